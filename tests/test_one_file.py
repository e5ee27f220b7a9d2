"""The method is one file: sfd_minimal.py, edm_unet.py and a teacher, alone in a folder, make a generator and a picture.
"""
import os
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, assert_same
from edm_unet import load_network

PROJECT = {"edm_unet", "sfd_minimal", "train_teacher", "lab"}
IMPORT = f"""
import importlib, sys

def imported(names):
    return sorted({{module.split(".")[0] for module in sys.modules}} & names)

program = importlib.import_module(sys.argv[1])
print("after the import:", *imported({PROJECT | {"torchvision", "matplotlib", "PIL"}}))
"""
SMALL = """
network = program.NetSettings(patch=4, model_channels=16, channel_mult=(1,), num_blocks=1)
program.PRESETS["mnist"] = (network, False, {})
"""
RUN = f"""
program.main(sys.argv[2:])
print("after the run:", *imported({PROJECT}))
"""


def alone(folder, *words):
    """Run python in a folder, with no module of the project in reach but those in the folder."""
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, *(str(word) for word in words)], cwd=folder, capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path, tiny):
    for name in ("edm_unet.py", "sfd_minimal.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(tiny, tmp_path / "tiny.pt")
    return tmp_path


def test_sfd_runs_from_two_files_and_a_teacher(folder):
    options = ["--forget", "0", "--to", "1", "--teacher", "tiny.pt", "--steps", "3", "--batch", "4", "--device", "cpu"]
    alone(folder, "sfd_minimal.py", *options)
    out = folder / "runs" / "mnist-forget0-to1"
    assert {path.name for path in out.iterdir()} == {"generator.pt", "both.pt", "checkpoint.pt", "samples.png"}
    generator, info = load_network(out / "generator.pt")
    both = torch.load(out / "both.pt", weights_only=True)
    assert info["forget"] == [0] and info["to"] == [1] and info["sigma_init"] == 2.5 and "fake" not in info
    assert both["fake"].keys() == generator.state_dict().keys()
    assert_same({k: v.half() for k, v in generator.state_dict().items()}, both["weights"])

    printed = alone(folder, "-c", IMPORT + RUN, "sfd_minimal", *options, "--out", "again")
    assert printed.count(": edm_unet sfd_minimal\n") == 2, printed
    assert_same(load_network(folder / "again" / "generator.pt")[0].state_dict(), generator.state_dict())


def test_a_teacher_is_trained_from_two_files_and_images(tmp_path, mnist_dir):
    for name in ("edm_unet.py", "train_teacher.py"):
        shutil.copy(ROOT / name, tmp_path)
    printed = alone(tmp_path, "-c", IMPORT + SMALL + RUN, "train_teacher", "--data-dir", mnist_dir, "--steps", "2",
                    "--batch", "4", "--device", "cpu")
    assert printed.count(": edm_unet train_teacher\n") == 2, printed
    out = tmp_path / "runs" / "mnist-teacher"
    assert {path.name for path in out.iterdir()} == {"teacher.pt", "checkpoint.pt", "samples.png"}
    teacher, info = load_network(out / "teacher.pt")
    assert teacher.shape == (1, 28, 28) and info["made_by"]["steps"] == 2 and len(info["classes"]) == 10
