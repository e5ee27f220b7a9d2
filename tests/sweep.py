"""The sweep behind the default settings: runs of 8,320 images that differ from the first row in what the row names.

    python tests/sweep.py > results/sweep.csv                    # one to four minutes a row on two cores
    python tests/sweep.py --rows "--ema 0.98" "--alpha 1.2" --teacher teachers/other.pt

The first row is the paper's method, without what the default adds to it. Each row is judged on 500 images per label:
fit for comparing rows, not for quoting, because FD is larger than of more images, and a fifth of a run is not yet where
the run leads. `steps_to_99` is the first probe, of 100 images, with a UA of 99 %.
`--rows` gives rows of your own; options beside it, like `--teacher` here, hold for all rows.
"""
import argparse
import csv
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate  # noqa: E402
import sfd_minimal  # noqa: E402
from baselines import PAPER  # noqa: E402
from common import parse, pick_device  # noqa: E402

IMAGES = 8320
ROWS = ["", "--lr 3e-4 --lr-fake 1e-3", "--lr 1e-3 --lr-fake 3e-3", "--lr 1e-3", "--lr-fake 5e-4", "--batch 32",
        "--ema 0.8", "--p-mean -1.2", "--alpha 1.2", "--lambda-forget 0.3", "--lambda-forget 3", "--forget-share 0.3",
        "--sigma-init 5"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=ROWS)
    a, shared = parser.parse_known_args()
    if "--steps" in " ".join([*shared, *a.rows]):
        parser.error(f"--steps is not for the sweep: every row sees {IMAGES} images, whatever its batch")
    columns = ["options", "steps", "steps_to_99", "ua", "override_share", "kept_accuracy", "fd", "precision", "recall"]
    table = csv.DictWriter(sys.stdout, columns, extrasaction="ignore")
    table.writeheader()
    sys.stdout.flush()
    for row in a.rows:
        table.writerow(one_run(row, shared))
        sys.stdout.flush()


def one_run(row, shared):
    """Dict of the row's columns: what the referee says after a run with the options `row` and `shared`."""
    device, options = pick_device("auto"), [*shared, *row.split()]
    with tempfile.TemporaryDirectory() as folder:
        s = parse(sfd_minimal.Settings, ["--forget", "0", "--to", "1", "--out", f"{folder}/run", *PAPER, *options], "")
        s.steps = IMAGES // s.batch
        teacher, _, _ = sfd_minimal.load_teacher(s, device)
        referee = evaluate.Referee(s.data, device, [0], [1])
        probe = lambda G: referee.probe(evaluate.one_step(G, s.sigma_init), G.settings)
        run, G, _ = sfd_minimal.distil(s, [0], [1], teacher, device, probe)
    stats, confusion2 = referee.measure(evaluate.one_step(G, s.sigma_init), teacher.settings,
                                        [500] * teacher.settings.num_classes)
    return {"options": " ".join(options), "steps": s.steps,
            "steps_to_99": next((h["step"] for h in run.history if h["ua"] >= 0.99), ""),
            **{k: round(v, 4) if isinstance(v, float) else v for k, v in referee.report(stats, confusion2).items()}}


if __name__ == "__main__":
    main()
