"""What is said of images that were asked for with prompts, attribute by attribute: the digit by MNIST's judges, on the
ink alone, and the colour by its hue.

    python -m lab.prompt_judge --data-dir data    # how often digit and colour are read rightly on real inked digits

An FD is that of the ink, on the features of MNIST's first judge: what colour it has is left to the rule.
"""
import json
import random
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lab import prompts
from lab.checkpoint import digest, find_weights, measured_file, remembered, un_erased
from lab.cli import check_ranges, command, parse, setting
from lab.data import load_images, to_float, to_uint8
from lab.device import machine, pick_device, seed_everything
from lab.figures import curves_figure, samples_figure
from lab.frechet import frechet, moments
from lab.judge import load_judge
from lab.prompts import COLOURS, DIGITS, TEMPLATES, UNSEEN_TEMPLATES, captions, means, named
from lab.report import markdown, percent
from lab.run import lock
from lab.sample import TEACHER_NFE, draw, in_float32, many_step, one_step

PROTOCOL = 2      # as in lab.evaluate
COUNTS = dict(seen=100, unseen_templates=20, unseen_pairs=100, unseen_words=20, digit_alone=50,  # images of each thing
              colour_alone=50)
FORGOTTEN = dict(under=5000, under_unseen_templates=1000, other_word=1000)                       # images in all


# ------------------------------------------------------------------------------------------------- what is in an image

def ink_of(images):
    """The ink of images uint8 (N, 3, H, W): their largest channel, as bright as MNIST's, uint8 (N, 1, H, W)."""
    ink = images.amax(1, keepdim=True).float()
    return (255 * ink / ink.flatten(1).amax(1).clamp(min=1).view(-1, 1, 1, 1)).round().to(torch.uint8)


def colour_of(images):
    """(N,): the number of the colour of images uint8 (N, 3, H, W), or -1 for none: the one of the six whose hue is
    nearest to that of the mean pixel, where that has a saturation of a quarter at least."""
    r, g, b = mean = images.float().mean((2, 3)).T
    high, low = mean.amax(0), mean.amin(0)
    chroma = (high - low).clamp(min=1e-6)
    hue = torch.where(high == r, (g - b) / chroma % 6,
                      torch.where(high == g, (b - r) / chroma + 2, (r - g) / chroma + 4))
    return torch.where(high - low >= high.clamp(min=1) / 4, (hue.round() % 6).long(), -1)


@torch.no_grad()
def read(judge, images, batch=500):
    """(digit (N,), features (N, 128) half) of the ink of images, on the CPU."""
    device = next(judge.parameters()).device
    parts = [judge(to_float(ink_of(part).to(device))) for part in images.split(batch)]
    logits, features = (torch.cat(of).cpu() for of in zip(*parts))
    return logits.argmax(1), features.half()


# --------------------------------------------------------------------------------------------------------- the question

def evenly(found, count):
    """`count` prompts for each thing that one of the captions `found` asks for, in as many of its forms as that
    allows."""
    forms = {}
    for caption in found:
        forms.setdefault(tuple(sorted(means(named(caption)).items())), {})[caption] = None
    return [list(of)[i * len(of) // count] for of in forms.values() for i in range(count)]


def pair(concept):
    return concept["digit"], concept["colour"]


def asked_of_all():
    """{set: [prompt, ...]}: the images that every network is asked for, whatever it has forgotten."""
    def those(kinds, templates=TEMPLATES, held_out=False):
        return [caption for caption, *_ in captions(templates, held_out) if named(caption).keys() == kinds]
    both, of_pair = {"digit", "colour"}, lambda caption: pair(means(named(caption))) in prompts.UNSEEN_PAIRS
    held_out = those(both, held_out=True)
    sets = {"seen": those(both), "unseen_templates": those(both, UNSEEN_TEMPLATES),
            "unseen_pairs": [caption for caption in held_out if of_pair(caption)],
            "unseen_words": [caption for caption in held_out if not of_pair(caption)],
            "digit_alone": those({"digit"}), "colour_alone": those({"colour"})}
    return {name: evenly(found, COUNTS[name]) for name, found in sets.items()}


def asked_of_forgotten(forgotten):
    """{set: [prompt, ...]}: under the forgotten words in templates that were trained on, each about equally often, and
    in others, and under other words for the same. Their order is random, so that the first are like the rest."""
    seen, others = ([caption for caption, *_ in captions(of)] for of in (TEMPLATES, UNSEEN_TEMPLATES))
    says = lambda c: any(f.items() <= named(c).items() for f in forgotten)
    implies = lambda c: any(means(f).items() <= means(named(c)).items() for f in forgotten)
    sets = {"under": [c for c in seen if says(c)], "under_unseen_templates": [c for c in others if says(c)],
            "other_word": [c for c in seen + others if implies(c) and not says(c)]}
    mixed = {name: random.Random(0).sample(of, len(of)) for name, of in sets.items() if of}
    return {name: [of[i % len(of)] for i in range(FORGOTTEN[name])] for name, of in mixed.items()}


# --------------------------------------------------------------------------------------------- from readings to numbers

def share(hits):
    return hits.float().mean().item() if len(hits) else None


def right(record, rows, kind):
    """Whether the attribute `kind` of images (rows,) is what their prompt says."""
    said = torch.tensor([means(named(record["prompts"][i]))[kind] for i in record["asked"][rows].tolist()])
    return record[kind][rows] == said


def has(record, rows, concept, digit="digit"):
    """Whether images (rows,) show all that a concept names."""
    return torch.stack([record[digit if kind == "digit" else kind][rows] == value
                        for kind, value in means(concept).items()]).all(0)


def saying(record, forgotten, same_words):
    """For each forgotten concept the rows (N,) of a record whose prompts say it, with its words or with any."""
    says = lambda f, c: f.items() <= named(c).items() if same_words else means(f).items() <= means(named(c)).items()
    return [torch.tensor([says(f, c) for c in record["prompts"]])[record["asked"]] for f in forgotten]


def forgetting(record, forgotten, overrides, same_words=True):
    """Of the images whose prompts say a forgotten concept, the shares that do not show it, that show its override, and
    that have the other attribute that the prompt names, if it names one that is to be kept; and how many they are. The
    second judge knows digits, and has no opinion on a colour alone."""
    gone, gone2, replaced, other = [], [], [], []
    says = saying(record, forgotten, same_words)
    for f, to, rows in zip(forgotten, overrides, says):
        gone.append(~has(record, rows, f))
        gone2 += [~has(record, rows, f, "digit2")] if "digit" in f else []
        replaced.append(torch.stack([has(record, rows, o) for o in to]).any(0))
        for kind in {"digit", "colour"} - f.keys():
            names = torch.tensor([kind in named(c) for c in record["prompts"]])[record["asked"]]
            for g, too in zip(forgotten, says):
                names &= ~too if kind in g else True
            other.append(right(record, rows & names, kind))
    mean = lambda parts: share(torch.cat(parts)) if parts else None
    return {"ua": mean(gone), "ua_judge2": mean(gone2), "override_share": mean(replaced),
            "other_attribute": mean(other), "n_forgotten": sum(map(len, gone))}


def metrics(measured, reference, floor, forgotten, overrides):
    """The numbers of a verdict, a plain dict, from the records of `asked_of_all` and, of a network that has forgotten
    something, `asked_of_forgotten`. Images are kept whose prompts say no forgotten concept, in whatever words."""
    out = {"n": sum(len(of["asked"]) for of in measured.values())}
    for name in (name for name in COUNTS if name in measured):
        record = measured[name]
        rows = ~torch.stack([torch.zeros(len(record["asked"]), dtype=torch.bool),
                             *saying(record, forgotten, same_words=False)]).any(0)
        kinds = named(record["prompts"][0]).keys()
        hits = {kind: right(record, rows, kind) for kind in kinds}
        out[name] = {kind: share(of) for kind, of in hits.items()} | {"n": int(rows.sum())}
        if len(hits) == 2:
            out[name]["both"] = share(hits["digit"] & hits["colour"])
        if name == "seen":
            said = [pair(means(named(record["prompts"][i]))) for i in record["asked"][rows].tolist()]
            digits, colours = map(torch.tensor, zip(*said))
            out["per_digit"] = [share(hits["digit"][digits == k]) for k in range(10)]
            out["per_colour"] = [share(hits["colour"][colours == k]) for k in range(6)]
            f = record["features"][rows].double()
            own = f.mean(0), f.T @ f / len(f) - f.mean(0).outer(f.mean(0))
            real, held_out = (moments(of, list(range(10)), digits.bincount(minlength=10)) for of in (reference, floor))
            out |= {"kept_accuracy": out[name]["both"], "fd": frechet(own, real), "fd_floor": frechet(held_out, real)}
    if forgotten:
        out |= forgetting(measured.get("under", measured["seen"]), forgotten, overrides)
        for name, same_words in (("under_unseen_templates", True), ("other_word", False)):
            if name in measured:
                out[name] = forgetting(measured[name], forgotten, overrides, same_words)
    return out


class PromptEvaluator:
    """MNIST's judges, the rule for colours, and the question of which concepts were forgotten."""

    def __init__(self, teacher, info, forgotten, overrides, seed=1000):
        self.paths = [find_weights("mnist", "judge"), find_weights("mnist", "judge2")]
        self.device = teacher.conditions.device
        (self.judge, about), (self.judge2, _) = (load_judge(path, self.device) for path in self.paths)
        self.reference, self.floor = about["train"], about["test"]
        self.origin = {"data": "mnist", "accuracy": about["accuracy"], "sha256": digest(*self.paths)}
        self.teacher, self.info, self.words, self.seed = teacher, info, teacher.settings.words, seed
        self.forgotten, self.overrides = forgotten, overrides

    def measure(self, generate, network, sets, progress=None):
        """{set: record} of sets {set: [prompt, ...]}: a record has the prompts, the number of each image's among them,
        what the judges read in it, and that of "seen" the features of the ink."""
        found = {}
        for name, asked in sets.items():
            own = list(dict.fromkeys(asked))
            place = {prompt: i for i, prompt in enumerate(own)}
            rows = torch.tensor([place[prompt] for prompt in asked])
            with in_float32(network):
                images = draw(generate, rows, network, self.seed, conditions=prompts.tokens(own, self.words),
                              progress=progress and f"{progress}: {name.replace('_', ' ')}")
            digit, features = read(self.judge, images)
            found[name] = {"prompts": own, "asked": rows, "digit": digit, "digit2": read(self.judge2, images)[0],
                           "colour": colour_of(images)} | ({"features": features} if name == "seen" else {})
        return found

    def report(self, measured):
        return metrics(measured, self.reference, self.floor, self.forgotten, self.overrides)

    def probe(self, generator, sigma_init):
        """A quick look at a generator in training: every fifth image of "seen", and 500 under what is forgotten."""
        sets = {"seen": asked_of_all()["seen"][::5]}
        sets |= {"under": asked_of_forgotten(self.forgotten)["under"][:500]} if self.forgotten else {}
        numbers = self.report(self.measure(one_step(generator, sigma_init), generator, sets))
        return {name: numbers[name] for name in ("ua", "kept_accuracy", "fd") if name in numbers}

    def known(self, path, generate, network, what):
        """`measure` of a file that does not change, on `asked_of_all`, remembered beside it."""
        key = {"files": digest(path, *self.paths), "protocol": PROTOCOL, "counts": COUNTS, "dtype": "float32"}
        return remembered(measured_file(path), key, lambda: {
            "machine": machine(self.device), "sets": self.measure(generate, network, asked_of_all(), what)})["sets"]

    def beside(self):
        """{name: metrics}: the teacher, and the one-step generator of this teacher that has forgotten nothing."""
        rows = {"teacher": self.report(self.known(self.info["path"], many_step(self.teacher), self.teacher,
                                                  "judging the teacher, once")) | {"nfe": TEACHER_NFE}}
        if self.forgotten and (found := un_erased(self.info, self.device)):
            path, generator, info = found
            rows["un_erased"] = self.report(self.known(path, one_step(generator, info["sigma_init"]), generator,
                                                       "judging the un-erased generator, once"))
            rows["un_erased"] |= {"nfe": 1, "seconds": info["seconds"]}
        return rows

    def verdict(self, out, generator, content):
        """Judge a generator beside its teacher; `content`: the other entries of its file. Prints the table; writes
        metrics.json, samples.png and curves.png into `out`. Returns the metrics."""
        out, began, generate = Path(out), time.perf_counter(), one_step(generator, content["sigma_init"])
        with lock(out):
            own = self.report(self.measure(generate, generator, asked_of_all() | asked_of_forgotten(self.forgotten),
                                           "judging the generator")) | {"nfe": 1}
            rows = self.beside()
            result = own | {"seconds": content["seconds"], "seconds_judging": time.perf_counter() - began,
                            "protocol": PROTOCOL, "judge": self.origin, **rows,
                            "forget": content["forget"], "to": content["to"], "settings": content["settings"],
                            "trained_on": content["machine"], "machine": machine(self.device)}
            (out / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
            print(table(rows | {"this generator": own}), end="\n\n")
            print(f"{own['n']} images of this generator judged; FD, of the ink, is "
                  f"{own['fd'] / rows['teacher']['fd']:.2f} times the teacher's, "
                  f"{own['fd_floor']:.2f} of held-out real digits")
            self.pictures(out, generate, generator, rows["teacher"])
            print(f"trained in {result['seconds']:.0f} s, judged in {result['seconds_judging']:.0f} s; "
                  f"numbers in {out / 'metrics.json'}, pictures beside it\n"
                  f"next: python -m lab.sample {shlex.quote(str(out))} --prompt \"a red zero\" --out zeros.png")
        return result

    def pictures(self, out, generate, generator, teacher):
        asked, conditions = prompts.grid(self.words)
        panels = {}
        for title, of, network in ((f"teacher, {TEACHER_NFE} evaluations", many_step(self.teacher), self.teacher),
                                   ("generator, 1 evaluation", generate, generator)):
            with in_float32(network):
                panels[title] = draw(of, asked, network, self.seed, conditions=conditions)
        rows = [DIGITS[f["digit"]] for f in self.forgotten if f.keys() == {"digit"}]
        samples_figure(panels, list(DIGITS)[:10], rows, out / "samples.png")
        if (out / "log.csv").exists():
            curves_figure(out / "log.csv", teacher | {"n": teacher["seen"]["n"]}, out / "curves.png",
                          probe="20 images per digit and colour")


COLUMNS = {"UA": ("ua",), "UA, judge 2": ("ua_judge2",), "as override": ("override_share",),
           "other attribute": ("other_attribute",), "UA, unseen templates": ("under_unseen_templates", "ua"),
           "UA, other word": ("other_word", "ua"), "kept: digit": ("seen", "digit"), "kept: colour": ("seen", "colour"),
           "unseen templates": ("unseen_templates", "both"), "unseen pairs": ("unseen_pairs", "both"), "FD": ("fd",),
           "NFE": ("nfe",)}


def table(rows):
    """Markdown table of metrics, one row per generator."""
    def value(row, path):
        for key in path:
            row = row.get(key) if row else None
        return row
    columns = {title: path for title, path in COLUMNS.items()
               if any(value(row, path) is not None for row in rows.values())}
    form = {"FD": "{:.2f}".format, "NFE": str}
    cell = lambda row, title: "" if (v := value(row, columns[title])) is None else form.get(title, percent)(v)
    return markdown(["", *columns], [[name.replace("un_erased", "un-erased one-step"),
                                      *[cell(row, title) for title in columns]] for name, row in rows.items()])


@dataclass
class Settings:
    data_dir: str = setting("data", "where torchvision keeps MNIST")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    __post_init__ = check_ranges


def main(argv):
    s = parse(Settings, argv, __doc__)
    device = pick_device(s.device)
    images, labels, _ = load_images("prompts", s.data_dir, None, train=False)
    seed_everything(0)
    colours = torch.arange(len(images)) % 6
    inked = to_uint8(prompts.inked(images, colours))
    said = {"colour": colour_of(inked) == colours}
    for name in ("judge", "judge2"):
        judge, _ = load_judge(find_weights("mnist", name), device)
        said[f"digit, {name}"] = read(judge, inked)[0] == labels
    print(f"of {len(images)} held-out digits in ink, read rightly: "
          + ", ".join(f"{what} {percent(share(of))}" for what, of in said.items()))


if __name__ == "__main__":
    command(main)
