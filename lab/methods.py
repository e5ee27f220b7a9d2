"""Other unlearning methods, each a loss of a few lines on the network that unlearns.

D starts as the frozen teacher D_phi and draws in 35 evaluations. c_f is the label to forget, c_o the one to draw
instead, c a label to keep, 0 the null label; ||.||^2 is under EDM's weight w(sigma), sg stops the gradient. Every loss
takes (network, world): D, and a `World` with the teacher, labels and data. Labels of a batch are (B, K), images
(B, C, H, W). A new method is one loss and one line in METHODS.
"""
import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Callable

import torch

from edm_unet import heun_sampler
from lab.data import batches
from lab.label_space import tie
from train_teacher import distance, edm_loss


# ----------------------------------------------------------------------------------------- what a loss may make use of

class World:
    """The teacher phi, the labels, and, for the methods that ask for it, real data.
    Options of a method are attributes: world.eta."""

    def __init__(self, phi, c_f, c_o, made_by, batch, device, data=None):
        self.phi, self.c_f, self.c_o, self.batch, self.device, self.data = phi, c_f, c_o, batch, device, data
        self.p_mean = made_by.get("p_mean", -1.2)  # as the teacher was trained; EDM's, where its file does not say
        self.guidance = made_by.get("guidance", 1.0), made_by.get("guidance_below")
        self.kept = torch.tensor([k for k in range(len(phi.conditions)) if k != c_f], device=device)
        self.real, self.mask = {}, []

    def label(self, k):
        """(B, K) one-hot of one label, or of those in a tensor (B,)."""
        return self.phi.conditions[[k] * self.batch if isinstance(k, int) else k]

    def noise(self, n):
        return torch.randn(n, *self.phi.shape, device=self.device)

    def random_kept(self):
        return self.kept[torch.randint(len(self.kept), (self.batch,), device=self.device)]

    def noise_levels(self, n):
        """ln sigma ~ N(P_mean, 1.2^2), as the teacher was trained: (n, 1, 1, 1)."""
        return (self.p_mean + 1.2 * torch.randn(n, 1, 1, 1, device=self.device)).exp()

    def real_images(self, which):
        """A batch of real images in [-1, 1] and their labels (B, K); which: 'kept' or 'forgotten'."""
        if which not in self.real:
            images, labels = self.data()
            chosen = (labels == self.c_f) == (which == "forgotten")
            self.real[which] = batches(images[chosen].to(self.device), labels[chosen].to(self.device),
                                       self.batch, flip=False)
        x, k = next(self.real[which])
        return x, self.label(k)

    def to_forget(self, n):
        """What is to be forgotten, and what is to be drawn instead: (n, K) each."""
        return self.phi.conditions[[self.c_f] * n], self.phi.conditions[[self.c_o] * n]

    @torch.no_grad()
    def own_images(self, labels):
        """Images of the teacher under labels (N,), in [-1, 1]: what it can replay without any data."""
        return torch.cat([heun_sampler(self.phi, *part)
                          for part in zip(self.noise(len(labels)).split(500), self.label(labels).split(500))])

    def partial(self):
        """(y, sigma, c_f, c_o): a batch of images half-way drawn under c_f, from `record_paths`, their noise levels
        (B, 1, 1, 1), and what `to_forget` says of them."""
        i, j = (torch.randint(n, (self.batch,), device=self.device) for n in self.states.shape[:2])
        return self.states[i, j], self.sigmas[i].view(-1, 1, 1, 1), *(of[j] for of in self.asked)


def denoising(network, x, label, world, drop=0.1):
    """The teacher's own loss on images x under labels (n, K), one label in ten dropped."""
    label = label * (torch.rand(len(x), 1, device=world.device) >= drop)
    return edm_loss(network, x, world.noise_levels(len(x)), label, *world.guidance)


# ---------------------------------------------------------------------------------------------------------- the losses

def denoise_kept(network, world):
    """E ||D(x + sigma eps; c) - x||^2 over real images x of the labels to keep.

    `retrain` minimises it from scratch: a network that has never seen c_f, the control that the others are held
    against. `finetune` starts from the teacher and hopes that c_f fades."""
    return denoising(network, *world.real_images("kept"), world)


def esd(network, world):
    """||D(y; c_f) - sg[D_phi(y; 0) - eta (D_phi(y; c_f) - D_phi(y; 0))]||^2: away from c_f, by negative guidance.

    Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023. There y is drawn by D, here by the teacher:
    its paths are recorded once."""
    y, sigma, c_f, _ = world.partial()
    with torch.no_grad():
        D_0, D_f = world.phi(y, sigma, c_f * 0), world.phi(y, sigma, c_f)
        target = D_0 - world.eta * (D_f - D_0)
    return distance(network(y, sigma, c_f), target, sigma)


@torch.no_grad()
def record_paths(network, world, n=200):
    """Keep all 35 states at which the teacher is asked while it draws n images of c_f;
    `World.partial` picks from them."""
    states, sigmas = [], []

    def recorder(x, sigma, label):
        states.append(x.float()), sigmas.append(sigma[0].float())
        return world.phi(x, sigma, label)

    z, world.asked = world.noise(n), world.to_forget(n)
    heun_sampler(recorder, z, world.asked[0])
    world.states, world.sigmas = torch.stack(states), torch.stack(sigmas)


def all_but_one(network, world):
    """||[D(y; c_f) - D(y; 0)] - sg[D_phi(y; c_o) - D_phi(y; 0)]||^2 + beta ||D(y; 0) - sg D_phi(y; 0)||^2:
    the guidance term of c_f becomes that of c_o, the unconditional score stays.

    Hong, Lee, Woo, "All but One: Surgical Concept Erasing with Model Preservation in Text-to-Image Diffusion Models",
    AAAI 2024. Reconstructed from the paper's abstract, not from its code."""
    y, sigma, c_f, c_o = world.partial()
    with torch.no_grad():
        phi_0 = world.phi(y, sigma, c_f * 0)
        guidance = world.phi(y, sigma, c_o) - phi_0
    D_0, D_f = network(y, sigma, c_f * 0), network(y, sigma, c_f)
    return distance(D_f - D_0, guidance, sigma) + world.beta * distance(D_0, phi_0, sigma)


def label_swap(network, world):
    """||D(y; c_f) - sg D_phi(y; c_o)||^2: asked for c_f, answer as the teacher does for c_o.
    The score-forgetting term's idea, at 35 evaluations."""
    y, sigma, c_f, c_o = world.partial()
    with torch.no_grad():
        target = world.phi(y, sigma, c_o)
    return distance(network(y, sigma, c_f), target, sigma)


def selective_amnesia(network, world):
    """E ||D(x + sigma eps; c_f) - x||^2, x uniform noise images + the same for replayed images of the labels to keep
    + lam sum_i F_i (theta_i - phi_i)^2, F the Fisher information of the teacher's weights.

    Heng and Soh, "Selective Amnesia: A Continual Learning Approach to Forgetting in Deep Generative Models",
    NeurIPS 2023."""
    x = torch.rand_like(world.replay[:world.batch]) * 2 - 1
    i = torch.randint(len(world.replay), (world.batch,), device=world.device)
    weights = zip(world.fisher, network.parameters(), world.phi.parameters())
    stay = sum((f * (p - p_0) ** 2).sum() for f, p, p_0 in weights)
    return (denoising(network, x, world.label(world.c_f), world, drop=0)
            + denoising(network, world.replay[i], world.label(world.replay_labels[i]), world) + world.lam * stay)


def replay_and_fisher(network, world):
    """The teacher's own images of the labels to keep, and F_i = E[(dL/dphi_i)^2] on 200 of them, one at a time."""
    world.replay_labels = world.kept.repeat(50)
    world.replay = world.own_images(world.replay_labels)
    world.fisher = [torch.zeros_like(p) for p in network.parameters()]
    for i in range(200):
        loss = denoising(network, world.replay[i:i + 1], world.label(world.replay_labels[i:i + 1]), world)
        for f, g in zip(world.fisher, torch.autograd.grad(loss, list(network.parameters()))):
            f += g ** 2 / 200


def salun(network, world):
    """||D(x_t; c_f) - sg D(x_t; c')||^2 on real images x of c_f, + beta times the denoising loss on real images of the
    labels to keep; only the half of the weights with the largest |gradient| of the forget loss moves. c' is the next
    label, as in the official code, or (`scattered`) a random one to keep for each image.

    Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency", ICLR 2024."""
    x, _ = world.real_images("forgotten")
    sigma = world.noise_levels(len(x))
    x_t = x + sigma * torch.randn_like(x)
    with torch.no_grad():
        other = world.random_kept() if world.scattered else (world.c_f + 1) % len(world.phi.conditions)
        target = network(x_t, sigma, world.label(other))
    forget = distance(network(x_t, sigma, world.label(world.c_f)), target, sigma)
    return forget + world.beta * denoise_kept(network, world)


def saliency(network, world):
    """The mask of `salun`: weights whose |gradient| of the denoising loss on real images of c_f is above the median."""
    loss = sum(denoising(network, world.real_images("forgotten")[0], world.label(world.c_f), world) for _ in range(10))
    gradient = torch.autograd.grad(loss, list(network.parameters()))
    median = torch.cat([g.abs().flatten() for g in gradient]).median()
    world.mask = [(g.abs() > median).float() for g in gradient]


def copy_label(network, world):
    """Column c_o of the label embedding over column c_f; nothing is trained. Exactly c_o's images under c_f, and c_f
    one column away: the control that any claim of forgetting in a label-conditional model must be able to explain."""
    tie(network, world.c_f, world.c_o)


@dataclass(frozen=True)
class Method:
    loss: Callable                                  # (network, world) -> scalar
    data: str = "none"                              # real images it needs
    before: Callable = lambda network, world: None  # once, before the first step
    steps: int = 100                                # optimizer steps
    batch: int = 64                                 # images per term of the loss
    lr: float = 3e-4                                # Adam's learning rate, decaying linearly to zero
    ema: float = 0.97                               # decay of the weight average that is judged
    only: str = ""                                  # train only the weights whose name matches this
    from_scratch: bool = False                      # start from fresh weights, not from the teacher's
    options: dict = field(default_factory=dict)     # settings of this loss alone: attributes of the world
    tried: tuple = ()                               # what lab.sweep chose from: fields of this class, or options
    differs: str = "as published"                   # from the paper, in a few words

    def changed(self, change):
        own = {k: v for k, v in change.items() if k in self.options}
        return dataclasses.replace(self, **{k: v for k, v in change.items() if k not in own},
                                   options=self.options | own)


# of the label embedding, only c_f's column gets a gradient
LABEL_ONLY = dict(only="map_label.weight", differs="trains the label column of c_f alone")


def tried(**values):
    """Every combination of these values of settings or options."""
    return tuple(dict(zip(values, chosen)) for chosen in itertools.product(*values.values()))


METHODS = {  # each tried at four settings (lab.sweep), and then set to the best of them
    "retrain": Method(denoise_kept, "kept", steps=12_000, lr=2e-3, ema=0.998, from_scratch=True, differs="the control"),
    "finetune": Method(denoise_kept, "kept", steps=200, lr=1e-2, tried=tried(lr=(3e-4, 1e-3, 3e-3, 1e-2)),
                       differs="no paper: training goes on without c_f"),
    "esd": Method(esd, before=record_paths, options=dict(eta=1.0), tried=tried(lr=(1e-4, 3e-4), eta=(1.0, 3.0)),
                  differs="y from the teacher's paths, not from D's"),
    "esd_column": Method(esd, before=record_paths, **LABEL_ONLY, lr=1e-2, options=dict(eta=3.0),
                         tried=tried(lr=(3e-3, 1e-2), eta=(1.0, 3.0))),
    "all_but_one": Method(all_but_one, before=record_paths, options=dict(beta=1.0),
                          tried=tried(lr=(3e-4, 1e-3), beta=(0.1, 1.0)), differs="rebuilt from the paper's abstract"),
    "all_but_one_column": Method(all_but_one, before=record_paths, **LABEL_ONLY, lr=1e-2, options=dict(beta=0.0),
                                 tried=tried(lr=(1e-3, 3e-3, 1e-2, 3e-2))),
    "selective_amnesia": Method(selective_amnesia, before=replay_and_fisher, steps=300, lr=1e-3,
                                options=dict(lam=1e4), tried=tried(lr=(3e-4, 1e-3), lam=(1e2, 1e4))),
    "salun": Method(salun, "kept and forgotten", before=saliency, steps=300, lr=3e-4,
                    options=dict(beta=1.0, scattered=False), tried=tried(lr=(3e-4, 1e-3), beta=(0.3, 1.0)),
                    differs="as in its code: c_f relabelled as the next label"),
    "salun_scattered": Method(salun, "kept and forgotten", before=saliency, steps=300, lr=1e-3,
                              options=dict(beta=1.0, scattered=True), tried=tried(lr=(3e-4, 1e-3), beta=(0.3, 1.0)),
                              differs="c_f relabelled at random"),
    "label_swap": Method(label_swap, before=record_paths, lr=1e-2, tried=tried(lr=(1e-3, 3e-3, 1e-2, 3e-2)),
                         **LABEL_ONLY | dict(differs="no paper: SFD's idea, on that column")),
    "embedding_copy": Method(None, before=copy_label, steps=0, differs="no paper: trains nothing"),
}
