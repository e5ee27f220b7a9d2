"""Images out: draw from a one-step generator or a teacher.

    python -m lab.sample runs/mnist-forget0-to1/generator.pt --label 0 --n 64 --out zeros.png
"""
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from edm_unet import heun
from lab import prompts
from lab.checkpoint import in_folder, load_checkpoint
from lab.cli import check_ranges, command, parse, setting
from lab.data import to_uint8
from lab.device import pick_device
from lab.errors import BadInput
from lab.figures import tile, to_picture
from lab.labels import label_number, named

TEACHER_STEPS = 18
TEACHER_NFE = 2 * TEACHER_STEPS - 1


def one_step(generator, sigma_init):
    """generate(z, c) -> images: the generator's one evaluation."""
    def generate(z, c):
        sigma = torch.full((len(z),) + (1,) * (z.ndim - 1), sigma_init, device=z.device)
        return generator(sigma * z, sigma, c)
    return generate


def many_step(teacher):
    """generate(z, c) -> images: the teacher's 35 evaluations."""
    return lambda z, c: heun(teacher, z, c, TEACHER_STEPS)


def chain(network, sigma_init=None):
    """generate(z, c) -> images, as the network draws: in one evaluation at sigma_init, where it has one."""
    return many_step(network) if sigma_init is None else one_step(network, sigma_init)


def load_generator(path, device):
    """(generate(z, c) -> images, network, its file's other entries and "nfe", the evaluations per image) of a
    one-step generator's file, or of a teacher's."""
    network, info = load_checkpoint(path, device)
    sigma_init = info.get("sigma_init")
    return chain(network, sigma_init), network, info | {"nfe": TEACHER_NFE if sigma_init is None else 1}


@contextlib.contextmanager
def in_float32(network):
    """Every network is judged in float32, on machines with and without fast bfloat16 alike."""
    fast, network.bf16 = getattr(network, "bf16", False), False
    try:
        yield
    finally:
        network.bf16 = fast


@torch.no_grad()
def draw(generate, labels, network, seed, batch=250, progress=None, conditions=None):
    """Images uint8 (N, C, H, W) under labels (N,), or of the rows (N,) of other `conditions` than the network's, from z
    that a seed fixes on every device: the j-th image of a label has the same z, whatever else is drawn beside it."""
    z = torch.empty(len(labels), *network.shape)
    for k in labels.unique().tolist():
        rng = torch.Generator().manual_seed(10_000 * seed + k)
        z[labels == k] = torch.randn(int((labels == k).sum()), *network.shape, generator=rng)
    c, images = network.conditions if conditions is None else conditions.to(network.conditions.device), []
    for part, k in tqdm(list(zip(z.split(batch), labels.split(batch))), desc=progress, disable=not progress,
                        leave=False):
        images.append(to_uint8(generate(part.to(c.device), c[k.to(c.device)])).cpu())
    return torch.cat(images)


@dataclass
class Settings:
    sample: str = setting("", "the file to draw from: a generator.pt or a run's folder, or a teacher", positional=True)
    out: str = setting("", "a .npz file, a picture (.png, .jpg, ...), or a folder for a picture each")
    label: tuple = setting(None, "labels to draw, in equal shares (None: all)")
    prompt: tuple = setting(None, "prompts to draw, in equal shares, each in quotes: of a network that reads them")
    n: int = setting(100, "images to draw, in all", above=0)
    seed: int = setting(0, "random seed", at_least=0, below=2 ** 32)
    overwrite: bool = setting(False, "replace the file of that name")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    __post_init__ = check_ranges


def form_of(out):
    """"npz", "picture" or "folder": what to write to the path `out`. BadInput for an ending that is none of them."""
    ending = out.suffix.lower()
    if out.is_dir() or not ending:
        return "folder"
    if ending != ".npz" and Image.registered_extensions().get(ending) not in Image.SAVE:
        raise BadInput(f"{out}: {ending} is neither .npz nor a picture's ending; a folder's name has none")
    return "npz" if ending == ".npz" else "picture"


def write(images, labels, out, form, **more):
    """A file appears whole or not at all, beside which the old one stays what it was; `more` goes into an .npz."""
    if form == "folder":
        out.mkdir(exist_ok=True)
        for i, (image, k) in enumerate(zip(images, labels.tolist())):
            to_picture(tile(image[None], 1)).save(out / f"{i:06d}-label{k}.png")
        return
    partial, n = out.with_name(f".partial-{out.name}"), len(images)  # the ending says what is written
    try:
        if form == "npz":
            with open(partial, "wb") as f:
                np.savez_compressed(f, images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy(),
                                    **more)
        else:
            to_picture(tile(images, max(r for r in range(1, int(n ** 0.5) + 1) if n % r == 0))).save(partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def main(argv):
    s = parse(Settings, argv, __doc__)
    if not s.out:
        raise BadInput("drawing needs --out: a .npz file, a picture, or a folder")
    out = Path(s.out)
    form = form_of(out)
    if form == "folder" and out.is_dir() and any(out.iterdir()):
        raise BadInput(f"{out} is not empty: what lies there would be taken for images of this network")
    if form != "folder" and out.exists() and not s.overwrite:
        raise BadInput(f"{out} is there already: say --overwrite to replace it, or another --out")
    generate, network, info = load_generator(in_folder(s.sample, "generator.pt"), pick_device(s.device))
    reads, conditions, more = info["data"] == "prompts", None, {}
    if bool(s.prompt) != reads or s.label and reads:
        raise BadInput(f"{s.sample} is asked with {'prompts, like --prompt' if reads else 'labels, not with prompts'}"
                       + (f' "{prompts.TEMPLATES[0].format(colour="red", digit="zero")}"' if reads else ""))
    if reads:
        classes, conditions = list(s.prompt), prompts.tokens(s.prompt, network.settings.words)
        asked, more = torch.arange(len(classes)), {"prompts": classes}
    else:
        classes = info["classes"]
        asked = torch.tensor([label_number(k, classes) for k in s.label] if s.label else range(len(classes)))
    labels = asked[torch.arange(s.n) * len(asked) // s.n]
    images = draw(generate, labels, network, s.seed, progress="drawing", conditions=conditions)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write(images, labels, out, form, **more)
    except OSError as e:
        raise BadInput(f"cannot write to {out}: {e.strerror or e}") from e
    called = (lambda k: repr(classes[k])) if reads else lambda k: named(k, classes)
    drawn = [f"{n} of {called(k)}" for k, n in zip(*(v.tolist() for v in labels.unique(return_counts=True)))]
    path = in_folder(s.sample, "generator.pt")
    print(f"{s.n} images in {out}: {', '.join(drawn)}\nnext: " + (
        f"python -m lab.evaluate {path.parent}" if (path.parent / "checkpoint.pt").exists() and "sigma_init" in info
        else f"python sfd_minimal.py --data {info['data']} --forget {'zero --to one' if reads else '0 --to 1'}"))


if __name__ == "__main__":
    command(main)
