"""Other ways to make a network forget a word of its prompts, and the settings of SFD's runs on prompts.

The losses are those of `lab.baselines.methods`, with captions in the place of labels. The settings of METHODS are
guesses: nothing was tuned.
"""
import torch

from lab.baselines.methods import ONE_STEP as ONE_STEP_ON_LABELS
from lab.baselines.methods import Method, World, all_but_one, denoise_kept, esd, record_paths
from lab.core.files import SHIPPED
from lab.prompts.captions import batches, override_captions
from lab.prompts.network import CrossAttention
from sfd_minimal import PRESETS

RECIPES = {  # differences from the settings of lab.distill; options on the command line override them
    "from the teacher": dict(steps=1500, lr=3e-4, lr_fake=1e-3, forget_share=0.2),
    "from a one-step generator": {**PRESETS["mnist, from a one-step generator"], "forget_share": 0.2},  # not tried
    "anchored": dict(steps=400, lr=8e-4, lr_fake=2.7e-3, lambda_anchor=3.0, forget_share=0.5),
    "forgetting nothing": PRESETS["mnist, forgetting nothing"],
}


def recipe(forgets=True, init_from="", anchored=False):
    """Settings of RECIPES for a run, and with `anchored` the start from plain SiD that it needs."""
    if anchored:
        return {"init_from": str(SHIPPED / "prompts_sid.pt"), **RECIPES["anchored"]}
    if not forgets:
        return dict(RECIPES["forgetting nothing"])
    return dict(RECIPES["from a one-step generator" if init_from else "from the teacher"])


class PromptWorld(World):
    """What the losses may use. c_f: the concepts to forget; c_o: a list of overrides for each."""

    def __init__(self, teacher, c_f, c_o, made_by, batch, device, data=None):
        super().__init__(teacher, c_f, c_o, made_by, batch, device, data)
        override, rows = override_captions(c_f, c_o, teacher.settings.words)
        self.override, self.rows = override.to(device), rows.to(device)
        own = torch.arange(len(override), device=device)
        self.kept = (self.override == own).nonzero()[:, 0]       # numbers of captions
        self.forgotten = (self.override != own).nonzero()[:, 0]

    def to_forget(self, n):
        """Tokens (n, L) of random captions to forget, and of the captions drawn instead."""
        i = self.forgotten[torch.randint(len(self.forgotten), (n,), device=self.device)]
        return self.rows[i], self.rows[self.override[i]]

    def real_images(self, which):
        """A batch of real images that do not show the concepts, and their captions. which: "kept"."""
        if which not in self.real:
            images, labels = self.data()
            self.real[which] = batches(images.to(self.device), labels.to(self.device), self.batch,
                                       self.teacher.settings.words, self.c_f)
        return next(self.real[which])


def record_paths_to_nothing(network, world):
    """`record_paths` with the empty prompt in the place of the override."""
    record_paths(network, world)
    c_f, _ = world.path_conditions
    world.path_conditions = c_f, torch.zeros_like(c_f)


@torch.no_grad()
def uce(network, world):
    """W' = W (sum_f v_o v_f^T + sum_c v_c v_c^T + r I) (sum_f v_f v_f^T + sum_c v_c v_c^T + r I)^-1, a closed form.

    W makes keys or values from the states v of a prompt. The states v_f of prompts to forget get the keys and values of
    the states v_o of their overrides. The states v_c of prompts to keep get their own. Unlike in the paper, c runs over
    every training caption to keep, and f over as many random captions to forget. Gandikota et al., "Unified Concept
    Editing in Diffusion Models", WACV 2024.
    """
    def states(rows):
        return network.text(rows).flatten(0, 1).cpu().double()  # (n L, WIDTH); some devices have no float64

    c_f, c_o = world.to_forget(len(world.kept))
    kept, forgotten, override = states(world.rows[world.kept]), states(c_f), states(c_o)
    stay = kept.T @ kept + 0.1 * torch.eye(kept.shape[1], dtype=kept.dtype)
    change = (override.T @ forgotten + stay) @ torch.linalg.inv(forgotten.T @ forgotten + stay)
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
ONE_STEP = {name: ONE_STEP_ON_LABELS[name] for name in ("sid", "sfd", "sfd_two_stages", "sfd_anchored")}
