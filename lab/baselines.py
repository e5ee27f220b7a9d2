"""Other ways to make a diffusion model forget a class, side by side with SFD: one teacher, one judge, one protocol.

    python -m lab.baselines --forget 0 --to 1                            # every method; --resume goes on with the rest
    python -m lab.baselines --forget 0 --to 1 --method esd label_swap    # some of them
"""
import copy
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import sfd_minimal
from edm_unet import EDMPrecond
from lab.checkpoint import load_teacher, pack, save_atomically, un_erased
from lab.cli import check_ranges, command, comparable, parse, setting
from lab.data import data_name, how_many, load_images
from lab.device import machine, pick_device, seed_everything
from lab.errors import BadInput
from lab.evaluate import PROTOCOL, Evaluator
from lab.figures import methods_figure
from lab.frechet import frechet, moments
from lab.labels import label_number, labels_only, run_name, who
from lab.methods import METHODS, World
from lab.report import markdown
from lab.run import Run, refuse_changed, update_average
from lab.sample import TEACHER_NFE, draw, load_generator, many_step

ONE_STEP = {  # this project's own, by what differs from a run of sfd_minimal.py
    "retrain_sid": dict(teacher="retrain", forget=("none",), to=("random",)),  # their control
    "sid": {},  # the generator that comes with the project, which has forgotten nothing
    "sfd": {},
    "sfd_two_stage": dict(init_from="sid"),
}
TUNED = {  # and from METHODS or the recipe of a data set: by lab.sweep, or by how near the control has to come
    ("mnist", "retrain_sid"): dict(steps=3400),
    ("mnist", "sfd_two_stage"): dict(lr=4e-4, lr_fake=4e-4 / 0.3),
    ("cifar10", "finetune"): dict(lr=3e-4),  # MNIST's 1e-2 leaves 11 % accuracy there: the smallest of its four
}


# ---------------------------------------------------------------------------------------------------------- one method

@dataclass
class Training:
    """What one method's result depends on; a run with other settings is not resumed."""
    method: str
    forget: object
    to: object
    seed: int
    steps: int
    batch: int
    lr: float
    ema: float
    only: str
    options: dict
    out: Path = setting("", "folder", trains=False)
    save_every: float = setting(30.0, "seconds between checkpoints", trains=False)
    resume: bool = setting(False, "go on", trains=False)
    overwrite: bool = setting(False, "begin anew", trains=False)


def train(method, world, network, average, optimizer, first=0):
    """Steps from number `first` on: yields the loss of each."""
    for step in range(first, method.steps):
        optimizer.param_groups[0]["lr"] = method.lr * (1 - step / method.steps)
        loss = method.loss(network, world)
        optimizer.zero_grad()
        loss.backward()
        for p, mask in zip(network.parameters(), world.mask):  # salun's; empty elsewhere
            p.grad *= mask
        optimizer.step()
        update_average(average, network, method.ema, step)
        yield {"loss": loss.detach()}


def unlearn(name, method, bench, out, resume):
    """(network, settings, seconds): one method from the teacher to its end, in the folder `out`."""
    s, phi, device = bench.s, bench.teacher, bench.device
    training = Training(name, bench.c_f, bench.c_o, s.seed, method.steps, method.batch, method.lr, method.ema,
                        method.only, method.options, out, s.save_every, resume, not resume)
    seed_everything(s.seed)
    world = bench.world(method.batch)
    for option, value in method.options.items():
        setattr(world, option, value)
    network = EDMPrecond(phi.settings).to(device) if method.from_scratch else copy.deepcopy(phi)
    network.bf16, network.text = phi.bf16, copy.deepcopy(phi.text)  # what reads prompts is nobody's to change
    network.requires_grad_(True)

    start = time.monotonic()
    method.before(network, world)
    preparation = time.monotonic() - start
    average = copy.deepcopy(network).eval().requires_grad_(False)
    for weight, p in network.named_parameters():
        p.requires_grad_(bool(re.search(method.only, weight)) and not weight.startswith("text."))
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], method.lr,
                                 betas=(0.9, 0.99), fused=True)
    state = {"network": network, "average": average, "optimizer": optimizer}
    pinned = {"teacher": bench.info["sha256"]}
    if method.data != "none":
        pinned["images"] = how_many(bench.real_data()[1], bench.info["classes"])
    run = Run(training, state, pinned)
    for _ in run.steps(train(method, world, **state, first=run.step)):
        pass
    return average, comparable(training), preparation + run.seconds


def distill(name, bench, out, resume, **changes):
    """(generator, its file's other entries) of a one-step method, in the folder `out`; `changes` of its settings."""
    s, folder = bench.s, Path(bench.s.out)
    changes = ONE_STEP[name] | changes
    if name == "sid" or changes.get("init_from"):
        path, generator, content = bench.un_erased(name)
        if name == "sid":
            return generator, content
        changes["init_from"] = os.path.relpath(path)  # what is recorded should not name the machine's folders
    if changes.get("teacher"):
        changes["teacher"] = os.path.relpath(folder / changes["teacher"] / "generator.pt")
        if not Path(changes["teacher"]).exists():
            raise BadInput(f"{name} starts from {changes['teacher']}, which is not there")
    settings = sfd_minimal.Settings(**{"forget": (s.forget,), "to": (s.to,)} | changes, data=s.data, seed=s.seed,
                                    device=s.device, out=str(out), save_every=s.save_every, resume=resume,
                                    overwrite=not resume)
    teacher, info = load_teacher(settings.teacher, s.data, bench.device)
    labels = ([], []) if settings.forget == ("none",) else ([bench.c_f], [bench.c_o])
    return sfd_minimal.train(settings, teacher, info, *labels)


def trained(name, bench, out, resume, **changes):
    """(network, its file's other entries) of any method, in the folder `out`; `changes` of its settings."""
    changes = TUNED.get((bench.s.data, name), {}) | changes
    if name not in bench.methods:
        return distill(name, bench, out, resume, **changes)
    network, settings, seconds = unlearn(name, bench.methods[name].changed(changes), bench, out, resume)
    return network, {"settings": settings, "seconds": seconds}


class Bench:
    """What all methods share: teacher, judges, labels, real data where a method asks for it; and what of it all is of
    labels, so that a comparison on something else overrides it."""

    def __init__(self, s):
        labels_only(s.data, "python -m lab.prompt_methods is the comparison there")
        self.s, self.device, self.methods = s, pick_device(s.device), METHODS
        self.teacher, self.info = load_teacher("", s.data, self.device)
        self.c_f, self.c_o = (label_number(word, self.info["classes"]) for word in (s.forget, s.to))
        if self.c_f == self.c_o:
            raise BadInput(f"--to {s.to} is itself to be forgotten: override it with a label that is kept")
        print(who([self.c_f], [self.c_o], self.info["classes"]))
        self.evaluator = Evaluator.find(self.teacher, self.info, [self.c_f], [self.c_o])
        if self.evaluator is None:
            raise BadInput(f"without judges of {s.data} there is nothing to compare")
        self._data, self._controls = None, {}

    def world(self, batch):
        return World(self.teacher, self.c_f, self.c_o, self.info.get("made_by", {}), batch, self.device, self.real_data)

    def real_data(self):
        if self._data is None:
            self._data = load_images(self.s.data, self.s.data_dir, self.info.get("size"), train=True)[:2]
        return self._data

    def un_erased(self, what):
        """`checkpoint.un_erased` of the teacher, which `what` needs; BadInput where there is none."""
        found = un_erased(self.info, self.device)
        if found is None:
            raise BadInput(f"{what} needs a one-step generator of {self.info['path']} that forgot nothing, "
                           "which is not there")
        return found

    def judge(self, generate, network, per_label, forgotten, what, erased=True, control=None):
        """The report on a network, with its distance to what the control in the file `control` draws."""
        counts = [forgotten if k == self.c_f else per_label for k in range(len(network.conditions))]
        measured = self.evaluator.measure(generate, network, counts, progress=f"judging {what}")
        return self.evaluator.report(measured, erased) | (self.distance(measured, control, counts) if control else {})

    def distance(self, measured, control, counts):
        """{"fd_control", "fd_control_kept"}: FD to what a network that never saw c_f draws under c_f, and under the
        labels to keep, from the same noise."""
        if control not in self._controls:
            generate, network, _ = load_generator(control, self.device)
            self._controls[control] = self.evaluator.measure(generate, network, counts, progress="judging the control")
        fd = lambda labels: frechet(*(moments(of["stats"], labels) for of in (measured, self._controls[control])))
        return {"fd_control": fd([self.c_f]), "fd_control_kept": fd(self.evaluator.kept)}

    def more(self, path, generate, network):
        """What else is to be said of the network at `path`."""
        return {}

    def picture(self, results, path):
        """One row of images per method: asked for c_f, and for a label to keep, from the same noise."""
        other, classes = next(k for k in self.evaluator.kept if k != self.c_o), self.info["classes"]
        methods_figure(self.drawn(results, torch.tensor([self.c_f] * 8 + [other] * 8)),
                       f"asked for {classes[self.c_f]}, to be forgotten (framed), and for {classes[other]}", path)

    def drawn(self, results, labels, conditions=None):
        """{method: (images, its numbers in words)}"""
        files = {"teacher": self.info["path"]} | {name: Path(self.s.out) / name / "generator.pt"
                                                  for name in results["methods"]}
        rows = {}
        for name, file in files.items():
            generate, network, _ = load_generator(file, self.device)
            m = results["teacher"] if name == "teacher" else results["methods"][name]
            rows[name] = (draw(generate, labels, network, seed=0, conditions=conditions),
                          f"UA {m['ua']:.1%}   kept {m['kept_accuracy']:.1%}   FD {m['fd']:.1f}")
        return rows


def run_method(name, bench):
    """Train and judge one method; its folder gets generator.pt and metrics.json. Returns the metrics."""
    s, out = bench.s, Path(bench.s.out) / name
    of = {"forget": bench.c_f, "to": bench.c_o, "teacher_sha256": bench.info["sha256"], "seed": s.seed,
          "per_label": s.per_label, "protocol": PROTOCOL}
    if s.resume and (out / "metrics.json").exists():
        row = json.loads((out / "metrics.json").read_text())
        refuse_changed(out, {k: row.get(k) for k in of}, of)
        return row
    resume = s.resume and (out / "checkpoint.pt").exists()
    print(f"{name}: {'going on' if resume else 'starting'} in {out}")
    network, content = trained(name, bench, out, resume)
    learned = bench.methods.get("retrain" if name == "retrain_sid" else name)
    content = {k: content[k] for k in ("settings", "seconds", "sigma_init") if k in content}
    content |= {"data": s.data, "classes": bench.info["classes"], "size": bench.info.get("size"),
                "forget": [bench.c_f], "to": [bench.c_o], "teacher_sha256": bench.info["sha256"],
                "machine": machine(bench.device)}
    save_atomically({"kind": "denoiser", **pack(network, half=True), **content}, out / "generator.pt")
    # what is judged is what is saved, half precision and all
    generate, network, saved = load_generator(out / "generator.pt", bench.device)
    control = out.parent / ("retrain_sid" if saved["nfe"] == 1 else "retrain") / "generator.pt"
    row = bench.judge(generate, network, s.per_label, 5 * s.per_label, name, erased=name != "sid",
                      control=control if control.exists() else None)
    row |= {"nfe": saved["nfe"], "real_data": learned.data if learned else "none", "seconds": content["seconds"],
            "settings": content["settings"]} | bench.more(out / "generator.pt", generate, network) | of
    (out / "metrics.json").write_text(json.dumps(row, indent=1) + "\n")
    return row


# --------------------------------------------------------------------------------------------------- all, side by side

def table(results):
    """Markdown: one row per method, the teacher first. Accuracies are judge B's, the settings were chosen by judge A;
    FD is in judge A's features; that to the control only where there is one."""
    far = {"fd_control": "FD to the control: c_f", "fd_control_kept": "kept"}
    far = {key: words for key, words in far.items() if any(key in m for m in results["methods"].values())}
    head = ["", "differs", "real images", "seconds", "NFE", "UA", "as override", "kept accuracy", "FD",
            "FD of the override", "precision", "recall", *far.values()]
    rows = []
    for name, m in {"teacher": results["teacher"], **results["methods"]}.items():
        differs = METHODS[name].differs if name in METHODS else ""
        rows.append([f"`{name}`", differs, m["real_data"], f"{m['seconds']:.0f}" if name != "teacher" else "", m["nfe"],
                     f"{m['ua_judge2']:.1%}", f"{m['override_share_judge2']:.1%}", f"{m['kept_accuracy_judge2']:.1%}",
                     f"{m['fd']:.1f}", f"{m['fd_override']:.1f}", f"{m['precision']:.3f}", f"{m['recall']:.3f}",
                     *(f"{abs(m[key]):.1f}" if key in m else "" for key in far)])
    return markdown(head, rows)


@dataclass
class Settings:
    forget: str = setting("0", "the label to forget")
    to: str = setting("1", "the label that the methods with an override draw instead")
    method: tuple = setting((*METHODS, *ONE_STEP), "methods to run", choices=(*METHODS, *ONE_STEP))
    data: str = setting("mnist", "data set that the teacher was trained on")
    data_dir: str = setting("data", "where torchvision keeps or downloads it, for the methods that need real images")
    per_label: int = setting(200, "images judged under each label to keep; five times as many under c_f", above=0)
    seed: int = setting(0, "random seed", at_least=0, below=2 ** 32)
    device: str = setting("auto", "auto, cpu, cuda or mps")
    out: str = setting("", "folder for the networks (default: runs/<data>-baselines-forget<f>-to<o>)")
    results: str = setting("", "file for the numbers, the figure beside it (default: results/<data>_baselines.json)")
    save_every: float = setting(30.0, "seconds between checkpoints", above=0)
    resume: bool = setting(False, "keep what is finished in the folder, and go on with the rest")
    overwrite: bool = setting(False, "replace what is in the folder")

    def __post_init__(self):
        check_ranges(self)
        if self.resume and self.overwrite:
            raise BadInput("--resume keeps what is finished and --overwrite replaces it: say one of them")
        self.out = self.out or f"runs/{run_name(self, 'baselines')}"
        self.results = self.results or f"results/{data_name(self.data)}_baselines.json"


def compare(bench, table):
    """Every method of bench.s: its folder, and its row in the file of results, the picture beside it and the table."""
    s, path = bench.s, Path(bench.s.results)
    if Path(s.out).exists() and not (s.resume or s.overwrite):
        raise BadInput(f"{s.out} holds a run already; continue it with --resume, replace it with --overwrite, "
                       "or choose another --out")
    teacher = bench.judge(many_step(bench.teacher), bench.teacher, s.per_label, 5 * s.per_label, "teacher",
                          erased=False) | {"nfe": TEACHER_NFE, "real_data": "all"}
    rows = {}
    for name in s.method:
        rows[name] = run_method(name, bench)
        results = {"forget": bench.c_f, "to": bench.c_o, "seed": s.seed, "per_label": s.per_label,
                   "protocol": PROTOCOL, "machine": machine(bench.device), "teacher": teacher, "methods": rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    bench.picture(results, path.with_suffix(".png"))
    print(table(results))


def main(argv):
    s = parse(Settings, argv, __doc__)
    compare(Bench(s), table)
    print(f"\nnext: python -m lab.audit {s.out}    # can it come back? needs real images")


if __name__ == "__main__":
    command(main)
