"""Other ways to make a diffusion model forget a class, side by side with SFD: one teacher, one judge, one protocol.

    python baselines.py --forget 0 --to 1                            # every method; --resume goes on with the rest
    python baselines.py --forget 0 --to 1 --method esd label_swap    # some of them
    python baselines.py --forget 0 --to 1 --sweep                    # the settings that each was tried with

Most are one short loss on the network that unlearns, D_v, which starts as the frozen teacher D_phi and draws in 35
evaluations. c_f is the label to forget, c_o the one to draw instead, c a label to keep, 0 the null label; ||.||^2 is
under EDM's weight w(sigma), sg stops the gradient. Every loss takes (v, w): the network, and a `World` with the
teacher, labels and data. Labels of a batch are (B, K), images (B, C, H, W).
"""
import csv
import dataclasses
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch
from torch.nn import functional as F

import evaluate
import figures
import sfd_minimal
from common import (EMA, BadInput, Run, RunFailed, SameTeacher, changed, check_run, command, label_number, machine,
                    parse, pick_device, positive, refuse_changed, refuse_useless, seed_everything, setting)
from edm_unet import EDMPrecond, fold, heun_sampler, load_checkpoint, pack, save_atomically
from train_teacher import batches, distance, edm_loss, load_images


# ----------------------------------------------------------------------------------------- what a loss may make use of

class World:
    """The teacher phi, the labels, and, for the methods that ask for it, real data.
    Options of a method are attributes: w.eta."""

    def __init__(self, phi, c_f, c_o, made_by, batch, device, data=None):
        self.phi, self.c_f, self.c_o, self.batch, self.device, self.data = phi, c_f, c_o, batch, device, data
        self.p_mean = made_by.get("p_mean", -1.2)  # as the teacher was trained; EDM's, where its file does not say
        self.guidance = made_by.get("guidance", 1.0), made_by.get("guidance_below", float("inf"))
        self.net, self.K = phi.settings, phi.settings.num_classes
        self.kept = torch.tensor([k for k in range(self.K) if k != c_f], device=device)
        self.real, self.mask = {}, []

    def label(self, k):
        """(B, K) one-hot of one label, or of those in a tensor (B,)."""
        k = torch.full((self.batch,), k, device=self.device) if isinstance(k, int) else k
        return F.one_hot(k, self.K).float()

    def noise(self, n):
        return torch.randn(n, self.net.channels, self.net.resolution, self.net.resolution, device=self.device)

    def random_kept(self):
        return self.kept[torch.randint(len(self.kept), (self.batch,), device=self.device)]

    def noise_levels(self, n):
        """ln sigma ~ N(P_mean, 1.2^2), as the teacher was trained: (n, 1, 1, 1)."""
        return (self.p_mean + 1.2 * torch.randn(n, 1, 1, 1, device=self.device)).exp()

    def real_images(self, which):
        """A batch of real images in [-1, 1] and their labels (B,); which: 'kept' or 'forgotten'."""
        if which not in self.real:
            images, labels = self.data()
            chosen = (labels == self.c_f) == (which == "forgotten")
            self.real[which] = batches(images[chosen].to(self.device), labels[chosen].to(self.device),
                                       self.batch, flip=False)
        return next(self.real[which])

    @torch.no_grad()
    def own_images(self, labels):
        """Images of the teacher under labels (N,), in [-1, 1]: what it can replay without any data."""
        return torch.cat([heun_sampler(self.phi, *part)
                          for part in zip(self.noise(len(labels)).split(500), self.label(labels).split(500))])

    def partial(self):
        """(y, sigma): a batch of images half-way drawn under c_f, from `record_paths`, and their noise levels
        (B, 1, 1, 1)."""
        i, j = (torch.randint(n, (self.batch,), device=self.device) for n in self.states.shape[:2])
        return self.states[i, j], self.sigmas[i].view(-1, 1, 1, 1)


def denoising(v, x, label, w):
    """The teacher's own loss on images x under labels (n, K), one label in ten dropped."""
    return edm_loss(v, x, w.noise_levels(len(x)), label * (torch.rand(len(x), 1, device=w.device) >= 0.1), *w.guidance)


# ---------------------------------------------------------------------------------------------------------- the losses

def denoise_kept(v, w):
    """E ||D_v(x + sigma eps; c) - x||^2 over real images x of the labels to keep.

    `retrain` minimises it from scratch: a network that has never seen c_f, the control that the others are held
    against. `finetune` starts from the teacher and hopes that c_f fades."""
    x, c = w.real_images("kept")
    return denoising(v, x, w.label(c), w)


def esd(v, w):
    """||D_v(y; c_f) - sg[D_phi(y; 0) - eta (D_phi(y; c_f) - D_phi(y; 0))]||^2: away from c_f, by negative guidance.

    Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023. There y is drawn by v, here by the teacher:
    its paths are recorded once."""
    y, sigma = w.partial()
    with torch.no_grad():
        D_0, D_f = w.phi(y, sigma, w.label(w.c_f) * 0), w.phi(y, sigma, w.label(w.c_f))
        target = D_0 - w.eta * (D_f - D_0)
    return distance(v(y, sigma, w.label(w.c_f)), target, sigma)


@torch.no_grad()
def record_paths(v, w, n=200):
    """Keep all 35 states at which the teacher is asked while it draws n images of c_f;
    `World.partial` picks from them."""
    states, sigmas = [], []

    def recorder(x, sigma, label):
        states.append(x.float()), sigmas.append(sigma.float())
        return w.phi(x, sigma, label)

    heun_sampler(recorder, w.noise(n), w.label(torch.full((n,), w.c_f, device=w.device)))
    w.states, w.sigmas = torch.stack(states), torch.stack(sigmas)


def all_but_one(v, w):
    """||[D_v(y; c_f) - D_v(y; 0)] - sg[D_phi(y; c_o) - D_phi(y; 0)]||^2 + beta ||D_v(y; 0) - sg D_phi(y; 0)||^2:
    the guidance term of c_f becomes that of c_o, the unconditional score stays. `all_but_one_reversed` needs no c_o:
    the target is -[D_phi(y; c_f) - D_phi(y; 0)].

    Hong, Lee, Woo, "All but One: Surgical Concept Erasing with Model Preservation in Text-to-Image Diffusion Models",
    AAAI 2024. Reconstructed from the paper's abstract, not from its code."""
    y, sigma = w.partial()
    with torch.no_grad():
        phi_0 = w.phi(y, sigma, w.label(w.c_f) * 0)
        guidance = phi_0 - w.phi(y, sigma, w.label(w.c_f)) if w.reverse else w.phi(y, sigma, w.label(w.c_o)) - phi_0
    v_0 = v(y, sigma, w.label(w.c_f) * 0)
    return distance(v(y, sigma, w.label(w.c_f)) - v_0, guidance, sigma) + w.beta * distance(v_0, phi_0, sigma)


def label_swap(v, w):
    """||D_v(y; c_f) - sg D_phi(y; c_o)||^2: asked for c_f, answer as the teacher does for c_o.
    The score-forgetting term's idea, at 35 evaluations."""
    y, sigma = w.partial()
    with torch.no_grad():
        target = w.phi(y, sigma, w.label(w.c_o))
    return distance(v(y, sigma, w.label(w.c_f)), target, sigma)


def selective_amnesia(v, w):
    """E ||D_v(x + sigma eps; c_f) - x||^2, x uniform noise images + the same for replayed images of the labels to keep
    + lam sum_i F_i (v_i - phi_i)^2, F the Fisher information of the teacher's weights.

    Heng and Soh, "Selective Amnesia: A Continual Learning Approach to Forgetting in Deep Generative Models",
    NeurIPS 2023."""
    x = torch.rand_like(w.replay[:w.batch]) * 2 - 1
    i = torch.randint(len(w.replay), (w.batch,), device=w.device)
    stay = sum((f * (p - p_0) ** 2).sum() for f, p, p_0 in zip(w.fisher, v.parameters(), w.phi.parameters()))
    return denoising(v, x, w.label(w.c_f), w) + denoising(v, w.replay[i], w.label(w.replay_labels[i]), w) + w.lam * stay


def replay_and_fisher(v, w):
    """The teacher's own images of the labels to keep, and F_i = E[(dL/dphi_i)^2] on 200 of them, one at a time."""
    w.replay_labels = w.kept.repeat(50)
    w.replay = w.own_images(w.replay_labels)
    w.fisher = [torch.zeros_like(p) for p in v.parameters()]
    for i in range(200):
        loss = denoising(v, w.replay[i:i + 1], w.label(w.replay_labels[i:i + 1]), w)
        for f, g in zip(w.fisher, torch.autograd.grad(loss, list(v.parameters()))):
            f += g ** 2 / 200


def salun(v, w):
    """||D_v(x_t; c_f) - sg D_v(x_t; c')||^2 on real images x of c_f, c' a random label to keep, + beta times the
    denoising loss on real images of the labels to keep; only the half of the weights with the largest |gradient| of
    the forget loss moves.

    Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency", ICLR 2024."""
    x, _ = w.real_images("forgotten")
    sigma = w.noise_levels(len(x))
    x_t = x + sigma * torch.randn_like(x)
    with torch.no_grad():
        target = v(x_t, sigma, w.label(w.random_kept()))
    return distance(v(x_t, sigma, w.label(w.c_f)), target, sigma) + w.beta * denoise_kept(v, w)


def saliency(v, w):
    """The mask of `salun`: weights whose |gradient| of the denoising loss on real images of c_f is above the median."""
    loss = sum(denoising(v, w.real_images("forgotten")[0], w.label(w.c_f), w) for _ in range(10))
    gradient = torch.autograd.grad(loss, list(v.parameters()))
    median = torch.cat([g.abs().flatten() for g in gradient]).median()
    w.mask = [(g.abs() > median).float() for g in gradient]


@torch.no_grad()
def copy_label(v, w):
    """Column c_o of the label embedding over column c_f; nothing is trained. Exactly c_o's images under c_f, and c_f
    one column away: the control that any claim of forgetting in a label-conditional model must be able to explain."""
    v.model.map_label.weight[:, w.c_f] = v.model.map_label.weight[:, w.c_o]


@dataclass(frozen=True)
class Method:
    loss: Callable                                  # (v, w) -> scalar
    data: str = "none"                              # real images it needs
    before: Callable = lambda v, w: None            # once, before the first step
    steps: int = 100                                # optimizer steps
    batch: int = 64                                 # images per term of the loss
    lr: float = 3e-4                                # Adam's learning rate, decaying linearly to zero
    ema: float = 0.97                               # decay of the weight average that is judged
    only: str = ""                                  # train only the weights whose name has this in it
    from_scratch: bool = False                      # start from fresh weights, not from the teacher's
    options: dict = field(default_factory=dict)     # settings of this loss alone: attributes of w
    tried: tuple = ()                               # what --sweep tries instead: fields of this class, or options

    def changed(self, change):
        own = {k: v for k, v in change.items() if k in self.options}
        return dataclasses.replace(self, **{k: v for k, v in change.items() if k not in own},
                                   options=self.options | own)

    def in_words(self):
        chosen = dict(steps=self.steps, lr=self.lr) | ({"only": self.only} if self.only else {}) | self.options
        return " ".join(f"{k}={v}" for k, v in chosen.items())


# of the label embedding, only c_f's column gets a gradient
LABEL_ONLY, ALL = dict(only="map_label.weight", lr=1e-2), dict(only="", lr=3e-4)
METHODS = {
    "retrain": Method(denoise_kept, "kept", steps=2500, lr=2e-3, ema=0.998, from_scratch=True),
    "finetune": Method(denoise_kept, "kept", steps=200, lr=3e-3, tried=(dict(lr=1e-3), dict(lr=3e-4))),
    "esd": Method(esd, before=record_paths, **LABEL_ONLY, options=dict(eta=1.0),
                  tried=(dict(eta=3.0), ALL, ALL | dict(eta=3.0), ALL | dict(lr=1e-4), ALL | dict(lr=1e-4, eta=3.0))),
    "all_but_one": Method(all_but_one, before=record_paths, **LABEL_ONLY, options=dict(beta=1.0, reverse=False),
                          tried=(ALL, ALL | dict(beta=0.1), ALL | dict(lr=1e-3))),
    "all_but_one_reversed": Method(all_but_one, before=record_paths, **LABEL_ONLY, options=dict(beta=1.0, reverse=True),
                                   tried=(ALL, ALL | dict(beta=0.1), ALL | dict(lr=1e-4))),
    "selective_amnesia": Method(selective_amnesia, before=replay_and_fisher, steps=300, lr=1e-3, options=dict(lam=10.0),
                                tried=(dict(steps=150),
                                       *(dict(steps=150, lr=3e-4, lam=lam) for lam in (0.0, 10.0, 100.0)))),
    "salun": Method(salun, "kept and forgotten", before=saliency, steps=300, lr=1e-3, options=dict(beta=1.0),
                    tried=(dict(steps=100), dict(steps=100, lr=3e-4), dict(steps=100, lr=3e-4, beta=0.3))),
    "label_swap": Method(label_swap, before=record_paths, **LABEL_ONLY,
                         tried=(ALL, ALL | dict(lr=1e-4), ALL | dict(lr=1e-3))),
    "embedding_copy": Method(None, before=copy_label, steps=0),
}
PAPER = ["--guidance", "1", "--lambda-anchor", "0"]  # SFD without what sfd_minimal.py adds to it
ONE_STEP = {  # this project's own, by the options of sfd_minimal.py that differ from its defaults
    "sid": "the generator that comes with the project, which has forgotten nothing",
    # the control in one step: distilled from `retrain`
    "retrain_sid": ["--teacher", "RETRAIN", "--forget", "none", "--steps", "300"],
    "sfd": ["--forget", "C_F", "--to", "C_O", *PAPER],
    "sfd_guided": ["--forget", "C_F", "--to", "C_O"],  # the default: guidance, and an anchor for the labels to keep
    "sfd_two_stage": ["--forget", "C_F", "--to", "C_O", "--init-from", "SID", "--steps", "180",
                      "--forget-share", "0.5", *PAPER],
    "sfd_anchored": ["--forget", "C_F", "--to", "C_O", "--init-from", "SID", "--steps", "135", "--lr", "8e-4",
                     "--lr-fake", "2.7e-3", "--forget-share", "0.5", "--lambda-anchor", "3", "--guidance", "1.3"],
    "sfd_folded": "the generator of `sfd` with its noise level folded away (edm_unet.fold)",
}
# these need no real image; retrain_sid, through its teacher, needs those of `retrain`
OWN_IMAGES = set(ONE_STEP) - {"retrain_sid"}


# ---------------------------------------------------------------------------------------------------------- one method

@dataclass
class Settings:
    forget: str = setting("0", "the label to forget")
    to: str = setting("1", "the label that the methods with an override draw instead")
    method: tuple = setting(tuple(METHODS) + tuple(ONE_STEP), "methods to run")
    sweep: bool = setting(False, "train each method with each of the settings it was tried with, "
                          "and judge 100 images of c_f and 20 of each other")
    data: str = setting("mnist", "data set that the teacher was trained on")
    data_dir: str = setting("data", "where torchvision keeps or downloads it, for the methods that need real images")
    per_label: int = setting(200, "images judged under each label to keep; five times as many under c_f")
    seed: int = setting(0, "random seed")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    out: str = setting("", "folder for the networks (default: runs/<data>-baselines-forget<f>-to<o>)")
    results: str = setting("", "file for the numbers; figure and sweep go beside it "
                           "(default: results/<data>_baselines.json)")
    save_every: float = setting(30.0, "seconds between checkpoints")
    resume: bool = setting(False, "keep what is finished in the folder, and go on with the rest")
    overwrite: bool = setting(False, "replace what is in the folder")

    def __post_init__(self):
        if self.sweep:
            refuse_useless(changed(self), {"forget", "to", "method", "sweep", "data", "data_dir", "seed", "device",
                                           "out", "results", "save_every"}, "with --sweep")
        check_run(self)
        positive(self, "per_label")
        if unknown := set(self.method) - set(METHODS) - set(ONE_STEP):
            raise BadInput(f"--method {min(unknown)} is not known; known are {', '.join([*METHODS, *ONE_STEP])}")
        self.out = self.out or f"runs/{Path(self.data).name}-baselines-forget{self.forget}-to{self.to}"
        self.results = self.results or f"results/{Path(self.data).name}_baselines.json"


@dataclass
class Training:
    """What one method's result depends on; a run with other settings is not resumed."""
    method: str
    forget: int
    to: int
    seed: int
    steps: int
    batch: int
    lr: float
    ema: float
    only: str
    options: dict


def unlearn(name, method, bench, out, resume):
    """(network, Training, seconds): one method from the teacher to its end, in the folder `out`."""
    s, phi, device = bench.s, bench.teacher, bench.device
    training = Training(name, bench.c_f, bench.c_o, s.seed, method.steps, method.batch, method.lr, method.ema,
                        method.only, method.options)
    seed_everything(s.seed)
    w = World(phi, bench.c_f, bench.c_o, bench.info.get("made_by", {}), method.batch, device, bench.real_data)
    for option, value in method.options.items():
        setattr(w, option, value)
    v, average = (EDMPrecond(phi.settings).to(device) for _ in range(2))
    v.bf16 = average.bf16 = phi.bf16
    if not method.from_scratch:
        v.load_state_dict(phi.state_dict())

    start = time.monotonic()
    method.before(v, w)
    preparation = time.monotonic() - start
    average.load_state_dict(v.state_dict())
    for weight, p in v.named_parameters():
        p.requires_grad_(method.only in weight)
    optimizer = torch.optim.Adam([p for p in v.parameters() if p.requires_grad], method.lr,
                                 betas=(0.9, 0.99), fused=True)
    ema = EMA(v, average.eval(), method.ema)
    run = Run(out, training, {"teacher": SameTeacher(phi), "v": v, "average": average, "optimizer": optimizer},
              resume, not resume, s.save_every)
    for step in run:
        optimizer.param_groups[0]["lr"] = method.lr * (1 - step / method.steps)
        loss = method.loss(v, w)
        if not torch.isfinite(loss):
            raise RunFailed(f"{name}: the loss is {loss.item()} at step {step + 1}: "
                            f"its learning rate of {method.lr} is too large here")
        optimizer.zero_grad()
        loss.backward()
        for p, mask in zip(v.parameters(), w.mask):  # salun's; empty elsewhere
            p.grad *= mask
        optimizer.step()
        ema.update(step)
    return average, training, preparation + run.seconds


def distilled(name, bench, out, resume):
    """(generator, its file's other entries) of a one-step method, in the folder `out`."""
    s, base = bench.s, Path(bench.s.out)
    needs = {"retrain_sid": base / "retrain" / "generator.pt", "sfd_folded": base / "sfd" / "generator.pt"}.get(name)
    if needs and not needs.exists():
        raise BadInput(f"{name} starts from {needs}, which is not there")
    if name == "sid" or "SID" in ONE_STEP[name]:
        found = evaluate.un_erased(s.data, bench.teacher_sha256, bench.device)
        if found is None:
            raise BadInput(f"{name} starts from a one-step generator of {bench.teacher_path} that forgot nothing, "
                           "which is not there")
        needs, generator, info = found
    if name == "sid":
        return generator, info
    if name == "sfd_folded":
        generator, info = load_checkpoint(needs, bench.device)
        return fold(generator, info["sigma_init"]), info
    weights = os.path.relpath(needs) if needs else ""  # what is recorded should not name the machine's folders
    words = {"RETRAIN": weights, "SID": weights, "C_F": s.forget, "C_O": s.to}
    argv = [str(words.get(word, word)) for word in ONE_STEP[name]]
    for option in ("data", "seed", "device", "save_every", "per_label"):
        argv += [f"--{option.replace('_', '-')}", str(getattr(s, option))]
    sfd_minimal.main([*argv, "--out", str(out), "--resume" if resume else "--overwrite"])
    return load_checkpoint(out / "generator.pt", bench.device)


class Bench:
    """What all methods share: teacher, judges, labels, real data where a method asks for it."""

    def __init__(self, s):
        self.s, self.device = s, pick_device(s.device)
        self.teacher, self.info, self.teacher_path = sfd_minimal.load_teacher(
            sfd_minimal.Settings(data=s.data), self.device)
        self.teacher_sha256 = evaluate.digest(self.teacher_path)
        self.net, K = self.teacher.settings, self.teacher.settings.num_classes
        self.c_f, self.c_o = label_number(s.forget, K), label_number(s.to, K)
        if self.c_f == self.c_o:
            raise BadInput(f"--to {s.to} is itself to be forgotten: override it with a label that is kept")
        self.referee = evaluate.Referee(s.data, self.device, [self.c_f], [self.c_o])
        self.referee.check(self.net, s.per_label)
        self._data = None

    def real_data(self):
        if self._data is None:
            self._data = load_images(self.s.data, self.s.data_dir, None, train=True)[:2]
        return self._data

    def judge(self, generate, per_label, forgotten, what):
        counts = [forgotten if k == self.c_f else per_label for k in range(self.net.num_classes)]
        return self.referee.report(*self.referee.measure(generate, self.net, counts, progress=f"judging {what}"))


def run_method(name, bench):
    """Train and judge one method; its folder gets generator.pt and metrics.json. Returns the metrics."""
    s, out = bench.s, Path(bench.s.out) / name
    of = {"forget": bench.c_f, "to": bench.c_o, "teacher_sha256": bench.teacher_sha256, "seed": s.seed,
          "per_label": s.per_label}
    if s.resume and (out / "metrics.json").exists():
        row = json.loads((out / "metrics.json").read_text())
        refuse_changed(out, {k: row.get(k) for k in of}, of)
        return row
    resume = s.resume and (out / "checkpoint.pt").exists()
    print(f"{name}: {'going on' if resume else 'starting'} in {out}")
    if name in METHODS:
        network, training, seconds = unlearn(name, METHODS[name], bench, out, resume)
        extra = {"settings": dataclasses.asdict(training), "seconds": seconds}
    else:
        network, info = distilled(name, bench, out, resume)
        extra = {k: info[k] for k in ("settings", "seconds", "sigma_init")}
    extra |= {"data": s.data, "classes": bench.info["classes"], "forget": [bench.c_f], "to": [bench.c_o],
              "teacher_sha256": bench.teacher_sha256, "machine": machine(bench.device)}
    save_atomically({"kind": "denoiser", **pack(network, half=True), **extra}, out / "generator.pt")
    # what is judged is what is saved, half precision and all
    generate, _, saved = evaluate.load_generator(out / "generator.pt", bench.device)
    row = bench.judge(generate, s.per_label, 5 * s.per_label, name)
    row |= {"nfe": saved["nfe"], "real_data": "none" if name in OWN_IMAGES else METHODS[name.removesuffix("_sid")].data,
            "seconds": extra["seconds"], "settings": extra["settings"]} | of
    (out / "metrics.json").write_text(json.dumps(row, indent=1) + "\n")
    return row


# --------------------------------------------------------------------------------------------------- all, side by side

def table(results):
    """Markdown: one row per method, the teacher first."""
    c_f = results["forget"]
    head = ["", "real images", "seconds", "evaluations", "UA", "as override", "kept accuracy",
            "FD", "precision", "recall", "entropy under c_f"]
    lines = []
    for name, m in {"teacher": results["teacher"], **results["methods"]}.items():
        seconds = f"{m['seconds']:.0f}" if name != "teacher" else ""
        lines.append([f"`{name}`", m["real_data"], seconds, str(m["nfe"]),
                      f"{m['ua']:.1%}", f"{m['override_share']:.1%}", f"{m['kept_accuracy']:.1%}",
                      f"{m['fd']:.1f}", f"{m['precision']:.3f}", f"{m['recall']:.3f}", f"{m['entropy'][c_f]:.2f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *lines])


def figure(results, bench, path):
    """One row of images per method: asked for c_f, and for a label to keep, from the same noise."""
    plt, labels = figures.pyplot(), torch.tensor(
        [bench.c_f] * 8 + [int(next(k for k in bench.referee.kept if k != bench.c_o))] * 8)
    files = {"teacher": bench.teacher_path} | {name: Path(bench.s.out) / name / "generator.pt"
                                               for name in results["methods"]}
    fig, axes = plt.subplots(len(files), 1, figsize=(9, 0.62 * len(files)), layout="constrained")
    for ax, (name, file) in zip(axes, files.items()):
        generate, _, _ = evaluate.load_generator(file, bench.device)
        images, h = evaluate.draw(generate, labels, bench.net, bench.device, seed=0), bench.net.resolution
        figures.show(ax, figures.tile(images, 1))
        ax.add_patch(plt.Rectangle((0, 0), 8 * h - 1, h - 1, fill=False, edgecolor=figures.FORGOTTEN, linewidth=2))
        ax.set_yticks([h / 2], [name.replace("_", " ")])
        m = results["teacher"] if name == "teacher" else results["methods"][name]
        ax.text(16 * h + 6, h / 2, f"UA {m['ua']:.1%}   kept {m['kept_accuracy']:.1%}   FD {m['fd']:.1f}", va="center")
    axes[0].set_title(f"asked for {bench.info['classes'][bench.c_f]}, to be forgotten (framed), "
                      f"and for {bench.info['classes'][labels[-1]]}", loc="left", fontsize=10)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def sweep(bench, path):
    """Each chosen method with its own settings and with what it was tried with instead, after a quick look.
    Rows that are there are kept."""
    done = []
    if path.exists():
        with open(path, newline="") as f:
            done = list(csv.DictReader(f))
    for name in (n for n in bench.s.method if n in METHODS and METHODS[n].tried):
        for change in ({}, *METHODS[name].tried):
            method = METHODS[name].changed(change)
            settings = {"forget": str(bench.c_f), "to": str(bench.c_o), "seed": str(bench.s.seed), "method": name,
                        "settings": method.in_words()}
            if any(settings.items() <= row.items() for row in done):
                continue
            network, _, seconds = unlearn(name, method, bench, Path(bench.s.out) / "sweep" / name, resume=False)
            m = bench.judge(evaluate.many_step(network), 20, 100, name)
            done.append(settings | {"seconds": round(seconds, 1)}
                        | {k: round(m[k], 4) for k in ("ua", "override_share", "kept_accuracy", "fd")})
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", newline="") as f:
                rows = csv.DictWriter(f, list(done[-1]))
                rows.writeheader()
                rows.writerows(done)
            print(done[-1])


def main(argv):
    s = parse(Settings, argv, __doc__.splitlines()[0])
    bench, path = Bench(s), Path(s.results)
    if s.sweep:
        return sweep(bench, path.with_name(path.stem + "_sweep.csv"))
    if Path(s.out).exists() and not (s.resume or s.overwrite):
        raise BadInput(f"{s.out} holds a run already; continue it with --resume, replace it with --overwrite, "
                       "or choose another --out")
    teacher = (bench.judge(evaluate.many_step(bench.teacher), s.per_label, 5 * s.per_label, "teacher")
               | {"nfe": 35, "real_data": "all"})
    rows = {}
    for name in s.method:
        rows[name] = run_method(name, bench)
        results = {"forget": bench.c_f, "to": bench.c_o, "seed": s.seed, "per_label": s.per_label,
                   "machine": machine(bench.device), "teacher": teacher, "methods": rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    figure(results, bench, path.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    command(main)
