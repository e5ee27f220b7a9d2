"""The course runs from top to bottom and prints what it has printed before. Slow: `python -m pytest -m notebooks`."""
import copy
import sys

import nbformat
import pytest

from conftest import ROOT

sys.path.append(str(ROOT / "notebooks"))
import refresh  # noqa: E402

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_and_prints_what_is_committed(path):
    found = refresh.differences(nbformat.read(path, as_version=4), refresh.execute(path))
    assert not found, "\n".join(found)


def test_there_are_five():
    assert [p.stem[:2] for p in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_fit_to_be_read(path):
    """Small, complete, three exercises with solutions that are folded, and told to the reader what the tolerance is."""
    assert path.stat().st_size < 300_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1)), "not run from top to bottom"
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]
    solutions = [c for c in code if "solution" in c.metadata.get("tags", [])]
    assert len(solutions) == 3 and all(c.metadata["jupyter"]["source_hidden"] and c.metadata["cellView"] == "form"
                                       for c in solutions)
    tolerance = notebook.metadata["tolerance"]
    assert (f"within {tolerance['atol']:g} + {100 * tolerance['rtol']:g} %"
            in notebook.cells[0].source.replace("\n", " "))


def test_a_changed_number_or_word_is_noticed():
    committed = nbformat.read(NOTEBOOKS[0], as_version=4)
    assert not refresh.differences(committed, committed)
    for old, new in ((r"\d\.\d\d", "9.99"), (r"label", "lable")):
        changed = copy.deepcopy(committed)
        stream = next(o for c in changed.cells if c.cell_type == "code"
                      for o in c.outputs if o.output_type == "stream" and "label" in o.text)
        stream.text = refresh.re.sub(old, new, stream.text, count=1)
        assert refresh.differences(committed, changed)
    changed = copy.deepcopy(committed)
    next(c for c in changed.cells if c.cell_type == "code").execution_count = None
    assert refresh.differences(changed, committed)
