"""The judges: two classifiers of a data set, their training, and what they say of a set of images.

    python -m lab.judge --data mnist    # both judges -> runs/mnist-judge/, runs/mnist-judge2/

The first one's features give the Frechet distance; the second, of another architecture and seed, guides nothing and
confirms.
"""
import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lab.checkpoint import known_size, read_file, save_atomically
from lab.cli import command, comparable, parse, setting
from lab.data import KNOWN, data_name, how_many, load_images, mirror, recipe_of, to_float
from lab.device import has_fast_bf16, machine, pick_device, seed_everything
from lab.errors import BadInput
from lab.run import Run, RunSettings


# ---------------------------------------------------------------------------------------------------------- the network

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


# -------------------------------------------------------------------------------------------------------- the training

def epoch_batch(images, labels, batch, step, flip):
    """Batch number `step` of (image in [-1, 1], label):
    each image once in an epoch, and mirrored in every second one if `flip`."""
    epoch, i = divmod(step, max(1, len(images) // batch))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
    i = order[i * batch:(i + 1) * batch].to(images.device)
    x = to_float(images[i])
    return mirror(x, (i + epoch) % 2 == 0) if flip else x, labels[i]


def jitter(x, progress):
    """For drawings: small random shifts, rotations and scalings."""
    n = len(x)
    angle, scale = (torch.rand(2, n, device=x.device) - 0.5) * torch.tensor([[0.4], [0.2]], device=x.device)
    shift = (torch.rand(n, 2, device=x.device) - 0.5) * 0.3
    c, si = angle.cos() * (1 + scale), angle.sin() * (1 + scale)
    theta = torch.stack([torch.stack([c, -si, shift[:, 0]], 1), torch.stack([si, c, shift[:, 1]], 1)], 1)
    # outside: black
    return F.grid_sample(x + 1, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False) - 1


def shift_and_hide(x, progress):
    """For photographs: at 6, 7 and then 8 eighths of their size, a third of the run each (coarse images are cheap to
    learn from), shifted by up to 2 pixels, and a grey square of a quarter of the side laid somewhere over them."""
    n, side = len(x), x.shape[2] * (6 + int(3 * progress)) // 8
    x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True) if side < x.shape[2] else x
    # (B, C, 5, 5, side, side), no copy
    windows = F.pad(x, (2, 2, 2, 2), mode="reflect").unfold(2, side, 1).unfold(3, side, 1)
    down, right = torch.randint(5, (2, n), device=x.device)
    x = windows[torch.arange(n, device=x.device), :, down, right]
    i = torch.arange(side, device=x.device)
    row, column = ((i - centre).abs() <= side // 8 for centre in torch.randint(side, (2, n, 1), device=x.device))
    return x.masked_fill((row[:, :, None] & column[:, None, :])[:, None], 0.0)


def whitening(x, side=2):
    """Filters (2 C side^2, C, side, side) whose answers to patches of x (B, C, H, W) are uncorrelated
    and of equal size, and their negatives."""
    patches = F.unfold(x.cpu(), side).transpose(1, 2).flatten(0, 1)  # not every device has eigh
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + 2e-3).sqrt()).T.unflatten(1, (x.shape[1], side, side))
    return torch.cat([filters, -filters])


JUDGES = {  # two architectures: the first guides nothing but the reader, the second confirms it
    "mnist": dict(nets=[dict(arch="cnn", width=16), dict(arch="resnet", width=16, stem_stride=2)],
                  augment=jitter, mirror=False, smoothing=0.0, steps=4000, batch=128, lr=4e-3,
                  optimizer=torch.optim.Adam, schedule={}),
    "cifar10": dict(nets=[dict(arch="resnet9", width=64), dict(arch="resnet", width=48, stem_stride=2)],
                    augment=shift_and_hide, mirror=True, smoothing=0.1, steps=4290, batch=256, lr=0.1,
                    optimizer=partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=1.5e-3),
                    schedule=dict(pct_start=0.25, anneal_strategy="linear", cycle_momentum=False)),
}
JUDGES["fashion_mnist"] = JUDGES["mnist"]
JUDGES["images"] = JUDGES["cifar10"]


@dataclass
class Settings(RunSettings):
    data: str = setting("mnist", "mnist, fashion_mnist, cifar10, or a folder of class folders")
    data_dir: str = setting("data", "where torchvision keeps or downloads the data set", trains=False)
    size: int = setting(None, "resize a folder's images to this height and width (None: as for its teacher)", above=0)
    steps: int = setting(None, "optimizer steps (None here and below: the data set's recipe, JUDGES)", above=0)
    batch: int = setting(None, "images per step, two at least for batch norm", at_least=2)
    lr: float = setting(None, "largest learning rate, after warm-up and before the decay to zero", above=0)

    def __post_init__(self):
        if self.data == "prompts":
            raise BadInput("prompts are judged by MNIST's judges: there is nothing to train (lab.prompt_judge)")
        self.fill(recipe_of(self.data, JUDGES))
        if self.size is not None and self.data in KNOWN:
            raise BadInput(f"--size is for folders of images; {self.data} has its own")


def train(s, recipe, images, labels, judge, optimizer, schedule, first=0):
    """Steps from number `first` on: yields the loss of each."""
    bf16 = has_fast_bf16(images.device)
    for step in range(first, s.steps):
        judge.train()
        x, c = epoch_batch(images, labels, s.batch, step, recipe["mirror"])
        x = recipe["augment"](x, step / s.steps).contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            logits, _ = judge(x)
        loss = F.cross_entropy(logits.float(), c, label_smoothing=recipe["smoothing"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield {"loss": loss.detach()}


def train_judge(s, device, number, training, test, classes):
    """One judge, saved with the moments of real features that the Frechet distance needs, so that no data is needed
    later. training and test: (images uint8, labels)."""
    (images, labels), (test_images, test_labels), recipe = training, test, recipe_of(s.data, JUDGES)
    images, labels, net = images.to(device), labels.to(device), recipe["nets"][number]
    try:
        judge = Judge(**net, mirror=recipe["mirror"], resolution=images.shape[2], channels=images.shape[1],
                      num_classes=len(classes))
    except ValueError as e:
        raise BadInput(f"{e}: another --size may help") from e
    judge = judge.to(device, memory_format=torch.channels_last)
    if net["arch"] == "resnet9":
        judge.trunk[0].weight.data.copy_(whitening(to_float(images[torch.randperm(len(images))[:5000]])))
    optimizer = recipe["optimizer"](judge.parameters(), lr=s.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.lr, total_steps=s.steps + 1, **recipe["schedule"])
    state = {"judge": judge, "optimizer": optimizer, "schedule": schedule}
    run = Run(s, state, pinned={"images": how_many(labels, classes)})
    for loss in run.steps(train(s, recipe, images, labels, **state, first=run.step)):
        if run.step % 100 == 0:
            run.log(loss)
    judge.half().float()  # what is measured is what is saved
    floor = class_stats(judge, test_images, test_labels, keep=0)
    reference = {"train": class_stats(judge, images, labels), "test": floor} if number == 0 else {}
    accuracy = floor["confusion"].diag().sum().item() / floor["confusion"].sum().item()
    save_atomically({"kind": "judge", "data": s.data, "classes": classes, "size": s.size, "judge": judge.settings,
                     "weights": {k: v.half().cpu() if v.is_floating_point() else v.cpu()
                                 for k, v in judge.state_dict().items()},
                     "accuracy": accuracy, **reference, "made_by": comparable(s), "machine": machine(device)},
                    run.out / "judge.pt")
    print(f"{run.out / 'judge.pt'}: {accuracy:.2%} of {len(test_images)} test images right, after {run.seconds:.0f} s")


def main(argv):
    s = parse(Settings, argv, __doc__)
    device, base = pick_device(s.device), s.out or f"runs/{data_name(s.data)}-judge"
    s.size = s.size or known_size(s.data, "teacher", "denoiser")
    *training, classes = load_images(s.data, s.data_dir, s.size, train=True)
    *test, _ = load_images(s.data, s.data_dir, s.size, train=False)
    for number, suffix in enumerate(("", "2")):
        seed_everything((s.seed + number) % 2 ** 32)
        resume = s.resume and (number == 0 or Path(f"{base}2/checkpoint.pt").exists())  # the second may not have begun
        train_judge(dataclasses.replace(s, out=base + suffix, resume=resume), device, number, training, test, classes)
    print(f"next: python sfd_minimal.py --data {s.data} --forget 0 --to 1")


if __name__ == "__main__":
    command(main)
