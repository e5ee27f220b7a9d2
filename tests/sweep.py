"""The sweep behind the default settings: short runs of the main method that differ from the first row in what the row names.

    python tests/sweep.py --steps 150 > results/sweep.csv        # about two minutes a row on two cores

FD, UA and kept accuracy are those of the last probe, 100 images per label: fit for comparing rows, not for quoting.
"""
import argparse
import csv
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate  # noqa: E402
import sfd_minimal  # noqa: E402
from common import parse, pick_device, seed_everything  # noqa: E402

ROWS = ["", "--lr-fake 1e-3", "--lr 1e-3 --lr-fake 1e-3", "--batch 32 --steps {twice}", "--alpha 1.2"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", nargs="*", default=ROWS)
    a = parser.parse_args()
    device = pick_device("auto")
    table = None
    for row in a.rows:
        with tempfile.TemporaryDirectory() as folder:
            options = row.format(twice=2 * a.steps).split()
            steps = [] if "--steps" in options else ["--steps", str(a.steps)]
            s = parse(sfd_minimal.Settings, ["--forget", "0", "--to", "1", "--out", f"{folder}/run", *steps, *options], "")
            seed_everything(s.seed)
            teacher, _, _ = sfd_minimal.load_teacher(s, device)
            referee = evaluate.Referee(s.data, device, [0], [1])
            run, _, _ = sfd_minimal.distil(s, [0], [1], teacher, device, lambda G: referee.probe(evaluate.one_step(G, s.sigma_init), G.settings))
            result = {"options": " ".join(options), **run.history[-1]}
            if table is None:
                table = csv.DictWriter(sys.stdout, list(result))
                table.writeheader()
            table.writerow(result)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
