"""The sweep behind the default settings: short runs that differ from the defaults in what the row names.

    python tests/sweep.py --steps 130 > results/sweep.csv        # about 100 seconds a row on two slow cores
    python tests/sweep.py --rows "--ema 0.98" "--alpha 1.2" --teacher teachers/other.pt      # rows of your own, with options for all of them

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
from common import parse, pick_device  # noqa: E402

ROWS = ["--lr-fake 3e-4", "", "--lr 1e-3", "--lr 1.5e-4", "--lr-fake 2e-3"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=130)
    parser.add_argument("--rows", nargs="*", default=ROWS)
    a, shared = parser.parse_known_args()
    device = pick_device("auto")
    table = None
    for row in a.rows:
        with tempfile.TemporaryDirectory() as folder:
            s = parse(sfd_minimal.Settings, ["--forget", "0", "--to", "1", "--out", f"{folder}/run", "--steps", str(a.steps), *shared, *row.split()], "")
            teacher, _, _ = sfd_minimal.load_teacher(s, device)
            referee = evaluate.Referee(s.data, device, [0], [1])
            run, _, _ = sfd_minimal.distil(s, [0], [1], teacher, device, lambda G: referee.probe(evaluate.one_step(G, s.sigma_init), G.settings))
            result = {"options": " ".join([*shared, *row.split()]), **run.history[-1]}
            if table is None:
                table = csv.DictWriter(sys.stdout, list(result))
                table.writeheader()
            table.writerow(result)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
