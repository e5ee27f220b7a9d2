"""Speed, side by side in one process, of what costs time: SFD steps, teacher training and sampling.

    python -m lab.bench
    python -m lab.bench --only profile      # which operations this project's step spends its time in
    python -m lab.bench --only published    # one step of the published architecture, and the memory it takes

This project's SFD step stands against one written as the official code does it, one-step sampling against the teacher's
35 evaluations; each with its arithmetic, and the share of what the device makes of a matrix product. The official way:
a fresh generator batch for each of the two updates, separate passes for kept and for forgotten labels (a full batch of
each), stop-gradients by toggling requires_grad, float32. Counted in images of kept labels, the ones the step is for.
"""
import copy
import sys
import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from edm_unet import EDMPrecond, NetSettings
from lab.checkpoint import SHIPPED, load_checkpoint
from lab.cli import check_ranges, command, parse, setting
from lab.device import machine, pick_device, synchronize
from lab.sample import many_step, one_step
from sfd_minimal import Settings as Method
from sfd_minimal import draw_labels, fake_score_loss, guided, score_identity_loss, sfd_step

PUBLISHED = NetSettings(resolution=32, channels=3, model_channels=128, channel_mult=(2, 2, 2), num_blocks=4,
                        attn_resolutions=(16,), dropout=0.13)


def official_step(generator, fake, teacher, optimizer_theta, optimizer_psi, batch, override, s):
    conditions, device = teacher.conditions, override.device

    def images(forgotten):
        c = torch.randint(1, len(override), (batch,), device=device) * (not forgotten)
        x_g = one_step(generator, s.sigma_init)(torch.randn(batch, *teacher.shape, device=device), conditions[c])
        return x_g, conditions[c], conditions[override[c]]

    generator.requires_grad_(False)
    fake.requires_grad_(True)
    optimizer_psi.zero_grad()
    for forgotten in (False, True):
        x_g, c_psi, _ = images(forgotten)
        sigma = (s.p_mean + s.p_std * torch.randn(batch, 1, 1, 1, device=device)).exp()
        fake_score_loss(fake, x_g, c_psi, sigma).mean().backward()
    optimizer_psi.step()

    fake.requires_grad_(False)
    generator.requires_grad_(True)
    optimizer_theta.zero_grad()
    low, high = s.sigma_min ** (1 / 7), s.sigma_max ** (1 / 7)
    for forgotten, weight in ((False, 1.0), (True, s.lambda_forget)):
        x_g, c_psi, c_phi = images(forgotten)
        sigma = (low + s.u_max * torch.rand(batch, 1, 1, 1, device=device) * (high - low)) ** 7
        (weight * score_identity_loss(teacher, fake, x_g, c_phi, c_psi, sigma, s.alpha).mean()).backward()
    optimizer_theta.step()
    fake.requires_grad_(True)


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
    teacher, generator, fake = (EDMPrecond(PUBLISHED).to(device) for _ in range(3))
    teacher.requires_grad_(False)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-5, betas=(0.0, 0.999), fused=True) for m in (generator, fake)]
    override, kept = first_to_second(teacher)
    before = [p.detach().clone() for p in generator.parameters()]
    take = lambda: sfd_step(generator, fake, teacher, *optimizers, torch.randn(batch, *teacher.shape, device=device),
                            *draw_labels(batch, override, kept, teacher.conditions), s)
    of_image_step = flops(take) / batch
    synchronize(device)
    start = time.perf_counter()
    terms = take()
    synchronize(device)
    seconds = time.perf_counter() - start
    assert (all(torch.isfinite(v) for v in terms.values())
            and any((p != q).any() for p, q in zip(generator.parameters(), before)))
    print(f"published architecture, {sum(p.numel() for p in teacher.parameters()) / 1e6:.1f} M parameters, "
          f"one SFD step of {batch} images: {seconds:.1f} s, {of_image_step / 1e12:.2f} TFLOP an image, "
          f"peak memory {peak_memory(device)}")
    fixed, of_image = counted_memory(teacher)
    for card in (16, 24, 80):
        print(f"as counted, {card} GB hold {max(0, int((card * 1e9 - fixed) / (3 * of_image)))} images at once in all "
              f"three networks, or any batch with --micro-batch {max(0, int((card * 1e9 - fixed) / of_image))} or less")


def peak_memory(device):
    """In words: of the card, or of this process, where the system says it."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB"
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30:.1f} GiB"


def counted_memory(network):
    """Bytes that a training run of `network` takes whatever its batch (four copies, two gradients, the two moments of
    two optimizers), and those that one evaluation keeps of an image for the gradient: counted, not measured."""
    saved, device = {}, network.conditions.device
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t):
        kept = network(torch.randn(2, *network.shape, device=device, requires_grad=True),
                       torch.ones(2, 1, 1, 1, device=device), network.conditions[:2])
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in network.parameters()}
    del kept
    return 10 * sum(weights.values()), sum(n for of, n in saved.items() if of not in weights) / 2


def first_to_second(teacher):
    """(override, kept) where label 0 is forgotten and 1 drawn instead."""
    K, device = len(teacher.conditions), teacher.conditions.device
    override = torch.arange(K, device=device)
    override[0] = 1
    return override, torch.arange(1, K, device=device)


@dataclass
class Settings:
    only: str = setting("speed", "what to measure", choices=("speed", "profile", "published"))
    teacher: str = setting(str(SHIPPED / "mnist.pt"), "the network to measure")
    batch: int = setting(64, "images per step", above=0)
    seconds: float = setting(20.0, "seconds for each row", above=0)
    device: str = setting("auto", "auto, cpu, cuda or mps")
    compile: bool = setting(False, "torch.compile the networks")
    __post_init__ = check_ranges


def main(argv):
    a = parse(Settings, argv, __doc__)
    device, s = pick_device(a.device), Method()
    print(machine(device))
    if a.only == "published":
        return published_step(device, s)
    teacher = load_checkpoint(a.teacher, device)[0].requires_grad_(False)
    override, kept = first_to_second(teacher)
    noise = lambda n: torch.randn(n, *teacher.shape, device=device)

    def models(bf16):
        generator, fake = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
        generator.bf16 = fake.bf16 = bf16
        return generator, fake, teacher, *(torch.optim.Adam(m.parameters(), 1e-5, betas=(0.0, 0.999), fused=True)
                                           for m in (generator, fake))

    def our_step(own, settings=s, anchor=None):
        generator, fake, D_phi, *optimizers = own
        c_phi, c_psi, forgotten = draw_labels(a.batch, override, kept, teacher.conditions)
        D_phi = guided(D_phi, c_psi, forgotten, settings.guidance) if settings.guidance != 1 else D_phi
        return sfd_step(generator, fake, D_phi, *optimizers, noise(a.batch), c_phi, c_psi, forgotten, settings,
                        teacher.sigma_data, anchor)

    if a.only == "profile":
        own = models(teacher.bf16)
        return profile(lambda: our_step(own), device)
    fast, kept_images = teacher.bf16, a.batch * len(kept) / len(override)
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
                    lambda: official_step(*theirs, a.batch, override, s), a.batch, "kept ")
    for bf16 in sorted({False, fast}):
        own = models(bf16)
        teacher.bf16 = bf16
        measure(f"this project, {'bfloat16' if bf16 else 'float32'}", own[:2], lambda: our_step(own),
                kept_images, "kept ", first)
    own, anchor, options = models(fast), copy.deepcopy(teacher), Method(guidance=1.2, lambda_anchor=1.0)
    measure("the same with guidance and anchor", own[:2], lambda: our_step(own, options, anchor),
            kept_images, "kept ", first)

    student, _, _, optimizer, _ = models(fast)
    x, c = noise(a.batch), teacher.conditions[torch.arange(a.batch, device=device) % len(override)]

    def teach():
        loss = fake_score_loss(student, x, c, torch.rand(a.batch, 1, 1, 1, device=device) + 0.1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    measure("teacher training", [student], teach, a.batch)

    z, c = noise(100), teacher.conditions[torch.arange(100, device=device) % len(override)]
    with torch.no_grad():
        one = measure("one-step sampling", [student], lambda: one_step(student, s.sigma_init)(z, c), 100)
        many = measure("the teacher's 35 evaluations", [student], lambda: many_step(student)(z, c), 100)
    print(f"one step is {one / many:.1f} times faster than 35 evaluations\nnext: python -m lab.bench --only profile")


if __name__ == "__main__":
    command(main)
