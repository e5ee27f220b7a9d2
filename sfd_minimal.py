"""Score Forgetting Distillation (SFD; Chen, Zhang, Zhou, ICLR 2025, arXiv 2409.11219) in one file.

    python sfd_minimal.py --forget 0 --to 1

turns a label-conditional diffusion teacher into a one-step generator that has forgotten a class, without any real
image. SFD is Score identity Distillation (SiD; Zhou et al., ICML 2024, arXiv 2404.04057) with one change: for the label
to forget, the teacher is asked about another label. Three networks of one architecture, all started from the teacher's
weights:

    teacher    D_phi(x_t; sigma, c)   frozen
    fake       D_psi(x_t; sigma, c)   keeps learning to denoise the generator's images: its score is the generator's
    generator  x_g = G_theta(z, c) = D_theta(sigma_init z; sigma_init, c),   z ~ N(0, I),   one evaluation

A denoiser D is any callable D(x_t, sigma, c) -> E[x | x_t; sigma, c]; its score is (D - x_t) / sigma^2. The method,
from `fake_score_loss` to `sfd_step`, needs torch, three such denoisers and two optimizers, nothing else: copy it from
here. Two things in it are not in the paper: `guided`, and the anchor at the end of `sfd_step`;
`--guidance 1 --lambda-anchor 0` leaves them out.
"""
import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from common import (EMA, BadInput, Run, RunFailed, SameTeacher, changed, check_run, command, label_number, machine,
                    parse, pick_device, positive, refuse_generator, refuse_useless, seed_everything, setting)
from edm_unet import EDMPrecond, find_weights, fold, load_checkpoint, pack, read_file, save_atomically, unpack


# ---------------------------------------------------------------------------------------------------------- the method

def fake_score_loss(fake, x_g, c, sigma, sigma_data=0.5):
    """L_psi = w(sigma) ||D_psi(x_t; sigma, c) - x_g||^2,  w = (sigma^2 + sd^2) / (sigma sd)^2.

    x_g (B, ...) images without gradient, c (B, K) the labels they were generated under, sigma (B, 1, ...) noise levels.
    Returns it per sample (B,), summed over pixels.
    """
    x_t = x_g + sigma * torch.randn_like(x_g)                                         # (B, ...)
    D_psi = fake(x_t, sigma, c)                                                       # (B, ...)
    w = (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2                    # (B, 1, ...)
    return (w * (D_psi - x_g) ** 2).flatten(1).sum(1)                                 # (B,)


def score_identity_loss(teacher, fake, x_g, c_phi, c_psi, sigma, alpha=1.0):
    """S(x_g; c_phi, c_psi) = sum_pixels (D_phi - D_psi) [(D_phi - x_g) - alpha (D_phi - D_psi)] / omega.

    The teacher is asked about c_phi (B, K), the fake score about c_psi (B, K). Gradient flows into x_g (B, ...)
    directly and through x_t inside both networks. sigma (B, 1, ...) noise levels. Returns it per sample (B,).
    """
    x_t = x_g + sigma * torch.randn_like(x_g)                                         # (B, ...)
    D_phi = teacher(x_t, sigma, c_phi)                                                # (B, ...)
    D_psi = fake(x_t, sigma, c_psi)                                                   # (B, ...)
    omega = (D_phi - x_g).detach().abs().flatten(1).mean(1).clamp(min=1e-5)           # (B,)
    S = (D_phi - D_psi) * ((D_phi - x_g) - alpha * (D_phi - D_psi))                   # (B, ...)
    return S.flatten(1).sum(1) / omega                                                # (B,)


def draw_labels(batch, override, kept, share=None):
    """One-hot (B, K) c_phi for the teacher and c_psi for generator and fake score; forgotten (B,), where they differ.

    override (K,) maps each label to the one the teacher is asked about: itself if kept, c_o if forgotten, -1 for a
    fresh draw among `kept` (n,). All labels are drawn equally often, or the forgotten ones in a `share` of the batch.
    """
    K, device = len(override), override.device
    to_forget = override != torch.arange(K, device=device)                            # (K,)
    if share is None:
        c = torch.randint(K, (batch,), device=device)
    else:
        p = torch.where(to_forget, share / to_forget.sum(), (1 - share) / len(kept))  # (K,)
        c = p.multinomial(batch, replacement=True)
    c_o = override[c]
    c_o = torch.where(c_o >= 0, c_o, kept[torch.randint(len(kept), (batch,), device=device)])
    one_hot = lambda labels: F.one_hot(labels, K).float()
    return one_hot(c_o), one_hot(c), to_forget[c]


def guided(teacher, c_psi, forgotten, guidance):
    """The teacher, further from c_f: D_phi(x_t; c_f) + g (D_phi(x_t; c_o) - D_phi(x_t; c_f)) in the rows to forget.

    Classifier-free guidance with the forgotten label for the null label, where `forgotten` (B,) is true. Not in the
    paper, which has g = 1; the larger g, the surer and the less varied what is drawn under c_f.
    """
    def D(x_t, sigma, c_phi):
        and_rows = lambda v, of: torch.cat([v, of[forgotten]])  # one forward answers both questions
        both = teacher(and_rows(x_t, x_t), and_rows(sigma, sigma), and_rows(c_phi, c_psi))
        D_phi, D_f = both.tensor_split([len(x_t)])                                    # (B, ...), (n, ...)
        return D_phi.index_put((forgotten,), D_f + guidance * (D_phi[forgotten] - D_f))
    return D


def sfd_step(generator, fake, teacher, optimizer_theta, optimizer_psi, z, c_phi, c_psi, forgotten, s,
             sigma_data=0.5, anchor=None):
    """One step of SFD: one batch of images serves both updates, and kept and forgotten labels share each forward.

    z (B, ...) normal noise; c_phi, c_psi, forgotten from `draw_labels`; s has sigma_init, p_mean, alpha, lambda_forget,
    and lambda_anchor where there is an `anchor`, a generator that draws the labels to keep well and gets no gradient.
    Returns the terms of both losses, detached.
    """
    B, per_sample, theta = len(z), (-1,) + (1,) * (z.ndim - 1), list(generator.parameters())

    # Generate, under the label to forget too: what changes for it is the question to the teacher, c_phi.
    x_g = generator(s.sigma_init * z, s.sigma_init, c_psi)                            # (B, ...), with gradient to theta

    # psi step: the fake score learns the images under the labels they were asked for. x_g is detached: theta stays.
    sigma = (s.p_mean + 1.2 * torch.randn(B, device=z.device)).exp().view(per_sample)  # ln sigma ~ N(p_mean, 1.2^2)
    L_psi = fake_score_loss(fake, x_g.detach(), c_psi, sigma, sigma_data).mean()
    optimizer_psi.zero_grad()
    L_psi.backward()
    optimizer_psi.step()

    # theta step: u ~ U[0, 0.8] on EDM's rho = 7 grid, counted from 0.002 up to 80, that is sigma from 0.002 to 24.4.
    u = 0.8 * torch.rand(B, device=z.device)
    sigma = (0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))).pow(7).view(per_sample)
    S = score_identity_loss(teacher, fake, x_g, c_phi, c_psi, sigma, s.alpha)         # (B,)
    # Both are sums over B, so that with lambda_forget = 1 they add up to the mean over the batch.
    L_keep = (S * ~forgotten).sum() / B      # S(G(z, c);   c_phi = c,   c_psi = c)      SiD on the labels to keep
    L_forget = (S * forgotten).sum() / B     # S(G(z, c_f); c_phi = c_o, c_psi = c_f)    the score-forgetting term
    L_theta = L_keep + s.lambda_forget * L_forget
    if anchor is not None:  # not in the papers: the labels to keep hold on to what the anchor draws from the same z
        with torch.no_grad():
            x_0 = anchor(s.sigma_init * z, s.sigma_init, c_psi)                       # (B, ...)
        L_theta = L_theta + s.lambda_anchor * (((x_g - x_0) ** 2).flatten(1).sum(1) * ~forgotten).sum() / B
    gradient = torch.autograd.grad(L_theta, theta)  # with respect to theta alone: phi and psi get none
    for p, g in zip(theta, gradient):
        p.grad = g
    optimizer_theta.step()
    return {"L_psi": L_psi.detach(), "L_keep": L_keep.detach(), "L_forget": L_forget.detach()}


# ------------------------------------------------------------------------------------------------------------ settings

@dataclass
class Settings:
    forget: tuple = setting(("0",), "labels to forget, or none: plain SiD, a one-step generator that forgot nothing")
    to: tuple = setting(("random",), "label that overrides them, or one for each, or random: uniform over the rest")
    data: str = setting("mnist", "data set that the teacher was trained on; names default teacher, judge and folder")
    teacher: str = setting("", "checkpoint of the teacher (default: teachers/<data>.pt beside this file)")
    init_from: str = setting("", "start generator and fake score from this both.pt; the teacher stays the true one")
    steps: int = setting(900, "optimizer steps of generator and fake score")
    batch: int = setting(64, "generated images per step")
    lr: float = setting(5e-4, "Adam's learning rate for the generator, constant for half the run, then falling to zero")
    lr_fake: float = setting(1.7e-3, "the same for the fake score, which must keep up")
    alpha: float = setting(1.0, "alpha in S; the published runs use 1.2")
    lambda_forget: float = setting(1.0, "weight of the score-forgetting term; that of the labels to keep is 1")
    lambda_anchor: float = setting(1.0, "weight of the squared distance, under the labels to keep, to what the "
                                   "generator's average draws, or with --init-from the start; 0 in the paper")
    guidance: float = setting(1.2, "step of the teacher from the forgotten label to the override: 1 in the paper, more "
                              "goes beyond, surer and less varied")
    forget_share: float = setting(None, "share of the batch under labels to forget (default: all labels equally often)")
    sigma_init: float = setting(2.5, "noise level at which the generator evaluates its network")
    p_mean: float = setting(0.0, "mean of ln sigma in the psi step; SiD's is -1.2")
    ema: float = setting(0.999, "decay of the generator's average, which is judged and kept; (1 + step) / (8 + step) "
                         "while that is smaller")
    fold: bool = setting(False, "fold label and noise level of generator.pt into a table with a row per label")
    per_label: int = setting(1000, "images judged per label at the end, five times as many under a forgotten one")
    seed: int = setting(0, "random seed")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    compile: bool = setting(False, "torch.compile the networks: a minute of preparation, then faster steps on a GPU")
    out: str = setting("", "folder to write to (default: runs/<data>-forget<f>-to<o>); --sample: .npz, .png or folder")
    save_every: float = setting(30.0, "seconds between checkpoints")
    resume: bool = setting(False, "continue the run in the folder")
    overwrite: bool = setting(False, "replace the run in the folder")
    sample: str = setting("", "train nothing: draw images from this generator.pt or teacher, and write them to --out")
    label: tuple = setting(None, "labels to draw with --sample (default: all)")
    n: int = setting(None, "images to draw with --sample, in all (default: 100)")

    def __post_init__(self):
        if self.sample:
            refuse_useless(changed(self), {"sample", "label", "n", "seed", "out", "device"}, "with --sample")
        elif self.label is not None or self.n is not None:
            raise BadInput("--label and --n belong to --sample")
        if self.n is not None:
            positive(self, "n")
        check_run(self)
        positive(self, "steps", "batch", "lr", "lr_fake", "sigma_init", "per_label")
        if not (abs(self.alpha) < float("inf") and abs(self.p_mean) < float("inf")):
            raise BadInput("--alpha and --p-mean must be finite")
        if not (0 <= self.lambda_forget < float("inf") and 0 <= self.lambda_anchor < float("inf")):
            raise BadInput("--lambda-forget and --lambda-anchor must be finite and not negative")
        if not 1 <= self.guidance < float("inf"):
            raise BadInput(f"--guidance must be at least 1 and finite, not {self.guidance}")
        if self.forget_share is not None and not 0 < self.forget_share < 1:
            raise BadInput(f"--forget-share must lie between 0 and 1, not {self.forget_share}")
        if not 0 <= self.ema < 1:
            raise BadInput(f"--ema must lie in [0, 1), not {self.ema}")


def read_labels(s, K):
    """(forget, to): lists of label numbers, to[i] overriding forget[i], -1 for random. BadInput for nonsense."""
    if s.forget == ("none",):
        of_forgetting = {"to", "lambda_forget", "lambda_anchor", "guidance", "forget_share"}
        refuse_useless(changed(s) & of_forgetting, set(), "with --forget none, which forgets nothing")
        return [], []
    forget = [label_number(f, K) for f in s.forget]
    to = [-1] if s.to == ("random",) else [label_number(t, K) for t in s.to]
    if len(set(forget)) < len(forget):
        raise BadInput(f"--forget names a label twice: {' '.join(s.forget)}")
    if len(forget) == K:
        raise BadInput(f"--forget names all {K} labels: at least one must be kept")
    if len(to) not in (1, len(forget)):
        raise BadInput(f"--to takes one label, one per forgotten label ({len(forget)}), or random; it got {len(to)}")
    if set(to) & set(forget):
        raise BadInput(f"--to {min(set(to) & set(forget))} is itself to be forgotten: override it with a label to keep")
    return forget, to * (len(forget) // len(to))


# ------------------------------------------------------------------------------------------------------------- one run

def load_teacher(s, device):
    """(teacher, its file's other entries, path). BadInput where the file is no teacher of the data set."""
    path = find_weights(s.data, "teacher", s.teacher)
    if path is None:
        raise BadInput(f"no teacher at {s.teacher or 'teachers/'}: train one with "
                       f"`python train_teacher.py --data {s.data}`, or name one with --teacher")
    teacher, info = load_checkpoint(path, device)
    refuse_generator(path, info)
    if Path(info["data"]).name != Path(s.data).name:
        raise BadInput(f"{path} was trained on {info['data']}, not on {s.data}: say --data {info['data']}")
    return teacher.requires_grad_(False), info, path


def initial_weights(s, teacher):
    """(generator's, fake's) state dicts to start from: the teacher's, or those of an earlier run."""
    if not s.init_from:
        return teacher.state_dict(), teacher.state_dict()
    content = read_file(s.init_from, "denoiser")
    if "fake" not in content:
        raise BadInput(f"{s.init_from} holds no fake score: --init-from takes the both.pt of a run, "
                       f"or teachers/{s.data}_sid.pt")
    generator, fake = unpack(content), unpack({**content, "weights": content["fake"]})
    if Path(content.get("data", "")).name != Path(s.data).name:
        raise BadInput(f"{s.init_from} is of {content.get('data')}, not of {s.data}")
    if generator.settings != teacher.settings:
        raise BadInput(f"{s.init_from} is of another network than the teacher")
    if content.get("sigma_init", s.sigma_init) != s.sigma_init:
        raise BadInput(f"{s.init_from} was distilled at --sigma-init {content['sigma_init']}: say so")
    return generator.state_dict(), fake.state_dict()


def decay(step, steps):
    """Factor on both learning rates: 1 for the first half of the run, then linearly to zero."""
    return min(1.0, 2 * (1 - step / steps))


def distil(s, forget, to, teacher, device, probe):
    """Run SFD; returns (run, average generator, fake). `probe(generator) -> dict` now and then goes to the log."""
    seed_everything(s.seed)
    net, K = teacher.settings, teacher.settings.num_classes
    generator, average, fake = (EDMPrecond(net).to(device).eval() for _ in range(3))
    theta_0, psi_0 = initial_weights(s, teacher)
    generator.load_state_dict(theta_0), average.load_state_dict(theta_0), fake.load_state_dict(psi_0)
    for model in (generator, average, fake):
        model.bf16 = teacher.bf16
    optimizer_theta = torch.optim.Adam(generator.parameters(), s.lr, betas=(0.0, 0.999), fused=True)
    optimizer_psi = torch.optim.Adam(fake.parameters(), s.lr_fake, betas=(0.0, 0.999), fused=True)
    ema = EMA(generator, average, s.ema)
    anchor = None
    if forget and s.lambda_anchor:  # a start that draws well in one step; the teacher does not, the average soon does
        anchor = copy.deepcopy(generator).requires_grad_(False) if s.init_from else average
    override = torch.arange(K, device=device)
    override[forget] = torch.tensor(to, dtype=torch.long, device=device)
    kept = torch.tensor([k for k in range(K) if k not in forget], device=device)
    if s.compile:
        for model in filter(None, (teacher, generator, fake, anchor)):
            model.compile()

    parts = {"teacher": SameTeacher(teacher), "generator": generator, "average": average, "fake": fake,
             "optimizer_theta": optimizer_theta, "optimizer_psi": optimizer_psi}
    if s.init_from and anchor:
        parts["anchor"] = anchor
    run = Run(s.out, s, parts, s.resume, s.overwrite, s.save_every)
    for step in run:
        for optimizer, lr in ((optimizer_theta, s.lr), (optimizer_psi, s.lr_fake)):
            optimizer.param_groups[0]["lr"] = lr * decay(step, s.steps)
        z = torch.randn(s.batch, net.channels, net.resolution, net.resolution, device=device)
        c_phi, c_psi, forgotten = draw_labels(s.batch, override, kept, s.forget_share)
        D_phi = guided(teacher, c_psi, forgotten, s.guidance) if s.guidance != 1 else teacher
        terms = sfd_step(generator, fake, D_phi, optimizer_theta, optimizer_psi, z, c_phi, c_psi, forgotten, s,
                         net.sigma_data, anchor)
        ema.update(step)
        terms = dict(zip(terms, torch.stack(list(terms.values())).tolist()))  # one wait for the device, not three
        for name, value in terms.items():
            if not math.isfinite(value):
                raise RunFailed(f"{name} is {value} at step {step + 1}: try a smaller --lr and --lr-fake. "
                                f"The last good checkpoint, if there is one, is {run.path}")
        if (step + 1) % (20 if step < 100 else 50) == 0 or step + 1 == s.steps:
            run.history.append({"step": step + 1, "seconds": round(run.elapsed(), 2), **terms, **probe(average)})
            shown = ("ua", "kept_accuracy", "fd")
            run.bar.set_postfix({k: f"{v:.3g}" for k, v in run.history[-1].items() if k in shown})
    return run, average, fake


def main(argv):
    s = parse(Settings, argv, __doc__.splitlines()[0])
    device = pick_device(s.device)
    if s.sample:
        import evaluate
        return evaluate.write_samples(s.sample, s.label, s.n or 100, s.seed, s.out, device)
    teacher, info, teacher_path = load_teacher(s, device)
    forget, to = read_labels(s, teacher.settings.num_classes)
    of_run = f"forget{'-'.join(map(str, forget))}-to{'-'.join(s.to)}" if forget else "sid"
    s.out = s.out or f"runs/{Path(s.data).name}-{of_run}"

    import evaluate  # here, so that the method above needs none of it
    referee = evaluate.Referee(s.data, device, forget, to) if find_weights(s.data, "judge2") else None
    if referee and (misfit := referee.misfit(teacher.settings)):
        print(f"note: {misfit}; this run will not be judged")
        referee = None
    if referee:
        referee.check(teacher.settings, s.per_label)
    instead = f", drawing {' '.join(s.to)} instead" if forget else ""
    print(f"SFD on {device.type}: forget {forget or 'nothing'}{instead}; "
          f"{s.steps} steps of {s.batch} images; writing to {s.out}")
    probe = lambda G: referee.probe(evaluate.one_step(G, s.sigma_init), G.settings) if referee else {}
    teacher_sha256 = evaluate.digest(teacher_path)
    if s.init_from and read_file(s.init_from, "denoiser").get("teacher_sha256") != teacher_sha256:
        print(f"note: {s.init_from} was distilled from another teacher than {teacher_path}, which is used from here on")
    run, G, fake = distil(s, forget, to, teacher, device, probe)

    info = {"kind": "denoiser", "data": s.data, "classes": info["classes"], "sigma_init": s.sigma_init,
            "forget": forget, "to": to, "teacher_sha256": teacher_sha256, "seconds": run.seconds,
            "settings": dataclasses.asdict(s), "machine": machine(device)}
    save_atomically(info | pack(fold(G, s.sigma_init) if s.fold else G), run.out / "generator.pt")
    save_atomically(info | pack(G, half=True) | {"fake": pack(fake, half=True)["weights"]}, run.out / "both.pt")
    if not referee:
        return print(f"{run.out}/generator.pt is there, but no judges of such images to say what it draws: train them "
                     f"with `python train_teacher.py --data {s.data} --judge`, then `python evaluate.py {run.out}`")
    evaluate.verdict(run.out, device, s.per_label)


if __name__ == "__main__":
    command(main)
