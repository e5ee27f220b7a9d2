"""Measure the speed of an SFD step, next to a step that is written as the official code writes it.

    python -m lab.bench                # images a second and arithmetic of both steps
    python -m lab.bench --published    # arithmetic and memory of NVIDIA's network for CIFAR-10, counted

The official way: a fresh batch of images for each of the two updates, separate passes for kept and for forgotten labels
(a full batch of each), stop-gradients by toggling requires_grad, float32. Speed is counted in images of kept labels,
for which both steps are made.
"""
import copy
import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

import sfd_minimal
from edm_unet import EDMPrecond, NetSettings, command, has_fast_bf16, load_network, machine, pick_device
from lab.core.files import SHIPPED
from lab.core.options import parse, setting
from sfd_minimal import draw_labels, fake_score_loss, score_identity_loss, sfd_step

PUBLISHED = NetSettings(resolution=32, channels=3, model_channels=128, channel_mult=(2, 2, 2), num_blocks=4,
                        attn_resolutions=(16,), dropout=0.13)


def official_step(n, batch, override, s):
    """One step of SFD on the `sfd_minimal.Networks` n, as the official code takes it. Label 0 is forgotten."""
    device, conditions = override.device, n.teacher.conditions

    def generate(forgotten):
        """Images (batch, ...), their labels, and the labels that the teacher is given."""
        c = torch.zeros(batch, dtype=torch.long, device=device)
        if not forgotten:
            c = torch.randint(1, len(override), (batch,), device=device)
        z = torch.randn(batch, *n.teacher.shape, device=device)
        x_g = n.generator(s.sigma_init * z, s.sigma_init, conditions[c])
        return x_g, conditions[c], conditions[override[c]]

    n.generator.requires_grad_(False)
    n.fake.requires_grad_(True)
    n.optimizer_psi.zero_grad()
    for forgotten in (False, True):
        x_g, c_psi, _ = generate(forgotten)
        sigma = (s.p_mean + s.p_std * torch.randn(batch, 1, 1, 1, device=device)).exp()
        fake_score_loss(n.fake, x_g, c_psi, sigma).mean().backward()
    n.optimizer_psi.step()

    n.fake.requires_grad_(False)
    n.generator.requires_grad_(True)
    n.optimizer_theta.zero_grad()
    low, high = s.sigma_min ** (1 / 7), s.sigma_max ** (1 / 7)
    for forgotten, weight in ((False, 1.0), (True, s.lambda_forget)):
        x_g, c_psi, c_phi = generate(forgotten)
        sigma = (low + s.u_max * torch.rand(batch, 1, 1, 1, device=device) * (high - low)) ** 7
        S = score_identity_loss(n.teacher, n.fake, x_g, c_phi, c_psi, sigma, s.alpha).mean()
        (weight * S).backward()
    n.optimizer_theta.step()


def our_step(n, batch, override, s):
    """One step of SFD as `sfd_minimal.distill` takes it."""
    z = torch.randn(batch, *n.teacher.shape, device=override.device)
    labels = draw_labels(batch, override, n.teacher.conditions)
    sfd_step(n.generator, n.fake, n.teacher, n.optimizer_theta, n.optimizer_psi, z, *labels, s)


def synchronize(device):
    """Wait until the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def rate(step, seconds, device):
    """Calls of `step` per second: the median of five equal stretches."""
    step()
    synchronize(device)
    rates = []
    for _ in range(5):
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / 5 or not calls:
            step()
            synchronize(device)
            calls += 1
        rates.append(calls / (time.perf_counter() - start))
    return sorted(rates)[2]


def flops(step):
    """Floating-point operations of the matrix products and convolutions in a call of `step`."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def saved_bytes(network):
    """Bytes that one evaluation keeps of an image for the gradient, without the weights."""
    sizes = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = network.conditions.device
    x = torch.randn(2, *network.shape, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(x, torch.ones(2, 1, 1, 1, device=device), network.conditions[:2])
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    return sum(size for pointer, size in sizes.items() if pointer not in weights) / 2


def published(batch=2):
    """Print the arithmetic and memory of SFD with NVIDIA's network, counted in one step of random weights on the CPU.
    """
    teacher, s = EDMPrecond(PUBLISHED), sfd_minimal.Settings()
    n = sfd_minimal.begin(teacher, s)
    per_image = flops(lambda: our_step(n, batch, first_to_second(teacher), s)) / batch
    kept = saved_bytes(n.generator)
    numbers = sum(p.numel() for p in teacher.parameters())
    print(f"{numbers / 1e6:.1f} M parameters, {per_image / 1e12:.2f} TFLOP an image and step")
    fixed = 10 * 4 * numbers  # four networks, two gradients, two moments of two optimizers, in float32
    for card in (16, 24, 80):
        free = card * 1e9 - fixed
        print(f"{card} GB hold {int(free / (3 * kept))} images at once in all three networks, "
              f"or any batch with a micro-batch of at most {int(free / kept)}")


def first_to_second(teacher):
    """override (K,) of `sfd_minimal.draw_labels`: label 1 is drawn under label 0."""
    override = torch.arange(len(teacher.conditions), device=teacher.conditions.device)
    override[0] = 1
    return override


@dataclass
class Settings:
    published: bool = setting(False, "count what NVIDIA's network takes, instead of measuring")
    teacher: str = setting(str(SHIPPED / "mnist.pt"), "file of the network to measure")
    batch: int = setting(64, "images per step", above=0)
    seconds: float = setting(20.0, "seconds of measuring each step", above=0)
    device: str = setting("auto", "auto, cpu, cuda or mps")


def main(argv):
    a = parse(Settings, argv, __doc__)
    if a.published:
        published()
        return
    device, s = pick_device(a.device), sfd_minimal.Settings()
    print(machine(device))
    teacher, _ = load_network(a.teacher, device)
    override = first_to_second(teacher)
    kept_share = (len(override) - 1) / len(override)
    rows = [("as the official code, float32", official_step, False, a.batch),
            ("this project, float32", our_step, False, a.batch * kept_share)]
    if has_fast_bf16(device):
        rows.append(("this project, bfloat16", our_step, True, a.batch * kept_share))
    first = None
    for name, step, bf16, images in rows:
        teacher.bf16 = bf16
        n = sfd_minimal.begin(teacher, s)

        def take_step():
            step(n, a.batch, override, s)
        per_image = flops(take_step) / images
        speed = rate(take_step, a.seconds, device) * images
        first = first or speed
        print(f"{name}: {speed:.1f} kept images/s, {per_image / 1e6:.1f} MFLOP per kept image, "
              f"{speed / first:.2f} times the first")


if __name__ == "__main__":
    command(main)
