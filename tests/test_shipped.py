"""The weights that come with the project are what their numbers say, on a few hundred samples."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from conftest import ROOT
from edm_unet import NetSettings, load_checkpoint, read_file

TEACHERS = ROOT / "teachers"
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["mnist", "mnist_plain"])
def judged(request):
    """200 images of a teacher by 35 evaluations, to be seen by both judges."""
    teacher, _ = load_checkpoint(TEACHERS / f"{request.param}.pt")
    labels = torch.arange(10).repeat_interleave(20)
    images = evaluate.draw(evaluate.many_step(teacher), labels, teacher.settings, CPU, seed=5)
    return request.param, labels, images


@pytest.mark.parametrize("number", ["", "2"])
def test_teacher_and_judges_agree(judged, number):
    name, labels, images = judged
    judge, info = evaluate.load_judge(TEACHERS / f"mnist_judge{number}.pt", CPU)
    assert info["accuracy"] >= 0.994
    confusion = evaluate.class_stats(judge, images, labels, keep=0)["confusion"]
    remembered = read_file(TEACHERS / f"{name}_measured.pt", "measured")
    recorded = remembered["stats"]["confusion"].double()
    accuracy = (recorded.diag().sum() / recorded.sum()).item()
    assert recorded.sum() == 10_000
    assert confusion.diag().sum().item() / 200 > accuracy - 0.03


@pytest.mark.parametrize("number", ["", "2"])
def test_judges_of_cifar10_know_photographs(number):
    """On the first five test images of each class, one class per row of the picture,
    and as they were recorded on all of them."""
    judge, info = evaluate.load_judge(TEACHERS / f"cifar10_judge{number}.pt", CPU)
    with Image.open(ROOT / "tests" / "fixtures" / "cifar10_jpeg_test.png") as picture:
        images = torch.tensor(np.asarray(picture)).reshape(10, 32, 5, 32, 3).permute(0, 2, 4, 1, 3).flatten(0, 1)
    labels = torch.arange(10).repeat_interleave(5)
    stats = evaluate.class_stats(judge, images, labels, keep=0)
    assert stats["confusion"].diag().sum() >= 42 and info["accuracy"] > 0.85
    assert (f"{100 * info['accuracy']:.2f} %" in (TEACHERS / "README.md").read_text()
            and f"{100 * info['accuracy']:.2f} %" in (ROOT / "README.md").read_text())
    mirrored = evaluate.class_stats(judge, images.flip(3), labels, keep=0)
    assert torch.allclose(stats["mean"], mirrored["mean"], atol=1e-4), (
        "a judge of photographs does not mind which way they look")
    if number == "":
        assert info["train"]["confusion"].sum() == 50_000 and info["test"]["confusion"].sum() == 10_000
        assert (info["test"]["confusion"].diag().sum() / 10_000).item() == pytest.approx(info["accuracy"])


@pytest.mark.parametrize("teacher", ["mnist", "mnist_plain"])
def test_recorded_teacher_belongs_to_these_files(teacher):
    names = [f"{teacher}.pt", "mnist_judge.pt", "mnist_judge2.pt"]
    assert (read_file(TEACHERS / f"{teacher}_measured.pt", "measured")["fingerprint"]
            == evaluate.digest(*(TEACHERS / n for n in names)))


def test_one_step_generator_is_of_this_teacher():
    sid, info = load_checkpoint(TEACHERS / "mnist_sid.pt")
    assert info["teacher_sha256"] == evaluate.digest(TEACHERS / "mnist.pt") and info["forget"] == []
    judge, _ = evaluate.load_judge(TEACHERS / "mnist_judge.pt", CPU)
    labels = torch.arange(10).repeat_interleave(30)
    images = evaluate.draw(evaluate.one_step(sid, info["sigma_init"]), labels, sid.settings, CPU, seed=5)
    confusion = evaluate.class_stats(judge, images, labels, keep=0)["confusion"]
    recorded = read_file(TEACHERS / "mnist_sid_measured.pt", "measured")["stats"]["confusion"].double()
    assert recorded.sum() == 10_000
    assert confusion.diag().sum().item() / 300 > (recorded.diag().sum() / recorded.sum()).item() - 0.03


def test_un_erased_generator_is_that_of_the_teacher_or_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no runs/ holds another
    path, _, info = evaluate.un_erased("mnist", evaluate.digest(TEACHERS / "mnist.pt"), CPU)
    assert path == TEACHERS / "mnist_sid.pt" and info["forget"] == []
    assert evaluate.un_erased("mnist", evaluate.digest(TEACHERS / "mnist_plain.pt"), CPU) is None


def test_forgetful_generator_is_of_this_teacher_and_forgets():
    G, info = load_checkpoint(TEACHERS / "mnist_forget0_to1.pt")
    assert (info["teacher_sha256"] == evaluate.digest(TEACHERS / "mnist.pt")
            and (info["forget"], info["to"]) == ([0], [1]))
    judge, _ = evaluate.load_judge(TEACHERS / "mnist_judge.pt", CPU)
    labels = torch.arange(10).repeat_interleave(30)
    confusion = evaluate.class_stats(
        judge, evaluate.draw(evaluate.one_step(G, info["sigma_init"]), labels, G.settings, CPU, seed=5),
        labels, keep=0)["confusion"]
    m = json.loads((ROOT / "results" / "mnist-paper-forget0-to1.json").read_text())
    assert confusion[0, 0] == 0 and confusion[0, 1] >= 28
    assert confusion.diag()[1:].sum().item() / 270 > m["kept_accuracy"] - 0.03


def test_weights_are_stored_in_half_precision():
    for name in ("mnist.pt", "mnist_plain.pt", "mnist_sid.pt", "mnist_forget0_to1.pt",
                 "mnist_judge.pt", "mnist_judge2.pt", "cifar10_judge.pt", "cifar10_judge2.pt"):
        kind = "judge" if "judge" in name else "denoiser"
        assert all(v.dtype == torch.float16 for v in read_file(TEACHERS / name, kind)["weights"].values()
                   if v.is_floating_point()), name


def test_committed_results_carry_their_circumstances():
    files = sorted((ROOT / "results").rglob("*-*.json"))
    assert files
    for f in files:
        m = json.loads(f.read_text())
        assert m["machine"]["torch"] and m["settings"]["seed"] is not None and m["n"] and m["seconds"] > 0, f
        assert m["teacher"]["nfe"] == 35, f


def test_a_damaged_memory_is_made_again(tmp_path, capsys):
    referee, network = evaluate.Referee("mnist", torch.device("cpu"), [0], [1]), tmp_path / "network.pt"
    network.write_bytes(b"known remembers what was drawn, not what this file holds")
    known = lambda: referee.known(network, lambda z, c: z, NetSettings(), 2, "")[1]
    first = known()
    (tmp_path / "network_measured.pt").write_bytes(b"cut short")
    assert torch.equal(known(), first) and "measured again" in capsys.readouterr().out
