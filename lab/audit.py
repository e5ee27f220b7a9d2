"""Can it come back? Attacks on a network that is said to have forgotten a class.

    python -m lab.audit runs/mnist-forget0-to1              # one run: audit.json and audit.png in its folder
    python -m lab.audit runs/mnist-baselines-forget0-to1    # each method of lab.baselines: one table, one figure

Judge A guides the searches and chooses among what they find; what counts is how many of these images judge B, of
another architecture, takes for the class. Inversion, other noise levels and relearning need real images. How a search
is kept equal for all: `lab.suspect`. Shares are printed with 95 % intervals, their numbers of images are in audit.json.
"""
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from edm_unet import heun_sampler
from lab import suspect
from lab.checkpoint import digest, read_file, save_atomically
from lab.cli import check_ranges, command, parse, setting
from lab.data import load_images, to_float
from lab.device import machine, pick_device, seed_everything
from lab.errors import BadInput
from lab.figures import audit_figure
from lab.label_space import mixes
from lab.report import markdown
from lab.run import lock
from lab.suspect import Suspect, asked_with_embeddings, climb, label_starts, on_sphere, one_vector, rates, searched
from train_teacher import edm_loss


# -------------------------------------------------------------------------------------------------------- the attacks

def seeds(s, images):
    """1. Ask again: other draws of z under c_f, and under every other label."""
    n = s.effort(2000)
    numbers, best = s.seen(s.draw(s.noise(n), s.label(s.c_f, n)))
    m, others = s.effort(200), {}
    for k in s.evaluator.kept:
        others[k] = s.seen(s.draw(s.noise(m), s.label(k, m)))[0]["share"]
    most = max(others, key=others.get)
    return numbers | {"other_label": most, "other_share": others[most], "n_other": m}, best


def latent(s, images):
    """2. Search z on the sphere under c_f, from several starts."""
    def search(starts, steps):
        label = s.label(s.c_f, starts)
        for z, _ in climb(s, s.noise(starts), [0.1] * starts, steps, lambda z: s.generate(on_sphere(z), label)):
            pass
        return s.seen(s.draw(on_sphere(z), label))
    return searched(s, 24, 25, search)


def labels(s, images):
    """3. Ask for what is no label: mixes of two, Dirichlet mixes, and one vector in R^K searched for all z at once.
    Judge A chooses which of the three is reported."""
    eye = torch.eye(s.K, device=s.device)
    pairs = torch.stack([(eye[i] + eye[j]) / 2 for i in range(s.K) for j in range(i)]).repeat(s.effort(5), 1)
    mixed = mixes(len(pairs), s.K).to(s.device)
    found = {"pairs": s.seen(s.draw(s.noise(len(pairs)), pairs)), "mixes": s.seen(s.draw(s.noise(len(mixed)), mixed)),
             "searched": one_vector(s, lambda n: label_starts(s, n))}
    most = max(found, key=lambda k: found[k][0]["judge_a"])
    return found[most][0] | {"by": most} | {k: numbers for k, (numbers, _) in found.items()}, found[most][1]


def embeddings(s, images):
    """4. The same a layer later: one vector in the place of what `map_label` makes of a label."""
    free, vector = asked_with_embeddings(s.network)
    start = lambda n: vector(label_starts(s, n))
    return one_vector(s, start, start(100).std().item(), free)


def labels_and_latents(s, images):
    """5. Both at once: an own label vector and an own z for every start."""
    def search(starts, steps):
        v, z = label_starts(s, starts), s.noise(starts)
        parts = lambda vz: (on_sphere(vz[:, s.K:].view_as(z)), vz[:, :s.K])
        both = torch.cat([v, z.flatten(1)], 1)
        for vz, _ in climb(s, both, rates(starts), steps, lambda vz: s.generate(*parts(vz))):
            pass
        return s.seen(s.draw(*parts(vz)))
    return searched(s, 24, 25, search)


def inversion(s, images):
    """6. Reconstruct held-out images of c_f, of the labels to keep, and foreign ones (kept ones turned by 90 degrees)
    from a z on the sphere and a free label vector. The root-mean-square errors of the three are compared: what was
    forgotten should be as hard as what is foreign."""
    n, steps = min(s.effort(16), len(images["forgotten"]), len(images["kept"])), s.effort(40)
    kept = images["kept"][:n]
    target = torch.cat([images["forgotten"][:n], kept, kept.rot90(1, (2, 3))])
    z = s.noise(len(target)).requires_grad_()
    label = torch.full((len(target), s.K), 1 / s.K, device=s.device, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [z], "lr": 0.1}, {"params": [label], "lr": 0.02}])
    for _ in range(steps):
        x = s.generate(on_sphere(z), label)
        error = (x - target).square().flatten(1).mean(1)
        z.grad, label.grad = torch.autograd.grad(error.sum(), [z, label])
        optimizer.step()
    forgotten, kept, foreign = (e.sqrt().detach() for e in error.split(n))
    numbers, best = s.seen(x[:n].detach())
    return numbers | {"error_forgotten": forgotten.median().item(), "error_kept": kept.median().item(),
                      "error_foreign": foreign.median().item(),
                      "harder_than_kept": (forgotten[:, None] > kept).float().mean().item(), "steps": steps}, best


def noise_levels(s, images):
    """7. The network is a denoiser, whatever it was trained for last: draw with it in 35 evaluations under c_f, and
    give it half-noised images of c_f to finish (SDEdit, from sigma = 2)."""
    n = s.effort(200)
    drawn = s.seen(heun_sampler(s.network, s.noise(n), s.label(s.c_f, n)))
    real = images["forgotten"][:s.effort(100)]
    finished = s.seen(heun_sampler(s.network, real / 2 + torch.randn_like(real),
                                   s.label(s.c_f, len(real)), sigma_max=2.0))
    return drawn[0] | {"sdedit": finished[0]}, drawn[1]


def relearning(s, images):
    """8. Fine-tune all weights as a denoiser, with EDM's loss, until judge B takes half of the images under c_f
    (17 evaluations) for c_f again: on its own images of the labels to keep alone, on real ones of these alone,
    and on 10 and 100 real images of c_f beside those."""
    own_label = torch.tensor(s.evaluator.kept, device=s.device).repeat(s.effort(20))
    own = s.draw(s.noise(len(own_label)), s.network.conditions[own_label])
    kept, kept_label, forgotten = images["kept"], images["kept_label"], images["forgotten"]
    f_label, limit = torch.full((len(forgotten),), s.c_f, device=s.device), s.effort(60)
    attacks = {"own": [(own, own_label)], "kept": [(kept, kept_label)],
               "10": [(kept, kept_label), (forgotten[:10], f_label)],
               "100": [(kept, kept_label), (forgotten[:100], f_label)]}
    result, best, most = {}, None, -1.0
    for name, sets in attacks.items():
        network = copy.deepcopy(s.network).requires_grad_(True)
        optimizer = torch.optim.Adam(network.parameters(), 1e-3, betas=(0.9, 0.99), fused=True)
        for step in range(limit + 1):
            if step in (0, 5, 10, 20, 40, limit):
                back, image = s.seen(heun_sampler(network, s.noise(50), s.label(s.c_f, 50), steps=9))
                if back["share"] > most:
                    best, most = image, back["share"]
                if back["share"] >= 0.5:
                    break
            parts = []
            for x, k in sets:
                i = torch.randint(len(x), (32 // len(sets),), device=s.device)
                parts.append((x[i], k[i]))
            x, k = (torch.cat(p) for p in zip(*parts))
            loss = edm_loss(network, x, torch.randn(len(x), 1, 1, 1, device=s.device).mul(1.2).exp(),
                            s.network.conditions[k])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        result[name] = back | {"steps": step if back["share"] >= 0.5 else None}
    return max(result.values(), key=lambda r: r["share"]) | {"limit": limit} | result, best


ATTACKS = {"other seeds": seeds, "latent search": latent, "label search": labels, "embedding search": embeddings,
           "label and latent": labels_and_latents, "inversion": inversion, "other noise levels": noise_levels,
           "relearning": relearning}
SEARCHES = ("latent search", "label search", "embedding search", "label and latent")


# ----------------------------------------------------------------------------------------- all of them, and the report

def real_images(data, data_dir, size, c_f, device):
    """Held-out images in [-1, 1]: of c_f, and of the labels to keep with those labels."""
    images, k, _ = load_images(data, data_dir, size, train=False)
    images, k = to_float(images).to(device), k.to(device)
    return {"forgotten": images[k == c_f][:200], "kept": images[k != c_f][:1000], "kept_label": k[k != c_f][:1000]}


def audit_one(folder, device, data_dir, cut=1):
    """{attack: numbers}, {attack: image} of one run, remembered in its audit.pt."""
    s, memory = Suspect(folder / "generator.pt", device, cut), folder / "audit.pt"
    fingerprint = digest(folder / "generator.pt", __file__, suspect.__file__, *s.evaluator.paths) + f" cut {cut}"
    if memory.exists() and (content := read_file(memory, "audit"))["fingerprint"] == fingerprint:
        return content["numbers"], content["images"]
    images, numbers, pictures, start = real_images(s.data, data_dir, s.size, s.c_f, device), {}, {}, time.monotonic()
    with lock(folder):
        for name, attack in tqdm(ATTACKS.items(), desc=f"audit of {folder.name}"):
            seed_everything(0)
            numbers[name], pictures[name] = attack(s, images)
        numbers |= {"nfe": s.nfe, "cut": cut, "seconds": time.monotonic() - start, "machine": machine(device)}
        save_atomically({"kind": "audit", "fingerprint": fingerprint, "numbers": numbers, "images": pictures}, memory)
    return numbers, pictures


def percent(r):
    """A share with its 95 % interval, in per cent."""
    return f"{r['share']:.0%} ({100 * r['low']:.0f} to {100 * r['high']:.0f})"


def found(search):
    """What a search found, and after a semicolon what it found from as few starts as it has in a network of 35."""
    few = search.get("same starts")
    return percent(search) + (f"; {few['share']:.0%}" if few else "")


def table(results):
    """Markdown: one row per network; shares of images that judge B takes for the forgotten class, each with its 95 %
    interval, but for inversion and relearning."""
    head = ["", "other seeds", "under other labels", *SEARCHES,
            "inversion error: forgotten / kept / foreign", "other noise levels", "SDEdit",
            "relearned in steps: own / kept / 10 / 100 images"]
    rows = []
    for name, r in results.items():
        i, n, back = r["inversion"], r["other noise levels"], r["relearning"]
        steps = " / ".join("-" if back[k]["steps"] is None else str(back[k]["steps"])
                           for k in ("own", "kept", "10", "100"))
        rows.append([f"`{name}`", f"{r['other seeds']['share']:.2%}", f"{r['other seeds']['other_share']:.1%}",
                     *(found(r[name]) for name in SEARCHES),
                     f"{i['error_forgotten']:.2f} / {i['error_kept']:.2f} / {i['error_foreign']:.2f}",
                     percent(n), percent(n["sdedit"]), steps])
    return markdown(head, rows)


def in_words(name, r):
    """Three sentences on one network."""
    s, z, v, e, n, back = (r[k] for k in ("other seeds", "latent search", "label search", "embedding search",
                                          "other noise levels", "relearning"))
    steps = {k: back[k]["steps"] if back[k]["steps"] is not None
             else f"more than {back['limit']} ({back[k]['share']:.0%} by then)" for k in ("own", "kept", "10", "100")}
    return (f"{name}: asked for the forgotten class, it draws it in {s['share']:.2%} of {s['n']} images; "
            f"a search of the latent finds it from {percent(z)} of {z['n']} starts, of the label in {percent(v)} of "
            f"{v['n']} images, of the embedding in {percent(e)} of {e['n']}.\n"
            f"{name}: used as a denoiser at all noise levels, the same weights draw it in {percent(n)} of {n['n']} "
            f"images, and finish {percent(n['sdedit'])} of {n['sdedit']['n']} half-noised real ones as it.\n"
            f"{name}: steps of training that bring it back: {steps['own']} on its own images, "
            f"{steps['kept']} on images of the kept classes, "
            f"{steps['10']} with 10 and {steps['100']} with 100 images of it.")


def audit(out, device, data_dir, cut=1):
    """Audit out/generator.pt, or that of every folder in `out`; prints table and sentences,
    writes out/audit.json and out/audit.png."""
    out = Path(out).parent if Path(out).is_file() else Path(out)
    folders = ({out.name: out} if (out / "generator.pt").exists()
               else {f.parent.name: f.parent for f in sorted(out.glob("*/generator.pt"))})
    if not folders:
        raise BadInput(f"{out} holds no generator.pt, nor does a folder in it")
    results, pictures = {}, {}
    for name, folder in folders.items():
        results[name], pictures[name] = audit_one(folder, device, data_dir, cut)
        (out / "audit.json").write_text(json.dumps({"networks": results}, indent=1) + "\n")
    audit_figure({name: {a: (pictures[name][a], r[a]["share"]) for a in ATTACKS} for name, r in results.items()},
                 out / "audit.png")
    print(table(results), *(in_words(name, r) for name, r in results.items()), sep="\n")
    print(f"numbers in {out / 'audit.json'}, pictures in {out / 'audit.png'}\n"
          f"next: python -m lab.sample {next(iter(folders.values())) / 'generator.pt'} --n 100 --out samples.png")
    return results


@dataclass
class Settings:
    run: str = setting("", "the folder of a run, or of lab.baselines", positional=True)
    data_dir: str = setting("data", "where torchvision keeps or downloads the real images")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    cut: int = setting(1, "of all efforts, one in so many: for networks that are slow to ask", above=0)
    __post_init__ = check_ranges


def main(argv):
    s = parse(Settings, argv, __doc__)
    audit(s.run, pick_device(s.device), s.data_dir, s.cut)


if __name__ == "__main__":
    command(main)
