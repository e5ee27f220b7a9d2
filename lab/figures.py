"""What the numbers look like: sample grids and training curves, the forgotten class in one colour throughout."""
import csv
import warnings

import numpy as np
from PIL import Image

FORGOTTEN = "#d55e00"  # the colour of the forgotten class in every figure; colour-blind safe, like the blue beside it
KEPT = "#0072b2"


def tile(images, rows):
    """uint8 (N, C, H, W) -> one picture (rows*H, N/rows*W, C), row by row."""
    n, c, h, w = images.shape
    return images.reshape(rows, n // rows, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, n // rows * w, c).numpy()


def to_picture(array):
    return Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)


def subplots(rows, columns, size):
    """A figure of its own, whatever backend the caller's pyplot has, and its axes (rows, columns)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def frame(ax, x, y, width, height, linewidth):
    from matplotlib.patches import Rectangle
    ax.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=FORGOTTEN, linewidth=linewidth))


def save(figure, path):
    """A picture that cannot be drawn is a note: the run whose numbers it shows is not lost for it."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            figure.savefig(path, dpi=110)
        except Exception as e:
            print(f"note: {path} could not be drawn: {type(e).__name__}: {e}")
    if any("missing from font" in str(w.message) for w in seen):
        print(f"note: the font has not all letters of the class names: boxes stand for them in {path}")


def show(ax, picture):
    """A uint8 picture (H, W, C) on its axes, grey where C is 1, without ticks."""
    ax.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=255)
    ax.set(xticks=[], yticks=[])


def samples_figure(panels, classes, forget, path):
    """{title: uint8 images, sorted by label}: panels one above the other, one row per label,
    the forgotten rows marked."""
    K = len(classes)
    fig, axes = subplots(len(panels), 1, (8, 4.2 * len(panels)))
    for ax, (title, images) in zip(axes[:, 0], panels.items()):
        h = images.shape[2]
        picture = tile(images, K)
        show(ax, picture)
        ax.set_yticks([h * (k + 0.5) for k in range(K)], classes, parse_math=False)
        ax.set_title(title, loc="left")
        for k in forget:
            frame(ax, 0, h * k, picture.shape[1] - 1, h - 1, linewidth=2.5)
            ax.get_yticklabels()[k].set(color=FORGOTTEN, fontweight="bold")
    save(fig, path)


def curves_figure(log, teacher, path, probe="100 images per class"):
    """UA, kept accuracy and FD of the probes in log.csv against steps, with the seconds on the upper axis.
    None without probes."""
    with open(log, newline="") as f:
        lines = [{k: float(v) for k, v in line.items()} for line in csv.DictReader(f) if line.get("fd")]
    if not lines:
        return
    steps, seconds = [r["step"] for r in lines], [r["seconds"] for r in lines]
    fig, ((left, right),) = subplots(1, 2, (9, 3.6))
    if "ua" in lines[0]:
        left.plot(steps, [100 * r["ua"] for r in lines], "o-", ms=3, color=FORGOTTEN, label="unlearning accuracy (UA)")
    left.plot(steps, [100 * r["kept_accuracy"] for r in lines], "s-", ms=3, color=KEPT,
              label="accuracy on kept classes")
    left.axhline(100 * teacher["kept_accuracy"], color="gray", ls="--", lw=1, label="teacher on kept classes")
    left.set(xlabel="steps", ylabel="%", ylim=(0, 102))
    left.legend(loc="lower right")
    right.plot(steps, [r["fd"] for r in lines], "s-", ms=3, color=KEPT,
               label=f"generator (probe of {probe})")
    right.axhline(teacher["fd"], color="gray", ls="--", lw=1,
                  label=f"teacher, 35 evaluations ({teacher['n']:,} images)")
    right.set(xlabel="steps", ylabel="FD (judge's features), kept classes")
    right.set_yscale("log", subs=(2, 5))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    right.margins(y=0.3)  # room for the legend
    right.legend(loc="upper right")
    for ax in (left, right):
        ticks = [t for t in ax.get_xticks() if 0 <= t <= steps[-1]]
        top = ax.secondary_xaxis("top")
        # steps of a run are not equally long
        top.set_xticks(ticks, [f"{t:.0f}" for t in np.interp(ticks, [0, *steps], [0, *seconds])])
        top.set_xlabel("seconds")
    save(fig, path)


def methods_figure(rows, title, path):
    """{name: (uint8 images, the first half of the label to forget, text)}: a row of images each, that half framed."""
    fig, axes = subplots(len(rows), 1, (9, 0.62 * len(rows)))
    for ax, (name, (images, text)) in zip(axes[:, 0], rows.items()):
        n, _, h, w = images.shape
        show(ax, tile(images, 1))
        frame(ax, 0, 0, n // 2 * w - 1, h - 1, linewidth=2)
        ax.set_yticks([h / 2], [name.replace("_", " ")])
        ax.text(n * w + 6, h / 2, text, va="center")
    axes[0, 0].set_title(title, loc="left", fontsize=10, parse_math=False)
    save(fig, path)


def audit_figure(rows, path):
    """{network: {attack: (uint8 image (C, H, W), share)}}: a row each, the image that judge B is surest of."""
    attacks = list(next(iter(rows.values())))
    fig, axes = subplots(len(rows), len(attacks), (1.5 * len(attacks) + 1.5, 1.12 * len(rows) + 0.5))
    for ax, attack in zip(axes[0], attacks):
        ax.set_title(attack.replace(" ", "\n", 1), fontsize=9)
    for row, (name, found) in zip(axes, rows.items()):
        for ax, attack in zip(row, attacks):
            image, share = found[attack]
            show(ax, image.permute(1, 2, 0).numpy())
            for side in ax.spines.values():
                side.set(color=FORGOTTEN if share else KEPT, linewidth=1 + 3 * share)
            ax.set_xlabel(f"{share:.2%}" if share < 0.01 else f"{share:.0%}", fontsize=8, labelpad=1)
        row[0].set_ylabel(name.replace("_", "\n"), rotation=0, ha="right", va="center", fontsize=9)
    save(fig, path)


def search_figure(results, path):
    """[(name, {"tied": bool, "after": {steps: {"most": share}}})]: a line each, dashed where the label is tied."""
    fig, ((ax,),) = subplots(1, 1, (7.5, 3.6))
    names = list(dict.fromkeys(name for name, _ in results))
    for name, of in results:
        ax.plot([int(steps) for steps in of["after"]], [100 * at["most"] for at in of["after"].values()], "o", ms=3,
                color=f"C{names.index(name)}", ls="--" if of["tied"] else "-", label=name + ", tied" * of["tied"])
    ax.set(xlabel="steps of the search", ylabel="% forgotten images, best of all vectors", ylim=(-2, 102))
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(fig, path)


def trade_figure(points, controls, path):
    """{network: (FD, share found)}: a point each, joined where no other beats them in both; the share in controls."""
    fig, ((ax,),) = subplots(1, 1, (7.5, 3.6))
    best = sorted(p for p in points.values()
                  if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points.values()))
    ax.plot([fd for fd, _ in best], [100 * share for _, share in best], color="gray", lw=1)
    ax.axhline(100 * controls, color="gray", ls="--", lw=1, label="mean of the controls")
    for name, (fd, share) in points.items():
        ax.plot(fd, 100 * share, "o", label=name)
    ax.set(xlabel="FD / teacher's", ylabel="% of starts that find what is forgotten")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(fig, path)
