"""Train the judges of a data set: two classifiers, with which runs are evaluated.

    python -m lab.judge --data mnist    # both judges: runs/mnist-judge/judge.pt and runs/mnist-judge2/judge.pt

The file of the first judge also holds the statistics of real images that the Frechet distance needs. An evaluation
needs no images.
"""
import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import torch
from torch.nn import functional as F

from edm_unet import (BadInput, RunFailed, command, command_line, has_fast_bf16, machine, pick_device,
                      save_file)
from lab.core.files import image_size
from lab.core.images import class_counts, data_name, load_images
from lab.core.options import check_ranges, comparable, given_options, setting
from lab.core.runs import Run, RunSettings, seed_everything
from lab.evaluate.judges import Judge, class_stats
from train_teacher import TORCHVISION, mirror, to_float


# ---------------------------------------------------------------------------------------------------------- the images

def epoch_batch(images, labels, batch, step, flip):
    """Batch number `step` of (images in [-1, 1], labels). Each image comes once in an epoch.

    flip: each image is mirrored in every second epoch.
    """
    epoch, i = divmod(step, max(1, len(images) // batch))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
    i = order[i * batch:(i + 1) * batch].to(images.device)
    x = to_float(images[i])
    return mirror(x, (i + epoch) % 2 == 0) if flip else x, labels[i]


def jitter(x, progress):
    """Shift, rotate and scale drawings a little, at random. Outside of a drawing is black."""
    n = len(x)
    angle, scale = (torch.rand(2, n, device=x.device) - 0.5) * torch.tensor([[0.4], [0.2]], device=x.device)
    shift = (torch.rand(n, 2, device=x.device) - 0.5) * 0.3
    cos, sin = angle.cos() * (1 + scale), angle.sin() * (1 + scale)
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    return F.grid_sample(x + 1, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False) - 1


def shift_and_hide(x, progress):
    """Shift photographs by up to 2 pixels and lay a grey square of a quarter of the side over them.

    progress: share of the run that is done. Images are at 6, then 7, then 8 eighths of their size, for a third of the
    run each, because small images are cheap to learn from.
    """
    n, side = len(x), x.shape[2] * (6 + int(3 * progress)) // 8
    if side < x.shape[2]:
        x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
    windows = F.pad(x, (2, 2, 2, 2), mode="reflect").unfold(2, side, 1).unfold(3, side, 1)  # (B, C, 5, 5, side, side)
    down, right = torch.randint(5, (2, n), device=x.device)
    x = windows[torch.arange(n, device=x.device), :, down, right]
    i = torch.arange(side, device=x.device)
    row, column = ((i - centre).abs() <= side // 8 for centre in torch.randint(side, (2, n, 1), device=x.device))
    return x.masked_fill((row[:, :, None] & column[:, None, :])[:, None], 0.0)


def whitening(x, side=2):
    """Filters (2 C side^2, C, side, side) with uncorrelated answers of equal size to patches of x (B, C, H, W).

    The second half of the filters are the negatives of the first.
    """
    patches = F.unfold(x.cpu(), side).transpose(1, 2).flatten(0, 1)  # not every device has eigh
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + 2e-3).sqrt()).T.unflatten(1, (x.shape[1], side, side))
    return torch.cat([filters, -filters])


# -------------------------------------------------------------------------------------------------------- the settings

@dataclass
class Settings(RunSettings):
    data: str = setting("mnist", "mnist, fashion_mnist, cifar10, or a folder of class folders", trains=False)
    data_dir: str = setting("data", "where torchvision keeps or downloads the data set", trains=False)
    size: int = setting(None, "resize a folder's images to this height and width; None is that of its teacher",
                        above=0)
    steps: int = setting(4000, "optimizer steps; photographs take 4290", above=0)
    batch: int = setting(128, "images per step, two at least for batch norm; photographs take 256", at_least=2)
    lr: float = setting(4e-3, "largest learning rate, between warm-up and decay to zero; photographs take 0.1", above=0)


@dataclass(frozen=True)
class Recipe:
    """How both judges of a kind of images are trained."""
    networks: tuple      # settings of the first and of the second `Judge`
    augment: Callable    # augment(x, progress) -> x
    mirror: bool
    optimizer: Callable
    schedule: dict       # of torch's OneCycleLR
    settings: dict       # differences from the Settings above


DRAWINGS = Recipe(networks=(dict(arch="cnn", width=16), dict(arch="resnet", width=16, stem_stride=2)), augment=jitter,
                  mirror=False, optimizer=torch.optim.Adam, schedule={}, settings={})
PHOTOGRAPHS = Recipe(networks=(dict(arch="resnet9", width=64, feature_layers=12),  # after two of three blocks
                               dict(arch="resnet", width=48, stem_stride=2)),
                     augment=shift_and_hide, mirror=True,
                     optimizer=partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=1.5e-3),
                     schedule=dict(pct_start=0.25, anneal_strategy="linear", cycle_momentum=False),
                     settings=dict(steps=4290, batch=256, lr=0.1))
RECIPES = {"mnist": DRAWINGS, "fashion_mnist": DRAWINGS, "cifar10": PHOTOGRAPHS}  # own images: PHOTOGRAPHS


# -------------------------------------------------------------------------------------------------------- the training

def train(s, recipe, images, labels, judge, optimizer, schedule, first=0):
    """Yield the loss of each step from number `first` on."""
    bf16 = has_fast_bf16(images.device)
    for step in range(first, s.steps):
        judge.train()
        x, c = epoch_batch(images, labels, s.batch, step, recipe.mirror)
        x = recipe.augment(x, step / s.steps).contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            logits, _ = judge(x)
        loss = F.cross_entropy(logits.float(), c)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield {"loss": loss.detach()}


def train_judge(s, recipe, number, training, held_out, classes, device):
    """Train judge number 0 or 1 and save it. training, held_out: (images uint8, labels)."""
    images, labels = (part.to(device) for part in training)
    network = recipe.networks[number]
    try:
        judge = Judge(**network, mirror=recipe.mirror, resolution=images.shape[2], channels=images.shape[1],
                      num_classes=len(classes))
    except ValueError as e:
        raise BadInput(f"{e}: another --size may help") from e
    judge = judge.to(device, memory_format=torch.channels_last)
    if network["arch"] == "resnet9":
        judge.trunk[0].weight.data.copy_(whitening(to_float(images[torch.randperm(len(images))[:5000]])))
    optimizer = recipe.optimizer(judge.parameters(), lr=s.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.lr, total_steps=s.steps + 1, **recipe.schedule)
    state = {"judge": judge, "optimizer": optimizer, "schedule": schedule}
    run = Run(s, state, pinned={"images": class_counts(labels, classes)})
    for loss in run.steps(train(s, recipe, images, labels, **state, first=run.step)):
        if run.step % 100 == 0:
            run.log(loss)
    save_judge(run, judge, (images, labels), held_out, classes, reference=number == 0)


def save_judge(run, judge, training, held_out, classes, reference):
    """Save a trained judge with its accuracy. reference: with the statistics of training and held-out images."""
    judge.half().float()  # the weights are stored in float16: measure those
    test = class_stats(judge, *held_out, keep=0)
    accuracy = test["confusion"].diag().sum().item() / test["confusion"].sum().item()
    statistics = {"train": class_stats(judge, *training), "test": test} if reference else {}
    weights = {}
    for name, v in judge.state_dict().items():
        weights[name] = v.half().cpu() if v.is_floating_point() else v.cpu()
        if not weights[name].isfinite().all():
            raise RunFailed(f"{name} of the judge is not finite, or too large for float16")
    path, device = run.out / "judge.pt", next(judge.parameters()).device
    save_file(path, {"kind": "judge", "data": run.s.data, "classes": classes, "size": run.s.size,
                     "judge": judge.settings, "weights": weights, "accuracy": accuracy, **statistics,
                     "made_by": comparable(run.s), "machine": machine(device)})
    print(f"{path}: {accuracy:.2%} of {len(held_out[0])} held-out images are judged right, after {run.seconds:.0f} s")


# ---------------------------------------------------------------------------------------------------- the command line

def main(argv):
    given = given_options(Settings, argv, __doc__)
    recipe = RECIPES.get(given.get("data", Settings.data), PHOTOGRAPHS)
    s = Settings(**{**recipe.settings, **given})
    check_ranges(s)
    out = s.out or f"runs/{data_name(s.data)}-judge"
    if s.data in TORCHVISION and s.size:
        raise BadInput(f"--size is for folders of images; {s.data} has its own")
    if s.data not in TORCHVISION and Path(out).resolve().is_relative_to(Path(s.data).resolve()):
        raise BadInput(f"{out} is inside the images' folder: name another folder with --out")
    s.size = s.size or image_size(s.data, "teacher")
    device = pick_device(s.device)
    *training, classes = load_images(s.data, s.data_dir, s.size, train=True)
    *held_out, _ = load_images(s.data, s.data_dir, s.size, train=False)
    for number, folder in enumerate((out, f"{out}2")):
        seed_everything((s.seed + number) % 2 ** 32)
        train_judge(dataclasses.replace(s, out=folder), recipe, number, training, held_out, classes, device)
    print("next:", command_line("sfd_minimal.py", "--data", s.data, "--forget", "0", "--to", "1"))


if __name__ == "__main__":
    command(main)
