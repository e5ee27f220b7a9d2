"""A published EDM checkpoint (edm-*.pkl) as one of this project's; no code in it is run.

    python -m lab.convert edm-cifar10-32x32-cond-vp.pkl edm-cifar10.pt
"""
from dataclasses import dataclass

from lab.checkpoint import pack, save_atomically, unpack
from lab.cli import command, parse, setting
from lab.data import class_names
from lab.edm_pickle import read_published


@dataclass
class Settings:
    file: str = setting("", "the published pickle", positional=True)
    out: str = setting("", "the checkpoint to write", positional=True)
    data: str = setting("cifar10", "data set it was trained on")


def main(argv):
    s = parse(Settings, argv, __doc__)
    model = unpack(read_published(s.file))
    save_atomically({"kind": "denoiser", "data": s.data, "classes": class_names(s.data, model.settings.num_classes),
                     **pack(model)}, s.out)
    print(f"{s.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {model.settings}\n"
          f"next: python sfd_minimal.py --data {s.data} --teacher {s.out} --forget 0 --to 1")


if __name__ == "__main__":
    command(main)
