"""Runs that survive: SIGKILL, Ctrl-C, a full disk, wrong settings; and the same numbers for the same seed."""
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

import lab.run
import sfd_minimal
import train_teacher
from conftest import ROOT, image_folder, program
from lab import evaluate
from lab.checkpoint import load_checkpoint, load_teacher, pack, save_atomically
from lab.errors import BadInput, RunFailed
from lab.recipes import RECIPES
from lab.run import Run

BASE = ["--forget", "0", "--to", "1", "--batch", "4", "--device", "cpu"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Verdicts of a few images."""
    monkeypatch.setattr(evaluate, "PER_LABEL", 4)


@pytest.fixture(scope="session")
def unjudged(tiny, tmp_path_factory):
    """A teacher of images that no judge knows: runs from it end with the generator."""
    path = tmp_path_factory.mktemp("unjudged") / "teacher.pt"
    save_atomically(torch.load(tiny, weights_only=True) | {"data": "runes"}, path)
    return ["--teacher", str(path), "--data", "runes"]


def weights(out):
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    return saved["step"], saved["state"]


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@contextlib.contextmanager
def stopped_after(step):
    """The run within is interrupted right after it was saved at `step`."""
    save = Run.save

    def save_and_stop(run):
        save(run)
        if run.step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save", save_and_stop)
        patch.setattr(lab.run, "APART", 0)
        yield


KILLER = textwrap.dedent("""
    import os, signal, sys
    import torch
    import lab.run
    import sfd_minimal
    from lab.cli import command

    def die(*args, **kw):
        os.kill(os.getpid(), signal.SIGKILL)

    def half_written(obj, f):
        save(obj, f)
        f.flush()
        f.truncate(f.tell() // 2)
        die()

    def after_rename(old, new):
        replace(old, new)
        die()

    def second(kill, otherwise):  # what dies at its second call, so that each life gets a step further
        calls = []
        return lambda *args, **kw: (kill if calls.append(1) or len(calls) == 2 else otherwise)(*args, **kw)

    save, replace, fsync = torch.save, os.replace, os.fsync
    points = {"half-written": (torch, "save", half_written, save), "before fsync": (os, "fsync", die, fsync),
              "before rename": (os, "replace", die, replace), "after rename": (os, "replace", after_rename, replace)}
    lab.run.APART = 0
    whole, killed, argv = sys.argv[1], sys.argv[2], sys.argv[3:]
    for point in ["", *points, *points, ""]:
        pid = os.fork()  # torch imported and no thread started yet: ten lives in the time of one import
        if pid == 0:
            out = killed
            if point:
                module, name, kill, otherwise = points[point]
                setattr(module, name, second(kill, otherwise))
            elif not os.path.exists(whole):
                out = whole
            resume = ["--resume"] if os.path.exists(os.path.join(out, "checkpoint.pt")) else []
            sys.argv = ["sfd_minimal.py", *argv, "--out", out, *resume]
            command(sfd_minimal.main)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        partial = os.path.exists(os.path.join(killed, "checkpoint.pt.partial"))
        print(point, "ended with", status, "partial file" if partial else "", flush=True)
""")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to live ten times in the time of one import")
def test_kills_at_every_point_of_a_save_change_no_bit(unjudged, tmp_path):
    """log.csv is not written here (no judge, and fewer than 20 steps), so that os.replace is the checkpoint's."""
    whole, killed = tmp_path / "whole", tmp_path / "killed often"
    done = subprocess.run([sys.executable, "-c", KILLER, whole, killed, *BASE, *unjudged, "--steps", "16",
                           "--save-every", "1e-9"], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    lives = done.stdout.count("ended with 9")
    assert lives == 8 and done.stdout.count("ended with 0") == 2, done.stdout + done.stderr
    assert done.stdout.count("partial file") >= 5, done.stdout  # a life that dies before its rename leaves one
    (step_a, state_a), (step_b, state_b) = weights(whole), weights(killed)
    assert step_a == step_b == 16
    assert_same(state_a, state_b)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_the_real_command_survives_a_kill_and_ctrl_c(unjudged, tmp_path):
    command = [*program("sfd_minimal.py"), *BASE, *unjudged, "--out", "run", "--steps", "5000", "--save-every", "0.1"]
    out = tmp_path / "run"

    def start(*more):
        age = (out / "checkpoint.pt").stat().st_mtime_ns if out.exists() else 0
        process = subprocess.Popen([*command, *more], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                                   text=True)
        while not (out / "checkpoint.pt").exists() or (out / "checkpoint.pt").stat().st_mtime_ns == age:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)  # it lives, and has saved at least once
        time.sleep(random.uniform(0, 0.2))
        return process

    killed = start()
    killed.kill()
    killed.communicate()
    interrupted = start("--resume")
    interrupted.send_signal(signal.SIGINT)
    _, err = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130 and "--resume" in err and "Traceback" not in err, err
    step, state = weights(out)
    with stopped_after(step):
        sfd_minimal.main([*BASE, *unjudged, "--out", str(tmp_path / "whole"), "--steps", "5000",
                          "--save-every", "1e-9"])
    assert_same(weights(tmp_path / "whole")[1], state)


def test_same_seed_same_metrics(tiny, tmp_path):
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sfd_minimal.main([*BASE, "--teacher", str(tiny), "--out", str(tmp_path / name), "--steps", "3",
                          "--seed", str(seed)])
        text = (tmp_path / name / "metrics.json").read_text()
        results.append(re.sub(r'"(seconds|seconds_judging|out)": [^,\n]*', "", text))
    assert results[0] == results[1]
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["fd"] != json.loads(text)["fd"]


def test_full_disk_keeps_the_last_checkpoint(unjudged, tmp_path):
    resource = pytest.importorskip("resource", reason="needs a limit for the size of files")
    out = tmp_path / "run"
    base = [*BASE, *unjudged, "--out", str(out)]
    sfd_minimal.main([*base, "--steps", "2"])
    before = weights(out)
    save_atomically(torch.load(out / "checkpoint.pt", weights_only=True) | {"step": 1}, out / "checkpoint.pt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((out / "checkpoint.pt").stat().st_size // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="could not write .*unharmed"):
            sfd_minimal.main([*base, "--steps", "2", "--resume"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_same(weights(out)[1], before[1])
    assert not list(out.glob("*.partial"))


def test_resume_with_other_settings_is_refused(unjudged, tmp_path):
    base = [*BASE, *unjudged, "--out", str(tmp_path / "run"), "--steps", "2"]
    sfd_minimal.main(base)
    with pytest.raises(BadInput, match="alpha was 1.0 and is 1.2.*lr was"):
        sfd_minimal.main([*base, "--resume", "--alpha", "1.2", "--lr", "1e-5"])
    with pytest.raises(BadInput, match="holds a run already"):
        sfd_minimal.main(base)
    with pytest.raises(BadInput, match="say one of them"):
        sfd_minimal.main([*base, "--resume", "--overwrite"])
    sfd_minimal.main([*base, "--overwrite"])


def test_resume_with_another_teacher_in_the_same_place_is_refused(tiny, tmp_path, capsys):
    out, teacher = tmp_path / "run", tmp_path / "teacher.pt"
    content = torch.load(tiny, weights_only=True) | {"data": "runes"}
    base = [*BASE, "--teacher", str(teacher), "--data", "runes", "--steps", "2"]
    save_atomically(content, teacher)
    sfd_minimal.main([*base, "--out", str(out)])
    save_atomically(content | {"weights": {k: v + 1e-3 for k, v in content["weights"].items()}}, teacher)
    with pytest.raises(BadInput, match="its teacher was .* and is"):
        sfd_minimal.main([*base, "--out", str(out), "--resume"])
    sfd_minimal.main([*base, "--out", str(tmp_path / "from"), "--init-from", str(out / "both.pt")])
    assert "was distilled from another teacher" in capsys.readouterr().out
    save_atomically(content, teacher)
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    del saved["state"]["generator"]["model.map_label.weight"]
    save_atomically(saved, out / "checkpoint.pt")
    with pytest.raises(BadInput, match="the generator in its checkpoint is of another shape"):
        sfd_minimal.main([*base, "--out", str(out), "--resume"])
    del saved["state"]["generator"]
    save_atomically(saved, out / "checkpoint.pt")
    with pytest.raises(BadInput, match="earlier version of this code, lacks generator"):
        sfd_minimal.main([*base, "--out", str(out), "--resume"])


def test_a_run_leaves_the_teacher_as_it_was(tiny):
    teacher, info = load_teacher(tiny, "mnist", torch.device("cpu"))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    s = sfd_minimal.Settings(steps=3, batch=4)
    state = sfd_minimal.begin(s, teacher, info)
    for _ in sfd_minimal.distill(s, sfd_minimal.about_labels(s, teacher, [0], [1]), teacher, **state):
        pass
    assert_same(teacher.state_dict(), before)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in state["fake"].parameters())
    for name in ("generator", "average", "fake"):
        assert any(not torch.equal(v, before[k]) for k, v in state[name].state_dict().items()), name


def test_a_second_stage_resumes_with_the_anchor_that_it_began_with(unjudged, tmp_path):
    start = tmp_path / "first" / "both.pt"
    base = ["--batch", "4", "--device", "cpu", *unjudged, "--steps", "4"]
    sfd_minimal.main([*base, "--forget", "none", "--out", str(start.parent)])
    base += ["--forget", "0", "--to", "1", "--init-from", str(start)]
    sfd_minimal.main([*base, "--out", str(tmp_path / "whole")])
    with stopped_after(2):
        sfd_minimal.main([*base, "--out", str(tmp_path / "cut"), "--save-every", "1e-9"])
    content = torch.load(start, weights_only=True)
    save_atomically(content | {"weights": {k: v + 1e-3 for k, v in content["weights"].items()}}, start)
    sfd_minimal.main([*base, "--out", str(tmp_path / "cut"), "--resume"])
    assert "anchor" in weights(tmp_path / "whole")[1]
    assert_same(weights(tmp_path / "whole")[1], weights(tmp_path / "cut")[1])


def test_the_anchor_is_the_start_or_else_the_average(tiny, tmp_path, monkeypatch):
    """And there is none unless it is asked for. Only the start's is frozen, and kept for resuming."""
    seen, step = [], sfd_minimal.sfd_step
    monkeypatch.setattr(sfd_minimal, "sfd_step", lambda *args: seen.append(args[-1]) or step(*args))
    teacher, info = load_teacher(tiny, "mnist", torch.device("cpu"))
    start = tmp_path / "both.pt"
    torch.manual_seed(1)
    other = {k: v + 0.01 * torch.randn_like(v) for k, v in teacher.state_dict().items()}
    save_atomically({"kind": "denoiser", "data": "mnist", "teacher_sha256": info["sha256"],
                     **pack(teacher), "weights": other, "fake": teacher.state_dict()}, start)

    def run(**changed):
        s = sfd_minimal.Settings(**{"steps": 2, "batch": 4} | changed)
        state = sfd_minimal.begin(s, teacher, info)
        for _ in sfd_minimal.distill(s, sfd_minimal.about_labels(s, teacher, [0], [1]), teacher, **state):
            pass
        return seen[-1], state

    assert run()[0] is None and run(lambda_anchor=0.0, init_from=str(start))[0] is None
    anchor, state = run(lambda_anchor=1.0)
    assert anchor is state["average"] and "anchor" not in state
    anchor, state = run(init_from=str(start))
    assert anchor is state["anchor"]
    assert_same(anchor.state_dict(), other)
    assert any(not torch.equal(v, w) for v, w in zip(anchor.parameters(), state["average"].parameters()))


def test_a_start_brings_its_own_settings_and_what_is_said_wins(capsys, tiny, tmp_path, unjudged):
    found = set()
    for said in ({}, {"data": "prompts"}, {"data": "cifar10"},
                 {"data": "cifar10", "teacher": "up/edm-cifar10-32x32-cond-vp.pkl"}):
        for start in ({}, {"init_from": "both.pt"}, {"forget": ("none",)}):
            s = sfd_minimal.Settings(**said, **start)
            found.add(s.recipe)
            assert {k: getattr(s, k) for k in RECIPES[s.recipe]} == RECIPES[s.recipe] == s.taken
    assert found == set(RECIPES)
    s = sfd_minimal.Settings(init_from="both.pt", steps=7, lambda_anchor=0.0)
    assert s.steps == 7 and s.lambda_anchor == 0 and s.forget_share == 0.5 and "steps" not in s.taken
    sfd_minimal.main([*BASE, *unjudged, "--out", str(tmp_path / "run"), "--steps", "1"])
    out, recipe = capsys.readouterr().out, RECIPES["cifar10, from the teacher"]  # a folder has CIFAR-10's
    assert f"lr={recipe['lr']} lr_fake={recipe['lr_fake']}" in out and "steps=" not in out
    content = load_checkpoint(tmp_path / "run" / "generator.pt")[1]
    assert content["settings"]["lr"] == recipe["lr"] and content["settings"]["guidance"] == recipe["guidance"] == 2.0


class Prompted(torch.nn.Module):
    """A denoiser of points, asked by prompts: token states (B, 7, 16), which it reads through a mean."""

    def __init__(self):
        super().__init__()
        self.register_buffer("conditions", torch.randn(3, 7, 16))
        self.read, self.net = torch.nn.Linear(16, 8), torch.nn.Linear(2 + 1 + 8, 2)
        self.shape, self.sigma_data = (2,), 0.5

    def forward(self, x, sigma, c):
        assert sigma.shape == (len(x), 1) and c.shape == (len(x), 7, 16)
        return self.net(torch.cat([x, sigma.log() / 4, self.read(c).mean(1)], 1))


def test_any_denoiser_can_be_distilled():
    torch.manual_seed(0)
    teacher = Prompted()
    s = sfd_minimal.Settings(steps=3, batch=8, guidance=1.5, lambda_anchor=0.5)
    state = sfd_minimal.begin(s, teacher)
    losses = list(sfd_minimal.distill(s, sfd_minimal.about_labels(s, teacher, [0], [2]), teacher, **state))
    assert len(losses) == 3 and all(torch.isfinite(v) for terms in losses for v in terms.values())
    assert not torch.equal(state["generator"].net.weight, teacher.net.weight)
    assert not any(p.requires_grad for p in state["average"].parameters()), "it would keep the graph of every step"


def test_a_run_that_diverges_says_where(unjudged, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(RunFailed, match=r"(L_\w+ is .* at step|weights of \w+ are not finite after step) \d+.*--?l"):
        sfd_minimal.main([*BASE, *unjudged, "--out", str(out), "--steps", "200", "--lr", "1e30", "--lr-fake", "1e30",
                          "--save-every", "0.01"])
    if (out / "checkpoint.pt").exists():
        for name, part in weights(out)[1].items():
            if "optimizer" not in name:
                assert all(torch.isfinite(v).all() for v in part.values()), (
                    f"{name} was saved although it is not finite")


def test_teacher_training_resumes(tmp_path, monkeypatch):
    recipe = train_teacher.TEACHERS["images"]
    small = dataclasses.replace(recipe["net"], model_channels=16)
    monkeypatch.setitem(train_teacher.TEACHERS, "images", recipe | {"net": small})
    folder = image_folder(tmp_path / "images of two kinds", "ab", 12, 8)
    base = ["--data", str(folder), "--batch", "4", "--seed", "3", "--steps", "6", "--warmup", "2", "--device", "cpu"]
    train_teacher.main([*base, "--out", str(tmp_path / "whole")])
    with stopped_after(3):
        train_teacher.main([*base, "--out", str(tmp_path / "cut"), "--save-every", "1e-9"])
    assert weights(tmp_path / "cut")[0] == 3
    train_teacher.main([*base, "--out", str(tmp_path / "cut"), "--resume"])
    assert_same(weights(tmp_path / "whole")[1], weights(tmp_path / "cut")[1])
    assert (tmp_path / "cut" / "samples.png").exists() and (tmp_path / "cut" / "teacher.pt").exists()
