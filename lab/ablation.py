"""Does a difference from the official code matter? SFD with one choice, or all, as in the official code.

    python -m lab.ablation --switch clipping
    python -m lab.ablation                                 # no switch: the default of sfd_minimal.py
    python -m lab.ablation --switch noise dropout          # two at once
    python -m lab.ablation --switch official --seed 1      # all at once

SFD of 0 to 1 on MNIST, from the teacher, with the default settings but for the switches. Writes metrics.json into the
folder of the run. For maintainers: results/ablation.md has the results.
"""
import math
from dataclasses import asdict, dataclass

import torch

import sfd_minimal
from edm_unet import BadInput, Block, command, machine, pack, save_file
from lab.core.files import SHIPPED, load_teacher
from lab.core.labels import run_folder
from lab.core.options import check_ranges, given_options, setting
from lab.core.runs import Run, RunSettings, seed_everything
from lab.evaluate.evaluator import Evaluator
from sfd_minimal import begin, draw_labels, fake_score_loss, override_labels, score_identity_loss, update_average

FORGET, OVERRIDE = 0, 1
SWITCHES = {  # what the official code for labels does
    "noise": "sigma of a step t from 38 to 711 of DDPM's schedule, in both updates",
    "psi-weight": "L_psi with the weight of noise prediction, 1 / sigma^2",
    "own-batch": "a batch of its own for the forgotten label, and weight 0.01 on both of its losses",
    "constant-rates": "constant learning rates",
    "equal-rates": "the generator's learning rate for the fake score too",
    "clipping": "each entry of the gradients clipped to [-1, 1]",
    "dropout": "dropout of 0.1 in each of the two networks, in its own update",
    "unguided-teacher": "a teacher that was trained without guidance",
    "alpha": "alpha = 1.2",
}
CHOICES = {  # of the override, as the paper discusses them
    "random-override": "a random label to keep in each draw",
    "nearest-override": "the label that judge 1 finds most likely for real 0s, but for 0",
}
SETTINGS = {"own-batch": dict(lambda_forget=0.01), "equal-rates": dict(lr_fake=3e-4), "alpha": dict(alpha=1.2)}
UNGUIDED = "teachers/mnist_plain.pt"


@dataclass
class Settings(RunSettings, sfd_minimal.Settings):
    switches: tuple = setting((), "as of SWITCHES and CHOICES", option=False)
    device: str = setting("cpu", "all runs of the table are on the CPU", option=False)

    def __post_init__(self):
        sfd_minimal.Settings.__post_init__(self)
        check_ranges(self)


@dataclass
class Options(Settings):
    switch: tuple = setting((), "official, or any of SWITCHES and CHOICES")


def ddpm_sigmas():
    """Noise levels of DDPM's steps 38 to 711, sqrt((1 - a) / a): 0.137 to 13.0."""
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    return ((1 - a) / a).sqrt().float()[38:712]


def as_noise_prediction(L_psi, sigma, sigma_data):
    """L_psi (B,) with the weight 1 / sigma^2 in the place of EDM's: ||eps_psi - eps||^2."""
    return L_psi * sigma_data ** 2 / (sigma ** 2 + sigma_data ** 2)


def draw_two_batches(batch, override, conditions):
    """`sfd_minimal.draw_labels` with a batch of labels to keep and, after it, a batch of the label to forget."""
    kept = torch.arange(len(override))[override == torch.arange(len(override))]
    c = torch.cat([kept[torch.randint(len(kept), (batch,))], torch.full((batch,), FORGET)])
    random_kept = kept[torch.randint(len(kept), (2 * batch,))]
    c_o = torch.where(override[c] == -1, random_kept, override[c])
    return conditions[c_o], conditions[c], c == FORGET


def step(s, n, override):
    """One step of `sfd_minimal.distill` with the switches s.switches. Without switches the two agree bit for bit."""
    own_batch = "own-batch" in s.switches
    B = 2 * s.batch if own_batch else s.batch
    z = torch.randn(B, *n.teacher.shape)
    draw = draw_two_batches if own_batch else draw_labels
    c_phi, c_psi, forgotten = draw(s.batch, override, n.teacher.conditions)
    weight = torch.where(forgotten, s.lambda_forget, 1.0)                              # (B,)
    sigma_init = torch.full((B, 1, 1, 1), s.sigma_init)
    dropout = "dropout" in s.switches
    x_g = n.generator.train(dropout)(sigma_init * z, sigma_init, c_psi)
    x_psi = x_g.detach()
    if dropout:  # the fake score learns from images without dropout
        with torch.no_grad():
            x_psi = n.generator.eval()(sigma_init * z, sigma_init, c_psi)

    def noise_levels(default):
        levels = ddpm_sigmas()
        return levels[torch.randint(len(levels), (B,))] if "noise" in s.switches else default()

    def edm_normal():
        return (s.p_mean + s.p_std * torch.randn(B)).exp()

    sigma = noise_levels(edm_normal).view(-1, 1, 1, 1)
    L_psi = fake_score_loss(n.fake.train(dropout), x_psi, c_psi, sigma, n.teacher.sigma_data)
    if "psi-weight" in s.switches:
        L_psi = as_noise_prediction(L_psi, sigma.flatten(), n.teacher.sigma_data)
    L_psi = (weight * L_psi).sum() / s.batch if own_batch else L_psi.mean()
    n.optimizer_psi.zero_grad()
    L_psi.backward()
    n.optimizer_psi.step()

    def edm_grid():
        low, high = s.sigma_min ** (1 / 7), s.sigma_max ** (1 / 7)
        return (low + s.u_max * torch.rand(B) * (high - low)).pow(7)

    sigma = noise_levels(edm_grid).view(-1, 1, 1, 1)
    S = score_identity_loss(n.teacher, n.fake.eval(), x_g, c_phi, c_psi, sigma, s.alpha)
    L_keep = torch.where(forgotten, 0, S).sum() / s.batch
    L_forget = torch.where(forgotten, weight * S, 0).sum() / s.batch
    n.optimizer_theta.zero_grad()
    (L_keep + L_forget).backward(inputs=list(n.generator.parameters()))
    n.optimizer_theta.step()
    return {"L_psi": L_psi.detach(), "L_keep": L_keep.detach(), "L_forget": L_forget.detach()}


def prepare(n, switches):
    """Switch clipping on in the `Networks` n, and give their blocks dropout, which `step` switches on."""
    for network, optimizer in ((n.generator, n.optimizer_theta), (n.fake, n.optimizer_psi)):
        if "clipping" in switches:
            def clip(optimizer, args, kwargs):
                torch.nn.utils.clip_grad_value_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.register_step_pre_hook(clip)
        if "dropout" in switches:
            for block in network.modules():
                if isinstance(block, Block):
                    block.dropout = 0.1


def distill(s, n, override, first=0):
    """`sfd_minimal.distill` with the switches s.switches."""
    for number in range(first, s.steps):
        sfd_minimal.set_learning_rates(n, s, 0 if "constant-rates" in s.switches else number)
        terms = step(s, n, override)
        update_average(n.average, n.generator, s.ema, number)
        yield terms


def nearest_label(evaluator):
    """The label, FORGET aside, with the largest logit by judge 1 for the mean features of real images of FORGET."""
    logits = evaluator.judge.head(evaluator.reference["mean"][FORGET])
    return int(logits.index_fill(0, torch.tensor(FORGET), -math.inf).argmax())


def expand(words):
    """The switches that the words of the command line name. BadInput for unknown ones."""
    unknown = set(words) - {*SWITCHES, *CHOICES, "official"}
    if unknown:
        raise BadInput(f"no switch {', '.join(sorted(unknown))}: {', '.join([*SWITCHES, *CHOICES, 'official'])}")
    found = [name for name in SWITCHES if name in words or "official" in words]
    return (*found, *(name for name in CHOICES if name in words))


def main(argv):
    given = given_options(Options, argv, __doc__)
    words = given.pop("switch", ())
    switches = expand(words)
    rates = {name: value for switch in switches for name, value in SETTINGS.get(switch, {}).items()}
    s = Settings(**{**rates, **given, "switches": switches})
    s.out = s.out or run_folder("mnist", "ablation", *words, f"seed{s.seed}")
    shipped, info = load_teacher("", "mnist", "cpu")
    unguided = UNGUIDED if "unguided-teacher" in switches else ""
    path = str(SHIPPED.parent / unguided) if unguided else ""
    teacher, teacher_info = load_teacher(path, "mnist", "cpu")
    evaluator = Evaluator(shipped, info, [FORGET], [OVERRIDE])
    override = OVERRIDE
    if "random-override" in switches:
        override = -1
    if "nearest-override" in switches:
        override = nearest_label(evaluator)
    evaluator.c_o = [override]
    print(f"SFD of 0 to {override} with {', '.join(switches) or 'no switch'}, {s.steps} steps, writing to {s.out}")

    seed_everything(s.seed)
    n = begin(teacher, s)
    prepare(n, switches)
    run = Run(s, n.trained(), pinned={"teacher": teacher_info["sha256"]})
    for terms in run.steps(distill(s, n, override_labels([FORGET], [override], 10), run.step)):
        if run.step % 100 == 0:
            run.log(terms)
    settings = asdict(s) | {"data": "mnist", "forget": [str(FORGET)], "to": [str(override)], "teacher": unguided}
    content = {"data": "mnist", "classes": info["classes"], "sigma_init": s.sigma_init, "forget": [FORGET],
               "to": [override], "teacher_sha256": teacher_info["sha256"], "seconds": run.seconds,
               "machine": machine(torch.device("cpu")), "settings": settings}
    save_file(run.out / "generator.pt", {**content, **pack(n.average)})
    evaluator.evaluate(s.out, n.average, content)


if __name__ == "__main__":
    command(main)
