"""Forgetting anywhere in label space: the map, the rows, the tie; and that it is off unless asked for."""
import pytest
import torch

import sfd_minimal
from conftest import ROOT
from lab.checkpoint import load_checkpoint, load_teacher
from lab.label_space import drawn_anywhere, tie

C_F, C_O = [0, 3], [1, 4]


@pytest.fixture
def teacher():
    network, content = load_checkpoint(ROOT / "teachers" / "mnist.pt")
    return network, content


def test_the_teacher_is_asked_about_what_the_map_makes_of_the_label(teacher):
    """v M: v with the coordinates of the labels to forget added to those of their overrides."""
    s = sfd_minimal.Settings(anywhere=0.25, forget_share=0.5)
    torch.manual_seed(0)
    c_phi, c_psi, forgotten = sfd_minimal.about_labels(s, teacher[0], C_F, C_O)(64)
    moved = c_psi.clone()
    moved[:, C_O] += c_psi[:, C_F]
    moved[:, C_F] = 0
    assert torch.allclose(c_phi, moved, atol=1e-6), "at the labels too the map is the override"
    one_hot = ((c_psi == 1).sum(1) == 1) & ((c_psi != 0).sum(1) == 1)
    assert one_hot.sum() == 48 and not one_hot[:16].any() and forgotten[:16].all()
    assert torch.equal(forgotten[16:], c_psi[16:][:, C_F].sum(1) == 1)


def test_label_space_is_reached_beyond_what_mixes_reach():
    torch.manual_seed(0)
    v = drawn_anywhere(3000, 10)
    mixes = (v >= 0).all(1) & ((v.sum(1) - 1).abs() < 1e-5)
    assert 0.3 < mixes.float().mean() < 0.37 and v.norm(dim=1).max() > 3.9
    assert (v.norm(dim=1) > 2).float().mean() > 0.15


def test_without_it_the_same_labels_are_drawn(teacher):
    """The paper's draw, number for number, whatever the option could do."""
    draws = []
    for s in (sfd_minimal.Settings(), sfd_minimal.Settings(anywhere=0.5)):
        torch.manual_seed(0)
        draws.append(sfd_minimal.about_labels(s, teacher[0], [0], [1])(64))
    (plain, wide), n = draws, 32
    assert all(torch.equal(a[n:], b[n:]) for a, b in zip(plain, wide))
    assert plain[2].float().mean() < 0.3 and wide[2][:n].all()


def test_tied_the_forgotten_label_says_what_its_override_says(teacher):
    network, _ = teacher
    before = network.model.map_label.weight.detach().clone()
    tie(network, C_F, C_O)
    changed = (network.model.map_label.weight != before).any(0)
    assert changed.nonzero()[:, 0].tolist() == C_F
    assert torch.equal(network.model.map_label.weight[:, C_F], before[:, C_O])


@pytest.mark.parametrize("share, tied", [(0.0, False), (0.5, True)])
def test_a_run_ties_last_and_only_if_asked_for(tiny, tmp_path, share, tied):
    phi, info = load_teacher(str(tiny), "mnist", "cpu")
    s = sfd_minimal.Settings(teacher=str(tiny), steps=2, batch=8, anywhere=share, device="cpu", out=str(tmp_path / "r"))
    generator, _ = sfd_minimal.train(s, phi, info, [0], [1])
    saved, _ = load_checkpoint(tmp_path / "r" / "generator.pt")
    for network in (generator, saved):
        weight = network.model.map_label.weight
        assert torch.equal(weight[:, 0], weight[:, 1]) == tied
