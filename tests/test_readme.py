"""What the READMEs say is so: commands parse, lines of code are in the file, tables are those that the results make."""
import csv
import dataclasses
import importlib
import json
import re
import shlex

import pytest

import sfd_minimal
from conftest import ROOT
from lab import audit, baselines, cli, methods, readme, report, sweep
from lab.errors import RunFailed
from lab.figures import trade_figure

README = (ROOT / "README.md").read_text()
ALL = [ROOT / name for name in (*readme.FILES, "teachers/README.md")]
TEXT = "\n".join(path.read_text() for path in ALL).replace("\\\n", " ")  # a command may go on in the next line
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S)
            for line in block.splitlines() if line.strip()] + re.findall(r"`(python [^`]+)`", TEXT)


def settings_of(words):
    """(settings class, arguments) of the words of a command after `python`."""
    name, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
    assert (ROOT / (name.replace(".", "/") + ".py")).exists(), name
    if "--sample" in rest:
        name = "lab.sample"
    return importlib.import_module(name).Settings, rest


@pytest.mark.parametrize("line", sorted({c for c in COMMANDS if "python " in c and "-m pytest" not in c}))
def test_commands_are_real(line):
    words = shlex.split(line.split("&&")[-1])[1:]
    if words[0].startswith("notebooks/"):
        assert (ROOT / words[0]).exists()
    elif len(words) > 2 or words[0] != "-m":
        cli.parse(*settings_of(words))
    else:
        settings_of(words)


def test_the_two_commands():
    assert "pip install -r requirements.txt && python sfd_minimal.py --forget 0 --to 1" in COMMANDS
    assert "pip install -r requirements.txt && python -m pytest" in COMMANDS
    assert "python -m pytest" in (ROOT / ".ci" / "run").read_text()


def test_readmes_are_read_to_the_end():
    assert len(README.splitlines()) <= 150
    prose = re.sub(r"<!-- table:.*?<!-- end -->", "", (ROOT / "results" / "README.md").read_text(), flags=re.S)
    assert len(prose.splitlines()) <= 150


def test_options_named_are_options():
    modules = ("sfd_minimal", "train_teacher", *(f"lab.{name}" for name in (
        "audit", "baselines", "bench", "evaluate", "fid", "judge", "label_search", "prompt_judge", "prompt_methods",
        "report", "sample", "sweep", "tour")))
    known = {cli.option(f.name) for module in modules
             for f in dataclasses.fields(importlib.import_module(module).Settings) if f.metadata["option"]}
    for option in re.findall(r"(?<![\w<!-])--[a-z][a-z-]+", TEXT):
        assert option in known | {"--help", "--check"}, option


def test_lines_of_code_quoted_are_in_the_file():
    source = re.sub(r"\s+", " ", (ROOT / "sfd_minimal.py").read_text())
    quoted = re.findall(r"^\| .*? \| `(.+?)` \|$", README.split("## Use it")[0], re.M)
    assert len(quoted) == 10
    for line in quoted:
        for part in re.split(r"\.\.\.\)?|;  ", line):
            assert re.sub(r"\s+", " ", part.strip()) in source.replace("torch.randn_like(x_g)", "eps"), part


def test_tables_are_made_from_the_results(monkeypatch):
    readme.main(["--check"])
    monkeypatch.setattr(readme, "read_rows", lambda *path: [row | {"fd": "99"} for row in report.read_rows(*path)])
    with pytest.raises(RunFailed, match="first, summary"):
        readme.main(["--check"])


READ = report.read_rows()


def test_rows_of_runs_say_where_they_come_from():
    assert len({row["id"] for row in READ}) == len(READ) > 90
    for row in READ:
        if row["group"] not in ("teacher", "un_erased", "sweep"):
            assert all(row[k] for k in ("seed", "steps", "lr", "lr_fake", "ua", "fd", "teacher_fd", "n", "seconds",
                                        "device", "name", "torch", "protocol", "commit")), row["id"]


@pytest.mark.parametrize("group, said", [("default", {}), ("two-stage", {"init_from": "teachers/mnist_sid.pt"})])
def test_runs_of_the_readme_are_its_commands(group, said):
    """Each run of the two groups has the settings that the command takes today."""
    rows = [row for row in READ if row["group"] == group]
    assert sorted((r["forget"], r["to"], r["seed"]) for r in rows) == [
        ("0", "1", "0"), ("0", "1", "1"), ("0", "1", "2"), ("4", "9", "0"), ("7", "3", "0")]
    today = dataclasses.asdict(sfd_minimal.Settings(**said))
    for row in rows:
        for name in set(report.SETTINGS) - {"forget", "to", "seed", "teacher", "data"}:
            assert row[name] == report.as_text(today[name]), (row["id"], name)
        bar = 0.999 if group == "default" and row["forget"] == "0" else 0.99
        assert float(row["ua"]) >= bar and row["n_forgotten"] == "5000"


def test_what_is_said_of_cifar10_is_its_rows():
    rows = {row["id"]: row for row in READ if row["data"] == "cifar10"}
    share = lambda row, key, digits=2: f"{100 * float(row[key]):.{digits}f}"
    run = rows["cifar10-two-stage-cifar10-forgetairplane-toautomobile-seed0"]
    start = rows["un_erased-cifar10-forgetairplane-toautomobile-protocol2"]
    assert (f"takes {float(run['seconds']):.0f} s: UA {share(run, 'ua', 1)} %, an automobile in "
            f"{share(run, 'override_share', 1)} %, kept accuracy {share(run, 'kept_accuracy', 1)} % from "
            f"{share(start, 'kept_accuracy', 1)} %" in " ".join(README.split()))
    one = rows["cifar10-one-stage-cifar10-forgetairplane-toautomobile-seed0"]
    assert f"one stage, {float(one['seconds']) / 60:.0f} min, {share(one, 'kept_accuracy', 1)} %" in README
    page = " ".join((ROOT / "results" / "cifar10.md").read_text().split())
    assert f"{share(one, 'override_share')} % automobiles" in page
    assert f"FD {float(one['fd']) / float(one['teacher_fd']):.2f} times the teacher's" in page
    for id, said in {"tried-cifar10-unguided-seed0": "a UA of {} % and an override of {} %",
                     "tried-cifar10-forgetairplane-toautomobile-seed0": "twice these rates ({} and {} %)",
                     "tried-cifar10-guided-100-steps-seed0": "133 s, give {} and {} %",
                     "tried-cifar10-cat-guided-4-seed0": "a UA of {} % and an override of {} %, with a kept"}.items():
        assert said.format(share(rows[id], "ua"), share(rows[id], "override_share")) in page, id
    cats = rows["cifar10-two-stage-cifar10-forgetcat-todog-seed0"]
    assert f"{100 - 100 * float(cats['ua']):.1f} % of what is drawn under *cat*" in page
    most = rows["cifar10-guided-cifar10-forgetcat-todog-seed0"]
    assert (f"at a UA of {share(most, 'ua')} % (judge 2: {share(most, 'ua_judge2')}) and an override of "
            f"{share(most, 'override_share')} %, {share(most, 'kept_accuracy')} % and "
            f"{float(most['fd']) / float(most['teacher_fd']):.2f}" in page)
    start = {"init_from": "teachers/cifar10_sid.pt"}
    for group, said in {"cifar10 two-stage": start, "cifar10 guided": start | {"guidance": 8.0},
                        "cifar10 one stage": {}}.items():
        today = sfd_minimal.Settings(data="cifar10", **said)
        for row in (row for row in READ if row["group"] == group):
            for k in ("steps", "batch", "lr", "lr_fake", "lambda_anchor", "forget_share", "guidance"):
                assert row[k] == report.as_text(getattr(today, k)), (row["id"], k)


def test_what_is_said_of_the_methods_on_cifar10_is_measured():
    page = " ".join((ROOT / "results" / "cifar10.md").read_text().split())
    results, audited = readme.read("cifar10_baselines"), readme.read("cifar10_audit")["networks"]
    teacher, of = results["teacher"], results["methods"]
    drawn = lambda name: f"{100 * of[name]['override_share_judge2']:.1f}"
    kept = lambda name: f"{100 * of[name]['kept_accuracy_judge2']:.1f}"
    taken = lambda name: f"{100 * (teacher['kept_accuracy_judge2'] - of[name]['kept_accuracy_judge2']):.1f}"
    searches = lambda name: [audited[name][f"{what} search"] for what in ("label", "embedding")]
    found = lambda these: " and ".join(f"{100 * one['share']:.0f}" for one in these)
    few = lambda name: found(one["same starts"] for one in searches(name))
    for said in (f"an automobile in {drawn('embedding_copy')} %",
                 f"at {drawn('all_but_one')} and {drawn('salun')} %, "
                 f"for {taken('all_but_one')} and {taken('salun')} points",
                 f"two stages draws {drawn('sfd_two_stage')} %, by its guidance, and keeps the {kept('sid')} %",
                 f"in one stage it is {drawn('sfd')} and {kept('sfd')} %",
                 f"takes {taken('esd')} points along", f"{found(searches('sid'))} % of what `sid` draws",
                 f"in {found(searches('sfd'))} % of `sfd`'s", f"in {found(searches('sfd_two_stage'))} % of",
                 f"has, {few('sfd')} %, and {few('sfd_two_stage')} %)",
                 f"in {found(searches('embedding_copy'))} % of `embedding_copy`'s"):
        assert said in page, said
    assert drawn("label_swap") == drawn("all_but_one_column") == "50.0" and kept("sid") == kept("sfd_two_stage")
    assert all(one["latent search"]["share"] == 1 and one["relearning"]["limit"] == 20 for one in audited.values())


def test_what_forgetting_anywhere_trades(tmp_path):
    points, page = readme.traded(), (ROOT / "results" / "label_search.md").read_text()
    assert len(points) == 10 and min(points, key=lambda name: points[name][0]) == "quick"
    for name in ("quick", "anywhere-seed0", "anywhere-and-searched"):
        assert re.search(rf"\| {name}, tied .*\| {48 * points[name][1]:.0f} of 48 ", page), name
    trade_figure(points, readme.found_in_controls(), tmp_path / "trade.png")
    assert (tmp_path / "trade.png").exists()


def test_what_is_said_of_the_label_search_is_measured():
    page, ends = " ".join((ROOT / "results" / "label_search.md").read_text().split()), readme.ends()
    audited = readme.read("mnist_audit")["networks"] | readme.read("mnist_anywhere_audit")["networks"]
    anywhere, tied_controls = ([f"{name}, tied" for name in names] for names in (readme.OF_ONE, readme.CONTROLS))
    three = lambda numbers: "{:.0f}, {:.0f} and {:.0f}".format(*numbers)
    left = lambda names: three(sum(at["found"] for at in ends[name]) for name in names)
    most = lambda names: three(100 * max(at["most"] for at in ends[name]) for name in names)
    found = lambda search: three(100 * audited[name.removeprefix("mnist_")][f"{search} search"]["share"]
                                 for name in readme.CONTROLS)
    for said in (f"{left(readme.CONTROLS)} of 48 starts end at a 0", f"label finds one in {found('label')} %",
                 f"leaves {left(anywhere)} of 48 starts", f"three draws in {most(anywhere)} %",
                 f"the controls' in {most(readme.CONTROLS)} and, tied, in {most(tied_controls)}",
                 f"in the controls in {found('embedding')} %"):
        assert said in page, said
    strongest = (100 * max(audited[f"retrain_sid-seed{seed}"][search]["share"] for search in audit.SEARCHES)
                 for seed in (1, 2))
    assert "`retrain_sid` of other seeds: {:.0f}, {:.0f} %".format(*strongest) in " ".join(README.split())


def test_what_is_said_of_prompts_is_its_row():
    (row,) = (row for row in READ if (row["group"], row["forget"], row["seed"]) == ("prompts two-stage", "zero", "0"))
    ua, override, colour, elsewhere, other = (f"{100 * float(row[key]):.1f} %" for key in (
        "ua", "override_share", "other_attribute", "ua_unseen_templates", "ua_other_word"))
    assert (f"takes {float(row['seconds']):.0f} s: UA {ua}, drawn as a one {override}, in its colour {colour}; "
            f"UA in templates never trained on {elsewhere}, under the numeral 0, which nobody named, {other}"
            in " ".join(README.split()))


def test_what_is_said_of_the_searches_of_prompts_is_measured():
    page = " ".join((ROOT / "results" / "prompts.md").read_text().split())
    of = readme.read("prompts_baselines")["methods"]
    found = lambda name: f"{100 * of[name]['embedding search']['share']:.0f}"
    few = lambda name: f"{100 * of[name]['embedding search']['same starts']['share']:.0f}"
    noise = of["retrain"]["latent search"]
    for said in (f"finds its zero in {found('uce')} %",
                 f"in {found('sfd')} % from the teacher and in {found('sfd_two_stage')} % from",
                 f"from as few starts as the others have, in {few('sfd')} and {few('sfd_two_stage')} %.",
                 f"finds a zero from {noise['share'] * noise['n']:.0f} of {noise['n']} starts"):
        assert said in page, said
    assert of["retrain"]["embedding search"]["share"] == 0


def test_methods_use_the_best_settings_of_their_sweep():
    """Each was tried with what it says, ran with what `sweep.best` makes of the rows, and ships with that."""
    with open(ROOT / "results" / "mnist_baselines_sweep.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    results = json.loads((ROOT / "results" / "mnist_baselines.json").read_text())["methods"]
    assert list(results) == [*methods.METHODS, *baselines.ONE_STEP]
    assert {row["method"] for row in rows} == set(sweep.TRIED)
    for name, tried in sweep.TRIED.items():
        rows_of = [row for row in rows if row["method"] == name]
        assert sorted(row["settings"] for row in rows_of) == sorted(map(sweep.in_words, tried)), name
        chosen = next(change for change in tried if sweep.in_words(change) == sweep.best(rows_of)["settings"])
        if name in methods.METHODS:
            assert methods.METHODS[name].changed(chosen) == methods.METHODS[name], name
        ran = results[name]["settings"]
        assert {k: ran.get("options", {}).get(k, ran.get(k)) for k in chosen} == pytest.approx(chosen), name


def test_files_named_exist():
    for path in ALL:
        for name in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", path.read_text()):
            assert (path.parent / name).exists(), (path, name)
        for name in re.findall(r"`((?:lab|teachers|results|notebooks|tests)/[\w./]+)`", path.read_text()):
            assert (ROOT / name).exists(), (path, name)


def test_requirements_give_a_reason_each():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert re.match(r"^[a-z]+>=[\d.]+ +# \S", line), line


def test_no_path_of_a_machine_is_committed():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py"), *ALL, ROOT / "results" / "runs.csv"]:
        assert not re.search(r"/(tmp|work|root|home)/", path.read_text()), path


def test_what_forgetting_took_along_is_the_label_that_fell_most():
    m = {"forget": [4], "to": [9], "per_class_accuracy": [0.9, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.6, 1.0, 0.2],
         "un_erased": {"per_class_accuracy": [1.0] * 10}}
    assert report.look_alike(m) == {"look_alike": 7, "look_alike_lost": pytest.approx(0.4)}, "not the override"
    assert report.look_alike(m | {"un_erased": None}) == {}
