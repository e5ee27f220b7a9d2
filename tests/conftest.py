import sys
from pathlib import Path

import pytest
import torch

import edm_unet

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A teacher for MNIST's shape that has learned nothing, but runs in no time."""
    path = tmp_path_factory.mktemp("a tiny teacher") / "tiny.pt"
    torch.manual_seed(0)
    net = edm_unet.NetSettings(model_channels=16, channel_mult=(1,), num_blocks=1, attn_resolutions=(), patch=4)
    edm_unet.save_atomically({"kind": "denoiser", "data": "mnist", "classes": [str(k) for k in range(10)],
                              **edm_unet.pack(edm_unet.EDMPrecond(net))}, path)
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


def program(name):
    return [sys.executable, str(ROOT / name)]
