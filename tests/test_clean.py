"""lab.clean: its result depends on the images of a generator that has forgotten, and on no weights but its own."""
import pytest
import torch

import sfd_minimal
from conftest import assert_same, save_network, tiny_network
from edm_unet import BadInput, load_file, load_network
from lab import clean
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


def test_what_has_forgotten_nothing_and_a_folder_that_is_there_are_refused(forgetful, tiny, tmp_path):
    with pytest.raises(BadInput, match="is no one-step generator that has forgotten a label"):
        clean.main([str(tiny), "--out", str(tmp_path / "a")])
    (tmp_path / "b").mkdir()
    with pytest.raises(BadInput, match="is there already"):
        clean.main([str(forgetful(0)), "--out", str(tmp_path / "b")])
