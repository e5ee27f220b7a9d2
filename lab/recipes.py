"""What a run of sfd_minimal.py takes for the settings that are not given: a line for each data set and start."""
from pathlib import Path

PLAIN = dict(lambda_anchor=0.0, guidance=1.0)  # as in the paper
PUBLISHED = dict(steps=50_000, batch=256, micro_batch=32, lr=1e-5, lr_fake=3e-5) | PLAIN
ANCHORED = dict(lambda_anchor=3.0, forget_share=0.5, guidance=1.0)
GUIDED = dict(guidance=2.0)
RECIPES = {
    "mnist, from the teacher": dict(steps=1000, batch=64, lr=3e-4, lr_fake=1e-3) | PLAIN,
    "mnist, from a one-step generator": dict(steps=135, batch=64, lr=8e-4, lr_fake=2.7e-3) | ANCHORED,
    "mnist, forgetting nothing": dict(steps=7000, batch=64, lr=1e-4, lr_fake=3.4e-4) | PLAIN,
    # guided: of what this teacher draws when asked for an automobile, the judge takes 3.5 % for airplanes
    "cifar10, from the teacher": dict(steps=8000, batch=64, lr=1e-4, lr_fake=3.4e-4) | PLAIN | GUIDED,
    "cifar10, from a one-step generator": dict(steps=200, batch=64, lr=2e-4, lr_fake=6.8e-4) | ANCHORED | GUIDED,
    "cifar10, forgetting nothing": dict(steps=800, batch=256, lr=1e-4, lr_fake=3.4e-4) | PLAIN,
    "prompts, from the teacher": dict(steps=1500, batch=64, lr=3e-4, lr_fake=1e-3, forget_share=0.2) | PLAIN,
    "prompts, from a one-step generator": dict(steps=400, batch=64, lr=8e-4, lr_fake=2.7e-3) | ANCHORED,
    "prompts, forgetting nothing": dict(steps=7000, batch=64, lr=1e-4, lr_fake=3.4e-4) | PLAIN,
    "NVIDIA's network, from the teacher": PUBLISHED,  # the rates of the official runs' best files; nothing tried here
    "NVIDIA's network, from a one-step generator": PUBLISHED,
    "NVIDIA's network, forgetting nothing": PUBLISHED,
}


def recipe_name(data, teacher, forgets, init_from):
    """The key of RECIPES for a run on `data` from the file `teacher` ("": the data set's). Fashion-MNIST has MNIST's
    recipes and a folder of images CIFAR-10's; a teacher is taken for NVIDIA's by its file name, edm-*."""
    kind = ("NVIDIA's network" if Path(teacher).name.startswith("edm-") else
            "prompts" if data == "prompts" else "mnist" if data in ("mnist", "fashion_mnist") else "cifar10")
    start = ("forgetting nothing" if not forgets else
             "from a one-step generator" if init_from else "from the teacher")
    return f"{kind}, {start}"
