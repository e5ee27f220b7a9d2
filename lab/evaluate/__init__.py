"""Judges, metrics and the evaluation of a run: `python -m lab.evaluate RUN`."""
from lab.evaluate.evaluator import evaluate_run  # noqa: F401
