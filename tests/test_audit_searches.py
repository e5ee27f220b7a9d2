"""Independent searches: they find what a network holds, and networks are compared with controls, search by search."""
import itertools

import pytest
import torch

from conftest import CPU, ROOT, tiny_network
from edm_unet import BadInput
from lab.audit import searches
from lab.audit.target import Target
from lab.core.runs import seed_everything
from lab.core.tables import read_json
from lab.evaluate.draw import sampler

SIGMA_INIT = 2.5
FEW = searches.Settings(run=("x",), searches=3, judged=50)


class BrightnessJudge(torch.nn.Module):
    """Takes an image for class 0 where its mean is above 0, and for class 1 otherwise."""

    def forward(self, x):
        m = 20 * x.flatten(1).mean(1)
        return torch.stack([m, -m], 1), None


def target_of(network):
    judge = BrightnessJudge()
    return Target(sampler(network.requires_grad_(False), SIGMA_INIT), network,
                  {"nfe": 1, "sigma_init": SIGMA_INIT, "forget": [0], "to": [1]}, judge, judge, 0)


@pytest.mark.parametrize("way", searches.WAYS)
def test_searches_find_a_vector_that_makes_images_bright(way):
    seed_everything(0)
    target = target_of(tiny_network(resolution=4, patch=1))
    before = target.recognised(target.draw(target.noise(50), target.label(0, 50)))[0]["share"]
    found, vectors = searches.attack(target, FEW)
    assert before < 0.5, "the network itself must not draw the class, or the searches have nothing to find"
    assert searches.successes(found[way]) == 3
    assert len(vectors[way].unique(dim=0)) == 3, "each search ends at a vector of its own"


def test_a_search_keeps_the_best_of_its_starts():
    """Of four starts of each search one is near the goal, and no step is long enough to get there from elsewhere."""
    target = target_of(tiny_network(resolution=4, patch=1))
    goal = torch.tensor([-1.0, -1, 1, -1, -1, -1, -1, 1])

    def start(n):
        return goal[:n, None]

    def generate(z, c):
        return c.view(-1, 1, 1, 1).expand_as(z)

    target.generate, target.nfe = generate, 1
    way = searches.Way(target.network, start, lambda v: v, 1e-6, starts=4, steps=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searches, "sampler", lambda network, sigma_init: generate)
        assert torch.allclose(searches.search(target, way, 2), torch.ones(2, 1), atol=1e-3)


def test_vectors_inside_start_from_the_network_itself():
    """The vectors are added in every block: zeros change nothing, and others change the image."""
    target = target_of(tiny_network(resolution=4, patch=1))
    way, z = searches.inside(target), target.noise(2)
    generate, (d,) = sampler(way.network, SIGMA_INIT), way.start(1).shape[1:]
    unchanged = target.draw(z, target.label(0, 2))
    with torch.no_grad():
        assert torch.equal(generate(z, way.condition(torch.zeros(2, d))), unchanged)
        assert not torch.allclose(generate(z, way.condition(torch.randn(2, d))), unchanged, atol=1e-3)


def test_vectors_are_replayed_on_the_network_that_they_were_found_on():
    target = target_of(tiny_network(resolution=4, patch=1))
    found, vectors = searches.attack(target, FEW)
    again = searches.replay(target, vectors, FEW)
    assert {way: searches.successes(each) for way, each in again.items()} == {
        way: searches.successes(each) for way, each in found.items()}


def test_a_search_of_a_network_of_many_steps_takes_seven_evaluations_an_image():
    network, calls = tiny_network(resolution=4, patch=1), []
    target = target_of(network)
    target.nfe = 35
    network.register_forward_hook(lambda *of_call: calls.append(1))
    images = searches.quick_sampler(target, network)(target.noise(2), target.label(0, 2))
    assert images.shape == (2, 1, 4, 4) and len(calls) == 7


def test_positive_controls_differ_in_the_forgotten_column_alone():
    public = tiny_network()
    controls = searches.positive_controls(target_of(public), public, 1)
    columns = {name: control.network.model.map_label.weight for name, control in controls.items()}
    own = columns["unchanged"]
    assert torch.equal(own, public.model.map_label.weight)
    assert torch.equal(columns["column copied"][:, 0], own[:, 1])
    assert torch.allclose(columns["column mixed"][:, 0], own[:, 1:].mean(1))
    for changed in columns.values():
        assert torch.equal(changed[:, 1:], own[:, 1:])


# ------------------------------------------------------------------------------------------------------------ p-values

@pytest.mark.parametrize("group, controls, p", [
    ([10], [0, 0, 0], 1 / 4), ([0], [0, 0, 0], 1.0), ([5, 6], [0, 1, 2, 3], 1 / 15), ([3, 3], [3, 3], 1.0),
    ([0, 0, 0], [10, 10, 10], 1.0)])
def test_p_values_by_hand(group, controls, p):
    assert searches.p_value(group, controls) == pytest.approx(p)


def test_p_values_are_uniform_where_nothing_differs():
    """Over all ways to split seven different networks, a share of at most p has a p-value of at most p."""
    networks = [0, 1, 2, 4, 7, 8, 10]
    found = []
    for chosen in itertools.combinations(range(7), 3):
        rest = [networks[i] for i in range(7) if i not in chosen]
        found.append(searches.p_value([networks[i] for i in chosen], rest))
    for p in (0.05, 0.2, 0.5, 0.9):
        assert sum(value <= p for value in found) / len(found) <= p


# ---------------------------------------------------------------------------------------------------------- the table

def results(copied):
    """Numbers as in searches.json. copied: the shares of the searches inside the positive control "column copied"."""
    full, none = [1.0] * 10, [0.0] * 10
    return {"positive": {"unchanged": {"embedding": full, "inside": full},
                         "column copied": {"embedding": full, "inside": copied}},
            "controls": {"control-seed1": {"embedding": none, "inside": none},
                         "control-seed2": {"embedding": [0.49, 0.5, *none[2:]], "inside": none}},
            "networks": {"sfd-seed0": {"embedding": none, "inside": full},
                         "sfd-seed3": {"embedding": [0.9, *none[1:]], "inside": full}}}


def test_rows_are_groups_and_the_unit_is_the_search():
    lines = searches.table(results([1.0] * 10), {"sfd": "SFD, one stage"}).splitlines()
    assert [cell.strip() for cell in lines[-1].split("|")[1:-1]] == [
        "SFD, one stage", "2", "1 of 20, p = 0.83", "20 of 20, p = 0.17"]
    assert "1 of 20" in lines[-2] and "p =" not in lines[-2], "a control is not compared with itself"


@pytest.mark.parametrize("missed, brackets", [(1, False), (2, True)])  # of 20 searches of positive controls
def test_a_search_without_power_is_in_brackets(missed, brackets):
    row = searches.table(results([1.0] * (10 - missed) + [0.0] * missed), {}).splitlines()[-1]
    assert ("(20 of 20, p = 0.17)" in row) == brackets and "(1 of 20" not in row


# --------------------------------------------------------------------------------------------------------- the command

def test_the_command_writes_numbers_and_vectors_and_replays_them(tmp_path, monkeypatch, capsys):
    def quick(target, s):
        return ({way: [0.5] * s.searches for way in searches.WAYS}, {"embedding": torch.zeros(s.searches, 32),
                                                                     "inside": torch.zeros(s.searches, 1)})
    monkeypatch.setattr(searches, "attack", quick)
    sfd, control = ROOT / "teachers/mnist_forget0_to1.pt", ROOT / "teachers/mnist_retrain_sid.pt"
    common = [str(sfd), "--searches", "2", "--judged", "3", "--device", "cpu"]
    searches.main([*common, "--control", str(control), "--out", str(tmp_path)])
    found = read_json(tmp_path / "searches.json")
    assert list(found["positive"]) == ["unchanged", "column copied", "column mixed"]
    assert found["networks"] == {"mnist_forget0_to1": {"embedding": [0.5, 0.5], "inside": [0.5, 0.5]}}
    monkeypatch.setattr(searches, "attack", None)  # nothing is searched again
    searches.main([*common, "--control", str(control), "--out", str(tmp_path)])

    def no_vectors_inside(target, vectors, s):
        return {"embedding": searches.shares(target, searches.embedding(target), vectors["embedding"], s.judged)}
    monkeypatch.setattr(searches, "replay", no_vectors_inside)
    capsys.readouterr()
    searches.main([*common, "--replay", str(tmp_path / "mnist_forget0_to1.pt")])
    assert "mnist_forget0_to1 {'embedding': '0 of 2'}" in capsys.readouterr().out


def test_networks_of_one_and_of_35_evaluations_are_not_mixed():
    with pytest.raises(BadInput, match="one after the other"):
        searches.main([str(ROOT / "teachers/mnist_forget0_to1.pt"), "--control",
                       str(ROOT / "teachers/mnist_retrain.pt")])


def test_a_network_that_forgot_nothing_is_refused():
    with pytest.raises(BadInput, match="has forgotten 0 labels"):
        searches.main([str(ROOT / "teachers/mnist_sid.pt"), "--device", CPU.type])
