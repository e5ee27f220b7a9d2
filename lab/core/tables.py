"""Numbers as files and tables: JSON and CSV written whole or not at all, and Markdown."""
import csv
import io
import json
import os
import statistics
from pathlib import Path

from edm_unet import BadInput


def write_text(path, text):
    """Write a text file whole or not at all: a kill leaves the file that was there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path):
    """The content of a JSON file. BadInput where the file is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise BadInput(f"{path} is damaged ({e}): remove it, and it is made again") from e


def read_rows(path):
    """The rows of a CSV file, each a dict of strings; none where there is no file."""
    if not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def write_rows(rows, path, columns=None):
    text = io.StringIO()
    table = csv.DictWriter(text, columns or list(rows[-1]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def percent(share):
    return f"{share:.2%}"


def spread(values, form):
    """The mean of numbers and, where the format tells them apart, their range."""
    low, mean, high = (form.format(f(values)) for f in (min, statistics.mean, max))
    return mean if low == high else f"{mean} ({low} to {high})"


def markdown(head, rows):
    """A Markdown table that also reads well in a terminal. Cells are strings or numbers."""
    lines = [[str(cell).replace("|", r"\|") for cell in line] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])
