"""The evaluation of a generator that reads prompts: the digit and the colour of its images, compared with the prompt's.

    python -m lab.prompts.evaluator --data-dir data    # how often both are read correctly from real digits in ink

MNIST's judges read the digit from the ink alone. A rule reads the colour from the hue. An FD is that of the ink, on the
features of MNIST's first judge. It does not measure the colour.
"""
import random
from dataclasses import dataclass

import torch

from edm_unet import command, pick_device
from lab.core.files import find_weights
from lab.core.images import to_uint8
from lab.core.options import parse, setting
from lab.core.runs import seed_everything
from lab.core.tables import markdown, percent
from lab.evaluate.draw import TEACHER_NFE, draw_images, in_float32, sampler
from lab.evaluate.evaluator import ROW_NAMES, Evaluator
from lab.evaluate.figures import curves_figure, samples_figure
from lab.evaluate.judges import load_judge
from lab.evaluate.metrics import frechet, moments
from lab.prompts.captions import (DIGITS, FIRST_DIGITS, TEMPLATES, UNSEEN_PAIRS, UNSEEN_TEMPLATES, captions, grid,
                                  inked, means, named_words, names, numbers, tokens)
from lab.prompts.network import load_prompt_network
from train_teacher import load_known, to_float

# images of each digit, colour or pair in the sets of prompts that every network draws
COUNTS = dict(seen=100, unseen_templates=20, unseen_pairs=100, unseen_words=20, digit_alone=50, colour_alone=50)
# images in all in the sets for a network that has forgotten something
FORGOTTEN = dict(under=5000, under_unseen_templates=1000, other_word=1000)
NOT_NAMED, NO_COLOUR = -2, -1  # in the place of a number


# ----------------------------------------------------------------------------------------------- what an image shows

def ink_of(images):
    """The ink of images uint8 (N, 3, H, W), as bright as MNIST's digits: uint8 (N, 1, H, W)."""
    ink = images.amax(1, keepdim=True).float()
    return (255 * ink / ink.flatten(1).amax(1).clamp(min=1).view(-1, 1, 1, 1)).round().to(torch.uint8)


def colour_of(images):
    """Number of the colour of images uint8 (N, 3, H, W): (N,).

    The colour is the one with the hue nearest to that of the mean pixel. NO_COLOUR where the mean pixel's saturation is
    below a quarter.
    """
    mean = images.float().mean((2, 3)).T
    r, g, b = mean
    high, low = mean.amax(0), mean.amin(0)
    chroma = (high - low).clamp(min=1e-6)
    green_or_blue = torch.where(high == g, (b - r) / chroma + 2, (r - g) / chroma + 4)
    hue = torch.where(high == r, (g - b) / chroma % 6, green_or_blue)
    return torch.where(high - low >= high.clamp(min=1) / 4, (hue.round() % 6).long(), NO_COLOUR)


@torch.no_grad()
def read_digits(judge, images, batch=500):
    """(digit (N,), features (N, 128) float16) of the ink of images uint8 (N, 3, H, W), on the CPU."""
    device = next(judge.parameters()).device
    parts = [judge(to_float(ink_of(part).to(device))) for part in images.split(batch)]
    logits = torch.cat([part for part, _ in parts]).cpu()
    features = torch.cat([part for _, part in parts]).cpu()
    return logits.argmax(1), features.half()


# ------------------------------------------------------------------------------------------------- the sets of prompts

def evenly(texts, count):
    """`count` prompts for each meaning of the texts, spread over the texts of that meaning."""
    texts_of = {}
    for text in texts:
        meaning = tuple(sorted(numbers(named_words(text)).items()))
        texts_of.setdefault(meaning, {})[text] = None
    prompts = []
    for same in texts_of.values():
        same = list(same)
        prompts += [same[i * len(same) // count] for i in range(count)]
    return prompts


def common_prompts():
    """{set: prompts}: what every network draws, whatever it has forgotten."""
    def texts(kinds, templates=TEMPLATES, held_out=False):
        return [c.text for c in captions(templates, held_out) if named_words(c.text).keys() == kinds]

    def has_unseen_pair(text):
        meaning = numbers(named_words(text))
        return (meaning["digit"], meaning["colour"]) in UNSEEN_PAIRS

    both = {"digit", "colour"}
    held_out = texts(both, held_out=True)
    sets = {"seen": texts(both), "unseen_templates": texts(both, UNSEEN_TEMPLATES),
            "unseen_pairs": [text for text in held_out if has_unseen_pair(text)],
            "unseen_words": [text for text in held_out if not has_unseen_pair(text)],
            "digit_alone": texts({"digit"}), "colour_alone": texts({"colour"})}
    return {name: evenly(found, COUNTS[name]) for name, found in sets.items()}


def forgotten_prompts(forgotten):
    """{set: prompts}: what a network draws that has forgotten concepts.

    "under": texts of training captions with the words of the concepts. "under_unseen_templates": those of the other
    templates. "other_word": other words of the same meaning. All texts of a set are about equally frequent. Their order
    is random, so that the first prompts are a fair sample of all.
    """
    seen = [caption.text for caption in captions(TEMPLATES)]
    unseen = [caption.text for caption in captions(UNSEEN_TEMPLATES)]

    def named(text):
        return any(names(text, concept) for concept in forgotten)

    def meant(text):
        return any(means(text, concept) for concept in forgotten)

    sets = {"under": [text for text in seen if named(text)],
            "under_unseen_templates": [text for text in unseen if named(text)],
            "other_word": [text for text in seen + unseen if meant(text) and not named(text)]}
    prompts = {}
    for name, texts in sets.items():
        if texts:
            mixed = random.Random(0).sample(texts, len(texts))
            prompts[name] = [mixed[i % len(mixed)] for i in range(FORGOTTEN[name])]
    return prompts


# --------------------------------------------------------------------------------------------- from readings to metrics
# A record has the prompt of each of N images, the "digit" (N,) that the first judge reads, the "digit2" (N,) that the
# second judge reads, the "colour" (N,), and for the set "seen" the "features" (N, 128) of the ink.

def share(hits):
    """Share of true entries; None where there are no entries."""
    return hits.float().mean().item() if len(hits) else None


def any_of(masks, record):
    """The images (N,) of a record that are in one of the masks (N,)."""
    found = torch.zeros(len(record["prompts"]), dtype=torch.bool)
    for mask in masks:
        found |= mask
    return found


def named_numbers(record, kind):
    """(N,) number of the digit or colour that each prompt names, or NOT_NAMED."""
    found = [numbers(named_words(prompt)) for prompt in record["prompts"]]
    return torch.tensor([meaning.get(kind, NOT_NAMED) for meaning in found])


def images_with(record, concept, test):
    """(N,) whether test(prompt, concept) holds: `names` or `means`."""
    return torch.tensor([test(prompt, concept) for prompt in record["prompts"]])


def shows(record, concept, digit="digit"):
    """(N,) whether the images show all that a concept names."""
    hits = [record[digit if kind == "digit" else kind] == number for kind, number in numbers(concept).items()]
    return torch.stack(hits).all(0)


def forgetting(record, forgotten, overrides, test=names):
    """Metrics of images whose prompts have a forgotten concept, by `names` or `means`.

    ua: share that do not show the concept; ua_judge2: the same by the second judge, None for colours. override_share:
    share that show an override. other_attribute: share with the colour that the prompt names where a digit is
    forgotten, and the other way round; None where prompts name nothing else that is kept.
    """
    gone, gone2, replaced, other = [], [], [], []
    under = [images_with(record, concept, test) for concept in forgotten]
    for concept, others, rows in zip(forgotten, overrides, under):
        gone.append(~shows(record, concept)[rows])
        if "digit" in concept:
            gone2.append(~shows(record, concept, "digit2")[rows])
        replaced.append(any_of([shows(record, other_concept) for other_concept in others], record)[rows])
        for kind in {"digit", "colour"} - concept.keys():
            named = named_numbers(record, kind)
            to_forget = any_of([mask for mask, f in zip(under, forgotten) if kind in f], record)
            chosen = rows & (named != NOT_NAMED) & ~to_forget
            other.append((record[kind] == named)[chosen])
    return {"ua": share(torch.cat(gone)),
            "ua_judge2": share(torch.cat(gone2)) if gone2 else None,
            "override_share": share(torch.cat(replaced)),
            "other_attribute": share(torch.cat(other)) if other else None,
            "n_forgotten": sum(len(part) for part in gone)}


def accuracy(record, kept):
    """Shares of the images in the mask kept (N,) with the digit, the colour and both as the prompt names them."""
    kinds = named_words(record["prompts"][0]).keys()
    hits = {kind: (record[kind] == named_numbers(record, kind))[kept] for kind in kinds}
    shares = {kind: share(hit) for kind, hit in hits.items()} | {"n": int(kept.sum())}
    if len(hits) == 2:
        shares["both"] = share(hits["digit"] & hits["colour"])
    return shares


def details(record, kept, reference, floor):
    """Accuracy by digit and by colour, and the FD of the ink, of the images in the mask kept (N,).

    reference, floor: statistics of MNIST's training and held-out images, mixed in the shares of the digits.
    """
    digit, colour = named_numbers(record, "digit")[kept], named_numbers(record, "colour")[kept]
    right_digit, right_colour = record["digit"][kept] == digit, record["colour"][kept] == colour
    f = record["features"][kept].double()
    drawn = f.mean(0), f.T @ f / len(f) - f.mean(0).outer(f.mean(0))
    count = digit.bincount(minlength=10)
    real, held_out = (moments(stats, list(range(10)), count) for stats in (reference, floor))
    return {"per_digit": [share(right_digit[digit == k]) for k in range(10)],
            "per_colour": [share(right_colour[colour == k]) for k in range(6)],
            "kept_accuracy": share(right_digit & right_colour),
            "fd": frechet(drawn, real), "fd_floor": frechet(held_out, real)}


def prompt_metrics(records, reference, floor, forgotten, overrides):
    """The metrics of a network as a plain dict, from {set: record}.

    Images are kept whose prompts mean no forgotten concept.
    """
    result = {"n": sum(len(record["prompts"]) for record in records.values())}
    for name in COUNTS:
        if name in records:
            record = records[name]
            kept = ~any_of([images_with(record, concept, means) for concept in forgotten], record)
            result[name] = accuracy(record, kept)
            if name == "seen":
                result |= details(record, kept, reference, floor)
    if forgotten:
        result |= forgetting(records.get("under", records["seen"]), forgotten, overrides)
        for name, test in (("under_unseen_templates", names), ("other_word", means)):
            if name in records:
                result[name] = forgetting(records[name], forgotten, overrides, test)
    return result


# -------------------------------------------------------------------------------------------------------- the evaluator

class PromptEvaluator(Evaluator):
    """MNIST's judges, a teacher that reads prompts, concepts c_f to forget, and for each a list of overrides in c_o."""
    per_label = 0  # prompts have no labels: COUNTS has the numbers of images
    judges_of = "mnist"
    load = staticmethod(load_prompt_network)

    def misfit(self):
        return ""  # MNIST's judges read the ink of all prompts

    def questions(self, forgotten, quick=False):
        """{set: [the prompt of each image]}."""
        sets = common_prompts()
        under = forgotten_prompts(self.c_f) if forgotten else {}
        if quick:
            sets = {"seen": sets["seen"][::5]}
            under = {name: prompts[:500] for name, prompts in under.items() if name == "under"}
        return sets | under

    def measure(self, generate, network, questions, progress=None):
        """{"sets": {set: record}} of the images of `questions`."""
        sets = {}
        for name, prompts in questions.items():
            texts = list(dict.fromkeys(prompts))
            number = {text: i for i, text in enumerate(texts)}
            rows = torch.tensor([number[prompt] for prompt in prompts])
            title = progress and f"{progress}: {name.replace('_', ' ')}"
            with in_float32(network):
                images = draw_images(generate, rows, network, self.seed, progress=title,
                                     conditions=tokens(texts, self.teacher.settings.words))
            digit, features = read_digits(self.judge, images)
            sets[name] = {"prompts": prompts, "digit": digit, "digit2": read_digits(self.judge2, images)[0],
                          "colour": colour_of(images)}
            if name == "seen":
                sets[name]["features"] = features
        return {"sets": sets}

    def report(self, measured, erased=True):
        return prompt_metrics(measured["sets"], self.reference, self.floor, self.c_f, self.c_o)

    def cache_key(self):
        return {"counts": COUNTS}

    def tables(self, rows):
        return table(rows)

    def pictures(self, out, generate, generator, rows, measured):
        labels, conditions = grid(self.teacher.settings.words)
        panels = {}
        for title, draw, network in ((f"teacher, {TEACHER_NFE} evaluations", sampler(self.teacher), self.teacher),
                                     ("generator, 1 evaluation", generate, generator)):
            with in_float32(network):
                panels[title] = draw_images(draw, labels, network, self.seed, conditions=conditions)
        framed = [DIGITS[concept["digit"]] for concept in self.c_f if concept.keys() == {"digit"}]
        samples_figure(panels, FIRST_DIGITS, framed, out / "evaluation.png")
        if (out / "log.csv").exists():
            teacher = rows["teacher"] | {"n": rows["teacher"]["seen"]["n"]}
            curves_figure(out / "log.csv", teacher, out / "curves.png", probe="20 images per digit and colour")


COLUMNS = {"UA": ("ua",), "UA, judge 2": ("ua_judge2",), "override": ("override_share",),
           "other attribute": ("other_attribute",), "UA, unseen templates": ("under_unseen_templates", "ua"),
           "UA, other word": ("other_word", "ua"), "kept: digit": ("seen", "digit"), "kept: colour": ("seen", "colour"),
           "unseen templates": ("unseen_templates", "both"), "unseen pairs": ("unseen_pairs", "both"), "FD": ("fd",),
           "NFE": ("nfe",)}


def look_up(metrics, path):
    """metrics[path[0]][path[1]]..., None where a part is missing."""
    for key in path:
        metrics = metrics.get(key) if metrics else None
    return metrics


def table(rows):
    """Markdown table of {name: metrics}, a row for each network."""
    form = {"FD": "{:.2f}".format, "NFE": str}
    columns = {}
    for title, path in COLUMNS.items():
        if any(look_up(row, path) is not None for row in rows.values()):
            columns[title] = path
    lines = []
    for name, row in rows.items():
        values = {title: look_up(row, path) for title, path in columns.items()}
        cells = ["" if value is None else form.get(title, percent)(value) for title, value in values.items()]
        lines.append([ROW_NAMES.get(name, name), *cells])
    return markdown(["", *columns], lines)


# ---------------------------------------------------------------------------------------------------- the command line

@dataclass
class Settings:
    data_dir: str = setting("data", "where torchvision keeps or downloads MNIST")
    device: str = setting("auto", "auto, cpu, cuda or mps")


def main(argv):
    s = parse(Settings, argv, __doc__)
    device = pick_device(s.device)
    images, labels, _ = load_known("mnist", s.data_dir, train=False)
    seed_everything(0)
    colours = torch.arange(len(images)) % 6
    images = to_uint8(inked(images, colours))
    shares = {"colour": share(colour_of(images) == colours)}
    for name in ("judge", "judge2"):
        judge, _ = load_judge(find_weights("mnist", name), device)
        shares[f"digit, {name}"] = share(read_digits(judge, images)[0] == labels)
    found = ", ".join(f"{name} {percent(value)}" for name, value in shares.items())
    print(f"read correctly in {len(images)} held-out digits in ink: {found}")


if __name__ == "__main__":
    command(main)
