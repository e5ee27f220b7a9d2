"""Train a label-conditional EDM teacher (Karras et al. 2022): the diffusion model that SFD starts from.

    python train_teacher.py --data mnist                  # -> runs/mnist-teacher/teacher.pt
    python train_teacher.py --data path/to/class/folders  # your own images, one folder for each class

SFD itself needs no images: only its teacher is trained on them. Your own images are read by lab/core/images.py.
"""
import copy
import math
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from edm_unet import (BadInput, EDMPrecond, NetSettings, Parser, RunFailed, Stopped, command, command_line, data_name,
                      digest, edm_loss, has_fast_bf16, heun_sampler, import_torchvision, load_checkpoint, load_network,
                      machine, make_run_folder, pack, pick_device, save_checkpoint, save_file, save_images,
                      stratified_normal, watch_pace, weighted_distance)


@dataclass
class Settings:
    steps: int = 11_000
    batch: int = 64
    lr: float = 2e-3                   # Adam's learning rate: linear warm-up, then a cosine to zero
    warmup: int = 200                  # steps of the warm-up
    ema: float = 0.999                 # decay of the running average of the weights, which is the teacher
    p_mean: float = 0.2                # training noise: ln sigma ~ N(p_mean, p_std^2); EDM's p_mean is -1.2
    p_std: float = 1.2
    label_drop: float = 0.1            # share of labels replaced by zeros, so that zeros mean "any label"
    guidance: float = 1.0              # strength of the guidance that is trained into the network; 1 is EDM's own loss
    guidance_below: float = math.inf   # guidance is applied at noise levels sigma below this
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch", "lr", "warmup", "p_std", "guidance_below"):
            if not getattr(self, name) > 0:
                raise BadInput(f"{name} must be above 0, not {getattr(self, name)}")
        if not all(map(math.isfinite, (self.lr, self.p_mean, self.p_std, self.guidance))) or self.guidance < 1:
            raise BadInput("lr, p_mean, p_std and guidance must be finite, and guidance at least 1")
        if not 0 <= self.ema < 1 or not 0 <= self.label_drop < 1 or not 0 <= self.seed < 2 ** 32:
            raise BadInput(f"ema and label_drop must lie in [0, 1), and seed between 0 and {2 ** 32 - 1}")
        if self.guidance > 1 and self.label_drop == 0:
            raise BadInput("guidance needs label_drop above 0, which teaches the network the null label")
        if self.guidance == 1 and self.guidance_below < math.inf:
            raise BadInput("guidance_below has no effect without guidance")


MNIST_NET = NetSettings(patch=2, model_channels=32, channel_mult=(1, 2), num_blocks=1)
PHOTO_NET = NetSettings(resolution=32, channels=3, patch=2, model_channels=64, channel_mult=(1, 2, 2), num_blocks=1,
                        attn_resolutions=(8,))
PRESETS = {  # (network, whether images are mirrored at random, differences from the settings above)
    "mnist": (MNIST_NET, False, dict()),
    "fashion_mnist": (MNIST_NET, False, dict()),
    "cifar10": (PHOTO_NET, True, dict(p_mean=-0.4, p_std=1.4, steps=4_400, batch=512)),
}
PRESETS["own images"] = PRESETS["cifar10"]
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}


# ---------------------------------------------------------------------------------------------------------- the images

def load_known(data, data_dir, train=True):
    """(images uint8 (N, C, H, W), labels (N,), class names) of a data set that torchvision knows.

    BadInput where the data set is not in the folder and cannot be downloaded, or torchvision cannot be imported.
    """
    datasets = import_torchvision("datasets")
    try:
        found = getattr(datasets, TORCHVISION[data])(data_dir, train=train, download=True)  # looks on the disk first
    except (RuntimeError, OSError, ValueError, IndexError, AssertionError) as e:  # what torchvision raises
        raise BadInput(f"{data} cannot be read from {data_dir}, nor downloaded: {e}. "
                       f"If its files in {data_dir} are damaged, remove them") from e
    images = torch.as_tensor(np.asarray(found.data))
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous(), torch.as_tensor(found.targets), list(found.classes)


def to_float(images):
    """uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def mirror(x, rows):
    """Images x (B, C, H, W), mirrored left to right where rows (B,) is true."""
    return torch.where(rows[:, None, None, None], x.flip(3), x)


def batches(images, labels, batch, flip):
    """Yield (images in [-1, 1], labels), drawn with replacement on the images' own device, for ever."""
    while True:
        i = torch.randint(len(images), (batch,), device=images.device)
        x = to_float(images[i])
        if flip:
            x = mirror(x, torch.rand(batch, device=images.device) < 0.5)
        yield x, labels[i]


# -------------------------------------------------------------------------------------------------------- the training

def guided_edm_loss(D, x, sigma, c, guidance=1.0, guidance_below=math.inf):
    """EDM's loss with guidance trained into the network: the shipped teachers were made so (teachers/README.md).

    With guidance g the target is x + (1 - 1/g) [D(x_t; c) - D(x_t; 0)], without gradient (Tang et al. 2025, arXiv
    2502.12154). D converges to E_0 + g (E_c - E_0), E the posterior means: one evaluation then replaces the two of
    classifier-free guidance. From sigma = guidance_below up the target is x (Kynkaanniemi et al. 2024, 2404.07724).
    """
    if guidance == 1:
        return edm_loss(D, x, sigma, c)
    x_t = x + sigma * torch.randn_like(x)
    D_x = D(x_t, sigma, c)
    with torch.no_grad():
        away = (1 - 1 / guidance) * (D_x - D(x_t, sigma, torch.zeros_like(c)))
        target = x + torch.where(sigma < guidance_below, away, 0)
    return weighted_distance(D_x, target, sigma, D.sigma_data)


def learning_rate(s, step):
    """A linear warm-up times a cosine to zero."""
    return s.lr * min(1.0, (step + 1) / s.warmup) * 0.5 * (1 + math.cos(math.pi * step / s.steps))


def begin(network, lr):
    """{name: part} of everything that training changes: the network, the running average of its weights, Adam."""
    average = copy.deepcopy(network).eval().requires_grad_(False)
    return {"network": network, "average": average,
            "optimizer": torch.optim.Adam(network.parameters(), lr, betas=(0.9, 0.99), fused=True)}


def train(s, data, network, average, optimizer, first=0):
    """Yield the loss of each step from number `first` on. data yields batches (x, c)."""
    for step in range(first, s.steps):
        x, c = next(data)
        c = c * (torch.rand(len(x), 1, device=x.device) >= s.label_drop)
        sigma = (s.p_mean + s.p_std * stratified_normal(len(x), x.device)).exp().view(-1, 1, 1, 1)
        loss = guided_edm_loss(network, x, sigma, c, s.guidance, s.guidance_below)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, step)
        optimizer.step()
        beta = min(s.ema, (1 + step) / (8 + step))  # smaller at first, to leave the start behind
        with torch.no_grad():
            for a, p in zip(average.parameters(), network.parameters()):
                a.lerp_(p, 1 - beta)
        yield {"loss": loss.detach()}


# ---------------------------------------------------------------------------------------------------- the command line

def run(s, data, parts, checkpoint, fixed):
    """Train, with a checkpoint every 30 seconds, or go on from the checkpoint that is there. Returns the seconds."""
    first, seconds = 0, 0.0
    if checkpoint.exists():
        first, seconds = load_checkpoint(checkpoint, fixed, parts, defaults=asdict(Settings()))
    else:
        save_checkpoint(checkpoint, 0, 0.0, fixed, parts)
    began = saved = time.monotonic()
    training = watch_pace(train(s, data, **parts, first=first))
    bar = tqdm(training, total=s.steps, initial=first, unit="step", mininterval=0.5)
    for step, terms in enumerate(bar, first + 1):
        if step % 50 == 0 or step == s.steps:
            if not terms["loss"].isfinite():
                raise RunFailed(f"the loss is {terms['loss']} at step {step}: begin again with a smaller --lr")
            bar.set_postfix(loss=f"{terms['loss']:.3g}")
        if time.monotonic() - saved > 30 or step == s.steps:
            saved = time.monotonic()
            save_checkpoint(checkpoint, step, seconds + saved - began, fixed, parts)
    return seconds + time.monotonic() - began


def write_results(out, teacher, content):
    """Write teacher.pt, in half precision, and samples.png, a row for each label."""
    save_file(out / "teacher.pt", {**content, **pack(teacher, half=True)})
    conditions = teacher.conditions
    z = torch.randn(20 * len(conditions), *teacher.shape, device=conditions.device)
    save_images(heun_sampler(teacher, z, conditions.repeat_interleave(20, 0)), 20, out / "samples.png")
    judge = command_line("-m", "lab.judge", "--data", content["data"])
    sfd = command_line("sfd_minimal.py", "--teacher", out / "teacher.pt", "--forget", "0", "--to", "1")
    print(f"trained in {content['seconds']:.0f} s: {out / 'teacher.pt'}, with samples.png beside it\n"
          f"next: {judge}, then {sfd}")


def load_images(data, data_dir, size):
    """(images, labels, class names) to train on, from torchvision or from a folder of class folders."""
    if data in TORCHVISION:
        if size:
            raise BadInput(f"--size is for folders of images; {data} has its own")
        return load_known(data, data_dir)
    if not (Path(__file__).parent / "lab").is_dir():
        raise BadInput(f"{data} is no data set of torchvision, and folders need the folder lab/ of the project")
    from lab.core.images import load_folder
    return load_folder(Path(data), size, train=True)


def parse(argv):
    parser = Parser(__doc__)
    parser.add_argument("--data", default="mnist", help="mnist, fashion_mnist, cifar10, or a folder of class folders")
    parser.add_argument("--data-dir", default="data", help="where torchvision keeps or downloads the images")
    parser.add_argument("--size", type=int, help="resize the images of a folder to this height and width")
    parser.add_argument("--init-from", help="start from the weights of this teacher")
    parser.add_argument("--out", help="folder to write to (default: runs/<data>-teacher)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    for f in fields(Settings):
        option, default = "--" + f.name.replace("_", "-"), f"default: of the preset, or {f.default}"
        parser.add_argument(option, type=f.type, help=f"see Settings ({default})")
    return parser.parse_args(argv)


def main(argv):
    a = parse(argv)
    device = pick_device(a.device)
    net, flip, preset = PRESETS.get(a.data, PRESETS["own images"])
    given = {f.name: getattr(a, f.name) for f in fields(Settings) if getattr(a, f.name) is not None}
    s = Settings(**{**preset, **given})
    if a.size is not None and a.size < 1:
        raise BadInput(f"--size must be above 0, not {a.size}")
    images, labels, classes = load_images(a.data, a.data_dir, a.size)
    try:
        net = replace(net, resolution=images.shape[2], channels=images.shape[1], num_classes=len(classes))
    except ValueError as e:
        raise BadInput(f"the images do not suit the network: {e}; another --size may") from e
    out = Path(a.out or f"runs/{data_name(a.data)}-teacher").expanduser()
    if a.data not in TORCHVISION and out.resolve().is_relative_to(Path(a.data).resolve()):
        raise BadInput(f"{out} is inside the images' folder: name another folder with --out")

    torch.manual_seed(s.seed)
    network = EDMPrecond(net).to(device)
    if a.init_from:
        start, info = load_network(a.init_from, device)
        if start.settings != net or "sigma_init" in info:
            raise BadInput(f"{a.init_from} is no teacher, or has another network than this run, {net}")
        network.load_state_dict(start.state_dict())
    network.bf16 = has_fast_bf16(device)
    images, labels = images.to(device), labels.to(device)
    data = ((x, network.conditions[k]) for x, k in batches(images, labels, s.batch, flip))
    size = sum(p.numel() for p in network.parameters()) / 1e6
    print(f"{size:.2f} M parameters on {device.type}, {len(images)} images of {len(classes)} classes, "
          f"{s.steps} steps of {s.batch}, writing to {out}")
    fixed = {**asdict(s), "images": [[name, int((labels == k).sum())] for k, name in enumerate(classes)],
             "size": a.size, "init_from": digest(a.init_from) if a.init_from else None}
    parts = begin(network, s.lr)
    make_run_folder(out, a.resume)
    content = {"data": a.data, "classes": classes, "size": a.size, "machine": machine(device),
               "made_by": {**asdict(s), "data": a.data, "init_from": a.init_from}}
    try:
        content["seconds"] = run(s, data, parts, out / "checkpoint.pt", fixed)
        write_results(out, parts["average"], content)
    except KeyboardInterrupt as e:
        raise Stopped from e


if __name__ == "__main__":
    command(main)
