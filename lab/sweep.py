"""The settings that each method of lab.baselines was tried with: its own, and what its `tried` says instead.

    python -m lab.sweep --forget 0 --to 1

A quick look, at 100 images of c_f and 20 of each other label. Rows that are in the file already are kept.
"""
import csv
from dataclasses import dataclass
from pathlib import Path

from lab import baselines
from lab.cli import check_ranges, command, parse, setting
from lab.data import data_name
from lab.methods import METHODS
from lab.sample import many_step

SWEPT = tuple(name for name, method in METHODS.items() if method.tried)


@dataclass
class Settings:
    forget: str = setting("0", "the label to forget")
    to: str = setting("1", "the label that the methods with an override draw instead")
    method: tuple = setting(SWEPT, "methods to try", choices=SWEPT)
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
    bench, path, done = baselines.Bench(s), Path(s.results), []
    if path.exists():
        with open(path, newline="") as f:
            done = list(csv.DictReader(f))
    for name in s.method:
        for change in ({}, *METHODS[name].tried):
            method = METHODS[name].changed(change)
            settings = {"forget": str(bench.c_f), "to": str(bench.c_o), "seed": str(s.seed), "method": name,
                        "settings": method.in_words()}
            if any(settings.items() <= row.items() for row in done):
                continue
            network, _, seconds = baselines.unlearn(name, method, bench, Path(s.out) / name, resume=False)
            m = bench.judge(many_step(network), network, 20, 100, name)
            done.append(settings | {"seconds": round(seconds, 1)}
                        | {k: round(m[k], 4) for k in ("ua", "override_share", "kept_accuracy", "fd")})
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", newline="") as f:
                rows = csv.DictWriter(f, list(done[-1]))
                rows.writeheader()
                rows.writerows(done)
            print(done[-1])


if __name__ == "__main__":
    command(main)
