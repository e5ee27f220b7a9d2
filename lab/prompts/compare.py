"""Compare ways to make a network forget a word for a digit with SFD, and try to bring the digit back.

    python -m lab.prompts.compare --forget zero --to one    # all methods; --resume goes on with the rest

The searches look for the forgotten digit in the ink: MNIST's judge 1 guides them, judge 2 decides.
"""
from dataclasses import dataclass

import torch

from edm_unet import BadInput, command, command_line
from lab.audit.attacks import latent_search, relearn, search_in_words
from lab.audit.target import Target, one_vector
from lab.baselines import compare as baselines
from lab.baselines.compare import Comparison, compare
from lab.core.options import parse, setting
from lab.core.runs import seed_everything
from lab.core.tables import markdown, percent
from lab.evaluate.draw import draw_images, in_float32, load_generator, sampler
from lab.evaluate.figures import methods_figure
from lab.prompts.captions import (DIGITS, FIRST_COLOURS, FIRST_DIGITS, NEVER_COLOURED, describe, grid, inked,
                                  override_captions, read_concepts, tokens)
from lab.prompts.evaluator import PromptEvaluator, common_prompts, forgotten_prompts, ink_of, look_up
from lab.prompts.methods import METHODS, ONE_STEP, PromptWorld, recipe
from lab.prompts.network import load_prompt_network, load_prompt_teacher
from train_teacher import load_known, to_float


# ------------------------------------------------------------------------------------------------------- the searches

class PromptTarget(Target):
    """A network that forgot a word for a digit. Conditions are tokens (B, L) or states (B, L, WIDTH)."""

    def __init__(self, path, evaluator, cut=1):
        generate, network, info = load_generator(path, evaluator.device, load_prompt_network)
        concept = evaluator.c_f[0]
        super().__init__(generate, network, info, evaluator.judge, evaluator.judge2, DIGITS[concept["digit"]], cut)
        self.word, self.words = concept["digit"], network.settings.words
        self.rows = tokens(forgotten_prompts([concept])["under"], self.words).to(self.device)

    def label(self, k, n):
        """Tokens (n, L) of captions with the forgotten word, whatever k is."""
        return self.rows[torch.arange(n, device=self.device) % len(self.rows)]

    def probabilities(self, images, judge):
        return super().probabilities(ink_of(images), judge)

    def loss(self, x):
        ink = (x.clamp(-1, 1).amax(1, keepdim=True) + 1) / 2
        brightest = ink.flatten(1).amax(1).clamp(min=0.01).view(-1, 1, 1, 1)
        return super().loss(ink / brightest * 2 - 1)


def embedding_search(target):
    """Search the states of one prompt (L, WIDTH) for all z at once, from those of words that do not mean the digit."""
    others = [word for word in target.words if DIGITS.get(word) != target.c_f]

    def start(n):
        prompts = [others[i] for i in torch.randint(len(others), (n,))]
        return target.network.text(tokens(prompts, target.words).to(target.device)).clone()

    numbers, _ = one_vector(target, start)
    return numbers


def relearning(target, images, labels):
    """`relearn` from 10 real images of the digit, in half of each batch, and 1000 of other digits, in random ink."""
    few, others = (labels == target.c_f).nonzero()[:10, 0], (labels != target.c_f).nonzero()[:1000, 0]
    digit_words = list(FIRST_DIGITS)
    digit_words[target.c_f] = target.word

    def batch():
        i = torch.cat([rows[torch.randint(len(rows), (16,))] for rows in (few, others)])
        colour = torch.randint(6, (len(i),))
        prompts = [f"a {FIRST_COLOURS[h]} {digit_words[k]}" for h, k in zip(colour.tolist(), labels[i].tolist())]
        return inked(images[i], colour).to(target.device), tokens(prompts, target.words).to(target.device)

    limit = target.effort(60)
    numbers, _ = relearn(target, batch, limit)
    return numbers | {"limit": limit}


# ------------------------------------------------------------------------------------------------------- the comparison

class PromptComparison(Comparison):
    """A comparison on captions. c_f: the concept to forget; c_o: the list of its overrides."""
    methods, one_step = METHODS, ONE_STEP
    load = staticmethod(load_prompt_network)
    cut = 1  # of the searches, as of `Target`

    def __init__(self, s):
        super().__init__(s)
        rows, self.kept_conditions = grid(self.teacher.settings.words)
        self.kept_rows = rows[rows // 6 != DIGITS[s.forget]]
        self.of_teacher = self.kept_images(sampler(self.teacher), self.teacher)

    def load_teacher(self, path=""):
        return load_prompt_teacher(path, self.device)

    def read_labels(self):
        forget = self.s.forget
        (c_f,), (c_o,) = read_concepts((forget,), (self.s.to,))
        if c_f.keys() != {"digit"} or forget in NEVER_COLOURED:
            raise BadInput(f"--forget {forget}: this comparison needs a word for a digit that captions have "
                           "together with a colour")
        print(describe([c_f], [c_o]))
        return c_f, c_o

    def find_evaluator(self):
        return PromptEvaluator.find(self.teacher, self.info, [self.c_f], [self.c_o])

    def world(self, batch):
        return PromptWorld(self.teacher, [self.c_f], [self.c_o], self.info["made_by"], batch, self.device,
                           self.real_data)

    def recipe(self, forgets, init_from, anchored):
        return recipe(forgets, init_from, anchored)

    def labels(self, forgets):
        c_f, c_o = ([self.c_f], [self.c_o]) if forgets else ([], [])
        return override_captions(c_f, c_o, self.teacher.settings.words)

    def questions(self):
        """A fifth of the images by which a run is evaluated: most of these networks draw slowly."""
        common = {name: prompts[::5] for name, prompts in common_prompts().items()}
        forgotten = {name: prompts[:len(prompts) // 5] for name, prompts in forgotten_prompts([self.c_f]).items()}
        return common | forgotten

    def distance_to(self, control, measured):
        return {}

    def real_data(self):
        if self._real_data is None:
            self._real_data = load_known("mnist", self.s.data_dir)[:2]
        return self._real_data

    def kept_images(self, generate, network):
        """162 images in [-1, 1] of digits to keep, three in each colour, from the same noise for every network."""
        with in_float32(network):
            return to_float(draw_images(generate, self.kept_rows, network, seed=0, conditions=self.kept_conditions))

    def more(self, path, generate, network):
        """Numbers of three searches, each from the same seed, and "moved" for networks with the teacher's sampler.

        moved: root mean square difference of kept images from the teacher's, over pixels in [-1, 1].
        """
        target, numbers = PromptTarget(path, self.evaluator, self.cut), {}
        if target.nfe > 1:
            moved = self.kept_images(generate, network) - self.of_teacher
            numbers["moved"] = moved.square().mean().sqrt().item()
        seed_everything(0)
        numbers["latent search"], _ = latent_search(target, None)
        seed_everything(0)
        numbers["embedding search"] = embedding_search(target)
        seed_everything(0)
        numbers["relearning"] = relearning(target, *self.real_data())
        return numbers

    def picture(self, results, path):
        forgotten, override = DIGITS[self.s.forget], DIGITS[self.c_o[0]["digit"]]
        other = next(word for word in FIRST_DIGITS if DIGITS[word] not in (forgotten, override))
        prompts = [f"a {FIRST_COLOURS[i % 6]} {word}" for word in (self.s.forget, other) for i in range(8)]
        conditions = tokens(prompts, self.teacher.settings.words)
        rows = self.images_of_methods(results, torch.arange(16), conditions)
        methods_figure(rows, f"prompts with {self.s.forget}, to be forgotten (framed), and with {other}", path)

    def table(self, results):
        return table(results)


COLUMNS = {"UA": ("ua",), "override": ("override_share",), "colour": ("other_attribute",),
           "UA, unseen templates": ("under_unseen_templates", "ua"), "UA, other word": ("other_word", "ua"),
           "kept": ("kept_accuracy",), "unseen pairs": ("unseen_pairs", "both")}


def table(results):
    """Markdown: one row for each method, the teacher first."""
    rows = []
    for name, m in {"teacher": results["teacher"], **results["methods"]}.items():
        values = [look_up(m, path) for path in COLUMNS.values()]
        seconds, searches, relearned = "", ["", ""], ""
        if name != "teacher":
            seconds = f"{m['seconds']:.0f}"
            searches = [search_in_words(m[name]) for name in ("latent search", "embedding search")]
            steps, limit = m["relearning"]["steps"], m["relearning"]["limit"]
            relearned = f"over {limit}" if steps is None else steps
        rows.append([f"`{name}`", m["real_data"], seconds, m["nfe"],
                     *("" if value is None else percent(value) for value in values), f"{m['fd']:.1f}",
                     f"{m['fd'] / m['fd_floor']:.1f}", f"{m['moved']:.2f}" if "moved" in m else "", *searches, relearned])
    return markdown(["", "real images", "seconds", "NFE", *COLUMNS, "FD", "FD / floor", "moved", "latent search",
                     "embedding search", "relearned in steps"], rows)


@dataclass
class Settings(baselines.Settings):
    forget: str = setting("zero", "the word for a digit to forget")
    to: str = setting("one", "the word that the methods with an override draw instead")
    method: tuple = setting((*METHODS, *ONE_STEP), "methods to run", choices=(*METHODS, *ONE_STEP))
    data: str = setting("prompts", "the data set", option=False)
    data_dir: str = setting("data", "where torchvision keeps or downloads MNIST, for methods and searches that need it")
    per_label: int = setting(20, "images judged of each colour and digit", option=False)


def main(argv):
    s = parse(Settings, argv, __doc__)
    compare(PromptComparison(s))
    network = f"{s.out}/{s.method[-1]}"
    print("next:", command_line("-m", "lab.prompts.sample", network, "--prompt", "a red zero", "--out", "zeros.png"))


if __name__ == "__main__":
    command(main)
