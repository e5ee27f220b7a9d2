"""Train a teacher that reads prompts, on MNIST's digits in coloured ink.

    python -m lab.prompts.train_teacher    # -> runs/prompts-teacher/teacher.pt

The network, its text encoder included, is trained by train_teacher.py's loop, on batches of captions.
"""
from dataclasses import asdict, fields

import torch

from edm_unet import (BadInput, Parser, Stopped, command, command_line, has_fast_bf16, heun_sampler, machine,
                      make_run_folder, pack, pick_device, save_file, save_images)
from lab.core.images import class_counts
from lab.core.runs import seed_everything
from lab.prompts.captions import WORDS, batches, grid
from lab.prompts.network import PromptDenoiser, PromptSettings, load_prompt_teacher
from train_teacher import Settings, begin, load_known, run

NET = PromptSettings(channels=3, patch=2, model_channels=32, channel_mult=(1, 2), num_blocks=1)  # as MNIST's teacher


def parse(argv):
    """The options of the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--data-dir", default="data", help="where torchvision keeps or downloads MNIST")
    parser.add_argument("--init-from", default="", help="start from the weights of this teacher")
    parser.add_argument("--out", default="runs/prompts-teacher", help="folder to write to (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    for f in fields(Settings):
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, default=f.default,
                            help="as in train_teacher.py (default: %(default)s)")
    return parser.parse_args(argv)


def write_results(out, teacher, content):
    """Write teacher.pt, in half precision, and samples.png, a row for each digit."""
    path, device = out / "teacher.pt", next(teacher.parameters()).device
    save_file(path, {**content, **pack(teacher, half=True)})
    rows, conditions = grid(WORDS)
    z = torch.randn(len(rows), *teacher.shape, device=device)
    save_images(heun_sampler(teacher, z, conditions[rows].to(device)), 18, out / "samples.png")
    print(f"trained in {content['seconds']:.0f} s: {path}, with samples.png beside it, a row for each digit\n"
          f"next: {command_line('-m', 'lab.prompts', '--teacher', path, '--forget', 'zero', '--to', 'one')}")


def main(argv):
    a = parse(argv)
    s = Settings(**{f.name: getattr(a, f.name) for f in fields(Settings)})
    device = pick_device(a.device)
    images, labels, classes = load_known("mnist", a.data_dir)

    seed_everything(s.seed)
    network, info = PromptDenoiser(NET).to(device), {}
    if a.init_from:
        start, info = load_prompt_teacher(a.init_from, device)
        if start.settings != NET:
            raise BadInput(f"{a.init_from} has another network than this run, {NET}")
        network.load_state_dict(start.state_dict())
    network.bf16 = has_fast_bf16(device)
    data = batches(images.to(device), labels.to(device), s.batch, WORDS)
    size = sum(p.numel() for p in network.parameters()) / 1e6
    fixed = {**asdict(s), "images": class_counts(labels, classes), "init_from": info.get("sha256", "")}
    parts = begin(network, s.lr)
    out = make_run_folder(a.out, a.resume)
    print(f"{size:.2f} M parameters on {device.type}, {s.steps} steps of {s.batch}, writing to {out}")
    content = {"data": "prompts", "classes": classes, "machine": machine(device),
               "made_by": {**asdict(s), "data": "prompts", "init_from": a.init_from}}
    try:
        content["seconds"] = run(s, data, parts, out / "checkpoint.pt", fixed)
        write_results(out, parts["average"], content)
    except KeyboardInterrupt as e:
        raise Stopped from e


if __name__ == "__main__":
    command(main)
