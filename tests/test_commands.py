"""Each command does what its help says, and ends what a user got wrong in one line with exit code 2."""
import argparse
import dataclasses
import importlib
import io
import json
import os
import pickle
import runpy
import shlex
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

import edm_unet
import lab.distill
import sfd_minimal
import train_teacher
from conftest import CPU, ROOT, image_folder, module, run, save_network, tiny_network
from edm_unet import BadInput, digest, load_file, load_network, pack, save_file
from lab.core.files import load_teacher
from lab.core.options import check_ranges, given_options
from lab.evaluate.evaluator import Evaluator

MNIST = load_file(ROOT / "teachers" / "mnist.pt")["classes"]
PACKAGES = ("lab.audit", "lab.baselines", "lab.evaluate", "lab.prompts")
PROGRAMS = ["sfd_minimal", "train_teacher", "lab.distill", "lab.sample", "lab.judge", "lab.fid", "lab.evaluate",
            "lab.baselines", "lab.baselines.grid", "lab.audit", "lab.prompts", "lab.prompts.train_teacher",
            "lab.prompts.sample", "lab.prompts.compare", "lab.report", "lab.readme", "lab.movie"]


def program_module(name):
    """The module that `python name.py` or `python -m name` runs."""
    return importlib.import_module(f"{name}.__main__" if name in PACKAGES else name)


@pytest.fixture(autouse=True)
def signals_are_put_back():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


# ----------------------------------------------------------------------------------------------- one line, exit code 2

class RunsCode:
    def __reduce__(self):
        return (open, ("code-ran", "w"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with every kind of file that is not what it should be."""
    folder = tmp_path_factory.mktemp("bad files")
    own, wide, for_mnist = tiny_network(8, patch=2), tiny_network(8, patch=2, model_channels=32), tiny_network()
    packed = pack(own)

    def save(name, network=own, **entries):
        save_network(network, folder / name, **entries)

    save("good.pt")
    (folder / "empty.pt").touch()
    (folder / "truncated.pt").write_bytes((folder / "good.pt").read_bytes()[:2000])
    (folder / "text.pt").write_text("not a network")
    (folder / "hostile.pt").write_bytes(pickle.dumps(RunsCode()))
    torch.save({"weights": RunsCode()}, folder / "hostile-zip.pt")
    torch.save([1, 2, 3], folder / "list.pt")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.pt")
    else:
        (folder / "pipe.pt").mkdir()
    save_file(folder / "no-net.pt", {"data": "mnist"})
    changes = {"absurd": {"model_channels": 10 ** 9}, "misfit": {"num_blocks": 31}, "blocks": {"num_blocks": 10 ** 9},
               "setting": {"colour": "blue"}, "word": {"num_blocks": "many"}, "huge": {"model_channels": 10 ** 30}}
    for name, change in changes.items():
        save(f"{name}.pt", net={**packed["net"], **change})
    save("weights.pt", weights={name: "no tensor" for name in packed["weights"]})
    save("few-classes.pt", classes=["a", "b"])
    save("generator.pt", sigma_init=2.5)
    save("teacher.pt", for_mnist)
    save("other-teacher.pt", for_mnist, seconds=1.0)
    both = {"fake": pack(for_mnist)["weights"], "sigma_init": 2.5}
    save("other-fake.pt", for_mnist, **{**both, "fake": packed["weights"]})
    save("other-net.pt", **{**both, "fake": packed["weights"]})
    save("other-sigma.pt", for_mnist, **{**both, "sigma_init": 1.0})
    save("no-sigma.pt", for_mnist, fake=both["fake"])
    save("method/generator.pt", settings={"method": "esd"}, teacher_sha256="")
    save("moved/generator.pt", for_mnist, sigma_init=2.5, forget=[0], to=[9], settings={"teacher": "/nowhere/gone.pt"},
         teacher_sha256=digest(folder / "teacher.pt"))
    (folder / "a-file").touch()
    image_folder(folder / "one-class", "a", 12, 8)
    image_folder(image_folder(folder / "mixed", "a", 12, 8), "b", 12, 9)
    image_folder(folder / "broken", "ab", 12, 8)
    (folder / "broken" / "b" / "3.png").write_bytes(b"not an image")
    image_folder(folder / "oblong", "ab", 12, (9, 8))
    image_folder(folder / "odd", "ab", 3, 9)
    image_folder(folder / "small", "ab", 3, 8)
    image_folder(folder / "one-each", "ab", 1, 8)
    image_folder(image_folder(folder / "lonely", "a", 12, 8), "b", 1, 8)
    image_folder(folder / "split" / "train", "ab", 2, 8)
    image_folder(folder / "split" / "test", "ac", 2, 8)
    (folder / "no-images").mkdir()
    return folder


CASES = {  # program: [(options, where {} is the folder of bad files; a word that the message has)]
    "sfd_minimal": [
        ("--forget 10", "10"), ("--forget -1", "-1"), ("--forget nil", "nil"), ("--forget nil", "zero one two"),
        ("--forget \u00b2", "\u00b2"), ("--forget none 1", "none"), ("--forget", "--forget"),
        ("--forget 0 --to 10", "10"), ("--forget 0 --to 0", "--to"), ("--forget 0 1 --to 2 1", "--to"),
        ("--forget 0 1 2 --to 3 4", "--to"), ("--forget none --to 1", "--to"), ("--forget 3 3", "--forget"),
        ("--forget 3 three", "--forget"), ("--forget 0 1 2 3 4 5 6 7 8 9", "--forget"),
        ("--frobnicate 3", "--frobnicate"), ("--step 3", "--step"), ("3", "3"), ("--steps many", "many"),
        ("--steps 1.5", "1.5"), ("--steps 0", "steps"), ("--lr nan", "lr"), ("--lr -0.001", "-0.001"),
        ("--u-max 2", "u_max"), ("--ema 1", "ema"), ("--sigma-min 90", "sigma_min"), ("--seed -1", "seed"),
        ("--device cuda:99", "cuda:99"), ("--device abacus", "abacus"), ("--device meta", "meta"),
        ("--data letters", "letters"), ("--teacher {}/nowhere.pt", "nowhere.pt"), ("--teacher {}/pipe.pt", "pipe.pt"),
        ("--teacher {}/no-images", "no-images"), ("--teacher {}/empty.pt", "empty.pt"),
        ("--teacher {}/truncated.pt", "truncated.pt"), ("--teacher {}/text.pt", "text.pt"),
        ("--teacher {}/list.pt", "list.pt"), ("--teacher {}/hostile.pt", "hostile.pt"),
        ("--teacher {}/hostile-zip.pt", "hostile-zip.pt"), ("--teacher {}/no-net.pt", "classes"),
        ("--teacher {}/absurd.pt", "absurd.pt"), ("--teacher {}/misfit.pt", "misfit.pt"),
        ("--teacher {}/blocks.pt", "blocks.pt"), ("--teacher {}/setting.pt", "setting.pt"),
        ("--teacher {}/word.pt", "word.pt"), ("--teacher {}/huge.pt", "huge.pt"),
        ("--teacher {}/weights.pt", "weights.pt"), ("--teacher {}/few-classes.pt", "few-classes.pt"),
        ("--teacher {root}/teachers/mnist_judge.pt", "mnist_judge.pt"),
        ("--teacher {}/generator.pt", "generator.pt"), ("--init-from {}/nowhere.pt", "nowhere.pt"),
        ("--init-from {}/good.pt", "good.pt"), ("--init-from {}/other-net.pt", "other-net.pt"),
        ("--teacher {}/teacher.pt --init-from {}/other-fake.pt", "other-fake.pt"),
        ("--teacher {}/teacher.pt --init-from {}/other-sigma.pt", "other-sigma.pt"),
        ("--teacher {}/teacher.pt --init-from {}/no-sigma.pt", "no-sigma.pt"),
        ("--out {}", "--resume"), ("--out {}/a-file", "--resume"), ("--out {}/a-file/run", "a-file/run")],
    "train_teacher": [
        ("--data {}/nowhere", "nowhere"), ("--data {}/no-images", "no-images"), ("--data {}/a-file", "a-file"),
        ("--data {}/one-class", "one-class"), ("--data {}/mixed", "mixed"), ("--data {}/broken", "broken/b/3.png"),
        ("--data {}/oblong", "square"), ("--data {}/odd", "--size"), ("--data {}/one-each", "one-each"),
        ("--data {}/lonely", "lonely"), ("--data {}/split", "split"), ("--data {}/small --out {}/small/run", "small"),
        ("--data {}/small --size 0", "size"), ("--data {}/small --size -8", "size"), ("--size 32", "--size"),
        ("--data {}/small --out {}/a-file/run", "a-file/run"), ("--data {}/small --out {}/no-images", "--resume"),
        ("--data {}/small --init-from {}/good.pt", "good.pt"), ("--data {}/small --init-from {}/text.pt", "text.pt"),
        ("--judge", "--judge"), ("--steps 0", "steps"), ("--lr -1", "lr"), ("--ema 1.5", "ema"),
        ("--label-drop 1", "label_drop"), ("--p-std 0", "p_std"), ("--p-mean nan", "p_mean"),
        ("--guidance 0.5", "guidance"), ("--guidance inf", "guidance"), ("--guidance-below 4", "guidance"),
        ("--guidance 1.3 --guidance-below 0", "guidance_below"), ("--guidance 1.3 --label-drop 0", "label_drop")],
    "lab.distill": [
        ("--forget 10", "10"), ("--forget 0 --to 0", "--to"), ("--frobnicate 3", "--frobnicate"),
        ("--steps 0", "steps"), ("--lambda-anchor nan", "lambda-anchor"), ("--guidance 0.5", "--guidance"),
        ("--forget none --guidance 2", "--guidance"), ("--forget none --anchored", "--anchored"),
        ("--forget-share 1", "--forget-share"), ("--micro-batch -1", "--micro-batch"),
        ("--save-every 0", "--save-every"), ("--teacher {}/list.pt", "list.pt"),
        ("--init-from {}/good.pt", "good.pt"), ("--out {}", "--resume"), ("--out {}/a-file/run", "a-file/run"),
        ("--data {}/small --teacher {}/teacher.pt", "teacher.pt"), ("--data fashion_mnist", "fashion_mnist")],
    "lab.sample": [
        ("", "file"), ("{}/good.pt", "--out"), ("{}/nowhere.pt --out x.png", "nowhere.pt"),
        ("{}/good.pt --label 10 --out x.png", "10"), ("{}/good.pt --n 0 --out x.png", "--n"),
        ("{}/good.pt --seed -1 --out x.png", "--seed"), ("{}/good.pt --out {}", "bad files"),
        ("{}/list.pt --out x.png", "list.pt"), ("{}/generator.pt --n 1 --out {}/a-file/x.png", "a-file/x.png"),
        ("{}/generator.pt --n 1 --out x.pt", "x.pt"), ("{}/generator.pt --n 1 --out x.ico", "x.ico"),
        ("{}/generator.pt --n 2053 --out x.webp", "16424x8"), ("{}/generator.pt --n 1 --out x.xbm", "x.xbm")],
    "lab.judge": [
        ("--batch 1", "--batch"), ("--data {}/odd", "16"), ("--data {}/nowhere", "nowhere"), ("--size 32", "--size"),
        ("--ema 0.5", "--ema"), ("--steps 0", "--steps"), ("--lr nan", "--lr"), ("--seed 4294967296", "--seed")],
    "lab.evaluate": [
        ("", "run"), ("{}", "generator.pt"), ("{}/no-images", "no-images"), ("{}/method", "method"),
        ("{} --per-label 0", "--per-label"), ("{} --lr 1", "--lr"), ("{}/moved", "/nowhere/gone.pt"),
        ("{}/moved --teacher {}/other-teacher.pt", "other-teacher.pt")],
    "lab.audit": [("", "run"), ("{}/no-images", "no-images"), ("{}/nowhere", "nowhere"), ("{}/method", "method"),
                  ("{} --cut 0", "--cut"), ("{} --per-label 5", "--per-label")],
    "lab.baselines": [
        ("--method magic", "magic"), ("--to 0", "--to"), ("--forget 11", "11"), ("--lr 1", "--lr"),
        ("--data fashion_mnist", "fashion_mnist"), ("--per-label 0", "--per-label"), ("--out {}", "--resume")],
    "lab.baselines.grid": [("--method magic", "magic"), ("--frobnicate 3", "--frobnicate")],
    "lab.prompts": [("--forget zebra", "zebra"), ("--to zero", "zero"), ("--frobnicate 3", "--frobnicate"),
                    ("--teacher {}/good.pt", "good.pt"), ("--out {}", "--resume")],
    "lab.prompts.train_teacher": [("--frobnicate 3", "--frobnicate"), ("--steps 0", "steps")],
    "lab.prompts.sample": [("", "file"), ("{}/good.pt --out x.png", "--prompt")],
    "lab.prompts.compare": [("--method magic", "magic"), ("--frobnicate 3", "--frobnicate")],
    "lab.fid": [("", "file"), ("{}/good.pt --per-label 0", "--per-label")],
    "lab.report": [("", "run"), ("{}/no-images", "no-images")],
    "lab.readme": [("--frobnicate 3", "--frobnicate")],
    "lab.movie": [("--out x.png", "x.png"), ("--steps -1", "--steps"), ("--forget 10", "10")],
}


def last_line(main, argv, monkeypatch, capsys, codes=(2,)):
    """The one line on stderr with which a program ends."""
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    err = err.split("\r")[-1]  # a progress bar is overwritten
    assert stop.value.code in codes and "Traceback" not in out + err, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def trained(*args, **options):
    raise AssertionError("training began")


@pytest.mark.parametrize("name, options, word", [(name, *case) for name, cases in CASES.items() for case in cases],
                         ids=lambda value: value.replace("{}/", "").replace("{root}/", ""))
def test_what_a_user_gets_wrong_is_one_line(name, options, word, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [name, *(option.replace("{root}", str(ROOT)).replace("{}", str(files)) for option in options.split())]
    main = program_module(name).main
    monkeypatch.setattr(torch.Tensor, "backward", trained)
    before = sorted(files.rglob("*"))
    assert word in last_line(lambda: edm_unet.command(main), argv, monkeypatch, capsys)
    assert not list(tmp_path.iterdir()) and sorted(files.rglob("*")) == before, "something was written"


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_file_of_a_command_runs_it(name, monkeypatch, capsys):
    """As a script, without a second import of torch."""
    path = program_module(name).__file__
    argv = [name, "a word", "--frobnicate"]
    assert "--frobnicate" in last_line(lambda: runpy.run_path(path, run_name="__main__"), argv, monkeypatch, capsys)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_lists_the_options(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        program_module(name).main(["--help"])
    assert stop.value.code == 0 and "--" in capsys.readouterr().out


WORDS = ["CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory: you tried",
         "[enforce fail] DefaultCPUAllocator: not enough memory: you tried"]


@pytest.mark.parametrize("error", [*(RuntimeError(f"{words}\nmore") for words in WORDS), MemoryError()])
def test_out_of_memory_is_one_line(error, monkeypatch, capsys):
    """In the words of a GPU, of Linux and of Windows, and as Python and numpy say it."""
    def main(argv):
        raise error

    assert "--batch" in last_line(lambda: edm_unet.command(main), ["sfd"], monkeypatch, capsys, codes=(1,))


NO_COMPILER = ["InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')",
               "Compiler: cl is not found.", "Failed to find C compiler. Please specify via CC environment variable",
               "Cannot find a working triton installation.\nEither the package is not installed"]


@pytest.mark.parametrize("words", NO_COMPILER)
def test_compile_without_a_compiler_is_one_line(words, monkeypatch, capsys):
    def main(argv):
        raise RuntimeError(f"backend='inductor' raised:\n{words}")

    line = last_line(lambda: edm_unet.command(main), ["sfd"], monkeypatch, capsys, codes=(1,))
    assert "without --compile" in line


@pytest.mark.slow
def test_a_run_that_cannot_compile_goes_on_without(tmp_path):
    options = ["--forget", "0", "--to", "1", "--steps", "1", "--batch", "4", "--device", "cpu", "--out", "run"]
    code = ("import os, runpy, sys; os.environ['CXX'] = 'no-such-compiler'; "
            "runpy.run_module('lab.distill', run_name='__main__')")
    done = run(sys.executable, "-c", code, *options, "--compile", cwd=tmp_path, code=1)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "without --compile" in line and "Traceback" not in done.stderr, done.stderr
    code = ("import sys; from lab import distill; distill.Evaluator.find = lambda *args: None; "
            "distill.main(sys.argv[1:])")
    run(sys.executable, "-c", code, *options, "--resume", cwd=tmp_path)
    assert (tmp_path / "run" / "generator.pt").exists()


class DoesNotFit:
    """Finds torchvision, which then cannot be imported."""

    def __init__(self, error):
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("operator torchvision::nms does not exist"),
                                   AttributeError("module 'torch.library' has no attribute 'register_fake'"),
                                   ImportError("undefined symbol"), OSError("libcudart.so: cannot open")])
def test_a_torchvision_that_does_not_fit_is_one_line(error, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [DoesNotFit(error), *sys.meta_path])
    argv = ["train", "--data-dir", str(tmp_path)]
    line = last_line(lambda: edm_unet.command(train_teacher.main), argv, monkeypatch, capsys)
    assert str(error) in line and f"belongs to torch {torch.__version__}" in line
    with pytest.raises(BadInput, match="torchvision cannot be imported"):
        edm_unet.save_images(torch.zeros(1, 1, 2, 2), 1, tmp_path / "a.png")


def test_an_older_python_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(edm_unet.__file__)
    assert "Python 3.10" in stop.value.code and "\n" not in stop.value.code


def test_an_error_of_the_code_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sfd"])
    with pytest.raises(RuntimeError, match="must match"):
        edm_unet.command(lambda argv: torch.ones(2) + torch.ones(3))


def test_weights_too_large_for_their_file_are_one_line(tiny, tmp_path, unevaluated, monkeypatch, capsys):
    def distill(s, n, override, first=0):
        n.fake.model.map_label.bias.data[0] = 1e6  # both.pt has float16
        yield {"L_psi": torch.tensor(1.0)}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sfd_minimal, "distill", distill)
    monkeypatch.setattr(sfd_minimal, "tqdm", lambda steps, **options: steps)
    argv = ["sfd", "--teacher", str(tiny), "--steps", "1", "--device", "cpu"]
    last_line(lambda: edm_unet.command(sfd_minimal.main), argv, monkeypatch, capsys, codes=(1, 2))


@pytest.mark.parametrize("cls", ["sfd_minimal.Settings", "train_teacher.Settings", "lab.distill.Settings",
                                 "lab.judge.Settings", "lab.baselines.compare.Settings"])
def test_no_setting_takes_a_number_that_cannot_be(cls):
    """No setting takes NaN or infinity, except for a default. Steps and batches are above 0, seeds have 32 bits."""
    module_name, name = cls.rsplit(".", 1)
    cls = getattr(importlib.import_module(module_name), name)
    for f in dataclasses.fields(cls):
        wrong = [float("nan"), float("inf"), -float("inf")] if f.type is float else []
        wrong = [value for value in wrong if f.default != value]
        if f.name in ("steps", "batch"):
            wrong = [0, -1]
        if f.name == "seed":
            wrong = [-1, 2 ** 32]
        for value in wrong:
            with pytest.raises(BadInput, match=f.name.replace("_", "[_-]")):
                check_ranges(cls(**{f.name: value}))


# ------------------------------------------------------------------------------------------- what the options promise

@pytest.fixture
def sfd(tiny, tmp_path, monkeypatch, unevaluated):
    """sfd_minimal.py with a tiny teacher that has MNIST's names, in an empty folder: (options) -> nothing."""
    monkeypatch.chdir(tmp_path)
    save_network(load_network(tiny)[0], tmp_path / "teacher.pt", classes=MNIST)

    def main(*options):
        sfd_minimal.main(["--teacher", "teacher.pt", "--steps", "2", "--batch", "8", "--device", "cpu", *options])

    return main


@pytest.mark.parametrize("options, folder, forget, to", [
    ("", "mnist-forget0-torandom", [0], [-1]),
    ("--forget 4 --to 9", "mnist-forget4-to9", [4], [9]),
    ("--forget zero 3 --to 1 Eight", "mnist-forgetzero-3-to1-Eight", [0, 3], [1, 8]),
    ("--forget 0 1 --to 2", "mnist-forget0-1-to2", [0, 1], [2, 2]),
    ("--forget 0 1 --to random 5", "mnist-forget0-1-torandom-5", [0, 1], [-1, 5]),
    ("--forget none", "mnist-sid", [], [])])
def test_labels_are_named_or_numbered(options, folder, forget, to, sfd):
    sfd(*options.split())
    _, info = load_network(Path("runs") / folder / "generator.pt")
    assert info["forget"] == forget and info["to"] == to and info["settings"]["steps"] == 2


def test_two_stages_are_the_paper_s(sfd):
    """Plain SiD, then SFD from its generator and fake score, with the teacher that it began with and no other loss."""
    sfd("--forget", "none")
    sfd("--forget", "0", "--to", "1", "--init-from", "runs/mnist-sid/both.pt", "--sigma-init", "2.5")
    _, info = load_network("runs/mnist-forget0-to1-second-stage/generator.pt")
    s = sfd_minimal.Settings(**sfd_minimal.PRESETS["mnist, from a one-step generator"])
    assert info["settings"]["lr"] == s.lr and info["settings"]["init_from"] == "runs/mnist-sid/both.pt"
    assert info["teacher_sha256"] == digest("teacher.pt")


def test_options_override_a_preset_and_nothing_else_changes_a_setting():
    changed = dict(steps=7, lr=0.5, ema=0.5)
    s = dataclasses.asdict(sfd_minimal.Settings(**changed))
    assert s == {**dataclasses.asdict(sfd_minimal.Settings()), **changed}
    for preset in sfd_minimal.PRESETS.values():
        assert preset.keys() <= s.keys()


def test_a_tilde_in_out_is_the_home_folder_where_the_shell_leaves_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # of Windows
    assert given_options(lab.distill.Options, ["--out=~/x"])["out"] == str(tmp_path / "x")


@pytest.mark.parametrize("data, preset", [("mnist", "mnist"), ("fashion_mnist", "mnist"), ("cifar10", "cifar10"),
                                          ("path/to/my images", "cifar10")])
def test_a_data_set_has_its_preset(data, preset):
    assert sfd_minimal.preset_name(data, True, None) == preset
    assert sfd_minimal.preset_name(data, True, "both.pt") == f"{preset}, from a one-step generator"
    assert sfd_minimal.preset_name(data, False, None) == f"{preset}, forgetting nothing"
    for key in (preset, f"{preset}, from a one-step generator", f"{preset}, forgetting nothing"):
        assert key in sfd_minimal.PRESETS


@pytest.mark.parametrize("word, classes, k", [
    ("zero", MNIST, 0), ("0", MNIST, 0), ("Nine", MNIST, 9), ("9", MNIST, 9), ("dog", ["cat", "dog"], 1),
    ("DOG", ["cat", "dog"], 1), ("1", ["b", "a"], 1), ("2", ["1", "2", "12"], 1), ("0", ["1", "2", "12"], 0)])
def test_a_word_is_a_name_or_else_a_number(word, classes, k):
    assert sfd_minimal.label_number(word, classes) == k


@pytest.mark.parametrize("forget, to, word", [(["none"], ["random"], "none"), (["a"], ["random"], "random")])
def test_a_class_called_none_or_random_must_be_given_by_its_number(forget, to, word):
    with pytest.raises(BadInput, match=word):
        sfd_minimal.read_labels(forget, to, ["a", "b", word])


@pytest.mark.parametrize("data", ["my images", "it's mine"])
def test_a_command_in_a_message_works_in_a_folder_with_a_space(data):
    for find, program in ((lambda: load_teacher("", data, CPU), ["train_teacher.py"]),
                          (lambda: Evaluator(None, {"data": data}, [], []), ["-m", "lab.judge"])):
        with pytest.raises(BadInput) as e:
            find()
        assert shlex.split(str(e.value).split("`")[1]) == ["python", *program, "--data", data]


def test_a_class_name_is_no_path():
    a = argparse.Namespace(forget=["T-shirt/top"], to=["../x"], init_from=None)
    assert Path(sfd_minimal.default_folder("fashion_mnist", a)).parent == Path("runs")
    assert Path(sfd_minimal.default_folder("../my data/..", a)).parent == Path("runs")


def test_a_teacher_can_begin_at_another(mnist_dir, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train_teacher.PRESETS, "mnist", (tiny_network(model_channels=8).settings, False, {}))
    argv = ["--data-dir", str(mnist_dir), "--steps", "1", "--batch", "4", "--guidance", "1.3", "--device", "cpu"]
    train_teacher.main([*argv, "--out", "first"])
    train_teacher.main([*argv, "--out", "second", "--init-from", "first/teacher.pt", "--lr", "1e-9"])
    (first, _), (second, info) = load_network("first/teacher.pt"), load_network("second/teacher.pt")
    for a, b in zip(first.parameters(), second.parameters()):
        assert torch.allclose(a, b, atol=1e-6)
    assert info["made_by"]["guidance"] == 1.3 and info["made_by"]["init_from"] == "first/teacher.pt"
    for wrong in (tiny, ROOT / "teachers" / "mnist_forget0_to1.pt"):
        with pytest.raises(BadInput, match=wrong.name):
            train_teacher.main([*argv, "--out", "third", "--init-from", str(wrong)])


def test_main_can_be_called_twice_and_from_a_thread(sfd):
    handlers = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]
    sfd("--out", "one")
    thread = threading.Thread(target=sfd, args=("--out", "two"))
    thread.start()
    thread.join()
    first, second = load_file("one/generator.pt")["weights"], load_file("two/generator.pt")["weights"]
    assert all(torch.equal(v, second[name]) for name, v in first.items())
    assert [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)] == handlers


# ------------------------------------------------------------------------------------------- in other circumstances

def test_a_terminal_without_the_letters_ends_no_run(monkeypatch):
    def main(argv):
        print("\u6f22")
        raise BadInput("no label \u5b57")

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit):
        edm_unet.command(main)
    out.flush()
    err.flush()
    assert out.buffer.getvalue() == b"\\u6f22\n" and err.buffer.getvalue() == b"error: no label \\u5b57\n"


OFFLINE = """
import runpy, socket, sys

class NoDataSets:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision.datasets":
            raise ImportError("data sets are forbidden here")

def forbidden(*args, **options):
    raise OSError("sockets are forbidden here")

import torchvision
for name in [name for name in sys.modules if name.startswith("torchvision.datasets")]:
    del sys.modules[name]
sys.meta_path.insert(0, NoDataSets())
socket.socket.__init__ = socket.create_connection = socket.getaddrinfo = forbidden
from lab.evaluate.evaluator import Evaluator
Evaluator.per_label = 4
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_command_of_the_readme_needs_no_images_and_no_network(tmp_path):
    (tmp_path / "offline.py").write_text(OFFLINE)
    done = run(sys.executable, "offline.py", ROOT / "sfd_minimal.py", "--forget", 0, "--to", 1, "--steps", 3,
               "--batch", 8, "--device", "cpu", cwd=tmp_path)
    out = tmp_path / "runs" / "mnist-forget0-to1"
    assert {"generator.pt", "both.pt", "samples.png", "metrics.json"} <= {path.name for path in out.iterdir()}
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0 <= metrics["ua"] <= 1 and metrics["forget"] == [0] and "lab.audit runs/mnist-forget0-to1" in done.stdout
