"""How the judges learn: batches, what is done to the images, the whitening stem, and a run that resumes."""
import pytest
import torch
from torch.nn import functional as F

from conftest import image_folder
from lab import judge as judges
from lab.data import to_float
from lab.judge import Judge, epoch_batch, jitter, shift_and_hide, whitening
from test_runs import assert_same, stopped_after, weights


def test_an_epoch_has_each_image_once_and_the_next_one_its_mirror_image():
    images = torch.arange(24, dtype=torch.uint8).reshape(8, 1, 1, 3)
    labels = torch.arange(8)
    seen = []
    for epoch in range(2):
        parts = [epoch_batch(images, labels, 4, 2 * epoch + i, flip=True) for i in range(2)]
        x, c = (torch.cat(p) for p in zip(*parts))
        assert sorted(c.tolist()) == list(range(8))
        seen.append(x[c.argsort()])
    plain = to_float(images)
    for a, b, image in zip(*seen, plain):
        assert ({tuple(a.flatten().tolist()), tuple(b.flatten().tolist())}
                == {tuple(image.flatten().tolist()), tuple(image.flip(2).flatten().tolist())})
    x, c = epoch_batch(images, labels, 4, 3, flip=False)
    assert torch.equal(x, plain[c]) and torch.equal(epoch_batch(images, labels, 4, 3, flip=False)[1], c)


def test_photographs_are_shifted_partly_hidden_and_grow_sharper():
    x = torch.rand(40, 3, 32, 32) * 2 - 1
    assert [shift_and_hide(x, p).shape[2] for p in (0.0, 0.3, 0.4, 0.6, 0.7, 0.99)] == [24, 24, 28, 28, 32, 32]
    padded, hidden = F.pad(x, (2, 2, 2, 2), mode="reflect"), []
    for image, around in zip(shift_and_hide(x, 0.99), padded):
        grey = (image == 0).all(0)
        assert any(torch.equal(image, around[:, i:i + 32, j:j + 32].masked_fill(grey, 0.0))
                   for i in range(5) for j in range(5))
        rows, columns = grey.any(1).sum().item(), grey.any(0).sum().item()
        assert grey.sum() == rows * columns and 5 <= rows <= 9 and 5 <= columns <= 9  # a square, smaller at the border
        hidden.append(rows * columns)
    assert max(hidden) == 81


def test_drawings_keep_their_size_and_their_background():
    x = torch.full((4, 1, 28, 28), -1.0)
    x[:, :, 10:18, 10:18] = 1
    y = jitter(x, 0.5)
    assert y.shape == x.shape and not torch.equal(x, y) and torch.equal(y[:, :, 0], x[:, :, 0])
    assert y.mean().item() == pytest.approx(x.mean().item(), abs=0.1)


def test_whitening_filters_answer_patches_without_correlation():
    torch.manual_seed(0)
    x = F.avg_pool2d(torch.randn(200, 3, 33, 33), 2, 1)  # neighbours are alike
    x = x + 0.3 * x.flip(1)  # and so are the channels
    filters = whitening(x)
    assert filters.shape == (24, 3, 2, 2) and torch.equal(filters[:12], -filters[12:])
    answers = F.conv2d(x, filters[:12]).transpose(0, 1).flatten(1)
    assert torch.allclose(answers @ answers.T / answers.shape[1], torch.eye(12), atol=0.1)
    raw = F.unfold(x, 2).transpose(0, 1).flatten(1)
    assert (torch.corrcoef(raw) - torch.eye(12)).abs().max() > 0.3, "the patches were white before"


@pytest.mark.parametrize("side", [16, 20, 32])
def test_resnet9_takes_any_side(side):
    judge = Judge("resnet9", 32, 3, 10, width=4).eval()
    logits, features = judge(torch.zeros(2, 3, side, side))
    assert logits.shape == (2, 10) and features.shape == (2, 128)
    with pytest.raises(ValueError, match="at least 16x16"):
        Judge("resnet9", 15, 3, 10, width=4)


def test_judge_training_resumes_and_leaves_the_stem(tmp_path):
    folder = image_folder(tmp_path / "images of two kinds", "ab", 12, 16)
    base = ["--data", str(folder), "--batch", "4", "--steps", "6", "--device", "cpu"]
    judges.main([*base, "--out", str(tmp_path / "whole")])
    with stopped_after(3):
        judges.main([*base, "--out", str(tmp_path / "cut"), "--save-every", "1e-9"])
    assert weights(tmp_path / "cut")[0] == 3 and not (tmp_path / "cut2").exists()
    stem = weights(tmp_path / "cut")[1]["judge"]["trunk.0.weight"].clone()
    judges.main([*base, "--out", str(tmp_path / "cut"), "--resume"])
    for name in ("whole", "whole2"):
        assert_same(weights(tmp_path / name)[1], weights(tmp_path / name.replace("whole", "cut"))[1])
    judge = torch.load(tmp_path / "cut" / "judge.pt", weights_only=True)
    assert torch.equal(judge["weights"]["trunk.0.weight"], stem.half()) and torch.equal(stem[:12], -stem[12:])
    assert judge["judge"]["arch"] == "resnet9" and judge["train"]["mean"].shape == (2, 128)
    second = torch.load(tmp_path / "cut2" / "judge.pt", weights_only=True)
    assert second["judge"]["arch"] == "resnet" and "train" not in second
