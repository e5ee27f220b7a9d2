"""A network that is said to have forgotten a class, and how it is searched: what `lab.audit` and `lab.prompt_methods`
ask with.

Every network is searched from equally many starts in equally many steps, through the chain of evaluations that then
draws; a one-step generator, whose chain is one, a second time with as many evaluations as a search of 35 takes.
"""
import copy

import torch

from lab.data import misfit, to_float, to_uint8
from lab.errors import BadInput
from lab.evaluate import Evaluator
from lab.label_space import mixes
from lab.labels import labels_only
from lab.sample import chain, load_generator


class Suspect:
    """A network said to have forgotten label c_f, and how to ask it. z, images (B, C, H, W); labels (B, K)."""

    def __init__(self, path, device, cut=1):
        self.generate, self.network, content = load_generator(path, device)
        self.network.requires_grad_(False)
        labels_only(content["data"], "python -m lab.prompt_methods trains, and searches, its own")
        if len(content.get("forget", [])) != 1:
            raise BadInput(f"{path} has forgotten {len(content.get('forget', []))} labels: the audit asks about one")
        self.c_f, self.data, self.device = content["forget"][0], content["data"], device
        self.sigma_init, self.size = content.get("sigma_init"), content.get("size")
        self.K, self.nfe = len(self.network.conditions), content["nfe"]
        if differs := misfit(self.data, content["classes"], self.network.shape, self.size):
            raise BadInput(f"{path} {differs}")
        self.evaluator = Evaluator(self.data, device, [self.c_f], content["to"])
        self.cut = cut  # of all efforts, one in so many

    def chain(self, network):
        """generate(z, c) of another network, as this suspect draws."""
        return chain(network, self.sigma_init)

    def effort(self, n):
        return max(2, n // self.cut)

    def noise(self, n):
        """On the sphere ||z|| = sqrt(d), where nearly all of N(0, I) lies."""
        return on_sphere(torch.randn(n, *self.network.shape, device=self.device))

    def label(self, k, n):
        return self.network.conditions[[k] * n]

    @torch.no_grad()
    def belief(self, images, judge="judge2"):
        """A judge's probabilities (N, K) for uint8 images: B's, or A's."""
        return torch.cat([getattr(self.evaluator, judge)(to_float(part))[0].softmax(1) for part in images.split(500)])

    def seen(self, x):
        """Images in [-1, 1] -> ({the share that judge B takes for c_f, its interval, how many they are, the share of
        judge A}, the one that B is surest of, uint8)."""
        images = to_uint8(x)
        p, guide = self.belief(images), self.belief(images, "judge")
        share = lambda p: (p.argmax(1) == self.c_f).float().mean().item()
        return (with_interval(share(p), len(x)) | {"judge_a": share(guide)}, images[p[:, self.c_f].argmax()].cpu())

    @torch.no_grad()
    def draw(self, z, label, generate=None):
        return torch.cat([(generate or self.generate)(*part) for part in zip(z.split(500), label.split(500))])

    def guided_loss(self, x):
        """-ln p_A(c_f | x), to be minimised."""
        return -self.evaluator.judge(x.clamp(-1, 1))[0].log_softmax(1)[:, self.c_f]


def on_sphere(z):
    return z * (z[0].numel() ** 0.5 / z.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)


def with_interval(share, n):
    """{"share", "n", "low", "high"}: with the 95 % interval of a share of n (Wilson)."""
    q = 1.96 ** 2 / n
    middle, half = (share + q / 2) / (1 + q), (q * (share * (1 - share) + q / 4)) ** 0.5 / (1 + q)
    return {"share": share, "n": n, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}


# ------------------------------------------------------------------------------------------------------- the searches

def climb(s, start, rate, steps, images):
    """Yields (v, loss (N,)) of each step: v (N, ...) from `start` by Adam, row i at `rate`[i], to where judge A is
    surest that images(v), equally many for each row, show c_f. Through every evaluation that draws them."""
    w = torch.zeros_like(start, requires_grad=True)
    rate = torch.as_tensor(rate, device=start.device).view(-1, *[1] * (start.ndim - 1))
    optimizer = torch.optim.Adam([w], 1.0)
    for _ in range(steps):
        loss = s.guided_loss(images(start + rate * w)).view(len(w), -1).mean(1)
        (w.grad,) = torch.autograd.grad(loss.sum(), [w])
        optimizer.step()
        yield (start + rate * w).detach(), loss.detach()


def searched(s, starts, steps, search):
    """(numbers, image) of search(starts, steps), which every network is given; a one-step generator is searched again
    with the evaluations that it costs to search 35: from 7 times the starts, in 5 times the steps."""
    starts, steps = s.effort(starts), s.effort(steps)
    numbers, best = search(starts, steps)
    numbers |= {"starts": starts, "steps": steps}
    if s.nfe > 1:
        return numbers, best
    more, best = search(7 * starts, 5 * steps)
    return more | {"starts": 7 * starts, "steps": 5 * steps, "same starts": numbers}, best


def for_all_z(s, generate, n):
    """images(v) for `climb`: n of them from fresh noise under each of the vectors v (N, ...)."""
    return lambda v: generate(s.noise(len(v) * n), v.repeat_interleave(n, 0))


def rates(n):
    """Learning rates of n starts: no single one is right for every network."""
    return torch.tensor([0.05, 0.02, 0.15]).repeat(n // 3 + 1)[:n]


def label_starts(s, n):
    """(n, K) vectors that a search begins at: the even mix, random mixes, and vectors of twice and of four times a
    label's length, which lie outside of what any mix reaches."""
    mixed = mixes(n, s.K)
    mixed[0] = 1 / s.K
    far = torch.nn.functional.normalize(torch.randn(n, s.K)) * torch.tensor([2.0, 4.0]).repeat(n)[:n, None]
    return torch.where(torch.arange(n)[:, None] % 4 < 2, mixed, far).to(s.device)


def asked_with_embeddings(network):
    """(network, vector): a copy that is asked with what stands behind `map_label`, (B, width), and vector(c), what says
    there the same as c (B, K) before it."""
    free, embed = copy.deepcopy(network), network.model.map_label
    free.model.map_label = torch.nn.Identity()
    # a network scales what it is asked with by the root of its length
    return free, lambda c: embed(c * c.shape[1] ** 0.5) / embed.out_features ** 0.5


def one_vector(s, start, scale=1.0, network=None):
    """A search of one vector for all z at once, from start(n) (n, ...), at rates in units of `scale`: what is drawn
    under the one of which judge A is surest. `network`: one that is asked otherwise in the place of the suspect's."""
    generate = s.chain(network) if network else s.generate

    def search(starts, steps):
        for v, loss in climb(s, start(starts), scale * rates(starts), steps, for_all_z(s, generate, 8)):
            pass
        surest = v[loss.argmin()].expand(s.effort(400), *v.shape[1:])
        return s.seen(s.draw(s.noise(len(surest)), surest, generate))
    return searched(s, 4, 40, search)
