"""SFD with options that are not in the paper: guidance, an anchor, a share of forgotten labels, micro-batches, curves.

    python -m lab.distill --forget 0 --to 1 --anchored    # MNIST in about a minute: SFD with an anchor
    python -m lab.distill --data cifar10 --forget airplane --to automobile --guidance 2

Without these options a run gives the same weights as sfd_minimal.py. While it trains, it evaluates the running average
now and then, and draws the curves.
"""
import copy
from dataclasses import asdict, dataclass

import torch

import sfd_minimal
from edm_unet import BadInput, command, digest, machine, pack, pick_device
from lab.adapters.denoisers import InParts, map_condition
from lab.core.files import SHIPPED, in_folder, load_teacher, save_run
from lab.core.labels import describe, run_folder
from lab.core.options import check_ranges, given_options, setting
from lab.core.runs import Run, RunSettings, seed_everything
from lab.evaluate.evaluator import Evaluator
from sfd_minimal import (begin, draw_labels, load_start, override_labels, preset_name, set_learning_rates, sfd_step,
                         update_average)


@dataclass
class Settings(RunSettings, sfd_minimal.Settings):
    forget: tuple = setting(("0",), "labels to forget, by name or number, or none")
    to: tuple = setting(("random",), "label drawn instead: one, one for each, or random")
    data: str = setting("mnist", "data set of the teacher", trains=False)
    teacher: str = setting("", "file of the teacher (default: the one of the data set)", trains=False)
    init_from: str = setting("", "start generator and fake score from this both.pt", trains=False)
    guidance: float = setting(1.0, "of the teacher, away from the label to forget; 1 is none", at_least=1)
    lambda_anchor: float = setting(0.0, "weight of anchor_loss on labels to keep", at_least=0)
    forget_share: float = setting(0.0, "share of a batch under labels to forget; 0: all labels equally", at_least=0,
                                  below=1)
    micro_batch: int = setting(0, "images at once in a network: less memory, a third more time; 0: all", at_least=0)
    compile: bool = setting(False, "torch.compile the networks: gains on a GPU alone, after minutes of compiling",
                            trains=False)

    def __post_init__(self):
        sfd_minimal.Settings.__post_init__(self)
        check_ranges(self)


ANCHORED = dict(lambda_anchor=3.0, forget_share=0.5)
RECIPES = {  # differences from the settings above; options on the command line override them
    **sfd_minimal.PRESETS,
    "mnist, anchored": dict(steps=135, lr=8e-4, lr_fake=2.7e-3) | ANCHORED,
    "cifar10, anchored": dict(steps=200, lr=2e-4, lr_fake=6.8e-4) | ANCHORED,
}


def recipe(data, forgets=True, init_from="", anchored=False):
    """Settings of RECIPES for a run on `data`, and with `anchored` the start from plain SiD that it needs."""
    if not anchored:
        return dict(RECIPES[preset_name(data, forgets, init_from)])
    found = RECIPES[preset_name(data, True, "") + ", anchored"]
    return {"init_from": str(SHIPPED / f"{data}_sid.pt"), **found}


# ----------------------------------------------------------------------------------- three options, not in the paper

def guided(teacher, c_psi, forgotten, guidance):
    """The teacher, guided away from the label to forget in the rows `forgotten` (B,) bool: a function of its arguments.

    D_phi(x_t; c_f) + g (D_phi(x_t; c_o) - D_phi(x_t; c_f)): the forgotten label is the negative prompt. A larger
    guidance g draws the override more surely and with less variety. g = 1 is D_phi(x_t; c_o).
    """
    rows = forgotten.nonzero()[:, 0]  # (n,); nonzero() makes the CPU wait for the GPU, so call it once per step

    def with_rows(v, w):
        return torch.cat([v, w[rows]])

    def guided_teacher(x_t, sigma, c_phi):
        both = teacher(with_rows(x_t, x_t), with_rows(sigma, sigma), map_condition(with_rows, c_phi, c_psi))
        D_phi, D_f = both.tensor_split([len(x_t)])                                    # (B, ...), (n, ...)
        return D_phi.index_put((rows,), D_f + guidance * (D_phi[rows] - D_f))
    return guided_teacher


def anchor_loss(anchor, x_g, z, c, forgotten, sigma_init):
    """||x_g - x_0||^2 on labels to keep, summed over pixels, mean over the batch; x_0 is the anchor's image of z.

    anchor: a generator that draws the labels to keep well. It gets no gradient.
    """
    x_0 = sfd_minimal.draw(anchor, z, c, sigma_init)                                  # (B, ...), no gradient
    squared = ((x_g - x_0) ** 2).flatten(1).sum(1)                                    # (B,)
    return torch.where(forgotten, 0, squared).sum() / len(x_g)


def draw_labels_in_shares(batch, override, conditions, share):
    """`sfd_minimal.draw_labels` with a `share` of the batch under labels to forget."""
    labels = torch.arange(len(override), device=override.device)
    to_forget = override != labels
    kept = labels[~to_forget]
    p = torch.where(to_forget, share / to_forget.sum(), (1 - share) / len(kept))      # (K,)
    c = p.multinomial(batch, replacement=True)
    random_kept = kept[torch.randint(len(kept), (batch,), device=override.device)]
    c_o = torch.where(override[c] == -1, random_kept, override[c])
    return conditions[c_o], conditions[c], to_forget[c]


# ------------------------------------------------------------------------------------------------------------ the loop

def distill(s, n, override, conditions, first=0, anchor=None):
    """`sfd_minimal.distill` with the options above. anchor: a network, or None for the running average itself."""
    in_parts = [InParts(net, s.micro_batch) if s.micro_batch else net for net in (n.generator, n.fake, n.teacher)]
    generator, fake, teacher = in_parts
    if s.compile:
        for network in in_parts:
            network.compile()
    extra_loss = None
    if s.lambda_anchor:
        def extra_loss(x_g, z, c, forgotten):
            return s.lambda_anchor * anchor_loss(anchor or n.average, x_g, z, c, forgotten, s.sigma_init)
    for step in range(first, s.steps):
        set_learning_rates(n, s, step)
        z = torch.randn(s.batch, *teacher.shape, device=override.device)
        if s.forget_share:
            c_phi, c_psi, forgotten = draw_labels_in_shares(s.batch, override, conditions, s.forget_share)
        else:
            c_phi, c_psi, forgotten = draw_labels(s.batch, override, conditions)
        D = guided(teacher, c_psi, forgotten, s.guidance) if s.guidance != 1 else teacher
        terms = sfd_step(generator, fake, D, n.optimizer_theta, n.optimizer_psi, z, c_phi, c_psi, forgotten, s,
                         teacher.sigma_data, extra_loss)
        update_average(n.average, n.generator, s.ema, step)
        yield terms


def train(s, teacher, info, c_f, c_o, labels=None, evaluator=None):
    """A run in the folder s.out. Returns its generator and the info of its file.

    info: of the teacher. c_f, c_o: what is forgotten and drawn instead, for the file. labels: (override (N,),
    conditions (N, ...)) as in `distill`; None for the labels c_f and c_o of a label-conditional teacher.
    """
    device = teacher.conditions.device
    override, conditions = labels or (override_labels(c_f, c_o, len(teacher.conditions)), teacher.conditions)
    override, conditions = override.to(device), conditions.to(device)
    seed_everything(s.seed)
    start = load_start(s.init_from, teacher, s) if s.init_from else (None, None)
    n = begin(teacher, s, *start)
    state, anchor = n.trained(), None
    if s.init_from and s.lambda_anchor:
        anchor = copy.deepcopy(n.average)
    run = Run(s, state, pinned={"teacher": info["sha256"], "init_from": s.init_from and digest(s.init_from),
                                "forget": c_f, "to": c_o})
    for terms in run.steps(distill(s, n, override, conditions, run.step, anchor)):
        if run.step in (20, 40, 60, 80, s.steps) or run.step % 100 == 0:
            run.log({**terms, **(evaluator.probe(n.average, s.sigma_init) if evaluator else {})})
    content = {"data": info["data"], "classes": info["classes"], "size": info.get("size"), "sigma_init": s.sigma_init,
               "forget": c_f, "to": c_o, "teacher_sha256": info["sha256"], "seconds": run.seconds,
               "machine": machine(device), "settings": asdict(s)}
    save_run(run, content, n.average, n.fake, pack)
    return n.average, content


# ---------------------------------------------------------------------------------------------------- the command line

@dataclass
class Options(Settings):
    anchored: bool = setting(False, "SFD with an anchor: from plain SiD, near its images of labels to keep")


def read_options(argv, options, description):
    """(given options {name: value}, whether anything is forgotten, whether --anchored is given) of a command line."""
    given = given_options(options, argv, description)
    anchored, forgets = given.pop("anchored", False), given.get("forget") != ("none",)
    if anchored and not forgets:
        raise BadInput("--anchored has no effect with --forget none")
    if given.get("init_from"):
        given["init_from"] = str(in_folder(given["init_from"], "both.pt"))
    return given, forgets, anchored


def parse(argv):
    """`Settings` of a command line: the recipe of the data set and start, overridden by the given options."""
    given, forgets, anchored = read_options(argv, Options, __doc__)
    return Settings(**{**recipe(given.get("data", "mnist"), forgets, given.get("init_from", ""), anchored), **given})


def main(argv):
    s = parse(argv)
    device = pick_device(s.device)
    teacher, info = load_teacher(s.teacher, s.data, device)
    c_f, c_o = sfd_minimal.read_labels(list(s.forget), list(s.to), info["classes"])
    if not c_f and (s.guidance != 1 or s.lambda_anchor or s.forget_share):
        raise BadInput("--guidance, --lambda-anchor and --forget-share have no effect with --forget none")
    what = ["sid"] if not c_f else ["forget" + "-".join(s.forget), "to" + "-".join(s.to)]
    s.out = s.out or run_folder(info["data"], *what, "anchored" if s.lambda_anchor else "")
    print(f"{describe(c_f, c_o, info['classes'])}; {s.steps} steps on {device.type}, writing to {s.out}")
    evaluator = Evaluator.find(teacher, info, c_f, c_o)
    generator, content = train(s, teacher, info, c_f, c_o, evaluator=evaluator)
    if evaluator:
        evaluator.evaluate(s.out, generator, content)


if __name__ == "__main__":
    command(main)
