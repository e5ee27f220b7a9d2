"""Each command as a user would run it, at a tiny size, from the shipped teacher."""
import csv
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import evaluate
import sfd_minimal
import train_teacher
from conftest import ROOT, program
from edm_unet import load_checkpoint


def run(*command, cwd, **kw):
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, **kw)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The main command with torchvision unimportable and no sockets: SFD needs neither data nor a network."""
    folder = tmp_path_factory.mktemp("a user")
    script = folder / "offline.py"
    script.write_text("""
import os, runpy, socket, sys

class NoTorchvision:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            raise ImportError("torchvision is forbidden here")

def forbidden(*args, **kw):
    raise OSError("sockets are forbidden here")

sys.meta_path.insert(0, NoTorchvision())
socket.socket.__init__ = socket.create_connection = socket.getaddrinfo = forbidden
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    out = run(sys.executable, script, ROOT / "sfd_minimal.py", "--forget", 0, "--to", 1,
              "--steps", 3, "--batch", 8, "--per-label", 4, cwd=folder)
    return folder / "runs" / "mnist-forget0-to1", out


def test_main_command_writes_what_it_promises(finished):
    folder, out = finished
    assert {p.name for p in folder.iterdir()} == {"generator.pt", "both.pt", "checkpoint.pt", "samples.png",
                                                  "curves.png", "log.csv", "metrics.json"}
    assert "teacher" in out and "this generator" in out and "kept accuracy" in out and "judged as its label, %" in out
    m = json.loads((folder / "metrics.json").read_text())
    for key in ("ua", "override_share", "kept_accuracy", "fd", "fd_floor", "fd_override", "precision", "recall",
                "nfe", "images_per_second", "seconds", "n"):
        assert key in m and key in m["teacher"], key
    assert m["seconds_judging"] > 0 and m["judge"]["data"] == "mnist" and m["judge"]["accuracy"] == 0.9963
    assert m["nfe"] == 1 and m["teacher"]["nfe"] == 35 and m["n"] == 9 * 4 + 5 * 4
    assert (len(m["per_class_accuracy"]) == 10 and m["settings"]["steps"] == 3
            and m["machine"]["torch"] and m["seconds"] > 0)
    with open(folder / "log.csv", newline="") as f:
        assert [row["step"] for row in csv.DictReader(f)] == ["3"]


def test_generator_file_holds_the_generator_alone(finished):
    import torch
    content = torch.load(finished[0] / "generator.pt", weights_only=True)
    assert "fake" not in content and content["sigma_init"] == 2.5 and content["forget"] == [0]


def test_evaluate_alone_gives_the_same_numbers(finished):
    folder, _ = finished
    before = json.loads((folder / "metrics.json").read_text())
    out = run(*program("evaluate.py"), folder.relative_to(folder.parent.parent), "--per-label", 4,
              cwd=folder.parent.parent)
    after = json.loads((folder / "metrics.json").read_text())
    assert "this generator" in out
    for key in ("ua", "kept_accuracy", "fd", "fd_override", "precision", "recall", "per_class_accuracy"):
        assert before[key] == pytest.approx(after[key]), key


def test_samples_in_every_form(finished):
    folder, _ = finished
    cwd = folder.parent.parent
    common = (*program("sfd_minimal.py"), "--sample", folder / "generator.pt", "--label", 3, 5,
              "--n", 6, "--seed", 7, "--out")
    run(*common, "some images.npz", cwd=cwd)
    with np.load(cwd / "some images.npz") as file:
        data = dict(file)
    assert (data["images"].shape == (6, 28, 28, 1) and data["images"].dtype == np.uint8
            and data["labels"].tolist() == [3, 3, 3, 5, 5, 5])
    run(*common, "grid.png", cwd=cwd)
    assert pixels(cwd / "grid.png").size == 6 * 28 * 28
    run(*common, "folder", cwd=cwd)
    files = sorted((cwd / "folder").iterdir())
    assert len(files) == 6 and np.array_equal(pixels(files[4]), data["images"][4, :, :, 0])


def test_several_labels_random_and_two_stages(tiny, tmp_path):
    base = (*program("sfd_minimal.py"), "--steps", 2, "--batch", 8, "--per-label", 2, "--teacher", tiny)
    run(*base, "--forget", "none", cwd=tmp_path)
    assert (tmp_path / "runs" / "mnist-sid" / "metrics.json").exists()
    run(*base, "--forget", 0, 1, "--to", 2, 3, "--init-from", "runs/mnist-sid/both.pt", "--forget-share", 0.5,
        "--lambda-anchor", 3, "--guidance", 1.3, cwd=tmp_path)
    m = json.loads((tmp_path / "runs" / "mnist-forget0-1-to2-3" / "metrics.json").read_text())
    assert m["forget"] == [0, 1] and m["to"] == [2, 3] and m["settings"]["forget_share"] == 0.5
    run(*base, "--forget", 4, "--fold", cwd=tmp_path)
    assert (tmp_path / "runs" / "mnist-forget4-torandom" / "metrics.json").exists()
    assert load_checkpoint(tmp_path / "runs" / "mnist-forget4-torandom" / "generator.pt")[0].settings.folded


def test_teacher_and_judges_are_trained(mnist_dir, tmp_path):
    """From data in torchvision's format that teaches nothing: what counts are the files."""
    base = (*program("train_teacher.py"), "--data", "mnist", "--data-dir", mnist_dir, "--steps", 2, "--batch", 4)
    run(*base, cwd=tmp_path)
    run(*base, "--judge", cwd=tmp_path)
    assert load_checkpoint(tmp_path / "runs" / "mnist-teacher" / "teacher.pt")[1]["made_by"]["steps"] == 2
    assert evaluate.load_judge(tmp_path / "runs" / "mnist-judge2" / "judge.pt", "cpu")[1]["data"] == "mnist"


def test_a_data_set_of_ones_own(tmp_path, monkeypatch, capsys):
    """A folder of class folders, under the recipe of CIFAR-10 with a sixth of its channels:
    teacher, then SFD without a judge, then the judges, then the verdict."""
    recipe = train_teacher.TEACHERS["cifar10"]
    assert (train_teacher.TEACHERS["images"] is recipe
            and train_teacher.JUDGES["images"] is train_teacher.JUDGES["cifar10"])
    monkeypatch.setitem(train_teacher.TEACHERS, "images",
                        recipe | {"net": dataclasses.replace(recipe["net"], model_channels=16)})
    monkeypatch.chdir(tmp_path)
    for k, label in enumerate("ab"):
        (tmp_path / "my images" / label).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (16, 16), (200 * k, 10 * i, 90)).save(tmp_path / "my images" / label / f"{i}.png")
    train_teacher.main(["--data", "my images", "--steps", "2", "--batch", "4"])
    sfd_minimal.main(["--data", "my images", "--forget", "0", "--to", "1",
                      "--steps", "2", "--batch", "4", "--per-label", "8"])
    assert "no judge" in capsys.readouterr().out
    train_teacher.main(["--data", "my images", "--judge", "--steps", "2", "--batch", "4"])
    evaluate.main(["runs/my images-forget0-to1", "--per-label", "8"])
    assert "this generator" in capsys.readouterr().out
    assert (tmp_path / "runs" / "my images-forget0-to1" / "metrics.json").exists()
