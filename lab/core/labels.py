"""Labels in words."""
import re
from pathlib import Path


def short_name(name):
    """A class name without its number: MNIST calls its classes "0 - zero"."""
    return re.sub(r"^\d+ - ", "", name)


def label_name(k, classes):
    """Label k for people: its name, and its number where the name is another word."""
    return str(k) if classes[k] == str(k) else f"{short_name(classes[k])} (label {k})"


def describe(c_f, c_o, classes):
    """What is forgotten and what is drawn instead, in words. c_f, c_o: lists of label numbers, -1 for random."""
    parts = []
    for f, o in zip(c_f, c_o):
        override = "a random kept label" if o < 0 else label_name(o, classes)
        parts.append(f"{label_name(f, classes)} is forgotten, {override} drawn instead")
    return "; ".join(parts) or "nothing is forgotten"


def run_folder(*words):
    """A folder in runs/ named after words, such as runs/mnist-baselines-forget0-to1."""
    return str(Path("runs") / re.sub(r"[^\w.-]+", "_", "-".join(str(word) for word in words if word))[:200])
