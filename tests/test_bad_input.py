"""Bad input: one line that says what is wrong, exit code 2, no traceback, nothing written."""
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import edm_unet
import evaluate
import sfd_minimal
import train_teacher

ROOT = Path(__file__).parent.parent
PROGRAMS = {"sfd": sfd_minimal.main, "teacher": train_teacher.main, "evaluate": evaluate.main, "unet": edm_unet.main}


class RunsCode:
    def __reduce__(self):
        return (open, ("code-ran", "w"))


def network(**changes):
    settings = dict(resolution=8, channels=1, num_classes=10, model_channels=16, channel_mult=(1,), num_blocks=1,
                    attn_resolutions=(), patch=2) | changes
    return edm_unet.EDMPrecond(edm_unet.NetSettings(**settings))


def write_files(folder):
    """Every kind of file that is not what it should be."""
    good = {"kind": "denoiser", "data": "mnist", "classes": [str(k) for k in range(10)], **edm_unet.pack(network())}
    edm_unet.save_atomically(good, folder / "good.pt")
    (folder / "empty.pt").touch()
    (folder / "truncated.pt").write_bytes((folder / "good.pt").read_bytes()[:2000])
    (folder / "text.pt").write_text("not a checkpoint")
    (folder / "hostile.pt").write_bytes(pickle.dumps(RunsCode()))
    torch.save({"kind": "denoiser", "weights": RunsCode()}, folder / "hostile-zip.pt")
    torch.save([1, 2, 3], folder / "list.pt")
    edm_unet.save_atomically({**good, "kind": "judge"}, folder / "judge.pt")
    edm_unet.save_atomically({**good, "data": "cifar10"}, folder / "other-data.pt")
    edm_unet.save_atomically({**good, "sigma_init": 2.5}, folder / "generator.pt")
    edm_unet.save_atomically({**good, "net": good["net"] | {"model_channels": 10 ** 9}}, folder / "absurd.pt")
    edm_unet.save_atomically({**good, "net": good["net"] | {"num_blocks": 31}}, folder / "misfit.pt")
    edm_unet.save_atomically({**good, "net": good["net"] | {"colour": "blue"}}, folder / "unknown-setting.pt")
    edm_unet.save_atomically({"kind": "denoiser", "data": "mnist"}, folder / "no-net.pt")
    edm_unet.save_atomically({**good, "fake": edm_unet.pack(network(model_channels=32))["weights"]},
                             folder / "other-fake.pt")
    edm_unet.save_atomically({**good, "data": "cifar10", "fake": good["weights"]}, folder / "other-data-fake.pt")
    edm_unet.save_atomically({**good, **edm_unet.pack(network(model_channels=32)),
                              "fake": edm_unet.pack(network(model_channels=32))["weights"]}, folder / "other-net.pt")
    edm_unet.save_atomically({**good, "settings": {"method": "esd"}, "teacher_sha256": ""},
                             folder / "method" / "generator.pt")
    (folder / "a-file").write_text("")
    noise = np.random.default_rng(0)
    for name, sizes in {"one-class": [("a", 8)], "mixed": [("a", 8), ("b", 9)],
                        "broken": [("a", 8), ("b", 8)], "oblong": [("a", 8), ("b", 8)]}.items():
        for i, (label, size) in enumerate(sizes):
            (folder / name / label).mkdir(parents=True, exist_ok=True)
            for j in range(12):
                shape = (size, size + (name == "oblong"), 3)
                Image.fromarray(noise.integers(0, 255, shape, dtype=np.uint8)).save(folder / name / label / f"{j}.png")
    (folder / "broken" / "b" / "3.png").write_bytes(b"not an image")
    (folder / "no-images").mkdir()
    for label in "ab":
        for name, size, count in (("one-each", 8, 1), ("lonely", 8, 1 + 11 * (label == "a")), ("odd", 9, 3)):
            (folder / name / label).mkdir(parents=True)
            for j in range(count):
                Image.new("RGB", (size, size)).save(folder / name / label / f"{j}.png")


CASES = [  # program, arguments ({} is the folder of bad files), a word of the message
    ("sfd", "--forget 10", "out of range"), ("sfd", "--forget -1", "out of range"),
    ("sfd", "--forget zero", "out of range"), ("sfd", "--forget 0 --to 10", "out of range"),
    ("sfd", "--forget 0 --to 0", "itself to be forgotten"), ("sfd", "--forget 0 1 --to 2 1", "itself to be forgotten"),
    ("sfd", "--forget 0 1 2 3 4 5 6 7 8 9", "at least one"), ("sfd", "--forget 3 3", "twice"),
    ("sfd", "--forget 0 1 2 --to 3 4", "one per forgotten label"), ("sfd", "--forget none --to 1", "no meaning"),
    ("sfd", "--forget none 1", "out of range"), ("sfd", "--forget", "expected at least one"),
    ("sfd", "--frobnicate 3", "unrecognized"), ("sfd", "--step 3", "unrecognized"),
    ("sfd", "--steps many", "invalid int"), ("sfd", "--steps 0", "above zero"), ("sfd", "--steps -5", "above zero"),
    ("sfd", "--batch 0", "above zero"), ("sfd", "--batch -1", "above zero"), ("sfd", "--lr 0", "above zero"),
    ("sfd", "--lr -0.001", "above zero"), ("sfd", "--lr inf", "above zero"), ("sfd", "--lr nan", "above zero"),
    ("sfd", "--lr-fake 0", "above zero"), ("sfd", "--sigma-init 0", "above zero"),
    ("sfd", "--sigma-init -2", "above zero"), ("sfd", "--per-label 0", "above zero"), ("sfd", "--alpha nan", "finite"),
    ("sfd", "--alpha inf", "finite"), ("sfd", "--lambda-forget nan", "finite"),
    ("sfd", "--lambda-forget -1", "not negative"), ("sfd", "--lambda-anchor -1", "not negative"),
    ("sfd", "--lambda-anchor nan", "finite"), ("sfd", "--guidance 0.5", "at least 1"),
    ("sfd", "--guidance nan", "at least 1"), ("sfd", "--forget none --guidance 1.3", "no meaning"),
    ("sfd", "--forget none --lambda-anchor 3", "no meaning"), ("sfd", "--p-mean nan", "finite"),
    ("sfd", "--ema 1", "[0, 1)"), ("sfd", "--device cuda:99", "not there"), ("sfd", "--device abacus", "not there"),
    ("sfd", "--data letters", "no teacher"), ("sfd", "--teacher {}/nowhere.pt", "no teacher"),
    ("sfd", "--teacher {}/empty.pt", "empty"), ("sfd", "--teacher {}/truncated.pt", "cannot be read"),
    ("sfd", "--teacher {}/text.pt", "cannot be read"), ("sfd", "--teacher {}/list.pt", "found list"),
    ("sfd", "--teacher {}/hostile.pt", "nothing in it was run"),
    ("sfd", "--teacher {}/hostile-zip.pt", "nothing in it was run"), ("sfd", "--teacher {}/judge.pt", "found 'judge'"),
    ("sfd", "--teacher {}/other-data.pt", "cifar10"), ("sfd", "--teacher {}/generator.pt", "not a teacher"),
    ("sfd", "--teacher {}/absurd.pt", "model_channels must be"), ("sfd", "--teacher {}/misfit.pt", "do not fit"),
    ("sfd", "--teacher {}/unknown-setting.pt", "do not fit"),
    ("sfd", "--teacher {}/no-net.pt", "lacks classes, net, weights"), ("sfd", "--teacher {}", "no such file"),
    ("sfd", "--init-from {}/nowhere.pt", "no such file"), ("sfd", "--init-from {}/good.pt", "no fake score"),
    ("sfd", "--init-from {}/other-data-fake.pt", "is of cifar10"),
    ("sfd", "--init-from {}/other-net.pt", "another network"), ("sfd", "--init-from {}/other-fake.pt", "do not fit"),
    ("sfd", "--resume", "no such file"), ("sfd", "--resume --overwrite", "one of them"), ("sfd", "--seed -1", "--seed"),
    ("sfd", "--forget \u00b2", "out of range"), ("sfd", "--device meta", "not there"),
    ("sfd", "--save-every 0", "above zero"), ("sfd", "--forget none --lambda-forget 2", "no meaning"),
    ("sfd", "--forget none --forget-share 0.3", "no meaning"), ("sfd", "--forget-share 1", "between 0 and 1"),
    ("sfd", "--forget-share nan", "between 0 and 1"),
    ("sfd", "--forget 0 1 2 3 4 5 6 7 8 --to 9 --per-label 3", "too few"), ("sfd", "--out {}", "holds a run already"),
    ("sfd", "--out {}/a-file/run", "cannot write"), ("sfd", "--out {}/a-file", "cannot write"),
    ("sfd", "--sample {}/nowhere.pt --out x.png", "no such file"), ("sfd", "--sample {}/good.pt", "needs --out"),
    ("sfd", "--sample {}/good.pt --out {}", "not empty"),
    ("sfd", "--sample {}/good.pt --label 10 --out x.png", "out of range"),
    ("sfd", "--sample {}/good.pt --n 0 --out x.png", "above zero"),
    ("sfd", "--sample {}/good.pt --steps 5 --out x.png", "no meaning"), ("sfd", "--label 3", "belong to --sample"),
    ("teacher", "--data {}/nowhere", "no folder of class folders"),
    ("teacher", "--data {}/no-images", "no folder of class folders"), ("teacher", "--data {}/one-class", "one class"),
    ("teacher", "--data {}/mixed", "mixes image sizes"), ("teacher", "--data {}/broken", "cannot be read as an image"),
    ("teacher", "--data {}/oblong", "not square"), ("teacher", "--steps 0", "above zero"),
    ("teacher", "--lr -1", "above zero"), ("teacher", "--ema 1.5", "[0, 1)"), ("teacher", "--p-std 0", "above zero"),
    ("teacher", "--data x --size 0", "above zero"), ("teacher", "--size 32", "for folders"),
    ("teacher", "--judge --ema 0.5", "no meaning"), ("teacher", "--p-mean nan", "finite"),
    ("teacher", "--guidance 0.5", "at least 1"), ("teacher", "--guidance inf", "at least 1"),
    ("teacher", "--guidance-below 4", "no meaning without --guidance"),
    ("teacher", "--guidance 1.3 --guidance-below 0", "above zero"),
    ("teacher", "--guidance 1.3 --guidance-below nan", "above zero"),
    ("teacher", "--judge --init-from x.pt", "no meaning"), ("teacher", "--guidance 1.3 --label-drop 0", "null label"),
    ("teacher", "--data {}/a-file", "no folder of class folders"), ("teacher", "--data {}/one-each", "at least two"),
    ("teacher", "--data {}/lonely", "at least two"), ("teacher", "--data {}/odd", "another --size"),
    ("teacher", "--data {}/odd --judge", "at least 16x16"),
    ("evaluate", "{}", "not the generator of a run"), ("evaluate", "{}/no-images", "no generator.pt"),
    ("evaluate", "{}/method", "not the generator of a run"), ("evaluate", "", "required"),
    ("evaluate", "{} --per-label 0", "above zero"), ("evaluate", "{} --audit --per-label 5", "no meaning with --audit"),
    ("evaluate", "{} --data-dir x", "no meaning without --audit"),
    ("unet", "convert {}/nowhere.pkl x.pt", "no such file"), ("unet", "convert {}/text.pt x.pt", "not a published EDM"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad files")
    write_files(folder)
    return folder


@pytest.mark.parametrize("program, arguments, word", CASES, ids=[f"{p} {a}" for p, a, _ in CASES])
def test_bad_input(program, arguments, word, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program, *(a.replace("{}", str(files)) for a in arguments.split())])
    before = sorted(files.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        common.command(PROGRAMS[program])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and word in err, err
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir()) and sorted(files.rglob("*")) == before, "something was written"


def test_the_real_command_exits_with_2(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "sfd_minimal.py", "--forget", "0", "--to", "0"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


def test_out_of_memory_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        common.command(lambda argv: torch.empty(1 << 60))
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.count("\n") == 1 and "try a smaller --batch" in err
    with pytest.raises(RuntimeError, match="must match"):  # another error of torch's is no lack of memory
        common.command(lambda argv: torch.ones(2) + torch.ones(3))
