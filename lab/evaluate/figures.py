"""Figures: grids of samples and curves of a training run. The forgotten class has one colour throughout."""
import csv
import warnings

import numpy as np
from PIL import Image

FORGOTTEN, KEPT = "#d55e00", "#0072b2"  # safe for the colour-blind


def tile(images, rows):
    """Images uint8 (N, C, H, W) as one picture (rows*H, N/rows*W, C), row by row."""
    n, c, h, w = images.shape
    return images.reshape(rows, n // rows, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, n // rows * w, c).numpy()


def to_picture(array):
    """PIL image of a uint8 array (H, W, 1 or 3)."""
    return Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)


def subplots(rows, columns, size):
    """A figure and its axes (rows, columns). Does not touch the backend of the caller's pyplot."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def frame(ax, x, y, width, height, linewidth):
    from matplotlib.patches import Rectangle
    ax.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=FORGOTTEN, linewidth=linewidth))


def show(ax, picture):
    """A uint8 picture (H, W, C) on its axes, without ticks."""
    ax.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=255)
    ax.set(xticks=[], yticks=[])


def save(figure, path):
    """Write a figure. A figure that cannot be drawn is a note: the run that it belongs to is not lost."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            figure.savefig(path, dpi=110)
        except Exception as e:
            print(f"note: {path} could not be drawn: {type(e).__name__}: {e}")
    if any("missing from font" in str(w.message) for w in seen):
        print(f"note: the font lacks some letters of the class names; {path} has boxes in their place")


def samples_figure(panels, classes, c_f, path):
    """Panels one above the other, a row of images for each label. The rows of the labels c_f are framed.

    panels: {title: images uint8 (N, C, H, W), sorted by label}.
    """
    K = len(classes)
    fig, axes = subplots(len(panels), 1, (8, 4.2 * len(panels)))
    for ax, (title, images) in zip(axes[:, 0], panels.items()):
        h = images.shape[2]
        picture = tile(images, K)
        show(ax, picture)
        ax.set_yticks([h * (k + 0.5) for k in range(K)], classes, parse_math=False)
        ax.set_title(title, loc="left")
        for k in c_f:
            frame(ax, 0, h * k, picture.shape[1] - 1, h - 1, linewidth=2.5)
            ax.get_yticklabels()[k].set(color=FORGOTTEN, fontweight="bold")
    save(fig, path)


def curves_figure(log, teacher, path, probe="100 images per label"):
    """UA, kept accuracy and FD in log.csv against steps, with the seconds on the upper axis.

    Nothing is drawn where the log has no such numbers. teacher: metrics of the teacher. probe: what was measured.
    """
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
    right.plot(steps, [r["fd"] for r in lines], "s-", ms=3, color=KEPT, label=f"generator ({probe})")
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
        times = np.interp(ticks, [0, *steps], [0, *seconds])  # steps of a run are not equally long
        top.set_xticks(ticks, [f"{t:.0f}" for t in times])
        top.set_xlabel("seconds")
    save(fig, path)


def methods_figure(rows, title, path):
    """A row of images for each method. rows: {name: (images uint8, text)}.

    The first half of the images of a row is of the label to forget, and is framed.
    """
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
    """A row for each network and a column for each attack, with the share of images in which the attack succeeded.

    rows: {network: {attack: (image uint8 (C, H, W), share)}}. The image is the one of which the judge is surest.
    """
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


def frontier_figure(rows, controls, path):
    """A point for each way of training: how often its class is found, against the quality of the other classes.

    rows: {name: {"seconds", "fd_ratio", "found"}}. The area of a point is the seconds of training. fd_ratio: FD over
    the teacher's. found, controls: share of the searches, 0 to 1. The line is that of the controls.
    """
    names = sorted(rows, key=lambda name: (rows[name]["found"], -rows[name]["fd_ratio"]))  # lines then hardly cross
    ratios, found, seconds = ([rows[name][key] for name in names] for key in ("fd_ratio", "found", "seconds"))
    fig, ((ax,),) = subplots(1, 1, (9, 4.5))
    points = ax.scatter(ratios, [100 * share for share in found], s=[500 * t / max(seconds) for t in seconds],
                        color=KEPT, alpha=0.6, edgecolor="black", clip_on=False, zorder=3)
    ax.axhline(100 * controls, color=FORGOTTEN, linestyle="--")
    ax.text(0.01, 100 * controls + 2, "controls", color=FORGOTTEN, transform=ax.get_yaxis_transform())
    for i, name in enumerate(names):
        ax.annotate(name, (ratios[i], 100 * found[i]), xytext=(1.04, (i + 0.5) / len(names)),
                    textcoords="axes fraction", va="center", parse_math=False,
                    arrowprops={"arrowstyle": "-", "color": "gray", "linewidth": 0.7, "relpos": (0, 0.5)})
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="FD of the other classes, over the teacher's", ylabel="searches that find the class, %",
           ylim=(-4, 104))
    sizes = points.legend_elements("sizes", num=3, func=lambda area: area * max(seconds) / 500, color=KEPT, alpha=0.6)
    fig.legend(*sizes, title="seconds of training", loc="outside upper center", ncols=len(sizes[0]), frameon=False)
    save(fig, path)
