"""Own images are read as they are, called by their folders' names, and never taken for another data set's."""
import os
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import sfd_minimal
import train_teacher
from conftest import CPU, ROOT, image_folder, save_network, tiny_network
from edm_unet import BadInput, load_network
from lab.core.files import find_weights, image_size, load_teacher
from lab.core.images import class_folders, data_name, load_images, misfit, read_image

TWELVE = [str(k) for k in range(1, 13)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------------------------ pixels as they are

WHITE, GREY, BLACK = (255, 255, 255), (128, 128, 128), (0, 0, 0)


def written(path, pixels, mode=None, **options):
    image = Image.fromarray(pixels, mode) if mode else Image.fromarray(pixels)
    image.save(path, **options)
    return path


@pytest.mark.parametrize("ending", [".png", ".tif", ".pgm"])
def test_sixteen_bits_keep_their_range(ending, tmp_path):
    wide = np.array([[0, 257, 128 * 257], [200 * 257, 65535, 257]], dtype=np.uint16)
    image, _ = read_image(written(tmp_path / f"wide{ending}", wide))
    assert np.array_equal(np.asarray(image)[..., 0], wide // 257) and image.mode == "RGB"


@pytest.mark.parametrize("pixels, mode", [(np.float32([[0.0, 1.0]]), "F"), (np.int32([[0, 70000]]), "I")])
def test_numbers_of_unknown_range_are_refused(pixels, mode, tmp_path):
    with pytest.raises(BadInput, match=f"numbers.tif .* range .*mode {mode}, TIFF"):
        read_image(written(tmp_path / "numbers.tif", pixels))


def test_transparency_is_laid_over_white(tmp_path):
    ink = np.zeros((2, 2, 4), np.uint8)
    ink[0, 0, 3], ink[0, 1, 3] = 255, 127  # black ink, half of it, none
    image, transparent = read_image(written(tmp_path / "ink.png", ink))
    assert transparent and [image.getpixel(at) for at in ((0, 0), (1, 0), (1, 1))] == [BLACK, GREY, WHITE]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert [read_image(tmp_path / "palette.png")[0].getpixel((x, 0)) for x in (0, 1)] == [WHITE, (0, 0, 255)]
    written(tmp_path / "grey.png", np.array([[0, 257]], dtype=np.uint16), transparency=0)
    assert [read_image(tmp_path / "grey.png")[0].getpixel((x, 0)) for x in (0, 1)] == [WHITE, (1, 1, 1)]
    assert not read_image(written(tmp_path / "opaque.png", np.full((2, 2, 4), 255, np.uint8)))[1]


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_a_photograph_is_turned_upright(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    path = written(tmp_path / "photo.jpg", pixels, exif=turned(6))  # the top of the scene is at the right of the pixels
    image, _ = read_image(path)
    assert image.size == (8, 16)
    with Image.open(path) as sideways:
        assert np.array_equal(np.asarray(image), np.asarray(sideways.rotate(-90, expand=True)))


@pytest.mark.parametrize("train", [True, False])
def test_pixels_labels_and_order_are_those_of_the_files(train, tmp_path):
    """Every tenth image of a class, from the first, is held out."""
    root = image_folder(tmp_path / "mine", TWELVE, 11, 8)
    images, labels, classes = load_images(root, "", None, train)
    numbers = [i for i in range(11) if (i % 10 > 0) == train]
    assert classes == TWELVE and labels.tolist() == [k for k in range(12) for _ in numbers]
    assert images.dtype == torch.uint8 and images.shape == (12 * len(numbers), 3, 8, 8) and images.is_contiguous()
    expected = []
    for name in TWELVE:
        for i in numbers:
            with Image.open(root / name / f"{i}.png") as image:
                expected.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert torch.equal(images, torch.stack(expected))


def test_images_of_any_size_are_resized_one_by_one(tmp_path, monkeypatch):
    """Memory holds the resized images, and one in its full size."""
    root = image_folder(image_folder(tmp_path / "mine", "a", 11, (40, 20)), "b", 11, 24)
    images, _, _ = load_images(root, "", 8, train=True)
    assert images.shape == (18, 3, 8, 8)
    with Image.open(root / "a" / "1.png") as image:
        expected = np.array(image.resize((8, 8), Image.Resampling.LANCZOS))
    assert torch.equal(images[0], torch.from_numpy(expected).permute(2, 0, 1))

    calls, resize = [], Image.Image.resize

    def counted(image, *args):
        calls.append("resized")
        return resize(image, *args)

    def read(path):
        calls.append("read")
        return read_image(path)

    monkeypatch.setattr(Image.Image, "resize", counted)
    monkeypatch.setattr("lab.core.images.read_image", read)
    load_images(root, "", 8, train=True)
    assert calls == ["read", "resized"] * 18
    with pytest.raises(BadInput, match=r"\(40, 20\) and, in .*b.1.png, \(24, 24\)"):
        load_images(root, "", None, train=True)


# ------------------------------------------------------------------------------------------ files that cannot be read

@pytest.mark.filterwarnings("ignore")  # Pillow warns of some damage before it raises
@pytest.mark.parametrize("damage", [b"", b"Exif\0\0", b"Exif\0\0MM\0*", b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
                                    b"Exif\0\0no tags at all", b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1"])
def test_a_damaged_exif_block_is_read_or_names_its_file(damage, tmp_path):
    path = written(tmp_path / "photo.jpg", np.zeros((8, 16, 3), np.uint8), exif=damage)
    try:
        assert read_image(path)[0].size == (16, 8)
    except BadInput as e:
        assert "photo.jpg" in str(e) and "\n" not in str(e)


@pytest.mark.parametrize("error", [SyntaxError("not a TIFF file"), TypeError("no number"), ZeroDivisionError(),
                                   KeyError(274), IndexError("list"), AttributeError("None")])
def test_whatever_pillow_raises_names_the_file(error, tmp_path, monkeypatch):
    def damaged(image):
        raise error

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", damaged)
    with pytest.raises(BadInput, match="photo.png is damaged"):
        read_image(written(tmp_path / "photo.png", np.zeros((8, 8, 3), np.uint8)))


@pytest.mark.parametrize("length", [0, 10, 100])
def test_an_image_that_is_cut_short_is_damaged(length, tmp_path):
    path = written(tmp_path / "photo.png", np.random.default_rng(0).integers(255, size=(32, 32, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BadInput, match="photo.png is damaged"):
        read_image(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links and pipes")
def test_what_is_wrong_with_a_file_is_said_as_it_is(tmp_path, monkeypatch):
    """A file that cannot be read is not called damaged, and a pipe is not waited for."""
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(BadInput, match="link.png cannot be read: No such file"):
        read_image(tmp_path / "link.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadInput, match="pipe.png is no regular file"):
        read_image(tmp_path / "pipe.png")
    path = written(tmp_path / "good.png", np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
    with pytest.raises(BadInput, match="good.png has too many pixels"):
        read_image(path)

    def broken_disk(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Image, "open", broken_disk)
    with pytest.raises(BadInput, match="good.png cannot be read: Input/output error"):
        read_image(path)


# ------------------------------------------------------------------------------------------------ folders as they are

def test_hidden_files_are_no_classes(tmp_path, capsys):
    root = image_folder(tmp_path / "mine", ["cat", "dog", ".ipynb_checkpoints", "__MACOSX"], 12, 8)
    (root / "cat" / ".DS_Store").touch()
    (root / "cat" / "anim.gif").touch()
    (root / "dog" / "notes.txt").touch()
    Image.new("RGB", (8, 8)).save(root / "cover.png")
    images, labels, classes = load_images(root, "", None, train=True)
    load_images(root, "", None, train=False)
    assert classes == ["cat", "dog"] and labels.bincount().tolist() == [10, 10]
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert len(notes) == 1
    for word in (".ipynb_checkpoints", "__MACOSX", ".DS_Store", "3 files", ".gif .png .txt"):
        assert word in notes[0]


@pytest.mark.parametrize("train, test", [("train", "val"), ("train", "valid"), ("Train", "test"),
                                         ("training", "testing")])
def test_splits_are_no_classes(train, test, tmp_path):
    for folder, n in ((train, 4), (test, 2)):
        image_folder(tmp_path / "mine" / folder, ["cat", "dog"], n, 8)
    for n, is_train in ((8, True), (4, False)):
        images, _, classes = load_images(tmp_path / "mine", "", None, is_train)
        assert classes == ["cat", "dog"] and len(images) == n


@pytest.mark.parametrize("folders, words", [
    (["pics/cat", "pics/dog"], ["pics", "cat, dog", "--data"]), (["train/cat", "train/dog"], ["train", "cat, dog"]),
    (["cat/big", "dog"], ["cat", "big"])])
def test_class_folders_hold_images(folders, words, tmp_path):
    image_folder(tmp_path / "wrap", folders, 2, 8)
    with pytest.raises(BadInput) as e:
        load_images(tmp_path / "wrap", "", None, train=True)
    for word in words:
        assert word in str(e.value)


def test_a_class_folder_without_images_is_refused(tmp_path):
    root = image_folder(tmp_path / "mine", ["cat", "dog"], 2, 8)
    (root / "empty").mkdir()
    with pytest.raises(BadInput, match="empty holds no image"):
        class_folders(root)


@pytest.mark.parametrize("length", [0, 3, 10, 5000])
def test_a_damaged_mnist_is_named(length, mnist_dir, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (mnist_dir / "MNIST" / "raw").iterdir():
        (raw / file.name).write_bytes(file.read_bytes())
    assert len(load_images("mnist", tmp_path, None, True)[0]) == 600
    whole = (raw / "train-images-idx3-ubyte").read_bytes()
    (raw / "train-images-idx3-ubyte").write_bytes(whole[:length])
    with pytest.raises(BadInput, match=f"{re.escape(str(tmp_path))}.*damaged"):
        load_images("mnist", tmp_path, None, True)


def test_a_damaged_cifar10_is_named(tmp_path, monkeypatch):
    from torchvision import datasets
    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", lambda *args, **options: None)
    folder = tmp_path / datasets.CIFAR10.base_folder
    folder.mkdir()
    (folder / "data_batch_3").write_bytes(b"cut short")
    with pytest.raises(BadInput, match=f"{re.escape(str(tmp_path))}.*damaged"):
        load_images("cifar10", tmp_path, None, True)


# ----------------------------------------------------------------------------------------------- a teacher of one's own

def test_a_teacher_of_own_images(here, monkeypatch, capsys):
    """Its folder is found again by its name, and by the size that its images were resized to."""
    monkeypatch.setitem(train_teacher.PRESETS, "own images", (tiny_network().settings, True, {}))
    image_folder(here / "two kinds", ["ant", "bee"], 12, 24)
    train_teacher.main(["--data", "two kinds", "--size", "16", "--steps", "2", "--batch", "4", "--device", "cpu"])
    network, info = load_network("runs/two kinds-teacher/teacher.pt")
    assert info["classes"] == ["ant", "bee"] and info["size"] == 16 and network.shape == (3, 16, 16)
    assert load_teacher("", "two kinds", CPU)[1]["sha256"] == info["sha256"]
    assert load_teacher("runs/two kinds-teacher", "two kinds", CPU)[1]["sha256"] == info["sha256"]
    printed = capsys.readouterr().out
    assert image_size("two kinds", "teacher") == 16 and "16x16" in capsys.readouterr().out
    judge, sfd = printed.splitlines()[-1].removeprefix("next: ").split(", then ")
    assert shlex.split(judge) == ["python", "-m", "lab.judge", "--data", "two kinds"]
    assert shlex.split(sfd)[:4] == ["python", "sfd_minimal.py", "--teacher", "runs/two kinds-teacher/teacher.pt"]
    with pytest.raises(BadInput, match="inside"):
        train_teacher.main(["--data", "two kinds", "--out", "two kinds/run"])
    assert {path.name for path in (here / "two kinds").iterdir()} == {"ant", "bee"}


def test_a_folder_called_mnist_is_not_mnist(here, monkeypatch):
    """Its teacher does not go where MNIST's is, and neither finds the other's."""
    monkeypatch.setitem(train_teacher.PRESETS, "own images", (tiny_network().settings, True, {}))
    image_folder(here / "mine" / "mnist", "ab", 12, 8)
    assert data_name("mine/mnist") == "mnist-folder"
    assert all(data_name(name) == name for name in train_teacher.TORCHVISION)
    save_network(tiny_network(), here / "runs" / "mnist-teacher" / "teacher.pt")
    assert [find_weights("mine/mnist", what) for what in ("teacher", "judge", "judge2", "sid")] == [None] * 4
    with pytest.raises(BadInput, match="mine/mnist"):
        load_teacher("", "mine/mnist", CPU)
    with pytest.raises(BadInput, match="mine/mnist"):
        load_teacher(ROOT / "teachers" / "mnist.pt", "mine/mnist", CPU)
    with pytest.raises(BadInput, match="mine/mnist"):
        sfd_minimal.find_teacher("mine/mnist")
    train_teacher.main(["--data", "mine/mnist", "--steps", "1", "--batch", "4", "--device", "cpu"])
    assert sfd_minimal.find_teacher("mine/mnist") == find_weights("mine/mnist", "teacher")
    assert load_teacher("", "mine/mnist", CPU)[0].shape == (3, 8, 8)


@pytest.mark.parametrize("changes, classes, words", [
    ({}, "ab", ""), ({}, "ac", "a c"), ({"num_classes": 3}, "abc", "a b c"), ({"resolution": 16}, "ab", "3x16x16")])
def test_a_teacher_must_fit_its_folder(changes, classes, words, here):
    image_folder(here / "mine", "ab", 2, 8)
    network = tiny_network(**{"resolution": 8, "channels": 3, "num_classes": 2, **changes})
    save_network(network, here / "runs" / "mine-teacher" / "teacher.pt", data="elsewhere/mine", classes=list(classes))
    if words:
        with pytest.raises(BadInput, match=words):
            load_teacher("", "mine", CPU)
    else:
        assert load_teacher("", "mine", CPU)[0].shape == (3, 8, 8)
    assert misfit("not here", "ab", (3, 8, 8), None) == ""
