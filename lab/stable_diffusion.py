"""SFD on Stable Diffusion: forget a concept, draw an override instead, in one evaluation.

IT WAS NEVER RUN ON REAL WEIGHTS, nor on a GPU: none were at hand. What is tested (tests/test_stable_diffusion.py) are
tiny pipelines with random weights, on the CPU. The method's lines are those of sfd_minimal.py.

    pip install -r requirements.txt -r lab/requirements.txt
    python -m lab.stable_diffusion FOLDER --concept "brad pitt" --override "a man" --prompts FILE --out runs/sd
    python -m lab.stable_diffusion draw runs/sd --prompt "a photo of brad pitt" --n 4 --out images.png

FOLDER is a pipeline on this disk, or the id of one that was fetched before. FILE has a prompt a line; those with the
concept in them are to forget, all others are kept. No image is needed. Memory for the 860 M parameters of version 1.5,
by estimate: 33 GB if all learn (teacher in bfloat16; generator, average, fake score, two gradients and four moments in
float32), 7 GB with --lora 64 (four networks in bfloat16); and what --micro-batch images keep for the gradient.
"""
import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lab.cli import check_ranges, command, parse, setting
from lab.data import to_uint8
from lab.denoisers import FromEpsilon, FromV
from lab.device import pick_device, seed_everything
from lab.errors import BadInput
from lab.figures import tile, to_picture
from lab.run import Run, RunSettings, update_average
from sfd_minimal import decay, guided, sfd_step


@dataclass
class Settings(RunSettings):
    model: str = setting("", "folder of a diffusers pipeline, or its id", positional=True)
    concept: str = setting("", "the words to forget, as they stand in the prompts")
    override: str = setting("", "the words whose images are drawn instead")
    prompts: str = setting("", "file of prompts, one a line")
    lora: int = setting(0, "rank of LoRA; 0: all weights learn", at_least=0)
    dtype: str = setting("bfloat16", "of all but the weights that learn", choices=("float32", "bfloat16", "float16"))
    steps: int = setting(2000, "optimizer steps of generator and fake score", above=0)
    batch: int = setting(64, "prompts per step", above=0)
    micro_batch: int = setting(4, "of them at once in a network; each is evaluated again for its gradient", above=0)
    lr: float = setting(1e-6, "generator's learning rate", above=0)
    lr_fake: float = setting(3e-6, "fake score's learning rate", above=0)
    guidance: float = setting(4.5, "of the teacher: away from the null prompt, or the concept to forget", at_least=1)
    forget_share: float = setting(0.5, "share of a batch that names the concept", above=0, below=1)
    ema: float = setting(0.99, "decay of the generator's average, which is kept", at_least=0, below=1)
    sigma_init: float = setting(2.5, "noise level of the one evaluation, in latents of unit variance", above=0)
    alpha, lambda_forget, p_mean, p_std, sigma_min, sigma_max, u_max = 1.0, 1.0, 0.0, 1.2, 0.03, 14.6, 0.95
    __post_init__ = check_ranges


class Unet(nn.Module):
    """A diffusers U-Net as net(x, t, c), float32 outside and `dtype` inside; c (B, L, W) are token states."""

    def __init__(self, unet, dtype):
        super().__init__()
        self.unet, self.dtype = unet, dtype

    def forward(self, x, t, c):
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
            return self.unet(x, t, encoder_hidden_states=c).sample.float()


def learned(network):
    """The weights of a network that learn: what an optimizer moves and a checkpoint holds."""
    return nn.ParameterDict({k.replace(".", "/"): p for k, p in network.named_parameters() if p.requires_grad})


def load_pipeline(path):
    from diffusers import DiffusionPipeline
    try:
        return DiffusionPipeline.from_pretrained(path, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as e:
        raise BadInput(f"{path} is no pipeline on this disk: {str(e).splitlines()[0]}") from e


def denoiser(pipe, unet, dtype, micro_batch=None):
    """D of a pipeline's U-Net, by what its scheduler says that it predicts."""
    kinds = {"epsilon": FromEpsilon, "v_prediction": FromV}
    if (predicts := pipe.scheduler.config.prediction_type) not in kinds:
        raise BadInput(f"its network predicts {predicts}, known are {', '.join(kinds)}")
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    return kinds[predicts](Unet(unet, dtype), pipe.scheduler.alphas_cumprod, None, shape, 1.0, micro_batch)


@torch.no_grad()
def states(pipe, prompts):
    """Token states (N, L, W) of prompts. BadInput for one that would be cut."""
    limit = pipe.tokenizer.model_max_length
    ids = [pipe.tokenizer(prompt).input_ids for prompt in prompts]
    if long := [prompt for prompt, i in zip(prompts, ids) if len(i) > limit]:
        raise BadInput(f"longer than the {limit} tokens that the text encoder takes: {long[0]!r}")
    padded = pipe.tokenizer(prompts, padding="max_length", max_length=limit, return_tensors="pt").input_ids
    return torch.cat([pipe.text_encoder(part.to(pipe.text_encoder.device))[0].float() for part in padded.split(64)])


def asker(s, pipe, device):
    """ask(batch) -> (c_phi, c_psi, forgotten, negative): the teacher is asked about the override in the place of the
    concept, and guided away from the concept; in all other prompts away from the null prompt."""
    prompts = list(filter(None, map(str.strip, Path(s.prompts).read_text().splitlines())))
    naming, others = ([p for p in prompts if (s.concept in p) == named] for named in (True, False))
    if not (s.concept and s.override and naming and others):
        raise BadInput(f"{s.prompts} must hold prompts with --concept {s.concept!r} in them, and others, to keep")
    overridden = [prompt.replace(s.concept, s.override) for prompt in naming]
    to_forget, instead, kept, null = (states(pipe, of).to(device) for of in (naming, overridden, others, [""]))

    def ask(batch):
        forgotten = torch.rand(batch, device=device) < s.forget_share
        f, k = (torch.randint(len(of), (batch,), device=device) for of in (to_forget, kept))
        where = lambda a, b: torch.where(forgotten[:, None, None], a, b)
        return where(instead[f], kept[k]), where(to_forget[f], kept[k]), forgotten, where(to_forget[f], null)
    return ask


def learning(teacher, rank):
    """A copy of the teacher that learns: all of it, in float32, or LoRA of a rank."""
    network = copy.deepcopy(teacher)
    if not rank:
        return network.float().requires_grad_()
    from peft import LoraConfig
    network.net.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v"]))
    for p in learned(network).values():
        p.data = p.data.float()
    return network


def distill(s, ask, teacher, generator, average, fake, optimizer_theta, optimizer_psi, first, device):
    """SFD from step number `first` on: yields each step's loss terms."""
    for step in range(first, s.steps):
        for optimizer, lr in ((optimizer_theta, s.lr), (optimizer_psi, s.lr_fake)):
            optimizer.param_groups[0]["lr"] = lr * decay(step, s.steps)
        c_phi, c_psi, forgotten, negative = ask(s.batch)
        D_phi = guided(teacher, negative, torch.ones_like(forgotten), s.guidance)  # in all rows
        terms = sfd_step(generator, fake, D_phi, optimizer_theta, optimizer_psi,
                         torch.randn(s.batch, *teacher.shape, device=device), c_phi, c_psi, forgotten, s, 1.0)
        update_average(average, generator, s.ema, step)
        yield terms


def train(s):
    device, pipe = pick_device(s.device), load_pipeline(s.model)
    seed_everything(s.seed)
    s.out = s.out or f"runs/{Path(s.model).name}-forget-{s.concept.replace(' ', '_')}"
    pipe.text_encoder.to(device)
    ask = asker(s, pipe, device)
    dtype = getattr(torch, s.dtype)
    teacher = denoiser(pipe, pipe.unet.to(device, dtype).requires_grad_(False).eval(), dtype, s.micro_batch).to(device)
    generator, fake = learning(teacher, s.lora), learning(teacher, s.lora)
    networks = {"generator": generator, "average": copy.deepcopy(generator), "fake": fake}
    optimizers = {name: torch.optim.Adam(learned(network).values(), lr, betas=(0.0, 0.999))
                  for name, network, lr in (("optimizer_theta", generator, s.lr), ("optimizer_psi", fake, s.lr_fake))}
    state = {name: learned(network) for name, network in networks.items()} | optimizers
    run = Run(s, state, pinned={"prompts": Path(s.prompts).read_text()})
    print(f"{s.concept!r} is forgotten, {s.override!r} drawn instead; "
          f"{sum(p.numel() for p in learned(generator).values()) / 1e6:.1f} M weights learn on {device}")
    for terms in run.steps(distill(s, ask, teacher, **networks, **optimizers, first=run.step, device=device)):
        run.log(terms)
    pipe.unet = networks["average"].net.unet
    if s.lora:
        pipe.unet.fuse_lora()
        pipe.unet.unload_lora()
    pipe.to("cpu").save_pretrained(run.out / "pipeline")
    (run.out / "one_step.json").write_text(json.dumps({"sigma_init": s.sigma_init}) + "\n")
    print(f"next: python -m lab.stable_diffusion draw {s.out} --prompt ... --out images.png")


@dataclass
class Draw:
    run: str = setting("", "the folder of a run", positional=True)
    prompt: str = setting("", "what to draw")
    n: int = setting(4, "images to draw", above=0)
    out: str = setting("images.png", "picture to write")
    seed: int = setting(0, "random seed", at_least=0, below=2 ** 32)
    device: str = setting("auto", "auto, cpu, cuda or mps")
    __post_init__ = check_ranges


@torch.no_grad()
def draw(s):
    """n images of a prompt side by side, one evaluation of the U-Net each."""
    device, sigma = pick_device(s.device), json.loads((Path(s.run) / "one_step.json").read_text())["sigma_init"]
    pipe = load_pipeline(Path(s.run) / "pipeline").to(device)
    D = denoiser(pipe, pipe.unet.float(), torch.float32).to(device)
    z = torch.randn(s.n, *D.shape, generator=torch.Generator().manual_seed(s.seed)).to(device)
    x = D(sigma * z, torch.full((s.n, 1, 1, 1), sigma, device=device), states(pipe, [s.prompt]).expand(s.n, -1, -1))
    images = to_uint8(pipe.vae.float().decode(x / pipe.vae.config.scaling_factor).sample).cpu()
    to_picture(tile(images, 1)).save(s.out)
    print(f"{s.n} images of {s.prompt!r} in {s.out}")


def main(argv):
    draw(parse(Draw, argv[1:], __doc__)) if argv[:1] == ["draw"] else train(parse(Settings, argv, __doc__))


if __name__ == "__main__":
    command(main)
