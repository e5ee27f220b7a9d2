"""Train what SFD takes as given: a label-conditional EDM teacher, and the two judges that say what an image shows.

    python train_teacher.py --data mnist            # the teacher  -> runs/mnist-teacher/
    python train_teacher.py --data mnist --judge    # both judges  -> runs/mnist-judge/, runs/mnist-judge2/
"""
import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import datasets

from common import (EMA, BadInput, Run, RunFailed, changed, check_run, command, comparable, machine, parse,
                    pick_device, positive, refuse_generator, refuse_useless, seed_everything, setting)
from edm_unet import EDMPrecond, NetSettings, has_fast_bf16, load_checkpoint, pack, save_atomically
from evaluate import Judge, class_stats, draw, many_step, to_float
from figures import samples_figure

# What differs from one data set to another: the network, the noise it is trained on, and how long.
# A folder of images starts from "images".
TEACHERS = {
    "mnist": dict(net=NetSettings(patch=2, model_channels=32, channel_mult=(1, 2), num_blocks=1),
                  p_mean=0.2, flip=False, steps=11_000, batch=64, lr=2e-3),
    "cifar10": dict(net=NetSettings(resolution=32, channels=3, model_channels=64, channel_mult=(1, 3, 3),
                                    num_blocks=2, attn_resolutions=(16,), dropout=0.1),
                    p_mean=-1.2, flip=True, steps=20_000, batch=512, lr=1e-3),
}
TEACHERS["fashion_mnist"] = TEACHERS["mnist"]
TEACHERS["images"] = TEACHERS["cifar10"]


def recipe_of(data, table):
    return table.get(data, table["images"])


@dataclass
class Settings:
    data: str = setting("mnist", "mnist, fashion_mnist, cifar10, or a folder of class folders")
    data_dir: str = setting("data", "where torchvision keeps or downloads the data set")
    size: int = setting(None, "resize a folder's images to this height and width (default: as they are)")
    judge: bool = setting(False, "train the judges instead of the teacher")
    steps: int = setting(None, "optimizer steps (default, like those of batch, lr and p_mean: "
                         "the data set's recipe above)")
    batch: int = setting(None, "images per step")
    lr: float = setting(None, "learning rate, after warm-up and before the decay to zero")
    warmup: int = setting(200, "steps of linear learning-rate warm-up")
    ema: float = setting(0.999, "decay of the weight average that is shipped")
    p_mean: float = setting(None, "mean of ln sigma in training; EDM's is -1.2")
    p_std: float = setting(1.2, "standard deviation of ln sigma in training")
    guidance: float = setting(1.0, "strength of the guidance that becomes part of the network, "
                              "so that drawing needs none; 1 is EDM's own loss")
    guidance_below: float = setting(float("inf"), "guide only at noise levels sigma below this")
    label_drop: float = setting(0.1, "share of labels replaced by zeros, which makes the null label mean 'any'")
    seed: int = setting(0, "random seed")
    init_from: str = setting("", "start from the weights of this teacher, not from fresh ones")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    compile: bool = setting(False, "torch.compile the network")
    out: str = setting("", "folder to write to (default: runs/<data>-teacher or runs/<data>-judge)")
    save_every: float = setting(30.0, "seconds between checkpoints")
    resume: bool = setting(False, "continue the run in the folder")
    overwrite: bool = setting(False, "replace the run in the folder")

    def __post_init__(self):
        if self.judge:
            refuse_useless(changed(self), {"data", "data_dir", "size", "judge", "steps", "batch", "lr", "seed",
                                           "device", "out", "save_every", "resume", "overwrite"}, "with --judge")
        if self.size is not None and self.data in TEACHERS:
            raise BadInput(f"--size is for folders of images; {self.data} has its own")
        recipe = recipe_of(self.data, JUDGES if self.judge else TEACHERS)
        for name in ("steps", "batch", "lr", "p_mean"):
            if getattr(self, name) is None:
                setattr(self, name, recipe.get(name))
        positive(self, "steps", "batch", "lr", "warmup", "p_std", *(["size"] if self.size is not None else []))
        check_run(self)
        if not math.isfinite(self.p_mean or 0):
            raise BadInput(f"--p-mean must be finite, not {self.p_mean}")
        if not 1 <= self.guidance < float("inf"):
            raise BadInput(f"--guidance must be at least 1 and finite, not {self.guidance}")
        if not self.guidance_below > 0 or self.guidance == 1 and self.guidance_below != float("inf"):
            raise BadInput(f"--guidance-below must be above zero, not {self.guidance_below}, "
                           "and has no meaning without --guidance")
        if not 0 <= self.label_drop < 1 or not 0 <= self.ema < 1:
            raise BadInput("--label-drop and --ema must lie in [0, 1)")
        if self.guidance != 1 and self.label_drop == 0:
            raise BadInput("--guidance asks the network about the null label, "
                           "which it learns with --label-drop above zero")


def load_images(data, data_dir, size, train):
    """(images uint8 (N, C, H, W), labels int64 (N,), class names). Everything in memory: these data sets are small."""
    if data in ("mnist", "fashion_mnist", "cifar10"):
        kind = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[data]
        try:
            d = kind(data_dir, train=train, download=True)  # looks on the disk first
        except (RuntimeError, OSError) as e:
            raise BadInput(f"{data} is not in {data_dir} and could not be downloaded: {e}") from e
        images, labels = torch.as_tensor(np.asarray(d.data)), torch.as_tensor(d.targets)
        return ((images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)).contiguous(),
                labels, list(d.classes))
    return load_folder(Path(data), size, train)


def load_folder(root, size, train):
    """`load_images` for a folder of class folders.
    Held out is root/test beside root/train where they exist, else every tenth image."""
    split = (root / "train").is_dir() and (root / "test").is_dir()
    try:
        folder = datasets.ImageFolder(root / ("train" if train else "test") if split else root)
    except OSError as e:
        raise BadInput(f"{root}: no data set of that name, "
                       f"and no folder of class folders with images in each: {e}") from e
    if split and datasets.folder.find_classes(root / "train") != datasets.folder.find_classes(root / "test"):
        raise BadInput(f"{root}: train and test do not hold the same class folders")
    if len(folder.classes) < 2:
        raise BadInput(f"{root} has one class; a label-conditional teacher needs at least two")
    images, labels, seen = [], [], [0] * len(folder.classes)
    for path, label in folder.samples:
        seen[label] += 1
        if not split and (seen[label] % 10 == 1) == train:  # the first, the eleventh, ... of each class are held out
            continue
        try:
            with Image.open(path) as image:
                image = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            raise BadInput(f"{path} cannot be read as an image: remove it") from e
        image = image.resize((size, size), Image.Resampling.LANCZOS) if size else image
        if images and image.size != images[0].size:
            raise BadInput(f"{root} mixes image sizes ({images[0].size} and, in {path}, {image.size}): say --size")
        images.append(image)
        labels.append(label)
    if len(set(labels)) < len(folder.classes):
        raise BadInput(f"{root}: at least two images of each class are needed, one of them to hold out")
    if images[0].width != images[0].height:
        raise BadInput(f"{root}: images of {images[0].size} are not square: say --size")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels), folder.classes


def mirror(x, which):
    """x (B, C, H, W), mirrored left to right where which (B,) is true."""
    return torch.where(which[:, None, None, None], x.flip(3), x)


def batches(images, labels, batch, flip):
    """Endless (image in [-1, 1], label) batches, drawn with replacement on the images' own device."""
    while True:
        i = torch.randint(len(images), (batch,), device=images.device)
        x = to_float(images[i])
        if flip:
            x = mirror(x, torch.rand(batch, device=images.device) < 0.5)
        yield x, labels[i]


def distance(D, target, sigma, sd=0.5):
    """w(sigma) ||D - target||^2, w = (sigma^2 + sd^2) / (sigma sd)^2. Mean over all."""
    weight = (sigma ** 2 + sd ** 2) / (sigma * sd) ** 2
    return (weight * (D - target) ** 2).mean()


def edm_loss(D, x, sigma, label, guidance=1.0, guidance_below=float("inf")):
    """w(sigma) ||D(x_t; sigma, label) - x||^2, x_t = x + sigma eps: Karras et al. 2022, eq. 2. Mean over all.

    With guidance g the target is x + (1 - 1/g) sg[D(x_t; label) - D(x_t; 0)] (Tang et al. 2025, arXiv 2502.12154), and
    what minimises the loss is E_0 + g (E_label - E_0), E the posterior means: one evaluation of D gives what
    classifier-free guidance takes two for. From sigma = guidance_below up the target stays x (Kynkäänniemi et al. 2024,
    arXiv 2404.07724): what SFD distils should not point beyond the data."""
    x_t, target = x + sigma * torch.randn_like(x), x
    D_x = D(x_t, sigma, label)
    if guidance != 1:
        with torch.no_grad():
            target = x + (sigma < guidance_below) * (1 - 1 / guidance) * (D_x - D(x_t, sigma, torch.zeros_like(label)))
    return distance(D_x, target, sigma, D.settings.sigma_data)


def report(run, loss):
    """Stop at the first loss that is not finite; log every hundredth."""
    step = run.step + 1
    if not math.isfinite(loss):
        raise RunFailed(f"the loss is {loss} at step {step}: try a smaller --lr. "
                        f"The last good checkpoint, if there is one, is {run.path}")
    if step % 100 == 0:
        run.history.append({"step": step, "seconds": round(run.seconds, 1), "loss": loss})
        run.bar.set_postfix(loss=f"{loss:.4f}")


def learning_rate(step, s):
    """Learning rate: linear warm-up, then cosine to zero."""
    warm, progress = min(1.0, (step + 1) / s.warmup), step / s.steps
    return s.lr * warm * 0.5 * (1 + math.cos(math.pi * progress))


def train_teacher(s, device):
    images, labels, classes = load_images(s.data, s.data_dir, s.size, train=True)
    images, labels = images.to(device), labels.to(device)
    recipe = recipe_of(s.data, TEACHERS)
    try:
        net = dataclasses.replace(recipe["net"], resolution=images.shape[2], channels=images.shape[1],
                                  num_classes=len(classes))
    except ValueError as e:
        raise BadInput(f"the images do not suit the network: {e}; another --size may") from e
    model = EDMPrecond(net).to(device)
    if s.init_from:
        initial, info = load_checkpoint(s.init_from, device)
        refuse_generator(s.init_from, info)
        if initial.settings != net:
            raise BadInput(f"{s.init_from} is another network, {initial.settings}, than the one to train, {net}")
        model.load_state_dict(initial.state_dict())
    average = EDMPrecond(net).to(device).eval()
    average.load_state_dict(model.state_dict())
    model.bf16 = average.bf16 = has_fast_bf16(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=s.lr, betas=(0.9, 0.99), fused=True)
    D, ema = torch.compile(model) if s.compile else model, EMA(model, average, s.ema)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}, "
          f"{len(images)} images of {len(classes)} classes, {s.steps} steps of {s.batch}")

    run = Run(s.out, s, {"model": model, "average": average, "optimizer": optimizer},
              s.resume, s.overwrite, s.save_every)
    data = batches(images, labels, s.batch, recipe["flip"])
    for step in run:
        x, c = next(data)
        label = F.one_hot(c, len(classes)).float() * (torch.rand(s.batch, 1, device=device) >= s.label_drop)
        # stratified: less variance
        u = (torch.arange(s.batch, device=device) + torch.rand(s.batch, device=device)) / s.batch
        normal = math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-0.999999, 0.999999))  # rounding can make u 0 or 1
        sigma = (s.p_mean + s.p_std * normal).exp().reshape(-1, 1, 1, 1)
        loss = edm_loss(D, x, sigma, label, s.guidance, s.guidance_below)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        optimizer.step()
        ema.update(step)
        report(run, loss.item())

    save_atomically({"kind": "denoiser", "data": s.data, "classes": classes, "made_by": comparable(s),
                     "machine": machine(device), "seconds": run.seconds, **pack(average, half=True)},
                    Path(s.out) / "teacher.pt")
    labels = torch.arange(len(classes)).repeat_interleave(20)
    samples_figure({"teacher, 35 evaluations": draw(many_step(average), labels, net, device, seed=0)},
                   classes, [], Path(s.out) / "samples.png")
    print(f"{Path(s.out) / 'teacher.pt'} after {run.seconds:.0f} s; samples in {Path(s.out) / 'samples.png'}")


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
    patches = F.unfold(x, side).transpose(1, 2).flatten(0, 1)
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


def train_judge(s, device, number):
    """One judge, saved with the moments of real features that the Frechet distance needs,
    so that no data is needed later."""
    images, labels, classes = load_images(s.data, s.data_dir, s.size, train=True)
    test_images, test_labels, _ = load_images(s.data, s.data_dir, s.size, train=False)
    images, labels = images.to(device), labels.to(device)
    recipe = recipe_of(s.data, JUDGES)
    net = recipe["nets"][number]
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
    bf16 = has_fast_bf16(device)
    run = Run(s.out, s, {"judge": judge, "optimizer": optimizer, "schedule": schedule},
              s.resume, s.overwrite, s.save_every)
    for step in run:
        judge.train()
        x, c = epoch_batch(images, labels, s.batch, step, recipe["mirror"])
        x = recipe["augment"](x, step / s.steps).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits, _ = judge(x)
        loss = F.cross_entropy(logits.float(), c, label_smoothing=recipe["smoothing"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        report(run, loss.item())
    judge.half().float()  # what is measured is what is saved
    test = class_stats(judge, test_images, test_labels, keep=0)
    reference = {"train": class_stats(judge, images, labels), "test": test} if number == 0 else {}
    accuracy = test["confusion"].diag().sum().item() / test["confusion"].sum().item()
    save_atomically({"kind": "judge", "data": s.data, "classes": classes, "judge": judge.settings,
                     "weights": {k: v.half().cpu() if v.is_floating_point() else v.cpu()
                                 for k, v in judge.state_dict().items()},
                     "accuracy": accuracy, **reference, "made_by": comparable(s), "machine": machine(device)},
                    Path(s.out) / "judge.pt")
    print(f"{Path(s.out) / 'judge.pt'}: {accuracy:.2%} of {len(test_images)} test images right, "
          f"after {run.seconds:.0f} s")


def main(argv):
    s = parse(Settings, argv, __doc__.splitlines()[0])
    device = pick_device(s.device)
    seed_everything(s.seed)
    name = Path(s.data).name
    if not s.judge:
        s.out = s.out or f"runs/{name}-teacher"
        return train_teacher(s, device)
    base = s.out or f"runs/{name}-judge"
    for number, suffix in enumerate(("", "2")):
        seed_everything(s.seed + number)
        resume = s.resume and (number == 0 or Path(f"{base}2/checkpoint.pt").exists())  # the second may not have begun
        train_judge(dataclasses.replace(s, out=base + suffix, resume=resume), device, number)


if __name__ == "__main__":
    command(main)
