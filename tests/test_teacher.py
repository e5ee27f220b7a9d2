"""The teacher's training: what its loss is smallest at, and where a run begins."""
import types

import pytest
import torch

import common
import train_teacher
from closed_form import SD, ring
from edm_unet import load_checkpoint

TRUTH = ring()


class Sharpened(torch.nn.Module):
    """E_0 + g (E_label - E_0) of the true posterior means; g is its only weight."""
    settings = types.SimpleNamespace(sigma_data=SD)

    def __init__(self, g):
        super().__init__()
        self.g = torch.nn.Parameter(torch.tensor(g))

    def forward(self, x, sigma, label):
        E_0 = TRUTH(x, sigma, 0 * label)
        return E_0 + self.g * (TRUTH(x, sigma, label) - E_0)


@pytest.mark.parametrize("guidance", [1.0, 1.3, 2.0])
def test_the_loss_is_smallest_at_the_guided_denoiser(guidance):
    """Its slope in g is linear: the zero of the line through two points of it is the guidance that was asked for."""
    torch.manual_seed(0)
    k = torch.randint(5, (40_000,))
    x, label, sigma = TRUTH.sample(k), torch.eye(5)[k], (0.5 + 1.2 * torch.randn(40_000, 1, dtype=torch.float64)).exp()

    def slope(g):
        torch.manual_seed(1)
        D = Sharpened(g)
        return torch.autograd.grad(train_teacher.edm_loss(D, x, sigma, label, guidance), D.g)[0].item()

    low, high = slope(0.5), slope(3.0)
    assert 0.5 - 2.5 * low / (high - low) == pytest.approx(guidance, rel=0.02)


def test_a_run_can_begin_at_another_teacher(tmp_path, monkeypatch, mnist_dir, tiny):
    monkeypatch.chdir(tmp_path)
    argv = ["--data", "mnist", "--data-dir", str(mnist_dir), "--steps", "1", "--batch", "4", "--guidance", "1.3"]
    train_teacher.main([*argv, "--out", "first"])
    train_teacher.main([*argv, "--out", "second", "--init-from", "first/teacher.pt", "--lr", "1e-9"])
    (first, _), (second, info) = (load_checkpoint(tmp_path / out / "teacher.pt") for out in ("first", "second"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert info["made_by"]["guidance"] == 1.3 and info["made_by"]["init_from"] == "first/teacher.pt"
    with pytest.raises(common.BadInput, match="another network"):
        train_teacher.main([*argv, "--out", "third", "--init-from", str(tiny)])
