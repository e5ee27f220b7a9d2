"""Images in: the data sets that torchvision knows, and folders of one's own, as uint8 tensors in memory.

A folder of one's own is root/CLASS/*.png, or root/train/CLASS/*.png beside root/test/CLASS/*.png. Its classes are
numbered in natural order: 1, 2, ..., 10. Images are read as RGB: upright (EXIF), 16 bits scaled to 8, and what is
transparent laid over white.
"""
import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from lab.errors import BadInput

KNOWN = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10",  # and what torchvision calls them
         "prompts": "MNIST"}                                                      # in coloured ink: lab.prompts
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
TRAIN, HELD_OUT = ("train", "training"), ("test", "testing", "val", "valid", "validation")  # folders of split data sets
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".pgm", ".ppm")
EXPECTED = "expected are class folders that hold images: root/CLASS/*.png, or root/train/CLASS/*.png beside root/test"


# -------------------------------------------------------------------------------------------------- images as tensors

def to_uint8(x):
    """Images in [-1, 1] as 8-bit ones: what a judge is shown, real and generated alike."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def to_float(images):
    """8-bit images in [-1, 1]."""
    return images.float() / 127.5 - 1


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


# ------------------------------------------------------------------------------------------------------- which data set

def recipe_of(data, table):
    """The data set's entry of a table of recipes; a folder of images has that of "images"."""
    return table[data if data in KNOWN else "images"]


def data_name(data):
    """What files of a data set are called after: its name, or its folder's. No folder is taken for a known one."""
    name = Path(data).resolve().name
    return data if data in KNOWN else f"{name}-folder" if name in KNOWN else name


def class_names(data, K):
    """What to call the K labels of a network whose file does not say."""
    return CIFAR10 if data == "cifar10" and K == len(CIFAR10) else [str(k) for k in range(K)]


def load_images(data, data_dir, size, train):
    """(images uint8 (N, C, H, W), labels int64 (N,), class names), those to train on or those held out; `size`, if any,
    is what a folder's images are resized to. BadInput for what cannot be read."""
    return load_known(data, data_dir, train) if data in KNOWN else load_folder(Path(data), size, train)


def how_many(labels, classes):
    """[class name, its number of images] for each label: what a run that goes on must find again."""
    return [list(of) for of in zip(classes, torch.bincount(labels.cpu(), minlength=len(classes)).tolist())]


# -------------------------------------------------------------------------------------------- what torchvision knows

def load_known(data, data_dir, train):
    """`load_images` for one of KNOWN."""
    from torchvision import datasets  # here: what reads no images can do without
    kind = getattr(datasets, KNOWN[data])
    try:
        d = kind(data_dir, train=train, download=True)  # looks on the disk first
    except (RuntimeError, OSError, ValueError, IndexError, AssertionError) as e:  # as torchvision says it
        if broken := damaged(kind, data_dir):
            raise BadInput(f"{broken} is damaged, empty or cut short: remove it, and it is downloaded again") from e
        raise BadInput(f"{data} is not in {data_dir} and could not be downloaded: {e}") from e
    images, labels = torch.as_tensor(np.asarray(d.data)), torch.as_tensor(d.targets)
    return ((images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)).contiguous(), labels, list(d.classes))


def damaged(kind, data_dir):
    """The first file of a torchvision data set that is not what it should be; None if all that are there are."""
    from torchvision.datasets.utils import check_integrity
    if hasattr(kind, "train_list"):  # CIFAR-10: torchvision has the check sums of its files
        files = [(Path(data_dir) / kind.base_folder / name, md5) for name, md5 in kind.train_list + kind.test_list]
        return next((path for path, md5 in files if path.exists() and not check_integrity(path, md5)), None)
    for path in sorted((Path(data_dir) / kind.__name__ / "raw").glob("*-ubyte")):  # MNIST's: its head says the length
        content = path.read_bytes()
        head = 4 + 4 * (content[3] if len(content) > 3 else 0)
        sides = [int.from_bytes(content[i:i + 4], "big") for i in range(4, head, 4)]
        if not sides or len(content) != head + math.prod(sides):
            return path


# ------------------------------------------------------------------------------------------------ a folder of one's own

def natural(path):
    """A key that sorts names as people do: 2 before 10."""
    parts = re.split(r"([0-9]+)", path.name)
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(parts)], path.name


def listing(folder):
    """(folders, images, all else) in a folder, each in natural order; what is hidden is all else."""
    folders, images, other = [], [], []
    for path in sorted(folder.iterdir(), key=natural):
        hidden = path.name.startswith(".") or path.name in ("__MACOSX", "@eaDir")
        image = not path.is_dir() and path.suffix.lower() in ENDINGS
        (other if hidden or not (path.is_dir() or image) else images if image else folders).append(path)
    return folders, images, other


def class_folders(root):
    """({class name: paths of its images}, paths left out) of a folder of class folders. BadInput if it is none."""
    try:
        folders, images, other = listing(root)
        inside = [(folder, *listing(folder)) for folder in folders]
    except OSError as e:
        raise BadInput(f"{root}: no data set of that name, and no folder of class folders: {e.strerror}") from e
    for folder, inner, of_class, _ in inside:
        if inner:
            hint = f"; perhaps --data {folder}" if len(folders) == 1 else ""
            raise BadInput(f"{folder} holds folders ({', '.join(f.name for f in inner[:3])}); {EXPECTED}{hint}")
        if not of_class:
            raise BadInput(f"{folder} holds no image ({' '.join(ENDINGS)}); {EXPECTED}")
    if not folders:
        raise BadInput(f"{root} is no folder of class folders; {EXPECTED}")
    return ({folder.name: of_class for folder, _, of_class, _ in inside},
            images + other + [path for *_, others in inside for path in others])


def split(root):
    """(the folder to train on, the one that is held out) where `root` holds both; (root, None) where it does not."""
    names = {path.name.lower(): path for path in root.iterdir() if path.is_dir()} if root.is_dir() else {}
    train, held_out = (next((names[n] for n in of if n in names), None) for of in (TRAIN, HELD_OUT))
    return (train, held_out) if train and held_out else (root, None)


def left_out(root, paths):
    """A note of what is in a data set's folder and was not read: what is hidden by name, other files by number."""
    hidden = [path.name for path in paths if path.name.startswith((".", "__", "@"))]
    others = [path for path in paths if path.name not in hidden]
    endings = sorted({path.suffix or path.name for path in others})
    said = hidden[:5] + [f"{len(hidden) - 5} more that are hidden"] * (len(hidden) > 5)
    said += [f"{len(others)} files that are no images of a class ({' '.join(endings[:8])})"] * bool(others)
    return f"note: left out of {root}: {', '.join(said)}"


def read_image(path):
    """(RGB image, whether some of it is transparent). BadInput for what has no known range, or cannot be read."""
    try:
        with Image.open(path) as image:
            wide = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")
            if image.mode in ("I", "F") and not wide:
                raise BadInput(f"{path} has numbers of unknown range for pixels (mode {image.mode}, {image.format}): "
                               "save it with 8 or 16 bits")
            image = ImageOps.exif_transpose(image)
            if wide:
                pixels = np.asarray(image).astype(np.int64)
                opaque = pixels != image.info.get("transparency", -1)
                grey, alpha = ((pixels + 128) // 257).astype(np.uint8), (255 * opaque).astype(np.uint8)
                image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
            if not image.has_transparency_data:
                return image.convert("RGB"), False
            image = image.convert("RGBA")
            over = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return over.convert("RGB"), image.getchannel("A").getextrema()[0] < 255
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise BadInput(f"{path} cannot be read as an image: remove it") from e
    except ValueError as e:
        raise e if isinstance(e, BadInput) else BadInput(f"{path} cannot be read as an image: {e}") from e


def load_folder(root, size, train):
    """`load_images` for a folder of one's own. Held out is root/test beside root/train where they exist, else every
    tenth image of each class, from the first."""
    folder, held_out = split(root)
    found, other = class_folders(folder)
    if held_out:
        of_test, more = class_folders(held_out)
        if of_test.keys() != found.keys():
            raise BadInput(f"{folder} and {held_out} do not hold the same class folders: "
                           f"{', '.join(sorted(of_test.keys() ^ found.keys()))} is in one of them")
        other += more + [path for path in sorted(root.iterdir()) if path not in (folder, held_out)]
        paths = found if train else of_test
    else:
        paths = {name: [p for i, p in enumerate(of) if (i % 10 > 0) == train] for name, of in found.items()}
    if len(found) < 2:
        raise BadInput(f"{root} has one class; a label-conditional teacher needs at least two")
    if not all(paths.values()):
        raise BadInput(f"{root}: at least two images of each class are needed, one of them to hold out")
    if other and train:
        print(left_out(root, other))
    images, labels, transparent = [], [], 0
    for label, of_class in enumerate(paths.values()):
        for path in of_class:
            image, see_through = read_image(path)
            image = image.resize((size, size), Image.Resampling.LANCZOS) if size else image
            if images and image.size != images[0].size:
                raise BadInput(f"{root} mixes image sizes ({images[0].size} and, in {path}, {image.size}): say --size")
            images.append(image)
            labels.append(label)
            transparent += see_through
    if images[0].width != images[0].height:
        raise BadInput(f"{root}: images of {images[0].size} are not square: say --size")
    if transparent and train:
        print(f"note: {transparent} images are transparent in places, which become white")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels), list(found)


def misfit(data, classes, shape, size):
    """In words, that the folder `data`, read at `size`, holds other classes or images than a network of `classes` that
    draws `shape`; empty where it holds the same, or is not here to be asked."""
    if data in KNOWN or not Path(data).is_dir():
        return ""
    found, _ = class_folders(split(Path(data))[0])
    if list(found) != list(classes):
        return f"knows the classes {' '.join(classes)}, and {data} holds {' '.join(found)}"
    width, height = (size, size) if size else read_image(next(iter(found.values()))[0])[0].size
    return "" if shape == (3, height, width) else (
        f"draws images of {'x'.join(map(str, shape))}, and {data} holds 3x{height}x{width}")
