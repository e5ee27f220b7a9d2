"""The literature's FID, with a small extractor in the place of Inception: all but its weights is exercised."""
import sys
import urllib.error

import pytest
import torch

from conftest import CPU, ROOT
from lab import evaluate, fid
from lab.errors import BadInput
from lab.sample import load_generator


@pytest.fixture
def small():
    fidelity = pytest.importorskip("torch_fidelity", reason="optional: pip install torch-fidelity")
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Small(FeatureExtractorBase):
        """Mean, spread and corners of the channels: a feature space whose Frechet distance is easily known."""

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
    return "small"


def test_it_is_the_frechet_distance(small):
    """Of images and the same ones 10 brighter: 10^2 for each of two features. Grey is shown in three channels."""
    images = torch.randint(0, 200, (64, 1, 8, 8), dtype=torch.uint8)
    assert fid.fid(images, images, CPU, small) == pytest.approx(0, abs=1e-3)
    assert fid.fid(images, images + 10, CPU, small) == pytest.approx(200, rel=1e-3)


def test_of_a_generator_on_its_kept_labels_and_of_a_teacher_on_all(small, mnist_dir):
    of = fid.fid_of(*load_generator(ROOT / "teachers" / "mnist_forget0_to1.pt", CPU), mnist_dir, CPU, 4, small)
    assert of["labels_fid"] == [1, 2, 3, 4, 5, 6, 7, 8, 9] and of["n_fid"] == 36 and of["fid"] >= 0
    of = fid.fid_of(*load_generator(ROOT / "teachers" / "mnist.pt", CPU), mnist_dir, CPU, 1, small)
    assert of["labels_fid"] == list(range(10))


def test_what_is_lacking_is_said_in_one_line(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*_, **__):
        raise urllib.error.URLError("no route")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(BadInput, match="Inception's weights cannot be had .*no route"):
        fid.fid(images, images, CPU)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(BadInput, match="pip install torch-fidelity"):
        fid.fid(images, images, CPU)


def test_evaluate_has_the_option():
    assert evaluate.Settings(fid=True).fid and evaluate.fid_of is fid.fid_of
