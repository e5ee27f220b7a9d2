"""Draw images from a one-step generator or a teacher.

    python -m lab.sample runs/mnist-forget0-to1/generator.pt --label 0 --n 64 --out zeros.png

A folder gets a picture for each image, and takes any number of images. All images of one file must fit into memory.
"""
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from edm_unet import BadInput, command, pick_device
from lab.core.files import in_folder
from lab.core.labels import label_name
from lab.core.options import parse, setting
from lab.evaluate.draw import draw_parts, load_generator
from lab.evaluate.figures import tile, to_picture
from sfd_minimal import label_number

ICONS = ("ICO", "ICNS")  # formats with sizes of their own, to which a picture is shrunk


def output_form(out):
    """"npz", "picture" or "folder": what to write to the path `out`.

    BadInput where `out` is there already, or its ending is neither .npz nor that of a picture.
    """
    ending = out.suffix.lower()
    if out.is_dir() and any(out.iterdir()):
        raise BadInput(f"{out} is not empty: its files would be taken for images of this network")
    if out.is_dir() or not ending:
        form = "folder"
    elif ending == ".npz":
        form = "npz"
    elif picture_format(out) in Image.SAVE and picture_format(out) not in ICONS:
        form = "picture"
    else:
        raise BadInput(f"{out}: {ending} is neither .npz nor the ending of a picture of any size; the name of a folder "
                       "has none")
    if out.is_file():
        raise BadInput(f"{out} is there already: name another --out")
    return form


def picture_format(out):
    """PIL's name of the format that the ending of `out` stands for, or None."""
    return Image.registered_extensions().get(out.suffix.lower())


def check_picture(out, n, shape):
    """Raise BadInput where n images (C, H, W) are too large a picture for the format of `out`.

    A WebP, for example, has at most 16,383 pixels on each side. A blank picture is written to memory to find out.
    """
    channels, height, width = shape
    rows = square_rows(n)
    size = (n // rows * width, rows * height)
    try:
        blank = Image.new("L" if channels == 1 else "RGB", size)
        blank.save(io.BytesIO(), picture_format(out))
    except MemoryError:
        raise
    except Exception as e:  # formats refuse in many ways
        raise BadInput(f"{out} cannot be a picture of {size[0]}x{size[1]} pixels ({e}). A folder gets a picture for "
                       "each image") from e


def write_images(images, labels, out, form, **more):
    """Write images uint8 (C, H, W) and their labels (N,). A file is written whole or not at all.

    images: an iterable of N images. Those of a folder are written one by one.
    more: arrays that go into an .npz as well. BadInput where `out` cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if form == "folder":
            write_folder(images, labels, out)
        else:
            write_file(images, labels, out, form, more)
    except OSError as e:
        raise BadInput(f"cannot write to {out}: {e.strerror or e}") from e


def write_folder(images, labels, out):
    out.mkdir(exist_ok=True)
    for i, (image, k) in enumerate(zip(images, labels.tolist())):
        to_picture(tile(image[None], 1)).save(out / f"{i:06d}-label{k}.png")


def write_file(images, labels, out, form, more):
    images = torch.stack(list(images))
    partial = out.with_name(f".partial-{out.name}")  # keeps the ending, by which PIL knows what to write
    try:
        if form == "npz":
            with open(partial, "wb") as f:
                np.savez_compressed(f, images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy(), **more)
        else:
            to_picture(tile(images, square_rows(len(images)))).save(partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def square_rows(n):
    """Number of rows of a picture of n images: the largest divisor of n up to its root."""
    return max(rows for rows in range(1, int(n ** 0.5) + 1) if n % rows == 0)


@dataclass
class Settings:
    file: str = setting("", "the network: a generator.pt, the folder of a run, or a teacher", positional=True)
    out: str = setting("", "a .npz file, a picture (.png, .jpg, ...), or a folder for a picture each")
    label: tuple = setting(None, "labels to draw, by name or number, in equal shares; None is all")
    n: int = setting(100, "images to draw, in all", above=0)
    seed: int = setting(0, "random seed", at_least=0, below=2 ** 32)
    device: str = setting("auto", "auto, cpu, cuda or mps")


def main(argv):
    s = parse(Settings, argv, __doc__)
    if not s.out:
        raise BadInput("--out is required: a .npz file, a picture, or a folder")
    out = Path(s.out)
    form = output_form(out)
    generate, network, info = load_generator(in_folder(s.file, "generator.pt"), pick_device(s.device))
    if form == "picture":
        check_picture(out, s.n, network.shape)
    classes = info["classes"]
    chosen = torch.arange(len(classes))
    if s.label:
        chosen = torch.tensor([label_number(word, classes) for word in s.label])
    labels = chosen[torch.arange(s.n) * len(chosen) // s.n]
    parts = draw_parts(generate, labels, network, s.seed, progress="drawing")
    write_images((image for part in parts for image in part), labels, out, form)
    counts = zip(*(v.tolist() for v in labels.unique(return_counts=True)))
    print(f"{s.n} images in {out}: {', '.join(f'{n} of {label_name(k, classes)}' for k, n in counts)}")


if __name__ == "__main__":
    command(main)
