"""What the README says is so: its commands parse, its settings exist, its table is the one that the results make."""
import csv
import dataclasses
import json
import re
import shlex

import pytest

import audit
import baselines
import common
import evaluate
import sfd_minimal
import train_teacher
from conftest import ROOT
from edm_unet import read_file

README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S)
            for line in block.splitlines() if line.strip()]
COMMANDS += re.findall(r"`(python [^`]+)`", README.split("what remains to be run")[1])


def result(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def as_json(settings):
    """Settings the way that a result holds them: tuples are lists."""
    return json.loads(json.dumps(settings))


def unwrapped(text):
    return " ".join(text.split())


@pytest.mark.parametrize("line", [c for c in COMMANDS if "python " in c])
def test_commands_are_real(line):
    words = shlex.split(line.split("&&")[-1])[1:]
    if words[0] == "-m":
        assert words == ["-m", "pytest"]
        return
    assert (ROOT / words[0]).exists()
    settings = {"sfd_minimal.py": sfd_minimal.Settings, "train_teacher.py": train_teacher.Settings,
                "baselines.py": baselines.Settings}.get(words[0])
    if settings:
        common.parse(settings, words[1:], "")


def test_the_two_commands():
    assert "pip install -r requirements.txt && python sfd_minimal.py --forget 0 --to 1" in COMMANDS
    assert "pip install -r requirements.txt && python -m pytest" in COMMANDS
    assert "python -m pytest" in (ROOT / ".ci" / "run").read_text()


def test_options_named_are_options():
    known = {f"--{f.name.replace('_', '-')}"
             for s in (sfd_minimal.Settings, train_teacher.Settings, baselines.Settings) for f in dataclasses.fields(s)}
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+",
                             README.replace("fidelity --gpu 0 --fid --input1 images --input2 KEPT", "")):
        assert option in known | {"--help", "--seconds", "--audit", "--published", "--profile"}, option


def test_lines_of_code_quoted_are_in_the_file():
    source = re.sub(r"\s+", " ", (ROOT / "sfd_minimal.py").read_text())
    for quoted in re.findall(r"^\| .*? \| `(.+?)` \|$", README.split("## Use it")[0], re.M):
        for part in re.split(r"\.\.\.\)?|;  ", quoted):
            assert re.sub(r"\s+", " ", part.strip()) in source.replace("torch.randn_like(x_g)", "eps"), part


def test_table_is_made_from_the_results():
    table = README.split("<!-- table -->")[1].split("<!-- end of table -->")[0].strip()
    assert table == evaluate.results_table(sorted((ROOT / "results").glob("*-*.json")))


def test_full_runs_with_other_settings_are_in_the_results():
    """Each run kept in results/tried, and each of the results that stands beside it, has its row, number for number."""
    tried = sorted((ROOT / "results" / "tried").glob("*.json"))
    text = (ROOT / "results" / "tried" / "README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines() if line.startswith("|")]
    beside = {path.stem.split("_")[0].replace("mnist-forget", "mnist-paper-forget") for path in tried}
    for path in tried + [ROOT / "results" / f"{name}.json" for name in beside]:
        m = json.loads(path.read_text())
        percent = [f"{100 * m[k]:.2f} %" for k in ("ua", "override_share", "kept_accuracy")]
        assert [*percent, f"{m['fd'] / m['teacher']['fd']:.2f}", f"{m['recall']:.3f}"] in rows, path.name


def test_tables_of_methods_and_audit_are_made_from_the_results():
    between = lambda name: README.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0].strip()
    compared, audited = result("mnist_baselines"), result("mnist_audit")
    assert between("baselines") == baselines.table(compared) and between("audit") == audit.table(audited["networks"])
    assert list(compared["methods"]) == list(baselines.METHODS) + list(baselines.ONE_STEP)
    assert (set(audited["networks"]) >= {"sfd", "sfd_folded", "retrain", "retrain_sid", "embedding_copy"}
            and compared["machine"]["torch"] and audited["machine"]["torch"])
    for sentence in audit.in_words("sfd", audited["networks"]["sfd"]).splitlines():
        assert sentence in unwrapped(README), sentence


def test_methods_use_the_best_settings_of_their_sweep():
    """Best is the largest sum of UA and kept accuracy, and of equal ones that of the smallest FD,
    as the README says."""
    with open(ROOT / "results" / "mnist_baselines_sweep.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    results = result("mnist_baselines")["methods"]
    for name in {row["method"] for row in rows}:
        best = max((row for row in rows if row["method"] == name),
                   key=lambda row: (float(row["ua"]) + float(row["kept_accuracy"]), -float(row["fd"])))
        assert best["settings"] == baselines.METHODS[name].in_words(), name
        assert (results[name]["settings"]["lr"] == baselines.METHODS[name].lr
                and results[name]["settings"]["steps"] == baselines.METHODS[name].steps), name


def test_headline_is_the_main_run():
    m = result("mnist-forget0-to1")
    assert m["settings"]["forget"] == ["0"] and m["settings"]["to"] == ["1"] and not m["settings"]["init_from"]
    defaults = as_json(dataclasses.asdict(sfd_minimal.Settings()))
    assert {k for k, v in m["settings"].items() if v != defaults[k]} <= {"to", "out", "resume", "overwrite"}
    head = README.split("Run it")[0]
    assert (f"held-out images is {m['fd_floor']:.2f}, " in unwrapped(head)
            and m["machine"]["torch"].split("+")[0] in head)
    assert f"| the teacher | 35 | | | {m['teacher']['kept_accuracy']:.2%} | {m['teacher']['fd']:.2f} | |\n" in head
    start = ("from the one-step generator that comes with the project "
             f"(made once, in {m['un_erased']['seconds']:,.0f} s)")
    rows = {"**the command below**": "mnist-forget0-to1", start: "mnist-from-sid-forget0-to1",
            "in one stage, but for longer, at lower rates": "mnist-hour-forget0-to1"}
    for name, file in rows.items():
        m = result(file)
        assert m["n_forgotten"] == 5000 and m["ua_judge2"] == 1 and m["settings"]["seed"] == 0
        row = [f"{m['ua']:.2%}", f"{m['override_share']:.2%}", f"{m['kept_accuracy']:.2%}",
               f"{m['fd']:.2f}", f"{m['seconds']:.0f}"]
        assert f"| {name} | 1 | {' | '.join(row)} |\n" in head, name


def test_two_stages_are_one_command():
    """In the README, in the comparison, and in each of the results."""
    options = lambda words: as_json(common.comparable(common.parse(sfd_minimal.Settings, words, "")))
    words = {"C_F": "0", "C_O": "1", "SID": "teachers/mnist_sid.pt"}
    said = options(shlex.split(next(c for c in COMMANDS if "--init-from teachers/mnist_sid.pt" in c))[2:])
    assert said == options([words.get(word, word) for word in baselines.ONE_STEP["sfd_anchored"]])
    files = sorted((ROOT / "results").glob("mnist-from-sid-*.json"))
    assert len(files) == 5
    for path in files:
        run = json.loads(path.read_text())["settings"]
        assert {k for k in said if said[k] != run[k]} <= {"forget", "to", "seed"}, path.name


@pytest.mark.parametrize("teacher", ["mnist", "mnist_plain"])
def test_teachers_readme_says_what_was_measured(teacher):
    text = (ROOT / "teachers" / "README.md").read_text()
    confusion = read_file(ROOT / "teachers" / f"{teacher}_measured.pt", "measured")["stats"]["confusion"]
    assert f"{100 * confusion.diag().sum().item() / confusion.sum().item():.2f}" in text
    assert " | ".join(f"{100 * a:.1f}" for a in (confusion.diag() / confusion.sum(1)).tolist()) in text


def test_teachers_readme_says_what_the_one_step_generator_draws():
    text = unwrapped((ROOT / "teachers" / "README.md").read_text())
    measured = read_file(ROOT / "teachers" / "mnist_sid_measured.pt", "measured")
    first, second = (c.diag().sum().item() / c.sum().item()
                     for c in (measured["stats"]["confusion"], measured["confusion2"]))
    assert f"{100 * first:.2f} % judged as their label ({100 * second:.2f} % by the second judge)" in text


def test_files_named_exist():
    for name in re.findall(r"(?<=\| `)[\w.]+/?(?=` \|)", README.split("## Files")[1]):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / name).exists(), name


def test_requirements_give_a_reason_each():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert re.match(r"^[a-z]+>=[\d.]+ +# \S", line), line
