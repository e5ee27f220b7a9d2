"""Train what SFD takes as given: a label-conditional EDM teacher (Karras et al. 2022).

    python train_teacher.py --data mnist      # -> runs/mnist-teacher/teacher.pt
    python train_teacher.py --data prompts    # one that is asked with prompts, lab/prompts.py
"""
import copy
import dataclasses
import math
from dataclasses import dataclass

import torch

from edm_unet import EDMPrecond, NetSettings
from lab import prompts
from lab.checkpoint import in_folder, known_size, load_checkpoint, pack, save_atomically
from lab.cli import command, comparable, parse, setting
from lab.data import KNOWN, batches, data_name, how_many, load_images, recipe_of
from lab.device import has_fast_bf16, machine, pick_device, seed_everything
from lab.errors import BadInput
from lab.figures import samples_figure
from lab.run import Run, RunSettings, update_average
from lab.sample import TEACHER_NFE, draw, many_step


# ------------------------------------------------------------------------------------------------------------ settings

# What differs from one data set to another: the network, the noise it is trained on, and how long.
# A folder of images starts from "images".
TEACHERS = {
    "mnist": dict(net=NetSettings(patch=2, model_channels=32, channel_mult=(1, 2), num_blocks=1),
                  p_mean=0.2, p_std=1.2, flip=False, steps=11_000, batch=64, lr=2e-3),
    "cifar10": dict(net=NetSettings(resolution=32, channels=3, patch=2, model_channels=64, channel_mult=(1, 2, 2),
                                    num_blocks=1, attn_resolutions=(8,)),
                    p_mean=-0.4, p_std=1.4, flip=True, steps=4_400, batch=512, lr=2e-3),
}
TEACHERS["fashion_mnist"] = TEACHERS["mnist"]
TEACHERS["prompts"] = TEACHERS["mnist"] | dict(
    net=dataclasses.replace(TEACHERS["mnist"]["net"], channels=3, num_classes=prompts.LONGEST, words=prompts.WORDS))
TEACHERS["images"] = TEACHERS["cifar10"]


@dataclass
class Settings(RunSettings):
    data: str = setting("mnist", "mnist, fashion_mnist, cifar10, prompts, or a folder of class folders")
    data_dir: str = setting("data", "where torchvision keeps or downloads the data set", trains=False)
    size: int = setting(None, "resize a folder's images to this height and width (None: as for its judges)", above=0)
    steps: int = setting(None, "optimizer steps (None here and below: the data set's recipe, TEACHERS)", above=0)
    batch: int = setting(None, "images per step", above=0)
    lr: float = setting(None, "learning rate, after warm-up and before the decay to zero", above=0)
    warmup: int = setting(200, "steps of linear learning-rate warm-up", above=0)
    ema: float = setting(0.999, "decay of the weight average that is shipped", at_least=0, below=1)
    p_mean: float = setting(None, "mean of ln sigma in training; EDM's is -1.2")
    p_std: float = setting(None, "standard deviation of ln sigma in training; EDM's is 1.2", above=0)
    guidance: float = setting(1.0, "strength of the guidance that becomes part of the network; 1: EDM's own loss",
                              at_least=1)
    guidance_below: float = setting(None, "guide only at noise levels sigma below this (None: at all)", above=0)
    label_drop: float = setting(0.1, "share of labels replaced by zeros, which makes the null label mean 'any'",
                                at_least=0, below=1)
    init_from: str = setting("", "start from the weights of this teacher, not from fresh ones")
    compile: bool = setting(False, "torch.compile the network", trains=False)

    def __post_init__(self):
        self.fill(recipe_of(self.data, TEACHERS))
        if self.size is not None and self.data in KNOWN:
            raise BadInput(f"--size is for folders of images; {self.data} has its own")
        if self.guidance_below and self.guidance == 1:
            raise BadInput("--guidance-below has no meaning without --guidance")
        if self.guidance != 1 and self.label_drop == 0:
            raise BadInput("--guidance asks the network about the null label, "
                           "which it learns with --label-drop above zero")


# ------------------------------------------------------------------------------------------------------------ the loss

def distance(D, target, sigma, sd=0.5):
    """w(sigma) ||D - target||^2, w = (sigma^2 + sd^2) / (sigma sd)^2. Mean over all."""
    w = (sigma ** 2 + sd ** 2) / (sigma * sd) ** 2
    return (w * (D - target) ** 2).mean()


def edm_loss(D, x, sigma, c, guidance=1.0, guidance_below=None):
    """w(sigma) ||D(x_t; sigma, c) - x||^2, x_t = x + sigma eps: Karras et al. 2022, eq. 2. Mean over all.

    x (B, ...) images in [-1, 1], sigma (B, 1, ...), c (B, K). With guidance g the target is
    x + (1 - 1/g) sg[D(x_t; c) - D(x_t; 0)] (Tang et al. 2025, arXiv 2502.12154), and what minimises the loss is
    E_0 + g (E_c - E_0), E the posterior means: one evaluation of D gives what classifier-free guidance takes two for.
    From sigma = guidance_below up the target stays x (Kynkäänniemi et al. 2024, arXiv 2404.07724): what SFD distills
    should not point beyond the data.
    """
    x_t, target = x + sigma * torch.randn_like(x), x
    D_x = D(x_t, sigma, c)
    if guidance != 1:
        with torch.no_grad():
            guided = sigma < (guidance_below or math.inf)
            target = x + guided * (1 - 1 / guidance) * (D_x - D(x_t, sigma, torch.zeros_like(c)))
    return distance(D_x, target, sigma, D.sigma_data)


# ------------------------------------------------------------------------------------------------------------ the loop

def learning_rate(step, s):
    """Linear warm-up, then cosine to zero."""
    warm, progress = min(1.0, (step + 1) / s.warmup), step / s.steps
    return s.lr * warm * 0.5 * (1 + math.cos(math.pi * progress))


def begin(s, net, device):
    """All that training changes, by name. BadInput where --init-from is of another network than `net`."""
    model = EDMPrecond(net).to(device)
    if s.init_from:
        initial, info = load_checkpoint(in_folder(s.init_from, "teacher.pt"), device)
        if "sigma_init" in info:
            raise BadInput(f"{s.init_from} is a one-step generator, not a teacher")
        if initial.settings != net:
            raise BadInput(f"{s.init_from} is another network, {initial.settings}, than the one to train, {net}")
        model.load_state_dict(initial.state_dict())
    model.bf16 = has_fast_bf16(device)
    return {"model": model, "average": copy.deepcopy(model).eval().requires_grad_(False),
            "optimizer": torch.optim.Adam(model.parameters(), lr=s.lr, betas=(0.9, 0.99), fused=True)}


def train(s, data, model, average, optimizer, first=0):
    """Steps from number `first` on, on batches (x, c) of `data`: yields the loss of each."""
    device = model.conditions.device
    for step in range(first, s.steps):
        x, c = next(data)
        c = c * (torch.rand(s.batch, 1, device=device) >= s.label_drop)
        # stratified: less variance
        u = (torch.arange(s.batch, device=device) + torch.rand(s.batch, device=device)) / s.batch
        normal = math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-0.999999, 0.999999))  # rounding can make u 0 or 1
        sigma = (s.p_mean + s.p_std * normal).exp().view(-1, 1, 1, 1)
        loss = edm_loss(model, x, sigma, c, s.guidance, s.guidance_below)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, s)
        optimizer.step()
        update_average(average, model, s.ema, step)
        yield {"loss": loss.detach()}


# ---------------------------------------------------------------------------------------------------- the command line

def main(argv):
    s = parse(Settings, argv, __doc__)
    device, s.out = pick_device(s.device), s.out or f"runs/{data_name(s.data)}-teacher"
    s.size = s.size or known_size(s.data, "judge", "judge")
    seed_everything(s.seed)
    images, labels, classes = load_images(s.data, s.data_dir, s.size, train=True)
    recipe = recipe_of(s.data, TEACHERS)
    try:
        net = recipe["net"] if s.data == "prompts" else dataclasses.replace(
            recipe["net"], resolution=images.shape[2], channels=images.shape[1], num_classes=len(classes))
    except ValueError as e:
        raise BadInput(f"the images do not suit the network: {e}; another --size may") from e
    state = begin(s, net, device)
    run = Run(s, state, pinned={"images": how_many(labels, classes)})
    print(f"{sum(p.numel() for p in state['model'].parameters()) / 1e6:.2f} M parameters on {device}, "
          f"{len(images)} images of {len(classes)} classes, {s.steps} steps of {s.batch}; writing to {s.out}")
    if s.compile:
        state["model"].compile()
    images, labels, conditions = images.to(device), labels.to(device), state["model"].conditions
    if net.words:
        data = prompts.batches(images, labels, s.batch, net.words)
    else:
        data = ((x, conditions[label]) for x, label in batches(images, labels, s.batch, recipe["flip"]))
    for loss in run.steps(train(s, data, **state, first=run.step)):
        if run.step % 100 == 0:
            run.log(loss)

    teacher = state["average"]
    save_atomically({"kind": "denoiser", "data": s.data, "classes": classes, "size": s.size, "made_by": comparable(s),
                     "machine": machine(device), "seconds": run.seconds, **pack(teacher, half=True)},
                    run.out / "teacher.pt")
    asked, conditions = torch.arange(len(classes)).repeat_interleave(20), None
    if net.words:
        asked, conditions = prompts.grid(net.words)
    images = draw(many_step(teacher), asked, teacher, seed=0, conditions=conditions)
    samples_figure({f"teacher, {TEACHER_NFE} evaluations": images}, classes, [], run.out / "samples.png")
    print(f"{run.out / 'teacher.pt'} after {run.seconds:.0f} s; samples in {run.out / 'samples.png'}\nnext: "
          + ("" if net.words else f"python -m lab.judge --data {s.data}, then ")
          + f"python sfd_minimal.py --data {s.data} --teacher {run.out / 'teacher.pt'} --forget "
          + ("zero --to one" if net.words else "0 --to 1"))


if __name__ == "__main__":
    command(main)
