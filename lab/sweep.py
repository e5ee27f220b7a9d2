"""The four settings that each method of lab.baselines was tried with; it has the best of them.

    python -m lab.sweep --forget 0 --to 1

Best is the smallest FD of those whose UA and kept accuracy, by judge A, add up to within a point of the largest sum:
the look is quick, at 250 images of c_f and 50 of each other label, and cannot tell less than a point apart. Rows
that are in the file already are kept.
"""
from dataclasses import dataclass
from pathlib import Path

from lab import baselines
from lab.cli import check_ranges, command, parse, setting
from lab.data import data_name
from lab.methods import METHODS
from lab.report import read_rows, write_rows
from lab.sample import chain

OWN = {"sfd": [dict(lr=lr, lr_fake=lr / 0.3) for lr in (1.5e-4, 3e-4, 6e-4, 1.2e-3)],
       "sfd_two_stage": [dict(lr=lr, lr_fake=lr / 0.3, forget_share=share)
                         for lr in (4e-4, 8e-4) for share in (0.3, 0.5)]}
TRIED = {name: method.tried for name, method in METHODS.items() if method.tried} | OWN


def in_words(change):
    return " ".join(f"{k}={v:.6g}" for k, v in change.items())


def best(rows):
    """Of the rows of one method, the one whose settings it gets."""
    total = lambda row: float(row["ua"]) + float(row["kept_accuracy"])
    enough = max(map(total, rows)) - 0.01
    return min((row for row in rows if total(row) >= enough), key=lambda row: float(row["fd"]))


@dataclass
class Settings:
    forget: str = setting("0", "the label to forget")
    to: str = setting("1", "the label that the methods with an override draw instead")
    method: tuple = setting(tuple(TRIED), "methods to try", choices=tuple(TRIED))
    data: str = setting("mnist", "data set that the teacher was trained on")
    data_dir: str = setting("data", "where torchvision keeps or downloads it, for the methods that need real images")
    seed: int = setting(0, "random seed", at_least=0, below=2 ** 32)
    device: str = setting("auto", "auto, cpu, cuda or mps")
    out: str = setting("", "folder for the networks (default: runs/<data>-sweep)")
    results: str = setting("", "file for the numbers (default: results/<data>_baselines_sweep.csv)")
    save_every: float = setting(30.0, "seconds between checkpoints", above=0)

    def __post_init__(self):
        check_ranges(self)
        self.out = self.out or f"runs/{data_name(self.data)}-sweep"
        self.results = self.results or f"results/{data_name(self.data)}_baselines_sweep.csv"


def main(argv):
    s = parse(Settings, argv, __doc__)
    bench, path = baselines.Bench(s), Path(s.results)
    done = read_rows(path)
    for name in s.method:
        for change in TRIED[name]:
            settings = {"forget": str(bench.c_f), "to": str(bench.c_o), "seed": str(s.seed), "method": name,
                        "settings": in_words(change)}
            if any(settings.items() <= row.items() for row in done):
                continue
            network, content = baselines.trained(name, bench, Path(s.out) / name, resume=False, **change)
            m = bench.judge(chain(network, content.get("sigma_init")), network, 50, 250, name)
            done.append(settings | {"seconds": round(content["seconds"], 1)}
                        | {k: round(m[k], 4) for k in ("ua", "override_share", "kept_accuracy", "fd")})
            write_rows(done, path)
            print(done[-1])


if __name__ == "__main__":
    command(main)
