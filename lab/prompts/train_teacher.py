"""Train a teacher that reads prompts, on MNIST's digits in coloured ink.

    python -m lab.prompts.train_teacher    # -> runs/prompts-teacher/teacher.pt

The network, its text encoder included, is trained by train_teacher.py's loop, on batches of captions.
"""
from dataclasses import asdict, fields
from pathlib import Path

import torch

from edm_unet import (BadInput, Parser, Stopped, command, has_fast_bf16, heun_sampler, machine, pack, pick_device,
                      save_file, save_images)
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


def main(argv):
    a = parse(argv)
    s = Settings(**{f.name: getattr(a, f.name) for f in fields(Settings)})
    device, out = pick_device(a.device), Path(a.out)
    images, labels, classes = load_known("mnist", a.data_dir)
    if out.exists() and not a.resume:
        raise BadInput(f"{out} is there already: --resume goes on with it, --out names another folder")
    out.mkdir(parents=True, exist_ok=True)

    seed_everything(s.seed)
    network = PromptDenoiser(NET).to(device)
    if a.init_from:
        start, _ = load_prompt_teacher(a.init_from, device)
        if start.settings != NET:
            raise BadInput(f"{a.init_from} has another network than this run, {NET}")
        network.load_state_dict(start.state_dict())
    network.bf16 = has_fast_bf16(device)
    data = batches(images.to(device), labels.to(device), s.batch, WORDS)
    size = sum(p.numel() for p in network.parameters()) / 1e6
    print(f"{size:.2f} M parameters on {device.type}, {s.steps} steps of {s.batch}, writing to {out}")
    fixed = {**asdict(s), "images": class_counts(labels, classes), "init_from": a.init_from}
    parts = begin(network, s.lr)
    try:
        seconds = run(s, data, parts, out / "checkpoint.pt", fixed)
    except KeyboardInterrupt as e:
        raise Stopped from e

    teacher, path = parts["average"], out / "teacher.pt"
    made_by = {**asdict(s), "data": "prompts", "init_from": a.init_from}
    save_file(path, {"data": "prompts", "classes": classes, "made_by": made_by, "machine": machine(device),
                     "seconds": seconds, **pack(teacher, half=True)})
    rows, conditions = grid(WORDS)
    z = torch.randn(len(rows), *teacher.shape, device=device)
    save_images(heun_sampler(teacher, z, conditions[rows].to(device)), 18, out / "samples.png")
    print(f"trained in {seconds:.0f} s: {path}, with samples.png beside it, a row for each digit\n"
          f"next: python -m lab.prompts --teacher {path} --forget zero --to one")


if __name__ == "__main__":
    command(main)
