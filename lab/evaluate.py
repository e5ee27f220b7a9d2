"""What the judges say of a generator: unlearning accuracy (UA), kept accuracy, Frechet distance (FD), recall.

    python -m lab.evaluate runs/mnist-forget0-to1    # prints the verdict; writes metrics.json and samples.png there

An FD is measured on the 128 features of this project's own judge. It is no FID; compare it only with the floor beside
it, which is the FD of held-out real images. Every set of images is first reduced to `class_stats`, and every number
comes from those.
"""
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lab.checkpoint import (digest, find_weights, load_checkpoint, load_teacher, measured_file, remembered,
                            un_erased)
from lab.cli import check_ranges, command, parse, setting
from lab.data import class_names, data_name
from lab.device import machine, pick_device
from lab.errors import BadInput
from lab.fid import fid_of
from lab.figures import curves_figure, samples_figure
from lab.frechet import frechet, moments, precision_recall
from lab.judge import class_stats, load_judge
from lab.prompt_judge import PromptEvaluator
from lab.report import markdown, percent
from lab.run import lock
from lab.sample import TEACHER_NFE, draw, in_float32, many_step, one_step

PER_LABEL = 1000  # images judged under each label, five times as many under a forgotten one
SHOWN = 20        # of them, those that the pictures show
PROTOCOL = 2      # of drawing and judging; 2: the same z for the same label everywhere, float32 for every network


# ------------------------------------------------------------------------------------------- from statistics to numbers

def metrics(measured, reference, floor, c_f, c_o, erased=True):
    """The numbers of a verdict: a plain dict.

    measured: "stats" by the first judge and "confusion2" by the second; reference and floor: the stats of training and
    of held-out images; c_f, c_o as of `label_numbers`. fd_override is of the images under the forgotten labels, or, of
    a network that has not erased them, under those to be drawn instead.
    """
    stats, confusion, K = measured["stats"], measured["stats"]["confusion"], len(measured["stats"]["confusion"])
    kept = [k for k in range(K) if k not in c_f]
    asked = [o for t in c_o for o in (kept if t < 0 else [t])]  # what the forgotten labels should show now
    accuracy, accuracy2 = (c.diag() / c.sum(1) for c in (confusion, measured["confusion2"]))
    real, fake = (s["features"][kept].flatten(0, 1).float() for s in (reference, stats))
    precision, recall = precision_recall(real, fake)
    out = {"kept_accuracy": accuracy[kept].mean().item(), "kept_accuracy_judge2": accuracy2[kept].mean().item(),
           "per_class_accuracy": accuracy.tolist(), "entropy": stats["entropy"].tolist(),
           "fd": frechet(moments(stats, kept), moments(reference, kept)),
           "fd_floor": frechet(moments(floor, kept), moments(reference, kept)),
           "precision": precision, "recall": recall, "n": int(confusion.sum())}
    if c_f:
        replaced = lambda of: torch.stack([of[f, kept if t < 0 else [t]].sum() / of[f].sum()
                                           for f, t in zip(c_f, c_o)]).mean().item()
        out |= {"ua": 1 - accuracy[c_f].mean().item(), "ua_judge2": 1 - accuracy2[c_f].mean().item(),
                "override_share": replaced(confusion), "override_share_judge2": replaced(measured["confusion2"]),
                "fd_override": frechet(moments(stats, c_f if erased else asked), moments(reference, asked)),
                "fd_override_floor": frechet(moments(floor, asked), moments(reference, asked)),
                "n_forgotten": int(confusion[c_f].sum())}
    return out


# ---------------------------------------------------------------------------------------------- from models to numbers

class Evaluator:
    """Both judges of a data set, and the question of which labels were forgotten."""

    def __init__(self, data, device, c_f, c_o, seed=1000):
        self.paths = [find_weights(data, "judge"), find_weights(data, "judge2")]
        if None in self.paths:
            raise BadInput(f"no judges for {data}: train them with `python -m lab.judge --data {data}`")
        (self.judge, info), (self.judge2, _) = (load_judge(p, device) for p in self.paths)
        self.reference, self.floor, self.classes = info["train"], info["test"], info["classes"]
        self.device, self.c_f, self.c_o, self.seed = device, c_f, c_o, seed
        self.origin = {"data": info["data"], "accuracy": info["accuracy"], "sha256": digest(*self.paths)}
        self.kept = [k for k in range(len(self.classes)) if k not in c_f]

    @classmethod
    def find(cls, teacher, info, c_f, c_o):
        """The Evaluator of what a teacher draws, which it will stand beside (`info` as of `load_teacher`); None, and a
        note, where there is none. A `PromptEvaluator`, where it is asked with prompts."""
        if info["data"] == "prompts":
            return PromptEvaluator(teacher, info, c_f, c_o)
        if None in (find_weights(info["data"], "judge"), find_weights(info["data"], "judge2")):
            return print(f"note: no judges of {info['data']}, so that this run will not be judged: train them with "
                         f"`python -m lab.judge --data {info['data']}`, then `python -m lab.evaluate` its folder")
        evaluator = cls(info["data"], teacher.conditions.device, c_f, c_o)
        if misfit := evaluator.misfit(teacher, info["classes"]):
            return print(f"note: {misfit}; this run will not be judged")
        if (n := evaluator.reference["features"][evaluator.kept].flatten(0, 1).shape[0]) < 4:
            print(f"note: the judges know {n} real images of the kept labels: precision and recall, which need 4, "
                  "will be missing, and an FD from so few says little")
        if data_name(evaluator.origin["data"]) != data_name(info["data"]):
            print(f"note: the judges learned from {evaluator.origin['data']}, "
                  f"and are right on {evaluator.origin['accuracy']:.2%} of its held-out images")
        evaluator.teacher, evaluator.info = teacher, info
        return evaluator

    def misfit(self, network, classes):
        """In words, that the judges know images of another shape or other labels than the network draws;
        empty if they know its. A network whose classes are numbers may have any names."""
        j = self.judge.settings
        words = lambda K, C, H, W: f"{K} classes of {C}x{H}x{W} images"
        draws = words(len(network.conditions), *network.shape)
        knows = words(j["num_classes"], j["channels"], j["resolution"], j["resolution"])
        if draws != knows:
            return f"the teacher draws {draws}, the judge knows {knows}"
        unnamed = classes == class_names("", len(classes))
        return "" if unnamed or list(classes) == list(self.classes) else (
            f"the teacher's labels are {' '.join(classes)}, the judge's {' '.join(self.classes)}")

    def measure(self, generate, network, counts, progress=None):
        """What both judges see in counts[k] images under each label k: "stats" (`class_stats`) by the first,
        "confusion2" by the second, and "samples", the first 20 of each label, or fewer."""
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        with in_float32(network):
            images = draw(generate, labels, network, self.seed, progress=progress)
        return {"stats": class_stats(self.judge, images, labels),
                "confusion2": class_stats(self.judge2, images, labels, keep=0)["confusion"],
                "samples": torch.cat([images[labels == k][:min(SHOWN, *counts)] for k in range(len(counts))])}

    def report(self, measured, erased=True):
        return metrics(measured, self.reference, self.floor, self.c_f, self.c_o, erased)

    def probe(self, generator, sigma_init, per_label=100):
        """A quick look at a generator in training: UA, kept accuracy and an FD
        that is biased upwards by its small sample."""
        labels = torch.arange(len(self.classes)).repeat_interleave(per_label)
        with in_float32(generator):
            images = draw(one_step(generator, sigma_init), labels, generator, self.seed)
        stats = class_stats(self.judge, images, labels, keep=0)
        accuracy = stats["confusion"].diag() / per_label
        forgotten = {"ua": 1 - accuracy[self.c_f].mean().item()} if self.c_f else {}
        return forgotten | {"kept_accuracy": accuracy[self.kept].mean().item(),
                            "fd": frechet(moments(stats, self.kept), moments(self.reference, self.kept))}

    def known(self, path, generate, network, per_label, what):
        """`measure` of a file that does not change, remembered beside it with what it depends on: that file, the
        judges, the protocol and the dtype."""
        K, key = len(network.conditions), {"files": digest(path, *self.paths), "protocol": PROTOCOL, "dtype": "float32"}
        return remembered(measured_file(path), key, lambda: {
            "per_label": per_label, "machine": machine(self.device),
            **self.measure(generate, network, [per_label] * K, progress=what)},
            enough=lambda content: content["per_label"] >= per_label)

    def beside(self, per_label):
        """({name: metrics}, samples of the teacher): what stands beside every erased generator, the teacher and the
        one-step generator that forgot nothing."""
        teacher = self.known(self.info["path"], many_step(self.teacher), self.teacher, per_label,
                             "judging the teacher, once")
        rows = {"teacher": self.report(teacher, erased=False) | {"nfe": TEACHER_NFE,
                                                                 "seconds": self.info.get("seconds")}}
        if self.c_f and (found := un_erased(self.info, self.device)):
            path, generator, info = found
            measured = self.known(path, one_step(generator, info["sigma_init"]), generator, per_label,
                                  "judging the un-erased generator, once")
            rows["un_erased"] = self.report(measured, erased=False) | {"nfe": 1, "seconds": info["seconds"]}
        return rows, teacher["samples"]

    def verdict(self, out, generator, content, per_label=None):
        """Judge a generator beside its teacher; `content`: the other entries of its file. Prints the table; writes
        metrics.json, samples.png and, where there is a log, curves.png into `out`. Returns the metrics."""
        with lock(out):
            return self._verdict(Path(out), generator, content, per_label or PER_LABEL)

    def _verdict(self, out, generator, content, per_label):
        began = time.perf_counter()
        counts = [5 * per_label if k in self.c_f else per_label for k in range(len(self.classes))]
        measured = self.measure(one_step(generator, content["sigma_init"]), generator, counts, "judging the generator")
        own, (rows, teacher_samples) = self.report(measured) | {"nfe": 1}, self.beside(per_label)
        result = own | {"seconds": content["seconds"], "seconds_judging": time.perf_counter() - began,
                        "protocol": PROTOCOL, "judge": self.origin, "teacher": rows["teacher"],
                        "un_erased": rows.get("un_erased"), "forget": self.c_f, "to": self.c_o,
                        "settings": content["settings"], "trained_on": content["machine"],
                        "machine": machine(self.device)}
        (out / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
        rows["this generator"] = own
        print(table(rows), per_class_table(rows, self.classes), sep="\n\n", end="\n\n")
        print(f"{result['n']} images of this generator judged ({per_label} per label"
              + (f", {5 * per_label} per forgotten label" if self.c_f else "")
              + f"); FD is {own['fd'] / rows['teacher']['fd']:.2f} times the teacher's, "
              f"{own['fd_floor']:.2f} of held-out real images")
        samples_figure({f"teacher, {TEACHER_NFE} evaluations": teacher_samples,
                        "generator, 1 evaluation": measured["samples"]}, self.classes, self.c_f, out / "samples.png")
        if (out / "log.csv").exists():
            curves_figure(out / "log.csv", rows["teacher"], out / "curves.png")
        print(f"trained in {result['seconds']:.0f} s, judged in {result['seconds_judging']:.0f} s; "
              f"numbers in {out / 'metrics.json'}, pictures beside it")
        if self.c_f:
            print(f"next: python -m lab.audit {out}    # can it come back? needs real images")
        return result


COLUMNS = {"UA": ("ua", percent), "as override": ("override_share", percent), "UA, judge 2": ("ua_judge2", percent),
           "kept accuracy": ("kept_accuracy", percent), "FD": ("fd", "{:.2f}".format),
           "FD of the override": ("fd_override", "{:.1f}".format), "precision": ("precision", "{:.3f}".format),
           "recall": ("recall", "{:.3f}".format), "NFE": ("nfe", str)}


def table(rows):
    """Markdown table of metrics, one row per generator."""
    columns = {title: c for title, c in COLUMNS.items() if any(c[0] in r for r in rows.values())}
    cell = lambda row, key, form: "" if row.get(key) is None else form(row[key])
    return markdown(["", *columns], [[name.replace("un_erased", "un-erased one-step"),
                                      *[cell(row, *column) for column in columns.values()]]
                                     for name, row in rows.items()])


def per_class_table(rows, classes):
    """Markdown table of the share of each label's images that are judged as that label."""
    return markdown(["judged as its label, %", *classes],
                    [[name.replace("un_erased", "un-erased one-step"),
                      *[f"{100 * a:.1f}" for a in row["per_class_accuracy"]]] for name, row in rows.items()])


@dataclass
class Settings:
    run: str = setting("", "the folder of a run of sfd_minimal.py", positional=True)
    per_label: int = setting(None, f"images judged under each label (None: {PER_LABEL}); five times as many under a "
                             "forgotten one", above=0)
    teacher: str = setting("", "its teacher, if it is no longer where it was")
    fid: bool = setting(False, "the literature's FID as well, of generator and teacher (lab.fid): for a GPU")
    data_dir: str = setting("data", "where the training images are, for --fid")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    __post_init__ = check_ranges


def main(argv):
    s = parse(Settings, argv, __doc__)
    run = Path(s.run).parent if Path(s.run).is_file() else Path(s.run)
    path = run / "generator.pt"
    if not path.exists():
        raise BadInput(f"{s.run} holds no generator.pt")
    generator, content = load_checkpoint(path, pick_device(s.device))
    if not {"settings", "sigma_init", "teacher_sha256"} <= content.keys():
        raise BadInput(f"{path} is not the generator of a run of sfd_minimal.py")
    data, device = content["data"], generator.conditions.device
    if data == "prompts" and (s.per_label or s.fid):
        raise BadInput("--per-label and --fid are for networks that are asked with labels")
    teacher, info = load_teacher(s.teacher or content["settings"]["teacher"], data, device)
    if info["sha256"] != content["teacher_sha256"]:
        raise BadInput(f"{info['path']} is not the teacher that {s.run} was distilled from: name it with --teacher")
    evaluator = Evaluator.find(teacher, info, content["forget"], content["to"])
    if evaluator is None:
        raise BadInput(f"{s.run} was not judged")
    result = evaluator.verdict(run, generator, content, *[s.per_label] * bool(s.per_label))
    if s.fid:
        for row, file, generate, network, of in (
                (result, path, one_step(generator, content["sigma_init"]), generator, content),
                (result["teacher"], info["path"], many_step(teacher), teacher, info)):
            row |= fid_of(generate, network, of, s.data_dir, device)
            print(f"FID of {file}: {row['fid']:.2f}, {row['n_fid']} images")
        (run / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    command(main)
