"""The benchmark runs, and the step costs about half of the official way's arithmetic."""
import re
import subprocess

from conftest import program


def test_benchmark(tiny):
    done = subprocess.run([*program("tests/bench.py"), "--teacher", str(tiny), "--batch", "8", "--seconds", "0.5"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cost = [float(x) for x in re.findall(r"([\d.]+) MFLOP per kept image", done.stdout)]
    assert (cost[0] / cost[1] > 1.9 and 1.05 < cost[-1] / cost[1] < 1.2
            and "times faster" in done.stdout and "teacher training" in done.stdout), done.stdout


def test_published_architecture_takes_a_step():
    done = subprocess.run([*program("tests/bench.py"), "--published"], capture_output=True, text=True)
    assert done.returncode == 0 and "55.7 M parameters, one SFD step" in done.stdout, done.stdout + done.stderr


def test_profile_names_the_convolution(tiny):
    done = subprocess.run([*program("tests/bench.py"), "--teacher", str(tiny), "--batch", "8", "--profile"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "convolution_backward" in done.stdout, done.stdout + done.stderr
