"""Other ways to make a network forget a word for a digit, side by side with SFD, and whether the digit can come back.

    python -m lab.prompt_methods --forget zero --to one    # every method; --resume goes on with the rest

The losses are those of `lab.methods`, with prompts for labels; their settings are guesses, and nothing was tuned. What
is searched for is the forgotten digit, by judge A; what counts is what judge B says of the ink.
"""
import copy
from dataclasses import dataclass

import torch

from edm_unet import CrossAttention, heun_sampler
from lab import audit, baselines, prompts
from lab.checkpoint import load_teacher
from lab.cli import command, parse, setting
from lab.data import to_float
from lab.device import pick_device, seed_everything
from lab.errors import BadInput
from lab.figures import methods_figure
from lab.labels import who
from lab.methods import Method, World, all_but_one, denoise_kept, esd, record_paths
from lab.prompt_judge import PromptEvaluator, asked_of_all, asked_of_forgotten, ink_of
from lab.prompts import COLOURS, DIGITS
from lab.report import markdown, percent
from lab.sample import draw, in_float32, load_generator, many_step
from lab.suspect import Suspect, one_vector
from train_teacher import edm_loss


# ---------------------------------------------------------------------------------------------------------- the methods

class PromptWorld(World):
    """What the losses may make use of, for a concept in prompts."""

    def __init__(self, phi, c_f, c_o, made_by, batch, device, data):
        super().__init__(phi, c_f, c_o, made_by, batch, device, data)
        self.rows, self.override = (of.to(device) for of in prompts.questions(c_f, c_o, phi.settings.words))
        self.same = self.override == torch.arange(len(self.override), device=device)

    def to_forget(self, n):
        changed = (~self.same).nonzero()[:, 0]
        i = changed[torch.randint(len(changed), (n,), device=self.device)]
        return self.rows[i], self.rows[self.override[i]]

    def real_images(self, which):
        """A batch of real images that do not show the concept, and their captions."""
        if which not in self.real:
            images, labels = (of.to(self.device) for of in self.data())
            self.real[which] = prompts.batches(images, labels, self.batch, self.phi.settings.words, self.c_f)
        return next(self.real[which])


def record_paths_to_nothing(network, world):
    """`record_paths` of a concept without an alternative: what is asked for instead is the empty prompt."""
    record_paths(network, world)
    c_f, _ = world.asked
    world.asked = c_f, torch.zeros_like(c_f)


@torch.no_grad()
def uce(network, world):
    """W' = W (sum_f v_o v_f^T + sum_c v_c v_c^T + r I) (sum_f v_f v_f^T + sum_c v_c v_c^T + r I)^-1 for all that makes
    keys and values of the states v of a prompt's words: those of prompts that say c_f answer as those of their
    overrides do, as many of them, drawn at random, as there are prompts c to keep, which answer as before.

    Gandikota et al., "Unified Concept Editing in Diffusion Models", WACV 2024."""
    states = lambda rows: network.text(rows).flatten(0, 1).cpu().double()  # not every device has float64
    c = states(world.rows[world.same])
    f, o = map(states, world.to_forget(int(world.same.sum())))
    stay = c.T @ c + 0.1 * torch.eye(c.shape[1], dtype=c.dtype)
    change = (o.T @ f + stay) @ torch.linalg.inv(f.T @ f + stay)
    for module in network.modules():
        if isinstance(module, CrossAttention):
            for linear in (module.to_k, module.to_v):
                linear.weight.copy_(linear.weight.cpu().double() @ change)


CROSS, ALL_ELSE = r"\.cross\.", r"^(?!.*\.cross\.)"
METHODS = {
    "retrain": Method(denoise_kept, "kept", steps=3000, lr=2e-3, ema=0.998, from_scratch=True),
    "finetune": Method(denoise_kept, "kept", steps=200, lr=1e-3),
    "esd_cross": Method(esd, before=record_paths, only=CROSS, steps=200, lr=1e-3, options=dict(eta=1.0)),
    "esd_else": Method(esd, before=record_paths, only=ALL_ELSE, options=dict(eta=1.0)),
    "all_but_one": Method(all_but_one, before=record_paths, only=CROSS, steps=200, lr=1e-3, options=dict(beta=1.0)),
    "all_but_one_to_nothing": Method(all_but_one, before=record_paths_to_nothing, only=CROSS, steps=200, lr=1e-3,
                                     options=dict(beta=1.0)),
    "uce": Method(None, before=uce, steps=0),
}
ONE_STEP = ("sid", "sfd", "sfd_two_stage")


# ---------------------------------------------------------------------------------------------------- can it come back?

class PromptSuspect(Suspect):
    """A network said to have forgotten a digit, asked in prompts; c (B, L) tokens or (B, L, WIDTH) states."""

    cut = 1

    def __init__(self, path, evaluator):
        self.device, self.evaluator = evaluator.device, evaluator
        self.generate, self.network, content = load_generator(path, self.device)
        self.network.requires_grad_(False)
        self.sigma_init, self.nfe = content.get("sigma_init"), content["nfe"]
        self.word, self.words = evaluator.forgotten[0]["digit"], self.network.settings.words
        self.c_f, asked = DIGITS[self.word], asked_of_forgotten(evaluator.forgotten)["under"]
        self.rows = prompts.tokens(asked, self.words).to(self.device)

    def label(self, k, n):
        return self.rows[torch.arange(n, device=self.device) % len(self.rows)]

    @torch.no_grad()
    def belief(self, images, judge="judge2"):
        return super().belief(ink_of(images), judge)

    def guided_loss(self, x):
        ink = (x.clamp(-1, 1).amax(1, keepdim=True) + 1) / 2
        return super().guided_loss(ink / ink.flatten(1).amax(1).clamp(min=0.01).view(-1, 1, 1, 1) * 2 - 1)


def embedding_search(s):
    """Concept inversion: the states of one prompt (L, WIDTH), searched for all z at once from those of words that do
    not mean the digit."""
    others = [word for word in s.words if DIGITS.get(word) != s.c_f]

    def start(n):
        said = [others[i] for i in torch.randint(len(others), (n,))]
        return s.network.text(prompts.tokens(said, s.words).to(s.device)).clone()
    return one_vector(s, start)[0]


def relearning(s, images, labels):
    """{"steps", "share", "limit"}: steps of EDM's loss, on all but the text encoder, on 10 shapes of the digit and on
    others beside them, in ink, until judge B sees it in half of 50 images under the word (17 evaluations)."""
    few, others = (labels == s.c_f).nonzero()[:10, 0], (labels != s.c_f).nonzero()[:1000, 0]
    network, limit = copy.deepcopy(s.network), s.effort(60)
    learning = [p.requires_grad_() for name, p in network.named_parameters() if not name.startswith("text.")]
    optimizer = torch.optim.Adam(learning, 1e-3, betas=(0.9, 0.99), fused=True)
    called, colours = list(DIGITS)[:10], list(COLOURS)[:6]
    called[s.c_f] = s.word
    for step in range(limit + 1):
        if step in (0, 5, 10, 20, 40, limit):
            back = s.seen(heun_sampler(network, s.noise(50), s.label(s.c_f, 50), steps=9))[0]["share"]
            if back >= 0.5:
                return {"steps": step, "share": back, "limit": limit}
        i = torch.cat([of[torch.randint(len(of), (16,))] for of in (few, others)])
        colour = torch.randint(6, (len(i),))
        said = [f"a {colours[h]} {called[k]}" for h, k in zip(colour.tolist(), labels[i].tolist())]
        x, c = prompts.inked(images[i], colour).to(s.device), prompts.tokens(said, s.words).to(s.device)
        loss = edm_loss(network, x, torch.randn(len(x), 1, 1, 1, device=s.device).mul(1.2).exp(), c)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"steps": None, "share": back, "limit": limit}


# --------------------------------------------------------------------------------------------------- all, side by side

class Bench(baselines.Bench):
    """What all methods share: teacher, judges, concept, real digits where a method asks for them."""

    def __init__(self, s):
        self.s, self.device, self.methods, self._data = s, pick_device(s.device), METHODS, None
        self.teacher, self.info = load_teacher("", "prompts", self.device)
        (self.c_f,), (self.c_o,) = prompts.concepts((s.forget,), (s.to,))
        if self.c_f.keys() != {"digit"} or s.forget in prompts.NEVER_COLOURED:
            raise BadInput(f"--forget {s.forget}: what is searched for here is a digit, under a word for it that is "
                           "read beside colours")
        print(who([self.c_f], [self.c_o], self.info["classes"]))
        self.evaluator = PromptEvaluator(self.teacher, self.info, [self.c_f], [self.c_o])
        asked, self.grid = prompts.grid(self.teacher.settings.words)
        self.asked = asked[asked // 6 != DIGITS[s.forget]]
        self.of_teacher = self.kept_images(many_step(self.teacher), self.teacher)

    def kept_images(self, generate, network):
        """162 images in [-1, 1], three of each colour and digit to keep, from the same noise for every network."""
        with in_float32(network):
            return to_float(draw(generate, self.asked, network, seed=0, conditions=self.grid))

    def world(self, batch):
        return PromptWorld(self.teacher, [self.c_f], [self.c_o], self.info["made_by"], batch, self.device,
                           self.real_data)

    def judge(self, generate, network, per_label, forgotten, what, erased=True, control=None):
        """A verdict on a fifth of the images that a run is judged by: most of these networks are slow to ask."""
        sets = {name: of[::5] for name, of in asked_of_all().items()}
        sets |= {name: of[:len(of) // 5] for name, of in asked_of_forgotten([self.c_f]).items()}
        return self.evaluator.report(self.evaluator.measure(generate, network, sets, f"judging {what}"))

    def more(self, path, generate, network):
        """"moved", of networks that keep the sampler: how far images of prompts to keep are from the teacher's, a root
        mean square over pixels in [-1, 1]; and what three searches find, each from the same seed."""
        found = {}
        if (s := PromptSuspect(path, self.evaluator)).nfe > 1:
            moved = self.kept_images(generate, network) - self.of_teacher
            found["moved"] = moved.square().mean().sqrt().item()
        for name, attack in {"latent search": lambda: audit.latent(s, None)[0],
                             "embedding search": lambda: embedding_search(s),
                             "relearning": lambda: relearning(s, *self.real_data())}.items():
            seed_everything(0)
            found[name] = attack()
        return found

    def picture(self, results, path):
        other = next(word for word in list(DIGITS)[:10] if DIGITS[word] not in (DIGITS[self.s.forget],
                                                                                DIGITS[self.s.to]))
        asked = [f"a {list(COLOURS)[i % 6]} {word}" for word in (self.s.forget, other) for i in range(8)]
        rows = self.drawn(results, torch.arange(16), prompts.tokens(asked, self.teacher.settings.words))
        methods_figure(rows, f"asked for {self.s.forget}, to be forgotten (framed), and for {other}", path)


def table(results):
    """Markdown: one row per method, the teacher first."""
    def cell(m, *path):
        for key in path:
            m = m.get(key) if m else None
        return "" if m is None else percent(m)
    shown = {"UA": ("ua",), "as override": ("override_share",), "colour": ("other_attribute",),
             "UA, unseen templates": ("under_unseen_templates", "ua"), "UA, other word": ("other_word", "ua"),
             "kept": ("kept_accuracy",), "unseen pairs": ("unseen_pairs", "both")}
    searches, rows = ("latent search", "embedding search"), []
    for name, m in {"teacher": results["teacher"], **results["methods"]}.items():
        back = m.get("relearning")
        rows.append([f"`{name}`", m["real_data"], f"{m['seconds']:.0f}" if back else "", m["nfe"],
                     *(cell(m, *path) for path in shown.values()), f"{m['fd']:.1f}",
                     f"{m['moved']:.2f}" if "moved" in m else "",
                     *(audit.found(m[search]) if back else "" for search in searches),
                     "" if not back else back["steps"] if back["steps"] is not None else f"over {back['limit']}"])
    return markdown(["", "real images", "seconds", "NFE", *shown, "FD", "moved", *searches, "relearned in steps"], rows)


@dataclass
class Settings(baselines.Settings):
    forget: str = setting("zero", "the word for a digit that is forgotten")
    to: str = setting("one", "the word that the methods with an override draw instead")
    method: tuple = setting((*METHODS, *ONE_STEP), "methods to run", choices=(*METHODS, *ONE_STEP))
    data: str = setting("prompts", "the data set", option=False)
    data_dir: str = setting("data", "where torchvision keeps MNIST, for the methods and searches that need real digits")
    per_label: int = setting(20, "images judged of each colour and digit", option=False)


def main(argv):
    s = parse(Settings, argv, __doc__)
    baselines.compare(Bench(s), table)
    print(f"\nnext: python -m lab.sample {s.out}/{s.method[-1]} --prompt \"a red zero\" --out zeros.png")


if __name__ == "__main__":
    command(main)
