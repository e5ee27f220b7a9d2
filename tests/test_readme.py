"""README.md and the pages: the commands exist, the examples run as they stand, the tables are what the files say."""
import importlib
import math
import re
import shlex

import pytest

import sfd_minimal
import train_teacher
from conftest import ROOT
from lab import distill, readme, report
from lab.core.options import given_options
from lab.core.tables import write_rows

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "lab" / "README.md", ROOT / "teachers" / "README.md",
         *(ROOT / "results").glob("*.md")]
COMMAND = re.compile(r"python (-m lab[\w.]*|[\w/]+\.py)([^`\n|#]*)")


def commands():
    """(program, options) of every command in the README, in code and in tables."""
    return sorted({(program, options.strip()) for program, options in COMMAND.findall(README)})


def options_class(program):
    """The dataclass with the options of a module of lab."""
    name = program.removeprefix("-m ")
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(name + ".__main__")
    return getattr(module, "Options", module.Settings)


@pytest.mark.parametrize("program, options", commands(), ids=lambda word: word or "alone")
def test_every_command_has_the_options_that_it_is_given(program, options):
    argv = shlex.split(options)
    if program == "sfd_minimal.py":
        assert sfd_minimal.parse(argv)
    elif program == "train_teacher.py":
        assert train_teacher.parse(argv)
    else:
        given_options(options_class(program), argv)


EXAMPLES = re.findall(r"```python\n(import .*?)```", README, re.S)


@pytest.mark.parametrize("example", EXAMPLES, ids=["own paper", "own network"])
def test_the_examples_run_as_they_stand(example, monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace = {}
    exec(compile(example, "README.md", "exec"), namespace)
    assert all(value.isfinite() for value in namespace["terms"].values())


def test_the_lines_of_sfd_step_are_those_of_the_file():
    (block,) = re.findall(r"```python\n(c_phi, .*?)```", README, re.S)
    source = (ROOT / "sfd_minimal.py").read_text(encoding="utf-8")
    code = [line.split("  #")[0].strip() for line in source.splitlines()]
    for line in block.splitlines():
        assert line.strip() in code or not line.strip(), line


def test_tables_are_what_the_files_say():
    for page in (ROOT / "README.md", *(ROOT / "results").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        assert readme.filled(text) == text, f"{page}: run python -m lab.readme"


def test_a_table_that_differs_is_made_again():
    text = "<!-- table: forgets -->\nold\n<!-- end -->\nthe end"
    assert "plain SiD" in readme.filled(text) and readme.filled(text).endswith("the end")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_a_run_becomes_rows_of_runs_csv(tmp_path):
    numbers = {"ua": 0.01, "fd": 2.0, "fd_override": 5.0, "recall_override": 0.8,
               "per_class_accuracy": [0.9, 1.0, 1.0], "nfe": 35}
    metrics = {**numbers, "ua": 1.0, "recall_override": 0.4, "per_class_accuracy": [0.0, 0.99, 0.9], "protocol": 3,
               "forget": [0], "to": [1],
               "settings": {"data": "mnist", "forget": ["0"], "to": ["1"], "teacher": "", "seed": 0},
               "teacher": numbers, "sid": numbers, "trained_on": {"name": "a machine", "torch": "2.9"}}
    rows = report.rows_of(metrics, "an-id", "a group", "abc1234", "a note")
    path = tmp_path / "runs.csv"
    report.add_rows(rows, path)
    report.add_rows(rows, path)
    found = {row["group"]: row for row in readme.read_rows(path)}
    assert found.keys() == {"a group", "teacher", "sid"} and len(readme.read_rows(path)) == 3
    own = found["a group"]
    assert (own["ua"], own["teacher_fd"], own["look_alike"], own["look_alike_lost"]) == ("1", "2", "2", "0.1")
    assert (own["recall_override"], own["teacher_recall_override"]) == ("0.4", "0.8")
    assert found["teacher"]["recall_override"] == "0.8"


def test_rows_from_before_a_column_keep_their_numbers(tmp_path):
    columns = [name for name in report.COLUMNS if "_override" not in name]
    old = {**dict.fromkeys(columns, "7"), "id": "old", "group": "a group"}
    write_rows([old], tmp_path / "runs.csv")
    report.add_rows([{**dict.fromkeys(report.COLUMNS, "8"), "id": "new", "group": "a group"}], tmp_path / "runs.csv")
    new_row, old_row = readme.read_rows(tmp_path / "runs.csv")
    assert {name: old_row[name] for name in columns} == old
    for name in ("precision_override", "recall_override", "teacher_recall_override"):
        assert (new_row[name], old_row[name]) == ("8", "")


# ---------------------------------------------------------------------------------------------------- cells of a table

@pytest.mark.parametrize("values, most, cell", [
    ([0.5], 1, "0.500"), ([1.0, 2.0, 3.0], 9, "2.000 (0.000 to 4.484)"), ([0.9, 0.91], 1, "0.905 (0.841 to 0.969)"),
    ([0.99, 1.0], 1, "0.995 (0.931 to 1.000)"), ([4.0, 5.0, 6.0, 7.0, 8.0], 9, "6.000 (4.037 to 7.963)")])
def test_an_interval_of_a_mean_is_students(values, most, cell):
    """2 -+ 4.303 * 1 / sqrt(3), 0.905 -+ 12.706 * 0.00707 / sqrt(2), 6 -+ 2.776 * 1.581 / sqrt(5), cut at both ends."""
    assert readme.interval(values, "{:.3f}", most) == cell


def test_the_quantiles_of_students_t_leave_out_five_percent():
    """By Simpson's rule over the density of t with n - 1 degrees of freedom."""
    for n, t in readme.T95.items():
        nu = n - 1
        scale = math.gamma(n / 2) / math.gamma(nu / 2) / math.sqrt(nu * math.pi)
        density = [scale * (1 + (t * i / 2000) ** 2 / nu) ** (-n / 2) for i in range(2001)]
        half = t / 2000 / 3 * (density[0] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2]) + density[-1])
        assert 2 * half == pytest.approx(0.95, abs=1e-4), n
    assert list(readme.T95) == list(range(2, 11))


def table_of(rows, name, monkeypatch):
    """The lines of a table, each a list of cells, from rows in the place of those of runs.csv."""
    monkeypatch.setattr(readme, "read_rows", lambda path: [dict(row) for row in rows])
    lines = readme.TABLES[name]().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def old_rows(group="", forget="", **changes):
    """The rows of runs.csv as of protocol 2, with other cells in the row of a group that forgets `forget`."""
    rows = []
    for row in readme.read_rows(report.RUNS):
        changed = changes if (row["group"], row["forget"]) == (group, forget) else {}
        rows.append({**row, "protocol": "2", "recall_override": "", "teacher_recall_override": "", **changed})
    return rows


def column(lines, title, after=""):
    """{first cell of a line: its cell under a title}. after: the title of an earlier column."""
    i = lines[0].index(title, lines[0].index(after))
    return {line[0]: line[i] for line in lines[1:]}


@pytest.mark.parametrize("name, group, forget, line, untouched", [
    ("every class", "every class", "1", "1 to 2", "2 to 3"),
    ("cifar10", "cifar10 two stages", "airplane", "airplane to automobile: two stages, seed 0",
     "ship to truck: two stages, seed 0"),
    ("summary", "anchored elsewhere", "0", "the same without bfloat16", "SFD, one stage")])
def test_an_fd_of_more_images_than_the_teachers_has_a_star(name, group, forget, line, untouched, monkeypatch):
    lines = table_of(old_rows(group, forget, protocol="3", fd_override="8.25"), name, monkeypatch)
    cells = column(lines, "FD of the override")
    assert cells[line] == "8.2" and cells[untouched].endswith("*")
    for words, cell in cells.items():
        assert cell.endswith("*") != words.endswith(("the teacher", "plain SiD")) or words == line, words


def test_recall_of_the_override_is_next_to_the_teachers(monkeypatch):
    rows = old_rows("every class", "1", recall_override="0.5", teacher_recall_override="0.75")
    lines = table_of(rows, "every class", monkeypatch)
    recall, teacher = (column(lines, title, "recall of the override")
                       for title in ("recall of the override", "the teacher's"))
    assert (recall["1 to 2"], teacher["1 to 2"], recall["2 to 3"], teacher["2 to 3"]) == ("0.500", "0.750", "", "")


def test_the_first_table_counts_its_runs_and_has_an_interval(monkeypatch):
    lines = table_of(old_rows(), "forgets", monkeypatch)
    assert column(lines, "runs")["SFD, one stage"] == str(len(readme.seeds("default")))
    found = [row["override_share"] for row in readme.seeds("default")]
    assert column(lines, "override")["SFD, one stage"] == readme.interval(found, "{:.2%}", 1)
    for title in ("UA", "override", "kept"):
        assert all(float(share) <= 100 for share in re.findall(r"([\d.]+)%", " ".join(column(lines, title).values())))


def test_a_table_has_the_teacher_of_the_newest_protocol_once(monkeypatch):
    rows = old_rows()
    rows += [{**row, "protocol": "3"} for row in rows if row["group"] in ("teacher", "sid")]
    lines = table_of(rows, "cifar10", monkeypatch)
    assert len({line[0] for line in lines}) == len(lines)
    summary = table_of(rows, "summary", monkeypatch)
    assert column(summary, "protocol")["the teacher"] == "3"


def test_rows_of_runs_csv_have_their_settings_and_circumstances():
    for row in readme.read_rows(report.RUNS):
        assert row["id"] and row["group"] and row["data"], row
        if row["group"] not in ("teacher", "sid", "sweep"):  # the group sweep is older than the columns
            assert row["seconds"] and row["torch"] and row["name"], row["id"]


def test_every_recipe_is_a_valid_setting():
    for name, settings in distill.RECIPES.items():
        assert distill.Settings(**settings), name
