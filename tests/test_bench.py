"""The benchmark runs, and the step costs about half of the official way's arithmetic."""
import dataclasses
import re
import time

import pytest
import torch

from conftest import CPU
from edm_unet import EDMPrecond
from lab import bench


def test_benchmark(tiny, monkeypatch, capsys):
    """Each row once instead of for seconds: what it costs, not how fast it is."""
    monkeypatch.setattr(bench, "rate", lambda step, seconds, device: (step(), 1.0)[1])
    bench.main(["--teacher", str(tiny), "--batch", "8", "--device", "cpu"])
    out = capsys.readouterr().out
    cost = [float(x) for x in re.findall(r"([\d.]+) MFLOP per kept image", out)]
    assert (cost[0] / cost[1] > 1.9 and 1.05 < cost[-1] / cost[1] < 1.2
            and "times faster" in out and "teacher training" in out), out
    assert float(re.search(r"matrix product in \w+: (\d+) GFLOP/s", out)[1]) == pytest.approx(2 * 2.048 ** 3, abs=1)


def test_rate_is_calls_per_second():
    calls = []
    rate = bench.rate(lambda: calls.append(time.sleep(0.01)), 0.1, CPU)
    assert 10 < rate < 100 and 6 <= len(calls) <= 1 + 5 * 3


def test_published_architecture_takes_a_step(monkeypatch, capsys):
    """Of a quarter of its width, all else as it is: the real one takes as long as the rest of these tests."""
    with torch.device("meta"):
        assert sum(p.numel() for p in EDMPrecond(bench.PUBLISHED).parameters()) == pytest.approx(55.7e6, abs=0.05e6)
    monkeypatch.setattr(bench, "PUBLISHED", dataclasses.replace(bench.PUBLISHED, model_channels=32))
    bench.main(["--only", "published", "--device", "cpu"])
    assert "3.5 M parameters, one SFD step of 2 images" in capsys.readouterr().out


def test_profile_names_the_convolution(tiny, monkeypatch, capsys):
    monkeypatch.setattr(bench.profile, "__defaults__", (2,))  # steps
    bench.main(["--teacher", str(tiny), "--batch", "8", "--only", "profile", "--device", "cpu"])
    assert "convolution_backward" in capsys.readouterr().out
