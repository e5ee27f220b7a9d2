"""Other unlearning methods, each a loss of a few lines.

Every network D starts as a copy of the teacher D_phi and keeps the teacher's sampler: 35 evaluations for an image.
c_f is the label to forget, c_o the label drawn instead, c a label to keep, and 0 the null label. ||.||^2 has EDM's
weight w(sigma), and sg[.] has no gradient. A loss takes (network, world) and returns a scalar. Conditions of a batch
are (B, K), images (B, C, H, W). To add a method, write a loss and add a line to METHODS.
"""
import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from typing import Callable

import torch

from edm_unet import heun_sampler, weighted_distance
from train_teacher import batches, guided_edm_loss


# ------------------------------------------------------------------------------------------------- what a loss may use

class World:
    """The teacher, the labels, and real images for the methods that need them.

    made_by: settings of the teacher's training. batch: images per term of a loss. data: a function that returns all
    (images uint8, labels). Options of a method are attributes: world.eta.
    """

    def __init__(self, teacher, c_f, c_o, made_by, batch, device, data=None):
        self.teacher, self.c_f, self.c_o, self.batch, self.device, self.data = teacher, c_f, c_o, batch, device, data
        self.p_mean = made_by.get("p_mean", -1.2)  # EDM's value, where the teacher's file has none
        self.guidance, self.guidance_below = made_by.get("guidance", 1.0), made_by.get("guidance_below") or math.inf
        self.kept = torch.tensor([k for k in range(len(teacher.conditions)) if k != c_f], device=device)
        self.real = {}  # the batches of `real_images`
        self.mask = {}  # {name of a weight: mask of its gradient}; empty for methods without masks

    def label(self, k):
        """Condition (B, K) of one label k for a whole batch, or of each label in a tensor k (B,)."""
        return self.teacher.conditions[[k] * self.batch if isinstance(k, int) else k]

    def noise(self, n):
        return torch.randn(n, *self.teacher.shape, device=self.device)

    def random_kept(self):
        """(B,) random labels to keep."""
        return self.kept[torch.randint(len(self.kept), (self.batch,), device=self.device)]

    def noise_levels(self, n):
        """sigma (n, 1, 1, 1) with ln sigma ~ N(p_mean, 1.2^2), p_mean as in the training of the teacher."""
        return (self.p_mean + 1.2 * torch.randn(n, 1, 1, 1, device=self.device)).exp()

    def real_images(self, which):
        """A batch of real images in [-1, 1] and their conditions. which: "kept" or "forgotten"."""
        if which not in self.real:
            images, labels = self.data()
            chosen = (labels == self.c_f) == (which == "forgotten")
            self.real[which] = batches(images[chosen].to(self.device), labels[chosen].to(self.device), self.batch,
                                       flip=False)
        x, k = next(self.real[which])
        return x, self.label(k)

    def to_forget(self, n):
        """Conditions (n, K) to forget, and the conditions (n, K) drawn instead."""
        return self.teacher.conditions[[self.c_f] * n], self.teacher.conditions[[self.c_o] * n]

    @torch.no_grad()
    def own_images(self, labels):
        """The teacher's images in [-1, 1] under labels (N,)."""
        parts = zip(self.noise(len(labels)).split(500), self.label(labels).split(500))
        return torch.cat([heun_sampler(self.teacher, z, c) for z, c in parts])

    def recorded_states(self):
        """A batch from `record_paths`: states y, noise levels sigma (B, 1, 1, 1), conditions c_f and c_o (B, K)."""
        i, j = (torch.randint(n, (self.batch,), device=self.device) for n in self.states.shape[:2])
        c_f, c_o = self.path_conditions
        return self.states[i, j], self.sigmas[i].view(-1, 1, 1, 1), c_f[j], c_o[j]

    def distance(self, D, target, sigma):
        """w(sigma) ||D - target||^2, mean over all entries."""
        return weighted_distance(D, target, sigma, self.teacher.sigma_data)


def denoising(network, x, c, world, drop=0.1):
    """The teacher's training loss on images x under conditions c (n, K), of which a share `drop` becomes null."""
    c = c * (torch.rand(len(x), 1, device=world.device) >= drop)
    return guided_edm_loss(network, x, world.noise_levels(len(x)), c, world.guidance, world.guidance_below)


def learning(network):
    """{name: weight} of all weights that are not frozen."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------------------------------------------------- the losses

def denoise_kept(network, world):
    """E ||D(x + sigma eps; c) - x||^2 over real images x of the labels to keep, with the teacher's trained-in guidance.

    `retrain` minimises this loss from fresh weights. Its network has never seen c_f: the control of all other methods.
    `finetune` starts from the teacher.
    """
    return denoising(network, *world.real_images("kept"), world)


def esd(network, world):
    """||D(y; c_f) - sg[D_phi(y; 0) - eta (D_phi(y; c_f) - D_phi(y; 0))]||^2: negative guidance, away from c_f.

    Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023. In the paper y is on a path of D, here on a
    path of the teacher: the paths are recorded once.
    """
    y, sigma, c_f, _ = world.recorded_states()
    with torch.no_grad():
        D_0, D_f = world.teacher(y, sigma, c_f * 0), world.teacher(y, sigma, c_f)
        target = D_0 - world.eta * (D_f - D_0)
    return world.distance(network(y, sigma, c_f), target, sigma)


@torch.no_grad()
def record_paths(network, world, n=200):
    """Record the 35 states at which the teacher is evaluated while it draws n images under c_f."""
    states, sigmas = [], []

    def recorder(x, sigma, c):
        states.append(x.float())
        sigmas.append(sigma[0].float())
        return world.teacher(x, sigma, c)

    z = world.noise(n)
    world.path_conditions = world.to_forget(n)
    heun_sampler(recorder, z, world.path_conditions[0])
    world.states, world.sigmas = torch.stack(states), torch.stack(sigmas)


def all_but_one(network, world):
    """||[D(y; c_f) - D(y; 0)] - sg[D_phi(y; c_o) - D_phi(y; 0)]||^2 + beta ||D(y; 0) - sg D_phi(y; 0)||^2.

    The guidance term of c_f becomes that of c_o, and the unconditional score stays. Hong, Lee and Woo, "All but One:
    Surgical Concept Erasing with Model Preservation in Text-to-Image Diffusion Models", AAAI 2024. Rebuilt from the
    paper's abstract, not from its code.
    """
    y, sigma, c_f, c_o = world.recorded_states()
    with torch.no_grad():
        phi_0 = world.teacher(y, sigma, c_f * 0)
        guidance = world.teacher(y, sigma, c_o) - phi_0
    D_0, D_f = network(y, sigma, c_f * 0), network(y, sigma, c_f)
    return world.distance(D_f - D_0, guidance, sigma) + world.beta * world.distance(D_0, phi_0, sigma)


def label_swap(network, world):
    """||D(y; c_f) - sg D_phi(y; c_o)||^2: the idea of the score-forgetting term, in 35 evaluations."""
    y, sigma, c_f, c_o = world.recorded_states()
    with torch.no_grad():
        target = world.teacher(y, sigma, c_o)
    return world.distance(network(y, sigma, c_f), target, sigma)


def selective_amnesia(network, world):
    """E ||D(x + sigma eps; c_f) - x||^2 over uniform noise images x, + the same over the teacher's images of labels to
    keep, + lam sum_i F_i (theta_i - phi_i)^2 with the Fisher information F of the teacher's weights.

    Heng and Soh, "Selective Amnesia: A Continual Learning Approach to Forgetting in Deep Generative Models", NeurIPS
    2023. Both denoising losses have the teacher's trained-in guidance.
    """
    x = torch.rand(world.batch, *world.teacher.shape, device=world.device) * 2 - 1
    i = torch.randint(len(world.replay), (world.batch,), device=world.device)
    theta, phi = dict(network.named_parameters()), dict(world.teacher.named_parameters())
    stay = sum((F * (theta[name] - phi[name]) ** 2).sum() for name, F in world.fisher.items())
    forget = denoising(network, x, world.label(world.c_f), world, drop=0)
    keep = denoising(network, world.replay[i], world.label(world.replay_labels[i]), world)
    return forget + keep + world.lam * stay


def replay_and_fisher(network, world, n=200):
    """Draw the teacher's images of labels to keep, and estimate F_i = E[(dL/dphi_i)^2] from n of them, one by one.

    There are 50 images of each label. Where these are fewer than n, they are used again.
    """
    weights = learning(network)
    world.replay_labels = world.kept.repeat(50)
    world.replay = world.own_images(world.replay_labels)
    world.fisher = {name: torch.zeros_like(p) for name, p in weights.items()}
    for i in range(n):
        j = i % len(world.replay)
        loss = denoising(network, world.replay[j:j + 1], world.label(world.replay_labels[j:j + 1]), world)
        for F, g in zip(world.fisher.values(), torch.autograd.grad(loss, list(weights.values()))):
            F += g ** 2 / n


def salun(network, world):
    """||D(x_t; c_f) - sg D(x_t; c')||^2 over real images x of c_f, + beta times the denoising loss on real images of
    labels to keep.

    c' is the next label, as in the official code, or with the option `scattered` a random label to keep for each image.
    Only half of the weights change (`saliency`). Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based
    Weight Saliency", ICLR 2024.
    """
    x, _ = world.real_images("forgotten")
    sigma = world.noise_levels(len(x))
    x_t = x + sigma * torch.randn_like(x)
    with torch.no_grad():
        other = world.random_kept() if world.scattered else (world.c_f + 1) % len(world.teacher.conditions)
        target = network(x_t, sigma, world.label(other))
    forget = world.distance(network(x_t, sigma, world.label(world.c_f)), target, sigma)
    return forget + world.beta * denoise_kept(network, world)


def saliency(network, world):
    """Make the mask of `salun`: weights with a |gradient| above the median, of the denoising loss on images of c_f."""
    weights = learning(network)
    loss = 0
    for _ in range(10):
        x, _ = world.real_images("forgotten")
        loss = loss + denoising(network, x, world.label(world.c_f), world)
    gradient = torch.autograd.grad(loss, list(weights.values()))
    median = torch.cat([g.abs().flatten() for g in gradient]).median()
    world.mask = {name: (g.abs() > median).float() for name, g in zip(weights, gradient)}


@torch.no_grad()
def copy_label(network, world):
    """Copy column c_o of the label embedding over column c_f. Nothing is trained.

    The network draws exactly c_o's images under c_f, and c_f is one column away: a high UA alone does not show that a
    network forgot.
    """
    weight = network.model.map_label.weight
    weight[:, world.c_f] = weight[:, world.c_o]


# --------------------------------------------------------------------------------------------------------- the methods

def no_preparation(network, world):
    """What most methods do before their first step."""


def all_of(**values):
    """Every combination of these values of settings: a tuple of dicts."""
    return tuple(dict(zip(values, chosen)) for chosen in itertools.product(*values.values()))


@dataclass(frozen=True)
class Method:
    """An unlearning method whose network keeps the teacher's sampler."""
    loss: Callable                        # (network, world) -> scalar
    data: str = "none"                    # real images that the method needs
    before: Callable = no_preparation     # (network, world), once, before the first step
    steps: int = 100                      # optimizer steps
    batch: int = 64                       # images per term of the loss
    lr: float = 3e-4                      # Adam's learning rate: falls linearly to zero
    ema: float = 0.97                     # decay of the running average of the weights, which is judged
    only: str = ""                        # train the weights whose names match this regular expression
    from_scratch: bool = False            # start from fresh weights, not from the teacher's
    options: dict = field(default_factory=dict)  # settings of this loss alone: attributes of the world
    tried: tuple = ()                     # settings that were tried: `lab.baselines.grid` chose the best of them
    differs: str = ""                     # the difference from the paper, in a few words

    def changed(self, change):
        """This method with other settings or options {name: value}."""
        options = {name: value for name, value in change.items() if name in self.options}
        settings = {name: value for name, value in change.items() if name not in options}
        return dataclasses.replace(self, **settings, options={**self.options, **options})


@dataclass(frozen=True)
class OneStep:
    """A one-step method of this project: a run of `lab.distill`."""
    settings: dict = field(default_factory=dict)  # differences from the recipe of lab.distill
    forgets: bool = True                  # False: plain SiD
    teacher: str = ""                     # method whose network is the teacher; "": the teacher of the data set
    from_sid: bool = False                # start from plain SiD, not from the teacher
    anchored: bool = False                # use the recipe with an anchor
    data: str = "none"                    # as of `Method`, like the next two
    tried: tuple = ()
    differs: str = ""

    def changed(self, change):
        """This method with other settings {name: value} of lab.distill."""
        return dataclasses.replace(self, settings={**self.settings, **change})


LABEL_ONLY = "map_label.weight"  # of which the column of c_f alone gets a gradient
METHODS = {  # each was tried at four settings on MNIST, and has the best of them
    "retrain": Method(denoise_kept, "kept", steps=12_000, lr=2e-3, ema=0.998, from_scratch=True, differs="the control"),
    "finetune": Method(denoise_kept, "kept", steps=200, lr=1e-2, tried=all_of(lr=(3e-4, 1e-3, 3e-3, 1e-2)),
                       differs="no paper: training goes on without c_f"),
    "esd": Method(esd, before=record_paths, options=dict(eta=1.0), tried=all_of(lr=(1e-4, 3e-4), eta=(1.0, 3.0)),
                  differs="y from the teacher's paths, not from D's"),
    "esd_column": Method(esd, before=record_paths, only=LABEL_ONLY, lr=1e-2, options=dict(eta=3.0),
                         tried=all_of(lr=(3e-3, 1e-2), eta=(1.0, 3.0)),
                         differs="trains the label column of c_f alone"),
    "all_but_one": Method(all_but_one, before=record_paths, options=dict(beta=1.0),
                          tried=all_of(lr=(3e-4, 1e-3), beta=(0.1, 1.0)), differs="rebuilt from the paper's abstract"),
    "selective_amnesia": Method(selective_amnesia, before=replay_and_fisher, steps=300, lr=1e-3, options=dict(lam=1e4),
                                tried=all_of(lr=(3e-4, 1e-3), lam=(1e2, 1e4)),
                                differs="Fisher information on kept classes alone, 300 steps of the paper's 20,000"),
    "salun": Method(salun, "kept and forgotten", before=saliency, steps=300, lr=3e-4,
                    options=dict(beta=1.0, scattered=False), tried=all_of(lr=(3e-4, 1e-3), beta=(0.3, 1.0)),
                    differs="as in its code: c_f relabelled as the next label"),
    "salun_scattered": Method(salun, "kept and forgotten", before=saliency, steps=300, lr=1e-3,
                              options=dict(beta=1.0, scattered=True), tried=all_of(lr=(3e-4, 1e-3), beta=(0.3, 1.0)),
                              differs="c_f relabelled at random"),
    "label_swap": Method(label_swap, before=record_paths, only=LABEL_ONLY, lr=1e-2,
                         tried=all_of(lr=(1e-3, 3e-3, 1e-2, 3e-2)),
                         differs="no paper: SFD's idea, on the label column of c_f"),
    "embedding_copy": Method(None, before=copy_label, steps=0, differs="no paper: trains nothing"),
}
SFD_TRIED = tuple(dict(lr=lr, lr_fake=lr / 0.3) for lr in (1.5e-4, 3e-4, 6e-4, 1.2e-3))
ANCHORED_TRIED = tuple(dict(lr=lr, lr_fake=lr / 0.3, forget_share=share) for lr in (4e-4, 8e-4) for share in (0.3, 0.5))
ONE_STEP = {
    "retrain_sid": OneStep(teacher="retrain", forgets=False, data="kept",
                           differs="the control in one step: plain SiD of `retrain`"),
    "sid": OneStep(forgets=False, differs="plain SiD of the teacher: nothing is forgotten"),
    "sfd": OneStep(tried=SFD_TRIED, differs="one stage, from the teacher"),
    "sfd_two_stages": OneStep(from_sid=True, differs="the paper's second stage, from `sid`"),
    "sfd_anchored": OneStep(from_sid=True, anchored=True, tried=ANCHORED_TRIED,
                            differs="from `sid`, with an anchor and half of a batch under c_f"),
}
TUNED = {  # {(data set, method): settings}, in the place of those above: the best of four, or what a control takes
    ("mnist", "retrain_sid"): dict(steps=3400),
    ("mnist", "sfd_anchored"): dict(lr=4e-4, lr_fake=4e-4 / 0.3),
    ("cifar10", "finetune"): dict(lr=3e-4),  # MNIST's 1e-2 leaves an accuracy of 11 %
}
