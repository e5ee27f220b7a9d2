"""Draw images from networks, with the same noise for the same label in every network and on every device."""
import contextlib

import torch
from tqdm import tqdm

from edm_unet import heun
from lab.core.files import load_any
from lab.core.images import to_uint8

TEACHER_STEPS = 18
TEACHER_NFE = 2 * TEACHER_STEPS - 1  # network evaluations per image


def sampler(network, sigma_init=None):
    """Return generate(z, c) -> images: one evaluation at the noise level sigma_init, or a teacher's 35.

    z (B, ...) standard normal noise, c (B, ...) conditions. Gradients reach both.
    """
    def one_step(z, c):
        sigma = torch.full((len(z),) + (1,) * (z.ndim - 1), sigma_init, device=z.device)
        return network(sigma * z, sigma, c)

    def many_steps(z, c):
        return heun(network, z, c, TEACHER_STEPS)

    return many_steps if sigma_init is None else one_step


def load_generator(path, device, load=load_any):
    """(generate, network, info) of the file of a one-step generator or a teacher.

    generate: as of `sampler`. info: the other entries of the file, and "nfe", the network evaluations per image.
    """
    network, info = load(path, device)
    sigma_init = info.get("sigma_init")
    nfe = TEACHER_NFE if sigma_init is None else 1
    return sampler(network, sigma_init), network, info | {"nfe": nfe}


@contextlib.contextmanager
def in_float32(network):
    """Compute in float32 inside the block: every network is evaluated so, on every machine."""
    bf16 = getattr(network, "bf16", False)
    network.bf16 = False
    try:
        yield
    finally:
        network.bf16 = bf16


@torch.no_grad()
def draw_parts(generate, labels, network, seed, batch=250, progress=None, conditions=None):
    """Yield images uint8 (n, C, H, W) under labels (N,), on the CPU, in parts of n = `batch` images or fewer.

    The j-th image of a label has the same noise, whatever else is drawn. conditions (K, ...): the condition of each
    label, where it is not the network's own. progress: title of a progress bar.
    """
    rng = {k: torch.Generator().manual_seed(10_000 * seed + k) for k in labels.unique().tolist()}
    device = network.conditions.device
    c = network.conditions if conditions is None else conditions.to(device)
    for part in tqdm(labels.split(batch), desc=progress, disable=not progress, leave=False):
        z = torch.stack([torch.randn(network.shape, generator=rng[k]) for k in part.tolist()])
        yield to_uint8(generate(z.to(device), c[part.to(device)])).cpu()


def draw_images(generate, labels, network, seed, **options):
    """All images of `draw_parts` at once: uint8 (N, C, H, W)."""
    return torch.cat(list(draw_parts(generate, labels, network, seed, **options)))
