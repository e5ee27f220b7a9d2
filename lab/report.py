"""Numbers as tables: the one writer of Markdown, and results/runs.csv, a row for each run that is kept.

    python -m lab.report runs/mnist-forget0-to1 --group default --note "the README's first row"

adds the run, from its metrics.json, and what stands beside it: its teacher and the one-step generator that forgot
nothing. `python -m lab.readme` makes the tables of the READMEs from that file.
"""
import csv
import json
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lab.cli import command, parse, setting
from lab.errors import BadInput

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "results" / "runs.csv"
SETTINGS = ("data", "forget", "to", "seed", "teacher", "init_from", "steps", "batch", "lr", "lr_fake", "alpha",
            "lambda_forget", "forget_share", "lambda_anchor", "anywhere", "guidance", "sigma_init", "p_mean", "ema")
NUMBERS = ("ua", "ua_judge2", "override_share", "kept_accuracy", "kept_accuracy_judge2", "fd", "teacher_fd", "fd_floor",
           "fd_override", "teacher_fd_override", "precision", "recall", "nfe", "n", "n_forgotten", "seconds")
LOOK_ALIKE = ("look_alike", "look_alike_lost")
OF_PROMPTS = {"other_attribute": ("other_attribute",), "ua_unseen_templates": ("under_unseen_templates", "ua"),
              "override_unseen_templates": ("under_unseen_templates", "override_share"),
              "ua_other_word": ("other_word", "ua"), "kept_digit": ("seen", "digit"), "kept_colour": ("seen", "colour"),
              "unseen_templates": ("unseen_templates", "both"), "unseen_pairs": ("unseen_pairs", "both")}
CIRCUMSTANCES = ("device", "name", "bf16", "threads", "torch", "python", "protocol", "commit")
COLUMNS = ("id", "group", *SETTINGS, *NUMBERS, *LOOK_ALIKE, *OF_PROMPTS, *CIRCUMSTANCES, "note")


def percent(share):
    return f"{share:.2%}"


def markdown(head, rows):
    """A Markdown table that also reads well in a terminal; cells are strings."""
    lines = [[str(cell).replace("|", r"\|") for cell in line] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def spread(values, form):
    """The mean of numbers and, where `form` tells them apart, their range."""
    low, mean, high = (form.format(f(values)) for f in (min, statistics.mean, max))
    return mean if low == high else f"{mean} ({low} to {high})"


def read_rows(path=RUNS):
    """The rows of a table in a file, each a dict of strings; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def write_rows(rows, path, columns=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as f:
        table = csv.DictWriter(f, columns or list(rows[-1]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def as_text(value):
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def of_prompts(m):
    """What a verdict on prompts says more, flat; nothing of other verdicts."""
    deep = lambda of, path: of if not path or of is None else deep(of.get(path[0]), path[1:])
    return {name: deep(m, path) for name, path in OF_PROMPTS.items()}


def look_alike(m):
    """What forgetting took along: the label to keep, the overrides aside, of whose images the judge recognises fewer
    than of the generator's that forgot nothing, by the largest share; and that share."""
    before, now = ((of or {}).get("per_class_accuracy") for of in (m.get("un_erased"), m))
    if not (before and now):
        return {}
    lost = {k: a - b for k, (a, b) in enumerate(zip(before, now)) if k not in (*m["forget"], *m["to"])}
    return dict(zip(LOOK_ALIKE, max(lost.items(), key=lambda of: of[1])))


def rows_of(m, id, group, commit, note):
    """The rows of a metrics.json `m`: the run's own, and those of what stands beside it."""
    s, of = m["settings"], {k: m["settings"].get(k) for k in ("data", "forget", "to")}
    circumstances = m["trained_on"] | {"protocol": m.get("protocol", 1), "commit": commit}
    teacher = {"teacher_fd": m["teacher"]["fd"], "teacher_fd_override": m["teacher"].get("fd_override")}
    pair = f"forget{'-'.join(s['forget'])}-to{'-'.join(s['to'])}".replace(" ", "-")
    rows = [m | look_alike(m) | of_prompts(m) | {k: s.get(k) for k in SETTINGS} | teacher | circumstances
            | {"id": id, "group": group, "note": note}]
    for name, numbers in (("teacher", m["teacher"]), ("un_erased", m.get("un_erased"))):
        if numbers and m["forget"]:
            rows.append({"id": f"{name}-{Path(s['teacher'] or s['data']).stem}-{pair}-protocol{m.get('protocol', 1)}",
                         "group": name} | of | numbers | of_prompts(numbers) | teacher | {"teacher": s["teacher"]}
                        | {"protocol": m.get("protocol", 1), "note": f"on the kept labels of {pair}"})
    return [{k: as_text(row.get(k)) for k in COLUMNS} for row in rows]


def add(rows, path=RUNS):
    """Put rows into runs.csv; one of the same id is replaced."""
    new = {row["id"]: row for row in rows}
    old = {row["id"]: row for row in read_rows(path)}
    write_rows(sorted((old | new).values(), key=lambda row: (row["group"], row["id"])), path, COLUMNS)


@dataclass
class Settings:
    run: str = setting("", "the folder of a finished run of sfd_minimal.py", positional=True)
    group: str = setting("tried", "what the run is an instance of: runs of one name have the same settings")
    note: str = setting("", "what the run changes that is no setting; after a semicolon, what else was seen")


def main(argv):
    s = parse(Settings, argv, __doc__)
    path = Path(s.run) / "metrics.json"
    if not path.exists():
        raise BadInput(f"{s.run} holds no metrics.json: make it with `python -m lab.evaluate {s.run}`")
    m = json.loads(path.read_text())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    id = f"{s.group}-{Path(s.run).name}-seed{m['settings']['seed']}".replace(" ", "-")
    add(rows := rows_of(m, id, s.group, commit.stdout.strip(), s.note))
    print(f"{', '.join(row['id'] for row in rows)} in {RUNS}\nnext: python -m lab.readme")


if __name__ == "__main__":
    command(main)
