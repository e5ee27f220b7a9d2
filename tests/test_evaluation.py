"""The numbers of a run can be trusted: independent formulas, judges that fit, the same images for every network."""
import csv
import json
import math
import sys
import urllib.error
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from conftest import CPU, ROOT, assert_same, image_folder, module, run, save_network, tiny_network
from edm_unet import BadInput, RunFailed, digest, load_file, load_network
from lab import fid, judge, sample
from lab.core import runs
from lab.core.files import find_sid, load_teacher
from lab.core.images import load_folder
from lab.evaluate import evaluate_run, evaluator, figures
from lab.evaluate.__main__ import main as evaluate_command
from lab.evaluate.draw import draw_images, in_float32, load_generator, sampler
from lab.evaluate.evaluator import Evaluator
from lab.evaluate.figures import samples_figure
from lab.evaluate.judges import Judge, class_stats, load_judge
from lab.evaluate.metrics import frechet, label_metrics, moments, precision_recall
from train_teacher import to_float

TEACHERS = ROOT / "teachers"
MNIST = [f"{k} - {name}" for k, name in enumerate("zero one two three four five six seven eight nine".split())]


# ------------------------------------------------------------------------------------------------------- the formulas

class Stub(torch.nn.Module):
    """A judge of two classes: the logits are the first two pixels, the features the first three."""
    settings = {"num_classes": 2}

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        pixels = x.flatten(1)
        return pixels[:, :2], pixels[:, :3]


def test_statistics_of_images_are_those_of_a_loop_over_them():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (11, 1, 2, 2)).astype(np.uint8)
    labels = np.array([0, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1])
    stats = class_stats(Stub(), torch.tensor(images), torch.tensor(labels), keep=500, batch=4)
    pixels = images.reshape(11, 4) / 127.5 - 1
    for k in (0, 1):
        rows = pixels[labels == k]
        taken_for = rows[:, :2].argmax(1)
        p = np.exp(rows[:, :2]) / np.exp(rows[:, :2]).sum(1, keepdims=True)
        assert stats["confusion"][k].tolist() == [(taken_for == 0).sum(), (taken_for == 1).sum()]
        assert stats["entropy"][k] == pytest.approx(-(p * np.log(p)).sum(1).mean(), abs=1e-6)
        assert stats["mean"][k].numpy() == pytest.approx(rows[:, :3].mean(0), abs=1e-6)
        outer = np.mean([np.outer(row, row) for row in rows[:, :3]], axis=0)
        assert stats["second"][k].numpy() == pytest.approx(outer, abs=1e-6)
        assert stats["features"][k].numpy() == pytest.approx(rows[:4, :3], abs=1e-3), "as many as label 0 has"


def test_moments_may_be_of_the_first_images_of_each_label():
    g = torch.Generator().manual_seed(0)
    images, labels = torch.randint(0, 256, (11, 1, 2, 2), generator=g).byte(), torch.tensor([0] * 3 + [1] * 8)
    first = torch.tensor([0, 1, 2, 3, 4, 5])
    cut, few = class_stats(Stub(), images, labels, moments_of=3), class_stats(Stub(), images[first], labels[first])
    for name in ("mean", "second"):
        assert torch.equal(cut[name], few[name]), name
    for name in ("confusion", "entropy", "features"):
        assert torch.equal(cut[name], class_stats(Stub(), images, labels)[name]), name


def features_and_stats(seed, counts=(40, 40), D=5):
    """Random features of each label, [(n, D)], and their statistics."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.randn(D, D, generator=g, dtype=torch.float64)
    features = [torch.randn(n, D, generator=g, dtype=torch.float64) @ scale + k for k, n in enumerate(counts)]
    stats = {"mean": torch.stack([f.mean(0) for f in features]),
             "second": torch.stack([f.T @ f / len(f) for f in features])}
    return features, stats


def test_moments_of_labels_are_those_of_their_pooled_features():
    features, stats = features_and_stats(0)
    mean, covariance = moments(stats, [0, 1])
    pooled = torch.cat(features).numpy()
    assert mean.numpy() == pytest.approx(pooled.mean(0))
    assert covariance.numpy() == pytest.approx(np.cov(pooled.T, ddof=0))
    features, stats = features_and_stats(1, counts=(10, 70))
    mean, covariance = moments(stats, [0, 1], weights=torch.tensor([10, 70]))
    pooled = torch.cat(features).numpy()
    assert mean.numpy() == pytest.approx(pooled.mean(0))
    assert covariance.numpy() == pytest.approx(np.cov(pooled.T, ddof=0))


def test_frechet_distance_is_the_textbook_formula():
    """Also where a covariance is singular, as that of features that never fire."""
    (_, a), (_, b) = features_and_stats(0), features_and_stats(1)
    for cut in (5, 3):
        pair = []
        for stats in (a, b):
            mean, covariance = moments(stats, [0, 1])
            covariance[cut:], covariance[:, cut:] = 0, 0
            pair.append((mean, covariance))
        (m_a, c_a), (m_b, c_b) = ((m.numpy(), c.numpy()) for m, c in pair)
        root_trace = np.sqrt(np.clip(np.linalg.eigvals(c_a @ c_b).real, 0, None)).sum()
        expected = ((m_a - m_b) ** 2).sum() + np.trace(c_a) + np.trace(c_b) - 2 * root_trace
        assert frechet(*pair) == pytest.approx(expected, rel=1e-6)
        assert frechet(pair[0], pair[0]) == pytest.approx(0, abs=1e-9)


def covered(points, support, k=3):
    """The share of points in the ball of some support point, one distance at a time."""
    count = 0
    for p in points:
        inside = False
        for s in support:
            distances = sorted(math.dist(s, other) for other in support)
            inside = inside or math.dist(p, s) <= distances[k]  # distances[0] is that of s to itself
        count += inside
    return count / len(points)


def test_precision_is_of_the_fake_images_and_recall_of_the_real_ones():
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(30, 2, generator=g), 0.3 * torch.randn(20, 2, generator=g)
    precision, recall = precision_recall(real, fake)
    assert precision == pytest.approx(covered(fake.tolist(), real.tolist()))
    assert recall == pytest.approx(covered(real.tolist(), fake.tolist()))
    assert precision > recall + 0.2, "fake images with too little variety"
    assert precision_recall(real, fake[:3]) == (None, None)


def test_metrics_of_a_confusion_matrix():
    """Three labels: label 0 is forgotten and drawn as 1, or as either kept label."""
    confusion = torch.tensor([[1, 6, 3], [0, 8, 2], [1, 0, 9]])
    confusion2 = torch.tensor([[2, 8, 0], [0, 10, 0], [5, 0, 5]])
    _, stats = features_and_stats(0, counts=(10, 10, 10))
    _, real = features_and_stats(1, counts=(10, 10, 10))
    for s in (stats, real):
        s |= {"features": torch.randn(3, 8, 5).half(), "entropy": torch.zeros(3)}
    measured = {"stats": stats | {"confusion": confusion}, "confusion2": confusion2}
    m = label_metrics(measured, real, real, [0], [1])
    assert m["ua"] == pytest.approx(0.9) and m["ua_judge2"] == pytest.approx(0.8)
    assert m["override_share"] == pytest.approx(0.6) and m["override_share_judge2"] == pytest.approx(0.8)
    assert m["kept_accuracy"] == pytest.approx(0.85) and m["kept_accuracy_judge2"] == pytest.approx(0.75)
    assert m["per_class_accuracy"] == pytest.approx([0.1, 0.8, 0.9]) and (m["n"], m["n_forgotten"]) == (30, 10)
    assert m["fd"] == frechet(moments(stats, [1, 2]), moments(real, [1, 2]))
    assert m["fd_floor"] == pytest.approx(0, abs=1e-6)
    assert m["fd_override"] == frechet(moments(stats, [0]), moments(real, [1]))
    kept_real, kept_fake = (s["features"][1:].flatten(0, 1).float() for s in (real, stats))
    assert (m["precision"], m["recall"]) == precision_recall(kept_real, kept_fake)
    unchanged = label_metrics(measured, real, real, [0], [1], erased=False)
    assert unchanged["fd_override"] == frechet(moments(stats, [1]), moments(real, [1]))
    at_random = label_metrics(measured, real, real, [0], [-1])
    assert at_random["override_share"] == pytest.approx(0.9)
    assert at_random["fd_override"] == frechet(moments(stats, [0]), moments(real, [1, 2]))
    assert "ua" not in label_metrics(measured, real, real, [], [])


def compared_as_the_override(c_f, c_o, erased, monkeypatch):
    """[(real or drawn, label, number of features)] that precision and recall of the override compare, of six labels."""
    sets = []
    monkeypatch.setattr("lab.evaluate.metrics.precision_recall", lambda *pair: sets.append(pair) or (0.25, 0.75))
    k = torch.arange(6)
    stats = {"features": k.view(6, 1, 1).expand(6, 50, 2).half(), "entropy": torch.zeros(6), "mean": torch.zeros(6, 2),
             "second": torch.zeros(6, 2, 2), "confusion": torch.ones(6, 6)}
    m = label_metrics({"stats": stats, "confusion2": stats["confusion"]}, stats, stats, c_f, c_o, erased)
    assert (m["precision_override"], m["recall_override"]) == (0.25, 0.75)
    found = []
    for name, features in zip(("real", "drawn"), sets[1]):
        counts = features[:, 0].long().bincount()
        found += [(name, label, counts[label].item()) for label in counts.nonzero()[:, 0].tolist()]
    return found


@pytest.mark.parametrize("c_f, c_o, real, drawn", [
    ([0], [1], {1: 50}, {0: 50}), ([0, 3], [1, 4], {1: 50, 4: 50}, {0: 50, 3: 50}),
    ([0, 3], [1, 1], {1: 50}, {0: 25, 3: 25}), ([0], [-1], dict.fromkeys(range(1, 6), 10), {0: 50})],
    ids=["one", "two", "one override for two", "any override"])
def test_recall_of_the_override_compares_as_many_images_of_a_run_as_of_the_teacher(c_f, c_o, real, drawn, monkeypatch):
    real = [("real", *item) for item in real.items()]
    assert compared_as_the_override(c_f, c_o, True, monkeypatch) == real + [("drawn", *item) for item in drawn.items()]
    own = [("drawn", label, count) for _, label, count in real]
    assert compared_as_the_override(c_f, c_o, False, monkeypatch) == real + own


# --------------------------------------------------------------------------------------------------------- drawing

def test_a_label_has_the_same_noise_whatever_else_is_drawn(tiny):
    """Networks are compared on the same images, and one label alone is the same as among others."""
    _, network, _ = load_generator(tiny, CPU)
    noises = []

    def look(z, c):
        noises.append(z)
        return z

    def draw(labels, seed, **options):
        return draw_images(look, torch.tensor(labels), network, seed, **options)

    mixed = [3, 3, 5, 3, 5]
    several = draw(mixed, 7)
    assert torch.equal(several[[0, 1, 3]], draw([3] * 4, 7)[:3]) and torch.equal(several[[2, 4]], draw([5, 5], 7))
    assert torch.equal(several, draw(mixed, 7, batch=2)) and not torch.equal(several, draw(mixed, 8))
    assert len(noises[0].flatten(1).unique(dim=0)) == 5


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_the_noise_of_all_results_is_that_of_one_call_for_each_label(shape):
    """Every published number was measured on this noise."""
    labels, noises = torch.tensor([1, 0, 1, 1, 0]), []
    network = SimpleNamespace(shape=shape, conditions=torch.eye(2))

    def look(z, c):
        noises.append(z)
        return z

    draw_images(look, labels, network, seed=7, batch=2)
    for k in (0, 1):
        g = torch.Generator().manual_seed(70_000 + k)
        assert torch.equal(torch.cat(noises)[labels == k], torch.randn(int((labels == k).sum()), *shape, generator=g))


def test_a_generator_draws_in_one_evaluation_and_a_teacher_in_35(tiny, tmp_path):
    network, _ = load_network(tiny)
    save_network(network, tmp_path / "generator.pt", sigma_init=2.5)
    for path, nfe in ((tiny, 35), (tmp_path / "generator.pt", 1)):
        generate, network, info = load_generator(path, CPU)
        calls = []
        network.register_forward_hook(lambda *_: calls.append(1))
        z, c = torch.randn(2, 1, 28, 28, requires_grad=True), network.conditions[:2].requires_grad_()
        with in_float32(network):
            images = generate(z, c)
        assert len(calls) == info["nfe"] == nfe
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(images.sum(), (z, c))), "attacks search both"
    with in_float32(network):
        assert torch.equal(images, network(2.5 * z, 2.5, c)), "the last of them is the one-step generator"


def test_networks_are_evaluated_in_float32(tiny):
    network, _ = load_network(tiny)
    network.bf16 = True
    with pytest.raises(RuntimeError, match="inside"):
        with in_float32(network):
            assert not network.bf16
            raise RuntimeError("inside")
    assert network.bf16


# ------------------------------------------------------------------------------------------ samples for other programs

@pytest.fixture
def generator_run(tiny, tmp_path, monkeypatch):
    """A working directory with the folder `run`, in which lies a generator that has learned nothing."""
    monkeypatch.chdir(tmp_path)
    save_network(load_network(tiny)[0], tmp_path / "run" / "generator.pt", sigma_init=2.5, classes=MNIST)
    return tmp_path


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_samples_in_every_form(generator_run):
    options = ["--label", "3", "five", "--n", "6", "--seed", "7", "--device", "cpu", "--out"]
    sample.main(["run/generator.pt", *options, "some images.npz"])
    with np.load("some images.npz") as file:
        images, labels = file["images"], file["labels"]
    assert images.shape == (6, 28, 28, 1) and images.dtype == np.uint8 and labels.tolist() == [3, 3, 3, 5, 5, 5]
    grid = images.reshape(2, 3, 28, 28).swapaxes(1, 2).reshape(56, 84)
    for name in ("grid.png", "GRID.BMP"):
        sample.main(["run", *options, name])
        assert np.array_equal(pixels(name), grid)
    sample.main(["run", *options, "new/folder"])
    files = sorted((generator_run / "new" / "folder").iterdir())
    assert [f.name for f in files][3:] == ["000003-label5.png", "000004-label5.png", "000005-label5.png"]
    assert len(files) == 6 and np.array_equal(pixels(files[4]), images[4, :, :, 0])


def test_samples_replace_no_file_and_a_full_disk_leaves_none(generator_run, monkeypatch):
    options = ["run", "--n", "3", "--device", "cpu", "--out"]
    for name in ("a.npz", "grid.png", "folder"):
        sample.main([*options, name])
        before = (generator_run / name).read_bytes() if name != "folder" else None
        with pytest.raises(BadInput):
            sample.main([*options, name, "--seed", "1"])
        assert before is None or (generator_run / name).read_bytes() == before
    for name in ("a.pt", "a.npz/below.png"):
        with pytest.raises(BadInput):
            sample.main([*options, name])

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(BadInput):
        sample.main([*options, "b.npz"])
    assert sorted(p.name for p in generator_run.iterdir()) == ["a.npz", "folder", "grid.png", "run"]


def test_a_folder_of_samples_is_drawn_and_written_in_parts(generator_run, monkeypatch):
    files_there, load = [], load_generator

    def watched(path, device):
        generate, network, info = load(path, device)

        def watch(z, c):
            files_there.append(len(list((generator_run / "many").iterdir())))
            return generate(z, c)
        return watch, network, info

    monkeypatch.setattr(sample, "load_generator", watched)
    sample.main(["run", "--label", "3", "--n", "600", "--device", "cpu", "--out", "many"])
    assert files_there == [0, 250, 500] and len(list((generator_run / "many").iterdir())) == 600


@pytest.mark.parametrize("options, word", [
    (["--label", "", "--out", "a.png"], "label"), (["--label", "3", " ", "--out", "a.png"], "label"),
    (["--n", "587", "--out", "a.webp"], "16436x28"), (["--out", "a.ico"], "a.ico"), (["--out", "a.icns"], "a.icns"),
    (["--out", "a.xbm"], "a.xbm"), (["--out", "a.pt"], "a.pt"), (["--out", "run/generator.pt/a.png"], "a.png")])
def test_what_cannot_be_written_is_said_before_it_is_drawn(options, word, generator_run, monkeypatch):
    def drawn(z, c):
        pytest.fail("drawn")

    monkeypatch.setattr("lab.evaluate.draw.sampler", lambda *args: drawn)
    with pytest.raises(BadInput, match=word) as e:
        sample.main(["run", "--device", "cpu", *options])
    assert "\n" not in str(e.value)
    assert [path.name for path in generator_run.iterdir()] == ["run"]


# ------------------------------------------------------------------------------------------------ training the judges

def test_an_epoch_has_each_image_once_and_the_next_epoch_its_mirror_image():
    images, labels = torch.arange(24, dtype=torch.uint8).reshape(8, 1, 1, 3), torch.arange(8)
    seen, orders = [], []
    for epoch in range(2):
        parts = [judge.epoch_batch(images, labels, 4, 2 * epoch + i, flip=True) for i in range(2)]
        x, c = (torch.cat(p) for p in zip(*parts))
        assert sorted(c.tolist()) == list(range(8))
        seen.append(x[c.argsort()])
        orders.append(c.tolist())
    assert orders[0] != orders[1]
    plain = to_float(images)
    for a, b, image in zip(*seen, plain):
        found = {tuple(a.flatten().tolist()), tuple(b.flatten().tolist())}
        assert found == {tuple(image.flatten().tolist()), tuple(image.flip(2).flatten().tolist())}
    x, c = judge.epoch_batch(images, labels, 4, 3, flip=False)
    assert torch.equal(x, plain[c]) and torch.equal(judge.epoch_batch(images, labels, 4, 3, flip=False)[1], c)


def test_photographs_are_shifted_partly_hidden_and_grow_sharper():
    x = torch.rand(40, 3, 32, 32) * 2 - 1
    sides = [judge.shift_and_hide(x, progress).shape[2] for progress in (0.0, 0.3, 0.4, 0.6, 0.7, 0.99)]
    assert sides == [24, 24, 28, 28, 32, 32]
    padded, hidden = F.pad(x, (2, 2, 2, 2), mode="reflect"), []
    for image, around in zip(judge.shift_and_hide(x, 0.99), padded):
        grey = (image == 0).all(0)
        windows = around.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)  # (25, 3, 32, 32)
        assert any(torch.equal(image, window.masked_fill(grey, 0.0)) for window in windows)
        rows, columns = grey.any(1).sum().item(), grey.any(0).sum().item()
        assert grey.sum() == rows * columns and 5 <= rows <= 9 and 5 <= columns <= 9  # smaller at the border
        hidden.append(rows * columns)
    assert max(hidden) == 81


def test_drawings_keep_their_size_and_their_background():
    x = torch.full((4, 1, 28, 28), -1.0)
    x[:, :, 10:18, 10:18] = 1
    y = judge.jitter(x, 0.5)
    assert y.shape == x.shape and not torch.equal(x, y) and torch.equal(y[:, :, 0], x[:, :, 0])
    assert y.mean().item() == pytest.approx(x.mean().item(), abs=0.1)


def test_whitening_filters_answer_patches_without_correlation():
    torch.manual_seed(0)
    x = F.avg_pool2d(torch.randn(200, 3, 33, 33), 2, 1)  # neighbours are alike
    x = x + 0.3 * x.flip(1)                              # and so are the channels
    filters = judge.whitening(x)
    assert filters.shape == (24, 3, 2, 2) and torch.equal(filters[:12], -filters[12:])
    answers = F.conv2d(x, filters[:12]).transpose(0, 1).flatten(1)
    assert torch.allclose(answers @ answers.T / answers.shape[1], torch.eye(12), atol=0.1)
    raw = F.unfold(x, 2).transpose(0, 1).flatten(1)
    assert (torch.corrcoef(raw) - torch.eye(12)).abs().max() > 0.3, "the patches themselves are correlated"


@pytest.mark.parametrize("side", [16, 20, 32])
def test_the_judge_of_photographs_takes_any_side_from_16(side):
    logits, features = Judge("resnet9", 32, 3, 10, width=4).eval()(torch.zeros(2, 3, side, side))
    assert logits.shape == (2, 10) and features.shape == (2, 128)
    with pytest.raises(ValueError):
        Judge("resnet9", 15, 3, 10, width=4)


def test_features_of_a_layer_are_sums_over_pixels_and_means_over_the_mirror_image():
    torch.manual_seed(0)
    late = Judge("resnet9", 32, 3, 10, width=4, mirror=True)
    early = Judge("resnet9", 32, 3, 10, width=4, mirror=True, feature_layers=12)
    early.load_state_dict(late.state_dict())
    x = torch.randn(3, 3, 32, 32)
    for training in (False, True):
        logits, features = early.train(training)(x)
        of_layers = early.trunk[:12]
        expected = of_layers(x).sum((2, 3))
        if not training:
            expected = (expected + of_layers(x.flip(3)).sum((2, 3))) / 2
        assert features.shape == (3, 16) and torch.allclose(features, expected, rtol=1e-4)
        assert torch.equal(logits, late.train(training)(x)[0]), "what the head reads is the same"


def test_an_option_overrides_a_recipe_and_settings_keep_their_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "mine", "ab", 2, 16)
    found = []
    monkeypatch.setattr(judge, "train_judge", lambda s, *_: found.append((s.steps, s.batch, s.lr)))
    judge.main(["--data", "mine", "--device", "cpu"])
    judge.main(["--data", "mine", "--device", "cpu", "--steps", "7", "--lr", "4e-3"])
    assert found == 2 * [(4290, 256, 0.1)] + 2 * [(7, 256, 4e-3)]
    s = judge.Settings(data="cifar10", steps=4000)
    assert (s.steps, s.batch, s.lr) == (4000, 128, 4e-3)


def test_training_the_judges_resumes_to_the_same_bits_and_leaves_the_whitening(tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "images of two kinds", "ab", 12, 16)
    base = ["--data", str(folder), "--batch", "4", "--steps", "6", "--device", "cpu"]
    judge.main([*base, "--out", str(tmp_path / "whole")])
    save = runs.Run.save

    def save_and_stop(run):
        save(run)
        if run.step == 3:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Run, "save", save_and_stop)
        patch.setattr(runs, "SAVING_SHARE", 0)
        judge.main([*base, "--out", str(tmp_path / "cut"), "--save-every", "1e-9"])
    cut = load_file(tmp_path / "cut" / "checkpoint.pt")
    assert cut["step"] == 3 and not (tmp_path / "cut2").exists()
    folder = folder.rename(tmp_path / "moved")
    base[base.index("--data") + 1] = f"{tmp_path}/../{tmp_path.name}/moved/"
    judge.main([*base, "--out", str(tmp_path / "cut"), "--resume"])
    for number in ("", "2"):
        whole, resumed = (load_file(tmp_path / (name + number) / "checkpoint.pt") for name in ("whole", "cut"))
        assert_same(whole["parts"], resumed["parts"])
    first, second = (load_file(tmp_path / name / "judge.pt") for name in ("cut", "cut2"))
    stem = cut["parts"]["judge"]["trunk.0.weight"]
    assert torch.equal(first["weights"]["trunk.0.weight"], stem.half()) and torch.equal(stem[:12], -stem[12:])
    assert first["judge"]["arch"] == "resnet9" and first["train"]["mean"].shape == (2, 256)
    assert second["judge"]["arch"] == "resnet" and "train" not in second
    with pytest.raises(BadInput):
        judge.main([*base, "--out", str(tmp_path / "whole")])
    images, labels, _ = load_folder(folder, None, train=True)
    again = class_stats(load_judge(tmp_path / "cut" / "judge.pt", CPU)[0], images, labels)
    assert torch.allclose(again["mean"], first["train"]["mean"], rtol=1e-5, atol=1e-6), "of the weights in the file"


def test_a_judge_with_weights_too_large_for_float16_is_not_saved(tmp_path):
    found = Judge("cnn", 28, 1, 2, width=4)
    found.head.bias.data[0] = 1e6
    images, labels = torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 1])
    run = SimpleNamespace(out=tmp_path, s=judge.Settings(), seconds=0.0)
    with pytest.raises(RunFailed, match="head.bias"):
        judge.save_judge(run, found, (images, labels), (images, labels), ["a", "b"], reference=False)
    assert not list(tmp_path.iterdir())


def test_judges_are_not_written_into_the_images(tmp_path, monkeypatch):
    monkeypatch.chdir(image_folder(tmp_path / "mine", "ab", 20, 16))
    with pytest.raises(BadInput):
        judge.main(["--data", ".", "--steps", "2", "--batch", "4", "--device", "cpu"])
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {"a", "b"}


# -------------------------------------------------------------------------------------------------- an evaluated run

NUMBERS = {"kept_accuracy", "kept_accuracy_judge2", "per_class_accuracy", "entropy", "fd", "fd_floor", "precision",
           "recall", "n", "nfe", "seconds"}
FORGOTTEN = {"ua", "ua_judge2", "override_share", "override_share_judge2", "fd_override", "fd_override_floor",
             "precision_override", "recall_override", "n_forgotten"}


@pytest.fixture(scope="module")
def shipped_run(tmp_path_factory):
    """A run of the generator that comes with the project, evaluated on few images: (folder, what was printed)."""
    folder = tmp_path_factory.mktemp("shipped") / "run"
    folder.mkdir()
    (folder / "generator.pt").write_bytes((TEACHERS / "mnist_forget0_to1.pt").read_bytes())
    with open(folder / "log.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerows([("step", "seconds", "ua", "kept_accuracy", "fd"), (5, 1.0, 0.1, 0.9, 50.0), (10, 2.5, 1, 1, 9)])
    printed = run(*module("lab.evaluate"), folder, "--per-label", 4, "--device", "cpu", cwd=folder.parent).stdout
    return folder, printed


def test_an_evaluation_writes_its_numbers_and_pictures(shipped_run):
    folder, printed = shipped_run
    assert {p.name for p in folder.iterdir()} == {"generator.pt", "log.csv", "metrics.json", "evaluation.png",
                                                  "curves.png"}
    m = json.loads((folder / "metrics.json").read_text())
    more = {"seconds_judging", "protocol", "judge", "teacher", "sid", "forget", "to", "settings", "trained_on",
            "machine"}
    assert m.keys() == NUMBERS | FORGOTTEN | more
    assert m["teacher"].keys() == m["sid"].keys() == NUMBERS | FORGOTTEN
    assert m["ua"] >= 0.95 and m["override_share"] >= 0.95 and m["kept_accuracy"] > 0.85 and m["teacher"]["ua"] < 0.05
    assert (m["nfe"], m["sid"]["nfe"], m["teacher"]["nfe"]) == (1, 1, 35)
    assert (m["n"], m["n_forgotten"]) == (9 * 4 + 5 * 4, 20) and m["teacher"]["n"] == m["sid"]["n"] == 10_000
    assert (m["forget"], m["to"], m["judge"]["data"]) == ([0], [1], "mnist") and m["machine"]["torch"]
    for row in (m["teacher"], m["sid"], m):
        assert f"{row['kept_accuracy']:.2%}" in printed and f"{row['fd']:.2f}" in printed


def test_an_evaluation_says_first_how_many_images_it_draws(shipped_run):
    _, printed = shipped_run
    line = printed.splitlines()[0]
    assert "56 images of this generator, 4 under each label to keep and 20 under each label to forget" in line
    assert "The teacher's 40 images are drawn once" in line


def evaluator_of(K, c_f, monkeypatch):
    content = {"train": None, "test": None, "classes": [str(k) for k in range(K)], "data": "mnist", "accuracy": 1.0}
    monkeypatch.setattr(evaluator, "load_judge", lambda *args: (None, content))
    return Evaluator(tiny_network(num_classes=K), {"data": "mnist"}, c_f, [-1] * len(c_f))


@pytest.mark.parametrize("K, per_label, quick", [(2, 1000, 100), (10, 1000, 100), (40, 250, 25), (1000, 10, 1),
                                                 (20_000, 1, 1)])
def test_the_images_of_an_evaluation_have_a_budget(K, per_label, quick, monkeypatch, capsys):
    """Up to ten labels it is 1000 images under each label. With more, it is 10,000 images in all."""
    found = evaluator_of(K, [1], monkeypatch)
    assert found.questions(forgotten=False) == [per_label] * K
    assert found.questions(forgotten=True) == [per_label, 5 * per_label] + [per_label] * (K - 2)
    assert found.questions(forgotten=True, quick=True) == [quick] * K
    found.announce()
    assert f"draws {(K + 4) * per_label} images" in capsys.readouterr().out
    Variant.announce(SimpleNamespace(per_label=0))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("K, points", [(2, 500), (10, 4500), (40, 4992)])
def test_precision_and_recall_compare_5000_features_at_most(K, points, monkeypatch):
    """The matrix of their distances would grow with the square of the number of labels."""
    compared = []
    monkeypatch.setattr("lab.evaluate.metrics.precision_recall", lambda *sets: compared.append(sets) or (0.0, 0.0))
    stats = {"features": torch.zeros(K, 500, 2).half(), "entropy": torch.zeros(K), "mean": torch.zeros(K, 2),
             "second": torch.zeros(K, 2, 2), "confusion": torch.ones(K, K)}
    label_metrics({"stats": stats, "confusion2": stats["confusion"]}, stats, stats, [0], [1])
    assert [len(features) for features in compared[0]] == [points] * 2


def test_a_second_evaluation_gives_the_same_numbers(shipped_run):
    folder, _ = shipped_run
    before = json.loads((folder / "metrics.json").read_text())
    evaluate_command([str(folder), "--per-label", "4", "--device", "cpu"])
    after = json.loads((folder / "metrics.json").read_text())
    assert after["seconds_judging"] != before["seconds_judging"]
    for key in NUMBERS | FORGOTTEN:
        assert before[key] == pytest.approx(after[key], rel=1e-4), key


def test_an_evaluation_with_several_draws(shipped_run, tmp_path, capsys):
    """The first draw is that of any evaluation, the second has other noise, and the table has their mean and range."""
    once = json.loads((shipped_run[0] / "metrics.json").read_text())
    (tmp_path / "generator.pt").write_bytes((TEACHERS / "mnist_forget0_to1.pt").read_bytes())
    evaluate_command([str(tmp_path), "--per-label", "4", "--draws", "2", "--device", "cpu"])
    printed = capsys.readouterr().out
    m = json.loads((tmp_path / "metrics.json").read_text())
    assert m.keys() == once.keys() | {"draws"} and len(m["draws"]) == 2
    for key in m["draws"][0]:
        assert m["draws"][0][key] == m[key] == pytest.approx(once[key], rel=1e-4), key
    found = Evaluator.find(*load_teacher("", "mnist", CPU), [0], [1])
    found.seed, found.per_label = 1001, 4
    generate, generator, _ = load_generator(tmp_path / "generator.pt", CPU)
    second = found.report(found.measure(generate, generator, found.questions(forgotten=True)))
    assert m["draws"][1]["fd"] == pytest.approx(second["fd"], rel=1e-4) != m["fd"]
    low, high = sorted(draw["fd"] for draw in m["draws"])
    table = printed.split("teacher's images once.")[1]
    assert f"{(low + high) / 2:.2f} ({low:.2f} to {high:.2f})" in table
    assert "56 images of this generator" in printed and ", 2 times from other noise" in printed


@pytest.fixture
def own_run(tmp_path, monkeypatch):
    """Own images at 16x16, their teacher, and a run from it that nobody has evaluated: (main folder, run's folder).

    Neither network has learned anything.
    """
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "mine", "ab", 12, 24)
    teacher = tmp_path / "runs" / "mine-teacher" / "teacher.pt"
    network = tiny_network(16, 3, num_classes=2)
    about = {"data": "mine", "classes": ["a", "b"], "size": 16}
    save_network(network, teacher, **about)
    save_network(network, tmp_path / "run" / "generator.pt", **about, sigma_init=2.5, forget=[0], to=[1], seconds=1.0,
                 teacher_sha256=digest(teacher), machine={}, settings={"teacher": str(teacher)})
    return tmp_path


def test_without_judges_a_run_is_not_evaluated_and_nothing_fails(own_run, capsys):
    assert evaluate_run("run", device="cpu") is None
    note = capsys.readouterr().out
    assert "python -m lab.judge --data mine" in note and note.count("\n") == 1
    assert not (own_run / "run" / "metrics.json").exists()


def test_own_images_are_judged_at_the_size_of_their_teacher(own_run):
    judge.main(["--data", "mine", "--steps", "2", "--batch", "4", "--device", "cpu"])
    assert load_file("runs/mine-judge/judge.pt")["size"] == 16
    m = evaluate_run("run", per_label=8, device="cpu")
    assert m["n"] == 8 + 5 * 8 and m["judge"]["data"] == "mine" and m["sid"] is None and m["fd"] > 0
    (own_run / "runs" / "mine-teacher" / "teacher.pt").rename("moved.pt")
    done = run(*module("lab.evaluate"), "run", "--device", "cpu", cwd=own_run, code=2)
    assert "--teacher" in done.stderr and done.stderr.count("\n") == 1
    assert evaluate_run("run", "moved.pt", per_label=8, device="cpu")["fd"] == pytest.approx(m["fd"])
    network, info = load_network("moved.pt")
    save_network(network, own_run / "another.pt", data="mine", classes=["a", "b"], size=16, seconds=2.0)
    with pytest.raises(BadInput):
        evaluate_run("run", "another.pt", device="cpu")


def test_few_real_images_are_enough_for_an_evaluation(own_run):
    image_folder(own_run / "few", "ab", 3, 16)
    judge.main(["--data", "few", "--steps", "2", "--batch", "2", "--device", "cpu", "--out", "runs/mine-judge"])
    m = evaluate_run("run", per_label=8, device="cpu")
    assert m["precision"] is m["recall"] is None and m["n"] == 48 and m["fd"] > 0


def test_a_folder_without_the_generator_of_a_run_is_refused(tiny, tmp_path):
    with pytest.raises(BadInput):
        evaluate_run(tmp_path)
    (tmp_path / "generator.pt").write_bytes(tiny.read_bytes())
    with pytest.raises(BadInput):
        evaluate_run(tmp_path)


def test_judges_of_other_labels_or_images_do_not_judge(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    numbers = [str(k) for k in range(10)]
    for network, classes, fits in ((tiny_network(), MNIST[::-1], False), (tiny_network(), MNIST, True),
                                   (tiny_network(), numbers, True), (tiny_network(24), MNIST, False),
                                   (tiny_network(num_classes=9), MNIST[:9], False)):
        save_network(network, tmp_path / "teacher.pt", classes=classes)
        found = Evaluator.find(*load_teacher("teacher.pt", "mnist", CPU), [0], [1])
        assert (found is not None) == fits


class Counting(Evaluator):
    """An Evaluator that draws nothing and counts what it would draw."""
    drawn = []

    def measure(self, generate, network, questions, progress=None):
        self.drawn.append(sum(questions))
        return {"stats": {"confusion": torch.tensor(questions)}}


def test_an_fd_of_the_override_is_of_as_many_images_as_the_teachers():
    """UA and the share of the override are of all images under the label to forget."""
    found = Evaluator.find(*load_teacher("", "mnist", CPU), [0], [1])
    generate, generator, _ = load_generator(TEACHERS / "mnist_forget0_to1.pt", CPU)
    found.per_label = 6
    measured = found.measure(generate, generator, found.questions(forgotten=True))
    equal = found.measure(generate, generator, [6] * 10)
    assert found.report(measured)["fd_override"] == pytest.approx(found.report(equal)["fd_override"], rel=1e-3)
    assert found.report(measured)["n_forgotten"] == 30 and measured["stats"]["confusion"][0].sum() == 30
    found.per_label = 30
    of_all = found.report(found.measure(generate, generator, [30] + [6] * 9))
    assert abs(of_all["fd_override"] / found.report(measured)["fd_override"] - 1) > 0.05


def test_cached_measurements_are_used_while_they_depend_on_the_same(tmp_path, monkeypatch, capsys):
    found, path = Counting(*load_teacher("", "mnist", CPU), [0], [1]), tmp_path / "network.pt"
    path.write_bytes(b"the bytes of this file are all that the cache depends on")

    def images_drawn(per_label):
        found.drawn.clear()
        found.per_label = per_label
        content = found.measure_file(path, None, None, "")
        assert content["stats"]["confusion"].sum() >= 10 * per_label
        return sum(found.drawn)

    assert images_drawn(2) == 20 and images_drawn(2) == images_drawn(1) == 0, "more images are enough for fewer"
    assert images_drawn(3) == 30 and images_drawn(2) == 0
    (tmp_path / "network_measured.pt").write_bytes(b"cut short")
    assert images_drawn(2) == 20 and "network_measured.pt" in capsys.readouterr().out
    path.write_bytes(b"another network")
    assert images_drawn(2) == 20 and images_drawn(2) == 0
    monkeypatch.setattr(evaluator, "PROTOCOL", 0)
    assert images_drawn(2) == 0, "the metrics are computed again, from the same images"
    monkeypatch.setattr(evaluator, "DRAWING", 0)
    assert images_drawn(2) == 20
    monkeypatch.setattr(Counting, "cache_key", lambda self: {"words": 7})
    assert images_drawn(2) == 20 and images_drawn(2) == 0


def test_a_generator_in_training_is_probed_with_the_metrics_of_an_evaluation(tiny):
    found = Evaluator.find(*load_teacher("", "mnist", CPU), [0], [1])
    generator, _ = load_network(tiny)
    probed = found.probe(generator, 2.5)
    precisions, generator.bf16 = [], True

    def generate(z, c):
        precisions.append(generator.bf16)
        return sampler(generator, 2.5)(z, c)

    full = found.report(found.measure(generate, generator, [100] * 10))
    assert not any(precisions) and generator.bf16
    assert probed == {name: full[name] for name in ("ua", "kept_accuracy", "fd")}


class Variant(Evaluator):
    """Draws and judges other things than labels, with the judges of MNIST: one mean brightness for each question."""
    judges_of, per_label = "mnist", 0

    def questions(self, forgotten, quick=False):
        return ["plain", "forgotten"] if forgotten else ["plain"]

    def measure(self, generate, network, questions, progress=None):
        images = draw_images(generate, torch.zeros(2, dtype=torch.long), network, self.seed)
        return {question: images.float().mean() for question in questions}

    def report(self, measured, erased=True):
        numbers = {"n": 2, "fd": 1 + measured["plain"].item(), "fd_floor": 1.0, "kept_accuracy": 1.0}
        return numbers | ({"n": 4, "n_forgotten": 2} if "forgotten" in measured else {})

    def cache_key(self):
        return {"counts": 2}

    def tables(self, rows):
        return f"the rows {' '.join(rows)}"

    def pictures(self, out, generate, generator, rows, measured):
        (out / "evaluation.png").write_text(" ".join(measured))


def test_a_variant_overrides_six_methods(tmp_path, monkeypatch, capsys):
    """Evaluation, cache and probe work for other conditions than labels."""
    monkeypatch.chdir(tmp_path)
    network = tiny_network(channels=3, num_classes=4)
    save_network(network, tmp_path / "teacher.pt", data="words", classes=list("abcd"))
    teacher, info = load_network("teacher.pt")
    save_network(network, tmp_path / "runs" / "words-sid" / "both.pt", sigma_init=2.5, seconds=1.0, data="words",
                 classes=list("abcd"), teacher_sha256=info["sha256"])
    found = Variant(teacher, info, [{"word": "a"}], [{"word": "b"}])
    about = {"sigma_init": 2.5, "seconds": 1.0, "machine": {}, "settings": {}}
    m = found.evaluate(tmp_path, network, about)
    assert "the rows teacher sid generator" in capsys.readouterr().out
    assert m["n"] == 4 and m["teacher"]["n"] == m["sid"]["n"] == 2 and m["forget"] == [{"word": "a"}]
    assert (tmp_path / "evaluation.png").read_text() == "teacher sid generator"
    assert found.probe(network, 2.5) == {"kept_accuracy": 1.0, "fd": m["fd"]}
    monkeypatch.setattr(Variant, "measure", lambda *_: pytest.fail("the teacher is measured again"))
    assert found.reference_rows()[0]["teacher"]["fd"] == m["teacher"]["fd"]


# ------------------------------------------------------------------------------- the weights that come with the project

def accuracy(confusion):
    return (confusion.diag().sum() / confusion.sum()).item()


def measured(name):
    """The cached measurement of a network that comes with the project."""
    return load_file(TEACHERS / f"{name}_measured.pt")


def confusion_of(name, counts, number=""):
    """(K, K) of the images of a network that comes with the project, counts[k] of each label."""
    generate, network, _ = load_generator(TEACHERS / f"{name}.pt", CPU)
    found, _ = load_judge(TEACHERS / f"{name.split('_')[0]}_judge{number}.pt", CPU)
    labels = torch.arange(10).repeat_interleave(torch.tensor(counts))
    return class_stats(found, draw_images(generate, labels, network, seed=5), labels, keep=0)["confusion"]


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_nothing_that_comes_with_the_project_is_measured_again(data, tmp_path, monkeypatch):
    """The measurements of teacher and plain SiD belong to these files, and find_sid to this teacher."""
    monkeypatch.chdir(tmp_path)
    found = Evaluator.find(*load_teacher("", data, CPU), [0], [1])
    assert Evaluator.per_label == 1000
    monkeypatch.setattr(Evaluator, "measure", lambda *_: pytest.fail("measured again"))
    rows, contents = found.reference_rows()
    assert rows.keys() == contents.keys() == {"teacher", "sid"}
    for row, content in zip(rows.values(), contents.values()):
        assert row["n"] == 10_000 and content["machine"]["torch"]
    _, info = find_sid(found.info, CPU)
    assert info["path"] == str(TEACHERS / f"{data}_sid.pt") and info["forget"] == []


def test_another_teacher_has_no_plain_sid_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mnist_plain", "mnist_retrain"):
        teacher, info = load_teacher(TEACHERS / f"{name}.pt", "mnist", CPU)
        assert teacher.shape == (1, 28, 28) and find_sid(info, CPU) is None


@pytest.mark.parametrize("number, kind", [("", "stats"), ("2", "confusion2")])
def test_teacher_and_judges_of_mnist_agree(number, kind):
    _, content = load_judge(TEACHERS / f"mnist_judge{number}.pt", CPU)
    assert content["accuracy"] >= 0.994
    recorded = measured("mnist")[kind]
    recorded = recorded["confusion"] if kind == "stats" else recorded
    assert accuracy(confusion_of("mnist", [8] * 10, number)) > accuracy(recorded) - 0.05


@pytest.mark.parametrize("name, counts, slack", [("mnist_sid", [30] * 10, 0.03), ("cifar10_sid", [20] * 10, 0.12),
                                                 ("cifar10", [3] * 10, 0.2)])
def test_networks_are_those_that_were_measured(name, counts, slack):
    assert accuracy(confusion_of(name, counts)) > accuracy(measured(name)["stats"]["confusion"]) - slack


@pytest.mark.parametrize("number", ["", "2"])
def test_judges_of_cifar10_know_photographs(number):
    """Five test images of each class, one class per row of the picture, and as recorded on all test images."""
    found, content = load_judge(TEACHERS / f"cifar10_judge{number}.pt", CPU)
    picture = torch.tensor(pixels(ROOT / "tests" / "fixtures" / "cifar10_jpeg_test.png"))
    images = picture.reshape(10, 32, 5, 32, 3).permute(0, 2, 4, 1, 3).flatten(0, 1)
    labels = torch.arange(10).repeat_interleave(5)
    stats = class_stats(found, images, labels, keep=0)
    assert stats["confusion"].diag().sum() >= 42 and content["accuracy"] > 0.85
    mirrored = class_stats(found, images.flip(3), labels, keep=0)
    assert torch.allclose(stats["mean"], mirrored["mean"], atol=1e-4)
    if number == "":
        assert content["train"]["confusion"].sum() == 50_000 and content["test"]["confusion"].sum() == 10_000
        assert accuracy(content["test"]["confusion"]) == pytest.approx(content["accuracy"])


def test_features_of_the_judge_of_cifar10_keep_the_variety_within_a_class():
    """In the last features of a classifier the means of ten classes, nine directions, have nearly all the variance."""
    _, content = load_judge(TEACHERS / "cifar10_judge.pt", CPU)
    _, covariance = moments(content["train"], list(range(10)))
    variances = torch.linalg.eigvalsh(covariance).flip(0)
    assert variances[:9].sum() / variances.sum() < 0.6


def test_the_forgetful_generator_belongs_to_this_teacher_and_forgets():
    _, info = load_network(TEACHERS / "mnist_forget0_to1.pt")
    assert info["teacher_sha256"] == digest(TEACHERS / "mnist.pt") and (info["forget"], info["to"]) == ([0], [1])
    confusion = confusion_of("mnist_forget0_to1", [500] + [20] * 9)
    assert confusion[0, 0] <= 1 and confusion[0, 1] >= 495
    assert accuracy(confusion[1:, 1:]) > 0.93


@pytest.mark.parametrize("name", ["mnist", "mnist_plain", "mnist_sid", "mnist_forget0_to1", "mnist_retrain",
                                  "mnist_retrain_sid", "mnist_judge", "mnist_judge2", "cifar10", "cifar10_sid",
                                  "cifar10_judge", "cifar10_judge2"])
def test_weights_are_stored_in_half_precision(name):
    weights = load_file(TEACHERS / f"{name}.pt")["weights"].values()
    assert all(v.dtype == torch.float16 for v in weights if v.is_floating_point())


# ---------------------------------------------------------------------------------------------------------------- FID

@pytest.fixture
def small():
    """A small extractor of torch-fidelity in the place of Inception: the mean of the pixels and one corner."""
    fidelity = pytest.importorskip("torch_fidelity", reason="optional: pip install torch-fidelity")
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Small(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        get_provided_features_list = staticmethod(lambda: ("f",))
        get_default_feature_layer_for_metric = staticmethod(lambda metric: "f")
        can_be_compiled = staticmethod(lambda: False)
        get_dummy_input_for_compile = staticmethod(lambda: None)

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape[1] == 3
            return (torch.stack([x.float().mean((1, 2, 3)), x[:, 0, 0, 0].float()], 1),)

    if "small" not in fidelity.registry.FEATURE_EXTRACTORS_REGISTRY:
        fidelity.register_feature_extractor("small", Small)
    return {"feature_extractor": "small"}


def test_fid_is_the_frechet_distance(small):
    """Of images and the same images 10 brighter: 10^2 for each of two features."""
    images = torch.randint(0, 200, (64, 1, 8, 8), dtype=torch.uint8)
    assert fid.fid(images, images, CPU, **small) == pytest.approx(0, abs=1e-3)
    assert fid.fid(images, images + 10, CPU, **small) == pytest.approx(200, rel=1e-3)


def test_fid_of_a_generator_is_on_its_kept_labels_and_of_a_teacher_on_all(small, mnist_dir, monkeypatch, capsys):
    generator = load_generator(TEACHERS / "mnist_forget0_to1.pt", CPU)
    numbers = fid.fid_of_network(*generator, mnist_dir, CPU, 4, small)
    assert numbers["labels_fid"] == list(range(1, 10)) and numbers["n_fid"] == 36 and numbers["n_real"] == 540
    assert numbers["fid"] > 0
    monkeypatch.setattr(fid, "inception", lambda: small)
    fid.main([str(TEACHERS / "mnist.pt"), "--data-dir", str(mnist_dir), "--per-label", "1", "--device", "cpu"])
    assert "10 images" in capsys.readouterr().out


def test_fid_says_what_is_missing_before_it_draws(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(fid, "draw_images", lambda *_, **__: pytest.fail("drawn"))

    def offline(*_, **__):
        raise urllib.error.URLError("no route")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    command = [str(TEACHERS / "mnist.pt"), "--device", "cpu"]
    with pytest.raises(BadInput, match="no route"):
        fid.main(command)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(BadInput, match="pip install torch-fidelity"):
        fid.main(command)


# ------------------------------------------------------------------------------------------------------------- figures

def test_a_picture_takes_any_class_name(tmp_path, capsys):
    """Names that look like formulas, letters that the font lacks. A picture that cannot be drawn ends no run."""
    images = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
    names = ["Ke$$a", "a_b^{", "$x", "\u6f22", "50%\\frac"]
    samples_figure({"a": images}, names, [0], tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").size and "note" in capsys.readouterr().out
    samples_figure({"a": images}, names, [0], tmp_path / "nowhere" / "a.png")
    assert "note" in capsys.readouterr().out


def test_figures_leave_the_backend_of_the_caller_alone(tmp_path):
    before = matplotlib.get_backend()
    matplotlib.use("svg")
    try:
        samples_figure({"a": torch.zeros(2, 1, 4, 4, dtype=torch.uint8)}, ["x", "y"], [0], tmp_path / "a.png")
        assert matplotlib.get_backend() == "svg" and (tmp_path / "a.png").stat().st_size > 1000
    finally:
        matplotlib.use(before)


def test_a_frontier_has_a_labelled_point_for_each_way_with_its_seconds_as_area(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    rows = {"fast $x": {"seconds": 100, "fd_ratio": 1.5, "found": 0.9},
            "slow": {"seconds": 400, "fd_ratio": 3.0, "found": 0.0}}
    figures.frontier_figure(rows, 0.05, tmp_path / "a.png")
    (ax,), = (figure.axes for figure in drawn)
    points, = ax.collections
    labels = {text.get_text(): getattr(text, "xy", text.get_position()) for text in ax.texts}
    assert labels.pop("controls") == (0.01, 7.0)
    assert labels == {"fast $x": (1.5, 90.0), "slow": (3.0, 0.0)}
    areas = dict(zip(map(tuple, points.get_offsets().tolist()), points.get_sizes()))
    assert areas[3.0, 0.0] == 4 * areas[1.5, 90.0]
    line, = ax.lines
    assert set(line.get_ydata()) == {5.0}
    assert not ax.get_title() and ax.get_xlabel() and ax.get_ylabel()


def test_a_frontier_is_drawn_where_all_took_the_same_time(tmp_path, capsys):
    figures.frontier_figure({"Ke$$a": {"seconds": 5, "fd_ratio": 1, "found": 0.5}}, 0.0, tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").size and not capsys.readouterr().out
