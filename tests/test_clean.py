"""lab.clean: a generator starts from the weights, and learns from the network, that the docstring names."""
import copy

import pytest
import torch

import sfd_minimal
from conftest import assert_same, save_network, tiny_network
from edm_unet import BadInput, load_file, load_network
from lab import clean, distill
from lab.audit.target import load_target
from lab.evaluate.evaluator import Evaluator

SHORT = ["--images", "40", "--teacher-steps", "3", "--steps", "2"]


@pytest.fixture
def forgetful(tmp_path, tiny):
    """Return make(seed): the file of a one-step generator that has forgotten the 0."""
    def make(seed):
        torch.manual_seed(seed)
        path = tmp_path / f"forgetful{seed}" / "generator.pt"
        save_network(tiny_network(), path, forget=[0], to=[1], sigma_init=2.5, settings={"teacher": str(tiny)})
        return path
    return make


@pytest.fixture
def evaluations(monkeypatch):
    """The evaluations that were made: (folder, generator, info)."""
    made = []
    monkeypatch.setattr(Evaluator, "evaluate", lambda self, *args: made.append(args))
    return made


def test_the_fresh_network_sees_the_generators_images_under_the_labels_they_were_drawn_for(forgetful, monkeypatch,
                                                                                           evaluations, tmp_path):
    seen = []

    def batches(images, labels, batch, flip):
        seen.append((images, labels))
        return real(images, labels, batch, flip)

    real = clean.train_teacher.batches
    monkeypatch.setattr(clean.train_teacher, "batches", batches)
    clean.main([str(forgetful(0)), "--out", str(tmp_path / "clean"), *SHORT])
    (images, labels), = seen
    generate, network, _ = clean.load_generator(forgetful(0), "cpu")
    assert labels.bincount(minlength=10).tolist() == [4] * 10
    assert torch.equal(images, clean.draw_images(generate, labels, network, 0))


@pytest.mark.parametrize("data, flip, p_mean", [("mnist", False, 0.2), ("cifar10", True, -0.4), ("birds", True, -0.4)])
def test_the_fresh_network_is_trained_as_a_teacher_of_the_same_data(data, flip, p_mean, monkeypatch, tmp_path):
    seen = []

    def train(s, data, network, average, optimizer, first):
        seen.append((s.steps, s.p_mean, next(data)[0].shape[0]))
        yield {"loss": torch.tensor(0.0)}

    def batches(images, labels, batch, flip):
        flips.append(flip)
        return real(images, labels, batch, flip)

    flips, real = [], clean.train_teacher.batches
    monkeypatch.setattr(clean.train_teacher, "batches", batches)
    monkeypatch.setattr(clean.train_teacher, "train", train)
    s = clean.Settings(teacher_steps=1, out=str(tmp_path))
    info = {"data": data, "classes": list("abcdefghij"), "sha256": "", "sigma_init": 2.5}
    images = torch.zeros(20, 1, 28, 28, dtype=torch.uint8)
    clean.train_fresh(s, tiny_network().settings, images, torch.arange(20) % 10, info, torch.device("cpu"))
    batch = 64 if data == "mnist" else 512
    assert flips == [flip] and seen == [(1, p_mean, batch)]


def test_two_generators_with_the_same_images_give_the_same_networks(forgetful, monkeypatch, evaluations, tmp_path):
    same = torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8)
    monkeypatch.setattr(clean, "draw_images", lambda *args, **options: same)
    for seed in (0, 1):
        clean.main([str(forgetful(seed)), "--out", str(tmp_path / f"clean{seed}"), *SHORT])
    a, b = (load_file(tmp_path / f"clean{seed}" / "generator.pt") for seed in (0, 1))
    assert_same(a["weights"], b["weights"])
    assert not torch.equal(*(next(iter(load_file(forgetful(seed))["weights"].values())) for seed in (0, 1)))


def test_the_generator_is_evaluated_as_having_forgotten_and_fresh_pt_starts_sfd(forgetful, evaluations, tmp_path, tiny):
    clean.main([str(forgetful(0)), "--out", str(tmp_path / "clean"), *SHORT])
    (out, generator, info), = evaluations
    assert info["forget"] == [0] and info["to"] == [1]
    saved, _ = load_network(out / "generator.pt")
    assert_same(dict(saved.state_dict()), dict(generator.state_dict()))
    teacher, _ = load_network(tiny)
    fresh, _ = load_network(out / "teacher.pt")
    for network in sfd_minimal.load_start(out / "fresh.pt", teacher, sfd_minimal.Settings()):
        assert_same(dict(network.state_dict()), dict(fresh.state_dict()))


@pytest.fixture
def edited(tmp_path):
    """The file of a network like those of lab.baselines: it has forgotten the 0, and draws in 35 evaluations."""
    torch.manual_seed(1)
    path = tmp_path / "edited" / "generator.pt"
    save_network(tiny_network(), path, forget=[0], to=[1], settings={}, seconds=100.0)
    return path


@pytest.fixture
def fresh(tmp_path):
    """A fresh.pt, with different weights for the generator and the fake score."""
    torch.manual_seed(2)
    path = tmp_path / "fresh.pt"
    save_network(tiny_network(), path, fake=tiny_network().state_dict(), sigma_init=2.5)
    return path


@pytest.mark.parametrize("start", ["own", "fresh"])
def test_an_edited_network_is_the_teacher_and_the_start_is_its_own_or_the_named_one(edited, fresh, start, tmp_path,
                                                                                    evaluations, monkeypatch):
    begun = []

    def begin(*args):
        networks = real(*args)
        begun.extend(copy.deepcopy([networks.teacher, networks.generator, networks.fake]))
        return networks

    real = distill.begin
    monkeypatch.setattr(distill, "begin", begin)
    options = [] if start == "own" else ["--init-from", str(fresh)]
    clean.main([str(edited), "--out", str(tmp_path / "out"), "--steps", "2", *options])
    own, other = load_file(edited), load_file(fresh)
    expected = [own["weights"], own["weights"], own["weights"]]
    if start == "fresh":
        expected = [own["weights"], other["weights"], other["fake"]]
    for network, weights in zip(begun, expected, strict=True):
        assert_same(dict(network.state_dict()), weights)


def test_the_generator_of_an_edited_network_is_evaluated_and_audited_as_having_forgotten(edited, evaluations, tmp_path):
    clean.main([str(edited), "--steps", "2"])
    (out, generator, info), = evaluations
    assert out == tmp_path / "edited-clean"
    assert (info["forget"], info["to"], info["sigma_init"]) == ([0], [1], 2.5)
    assert info["seconds"] > 100
    target = load_target(out / "generator.pt", "cpu")
    assert target.nfe == 1 and target.c_f == 0
    assert_same(dict(target.network.state_dict()), dict(generator.state_dict()))


def test_mixed_weights_lie_between_the_teachers_and_fresh_ones_and_start_sfd(tiny, tmp_path, capsys):
    for share in ("0.25", "1"):
        clean.main([str(tiny), "--mixed", share, "--seed", "3", "--out", str(tmp_path / share)])
    teacher, _ = load_network(tiny)
    quarter, all_fresh = (sfd_minimal.load_start(tmp_path / share / "start.pt", teacher, sfd_minimal.Settings())
                          for share in ("0.25", "1"))
    for p, q, mixed, fake in zip(teacher.parameters(), all_fresh[0].parameters(), *(n.parameters() for n in quarter)):
        assert torch.allclose(mixed, 0.75 * p + 0.25 * q, atol=1e-6)
        assert torch.equal(mixed, fake)
    assert not torch.equal(teacher.model.map_label.weight, all_fresh[0].model.map_label.weight)
    assert str(tmp_path / "1" / "start.pt") in capsys.readouterr().out


def test_a_teacher_that_is_gone_is_noticed_before_any_training(tmp_path):
    path = tmp_path / "run" / "generator.pt"
    save_network(tiny_network(), path, forget=[0], to=[1], sigma_init=2.5,
                 settings={"teacher": str(tmp_path / "gone.pt")})
    with pytest.raises(BadInput, match="gone.pt"):
        clean.main([str(path), "--out", str(tmp_path / "out"), *SHORT])
    assert not (tmp_path / "out").exists()


def test_what_has_forgotten_nothing_and_a_folder_that_is_there_are_refused(forgetful, tiny, tmp_path):
    with pytest.raises(BadInput, match="has forgotten no label"):
        clean.main([str(tiny), "--out", str(tmp_path / "a")])
    (tmp_path / "b").mkdir()
    with pytest.raises(BadInput, match="is there already"):
        clean.main([str(forgetful(0)), "--out", str(tmp_path / "b")])
    for network, share in ((tiny, "1.5"), (forgetful(0), "0.5")):
        with pytest.raises(BadInput, match="--mixed takes a share, at most 1, and the file of a teacher"):
            clean.main([str(network), "--mixed", share, "--out", str(tmp_path / "c")])
