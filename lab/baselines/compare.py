"""One comparison of unlearning methods: one teacher, two judges, the same noise for every method."""
import copy
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from edm_unet import BadInput, command_line, machine, pack, pick_device, save_file
from lab import distill
from lab.baselines.methods import METHODS, ONE_STEP, TUNED, World
from lab.core.files import find_sid, load_any, load_teacher
from lab.core.images import class_counts, data_name, load_images
from lab.core.labels import describe, run_folder
from lab.core.options import check_ranges, comparable, setting
from lab.core.runs import Run, RunSettings, seed_everything
from lab.core.tables import markdown, read_json, write_json
from lab.evaluate.draw import TEACHER_NFE, draw_images, load_generator, sampler
from lab.evaluate.evaluator import PROTOCOL, Evaluator
from lab.evaluate.figures import methods_figure
from lab.evaluate.metrics import frechet, moments
from sfd_minimal import label_number, update_average


@dataclass
class Settings:
    forget: str = setting("0", "the label to forget")
    to: str = setting("1", "the label that the methods with an override draw instead")
    method: tuple = setting((*METHODS, *ONE_STEP), "methods to run", choices=(*METHODS, *ONE_STEP))
    data: str = setting("mnist", "data set of the teacher")
    data_dir: str = setting("data", "where torchvision keeps or downloads the data set, for methods with real images")
    per_label: int = setting(200, "images judged under each label to keep; five times as many under c_f", above=0)
    seed: int = setting(0, "random seed", at_least=0, below=2 ** 32)
    device: str = setting("auto", "auto, cpu, cuda or mps")
    out: str = setting("", "folder to write to (default: runs/<data>-baselines-forget<f>-to<o>)")
    save_every: float = setting(30.0, "seconds between checkpoints", above=0)
    resume: bool = setting(False, "keep the finished methods in the folder, and go on with the rest")

    def __post_init__(self):
        self.out = self.out or run_folder(data_name(self.data), "baselines", f"forget{self.forget}", f"to{self.to}")


class Comparison:
    """What all methods of a comparison share: teacher, labels, evaluator, real images.

    A variant for other conditions than labels overrides `methods`, `one_step`, `load` and the first group of methods.
    """
    methods, one_step = METHODS, ONE_STEP
    load = staticmethod(load_any)  # load(path, device) -> (network, info)

    def __init__(self, s):
        self.s, self.device = s, pick_device(s.device)
        self.teacher, self.info = self.load_teacher()
        self.learns = [p.requires_grad for p in self.teacher.parameters()]
        self.teacher.requires_grad_(False)
        self.c_f, self.c_o = self.read_labels()
        self.evaluator = self.find_evaluator()
        if self.evaluator is None:
            raise BadInput(f"a comparison needs judges of {s.data}")
        self._real_data, self._controls = None, {}

    # ------------------------------------------------------------------------------------- what depends on the labels

    def load_teacher(self, path=""):
        """(teacher, info) from a file, or of the data set."""
        return load_teacher(path, self.s.data, self.device)

    def read_labels(self):
        """Print and return (c_f, c_o): the label to forget and the label drawn instead."""
        classes = self.info["classes"]
        c_f, c_o = label_number(self.s.forget, classes), label_number(self.s.to, classes)
        if c_f == c_o:
            raise BadInput(f"--to {self.s.to} is itself to be forgotten: name a label to keep")
        print(describe([c_f], [c_o], classes))
        return c_f, c_o

    def find_evaluator(self):
        """The evaluator of this comparison, or None, with a note."""
        evaluator = Evaluator.find(self.teacher, self.info, [self.c_f], [self.c_o])
        if evaluator:
            evaluator.per_label = self.s.per_label
        return evaluator

    def world(self, batch):
        made_by = self.info.get("made_by", {})
        return World(self.teacher, self.c_f, self.c_o, made_by, batch, self.device, self.real_data)

    def recipe(self, forgets, init_from, anchored):
        """Settings of a one-step method, as of `lab.distill.recipe`."""
        return distill.recipe(self.s.data, forgets, init_from, anchored)

    def labels(self, forgets):
        """(override (N,), conditions (N, ...)) for `lab.distill.train`, or None for the labels c_f and c_o."""
        return None

    def questions(self):
        """What is drawn from every network: `Evaluator.questions`."""
        return self.evaluator.questions(forgotten=True)

    def distance_to(self, control, measured):
        """FD to the images of the network in the file `control`: under c_f, and under the labels to keep."""
        if control not in self._controls:
            generate, network, _ = load_generator(control, self.device, self.load)
            self._controls[control] = self.evaluator.measure(generate, network, self.questions(),
                                                             progress="measuring the control")
        distances = {}
        for name, labels in (("fd_control", [self.c_f]), ("fd_control_kept", self.evaluator.kept)):
            own, of_control = (moments(m["stats"], labels) for m in (measured, self._controls[control]))
            distances[name] = frechet(own, of_control)
        return distances

    def more(self, path, generate, network):
        """Further numbers {name: value} of the network in the file `path`."""
        return {}

    def picture(self, results, path):
        """Write a figure with a row of images for each method, under c_f and under another label."""
        others = [k for k in self.evaluator.kept if k != self.c_o]
        other = others[0] if others else self.c_o  # of two classes there is no third
        rows = self.images_of_methods(results, torch.tensor([self.c_f] * 8 + [other] * 8))
        to_forget, to_keep = (self.info["classes"][k] for k in (self.c_f, other))
        methods_figure(rows, f"label {to_forget}, to be forgotten (framed), and label {to_keep}", path)

    def table(self, results):
        """The numbers of a comparison as text."""
        return table(results)

    # -------------------------------------------------------------------------------- what all comparisons have alike

    def real_data(self):
        """(images uint8, labels) to train on."""
        if self._real_data is None:
            self._real_data = load_images(self.s.data, self.s.data_dir, self.info.get("size"), train=True)[:2]
        return self._real_data

    def start(self, method):
        """The network that a method changes. Weights that are frozen in the loaded teacher stay as they are."""
        network = copy.deepcopy(self.teacher)
        if method.from_scratch:
            network = type(self.teacher)(self.teacher.settings).to(self.device)
            network.bf16 = self.teacher.bf16
        for p, p_teacher, learns in zip(network.parameters(), self.teacher.parameters(), self.learns):
            p.requires_grad_(learns)
            if not learns:
                p.data.copy_(p_teacher)
        return network

    def find_sid(self, name):
        """(generator, info) of the teacher's plain SiD, for the method `name`. BadInput where there is none."""
        found = find_sid(self.info, self.device, self.load)
        if found is None:
            train = command_line("sfd_minimal.py", "--data", self.s.data, "--forget", "none")
            raise BadInput(f"{name} needs plain SiD of {self.info['path']}, a one-step generator that forgot nothing: "
                           f"train it with `{train}`")
        return found

    def judge(self, generate, network, name, erased=True, control=None):
        """Metrics of a network. control: file of a network that never saw c_f, to which the FD is measured too."""
        measured = self.evaluator.measure(generate, network, self.questions(), progress=f"measuring {name}")
        metrics = self.evaluator.report(measured, erased)
        return {**metrics, **self.distance_to(control, measured)} if control else metrics

    def images_of_methods(self, results, labels, conditions=None):
        """{method: (images under labels (N,), its numbers in words)}, for `methods_figure`."""
        files = {"teacher": self.info["path"]}
        for name in results["methods"]:
            files[name] = Path(self.s.out) / name / "generator.pt"
        rows = {}
        for name, file in files.items():
            generate, network, _ = load_generator(file, self.device, self.load)
            m = results["teacher"] if name == "teacher" else results["methods"][name]
            rows[name] = (draw_images(generate, labels, network, seed=0, conditions=conditions),
                          f"UA {m['ua']:.1%}   kept {m['kept_accuracy']:.1%}   FD {m['fd']:.1f}")
        return rows


# ---------------------------------------------------------------------------------------------------------- one method

@dataclass(kw_only=True)
class MethodSettings(RunSettings):
    """Everything that the network of a method depends on: a run with other settings is not resumed."""
    method: str
    forget: object
    to: object
    steps: int = setting(0, "", at_least=0)
    batch: int = setting(0, "", above=0)
    lr: float = setting(0.0, "", above=0)
    ema: float = setting(0.0, "", at_least=0, below=1)
    only: str
    options: dict


def train(method, world, network, average, optimizer, first=0):
    """Yield the loss of each step from number `first` on."""
    for step in range(first, method.steps):
        optimizer.param_groups[0]["lr"] = method.lr * (1 - step / method.steps)
        loss = method.loss(network, world)
        optimizer.zero_grad()
        loss.backward()
        for name, p in network.named_parameters():
            if name in world.mask:
                p.grad *= world.mask[name]
        optimizer.step()
        update_average(average, network, method.ema, step)
        yield {"loss": loss.detach()}


def run(comparison, name, method, out):
    """Train a method in the folder `out`. Returns (network, info): info are the entries of its file."""
    s = comparison.s
    settings = MethodSettings(
        method=name, forget=comparison.c_f, to=comparison.c_o, steps=method.steps, batch=method.batch, lr=method.lr,
        ema=method.ema, only=method.only, options=method.options, seed=s.seed, device=s.device, out=str(out),
        save_every=s.save_every, resume=s.resume)
    check_ranges(settings)
    seed_everything(s.seed)
    world = comparison.world(method.batch)
    for option, value in method.options.items():
        setattr(world, option, value)
    network = comparison.start(method)

    began = time.monotonic()
    method.before(network, world)
    preparation = time.monotonic() - began
    average = copy.deepcopy(network).eval().requires_grad_(False)
    for weight, p in network.named_parameters():
        if not re.search(method.only, weight):
            p.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], method.lr, betas=(0.9, 0.99),
                                 fused=True)
    state = {"network": network, "average": average, "optimizer": optimizer}
    pinned = {"teacher": comparison.info["sha256"]}
    if method.data != "none":
        pinned["images"] = class_counts(comparison.real_data()[1], comparison.info["classes"])
    training = Run(settings, state, pinned)
    for _ in training.steps(train(method, world, **state, first=training.step)):
        pass
    return average, {"settings": comparable(settings), "seconds": preparation + training.seconds}


def run_one_step(comparison, name, method, out):
    """`run` for a one-step method. Plain SiD of the teacher is not trained: it is the generator that is there."""
    s = comparison.s
    settings = {"forget": (s.forget,), "to": (s.to,)} if method.forgets else {"forget": ("none",), "to": ("random",)}
    init_from, teacher = "", ""
    if name == "sid" or method.from_sid:
        generator, info = comparison.find_sid(name)
        if name == "sid":
            return generator, info
        init_from = os.path.relpath(info["path"])  # a result should not name the folders of a machine
    if method.teacher:
        teacher = os.path.relpath(out.parent / method.teacher / "generator.pt")
        if not Path(teacher).exists():
            raise BadInput(f"{name} needs the network of the method {method.teacher}, {teacher}")
    settings |= comparison.recipe(method.forgets, init_from, method.anchored) | method.settings
    settings |= {"init_from": init_from, "teacher": teacher, "data": s.data, "seed": s.seed, "device": s.device,
                 "out": str(out), "save_every": s.save_every, "resume": s.resume}
    # loaded again: the comparison's own is frozen, and what is frozen does not learn
    network, info = comparison.load_teacher(teacher)
    c_f, c_o = ([comparison.c_f], [comparison.c_o]) if method.forgets else ([], [])
    return distill.train(distill.Settings(**settings), network, info, c_f, c_o, comparison.labels(method.forgets))


def in_words(change):
    """Settings {name: value} as text, such as "lr=0.001 eta=3"."""
    return " ".join(f"{name}={value:.6g}" for name, value in change.items())


def finished(path, fixed):
    """The metrics in a finished method's file; None where there are none. BadInput where they are of other settings."""
    if not path.exists():
        return None
    try:
        metrics = read_json(path)
    except BadInput as e:
        print(f"note: {e}")
        return None
    changed = [f"{key} was {metrics.get(key)!r} and is {value!r}" for key, value in fixed.items()
               if metrics.get(key) != value]
    if changed:
        raise BadInput(f"cannot resume {path.parent} with other settings: {'; '.join(changed)}")
    return metrics


def run_method(comparison, name, change=None):
    """Train and judge a method, or with s.resume take its finished metrics. Returns the metrics.

    Its folder gets generator.pt and metrics.json. change: other settings {name: value} of the method.
    """
    s, change = comparison.s, change or {}
    out = Path(s.out) / "-".join([name, *in_words(change).split()])
    fixed = {"forget": comparison.c_f, "to": comparison.c_o, "teacher_sha256": comparison.info["sha256"],
             "seed": s.seed, "per_label": s.per_label, "protocol": PROTOCOL}
    metrics = finished(out / "metrics.json", fixed)
    if metrics:
        return metrics
    print(f"{name} {in_words(change)}: {'going on' if (out / 'checkpoint.pt').exists() else 'starting'} in {out}")
    one_step = name in comparison.one_step
    method = (comparison.one_step if one_step else comparison.methods)[name]
    method = method.changed({**TUNED.get((s.data, name), {}), **change})
    network, info = (run_one_step if one_step else run)(comparison, name, method, out)

    content = {key: info[key] for key in ("settings", "seconds", "sigma_init") if key in info}
    content |= {"data": s.data, "classes": comparison.info["classes"], "size": comparison.info.get("size"),
                "forget": [comparison.c_f], "to": [comparison.c_o], "teacher_sha256": comparison.info["sha256"],
                "machine": machine(comparison.device)}
    out.mkdir(parents=True, exist_ok=True)
    save_file(out / "generator.pt", {**content, **pack(network, half=True)})
    # the network of the file is judged, with its weights in half precision
    generate, network, saved = load_generator(out / "generator.pt", comparison.device, comparison.load)
    control = out.parent / ("retrain_sid" if saved["nfe"] == 1 else "retrain") / "generator.pt"
    metrics = comparison.judge(generate, network, name, erased=name != "sid",
                               control=control if control.exists() else None)
    metrics |= {"nfe": saved["nfe"], "real_data": method.data, "seconds": info["seconds"], "settings": info["settings"]}
    metrics |= comparison.more(out / "generator.pt", generate, network)
    metrics |= fixed
    write_json(out / "metrics.json", metrics)
    return metrics


# ---------------------------------------------------------------------------------------------------- all methods

def table(results):
    """Markdown: one row for each method, the teacher first.

    Accuracies are those of judge 2, since judge 1 chose the settings. FD is in judge 1's features. The FD to the
    control is there where the control is.
    """
    methods = {**METHODS, **ONE_STEP}
    controls = {"fd_control": "FD to the control: c_f", "fd_control_kept": "kept"}
    controls = {key: title for key, title in controls.items() if any(key in m for m in results["methods"].values())}
    rows = []
    for name, m in {"teacher": results["teacher"], **results["methods"]}.items():
        differs = methods[name].differs if name in methods else ""
        seconds = "" if name == "teacher" else f"{m['seconds']:.0f}"
        row = [f"`{name}`", differs, m["real_data"], seconds, m["nfe"]]
        row += [f"{m[key]:.1%}" for key in ("ua_judge2", "override_share_judge2", "kept_accuracy_judge2")]
        row += [f"{m['fd']:.1f}", f"{m['fd'] / m['fd_floor']:.1f}", f"{m['fd_override']:.1f}"]
        row += ["" if m[key] is None else f"{m[key]:.3f}" for key in ("precision", "recall")]
        row += [f"{abs(m[key]):.1f}" if key in m else "" for key in controls]
        rows.append(row)
    return markdown(["", "differs", "real images", "seconds", "NFE", "UA", "override", "kept", "FD",
                     "FD / floor", "FD of the override", "precision", "recall", *controls.values()], rows)


def compare(comparison):
    """Run every method of comparison.s. Prints the table; writes comparison.json and .png into the folder s.out."""
    s, out = comparison.s, Path(comparison.s.out)
    if out.exists() and not s.resume:
        raise BadInput(f"{out} is there already: --resume goes on with it, --out names another folder")
    teacher = comparison.judge(sampler(comparison.teacher), comparison.teacher, "the teacher", erased=False)
    results = {"forget": comparison.c_f, "to": comparison.c_o, "seed": s.seed, "per_label": s.per_label,
               "protocol": PROTOCOL, "machine": machine(comparison.device),
               "teacher": teacher | {"nfe": TEACHER_NFE, "real_data": "all"}, "methods": {}}
    for name in s.method:
        results["methods"][name] = run_method(comparison, name)
        write_json(out / "comparison.json", results)
    comparison.picture(results, out / "comparison.png")
    print(comparison.table(results))
    print(f"numbers in {out / 'comparison.json'}, pictures in {out / 'comparison.png'}")
