"""Score Forgetting Distillation (SFD) in one file. Chen, Zhang and Zhou, ICLR 2025, https://arxiv.org/abs/2409.11219

    python sfd_minimal.py --forget 0 --to 1

distils a label-conditional diffusion teacher into a one-step generator that has forgotten a class, without real images.
SFD is Score identity Distillation (SiD, https://arxiv.org/abs/2404.04057) with one change: for the label to forget, the
teacher is given another label. Three networks, all started from the teacher's weights:

    teacher    D_phi(x_t; sigma, c)   frozen
    fake       D_psi(x_t; sigma, c)   keeps learning to denoise the generator's images, and so knows their score
    generator  x_g = G_theta(z, c) = D_theta(sigma_init z; sigma_init, c),   z ~ N(0, I),   one evaluation

A denoiser is any callable D(x_t, sigma, c) -> E[x | x_t; sigma, c]. Its score is (D - x_t) / sigma^2.
To use SFD in your own project, copy the code between the two rulers: it needs torch and nothing else.
"""
import copy
import math
import re
import time
import unicodedata
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

from edm_unet import (BadInput, Parser, RunFailed, Stopped, command, data_name, digest, load_checkpoint, load_file,
                      load_network, machine, make_run_folder, pack, pick_device, save_checkpoint, save_file,
                      save_images, unpack, watch_pace)


@dataclass
class Settings:
    # the method
    alpha: float = 1.0          # of score_identity_loss; the published runs on labels use 1.2
    lambda_forget: float = 1.0  # weight of the score-forgetting term; the labels to keep have weight 1
    sigma_init: float = 2.5     # noise level at which the generator evaluates its network
    p_mean: float = 0.0         # psi step: ln sigma ~ N(p_mean, p_std^2); SiD's p_mean is -1.2
    p_std: float = 1.2
    sigma_min: float = 0.002    # theta step: EDM's rho = 7 grid between sigma_min and sigma_max,
    sigma_max: float = 80.0
    u_max: float = 0.8          # of which the lowest share u_max is used: up to sigma = 24.4
    # the run
    steps: int = 1000
    batch: int = 64             # generated images per step
    lr: float = 3e-4            # generator's learning rate (Adam): constant for half of the run, then linearly to zero
    lr_fake: float = 1e-3       # fake score's learning rate: it must keep up with the generator
    ema: float = 0.999          # decay of the generator's running average; the run saves the average
    seed: int = 0

    def __post_init__(self):
        for name in ("sigma_init", "p_std", "sigma_min", "sigma_max", "u_max", "steps", "batch", "lr", "lr_fake"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadInput(f"{name} must be above 0 and finite, not {getattr(self, name)}")
        if not all(map(math.isfinite, (self.alpha, self.lambda_forget, self.p_mean))) or self.lambda_forget < 0:
            raise BadInput("alpha, lambda_forget and p_mean must be finite, and lambda_forget at least 0")
        if not 0 <= self.ema < 1 or self.u_max > 1 or self.sigma_min >= self.sigma_max:
            raise BadInput("ema must lie in [0, 1), u_max in (0, 1], and sigma_min below sigma_max")
        if not 0 <= self.seed < 2 ** 32:
            raise BadInput(f"seed must lie between 0 and {2 ** 32 - 1}, not {self.seed}")


PRESETS = {  # differences from the defaults above; options on the command line override a preset
    "mnist": dict(),
    "mnist, from a one-step generator": dict(steps=700),
    "mnist, forgetting nothing": dict(steps=7000, lr=1e-4, lr_fake=3.4e-4),
    "cifar10": dict(steps=8000, lr=1e-4, lr_fake=3.4e-4),
    "cifar10, from a one-step generator": dict(steps=450, lr=2e-4, lr_fake=6.8e-4),
    "cifar10, forgetting nothing": dict(steps=800, batch=256, lr=1e-4, lr_fake=3.4e-4),
}


# ------------------------------------------------------------------------------------------------ SFD: copy from here
# `s` is any object with the fields alpha, lambda_forget, sigma_init, p_mean, p_std, sigma_min, sigma_max and u_max.

def fake_score_loss(fake, x_g, c, sigma, sigma_data=0.5):
    """L_psi = w(sigma) ||D_psi(x_t; sigma, c) - x_g||^2,  w = (sigma^2 + sd^2) / (sigma sd)^2.

    x_g (B, ...) generated images, detached; c (B, ...) their labels; sigma (B, 1, ...). Returns (B,).
    """
    if sigma.ndim != x_g.ndim:
        raise ValueError(f"sigma {tuple(sigma.shape)} must have as many dimensions as x_g {tuple(x_g.shape)}")
    x_t = x_g + sigma * torch.randn_like(x_g)                                         # (B, ...)
    D_psi = fake(x_t, sigma, c)                                                       # (B, ...)
    w = (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2                    # (B, 1, ...)
    return (w * (D_psi - x_g) ** 2).flatten(1).sum(1)                                 # (B,)


def score_identity_loss(teacher, fake, x_g, c_phi, c_psi, sigma, alpha=1.0):
    """S(x_g; c_phi, c_psi) = sum_pixels (D_phi - D_psi) [(D_phi - x_g) - alpha (D_phi - D_psi)] / omega.

    The teacher is given the labels c_phi (B, ...), the fake score the labels c_psi (B, ...). The gradient reaches
    x_g (B, ...) directly and through x_t inside both networks. sigma (B, 1, ...). Returns (B,).
    omega = mean_pixels |D_phi - x_g|, one number for each sample, without gradient. Where x_g has one number a sample,
    some omegas are close to zero, and these samples dominate: for such data take the mean of omega over the batch.
    """
    if sigma.ndim != x_g.ndim:
        raise ValueError(f"sigma {tuple(sigma.shape)} must have as many dimensions as x_g {tuple(x_g.shape)}")
    x_t = x_g + sigma * torch.randn_like(x_g)                                         # (B, ...)
    D_phi = teacher(x_t, sigma, c_phi)                                                # (B, ...)
    D_psi = fake(x_t, sigma, c_psi)                                                   # (B, ...)
    omega = (D_phi - x_g).detach().abs().flatten(1).mean(1).clamp(min=1e-5)           # (B,)
    S = (D_phi - D_psi) * ((D_phi - x_g) - alpha * (D_phi - D_psi))                   # (B, ...)
    return S.flatten(1).sum(1) / omega                                                # (B,)


def draw_labels(batch, override, conditions):
    """Draw labels: c_phi for the teacher, c_psi for generator and fake score, and forgotten (B,), where they differ.

    override (K,): the label that the teacher is given in the place of each label. A label to keep is its own override,
    and there is at least one. -1: the teacher is given a random label to keep, another one in each draw.
    conditions (K, ...): what the networks take for each label, such as its one-hot row.
    """
    labels = torch.arange(len(override), device=override.device)
    kept = labels[override == labels]
    c = torch.randint(len(labels), (batch,), device=override.device)
    random_kept = kept[torch.randint(len(kept), (batch,), device=override.device)]
    c_o = torch.where(override[c] == -1, random_kept, override[c])
    return conditions[c_o], conditions[c], c_o != c


def sfd_step(generator, fake, teacher, optimizer_theta, optimizer_psi, z, c_phi, c_psi, forgotten, s,
             sigma_data=0.5, extra_loss=None):
    """One step of SFD. z (B, ...) ~ N(0, I); c_phi, c_psi (B, ...) and forgotten (B,) bool as from `draw_labels`.

    extra_loss(x_g, z, c_psi, forgotten) -> scalar: a term of your own, added to L_theta. Returns L_psi, L_keep and
    L_forget, detached. ValueError where `forgotten` is no bool tensor of shape (B,).
    """
    B = len(z)
    per_sample = (B,) + (1,) * (z.ndim - 1)
    sigma_init = torch.full(per_sample, s.sigma_init, device=z.device)
    if not torch.is_tensor(forgotten) or forgotten.dtype != torch.bool or forgotten.shape != (B,):
        raise ValueError(f"forgotten must be a bool tensor of shape ({B},), true in the rows of a label to forget")

    # Generate images, under the labels to forget too. Only the teacher will be given another label for them.
    x_g = generator(sigma_init * z, sigma_init, c_psi)                                # (B, ...), with gradient

    # psi step: the fake score learns to denoise the generator's images, under the labels they were generated for.
    sigma = (s.p_mean + s.p_std * torch.randn(B, device=z.device)).exp().view(per_sample)
    L_psi = fake_score_loss(fake, x_g.detach(), c_psi, sigma, sigma_data).mean()
    optimizer_psi.zero_grad()
    L_psi.backward()
    optimizer_psi.step()

    # theta step: the generator moves to where the fake score and the teacher agree.
    low, high = s.sigma_min ** (1 / 7), s.sigma_max ** (1 / 7)
    u = s.u_max * torch.rand(B, device=z.device)
    sigma = (low + u * (high - low)).pow(7).view(per_sample)
    S = score_identity_loss(teacher, fake, x_g, c_phi, c_psi, sigma, s.alpha)         # (B,)
    L_keep = torch.where(forgotten, 0, S).sum() / B     # S(G(z, c);   c_phi = c,   c_psi = c)    SiD, labels to keep
    L_forget = torch.where(forgotten, S, 0).sum() / B   # S(G(z, c_f); c_phi = c_o, c_psi = c_f)  score forgetting
    L_theta = L_keep + s.lambda_forget * L_forget
    if extra_loss is not None:
        L_theta = L_theta + extra_loss(x_g, z, c_psi, forgotten)
    optimizer_theta.zero_grad()
    L_theta.backward(inputs=[p for p in generator.parameters() if p.requires_grad])   # teacher and fake get none
    optimizer_theta.step()
    return {"L_psi": L_psi.detach(), "L_keep": L_keep.detach(), "L_forget": L_forget.detach()}


# ------------------------------------------------------------------------------------------------------------ to here

@dataclass
class Networks:
    """The frozen teacher, and the networks and optimizers that training changes."""
    teacher: torch.nn.Module
    generator: torch.nn.Module
    average: torch.nn.Module    # running average of the generator
    fake: torch.nn.Module
    optimizer_theta: torch.optim.Optimizer
    optimizer_psi: torch.optim.Optimizer

    def trained(self):
        """{name: part} of everything that training changes: what a checkpoint holds."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "teacher"}


def begin(teacher, s, generator=None, fake=None):
    """Copy the teacher, or a one-step generator and its fake score, into the `Networks` of a run.

    The teacher itself is not changed. A parameter that is frozen in the teacher stays frozen in the copies. If all are
    frozen, all learn in the copies. ValueError where a parameter is not float32, which would round Adam's steps away.
    """
    learns = [p.requires_grad for p in teacher.parameters()]
    if not any(learns):
        learns = [True] * len(learns)
    frozen_teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
    generator = copy.deepcopy(teacher if generator is None else generator).eval()
    fake = copy.deepcopy(teacher if fake is None else fake).eval()
    average = copy.deepcopy(generator).requires_grad_(False)
    for network in (frozen_teacher, generator, fake):
        if any(p.dtype != torch.float32 for p in network.parameters()):
            raise ValueError("parameters must be float32; a network may compute in bfloat16 inside")
    optimizers = []
    for network, lr in ((generator, s.lr), (fake, s.lr_fake)):
        for parameter, learn in zip(network.parameters(), learns, strict=True):
            parameter.requires_grad_(learn)
        learning = [p for p in network.parameters() if p.requires_grad]
        optimizers.append(torch.optim.Adam(learning, lr, betas=(0.0, 0.999), fused=True))
    return Networks(frozen_teacher, generator, average, fake, *optimizers)


def set_learning_rates(n, s, step):
    """Both rates are constant for the first half of the run, then fall linearly to zero."""
    decay = min(1.0, 2 * (1 - step / s.steps))
    for optimizer, lr in ((n.optimizer_theta, s.lr), (n.optimizer_psi, s.lr_fake)):
        for group in optimizer.param_groups:
            group["lr"] = lr * decay


@torch.no_grad()
def update_average(average, network, ema, step):
    """average <- beta average + (1 - beta) network. beta is `ema`, and smaller in the first steps."""
    beta = min(ema, (1 + step) / (8 + step))
    for a, p in zip(average.parameters(), network.parameters()):
        a.lerp_(p, 1 - beta)
    for a, p in zip(average.buffers(), network.buffers()):
        a.copy_(p)


def distill(s, n, override, first=0):
    """SFD from step number `first` on, on the `Networks` n. override (K,) as in `draw_labels`.

    Yield the loss terms of each step. The caller logs, saves and stops. RunFailed where a loss is not finite.
    """
    device = n.teacher.conditions.device
    for step in range(first, s.steps):
        set_learning_rates(n, s, step)
        z = torch.randn(s.batch, *n.teacher.shape, device=device)
        c_phi, c_psi, forgotten = draw_labels(s.batch, override, n.teacher.conditions)
        terms = sfd_step(n.generator, n.fake, n.teacher, n.optimizer_theta, n.optimizer_psi,
                         z, c_phi, c_psi, forgotten, s, n.teacher.sigma_data)
        for name, value in terms.items():
            if not value.isfinite():
                raise RunFailed(f"{name} is {value} at step {step + 1}: begin again with smaller --lr and --lr-fake")
        update_average(n.average, n.generator, s.ema, step)
        yield terms


@torch.no_grad()
def draw(generator, z, c, sigma_init=2.5):
    """One-step images (N, ...) in [-1, 1] from noise z (N, ...) and conditions c (N, ...)."""
    sigma = torch.full((len(z),) + (1,) * (z.ndim - 1), sigma_init, device=z.device)
    return generator(sigma * z, sigma, c)


# --------------------------------------------------------------------------------------------------------- the labels

def label_number(word, classes):
    """Index of the class with this name, or else with this number. MNIST's "0 - zero" is found as 0 and as zero.

    BadInput where there is none, or where a number could mean two: 1, with the classes "1 - cat" and "2 - dog".
    """
    def plain(name):
        return unicodedata.normalize("NFC", name).casefold()

    names = [re.sub(r"^\d+ - ", "", name) for name in classes]
    for spelled in (classes, names):
        found = [k for k, name in enumerate(spelled) if plain(name) == plain(word)]
        if len(found) == 1:
            return found[0]
    if word.isdecimal():
        number = int(word)
        found = {k for k, name in enumerate(classes) if re.match(rf"0*{number}[\W_]", name)}
        if number < len(classes):
            found.add(number)
        if len(found) > 1:
            raise BadInput(f"{word} could be {' or '.join(classes[k] for k in sorted(found))}: give the name")
        if found:
            return found.pop()
    raise BadInput(f"no label {word!r}: {' '.join(names)}, or 0 to {len(classes) - 1}")


def override_labels(forget, to, K):
    """override (K,) for `distill`: the teacher is given label to[i] in the place of forget[i]; -1: a random kept label.

    BadInput where a label is forgotten twice, none is kept, the lists differ in length, or an override is forgotten.
    """
    override = torch.arange(K)
    if len(set(forget)) < len(forget):
        raise BadInput("--forget names a label twice")
    if len(forget) >= K:
        raise BadInput(f"--forget names all {K} labels: at least one must be kept")
    if len(to) != len(forget):
        raise BadInput(f"--to takes one label, or one for each of the {len(forget)} labels to forget; it got {len(to)}")
    if set(forget) & set(to):
        raise BadInput("--to names a label that is itself to be forgotten: name a label to keep")
    override[forget] = torch.tensor(to, dtype=torch.long)
    return override


def read_labels(forget, to, classes):
    """Indices of the labels to forget and of their overrides, from words of the command line. -1: a random kept label.
    """
    for word, words in (("none", forget), ("random", to)):
        if word in words and word in classes:
            raise BadInput(f"{word} is a label as well: give its number")
    if forget == ["none"]:
        if to != ["random"]:
            raise BadInput("--to has no effect with --forget none")
        return [], []
    c_f = [label_number(word, classes) for word in forget]
    c_o = [-1 if word == "random" else label_number(word, classes) for word in to]
    if len(c_o) == 1:
        c_o = c_o * len(c_f)
    return c_f, c_o


# --------------------------------------------------------------------------------------------------- the command line

def find_teacher(data):
    """The teacher's file of a data set: the one that comes with the project, or the one trained in runs/."""
    paths = (Path(__file__).parent / "teachers" / f"{data}.pt", Path("runs") / f"{data_name(data)}-teacher/teacher.pt")
    for path in paths:
        if path.is_file():
            return path
    raise BadInput(f"no teacher for {data}: train one with `python train_teacher.py --data {data}`, "
                   "or name its file with --teacher")


def load_start(path, teacher, s):
    """Load (generator, fake score) from the both.pt of an earlier run. BadInput where they do not fit the teacher."""
    content = load_file(path)
    if not {"net", "weights", "fake", "sigma_init"} <= content.keys():
        raise BadInput(f"{path} holds no fake score: --init-from takes the both.pt of a run")
    try:
        generator = unpack(content, type(teacher))
        fake = unpack({"net": content["net"], "weights": content["fake"]}, type(teacher))
    except BadInput as e:
        raise BadInput(f"{path}: {e}") from e
    if generator.settings != teacher.settings or content["sigma_init"] != s.sigma_init:
        raise BadInput(f"{path} has another network or another sigma_init than this run")
    device = teacher.conditions.device
    generator.bf16 = fake.bf16 = teacher.bf16
    return generator.to(device), fake.to(device)


def run(s, n, override, checkpoint, settings):
    """Train, with a checkpoint every 30 seconds, or go on from the checkpoint that is there. Returns the seconds."""
    first, seconds = 0, 0.0
    if checkpoint.exists():
        first, seconds = load_checkpoint(checkpoint, settings, n.trained(), defaults=asdict(Settings()))
    else:
        save_checkpoint(checkpoint, 0, 0.0, settings, n.trained())
    began = saved = time.monotonic()
    bar = tqdm(watch_pace(distill(s, n, override, first)), total=s.steps, initial=first, unit="step", mininterval=0.5)
    for step, terms in enumerate(bar, first + 1):
        if step % 50 == 0:
            bar.set_postfix({name: f"{value:.3g}" for name, value in terms.items()})
        if time.monotonic() - saved > 30 or step == s.steps:
            saved = time.monotonic()
            save_checkpoint(checkpoint, step, seconds + saved - began, settings, n.trained())
    return seconds + time.monotonic() - began


def write_results(out, n, sigma_init, content):
    """Write generator.pt, both.pt (with the fake score, for --init-from) and samples.png, a row for each label."""
    save_file(out / "generator.pt", {**content, **pack(n.average)})
    save_file(out / "both.pt", {**content, **pack(n.average, half=True), "fake": pack(n.fake, half=True)["weights"]})
    conditions = n.teacher.conditions
    z = torch.randn(20, *n.teacher.shape, device=conditions.device)     # the same noise under every label
    rows = [draw(n.average, z, c.expand(20, *c.shape), sigma_init) for c in conditions]
    save_images(torch.cat(rows), 20, out / "samples.png")
    print(f"trained in {content['seconds']:.0f} s: {out / 'generator.pt'}, with samples.png beside it")


def evaluate(out, device):
    """Print the metrics of the generator in `out`. Two classifiers label its images: the one part that needs lab/."""
    if not (Path(__file__).parent / "lab").is_dir():
        print("not evaluated: the folder lab/ of the project is missing")
        return
    from lab.evaluate import evaluate_run
    evaluate_run(out, device=device)


def preset_name(data, forgets, init_from):
    """The key of PRESETS for a run. All data sets but MNIST and Fashion-MNIST get the preset of CIFAR-10."""
    name = "mnist" if data in ("mnist", "fashion_mnist") else "cifar10"
    if not forgets:
        return f"{name}, forgetting nothing"
    return f"{name}, from a one-step generator" if init_from else name


def default_folder(data, a):
    """Such as runs/mnist-forget0-to1, runs/mnist-sid, or runs/mnist-forget0-to1-second-stage."""
    name = data_name(data) + ("-sid" if a.forget == ["none"] else f"-forget{'-'.join(a.forget)}-to{'-'.join(a.to)}")
    name += "-second-stage" if a.init_from else ""
    return "runs/" + re.sub(r"[^\w.-]+", "_", name)[:200]


def parse(argv):
    parser = Parser(__doc__)
    parser.add_argument("--forget", nargs="+", default=["0"], help="labels to forget, by name or number, or none")
    parser.add_argument("--to", nargs="+", default=["random"], help="label drawn instead: one, one for each, or random")
    parser.add_argument("--data", default="mnist", help="data set whose teacher is used: mnist, cifar10, ...")
    parser.add_argument("--teacher", help="file of the teacher (default: the one of the data set)")
    parser.add_argument("--init-from", help="second stage: start generator and fake score from this both.pt")
    parser.add_argument("--out", help="folder to write to (default: runs/<data>-forget...)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    for f in fields(Settings):
        option, default = "--" + f.name.replace("_", "-"), f"default: of the preset, or {f.default}"
        parser.add_argument(option, type=f.type, help=f"see Settings ({default})")
    return parser.parse_args(argv)


def main(argv):
    a = parse(argv)
    device = pick_device(a.device)
    teacher, info = load_network(a.teacher or find_teacher(a.data), device)
    if len(info["classes"]) != len(teacher.conditions):
        raise BadInput(f"{info['path']} has {len(info['classes'])} names for {len(teacher.conditions)} labels")
    if "sigma_init" in info:
        raise BadInput(f"{info['path']} is a one-step generator, not a teacher")
    c_f, c_o = read_labels(a.forget, a.to, info["classes"])
    override = override_labels(c_f, c_o, len(info["classes"])).to(device)

    preset = preset_name(info["data"], c_f, a.init_from)
    given = {f.name: getattr(a, f.name) for f in fields(Settings) if getattr(a, f.name) is not None}
    s = Settings(**{**PRESETS[preset], **given})

    torch.manual_seed(s.seed)
    start = load_start(a.init_from, teacher, s) if a.init_from else (None, None)
    n = begin(teacher, s, *start)
    out = make_run_folder(a.out or default_folder(info["data"], a), a.resume)
    print(f"{preset}: {s.steps} steps of {s.batch} images on {device.type}, writing to {out}")
    fixed = {**asdict(s), "forget": c_f, "to": c_o, "teacher": info["sha256"],
             "init_from": digest(a.init_from) if a.init_from else None}
    content = {"data": info["data"], "classes": info["classes"], "size": info.get("size"), "sigma_init": s.sigma_init,
               "forget": c_f, "to": c_o, "teacher_sha256": info["sha256"], "machine": machine(device),
               "settings": {**asdict(s), "data": info["data"], "forget": a.forget, "to": a.to,
                            "teacher": a.teacher or "", "init_from": a.init_from or ""}}
    try:
        content["seconds"] = run(s, n, override, out / "checkpoint.pt", fixed)
        write_results(out, n, s.sigma_init, content)
        evaluate(out, a.device)
    except KeyboardInterrupt as e:
        raise Stopped from e


if __name__ == "__main__":
    command(main)
