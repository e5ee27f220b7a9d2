"""Draw images of prompts, from a one-step generator or a teacher.

    python -m lab.prompts.sample runs/prompts-forgetzero-toone --prompt "a red zero" --n 64 --out zeros.png
"""
from dataclasses import dataclass
from pathlib import Path

import torch

from edm_unet import BadInput, command, pick_device
from lab.core.files import in_folder
from lab.core.options import parse, setting
from lab.evaluate.draw import draw_parts, load_generator
from lab.prompts.captions import tokens
from lab.prompts.network import load_prompt_network
from lab.sample import check_picture, output_form, write_images


@dataclass
class Settings:
    file: str = setting("", "the network: a generator.pt, the folder of a run, or a teacher", positional=True)
    out: str = setting("", "a .npz file, a picture (.png, .jpg, ...), or a folder for a picture each")
    prompt: tuple = setting((), "prompts to draw, each in quotes, in equal shares")
    n: int = setting(100, "images to draw, in all", above=0)
    seed: int = setting(0, "random seed", at_least=0, below=2 ** 32)
    device: str = setting("auto", "auto, cpu, cuda or mps")


def main(argv):
    s = parse(Settings, argv, __doc__)
    if not s.out or not s.prompt:
        raise BadInput('--out and --prompt are required, such as --prompt "a red zero" --out zeros.png')
    out, prompts = Path(s.out), list(s.prompt)
    form = output_form(out)
    path = in_folder(s.file, "generator.pt")
    generate, network, _ = load_generator(path, pick_device(s.device), load_prompt_network)
    conditions = tokens(prompts, network.settings.words)
    rows = torch.arange(s.n) * len(prompts) // s.n
    if form == "picture":
        check_picture(out, s.n, network.shape)
    parts = draw_parts(generate, rows, network, s.seed, progress="drawing", conditions=conditions)
    write_images((image for part in parts for image in part), rows, out, form, prompts=prompts)
    counts = rows.bincount(minlength=len(prompts)).tolist()
    drawn = ", ".join(f"{n} of {prompt!r}" for n, prompt in zip(counts, prompts))
    print(f"{s.n} images in {out}: {drawn}")


if __name__ == "__main__":
    command(main)
