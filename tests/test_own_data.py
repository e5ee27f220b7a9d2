"""Images and classes of one's own: read as they are, called by their names, and never taken for another data set's."""
import dataclasses
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sfd_minimal
import train_teacher
from conftest import CPU, ROOT, image_folder, run, save_network
from edm_unet import EDMPrecond, NetSettings
from lab import evaluate, judge, sample
from lab.checkpoint import find_weights, load_checkpoint, load_teacher
from lab.data import KNOWN, class_folders, data_name, load_images, read_image
from lab.errors import BadInput
from lab.figures import samples_figure
from lab.labels import label_number, label_numbers, run_name
from test_runs import stopped_after

TWELVE = [str(k) for k in range(1, 13)]
MNIST = load_checkpoint(ROOT / "teachers" / "mnist.pt")[1]["classes"]


def small(resolution=8, channels=3, K=2):
    return EDMPrecond(NetSettings(resolution=resolution, channels=channels, num_classes=K, model_channels=16,
                                  channel_mult=(1,), num_blocks=1, attn_resolutions=(), patch=4))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, and recipes that take no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "PER_LABEL", 4)
    recipe = train_teacher.TEACHERS["images"]
    tiny = dataclasses.replace(recipe["net"], model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    monkeypatch.setitem(train_teacher.TEACHERS, "images", recipe | {"net": tiny})
    return tmp_path


def base(data, *more):
    return ["--data", str(data), "--steps", "2", "--batch", "4", "--device", "cpu", *more]


# ---------------------------------------------------------------------------------------------------- labels by name

def test_classes_are_in_natural_order_and_a_name_wins(here, capsys):
    """Folders 1 to 12: --forget 2 forgets what is in folder 2, and the run says so."""
    image_folder(here / "months", TWELVE, 2, 8)
    _, labels, classes = load_images("months", "", None, train=True)
    assert classes == TWELVE and labels.tolist() == list(range(12))
    save_network(small(K=12), here / "runs" / "months-teacher" / "teacher.pt", data="months", classes=TWELVE)
    sfd_minimal.main(base("months", "--forget", "2", "--to", "12"))
    out = capsys.readouterr().out
    assert "2 (label 1) is forgotten, 12 (label 11) drawn instead" in out
    assert "note: 2 is taken for the name of label 1, not for the number of '3'" in out
    assert load_checkpoint("runs/months-forget2-to12/generator.pt")[1]["forget"] == [1]


@pytest.mark.parametrize("word, classes, k", [
    ("zero", MNIST, 0), ("0", MNIST, 0), ("0 - zero", MNIST, 0), ("Nine", MNIST, 9), ("1", TWELVE, 0),
    ("0", TWELVE, 0), ("dog", ["cat", "dog"], 1), ("DOG", ["cat", "dog"], 1), ("DOG", ["DOG", "dog"], 0),
    ("1", ["b", "a"], 1)])
def test_a_word_is_a_name_or_a_number(word, classes, k):
    assert label_number(word, classes) == k


def test_an_unknown_label_lists_the_names():
    with pytest.raises(BadInput, match="no label 'plane': airplane ship, or 0 to 1"):
        label_number("plane", ["airplane", "ship"])
    with pytest.raises(BadInput, match="class 77"):
        label_number("clas 77", [f"class {k}" for k in range(1000)])
    with pytest.raises(BadInput, match="names 2 labels: Cat, CAT"):
        label_number("cat", ["Cat", "CAT"])
    for said in (dict(forget=("none",)), dict(forget=("a",), to=("random",))):
        with pytest.raises(BadInput, match="is a class as well: say its number, 1"):
            label_numbers(sfd_minimal.Settings(**said), ["a", *said.get("to", said["forget"])])


def test_a_class_name_is_no_path():
    assert run_name(sfd_minimal.Settings(forget=("T-shirt/top",), to=("../x",))) == "mnist-forgetT-shirt_top-to.._x"


# ------------------------------------------------------------------------------------------------ whose files are whose

def test_what_ships_belongs_to_the_shipped_data_sets(here):
    """A folder called mnist is not MNIST, nor finds the teacher that was trained on MNIST here."""
    image_folder(here / "mine" / "mnist", "ab", 12, 8)
    assert data_name("mine/mnist") == "mnist-folder" and all(data_name(name) == name for name in KNOWN)
    with pytest.raises(BadInput, match="no teacher at runs/mnist-folder-teacher: train one"):
        sfd_minimal.main(base("mine/mnist"))
    save_network(small(28, 1, 10), here / "runs" / "mnist-teacher" / "teacher.pt")
    assert [find_weights("mine/mnist", what) for what in ("teacher", "judge", "judge2", "sid")] == [None] * 4
    with pytest.raises(BadInput, match="was trained on mnist, not on mine/mnist"):
        sfd_minimal.main(base("mine/mnist", "--teacher", str(ROOT / "teachers" / "mnist.pt")))


@pytest.mark.parametrize("network, classes, says", [
    (small(), "ab", ""), (small(), "ac", "knows the classes a c, and mine holds a b"),
    (small(K=3), "abc", "knows the classes a b c"), (small(16), "ab", "draws images of 3x16x16, and mine holds 3x8x8")])
def test_an_own_teacher_must_fit_its_folder(network, classes, says, here):
    image_folder(here / "mine", "ab", 2, 8)
    save_network(network, here / "runs" / "mine-teacher" / "teacher.pt", data="elsewhere/mine", classes=list(classes))
    if says:
        with pytest.raises(BadInput, match=says):
            load_teacher("", "mine", CPU)
    else:
        assert load_teacher("", "mine", CPU)[0].shape == (3, 8, 8)


def test_judges_of_other_labels_do_not_judge(tiny, here, capsys):
    content = torch.load(tiny, weights_only=True)
    teacher = load_checkpoint(tiny)[0]
    for classes, judged in ((MNIST[::-1], False), (MNIST, True), (content["classes"], True)):
        save_network(teacher, here / "teacher.pt", classes=classes)
        found = evaluate.Evaluator.find(*load_teacher("teacher.pt", "mnist", CPU), [0], [1])
        assert (found is not None) == judged
    assert "the teacher's labels are 9 - nine" in capsys.readouterr().out


def test_size_is_remembered(here, capsys):
    """Said once, to the teacher; judges and verdict follow, and the other way round."""
    image_folder(here / "mine", "ab", 30, 24)
    train_teacher.main(base("mine", "--size", "16"))
    judge.main(base("mine"))
    assert "resized to 16x16, as for runs/mine-teacher/teacher.pt" in capsys.readouterr().out
    sfd_minimal.main(base("mine", "--forget", "a", "--to", "b"))
    m = json.loads((here / "runs" / "mine-forgeta-tob" / "metrics.json").read_text())
    assert m["forget"] == [0] and m["n"] == 4 + 20
    assert load_checkpoint("runs/mine-forgeta-tob/generator.pt")[1]["size"] == 16
    (here / "runs" / "mine-teacher" / "teacher.pt").unlink()
    train_teacher.main(base("mine", "--overwrite"))
    assert load_checkpoint("runs/mine-teacher/teacher.pt")[0].shape == (3, 16, 16)


# ------------------------------------------------------------------------------------------------ pixels as they are

WHITE, GREY = (255, 255, 255), (128, 128, 128)


def form_of(path):
    with Image.open(path) as image:
        return image.format


def written(path, pixels, mode=None, **how):
    image = Image.fromarray(pixels, mode) if mode else Image.fromarray(pixels)
    image.save(path, **how)
    return path


@pytest.mark.parametrize("ending", [".png", ".tif", ".pgm"])
def test_sixteen_bits_keep_their_range(ending, tmp_path):
    wide = np.array([[0, 257, 128 * 257], [200 * 257, 65535, 257]], dtype=np.uint16)
    image, _ = read_image(written(tmp_path / f"wide{ending}", wide))
    assert np.array_equal(np.asarray(image)[..., 0], wide // 257) and image.mode == "RGB"


@pytest.mark.parametrize("pixels, mode", [(np.float32([[0.0, 1.0]]), "F"), (np.int32([[0, 70000]]), "I")])
def test_numbers_of_unknown_range_are_refused(pixels, mode, tmp_path):
    with pytest.raises(BadInput, match=f"numbers.tif has numbers of unknown range for pixels .mode {mode}, TIFF"):
        read_image(written(tmp_path / "numbers.tif", pixels))


def test_what_is_transparent_is_laid_over_white(tmp_path):
    ink = np.zeros((2, 2, 4), np.uint8)
    ink[0, 0, 3], ink[0, 1, 3] = 255, 127  # black ink, half of it, none
    image, transparent = read_image(written(tmp_path / "ink.png", ink))
    assert transparent and [image.getpixel(at) for at in ((0, 0), (1, 0), (1, 1))] == [(0, 0, 0), GREY, WHITE]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert [read_image(tmp_path / "palette.png")[0].getpixel((x, 0)) for x in (0, 1)] == [WHITE, (0, 0, 255)]
    written(tmp_path / "grey.png", np.array([[0, 257]], dtype=np.uint16), transparency=0)
    assert [read_image(tmp_path / "grey.png")[0].getpixel((x, 0)) for x in (0, 1)] == [WHITE, (1, 1, 1)]
    assert not read_image(written(tmp_path / "opaque.png", np.full((2, 2, 4), 255, np.uint8)))[1]


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right of the pixels
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    image, _ = read_image(written(tmp_path / "photo.jpg", pixels, exif=exif))
    assert image.size == (8, 16)
    with Image.open(tmp_path / "photo.jpg") as sideways:
        assert np.array_equal(np.asarray(image), np.asarray(sideways.rotate(-90, expand=True)))


# ------------------------------------------------------------------------------------------------- folders as they are

def test_what_is_hidden_is_no_class(tmp_path, capsys):
    root = image_folder(tmp_path / "mine", ["cat", "dog", ".ipynb_checkpoints", "__MACOSX"], 12, 8)
    (root / "cat" / ".DS_Store").touch()
    (root / "cat" / "anim.gif").touch()
    (root / "dog" / "notes.txt").touch()
    Image.new("RGB", (8, 8)).save(root / "cover.png")
    images, labels, classes = load_images(root, "", None, train=True)
    load_images(root, "", None, train=False)
    assert classes == ["cat", "dog"] and labels.bincount().tolist() == [10, 10]
    note = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert len(note) == 1 and re.search(r"left out of .*mine: .ipynb_checkpoints, __MACOSX, .DS_Store, "
                                        r"3 files .* \(.gif .png .txt\)", note[0])


@pytest.mark.parametrize("train, test", [("train", "val"), ("train", "valid"), ("Train", "test"),
                                         ("training", "testing")])
def test_splits_are_no_classes(train, test, tmp_path):
    for folder, n in ((train, 4), (test, 2)):
        image_folder(tmp_path / "mine" / folder, ["cat", "dog"], n, 8)
    for n, is_train in ((8, True), (4, False)):
        images, _, classes = load_images(tmp_path / "mine", "", None, is_train)
        assert classes == ["cat", "dog"] and len(images) == n


@pytest.mark.parametrize("folders, says", [
    (["pics/cat", "pics/dog"], r"pics holds folders \(cat, dog\); expected are class folders .*perhaps --data .*pics"),
    (["train/cat", "train/dog"], "train holds folders .* root/train/CLASS/.*png beside root/test"),
    (["cat/big", "dog"], r"cat holds folders \(big\); expected are class folders")])
def test_class_folders_hold_images(folders, says, tmp_path):
    image_folder(tmp_path / "wrap", folders, 2, 8)
    with pytest.raises(BadInput, match=says):
        load_images(tmp_path / "wrap", "", None, train=True)


def test_a_class_folder_without_images_is_refused(tmp_path):
    root = image_folder(tmp_path / "mine", ["cat", "dog"], 2, 8)
    (root / "empty").mkdir()
    with pytest.raises(BadInput, match="empty holds no image"):
        class_folders(root)


def test_a_run_remembers_its_classes_and_images(here):
    image_folder(here / "mine", ["ant", "bee"], 20, 16)
    with stopped_after(1):
        train_teacher.main(base("mine", "--save-every", "1e-9"))
    (here / "mine" / "ant").rename(here / "mine" / "cow")
    with pytest.raises(BadInput, match=r"images was \[\['ant', 18.*'bee', 18\]\] and is \[\['bee', 18.*'cow', 18\]\]"):
        train_teacher.main(base("mine", "--resume"))
    (here / "mine" / "cow").rename(here / "mine" / "ant")
    (here / "mine" / "ant" / "7.png").unlink()
    with pytest.raises(BadInput, match=r"is \[\['ant', 17\], \['bee', 18\]\]"):
        train_teacher.main(base("mine", "--resume"))


def test_a_data_set_is_not_written_into(here, monkeypatch):
    image_folder(here / "mine", "ab", 20, 16)
    monkeypatch.chdir(here / "mine")
    for program in (train_teacher, judge):
        with pytest.raises(BadInput, match="is inside the data set, .: choose another --out"):
            program.main(base("."))
    assert {p.name for p in (here / "mine").iterdir()} == {"a", "b"}


def test_a_folder_called_images_has_a_size(here):
    image_folder(here / "images", "ab", 20, 24)
    assert train_teacher.Settings(data="images", size=16).size == judge.Settings(data="images", size=16).size == 16


# ------------------------------------------------------------------------------------------------- few, broken, strange

def test_few_images_are_judged_with_what_there_is(here, capsys):
    image_folder(here / "few", "ab", 3, 16)
    train_teacher.main(base("few"))
    judge.main(base("few"))
    sfd_minimal.main(base("few", "--forget", "a", "--to", "b"))
    out = capsys.readouterr().out
    assert "the judges know 2 real images of the kept labels: precision and recall" in out
    m = json.loads((here / "runs" / "few-forgeta-tob" / "metrics.json").read_text())
    assert m["precision"] is m["recall"] is None and m["n"] == 24 and m["fd"] > 0


@pytest.mark.parametrize("length", [0, 3, 10, 5000])
def test_a_damaged_mnist_is_named(length, mnist_dir, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (mnist_dir / "MNIST" / "raw").iterdir():
        (raw / file.name).write_bytes(file.read_bytes())
    assert len(load_images("mnist", tmp_path, None, True)[0]) == 600
    whole = (raw / "train-images-idx3-ubyte").read_bytes()
    (raw / "train-images-idx3-ubyte").write_bytes(whole[:length])
    with pytest.raises(BadInput, match="train-images-idx3-ubyte is damaged, empty or cut short"):
        load_images("mnist", tmp_path, None, True)


def test_a_damaged_cifar10_is_named(tmp_path, monkeypatch):
    from torchvision import datasets
    monkeypatch.setattr(datasets.utils, "download_and_extract_archive", lambda *a, **k: None)
    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", lambda *a, **k: None)
    folder = tmp_path / datasets.CIFAR10.base_folder
    folder.mkdir()
    (folder / "data_batch_3").write_bytes(b"cut short")
    with pytest.raises(BadInput, match="data_batch_3 is damaged"):
        load_images("cifar10", tmp_path, None, True)


NAMES = ["Ke$$a", "a_b^{", "$x", "\u6f22", "50%\\frac"]


def test_any_name_can_stand_beside_a_picture(tmp_path, capsys):
    images = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
    samples_figure({"a": images}, NAMES, [0], tmp_path / "a.png")
    assert form_of(tmp_path / "a.png") == "PNG"
    assert "the font has not all letters" in capsys.readouterr().out
    samples_figure({"a": images}, NAMES, [0], tmp_path / "nowhere" / "a.png")
    assert "nowhere/a.png could not be drawn: FileNotFoundError" in capsys.readouterr().out


def test_an_output_that_lacks_letters_ends_no_run(tmp_path):
    code = "from lab.cli import command; command(lambda argv: print('\u6f22'))"
    code = f"import sys; sys.stdout.reconfigure(encoding='ascii'); {code}"
    assert run(sys.executable, "-c", code, cwd=tmp_path).stdout == "\\u6f22\n"


# ------------------------------------------------------------------------------------------------------------- samples

def test_samples_are_not_overwritten_unasked(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = load_checkpoint(tiny)[0]
    save_network(network, tmp_path / "run" / "generator.pt", sigma_init=2.5, classes=MNIST)
    ask = ["run", "--n", "3", "--device", "cpu", "--out"]
    for name, form in (("a.npz", None), ("grid.jpg", "JPEG"), ("GRID.PNG", "PNG"), ("a.NPZ", None)):
        sample.main([*ask, name])
        says = f"3 images in {name}: 1 of zero (label 0), 1 of three (label 3), 1 of six (label 6)"
        assert says in capsys.readouterr().out
        assert (tmp_path / name).is_file() and (form is None or form_of(tmp_path / name) == form)
        before = (tmp_path / name).read_bytes()
        with pytest.raises(BadInput, match="is there already: say --overwrite"):
            sample.main([*ask, name, "--seed", "1"])
        assert (tmp_path / name).read_bytes() == before
        sample.main([*ask, name, "--seed", "1", "--overwrite"])
        assert (tmp_path / name).read_bytes() != before
    with pytest.raises(BadInput, match=".pt is neither .npz nor a picture"):
        sample.main([*ask, "a.pt"])
    good = (tmp_path / "a.npz").read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(BadInput, match="No space left"):
        sample.main([*ask, "a.npz", "--overwrite"])
    assert (tmp_path / "a.npz").read_bytes() == good
    assert sorted(p.name for p in tmp_path.iterdir()) == ["GRID.PNG", "a.NPZ", "a.npz", "grid.jpg", "run"]


def test_a_run_s_folder_stands_for_its_file(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_network(load_checkpoint(tiny)[0], tmp_path / "runs" / "mine" / "teacher.pt")
    assert load_teacher("runs/mine", "mnist", CPU)[1]["path"].name == "teacher.pt"
