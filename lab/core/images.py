"""Images as uint8 tensors: the data sets of torchvision, and folders of your own.

A folder of your own is root/CLASS/*.png, or root/train/CLASS/*.png beside root/test/CLASS/*.png. Its classes are in
natural order: 1, 2, ..., 10. Images are read as RGB: turned upright (EXIF), 16 bits scaled to 8, transparency laid over
white.
"""
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from edm_unet import BadInput, data_name
from train_teacher import TORCHVISION, load_known

TRAIN, HELD_OUT = ("train", "training"), ("test", "testing", "val", "valid", "validation")  # folders of split data sets
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".pgm", ".ppm")
EXPECTED = "expected are class folders that hold images: root/CLASS/*.png, or root/train/CLASS/*.png beside root/test"


def to_uint8(x):
    """Images in [-1, 1] as uint8: the form in which judges get real and generated images."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def load_images(data, data_dir, size, train):
    """(images uint8 (N, C, H, W), labels int64 (N,), class names), to train on or held out.

    size: height and width to which the images of a folder are resized, or None. BadInput where images cannot be read.
    """
    if data in TORCHVISION:
        return load_known(data, data_dir, train)
    return load_folder(Path(data), size, train)


def class_counts(labels, classes):
    """[class name, number of its images] of each label."""
    counts = torch.bincount(labels.cpu(), minlength=len(classes)).tolist()
    return [[name, count] for name, count in zip(classes, counts)]


# --------------------------------------------------------------------------------------------------------- one image

def read_image(path):
    """(RGB image, whether some of it is transparent). BadInput for a file that cannot be read as an image."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise BadInput(f"{path} is no regular file")
        with Image.open(path) as image:
            return to_rgb(image, path)
    except (BadInput, MemoryError):
        raise
    except Image.DecompressionBombError as e:
        raise BadInput(f"{path} has too many pixels: {e}") from e
    except Exception as e:  # a damaged image can raise anything, and is refused whatever it raises
        if isinstance(e, OSError) and e.strerror:
            raise BadInput(f"{path} cannot be read: {e.strerror}") from e
        raise BadInput(f"{path} is damaged or no image ({type(e).__name__}: {e})") from e


def to_rgb(image, path):
    """(RGB image, whether some of it is transparent) of an image of any kind.

    Images of 32-bit numbers have no known range: BadInput, except for the formats that store 16 bits in them.
    """
    has_16_bits = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")
    if image.mode in ("I", "F") and not has_16_bits:
        raise BadInput(f"{path} has numbers of unknown range for pixels (mode {image.mode}, {image.format}): "
                       "save it with 8 or 16 bits")
    image = ImageOps.exif_transpose(image)
    if has_16_bits:
        pixels = np.asarray(image).astype(np.int64)
        grey = ((pixels + 128) // 257).astype(np.uint8)
        opaque = np.where(pixels == image.info.get("transparency", -1), 0, 255).astype(np.uint8)
        image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(opaque)])
    if not image.has_transparency_data:
        return image.convert("RGB"), False
    image = image.convert("RGBA")
    over_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return over_white.convert("RGB"), image.getchannel("A").getextrema()[0] < 255


# ----------------------------------------------------------------------------------------------- a folder of your own

def natural(path):
    """A key that sorts names as people do: 2 before 10."""
    parts = re.split(r"([0-9]+)", path.name)
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(parts)], path.name


def is_hidden(path):
    return path.name.startswith(".") or path.name in ("__MACOSX", "@eaDir")


def listing(folder):
    """(folders, images, everything else) in a folder, each in natural order. Hidden files are everything else."""
    folders, images, other = [], [], []
    for path in sorted(folder.iterdir(), key=natural):
        if is_hidden(path):
            other.append(path)
        elif path.is_dir():
            folders.append(path)
        elif path.suffix.lower() in ENDINGS:
            images.append(path)
        else:
            other.append(path)
    return folders, images, other


def class_folders(root):
    """({class name: paths of its images}, paths that are left out) of a folder of class folders. BadInput for others.
    """
    found = {}
    try:
        folders, images, other = listing(root)
        left_out = images + other
        for folder in folders:
            inner, found[folder.name], other = listing(folder)
            left_out += other
            if inner:
                names = ", ".join(path.name for path in inner[:3])
                hint = f"; perhaps --data {folder}" if len(folders) == 1 else ""
                raise BadInput(f"{folder} holds folders ({names}); {EXPECTED}{hint}")
            if not found[folder.name]:
                raise BadInput(f"{folder} holds no image ({' '.join(ENDINGS)}); {EXPECTED}")
    except OSError as e:
        raise BadInput(f"{root}: no data set of that name, and no folder of class folders: {e.strerror}") from e
    if not folders:
        raise BadInput(f"{root} is no folder of class folders; {EXPECTED}")
    return found, left_out


def split(root):
    """(the folder to train on, the one that is held out) where `root` holds both, else (root, None)."""
    if not root.is_dir():
        return root, None
    folders = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    train = [folders[name] for name in TRAIN if name in folders]
    held_out = [folders[name] for name in HELD_OUT if name in folders]
    return (train[0], held_out[0]) if train and held_out else (root, None)


def note_left_out(root, paths):
    """Print the paths in a data set's folder that were not read: hidden ones by name, others by number."""
    hidden = [path.name for path in paths if is_hidden(path)]
    others = [path for path in paths if not is_hidden(path)]
    words = hidden[:5]
    if len(hidden) > 5:
        words.append(f"{len(hidden) - 5} more that are hidden")
    if others:
        endings = sorted({path.suffix or path.name for path in others})
        words.append(f"{len(others)} files that are no images of a class ({' '.join(endings[:8])})")
    print(f"note: left out of {root}: {', '.join(words)}")


def image_paths(root, train):
    """({class name: paths of its images}, paths that are left out), to train on or held out.

    Held out is root/test beside root/train where both exist, else every tenth image of each class, from the first.
    """
    folder, held_out = split(root)
    found, left_out = class_folders(folder)
    if held_out is None:
        paths = {}
        for name, images in found.items():
            paths[name] = [path for i, path in enumerate(images) if (i % 10 > 0) == train]
    else:
        test, left_out_of_test = class_folders(held_out)
        if test.keys() != found.keys():
            raise BadInput(f"{folder} and {held_out} do not hold the same class folders: "
                           f"{', '.join(sorted(test.keys() ^ found.keys()))} is in one of them")
        paths = found if train else {name: test[name] for name in found}
        left_out += left_out_of_test + [path for path in sorted(root.iterdir()) if path not in (folder, held_out)]
    if len(found) < 2:
        raise BadInput(f"{root} has one class; a label-conditional teacher needs at least two")
    if not all(paths.values()):
        raise BadInput(f"{root}: at least two images of each class are needed, one of them to hold out")
    return paths, left_out


def load_folder(root, size, train):
    """`load_images` for a folder of your own. One image at a time is held in its full size."""
    paths, left_out = image_paths(root, train)
    if left_out and train:
        note_left_out(root, left_out)
    images, labels, transparent = [], [], 0
    for label, paths_of_class in enumerate(paths.values()):
        for path in paths_of_class:
            image, is_transparent = read_image(path)
            if size:
                image = image.resize((size, size), Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()   # (3, H, W)
            if images and pixels.shape != images[0].shape:
                first = (images[0].shape[2], images[0].shape[1])
                raise BadInput(f"{root} mixes image sizes ({first} and, in {path}, {image.size}): say --size")
            images.append(pixels)
            labels.append(label)
            if is_transparent:
                transparent += 1
    if images[0].shape[1] != images[0].shape[2]:
        raise BadInput(f"{root}: images of {image.size} are not square: say --size")
    if transparent and train:
        print(f"note: {transparent} images are transparent in places, which become white")
    return torch.stack(images), torch.tensor(labels), list(paths)


def misfit(data, classes, shape, size):
    """How the folder `data`, read at `size`, differs from the images of a network with these classes and this shape.

    Empty where they fit, or where there is no such folder.
    """
    if data in TORCHVISION or not Path(data).is_dir():
        return ""
    found, _ = class_folders(split(Path(data))[0])
    if list(found) != list(classes):
        return f"knows the classes {' '.join(classes)}, and {data} holds {' '.join(found)}"
    width, height = (size, size) if size else read_image(next(iter(found.values()))[0])[0].size
    if shape == (3, height, width):
        return ""
    return f"draws images of {'x'.join(str(n) for n in shape)}, and {data} holds 3x{height}x{width}"
