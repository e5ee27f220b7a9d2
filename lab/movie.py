"""A moving picture of forgetting: images from the same noise, drawn again and again while a second stage trains.

    python -m lab.movie --forget 0 --to 1 --out results/forgetting.webp

The upper row is drawn under the label to forget, the lower row under labels to keep. A run of some minutes.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import sfd_minimal
from edm_unet import BadInput, command, pick_device
from lab.core.files import find_weights, load_teacher
from lab.core.images import to_uint8
from lab.core.options import parse, setting
from lab.evaluate.figures import tile, to_picture

COLUMNS = 9
FRAMES = (*range(0, 40, 2), *range(40, 120, 10), *range(120, 10_000, 60))  # steps: most of the change comes early


def frame(generator, z, labels, sigma_init, scale, progress):
    """One picture: two rows of images, and below them a line as long as the share of the run that is done."""
    images = to_uint8(sfd_minimal.draw(generator, z, generator.conditions[labels], sigma_init)).cpu()
    rows = to_picture(tile(images, 2)).convert("RGB")
    rows = rows.resize((rows.width * scale, rows.height * scale), Image.Resampling.LANCZOS)
    picture = Image.new("RGB", (rows.width, rows.height + 6), "white")
    picture.paste(rows, (0, 0))
    picture.paste("#d55e00", (0, rows.height + 2, max(1, round(rows.width * progress)), rows.height + 6))
    return picture


@dataclass
class Settings:
    forget: tuple = setting(("0",), "the label to forget")
    to: tuple = setting(("1",), "the label drawn instead")
    data: str = setting("mnist", "data set of the teacher; its plain SiD is the start")
    out: str = setting("forgetting.webp", "moving picture to write: .webp or .gif")
    steps: int = setting(0, "steps of the run; 0: those of the preset", at_least=0)
    scale: int = setting(2, "enlarge the images by this factor", above=0)
    device: str = setting("auto", "auto, cpu, cuda or mps")


def main(argv):
    options = parse(Settings, argv, __doc__)
    if Path(options.out).suffix.lower() not in (".webp", ".gif") or Path(options.out).exists():
        raise BadInput(f"--out {options.out} must end in .webp or .gif and not be there already")
    device = pick_device(options.device)
    teacher, info = load_teacher("", options.data, device)
    start = find_weights(options.data, "sid")
    if start is None:
        raise BadInput(f"there is no plain SiD of {options.data} to start from")
    c_f, c_o = sfd_minimal.read_labels(list(options.forget), list(options.to), info["classes"])
    override = sfd_minimal.override_labels(c_f, c_o, len(info["classes"])).to(device)
    preset = sfd_minimal.PRESETS[sfd_minimal.preset_name(options.data, True, str(start))]
    s = sfd_minimal.Settings(**{**preset, **({"steps": options.steps} if options.steps else {})})
    torch.manual_seed(s.seed)
    n = sfd_minimal.begin(teacher, s, *sfd_minimal.load_start(start, teacher, s))
    kept = [k for k in range(len(override)) if k not in c_f]
    labels = torch.tensor([c_f[0]] * COLUMNS + [kept[i % len(kept)] for i in range(COLUMNS)], device=device)
    z = torch.randn(len(labels), *teacher.shape, device=device)
    pictures = [frame(n.average, z, labels, s.sigma_init, options.scale, 0)]
    for step, _ in enumerate(tqdm(sfd_minimal.distill(s, n, override), total=s.steps, unit="step"), 1):
        if step in FRAMES or step == s.steps:
            pictures.append(frame(n.average, z, labels, s.sigma_init, options.scale, step / s.steps))
    durations = [1000, *[120] * (len(pictures) - 2), 2000]  # milliseconds
    pictures[0].save(options.out, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    print(f"{len(pictures)} pictures in {options.out}, {Path(options.out).stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    command(main)
