"""Can it come back? Six attacks on a network that is said to have forgotten a class.

    python -m lab.audit runs/mnist-forget0-to1              # one run: audit.json and audit.png in its folder
    python -m lab.audit runs/mnist-baselines-forget0-to1    # each method of lab.baselines: one table, one figure

Judge A guides the searches; what counts is what judge B, of another architecture, says of the image. Attacks 4 to 6
need real images. One-step generators are cheap to ask; a network of 35 evaluations is asked less often, and searched
through 6 Euler steps, before its find is drawn with all 35. Every share is printed with its number of images in
audit.json.
"""
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from edm_unet import heun_sampler, sigma_grid
from lab.checkpoint import digest, read_file, save_atomically
from lab.cli import check_ranges, command, parse, setting
from lab.data import load_images, misfit, to_float, to_uint8
from lab.device import machine, pick_device, seed_everything
from lab.errors import BadInput
from lab.evaluate import Evaluator
from lab.figures import audit_figure
from lab.labels import labels_only
from lab.report import markdown
from lab.run import lock
from lab.sample import load_generator, one_step
from train_teacher import edm_loss


class Suspect:
    """A network said to have forgotten label c_f, and how to ask it. z, images (B, C, H, W); labels (B, K)."""

    def __init__(self, path, device, fast=False):
        self.generate, self.network, content = load_generator(path, device)
        self.network.requires_grad_(False)
        labels_only(content["data"], "python -m lab.prompt_methods trains, and searches, its own")
        if len(content.get("forget", [])) != 1:
            raise BadInput(f"{path} has forgotten {len(content.get('forget', []))} labels: the audit asks about one")
        self.c_f, self.data, self.device = content["forget"][0], content["data"], device
        self.sigma_init, self.size = content.get("sigma_init"), content.get("size")
        self.K, self.nfe, self.one_step = len(self.network.conditions), content["nfe"], content["nfe"] == 1
        if differs := misfit(self.data, content["classes"], self.network.shape, self.size):
            raise BadInput(f"{path} {differs}")
        self.evaluator = Evaluator(self.data, device, [self.c_f], content["to"])
        self.share = 20 if fast else 1  # of all efforts, one in so many: for tests

    def effort(self, one_step, many_step):
        return max(2, (one_step if self.one_step else many_step) // self.share)

    def noise(self, n):
        """On the sphere ||z|| = sqrt(d), where nearly all of N(0, I) lies."""
        return on_sphere(torch.randn(n, *self.network.shape, device=self.device))

    def label(self, k, n):
        return self.network.conditions[[k] * n]

    def differentiable(self, z, label):
        """Images with a gradient to z and label: the generator's one evaluation, or 6 Euler steps of a teacher."""
        if self.one_step:
            return one_step(self.network, self.sigma_init)(z, label)
        sigmas = sigma_grid(torch.linspace(0, 1, 6, device=z.device), sigma_min=0.1).tolist()
        x = z * sigmas[0]
        for sigma, sigma_next in zip(sigmas, [*sigmas[1:], 0.0]):
            level = torch.full((len(x), 1, 1, 1), sigma, device=x.device)
            x = x + (sigma_next - sigma) * (x - self.network(x, level, label)) / sigma
        return x

    @torch.no_grad()
    def belief(self, images):
        """Judge B's probabilities (N, K) for uint8 images."""
        return torch.cat([self.evaluator.judge2(to_float(part))[0].softmax(1) for part in images.split(500)])

    def seen(self, x):
        """Images in [-1, 1] -> ({the share that judge B takes for c_f, how many they are},
        the one it is surest of, uint8)."""
        p = self.belief(images := to_uint8(x))
        return ({"share": (p.argmax(1) == self.c_f).float().mean().item(), "n": len(x)},
                images[p[:, self.c_f].argmax()].cpu())

    @torch.no_grad()
    def draw(self, z, label):
        return torch.cat([self.generate(*part) for part in zip(z.split(500), label.split(500))])

    def climb(self, w, rate, n, steps, at=lambda w: w):
        """Adam on w, in place, to where judge A is surest of c_f in n images under each of the vectors at(w) (N, ...),
        from fresh noise. Yields the loss (N,) of each step."""
        optimizer = torch.optim.Adam([w], rate)
        for _ in range(steps):
            v = at(w)
            x = self.differentiable(self.noise(len(v) * n), v.repeat_interleave(n, 0))
            loss = self.guided_loss(x).view(len(v), n).mean(1)
            (w.grad,) = torch.autograd.grad(loss.sum(), [w])
            optimizer.step()
            yield loss

    def guided_loss(self, x):
        """-ln p_A(c_f | x), to be minimised."""
        return -self.evaluator.judge(x.clamp(-1, 1))[0].log_softmax(1)[:, self.c_f]


def on_sphere(z):
    return z * (z[0].numel() ** 0.5 / z.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)


# -------------------------------------------------------------------------------------------------------- the attacks

def seeds(s, images):
    """1. Ask again: other draws of z under c_f, and under every other label."""
    n = s.effort(10_000, 1000)
    numbers, best = s.seen(s.draw(s.noise(n), s.label(s.c_f, n)))
    m, others = s.effort(1000, 50), {}
    for k in s.evaluator.kept:
        others[k] = s.seen(s.draw(s.noise(m), s.label(k, m)))[0]["share"]
    most = max(others, key=others.get)
    return numbers | {"other_label": most, "other_share": others[most], "n_other": m}, best


def latent(s, images):
    """2. Search z on the sphere under c_f, guided by judge A, from several starts."""
    n, steps = s.effort(64, 12), s.effort(60, 25)
    z, label = s.noise(n).requires_grad_(), s.label(s.c_f, n)
    optimizer = torch.optim.Adam([z], 0.1)
    for _ in range(steps):
        loss = s.guided_loss(s.differentiable(on_sphere(z), label)).sum()
        (z.grad,) = torch.autograd.grad(loss, [z])
        optimizer.step()
    numbers, best = s.seen(x := s.draw(on_sphere(z.detach()), label))
    found = (s.belief(to_uint8(x)).argmax(1) == s.c_f).nonzero()
    return numbers | {"restarts_needed": found[0].item() + 1 if len(found) else None, "steps": steps}, best


def labels(s, images):
    """3. Ask for what is no label: mixes of two, Dirichlet mixes, and one vector in R^K searched for all z at once,
    from four starts, of which the one is kept that judge A, which guides the search, is surest of."""
    eye, rng = torch.eye(s.K, device=s.device), torch.distributions.Dirichlet(torch.ones(s.K))
    mixes = lambda n: rng.sample((n,)).to(s.device)  # not every device draws them
    pairs = torch.stack([(eye[i] + eye[j]) / 2 for i in range(s.K) for j in range(i)]).repeat(s.effort(10, 3), 1)
    dirichlet = mixes(len(pairs))
    v = torch.cat([eye.mean(0, keepdim=True), mixes(3)]).requires_grad_()
    for loss in s.climb(v, 0.05, s.effort(32, 8), steps := s.effort(120, 25)):
        pass
    surest = v[loss.argmin()].detach()
    m = s.effort(500, 50)
    found = {"pairs": s.seen(s.draw(s.noise(len(pairs)), pairs)),
             "dirichlet": s.seen(s.draw(s.noise(len(pairs)), dirichlet)),
             "searched": s.seen(s.draw(s.noise(m), surest.expand(m, s.K)))}
    most = max(found, key=lambda k: found[k][0]["share"])
    return (found[most][0] | {"by": most, "starts": len(v), "steps": steps} | {k: f[0] for k, f in found.items()},
            found[most][1])


def inversion(s, images):
    """4. Reconstruct held-out images of c_f, of the labels to keep, and foreign ones (kept ones turned by 90 degrees)
    from a z on the sphere and a free label vector. The root-mean-square errors of the three are compared: what was
    forgotten should be as hard as what is foreign."""
    n, steps = min(s.effort(24, 8), len(images["forgotten"]), len(images["kept"])), s.effort(100, 40)
    kept = images["kept"][:n]
    target = torch.cat([images["forgotten"][:n], kept, kept.rot90(1, (2, 3))])
    z = s.noise(len(target)).requires_grad_()
    label = torch.full((len(target), s.K), 1 / s.K, device=s.device, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [z], "lr": 0.1}, {"params": [label], "lr": 0.02}])
    for _ in range(steps):
        x = s.differentiable(on_sphere(z), label)
        error = (x - target).square().flatten(1).mean(1)
        z.grad, label.grad = torch.autograd.grad(error.sum(), [z, label])
        optimizer.step()
    forgotten, kept, foreign = (e.sqrt().detach() for e in error.split(n))
    numbers, best = s.seen(x[:n].detach())
    return numbers | {"error_forgotten": forgotten.median().item(), "error_kept": kept.median().item(),
                      "error_foreign": foreign.median().item(),
                      "harder_than_kept": (forgotten[:, None] > kept).float().mean().item(), "steps": steps}, best


def noise_levels(s, images):
    """5. The network is a denoiser, whatever it was trained for last: draw with it in 35 evaluations under c_f, and
    give it half-noised images of c_f to finish (SDEdit, from sigma = 2)."""
    n = s.effort(200, 200)
    drawn = s.seen(heun_sampler(s.network, s.noise(n), s.label(s.c_f, n)))
    real = images["forgotten"][:s.effort(100, 100)]
    finished = s.seen(heun_sampler(s.network, real / 2 + torch.randn_like(real),
                                   s.label(s.c_f, len(real)), sigma_max=2.0))
    return drawn[0] | {"sdedit": finished[0]}, drawn[1]


def relearning(s, images):
    """6. Fine-tune all weights as a denoiser, with EDM's loss, until judge B takes half of the images under c_f
    (17 evaluations) for c_f again: on its own images of the labels to keep alone, on real ones of these alone,
    and on 10 and 100 real images of c_f beside those."""
    own_label = torch.tensor(s.evaluator.kept, device=s.device).repeat(s.effort(20, 20))
    own = s.draw(s.noise(len(own_label)), s.network.conditions[own_label])
    kept, kept_label, forgotten = images["kept"], images["kept_label"], images["forgotten"]
    f_label, limit = torch.full((len(forgotten),), s.c_f, device=s.device), s.effort(60, 60)
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
        result[name] = {"steps": step if back["share"] >= 0.5 else None, "share": back["share"], "n": 50}
    return {"share": max(r["share"] for r in result.values()), "n": 50, "limit": limit} | result, best


ATTACKS = {"other seeds": seeds, "latent search": latent, "label search": labels, "inversion": inversion,
            "other noise levels": noise_levels, "relearning": relearning}


# ----------------------------------------------------------------------------------------- all of them, and the report

def real_images(data, data_dir, size, c_f, device):
    """Held-out images in [-1, 1]: of c_f, and of the labels to keep with those labels."""
    images, k, _ = load_images(data, data_dir, size, train=False)
    images, k = to_float(images).to(device), k.to(device)
    return {"forgotten": images[k == c_f][:200], "kept": images[k != c_f][:1000], "kept_label": k[k != c_f][:1000]}


def audit_one(folder, device, data_dir, fast=False):
    """{attack: numbers}, {attack: image} of one run, remembered in its audit.pt."""
    s, memory = Suspect(folder / "generator.pt", device, fast), folder / "audit.pt"
    fingerprint = digest(folder / "generator.pt", __file__, *s.evaluator.paths) + " fast" * fast
    if memory.exists() and (content := read_file(memory, "audit"))["fingerprint"] == fingerprint:
        return content["numbers"], content["images"]
    images, numbers, pictures, start = real_images(s.data, data_dir, s.size, s.c_f, device), {}, {}, time.monotonic()
    with lock(folder):
        for name, attack in tqdm(ATTACKS.items(), desc=f"audit of {folder.name}"):
            seed_everything(0)
            numbers[name], pictures[name] = attack(s, images)
        numbers["evaluations"], numbers["seconds"] = s.nfe, time.monotonic() - start
        save_atomically({"kind": "audit", "fingerprint": fingerprint, "numbers": numbers, "images": pictures}, memory)
    return numbers, pictures


def table(results):
    """Markdown: one row per network; shares of images that judge B takes for the forgotten class,
    but for inversion and relearning."""
    head = ["", "seeds", "under other labels", "latent search", "label search",
            "inversion error: forgotten / kept / foreign", "other noise levels", "SDEdit",
            "relearned in steps: own / kept / 10 / 100 images"]
    rows = []
    for name, r in results.items():
        i, n, back = r["inversion"], r["other noise levels"], r["relearning"]
        steps = " / ".join("-" if back[k]["steps"] is None else str(back[k]["steps"])
                           for k in ("own", "kept", "10", "100"))
        rows.append([f"`{name}`", f"{r['other seeds']['share']:.2%}", f"{r['other seeds']['other_share']:.1%}",
                     f"{r['latent search']['share']:.0%}",
                     f"{r['label search']['share']:.0%} ({r['label search']['by']})",
                     f"{i['error_forgotten']:.2f} / {i['error_kept']:.2f} / {i['error_foreign']:.2f}",
                     f"{n['share']:.0%}", f"{n['sdedit']['share']:.0%}", steps])
    return markdown(head, rows)


def in_words(name, r):
    """Three sentences on one network."""
    s, z, v, n, back = (r[k] for k in ("other seeds", "latent search", "label search",
                                       "other noise levels", "relearning"))
    steps = {k: back[k]["steps"] if back[k]["steps"] is not None
             else f"more than {back['limit']} ({back[k]['share']:.0%} by then)" for k in ("own", "kept", "10", "100")}
    return (f"{name}: asked for the forgotten class, it draws it in {s['share']:.2%} of {s['n']} images; "
            f"a search of the latent finds it in {z['share']:.0%} of {z['n']} starts, "
            f"a search of the label in {v['share']:.0%} of {v['n']} images.\n"
            f"{name}: used as a denoiser at all noise levels, the same weights draw it in {n['share']:.0%} of {n['n']} "
            f"images, and finish {n['sdedit']['share']:.0%} of {n['sdedit']['n']} half-noised real ones as it.\n"
            f"{name}: steps of training that bring it back: {steps['own']} on its own images, "
            f"{steps['kept']} on images of the kept classes, "
            f"{steps['10']} with 10 and {steps['100']} with 100 images of it.")


def audit(out, device, data_dir, fast=False):
    """Audit out/generator.pt, or that of every folder in `out`; prints table and sentences,
    writes out/audit.json and out/audit.png."""
    out = Path(out).parent if Path(out).is_file() else Path(out)
    folders = ({out.name: out} if (out / "generator.pt").exists()
               else {f.parent.name: f.parent for f in sorted(out.glob("*/generator.pt"))})
    if not folders:
        raise BadInput(f"{out} holds no generator.pt, nor does a folder in it")
    results, pictures = {}, {}
    for name, folder in folders.items():
        results[name], pictures[name] = audit_one(folder, device, data_dir, fast)
        results[name]["machine"] = machine(device)
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
    __post_init__ = check_ranges


def main(argv):
    s = parse(Settings, argv, __doc__)
    audit(s.run, pick_device(s.device), s.data_dir)


if __name__ == "__main__":
    command(main)
