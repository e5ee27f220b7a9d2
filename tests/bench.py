"""Speed, side by side in one process: this project's SFD step against one written as the official code does it, and one-step
sampling against the teacher's 35 evaluations.

    python tests/bench.py [--teacher teachers/mnist.pt] [--batch 64] [--seconds 20]

The official way: a fresh generator batch for each of the two updates, separate passes for kept and for forgotten labels (a full
batch of each), stop-gradients by toggling requires_grad, float32. Counted in images of kept labels, the ones the step is for.
"""
import argparse
import copy
import sys
import time
import types
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import machine, pick_device  # noqa: E402
from edm_unet import heun_sampler, load_checkpoint  # noqa: E402
from sfd_minimal import draw_labels, fake_score_loss, score_identity_loss, sfd_step  # noqa: E402


def official_step(generator, fake, teacher, optimizer_theta, optimizer_psi, batch, shape, override, s, device):
    def images(forgotten):
        c = torch.zeros(batch, dtype=torch.long, device=device) if forgotten else torch.randint(1, len(override), (batch,), device=device)
        label = F.one_hot(c, len(override)).float()
        return generator(s.sigma_init * torch.randn(batch, *shape, device=device), s.sigma_init, label), label, F.one_hot(override[c], len(override)).float()

    generator.requires_grad_(False)
    fake.requires_grad_(True)
    optimizer_psi.zero_grad()
    for forgotten in (False, True):
        x_g, label, _ = images(forgotten)
        sigma = (s.p_mean + 1.2 * torch.randn(batch, 1, 1, 1, device=device)).exp()
        fake_score_loss(fake, x_g, label, sigma).mean().backward()
    optimizer_psi.step()

    fake.requires_grad_(False)
    generator.requires_grad_(True)
    optimizer_theta.zero_grad()
    for forgotten, weight in ((False, 1.0), (True, s.lambda_forget)):
        x_g, label, told = images(forgotten)
        sigma = (0.002 ** (1 / 7) + 0.8 * torch.rand(batch, 1, 1, 1, device=device) * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
        (weight * score_identity_loss(teacher, fake, x_g, told, label, sigma, s.alpha).mean()).backward()
    optimizer_theta.step()
    fake.requires_grad_(True)


def rate(step, seconds, device):
    """Calls per second, the median of a handful of equal stretches."""
    step()
    rates = []
    for _ in range(5):
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / 5 or not calls:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            calls += 1
        rates.append(calls / (time.perf_counter() - start))
    return sorted(rates)[2]


def flops(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default=str(Path(__file__).parent.parent / "teachers" / "mnist.pt"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--device", default="auto")
    a = parser.parse_args()
    device = pick_device(a.device)
    teacher, _ = load_checkpoint(a.teacher, device)
    teacher.requires_grad_(False)
    net, K = teacher.settings, teacher.settings.num_classes
    shape = (net.channels, net.resolution, net.resolution)
    s = types.SimpleNamespace(sigma_init=2.5, p_mean=0.0, alpha=1.0, lambda_forget=1.0)
    override, kept = torch.arange(K, device=device), torch.arange(1, K, device=device)
    override[0] = 1

    def models(bf16):
        generator, fake = copy.deepcopy(teacher).requires_grad_(True), copy.deepcopy(teacher).requires_grad_(True)
        generator.bf16 = fake.bf16 = bf16
        return generator, fake, teacher, *(torch.optim.Adam(m.parameters(), 1e-5, betas=(0.0, 0.999), fused=True) for m in (generator, fake))

    fast, kept_images = teacher.bf16, a.batch * (K - 1) / K  # of our batch, one label in K is the forgotten one
    print(machine(device), f"| batch {a.batch}")
    theirs, first = models(bf16=False), None
    steps = [("as the official code, float32", a.batch, lambda: official_step(*theirs, a.batch, shape, override, s, device))]
    for bf16 in sorted({False, fast}):
        def ours(own=models(bf16)):
            sfd_step(*own, torch.randn(a.batch, *shape, device=device), *draw_labels(a.batch, override, kept), s, net.sigma_data)
        steps.append((f"this project, {'bfloat16' if bf16 else 'float32'}", kept_images, ours))
    for name, images, step in steps:
        teacher.bf16 = "bfloat16" in name
        speed = rate(step, a.seconds, device) * images
        first = first or speed
        print(f"{name}: {speed:.1f} kept images/s, {flops(step) / images / 1e6:.1f} MFLOP per kept image, {speed / first:.2f} times the first")

    teacher.bf16 = fast
    z, c = torch.randn(100, *shape, device=device), torch.eye(K, device=device)[torch.arange(100) % K]
    with torch.no_grad():
        one = 100 * rate(lambda: teacher(2.5 * z, 2.5, c), a.seconds / 4, device)
        many = 100 * rate(lambda: heun_sampler(teacher, z, c), a.seconds / 4, device)
    print(f"sampling: {one:.0f} images/s in one step, {many:.1f} by the teacher in 35 evaluations: {one / many:.1f} times faster")


if __name__ == "__main__":
    main()
