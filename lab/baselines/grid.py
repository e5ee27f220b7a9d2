"""Run methods of lab.baselines with other settings, for other labels and from other seeds: a row each in a CSV file.

    python -m lab.baselines.grid --method salun --seed 0 1 2 --settings lr=3e-4 lr=1e-3,beta=0.3
    python -m lab.baselines.grid --settings tried --per-label 50    # the settings that METHODS were chosen from
    python -m lab.baselines.grid --forget all                       # each label in turn, overridden by the next one

Rows that are in the file are kept. The networks are in a folder beside the file.
"""
import json
from dataclasses import dataclass, fields
from pathlib import Path

from edm_unet import BadInput, command
from lab import distill
from lab.baselines import compare
from lab.baselines.compare import Comparison, in_words, run_method
from lab.baselines.methods import METHODS, ONE_STEP
from lab.core.files import find_sid, load_teacher
from lab.core.labels import short_name
from lab.core.options import parse, setting
from lab.core.runs import RunSettings
from lab.core.tables import markdown, read_rows, spread, write_rows
from lab.evaluate.draw import TEACHER_NFE, sampler
from sfd_minimal import label_number

ALL = {**METHODS, **ONE_STEP}
NUMBERS = ("ua", "ua_judge2", "override_share", "override_share_judge2", "kept_accuracy", "kept_accuracy_judge2", "fd",
           "seconds")
COLUMNS = ("forget", "to", "seed", "method", "settings", "per_label", *NUMBERS, "look_alike", "lost")


# ----------------------------------------------------------------------------------------------------------- the rows

def best(rows):
    """Of rows of one method, the row with the best settings.

    The best settings have the smallest FD of those whose UA and kept accuracy add up to within a point of the largest
    sum. So few images do not tell less than a point apart.
    """
    totals = [float(row["ua"]) + float(row["kept_accuracy"]) for row in rows]
    enough = [row for row, total in zip(rows, totals) if total >= max(totals) - 0.01]
    return min(enough, key=lambda row: float(row["fd"]))


def table(rows):
    """Markdown: mean and range of each method over the labels at its first seed, and over the seeds of its first label.

    Methods with one row are left out.
    """
    columns = {"UA": "ua_judge2", "override": "override_share_judge2", "kept": "kept_accuracy_judge2",
               "most damaged": "lost", "FD": "fd"}
    lines = []
    for name in dict.fromkeys((row["method"], row.get("settings", "")) for row in rows):
        own = [row for row in rows if (row["method"], row.get("settings", "")) == name]
        classes = [row for row in own if row["seed"] == own[0]["seed"]]
        seeds = [row for row in own if (row["forget"], row["to"]) == (own[0]["forget"], own[0]["to"])]
        for found, words in ((classes, "classes"), (seeds, "seeds")):
            if len(found) < 2:
                continue
            cells = []
            for key in columns.values():
                values = [float(row[key]) for row in found if row[key]]
                cells.append(spread(values, "{:.1f}" if key == "fd" else "{:.1%}") if values else "")
            lines.append([f"`{name[0]}` {name[1]}".strip(), f"{len(found)} {words}", *cells])
    return markdown(["", "over", *columns], lines)


def accuracy_at_start(comparison, nfe):
    """Accuracy of each label before anything is forgotten: the teacher's, or for one-step methods plain SiD's.

    None where there is no plain SiD.
    """
    network, sigma_init = comparison.teacher, None
    if nfe != TEACHER_NFE:
        found = find_sid(comparison.info, comparison.device)
        if found is None:
            return None
        network, sigma_init = found[0], found[1]["sigma_init"]
    questions = [comparison.s.per_label] * len(network.conditions)
    measured = comparison.evaluator.measure(sampler(network, sigma_init), network, questions, "measuring the start")
    return comparison.evaluator.report(measured, erased=False)["per_class_accuracy"]


def most_damaged(before, now, changed):
    """(label, loss): the label outside of `changed` whose accuracy fell most, and by how much; None if there is none.

    before, now: accuracy of each label.
    """
    lost = {k: a - b for k, (a, b) in enumerate(zip(before, now)) if k not in changed}
    return max(lost.items(), key=lambda item: item[1]) if lost else None


# --------------------------------------------------------------------------------------------------------- the program

@dataclass
class Settings:
    method: tuple = setting(tuple(ALL), "methods to run", choices=tuple(ALL))
    settings: tuple = setting(("own",), "settings to run each method with, such as lr=1e-3,beta=0.3; own: those of the "
                              "method; tried: the four from which those were chosen")
    forget: tuple = setting(("0",), "labels to forget, one in each run, or all")
    to: str = setting("next", "label drawn instead; next: the label after the one to forget")
    seed: tuple = setting(("0",), "random seeds")
    data: str = setting("mnist", "data set of the teacher")
    data_dir: str = setting("data", "where torchvision keeps or downloads the data set, for methods with real images")
    per_label: int = setting(100, "images judged under each label to keep; five times as many under c_f", above=0)
    device: str = setting("auto", "auto, cpu, cuda or mps")
    save_every: float = setting(30.0, "seconds between checkpoints", above=0)
    out: str = setting("runs/grid.csv", "file for the rows")


def numbers_of(name):
    """{setting: number} of a method: the settings that --settings may change."""
    if name in METHODS:
        settings = {**vars(METHODS[name]), **METHODS[name].options}
    else:
        settings = vars(distill.Settings())
    shared = {f.name for f in fields(RunSettings)}
    return {key: v for key, v in settings.items() if isinstance(v, (int, float)) and key not in shared}


def read_change(word, name):
    """{setting: number} of a word such as lr=1e-3,beta=0.3 for the method `name`. BadInput for other words."""
    numbers, change = numbers_of(name), {}
    for part in word.split(","):
        key, _, text = part.partition("=")
        if key not in numbers:
            raise BadInput(f"--settings {word}: {name} has no setting {key!r}; it has {', '.join(numbers)}")
        kind = type(numbers[key])
        try:
            change[key] = kind(json.loads(text))
        except (ValueError, TypeError) as e:
            raise BadInput(f"--settings {word}: {text!r} is no number") from e
        if change[key] != json.loads(text):
            raise BadInput(f"--settings {word}: {key} takes {kind.__name__} values")
    return change


def changes(words, name):
    """The settings that a method is run with, a list of {name: value}, from the words of --settings."""
    found = []
    for word in words:
        if word == "tried":
            found += ALL[name].tried
        else:
            found.append({} if word == "own" else read_change(word, name))
    return found


def planned(s, classes):
    """[(c_f, c_o, seed, method, change)] of all rows that the settings ask for."""
    if not all(word.isdecimal() and int(word) < 2 ** 32 for word in s.seed):
        raise BadInput(f"--seed takes numbers from 0 to 2^32 - 1, not {' '.join(s.seed)}")
    all_labels = s.forget == ("all",)
    runs = []
    for c_f in range(len(classes)) if all_labels else [label_number(word, classes) for word in s.forget]:
        c_o = (c_f + 1) % len(classes) if s.to == "next" else label_number(s.to, classes)
        for seed in map(int, s.seed):
            for name in s.method:
                runs += [(c_f, c_o, seed, name, change) for change in changes(s.settings, name)]
    return runs


def begin(s, c_f, c_o, seed, classes):
    """The `Comparison` of one pair of labels and one seed."""
    # a class may have another label's number for a name
    forget, to = (str(k) if label_number(str(k), classes) == k else short_name(classes[k]) for k in (c_f, c_o))
    out = Path(s.out)
    folder = out.with_name(f"{out.stem}-networks") / f"forget{c_f}-to{c_o}-seed{seed}"
    return Comparison(compare.Settings(
        forget=forget, to=to, data=s.data, data_dir=s.data_dir, per_label=s.per_label, seed=seed, device=s.device,
        out=str(folder), save_every=s.save_every, resume=True))


def make_row(comparison, name, change, starts):
    """The numbers of a row. starts: {network evaluations: accuracy of each label at the start}, filled where needed."""
    metrics = run_method(comparison, name, change)
    nfe, damage = metrics["nfe"], None
    if nfe not in starts:
        starts[nfe] = accuracy_at_start(comparison, nfe)
    if starts[nfe]:
        damage = most_damaged(starts[nfe], metrics["per_class_accuracy"], (comparison.c_f, comparison.c_o))
    row = {key: f"{metrics[key]:.6g}" for key in NUMBERS}
    row["look_alike"] = comparison.info["classes"][damage[0]] if damage else ""
    row["lost"] = f"{damage[1]:.6g}" if damage else ""
    return row


def main(argv):
    s = parse(Settings, argv, __doc__)
    classes, rows, starts, current = load_teacher("", s.data, "cpu")[1]["classes"], read_rows(s.out), {}, None
    if rows and set(rows[0]) != set(COLUMNS):
        raise BadInput(f"{s.out} is a file with other columns: name another with --out")
    for c_f, c_o, seed, name, change in planned(s, classes):
        key = {"forget": c_f, "to": c_o, "seed": seed, "method": name, "settings": in_words(change),
               "per_label": s.per_label}
        key = {column: str(value) for column, value in key.items()}
        if any(key.items() <= row.items() for row in rows):
            continue
        if current != (c_f, c_o, seed):
            comparison, current = begin(s, c_f, c_o, seed, classes), (c_f, c_o, seed)
        rows.append({**key, **make_row(comparison, name, change, starts)})
        write_rows(rows, s.out, COLUMNS)
        print("  ".join(f"{column} {value}" for column, value in rows[-1].items()))
    print(table(rows))
    for name in s.method:
        own = [row for row in rows if row["method"] == name]
        if len({row["settings"] for row in own}) > 1:
            print(f"best settings of {name}: {best(own)['settings'] or 'its own'}")
    print(f"{len(rows)} rows in {s.out}")


if __name__ == "__main__":
    command(main)
