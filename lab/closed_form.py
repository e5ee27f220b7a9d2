"""Ground truth that this project did not make up: labelled Gaussians, whose denoisers are a line of algebra; and a
small network for them. The tests hold the method against it, and the first notebook draws it."""
import math

import torch
from torch import nn

SD = 1.5  # standard deviation of the points of `ring`, for EDM's preconditioning


class Gaussians:
    """p(x | k) = N(means[k], covs[k]) in D dimensions, all labels equally likely. Called like every denoiser of the
    project: D(x, sigma, label) = E[x_0 | x_0 + sigma eps = x], under a one-hot label or, where the label is zero, under
    the whole mixture."""

    def __init__(self, means, covs):
        self.means, self.covs = means, covs

    def parts(self, x, sigma):
        """Per label: the posterior mean (B, K, D) and ln p(x; sigma | k) (B, K)."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
        noisy = self.covs + sigma ** 2 * torch.eye(x.shape[1], dtype=x.dtype)                   # (B or 1, K, D, D)
        offset = (x[:, None] - self.means)[..., None]                                           # (B, K, D, 1)
        whitened = torch.linalg.inv(noisy) @ offset
        log_p = -0.5 * ((offset * whitened).sum((-1, -2)) + torch.linalg.slogdet(2 * math.pi * noisy)[1])
        return self.means + (self.covs @ whitened)[..., 0], log_p

    def __call__(self, x, sigma, label):
        means, log_p = self.parts(x, sigma)
        nothing = label.sum(1, keepdim=True) == 0
        weights = torch.where(nothing, log_p.softmax(1), label.to(x.dtype))
        return (weights[..., None] * means).sum(1)

    def sample(self, k):
        """One draw for each label number in k (B,)."""
        eps = torch.randn(len(k), self.means.shape[1], 1, dtype=self.means.dtype)
        return self.means[k] + (torch.linalg.cholesky(self.covs)[k] @ eps)[..., 0]


def ring(labels=5, radius=2.0, dtype=torch.float64):
    """Labelled Gaussians on a ring, each with an ellipse of its own."""
    angle = torch.arange(labels, dtype=dtype) * 2 * math.pi / labels
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()], 1), torch.stack([angle.sin(), angle.cos()], 1)], 1)
    widths = torch.stack([0.3 + 0.1 * torch.arange(labels, dtype=dtype) / labels,
                          torch.full((labels,), 0.2, dtype=dtype)], 1)
    return Gaussians(means, turn @ torch.diag_embed(widths ** 2) @ turn.mT)


class Guided(nn.Module):
    """E_0 + g (E_label - E_0) of the posterior means of D at noise levels below `below`, E_label above;
    g is its only weight."""
    sigma_data = SD

    def __init__(self, D, g, below=math.inf):
        super().__init__()
        self.D, self.below, self.g = D, below, nn.Parameter(torch.tensor(g))

    def forward(self, x, sigma, label):
        E_0, sigma = self.D(x, sigma, 0 * label), torch.as_tensor(sigma).reshape(-1, 1)
        return E_0 + torch.where(sigma < self.below, self.g, 1.0) * (self.D(x, sigma, label) - E_0)


class MLP(nn.Module):
    """EDM-preconditioned denoiser of points, D(x, sigma, label); x (B, 2)."""

    def __init__(self, labels=5, width=96):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2 + 1 + labels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                 nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x, sigma, label):
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1).expand(len(x), 1)
        total = (sigma ** 2 + SD ** 2).sqrt()
        return x * (SD / total) ** 2 + sigma * SD / total * self.net(torch.cat([x / total, sigma.log() / 4, label], 1))


def fit(mlp, truth, steps=1500):
    """Train `mlp` to be the closed-form denoiser:
    what generator and fake score start from, as from a teacher's weights."""
    optimizer = torch.optim.Adam(mlp.parameters(), 2e-3, fused=True)
    for step in range(steps):
        k = torch.randint(5, (512,))
        sigma = (torch.randn(512, 1) * 1.6).exp()
        x = truth.sample(k)
        x_t, label = x + sigma * torch.randn_like(x), torch.eye(5)[k]
        loss = ((sigma ** 2 + SD ** 2) / (sigma * SD) ** 2
                * (mlp(x_t, sigma, label) - truth(x_t, sigma, label)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, 2 * (1 - step / steps))
        optimizer.step()
    return mlp
