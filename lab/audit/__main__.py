"""Attack networks that forgot a class: can the class come back?

    python -m lab.audit runs/mnist-forget0-to1              # one run: audit.json and audit.png in its folder
    python -m lab.audit runs/mnist-baselines-forget0-to1    # each method of lab.baselines: one table, one figure

What counts is how many of the images of an attack judge 2 takes for the forgotten class. Inversion, other noise levels
and relearning need real images. Shares are printed with 95 % intervals. Their numbers of images are in audit.json.
"""
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from edm_unet import BadInput, command, command_line, digest, machine, pick_device
from lab.audit import attacks, target
from lab.audit.attacks import ATTACKS, in_words, table
from lab.audit.target import judge_files, load_target
from lab.core.files import cached
from lab.core.images import load_images
from lab.core.options import parse, setting
from lab.core.runs import seed_everything
from lab.core.tables import write_json
from lab.evaluate.figures import audit_figure
from train_teacher import TORCHVISION, to_float


def real_images(data, data_dir, size, c_f, device):
    """Held-out images in [-1, 1]: 200 of c_f, and 1,000 of the labels to keep with these labels.

    Folders hold their images class by class, so the images are shuffled, always in the same way. The data sets of
    torchvision are in a random order already: of these the first images are taken.
    """
    images, labels, _ = load_images(data, data_dir, size, train=False)
    if data not in TORCHVISION:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], labels[order]
    forgotten = (labels == c_f).nonzero()[:200, 0]
    kept = (labels != c_f).nonzero()[:1000, 0]
    return {"forgotten": to_float(images[forgotten]).to(device), "kept": to_float(images[kept]).to(device),
            "kept_label": labels[kept].to(device)}


def audit_one(folder, device, data_dir, cut=1):
    """({attack: numbers}, {attack: image}) of the network in folder/generator.pt, cached in folder/audit.pt."""
    network = load_target(folder / "generator.pt", device, cut)
    info = network.info
    fingerprint = digest(folder / "generator.pt", attacks.__file__, target.__file__, *judge_files(info["data"]))

    def make():
        images = real_images(info["data"], data_dir, info.get("size"), network.c_f, device)
        numbers, pictures, began = {}, {}, time.monotonic()
        for name, attack in tqdm(ATTACKS.items(), desc=f"audit of {folder.name}"):
            seed_everything(0)
            numbers[name], pictures[name] = attack(network, images)
        numbers |= {"nfe": network.nfe, "cut": cut, "seconds": time.monotonic() - began, "machine": machine(device)}
        return {"numbers": numbers, "images": pictures}

    found = cached(folder / "audit.pt", {"kind": "audit", "fingerprint": f"{fingerprint} cut {cut}"}, make)
    return found["numbers"], found["images"]


def audit(out, device, data_dir, cut=1):
    """Audit out/generator.pt, or that of every folder in `out`. Returns {network: numbers}.

    Prints a table and sentences; writes audit.json and audit.png into `out`.
    """
    out = Path(out).parent if Path(out).is_file() else Path(out)
    folders = {path.parent.name: path.parent for path in sorted(out.glob("*/generator.pt"))}
    if (out / "generator.pt").exists():
        folders = {out.name: out}
    if not folders:
        raise BadInput(f"{out} holds no generator.pt, nor does a folder in it")
    results, figure = {}, {}
    for name, folder in folders.items():
        results[name], pictures = audit_one(folder, device, data_dir, cut)
        figure[name] = {attack: (pictures[attack], results[name][attack]["share"]) for attack in ATTACKS}
        write_json(out / "audit.json", {"networks": results})
    audit_figure(figure, out / "audit.png")
    print(table(results), *(in_words(name, numbers) for name, numbers in results.items()), sep="\n")
    first = next(iter(folders.values())) / "generator.pt"
    print(f"numbers in {out / 'audit.json'}, pictures in {out / 'audit.png'}")
    print("next:", command_line("-m", "lab.sample", first, "--n", "100", "--out", "samples.png"))
    return results


@dataclass
class Settings:
    run: str = setting("", "the folder of a run, or of lab.baselines", positional=True)
    data_dir: str = setting("data", "where torchvision keeps or downloads the real images")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    cut: int = setting(1, "divide all starts, steps and images by this: a shorter audit of slow networks", above=0)


def main(argv):
    s = parse(Settings, argv, __doc__)
    audit(s.run, pick_device(s.device), s.data_dir, s.cut)


if __name__ == "__main__":
    command(main)
