"""Score Forgetting Distillation (SFD; Chen, Zhang, Zhou, ICLR 2025, arXiv 2409.11219) in one file.

    python sfd_minimal.py --forget 0 --to 1

turns a label-conditional diffusion teacher into a one-step generator that has forgotten a class, without real images.
SFD is Score identity Distillation (SiD; Zhou et al., ICML 2024, arXiv 2404.04057) with one change: for the label to
forget, the teacher is asked about another label. Three networks, all started from the teacher's weights:

    teacher    D_phi(x_t; sigma, c)   frozen
    fake       D_psi(x_t; sigma, c)   keeps learning to denoise the generator's images: its score is the generator's
    generator  x_g = G_theta(z, c) = D_theta(sigma_init z; sigma_init, c),   z ~ N(0, I),   one evaluation

A denoiser D is any callable D(x_t, sigma, c) -> E[x | x_t; sigma, c]; its score is (D - x_t) / sigma^2. The method,
from `fake_score_loss` to `sfd_step`, needs torch, three such denoisers and two optimizers, nothing else: paste it.
"""
import copy
from dataclasses import dataclass

import torch

from lab import prompts, sample
from lab.checkpoint import load_start, load_teacher, save_generator
from lab.cli import command, parse, setting
from lab.denoisers import each
from lab.device import pick_device, seed_everything
from lab.evaluate import Evaluator
from lab.label_space import anywhere, tie
from lab.labels import label_numbers, run_name, who
from lab.recipes import RECIPES, recipe_name
from lab.run import Run, RunSettings, decay, update_average


@dataclass
class Settings(RunSettings):
    forget: tuple = setting(("0",), "labels to forget, or words of prompts, or none: plain SiD, nothing is forgotten")
    to: tuple = setting(("random",), "what overrides them, one for all or each, or random: uniform over the rest")
    data: str = setting("mnist", "data set that the teacher was trained on; names default teacher, judge and folder")
    teacher: str = setting("", "its checkpoint (default: the shipped one, or in runs/<data>-teacher)", trains=False)
    init_from: str = setting("", "start generator and fake score from this both.pt; the teacher stays the true one")
    steps: int = setting(None, "optimizer steps (None, here and below: `lab.recipes`)", above=0)
    batch: int = setting(None, "generated images per step", above=0)
    lr: float = setting(None, "generator's learning rate (Adam): constant for half the run, then to zero", above=0)
    lr_fake: float = setting(None, "the same for the fake score, which must keep up", above=0)
    alpha: float = setting(1.0, "alpha in S; the published runs use 1.2")
    lambda_forget: float = setting(1.0, "weight of the score-forgetting term; kept labels have 1", at_least=0)
    forget_share: float = setting(None, "share of the batch under forgotten labels (None: all alike)", above=0, below=1)
    lambda_anchor: float = setting(None, "not in the paper: weight of `anchor_loss` on kept labels", at_least=0)
    anywhere: float = setting(0.0, "not in the paper: share of the batch anywhere in label space", at_least=0, below=1)
    guidance: float = setting(None, "not in the paper on labels: above 1, further from the forgotten one", at_least=1)
    sigma_init: float = setting(2.5, "noise level at which the generator evaluates its network", above=0)
    p_mean: float = setting(0.0, "mean of ln sigma in the psi step; SiD's is -1.2")
    p_std: float = setting(1.2, "standard deviation of ln sigma in the psi step", above=0, option=False)
    sigma_min: float = setting(0.002, "lowest noise level of the theta step's grid", above=0, option=False)
    sigma_max: float = setting(80.0, "highest noise level of that grid", above=0, option=False)
    u_max: float = setting(0.8, "share of it that is used, from below: sigma up to 24.4", above=0, option=False)
    ema: float = setting(0.999, "decay of the generator's average, which is judged and kept", at_least=0, below=1)
    micro_batch: int = setting(None, "images at once in a network, for large ones: a third more time", above=0)
    compile: bool = setting(False, "torch.compile the networks: a minute, then faster steps on a GPU", trains=False)

    def __post_init__(self):
        self.recipe = recipe_name(self.data, self.teacher, self.forget != ("none",), self.init_from)
        self.taken = self.fill(RECIPES[self.recipe])


# ---------------------------------------------------------------------------------------------------------- the method

def fake_score_loss(fake, x_g, c, sigma, sigma_data=0.5):
    """L_psi = w(sigma) ||D_psi(x_t; sigma, c) - x_g||^2,  w = (sigma^2 + sd^2) / (sigma sd)^2.

    x_g (B, ...) images without gradient, c (B, ...) what they were generated under, sigma (B, 1, ...). Returns (B,).
    """
    x_t = x_g + sigma * torch.randn_like(x_g)                                         # (B, ...)
    D_psi = fake(x_t, sigma, c)                                                       # (B, ...)
    w = (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2                    # (B, 1, ...)
    return (w * (D_psi - x_g) ** 2).flatten(1).sum(1)                                 # (B,)


def score_identity_loss(teacher, fake, x_g, c_phi, c_psi, sigma, alpha=1.0):
    """S(x_g; c_phi, c_psi) = sum_pixels (D_phi - D_psi) [(D_phi - x_g) - alpha (D_phi - D_psi)] / omega.

    The teacher is asked about c_phi (B, ...), the fake score about c_psi (B, ...). Gradient flows into x_g (B, ...)
    directly and through x_t inside both networks. sigma (B, 1, ...). Returns (B,).
    """
    x_t = x_g + sigma * torch.randn_like(x_g)                                         # (B, ...)
    D_phi = teacher(x_t, sigma, c_phi)                                                # (B, ...)
    D_psi = fake(x_t, sigma, c_psi)                                                   # (B, ...)
    omega = (D_phi - x_g).detach().abs().flatten(1).mean(1).clamp(min=1e-5)           # (B,)
    S = (D_phi - D_psi) * ((D_phi - x_g) - alpha * (D_phi - D_psi))                   # (B, ...)
    return S.flatten(1).sum(1) / omega                                                # (B,)


def draw_labels(batch, override, kept, conditions, share=None):
    """c_phi for the teacher and c_psi for generator and fake score, (B, ...) rows of `conditions` (K, ...), which has
    one for each label; forgotten (B,), where the two differ.

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
    return conditions[c_o], conditions[c], to_forget[c]


def sfd_step(generator, fake, teacher, optimizer_theta, optimizer_psi, z, c_phi, c_psi, forgotten, s,
             sigma_data=0.5, anchor=None):
    """One step of SFD: one batch of images serves both updates, and kept and forgotten labels share each forward.

    z (B, ...) normal noise; c_phi, c_psi, forgotten from `draw_labels`; s: `Settings`, or anything with its fields.
    Returns the terms of both losses, detached.
    """
    B, per_sample = len(z), (-1,) + (1,) * (z.ndim - 1)
    theta = [p for p in generator.parameters() if p.requires_grad]
    sigma_init = torch.full((B,), s.sigma_init, device=z.device).view(per_sample)

    # Generate, under the label to forget too: what changes for it is the question to the teacher, c_phi.
    x_g = generator(sigma_init * z, sigma_init, c_psi)                                # (B, ...), with gradient to theta

    # psi step: the fake score learns the images under the labels they were asked for. x_g is detached: theta stays.
    sigma = (s.p_mean + s.p_std * torch.randn(B, device=z.device)).exp().view(per_sample)
    L_psi = fake_score_loss(fake, x_g.detach(), c_psi, sigma, sigma_data).mean()
    optimizer_psi.zero_grad()
    L_psi.backward()
    optimizer_psi.step()

    # theta step: u ~ U[0, u_max] on EDM's rho = 7 grid, counted from sigma_min up to sigma_max.
    u, low, high = s.u_max * torch.rand(B, device=z.device), s.sigma_min ** (1 / 7), s.sigma_max ** (1 / 7)
    sigma = (low + u * (high - low)).pow(7).view(per_sample)
    S = score_identity_loss(teacher, fake, x_g, c_phi, c_psi, sigma, s.alpha)         # (B,)
    L_keep = (S * ~forgotten).sum() / B      # S(G(z, c);   c_phi = c,   c_psi = c)      SiD on the labels to keep
    L_forget = (S * forgotten).sum() / B     # S(G(z, c_f); c_phi = c_o, c_psi = c_f)    the score-forgetting term
    L_theta = L_keep + s.lambda_forget * L_forget
    if anchor is not None:
        L_theta = L_theta + s.lambda_anchor * anchor_loss(anchor, x_g, sigma_init * z, sigma_init, c_psi, forgotten)
    optimizer_theta.zero_grad()
    L_theta.backward(inputs=theta)           # the gradient of theta alone: phi and psi get none
    optimizer_theta.step()
    return {"L_psi": L_psi.detach(), "L_keep": L_keep.detach(), "L_forget": L_forget.detach()}


# ------------------------------------------------------------------------------------- two options, not in the paper

def guided(teacher, c_psi, forgotten, guidance):
    """D_phi(x_t; c_f) + g (D_phi(x_t; c_o) - D_phi(x_t; c_f)) in the rows to forget (`forgotten`, (B,)): the teacher
    with the forgotten label as negative prompt, as in the official code for Stable Diffusion.

    The larger g, the surer and the less varied what is drawn under c_f; g = 1 asks about c_o alone.
    """
    rows = forgotten.nonzero()[:, 0]                # (n,), once: how many they are is what a GPU is waited for

    def D(x_t, sigma, c_phi):
        and_rows = lambda v, of: torch.cat([v, of[rows]])  # one forward answers both questions
        both = teacher(and_rows(x_t, x_t), and_rows(sigma, sigma), each(and_rows, c_phi, c_psi))
        D_phi, D_f = both.tensor_split([len(x_t)])                                    # (B, ...), (n, ...)
        return D_phi.index_put((rows,), D_f + guidance * (D_phi[rows] - D_f))
    return D


def anchor_loss(anchor, x_g, x_init, sigma_init, c, forgotten):
    """||x_g - x_0||^2 under the labels to keep, summed over pixels, mean over the batch: x_0 is what the `anchor`, a
    generator that draws them well, makes of the same noise. The anchor gets no gradient."""
    with torch.no_grad():
        x_0 = anchor(x_init, sigma_init, c)                                           # (B, ...)
    return (((x_g - x_0) ** 2).flatten(1).sum(1) * ~forgotten).sum() / len(x_g)


# ------------------------------------------------------------------------------------------------------------ the loop

def begin(s, teacher, info=None):
    """All that training changes, by name. The teacher, any denoiser with `conditions`, `shape` and `sigma_data`, is
    frozen, and copied three times; `info` is what its file says beside it."""
    teacher.requires_grad_(False)
    generator, average, fake = (copy.deepcopy(teacher) for _ in range(3))
    if s.init_from:
        load_start(s.init_from, generator, fake, s.sigma_init, info)
        average.load_state_dict(generator.state_dict())
    # all of both learns, but what reads the prompts: an image is to be forgotten, not a word
    learning = lambda model: [p.requires_grad_() for name, p in model.named_parameters() if name[:5] != "text."]
    adam = lambda model, lr: torch.optim.Adam(learning(model), lr, betas=(0.0, 0.999), fused=True)
    state = dict(generator=generator, average=average, fake=fake,
                 optimizer_theta=adam(generator, s.lr), optimizer_psi=adam(fake, s.lr_fake))
    if s.lambda_anchor and s.init_from:  # a start that draws well in one step; without one, the average soon does
        state["anchor"] = copy.deepcopy(average)
    return state


def about_labels(s, teacher, c_f, c_o):
    """What `distill` asks about: c_o[i], or with -1 a random kept label, shall be drawn under label c_f[i]. A teacher
    of prompts is asked about each as about a label, overridden by the same with c_o's words in it (`lab.prompts`)."""
    conditions, override = teacher.conditions, torch.arange(len(teacher.conditions))
    if s.data == "prompts":
        conditions, override = prompts.questions(c_f, c_o, teacher.settings.words)
    else:
        override[c_f] = torch.tensor(c_o, dtype=torch.long)
    conditions, override = (of.to(teacher.conditions.device) for of in (conditions, override))
    kept = (override == torch.arange(len(override), device=override.device)).nonzero()[:, 0]
    ask = lambda batch: draw_labels(batch, override, kept, conditions, s.forget_share)
    return anywhere(ask, s.anywhere, conditions[override]) if s.anywhere else ask


def distill(s, ask, teacher, generator, average, fake, optimizer_theta, optimizer_psi, anchor=None, first=0):
    """SFD from step number `first` on; ask(batch) draws c_phi, c_psi and forgotten, as `about_labels` says it.
    A generator of each step's loss terms: who asks for the next one shows, saves and stops."""
    device = next(generator.parameters()).device
    if s.lambda_anchor and anchor is None:
        anchor = average
    for step in range(first, s.steps):
        for optimizer, lr in ((optimizer_theta, s.lr), (optimizer_psi, s.lr_fake)):
            optimizer.param_groups[0]["lr"] = lr * decay(step, s.steps)
        z = torch.randn(s.batch, *teacher.shape, device=device)
        c_phi, c_psi, forgotten = ask(s.batch)
        D_phi = guided(teacher, c_psi, forgotten, s.guidance) if s.guidance != 1 else teacher
        terms = sfd_step(generator, fake, D_phi, optimizer_theta, optimizer_psi, z, c_phi, c_psi, forgotten, s,
                         teacher.sigma_data, anchor)
        update_average(average, generator, s.ema, step)
        yield terms


# ---------------------------------------------------------------------------------------------------- the command line

def train(s, teacher, info, c_f, c_o, evaluator=None):
    """A run in the folder s.out, begun or resumed: (its generator, what the generator's file says beside it)."""
    seed_everything(s.seed)
    teacher.micro_batch = s.micro_batch
    state = begin(s, teacher, info)
    run = Run(s, state, pinned={"teacher": info["sha256"]})
    for model in filter(lambda part: s.compile and hasattr(part, "compile"), (teacher, *state.values())):
        model.compile()
    for terms in run.steps(distill(s, about_labels(s, teacher, c_f, c_o), teacher, **state, first=run.step)):
        if run.step in (20, 40, 60, 80, s.steps) or run.step % 100 == 0:
            run.log(terms | (evaluator.probe(state["average"], s.sigma_init) if evaluator else {}))
    if s.anywhere:  # the weights have forgotten it: now the label too
        tie(state["average"], c_f, c_o)
    return state["average"], save_generator(run, info, c_f, c_o, state["average"], state["fake"])


def main(argv):
    if "--sample" in argv:  # the same as python -m lab.sample
        return sample.main(argv)
    s = parse(Settings, argv, __doc__)
    device = pick_device(s.device)
    teacher, info = load_teacher(s.teacher, s.data, device)
    c_f, c_o = label_numbers(s, info["classes"])
    s.out = s.out or f"runs/{run_name(s)}"
    print(f"SFD on {device.type}: {who(c_f, c_o, info['classes'])}; writing to {s.out}\n"
          f"{s.recipe}: {' '.join(f'{name}={value}' for name, value in s.taken.items())}")
    evaluator = Evaluator.find(teacher, info, c_f, c_o)
    generator, content = train(s, teacher, info, c_f, c_o, evaluator)
    if evaluator:
        evaluator.verdict(s.out, generator, content)


if __name__ == "__main__":
    command(main)
