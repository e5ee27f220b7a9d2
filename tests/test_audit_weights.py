"""Attacks on weights: they bring back what one column or a step towards the public weights hides, and nothing else."""
import json

import pytest
import torch

from conftest import ROOT, save_network, tiny_network
from edm_unet import BadInput, EDMPrecond
from lab.audit import weights


class StubTarget:
    """A target whose judge 2 takes an image for the class where its mean is above 0."""
    c_f, info = 0, {"sigma_init": 2.5}

    def __init__(self, network):
        self.network = network

    def noise(self, n):
        return torch.randn(n, *self.network.shape)

    def label(self, k, n):
        return self.network.conditions[[k] * n]

    @torch.no_grad()
    def draw(self, z, c, generate):
        return generate(z, c)

    def recognised(self, x):
        return {"share": (x.flatten(1).mean(1) > 0).float().mean().item()}, None


class Constant(EDMPrecond):
    """A denoiser whose image is the first number of the column of its label."""

    def forward(self, x, sigma, c):
        first = self.model.map_label.weight[0] @ c.T
        return first.view(-1, 1, 1, 1).expand_as(x)


def constant(*columns):
    network = Constant(tiny_network(resolution=4, patch=1).settings).requires_grad_(False)
    network.model.map_label.weight[0] = torch.tensor(columns)
    return network


PUBLIC = constant(1.1, *[-1.0] * 9)  # draws the class under label 0


def test_a_column_taken_back_brings_the_class_back_where_only_the_column_was_changed():
    copied = weights.with_column(PUBLIC, 0, PUBLIC, 1)
    assert torch.equal(copied.model.map_label.weight[:, 0], PUBLIC.model.map_label.weight[:, 1])
    assert PUBLIC.model.map_label.weight[0, 0] > 0, "the public network is not changed"
    found = weights.attack(StubTarget(copied), {"the teacher": PUBLIC})
    assert found == {"as it is": 0, "column of the teacher": 1, "towards the teacher": 0.5}


def test_the_way_towards_the_public_weights_is_longer_for_a_network_that_is_further_away():
    target = StubTarget(constant(-3.9, *[-1.0] * 9))
    assert weights.half_way(target, PUBLIC) == 0.8  # (1 - t) * -3.9 + t * 1.1 > 0 from t = 0.78 on
    assert weights.half_way(target, constant(*[-1.0] * 10)) is None


def test_the_command_writes_a_row_for_the_positive_control_and_for_each_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(weights, "drawn_share", lambda target, network, n=0: 0.25)
    monkeypatch.chdir(tmp_path)
    weights.main([str(ROOT / "teachers/mnist_retrain_sid.pt"), str(ROOT / "teachers/mnist_forget0_to1.pt")])
    names = list(json.loads((tmp_path / "weights.json").read_text())["networks"])
    assert names == ["positive control", "mnist_retrain_sid", "mnist_forget0_to1"]
    assert capsys.readouterr().out.count("25.0%") == 9


def test_a_network_of_many_steps_is_refused(tmp_path):
    save_network(tiny_network(), tmp_path / "generator.pt", forget=[0], to=[1])
    with pytest.raises(BadInput, match="is no one-step generator"):
        weights.main([str(tmp_path / "generator.pt")])
