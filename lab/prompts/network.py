"""A denoiser that reads prompts: MNIST's U-Net with cross-attention to the states of a text encoder."""
import functools
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from edm_unet import BadInput, Block, EDMPrecond, NetSettings, UNet, group_norm, load_network
from lab.core.files import find_weights, in_folder
from lab.prompts.captions import LONGEST, WORDS

WIDTH = 64  # of the states of a prompt
HEADS = 4


@dataclass(frozen=True)
class PromptSettings(NetSettings):
    """Shape of the U-Net and of its text encoder."""
    words: tuple = WORDS    # words of a prompt: tokens 1, 2, ...; token 0 is no word
    length: int = LONGEST   # tokens of a prompt, L

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "words", tuple(self.words))
        object.__setattr__(self, "num_classes", 1)  # without effect; older files hold the length of a prompt here


class TextEncoder(nn.Module):
    """Tokens (B, L) of a prompt -> states (B, L, WIDTH): word and position, then two transformer layers."""

    def __init__(self, words, length):
        super().__init__()
        self.token, self.position = nn.Embedding(1 + words, WIDTH), nn.Parameter(torch.randn(length, WIDTH) / 10)
        layer = functools.partial(nn.TransformerEncoderLayer, WIDTH, HEADS, 2 * WIDTH, 0.0, "gelu", batch_first=True)
        self.layers = nn.Sequential(layer(), layer())

    def forward(self, tokens):
        return self.layers(self.token(tokens) + self.position)


class CrossAttention(nn.Module):
    """Add softmax(q k^T / sqrt(C / HEADS)) v to x: queries from x (B, C, H, W), the rest from states (B, L, WIDTH)."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.to_q = group_norm(channels), nn.Conv2d(channels, channels, 1)
        self.to_k, self.to_v = nn.Linear(WIDTH, channels, bias=False), nn.Linear(WIDTH, channels, bias=False)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x, states):
        q = self.to_q(self.norm(x)).flatten(2).transpose(1, 2).contiguous()            # (B, H*W, C)
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2)                      # (B, HEADS, places, C / HEADS)
                   for part in (q, self.to_k(states), self.to_v(states)))
        h = F.scaled_dot_product_attention(q, k, v)
        return (x + self.proj(h.transpose(2, 3).reshape(x.shape))) * math.sqrt(0.5)


class PromptBlock(Block):
    """A block of the U-Net that, where it has self-attention, then attends to the prompt."""

    def __init__(self, c_in, c_out, emb_dim, attention=False, resample=None, dropout=0.0):
        super().__init__(c_in, c_out, emb_dim, attention, resample, dropout)
        self.cross = CrossAttention(c_out) if attention else None

    def forward(self, x, condition):
        emb, states = condition
        x = super().forward(x, emb)
        return self.cross(x, states) if self.cross else x


class PromptUNet(UNet):
    """F(x; c_noise, c), c (B, L, WIDTH) the states of a prompt."""
    block = PromptBlock

    def __init__(self, s):
        super().__init__(s)
        self.map_label = None  # the prompt enters in the blocks

    def embedding(self, c_noise, c):
        """Noise level (B,) as (B, 4 model_channels), and the states: what every block takes."""
        emb = self.time_embedding(c_noise)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb)))), c


class PromptDenoiser(EDMPrecond):
    """D(x; sigma, c), c the tokens (B, L) of prompts, their states (B, L, WIDTH), or None for the empty prompt.

    The text encoder `text` learns with the teacher. It stays frozen in every method after that: images should change,
    not the meaning of words.
    """
    settings_class, network_class = PromptSettings, PromptUNet

    def __init__(self, settings):
        super().__init__(settings)
        self.text = TextEncoder(len(settings.words), settings.length)

    @property
    def conditions(self):
        """The prompt of each word alone, (words, L), on the network's device."""
        tokens = torch.arange(1, 1 + len(self.settings.words), device=next(self.parameters()).device)
        return F.pad(tokens[:, None], (0, self.settings.length - 1))

    def read_condition(self, x, c):
        """The states of prompts, as the U-Net takes them."""
        if c is None:
            c = x.new_zeros(len(x), self.settings.length)
        return self.text(c.long()) if c.ndim == 2 else c.float()


def load_prompt_network(path, device="cpu"):
    """(network with a frozen text encoder, info) from a file, as `edm_unet.load_network`."""
    network, info = load_network(path, device, PromptDenoiser)
    network.text.requires_grad_(False)
    return network, info


def load_prompt_teacher(path, device="cpu"):
    """(teacher, info) from a file, or where `path` is empty the one of the project. BadInput where it is no teacher."""
    path = in_folder(path, "teacher.pt") if path else find_weights("prompts", "teacher")
    if path is None:
        raise BadInput("no teacher for prompts: train one with `python -m lab.prompts.train_teacher`, or name its file "
                       "with --teacher")
    teacher, info = load_prompt_network(path, device)
    if "sigma_init" in info:
        raise BadInput(f"{path} is a one-step generator, not a teacher")
    return teacher, info
