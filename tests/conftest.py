import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edm_unet import EDMPrecond, NetSettings
from lab.checkpoint import pack, save_atomically

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def program(name):
    """The command of a program at the root."""
    return [sys.executable, str(ROOT / name)]


def module(name):
    """The command of a module, `python -m lab.name`."""
    return [sys.executable, "-m", name]


def run(*command, cwd, code=0):
    """The finished process of a command, which must end with exit code `code`. A second or three: torch is imported."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == code, done.stdout + done.stderr
    return done


def image_folder(path, classes, n, size):
    """`path`, a folder of class folders with n images each: noise, brighter from class to class.
    size: their side, or (width, height)."""
    width, height = size if isinstance(size, tuple) else (size, size)
    noise = np.random.default_rng(0)
    for k, label in enumerate(classes):
        (path / label).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            pixels = noise.integers(120 * k // len(classes), 120 * k // len(classes) + 120, (height, width, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path / label / f"{i}.png")
    return path


def save_network(network, path, half=False, **entries):
    """A checkpoint of a network for MNIST; `entries` stand beside what such a file says, or instead of it."""
    save_atomically({"kind": "denoiser", "data": "mnist", "classes": [str(k) for k in range(10)],
                     **pack(network, half), **entries}, path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A teacher for MNIST's shape that has learned nothing, but runs in no time."""
    path = tmp_path_factory.mktemp("a tiny teacher") / "tiny.pt"
    torch.manual_seed(0)
    save_network(EDMPrecond(NetSettings(model_channels=16, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
                                        patch=4)), path)
    return path


@pytest.fixture(scope="session")
def mnist_dir(tmp_path_factory):
    """A folder in which torchvision finds MNIST: noise in its format, 600 images to train on and 1,200 held out.
    For paths, not for numbers."""
    raw = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    for prefix, n in (("train", 600), ("t10k", 1200)):
        images = torch.randint(256, (n, 28, 28), generator=g, dtype=torch.uint8).numpy().tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            b"".join(v.to_bytes(4, "big") for v in (2051, n, 28, 28)) + images)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            b"".join(v.to_bytes(4, "big") for v in (2049, n)) + bytes(k % 10 for k in range(n)))
    return raw.parent.parent
