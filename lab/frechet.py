"""Frechet distance, precision and recall, from statistics of features (`lab.judge.class_stats`)."""
import torch


def moments(stats, labels, weights=None):
    """Mean (128,) and covariance (128, 128) of the mixture of `labels`, in equal parts or by `weights`, float64."""
    share = torch.ones(len(labels), dtype=torch.float64) if weights is None else weights.double()
    share = share / share.sum()
    mean, second = (torch.tensordot(share, stats[name][labels].double(), 1) for name in ("mean", "second"))
    return mean, second - mean.outer(mean)


def sqrtm(c):
    """Square root of a symmetric positive semi-definite matrix; rounding's negative eigenvalues are zero."""
    values, vectors = torch.linalg.eigh((c + c.T) / 2)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet(a, b):
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), of two (mean, covariance) pairs.

    The inner matrix is symmetric and positive semi-definite, so that its root is real, unlike that of C_a C_b."""
    (m_a, c_a), (m_b, c_b) = a, b
    root = sqrtm(c_a)
    cross = torch.linalg.eigvalsh(root @ c_b @ root).clamp(min=0).sqrt().sum()
    return ((m_a - m_b).square().sum() + c_a.trace() + c_b.trace() - 2 * cross).item()


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (N, 128), (M, 128): the share of fake images
    within the k-nearest-neighbour balls of the real ones, and the share of real ones within those of the fake. None for
    both where there are too few."""
    if min(len(real), len(fake)) <= k:
        return None, None

    def covered(points, support):
        # the nearest neighbour of a point is itself
        radius = torch.cdist(support, support).topk(k + 1, largest=False).values[:, -1]
        return (torch.cdist(points, support) <= radius).any(1).float().mean().item()
    return covered(fake, real), covered(real, fake)
