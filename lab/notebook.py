"""Helpers of the notebooks: the style of figures, points in the plane, and rows of images."""
import matplotlib.pyplot as plt
import torch

from lab.core.images import to_uint8
from lab.evaluate.figures import FORGOTTEN, KEPT, frame, tile

GREY = "#888888"


def style(dpi=60):
    """Set up figures and random numbers as all notebooks have them. At most two threads."""
    plt.rcParams.update({"figure.dpi": dpi, "font.size": 13, "image.interpolation": "nearest",
                         "axes.spines.top": False, "axes.spines.right": False})
    torch.set_num_threads(min(2, torch.get_num_threads()))
    torch.manual_seed(0)


def colour(label, forgotten):
    """Orange for the label to forget, blue for the others."""
    return FORGOTTEN if label == forgotten else KEPT


# ------------------------------------------------------------------------------------------------- points in the plane

def panels(n, size=4.4):
    """A figure with n panels in a row: its axes."""
    _, axes = plt.subplots(1, n, figsize=(size * n, size), layout="constrained", squeeze=False)
    return axes[0]


def plane(ax, title, teacher=None, forgotten=None):
    """Draw the frame of the plane and, in grey, points of the `closed_form.Gaussians` of a teacher."""
    ax.set(xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    ax.set_title(title, fontsize=13)
    for k in range(0 if teacher is None else len(teacher.means)):
        ax.scatter(*teacher.sample(torch.full((150,), k)).T, s=2, color=GREY, alpha=0.4, linewidths=0)
        ax.annotate(str(k), teacher.means[k] * 1.55, ha="center", va="center", color=colour(k, forgotten),
                    fontweight="bold")


def clouds(ax, points, forgotten):
    """Draw {label: points (N, 2)}."""
    for k, x in points.items():
        ax.scatter(*x.T, s=3, color=colour(k, forgotten), alpha=0.5, linewidths=0)


def film(frames, teacher, forgotten):
    """Draw {step: {label: points (N, 2)}}, a panel for each step."""
    for ax, (step, points) in zip(panels(len(frames), 3.5), frames.items()):
        plane(ax, f"step {step}", teacher, forgotten)
        clouds(ax, points, forgotten)
    plt.show()


# -------------------------------------------------------------------------------------------------------------- images

def image_rows(rows, labels, forgotten=0, signed=()):
    """Draw {title: images (N, 1, H, W) in [-1, 1]}, a row each. The columns of the label to forget are framed.

    labels: of the columns. signed: titles of rows that are differences, in red and blue, with zero in white.
    """
    size = (1.25 * len(labels) + 2.2, 1.3 * len(rows))
    _, axes = plt.subplots(len(rows), len(labels), figsize=size, layout="constrained", squeeze=False)
    for line, (title, images) in zip(axes, rows.items()):
        for ax, image, k in zip(line, images.detach(), labels):
            ax.imshow(image[0], cmap="RdBu" if title in signed else "gray", vmin=-1, vmax=1)
            ax.set(xticks=[], yticks=[])
            for side in ax.spines.values():
                side.set(visible=True, color=GREY, linewidth=1)
                if k == forgotten:
                    side.set(color=FORGOTTEN, linewidth=3)
        line[0].set_ylabel(title, rotation=0, ha="right", va="center")
    plt.show()


def few_greys(images):
    """Images uint8 with 16 levels of brightness, which keeps a notebook small."""
    return images // 16 * 16


def strips(pictures, forgotten=(), width=8.0):
    """Draw {title: images (N, C, H, W), uint8 or in [-1, 1]}, a strip each. Titles in `forgotten` are orange."""
    size = (width, 0.08 * width * len(pictures) + 0.1)
    _, axes = plt.subplots(len(pictures), 1, figsize=size, layout="constrained", squeeze=False)
    for ax, (title, images) in zip(axes[:, 0], pictures.items()):
        show_grid(ax, images, 1)
        ax.set_ylabel(title, rotation=0, ha="right", va="center", color=FORGOTTEN if title in forgotten else "black")
    plt.show()


def show_grid(ax, images, rows):
    """Draw images (N, C, H, W), uint8 or in [-1, 1], as a grid."""
    if images.dtype != torch.uint8:
        images = to_uint8(images)
    picture = tile(few_greys(images), rows)
    ax.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=255)
    ax.set(xticks=[], yticks=[])
