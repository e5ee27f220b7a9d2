"""Fill the tables of README.md and of the pages in results/ from the files in results/.

    python -m lab.readme
    python -m lab.readme --check    # writes nothing; exit code 1 where a table differs from the files
    python -m lab.readme --figures  # draws results/frontier.png from the same files, and writes no table

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. For maintainers.
"""
import math
import re
import statistics
from dataclasses import dataclass

from edm_unet import RunFailed, command
from lab import ablation
from lab.audit import attacks, searches, weights
from lab.baselines import compare, grid
from lab.core.options import parse, setting
from lab.core.tables import markdown, percent, read_json, read_rows, spread, write_text
from lab.evaluate.figures import frontier_figure
from lab.prompts import compare as prompt_compare
from lab.prompts import layout
from lab.report import ROOT, RUNS

GROUPS = {  # groups of runs.csv on MNIST, in the order of the tables
    "default": "SFD, one stage",
    "default elsewhere": "the same on other machines",
    "two stages": "SFD, two stages",
    "anchored": "SFD with an anchor",
    "anchored elsewhere": "the same without bfloat16",
    "a batch for each": "one stage, a batch for each update",
    "paper 900": "one stage, 900 steps at higher rates",
    "guided and anchored": "one stage, guided and anchored",
    "anchored guided": "anchor and guidance",
    "an hour": "one stage, 7,000 steps, guided",
    "plain teacher": "one stage, from a teacher without guidance",
}
COLUMNS = {  # title: (key of runs.csv, format)
    "UA": ("ua", "{:.2%}"), "override": ("override_share", "{:.2%}"), "kept": ("kept_accuracy", "{:.2%}"),
    "FD / teacher's": ("ratio", "{:.2f}"), "FD / floor": ("over_floor", "{:.2f}"),
    "FD of the override": ("fd_override", "{:.1f}"),
    "the teacher's": ("teacher_fd_override", "{:.1f}"), "recall": ("recall", "{:.3f}"),
    "seconds": ("seconds", "{:.0f}"),
}
RECALL = {  # further columns of a table that has "FD of the override" and "the teacher's"
    "recall of the override": ("recall_override", "{:.3f}"), "the teacher's": ("teacher_recall_override", "{:.3f}"),
}
SHARES = ("ua", "override_share", "kept_accuracy", "recall")  # numbers that cannot be above 1
# Student's t for a 95 % interval of a mean, by the number of runs
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
PAGES = {  # other data sets: groups of runs.csv, and further columns
    "prompts": ({"prompts one stage": "one stage", "prompts anchored": "with an anchor"},
                {"UA": "ua", "override": "override_share", "other attribute": "other_attribute",
                 "UA, unseen templates": "ua_unseen_templates",
                 "override, unseen templates": "override_unseen_templates", "UA, other word": "ua_other_word",
                 "digit": "kept_digit", "colour": "kept_colour",
                 "unseen templates": "unseen_templates", "unseen pairs": "unseen_pairs"}),
    "cifar10": ({"cifar10 two stages": "two stages"},
                {"UA": "ua", "UA, judge 2": "ua_judge2", "override": "override_share",
                 "FD of the override": "fd_override", "kept": "kept_accuracy",
                 "kept, judge 2": "kept_accuracy_judge2"}),
}


# ------------------------------------------------------------------------------------------------- rows of runs.csv

def group_rows(group):
    """The rows of a group in runs.csv, with a "pair" of labels and with the numbers of tables as numbers or None."""
    found = []
    for row in read_rows(RUNS):
        if row["group"] != group:
            continue
        if row["teacher_fd"]:
            row["ratio"] = float(row["fd"]) / float(row["teacher_fd"])
        if row["fd_floor"]:
            row["over_floor"] = float(row["fd"]) / float(row["fd_floor"])
        for key in ("nfe", "fd", *(key for key, _ in (*COLUMNS.values(), *RECALL.values()))):
            row[key] = float(row[key]) if row.get(key) not in (None, "") else None
        if group == "teacher":
            row["seconds"] = None  # the file knows the time of its last training alone
        row["pair"] = f"{row['forget']} to {row['to']}"
        found.append(row)
    if not found:
        raise RunFailed(f"results/runs.csv has no run in the group {group!r}")
    return found


def reference_row(group):
    """The row of the teacher or of plain SiD for 0 to 1, of the newest protocol."""
    found = [row for row in group_rows(group) if row["id"].startswith(f"{group}-mnist-forget0-to1-")]
    return max(found, key=lambda row: int(row["protocol"]))


def seeds(group):
    """The rows of a group for 0 to 1, one for each seed."""
    return [row for row in group_rows(group) if row["pair"] == "0 to 1"]


def star(row):
    """A star where the FD of the override of a run is from more images than the teacher's, as before protocol 3."""
    return "*" if int(row["protocol"]) < 3 and row["group"] not in ("teacher", "sid") else ""


def cells(rows, titles, columns=COLUMNS, stars=False):
    """One cell for each title of `columns`: the mean over rows and, where there are several, the range.

    stars: put a `star` behind the FD of the override.
    """
    found = []
    for title in titles:
        key, form = columns[title]
        values = [row[key] for row in rows if row[key] is not None]
        cell = spread(values, form) if values else ""
        if stars and key == "fd_override":
            cell += max(star(row) for row in rows)
        found.append(cell)
    return found


def interval(values, form, most=math.inf):
    """The mean of numbers and, where there are several, its 95 % interval by Student's t, between 0 and `most`.

    For more than ten numbers the interval is that of ten, which is a little too wide.
    """
    mean = statistics.mean(values)
    if len(values) == 1:
        return form.format(mean)
    half = T95[min(len(values), 10)] * statistics.stdev(values) / len(values) ** 0.5
    low, high = max(0, mean - half), min(most, mean + half)
    return f"{form.format(mean)} ({form.format(low)} to {form.format(high)})"


# ----------------------------------------------------------------------------------------------------------- README.md

def first():
    """The teacher, plain SiD and SFD, in the words of a first reader. SFD: means over seeds, and seed 0's minutes."""
    rows = {"the teacher": [reference_row("teacher")],
            "one step, nothing forgotten (plain SiD)": [reference_row("sid")],
            "**one step, 0 forgotten (SFD)**": seeds("default"),
            "the same in two stages": seeds("two stages")}
    lines = []
    for name, runs in rows.items():
        ua, override, kept = (statistics.mean(row[key] for row in runs)
                              for key in ("ua", "override_share", "kept_accuracy"))
        seconds = runs[0]["seconds"]
        lines.append([name, f"{runs[0]['nfe']:.0f}", percent(1 - ua), percent(override), percent(kept),
                      f"{seconds / 60:.0f}" if seconds else ""])
    return markdown(["", "evaluations per image", "still drawn as a 0", "drawn as a 1 instead", "other digits right",
                     "minutes"], lines)


def forgets():
    """The seeds of 0 to 1, with the 95 % interval of their mean."""
    titles = ["UA", "override", "kept", "FD / teacher's", "FD / floor", "recall"]
    found = {"the teacher": [reference_row("teacher")], "plain SiD": [reference_row("sid")]}
    for group in ("default", "two stages", "anchored"):
        found[GROUPS[group]] = seeds(group)
    lines = []
    for words, rows in found.items():
        line = [words, len(rows)]
        for key, form in (COLUMNS[title] for title in titles):
            line.append(interval([row[key] for row in rows], form, most=1 if key in SHARES else math.inf))
        lines.append(line)
    return markdown(["", "runs", *titles], lines)


FIVE = {"teacher": "the teacher", "retrain": "retrained without the class",
        "embedding_copy": "label column copied", "esd": "ESD, 2023",
        "salun": "SalUn, 2024", "sfd": "SFD, one stage"}


def results(name):
    return read_json(ROOT / "results" / f"{name}.json")


def five_methods():
    comparison, lines = results("mnist_baselines"), []
    found = {"teacher": comparison["teacher"], **comparison["methods"]}
    for name, words in FIVE.items():
        m = found[name]
        seconds = f"{m['seconds']:.0f}" if "seconds" in m else ""
        lines.append([words, m["real_data"], m["nfe"], f"{m['ua_judge2']:.1%}", f"{m['override_share_judge2']:.1%}",
                      f"{m['kept_accuracy_judge2']:.1%}", f"{m['fd'] / m['fd_floor']:.1f}", seconds])
    return markdown(["", "real images it learns from", "NFE", "UA", "override", "kept", "FD / floor", "seconds"], lines)


# ------------------------------------------------------------------------------------------------------------ results/

def summary():
    """Mean and range of every group."""
    titles = list(COLUMNS)
    found = {"the teacher": [reference_row("teacher")], "plain SiD": [reference_row("sid")]}
    for group, words in GROUPS.items():
        found[words] = group_rows(group)
    lines = []
    for words, rows in found.items():
        protocols = " and ".join(sorted({row["protocol"] for row in rows}))
        lines.append([words, len(rows), protocols, *cells(rows, titles, stars=True)])
    return markdown(["", "runs", "protocol", *titles], lines)


def every_run():
    lines = []
    for group, words in GROUPS.items():
        for row in group_rows(group):
            lines.append([words, row["pair"], row["seed"], row["protocol"], *cells([row], COLUMNS, stars=True)])
    return markdown(["", "labels", "seed", "protocol", *COLUMNS], lines)


def ablation_table():
    """SFD in one stage with single choices of the official code."""
    titles = ["UA", "override", "kept", "FD / floor", "FD of the override", "recall"]
    words = {f"ablation {name}": text for name, text in (ablation.SWITCHES | ablation.CHOICES).items()}
    lines = [["as here", len(seeds("default")), *cells(seeds("default"), titles, stars=True)]]
    run = {row["group"] for row in read_rows(RUNS)}
    for group, text in {**words, "ablation official": "all at once, but for the override"}.items():
        if group in run:
            rows = group_rows(group)
            lines.append([text, len(rows), *cells(rows, titles, stars=True)])
    return markdown(["", "runs", *titles], lines)


def class_table(rows, sequence=()):
    """Every class in turn, the mean and range of all of them, and requests one after the other."""
    titles = ["UA", "override", "kept", "FD / teacher's", "FD / floor", "seconds", "FD of the override",
              "the teacher's"]

    def numbers(rows):
        return [*cells(rows, titles, stars=True), *cells(rows, RECALL, RECALL)]

    def line(row):
        return [row["pair"], *numbers([row]), f"{row['look_alike']}: {100 * float(row['look_alike_lost']):.1f}"]

    lost = [100 * float(row["look_alike_lost"]) for row in rows]
    lines = [line(row) for row in rows]
    lines.append(["all ten", *numbers(rows), spread(lost, "{:.1f}")])
    lines += [line(row) for row in sequence]
    return markdown(["", *titles, *RECALL, "most damaged label: points"], lines)


def every_class():
    """SFD with an anchor."""
    return class_table(group_rows("every class"), sorted(group_rows("in sequence"), key=lambda row: len(row["pair"])))


def every_class_in_two_stages():
    """SFD in two stages. 0 to 1 is seed 0 of the first table."""
    first = [row for row in seeds("two stages") if row["seed"] == "0"]
    return class_table(first + group_rows("every class, two stages"))


def page(data):
    """Every run on a data set with a page of its own, below the teacher and plain SiD on the same kept labels."""
    groups, columns = PAGES[data]
    formats = {key: form for key, form in COLUMNS.values()}

    def line(words, row):
        shown = []
        for key in (*columns.values(), "ratio", "over_floor", "seconds"):
            value = row.get(key)
            cell = "" if value in (None, "") else formats.get(key, "{:.2%}").format(float(value))
            shown.append(cell + star(row) if key == "fd_override" else cell)
        return [words, *shown]

    found = [row for group in groups for row in group_rows(group)]
    lines = []
    for pair in dict.fromkeys(row["pair"] for row in found):
        for group, words in {"teacher": "the teacher", "sid": "plain SiD"}.items():
            of_pair = [row for row in group_rows(group) if (row["data"], row["pair"]) == (data, pair)]
            newest = max((int(row["protocol"]) for row in of_pair), default=0)
            for row in of_pair:
                if int(row["protocol"]) == newest:
                    lines.append(line(f"{pair}: {words}", row))
        for row in found:
            if row["pair"] == pair:
                lines.append(line(f"{pair}: {groups[row['group']]}, seed {row['seed']}", row))
    return markdown(["", *columns, "FD / teacher's", "FD / floor", "seconds"], lines)


def methods():
    return compare.table(results("mnist_baselines"))


def methods_over_classes():
    return grid.table(read_rows(ROOT / "results" / "mnist_tour.csv"))


def audit_table():
    return attacks.table(results("mnist_audit")["networks"])


NETWORKS = {  # networks of mnist_searches.json: (group of runs.csv, words)
    "sfd": ("default", GROUPS["default"]), "sfd_two_stages": ("two stages", GROUPS["two stages"]),
    "clean_room": ("clean room", "clean room"), "clean_start": ("clean start", "clean start"),
}
STUDENTS = {  # further ones, for results/clean.md
    "clean_start_3000": ("clean start longer", "clean start, 3,000 steps"),
    "mixed": ("mixed start", "half-fresh start"),
    "copy_own": ("copied, own start", "copied column, own start"),
    "esd_fresh": ("ESD, fresh start", "ESD, fresh start"),
}
CONTROLS = {
    "unchanged": "plain SiD, which draws 0s",
    "column copied": "plain SiD with the column of the 1 in the place of the 0's",
    "column mixed": "plain SiD with the mean of the other columns there", "control": "controls: trained without 0s",
}


def clean_runs():
    """Students from other weights than the teacher's, and SFD."""
    titles = ["UA", "override", "kept", "FD / teacher's", "FD / floor", "recall", "seconds"]
    lines = [[words, *cells(seeds(group), titles)] for group, words in (NETWORKS | STUDENTS).values()]
    return markdown(["", *titles], lines)


def clean_pairs():
    """Two more pairs of labels: SFD in two stages and the clean students, with ten searches of each kind."""
    titles = ["UA", "override", "kept", "FD / teacher's", "FD / floor", "recall"]
    lines = []
    for pair, networks in results("mnist_searches")["pairs"].items():
        for group, found in networks.items():
            rows = [row for row in group_rows(group) if row["pair"] == pair]
            successes = [f"{searches.successes(found[way])} of {len(found[way])}" for way in searches.WAYS]
            lines.append([f"{pair}: {GROUPS.get(group, group)}", *cells(rows, titles), *successes])
    return markdown(["", *titles, *searches.WAYS], lines)


def clean_audit():
    """Attacks on these students, on a control, and on SFD."""
    found = {"control (`retrain_sid`)": results("mnist_audit")["networks"]["retrain_sid"],
             GROUPS["default"]: results("mnist_audit")["networks"]["sfd"],
             **results("mnist_clean_audit")["networks"]}
    lines = []
    for name, r in found.items():
        lines.append([name, *(f"{r[search]['share']:.0%}" for search in attacks.SEARCHES),
                      f"{r['other noise levels']['sdedit']['share']:.0%}"])
    return markdown(["", *attacks.SEARCHES, "SDEdit"], lines)


def words_of(named):
    """{row: words} of the controls and of the rows `named`."""
    return CONTROLS | {row: words for row, (_, words) in named.items()}


def searches_table(named=NETWORKS):
    """Independent searches of positive controls, controls, and the networks of the rows `named`."""
    found = results("mnist_searches")
    rows = searches.rows_of(found["networks"])
    found["networks"] = {name: found["networks"][name] for row in named for name in rows[row]}
    return searches.table(found, words_of(named))


def clean_searches():
    return searches_table(NETWORKS | STUDENTS)


def relearning():
    """Steps of training on ten real images until the class is back. p: how often chance takes as few steps."""
    found, words, lines = results("mnist_relearning"), words_of(NETWORKS | STUDENTS), []

    def speeds(networks):
        return [-statistics.mean(steps) for steps in networks]  # p_value counts large values

    for kind, networks in found.items():
        for row, names in searches.rows_of(networks).items():
            each = [networks[name] for name in names]
            p = ""
            if kind == "networks":
                p = f"{searches.p_value(speeds(each), speeds(found['controls'].values())):.2f}"
            lines.append([words[row], len(names), spread([n for steps in each for n in steps], "{:.0f}"), p])
    return markdown(["", "networks", "steps", "p"], lines)


def share_found(networks):
    """Share of the searches of networks that find the class, of the kind of search that finds it more often."""
    found = []
    for way in searches.WAYS:
        shares = [share for network in networks for share in network[way]]
        found.append(searches.successes(shares) / len(shares))
    return max(found)


def frontier():
    """Draw results/frontier.png: quality, training time, and the share of searches that find the class."""
    found, rows = results("mnist_searches"), {}
    names = searches.rows_of(found["networks"])
    for row, (group, words) in (NETWORKS | STUDENTS).items():
        runs = seeds(group)
        rows[words] = {"seconds": statistics.mean(run["seconds"] for run in runs),
                       "fd_ratio": statistics.mean(run["ratio"] for run in runs),
                       "found": share_found([found["networks"][name] for name in names[row]])}
    frontier_figure(rows, share_found(found["controls"].values()), ROOT / "results" / "frontier.png")


def prompts_layout():
    return layout.table(results("prompts_layout"))


def weights_table():
    return weights.table(results("mnist_weights")["networks"])


def cifar10_methods():
    return compare.table(results("cifar10_baselines"))


def cifar10_audit():
    return attacks.table(results("cifar10_audit")["networks"])


def prompt_methods():
    return prompt_compare.table(results("prompts_baselines"))


def prompts_page():
    return page("prompts")


def cifar10_page():
    return page("cifar10")


TABLES = {"first": first, "forgets": forgets, "five methods": five_methods, "summary": summary, "runs": every_run,
          "every class": every_class, "every class, two stages": every_class_in_two_stages, "ablation": ablation_table,
          "methods": methods, "methods over classes": methods_over_classes, "audit": audit_table,
          "searches": searches_table, "weights": weights_table, "clean": clean_runs, "clean searches": clean_searches,
          "clean pairs": clean_pairs, "clean audit": clean_audit, "relearning": relearning,
          "prompts layout": prompts_layout, "cifar10": cifar10_page, "cifar10 methods": cifar10_methods,
          "cifar10 audit": cifar10_audit, "prompts": prompts_page, "prompt methods": prompt_methods}
BLOCK = re.compile(r"<!-- table: ([^\n]+?) -->\n.*?<!-- end -->", re.S)


def filled(text):
    """A page with its tables made again."""
    def block(match):
        if match[1] not in TABLES:
            raise RunFailed(f"there is no table {match[1]!r}; there are {', '.join(TABLES)}")
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"
    return BLOCK.sub(block, text)


@dataclass
class Settings:
    check: bool = setting(False, "write nothing; exit code 1 where a table differs from the files")
    figures: bool = setting(False, "draw results/frontier.png, and no table")


def main(argv):
    s = parse(Settings, argv, __doc__)
    if s.figures:
        return frontier()
    differ = []
    for path in (ROOT / "README.md", *sorted((ROOT / "results").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            differ.append(str(path.relative_to(ROOT)))
        if new != text and not s.check:
            write_text(path, new)
    if s.check and differ:
        raise RunFailed(f"tables differ from the files in {', '.join(differ)}: run python -m lab.readme")
    print(f"tables made again in: {', '.join(differ) or 'no page'}")


if __name__ == "__main__":
    command(main)
