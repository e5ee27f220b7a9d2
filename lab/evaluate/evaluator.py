"""The evaluation of a one-step generator: its images under every label, compared with those of its teacher.

Each set of images is reduced to statistics by both judges. All metrics come from these statistics.
"""
import copy
import time
from pathlib import Path

import torch

from edm_unet import BadInput, command_line, digest, load_network, machine, pick_device
from lab.core.files import cached, find_sid, find_weights, in_folder, load_teacher, measured_file
from lab.core.tables import markdown, spread, write_json
from lab.evaluate.draw import TEACHER_NFE, draw_images, in_float32, sampler
from lab.evaluate.figures import curves_figure, samples_figure
from lab.evaluate.judges import class_stats, load_judge
from lab.evaluate.metrics import label_metrics

BUDGET = 10_000  # images of a network that has forgotten nothing, under all labels together
DRAWING = 2   # version of drawing and judging; 2: a label has the same noise in every network, float32 everywhere
PROTOCOL = 3  # version of the metrics; 3: fd_override is of `per_label` images of a label to forget, as of all labels
SHOWN = 20    # images of each label in the pictures
ROW_NAMES = {"teacher": "teacher", "sid": "plain SiD", "generator": "this generator"}


class Evaluator:
    """Both judges of a data set, a teacher, and the labels to forget.

    teacher, info: as from `lab.core.files.load_teacher`. c_f, c_o: numbers of the labels to forget and of their
    overrides, -1 for a random kept label. BadInput where there are no judges. A variant for other conditions than
    labels overrides `questions`, `measure`, `report`, `cache_key`, `tables`, `pictures` and, for `find`, `misfit`.
    """
    per_label = 1000  # images of each label, or fewer within the BUDGET; five times as many of a label to forget
    judges_of = None  # data set of the judges, where it is not the teacher's
    load = staticmethod(load_network)

    def __init__(self, teacher, info, c_f, c_o, seed=1000):
        data = self.judges_of or info["data"]
        self.paths = [find_weights(data, "judge"), find_weights(data, "judge2")]
        if None in self.paths:
            raise BadInput(f"no judges for {data}: train them with "
                           f"`{command_line('-m', 'lab.judge', '--data', data)}`")
        self.teacher, self.info, self.c_f, self.c_o, self.seed = teacher, info, c_f, c_o, seed
        self.device = teacher.conditions.device
        self.judge, content = load_judge(self.paths[0], self.device)
        self.judge2, _ = load_judge(self.paths[1], self.device)
        self.reference, self.floor, self.classes = content["train"], content["test"], content["classes"]
        self.kept = [k for k in range(len(self.classes)) if k not in c_f]
        share = max(1, BUDGET // len(self.classes))
        self.per_label, self.per_probe = min(self.per_label, share), min(100, max(1, share // 10))
        self.origin = {"data": content["data"], "accuracy": content["accuracy"], "sha256": digest(*self.paths)}

    @classmethod
    def find(cls, teacher, info, c_f, c_o):
        """The Evaluator of a teacher; None, with a note, where there are no judges of its images and labels."""
        try:
            evaluator = cls(teacher, info, c_f, c_o)
        except BadInput as e:
            print(f"note: not evaluated: {e}")
            return None
        misfit = evaluator.misfit()
        if misfit:
            print(f"note: not evaluated: {misfit}")
            return None
        n = evaluator.reference["features"][evaluator.kept].flatten(0, 1).shape[0]
        if n < 4:
            print(f"note: the judges have seen {n} real images of the kept labels. An FD from so few says little, and "
                  "precision and recall need 4")
        return evaluator

    def misfit(self):
        """In words, that the judges classify other images or labels than the teacher draws. Empty if they fit."""
        s, names = self.judge.settings, self.info["classes"]
        judged = (s["num_classes"], s["channels"], s["resolution"], s["resolution"])
        drawn = (len(self.teacher.conditions), *self.teacher.shape)
        if drawn != judged:
            K, *shape = drawn
            K_judge, *judge_shape = judged
            return f"the teacher draws {K} labels of shape {shape}, the judges classify {K_judge} of {judge_shape}"
        unnamed = list(names) == [str(k) for k in range(len(names))]
        if unnamed or list(names) == list(self.classes):
            return ""
        return f"the teacher's labels are {' '.join(names)}, the judges' {' '.join(self.classes)}"

    # ------------------------------------------------------------------------------------- what depends on the labels

    def questions(self, forgotten, quick=False):
        """Number of images to draw under each label.

        forgotten: more under the labels to forget, as for a generator that has forgotten them. quick: for a look at a
        generator in training.
        """
        if quick:
            return [self.per_probe] * len(self.classes)
        counts = [self.per_label] * len(self.classes)
        for k in self.c_f if forgotten else []:
            counts[k] = 5 * self.per_label
        return counts

    def measure(self, generate, network, questions, progress=None):
        """Draw the images of `questions` and judge them. Returns a dict of tensors, which is all that `report` needs.

        generate(z, c) -> images. "stats": of the first judge; "confusion2": of the second; "samples": the first 20
        images of each label, or fewer. The moments are of `per_label` images of each label at most: more images make
        an FD smaller.
        """
        labels = torch.arange(len(questions)).repeat_interleave(torch.tensor(questions))
        with in_float32(network):
            images = draw_images(generate, labels, network, self.seed, progress=progress)
        shown = min(SHOWN, *questions)
        return {"stats": class_stats(self.judge, images, labels, moments_of=self.per_label),
                "confusion2": class_stats(self.judge2, images, labels, keep=0)["confusion"],
                "samples": torch.cat([images[labels == k][:shown] for k in range(len(questions))])}

    def report(self, measured, erased=True):
        """The metrics of what `measure` returned. erased: whether the network has forgotten the labels."""
        return label_metrics(measured, self.reference, self.floor, self.c_f, self.c_o, erased)

    def cache_key(self):
        """What cached measurements depend on, besides the files, the drawing and `per_label`."""
        return {}

    def tables(self, rows):
        """The metrics of `rows` {name: metrics} as text."""
        return f"{metrics_table(rows)}\n\n{label_table(rows, self.classes)}"

    def pictures(self, out, generate, generator, rows, measured):
        """Write evaluation.png and, where there is a log, curves.png into `out`.

        rows, measured: {name: metrics} and {name: what `measure` returned} of "teacher" and "generator".
        """
        panels = {f"teacher, {TEACHER_NFE} evaluations": measured["teacher"]["samples"],
                  "generator, 1 evaluation": measured["generator"]["samples"]}
        samples_figure(panels, self.classes, self.c_f, out / "evaluation.png")
        if (out / "log.csv").exists():
            curves_figure(out / "log.csv", rows["teacher"], out / "curves.png", f"{self.per_probe} images per label")

    # ----------------------------------------------------------------------------------- what all evaluations share

    def announce(self, draws=1):
        """Print how many images an evaluation draws. Nothing for a variant that draws no labels."""
        if not self.per_label:
            return
        of_each = f"{self.per_label} under each label"
        if self.c_f:
            of_each += f" to keep and {5 * self.per_label} under each label to forget"
        if draws > 1:
            of_each += f", {draws} times from other noise"
        print(f"The evaluation draws {sum(self.questions(forgotten=True))} images of this generator, {of_each}. "
              f"The teacher's {sum(self.questions(forgotten=False))} images are drawn once.")

    def probe(self, generator, sigma_init):
        """UA, kept accuracy and FD of few images of a generator in training. So few images make the FD too large."""
        generate = sampler(generator, sigma_init)
        numbers = self.report(self.measure(generate, generator, self.questions(forgotten=True, quick=True)))
        return {name: numbers[name] for name in ("ua", "kept_accuracy", "fd") if name in numbers}

    def measure_file(self, path, generate, network, progress):
        """`measure` of a network that has forgotten nothing, cached next to its file at `path`."""
        key = {"kind": "measured", "files": digest(path, *self.paths), "protocol": DRAWING, "dtype": "float32",
               **self.cache_key()}

        def make():
            return {"per_label": self.per_label, "machine": machine(self.device),
                    **self.measure(generate, network, self.questions(forgotten=False), progress)}

        def enough(content):
            return content.get("per_label", 0) >= self.per_label

        return cached(measured_file(path), key, make, enough)

    def reference_rows(self):
        """({name: metrics}, {name: measured}) of the networks that have forgotten nothing.

        They are the teacher and, where labels are forgotten and there is one, "sid": the teacher's generator by plain
        SiD.
        """
        measured = {"teacher": self.measure_file(self.info["path"], sampler(self.teacher), self.teacher,
                                                 "measuring the teacher, once")}
        rows = {"teacher": self.report(measured["teacher"], erased=False)}
        rows["teacher"] |= {"nfe": TEACHER_NFE, "seconds": self.info.get("seconds")}
        found = find_sid(self.info, self.device, self.load) if self.c_f else None
        if found:
            sid, info = found
            measured["sid"] = self.measure_file(info["path"], sampler(sid, info["sigma_init"]), sid,
                                                "measuring plain SiD, once")
            rows["sid"] = self.report(measured["sid"], erased=False) | {"nfe": 1, "seconds": info["seconds"]}
        return rows, measured

    def with_seed(self, seed):
        """Return this evaluator with another seed of the noise."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def evaluate(self, out, generator, info, draws=1):
        """Evaluate a one-step generator. Print the tables. Returns the metrics.

        Writes metrics.json and the pictures into the folder `out`. info: the other entries of the generator's file.
        draws: how often the generator's images are drawn, each time from other noise. The metrics are of the
        first draw.
        """
        self.announce(draws)
        began = time.perf_counter()
        out, generate = Path(out), sampler(generator, info["sigma_init"])
        drawn = []
        for seed in range(self.seed, self.seed + draws):
            drawn.append(self.with_seed(seed).measure(generate, generator, self.questions(forgotten=True),
                                                      "measuring the generator"))
        reports = [self.report(found) for found in drawn]
        numbers = reports[0] | {"nfe": 1}
        rows, measured = self.reference_rows()
        result = numbers | {
            "seconds": info["seconds"], "seconds_judging": time.perf_counter() - began, "protocol": PROTOCOL,
            "judge": self.origin, "teacher": rows["teacher"], "sid": rows.get("sid"), "forget": self.c_f,
            "to": self.c_o, "settings": info["settings"], "trained_on": info["machine"],
            "machine": machine(self.device)}
        if draws > 1:
            result["draws"] = reports
        write_json(out / "metrics.json", result)
        rows["generator"], measured["generator"] = numbers, drawn[0]
        self.pictures(out, generate, generator, rows, measured)
        forgotten = f", {numbers['n_forgotten']} of them under forgotten labels" if self.c_f else ""
        print(f"\n{self.tables(rows)}\n\n"
              f"{numbers['n']} images of this generator were judged{forgotten}.\n"
              f"The FD is {numbers['fd'] / rows['teacher']['fd']:.2f} times the teacher's. "
              f"Held-out real images have an FD of {numbers['fd_floor']:.2f}.\n"
              f"Training took {result['seconds']:.0f} s, the evaluation {result['seconds_judging']:.0f} s. "
              f"Numbers are in {out / 'metrics.json'}, pictures in {out / 'evaluation.png'}.")
        if draws > 1:
            print(f"\nThis generator's images were drawn {draws} times from other noise, the teacher's images once.\n"
                  f"Mean over the draws, with the smallest and the largest value:\n\n{draws_table(reports)}")
        return result


# ------------------------------------------------------------------------------------------------------------- tables

COLUMNS = {"UA": ("ua", "{:.2%}"), "override": ("override_share", "{:.2%}"), "UA, judge 2": ("ua_judge2", "{:.2%}"),
           "kept": ("kept_accuracy", "{:.2%}"), "FD": ("fd", "{:.2f}"), "FD of the override": ("fd_override", "{:.1f}"),
           "precision": ("precision", "{:.3f}"), "recall": ("recall", "{:.3f}"), "NFE": ("nfe", "{}")}


def metrics_table(rows):
    """Markdown table of {name: metrics}, a row for each network."""
    columns = {title: column for title, column in COLUMNS.items() if any(column[0] in row for row in rows.values())}
    lines = []
    for name, row in rows.items():
        cells = ["" if row.get(key) is None else form.format(row[key]) for key, form in columns.values()]
        lines.append([ROW_NAMES.get(name, name), *cells])
    return markdown(["", *columns], lines)


def draws_table(reports):
    """Markdown table of the metrics of several draws of one generator: the mean of each and its range."""
    columns = {title: COLUMNS[title] for title in ("UA", "override", "kept", "FD", "FD of the override", "recall")}
    cells = {}
    for title, (key, form) in columns.items():
        values = [report[key] for report in reports if report.get(key) is not None]
        if values:
            cells[title] = spread(values, form)
    return markdown(list(cells), [list(cells.values())])


def label_table(rows, classes):
    """Markdown table of the share of each label's images that the first judge takes for that label, in %."""
    lines = []
    for name, row in rows.items():
        lines.append([ROW_NAMES.get(name, name), *[f"{100 * share:.1f}" for share in row["per_class_accuracy"]]])
    return markdown(["judged as its label, %", *classes], lines)


# ---------------------------------------------------------------------------------------------- the evaluation of a run

def evaluate_run(out, teacher_path="", per_label=None, device="auto", draws=1):
    """Evaluate the generator.pt in the folder of a run. Returns its metrics; None, with a note, without judges.

    teacher_path: the teacher's file, where it is not where it was. draws: as of `Evaluator.evaluate`. BadInput where
    the folder has no generator, or the teacher is another one than the generator's.
    """
    path = in_folder(out, "generator.pt")
    if not path.exists():
        raise BadInput(f"{out} holds no generator.pt")
    generator, info = load_network(path, pick_device(device))
    if not {"settings", "sigma_init", "teacher_sha256"} <= info.keys():
        raise BadInput(f"{path} is not the generator of a run of sfd_minimal.py")
    teacher_path = teacher_path or info["settings"]["teacher"]
    if teacher_path and not Path(teacher_path).exists():
        raise BadInput(f"the teacher of {out} is not at {teacher_path}: name its file with --teacher")
    teacher, teacher_info = load_teacher(teacher_path, info["data"], generator.conditions.device)
    if teacher_info["sha256"] != info["teacher_sha256"]:
        raise BadInput(f"{teacher_info['path']} is not the teacher of {out}: name its file with --teacher")
    evaluator = Evaluator.find(teacher, teacher_info, info["forget"], info["to"])
    if evaluator is None:
        return None
    evaluator.per_label = per_label or evaluator.per_label
    result = evaluator.evaluate(path.parent, generator, info, draws)
    if evaluator.c_f:
        audit = command_line("-m", "lab.audit", path.parent)
        print(f"next: {audit}    # can attacks bring the forgotten class back?")
    return result
