"""Run the notebooks from top to bottom and write their outputs.

    python notebooks/refresh.py                # all notebooks, or those that are named
    python notebooks/refresh.py --check        # write nothing; fail where a notebook prints something else than before

Printed text must be the same, and each number in it within atol + rtol * |number|. Both are in the metadata of each
notebook, and in words in its first cell. The first code cell of every notebook is SETUP.
"""
import argparse
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
REPOSITORY = ""     # address of the project's git repository, which is not public yet. It is written into the notebooks
SETUP = f'''#@title Set-up: find the project. In Colab, fetch it
import os
import subprocess
import sys
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # progress bars do not print well
places = [Path.cwd(), *Path.cwd().parents, Path("sfd-minimal").resolve()]
if not any((place / "sfd_minimal.py").exists() for place in places):
    address = os.environ.get("SFD_MINIMAL_REPOSITORY", "{REPOSITORY}")
    address = address or input("SFD_MINIMAL_REPOSITORY, the address of the project's git repository: ")
    subprocess.run(["git", "clone", "--depth", "1", address, "sfd-minimal"], check=True)
root = next(place for place in places if (place / "sfd_minimal.py").exists())
sys.path[:0] = [str(root), str(root / "notebooks")]'''
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def execute(path):
    """Run the notebook at `path` in a fresh kernel and return it. Raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    set_up(notebook).source = SETUP
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # time stamps
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def set_up(notebook):
    """The first code cell of a notebook."""
    return next(cell for cell in notebook.cells if cell.cell_type == "code")


def printed(notebook):
    """The text that each code cell printed."""
    texts = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            texts.append("".join(output.text for output in cell.outputs if output.output_type == "stream"))
    return texts


def numbers(text):
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def differences(committed, fresh):
    """Lines that say where a fresh run printed something else than is committed, beyond the notebook's tolerance."""
    rtol, atol = committed.metadata["tolerance"]["rtol"], committed.metadata["tolerance"]["atol"]
    found = []
    if any(cell.cell_type == "code" and cell.execution_count is None for cell in committed.cells):
        found.append("a cell was committed without having been run")
    for i, (old, new) in enumerate(zip(printed(committed), printed(fresh), strict=True), 1):
        if NUMBER.sub("#", old) != NUMBER.sub("#", new):
            found.append(f"code cell {i} printed {new!r} where {old!r} is committed")
            continue
        for a, b in zip(numbers(old), numbers(new)):
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
        began = time.monotonic()
        fresh = execute(path)
        if a.check:
            problems = differences(nbformat.read(path, as_version=4), fresh)
            for problem in problems:
                print(f"{path.name}: {problem}")
            failed = failed or bool(problems)
        else:
            nbformat.write(fresh, path)
        print(f"{path.name}: {time.monotonic() - began:.0f} s, {path.stat().st_size / 1000:.0f} KB")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
