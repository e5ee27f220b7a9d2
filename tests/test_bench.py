"""The benchmark runs, and the step costs about half of the official way's arithmetic."""
import re
import subprocess

from conftest import program


def test_benchmark(tiny):
    done = subprocess.run([*program("tests/bench.py"), "--teacher", str(tiny), "--batch", "8", "--seconds", "0.5"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cost = [float(x) for x in re.findall(r"([\d.]+) MFLOP per kept image", done.stdout)]
    assert cost[0] / cost[1] > 1.9 and "times faster" in done.stdout, done.stdout
