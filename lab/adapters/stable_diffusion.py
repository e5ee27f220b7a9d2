"""SFD on Stable Diffusion: forget a concept, draw an override instead, in one evaluation.

THIS WAS NEVER RUN ON REAL WEIGHTS, nor on a GPU: none were at hand. tests/test_stable_diffusion.py runs tiny pipelines
with random weights on the CPU. The method is `sfd_minimal.sfd_step`.

    pip install -r requirements.txt -r lab/requirements.txt
    python -m lab.adapters.stable_diffusion FOLDER --concept "brad pitt" --override "a man" --prompts FILE --out runs/sd
    python -m lab.adapters.stable_diffusion draw runs/sd --prompt "a photo of brad pitt" --n 4 --out images.png

FOLDER is a diffusers pipeline of Stable Diffusion 1 or 2 on this disk, or the id of one that was fetched before. FILE
has a prompt on each line. Prompts that contain the concept are to be forgotten, all others are kept. The concept is
found by the tokenizer's tokens, as whole words in upper or lower case. No images are needed.

Guidance is that of the published runs: long and short guidance (Zhou et al. 2024, https://arxiv.org/abs/2406.01561)
with kappa_1 = kappa_2 = kappa_3 = kappa_4 = 4.5. A guided network is D[kappa] = D(null) + kappa (D(prompt) - D(null)).
null is the empty prompt. The fake score learns as D_psi[kappa_1]. With alpha = 1 the generator's loss is

    S = sum_pixels (D_phi[kappa_4] - D_psi[kappa_2]) (D_psi[kappa_3] - x_g) / omega

A tenth of the prompts is replaced by the empty prompt, because the fake score must know the empty prompt too. The
published code replaces prompts in the fake score's step alone. Here one batch serves both steps.

Other differences from the published runs. They start the generator from a one-step generator of the same model, and
here it starts from the teacher: the number of steps in Settings is a guess. Their learning rates are constant. Both of
their updates draw t from 20 to 979, and L_psi is the loss of noise prediction. They save the generator, and here its
running average is saved. In float16 they clip each entry of the generator's gradient to [-1, 1]. Their runs against
nudity have a negative prompt, and here the null prompt is always empty.

Memory for the 860 M parameters of version 1.5, estimated: 33 GB if all weights learn (the teacher in bfloat16, and in
float32 the generator, its average, the fake score, two gradients and four moments), 7 GB with --lora 64 (four networks
in bfloat16). What --micro-batch images keep for the gradient comes on top.
"""
import codecs
import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from edm_unet import BadInput, command, pick_device, save_images
from lab.adapters.denoisers import FromEpsilon, FromV, FromX0, InParts, check_noise_range
from lab.core.options import parse, setting
from lab.core.runs import Run, RunSettings, seed_everything
from lab.core.tables import read_json, write_json
from sfd_minimal import Networks, set_learning_rates, sfd_step, update_average

PREDICTIONS = {"epsilon": FromEpsilon, "v_prediction": FromV, "sample": FromX0}  # by diffusers' name
KIND = "StableDiffusionPipeline"                                   # diffusers' class, and the parts that are used here
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
WORD_END = "</w>"  # ends the last token of each word in CLIP's tokenizer


@dataclass
class Settings(RunSettings):
    model: str = setting("", "folder of a diffusers pipeline, or its id", positional=True, trains=False)
    concept: str = setting("", "words to forget, in upper or lower case")
    override: str = setting("", "words whose images are drawn instead")
    prompts: str = setting("", "file with a prompt on each line, in UTF-8", trains=False)
    lora: int = setting(0, "rank of LoRA; 0: all weights learn", at_least=0)
    dtype: str = setting("bfloat16", "of all weights that do not learn", choices=("float32", "bfloat16", "float16"))
    steps: int = setting(2000, "optimizer steps of generator and fake score", above=0)
    batch: int = setting(64, "prompts per step", above=0)
    micro_batch: int = setting(4, "images at once in a network; each is evaluated again for its gradient", above=0)
    lr: float = setting(1e-6, "generator's learning rate", above=0)
    lr_fake: float = setting(3e-6, "fake score's learning rate", above=0)
    guidance: float = setting(4.5, "kappa_1 to kappa_4, of teacher and fake score; 1 is none", at_least=1)
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
    null_share = 0.1  # of all prompts, replaced by the empty prompt where there is guidance


# ------------------------------------------------------------------------------------------------------- the networks

class Unet(nn.Module):
    """A diffusers U-Net as net(x, t, c), float32 outside and `dtype` inside. c (B, L, W) are token states."""

    def __init__(self, unet, dtype):
        super().__init__()
        self.unet, self.dtype = unet, dtype

    def forward(self, x, t, c):
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
            return self.unet(x, t, encoder_hidden_states=c).sample.float()


def from_disk(load, path, **more):
    """load(path, ...), a function of diffusers. BadInput where the files are missing or damaged."""
    try:
        return load(path, local_files_only=True, **more)
    except (OSError, ValueError) as e:
        raise BadInput(f"{path} is no pipeline on this disk: {str(e).splitlines()[0]}") from e


def latent_shape(unet):
    """(channels, height, width) of a U-Net's latents, from its settings. Both sides are None where the size is open."""
    size = unet.get("sample_size")
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return unet.get("in_channels", 4), height, width


def check_kind(path):
    """Raise BadInput where a pipeline is not one of Stable Diffusion 1 or 2. This reads settings and no weights."""
    from diffusers import DiffusionPipeline, UNet2DConditionModel
    pipeline = from_disk(DiffusionPipeline.load_config, path)
    kind = pipeline.get("_class_name")
    if kind != KIND:
        raise BadInput(f"{path} is a {kind}: only a {KIND} of Stable Diffusion 1 or 2 can be used")
    for part in PARTS:
        if pipeline.get(part, [None])[0] is None:
            raise BadInput(f"{path} has no {part}")
    unet = from_disk(UNet2DConditionModel.load_config, path, subfolder="unet")
    channels, height, width = latent_shape(unet)
    predicted = unet.get("out_channels", 4)
    refused = {
        f"for inpainting or editing ({channels} channels in, {predicted} out)": channels != predicted,
        "class-conditional": unet.get("class_embed_type") or unet.get("num_class_embeds"),
        "one of Stable Diffusion XL (addition_embed_type)": unet.get("addition_embed_type"),
        "distilled with its guidance as an input (time_cond_proj_dim)": unet.get("time_cond_proj_dim"),
        f"for images that are not square (sample_size {height}x{width})": height != width,
        "without a sample_size": height is None,
    }
    for words, holds in refused.items():
        if holds:
            raise BadInput(f"the U-Net of {path} is {words}, which cannot be used")


def load_pipeline(path):
    """The diffusers pipeline in a folder. BadInput where there is none, or one of another kind than `check_kind`'s."""
    from diffusers import DiffusionPipeline
    check_kind(path)
    pipe = from_disk(DiffusionPipeline.from_pretrained, path, use_safetensors=True)
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise BadInput(f"{path} has a {type(pipe.scheduler).__name__}, a scheduler without alphas_cumprod")
    return pipe


def pipeline_digest(pipe):
    """sha256 of all weights of a pipeline and of its noise schedule: what the pipeline is, wherever it lies."""
    digest = hashlib.sha256()
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        for name, weight in part.state_dict().items():
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    scheduler = pipe.scheduler
    digest.update(f"{scheduler.config.get('prediction_type')} {scheduler.alphas_cumprod.tolist()}".encode())
    return digest.hexdigest()


def denoiser(pipe, unet, dtype):
    """D(x; sigma, c) of a pipeline's U-Net, on the U-Net's device. BadInput where its kind or schedule is another."""
    predicts = pipe.scheduler.config.get("prediction_type")
    if predicts not in PREDICTIONS:
        raise BadInput(f"the network predicts {predicts}, not one of {', '.join(PREDICTIONS)}")
    shape = latent_shape(unet.config)
    try:
        D = PREDICTIONS[predicts](Unet(unet, dtype), pipe.scheduler.alphas_cumprod, None, shape, sigma_data=1.0)
    except ValueError as e:
        raise BadInput(f"the pipeline's scheduler: {e}") from e
    return D.to(unet.device)


def guided(D, null, guidance):
    """The denoiser D, guided away from the empty prompt: a function of the same x_t, sigma and c (B, L, W).

    D(x_t; null) + guidance (D(x_t; c) - D(x_t; null)), which costs a second evaluation. null (1, L, W).
    """
    if guidance == 1:
        return D

    def guided_D(x_t, sigma, c):
        both = D(torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), torch.cat([c, null.expand_as(c)]))
        D_c, D_null = both.chunk(2)                                                   # (B, ...), (B, ...)
        return D_null + guidance * (D_c - D_null)
    return guided_D


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

def read_lines(path):
    """Lines of a text file that are not empty, as UTF-8. A byte order mark may say that the file is UTF-16.

    BadInput where the file cannot be read, or its bytes are in another encoding.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as e:
        raise BadInput(f"--prompts {str(path)!r} cannot be read: {e.strerror}") from e
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "UTF-16" if utf_16 else "UTF-8"
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        line = content[:e.start].count(b"\n") + 1
        raise BadInput(f"{path} is not {encoding} (line {line}: {e.reason}): save the file as UTF-8") from e
    if "\0" in text:
        raise BadInput(f"{path} is not {encoding} (zero bytes, as in UTF-16 without a mark): save the file as UTF-8")
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line]


def token_ids(tokenizer, text):
    """Token ids of a text, without the tokens of its beginning and end."""
    return tokenizer(text, add_special_tokens=False).input_ids


def replace_words(tokenizer, ids, concept, override):
    """The token ids `ids` with `override` in the place of each `concept`. All three are lists of token ids.

    The concept is found where a word begins. Its own last token ends a word.
    """
    ends = [token.endswith(WORD_END) for token in tokenizer.convert_ids_to_tokens(ids)]
    replaced, i = [], 0
    while i < len(ids):
        begins_word = i == 0 or ends[i - 1]
        if begins_word and ids[i:i + len(concept)] == concept:
            replaced += override
            i += len(concept)
        else:
            replaced.append(ids[i])
            i += 1
    return replaced


def split_prompts(s, tokenizer, lines):
    """(to_forget, overridden, kept): lists of prompts, each a list of token ids. Prints how many there are.

    overridden: the prompts to forget, with the override in the place of the concept. BadInput where concept or override
    are empty or the same, where a kind of prompt is missing, and where the tokenizer does not mark the ends of words.
    """
    concept, override = token_ids(tokenizer, s.concept), token_ids(tokenizer, s.override)
    if not concept or not override or concept == override:
        raise BadInput(f"--concept {s.concept!r} and --override {s.override!r} must be two different words or phrases")
    if not tokenizer.convert_ids_to_tokens(concept)[-1].endswith(WORD_END):
        raise BadInput(f"the pipeline's {type(tokenizer).__name__} does not mark the ends of words, as CLIP's does")
    to_forget, overridden, kept = [], [], []
    examples = {"forgotten": [], "kept": []}
    for line in lines:
        ids = token_ids(tokenizer, line)
        replaced = replace_words(tokenizer, ids, concept, override)
        if replaced == ids:
            kept.append(ids)
            examples["kept"].append(line)
        else:
            to_forget.append(ids)
            overridden.append(replaced)
            examples["forgotten"].append(line)
    if not to_forget or not kept:
        raise BadInput(f"{s.prompts} must hold prompts with {s.concept!r} and others to keep: "
                       f"it has {len(to_forget)} and {len(kept)}")
    for name, prompts in examples.items():
        print(f"prompts {name}: {len(prompts)}, such as {' and '.join(map(repr, prompts[:2]))}")
    return to_forget, overridden, kept


@torch.no_grad()
def states_of_ids(pipe, prompts):
    """Token states (N, L, W) of prompts, each a list of token ids. BadInput where a prompt is too long."""
    tokenizer, limit = pipe.tokenizer, pipe.tokenizer.model_max_length
    rows = []
    for ids in prompts:
        row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        if len(row) > limit:
            raise BadInput(f"longer than the {limit} tokens that the text encoder takes: {tokenizer.decode(ids)!r}")
        rows.append(row + [tokenizer.pad_token_id] * (limit - len(row)))
    rows = torch.tensor(rows, device=pipe.text_encoder.device)
    return torch.cat([pipe.text_encoder(part)[0].float() for part in rows.split(64)])


def token_states(pipe, prompts):
    """Token states (N, L, W) of prompts that are strings. BadInput where a prompt is too long."""
    return states_of_ids(pipe, [token_ids(pipe.tokenizer, prompt) for prompt in prompts])


def prompt_drawer(s, to_forget, instead, kept, null):
    """A function draw_prompts(batch) -> (c_phi, c_psi, forgotten), token states (B, L, W) and bool (B,).

    to_forget, instead (F, L, W): prompts with the concept, and with the override in its place, which the teacher is
    given. kept (K, L, W). null (1, L, W): the empty prompt, which counts as a prompt to keep.
    """
    device = null.device
    null_share = 0 if s.guidance == 1 else s.null_share

    def draw_prompts(batch):
        dropped = torch.rand(batch, device=device) < null_share
        forgotten = (torch.rand(batch, device=device) < s.forget_share) & ~dropped
        f = torch.randint(len(to_forget), (batch,), device=device)
        k = torch.randint(len(kept), (batch,), device=device)
        others = torch.where(dropped[:, None, None], null, kept[k])
        rows = forgotten[:, None, None]
        c_phi = torch.where(rows, instead[f], others)
        c_psi = torch.where(rows, to_forget[f], others)
        return c_phi, c_psi, forgotten
    return draw_prompts


# -------------------------------------------------------------------------------------------------------- the commands

def distill(s, n, draw_prompts, null, first=0):
    """SFD from step number `first` on, on the `Networks` n. Yield the loss terms of each step.

    draw_prompts: as from `prompt_drawer`. null (1, L, W): the empty prompt, away from which fake score and teacher are
    guided.
    """
    generator, fake, teacher = (InParts(network, s.micro_batch) for network in (n.generator, n.fake, n.teacher))
    D_psi, D_phi = guided(fake, null, s.guidance), guided(teacher, null, s.guidance)
    for step in range(first, s.steps):
        set_learning_rates(n, s, step)
        c_phi, c_psi, forgotten = draw_prompts(s.batch)
        z = torch.randn(s.batch, *teacher.shape, device=null.device)
        terms = sfd_step(generator, D_psi, D_phi, n.optimizer_theta, n.optimizer_psi, z, c_phi, c_psi, forgotten, s,
                         teacher.sigma_data)
        update_average(n.average, n.generator, s.ema, step)
        yield terms


def train(s):
    device, lines = pick_device(s.device), read_lines(s.prompts)
    pipe = load_pipeline(s.model)
    seed_everything(s.seed)
    s.out = s.out or f"runs/{Path(s.model).name}-forget-{s.concept.replace(' ', '_')}"
    prompts = split_prompts(s, pipe.tokenizer, lines)
    pinned = {"pipeline": pipeline_digest(pipe), "prompts": hashlib.sha256(repr(prompts).encode()).hexdigest()}
    dtype = getattr(torch, s.dtype)
    teacher = denoiser(pipe, pipe.unet.to(device, dtype).requires_grad_(False).eval(), dtype)
    try:
        check_noise_range(teacher, s)
    except ValueError as e:
        raise BadInput(str(e)) from e
    pipe.text_encoder.to(device)
    states = [states_of_ids(pipe, part) for part in prompts]
    null = token_states(pipe, [""])
    n = begin(s, teacher)
    state = {"generator": learning_weights(n.generator), "average": learning_weights(n.average),
             "fake": learning_weights(n.fake), "optimizer_theta": n.optimizer_theta, "optimizer_psi": n.optimizer_psi}
    run = Run(s, state, pinned)
    learn = sum(p.numel() for p in state["generator"].values()) / 1e6
    print(f"{s.concept!r} is forgotten, {s.override!r} drawn instead; {learn:.1f} M weights learn on {device}")
    for terms in run.steps(distill(s, n, prompt_drawer(s, *states, null), null, run.step)):
        run.log(terms)
    save_pipeline(pipe, n.average, s.lora, run.out / "pipeline")
    write_json(run.out / "one_step.json", {"sigma_init": s.sigma_init, "pipeline": pipeline_digest(pipe)})
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
    """n images of a prompt side by side, with one evaluation of the U-Net each. BadInput where the run is not finished.

    What can be refused is refused before the drawing starts.
    """
    out, about = Path(s.out), Path(s.run) / "one_step.json"
    if not s.prompt.strip():
        raise BadInput("--prompt is required: what to draw")
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise BadInput(f"--out {out} must end as a picture does, such as .png")
    if not about.exists():
        raise BadInput(f"{s.run} holds no finished run: it has no {about.name}")
    device, content = pick_device(s.device), read_json(about)
    pipe = load_pipeline(Path(s.run) / "pipeline")
    if pipeline_digest(pipe) != content.get("pipeline"):
        raise BadInput(f"{s.run}/pipeline is not the pipeline that this run saved")
    pipe.to(device)
    sigma = content["sigma_init"]
    D = denoiser(pipe, pipe.unet.float(), torch.float32)
    z = torch.randn(s.n, *D.shape, generator=torch.Generator().manual_seed(s.seed)).to(device)
    x = D(sigma * z, sigma, token_states(pipe, [s.prompt]).expand(s.n, -1, -1))
    images = pipe.vae.float().decode(x / pipe.vae.config.scaling_factor).sample
    out.parent.mkdir(parents=True, exist_ok=True)
    save_images(images, s.n, out)
    print(f"{s.n} images of {s.prompt!r} by {s.run} in {out}")


def main(argv):
    if argv[:1] == ["draw"]:
        draw(parse(Draw, argv[1:], __doc__))
    else:
        train(parse(Settings, argv, __doc__))


if __name__ == "__main__":
    command(main)
