"""A network under attack, and searches of its inputs for the class that it forgot.

Judge 1 guides the searches. Judge 2, of another architecture, decides which images show the class. All networks get the
same search budget: equally many starts and steps, with gradients through all evaluations that draw an image. A one-step
generator is searched a second time, with as many evaluations as a search of a network of 35 evaluations takes.
"""
import copy
from pathlib import Path

import torch

from edm_unet import BadInput, command_line
from lab.core.files import find_weights
from lab.core.images import misfit, to_uint8
from lab.evaluate.draw import load_generator, sampler
from lab.evaluate.judges import load_judge
from train_teacher import to_float


class Target:
    """A network that forgot class c_f, and the two judges. z and images are (B, C, H, W), conditions c (B, K).

    generate, network, info: as of `load_generator`. cut: all numbers of starts, steps and images are divided by it. A
    variant for other conditions than labels overrides `label`, `probabilities` and `loss`.
    """

    def __init__(self, generate, network, info, judge, judge2, c_f, cut=1):
        self.learns = [p.requires_grad for p in network.parameters()]
        self.generate, self.network, self.info = generate, network.requires_grad_(False), info
        self.judge, self.judge2, self.c_f, self.cut = judge, judge2, c_f, cut
        self.nfe, self.device, self.K = info["nfe"], network.conditions.device, len(network.conditions)

    # ------------------------------------------------------------------------------------- what depends on the labels

    def label(self, k, n):
        """Conditions (n, K) of label k."""
        return self.network.conditions[[k] * n]

    @torch.no_grad()
    def probabilities(self, images, judge):
        """A judge's probabilities (N, K) for images uint8."""
        return torch.cat([judge(to_float(part))[0].softmax(1) for part in images.split(500)])

    def loss(self, x):
        """-ln p_A(c_f | x) of images in [-1, 1]: (N,), minimised by the searches."""
        return -self.judge(x.clamp(-1, 1))[0].log_softmax(1)[:, self.c_f]

    # ----------------------------------------------------------------------------------- what all targets have alike

    def effort(self, n):
        """A number of starts, steps or images, divided by `cut`; at least 2."""
        return max(2, n // self.cut)

    def noise(self, n):
        """n random z on the sphere."""
        return on_sphere(torch.randn(n, *self.network.shape, device=self.device))

    @torch.no_grad()
    def draw(self, z, c, generate=None):
        """Images in [-1, 1] by `generate`, or by the network itself."""
        generate = generate or self.generate
        return torch.cat([generate(*part) for part in zip(z.split(500), c.split(500))])

    def recognised(self, x):
        """({"share", "n", "low", "high", "judge_a"}, image) of images x in [-1, 1].

        The share of images that judge 2 takes for c_f, with its interval, and the share of judge 1. The image is the
        one of which judge 2 is surest, uint8.
        """
        images = to_uint8(x)
        p, p_a = self.probabilities(images, self.judge2), self.probabilities(images, self.judge)
        shares = [(q.argmax(1) == self.c_f).float().mean().item() for q in (p, p_a)]
        return with_interval(shares[0], len(x)) | {"judge_a": shares[1]}, images[p[:, self.c_f].argmax()].cpu()


def judge_files(data):
    """Files of the two judges of a data set. BadInput where there are none."""
    paths = [find_weights(data, "judge"), find_weights(data, "judge2")]
    if None in paths:
        raise BadInput(f"no judges for {data}: train them with `{command_line('-m', 'lab.judge', '--data', data)}`")
    return paths


def load_target(path, device, cut=1, c_f=None):
    """The `Target` of a network's file. c_f: the label to search for, or None for the one that the network forgot.

    BadInput where c_f is None and the network did not forget one label, or there are no judges.
    """
    generate, network, info = load_generator(path, device)
    forgotten = info.get("forget", []) if c_f is None else [c_f]
    if len(forgotten) != 1:
        raise BadInput(f"{path} has forgotten {len(forgotten)} labels: the audit attacks networks that forgot one")
    differs = misfit(info["data"], info["classes"], network.shape, info.get("size"))
    if differs:
        raise BadInput(f"{path} {differs}")
    (judge, _), (judge2, _) = (load_judge(judge_path, device) for judge_path in judge_files(info["data"]))
    return Target(generate, network, info, judge, judge2, forgotten[0], cut)


def with_network(target, network):
    """The same `Target` with another network that draws in as many evaluations."""
    return Target(sampler(network, target.info.get("sigma_init")), network.requires_grad_(False), target.info,
                  target.judge, target.judge2, target.c_f)


def name_of(path):
    """A network's name: that of its folder, or of its file."""
    path = Path(path)
    return path.parent.name if path.name == "generator.pt" else path.stem


def on_sphere(z):
    """z (B, ...), scaled to ||z|| = sqrt(d): nearly all of N(0, I) is close to this sphere."""
    return z * (z[0].numel() ** 0.5 / z.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)


def with_interval(share, n):
    """{"share", "n", "low", "high"}: a share of n images with its 95 % interval (Wilson)."""
    q = 1.96 ** 2 / n
    middle, half = (share + q / 2) / (1 + q), (q * (share * (1 - share) + q / 4)) ** 0.5 / (1 + q)
    return {"share": share, "n": n, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}


# ------------------------------------------------------------------------------------------------------- the searches

def optimise(target, start, rate, steps, images):
    """Search vectors v (N, ...) by Adam for images that judge 1 takes for c_f. Yield (v, loss (N,)) of each step.

    Row i starts at start[i] and has the learning rate rate[i]. images(v): equally many images for each row.
    """
    w = torch.zeros_like(start, requires_grad=True)
    rate = torch.as_tensor(rate, device=start.device).view(-1, *[1] * (start.ndim - 1))
    optimizer = torch.optim.Adam([w], 1.0)
    for _ in range(steps):
        loss = target.loss(images(start + rate * w)).view(len(w), -1).mean(1)
        (w.grad,) = torch.autograd.grad(loss.sum(), [w])
        optimizer.step()
        yield (start + rate * w).detach(), loss.detach()


def searched(target, starts, steps, search):
    """(numbers, image) of search(starts, steps), with the budget that all networks get.

    A one-step generator is searched again with as many evaluations as 35-step networks take: from 7 times the starts in
    5 times the steps. The numbers of the smaller search are then under "same starts".
    """
    starts, steps = target.effort(starts), target.effort(steps)
    numbers, image = search(starts, steps)
    numbers |= {"starts": starts, "steps": steps}
    if target.nfe > 1:
        return numbers, image
    more, image = search(7 * starts, 5 * steps)
    return more | {"starts": 7 * starts, "steps": 5 * steps, "same starts": numbers}, image


def rates(n):
    """Learning rates of n starts. They differ, since no single rate suits every network."""
    return torch.tensor([0.05, 0.02, 0.15]).repeat(n // 3 + 1)[:n]


def mixes(n, K, concentration=1.0):
    """(n, K) random mixes of labels, Dirichlet; on the CPU, since not every device draws them."""
    return torch.distributions.Dirichlet(torch.full((K,), concentration)).sample((n,))


def label_starts(target, n):
    """(n, K) label vectors that a search begins at: the even mix, random mixes, and vectors outside of all mixes, of
    twice and four times a label's length."""
    mixed = mixes(n, target.K)
    mixed[0] = 1 / target.K
    far = torch.nn.functional.normalize(torch.randn(n, target.K)) * torch.tensor([2.0, 4.0]).repeat(n)[:n, None]
    return torch.where(torch.arange(n)[:, None] % 4 < 2, mixed, far).to(target.device)


def without_label_layer(network):
    """(copy, vector): a copy whose condition is the output of `map_label` (B, width), not a label.

    vector(c) is the condition of the copy that has the effect of c (B, K) in the network.
    """
    free, embed = copy.deepcopy(network), network.model.map_label
    free.model.map_label = torch.nn.Identity()

    def vector(c):  # the network scales a condition by the root of its length
        return embed(c * c.shape[1] ** 0.5) / embed.out_features ** 0.5
    return free, vector


def one_vector(target, start, scale=1.0, network=None):
    """(numbers, image) of a search for one condition that brings c_f back for all z at once.

    start(n): n conditions to begin at. scale: unit of the learning rates. network: a network with other conditions in
    the place of the target's. The images are drawn under the condition with the smallest loss.
    """
    generate = sampler(network, target.info.get("sigma_init")) if network else target.generate
    images_of_each = 8

    def images(v):
        return generate(target.noise(len(v) * images_of_each), v.repeat_interleave(images_of_each, 0))

    def search(starts, steps):
        for v, loss in optimise(target, start(starts), scale * rates(starts), steps, images):
            pass
        best = v[loss.argmin()].expand(target.effort(400), *v.shape[1:])
        return target.recognised(target.draw(target.noise(len(best)), best, generate))
    return searched(target, 4, 40, search)
