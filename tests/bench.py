"""Speed, side by side in one process, of what costs time: SFD steps, teacher training and sampling.

This project's SFD step stands against one written as the official code does it, one-step sampling against the teacher's
35 evaluations; each with its arithmetic, and the share of what the device makes of a matrix product.

    python tests/bench.py [--teacher teachers/mnist.pt] [--batch 64] [--seconds 20] [--compile]
    python tests/bench.py --profile          # which operations this project's step spends its time in
    python tests/bench.py --published        # one step of the published architecture, and the memory it takes

The official way: a fresh generator batch for each of the two updates, separate passes for kept and for forgotten labels
(a full batch of each), stop-gradients by toggling requires_grad, float32. Counted in images of kept labels, the ones
the step is for. The method is the same in both; the guidance and the anchor that the default adds have a row of
their own.
"""
import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import machine, pick_device  # noqa: E402
from edm_unet import EDMPrecond, NetSettings, heun_sampler, load_checkpoint  # noqa: E402
from sfd_minimal import Settings, draw_labels, fake_score_loss, guided, score_identity_loss, sfd_step  # noqa: E402

PUBLISHED = NetSettings(resolution=32, channels=3, model_channels=128, channel_mult=(2, 2, 2), num_blocks=4,
                        attn_resolutions=(16,), dropout=0.13)


def official_step(generator, fake, teacher, optimizer_theta, optimizer_psi, batch, shape, override, s, device):
    def images(forgotten):
        c = (torch.zeros(batch, dtype=torch.long, device=device) if forgotten
             else torch.randint(1, len(override), (batch,), device=device))
        label = F.one_hot(c, len(override)).float()
        return (generator(s.sigma_init * torch.randn(batch, *shape, device=device), s.sigma_init, label), label,
                F.one_hot(override[c], len(override)).float())

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
        sigma = (0.002 ** (1 / 7)
                 + 0.8 * torch.rand(batch, 1, 1, 1, device=device) * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
        (weight * score_identity_loss(teacher, fake, x_g, told, label, sigma, s.alpha).mean()).backward()
    optimizer_theta.step()
    fake.requires_grad_(True)


def synchronize(device):
    """Wait until the device has done what it was given: what the clock says before is how fast it was given."""
    getattr(torch, device.type).synchronize()


def rate(step, seconds, device):
    """Calls per second, the median of a handful of equal stretches."""
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
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def matrix_rate(device, dtype):
    """FLOP/s of one large matrix product, large enough for a GPU to forget the wait for its end."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 * rate(lambda: a @ b, 2, device)


def profile(step, device, steps=10):
    """The operations that take the most time of their own, without what they call: on the GPU where there is one."""
    step()
    with torch.profiler.profile() as seen:  # of all the devices that there are
        for _ in range(steps):
            step()
    own = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    print(seen.key_averages().table(sort_by=own, row_limit=12, max_name_column_width=40))


def published_step(device, s, batch=2):
    """One SFD step of the published network, from random weights: what it costs."""
    import resource  # not on Windows
    teacher, generator, fake = (EDMPrecond(PUBLISHED).to(device) for _ in range(3))
    teacher.requires_grad_(False)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-5, betas=(0.0, 0.999), fused=True) for m in (generator, fake)]
    override = torch.arange(10, device=device)
    override[0] = 1
    before = [p.detach().clone() for p in generator.parameters()]
    synchronize(device)
    start = time.perf_counter()
    terms = sfd_step(generator, fake, teacher, *optimizers, torch.randn(batch, 3, 32, 32, device=device),
                     *draw_labels(batch, override, torch.arange(1, 10, device=device)), s)
    synchronize(device)
    seconds = time.perf_counter() - start
    assert (all(torch.isfinite(v) for v in terms.values())
            and any((p != q).any() for p, q in zip(generator.parameters(), before)))
    peak = (torch.cuda.max_memory_allocated() if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    print(f"published architecture, {sum(p.numel() for p in teacher.parameters()) / 1e6:.1f} M parameters, "
          f"one SFD step of {batch} images: {seconds:.1f} s, peak memory of the process {peak / 2 ** 30:.1f} GiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default=str(Path(__file__).parent.parent / "teachers" / "mnist.pt"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument("--profile", action="store_true", help="the operations of this project's step instead")
    parser.add_argument("--published", action="store_true", help="the published architecture instead")
    a = parser.parse_args()
    device = pick_device(a.device)
    s = Settings()
    print(machine(device))
    if a.published:
        return published_step(device, s)
    teacher, _ = load_checkpoint(a.teacher, device)
    teacher.requires_grad_(False)
    net, K = teacher.settings, teacher.settings.num_classes
    shape = (net.channels, net.resolution, net.resolution)
    override, kept = torch.arange(K, device=device), torch.arange(1, K, device=device)
    override[0] = 1

    def models(bf16):
        generator, fake = copy.deepcopy(teacher).requires_grad_(True), copy.deepcopy(teacher).requires_grad_(True)
        generator.bf16 = fake.bf16 = bf16
        return generator, fake, teacher, *(torch.optim.Adam(m.parameters(), 1e-5, betas=(0.0, 0.999), fused=True)
                                           for m in (generator, fake))

    def our_step(own, anchor=None):
        generator, fake, D_phi, *optimizers = own
        c_phi, c_psi, forgotten = draw_labels(a.batch, override, kept)
        D_phi = guided(D_phi, c_psi, forgotten, s.guidance) if anchor else D_phi
        return sfd_step(generator, fake, D_phi, *optimizers, torch.randn(a.batch, *shape, device=device),
                        c_phi, c_psi, forgotten, s, net.sigma_data, anchor)

    if a.profile:
        own = models(teacher.bf16)
        return profile(lambda: our_step(own), device)
    fast, kept_images = teacher.bf16, a.batch * (K - 1) / K  # of our batch, one label in K is the forgotten one
    peak = matrix_rate(device, torch.bfloat16 if fast else torch.float32)
    print(f"batch {a.batch}; matrix product in {'bfloat16' if fast else 'float32'}: {peak / 1e9:.0f} GFLOP/s")

    def measure(name, networks, step, images, kept="", first=None):
        with torch.compiler.set_stance("force_eager"):  # the count does not see into compiled code
            per_image = flops(step) / images
        # or the networks of all rows together exceed what torch is willing to compile of one function
        torch.compiler.reset()
        for network in networks if a.compile else ():
            network.compile()
        speed = rate(step, a.seconds, device) * images
        print(f"{name}: {speed:.1f} {kept}images/s, {per_image / 1e6:.1f} MFLOP per {kept}image, "
              f"{speed * per_image / peak:.0%} of the matrix rate"
              + (f", {speed / first:.2f} times the first" if first else ""))
        return speed

    theirs = models(bf16=False)
    teacher.bf16 = False
    first = measure("as the official code, float32", theirs[:3],
                    lambda: official_step(*theirs, a.batch, shape, override, s, device), a.batch, "kept ")
    for bf16 in sorted({False, fast}):
        own = models(bf16)
        teacher.bf16 = bf16
        measure(f"this project, {'bfloat16' if bf16 else 'float32'}", own[:2], lambda: our_step(own),
                kept_images, "kept ", first)
    own, anchor = models(fast), copy.deepcopy(teacher)
    measure("the same with guidance and anchor", own[:2], lambda: our_step(own, anchor), kept_images, "kept ", first)

    student, _, _, optimizer, _ = models(fast)
    x, label = (torch.randn(a.batch, *shape, device=device),
                torch.eye(K, device=device)[torch.arange(a.batch, device=device) % K])

    def teach():
        loss = fake_score_loss(student, x, label, torch.rand(a.batch, 1, 1, 1, device=device) + 0.1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    measure("teacher training", [student], teach, a.batch)

    z, c = torch.randn(100, *shape, device=device), torch.eye(K, device=device)[torch.arange(100, device=device) % K]
    with torch.no_grad():
        one = measure("one-step sampling", [student], lambda: student(2.5 * z, 2.5, c), 100)
        many = measure("the teacher's 35 evaluations", [student], lambda: heun_sampler(student, z, c), 100)
    print(f"one step is {one / many:.1f} times faster than 35 evaluations")


if __name__ == "__main__":
    main()
