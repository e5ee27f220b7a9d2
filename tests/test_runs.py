"""Runs that survive: SIGKILL, Ctrl-C, a full disk, wrong settings; and the same numbers for the same seed."""
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

import common
import edm_unet
import sfd_minimal
import train_teacher
from PIL import Image
from conftest import ROOT, program

QUICK = ["--batch", "4", "--per-label", "2"]


def sfd(tiny, out, *more, **kw):
    return subprocess.run([*program("sfd_minimal.py"), "--forget", "0", "--to", "1", "--teacher", str(tiny),
                           "--out", str(out), *QUICK, *more], capture_output=True, text=True, **kw)


def weights(out):
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    return saved["step"], saved["parts"]


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
    save = common.Run.save

    def save_and_stop(run):
        save(run)
        if run.step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Run, "save", save_and_stop)
        yield


KILLER = textwrap.dedent("""
    import os, random, signal, sys, time
    import sfd_minimal, evaluate, common
    argv, kills = sys.argv[2:], int(sys.argv[1])
    random.seed(0)
    for i in range(kills + 1):
        pid = os.fork()  # torch imported and no thread started yet: twenty lives in the time of two imports
        if pid == 0:
            if os.path.exists(os.path.join(argv[argv.index("--out") + 1], "checkpoint.pt")):
                argv.append("--resume")
            sys.argv = ["sfd_minimal.py", *argv, *([] if "--resume" in argv else ["--overwrite"])]
            common.command(sfd_minimal.main)
            os._exit(0)
        if i < kills:
            checkpoint = os.path.join(argv[argv.index("--out") + 1], "checkpoint.pt")
            age = lambda: os.stat(checkpoint).st_mtime_ns if os.path.exists(checkpoint) else 0
            before = age()
            while age() == before:  # it lives, and has saved at least once
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.1))
            print("a save was under way" if os.path.exists(checkpoint + ".partial") else "", flush=True)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        print("life", i, "ended with", status, flush=True)
    sys.exit(os.waitstatus_to_exitcode(status))
""")


def test_a_run_leaves_the_teacher_as_it_was(tiny, tmp_path):
    s = sfd_minimal.Settings(teacher=str(tiny), out=str(tmp_path / "run"), batch=4, steps=3, forget=("0",), to=("1",))
    teacher, _, _ = sfd_minimal.load_teacher(s, torch.device("cpu"))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    _, average, fake = sfd_minimal.distil(s, [0], [1], teacher, torch.device("cpu"), lambda G: {})
    assert_same(teacher.state_dict(), before)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in fake.parameters())
    for model in (average, fake):
        assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_no_gpu_is_touched_by_an_import():
    code = ("import torch; torch.cuda.is_available = torch.cuda._lazy_init = lambda *a, **k: 1 / 0\n"
            "import sfd_minimal, train_teacher, evaluate, edm_unet, edm_pickle, common")
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to live twenty times in the time of two imports")
def test_twenty_kills_change_no_bit(tiny, tmp_path):
    steps = ["--steps", "250", "--save-every", "1e-9"]
    whole, killed = tmp_path / "whole", tmp_path / "killed often"
    assert sfd(tiny, whole, *steps).returncode == 0
    arguments = ["--forget", "0", "--to", "1", "--teacher", str(tiny), "--out", str(killed), *QUICK, *steps]
    done = subprocess.run([sys.executable, "-c", KILLER, "20", *arguments],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ended with 9") == 20 and "a save was under way" in done.stdout, done.stdout
    (step_a, parts_a), (step_b, parts_b) = weights(whole), weights(killed)
    assert step_a == step_b == 250
    assert_same(parts_a, parts_b)


def test_same_seed_same_metrics(tiny, tmp_path):
    results = []
    for name in "ab":
        assert sfd(tiny, tmp_path / name, "--steps", "3").returncode == 0
        text = (tmp_path / name / "metrics.json").read_text()
        results.append(re.sub(r'"(seconds|seconds_judging|images_per_second|out)": [^,\n]*', "", text))
    assert results[0] == results[1]
    assert sfd(tiny, tmp_path / "c", "--steps", "3", "--seed", "1").returncode == 0
    assert (json.loads((tmp_path / "c" / "metrics.json").read_text())["fd"]
            != json.loads((tmp_path / "a" / "metrics.json").read_text())["fd"])


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_ctrl_c_saves_and_says_how_to_go_on(tiny, tmp_path):
    out = tmp_path / "run"
    command = [*program("sfd_minimal.py"), "--teacher", str(tiny), "--out", str(out), *QUICK,
               "--steps", "100000", "--save-every", "0.1"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (out / "checkpoint.pt").exists():
            break
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "--resume" in err and "Traceback" not in err
    assert weights(out)[0] > 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_full_disk_keeps_the_last_checkpoint(tiny, tmp_path):
    out = tmp_path / "run"
    assert sfd(tiny, out, "--steps", "2").returncode == 0
    before = weights(out)
    limit = (out / "checkpoint.pt").stat().st_size // 2
    code = ("import resource, sys, common, sfd_minimal; "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); common.command(sfd_minimal.main)")
    (out / "metrics.json").unlink()
    edm_unet.save_atomically(torch.load(out / "checkpoint.pt", weights_only=True) | {"step": 1}, out / "checkpoint.pt")
    done = subprocess.run([sys.executable, "-c", code, "--forget", "0", "--to", "1", "--teacher", str(tiny),
                           "--out", str(out), *QUICK, "--steps", "2", "--resume"],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode == 1 and "could not write" in done.stderr and "unharmed" in done.stderr
            and "Traceback" not in done.stderr), done.stderr
    assert_same(weights(out)[1], before[1])
    assert not list(out.glob("*.partial"))


def test_resume_with_other_settings_is_refused(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    base = ["--teacher", str(tiny), "--out", str(out), *QUICK, "--steps", "2"]
    sfd_minimal.main(base)
    with pytest.raises(common.BadInput, match="alpha was 1.0 and is 1.2.*lr was"):
        sfd_minimal.main([*base, "--resume", "--alpha", "1.2", "--lr", "1e-5"])
    with pytest.raises(common.BadInput, match="holds a run already"):
        sfd_minimal.main(base)
    sfd_minimal.main([*base, "--overwrite"])


def test_resume_with_another_teacher_in_the_same_place_is_refused(tiny, tmp_path, capsys):
    out, teacher, base = tmp_path / "run", tmp_path / "teacher.pt", [*QUICK, "--steps", "2"]
    content = torch.load(tiny, weights_only=True)
    edm_unet.save_atomically(content, teacher)
    sfd_minimal.main(["--teacher", str(teacher), "--out", str(out), *base])
    edm_unet.save_atomically(content | {"weights": {k: v + 1e-3 for k, v in content["weights"].items()}}, teacher)
    with pytest.raises(common.BadInput, match="the teacher is another one"):
        sfd_minimal.main(["--teacher", str(teacher), "--out", str(out), *base, "--resume"])
    sfd_minimal.main(["--teacher", str(teacher), "--out", str(tmp_path / "from"), *base,
                      "--init-from", str(out / "both.pt")])
    assert "was distilled from another teacher" in capsys.readouterr().out
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    edm_unet.save_atomically(content, teacher)
    del saved["parts"]["generator"]["model.map_label.weight"]
    edm_unet.save_atomically(saved, out / "checkpoint.pt")
    with pytest.raises(common.BadInput, match="the generator in its checkpoint is of another shape"):
        sfd_minimal.main(["--teacher", str(teacher), "--out", str(out), *base, "--resume"])
    del saved["parts"]["teacher"]
    edm_unet.save_atomically(saved, out / "checkpoint.pt")
    with pytest.raises(common.BadInput, match="earlier version of this code, lacks teacher"):
        sfd_minimal.main(["--teacher", str(teacher), "--out", str(out), *base, "--resume"])


def test_a_second_stage_resumes_with_the_anchor_that_it_began_with(tiny, tmp_path):
    start = tmp_path / "first" / "both.pt"
    base = ["--teacher", str(tiny), *QUICK, "--steps", "4"]
    sfd_minimal.main([*base, "--forget", "none", "--out", str(start.parent)])
    base += ["--forget", "0", "--to", "1", "--init-from", str(start), "--forget-share", "0.5", "--lambda-anchor", "3"]
    sfd_minimal.main([*base, "--out", str(tmp_path / "whole")])
    with stopped_after(2):
        sfd_minimal.main([*base, "--out", str(tmp_path / "cut"), "--save-every", "1e-9"])
    content = torch.load(start, weights_only=True)
    edm_unet.save_atomically(content | {"weights": {k: v + 1e-3 for k, v in content["weights"].items()}}, start)
    sfd_minimal.main([*base, "--out", str(tmp_path / "cut"), "--resume"])
    assert_same(weights(tmp_path / "whole")[1], weights(tmp_path / "cut")[1])


def test_the_anchor_is_the_start_or_else_the_average(tiny, tmp_path, monkeypatch):
    """And there is none where its weight is zero, or where nothing is forgotten.
    Only the start's is frozen, and kept for resuming."""
    seen, step = [], sfd_minimal.sfd_step
    monkeypatch.setattr(sfd_minimal, "sfd_step", lambda *args: seen.append(args[-1]) or step(*args))
    teacher, out = edm_unet.load_checkpoint(tiny)[0].requires_grad_(False), str(tmp_path / "run")
    sfd_minimal.main(["--teacher", str(tiny), *QUICK, "--steps", "2", "--forget", "none", "--out", out])
    assert seen == [None, None]

    def anchor_of(**changed):
        s = sfd_minimal.Settings(forget=("0",), to=("1",), steps=2, batch=4,
                                 out=str(tmp_path / "again"), overwrite=True, **changed)
        _, average, _ = sfd_minimal.distil(s, [0], [1], teacher, torch.device("cpu"), lambda G: {})
        return seen[-1], average, "anchor" in weights(tmp_path / "again")[1]

    anchor, average, kept = anchor_of()
    assert anchor is average and not kept
    anchor, average, kept = anchor_of(init_from=f"{out}/both.pt")
    assert kept and all(torch.equal(v, w) for v, w in zip(
        anchor.state_dict().values(), edm_unet.load_checkpoint(f"{out}/both.pt")[0].state_dict().values()))
    assert any(not torch.equal(v, w) for v, w in zip(anchor.parameters(), average.parameters()))
    assert anchor_of(lambda_anchor=0.0)[0] is None


def test_a_run_that_diverges_says_where(tiny, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(common.RunFailed, match=r"L_\w+ is .* at step \d+.*--lr"):
        sfd_minimal.main(["--teacher", str(tiny), "--out", str(out), *QUICK, "--steps", "200",
                          "--lr", "1e30", "--lr-fake", "1e30", "--save-every", "0.01"])
    if (out / "checkpoint.pt").exists():
        for name, part in weights(out)[1].items():
            if "optimizer" not in name and name != "teacher":
                assert all(torch.isfinite(v).all() for v in part.values()), (
                    f"{name} was saved although it is not finite")


def test_teacher_training_resumes(tmp_path):
    folder = tmp_path / "images of two kinds"
    for k, label in enumerate("ab"):
        (folder / label).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (8, 8), (120 * k, 20 * i, 90)).save(folder / label / f"{i}.png")
    base = ["--data", str(folder), "--batch", "4", "--seed", "3", "--steps", "6", "--warmup", "2"]
    train_teacher.main([*base, "--out", str(tmp_path / "whole")])
    with stopped_after(3):
        train_teacher.main([*base, "--out", str(tmp_path / "cut"), "--save-every", "1e-9"])
    assert weights(tmp_path / "cut")[0] == 3
    train_teacher.main([*base, "--out", str(tmp_path / "cut"), "--resume"])
    assert_same(weights(tmp_path / "whole")[1], weights(tmp_path / "cut")[1])
    assert (tmp_path / "cut" / "samples.png").exists() and (tmp_path / "cut" / "teacher.pt").exists()
