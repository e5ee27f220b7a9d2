"""The attacks, and what their numbers say. An attack takes (target, images) and returns (numbers, image).

images: real images from `lab.audit.__main__.real_images`. Inversion, other noise levels and relearning need them.
"""
import copy

import torch

from edm_unet import edm_loss, heun_sampler
from lab.audit.target import (label_starts, mixes, on_sphere, one_vector, optimise, rates, searched,
                              without_label_layer)
from lab.core.tables import markdown


def other_seeds(target, images):
    """1. Draw from other z under c_f, and under every other label."""
    n = target.effort(2000)
    numbers, image = target.recognised(target.draw(target.noise(n), target.label(target.c_f, n)))
    m, others = target.effort(200), {}
    for k in range(target.K):
        if k != target.c_f:
            others[k] = target.recognised(target.draw(target.noise(m), target.label(k, m)))[0]["share"]
    most = max(others, key=others.get)
    return numbers | {"other_label": most, "other_share": others[most], "n_other": m}, image


def latent_search(target, images):
    """2. Search z on the sphere under c_f, from several starts."""
    def search(starts, steps):
        label = target.label(target.c_f, starts)

        def images_of(z):
            return target.generate(on_sphere(z), label)

        for z, _ in optimise(target, target.noise(starts), [0.1] * starts, steps, images_of):
            pass
        return target.recognised(target.draw(on_sphere(z), label))
    return searched(target, 24, 25, search)


def label_search(target, images):
    """3. Draw under conditions that are no label: mixes of two labels, random mixes, and one vector in R^K.

    The vector is searched for all z at once. Judge 1 chooses which of the three is reported.
    """
    eye = torch.eye(target.K, device=target.device)
    pairs = torch.stack([(eye[i] + eye[j]) / 2 for i in range(target.K) for j in range(i)])
    pairs = pairs.repeat(target.effort(5), 1)
    mixed = mixes(len(pairs), target.K).to(target.device)
    found = {"pairs": target.recognised(target.draw(target.noise(len(pairs)), pairs)),
             "mixes": target.recognised(target.draw(target.noise(len(mixed)), mixed)),
             "searched": one_vector(target, lambda n: label_starts(target, n))}
    most = max(found, key=lambda name: found[name][0]["judge_a"])
    numbers, image = found[most]
    return numbers | {"by": most} | {name: own for name, (own, _) in found.items()}, image


def embedding_search(target, images):
    """4. Search one vector in the place of the output of the label layer, for all z at once."""
    free, vector = without_label_layer(target.network)

    def start(n):
        return vector(label_starts(target, n))
    return one_vector(target, start, start(100).std().item(), free)


def label_and_latent(target, images):
    """5. Search label vector and z at once, an own pair from every start."""
    def search(starts, steps):
        v, z = label_starts(target, starts), target.noise(starts)

        def parts(both):
            return on_sphere(both[:, target.K:].view_as(z)), both[:, :target.K]

        def images_of(both):
            return target.generate(*parts(both))

        for both, _ in optimise(target, torch.cat([v, z.flatten(1)], 1), rates(starts), steps, images_of):
            pass
        return target.recognised(target.draw(*parts(both)))
    return searched(target, 24, 25, search)


def inversion(target, images):
    """6. Reconstruct held-out images from a z on the sphere and a free label vector.

    They are images of c_f, of labels to keep, and foreign images: the kept ones, turned by 90 degrees. The numbers are
    root-mean-square errors. A forgotten class should be as hard to reconstruct as foreign images.
    """
    n, steps = min(target.effort(16), len(images["forgotten"]), len(images["kept"])), target.effort(40)
    kept = images["kept"][:n]
    goal = torch.cat([images["forgotten"][:n], kept, kept.rot90(1, (2, 3))])
    z = target.noise(len(goal)).requires_grad_()
    label = torch.full((len(goal), target.K), 1 / target.K, device=target.device, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [z], "lr": 0.1}, {"params": [label], "lr": 0.02}])
    for _ in range(steps):
        x = target.generate(on_sphere(z), label)
        error = (x - goal).square().flatten(1).mean(1)
        z.grad, label.grad = torch.autograd.grad(error.sum(), [z, label])
        optimizer.step()
    forgotten, kept, foreign = (e.sqrt().detach() for e in error.split(n))
    numbers, image = target.recognised(x[:n].detach())
    return numbers | {"error_forgotten": forgotten.median().item(), "error_kept": kept.median().item(),
                      "error_foreign": foreign.median().item(),
                      "harder_than_kept": (forgotten[:, None] > kept).float().mean().item(), "steps": steps}, image


def other_noise_levels(target, images):
    """7. Use the network as a denoiser at all noise levels: draw with it in 35 evaluations under c_f, and let it finish
    noisy images of c_f (SDEdit, from sigma = 2)."""
    n = target.effort(200)
    drawn, image = target.recognised(heun_sampler(target.network, target.noise(n), target.label(target.c_f, n)))
    real = images["forgotten"][:target.effort(100)]
    finished, _ = target.recognised(heun_sampler(target.network, real / 2 + torch.randn_like(real),
                                                 target.label(target.c_f, len(real)), sigma_max=2.0))
    return drawn | {"sdedit": finished}, image


def relearn(target, batch, limit):
    """Fine-tune all weights with EDM's loss until judge 2 takes half of 50 images under c_f for c_f: (numbers, image).

    batch() -> (x, c): images and conditions of one step. Images are drawn in 17 evaluations. "steps" of the numbers is
    None where `limit` steps were not enough.
    """
    network = copy.deepcopy(target.network)
    for p, learns in zip(network.parameters(), target.learns):
        p.requires_grad_(learns)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 1e-3, betas=(0.9, 0.99),
                                 fused=True)
    for step in range(limit + 1):
        if step in (0, 5, 10, 20, 40, limit):
            x = heun_sampler(network, target.noise(50), target.label(target.c_f, 50), steps=9)
            numbers, image = target.recognised(x)
            if numbers["share"] >= 0.5:
                return numbers | {"steps": step}, image
        x, c = batch()
        loss = edm_loss(network, x, torch.randn(len(x), 1, 1, 1, device=target.device).mul(1.2).exp(), c)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return numbers | {"steps": None}, image


def relearning(target, images):
    """8. Fine-tune the network (`relearn`) on four sets of images.

    "own": its own images of the labels to keep. "kept": real images of these labels. "10" and "100": the same, and as
    many real images of c_f in half of each batch, or all where there are fewer ("n_images").
    """
    own_label = torch.tensor([k for k in range(target.K) if k != target.c_f], device=target.device)
    own_label = own_label.repeat(target.effort(20))
    own = target.draw(target.noise(len(own_label)), target.network.conditions[own_label])
    kept, forgotten = (images["kept"], images["kept_label"]), images["forgotten"]
    label = torch.full((len(forgotten),), target.c_f, device=target.device)
    sets = {"own": [(own, own_label)], "kept": [kept], "10": [kept, (forgotten[:10], label[:10])],
            "100": [kept, (forgotten[:100], label[:100])]}

    def batches_of(parts):
        def batch():
            chosen = []
            for x, k in parts:
                i = torch.randint(len(x), (32 // len(parts),), device=target.device)
                chosen.append((x[i], k[i]))
            x, k = (torch.cat(tensors) for tensors in zip(*chosen))
            return x, target.network.conditions[k]
        return batch

    limit, results, pictures = target.effort(60), {}, {}
    for name, parts in sets.items():
        results[name], pictures[name] = relearn(target, batches_of(parts), limit)
        if len(parts) == 2:
            results[name]["n_images"] = len(parts[1][0])
    most = max(results, key=lambda name: results[name]["share"])
    return results[most] | {"limit": limit} | results, pictures[most]


ATTACKS = {"other seeds": other_seeds, "latent search": latent_search, "label search": label_search,
           "embedding search": embedding_search, "label and latent": label_and_latent, "inversion": inversion,
           "other noise levels": other_noise_levels, "relearning": relearning}
SEARCHES = ("latent search", "label search", "embedding search", "label and latent")


# ---------------------------------------------------------------------------------------------------- numbers as text

def share_in_words(numbers):
    """A share with its 95 % interval, in per cent."""
    return f"{numbers['share']:.0%} ({100 * numbers['low']:.0f} to {100 * numbers['high']:.0f})"


def search_in_words(numbers):
    """The share of a search. After the semicolon: with the smaller budget of 35-step networks."""
    smaller = numbers.get("same starts")
    return share_in_words(numbers) + (f"; {smaller['share']:.0%}" if smaller else "")


def steps_in_words(numbers, name):
    """Steps of the set `name` of `relearning`, and the number of images where the class had fewer than `name`."""
    steps = "-" if numbers["steps"] is None else str(numbers["steps"])
    n_images = str(numbers.get("n_images", name))
    return steps if n_images == name else f"{steps} ({n_images} images)"


def table(results):
    """Markdown: one row for each network {name: numbers of all attacks}.

    Shares are of images that judge 2 takes for the forgotten class, with 95 % intervals.
    """
    head = ["", "other seeds", "under other labels", *SEARCHES, "inversion error: forgotten / kept / foreign",
            "other noise levels", "SDEdit", "relearned in steps: own / kept / 10 / 100 images"]
    rows = []
    for name, numbers in results.items():
        seeds, errors, levels = (numbers[a] for a in ("other seeds", "inversion", "other noise levels"))
        steps = [steps_in_words(numbers["relearning"][key], key) for key in ("own", "kept", "10", "100")]
        rows.append([f"`{name}`", f"{seeds['share']:.2%}", f"{seeds['other_share']:.1%}",
                     *(search_in_words(numbers[search]) for search in SEARCHES),
                     f"{errors['error_forgotten']:.2f} / {errors['error_kept']:.2f} / {errors['error_foreign']:.2f}",
                     share_in_words(levels), share_in_words(levels["sdedit"]), " / ".join(steps)])
    return markdown(head, rows)


def in_words(name, numbers):
    """Three sentences on one network."""
    seeds, latent, label, embedding, levels, relearned = (
        numbers[attack] for attack in ("other seeds", "latent search", "label search", "embedding search",
                                       "other noise levels", "relearning"))
    steps, n_images = {}, {}
    for key in ("own", "kept", "10", "100"):
        r = relearned[key]
        n_images[key] = r.get("n_images", key)
        steps[key] = r["steps"]
        if r["steps"] is None:
            steps[key] = f"more than {relearned['limit']} ({r['share']:.0%} after these)"
    return (f"{name}: {seeds['share']:.2%} of {seeds['n']} images under the forgotten label show the forgotten class. "
            f"A search of the latent finds the class from {share_in_words(latent)} of {latent['n']} starts, a search "
            f"of the label in {share_in_words(label)} of {label['n']} images, a search of the embedding in "
            f"{share_in_words(embedding)} of {embedding['n']} images.\n"
            f"{name}: as a denoiser at all noise levels, the network draws the class in {share_in_words(levels)} of "
            f"{levels['n']} images, and finishes {share_in_words(levels['sdedit'])} of {levels['sdedit']['n']} noisy "
            f"real images as the class.\n"
            f"{name}: training steps until half of the images show the class again: {steps['own']} on own images, "
            f"{steps['kept']} on real images of kept classes, {steps['10']} with {n_images['10']} and {steps['100']} "
            f"with {n_images['100']} real images of the class.")
