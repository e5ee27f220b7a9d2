"""Labelled Gaussians in the plane, whose denoisers have a closed form, and a small network for them.

The tests compare the method with this ground truth, and notebook 1 draws it.
"""
import math

import torch
from torch import nn

SD = 1.5  # standard deviation of the points of `ring`, for EDM's preconditioning


class Gaussians:
    """p(x | k) = N(means[k], covs[k]) in D dimensions, with all labels equally likely.

    Called as every denoiser of the project: D(x, sigma, c) = E[x_0 | x_0 + sigma eps = x]. x (B, D). c (B, K) is a
    one-hot label, or zero for the whole mixture.
    """

    def __init__(self, means, covs):
        self.means, self.covs = means, covs
        self.variances, self.axes = torch.linalg.eigh(covs)  # (K, D) along the axes of the ellipses, (K, D, D)

    def posteriors(self, x, sigma):
        """The posterior mean (B, K, D) under each label, and ln p(x; sigma | k) (B, K)."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1)
        noisy = self.variances + sigma ** 2                                                     # (B or 1, K, D)
        offset = (self.axes.mT @ (x[:, None] - self.means)[..., None])[..., 0]                  # (B, K, D)
        log_p = -0.5 * (offset ** 2 / noisy + (2 * math.pi * noisy).log()).sum(-1)
        shrunk = offset * self.variances / noisy
        return self.means + (self.axes @ shrunk[..., None])[..., 0], log_p

    def __call__(self, x, sigma, c):
        means, log_p = self.posteriors(x, sigma)
        any_label = c.sum(1, keepdim=True) == 0
        weights = torch.where(any_label, log_p.softmax(1), c.to(x.dtype))
        return (weights[..., None] * means).sum(1)

    def sample(self, k):
        """One point for each label number in k (B,): (B, D)."""
        eps = torch.randn(len(k), self.means.shape[1], 1, dtype=self.means.dtype)
        return self.means[k] + (torch.linalg.cholesky(self.covs)[k] @ eps)[..., 0]


def ring(labels=5, radius=2.0, dtype=torch.float64):
    """`Gaussians` on a ring, each with its own ellipse."""
    angle = torch.arange(labels, dtype=dtype) * 2 * math.pi / labels
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()], 1), torch.stack([angle.sin(), angle.cos()], 1)], 1)
    along = 0.3 + 0.1 * torch.arange(labels, dtype=dtype) / labels
    widths = torch.stack([along, torch.full_like(along, 0.2)], 1)
    return Gaussians(means, turn @ torch.diag_embed(widths ** 2) @ turn.mT)


class Guided(nn.Module):
    """E_0 + g (E_c - E_0) at noise levels below `below`, else E_c, from the posterior means E of a denoiser D.

    g is the only weight.
    """
    sigma_data = SD

    def __init__(self, D, g, below=math.inf):
        super().__init__()
        self.D, self.below, self.g = D, below, nn.Parameter(torch.tensor(g))

    def forward(self, x, sigma, c):
        sigma = torch.as_tensor(sigma).reshape(-1, 1)
        E_0, E_c = self.D(x, sigma, torch.zeros_like(c)), self.D(x, sigma, c)
        return E_0 + torch.where(sigma < self.below, self.g, 1.0) * (E_c - E_0)


class MLP(nn.Module):
    """EDM-preconditioned denoiser of points x (B, 2) under labels c (B, labels)."""

    def __init__(self, labels=5, width=96):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2 + 1 + labels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                 nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x, sigma, c):
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1).expand(len(x), 1)
        total = (sigma ** 2 + SD ** 2).sqrt()
        return x * (SD / total) ** 2 + sigma * SD / total * self.net(torch.cat([x / total, sigma.log() / 4, c], 1))


def fit(mlp, truth, steps=1500):
    """Train `mlp` to be the closed-form denoiser `truth`: what generator and fake score start from."""
    optimizer = torch.optim.Adam(mlp.parameters(), 2e-3, fused=True)
    for step in range(steps):
        k = torch.randint(5, (512,))
        sigma = (torch.randn(512, 1) * 1.6).exp()
        x = truth.sample(k)
        x_t, c = x + sigma * torch.randn_like(x), torch.eye(5)[k]
        w = (sigma ** 2 + SD ** 2) / (sigma * SD) ** 2
        loss = (w * (mlp(x_t, sigma, c) - truth(x_t, sigma, c)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, 2 * (1 - step / steps))
        optimizer.step()
    return mlp
