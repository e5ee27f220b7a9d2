"""Other people's networks as the denoiser D(x, sigma, c) that SFD asks: those that predict noise, v, or a velocity.

    teacher = FromEpsilon(unet, alphas_cumprod, conditions, shape)    # then as any teacher: begin, distill, sfd_step

Each wraps net(x, t, c), with x (B, ...) in the network's own units and t (B,) its time; c is what the network takes: a
tensor, or a tuple or dict of tensors. x and D of the wrapper are in SFD's units: x = x_0 + sigma eps, D = E[x_0 | x].
"""
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def each(f, *c):
    """f of what is asked for: of tensors, or of the parts of tuples or dicts of tensors, one with the other."""
    if isinstance(c[0], dict):
        return {name: f(*(of[name] for of in c)) for name in c[0]}
    return tuple(map(f, *c)) if isinstance(c[0], tuple) else f(*c)


def in_parts(D, size, x, sigma, c):
    """D(x, sigma, c) of `size` images at a time, each part evaluated again for its gradient: the memory of one, for a
    third more time."""
    parts = range(0, len(x), size)
    return torch.cat([checkpoint(D, x[i:i + size], sigma[i:i + size], each(lambda of: of[i:i + size], c),
                                 use_reentrant=False) for i in parts])


class Denoiser(nn.Module):
    """A network that learned another prediction; `conditions`, `shape` and `sigma_data` are what SFD asks a teacher
    for. Its parameters are those of the network, which trains through it. See `in_parts` for `micro_batch`."""

    def __init__(self, net, conditions, shape, sigma_data=0.5, micro_batch=None):
        super().__init__()
        self.net, self.conditions, self.shape, self.sigma_data = net, conditions, tuple(shape), sigma_data
        self.micro_batch = micro_batch

    def forward(self, x, sigma, c):
        if self.micro_batch and len(x) > self.micro_batch:
            return in_parts(self.denoise, self.micro_batch, x, sigma, c)
        return self.denoise(x, sigma, c)


class Discrete(Denoiser):
    """One that knows the steps 0, ..., T - 1 of a schedule: alphas_cumprod (T,), falling. The noise level of step t is
    sigma_t = sqrt(1 / alphas_cumprod_t - 1); between two t is interpolated in ln sigma, and beyond them it stops."""

    def __init__(self, net, alphas_cumprod, conditions, shape, sigma_data=0.5, micro_batch=None):
        super().__init__(net, conditions, shape, sigma_data, micro_batch)
        self.register_buffer("ln_sigma", (1 / alphas_cumprod.double() - 1).log() / 2)

    def time(self, sigma):
        """t (B,), fractional, of sigma (B, 1, ...)."""
        ln = sigma.flatten(1)[:, 0].double().log()
        above = torch.searchsorted(self.ln_sigma, ln).clamp(1, len(self.ln_sigma) - 1)
        low, high = self.ln_sigma[above - 1], self.ln_sigma[above]
        return (above - 1 + ((ln - low) / (high - low)).clamp(0, 1)).to(sigma.dtype)


class FromEpsilon(Discrete):
    """The network predicts the noise eps in x / sqrt(1 + sigma^2): D = x - sigma eps."""

    def denoise(self, x, sigma, c):
        return x - sigma * self.net(x / (1 + sigma ** 2).sqrt(), self.time(sigma), c)


class FromV(Discrete):
    """The network predicts v = (eps - sigma x_0) / r, r = sqrt(1 + sigma^2), at x / r: D = (x / r - sigma v) / r."""

    def denoise(self, x, sigma, c):
        r = (1 + sigma ** 2).sqrt()
        return (x / r - sigma * self.net(x / r, self.time(sigma), c)) / r


class FromFlow(Denoiser):
    """Rectified flow: the network predicts the velocity u = eps - x_0 at (1 - t) x_0 + t eps = x / (1 + sigma), where
    t = sigma / (1 + sigma): D = x / (1 + sigma) - t u."""

    def denoise(self, x, sigma, c):
        t = sigma / (1 + sigma)
        return x / (1 + sigma) - t * self.net(x / (1 + sigma), t.flatten(1)[:, 0], c)
