"""The judges: two classifiers of a data set. `python -m lab.judge` trains them.

The features of the first judge give the Frechet distance. The second judge has another architecture and another seed,
and confirms the first.
"""
import torch
from torch import nn
from torch.nn import functional as F

from edm_unet import BadInput, load_file
from train_teacher import to_float


def conv_bn(c_in, c_out, stride=1):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out))


class ResBlock(nn.Module):
    """Residual block of two convolutions."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.a, self.b = conv_bn(c_in, c_out, stride), conv_bn(c_out, c_out)
        self.skip = conv_bn(c_in, c_out, stride) if c_in != c_out or stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.b(F.relu(self.a(x))) + self.skip(x))


class Residual(nn.Module):
    """Residual block of one convolution."""

    def __init__(self, c):
        super().__init__()
        self.conv = conv_bn(c, c)

    def forward(self, x):
        return x + F.relu(self.conv(x))


def cnn(resolution, channels, w, stem_stride):
    """Layers of three poolings."""
    layers = []
    for c_in, c_out, stride, pool in ((channels, w, stem_stride, True), (w, 2 * w, 1, False),
                                      (2 * w, 2 * w, 1, True), (2 * w, 4 * w, 1, True)):
        layers.append(nn.Sequential(conv_bn(c_in, c_out, stride), nn.ReLU()))
        if pool:
            layers.append(nn.MaxPool2d(2))
    side = (resolution + stem_stride - 1) // stem_stride // 8
    return [*layers, nn.Flatten(), nn.Linear(4 * w * side ** 2, 128)]


def resnet(resolution, channels, w, stem_stride):
    """Layers of six residual blocks of two convolutions each."""
    return [conv_bn(channels, w, stem_stride), nn.ReLU(), ResBlock(w, w, 1), ResBlock(w, w, 1),
            ResBlock(w, 2 * w, 2), ResBlock(2 * w, 2 * w, 1), ResBlock(2 * w, 4 * w, 2), ResBlock(4 * w, 4 * w, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 128)]


def resnet9(resolution, channels, w, stem_stride):
    """Layers after Jordan 2024 (arXiv 2404.00498), the fastest to train on photographs.

    Frozen whitening filters, then three times a convolution that halves the side and one more as a residual.
    """
    if resolution < 16:
        raise ValueError(f"this judge needs images of at least 16x16, not {resolution}x{resolution}")
    layers = [nn.Conv2d(channels, 8 * channels, 2, bias=False).requires_grad_(False), nn.ReLU()]
    for c_in, c_out in ((8 * channels, w), (w, 4 * w), (4 * w, 4 * w)):
        layers += [nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(c_out), nn.ReLU(),
                   Residual(c_out)]
    return [*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4 * w, 128)]


ARCHITECTURES = {"cnn": cnn, "resnet": resnet, "resnet9": resnet9}


class Judge(nn.Module):
    """Classifier of images x (B, C, H, W) in [-1, 1]: (logits (B, K), features (B, D)).

    arch: "cnn", "resnet" or "resnet9". mirror: in eval mode, what the head reads and the features are means over the
    image and its mirror image. feature_layers: features are the output of so many layers, summed over the pixels;
    0: they are what the head reads, and D is 128. In the last layers nearly all variance lies between the classes, so
    their features tell little of the variety within a class. ValueError where the images are too small for the
    architecture.
    """

    def __init__(self, arch, resolution, channels, num_classes, width, stem_stride=1, mirror=False, feature_layers=0):
        super().__init__()
        self.settings = dict(arch=arch, resolution=resolution, channels=channels, num_classes=num_classes, width=width,
                             stem_stride=stem_stride, mirror=mirror, feature_layers=feature_layers)
        self.trunk = nn.Sequential(*ARCHITECTURES[arch](resolution, channels, width, stem_stride))
        self.head = nn.Linear(128, num_classes)

    def look(self, x):
        """What the head reads of images (B, 128), and their features (B, D)."""
        layers = self.settings["feature_layers"]
        early = self.trunk[:layers](x)
        read = F.relu(self.trunk[layers:](early))
        return read, early.sum((2, 3)) if layers else read

    def forward(self, x):
        read, features = self.look(x)
        if self.settings["mirror"] and not self.training:
            read_mirrored, features_mirrored = self.look(x.flip(3))
            read, features = (read + read_mirrored) / 2, (features + features_mirrored) / 2
        return self.head(read), features


@torch.no_grad()
def class_stats(judge, images, labels, keep=500, batch=500, moments_of=None):
    """Return the statistics of images by their labels: all that the metrics need.

    images: uint8 (N, C, H, W). labels: (N,). keep, moments_of: number of first images of each label that the features
    and the moments are of. The moments are of all images where it is None. Per label k

    confusion (K, K)      number of images of label k that the judge takes for each class
    entropy (K,)          mean entropy of the judge's probabilities, in nats
    mean (K, D)           first moments of the judge's features
    second (K, D, D)      second moments
    features (K, n, D)    features of the first images, float16; n = `keep`, or what the smallest label has
    """
    judge.eval()
    K, device = judge.settings["num_classes"], next(judge.parameters()).device
    outputs = [judge(to_float(part.to(device))) for part in images.split(batch)]
    logits = torch.cat([part for part, _ in outputs]).cpu()
    features = torch.cat([part for _, part in outputs]).cpu()
    log_p, labels = logits.log_softmax(1), labels.cpu()
    keep = min(keep, int(labels.bincount(minlength=K).min()))
    stats = {"confusion": [], "entropy": [], "mean": [], "second": [], "features": []}
    for k in range(K):
        rows = labels == k
        f = features[rows][:moments_of].double()
        stats["confusion"].append(logits.argmax(1)[rows].bincount(minlength=K))
        stats["entropy"].append(-(log_p[rows].exp() * log_p[rows]).sum(1).mean())
        stats["mean"].append(f.mean(0).float())
        stats["second"].append((f.T @ f / len(f)).float())
        stats["features"].append(features[rows][:keep].half())
    return {name: torch.stack(values) for name, values in stats.items()}


def load_judge(path, device):
    """(judge, the content of its file: accuracy, how it was made; of the first judge also the statistics of real
    images, "train" and "test"). BadInput for other files."""
    content = load_file(path)
    if content.get("kind") != "judge":
        raise BadInput(f"{path} is not the file of a judge")
    judge = Judge(**content["judge"]).to(device).eval()
    judge.load_state_dict(content["weights"])
    return judge.requires_grad_(False), content
