"""SFD on Stable Diffusion: forget a concept, draw an override instead, in one evaluation.

THIS WAS NEVER RUN ON REAL WEIGHTS, nor on a GPU: none were at hand. tests/test_stable_diffusion.py runs tiny pipelines
with random weights on the CPU. The method is `sfd_minimal.sfd_step`.

    pip install -r requirements.txt -r lab/requirements.txt
    python -m lab.adapters.stable_diffusion FOLDER --concept "brad pitt" --override "a man" --prompts FILE --out runs/sd
    python -m lab.adapters.stable_diffusion draw runs/sd --prompt "a photo of brad pitt" --n 4 --out images.png

FOLDER is a diffusers pipeline on this disk, or the id of one that was fetched before. FILE has a prompt on each line.
Prompts that contain the concept are to be forgotten, all others are kept. No images are needed.

Memory for the 860 M parameters of version 1.5, estimated: 33 GB if all weights learn (the teacher in bfloat16, and in
float32 the generator, its average, the fake score, two gradients and four moments), 7 GB with --lora 64 (four networks
in bfloat16). What --micro-batch images keep for the gradient comes on top.
"""
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from edm_unet import BadInput, command, pick_device, save_images
from lab.adapters.denoisers import FromEpsilon, FromV, FromX0, InParts, check_noise_range
from lab.core.options import parse, setting
from lab.core.runs import Run, RunSettings, seed_everything
from lab.core.tables import read_json, write_json
from lab.distill import guided
from sfd_minimal import Networks, set_learning_rates, sfd_step, update_average

PREDICTIONS = {"epsilon": FromEpsilon, "v_prediction": FromV, "sample": FromX0}  # by diffusers' name


@dataclass
class Settings(RunSettings):
    model: str = setting("", "folder of a diffusers pipeline, or its id", positional=True)
    concept: str = setting("", "words to forget, as in the prompts")
    override: str = setting("", "words whose images are drawn instead")
    prompts: str = setting("", "file with a prompt on each line")
    lora: int = setting(0, "rank of LoRA; 0: all weights learn", at_least=0)
    dtype: str = setting("bfloat16", "of all weights that do not learn", choices=("float32", "bfloat16", "float16"))
    steps: int = setting(2000, "optimizer steps of generator and fake score", above=0)
    batch: int = setting(64, "prompts per step", above=0)
    micro_batch: int = setting(4, "images at once in a network; each is evaluated again for its gradient", above=0)
    lr: float = setting(1e-6, "generator's learning rate", above=0)
    lr_fake: float = setting(3e-6, "fake score's learning rate", above=0)
    guidance: float = setting(4.5, "of the teacher, away from the null prompt or the concept to forget", at_least=1)
    forget_share: float = setting(0.5, "share of a batch with the concept in its prompts", above=0, below=1)
    ema: float = setting(0.99, "decay of the generator's average, which is the result", at_least=0, below=1)
    sigma_init: float = setting(2.5, "noise level of the one evaluation, in latents of unit variance", above=0)

    # not options; see sfd_minimal.Settings. Stable Diffusion learned noise levels from 0.029 to 14.6
    alpha = 1.0
    lambda_forget = 1.0
    p_mean = 0.0
    p_std = 1.2
    sigma_min = 0.03
    sigma_max = 14.6
    u_max = 0.95


# ------------------------------------------------------------------------------------------------------- the networks

class Unet(nn.Module):
    """A diffusers U-Net as net(x, t, c), float32 outside and `dtype` inside. c (B, L, W) are token states."""

    def __init__(self, unet, dtype):
        super().__init__()
        self.unet, self.dtype = unet, dtype

    def forward(self, x, t, c):
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
            return self.unet(x, t, encoder_hidden_states=c).sample.float()


def load_pipeline(path):
    """The diffusers pipeline in a folder. BadInput where there is none."""
    from diffusers import DiffusionPipeline
    try:
        return DiffusionPipeline.from_pretrained(path, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as e:
        raise BadInput(f"{path} is no pipeline on this disk: {str(e).splitlines()[0]}") from e


def denoiser(pipe, unet, dtype):
    """D(x; sigma, c) of a pipeline's U-Net, on the U-Net's device. BadInput where its kind or schedule is another."""
    predicts = pipe.scheduler.config.prediction_type
    if predicts not in PREDICTIONS:
        raise BadInput(f"the network predicts {predicts}, not one of {', '.join(PREDICTIONS)}")
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    try:
        D = PREDICTIONS[predicts](Unet(unet, dtype), pipe.scheduler.alphas_cumprod, None, shape, sigma_data=1.0)
    except ValueError as e:
        raise BadInput(f"the pipeline's scheduler: {e}") from e
    return D.to(unet.device)


def learning_copy(teacher, rank):
    """A copy of the teacher that learns: all of it, in float32, or LoRA of a rank. Its learning weights are float32."""
    network = copy.deepcopy(teacher)
    if not rank:
        return network.float().requires_grad_()
    from peft import LoraConfig
    network.net.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v"]))
    for p in learning_weights(network).values():
        p.data = p.data.float()
    return network


def learning_weights(network):
    """The weights of a network that learn: the optimizer moves them, and a checkpoint holds them."""
    return nn.ParameterDict({k.replace(".", "/"): p for k, p in network.named_parameters() if p.requires_grad})


def begin(s, teacher):
    """The `Networks` of a run, each of which starts as the teacher."""
    generator, fake = learning_copy(teacher, s.lora), learning_copy(teacher, s.lora)
    optimizer_theta = torch.optim.Adam(learning_weights(generator).values(), s.lr, betas=(0.0, 0.999))
    optimizer_psi = torch.optim.Adam(learning_weights(fake).values(), s.lr_fake, betas=(0.0, 0.999))
    return Networks(teacher, generator, copy.deepcopy(generator), fake, optimizer_theta, optimizer_psi)


def save_pipeline(pipe, average, lora, folder):
    """Save the pipeline with the U-Net of `average`, in float32. LoRA is merged into the weights."""
    pipe.unet = average.net.unet.float()  # before merging: bfloat16 would round most of what LoRA learned away
    if lora:
        pipe.unet.fuse_lora()
        pipe.unet.unload_lora()
    pipe.to("cpu").save_pretrained(folder)


# --------------------------------------------------------------------------------------------------------- the prompts

@torch.no_grad()
def token_states(pipe, prompts):
    """Token states (N, L, W) of prompts. BadInput where a prompt is too long for the text encoder."""
    limit = pipe.tokenizer.model_max_length
    for prompt in prompts:
        if len(pipe.tokenizer(prompt).input_ids) > limit:
            raise BadInput(f"longer than the {limit} tokens that the text encoder takes: {prompt!r}")
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=limit, return_tensors="pt").input_ids
    device = pipe.text_encoder.device
    return torch.cat([pipe.text_encoder(part.to(device))[0].float() for part in tokens.split(64)])


def prompt_drawer(s, pipe, device):
    """A function draw_prompts(batch) -> (c_phi, c_psi, forgotten, negative), all token states but forgotten (B,) bool.

    In prompts with the concept, the teacher is given the override in its place, and is guided away from the concept.
    In all other prompts it is guided away from the null prompt. BadInput where the file lacks one kind of prompt.
    """
    lines = [line.strip() for line in Path(s.prompts).read_text().splitlines()]
    with_concept = [line for line in lines if line and s.concept in line]
    others = [line for line in lines if line and s.concept not in line]
    if not (s.concept and s.override and with_concept and others):
        raise BadInput(f"{s.prompts} must hold prompts that contain --concept {s.concept!r}, and others to keep; "
                       "--override must not be empty")
    overridden = [line.replace(s.concept, s.override) for line in with_concept]
    to_forget, instead, kept, null = (token_states(pipe, prompts).to(device)
                                      for prompts in (with_concept, overridden, others, [""]))

    def draw_prompts(batch):
        forgotten = torch.rand(batch, device=device) < s.forget_share
        f = torch.randint(len(to_forget), (batch,), device=device)
        k = torch.randint(len(kept), (batch,), device=device)
        rows = forgotten[:, None, None]
        c_phi = torch.where(rows, instead[f], kept[k])
        c_psi = torch.where(rows, to_forget[f], kept[k])
        return c_phi, c_psi, forgotten, torch.where(rows, to_forget[f], null)
    return draw_prompts


# -------------------------------------------------------------------------------------------------------- the commands

def distill(s, n, draw_prompts, first=0):
    """SFD from step number `first` on, on the `Networks` n. Yield the loss terms of each step."""
    generator, fake, teacher = (InParts(network, s.micro_batch) for network in (n.generator, n.fake, n.teacher))
    for step in range(first, s.steps):
        set_learning_rates(n, s, step)
        c_phi, c_psi, forgotten, negative = draw_prompts(s.batch)
        D = guided(teacher, negative, torch.ones_like(forgotten), s.guidance)  # in all rows
        z = torch.randn(s.batch, *teacher.shape, device=forgotten.device)
        terms = sfd_step(generator, fake, D, n.optimizer_theta, n.optimizer_psi, z, c_phi, c_psi, forgotten, s,
                         teacher.sigma_data)
        update_average(n.average, n.generator, s.ema, step)
        yield terms


def train(s):
    device, pipe = pick_device(s.device), load_pipeline(s.model)
    seed_everything(s.seed)
    s.out = s.out or f"runs/{Path(s.model).name}-forget-{s.concept.replace(' ', '_')}"
    pipe.text_encoder.to(device)
    draw_prompts = prompt_drawer(s, pipe, device)
    dtype = getattr(torch, s.dtype)
    teacher = denoiser(pipe, pipe.unet.to(device, dtype).requires_grad_(False).eval(), dtype)
    try:
        check_noise_range(teacher, s)
    except ValueError as e:
        raise BadInput(str(e)) from e
    n = begin(s, teacher)
    state = {"generator": learning_weights(n.generator), "average": learning_weights(n.average),
             "fake": learning_weights(n.fake), "optimizer_theta": n.optimizer_theta, "optimizer_psi": n.optimizer_psi}
    run = Run(s, state, pinned={"prompt lines": Path(s.prompts).read_text()})
    learn = sum(p.numel() for p in state["generator"].values()) / 1e6
    print(f"{s.concept!r} is forgotten, {s.override!r} drawn instead; {learn:.1f} M weights learn on {device}")
    for terms in run.steps(distill(s, n, draw_prompts, run.step)):
        run.log(terms)
    save_pipeline(pipe, n.average, s.lora, run.out / "pipeline")
    write_json(run.out / "one_step.json", {"sigma_init": s.sigma_init})
    print(f"next: python -m lab.adapters.stable_diffusion draw {s.out} --prompt ... --out images.png")


@dataclass
class Draw:
    run: str = setting("", "the folder of a run", positional=True)
    prompt: str = setting("", "what to draw")
    n: int = setting(4, "images to draw", above=0)
    out: str = setting("images.png", "picture to write")
    seed: int = setting(0, "random seed", at_least=0, below=2 ** 32)
    device: str = setting("auto", "auto, cpu, cuda or mps")


@torch.no_grad()
def draw(s):
    """n images of a prompt side by side, with one evaluation of the U-Net each."""
    device, sigma = pick_device(s.device), read_json(Path(s.run) / "one_step.json")["sigma_init"]
    pipe = load_pipeline(Path(s.run) / "pipeline").to(device)
    D = denoiser(pipe, pipe.unet.float(), torch.float32)
    z = torch.randn(s.n, *D.shape, generator=torch.Generator().manual_seed(s.seed)).to(device)
    x = D(sigma * z, sigma, token_states(pipe, [s.prompt]).expand(s.n, -1, -1))
    images = pipe.vae.float().decode(x / pipe.vae.config.scaling_factor).sample
    save_images(images, s.n, s.out)
    print(f"{s.n} images of {s.prompt!r} in {s.out}")


def main(argv):
    if argv[:1] == ["draw"]:
        draw(parse(Draw, argv[1:], __doc__))
    else:
        train(parse(Settings, argv, __doc__))


if __name__ == "__main__":
    command(main)
