"""Execute the notebooks from top to bottom, in order.

    python notebooks/refresh.py             # write their outputs
    python notebooks/refresh.py --check     # write nothing; fail where what they print is not what is committed

Printed text must be the same, and each number in it within rtol * |committed| + atol, which stand in each notebook's
metadata and first cell.
"""
import argparse
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def execute(path):
    """The notebook at `path`, run in a fresh kernel; raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # time stamps
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook


def printed(notebook):
    """What each code cell printed."""
    return ["".join(o.text for o in cell.outputs if o.output_type == "stream")
            for cell in notebook.cells if cell.cell_type == "code"]


def differences(committed, fresh):
    """Lines that say what a fresh run printed differently, beyond the notebook's tolerance; empty where all is well."""
    rtol, atol, found = committed.metadata["tolerance"]["rtol"], committed.metadata["tolerance"]["atol"], []
    if any(cell.cell_type == "code" and cell.execution_count is None for cell in committed.cells):
        found.append("a cell was committed without having been run")
    for i, (old, new) in enumerate(zip(printed(committed), printed(fresh), strict=True), 1):
        if NUMBER.sub("#", old) != NUMBER.sub("#", new):
            found.append(f"code cell {i} printed {new!r} where {old!r} is committed")
            continue
        for a, b in zip(*([float(n.replace(",", "")) for n in NUMBER.findall(text)] for text in (old, new))):
            if not abs(a - b) <= rtol * abs(a) + atol:
                found.append(f"code cell {i} printed {b:g} where {a:g} is committed: {new.strip()!r}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")),
                        help="notebooks to run (default: all)")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    a = parser.parse_args()
    failed = False
    for path in a.notebook:
        start, fresh = time.monotonic(), execute(path)
        if a.check:
            problems = differences(nbformat.read(path, as_version=4), fresh)
            failed |= bool(problems)
            print(*[f"{path.name}: {p}" for p in problems], sep="\n" if problems else "")
        else:
            nbformat.write(fresh, path)
        print(f"{path.name}: {time.monotonic() - start:.0f} s, {path.stat().st_size / 1000:.0f} KB")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
