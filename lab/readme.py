"""The tables of README.md and of the pages in results/, from the files there: fills every block between
`<!-- table: NAME -->` and `<!-- end -->`, and draws the two figures of results/label_search.md.

    python -m lab.readme
    python -m lab.readme --check    # writes nothing; exit code 1 where a table is not what results/ says
"""
import json
import re
import statistics
from dataclasses import dataclass

from lab import audit, baselines, label_search, prompt_methods, tour
from lab.cli import command, parse, setting
from lab.errors import RunFailed
from lab.figures import search_figure, trade_figure
from lab.report import ROOT, markdown, read_rows, spread

FILES = ("README.md", "results/README.md", "results/prompts.md", "results/cifar10.md",
         "results/label_search.md")
GROUPS = {  # of runs.csv, in words, in the order of the tables
    "default": "the default",
    "default elsewhere": "the default, seed 0, on two other machines",
    "two-stage": "`--init-from` the one-step generator",
    "two-stage elsewhere": "the same, seed 0, without bfloat16",
    "a batch for each": "the default, a batch for each update",
    "paper 900": "900 steps, rates of 5e-4 and 1.7e-3",
    "guided and anchored": "the same with guidance 1.2 and an anchor",
    "two-stage guided": "`--init-from`, with guidance 1.3",
    "an hour": "7,000 steps, low rates, guidance 1.2",
    "plain teacher": "from a teacher without guidance in it",
}
AT_A_GLANCE = ("default", "two-stage")  # in README.md; results/README.md has all
FIRST = {"default": "**the command below**", "two-stage": "from the one-step generator: the second command"}
SIDE_BY_SIDE = ("retrain", "retrain_sid", "esd_column", "all_but_one_column", "selective_amnesia", "salun",
                "embedding_copy", "sid", "sfd", "sfd_two_stage")
NUMBERS = {"NFE": ("nfe", "{:.0f}"), "UA": ("ua", "{:.2%}"), "as override": ("override_share", "{:.2%}"),
           "kept accuracy": ("kept_accuracy", "{:.2%}"), "FD": ("fd", "{:.2f}"), "FD / teacher's": ("ratio", "{:.2f}"),
           "FD of the override": ("fd_override", "{:.1f}"), "the teacher's": ("teacher_fd_override", "{:.1f}"),
           "recall": ("recall", "{:.3f}"), "seconds": ("seconds", "{:.0f}")}
OWN_PAGE = {  # of other data sets: {group: in words}, {title: what is printed of a run}
    "prompts": ({"prompts two-stage": "`--init-from`", "prompts one stage": "from the teacher"},
                {"UA": "ua", "as override": "override_share", "other attribute": "other_attribute",
                 "UA, unseen templates": "ua_unseen_templates", "as override, there": "override_unseen_templates",
                 "UA, other word": "ua_other_word", "digit": "kept_digit", "colour": "kept_colour",
                 "both, unseen templates": "unseen_templates", "both, unseen pairs": "unseen_pairs"}),
    "cifar10": ({"cifar10 two-stage": "`--init-from`", "cifar10 guided": "the same, `--guidance 8`",
                 "cifar10 one stage": "from the teacher"},
                {"UA": "ua", "UA, judge 2": "ua_judge2", "as override": "override_share",
                 "FD of the override": "fd_override", "kept accuracy": "kept_accuracy",
                 "kept, judge 2": "kept_accuracy_judge2"}),
}
CONTROLS = ("mnist_retrain_sid", "mnist_retrain_sid-seed1", "mnist_retrain_sid-seed2")
OF_ONE = [f"anywhere-seed{seed}" for seed in range(3)]
SEARCHED = (*CONTROLS, "mnist_forget0_to1", "quick", *OF_ONE)  # in the first table of the label search, and its figure
LONG = [title for title in NUMBERS if title not in ("NFE", "FD")]


def of_group(name):
    """The rows of a group in runs.csv, with "pair" and, as numbers or None, what NUMBERS asks for."""
    rows = [row for row in read_rows() if row["group"] == name]
    if not rows:
        raise RunFailed(f"results/runs.csv has no run in the group {name!r}")
    for row in rows:
        row |= {key: float(row[key]) if row.get(key) else None for key, _ in NUMBERS.values()}
        row |= {"pair": f"{row['forget']} to {row['to']}",
                "ratio": row["fd"] / float(row["teacher_fd"]) if row["teacher_fd"] else None}
        if name == "teacher":
            row["seconds"] = None  # its file knows those of its last training alone
    return rows


def beside(group):
    """What stands beside a generator that forgot 0 and draws 1, by the newest protocol."""
    return [max((row for row in of_group(group) if row["id"].startswith(f"{group}-mnist-forget0-to1-")),
                key=lambda row: int(row["protocol"]))]


def line(head, rows, titles):
    """Cells of one row of a table: `head`, then of each title the mean and, where it is not one number, the range."""
    for key, form in (NUMBERS[title] for title in titles):
        values = [row[key] for row in rows if row[key] is not None]
        head = [*head, spread(values, form) if values else ""]
    return head


def first():
    titles = [title for title in NUMBERS if title in ("NFE", "UA", "as override", "kept accuracy", "FD", "seconds")]
    rows = {"the teacher": beside("teacher"), "one step, nothing forgotten; in `teachers/`": beside("un_erased")}
    rows |= {words: [row for row in of_group(group) if (row["pair"], row["seed"]) == ("0 to 1", "0")]
             for group, words in FIRST.items()}
    slow = {words: [row for row in of_group(f"{group} elsewhere") if row["bf16"] == "False"]
            for group, words in FIRST.items()}
    return markdown(["MNIST: forget 0, draw 1 instead", *titles, "without bfloat16"],
                    [line(line([words], found, titles), slow.get(words, []), ["seconds"])
                     for words, found in rows.items()])


def summary():
    what = {"the teacher": beside("teacher"), "one step, nothing forgotten": beside("un_erased")}
    what |= {GROUPS[group]: of_group(group) for group in AT_A_GLANCE}
    protocols = [" and ".join(sorted({row["protocol"] for row in rows})) for rows in what.values()]
    return markdown(["", "runs", "protocol", *LONG],
                    [line([words, len(rows), p], rows, LONG) for (words, rows), p in zip(what.items(), protocols)])


def of_data(data):
    """One row per run on a data set with a page of its own, beside the teacher and the un-erased generator on what
    these runs keep."""
    (groups, columns), forms = OWN_PAGE[data], dict(NUMBERS.values())

    def row(words, of):
        cells = ["" if of.get(key) in (None, "") else forms.get(key, "{:.2%}").format(float(of[key]))
                 for key in columns.values()]
        return [words, *cells, f"{of['ratio']:.2f}", f"{of['seconds']:.0f}" if of["seconds"] else ""]
    found = [of for group in groups for of in of_group(group)]
    rows = []
    for name in dict.fromkeys(of["pair"] for of in found):
        for group, words in {"teacher": "the teacher", "un_erased": "one step, nothing forgotten"}.items():
            rows += [row(f"{name}: {words}", of) for of in of_group(group)
                     if (of["data"], of["pair"]) == (data, name)]
        rows += [row(f"{name}: {groups[of['group']]}, seed {of['seed']}", of) for of in found if of["pair"] == name]
    return markdown(["", *columns, "FD / teacher's", "seconds"], rows)


def every_run():
    return markdown(["group", "labels", "seed", "protocol", *LONG],
                    [line([group, row["pair"], row["seed"], row["protocol"]], [row], LONG)
                     for group in GROUPS for row in of_group(group)])


def every_class():
    """Every class in turn, their mean and range, and requests one after the other; with what each took along."""
    titles = ["UA", "as override", "kept accuracy", "FD / teacher's", "seconds"]
    taken = lambda row: 100 * float(row["look_alike_lost"])
    one = lambda row: [*line([row["pair"]], [row], titles), f"{row['look_alike']}: {taken(row):.1f}"]
    rows, sequence = of_group("every class"), sorted(of_group("in sequence"), key=lambda row: len(row["pair"]))
    mean = [*line(["all ten"], rows, titles), spread([*map(taken, rows)], "{:.1f}")]
    return markdown(["", *titles, "most damaged label: points"], [*map(one, rows), mean, *map(one, sequence)])


def read(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def searches(*names):
    """[(name, numbers)] of these networks, from the first draw of starts."""
    found = [of for of in read("mnist_label_search") if not of[1]["seed"]]
    return [of for name in names for of in found if of[0] == name]


def searched(*names):
    return label_search.table(searches(*names))


def ends():
    """{network, tied or not: what its searches had found at their end, one for each draw of starts}"""
    found = {}
    for name, of in read("mnist_label_search"):
        found.setdefault(name + ", tied" * of["tied"], []).append(list(of["after"].values())[-1])
    return found


def share_found(searches):
    """The share of all starts of these searches that end where more than half of the images show c_f."""
    return statistics.mean(at["found"] for at in searches) / label_search.STARTS


def found_in_controls():
    """`share_found` of the networks that never saw a 0."""
    found = ends()
    return share_found([at for name in CONTROLS for at in found[name]])


def other_starts():
    """What was searched from several draws of starts: the best vector of each at the end, and how many show c_f."""
    starts = label_search.STARTS
    rows = [[name, *(f"{at['most']:.0%}, {at['found']} of {starts}" for at in found),
             f"{sum(at['found'] for at in found)} of {len(found) * starts}"]
            for name, found in ends().items() if len(found) > 1]
    return markdown(["", *(f"starts {seed}" for seed in range(3)), "all"], rows)


def anywhere_rows():
    """The runs of `--anywhere` and what was tried beside it, with the runs in two stages without it."""
    return [row for group in ("two-stage", "anywhere", "tried") for row in of_group(group)
            if group != "tried" or row["id"].startswith("tried-anywhere-")]


def called(row):
    """What a row of `anywhere_rows` is called: its group, or what was tried."""
    return row["group"] if row["group"] != "tried" else row["id"][len("tried-"):-len("-seed0")]


def forgotten_anywhere():
    """What `--anywhere` costs."""
    titles = ["UA", "as override", "kept accuracy", "FD / teacher's", "FD of the override", "seconds"]
    return markdown(["", "labels", "seed", *titles],
                    [line([called(row), row["pair"], row["seed"]], [row], titles) for row in anywhere_rows()])


def traded():
    """{network: (FD / teacher's, share of starts that end at a 0)}: forgetting 0 anywhere, and without it."""
    found, points = ends(), {}
    for row in (row for row in anywhere_rows() if row["pair"] == "0 to 1"):
        name = called(row) + f"-seed{row['seed']}" * (row["group"] != "tried")
        name = {"two-stage-seed0": "quick"}.get(name, name)
        if name + ", tied" in found:  # two stages were searched on their first seed alone
            points[name] = row["ratio"], share_found(found[name + ", tied"])
    return points


def attacked_anywhere():
    """The audit of `--anywhere` beside that of its controls and of two stages."""
    before = read("mnist_audit")["networks"]
    return audit.table({name: before[name] for name in ("sfd_two_stage", "retrain_sid")}
                       | read("mnist_anywhere_audit")["networks"])


def side_by_side():
    found = {file: read(file)[key] for file, key in (("mnist_baselines", "methods"), ("mnist_audit", "networks"))}
    rows = []
    for name in SIDE_BY_SIDE:
        if lacking := [file for file in found if name not in found[file]]:
            raise RunFailed(f"results/{lacking[0]}.json has no {name}")
        m, n = (f[name] for f in found.values())
        steps, limit = n["relearning"]["10"]["steps"], n["relearning"]["limit"]
        strongest = max(audit.SEARCHES, key=lambda search: n[search]["share"])
        rows.append([f"`{name}`", m["real_data"], m["nfe"], f"{m['seconds']:.0f}", f"{m['ua_judge2']:.1%}",
                     f"{m['kept_accuracy_judge2']:.1%}", f"{m['fd']:.1f}", f"{n['latent search']['share']:.0%}",
                     f"{n[strongest]['share']:.0%}, {strongest.removesuffix(' search')}",
                     f"more than {limit}" if steps is None else steps])
    return markdown(["", "real images", "NFE", "seconds", "UA", "kept accuracy", "FD", "latent search",
                     "strongest search", "steps to relearn"], rows)


TABLES = {"first": first, "summary": summary, "runs": every_run, "side by side": side_by_side,
          "prompts": lambda: of_data("prompts"), "cifar10": lambda: of_data("cifar10"),
          "prompt methods": lambda: prompt_methods.table(read("prompts_baselines")),
          "every class": every_class, "tour": lambda: tour.table(read_rows(ROOT / "results" / "mnist_tour.csv")),
          "label search": lambda: searched(*SEARCHED),
          "label search, other starts": other_starts,
          "label search, other labels": lambda: searched(*(f"{of}-{pair}" for pair in ("4-to-9", "7-to-3")
                                                           for of in ("control", "quick", "anywhere"))),
          "label search, tried": lambda: searched(*(f"anywhere-{what}" for what in (
              "600-steps", "and-searched", "and-searched-far", "in-embedding", "from-noise-0.3", "from-noise-0.5"))),
          "anywhere": forgotten_anywhere, "anywhere audit": attacked_anywhere,
          "methods": lambda: baselines.table(read("mnist_baselines")),
          "audit": lambda: audit.table(read("mnist_audit")["networks"]),
          "cifar10 methods": lambda: baselines.table(read("cifar10_baselines")),
          "cifar10 audit": lambda: audit.table(read("cifar10_audit")["networks"])}


@dataclass
class Settings:
    check: bool = setting(False, "write nothing; fail where a table is not what results/ says")


def main(argv):
    s, differ = parse(Settings, argv, __doc__), []

    def filled(block):
        if block[1] not in TABLES:
            raise RunFailed(f"there is no table {block[1]!r}; there are {', '.join(TABLES)}")
        new = f"<!-- table: {block[1]} -->\n{TABLES[block[1]]()}\n<!-- end -->"
        if new != block[0]:
            differ.append(block[1])
        return new

    pages = {ROOT / file: re.sub(r"<!-- table: ([^\n]+?) -->\n.*?<!-- end -->", filled, (ROOT / file).read_text(),
                                 flags=re.S) for file in FILES}
    if s.check and differ:
        raise RunFailed(f"not what results/ says: {', '.join(differ)}; python -m lab.readme makes them again")
    if not s.check:
        for path, page in pages.items():
            path.write_text(page)
        search_figure(searches(*SEARCHED), ROOT / "results" / "mnist_label_search.png")
        trade_figure(traded(), found_in_controls(), ROOT / "results" / "mnist_anywhere.png")
    print(f"tables made again: {', '.join(differ) or 'none, all are what results/ says'}")


if __name__ == "__main__":
    command(main)
