"""Add a finished run to results/runs.csv: a row for the run, for its teacher and for plain SiD.

    python -m lab.report runs/mnist-forget0-to1 --group default --note "two idle cores"

For maintainers: `python -m lab.readme` makes the tables of the pages from this file.
"""
import subprocess
from dataclasses import dataclass
from pathlib import Path

from edm_unet import BadInput, command, command_line
from lab.baselines import grid
from lab.core.options import parse, setting
from lab.core.tables import read_json, read_rows, write_rows

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "results" / "runs.csv"
SETTINGS = ("data", "forget", "to", "seed", "teacher", "init_from", "steps", "batch", "lr", "lr_fake", "alpha",
            "lambda_forget", "forget_share", "lambda_anchor", "guidance", "sigma_init", "p_mean", "ema")
NUMBERS = ("ua", "ua_judge2", "override_share", "kept_accuracy", "kept_accuracy_judge2", "fd", "teacher_fd", "fd_floor",
           "fd_override", "teacher_fd_override", "precision", "recall", "precision_override", "recall_override",
           "teacher_recall_override", "nfe", "n", "n_forgotten", "seconds")
DAMAGE = ("look_alike", "look_alike_lost")
PROMPTS = {"other_attribute": ("other_attribute",), "ua_unseen_templates": ("under_unseen_templates", "ua"),
           "override_unseen_templates": ("under_unseen_templates", "override_share"),
           "ua_other_word": ("other_word", "ua"), "kept_digit": ("seen", "digit"), "kept_colour": ("seen", "colour"),
           "unseen_templates": ("unseen_templates", "both"), "unseen_pairs": ("unseen_pairs", "both")}
CIRCUMSTANCES = ("device", "name", "bf16", "threads", "torch", "python", "protocol", "commit")
COLUMNS = ("id", "group", *SETTINGS, *NUMBERS, *DAMAGE, *PROMPTS, *CIRCUMSTANCES, "note")


def as_text(value):
    """A value as a cell of runs.csv."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def prompt_numbers(metrics):
    """The numbers of an evaluation on prompts, flat. None where an evaluation does not have them."""
    found = {}
    for name, path in PROMPTS.items():
        value = metrics
        for key in path:
            value = value.get(key) if value else None
        found[name] = value
    return found


def most_damaged(metrics):
    """The kept label, overrides aside, whose accuracy fell most from plain SiD's, and by how much."""
    before, now = (metrics.get("sid") or {}).get("per_class_accuracy"), metrics.get("per_class_accuracy")
    if not before or not now:
        return {}
    found = grid.most_damaged(before, now, (*metrics["forget"], *metrics["to"]))
    return dict(zip(DAMAGE, found)) if found else {}


def rows_of(metrics, id, group, commit, note):
    """Rows of runs.csv from a metrics.json: the run's own, its teacher's and plain SiD's."""
    s, protocol = metrics["settings"], metrics["protocol"]
    teacher = {f"teacher_{key}": metrics["teacher"].get(key) for key in ("fd", "fd_override", "recall_override")}
    pair = f"forget{'-'.join(s['forget'])}-to{'-'.join(s['to'])}".replace(" ", "-")
    own = {**metrics, **most_damaged(metrics), **prompt_numbers(metrics), **{name: s.get(name) for name in SETTINGS}}
    rows = [{**own, **teacher, **metrics["trained_on"], "protocol": protocol, "commit": commit, "id": id,
             "group": group, "note": note}]
    for name in ("teacher", "sid"):
        numbers = metrics.get(name)
        if numbers and metrics["forget"]:
            rows.append({**numbers, **prompt_numbers(numbers), **teacher,
                         "id": f"{name}-{Path(s['teacher'] or s['data']).stem}-{pair}-protocol{protocol}",
                         "group": name, "data": s["data"], "forget": s["forget"], "to": s["to"],
                         "teacher": s["teacher"], "protocol": protocol, "note": f"on the kept labels of {pair}"})
    return [{name: as_text(row.get(name)) for name in COLUMNS} for row in rows]


def add_rows(rows, path=RUNS):
    """Put rows into runs.csv. A row of the same id is replaced."""
    merged = {row["id"]: row for row in [*read_rows(path), *rows]}
    write_rows(sorted(merged.values(), key=lambda row: (row["group"], row["id"])), path, COLUMNS)


@dataclass
class Settings:
    run: str = setting("", "the folder of a finished run", positional=True)
    group: str = setting("tried", "runs of one group differ in labels and seed alone")
    note: str = setting("", "what else differs, and the circumstances")


def main(argv):
    s = parse(Settings, argv, __doc__)
    path = Path(s.run) / "metrics.json"
    if not path.exists():
        raise BadInput(f"{s.run} holds no metrics.json: make it with `{command_line('-m', 'lab.evaluate', s.run)}`")
    metrics = read_json(path)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    id = f"{s.group}-{Path(s.run).name}-seed{metrics['settings']['seed']}".replace(" ", "-")
    rows = rows_of(metrics, id, s.group, commit.stdout.strip(), s.note)
    add_rows(rows)
    print(f"{', '.join(row['id'] for row in rows)} in {RUNS}\nnext: python -m lab.readme")


if __name__ == "__main__":
    command(main)
