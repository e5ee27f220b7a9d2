"""Evaluate a run: unlearning accuracy (UA), kept accuracy, Frechet distance (FD), precision and recall.

    python -m lab.evaluate runs/mnist-forget0-to1

Prints the metrics of the generator, of its teacher and of plain SiD. Writes metrics.json and evaluation.png into the
folder of the run.
"""
from dataclasses import dataclass

from edm_unet import command
from lab.core.options import parse, setting
from lab.evaluate.evaluator import evaluate_run


@dataclass
class Settings:
    run: str = setting("", "folder of a run of sfd_minimal.py", positional=True)
    per_label: int = setting(None, "images judged under each label, five times as many under a forgotten label; "
                             "None is 1000, or 10,000 divided by the number of labels where there are more than ten",
                             above=0)
    draws: int = setting(1, "how often the generator's images are drawn, each time from other noise; the teacher is "
                         "drawn once", above=0)
    teacher: str = setting("", "file of the teacher, where it is no longer where it was")
    device: str = setting("auto", "auto, cpu, cuda or mps")


def main(argv):
    s = parse(Settings, argv, __doc__)
    evaluate_run(s.run, s.teacher, s.per_label, s.device, s.draws)


if __name__ == "__main__":
    command(main)
