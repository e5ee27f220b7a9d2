"""Training survives Ctrl-C, SIGTERM, kill -9 and a full disk, and --resume gives the same weights, bit for bit."""
import dataclasses
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import edm_unet
import lab.core.runs
import lab.distill
import lab.prompts.train_teacher
import sfd_minimal
import train_teacher
from conftest import ROOT, assert_same, image_folder, save_network, tiny_network
from edm_unet import BadInput, RunFailed, Stopped, load_file, load_network, save_checkpoint, save_file
from lab.core.runs import Run
from lab.prompts.network import PromptSettings

SMALL = tiny_network().settings


@pytest.fixture
def here(tmp_path, monkeypatch, unevaluated):
    """An empty folder to work in, and presets that take no time."""
    monkeypatch.chdir(tmp_path)
    for name in ("mnist", "own images"):
        monkeypatch.setitem(train_teacher.PRESETS, name, (SMALL, False, dict(warmup=2)))
    return tmp_path


@pytest.fixture
def sfd(tiny, here):
    """The options of a short run of sfd_minimal.py."""
    return ["--forget", "0", "--to", "1", "--teacher", str(tiny), "--batch", "4", "--device", "cpu", "--steps", "6"]


@pytest.fixture
def teacher(mnist_dir, here):
    """The options of a short run of train_teacher.py."""
    return ["--data-dir", str(mnist_dir), "--batch", "4", "--device", "cpu", "--steps", "6"]


def parts(out):
    """Networks, optimizers and random states in the checkpoint of a run, and its number of steps."""
    saved = load_file(Path(out) / "checkpoint.pt")
    return saved["parts"], saved["random"], saved["step"]


class Clock:
    """A clock that moves on by a minute with each look, so that every step is saved."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 60
        return self.now


def stop_after(module, steps, monkeypatch, stop=signal.SIGINT):
    """Let the next run of a command be stopped by a signal right after it has saved that many steps."""
    def save_and_stop(path, step, *rest):
        save_checkpoint(path, step, *rest)
        if step == steps:
            os.kill(os.getpid(), stop)

    monkeypatch.setattr(module, "time", Clock())
    monkeypatch.setattr(module, "save_checkpoint", save_and_stop)


# ----------------------------------------------------------------------------------------------------- the same bits

def test_a_stopped_run_of_sfd_resumes_to_the_same_bits(sfd, monkeypatch):
    sfd_minimal.main([*sfd, "--out", "whole"])
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(sfd_minimal, 3, patch)
        sfd_minimal.main([*sfd, "--out", "cut"])
    assert parts("cut")[2] == 3 and not Path("cut/generator.pt").exists()
    sfd_minimal.main([*sfd, "--out", "cut", "--resume"])
    assert_same(parts("whole"), parts("cut"))
    for name in ("generator.pt", "both.pt"):
        assert_same(load_file(f"whole/{name}")["weights"], load_file(f"cut/{name}")["weights"])
    assert Path("whole/samples.png").read_bytes() == Path("cut/samples.png").read_bytes()
    sfd_minimal.main([*sfd, "--out", "cut", "--resume"])  # a run that is at its end is drawn and saved again
    assert_same(parts("whole"), parts("cut"))


def test_a_stopped_second_stage_resumes_to_the_same_bits(sfd, monkeypatch):
    first = ["none" if word == "0" else word for word in sfd if word not in ("--to", "1")]
    sfd_minimal.main([*first, "--out", "first"])
    sfd += ["--init-from", "first/both.pt"]
    sfd_minimal.main([*sfd, "--out", "whole"])
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(sfd_minimal, 2, patch)
        sfd_minimal.main([*sfd, "--out", "cut"])
    sfd_minimal.main([*sfd, "--out", "cut", "--resume"])
    assert_same(parts("whole"), parts("cut"))
    start, start_of_fake = load_file("first/both.pt")["weights"], load_file("first/both.pt")["fake"]
    n = sfd_minimal.begin(load_network("first/generator.pt")[0], sfd_minimal.Settings(),
                          *sfd_minimal.load_start("first/both.pt", tiny_network(), sfd_minimal.Settings()))
    assert_same({k: v.half() for k, v in n.generator.state_dict().items()}, start)
    assert_same({k: v.half() for k, v in n.fake.state_dict().items()}, start_of_fake)


def test_the_training_of_a_teacher_resumes_to_the_same_bits(teacher, monkeypatch):
    train_teacher.main([*teacher, "--out", "whole"])
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(train_teacher, 3, patch)
        train_teacher.main([*teacher, "--out", "cut"])
    assert parts("cut")[2] == 3
    train_teacher.main([*teacher, "--out", "cut", "--resume"])
    assert_same(parts("whole"), parts("cut"))
    assert_same(load_file("whole/teacher.pt")["weights"], load_file("cut/teacher.pt")["weights"])


def test_the_same_seed_gives_the_same_weights(sfd, teacher):
    for main, options, name in ((sfd_minimal.main, sfd, "generator.pt"), (train_teacher.main, teacher, "teacher.pt")):
        weights = []
        for out, seed in (("a", 0), ("b", 0), ("c", 1)):
            main([*options, "--out", f"{name} {out}", "--seed", str(seed)])
            weights.append(load_file(Path(f"{name} {out}") / name)["weights"])
        assert_same(weights[0], weights[1])
        assert any(not torch.equal(v, weights[2][k]) for k, v in weights[0].items())


def distilled(tiny, out, **changes):
    """A run of lab.distill in the folder `out`."""
    teacher, info = load_network(tiny)
    s = lab.distill.Settings(**{"steps": 6, "batch": 4, "out": out, "device": "cpu", **changes})
    lab.distill.train(s, teacher, info, [0], [1])


def test_lab_distill_without_its_options_is_sfd_minimal(sfd, tiny):
    sfd_minimal.main([*sfd, "--out", "a"])
    distilled(tiny, "b")
    assert_same(parts("a"), parts("b"))
    assert_same(load_file("a/both.pt")["fake"], load_file("b/both.pt")["fake"])


def test_a_run_with_an_anchor_resumes_to_the_same_bits(sfd, tiny, monkeypatch):
    """The anchor is the start, not what has been trained when the run was stopped."""
    sfd_minimal.main([*sfd, "--out", "first"])
    options = dict(init_from="first/both.pt", lambda_anchor=3.0, forget_share=0.5, guidance=2.0)
    distilled(tiny, "whole", **options)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        save = Run.save

        def save_and_stop(run):
            save(run)
            if run.step == 3:
                raise Stopped

        patch.setattr(Run, "save", save_and_stop)
        patch.setattr(lab.core.runs, "SAVING_SHARE", 0)
        distilled(tiny, "cut", save_every=1e-9, **options)
    assert parts("cut")[2] == 3
    distilled(tiny, "cut", resume=True, **options)
    assert_same(parts("whole"), parts("cut"))


# ---------------------------------------------------------------------------------------------------- kill -9, Ctrl-C

KILLER = textwrap.dedent("""
    import os, signal, sys
    from types import SimpleNamespace
    import torch, torchvision.datasets, torchvision.utils
    import conftest, edm_unet, lab.core.runs, sfd_minimal, test_runs, train_teacher

    def die(*args, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    def save_half_and_die(content, f):
        save(content, f)
        f.flush()
        f.truncate(f.tell() // 2)
        die()

    def rename_and_die(old, new):
        replace(old, new)
        die()

    def second_call(kill, otherwise):  # the first call is let through, so that each life gets a step further
        calls = []
        def called(*args, **options):
            calls.append(1)
            return kill(*args, **options) if len(calls) == 2 else otherwise(*args, **options)
        return called

    save, replace, fsync = torch.save, os.replace, os.fsync
    points = {"half-written": (torch, "save", save_half_and_die, save), "before fsync": (os, "fsync", die, fsync),
              "before rename": (os, "replace", die, replace), "after rename": (os, "replace", rename_and_die, replace)}
    sys.modules["lab.evaluate"] = SimpleNamespace(evaluate_run=lambda *args, **options: None)
    train_teacher.PRESETS["mnist"] = (test_runs.SMALL, False, dict())
    sfd_minimal.time = train_teacher.time = test_runs.Clock()
    lab.core.runs.SAVING_SHARE = 0
    mains = {"sfd_minimal": sfd_minimal.main, "train_teacher": train_teacher.main, "lab.core.runs": test_runs.plain_run}
    main, argv = mains[sys.argv[1]], sys.argv[2:]
    for point in ["", *points, ""]:
        pid = os.fork()  # torch is imported and no thread has started: six lives in the time of one import
        if pid == 0:
            out = "killed"
            if point:
                module, name, kill, otherwise = points[point]
                setattr(module, name, second_call(kill, otherwise))
            elif not os.path.exists("whole"):
                out = "whole"
            resume = ["--resume"] if os.path.exists(os.path.join(out, "checkpoint.pt")) else []
            main([*argv, "--out", out, *resume])
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        partial = os.path.exists("killed/checkpoint.pt.partial")
        print(point, "ended with", status, "and a partial file" if partial else "", flush=True)
""")


def plain_run(argv):
    """A program that trains a tiny network with lab.core.runs.Run. Its options: --out FOLDER, and --resume or not."""
    torch.manual_seed(0)
    network = torch.nn.Linear(4, 4)
    state = {"network": network, "optimizer": torch.optim.Adam(network.parameters(), 1e-2)}
    run = Run(plain_settings(argv[1], resume="--resume" in argv), state)
    for _ in run.steps(plain_training(run.step, **state)):
        pass


def plain_settings(out, **changes):
    @dataclasses.dataclass
    class Settings(lab.core.runs.RunSettings):
        steps: int = 12

    return Settings(**{"out": str(out), "save_every": 1e-9, **changes})


def plain_training(first, network, optimizer):
    for _ in range(first, 12):
        loss = network(torch.randn(8, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield {"loss": loss.detach()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to live six times in the time of one import")
@pytest.mark.parametrize("name", ["sfd_minimal", "train_teacher", "lab.core.runs"])
def test_kills_at_every_point_of_a_save_change_no_bit(name, sfd, teacher, tmp_path):
    options = {"sfd_minimal": sfd, "train_teacher": teacher, "lab.core.runs": []}[name]
    options += ["--steps", "12"] if options else []
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run([sys.executable, "-c", KILLER, name, *options], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ended with 9") == 4 and done.stdout.count("ended with 0") == 2, done.stdout + done.stderr
    assert done.stdout.count("partial file") == 3, done.stdout  # a life that dies before its rename leaves one
    assert parts("whole")[2] == 12
    assert_same(parts("whole"), parts("killed"))


FAST_CLOCK = """
import time
real = time.monotonic

def monotonic():
    return 3000 * real()

time.monotonic = monotonic  # half a minute, after which a run is saved, is 10 milliseconds
"""


@pytest.fixture
def installed(tmp_path, tiny):
    """A folder with sfd_minimal.py, edm_unet.py and a teacher, where the clock runs fast."""
    folder = tmp_path / "my project"
    folder.mkdir()
    for name in ("edm_unet.py", "sfd_minimal.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copy(tiny, folder / "tiny.pt")
    (folder / "sitecustomize.py").write_text(FAST_CLOCK)
    return folder


def saved_steps(out):
    return load_file(out / "checkpoint.pt")["step"] if (out / "checkpoint.pt").exists() else 0


def started(words, folder):
    """A process of the command, in the folder, that has trained and saved since its start."""
    out = folder / "my run"
    before = saved_steps(out)
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    process = subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PATH": search, "PYTHONPATH": str(folder)})
    while saved_steps(out) == before:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT and SIGTERM")
def test_the_real_command_survives_ctrl_c_and_sigterm(installed, here, monkeypatch):
    """The last line names the command that goes on, which works as it stands, in a folder with a space."""
    options = ["--teacher", "tiny.pt", "--to", "1", "--batch", "4", "--steps", "60", "--device", "cpu", "--out"]
    words = ["python", "sfd_minimal.py", *options, "my run"]
    for stop in (signal.SIGINT, signal.SIGTERM):
        process = started(words, installed)
        process.send_signal(stop)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in err, err
        words = shlex.split(err.strip().splitlines()[-1].split("to go on: ")[1])
    monkeypatch.chdir(installed)
    sfd_minimal.main(words[2:])
    sfd_minimal.main([*options, "whole"])
    assert_same(parts("whole"), parts("my run"))


@pytest.fixture
def as_program(monkeypatch):
    """Run a main(argv) as the program of that name: (exit code, last line on stderr). Signals are put back at the end.
    """
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}

    def finished(main, name, argv, capsys):
        monkeypatch.setattr(sys, "argv", [name, *argv])
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
        with pytest.raises(SystemExit) as stop:
            edm_unet.command(main)
        return stop.value.code, capsys.readouterr().err.strip().splitlines()[-1]

    yield finished
    for which, handler in handlers.items():
        signal.signal(which, handler)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["sfd_minimal.py", "train_teacher.py"])
def test_a_stop_names_the_command_that_goes_on(name, stop, sfd, teacher, as_program, monkeypatch, capsys):
    module, argv = {"sfd_minimal.py": (sfd_minimal, sfd), "train_teacher.py": (train_teacher, teacher)}[name]
    argv += ["--out", "it's mine"]
    with monkeypatch.context() as patch:
        stop_after(module, 2, patch, stop)
        code, line = as_program(module.main, name, argv, capsys)
    assert code == 130 and shlex.split(line.split("to go on: ")[1]) == ["python", name, *argv, "--resume"]
    assert parts("it's mine")[2] == 2


def test_a_module_is_named_as_a_module(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/path/lab/audit/__main__.py", "my run", "--resume"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="lab.audit.__main__"))
    assert edm_unet.resume_command() == "python -m lab.audit 'my run' --resume"
    monkeypatch.setattr(os, "name", "nt")
    assert edm_unet.resume_command() == 'python -m lab.audit "my run" --resume'


@pytest.mark.parametrize("name", ["sfd_minimal.py", "train_teacher.py"])
def test_a_stop_after_training_names_the_command_too(name, sfd, teacher, as_program, monkeypatch, capsys):
    """The last pictures take seconds, and the evaluation takes longer: a run stopped there can go on as well."""
    module, argv = {"sfd_minimal.py": (sfd_minimal, sfd), "train_teacher.py": (train_teacher, teacher)}[name]

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_images", stopped)
    code, line = as_program(module.main, name, [*argv, "--out", "run"], capsys)
    assert code == 130 and "--resume" in line


def test_ctrl_c_in_the_middle_of_a_save_is_ctrl_c(tmp_path, monkeypatch):
    """torch reports whatever stops its writing as a RuntimeError, as a full disk does."""
    class Interrupted(io.BufferedWriter):
        def write(self, data):
            if self.tell() > 100:
                raise KeyboardInterrupt
            return super().write(data)

    save_file(tmp_path / "a.pt", {"weights": torch.zeros(3)})
    before = (tmp_path / "a.pt").read_bytes()
    monkeypatch.setattr(edm_unet, "open", lambda path, mode: Interrupted(io.FileIO(path, mode)), raising=False)
    with pytest.raises(KeyboardInterrupt):
        save_file(tmp_path / "a.pt", {"weights": torch.ones(3)})
    assert (tmp_path / "a.pt").read_bytes() == before


# ----------------------------------------------------------------------------------------- what must not be resumed

@pytest.mark.parametrize("changed, word", [
    (["--alpha", "1.2"], "alpha"), (["--lr", "1e-5"], "lr"), (["--forget", "2"], "forget"), (["--to", "3"], "to"),
    (["--teacher", "other.pt"], "teacher"), (["--init-from", "run/both.pt"], "init_from")])
def test_a_run_of_sfd_is_not_resumed_as_another(changed, word, sfd):
    sfd_minimal.main([*sfd, "--out", "run"])
    content = load_file(sfd[sfd.index("--teacher") + 1])
    save_file("other.pt", {**content, "weights": {k: v + 1e-3 for k, v in content["weights"].items()}})
    before = Path("run/checkpoint.pt").read_bytes()
    with pytest.raises(BadInput, match=f"{word} was .* and is "):
        sfd_minimal.main([*sfd, "--out", "run", "--resume", *changed])
    assert Path("run/checkpoint.pt").read_bytes() == before


def test_a_teacher_is_not_resumed_on_other_images(here):
    image_folder(here / "mine", ["ant", "bee"], 20, 16)
    argv = ["--data", "mine", "--steps", "2", "--batch", "4", "--device", "cpu", "--out", "run"]
    train_teacher.main(argv)
    with pytest.raises(BadInput, match="lr was 0.002 and is 0.1"):
        train_teacher.main([*argv, "--resume", "--lr", "0.1"])
    (here / "mine" / "ant").rename(here / "mine" / "cow")
    with pytest.raises(BadInput, match="ant.*cow"):
        train_teacher.main([*argv, "--resume"])
    (here / "mine" / "cow").rename(here / "mine" / "ant")
    (here / "mine" / "ant" / "7.png").unlink()
    with pytest.raises(BadInput, match="images was .*18.* and is .*17"):
        train_teacher.main([*argv, "--resume"])


def test_a_run_of_sfd_goes_on_however_its_labels_and_files_are_spelled(sfd, tiny, here):
    network, names = load_network(tiny)[0], [f"{k} - {name}" for k, name in enumerate("zero one two three".split())]
    save_network(network, here / "a teacher" / "teacher.pt", classes=names + [str(k) for k in range(4, 10)])
    sfd[sfd.index("--teacher") + 1] = "a teacher/teacher.pt"
    sfd_minimal.main([*sfd, "--out", "first"])
    sfd_minimal.main([*sfd, "--init-from", "first/both.pt", "--out", "run"])
    before = parts("run")
    Path("a teacher").rename("moved")
    Path("first").rename("elsewhere")
    sfd_minimal.main(["--forget", "Zero", "--to", "one", *sfd[4:], "--teacher", "./moved/../moved/teacher.pt",
                      "--init-from", "./elsewhere/both.pt", "--out", "./run/", "--resume"])
    assert_same(before, parts("run"))


def test_a_run_of_lab_distill_goes_on_however_its_labels_and_data_are_spelled(tiny, here, monkeypatch):
    monkeypatch.setattr(lab.distill.Evaluator, "find", lambda *args: None)
    names = [f"{k} - {name}" for k, name in enumerate("zero one two three".split())] + [str(k) for k in range(4, 10)]
    save_network(load_network(tiny)[0], here / "runs" / "mine-teacher" / "teacher.pt", classes=names, data="mine")
    argv = ["--steps", "2", "--batch", "4", "--device", "cpu", "--out", "run"]
    lab.distill.main(["--data", "mine", "--forget", "0", "--to", "1", *argv])
    before = parts("run")
    for data, forget, to in (("./mine/", "zero", "One"), ("../mine", "Zero", "1")):
        lab.distill.main(["--data", data, "--forget", forget, "--to", to, *argv, "--resume"])
        assert_same(before, parts("run"))
    for forget, to, word in (("2", "1", r"forget was \[0\] and is \[2\]"), ("0", "3", r"to was \[1\] and is \[3\]")):
        with pytest.raises(BadInput, match=word):
            lab.distill.main(["--data", "mine", "--forget", forget, "--to", to, *argv, "--resume"])


def test_the_training_of_a_teacher_goes_on_however_its_images_are_spelled(here):
    image_folder(here / "mine", ["ant", "bee"], 4, 16)
    argv = ["--steps", "2", "--batch", "4", "--device", "cpu", "--out", "run"]
    train_teacher.main(["--data", "mine", "--steps", "1", "--batch", "4", "--device", "cpu", "--out", "first"])
    train_teacher.main(["--data", "mine", *argv, "--init-from", "first/teacher.pt"])
    before = parts("run")
    (here / "mine").rename(here / "moved")
    for spelled in ("moved", "moved/", "./moved", "../" + here.name + "/moved/", str(here / "moved")):
        train_teacher.main(["--data", spelled, *argv, "--init-from", "./first/teacher.pt", "--resume"])
        assert_same(before, parts("run"))


@pytest.fixture
def prompts(mnist_dir, here, monkeypatch):
    """The options of a short run of lab.prompts.train_teacher."""
    small = PromptSettings(channels=3, patch=4, model_channels=16, channel_mult=(1,), num_blocks=1)
    monkeypatch.setattr(lab.prompts.train_teacher, "NET", small)
    monkeypatch.setattr(lab.prompts.train_teacher, "save_images", lambda *args: None)  # draws 60 images in 35 steps
    monkeypatch.setattr(lab.prompts.train_teacher, "heun_sampler", lambda *args: None)
    return ["--data-dir", str(mnist_dir), "--batch", "4", "--device", "cpu", "--steps", "2"]


def test_a_teacher_of_prompts_goes_on_however_its_start_is_spelled(prompts):
    lab.prompts.train_teacher.main([*prompts, "--out", "first"])
    lab.prompts.train_teacher.main([*prompts, "--out", "run", "--init-from", "first/teacher.pt"])
    before = parts("run")
    Path("first").rename("moved")
    for spelled in ("moved/teacher.pt", "./moved/", "moved"):
        lab.prompts.train_teacher.main([*prompts, "--out", "run", "--init-from", spelled, "--resume"])
        assert_same(before, parts("run"))
    with pytest.raises(BadInput, match="init_from was .* and is "):
        lab.prompts.train_teacher.main([*prompts, "--out", "run", "--init-from", "run", "--resume"])


def lose_setting(out, name):
    """Make the checkpoint of a run one of an earlier version of the code, which had no setting of that name."""
    saved = load_file(f"{out}/checkpoint.pt")
    del saved["settings"][name]
    save_file(f"{out}/checkpoint.pt", saved)


def test_a_setting_that_an_earlier_version_lacked_was_its_default(sfd, teacher, here):
    train_teacher.main([*teacher, "--out", "run"])
    lose_setting("run", "label_drop")
    train_teacher.main([*teacher, "--out", "run", "--resume"])
    with pytest.raises(BadInput, match="label_drop is 0.3, and the earlier version .* had no such setting"):
        train_teacher.main([*teacher, "--out", "run", "--resume", "--label-drop", "0.3"])

    sfd_minimal.main([*sfd, "--out", "sfd run"])
    lose_setting("sfd run", "alpha")
    sfd_minimal.main([*sfd, "--out", "sfd run", "--resume"])
    with pytest.raises(BadInput, match="alpha is 1.2, and the earlier version"):
        sfd_minimal.main([*sfd, "--out", "sfd run", "--resume", "--alpha", "1.2"])

    run = Run(plain_settings("plain"), {}, pinned={"teacher": "one"})
    run.save()
    lose_setting("plain", "seed")
    Run(plain_settings("plain", resume=True), {}, pinned={"teacher": "one"})
    with pytest.raises(BadInput, match="seed is 3, and the earlier version"):
        Run(plain_settings("plain", resume=True, seed=3), {}, pinned={"teacher": "one"})
    with pytest.raises(BadInput, match="teacher was 'one', and this version has no such setting"):
        Run(plain_settings("plain", resume=True), {})


def test_a_folder_that_is_there_is_refused(sfd, teacher):
    """Without --resume any folder, and with it a folder that has no checkpoint."""
    Path("run").mkdir()
    for main, argv in ((sfd_minimal.main, sfd), (train_teacher.main, teacher)):
        for options, word in (([], "--resume"), (["--resume"], "checkpoint")):
            with pytest.raises(BadInput, match=word):
                main([*argv, "--out", "run", *options])
            assert not list(Path("run").iterdir())


def test_a_checkpoint_of_other_code_is_refused(sfd):
    sfd_minimal.main([*sfd, "--out", "run"])
    saved = load_file("run/checkpoint.pt")
    del saved["parts"]["average"]
    for content in (saved, {"step": 3}):
        save_file("run/checkpoint.pt", content)
        with pytest.raises(BadInput, match="version"):
            sfd_minimal.main([*sfd, "--out", "run", "--resume"])


@pytest.mark.parametrize("name", ["sfd_minimal", "train_teacher", "lab.prompts.train_teacher", "lab.core.runs"])
def test_of_two_runs_that_begin_in_one_folder_one_is_refused(name, sfd, teacher, prompts, monkeypatch):
    """Both find no folder, and then both make it."""
    both, mkdir, errors = threading.Barrier(2), Path.mkdir, []

    def mkdir_at_once(path, *args, **options):
        if path.name == "run":
            both.wait(timeout=20)
        mkdir(path, *args, **options)

    def plain(argv):
        Run(plain_settings("run"), {"network": torch.nn.Linear(1, 1)})

    programs = {"sfd_minimal": (sfd_minimal.main, sfd), "train_teacher": (train_teacher.main, teacher),
                "lab.prompts.train_teacher": (lab.prompts.train_teacher.main, prompts), "lab.core.runs": (plain, [])}

    def main():
        program, argv = programs[name]
        try:
            program([*argv, "--out", "run"])
        except Exception as e:
            errors.append(e)

    monkeypatch.setattr(Path, "mkdir", mkdir_at_once)
    threads = [threading.Thread(target=main) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(e) for e in errors] == [BadInput] and Path("run/checkpoint.pt").exists()


# ------------------------------------------------------------------------------------------------------ bad endings

def assert_finite(out):
    for part in parts(out)[0].values():
        if "state" not in part:  # a network
            assert all(torch.isfinite(v).all() for v in part.values())


def test_a_run_that_diverges_stops_with_its_last_good_checkpoint(sfd, teacher, monkeypatch):
    for module, argv in ((sfd_minimal, [*sfd, "--lr-fake", "1e30"]), (train_teacher, teacher)):
        with monkeypatch.context() as patch, pytest.raises(RunFailed, match=r"step \d"):
            patch.setattr(module, "time", Clock())
            module.main([*argv, "--steps", "200", "--lr", "1e30", "--out", f"{module.__name__} run"])
        assert_finite(f"{module.__name__} run")
        assert not Path(f"{module.__name__} run/samples.png").exists()


def test_a_loss_that_is_not_finite_stops_the_run_at_once(sfd, monkeypatch):
    step, terms = sfd_minimal.sfd_step, []

    def sfd_step(*args):
        terms.append(step(*args))
        return {**terms[-1], "L_keep": torch.tensor(float("nan"))} if len(terms) == 4 else terms[-1]

    monkeypatch.setattr(sfd_minimal, "sfd_step", sfd_step)
    monkeypatch.setattr(sfd_minimal, "time", Clock())
    with pytest.raises(RunFailed, match="L_keep is nan at step 4"):
        sfd_minimal.main([*sfd, "--out", "run"])
    assert parts("run")[2] == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(value, tmp_path):
    network = torch.nn.Linear(2, 2)
    save_checkpoint(tmp_path / "checkpoint.pt", 1, 0.0, {}, {"network": network})
    before = (tmp_path / "checkpoint.pt").read_bytes()
    network.bias.data[1] = value
    with pytest.raises(RunFailed, match="network are not finite after step 2"):
        save_checkpoint(tmp_path / "checkpoint.pt", 2, 0.0, {}, {"network": network})
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    network = tiny_network()
    network.model.map_label.bias.data[0] = 1e6  # float16 has no such number
    with pytest.raises(RunFailed, match="float16"):
        edm_unet.pack(network, half=True)


def test_a_full_disk_leaves_the_last_checkpoint_whole(sfd, monkeypatch):
    resource = pytest.importorskip("resource", reason="needs a limit for the size of files")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(sfd_minimal, 3, patch)
        sfd_minimal.main([*sfd, "--out", "run"])
    before = Path("run/checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="checkpoint.pt"):
            sfd_minimal.main([*sfd, "--out", "run", "--resume"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path("run/checkpoint.pt").read_bytes() == before
    assert [path.name for path in Path("run").iterdir()] == ["checkpoint.pt"]


# ------------------------------------------------------------------------------------ the runs of lab: lab.core.runs

def losses(n=40):
    for _ in range(n):
        yield {"loss": torch.tensor(1.0)}


def test_ctrl_c_waits_for_the_end_of_the_step(here):
    """A run of lab saves when it is stopped, and resumes to the same bits, with the log that it had."""
    handler = signal.getsignal(signal.SIGINT)
    plain_run(["--out", "whole"])
    network = torch.nn.Linear(4, 4)
    torch.manual_seed(0)
    network.reset_parameters()
    state = {"network": network, "optimizer": torch.optim.Adam(network.parameters(), 1e-2)}
    run = Run(plain_settings("cut", save_every=1e9), state)
    with pytest.raises(Stopped):
        for terms in run.steps(plain_training(0, **state)):
            run.log(terms)
            if run.step == 5:
                os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler
    assert parts("cut")[2] == 5 and len(Path("cut/log.csv").read_text().splitlines()) == 6
    plain_run(["--out", "cut", "--resume"])
    assert_same(parts("whole"), parts("cut"))
    assert len(Path("cut/log.csv").read_text().splitlines()) == 6


def test_a_run_of_lab_is_not_resumed_as_another(here):
    network = torch.nn.Linear(1, 1)
    Run(plain_settings("run"), {"network": network}, pinned={"teacher": "one"})
    with pytest.raises(BadInput, match="--resume"):
        Run(plain_settings("run"), {"network": network}, pinned={"teacher": "one"})
    with pytest.raises(BadInput, match="teacher was 'one' and is 'another'"):
        Run(plain_settings("run", resume=True), {"network": network}, pinned={"teacher": "another"})
    with pytest.raises(BadInput, match="steps was 12 and is 13"):
        Run(plain_settings("run", resume=True, steps=13), {"network": network}, pinned={"teacher": "one"})
    Run(plain_settings("run", resume=True, save_every=7.0), {"network": network}, pinned={"teacher": "one"})
    Path("a file").touch()
    with pytest.raises(BadInput, match="a file/run"):
        Run(plain_settings("a file/run"), {"network": network})


def test_a_run_of_lab_stops_at_a_loss_that_is_not_finite(here):
    run = Run(plain_settings("run", steps=40), {})
    with pytest.raises(RunFailed, match="loss is nan at step 4"):
        for terms in run.steps({"loss": torch.tensor(float("nan") if i == 3 else 1.0)} for i in range(40)):
            pass
    assert parts("run")[2] <= 3


def test_checkpoints_take_a_thirtieth_of_the_time_at_most(here, monkeypatch):
    saves, save = [], Run.save

    def slow_save(run):
        saves.append(run.step)
        time.sleep(0.02)
        save(run)

    def slow_training():
        for terms in losses():
            time.sleep(0.01)
            yield terms

    monkeypatch.setattr(Run, "save", slow_save)
    run = Run(plain_settings("run", steps=40), {})
    for _ in run.steps(slow_training()):
        pass
    assert saves[0] == 1 and saves[-1] == 40 and len(saves) <= 3, saves


def test_a_log_that_another_program_holds_open_ends_no_run(here, monkeypatch, capsys):
    replace = os.replace

    def held(old, new):
        if str(new).endswith("log.csv"):
            raise PermissionError(13, "the file is used by another process")
        replace(old, new)

    monkeypatch.setattr(os, "replace", held)
    run = Run(plain_settings("run", steps=40), {})
    for terms in run.steps(losses()):
        run.log(terms)
    assert run.step == 40 and parts("run")[2] == 40
    assert "log.csv" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ beside other programs

def noted(monkeypatch, capsys, durations, threads=2):
    """What watch_pace prints where the steps take these seconds."""
    clock = [0.0]
    monkeypatch.setattr(edm_unet.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    def training():
        for seconds in durations:
            clock[0] += seconds
            yield {"loss": torch.zeros(())}

    for _ in edm_unet.watch_pace(training()):
        clock[0] += 100.0  # the caller's own time, such as that of a checkpoint, does not count
    return capsys.readouterr().err


def test_steps_that_become_three_times_as_slow_bring_one_line_of_advice(monkeypatch, capsys):
    words = noted(monkeypatch, capsys, [0.4] * 10 + [1.8] * 20)
    assert words.count("\n") == 1 and "takes 1.80 s and took 0.40 s" in words and "OMP_NUM_THREADS=1" in words


@pytest.mark.parametrize("durations, threads", [([0.4] * 10 + [1.8, 1.8] + [0.4] * 10, 2),    # two slow steps
                                                ([5.0] + [0.4] * 10 + [1.0] * 10, 2),         # the first step is slow
                                                ([0.4] * 10 + [1.8] * 20, 1)])                # there is one thread
def test_a_steady_run_and_a_run_with_one_thread_get_no_advice(monkeypatch, capsys, durations, threads):
    assert noted(monkeypatch, capsys, durations, threads) == ""
