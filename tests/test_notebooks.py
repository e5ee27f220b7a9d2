"""The course runs from top to bottom and prints again what it holds. Slow: `python -m pytest -m notebooks`."""
import copy
import re
import sys

import nbformat
import pytest

from conftest import ROOT

sys.path.append(str(ROOT / "notebooks"))
import refresh  # noqa: E402

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ARXIV = {"2409.11219", "2404.04057", "2206.00364", "2303.07345", "2310.12508", "2305.10120", "2308.14761", "2006.11239",
         "2207.12598"}  # SFD, SiD, EDM, ESD, SalUn, Selective Amnesia, UCE, DDPM, classifier-free guidance


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag):
    return [cell for cell in code_cells(notebook) if tag in cell.metadata.get("tags", [])]


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_prints_what_is_committed(path):
    found = refresh.differences(read(path), refresh.execute(path))
    assert not found, "\n".join(found)


def test_there_are_five():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_small_complete_and_run_from_top_to_bottom(path):
    assert path.stat().st_size < 300_000
    notebook = read(path)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert refresh.set_up(notebook).source == refresh.SETUP, "python notebooks/refresh.py writes the set-up"
    for cell in cells[1:]:
        assert cell.source.count("\n") < 25, f"a long cell: {cell.source[:60]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_tells_what_to_expect_and_what_was_learned(path):
    notebook = read(path)
    first, last = notebook.cells[0].source, notebook.cells[-1].source
    for words in ("After this notebook you can", "You should know before", "Time:", "In Colab:"):
        assert words in first
    tolerance = notebook.metadata["tolerance"]
    assert f"within {tolerance['atol']:g} + {100 * tolerance['rtol']:g} %" in first.replace("\n", " ")
    assert "What you have learned" in last
    cited = re.findall(r"arxiv\.org/abs/([\d.]+)\)", last)
    assert len(cited) >= 3 and set(cited) <= ARXIV


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_have_a_time_a_difficulty_and_a_folded_solution(path):
    notebook = read(path)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    exercises = re.findall(r"\*\(\d+ minutes, (?:easy|medium|hard)\)\*", text)
    solutions = tagged(notebook, "solution")
    assert len(solutions) == len(exercises) >= 3
    for cell in solutions:
        assert cell.metadata["jupyter"]["source_hidden"] and cell.metadata["cellView"] == "form"


def test_code_to_write_is_not_yet_there():
    exercises = tagged(read(NOTEBOOKS[1]), "exercise")
    assert len(exercises) == 3
    for cell in exercises:
        assert "# your code" in cell.source
        assert [output.text.strip()[-7:] for output in cell.outputs] == ["not yet"]


def test_a_changed_number_or_word_is_noticed():
    committed = read(NOTEBOOKS[0])
    assert not refresh.differences(committed, committed)
    for old, new in ((r"\d\.\d\d", "9.99"), (r"label", "lable")):
        changed = copy.deepcopy(committed)
        streams = [output for cell in code_cells(changed) for output in cell.outputs if output.output_type == "stream"]
        stream = next(output for output in streams if "label" in output.text)
        stream.text = re.sub(old, new, stream.text, count=1)
        assert refresh.differences(committed, changed)
    changed = copy.deepcopy(committed)
    code_cells(changed)[0].execution_count = None
    assert refresh.differences(changed, committed)
