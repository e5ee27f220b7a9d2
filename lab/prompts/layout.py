"""Measure whether images keep their layout when a concept is forgotten, as the abstract of All but One claims.

    python -m lab.prompts.layout                                  # all methods from three seeds; --resume goes on
    python -m lab.prompts.layout --tune                           # with the best of four settings of each method
    python -m lab.prompts.layout --sfd runs/prompts-forgetzero-toone

A network that forgot a concept draws under prompts with the concept. The teacher draws under the same prompts from the
same noise. Each pair of images is compared by overlap, centroid, width and colour of the ink. For chance, the images
are also compared with the teacher's from other noise.

All but One has three alternatives: another digit, nothing, and another colour. A word for a digit can only be
overridden by a word for a digit. The alternative of another colour therefore forgets the pair "red zero", with the
override "blue zero".
"""
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from edm_unet import BadInput, command, machine
from lab.baselines.compare import Comparison, run_method
from lab.baselines.grid import best
from lab.baselines.methods import all_of
from lab.core.files import find_sid, in_folder
from lab.core.options import parse, setting
from lab.core.tables import markdown, spread, write_json
from lab.evaluate.draw import draw_images, in_float32, load_generator, sampler
from lab.prompts import compare
from lab.prompts.captions import describe, exchange, read_concepts, tokens
from lab.prompts.evaluator import colour_of, common_prompts, forgotten_prompts, ink_of, look_up, read_digits
from lab.prompts.network import load_prompt_network
from train_teacher import to_float

CASES = (("zero", "one", ("retrain", "uce", "esd_cross", "all_but_one", "all_but_one_to_nothing")),
         ("red zero", "blue zero", ("uce", "all_but_one")))  # what is forgotten, what is drawn instead, methods
NOISE = 1000             # seed of the noise of all images that are reported; the other noise has the next seed
UNPROMPTED = 50          # images with no prompt
TRAINED = ("all_but_one", "all_but_one_to_nothing", "esd_cross")  # the methods that --tune chooses settings for
TRIED = all_of(lr=(3e-4, 1e-3), steps=(50, 200))
TUNING_SEED, TUNING_NOISE = 100, 2000


# ------------------------------------------------------------------------------------------------------- the measures

def inked_pixels(images):
    """Pixels (N, H, W) with more than half of the brightest ink, of images uint8 (N, 3, H, W)."""
    return ink_of(images)[:, 0] > 127


def overlap(a, b):
    """Intersection over union (N,) of inked pixels (N, H, W)."""
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1)


def centroid(pixels):
    """Mean (row, column) of inked pixels (N, H, W): (N, 2). (0, 0) where there are none."""
    n = pixels.sum((1, 2)).clamp(min=1)
    row, column = (torch.arange(size, dtype=torch.float32) for size in pixels.shape[1:])
    return torch.stack([(pixels.sum(2) * row).sum(1) / n, (pixels.sum(1) * column).sum(1) / n], 1)


def stroke_width(pixels):
    """2 area / boundary (N,) of inked pixels (N, H, W): the width in pixels of a long stroke along a row or a column.

    boundary: the number of sides of pixels between ink and no ink. Slanted strokes have more of them, and so appear
    thinner.
    """
    padded = F.pad(pixels.float(), (1, 1, 1, 1))
    boundary = padded.diff(dim=1).abs().sum((1, 2)) + padded.diff(dim=2).abs().sum((1, 2))
    return 2 * pixels.sum((1, 2)) / boundary.clamp(min=1)


def compare_images(images, reference):
    """Compare images uint8 (N, 3, H, W) with the reference image of each. Returns means over the pairs.

    overlap: of inked pixels, 1 is equal. centroid: distance of the centroids in pixels. width: difference of the stroke
    widths in pixels, without sign. colour: share of the images with the colour of their reference, by `colour_of`.
    """
    a, b = inked_pixels(images), inked_pixels(reference)
    values = {"overlap": overlap(a, b), "centroid": (centroid(a) - centroid(b)).norm(dim=1),
              "width": (stroke_width(a) - stroke_width(b)).abs(),
              "colour": (colour_of(images) == colour_of(reference)).float()}
    return {name: value.mean().item() for name, value in values.items()}


def drift(images, reference):
    """Root mean square difference of images uint8, over pixels in [-1, 1]."""
    return (to_float(images) - to_float(reference)).square().mean().sqrt().item()


# ------------------------------------------------------------------------------------------------------ the comparison

class LayoutComparison(compare.PromptComparison):
    """A comparison on captions that measures the layout. c_f may be a pair too.

    s.per_label: images under prompts with the concept. noise: seed of the noise of all images.
    """

    def __init__(self, s, noise):
        Comparison.__init__(self, s)  # not PromptComparison's, which draws images that are not needed here
        self.evaluator.seed = noise
        self.prompts = forgotten_prompts([self.c_f])["under"][:s.per_label]
        self.texts = list(dict.fromkeys(self.prompts))
        generate = sampler(self.teacher)
        self.of_teacher = self.images(generate, self.teacher)
        self.at_other_noise = self.images(generate, self.teacher, shift=1)

    def read_labels(self):
        (c_f,), (c_o,) = read_concepts((self.s.forget,), (self.s.to,))
        print(describe([c_f], [c_o]))
        return c_f, c_o

    def questions(self):
        """A part of the kept prompts by which a run is evaluated. `judge` adds the prompts with the concept."""
        sets = common_prompts()
        return {"seen": sets["seen"][::50], "unseen_pairs": sets["unseen_pairs"][::5]}

    def images(self, generate, network, shift=0, texts=None):
        """{"under": images under the prompts with the concept, "empty": images with no prompt}, uint8.

        shift: added to the seed of the noise. texts: drawn in the place of self.texts, from the same noise.
        """
        noise = self.evaluator.seed + shift
        rows = torch.tensor([self.texts.index(prompt) for prompt in self.prompts])
        words = self.teacher.settings.words
        with in_float32(network):
            under = draw_images(generate, rows, network, noise, conditions=tokens(texts or self.texts, words))
            empty = draw_images(generate, torch.zeros(UNPROMPTED, dtype=torch.long), network, noise,
                                conditions=tokens([""], words))
        return {"under": under, "empty": empty}

    def layout(self, images, reference):
        """What `images` and `reference`, both as of `self.images`, have in common."""
        return {"layout": compare_images(images["under"], reference["under"]),
                "drift": drift(images["empty"], reference["empty"])}

    def judge(self, generate, network, name, erased=True, control=None):
        """Metrics of a network by the first judge, in "judge2" those by the second, and the layout."""
        images = self.images(generate, network)
        under, judges = images["under"], (self.evaluator.judge, self.evaluator.judge2)
        digit, digit2 = (read_digits(judge, under)[0] for judge in judges)
        sets = self.evaluator.measure(generate, network, self.questions(), progress=f"measuring {name}")["sets"]
        sets["under"] = {"prompts": self.prompts, "digit": digit, "digit2": digit2, "colour": colour_of(under)}
        by_second = {key: {**record, "digit": record["digit2"]} for key, record in sets.items()}
        return {**self.evaluator.report({"sets": sets}), "judge2": self.evaluator.report({"sets": by_second}),
                **self.layout(images, self.of_teacher),
                "layout_other_noise": compare_images(under, self.at_other_noise["under"])}

    def more(self, path, generate, network):
        return {}


def references(comparison):
    """{row: [numbers]} of the teacher: at the noise of all, at other noise, and under the override's words."""
    generate, teacher = sampler(comparison.teacher), comparison.teacher
    texts = [exchange(text, comparison.c_f, comparison.c_o[0]) for text in comparison.texts]
    exchanged = comparison.images(generate, teacher, texts=texts)
    return {"teacher": [comparison.judge(generate, teacher, "the teacher")],
            "teacher, other noise": [comparison.layout(comparison.at_other_noise, comparison.of_teacher)],
            "teacher, words of the override": [comparison.layout(exchanged, comparison.of_teacher)]}


def one_step_rows(comparison, paths):
    """{row: [numbers]} of SFD's runs, and of plain SiD where there is one.

    One step makes other images of the same noise than 35 do. SFD is therefore compared with plain SiD too. BadInput
    where a file holds no one-step generator that forgot the concept.
    """
    rows, own_images = {"sfd": []}, []
    for path in paths:
        path = in_folder(path, "generator.pt")
        generate, network, info = load_generator(path, comparison.device, load_prompt_network)
        if info["nfe"] > 1 or info.get("forget") != [comparison.c_f]:
            raise BadInput(f"--sfd {path} is no one-step generator that has forgotten {comparison.s.forget!r}")
        rows["sfd"].append(comparison.judge(generate, network, "SFD"))
        own_images.append(comparison.images(generate, network))
    found = find_sid(comparison.info, comparison.device, load_prompt_network)
    if found:
        generate, network = sampler(found[0], found[1]["sigma_init"]), found[0]
        rows["sid"] = [comparison.judge(generate, network, "plain SiD")]
        of_sid = comparison.images(generate, network)
        rows["sfd, compared with sid"] = [comparison.layout(images, of_sid) for images in own_images]
    return rows


# --------------------------------------------------------------------------------------------------------- the program

COLUMNS = {"UA": ("judge2", "ua"), "override": ("judge2", "override_share"), "kept": ("judge2", "kept_accuracy"),
           "unseen pairs": ("judge2", "unseen_pairs", "both"), "overlap": ("layout", "overlap"),
           "overlap, other noise": ("layout_other_noise", "overlap"), "centroid": ("layout", "centroid"),
           "width": ("layout", "width"), "colour stays": ("layout", "colour"), "drift": ("drift",)}
SHARES = ("UA", "override", "kept", "unseen pairs", "colour stays")


def table(results):
    """Markdown: mean and range over the runs of each row, for each concept."""
    lines = []
    for case in results["cases"]:
        for name, runs in case["rows"].items():
            cells = []
            for column, path in COLUMNS.items():
                values = [value for value in (look_up(run, path) for run in runs) if value is not None]
                cells.append(spread(values, "{:.1%}" if column in SHARES else "{:.2f}") if values else "")
            lines.append([f"{case['forget']} to {case['to']}: {name}", len(runs), *cells])
    return markdown(["", "runs", *COLUMNS], lines)


@dataclass
class Settings:
    method: tuple = setting(CASES[0][2], "methods to run", choices=CASES[0][2])
    seeds: tuple = setting(("0", "1", "2"), "seeds of the trainings")
    control: tuple = setting(("0",), "seeds of the retrained control, whose training takes longest")
    sfd: tuple = setting((), "runs of SFD that forgot zero: folders or generators' files, one for each seed")
    tune: bool = setting(False, "choose each method's learning rate and steps first, among four settings")
    images: int = setting(100, "images under prompts with the concept", above=0)
    data_dir: str = setting("data", "where torchvision keeps or downloads MNIST, for the control")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    out: str = setting("runs/prompts-layout", "folder to write to")
    resume: bool = setting(False, "keep the finished runs in the folder, and go on with the rest")


def begin(s, forget, to, noise):
    """The comparison on one concept."""
    return LayoutComparison(compare.Settings(forget=forget, to=to, data_dir=s.data_dir, per_label=s.images,
                                             device=s.device, out=s.out, resume=True), noise)


def run_seed(comparison, name, seed, change, folder):
    """`run_method` from a seed, with its runs in `folder`."""
    comparison.s = replace(comparison.s, seed=seed, out=str(folder))
    return run_method(comparison, name, change)


def tune(s):
    """{method: settings}: the best of TRIED for forgetting zero, chosen by the first judge as in `lab.baselines.grid`.

    Seed and noise are not those of the reported runs.
    """
    forget, to, _ = CASES[0]
    comparison, chosen = begin(s, forget, to, TUNING_NOISE), {}
    for name in TRAINED:
        if name not in s.method:
            continue
        rows = [run_seed(comparison, name, TUNING_SEED, change, Path(s.out) / "tuning") | {"change": change}
                for change in TRIED]
        chosen[name] = best(rows)["change"]
        print(f"best settings of {name}: {chosen[name]}")
    return chosen


def main(argv):
    s = parse(Settings, argv, __doc__)
    out = Path(s.out)
    if not all(word.isdecimal() and int(word) < 2 ** 32 for word in s.seeds + s.control):
        raise BadInput(f"seeds are numbers from 0 to 2^32 - 1, not {' '.join(s.seeds + s.control)}")
    if out.exists() and not s.resume:
        raise BadInput(f"{out} is there already: --resume goes on with it, --out names another folder")
    chosen = tune(s) if s.tune else {}
    results = {"images": s.images, "noise": NOISE, "tuned": chosen, "cases": []}
    for forget, to, names in CASES:
        comparison = begin(s, forget, to, NOISE)
        results["machine"] = machine(comparison.device)
        rows = references(comparison)
        results["cases"].append({"forget": forget, "to": to, "rows": rows})
        if s.sfd and (forget, to) == CASES[0][:2]:
            rows |= one_step_rows(comparison, s.sfd)
        for name in names:
            if name not in s.method:
                continue
            rows[name] = []
            for seed in map(int, s.control if name == "retrain" else s.seeds):
                folder = out / f"{forget}-seed{seed}".replace(" ", "-")
                rows[name].append(run_seed(comparison, name, seed, chosen.get(name), folder))
                write_json(out / "layout.json", results)
        write_json(out / "layout.json", results)
    print(table(results))
    print(f"numbers in {out / 'layout.json'}")


if __name__ == "__main__":
    command(main)
