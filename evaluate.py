"""The judge, and what it says of a generator: accuracy per class, Frechet distance (FD), precision and recall.

    python evaluate.py runs/mnist-forget0-to1       # prints the table; writes metrics.json and samples.png there

An FD is measured on the 128 features of this project's own judge. It is no FID; compare it only with the floor beside
it, which is the FD of held-out real images. Every set of images is first reduced to `class_stats`, and every number
comes from those.
"""
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from common import BadInput, Parser, command, label_number, machine, pick_device, positive, refuse_useless
from edm_unet import (CheckpointError, find_weights, heun_sampler, load_checkpoint, read_file, save_atomically,
                      weight_files)
from figures import curves_figure, samples_figure, tile, to_picture

HERE, TEACHER_STEPS = Path(__file__).parent, 18
PER_LABEL = 1000  # images judged under each label, five times as many under a forgotten one


# ----------------------------------------------------------------------------------------------------------- the judge

def conv_bn(c_in, c_out, stride=1):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out))


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.a, self.b = conv_bn(c_in, c_out, stride), conv_bn(c_out, c_out)
        self.skip = conv_bn(c_in, c_out, stride) if c_in != c_out or stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.b(F.relu(self.a(x))) + self.skip(x))


class Residual(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = conv_bn(c, c)

    def forward(self, x):
        return x + F.relu(self.conv(x))


class Judge(nn.Module):
    """Classifier with a 128-wide penultimate layer. x (B, C, H, W) in [-1, 1] -> (logits (B, K), features (B, 128)).

    arch "cnn" (three poolings), "resnet" (six blocks of two convolutions) or, the fastest to train on photographs,
    "resnet9" (after Jordan 2024: frozen whitening filters, then three times a convolution that halves the side and one
    more beside it; sides of 16 and more, of any size once built).
    mirror: once trained, its features are the mean of those of the image and of its mirror image.
    ValueError for another arch or a smaller side."""

    def __init__(self, arch, resolution, channels, num_classes, width, stem_stride=1, mirror=False):
        super().__init__()
        self.settings = dict(arch=arch, resolution=resolution, channels=channels, num_classes=num_classes, width=width,
                             stem_stride=stem_stride, mirror=mirror)
        w = width
        if arch == "cnn":
            plan = [(channels, w, stem_stride), "pool", (w, 2 * w, 1), (2 * w, 2 * w, 1), "pool",
                    (2 * w, 4 * w, 1), "pool"]
            layers = [nn.MaxPool2d(2) if p == "pool" else nn.Sequential(conv_bn(*p), nn.ReLU()) for p in plan]
            side = (resolution + stem_stride - 1) // stem_stride // 8
            layers += [nn.Flatten(), nn.Linear(4 * w * side ** 2, 128)]
        elif arch == "resnet":
            layers = [conv_bn(channels, w, stem_stride), nn.ReLU(), ResBlock(w, w, 1), ResBlock(w, w, 1),
                      ResBlock(w, 2 * w, 2), ResBlock(2 * w, 2 * w, 1),
                      ResBlock(2 * w, 4 * w, 2), ResBlock(4 * w, 4 * w, 1)]
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 128)]
        elif arch == "resnet9":
            if resolution < 16:
                raise ValueError(f"this judge needs images of at least 16x16, not {resolution}x{resolution}")
            layers = [nn.Conv2d(channels, 8 * channels, 2, bias=False).requires_grad_(False), nn.ReLU()]
            for c_in, c_out in (8 * channels, w), (w, 4 * w), (4 * w, 4 * w):
                layers += [nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(c_out),
                           nn.ReLU(), Residual(c_out)]
            layers += [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4 * w, 128)]
        else:
            raise ValueError(f"arch must be 'cnn', 'resnet' or 'resnet9', not {arch!r}")
        self.trunk, self.head = nn.Sequential(*layers), nn.Linear(128, num_classes)

    def forward(self, x):
        features = F.relu(self.trunk(x))
        if self.settings["mirror"] and not self.training:
            features = (features + F.relu(self.trunk(x.flip(3)))) / 2
        return self.head(features), features


def to_uint8(x):
    """Images in [-1, 1] as 8-bit ones: what a judge is shown, real and generated alike."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def to_float(images):
    return images.float() / 127.5 - 1


@torch.no_grad()
def class_stats(judge, images, labels, keep=500, batch=500):
    """All that the tables need of a set of images (uint8 (N, C, H, W)) asked for, or known, under `labels` (N,):
    per label k

    confusion (K, K) how often an image of label k is judged as each class;
    entropy (K,) of the judge's opinion, mean, in nats;
    mean (K, 128), second (K, 128, 128) moments of its features;  features (K, <= keep, 128) of the first ones, float16.
    """
    judge.eval()
    K = judge.settings["num_classes"]
    outputs = [judge(to_float(part.to(next(judge.parameters()).device))) for part in images.split(batch)]
    logits, features = (torch.cat(o).cpu() for o in zip(*outputs))
    log_p, labels = logits.log_softmax(1), labels.cpu()
    f = features.double()
    of = [labels == k for k in range(K)]
    fewest = min([keep] + [int(m.sum()) for m in of])
    return {"confusion": torch.stack([logits.argmax(1)[m].bincount(minlength=K) for m in of]),
            "entropy": torch.stack([-(log_p[m].exp() * log_p[m]).sum(1).mean() for m in of]),
            "mean": torch.stack([f[m].mean(0) for m in of]).float(),
            "second": torch.stack([f[m].T @ f[m] / m.sum() for m in of]).float(),
            "features": torch.stack([features[m][:fewest] for m in of]).half()}


def load_judge(path, device):
    """(judge, the file's other entries: reference statistics, accuracy, how it was made)."""
    content = read_file(path, "judge")
    judge = Judge(**content["judge"]).to(device).eval()
    judge.load_state_dict(content["weights"])
    return judge.requires_grad_(False), content


def digest(*paths):
    return hashlib.sha256(b"".join(Path(p).read_bytes() for p in paths)).hexdigest()


# --------------------------------------------------------------------------------------------- numbers from statistics

def moments(stats, labels):
    """Mean (128,) and covariance (128, 128) of the equal-weight mixture of `labels`, float64."""
    mean, second = stats["mean"][labels].double().mean(0), stats["second"][labels].double().mean(0)
    return mean, second - mean.outer(mean)


def sqrtm(c):
    """Square root of a symmetric positive semi-definite matrix; rounding's negative eigenvalues are zero."""
    values, vectors = torch.linalg.eigh((c + c.T) / 2)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet(a, b):
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), of two (mean, covariance) pairs.

    The inner matrix is symmetric and positive semi-definite, so that its root is real, unlike that of C_a C_b."""
    (m_a, c_a), (m_b, c_b) = a, b
    root = sqrtm(c_a)
    cross = torch.linalg.eigvalsh(root @ c_b @ root).clamp(min=0).sqrt().sum()
    return ((m_a - m_b).square().sum() + c_a.trace() + c_b.trace() - 2 * cross).item()


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (N, 128), (M, 128): the share of fake images
    within the k-nearest-neighbour balls of the real ones, and the share of real ones within those of the fake."""
    def covered(points, support):
        # the nearest neighbour of a point is itself
        radius = torch.cdist(support, support).kthvalue(k + 1, dim=1).values
        return (torch.cdist(points, support) <= radius).any(1).float().mean().item()
    return covered(fake, real), covered(real, fake)


def metrics(stats, confusion2, reference, floor, forget, to):
    """The numbers of a verdict. stats of the images, confusion2 by the second judge, reference of the training images,
    floor of the held-out ones; forget and to as `sfd_minimal.read_labels` gives them."""
    confusion, K = stats["confusion"], len(stats["confusion"])
    kept = [k for k in range(K) if k not in forget]
    asked = [o for t in to for o in (kept if t < 0 else [t])]  # what the forgotten labels should show now
    accuracy, accuracy2 = (c.diag() / c.sum(1) for c in (confusion, confusion2))
    real, fake = (s["features"][kept].flatten(0, 1).float() for s in (reference, stats))
    precision, recall = precision_recall(real, fake)
    out = {"kept_accuracy": accuracy[kept].mean().item(), "kept_accuracy_judge2": accuracy2[kept].mean().item(),
           "per_class_accuracy": accuracy.tolist(), "entropy": stats["entropy"].tolist(),
           "fd": frechet(moments(stats, kept), moments(reference, kept)),
           "fd_floor": frechet(moments(floor, kept), moments(reference, kept)),
           "precision": precision, "recall": recall, "n": int(confusion.sum())}
    if forget:
        shares = [confusion[f, kept if t < 0 else [t]].sum() / confusion[f].sum() for f, t in zip(forget, to)]
        out |= {"ua": 1 - accuracy[forget].mean().item(), "ua_judge2": 1 - accuracy2[forget].mean().item(),
                "override_share": torch.stack(shares).mean().item(),
                "fd_override": frechet(moments(stats, forget), moments(reference, asked)),
                "fd_override_floor": frechet(moments(floor, asked), moments(reference, asked)),
                "n_forgotten": int(confusion[forget].sum())}
    return out


# ---------------------------------------------------------------------------------------------- from models to numbers

@torch.no_grad()
def draw(generate, labels, net, device, seed, batch=500, progress=None):
    """Images uint8 (N, C, H, W) under labels (N,): generate(z, one-hot)
    with z from a seed that means the same on every device."""
    rng, images = torch.Generator().manual_seed(seed), []
    for part in tqdm(labels.split(batch), desc=progress, disable=not progress, leave=False):
        z = torch.randn(len(part), net.channels, net.resolution, net.resolution, generator=rng).to(device)
        images.append(to_uint8(generate(z, F.one_hot(part, net.num_classes).float().to(device))).cpu())
    return torch.cat(images)


def one_step(generator, sigma_init):
    return lambda z, c: generator(sigma_init * z, sigma_init, c)


def many_step(teacher):
    return lambda z, c: heun_sampler(teacher, z, c, TEACHER_STEPS)


def load_generator(path, device):
    """(generate(z, one-hot) -> images, network, its file's other entries and "nfe", the evaluations per image) of a
    one-step generator's file, or of a teacher's."""
    network, info = load_checkpoint(path, device)
    if "sigma_init" in info:
        return one_step(network, info["sigma_init"]), network, info | {"nfe": 1}
    return many_step(network), network, info | {"nfe": 2 * TEACHER_STEPS - 1}


def images_per_second(generate, net, device, n):
    labels = torch.arange(n) % net.num_classes
    draw(generate, labels, net, device, 0, batch=n)  # the first is slower: memory, and on a GPU the choice of kernels
    start = time.perf_counter()
    draw(generate, labels, net, device, 0, batch=n)
    return n / (time.perf_counter() - start)


class Referee:
    """Both judges of a data set, and the question of which labels were forgotten."""

    def __init__(self, data, device, forget, to, seed=1000):
        self.paths = [find_weights(data, "judge"), find_weights(data, "judge2")]
        if None in self.paths:
            raise BadInput(f"no judges for {data}: train them with `python train_teacher.py --data {data} --judge`")
        (self.judge, info), (self.judge2, _) = (load_judge(p, device) for p in self.paths)
        self.reference, self.floor, self.classes = info["train"], info["test"], info["classes"]
        self.device, self.forget, self.to, self.seed = device, forget, to, seed
        self.origin = {"data": info["data"], "accuracy": info["accuracy"], "sha256": digest(*self.paths)}
        self.kept = [k for k in range(len(self.classes)) if k not in forget]

    def misfit(self, net):
        """In words, that the judges know images of another shape or other labels than the network draws;
        empty if they know its."""
        shape = lambda n: f"{n['num_classes']} classes of {n['channels']}x{n['resolution']}x{n['resolution']} images"
        draws, knows = shape(vars(net)), shape(self.judge.settings)
        return "" if draws == knows else f"the teacher draws {draws}, the judge knows {knows}"

    def check(self, net, per_label):
        """BadInput where the judges cannot judge: another image shape, other labels,
        or too few images for precision and recall."""
        if misfit := self.misfit(net):
            raise BadInput(f"{misfit}: one of them is of another data set")
        if per_label * len(self.kept) < 4:
            raise BadInput(f"--per-label {per_label} is too few: "
                           "precision and recall need at least 4 images of kept labels")

    def measure(self, generate, net, counts, progress=None):
        """(class_stats of the first judge, confusion of the second) of counts[k] images under each label k."""
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        images = draw(generate, labels, net, self.device, self.seed, progress=progress)
        return class_stats(self.judge, images, labels), class_stats(self.judge2, images, labels, keep=0)["confusion"]

    def report(self, stats, confusion2):
        return metrics(stats, confusion2, self.reference, self.floor, self.forget, self.to)

    def probe(self, generate, net, per_label=100):
        """A quick look at a generator in training: UA, kept accuracy and an FD
        that is biased upwards by its small sample."""
        labels = torch.arange(net.num_classes).repeat_interleave(per_label)
        stats = class_stats(self.judge, draw(generate, labels, net, self.device, self.seed), labels, keep=0)
        accuracy = stats["confusion"].diag() / per_label
        forgotten = {"ua": 1 - accuracy[self.forget].mean().item()} if self.forget else {}
        return forgotten | {"kept_accuracy": accuracy[self.kept].mean().item(),
                            "fd": frechet(moments(stats, self.kept), moments(self.reference, self.kept))}

    def known(self, path, generate, net, per_label, what):
        """`measure` of a file that does not change, remembered beside it
        under the fingerprint of that file and the judges'."""
        memory = Path(path).with_name(Path(path).stem + "_measured.pt")
        fingerprint = digest(path, *self.paths)
        try:
            content = read_file(memory, "measured") if memory.exists() else {"fingerprint": None}
            if content["fingerprint"] == fingerprint and content["per_label"] >= per_label:
                return content["stats"], content["confusion2"]
        except CheckpointError as e:
            print(f"note: this will be measured again: {e}")
        stats, confusion2 = self.measure(generate, net, [per_label] * net.num_classes, progress=what)
        try:
            save_atomically({"kind": "measured", "fingerprint": fingerprint, "per_label": per_label,
                             "stats": stats, "confusion2": confusion2, "machine": machine(self.device)}, memory)
        except OSError as e:
            print(f"note: this will be measured again next time: {e}")
        return stats, confusion2


# --------------------------------------------------------------------------------------------------- the whole verdict

def un_erased(data, teacher_sha256, device):
    """(path, generator, its file's other entries) of the one-step generator there
    that forgot nothing and is of this teacher, or None."""
    for path in weight_files(data, "sid"):
        generator, info = load_checkpoint(path, device)
        if info["teacher_sha256"] == teacher_sha256:
            return path, generator, info
    return None


def verdict(out, device, per_label=PER_LABEL, teacher_file=None):
    """Judge out/generator.pt beside its teacher, and beside the one-step generator that has forgotten nothing where
    there is one. Prints the table; writes out/metrics.json, out/samples.png and, where there is a log, out/curves.png.
    Returns the metrics."""
    out, began = Path(out), time.perf_counter()
    generator, info = load_checkpoint(out / "generator.pt", device)
    if not {"settings", "sigma_init", "teacher_sha256"} <= info.keys():
        raise BadInput(f"{out / 'generator.pt'} is not the generator of a run of sfd_minimal.py")
    s, net, K = info["settings"], generator.settings, generator.settings.num_classes
    teacher_path = find_weights(info["data"], "teacher", teacher_file or s["teacher"])
    if teacher_path is None or digest(teacher_path) != info["teacher_sha256"]:
        raise BadInput(f"the teacher that {out} was distilled from is not at {teacher_path or 'teachers/'}: "
                       "name it with --teacher")
    teacher, teacher_info = load_checkpoint(teacher_path, device)
    referee = Referee(info["data"], device, info["forget"], info["to"])
    referee.check(net, per_label)
    if referee.origin["data"] != Path(info["data"]).name:
        print(f"note: the judges learned from {referee.origin['data']}, "
              f"and are right on {referee.origin['accuracy']:.2%} of its held-out images")
    forget, generate = info["forget"], one_step(generator, info["sigma_init"])

    counts = [5 * per_label if k in forget else per_label for k in range(K)]
    rows = {"this generator": referee.report(*referee.measure(generate, net, counts, progress="judging the generator"))}
    rows["this generator"] |= {"nfe": 1, "images_per_second": images_per_second(generate, net, device, 1000)}
    if forget and (found := un_erased(info["data"], info["teacher_sha256"], device)):
        sid_path, sid, sid_info = found
        sid = one_step(sid, sid_info["sigma_init"])
        rows["un-erased one-step"] = referee.report(
            *referee.known(sid_path, sid, net, per_label, "judging the un-erased generator, once"))
        rows["un-erased one-step"] |= {"nfe": 1, "images_per_second": images_per_second(sid, net, device, 1000),
                                       "seconds": sid_info["seconds"]}
    rows["teacher"] = referee.report(
        *referee.known(teacher_path, many_step(teacher), net, per_label, "judging the teacher, once"))

    labels = torch.arange(K).repeat_interleave(20)
    start = time.perf_counter()
    teacher_images = draw(many_step(teacher), labels, net, device, seed=0)
    rows["teacher"] |= {"nfe": 2 * TEACHER_STEPS - 1, "images_per_second": len(labels) / (time.perf_counter() - start),
                        "seconds": teacher_info.get("seconds")}
    samples_figure({"teacher, 35 evaluations": teacher_images,
                    "generator, 1 evaluation": draw(generate, labels, net, device, seed=0)},
                   referee.classes, forget, out / "samples.png")
    if (out / "log.csv").exists():
        curves_figure(out / "log.csv", rows["teacher"], out / "curves.png")

    result = rows["this generator"] | {
        "seconds": info["seconds"], "seconds_judging": time.perf_counter() - began, "judge": referee.origin,
        "teacher": rows["teacher"], "un_erased": rows.get("un-erased one-step"), "forget": forget, "to": info["to"],
        "settings": s, "trained_on": info["machine"], "machine": machine(device)}
    text = json.dumps(result, indent=1)
    (out / "metrics.json").write_text(text + "\n")
    rows = {name: rows[name] for name in ("teacher", "un-erased one-step", "this generator") if name in rows}
    print(table(rows), per_class_table(rows, referee.classes), sep="\n\n", end="\n\n")
    print(f"{result['n']} images of this generator judged ({per_label} per label"
          + (f", {5 * per_label} per forgotten label" if forget else "")
          + f"); FD of held-out real images, its floor: {result['fd_floor']:.2f}")
    print(f"trained in {info['seconds']:.0f} s, judged in {result['seconds_judging']:.0f} s; "
          f"numbers in {out / 'metrics.json'}, pictures beside it")
    return result


def write_samples(path, wanted, n, seed, out, device):
    """n images, the wanted labels in equal shares, from a one-step generator or a teacher,
    as .npz, one .png grid, or a folder."""
    generate, network, _ = load_generator(path, device)
    net = network.settings
    if not out:
        raise BadInput("--sample needs --out: a .npz or .png file, or a folder")
    if Path(out).is_dir() and any(Path(out).iterdir()):
        raise BadInput(f"{out} is not empty: what lies there would be taken for images of this network")
    asked = torch.tensor([label_number(k, net.num_classes) for k in wanted] if wanted else range(net.num_classes))
    labels = asked[torch.arange(n) * len(asked) // n]
    images, out = draw(generate, labels, net, device, seed, progress="drawing"), Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"cannot write to {out}: {e.strerror}") from e
    if out.suffix == ".npz":
        np.savez_compressed(out, images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    elif out.suffix == ".png":
        rows = max(r for r in range(1, int(n ** 0.5) + 1) if n % r == 0)
        to_picture(tile(images, rows)).save(out)
    else:
        out.mkdir(exist_ok=True)
        for i, (image, k) in enumerate(zip(images, labels.tolist())):
            to_picture(tile(image[None], 1)).save(out / f"{i:06d}-label{k}.png")
    print(f"{n} images of label {' '.join(map(str, asked.tolist()))} in {out}")


COLUMNS = [("UA", "ua", "{:.2%}"), ("as override", "override_share", "{:.2%}"), ("UA, judge 2", "ua_judge2", "{:.2%}"),
           ("kept accuracy", "kept_accuracy", "{:.2%}"), ("FD", "fd", "{:.1f}"), ("precision", "precision", "{:.3f}"),
           ("recall", "recall", "{:.3f}"), ("evaluations", "nfe", "{}"), ("images/s", "images_per_second", "{:.0f}")]


def table(rows):
    """Markdown table of metrics, one row per generator."""
    columns = [c for c in COLUMNS if any(c[1] in r for r in rows.values())]
    lines = [["", *[title for title, _, _ in columns]]]
    return aligned(lines + [[name, *[form.format(row[key]) if key in row else "" for _, key, form in columns]]
                            for name, row in rows.items()])


def per_class_table(rows, classes):
    """Markdown table of the share of each label's images that are judged as that label."""
    return aligned([["judged as its label, %", *classes],
                    *[[name, *[f"{100 * a:.1f}" for a in row["per_class_accuracy"]]] for name, row in rows.items()]])


def aligned(lines):
    """Lines of cells, the head first, as a Markdown table that also reads well in a terminal."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def results_table(files):
    """The README's table, from committed metrics.json files: first what is to be beaten, then one row per run."""
    from sfd_minimal import Settings  # here, because that file in turn imports this one
    runs = [json.loads(Path(f).read_text()) for f in files]
    first, lines = runs[0], []

    def add(name, m, teacher, seconds):
        unlearned = [f"{m['ua']:.2%}", f"{m['override_share']:.2%}"] if seconds and m["forget"] else ["", ""]
        lines.append([name, *unlearned, f"{m['kept_accuracy']:.2%}", f"{m['fd']:.2f}", f"{m['fd'] / teacher['fd']:.2f}",
                      f"{m['precision']:.3f}", f"{m['recall']:.3f}", str(m["nfe"]), seconds])

    add("teacher", first["teacher"], first["teacher"], "")
    if first["un_erased"]:
        add("one step, nothing forgotten", first["un_erased"], first["teacher"], "")
    for m in runs:
        s = {"lambda_anchor": 0, "guidance": 1} | m["settings"]  # results from before these were settings lack them
        name = (f"{' '.join(s['forget'])} to {' '.join(s['to'])}, seed {s['seed']}, {s['steps']} steps"
                + (" from the one-step generator" if s["init_from"] else ""))
        name += "".join(f", {key} {s[key]:g}" for key in ("lr", "lambda_forget", "lambda_anchor", "guidance")
                        if s[key] != getattr(Settings, key))
        name += f", teacher {Path(s['teacher']).stem}" if s["teacher"] else ""
        add(name, m, m["teacher"], f"{m['seconds']:.0f}")
    head = ["", "UA", "as override", "kept accuracy", "FD", "FD / teacher's",
            "precision", "recall", "evaluations", "seconds"]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *lines])


def main(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run of sfd_minimal.py; "
                                    "or the word 'table', for the README's table from results/*.json")
    parser.add_argument("--per-label", type=int, default=PER_LABEL,
                        help="images judged under each label; five times as many under a forgotten one")
    parser.add_argument("--teacher", help="its teacher, if it is no longer where it was")
    parser.add_argument("--audit", action="store_true", help="can it come back? six attempts, with real images")
    parser.add_argument("--data-dir", default="data",
                        help="where torchvision keeps or downloads the images for --audit")
    parser.add_argument("--device", default="auto")
    a = parser.parse_args(argv)
    positive(a, "per_label")
    given = {name for name, value in vars(a).items() if value != parser.get_default(name)}
    useful = {"run", "device"} | ({"audit", "data_dir"} if a.audit else {"per_label", "teacher"})
    refuse_useless(given, useful, f"{'with' if a.audit else 'without'} --audit")
    if a.audit:
        from audit import audit
        return audit(a.run, pick_device(a.device), a.data_dir)
    if a.run == "table":
        return print(results_table(sorted((HERE / "results").glob("*-*.json"))))
    if not (Path(a.run) / "generator.pt").exists():
        raise BadInput(f"{a.run} holds no generator.pt")
    verdict(a.run, pick_device(a.device), a.per_label, a.teacher)


if __name__ == "__main__":
    command(main)
