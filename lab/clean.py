"""One-step generators that have forgotten a class, from other weights than the teacher's.

    python -m lab.clean runs/mnist-forget0-to1                 # clean room
    python -m lab.clean runs/mnist-baselines-forget0-to1/esd   # unlearn, then distill
    python -m lab.clean teachers/mnist.pt --mixed 0.5          # a start for SFD

Clean room: no weight ever drew the class, and no real images are used.

1. The generator of the run draws images: of the labels to keep, and of the override under the label to forget.
2. A fresh network learns to denoise these images, as in train_teacher.py: teacher.pt.
3. Plain SiD makes a one-step generator of this network: generator.pt, which is evaluated.

The weights of step 2 are saved in fresh.pt too, as a start for SFD from the true teacher:

    python sfd_minimal.py --forget 0 --to 1 --init-from runs/mnist-forget0-to1-clean/fresh.pt --steps 1000

Unlearn, then distill: step 3 of a network of lab.baselines that has forgotten the class. The generator starts from the
weights of this network. --init-from names a fresh.pt to start from instead.

A start for SFD: with the share m of --mixed, the weights in start.pt are (1 - m) times the teacher's, and m times
fresh ones.

After Distillation Robustifies Unlearning (Lee et al., NeurIPS 2025, for language models).
"""
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import sfd_minimal
import train_teacher
from edm_unet import (BadInput, EDMPrecond, command, command_line, has_fast_bf16, machine, make_run_folder, pack,
                      pick_device, save_file)
from lab.core.files import in_folder, load_teacher
from lab.core.images import data_name
from lab.core.labels import run_folder
from lab.core.options import parse, setting
from lab.core.runs import Run, RunSettings, seed_everything
from lab.distill import Settings as DistillSettings
from lab.distill import recipe, train
from lab.evaluate.draw import draw_images, load_generator
from lab.evaluate.evaluator import Evaluator


@dataclass
class Settings(RunSettings):
    network: str = setting("", "file or folder of a run of sfd_minimal.py, or of a network of lab.baselines; with "
                           "--mixed, a teacher's file", positional=True, trains=False)
    images: int = setting(60_000, "clean room: images that the generator of the run draws", above=0)
    teacher_steps: int = setting(3000, "clean room: steps of the fresh network", above=0)
    steps: int = setting(1000, "steps of plain SiD", above=0)
    init_from: str = setting("", "start generator and fake score of plain SiD from this fresh.pt", trains=False)
    mixed: float = setting(0.0, "write a start for SFD, with this share of fresh weights", at_least=0, trains=False)


def drawn_images(path, info, images, seed, device):
    """`images` images uint8 of the generator at `path`, about as many under each label, and their labels (N,)."""
    generate, network, _ = load_generator(path, device)
    labels = torch.arange(images) % len(info["classes"])
    return draw_images(generate, labels, network, seed, progress="drawing images"), labels


def save_start(path, content, network, sigma_init):
    """Save a network as the start of generator and fake score, for --init-from. content: the file's other entries."""
    weights = pack(network)
    save_file(path, {**content, **weights, "fake": weights["weights"], "sigma_init": sigma_init})


def train_fresh(s, net, images, labels, info, device):
    """Train a network of the shape `net` with fresh weights on images. Saves teacher.pt and fresh.pt."""
    _, flip, preset = train_teacher.PRESETS.get(info["data"], train_teacher.PRESETS["own images"])
    settings = train_teacher.Settings(**{**preset, "steps": s.teacher_steps, "seed": s.seed})
    seed_everything(s.seed)
    network = EDMPrecond(net).to(device)
    network.bf16 = has_fast_bf16(device)
    parts = train_teacher.begin(network, settings.lr)
    run = Run(replace(s, out=str(Path(s.out) / "teacher"), steps=s.teacher_steps), parts, {"from": info["sha256"]})
    images, labels = images.to(device), labels.to(device)
    batches = train_teacher.batches(images, labels, settings.batch, flip)
    data = ((x, network.conditions[k]) for x, k in batches)
    for terms in run.steps(train_teacher.train(settings, data, **parts, first=run.step)):
        if run.step % 100 == 0:
            run.log(terms)
    content = {"data": info["data"], "classes": info["classes"], "size": info.get("size"), "seconds": run.seconds,
               "machine": machine(device), "made_by": asdict(settings) | {"images_of": info["sha256"]}}
    save_file(Path(s.out) / "teacher.pt", {**content, **pack(parts["average"])})
    save_start(Path(s.out) / "fresh.pt", content, parts["average"], info["sigma_init"])


def mix(s, teacher, info):
    """Mix the weights of a teacher with the share s.mixed of fresh ones. Saves start.pt."""
    if s.mixed > 1 or "sigma_init" in info:
        raise BadInput("--mixed takes a share, at most 1, and the file of a teacher")
    out = make_run_folder(s.out or run_folder(data_name(info["data"]), "mixed", s.mixed), s.resume)
    seed_everything(s.seed)
    fresh = EDMPrecond(teacher.settings).to(teacher.conditions.device)
    with torch.no_grad():
        for p, q in zip(teacher.parameters(), fresh.parameters()):
            p.lerp_(q, s.mixed)
    content = {"data": info["data"], "classes": info["classes"], "size": info.get("size"),
               "made_by": {"mixed": s.mixed, "seed": s.seed, "teacher": info["sha256"]}}
    save_start(out / "start.pt", content, teacher, sfd_minimal.Settings.sigma_init)
    print("next:", command_line("sfd_minimal.py", "--data", info["data"], "--forget", 0, "--to", 1, "--steps", s.steps,
                                "--init-from", out / "start.pt", "--out", out / "sfd"))


def distill(s, network, info, evaluator):
    """Make a one-step generator by plain SiD of a network that draws the override already. Evaluate it in s.out.

    info: entries of the network's file. evaluator: of the true teacher and the forgotten labels. The seconds of the
    result include those of the network.
    """
    out, data = Path(s.out), info["data"]
    forget, to = [str(k) for k in evaluator.c_f], ["random" if k < 0 else str(k) for k in evaluator.c_o]
    rates = {name: value for name, value in recipe(data).items() if name in ("lr", "lr_fake")}
    settings = DistillSettings(**rates, data=data, forget=tuple(forget), to=tuple(to), steps=s.steps, seed=s.seed,
                               init_from=s.init_from, device=s.device, out=str(out / "sid"), save_every=s.save_every,
                               resume=s.resume)
    labels = torch.arange(len(network.conditions)), network.conditions  # each label is its own override
    generator, content = train(settings, network, info, evaluator.c_f, evaluator.c_o, labels)
    content["seconds"] += info["seconds"]
    save_file(out / "generator.pt", {**content, **pack(generator)})
    evaluator.evaluate(out, generator, content)


def main(argv):
    s = parse(Settings, argv, __doc__)
    device = pick_device(s.device)
    path = in_folder(s.network, "generator.pt")
    _, network, info = load_generator(path, device)
    if s.mixed:
        return mix(s, network, info)
    if not info.get("forget"):
        raise BadInput(f"{path} has forgotten no label")
    s.out = s.out or f"{path.parent}-clean"
    out = Path(s.out)
    if out.exists() and not s.resume:
        raise BadInput(f"{out} is there already: --resume goes on with it, --out names another folder")
    teacher, teacher_info = load_teacher(info["settings"].get("teacher", ""), info["data"], device)
    evaluator = Evaluator(teacher, teacher_info, info["forget"], info["to"])
    if "sigma_init" in info:  # a one-step generator, and plain SiD needs a network for all noise levels
        if not (out / "fresh.pt").exists():
            images, labels = drawn_images(path, info, s.images, s.seed, device)
            train_fresh(s, network.settings, images, labels, info, device)
        network, info = load_teacher(str(out / "teacher.pt"), info["data"], device)
    distill(s, network, info, evaluator)


if __name__ == "__main__":
    command(main)
