"""The network, and what a reader of SFD may take as given: a label-conditional DDPM++ U-Net (Song et al. 2021) under
EDM preconditioning (Karras et al. 2022), the deterministic Heun sampler, and checkpoints that run no code when read.

The contract of every denoiser in this project, networks and closed forms alike:

    D = model(x, sigma, label)

    x      (B, C, H, W)           float32, an image in [-1, 1] plus sigma times standard normal noise
    sigma  scalar, (B,) or (B,1,1,1)   noise level, a standard deviation in units of x
    label  (B, K)                 one-hot or soft; all zeros = no label
    D      (B, C, H, W)           float32, the posterior mean E[image | x; sigma, label].  score = (D - x) / sigma^2
"""
import dataclasses
import functools
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class NetSettings:
    """What it takes to rebuild a network; stored in every checkpoint."""
    resolution: int = 28            # height and width of the images
    channels: int = 1               # 1 grey, 3 RGB
    num_classes: int = 10           # K
    model_channels: int = 64        # width of the first level
    channel_mult: tuple = (1, 2)    # width of each level, in units of model_channels; each level halves the resolution
    num_blocks: int = 2             # residual blocks per level in the encoder, one more in the decoder
    attn_resolutions: tuple = (7,)  # levels with self-attention, by their resolution inside the net
    patch: int = 1                  # pixels are folded patch x patch into channels before the net, unfolded after it
    dropout: float = 0.0            # inside the residual blocks, in training mode only
    sigma_data: float = 0.5         # standard deviation of the images, in EDM's preconditioning
    folded: bool = False            # the label picks a row of a table, and the noise level is no input: see `fold`

    def __post_init__(self):
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "attn_resolutions", tuple(self.attn_resolutions))
        limits = dict(resolution=1024, channels=64, num_classes=10_000, model_channels=1024, num_blocks=32, patch=16)
        for name, most in limits.items():
            if not (isinstance(getattr(self, name), int) and 1 <= getattr(self, name) <= most):
                raise ValueError(f"{name} must be a whole number from 1 to {most}, not {getattr(self, name)!r}")
        if not (1 <= len(self.channel_mult) <= 8
                and all(isinstance(m, int) and 1 <= m <= 16 for m in self.channel_mult)):
            raise ValueError(f"channel_mult must be 1 to 8 whole numbers from 1 to 16, not {self.channel_mult!r}")
        if self.resolution % (self.patch << (len(self.channel_mult) - 1)):
            raise ValueError(f"resolution {self.resolution} cannot be folded by patch {self.patch} and then halved "
                             f"{len(self.channel_mult) - 1} times")
        if self.model_channels % 4:
            raise ValueError(f"model_channels must be a multiple of 4, not {self.model_channels}")
        if not (0 <= self.dropout < 1 and 0 < self.sigma_data < 1000):
            raise ValueError(f"dropout {self.dropout!r} must lie in [0, 1) "
                             f"and sigma_data {self.sigma_data!r} in (0, 1000)")


def group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class Block(nn.Module):
    """Residual block of DDPM++: norm, SiLU, conv, + embedding, norm, SiLU, conv, + skip;
    then attention where asked for."""

    def __init__(self, c_in, c_out, emb_dim, attention=False, resample=None, dropout=0.0):
        super().__init__()
        self.resample, self.dropout = resample, dropout  # resample: None, "up" or "down"
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
        self.attention = attention

    def _resize(self, x):
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x, emb):
        h = self.conv0(self._resize(F.silu(self.norm0(x))))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + self.skip(self._resize(x))) * math.sqrt(0.5)
        if not self.attention:
            return x
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm2(x)).reshape(B, C, 3, H * W).permute(2, 0, 3, 1)[:, :, None]  # each (B, 1, H*W, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(B, C, H, W)
        return (x + self.proj(h)) * math.sqrt(0.5)


class UNet(nn.Module):
    """DDPM++ U-Net F(x; c_noise, label).
    Parameters carry the names of the official EDM network, so its weights load as they are."""

    def __init__(self, s: NetSettings):
        super().__init__()
        self.patch, self.emb_half, self.folded = s.patch, s.model_channels // 2, s.folded
        image_channels, emb_dim = s.channels * s.patch ** 2, 4 * s.model_channels
        if s.folded:
            self.table = nn.Linear(s.num_classes, emb_dim, bias=False)
        else:
            self.map_label = nn.Linear(s.num_classes, s.model_channels)
            self.map_layer0 = nn.Linear(s.model_channels, emb_dim)
            self.map_layer1 = nn.Linear(emb_dim, emb_dim)
        block = functools.partial(Block, emb_dim=emb_dim, dropout=s.dropout)

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

    def embedding(self, c_noise, label):
        if self.folded:
            return self.table(label)
        frequency = (1 / 10000) ** (torch.arange(self.emb_half, device=label.device) / (self.emb_half - 1))
        angle = c_noise[:, None] * frequency
        emb = torch.cat([angle.sin(), angle.cos()], 1) + self.map_label(label * math.sqrt(label.shape[1]))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(self, x, c_noise, label):
        emb = self.embedding(c_noise, label)
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
    """D(x; sigma, label) = c_skip x + c_out F(c_in x; c_noise, label): Karras et al. 2022, eq. 7 and table 1.
    See the contract above."""

    def __init__(self, settings: NetSettings):
        super().__init__()
        self.settings, self.model = settings, UNet(settings)
        self.bf16 = False  # run F in bfloat16; weights and everything outside F stay float32

    def forward(self, x, sigma, label):
        x = x.float()
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1).expand(len(x), 1, 1, 1)
        sd = self.settings.sigma_data
        c_skip = sd ** 2 / (sigma ** 2 + sd ** 2)
        c_out = sigma * sd / (sigma ** 2 + sd ** 2).sqrt()
        c_in = 1 / (sigma ** 2 + sd ** 2).sqrt()
        c_noise = sigma.log() / 4
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            F_x = self.model(c_in * x, c_noise.flatten(), label.float())
        return c_skip * x + c_out * F_x.float()


@torch.no_grad()
def fold(model, sigma):
    """A copy of a one-step generator that knows no noise level but `sigma`: the embeddings of (sigma, label) become a
    table of K rows, and the layers that made them are gone. The same images under one-hot labels; a mix of labels mixes
    rows; at another sigma it is no denoiser."""
    K, parameter = model.settings.num_classes, next(model.parameters())
    c_noise = torch.full((K,), math.log(sigma) / 4, device=parameter.device)
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("model.map_")}
    folded = EDMPrecond(dataclasses.replace(model.settings, folded=True)).to(parameter.device).eval()
    folded.load_state_dict(
        kept | {"model.table.weight": model.model.embedding(c_noise, torch.eye(K, device=parameter.device)).T})
    folded.bf16 = model.bf16
    return folded


def sigma_grid(u, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Noise level at the fraction u in [0, 1] of EDM's grid, from sigma_max (u = 0) to sigma_min (u = 1):
    eq. 5, continuous in u."""
    return (sigma_max ** (1 / rho) + u * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


@torch.no_grad()
def heun_sampler(D, z, label, steps=18, guidance=1.0, sigma_max=80.0):
    """EDM's deterministic second-order sampler (Karras et al. 2022, algorithm 1): 2 * steps - 1 evaluations of D.

    z (B, ...) standard normal noise, label (B, K), sampling starts from sigma_max * z; guidance w moves D to
    D(0) + w (D(label) - D(0)), at twice the cost.
    Returns samples of z's shape and dtype; the state in between is float64, float32 on devices that have no float64.
    """
    dtype = torch.float32 if z.device.type == "mps" else torch.float64
    sigmas = torch.cat([sigma_grid(torch.linspace(0, 1, steps, dtype=dtype, device=z.device), sigma_max=sigma_max),
                        z.new_zeros(1, dtype=dtype)])

    def slope(x, sigma):  # dx/dsigma of the probability flow, eq. 3
        D_x = D(x, sigma, label).to(dtype)
        if guidance != 1:
            D_0 = D(x, sigma, torch.zeros_like(label)).to(dtype)
            D_x = D_0 + guidance * (D_x - D_0)
        return (x - D_x) / sigma

    x = z.to(dtype) * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        d = slope(x, sigma)
        x_next = x + (sigma_next - sigma) * d
        if sigma_next > 0:
            x_next = x + (sigma_next - sigma) * (d + slope(x_next, sigma_next)) / 2
        x = x_next
    return x.to(z.dtype)


# Checkpoints: plain dicts of settings and tensors. Read with weights_only=True, so that no file can run code.

class CheckpointError(ValueError):
    """A file that is not what it should be; the message is one line that says which and why."""


def save_atomically(obj, path):
    """torch.save to a temporary file beside `path`, then rename: a kill or a full disk leaves the old file whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as f:
            torch.save(obj, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:  # torch's zip writer turns a full disk into a RuntimeError
        partial.unlink(missing_ok=True)
        kept = "the previous file there is unharmed" if path.exists() else "nothing was written"
        raise OSError(f"could not write {path} ({e}); {kept}") from e


def read_file(path, kind):
    """The dict in a file that `save_atomically` wrote, on the CPU.
    CheckpointError, in one line, if it is anything else than a `kind`."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            # torch warns of some foreign pickles before it refuses them; the refusal says enough
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged or hostile file can raise anything; whatever it is, the file is refused
        reason = ("it is empty" if path.stat().st_size == 0
                  else f"truncated, or not a checkpoint ({type(e).__name__}); nothing in it was run")
        raise CheckpointError(f"{path}: cannot be read: {reason}") from e
    if not isinstance(content, dict) or content.get("kind") != kind:
        found = repr(content.get("kind")) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: expected a {kind} file of this project, found {found}")
    return content


def pack(model, half=False):
    """Settings and weights of an EDMPrecond as a plain dict; `half` stores the weights in float16."""
    state = {k: v.detach().to("cpu", torch.float16 if half else None) for k, v in model.state_dict().items()}
    return {"net": dataclasses.asdict(model.settings), "weights": state}


def unpack(packed):
    """The EDMPrecond that `pack` took apart, float32, on the CPU.
    CheckpointError where settings and weights do not fit."""
    try:
        settings = NetSettings(**packed["net"])
        with torch.device("meta"):  # shapes only: settings that ask for an absurd size cost nothing
            model = EDMPrecond(settings)
        model.load_state_dict({k: v.float() for k, v in packed["weights"].items()}, assign=True)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise CheckpointError(f"settings and weights do not fit together: {str(e).splitlines()[0]}") from e
    return model


def load_checkpoint(path, device="cpu"):
    """(denoiser, content): the EDMPrecond in a checkpoint of this project or a published edm-*.pkl, in eval mode, and
    the file's other entries. bfloat16 is on where the device computes it fast. CheckpointError, in one line, for a file
    that is neither."""
    if Path(path).suffix == ".pkl":
        from edm_pickle import load_published
        model = load_published(path)
        content = {"data": "cifar10", "classes": [str(k) for k in range(model.settings.num_classes)]}
    else:
        content = read_file(path, "denoiser")
        if lacking := {"net", "weights", "data", "classes"} - content.keys():
            raise CheckpointError(f"{path} lacks {', '.join(sorted(lacking))}")
        try:
            model = unpack(content)
        except CheckpointError as e:
            raise CheckpointError(f"{path}: {e}") from e
    model = model.to(device).eval()
    model.bf16 = has_fast_bf16(device)
    return model, content


def weight_files(data, what, named=""):
    """Paths of the `what` (teacher, judge, judge2, sid) of a data set that are there: the one named, else the one that
    comes with the project and the one that was trained in runs/."""
    name = Path(data).name
    shipped = Path(__file__).parent / "teachers" / (f"{name}.pt" if what == "teacher" else f"{name}_{what}.pt")
    trained = Path("runs") / f"{name}-{what}" / {"teacher": "teacher.pt", "sid": "both.pt"}.get(what, "judge.pt")
    return [path for path in ([Path(named)] if named else [shipped, trained]) if path.exists()]


def find_weights(data, what, named=""):
    """The first of `weight_files`, None where there is none."""
    return next(iter(weight_files(data, what, named)), None)


def has_fast_bf16(device):
    """Whether the device multiplies bfloat16 matrices in hardware; elsewhere it is slower than float32, or emulated."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and any(cpu_features().get(name) for name in ("amx_bf16", "avx512_bf16"))


def cpu_features():
    """What torch knows of the CPU; nothing, before it could tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def main(argv):
    """`python edm_unet.py convert FILE.pkl OUT.pt --data NAME`: a published EDM checkpoint as one of this project's."""
    from common import Parser
    from edm_pickle import load_published
    parser = Parser(description="Convert a published EDM checkpoint (edm-*.pkl) to this project's format; "
                                "no code in it is run.")
    parser.add_argument("action", choices=["convert"])
    parser.add_argument("file", help="the published pickle")
    parser.add_argument("out", help="the checkpoint to write")
    parser.add_argument("--data", default="cifar10", help="data set it was trained on")
    a = parser.parse_args(argv)
    model = load_published(a.file)
    classes = [str(k) for k in range(model.settings.num_classes)]
    save_atomically({"kind": "denoiser", "data": a.data, "classes": classes, **pack(model)}, a.out)
    print(f"{a.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {model.settings}")


if __name__ == "__main__":
    from common import command
    command(main)
