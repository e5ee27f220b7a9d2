"""The network, and what a reader of SFD may take as given: a label-conditional DDPM++ U-Net (Song et al. 2021) under
EDM preconditioning (Karras et al. 2022), and the deterministic Heun sampler.

The contract of every denoiser in this project, networks and closed forms alike:

    D = model(x, sigma, c)

    x      (B, ...)        float32, an image in [-1, 1] plus sigma times standard normal noise
    sigma  (B, 1, ..., 1)  noise level, a standard deviation in units of x, with as many dimensions as x
    c      (B, ...)        what is asked for: here a one-hot label (B, K), or the tokens of a prompt (B, L), or their
                           states (B, L, WIDTH); zeros for label or tokens, or None = no label, the empty prompt
    D      (B, ...)        float32, the posterior mean E[image | x; sigma, c].  score = (D - x) / sigma^2

A teacher also says what there is to ask for and what it draws: `conditions` (K, ...), one row for each label or word,
`shape`, that of one image, and `sigma_data`, the standard deviation of the images.
"""
import functools
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class NetSettings:
    """What it takes to rebuild a network; stored in every checkpoint."""
    resolution: int = 28            # height and width of the images
    channels: int = 1               # 1 grey, 3 RGB
    num_classes: int = 10           # K; asked with prompts: their longest length L
    words: tuple = ()               # what a prompt can say, tokens 1, 2, ...; none: asked with labels
    model_channels: int = 64        # width of the first level
    channel_mult: tuple = (1, 2)    # width of each level, in units of model_channels; each level halves the resolution
    num_blocks: int = 2             # residual blocks per level in the encoder, one more in the decoder
    attn_resolutions: tuple = (7,)  # levels with self-attention, by their resolution inside the net
    patch: int = 1                  # pixels are folded patch x patch into channels before the net, unfolded after it
    dropout: float = 0.0            # inside the residual blocks, in training mode only
    sigma_data: float = 0.5         # standard deviation of the images, in EDM's preconditioning

    def __post_init__(self):
        for name in ("channel_mult", "attn_resolutions", "words"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
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


WIDTH = 64  # of the states of a prompt


class TextEncoder(nn.Module):
    """A prompt's tokens (B, L) -> their states (B, L, WIDTH): word and position, then two transformer layers."""

    def __init__(self, words, length):
        super().__init__()
        self.token, self.position = nn.Embedding(1 + words, WIDTH), nn.Parameter(torch.randn(length, WIDTH) / 10)
        layer = functools.partial(nn.TransformerEncoderLayer, WIDTH, 4, 2 * WIDTH, 0.0, "gelu", batch_first=True)
        self.layers = nn.Sequential(layer(), layer())

    def forward(self, tokens):
        return self.layers(self.token(tokens) + self.position)


class CrossAttention(nn.Module):
    """Each place of x (B, C, H, W) asks, and the states (B, L, WIDTH) of a prompt answer: added to x, in four heads."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.to_q = group_norm(channels), nn.Conv2d(channels, channels, 1)
        self.to_k, self.to_v = (nn.Linear(WIDTH, channels, bias=False) for _ in range(2))
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x, states):
        heads = lambda of: of.unflatten(2, (4, -1)).transpose(1, 2)                    # (B, 4, places, C / 4)
        q = self.to_q(self.norm(x)).flatten(2).transpose(1, 2).contiguous()            # (B, H*W, C)
        h = F.scaled_dot_product_attention(*map(heads, (q, self.to_k(states), self.to_v(states))))
        return (x + self.proj(h.transpose(2, 3).reshape(x.shape))) * math.sqrt(0.5)


class Block(nn.Module):
    """Residual block of DDPM++: norm, SiLU, conv, + embedding, norm, SiLU, conv, + skip;
    then attention where asked for, and where there are prompts, to them."""

    def __init__(self, c_in, c_out, emb_dim, attention=False, resample=None, dropout=0.0, prompted=False):
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
        self.attention, self.cross = attention, CrossAttention(c_out) if attention and prompted else None

    def _resize(self, x):
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x, emb, states=None):
        h = self.conv0(self._resize(F.silu(self.norm0(x))))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + self.skip(self._resize(x))) * math.sqrt(0.5)
        if not self.attention:
            return x
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm2(x)).reshape(B, C, 3, H * W).unbind(2)            # (B, C, H*W) each
        weights = (q.mT @ k / math.sqrt(C)).softmax(2)                                 # (B, H*W, H*W)
        h = (v @ weights.mT).reshape(B, C, H, W)
        x = (x + self.proj(h)) * math.sqrt(0.5)
        return self.cross(x, states) if self.cross else x


class UNet(nn.Module):
    """DDPM++ U-Net F(x; c_noise, c), c the label, or the states of a prompt.
    Parameters carry the names of the official EDM network, so its weights load as they are."""

    def __init__(self, s: NetSettings):
        super().__init__()
        self.patch, self.emb_half = s.patch, s.model_channels // 2
        image_channels, emb_dim = s.channels * s.patch ** 2, 4 * s.model_channels
        self.map_label = None if s.words else nn.Linear(s.num_classes, s.model_channels)
        self.map_layer0 = nn.Linear(s.model_channels, emb_dim)
        self.map_layer1 = nn.Linear(emb_dim, emb_dim)
        block = functools.partial(Block, emb_dim=emb_dim, dropout=s.dropout, prompted=bool(s.words))

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

    def embedding(self, c_noise, c):
        frequency = (1 / 10000) ** (torch.arange(self.emb_half, device=c.device) / (self.emb_half - 1))
        angle = c_noise[:, None] * frequency
        emb = torch.cat([angle.sin(), angle.cos()], 1)
        emb = emb + self.map_label(c * math.sqrt(c.shape[1])) if self.map_label else emb
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(self, x, c_noise, c):
        emb = self.embedding(c_noise, c)
        x, skips = F.pixel_unshuffle(x, self.patch), []
        for layer in self.enc.values():
            x = layer(x, emb, c) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        *blocks, norm, conv = self.dec.values()
        for layer in blocks:
            if layer.conv0.in_channels != x.shape[1]:
                x = torch.cat([x, skips.pop()], 1)
            x = layer(x, emb, c)
        return F.pixel_shuffle(conv(F.silu(norm(x))), self.patch)


class EDMPrecond(nn.Module):
    """D(x; sigma, c) = c_skip x + c_out F(c_in x; c_noise, c): Karras et al. 2022, eq. 7 and table 1.

    x (B, C, H, W), sigma (B, 1, 1, 1) or anything that broadcasts to it, c (B, K) one-hot or soft, or a prompt. See the
    contract. `text` reads the prompts: it learns with the teacher and is frozen from then on."""

    def __init__(self, settings: NetSettings):
        super().__init__()
        self.settings, self.model = settings, UNet(settings)
        self.text = TextEncoder(len(settings.words), settings.num_classes) if settings.words else None
        self.shape, self.sigma_data = (settings.channels, settings.resolution, settings.resolution), settings.sigma_data
        self.bf16 = False  # run F in bfloat16; weights and everything outside F stay float32
        self.micro_batch = None  # evaluate so many images at a time, and again for the gradient: less memory, more time

    @property
    def conditions(self):
        """(K, K): the one-hot row of each label, or (words, L): the prompt of each word alone; on the network's
        device."""
        words, width, device = len(self.settings.words), self.settings.num_classes, next(self.parameters()).device
        if words:
            return F.pad(torch.arange(1, words + 1, device=device)[:, None], (0, width - 1))
        return torch.eye(width, device=device)

    def _precision(self, device):
        """bfloat16 where it is on, else what the caller's autocast says. Without autocast's cache of cast weights: it
        would outlive an optimizer's step inside the caller's autocast, and be asked instead of the new weights."""
        outer = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if outer and not self.bf16 else torch.bfloat16
        return torch.autocast(device, dtype, enabled=outer or self.bf16, cache_enabled=False)

    def forward(self, x, sigma, c):
        x, sd, part = x.float(), self.sigma_data, self.micro_batch
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1).expand(len(x), 1, 1, 1)
        c = x.new_zeros(len(x), self.settings.num_classes) if c is None else c
        if part and len(x) > part:
            return torch.cat([checkpoint(self, *of, use_reentrant=False)
                              for of in zip(x.split(part), sigma.split(part), c.split(part))])
        c_skip = sd ** 2 / (sigma ** 2 + sd ** 2)
        c_out = sigma * sd / (sigma ** 2 + sd ** 2).sqrt()
        c_in = 1 / (sigma ** 2 + sd ** 2).sqrt()
        c_noise = sigma.log() / 4
        with self._precision(x.device.type):
            c = self.text(c.long()) if self.text and c.ndim == 2 else c.float()
            F_x = self.model(c_in * x, c_noise.flatten(), c)
        return c_skip * x + c_out * F_x.float()


def sigma_grid(u, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Noise level at the fraction u in [0, 1] of EDM's grid, from sigma_max (u = 0) to sigma_min (u = 1):
    eq. 5, continuous in u."""
    return (sigma_max ** (1 / rho) + u * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def heun(D, z, c, steps=18, guidance=1.0, sigma_max=80.0):
    """EDM's deterministic second-order sampler (Karras et al. 2022, algorithm 1): 2 * steps - 1 evaluations of D.

    z (B, ...) standard normal noise, c (B, K), sampling starts from sigma_max * z; guidance w moves D to
    D(0) + w (D(c) - D(0)), at twice the cost.
    Returns samples of z's shape and dtype; the state in between is float64, float32 on devices that have no float64.
    """
    dtype = torch.float32 if z.device.type == "mps" else torch.float64
    sigmas = torch.cat([sigma_grid(torch.linspace(0, 1, steps, dtype=dtype, device=z.device), sigma_max=sigma_max),
                        z.new_zeros(1, dtype=dtype)])

    def slope(x, sigma):  # dx/dsigma of the probability flow, eq. 3
        level = sigma.expand(len(x)).view(-1, *[1] * (x.ndim - 1))
        D_x = D(x, level, c).to(dtype)
        if guidance != 1:
            D_0 = D(x, level, torch.zeros_like(c)).to(dtype)
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


heun_sampler = torch.no_grad()(heun)  # where nobody asks how an image would change with z or c
