"""Bad input: one line that says what is wrong, exit code 2, no traceback, nothing written."""
import pickle
import runpy
import sys

import pytest
import torch

import sfd_minimal
import train_teacher
from conftest import image_folder, save_network
from edm_unet import EDMPrecond, NetSettings
from lab import audit, baselines, bench, convert, evaluate, judge, readme, report, sample, sweep
from lab.checkpoint import digest, pack, save_atomically
from lab.cli import command

PROGRAMS = {"sfd": sfd_minimal, "teacher": train_teacher, "evaluate": evaluate, "sample": sample, "convert": convert,
            "judge": judge, "audit": audit, "baselines": baselines, "sweep": sweep, "bench": bench,
            "report": report, "readme": readme}


class RunsCode:
    def __reduce__(self):
        return (open, ("code-ran", "w"))


def network(**changes):
    return EDMPrecond(NetSettings(**dict(resolution=8, model_channels=16, channel_mult=(1,), num_blocks=1,
                                         attn_resolutions=(), patch=2) | changes))


def write_files(folder):
    """Every kind of file that is not what it should be."""
    own, wide, judged = network(), network(model_channels=32), network(resolution=28, patch=4)
    save = lambda name, of=own, **entries: save_network(of, folder / name, **entries)
    save("good.pt")
    (folder / "empty.pt").touch()
    (folder / "truncated.pt").write_bytes((folder / "good.pt").read_bytes()[:2000])
    (folder / "text.pt").write_text("not a checkpoint")
    (folder / "hostile.pt").write_bytes(pickle.dumps(RunsCode()))
    torch.save({"kind": "denoiser", "weights": RunsCode()}, folder / "hostile-zip.pt")
    torch.save([1, 2, 3], folder / "list.pt")
    save("judge.pt", kind="judge")
    save("other-data.pt", data="cifar10")
    save("generator.pt", sigma_init=2.5)
    for name, change in {"absurd": {"model_channels": 10 ** 9}, "misfit": {"num_blocks": 31},
                         "unknown-setting": {"colour": "blue"}, "folded": {"folded": True}}.items():
        save(f"{name}.pt", net=pack(own)["net"] | change)
    save_atomically({"kind": "denoiser", "data": "mnist"}, folder / "no-net.pt")
    save("other-fake.pt", fake=pack(wide)["weights"])
    save("other-data-fake.pt", data="cifar10", fake=pack(own)["weights"])
    save("other-net.pt", wide, fake=pack(wide)["weights"])
    save("method/generator.pt", settings={"method": "esd"}, teacher_sha256="")
    save("teacher.pt", judged)
    save("other-teacher.pt", judged, seconds=1.0)
    for name, n in (("moved", 1), ("nine-gone", 9)):  # runs that have forgotten n labels, whose teacher is elsewhere
        save(f"{name}/generator.pt", judged, sigma_init=2.5, forget=list(range(n)), to=[9] * n,
             settings={"teacher": str(folder / "gone.pt")}, teacher_sha256=digest(folder / "teacher.pt"))
    (folder / "a-file").write_text("")
    image_folder(folder / "one-class", "a", 12, 8)
    image_folder(image_folder(folder / "mixed", "a", 12, 8), "b", 12, 9)
    image_folder(folder / "broken", "ab", 12, 8)
    (folder / "broken" / "b" / "3.png").write_bytes(b"not an image")
    image_folder(folder / "oblong", "ab", 12, (9, 8))
    image_folder(folder / "odd", "ab", 3, 9)
    image_folder(folder / "one-each", "ab", 1, 8)
    image_folder(image_folder(folder / "lonely", "a", 12, 8), "b", 1, 8)
    image_folder(folder / "split" / "train", "ab", 2, 8)
    image_folder(folder / "split" / "test", "ac", 2, 8)
    (folder / "no-images").mkdir()


CASES = [  # program, arguments ({} is the folder of bad files), a word of the message
    ("sfd", "--forget 10", "no label '10': zero one two"), ("sfd", "--forget -1", "no label '-1'"),
    ("sfd", "--forget nil", "eight nine, or 0 to 9"), ("sfd", "--forget 0 --to 10", "no label '10'"),
    ("sfd", "--forget \u00b2", "no label"), ("sfd", "--forget none 1", "no label 'none'"),
    ("sfd", "--forget 0 --to 0", "itself to be forgotten"), ("sfd", "--forget 0 1 --to 2 1", "itself to be forgotten"),
    ("sfd", "--forget 0 1 2 3 4 5 6 7 8 9", "at least one"), ("sfd", "--forget 3 3", "twice"),
    ("sfd", "--forget 0 1 2 --to 3 4", "one per forgotten label"), ("sfd", "--forget", "expected at least one"),
    ("sfd", "--forget none --to 1", "no meaning with it"),
    ("sfd", "--forget none --guidance 1.3", "no meaning with it"),
    ("sfd", "--forget none --lambda-anchor 3", "no meaning with it"),
    ("sfd", "--forget none --lambda-forget 2", "no meaning with it"),
    ("sfd", "--forget none --forget-share 0.3", "no meaning with it"),
    ("sfd", "--forget none --anywhere 0.3", "no meaning with it"), ("sfd", "--anywhere 0.3", "the one that --to names"),
    ("sfd", "--data prompts --forget zero --to one --anywhere 0.3", "of labels, not of prompts"),
    ("sfd", "--frobnicate 3", "unrecognized"), ("sfd", "--step 3", "unrecognized"), ("sfd", "3", "unrecognized"),
    ("sfd", "--per-label 4", "unrecognized"), ("sfd", "--label 3", "unrecognized"),
    ("sfd", "--u-max 1", "unrecognized"),
    ("sfd", "--steps many", "invalid int"), ("sfd", "--steps 0", "--steps must be finite and above 0, not 0"),
    ("sfd", "--steps -5", "--steps must be finite and above 0, not -5"),
    ("sfd", "--batch 0", "--batch must be finite and above 0, not 0"), ("sfd", "--batch -1", "above 0, not -1"),
    ("sfd", "--lr 0", "--lr must be finite and above 0, not 0"), ("sfd", "--lr -0.001", "above 0, not -0.001"),
    ("sfd", "--lr inf", "--lr must be finite and above 0, not inf"), ("sfd", "--lr nan", "above 0, not nan"),
    ("sfd", "--lr-fake 0", "--lr-fake must be finite and above 0"),
    ("sfd", "--sigma-init 0", "--sigma-init must be finite and above 0"), ("sfd", "--sigma-init -2", "above 0, not -2"),
    ("sfd", "--alpha nan", "--alpha must be finite, not nan"), ("sfd", "--alpha inf", "must be finite, not inf"),
    ("sfd", "--lambda-forget nan", "--lambda-forget must be finite and at least 0, not nan"),
    ("sfd", "--lambda-forget -1", "--lambda-forget must be finite and at least 0, not -1"),
    ("sfd", "--lambda-anchor -1", "--lambda-anchor must be finite and at least 0, not -1"),
    ("sfd", "--lambda-anchor nan", "at least 0, not nan"),
    ("sfd", "--guidance 0.5", "--guidance must be finite and at least 1, not 0.5"),
    ("sfd", "--guidance nan", "at least 1, not nan"), ("sfd", "--p-mean nan", "--p-mean must be finite, not nan"),
    ("sfd", "--ema 1", "--ema must be finite and at least 0 and below 1, not 1"),
    ("sfd", "--ema -0.1", "at least 0 and below 1, not -0.1"),
    ("sfd", "--forget-share 1", "--forget-share must be finite and above 0 and below 1, not 1"),
    ("sfd", "--forget-share 0", "above 0 and below 1, not 0"), ("sfd", "--forget-share nan", "below 1, not nan"),
    ("sfd", "--seed -1", "--seed must be finite and at least 0"), ("sfd", "--seed 4294967296", "--seed must be"),
    ("sfd", "--save-every 0", "--save-every must be finite and above 0"),
    ("sfd", "--device cuda:99", "not there"), ("sfd", "--device abacus", "not there"),
    ("sfd", "--device meta", "not there"),
    ("sfd", "--data letters", "no teacher"), ("sfd", "--teacher {}/nowhere.pt", "no teacher"),
    ("sfd", "--teacher {}/empty.pt", "empty"), ("sfd", "--teacher {}/truncated.pt", "cannot be read"),
    ("sfd", "--teacher {}/text.pt", "cannot be read"), ("sfd", "--teacher {}/list.pt", "found list"),
    ("sfd", "--teacher {}/hostile.pt", "nothing in it was run"),
    ("sfd", "--teacher {}/hostile-zip.pt", "nothing in it was run"), ("sfd", "--teacher {}/judge.pt", "found 'judge'"),
    ("sfd", "--teacher {}/other-data.pt", "cifar10"), ("sfd", "--teacher {}/generator.pt", "not a teacher"),
    ("sfd", "--teacher {}/absurd.pt", "model_channels must be"), ("sfd", "--teacher {}/misfit.pt", "do not fit"),
    ("sfd", "--teacher {}/unknown-setting.pt", "do not fit"), ("sfd", "--teacher {}/folded.pt", "do not fit"),
    ("sfd", "--teacher {}/no-net.pt", "lacks classes, net, weights"), ("sfd", "--teacher {}/no-images", "no teacher"),
    ("sfd", "--init-from {}/nowhere.pt", "no such file"), ("sfd", "--init-from {}/good.pt", "no fake score"),
    ("sfd", "--init-from {}/other-data-fake.pt", "is of cifar10"),
    ("sfd", "--init-from {}/other-net.pt", "another network"), ("sfd", "--init-from {}/other-fake.pt", "do not fit"),
    ("sfd", "--resume", "no such file"), ("sfd", "--resume --overwrite", "one of them"),
    ("sfd", "--out {}", "holds a run already"), ("sfd", "--out {}/a-file/run", "cannot write"),
    ("sfd", "--out {}/a-file", "cannot write"),
    ("sfd", "--sample {}/good.pt", "needs --out"), ("sfd", "--sample {}/nowhere.pt --out x.png", "no such file"),
    ("sfd", "--sample {}/good.pt --steps 5 --out x.png", "unrecognized"), ("sfd", "--sample", "expected one argument"),
    ("sample", "", "is required"), ("sample", "{}/good.pt", "needs --out"),
    ("sample", "{}/nowhere.pt --out x.png", "no such file"), ("sample", "{}/good.pt --out {}", "not empty"),
    ("sample", "{}/good.pt --label 10 --out x.png", "no label"),
    ("sample", "{}/good.pt --label -1 --out x.png", "no label"),
    ("sample", "{}/good.pt --n 0 --out x.png", "--n must be finite and above 0"),
    ("sample", "{}/good.pt --seed -1 --out x.png", "--seed must be"),
    ("sample", "{}/generator.pt --n 1 --out {}/a-file/x.png", "cannot write"),
    ("sample", "{}/judge.pt --out x.png", "found 'judge'"),
    ("teacher", "--data {}/nowhere", "no folder of class folders"), ("judge", "--batch 1", "at least 2"),
    ("teacher", "--data {}/no-images", "no folder of class folders"),
    ("teacher", "--data {}/a-file", "no folder of class folders"), ("teacher", "--data {}/one-class", "one class"),
    ("teacher", "--data {}/mixed", "mixes image sizes"), ("teacher", "--data {}/broken", "cannot be read as an image"),
    ("teacher", "--data {}/oblong", "not square"), ("teacher", "--data {}/odd", "another --size"),
    ("teacher", "--data {}/one-each", "at least two"), ("teacher", "--data {}/lonely", "at least two"),
    ("teacher", "--data {}/split", "same class folders"), ("teacher", "--judge", "unrecognized"),
    ("teacher", "--steps 0", "--steps must be finite and above 0"), ("teacher", "--lr -1", "above 0, not -1"),
    ("teacher", "--ema 1.5", "--ema must be finite and at least 0 and below 1"),
    ("teacher", "--label-drop 1", "--label-drop must be finite and at least 0 and below 1"),
    ("teacher", "--p-std 0", "--p-std must be finite and above 0"),
    ("teacher", "--p-mean nan", "--p-mean must be finite, not nan"),
    ("teacher", "--data x --size 0", "--size must be finite and above 0"), ("teacher", "--size 32", "for folders"),
    ("teacher", "--guidance 0.5", "at least 1"), ("teacher", "--guidance inf", "at least 1, not inf"),
    ("teacher", "--guidance-below 4", "no meaning without --guidance"),
    ("teacher", "--guidance 1.3 --guidance-below 0", "--guidance-below must be finite and above 0"),
    ("teacher", "--guidance 1.3 --guidance-below nan", "above 0, not nan"),
    ("teacher", "--guidance 1.3 --label-drop 0", "null label"),
    ("judge", "--data {}/odd", "at least 16x16"), ("judge", "--data {}/nowhere", "no folder of class folders"),
    ("judge", "--ema 0.5", "unrecognized"), ("judge", "--init-from x.pt", "unrecognized"),
    ("judge", "--size 32", "for folders"), ("judge", "--steps 0", "--steps must be finite and above 0"),
    ("judge", "--lr nan", "above 0, not nan"), ("judge", "--seed 4294967296", "--seed must be"),
    ("evaluate", "", "is required"), ("evaluate", "{}", "not the generator of a run"),
    ("evaluate", "{}/no-images", "no generator.pt"), ("evaluate", "{}/method", "not the generator of a run"),
    ("evaluate", "{} --per-label 0", "--per-label must be finite and above 0"),
    ("evaluate", "{} --lr 1", "unrecognized"), ("evaluate", "{}/moved", "no teacher at"),
    ("evaluate", "{}/moved --teacher {}/other-teacher.pt", "is not the teacher that"),
    ("audit", "", "is required"), ("audit", "{}/no-images", "no generator.pt"),
    ("audit", "{}/nowhere", "no generator.pt"), ("audit", "{}/method", "forgotten 0 labels"),
    ("audit", "{}/nine-gone", "forgotten 9 labels"), ("audit", "{} --per-label 5", "unrecognized"),
    ("convert", "", "is required"), ("convert", "{}/text.pt", "is required"),
    ("convert", "{}/nowhere.pkl x.pt", "no such file"), ("convert", "{}/text.pt x.pt", "not a published EDM"),
    ("baselines", "--method magic", "--method magic is not known"),
    ("baselines", "--resume --overwrite", "say one of them"),
    ("baselines", "--to 0", "itself to be forgotten"), ("baselines", "--forget 11", "no label"),
    ("baselines", "--lr 1", "unrecognized"), ("baselines", "--data fashion_mnist", "no teacher"),
    ("baselines", "--per-label 0", "--per-label must be finite and above 0"),
    ("baselines", "--out {}", "holds a run already"),
    ("baselines", "--method retrain_sid --out nowhere --per-label 1", "which is not there"),
    ("sweep", "--method magic", "--method magic is not known"), ("sweep", "--method embedding_copy", "is not known"),
    ("sweep", "--per-label 5", "unrecognized"), ("bench", "--only everything", "--only everything is not known"),
    ("bench", "--seconds 0", "--seconds must be finite and above 0"),
    ("report", "", "is required"), ("report", "{}/no-images", "no metrics.json"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad files")
    write_files(folder)
    return folder


def one_line(main, argv, monkeypatch, capsys):
    """What a command says before it ends with exit code 2: a single line."""
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    err = err.split("\r")[-1]  # what remains to be seen where a progress bar was
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err, err
    return err


@pytest.mark.parametrize("program, arguments, word", CASES, ids=[f"{p} {a}" for p, a, _ in CASES])
def test_bad_input(program, arguments, word, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [program, *(a.replace("{}", str(files)) for a in arguments.split())]
    if "--device" not in argv and program not in ("convert", "report", "readme"):
        argv += ["--device", "cpu"]
    before = sorted(files.rglob("*"))
    assert word in one_line(lambda: command(PROGRAMS[program].main), argv, monkeypatch, capsys)
    assert not list(tmp_path.iterdir()) and sorted(files.rglob("*")) == before, "something was written"


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_file_itself_is_that_command(program, monkeypatch, capsys):
    """Run as a script, it says so too; without a second import of torch."""
    main = lambda: runpy.run_path(PROGRAMS[program].__file__, run_name="__main__")
    assert "unrecognized arguments: --frobnicate" in one_line(main, [program, "--frobnicate"], monkeypatch, capsys)


def test_out_of_memory_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        command(lambda argv: torch.empty(1 << 60))
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.count("\n") == 1 and "try a smaller --batch" in err
    with pytest.raises(RuntimeError, match="must match"):  # another error of torch's is no lack of memory
        command(lambda argv: torch.ones(2) + torch.ones(3))
