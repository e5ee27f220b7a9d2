"""Helpers of all tests: commands in processes of their own, folders of images, networks that take no time."""
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from edm_unet import EDMPrecond, NetSettings, pack, save_file

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def program(name):
    """The command of a program at the root."""
    return [sys.executable, str(ROOT / name)]


def module(name):
    """The command of a module: `python -m name`."""
    return [sys.executable, "-m", name]


def run(*command, cwd, code=0):
    """Run a command to its end and return the finished process, whose exit code must be `code`.

    Every call takes two seconds or more, in which torch is imported.
    """
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == code, done.stdout + done.stderr
    return done


def image_folder(path, classes, n, size):
    """Make the folder `path` of class folders with n images each, of noise that is brighter from class to class.

    size: height and width, or (width, height).
    """
    width, height = size if isinstance(size, tuple) else (size, size)
    noise = np.random.default_rng(0)
    for k, label in enumerate(classes):
        (path / label).mkdir(parents=True, exist_ok=True)
        darkest = 120 * k // len(classes)
        for i in range(n):
            pixels = noise.integers(darkest, darkest + 120, (height, width, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path / label / f"{i}.png")
    return path


def tiny_network(resolution=28, channels=1, num_classes=10, model_channels=16, patch=4, **changes):
    """A network that has learned nothing and computes in no time."""
    return EDMPrecond(NetSettings(resolution=resolution, channels=channels, num_classes=num_classes, patch=patch,
                                  model_channels=model_channels, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
                                  **changes))


def save_network(network, path, half=False, **entries):
    """Write the file of a network for MNIST. `entries` are added to those of such a file, or replace them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = [str(k) for k in range(10)]
    save_file(path, {"data": "mnist", "classes": classes, **pack(network, half), **entries})


def assert_same(a, b):
    """Assert that two nested dicts, lists or tuples hold the same values, and the same bits in their tensors."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The file of a teacher with the shape of MNIST that has learned nothing and computes in no time."""
    path = tmp_path_factory.mktemp("a tiny teacher") / "tiny.pt"
    torch.manual_seed(0)
    save_network(tiny_network(), path)
    return path


@pytest.fixture
def unevaluated(monkeypatch):
    """Runs of sfd_minimal.py end without the evaluation."""
    monkeypatch.setitem(sys.modules, "lab.evaluate", SimpleNamespace(evaluate_run=lambda *args, **options: None))


@pytest.fixture(scope="session")
def mnist_dir(tmp_path_factory):
    """A folder in which torchvision finds MNIST: noise in its format, 600 images to train on and 1,200 held out."""
    raw = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    for prefix, n in (("train", 600), ("t10k", 1200)):
        images = torch.randint(256, (n, 28, 28), generator=g, dtype=torch.uint8).numpy().tobytes()
        head = b"".join(number.to_bytes(4, "big") for number in (2051, n, 28, 28))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(head + images)
        head = b"".join(number.to_bytes(4, "big") for number in (2049, n))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(head + bytes(k % 10 for k in range(n)))
    return raw.parent.parent
