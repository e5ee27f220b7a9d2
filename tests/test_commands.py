"""Each command as a user would run it, at a tiny size: one subprocess each, the rest through main(argv)."""
import csv
import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sfd_minimal
import train_teacher
from conftest import CPU, ROOT, image_folder, module, program, run
from lab import evaluate, judge, sample
from lab.checkpoint import load_checkpoint
from lab.recipes import RECIPES


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


OFFLINE = """
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
sys.path[0] = os.path.dirname(sys.argv[0])
import lab.evaluate
lab.evaluate.PER_LABEL = 4
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The main command with torchvision unimportable and no sockets: SFD needs neither data nor a network."""
    folder = tmp_path_factory.mktemp("a user")
    (folder / "offline.py").write_text(OFFLINE)
    out = run(sys.executable, "offline.py", ROOT / "sfd_minimal.py", "--forget", 0, "--to", 1, "--steps", 3,
              "--batch", 8, "--device", "cpu", cwd=folder).stdout
    return folder / "runs" / "mnist-forget0-to1", out


def test_main_command_writes_what_it_promises(finished):
    folder, out = finished
    assert {p.name for p in folder.iterdir()} == {"generator.pt", "both.pt", "checkpoint.pt", "samples.png",
                                                  "curves.png", "log.csv", "metrics.json", ".lock"}
    assert "teacher" in out and "this generator" in out and "kept accuracy" in out and "judged as its label, %" in out
    assert "un-erased one-step" in out and f"next: python -m lab.audit runs/{folder.name}" in out
    m = json.loads((folder / "metrics.json").read_text())
    for key in ("ua", "override_share", "kept_accuracy", "fd", "fd_floor", "fd_override", "precision", "recall",
                "nfe", "seconds", "n"):
        assert key in m and key in m["teacher"] and key in m["un_erased"], key
    assert m["seconds_judging"] > 0 and m["judge"]["data"] == "mnist" and m["judge"]["accuracy"] == 0.9963
    assert (m["nfe"], m["un_erased"]["nfe"], m["teacher"]["nfe"]) == (1, 1, 35)
    assert m["n"] == 9 * 4 + 5 * 4 and m["n_forgotten"] == 20 and m["teacher"]["n"] == m["un_erased"]["n"] == 10_000
    assert (len(m["per_class_accuracy"]) == 10 and m["settings"]["steps"] == 3 and m["protocol"] == evaluate.PROTOCOL
            and m["machine"]["torch"] and m["trained_on"]["device"] == "cpu" and m["seconds"] > 0)
    with open(folder / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["step"] for row in rows] == ["3"] and {"L_psi", "L_keep", "L_forget", "ua", "fd"} <= rows[0].keys()


def test_generator_file_holds_the_generator_alone(finished):
    content, both = (torch.load(finished[0] / name, weights_only=True) for name in ("generator.pt", "both.pt"))
    assert "fake" not in content and content["sigma_init"] == 2.5 and content["forget"] == [0]
    assert "fake" in both and all(torch.equal(v.half(), both["weights"][k]) for k, v in content["weights"].items())


def test_evaluate_alone_gives_the_same_numbers(finished):
    folder, _ = finished
    before = json.loads((folder / "metrics.json").read_text())
    out = run(*module("lab.evaluate"), f"runs/{folder.name}", "--per-label", 4, "--device", "cpu",
              cwd=folder.parent.parent).stdout
    after = json.loads((folder / "metrics.json").read_text())
    assert "this generator" in out and after["seconds_judging"] != before["seconds_judging"]
    for key in ("ua", "kept_accuracy", "fd", "fd_override", "precision", "recall", "per_class_accuracy"):
        assert before[key] == pytest.approx(after[key]), key


def test_samples_in_every_form(finished, monkeypatch, capsys):
    folder, _ = finished
    cwd = folder.parent.parent
    asked = ["--label", "3", "5", "--n", "6", "--seed", "7", "--device", "cpu", "--out"]
    run(*program("sfd_minimal.py"), "--sample", folder / "generator.pt", *asked, "some images.npz", cwd=cwd)
    with np.load(cwd / "some images.npz") as file:
        data = dict(file)
    assert (data["images"].shape == (6, 28, 28, 1) and data["images"].dtype == np.uint8
            and data["labels"].tolist() == [3, 3, 3, 5, 5, 5])
    monkeypatch.chdir(cwd)
    sample.main([str(folder / "generator.pt"), *asked, "grid.png"])
    assert "6 images in grid.png: 3 of three (label 3), 3 of five (label 5)" in capsys.readouterr().out
    assert np.array_equal(pixels("grid.png"), data["images"].reshape(2, 3, 28, 28).swapaxes(1, 2).reshape(56, 84))
    sample.main([str(folder / "generator.pt"), *asked, "folder"])
    files = sorted((cwd / "folder").iterdir())
    assert [f.name for f in files][3:] == ["000003-label5.png", "000004-label5.png", "000005-label5.png"]
    assert len(files) == 6 and np.array_equal(pixels(files[4]), data["images"][4, :, :, 0])


def test_a_label_has_the_same_noise_whatever_is_drawn_beside_it(tiny):
    """So that networks are compared on the same images, and a label alone is the label among others."""
    generate, network, info = sample.load_generator(tiny, CPU)
    assert info["nfe"] == 35
    seen = []
    look = lambda z, c: seen.append(z) or z
    draw = lambda labels, seed, **kw: sample.draw(look, torch.tensor(labels), network, seed, **kw)
    mixed = [3, 3, 5, 3, 5]
    several = draw(mixed, 7)
    assert torch.equal(several[[0, 1, 3]], draw([3] * 4, 7)[:3]) and torch.equal(several[[2, 4]], draw([5, 5], 7))
    assert torch.equal(several, draw(mixed, 7, batch=2)) and not torch.equal(several, draw(mixed, 8))
    assert len(seen[0].flatten(1).unique(dim=0)) == 5, "and no two of them the same"


def test_several_labels_random_and_two_stages(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "PER_LABEL", 2)
    base = ["--steps", "2", "--batch", "8", "--teacher", str(tiny), "--device", "cpu"]
    sfd_minimal.main([*base, "--forget", "none"])
    m = json.loads((tmp_path / "runs" / "mnist-sid" / "metrics.json").read_text())
    assert m["forget"] == m["to"] == [] and "ua" not in m and "kept_accuracy" in m
    sfd_minimal.main([*base, "--forget", "0", "1", "--to", "2", "3", "--init-from", "runs/mnist-sid/both.pt",
                      "--guidance", "1.3"])
    m = json.loads((tmp_path / "runs" / "mnist-forget0-1-to2-3" / "metrics.json").read_text())
    assert m["forget"] == [0, 1] and m["to"] == [2, 3] and m["n_forgotten"] == 2 * 10
    brought = RECIPES["mnist, from a one-step generator"] | {"steps": 2, "batch": 8, "guidance": 1.3}
    assert {k: m["settings"][k] for k in brought} == brought and brought["forget_share"] and brought["lambda_anchor"]
    assert m["un_erased"]["nfe"] == 1, "the first stage, in runs/, stands beside the second"
    sfd_minimal.main([*base, "--forget", "4"])
    m = json.loads((tmp_path / "runs" / "mnist-forget4-torandom" / "metrics.json").read_text())
    assert m["forget"] == [4] and m["to"] == [-1] and m["settings"]["guidance"] == 1.0


def test_teacher_and_judges_are_trained(mnist_dir, tmp_path):
    """From data that teaches nothing: what counts are the files."""
    image_folder(tmp_path / "two kinds", "ab", 3, 8)
    base = ["--steps", 2, "--batch", 4, "--device", "cpu"]
    run(*program("train_teacher.py"), "--data", "two kinds", *base, cwd=tmp_path)
    network, info = load_checkpoint(tmp_path / "runs" / "two kinds-teacher" / "teacher.pt")
    assert info["made_by"]["steps"] == 2 and info["classes"] == ["a", "b"] and network.shape == (3, 8, 8)
    run(*module("lab.judge"), "--data", "mnist", "--data-dir", mnist_dir, *base, cwd=tmp_path)
    for name in ("mnist-judge", "mnist-judge2"):
        assert judge.load_judge(tmp_path / "runs" / name / "judge.pt", CPU)[1]["data"] == "mnist"


def test_a_data_set_of_ones_own(tmp_path, monkeypatch, capsys):
    """A folder of class folders, under the recipe of CIFAR-10 with a small network:
    teacher, then SFD without a judge, then the judges, then the verdict."""
    recipe = train_teacher.TEACHERS["cifar10"]
    assert train_teacher.TEACHERS["images"] is recipe and judge.JUDGES["images"] is judge.JUDGES["cifar10"]
    monkeypatch.setitem(train_teacher.TEACHERS, "images",
                        recipe | {"net": dataclasses.replace(recipe["net"], model_channels=8, channel_mult=(1, 1))})
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "my images", "ab", 20, 16)
    base = ["--data", "my images", "--steps", "2", "--batch", "4", "--device", "cpu"]
    train_teacher.main(base)
    sfd_minimal.main([*base, "--forget", "0", "--to", "1"])
    out = tmp_path / "runs" / "my images-forget0-to1"
    assert "no judges of my images" in capsys.readouterr().out and not (out / "metrics.json").exists()
    judge.main(base)
    evaluate.main(["runs/my images-forget0-to1", "--per-label", "8", "--device", "cpu"])
    assert "this generator" in capsys.readouterr().out
    m = json.loads((out / "metrics.json").read_text())
    assert m["n"] == 8 + 5 * 8 and m["judge"]["data"] == "my images" and m["un_erased"] is None
