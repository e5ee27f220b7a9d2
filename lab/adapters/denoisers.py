"""Networks that predict noise, v, x_0 or a flow velocity, as the denoiser D(x; sigma, c) of edm_unet.py's contract.

    teacher = FromEpsilon(unet, alphas_cumprod, conditions, shape)
    check_noise_range(teacher, s)                                     # s as in sfd_minimal.Settings
    n = sfd_minimal.begin(teacher, s)                                 # from here on as any teacher

Each class wraps net(x_in, t, c). x_in (B, ...) is in the network's own units, t (B,) is its time, and c is what the
network takes: a tensor, or a tuple or dict of tensors. With x = x_0 + sigma eps and r = sqrt(1 + sigma^2):

    class          the network predicts         at x_in            so that D is
    FromEpsilon    eps                          x / r              x - sigma eps
    FromV          v = (eps - sigma x_0) / r    x / r              (x / r - sigma v) / r
    FromX0         x_0                          x / r              x_0
    FromFlow       u = eps - x_0                x / (1 + sigma)    x / (1 + sigma) - t u,   t = sigma / (1 + sigma)

This file needs torch alone.
"""
import math
from statistics import NormalDist

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def map_condition(f, *conditions):
    """Apply f to corresponding tensors of conditions that are tensors, tuples or dicts. None stays None."""
    first = conditions[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {name: map_condition(f, *(c[name] for c in conditions)) for name in first}
    if isinstance(first, tuple):
        return tuple(map_condition(f, *parts) for parts in zip(*conditions, strict=True))
    return f(*conditions)


class InParts(nn.Module):
    """Evaluate a denoiser on `size` images at a time, and each part again for its gradient.

    This keeps what one part needs in memory instead of what all images need, and takes a third more time. Gradients
    reach the parameters of `network`, which are those of this module too.
    """

    def __init__(self, network, size):
        super().__init__()
        self.network, self.size = network, size
        self.shape, self.sigma_data = network.shape, network.sigma_data

    @property
    def conditions(self):
        return self.network.conditions

    def forward(self, x, sigma, c):
        if len(x) <= self.size:
            return self.network(x, sigma, c)
        parts = []
        for first in range(0, len(x), self.size):
            rows = slice(first, first + self.size)
            c_rows = map_condition(lambda tensor: tensor[rows], c)
            parts.append(checkpoint(self.network, x[rows], sigma[rows], c_rows, use_reentrant=False))
        return torch.cat(parts)


class Denoiser(nn.Module):
    """Base of the adapters. A subclass has denoise(x, sigma, c).

    conditions (K, ...), shape, sigma_data: see the contract in edm_unet.py. The parameters are those of `net`, which
    trains through the adapter. sigma_min and sigma_max are the smallest and largest noise level that `net` learned.
    """
    sigma_min, sigma_max = 0.0, math.inf

    def __init__(self, net, conditions, shape, sigma_data=0.5):
        super().__init__()
        self.net, self.conditions, self.shape, self.sigma_data = net, conditions, tuple(shape), sigma_data

    def _apply(self, f, recurse=True):
        """Move the conditions with the weights. torch calls this in .to(), .cuda() and their like."""
        super()._apply(f, recurse)
        self.conditions = map_condition(f, self.conditions)
        return self

    def predict(self, x, t, c):
        """net(x, t, c), in the dtype of x (B, ...). ValueError where the prediction has another shape than x.

        Under the caller's autocast the cache of cast weights is off: it would outlive an optimizer's step, and the
        network would go on computing with old weights.
        """
        kind = x.device.type
        with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
            prediction = self.net(x, t, c)
        if prediction.shape != x.shape:
            raise ValueError(f"the network predicts {tuple(prediction.shape)} for an input of {tuple(x.shape)}; "
                             "an output of twice the channels holds learned variances, to be cut off in `net`")
        return prediction.to(x.dtype)

    def forward(self, x, sigma, c):
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        return self.denoise(x, sigma.expand(len(x), *sigma.shape[1:]), c)


class Discrete(Denoiser):
    """Base of networks that learned the time steps 0, ..., T - 1 of a schedule.

    alphas_cumprod (T,), a tensor, numpy array or list: the noise level of step t is sqrt(1 / alphas_cumprod[t] - 1).
    Between two steps, t is interpolated in ln sigma. Below sigma_min t stays 0 and above sigma_max T - 1, so that D is
    wrong there: `check_noise_range` refuses settings that go there. ValueError where alphas_cumprod is no schedule.
    """

    def __init__(self, net, alphas_cumprod, conditions, shape, sigma_data=0.5):
        super().__init__(net, conditions, shape, sigma_data)
        alphas_cumprod = torch.as_tensor(alphas_cumprod).double().flatten()
        first, last = alphas_cumprod[0].item(), alphas_cumprod[-1].item()
        if not (0 < last and first < 1 and (alphas_cumprod.diff() < 0).all()):
            raise ValueError("alphas_cumprod must fall strictly, from below 1 to above 0, as the cumulative product of "
                             f"1 - beta does; these {len(alphas_cumprod)} numbers begin with {first:g} and end with "
                             f"{last:g}. A step without noise (1) or without image (0) must be left out")
        if last > 0.5:
            raise ValueError(f"alphas_cumprod ends with {last:g}, where more image than noise is left: these may be "
                             "alphas instead of their cumulative product")
        ln_sigma = (1 / alphas_cumprod - 1).log() / 2
        self.sigma_min, self.sigma_max = ln_sigma[0].exp().item(), ln_sigma[-1].exp().item()
        self.register_buffer("ln_sigma", ln_sigma.float())  # t is off by less than 1e-3; MPS has no float64

    def time(self, sigma):
        """Fractional time step t (B,) of sigma (B, 1, ...)."""
        ln = sigma.flatten().to(self.ln_sigma.dtype).log()
        above = torch.searchsorted(self.ln_sigma, ln).clamp(1, len(self.ln_sigma) - 1)
        low, high = self.ln_sigma[above - 1], self.ln_sigma[above]
        return (above - 1 + ((ln - low) / (high - low)).clamp(0, 1)).to(sigma.dtype)


class FromEpsilon(Discrete):
    """Denoiser of a network that predicts the noise."""

    def denoise(self, x, sigma, c):
        eps = self.predict(x / (1 + sigma ** 2).sqrt(), self.time(sigma), c)
        return x - sigma * eps


class FromV(Discrete):
    """Denoiser of a network that predicts v (Salimans and Ho 2022, https://arxiv.org/abs/2202.00512)."""

    def denoise(self, x, sigma, c):
        r = (1 + sigma ** 2).sqrt()
        v = self.predict(x / r, self.time(sigma), c)
        return (x / r - sigma * v) / r


class FromX0(Discrete):
    """Denoiser of a network that predicts the image."""

    def denoise(self, x, sigma, c):
        return self.predict(x / (1 + sigma ** 2).sqrt(), self.time(sigma), c)


class FromFlow(Denoiser):
    """Denoiser of a rectified flow: the network predicts the velocity at (1 - t) x_0 + t eps, t in (0, 1)."""

    def denoise(self, x, sigma, c):
        t = sigma / (1 + sigma)
        u = self.predict(x / (1 + sigma), t.flatten(), c)
        return x / (1 + sigma) - t * u


def check_noise_range(denoiser, s):
    """Raise ValueError where SFD with the settings `s` would use noise levels that the denoiser never learned.

    The generator's noise level and the grid of the theta step must lie within the denoiser's sigma_min and sigma_max,
    because S compares the teacher with the fake score there. The psi step draws from a normal distribution, which has
    no end: 5 % of its noise levels may lie outside, where the fake score learns its own answer.
    """
    low, high = denoiser.sigma_min, denoiser.sigma_max
    learned = f"the network learned noise levels from {low:.4g} to {high:.4g}"
    bottom, top = s.sigma_min ** (1 / 7), s.sigma_max ** (1 / 7)
    theta_max = (bottom + s.u_max * (top - bottom)) ** 7
    if s.sigma_min < low or theta_max > high * (1 + 1e-9):
        raise ValueError(f"{learned}, and the theta step uses {s.sigma_min:.4g} to {theta_max:.4g}: "
                         "change sigma_min, sigma_max or u_max")
    if not low <= s.sigma_init <= high:
        raise ValueError(f"{learned}, and the generator uses sigma_init = {s.sigma_init:g}")
    psi = NormalDist(s.p_mean, s.p_std)
    inside = psi.cdf(math.log(high)) - (psi.cdf(math.log(low)) if low > 0 else 0)
    if inside < 0.95:
        raise ValueError(f"{learned}, and {1 - inside:.0%} of the psi step's lie outside: change p_mean or p_std")
