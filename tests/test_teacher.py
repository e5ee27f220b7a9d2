"""The teacher's training: what its loss is smallest at, and where a run begins."""
import dataclasses
from math import inf

import pytest
import torch

import train_teacher
from conftest import ROOT
from lab.checkpoint import load_checkpoint
from lab.closed_form import Guided, ring
from lab.errors import BadInput


@pytest.mark.parametrize("guidance, below, sigmas, found", [
    (1.0, inf, (0, inf), 1.0), (1.3, inf, (0, inf), 1.3), (2.0, inf, (0, inf), 2.0),
    (2.0, 1.5, (0, 1.4), 2.0), (2.0, 1.5, (1.5, inf), 1.0)])
def test_the_loss_is_smallest_at_the_guided_denoiser(guidance, below, sigmas, found):
    """Its slope in g is linear: the zero of the line through two points of it is the guidance that was asked for,
    at those noise levels."""
    torch.manual_seed(0)
    k = torch.randint(5, (40_000,))
    x, label, sigma = (ring().sample(k), torch.eye(5)[k],
                       (0.5 + 1.2 * torch.randn(40_000, 1, dtype=torch.float64)).exp().clamp(*sigmas))

    def slope(g):
        torch.manual_seed(1)
        D = Guided(ring(), g)
        return torch.autograd.grad(train_teacher.edm_loss(D, x, sigma, label, guidance, below), D.g)[0].item()

    low, high = slope(0.5), slope(3.0)
    assert 0.5 - 2.5 * low / (high - low) == pytest.approx(found, rel=0.02)


def test_a_run_can_begin_at_another_teacher(tmp_path, monkeypatch, mnist_dir, tiny):
    monkeypatch.chdir(tmp_path)
    recipe = train_teacher.TEACHERS["mnist"]
    monkeypatch.setitem(train_teacher.TEACHERS, "mnist",
                        recipe | {"net": dataclasses.replace(recipe["net"], model_channels=8)})
    argv = ["--data", "mnist", "--data-dir", str(mnist_dir), "--steps", "1", "--batch", "4", "--guidance", "1.3",
            "--device", "cpu"]
    train_teacher.main([*argv, "--out", "first"])
    train_teacher.main([*argv, "--out", "second", "--init-from", "first/teacher.pt", "--lr", "1e-9"])
    (first, _), (second, info) = (load_checkpoint(tmp_path / out / "teacher.pt") for out in ("first", "second"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert info["made_by"]["guidance"] == 1.3 and info["made_by"]["init_from"] == "first/teacher.pt"
    with pytest.raises(BadInput, match="another network"):
        train_teacher.main([*argv, "--out", "third", "--init-from", str(tiny)])
    with pytest.raises(BadInput, match="one-step generator, not a teacher"):
        train_teacher.main([*argv, "--out", "third", "--init-from", str(ROOT / "teachers" / "mnist_forget0_to1.pt")])
