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
    edm_unet.save_atomically({"kind": "denoiser", "data": "mnist", "classes": [str(k) for k in range(10)], **edm_unet.pack(edm_unet.EDMPrecond(net))}, path)
    return path


def program(name):
    return [sys.executable, str(ROOT / name)]
