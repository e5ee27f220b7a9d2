"""Unlearning accuracy (UA), Frechet distance (FD), precision and recall, from the statistics of `judges.class_stats`.

An FD is measured on the features of the project's own judge. It is no FID. Compare it with the FD of held-out real
images.
"""
import torch

COMPARED = 5000  # features in all, real or fake, that precision and recall are measured on


def moments(stats, labels, weights=None):
    """Mean (D,) and covariance (D, D) of the mixture of `labels`, in equal parts or by `weights`, float64."""
    share = torch.ones(len(labels), dtype=torch.float64) if weights is None else weights.double()
    share = share / share.sum()
    mean = torch.tensordot(share, stats["mean"][labels].double(), 1)
    second = torch.tensordot(share, stats["second"][labels].double(), 1)
    return mean, second - mean.outer(mean)


def sqrtm(c):
    """Square root of a symmetric positive semi-definite matrix. Negative eigenvalues from rounding count as zero."""
    values, vectors = torch.linalg.eigh((c + c.T) / 2)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet(a, b):
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) of two (mean, covariance) pairs.

    The inner matrix is symmetric and positive semi-definite, so its root is real. The root of C_a C_b need not be.
    """
    (m_a, c_a), (m_b, c_b) = a, b
    root = sqrtm(c_a)
    cross = torch.linalg.eigvalsh(root @ c_b @ root).clamp(min=0).sqrt().sum()
    return ((m_a - m_b).square().sum() + c_a.trace() + c_b.trace() - 2 * cross).item()


def share_covered(points, support, k):
    """Share of points (N, D) within the k-nearest-neighbour ball of some point of `support` (M, D)."""
    nearest = torch.cdist(support, support).topk(k + 1, largest=False).values  # the first is the point itself
    return (torch.cdist(points, support) <= nearest[:, -1]).any(1).float().mean().item()


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991) of features (N, D), (M, D).

    Precision is the share of fake images that the real ones cover, recall the share of real images that the fake ones
    cover. None for both where there are at most k images.
    """
    if min(len(real), len(fake)) <= k:
        return None, None
    return share_covered(fake, real, k), share_covered(real, fake, k)


def override_precision_recall(real, fake, c_f, overrides, erased):
    """`precision_recall` of the images drawn as the override, against real images of the override.

    real, fake: features (K, n, D) of each label. The images are those under the labels c_f, or under the overrides
    where the network has forgotten nothing (erased=False). Their number is the same in both cases, up to rounding.
    """
    overrides = list(dict.fromkeys(overrides))  # labels to forget may share an override
    number = min(COMPARED, fake.shape[1] * min(len(c_f), len(overrides)))

    def features(of_labels, labels):
        of_each = max(1, number // len(labels))
        return of_labels[labels, :of_each].flatten(0, 1).float()

    return precision_recall(features(real, overrides), features(fake, c_f if erased else overrides))


def override_share(confusion, c_f, c_o, kept):
    """Mean over the labels c_f of the share of their images that a judge takes for their override."""
    shares = []
    for f, o in zip(c_f, c_o):
        targets = kept if o < 0 else [o]
        shares.append(confusion[f, targets].sum() / confusion[f].sum())
    return torch.stack(shares).mean().item()


def label_metrics(measured, reference, floor, c_f, c_o, erased=True):
    """The metrics of a network as a plain dict.

    measured: "stats" of the first judge and "confusion2" of the second. reference, floor: stats of the training images
    and of held-out images. c_f, c_o: numbers of the labels to forget and of their overrides, -1 for a random kept
    label. Metrics of the override are of the images under the labels c_f, or under c_o where the network has forgotten
    nothing (erased=False).
    """
    stats = measured["stats"]
    confusion, confusion2 = stats["confusion"], measured["confusion2"]
    accuracy, accuracy2 = confusion.diag() / confusion.sum(1), confusion2.diag() / confusion2.sum(1)
    kept = [k for k in range(len(confusion)) if k not in c_f]
    of_each = max(1, COMPARED // len(kept))
    real, fake = (s["features"][kept, :of_each].flatten(0, 1).float() for s in (reference, stats))
    precision, recall = precision_recall(real, fake)
    numbers = {
        "kept_accuracy": accuracy[kept].mean().item(),
        "kept_accuracy_judge2": accuracy2[kept].mean().item(),
        "per_class_accuracy": accuracy.tolist(),
        "entropy": stats["entropy"].tolist(),
        "fd": frechet(moments(stats, kept), moments(reference, kept)),
        "fd_floor": frechet(moments(floor, kept), moments(reference, kept)),
        "precision": precision,
        "recall": recall,
        "n": int(confusion.sum()),
    }
    if not c_f:
        return numbers
    overrides = []  # labels of which the images under c_f should be
    for o in c_o:
        overrides += kept if o < 0 else [o]
    shown = c_f if erased else overrides
    precision_override, recall_override = override_precision_recall(reference["features"], stats["features"], c_f,
                                                                    overrides, erased)
    return numbers | {
        "ua": 1 - accuracy[c_f].mean().item(),
        "ua_judge2": 1 - accuracy2[c_f].mean().item(),
        "override_share": override_share(confusion, c_f, c_o, kept),
        "override_share_judge2": override_share(confusion2, c_f, c_o, kept),
        "fd_override": frechet(moments(stats, shown), moments(reference, overrides)),
        "fd_override_floor": frechet(moments(floor, overrides), moments(reference, overrides)),
        "precision_override": precision_override,
        "recall_override": recall_override,
        "n_forgotten": int(confusion[c_f].sum()),
    }
