"""Other classes, other seeds: the methods of lab.baselines for every class in turn, each overridden by the next one.

    python -m lab.tour                                                       # the methods that take under two minutes
    python -m lab.tour --forget 0 --seed 0 1 2 --method salun sfd_two_stage

A row each in results/mnist_tour.csv; those that are in the file already are kept.
"""
from dataclasses import dataclass
from pathlib import Path

from lab import baselines
from lab.checkpoint import load_teacher
from lab.cli import check_ranges, command, parse, setting
from lab.data import data_name
from lab.labels import label_number
from lab.methods import METHODS
from lab.report import look_alike, markdown, read_rows, spread, write_rows
from lab.sample import TEACHER_NFE, chain

ALL = (*METHODS, *baselines.ONE_STEP)
QUICK = ("finetune", "esd", "esd_column", "all_but_one", "all_but_one_column", "label_swap", "embedding_copy",
         "sfd_two_stage")
NUMBERS = ("ua", "ua_judge2", "override_share", "override_share_judge2", "kept_accuracy", "kept_accuracy_judge2", "fd",
           "seconds")
KEYS = ("forget", "to", "seed", "method")


@dataclass
class Settings:
    forget: tuple = setting(("all",), "the labels to forget, one in each run, or all; each is overridden by the next")
    seed: tuple = setting(("0",), "random seeds")
    method: tuple = setting(QUICK, "methods to run", choices=ALL)
    data: str = setting("mnist", "data set that the teacher was trained on")
    data_dir: str = setting("data", "where torchvision keeps or downloads it, for the methods that need real images")
    per_label: int = setting(100, "images judged under each label to keep; five times as many under c_f", above=0)
    device: str = setting("auto", "auto, cpu, cuda or mps")
    out: str = setting("", "folder for the networks (default: runs/<data>-tour)")
    results: str = setting("", "file for the numbers (default: results/<data>_tour.csv)")

    def __post_init__(self):
        check_ranges(self)
        self.out = self.out or f"runs/{data_name(self.data)}-tour"
        self.results = self.results or f"results/{data_name(self.data)}_tour.csv"


def starts(bench):
    """{evaluations of an image: metrics} of what methods start from, on the same noise as they are judged on."""
    _, sid, content = bench.un_erased("a tour")
    counts = [bench.s.per_label] * 2
    judged = lambda network, sigma_init=None: bench.judge(chain(network, sigma_init), network, *counts, "a start",
                                                          erased=False)
    return {TEACHER_NFE: judged(bench.teacher), 1: judged(sid, content["sigma_init"])}


def table(rows):
    """Markdown: for every method mean and range over the classes, at seed 0, and over the seeds of the first class."""
    columns = {"UA": "ua_judge2", "as override": "override_share_judge2", "kept accuracy": "kept_accuracy_judge2",
               "most damaged": "lost", "FD": "fd"}

    def cells(found):
        for key in columns.values():
            yield spread([float(row[key]) for row in found], "{:.1f}" if key == "fd" else "{:.1%}")
    out = []
    for name in dict.fromkeys(row["method"] for row in rows):
        of = [row for row in rows if row["method"] == name]
        for found, words in (([row for row in of if row["seed"] == "0"], "classes"),
                             ([row for row in of if row["forget"] == "0"], "seeds")):
            if len(found) > 1:
                out.append([f"`{name}`", f"{len(found)} {words}", *cells(found)])
    return markdown(["", "over", *columns], out)


def main(argv):
    s = parse(Settings, argv, __doc__)
    path, classes = Path(s.results), load_teacher("", s.data, "cpu")[1]["classes"]
    rows, start, K = read_rows(path), None, len(classes)
    for forget in range(K) if s.forget == ("all",) else [label_number(word, classes) for word in s.forget]:
        for seed in map(int, s.seed):
            bench = None
            for method in s.method:
                key = dict(zip(KEYS, map(str, (forget, (forget + 1) % K, seed, method))))
                if any(key.items() <= row.items() for row in rows):
                    continue
                bench = bench or baselines.Bench(baselines.Settings(
                    forget=key["forget"], to=key["to"], data=s.data, data_dir=s.data_dir, per_label=s.per_label,
                    seed=seed, device=s.device, out=f"{s.out}/forget{forget}-seed{seed}", resume=True))
                start = start or starts(bench)
                m = baselines.run_method(method, bench)
                damage = look_alike(m | {"un_erased": start[m["nfe"]], "forget": [m["forget"]], "to": [m["to"]]})
                rows.append(key | {k: f"{m[k]:.6g}" for k in NUMBERS}
                            | {"look_alike": classes[damage["look_alike"]], "lost": f"{damage['look_alike_lost']:.6g}"})
                write_rows(rows, path)
    print(table(rows))


if __name__ == "__main__":
    command(main)
