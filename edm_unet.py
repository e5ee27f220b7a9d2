"""What a reader of SFD may take as given: the denoiser, its network, its loss, its sampler; then files and commands.

The network is the label-conditional DDPM++ U-Net (Song et al. 2021, https://arxiv.org/abs/2011.13456) under the
preconditioning of EDM (Karras et al. 2022, https://arxiv.org/abs/2206.00364). Only `save_images` needs more than torch.

The contract of every denoiser in this project, networks and closed forms alike:

    D = model(x, sigma, c)

    x      (B, ...)        float32, an image in [-1, 1] plus sigma times standard normal noise
    sigma  (B, 1, ..., 1)  noise level: a standard deviation in units of x, with as many dimensions as x
    c      (B, ...)        the condition, here a one-hot label (B, K); zeros mean "any label"
    D      (B, ...)        float32, the posterior mean E[image | x; sigma, c]. The score is (D - x) / sigma^2

A teacher has three more attributes: `conditions` (K, ...), the condition of each label; `shape`, the shape of one
image; `sigma_data`, the standard deviation of the images. `copy.deepcopy` of a teacher must give an independent
network: a block whose forward was replaced by a closure goes on calling the weights of the original.
"""
import argparse
import collections
import functools
import hashlib
import importlib
import math
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

if sys.version_info < (3, 10):
    sys.exit(f"error: this project needs Python 3.10 or later, and this is Python {platform.python_version()}")


# --------------------------------------------------------------------------------------------------------- the network

@dataclass(frozen=True)
class NetSettings:
    """Shape of the U-Net. Every file of a network holds it."""
    resolution: int = 28            # height and width of the images
    channels: int = 1               # 1 grey, 3 RGB
    num_classes: int = 10           # K
    model_channels: int = 64        # width of the first level
    channel_mult: tuple = (1, 2)    # width of each level, in units of model_channels; each level halves the resolution
    num_blocks: int = 2             # residual blocks per level in the encoder, one more in the decoder
    attn_resolutions: tuple = (7,)  # levels with self-attention, by their resolution inside the network
    patch: int = 1                  # pixels are folded patch x patch into channels before the network
    dropout: float = 0.0            # inside the residual blocks, in training mode only
    sigma_data: float = 0.5         # standard deviation of the images, in EDM's preconditioning

    def __post_init__(self):
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "attn_resolutions", tuple(self.attn_resolutions))
        self._check_numbers()
        halvings = len(self.channel_mult) - 1
        if self.resolution % (self.patch * 2 ** halvings):
            raise ValueError(f"resolution {self.resolution} cannot be folded by patch {self.patch} and then halved "
                             f"{halvings} times")
        if self.model_channels % 4:
            raise ValueError(f"model_channels must be a multiple of 4, not {self.model_channels}")

    def _check_numbers(self):
        """Raise ValueError where a setting is no number, or out of its range: a file may hold anything."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int and not is_size(value):
                raise ValueError(f"{f.name} must be a whole number above 0, not {value!r}")
        if not self.channel_mult or not all(map(is_size, self.channel_mult + self.attn_resolutions)):
            raise ValueError("channel_mult and attn_resolutions must hold whole numbers above 0")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a number in [0, 1), not {self.dropout!r}")
        if not isinstance(self.sigma_data, (int, float)) or not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data must be a number above 0, not {self.sigma_data!r}")


def is_size(value):
    """Whether a value is a whole number above 0."""
    return isinstance(value, int) and value > 0


def group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class Block(nn.Module):
    """Residual block of DDPM++: norm, SiLU, conv, + embedding, norm, SiLU, conv, + skip; then self-attention, or not.

    resample: None, "up" (each pixel becomes 2x2) or "down" (each 2x2 becomes its mean).
    """

    def __init__(self, c_in, c_out, emb_dim, attention=False, resample=None, dropout=0.0):
        super().__init__()
        self.resample, self.dropout, self.attention = resample, dropout, attention
        self.norm0 = group_norm(c_in)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = nn.Linear(emb_dim, c_out)
        self.norm1 = group_norm(c_out)
        self.conv1 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out or resample else nn.Identity()
        if attention:
            self.norm2 = group_norm(c_out)
            self.qkv = nn.Conv2d(c_out, 3 * c_out, 1)
            self.proj = nn.Conv2d(c_out, c_out, 1)

    def _resize(self, x):
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def _attend(self, x):
        """softmax(q k^T / sqrt(C)) v over the H*W places of x (B, C, H, W), with one head."""
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm2(x)).reshape(B, C, 3, H * W).unbind(2)            # (B, C, H*W) each
        weights = (q.mT @ k / math.sqrt(C)).softmax(2)                                 # (B, H*W, H*W)
        return self.proj((v @ weights.mT).reshape(B, C, H, W))

    def forward(self, x, emb):
        h = self.conv0(self._resize(F.silu(self.norm0(x))))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + self.skip(self._resize(x))) * math.sqrt(0.5)
        if self.attention:
            x = (x + self._attend(x)) * math.sqrt(0.5)
        return x


class UNet(nn.Module):
    """DDPM++ U-Net F(x; c_noise, c), c (B, K) the label.

    The parameters have the names of the official EDM network (lab/adapters/pickles.py reads its files).
    """
    block = Block

    def __init__(self, s: NetSettings):
        super().__init__()
        self.patch, self.emb_half = s.patch, s.model_channels // 2
        image_channels, emb_dim = s.channels * s.patch ** 2, 4 * s.model_channels
        self.map_label = nn.Linear(s.num_classes, s.model_channels)
        self.map_layer0 = nn.Linear(s.model_channels, emb_dim)
        self.map_layer1 = nn.Linear(emb_dim, emb_dim)
        block = functools.partial(self.block, emb_dim=emb_dim, dropout=s.dropout)

        self.enc, self.dec, skips = nn.ModuleDict(), nn.ModuleDict(), []
        for level, mult in enumerate(s.channel_mult):
            res = (s.resolution // s.patch) >> level
            if level == 0:
                c = s.model_channels
                self.enc[f"{res}x{res}_conv"] = nn.Conv2d(image_channels, c, 3, padding=1)
            else:
                self.enc[f"{res}x{res}_down"] = block(c, c, resample="down")
            skips.append(c)
            for i in range(s.num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(c, s.model_channels * mult,
                                                          attention=res in s.attn_resolutions)
                c = s.model_channels * mult
                skips.append(c)

        for level, mult in reversed(list(enumerate(s.channel_mult))):
            res = (s.resolution // s.patch) >> level
            if level == len(s.channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = block(c, c, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(c, c)
            else:
                self.dec[f"{res}x{res}_up"] = block(c, c, resample="up")
            for i in range(s.num_blocks + 1):
                self.dec[f"{res}x{res}_block{i}"] = block(c + skips.pop(), s.model_channels * mult,
                                                          attention=i == s.num_blocks and res in s.attn_resolutions)
                c = s.model_channels * mult
        self.dec[f"{res}x{res}_aux_norm"] = group_norm(c)
        self.dec[f"{res}x{res}_aux_conv"] = nn.Conv2d(c, image_channels, 3, padding=1)

    def time_embedding(self, c_noise):
        """Sines and cosines of c_noise (B,): (B, model_channels)."""
        frequency = (1 / 10000) ** (torch.arange(self.emb_half, device=c_noise.device) / (self.emb_half - 1))
        angle = c_noise[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], 1)

    def embedding(self, c_noise, c):
        """Noise level (B,) and label (B, K), as every block takes them: (B, 4 model_channels)."""
        emb = self.time_embedding(c_noise) + self.map_label(c * math.sqrt(c.shape[1]))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(self, x, c_noise, c):
        emb = self.embedding(c_noise, c)
        x, skips = F.pixel_unshuffle(x, self.patch), []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        *blocks, norm, conv = self.dec.values()
        for layer in blocks:
            if layer.conv0.in_channels != x.shape[1]:
                x = torch.cat([x, skips.pop()], 1)
            x = layer(x, emb)
        return F.pixel_shuffle(conv(F.silu(norm(x))), self.patch)


class EDMPrecond(nn.Module):
    """D(x; sigma, c) = c_skip x + c_out F(c_in x; c_noise, c): Karras et al. 2022, eq. 7 and table 1.

    x (B, C, H, W), sigma (B, 1, 1, 1) or anything that broadcasts to it, c (B, K) one-hot, soft, or None. See the
    contract above.
    """
    settings_class, network_class = NetSettings, UNet

    def __init__(self, settings):
        super().__init__()
        self.settings, self.model = settings, self.network_class(settings)
        self.shape, self.sigma_data = (settings.channels, settings.resolution, settings.resolution), settings.sigma_data
        self.bf16 = False  # compute F in bfloat16; the weights and everything outside F stay float32

    @property
    def conditions(self):
        """One-hot row of each label, (K, K), on the network's device."""
        return torch.eye(self.settings.num_classes, device=next(self.parameters()).device)

    def read_condition(self, x, c):
        """The condition as the U-Net takes it."""
        return x.new_zeros(len(x), self.settings.num_classes) if c is None else c.float()

    def _precision(self, device_type):
        """bfloat16 where `bf16` is on, else the caller's autocast. The cache of cast weights is off: inside a caller's
        autocast it would survive an optimizer's step, and the network would go on computing with old weights."""
        outer = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if outer and not self.bf16 else torch.bfloat16
        return torch.autocast(device_type, dtype, enabled=outer or self.bf16, cache_enabled=False)

    def forward(self, x, sigma, c):
        x, sd = x.float(), self.sigma_data
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1).expand(len(x), 1, 1, 1)
        c_skip = sd ** 2 / (sigma ** 2 + sd ** 2)
        c_out = sigma * sd / (sigma ** 2 + sd ** 2).sqrt()
        c_in = 1 / (sigma ** 2 + sd ** 2).sqrt()
        c_noise = sigma.log() / 4
        with self._precision(x.device.type):
            F_x = self.model(c_in * x, c_noise.flatten(), self.read_condition(x, c))
        return c_skip * x + c_out * F_x.float()


# ------------------------------------------------------------------------------------------------ the loss, the sampler

def weighted_distance(D_x, target, sigma, sigma_data=0.5):
    """w(sigma) ||D_x - target||^2, w = (sigma^2 + sd^2) / (sigma sd)^2. Mean over all entries."""
    w = (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2
    return (w * (D_x - target) ** 2).mean()


def edm_loss(D, x, sigma, c):
    """w(sigma) ||D(x + sigma eps; sigma, c) - x||^2: Karras et al. 2022, eq. 2. Mean over all entries.

    x (B, ...) images in [-1, 1], sigma (B, 1, ...), c (B, K).
    """
    x_t = x + sigma * torch.randn_like(x)
    return weighted_distance(D(x_t, sigma, c), x, sigma, D.sigma_data)


def stratified_normal(n, device):
    """n standard normal numbers, one from each of n equally likely intervals: noise levels with less variance."""
    u = (torch.arange(n, device=device) + torch.rand(n, device=device)) / n
    return math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-0.999999, 0.999999))  # rounding can make u 0 or 1


def sigma_grid(u, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Noise level at the fraction u in [0, 1] of EDM's grid, from sigma_max (u = 0) to sigma_min (u = 1): eq. 5."""
    return (sigma_max ** (1 / rho) + u * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def heun(D, z, c, steps=18, sigma_max=80.0):
    """EDM's deterministic second-order sampler (Karras et al. 2022, algorithm 1): 2 * steps - 1 evaluations of D.

    z (B, ...) standard normal noise, c (B, K). Sampling starts from sigma_max * z. Returns samples of z's shape and
    dtype. The state in between is float64, or float32 on devices that have no float64.
    """
    dtype = torch.float32 if z.device.type == "mps" else torch.float64
    sigmas = torch.cat([sigma_grid(torch.linspace(0, 1, steps, dtype=dtype, device=z.device), sigma_max=sigma_max),
                        z.new_zeros(1, dtype=dtype)])

    def slope(x, sigma):  # dx/dsigma of the probability flow, eq. 3
        level = sigma.expand(len(x)).view(-1, *[1] * (x.ndim - 1))
        return (x - D(x, level, c).to(dtype)) / sigma

    x = z.to(dtype) * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        d = slope(x, sigma)
        x_next = x + (sigma_next - sigma) * d
        if sigma_next > 0:
            x_next = x + (sigma_next - sigma) * (d + slope(x_next, sigma_next)) / 2
        x = x_next
    return x.to(z.dtype)


heun_sampler = torch.no_grad()(heun)  # for images alone, without gradients to z or c


# ----------------------------------------------------------------------------------------------------------- the device

def pick_device(name="auto"):
    """torch.device of that name; for "auto" the first of cuda, mps and cpu that computes. BadInput if none does."""
    if name == "auto":
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        names = [kind for kind, there in found.items() if there]
    else:
        names = [name]
    for name in names:
        try:
            device = torch.device(name)
            torch.zeros(1, device=device).add(1).item()
            return device
        except (RuntimeError, AssertionError, NotImplementedError) as e:  # such as a card too old for this torch
            problem = f"device {name} does not compute: {str(e).splitlines()[0]}"
            if name != names[-1]:
                print(f"note: {problem}")
    raise BadInput(problem)


def cpu_features():
    """What torch knows of the CPU. Empty on versions of torch that do not tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def has_fast_bf16(device):
    """Whether the device multiplies bfloat16 matrices in hardware. Elsewhere bfloat16 is slower than float32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    features = cpu_features()
    return device.type == "cpu" and bool(features.get("amx_bf16") or features.get("avx512_bf16"))


def machine(device):
    """Device, versions and threads, to report with a measurement: a plain dict."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = cpu_features().get("cpu_name", platform.processor())
    return {"device": device.type, "name": name, "bf16": has_fast_bf16(device), "threads": torch.get_num_threads(),
            "torch": str(torch.__version__), "python": platform.python_version(), "system": platform.system()}


# ------------------------------------------------------------------------------------------------------------ the files

def save_file(path, content):
    """torch.save to a file beside `path`, then rename: a kill or a full disk leaves the old file whole.

    Raises OSError where the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        if isinstance(e.__context__, KeyboardInterrupt):  # and Ctrl-C in the middle of its writing too
            raise e.__context__
        raise OSError(f"could not write {path} ({e}); a file that was there is unharmed") from e


def load_file(path):
    """The dict in a file of `save_file`, on the CPU. Nothing in the file is run. BadInput for any other file."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about some foreign files before it refuses them
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged or hostile file can raise anything, and is refused whatever it raises
        raise BadInput(f"{path} is empty, damaged or no file of this project ({type(e).__name__})") from e
    if not isinstance(content, dict):
        raise BadInput(f"{path} is no file of this project")
    return content


DATA_SETS = ("mnist", "fashion_mnist", "cifar10")  # of torchvision; any other name is a folder of images


def data_name(data):
    """Name of a data set in file names: for a folder its last part, with -folder where torchvision has that name."""
    if data in DATA_SETS:
        return data
    name = Path(data).resolve().name
    return f"{name}-folder" if name in DATA_SETS else name


def make_run_folder(path, resume):
    """Make the folder of a run. BadInput where it is there already, and with `resume` where it has no checkpoint."""
    path = Path(path).expanduser()
    if resume and not (path / "checkpoint.pt").exists():
        raise BadInput(f"{path} holds no checkpoint.pt to go on with")
    try:
        path.mkdir(parents=True, exist_ok=resume)
    except FileExistsError as e:
        raise BadInput(f"{path} is there already: --resume goes on with it, --out names another folder") from e
    except OSError as e:
        raise BadInput(f"cannot write to {path}: {e.strerror}") from e
    return path


def digest(*paths):
    """sha256 of the bytes of files, one after the other."""
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()


def pack(network, half=False):
    """Settings and weights of an EDMPrecond as a plain dict. `half` stores the weights as float16.

    RunFailed where a weight is not finite, or too large for float16.
    """
    weights = {name: v.detach().to("cpu", torch.float16 if half else None) for name, v in network.state_dict().items()}
    if not all(v.isfinite().all() for v in weights.values()):
        raise RunFailed("a weight is not finite, or too large for float16")
    return {"net": asdict(network.settings), "weights": weights}


def unpack(packed, network_class=EDMPrecond):
    """The network that `pack` took apart: float32, in eval mode, on the CPU. BadInput where the parts do not fit."""
    try:
        weights = {name: v.float() for name, v in packed["weights"].items()}
        settings_class = network_class.settings_class
        names = {f.name for f in fields(settings_class)}
        # an unknown setting that is off is ignored; one that is on makes another network, and is refused
        settings = settings_class(**{name: v for name, v in packed["net"].items() if name in names or v})
        if settings.num_blocks * len(settings.channel_mult) > len(weights):
            raise ValueError("it has fewer weights than blocks")  # refuse an absurd size before it is built
        with torch.device("meta"):                                # shapes without memory
            network = network_class(settings)
        network.load_state_dict(weights, assign=True)
    except Exception as e:  # a damaged or hostile file can raise anything
        raise BadInput(f"settings and weights do not fit together: {' '.join(str(e).split())[:200]}") from e
    return network.eval()


def load_network(path, device="cpu", network_class=EDMPrecond):
    """(network in eval mode, the other entries of its file, its "path" and "sha256"). BadInput for other files.

    The network computes in bfloat16 where the device does that fast.
    """
    content = load_file(path)
    missing = {"net", "weights", "data", "classes"} - content.keys()
    if missing:
        raise BadInput(f"{path} is not the file of a network: it lacks {', '.join(sorted(missing))}")
    try:
        network = unpack(content, network_class).to(device)
    except BadInput as e:
        raise BadInput(f"{path}: {e}") from e
    network.bf16 = has_fast_bf16(device)
    info = {name: value for name, value in content.items() if name not in ("net", "weights")}
    return network, info | {"path": str(path), "sha256": digest(path)}


def import_torchvision(name):
    """The module torchvision.<name>. BadInput where torchvision is missing or does not fit this version of torch."""
    try:
        return importlib.import_module(f"torchvision.{name}")
    except Exception as e:  # a torchvision for another torch raises errors of many kinds
        raise BadInput(f"torchvision cannot be imported ({type(e).__name__}: {' '.join(str(e).split())}): install the "
                       f"torchvision that belongs to torch {torch.__version__}") from e


def save_images(images, columns, path):
    """Images (N, C, H, W) in [-1, 1] as one picture, row by row."""
    save_image = import_torchvision("utils").save_image
    save_image(images, path, nrow=columns, padding=0, normalize=True, value_range=(-1, 1))


# -------------------------------------------------------------------------------------------- a run that can be resumed

def save_checkpoint(path, step, seconds, settings, parts):
    """Save the networks and optimizers `parts` {name: part} after `step` steps in `seconds`, with all random states.

    settings: what must not change when the run is resumed. RunFailed where a weight is not finite: the file of the last
    good checkpoint is kept.
    """
    for name, part in parts.items():
        if isinstance(part, nn.Module) and not all(v.isfinite().all() for v in part.state_dict().values()):
            raise RunFailed(f"the weights of {name} are not finite after step {step}: begin again with smaller "
                            f"learning rates. {path} has the last good step")
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        random["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        random["mps"] = torch.mps.get_rng_state()
    save_file(path, {"step": step, "seconds": seconds, "settings": settings, "random": random,
                     "parts": {name: part.state_dict() for name, part in parts.items()}})


def changed_settings(was, now, defaults):
    """In words, which settings {name: value} of a run are not those that it was begun with.

    A setting that the run was begun without, by an earlier version of the code, had the value in `defaults`.
    """
    changed = []
    for name in sorted(was.keys() | now.keys()):
        before, after = was.get(name, defaults.get(name)), now.get(name)
        if before == after:
            continue
        if name not in was:
            changed.append(f"{name} is {after!r}, and the earlier version that began the run had no such setting")
        elif name not in now:
            changed.append(f"{name} was {before!r}, and this version has no such setting")
        else:
            changed.append(f"{name} was {before!r} and is {after!r}")
    return changed


def load_checkpoint(path, settings, parts, defaults=None):
    """Load a checkpoint into `parts` and set the random states. Returns (steps, seconds) so far.

    defaults: {name: value} of settings that an earlier version of the code may not have had. BadInput where the run was
    begun with other settings.
    """
    saved = load_file(path)
    known = {"step", "seconds", "settings", "random", "parts"} <= saved.keys()
    if not known or not parts.keys() <= saved["parts"].keys():
        raise BadInput(f"{path} is not a checkpoint of this version of the code")
    changed = changed_settings(saved["settings"], settings, defaults or {})
    if changed:
        raise BadInput(f"cannot resume {Path(path).parent} with other settings: {'; '.join(changed)}")
    for name, part in parts.items():
        part.load_state_dict(saved["parts"][name])
    torch.set_rng_state(saved["random"]["cpu"])
    if "cuda" in saved["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["random"]["cuda"][:torch.cuda.device_count()])
    if "mps" in saved["random"] and torch.backends.mps.is_available():
        torch.mps.set_rng_state(saved["random"]["mps"])
    return saved["step"], saved["seconds"]


def watch_pace(training):
    """Yield what the training loop yields. Note once where other programs slow a run on the CPU down.

    Threads of torch spin while they wait for each other, and so lose more than the other program takes.
    """
    recent, fastest, noted = collections.deque(maxlen=5), math.inf, torch.get_num_threads() == 1
    began = time.monotonic()
    for terms in training:
        recent.append(time.monotonic() - began)
        if len(recent) == 5 and not noted and next(iter(terms.values())).device.type == "cpu":
            now = statistics.median(recent)
            fastest = min(fastest, now)
            if now > 3 * fastest:
                noted = True
                tqdm.write(f"note: a step takes {now:.2f} s and took {fastest:.2f} s: another program uses the CPU. "
                           "Beside it, one thread may be faster than several: stop with Ctrl-C, set OMP_NUM_THREADS=1, "
                           "and go on with --resume", file=sys.stderr)
        yield terms
        began = time.monotonic()


# ---------------------------------------------------------------------------------------------------- the command line

class BadInput(ValueError):
    """The user asked for something that cannot be done. The message is one line. Exit code 2."""


class RunFailed(RuntimeError):
    """The run cannot go on. The message says at which step, why, and what to try. Exit code 1."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped a run that --resume goes on with. Exit code 130."""


class Parser(argparse.ArgumentParser):
    """argparse with bad options as BadInput, and without abbreviations."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise BadInput(f"{message} (--help lists the options)")


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # of a GPU, on Linux, on Windows
NO_COMPILER = ("No working C++ compiler", "Compiler: cl", "Failed to find C compiler",
               "working triton installation")  # on a CPU, on Windows, on a GPU, on a GPU without triton


def command(main):
    """Run main(argv) as a program. An error that a user can act on is one line, without a traceback."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # without a terminal these can be None
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without the letters of a class name
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        main(sys.argv[1:])
    except (BadInput, RunFailed, OSError, RuntimeError, MemoryError) as e:
        message, advice = str(e), ""
        if isinstance(e, MemoryError) or any(words in message for words in OUT_OF_MEMORY):
            advice = ": try a smaller --batch"
        elif any(words in message for words in NO_COMPILER):
            message = message.split("\n\n")[0]  # after that, torch says how to report a bug
            advice = ": --compile needs a compiler. The run goes on with --resume and without --compile"
        if not isinstance(e, (BadInput, RunFailed, OSError)) and not advice:
            raise
        print("error:", (" ".join(message.split()) or "out of memory") + advice, file=sys.stderr)
        sys.exit(2 if isinstance(e, BadInput) else 1)
    except KeyboardInterrupt as e:
        print(f"stopped; to go on: {resume_command()}" if isinstance(e, Stopped) else "stopped", file=sys.stderr)
        sys.exit(130)


def command_line(*words):
    """The command `python` with these words, in the quotes of the system's shell."""
    words = ["python", *map(str, words)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def resume_command():
    """This program's command line with --resume."""
    spec = sys.modules["__main__"].__spec__  # of `python -m lab.distill`; None for `python sfd_minimal.py`
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]
    return command_line(*program, *(word for word in sys.argv[1:] if word != "--resume"), "--resume")
