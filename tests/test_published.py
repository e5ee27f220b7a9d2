"""Published EDM pickles: read without running any code in them, and hostile ones refused by name."""
import collections
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import sfd_minimal
from conftest import CPU, module, run
from lab import edm_pickle, evaluate
from lab.checkpoint import load_checkpoint, load_teacher, unpack
from lab.edm_pickle import read_published
from lab.errors import BadInput
from test_unet import golden

FILE = Path(__file__).parent / "fixtures" / "edm_ddpmpp_official_format.pkl"


def test_reads_the_published_format(tmp_path):
    """As settings and weights, as a network, and as the checkpoint that the command makes of it."""
    packed = read_published(FILE)
    assert packed.keys() == {"net", "weights"} and not [k for k in packed["weights"] if "augment" in k]
    run(*module("lab.convert"), FILE, "--data", "objects", tmp_path / "converted.pt", cwd=tmp_path)
    _, x, sigma, label, D_x = golden()
    (direct, of), (converted, info) = load_checkpoint(FILE), load_checkpoint(tmp_path / "converted.pt")
    for model in (unpack(packed).eval(), direct, converted):
        model.bf16 = False
        with torch.no_grad():
            assert (model(x, sigma, label) - D_x).norm() / D_x.norm() < 1e-5
        assert (model.settings.dropout == 0.13 and model.settings.attn_resolutions == (8,)
                and model.settings.channel_mult == (1, 2, 2))
    assert of["data"] == "cifar10" and info["data"] == "objects"
    assert of["classes"][:3] == ["airplane", "automobile", "bird"] and info["classes"] == [str(k) for k in range(10)]


def test_a_published_pickle_is_a_teacher(tmp_path, monkeypatch, capsys):
    """The command of the README, on a file of that format with smaller images than the judges of CIFAR-10 know."""
    monkeypatch.chdir(tmp_path)
    sfd_minimal.main(["--teacher", str(FILE), "--data", "cifar10", "--forget", "0", "--to", "1", "--steps", "2",
                      "--batch", "4", "--device", "cpu"])
    says = "the judge knows 10 classes of 3x32x32 images; this run will not be judged"
    assert says in capsys.readouterr().out
    generator, info = load_checkpoint(tmp_path / "runs" / "cifar10-forget0-to1" / "generator.pt")
    assert generator.settings.resolution == 16 and info["forget"] == [0]
    with pytest.raises(BadInput, match="was not judged"):
        evaluate.main([str(tmp_path / "runs" / "cifar10-forget0-to1"), "--teacher", str(FILE), "--device", "cpu"])
    assert says in capsys.readouterr().out
    assert not (tmp_path / "runs" / "cifar10-forget0-to1" / "metrics.json").exists()


def test_a_pickle_in_capitals_is_of_the_data_set_that_is_said(tmp_path):
    path = tmp_path / "NETWORK.PKL"
    path.write_bytes(FILE.read_bytes())
    teacher, info = load_teacher(path, "objects", CPU)
    assert info["data"] == "objects" and info["classes"] == [str(k) for k in range(10)] and teacher.shape == (3, 16, 16)


@pytest.mark.parametrize("inside, change, says", [
    ("", {"label_dim": 0}, "it has no labels"), ("", {"class_name": "VPPrecond"}, "its preconditioning is VPPrecond"),
    ("", {"class_name": "VEPrecond"}, "expected is EDMPrecond"),
    ("", {"class_name": "iDDPMPrecond"}, "is iDDPMPrecond"),
    ("model", {"class_name": "DhariwalUNet"}, "its network is DhariwalUNet")])
def test_another_kind_of_published_network_is_called_by_its_name(inside, change, says, monkeypatch):
    """The file of the right kind, changed after reading, as these kinds differ from it."""
    load = edm_pickle._Unpickler.load

    def changed(self):
        content = load(self)
        (content["ema"]["_modules"][inside] if inside else content["ema"]).update(change)
        return content
    monkeypatch.setattr(edm_pickle._Unpickler, "load", changed)
    with pytest.raises(BadInput, match=says):
        read_published(FILE)


class Reduce:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Unknown:
    pass


def touch():
    return Reduce(os.system, "touch code-ran")


small = torch.zeros(3)
HOSTILE = {
    "os.system": (lambda: {"ema": touch()}, "system"),
    "eval": (lambda: {"ema": Reduce(eval, "open('code-ran', 'w')")}, "eval"),
    "extra global beside the net": (lambda: {"ema": None, "extra": Reduce(open, "code-ran", "w")}, "open"),
    "unknown class": (lambda: {"ema": Unknown()}, "Unknown"),
    "nested pickle in a storage": (lambda: {"ema": Reduce(torch.storage._load_from_bytes,
                                                          pickle.dumps(touch(), protocol=2))},
                                   "Weights only load failed"),
    "numpy object array": (lambda: {"ema": np.array([Unknown()], dtype=object)}, "_reconstruct"),
    "storage too small": (lambda: {"ema": Reduce(torch._utils._rebuild_tensor_v2, small.storage(), 0,
                                                 (1000, 1000), (1000, 1), False, collections.OrderedDict())},
                          "beyond its storage"),
    "negative offset": (lambda: {"ema": Reduce(torch._utils._rebuild_tensor_v2, small.storage(), -4,
                                               (2,), (1,), False, collections.OrderedDict())}, "beyond its storage"),
    "tensor with hooks": (lambda: {"ema": Reduce(torch._utils._rebuild_tensor_v2, small.storage(), 0,
                                                 (2,), (1,), False, {1: 2})}, "hooks"),
    "no net": (lambda: {"something": 1}, "KeyError"),
    "not a dict": (lambda: [1, 2], "TypeError"),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, word = HOSTILE[name]
    (tmp_path / "hostile.pkl").write_bytes(pickle.dumps(make(), protocol=4))
    with pytest.raises(BadInput, match=word):
        read_published(tmp_path / "hostile.pkl")
    assert [p.name for p in tmp_path.iterdir()] == ["hostile.pkl"], "code in the file was run"


@pytest.mark.parametrize("length", [0, 1, 100, 50_000, 1_800_000])
def test_truncated_files_are_refused(length, tmp_path):
    (tmp_path / "cut.pkl").write_bytes(FILE.read_bytes()[:length])
    with pytest.raises(BadInput, match="not a published EDM"):
        read_published(tmp_path / "cut.pkl")
