"""The weights that come with the project are what their numbers say, on a few hundred samples."""
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import CPU, ROOT
from edm_unet import EDMPrecond, NetSettings
from lab import evaluate
from lab.checkpoint import digest, load_checkpoint, load_teacher, read_file, un_erased
from lab.evaluate import Evaluator
from lab.judge import class_stats, load_judge
from lab.report import COLUMNS, read_rows
from lab.sample import draw, load_generator

TEACHERS = ROOT / "teachers"


def confusion(name, counts):
    """(K, K) how often the judge takes a network's images, counts[k] of each label, for each class."""
    generate, network, _ = load_generator(TEACHERS / name, CPU)
    labels = torch.arange(10).repeat_interleave(torch.tensor(counts))
    judge, _ = load_judge(TEACHERS / f"{name.split('_')[0]}_judge.pt", CPU)
    return class_stats(judge, draw(generate, labels, network, seed=5), labels, keep=0)["confusion"]


def recorded(name):
    """What stands beside every verdict: the same of 10,000 images, as it was measured once."""
    return read_file(TEACHERS / f"{name}_measured.pt", "measured")


def accuracy(confusion):
    return (confusion.diag().sum() / confusion.sum()).item()


@pytest.fixture(scope="module")
def drawn():
    """120 images of the teacher by 35 evaluations."""
    generate, teacher, info = load_generator(TEACHERS / "mnist.pt", CPU)
    assert info["nfe"] == 35
    labels = torch.arange(10).repeat_interleave(12)
    return labels, draw(generate, labels, teacher, seed=5)


@pytest.mark.parametrize("number", ["", "2"])
def test_teacher_and_judges_agree(drawn, number):
    labels, images = drawn
    judge, info = load_judge(TEACHERS / f"mnist_judge{number}.pt", CPU)
    assert info["accuracy"] >= 0.994
    of = {"": recorded("mnist")["stats"]["confusion"], "2": recorded("mnist")["confusion2"]}[number]
    assert of.sum() == 10_000
    assert accuracy(class_stats(judge, images, labels, keep=0)["confusion"]) > accuracy(of) - 0.03


def test_the_earlier_teacher_is_one_still():
    """Results of results/plain_teacher are of it."""
    teacher, info = load_teacher(TEACHERS / "mnist_plain.pt", "mnist", CPU)
    assert teacher.shape == (1, 28, 28) and len(info["classes"]) == 10 and len(teacher.conditions) == 10
    assert info["sha256"] == digest(TEACHERS / "mnist_plain.pt") != digest(TEACHERS / "mnist.pt")


@pytest.mark.parametrize("number", ["", "2"])
def test_judges_of_cifar10_know_photographs(number):
    """On the first five test images of each class, one class per row of the picture,
    and as they were recorded on all of them."""
    judge, info = load_judge(TEACHERS / f"cifar10_judge{number}.pt", CPU)
    with Image.open(ROOT / "tests" / "fixtures" / "cifar10_jpeg_test.png") as picture:
        images = torch.tensor(np.asarray(picture)).reshape(10, 32, 5, 32, 3).permute(0, 2, 4, 1, 3).flatten(0, 1)
    labels = torch.arange(10).repeat_interleave(5)
    stats = class_stats(judge, images, labels, keep=0)
    assert stats["confusion"].diag().sum() >= 42 and info["accuracy"] > 0.85
    (line,) = (line for line in (TEACHERS / "README.md").read_text().splitlines()
               if line.startswith(f"| `cifar10_judge{number}.pt`"))
    assert f"{100 * info['accuracy']:.2f} %" in line
    mirrored = class_stats(judge, images.flip(3), labels, keep=0)
    assert torch.allclose(stats["mean"], mirrored["mean"], atol=1e-4), (
        "a judge of photographs does not mind which way they look")
    if number == "":
        assert info["train"]["confusion"].sum() == 50_000 and info["test"]["confusion"].sum() == 10_000
        assert (info["test"]["confusion"].diag().sum() / 10_000).item() == pytest.approx(info["accuracy"])


@pytest.mark.parametrize("name", ["mnist", "mnist_sid", "cifar10", "cifar10_sid"])
def test_what_was_recorded_belongs_to_these_files(name):
    """So that a first run need not measure it again."""
    memory, data = recorded(name), name.removesuffix("_sid")
    assert memory["files"] == digest(*(TEACHERS / n for n in (f"{name}.pt", f"{data}_judge.pt", f"{data}_judge2.pt")))
    assert memory["protocol"] == evaluate.PROTOCOL and memory["dtype"] == "float32" and memory["machine"]["torch"]
    assert memory["per_label"] == evaluate.PER_LABEL == 1000 and memory["stats"]["confusion"].sum() == 10_000


@pytest.mark.parametrize("data, slack", [("mnist", 0.03), ("cifar10", 0.1)])
def test_one_step_generator_is_of_this_teacher(data, slack):
    name = f"{data}_sid"
    _, info = load_checkpoint(TEACHERS / f"{name}.pt")
    assert info["teacher_sha256"] == digest(TEACHERS / f"{data}.pt") and info["forget"] == []
    assert accuracy(confusion(f"{name}.pt", [30] * 10)) > accuracy(recorded(name)["stats"]["confusion"]) - slack


def test_teacher_of_cifar10_is_the_one_that_was_measured():
    """Forty images by 35 evaluations; and what is recorded of 10,000, as teachers/README.md says it."""
    generate, teacher, info = load_generator(TEACHERS / "cifar10.pt", CPU)
    assert info["nfe"] == 35 and info["classes"][0] == "airplane" and teacher.shape == (3, 32, 32)
    judge, _ = load_judge(TEACHERS / "cifar10_judge.pt", CPU)
    labels = torch.arange(10).repeat_interleave(4)
    seen = class_stats(judge, draw(generate, labels, teacher, seed=5), labels, keep=0)["confusion"]
    of = recorded("cifar10")["stats"]["confusion"]
    assert accuracy(seen) > accuracy(of) - 0.2
    said = re.search(r"\| judged as its label, % \| 65.9 \|(.*)\|", (TEACHERS / "README.md").read_text())
    assert f"{100 * accuracy(of):.1f}" == "65.9" and said[1].split("|") == [
        f" {100 * a:.1f} " for a in (of.diag() / of.sum(1)).tolist()]


def test_un_erased_generator_is_that_of_the_teacher_or_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no runs/ holds another
    evaluator = Evaluator.find(*load_teacher("", "mnist", CPU), [0], [1])
    path, _, info = un_erased(evaluator.info, CPU)
    assert path == TEACHERS / "mnist_sid.pt" and info["forget"] == []
    evaluator = Evaluator.find(*load_teacher(TEACHERS / "mnist_plain.pt", "mnist", CPU), [0], [1])
    assert un_erased(evaluator.info, CPU) is None


def test_forgetful_generator_is_of_this_teacher_and_forgets():
    _, info = load_checkpoint(TEACHERS / "mnist_forget0_to1.pt")
    assert info["teacher_sha256"] == digest(TEACHERS / "mnist.pt") and (info["forget"], info["to"]) == ([0], [1])
    c = confusion("mnist_forget0_to1.pt", [500] + [30] * 9)
    (row,) = (r for r in read_rows() if r["id"] == "paper-900-mnist-forget0-to1-seed0")
    assert info["settings"]["steps"] == int(row["steps"]) == 900
    assert c[0, 0] <= 1 and c[0, 1] >= 495, "of 500; once in 5,000 the judge sees a 0"
    assert c.diag()[1:].sum().item() / 270 > float(row["kept_accuracy"]) - 0.03


def test_weights_are_stored_in_half_precision():
    for name in ("mnist.pt", "mnist_plain.pt", "mnist_sid.pt", "mnist_forget0_to1.pt",
                 "cifar10.pt", "cifar10_sid.pt",
                 "mnist_judge.pt", "mnist_judge2.pt", "cifar10_judge.pt", "cifar10_judge2.pt"):
        kind = "judge" if "judge" in name else "denoiser"
        assert all(v.dtype == torch.float16 for v in read_file(TEACHERS / name, kind)["weights"].values()
                   if v.is_floating_point()), name


def test_committed_results_carry_their_circumstances():
    rows = read_rows()
    assert rows and all(tuple(row) == COLUMNS for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    beside = {(row["teacher"], row["forget"], row["to"], row["protocol"]) for row in rows if row["group"] == "teacher"}
    for row in rows:
        assert row["forget"] and row["to"] and row["fd"] and row["kept_accuracy"] and row["n"] and row["protocol"], row
        if row["group"] in ("teacher", "un_erased"):
            assert row["nfe"] == {"teacher": "35", "un_erased": "1"}[row["group"]], row
            continue
        assert row["seed"] and int(row["steps"]) > 0 and float(row["lr"]) > 0 and row["commit"], row
        if row["group"] != "sweep":  # quick looks, all on one machine
            assert row["torch"] and row["device"] and float(row["seconds"]) > 0 and float(row["teacher_fd"]) > 0, row
            assert (row["teacher"], row["forget"], row["to"], row["protocol"]) in beside, row
    of = lambda name: json.loads((ROOT / "results" / f"mnist_{name}.json").read_text())
    assert all(made["machine"]["torch"] for made in (of("baselines"), *of("audit")["networks"].values()))


def test_a_memory_is_used_as_long_as_it_says_the_same(tmp_path, capsys, monkeypatch):
    """Not with another file, protocol or fewer images, nor damaged."""
    evaluator, path = Evaluator("mnist", CPU, [0], [1]), tmp_path / "network.pt"
    path.write_bytes(b"known remembers what was drawn, not what this file holds")
    network, asked = EDMPrecond(NetSettings(model_channels=16, channel_mult=(1,), num_blocks=1, patch=4)), []
    generate = lambda z, c: asked.append(len(z)) or z

    def again(per_label=2):
        asked.clear()
        content = evaluator.known(path, generate, network, per_label, "")
        return sum(asked), content["stats"]["confusion"]

    n, first = again()
    assert n == 20 and first.sum() == 20 and again(1)[0] == 0 and torch.equal(again()[1], first)
    assert again(3)[0] == 30 and again(2)[0] == 0, "what was measured of more images does for fewer"
    (tmp_path / "network_measured.pt").write_bytes(b"cut short")
    assert again()[0] == 20 and "measured again" in capsys.readouterr().out and torch.equal(again()[1], first)
    path.write_bytes(b"another network")
    assert again()[0] == 20 and again()[0] == 0
    monkeypatch.setattr(evaluate, "PROTOCOL", 0)
    assert again()[0] == 20
