"""Images in: the data sets that torchvision knows, and folders of class folders, as uint8 tensors in memory."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lab.errors import BadInput

KNOWN = ("mnist", "fashion_mnist", "cifar10")


def to_uint8(x):
    """Images in [-1, 1] as 8-bit ones: what a judge is shown, real and generated alike."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def to_float(images):
    """8-bit images in [-1, 1]."""
    return images.float() / 127.5 - 1


def recipe_of(data, table):
    """The data set's entry of a table of recipes; a folder of images has that of "images"."""
    return table.get(data, table["images"])


def load_images(data, data_dir, size, train):
    """(images uint8 (N, C, H, W), labels int64 (N,), class names), those to train on or those held out; `size`, if any,
    is what a folder's images are resized to. BadInput for what cannot be read."""
    from torchvision import datasets  # here: what reads no images can do without
    if data in KNOWN:
        kind = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[data]
        try:
            d = kind(data_dir, train=train, download=True)  # looks on the disk first
        except (RuntimeError, OSError) as e:
            raise BadInput(f"{data} is not in {data_dir} and could not be downloaded: {e}") from e
        images, labels = torch.as_tensor(np.asarray(d.data)), torch.as_tensor(d.targets)
        return ((images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)).contiguous(),
                labels, list(d.classes))
    return load_folder(Path(data), size, train)


def load_folder(root, size, train):
    """`load_images` for a folder of class folders.
    Held out is root/test beside root/train where they exist, else every tenth image."""
    from torchvision import datasets
    split = (root / "train").is_dir() and (root / "test").is_dir()
    try:
        folder = datasets.ImageFolder(root / ("train" if train else "test") if split else root)
    except OSError as e:
        raise BadInput(f"{root}: no data set of that name, "
                       f"and no folder of class folders with images in each: {e}") from e
    if split and datasets.folder.find_classes(root / "train") != datasets.folder.find_classes(root / "test"):
        raise BadInput(f"{root}: train and test do not hold the same class folders")
    if len(folder.classes) < 2:
        raise BadInput(f"{root} has one class; a label-conditional teacher needs at least two")
    images, labels, seen = [], [], [0] * len(folder.classes)
    for path, label in folder.samples:
        seen[label] += 1
        if not split and (seen[label] % 10 == 1) == train:  # the first, the eleventh, ... of each class are held out
            continue
        try:
            with Image.open(path) as image:
                image = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            raise BadInput(f"{path} cannot be read as an image: remove it") from e
        image = image.resize((size, size), Image.Resampling.LANCZOS) if size else image
        if images and image.size != images[0].size:
            raise BadInput(f"{root} mixes image sizes ({images[0].size} and, in {path}, {image.size}): say --size")
        images.append(image)
        labels.append(label)
    if len(set(labels)) < len(folder.classes):
        raise BadInput(f"{root}: at least two images of each class are needed, one of them to hold out")
    if images[0].width != images[0].height:
        raise BadInput(f"{root}: images of {images[0].size} are not square: say --size")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels), folder.classes


def mirror(x, which):
    """x (B, C, H, W), mirrored left to right where which (B,) is true."""
    return torch.where(which[:, None, None, None], x.flip(3), x)


def batches(images, labels, batch, flip):
    """Endless (image in [-1, 1], label) batches, drawn with replacement on the images' own device."""
    while True:
        i = torch.randint(len(images), (batch,), device=images.device)
        x = to_float(images[i])
        if flip:
            x = mirror(x, torch.rand(batch, device=images.device) < 0.5)
        yield x, labels[i]
