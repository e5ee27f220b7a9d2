"""A one-step generator without a weight that ever drew the forgotten class, and without real images.

    python -m lab.clean runs/mnist-forget0-to1

1. The generator of the run draws images: of the labels to keep, and of the override under the label to forget.
2. A fresh network learns to denoise these images, as in train_teacher.py: teacher.pt.
3. Plain SiD makes a one-step generator of this network: generator.pt, which is evaluated.

The weights of step 2 are saved in fresh.pt too, as a start for SFD from the true teacher:

    python sfd_minimal.py --forget 0 --to 1 --init-from runs/mnist-forget0-to1-clean/fresh.pt --steps 1000

After Distillation Robustifies Unlearning (Lee et al., NeurIPS 2025, for language models).
"""
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import sfd_minimal
import train_teacher
from edm_unet import BadInput, EDMPrecond, command, has_fast_bf16, machine, pack, pick_device, save_file
from lab.core.files import in_folder, load_teacher
from lab.core.options import parse, setting
from lab.core.runs import Run, RunSettings, seed_everything
from lab.distill import Settings as DistillSettings
from lab.distill import recipe, train
from lab.evaluate.draw import draw_images, load_generator
from lab.evaluate.evaluator import Evaluator


@dataclass
class Settings(RunSettings):
    run: str = setting("", "folder of a run of sfd_minimal.py, or a generator's file", positional=True, trains=False)
    images: int = setting(60_000, "images that the generator of the run draws", above=0)
    teacher_steps: int = setting(3000, "steps of the fresh network", above=0)
    steps: int = setting(1000, "steps of plain SiD", above=0)


def drawn_images(path, info, images, seed, device):
    """`images` images uint8 of the generator at `path`, about as many under each label, and their labels (N,)."""
    generate, network, _ = load_generator(path, device)
    labels = torch.arange(images) % len(info["classes"])
    return draw_images(generate, labels, network, seed, progress="drawing images"), labels


def train_fresh(s, net, images, labels, info, device):
    """A network of the shape `net` with fresh weights, trained on images. Saves teacher.pt and fresh.pt."""
    settings = train_teacher.Settings(steps=s.teacher_steps, seed=s.seed)
    seed_everything(s.seed)
    network = EDMPrecond(net).to(device)
    network.bf16 = has_fast_bf16(device)
    parts = train_teacher.begin(network, settings.lr)
    run = Run(replace(s, out=str(Path(s.out) / "teacher"), steps=s.teacher_steps), parts, {"from": info["sha256"]})
    images, labels = images.to(device), labels.to(device)
    batches = train_teacher.batches(images, labels, settings.batch, flip=False)
    data = ((x, network.conditions[k]) for x, k in batches)
    for terms in run.steps(train_teacher.train(settings, data, **parts, first=run.step)):
        if run.step % 100 == 0:
            run.log(terms)
    content = {"data": info["data"], "classes": info["classes"], "size": info.get("size"), "seconds": run.seconds,
               "machine": machine(device), "made_by": asdict(settings) | {"images_of": info["sha256"]}}
    weights = pack(parts["average"])
    save_file(Path(s.out) / "teacher.pt", {**content, **weights})
    save_file(Path(s.out) / "fresh.pt", {**content, **weights, "fake": weights["weights"],
                                         "sigma_init": info["sigma_init"]})


def main(argv):
    s = parse(Settings, argv, __doc__)
    device = pick_device(s.device)
    path = in_folder(s.run, "generator.pt")
    _, generator, info = load_generator(path, device)
    if not info.get("forget") or "sigma_init" not in info:
        raise BadInput(f"{path} is no one-step generator that has forgotten a label")
    s.out = s.out or f"{path.parent}-clean"
    out = Path(s.out)
    if out.exists() and not s.resume:
        raise BadInput(f"{out} is there already: --resume goes on with it, --out names another folder")
    if not (out / "fresh.pt").exists():
        images, labels = drawn_images(path, info, s.images, s.seed, device)
        train_fresh(s, generator.settings, images, labels, info, device)

    fresh, fresh_info = load_teacher(str(out / "teacher.pt"), info["data"], device)
    K, data = len(info["classes"]), info["data"]
    forget, to = [str(k) for k in info["forget"]], ["random" if k < 0 else str(k) for k in info["to"]]
    rates = {name: value for name, value in recipe(data).items() if name in ("lr", "lr_fake")}
    settings = DistillSettings(**rates, data=data, forget=tuple(forget), to=tuple(to), steps=s.steps, seed=s.seed,
                               device=s.device, out=str(out / "sid"), save_every=s.save_every, resume=s.resume)
    labels = torch.arange(K), fresh.conditions  # nothing is forgotten: the fresh network draws the override already
    generator, content = train(settings, fresh, fresh_info, info["forget"], info["to"], labels)
    content["seconds"] += fresh_info["seconds"]
    save_file(out / "generator.pt", {**content, **pack(generator)})
    teacher, teacher_info = load_teacher(info["settings"]["teacher"], data, device)
    Evaluator(teacher, teacher_info, info["forget"], info["to"]).evaluate(out, generator, content)


if __name__ == "__main__":
    command(main)
