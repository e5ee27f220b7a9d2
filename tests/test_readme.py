"""README.md and the pages: the commands exist, the examples run as they stand, the tables are what the files say."""
import importlib
import re
import shlex

import pytest

import sfd_minimal
import train_teacher
from conftest import ROOT
from lab import distill, readme, report
from lab.core.options import given_options

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
    numbers = {"ua": 0.01, "fd": 2.0, "fd_override": 5.0, "per_class_accuracy": [0.9, 1.0, 1.0], "nfe": 35}
    metrics = {**numbers, "ua": 1.0, "per_class_accuracy": [0.0, 0.99, 0.9], "protocol": 2, "forget": [0], "to": [1],
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


def test_rows_of_runs_csv_have_their_settings_and_circumstances():
    for row in readme.read_rows(report.RUNS):
        assert row["id"] and row["group"] and row["data"], row
        if row["group"] not in ("teacher", "sid", "sweep"):  # the group sweep is older than the columns
            assert row["seconds"] and row["torch"] and row["name"], row["id"]


def test_every_recipe_is_a_valid_setting():
    for name, settings in distill.RECIPES.items():
        assert distill.Settings(**settings), name
