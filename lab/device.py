"""What this machine has: the device that was asked for, whether it multiplies bfloat16 fast, its name for reports."""
import platform
import random
import shutil

import numpy as np
import torch

from lab.errors import BadInput


def pick_device(name):
    """torch.device for 'auto' (cuda, else mps, else cpu: the first that computes) or for the one named; BadInput if it
    is not there. A card that is there and cannot be used gets a note."""
    if name == "auto":
        if shutil.which("nvidia-smi") and not torch.cuda.is_available():
            print("note: there is an NVIDIA card, which this torch cannot use: " + (
                "its driver may be older than this torch" if torch.version.cuda else "it was built without CUDA"))
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        for kind in (kind for kind in there if there[kind]):
            try:
                return pick_device(kind)
            except BadInput as e:  # like a card that is older or newer than this torch has kernels for
                print(f"note: {e}; the next device is taken")
        return torch.device("cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("cpu, cuda and mps are known here")
        torch.zeros(1, device=device).add(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise BadInput(f"--device {name} is not there: {str(e).splitlines()[0]}") from e
    return device


def cpu_features():
    """What torch knows of the CPU; nothing, before it could tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def has_fast_bf16(device):
    """Whether the device multiplies bfloat16 matrices in hardware; elsewhere it is slower than float32, or emulated."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and any(cpu_features().get(name) for name in ("amx_bf16", "avx512_bf16"))


def machine(device):
    """What a reported number must say of where it was measured: a plain dict."""
    name = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else cpu_features().get("cpu_name", platform.processor()))
    return {"device": device.type, "name": name, "bf16": has_fast_bf16(device), "threads": torch.get_num_threads(),
            "torch": str(torch.__version__), "python": platform.python_version(), "system": platform.system()}


def synchronize(device):
    """Wait until the device has done what it was given: what the clock says before is how fast it was given."""
    getattr(torch, device.type).synchronize()


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_states():
    """The random states of every kind of device that is in use."""
    return {"cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,
            "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None}


def set_rng_states(states):
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"][:torch.cuda.device_count()])
    if states["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
