"""The sweep runs, and the committed table is of the rows that it has now."""
import csv

import pytest

import sfd_minimal
import sweep
from conftest import ROOT


def test_a_row_is_run_and_judged(tiny, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "IMAGES", 24)
    monkeypatch.setattr("sys.argv", ["sweep.py", "--rows", "--batch 8 --alpha 1.2", "--teacher", str(tiny)])
    sweep.main()
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert row["options"] == f"--teacher {tiny} --batch 8 --alpha 1.2" and row["steps"] == "3"
    assert float(row["fd"]) > 100 and row["steps_to_99"] in ("", "3") and 0 <= float(row["kept_accuracy"]) < 0.5


def test_steps_of_a_row_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sweep.py", "--rows", "--steps 5"])
    with pytest.raises(SystemExit):
        sweep.main()
    assert "8320 images" in capsys.readouterr().err


def test_committed_table_has_these_rows():
    with open(ROOT / "results" / "sweep.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["options"] for row in rows] == sweep.ROWS
    for row in rows:
        batch = int(row["options"].split()[1]) if row["options"].startswith("--batch") else sfd_minimal.Settings().batch
        assert int(row["steps"]) == sweep.IMAGES // batch
