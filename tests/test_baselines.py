"""The other methods: each loss against what its formula says, and the whole bench at a tiny size."""
import copy
import csv
import dataclasses
import json
import sys

import pytest
import torch

import baselines
import common
from conftest import ROOT
from edm_unet import load_checkpoint
from test_commands import run

C_F, C_O = 0, 1
SMALL = {k: dataclasses.replace(m, steps=min(m.steps, 2), batch=8) for k, m in baselines.METHODS.items()}


@pytest.fixture
def world(tiny):
    """A teacher of random weights, recorded paths of it, and a network that unlearns: a copy."""
    torch.manual_seed(0)
    phi, _ = load_checkpoint(tiny)
    phi.requires_grad_(False)
    phi.bf16 = False  # what is compared here differs by less than bfloat16 can tell
    data = lambda: (torch.randint(256, (60, 1, 28, 28), dtype=torch.uint8), torch.arange(60) % 10)
    w = baselines.World(phi, C_F, C_O, {"p_mean": 0.2, "guidance": 1.3}, 8, torch.device("cpu"), data)
    w.eta, w.beta, w.lam, w.reverse = 1.0, 0.5, 10.0, False
    v = copy.deepcopy(phi).requires_grad_(True)
    baselines.record_paths(v, w, n=4)
    return v, w


def test_paths_are_the_samplers(world):
    v, w = world
    assert (w.states.shape == (35, 4, 1, 28, 28) and w.sigmas[0].item() == pytest.approx(80)
            and w.sigmas.min().item() == pytest.approx(0.002, rel=1e-3))
    assert w.states[0].std().item() == pytest.approx(80, rel=0.1)


def test_copying_the_label_is_the_fixed_point_of_swapping_it(world):
    v, w = world
    assert baselines.label_swap(v, w) > 1e-6 and baselines.all_but_one(v, w) > 1e-6
    baselines.copy_label(v, w)
    assert baselines.label_swap(v, w) < 1e-10 and baselines.all_but_one(v, w) < 1e-10


def test_esd_without_guidance_asks_for_the_unconditional(world):
    v, w = world
    w.eta = 0.0
    with torch.no_grad():
        v.model.map_label.weight[:, C_F] = 0  # then c_f is answered like the null label
    assert baselines.esd(v, w) < 1e-10
    w.eta = 1.0
    assert baselines.esd(v, w) > 1e-6


def test_reversed_guidance_points_away(world):
    v, w = world
    w.reverse, w.beta = True, 0.0
    # a network whose guidance term of c_f is that of the teacher, reversed, to first order in the embedding
    with torch.no_grad():
        small = copy.deepcopy(w.phi)
        small.model.map_label.weight[:, C_F] *= 1e-3
        w.phi = small
        v.load_state_dict(small.state_dict())
        as_is = baselines.all_but_one(v, w)
        v.model.map_label.weight[:, C_F] *= -1
    assert baselines.all_but_one(v, w) < 0.05 * as_is


def test_amnesia_holds_what_matters(world):
    v, w = world
    baselines.replay_and_fisher(v, w)
    assert (set(w.replay_labels.tolist()) == set(range(1, 10))
            and all((f >= 0).all() for f in w.fisher) and sum(f.sum() for f in w.fisher) > 0)
    with torch.no_grad():
        for p in v.parameters():
            p += 0.01
    loss = {}
    for w.lam in (0.0, 1e6):
        torch.manual_seed(1)
        loss[w.lam] = baselines.selective_amnesia(v, w).item()
    by_hand = 1e6 * sum((f * 0.01 ** 2).sum() for f in w.fisher).item()
    assert loss[1e6] - loss[0.0] == pytest.approx(by_hand, rel=1e-2)


def test_saliency_takes_half_of_the_weights(world):
    v, w = world
    baselines.saliency(v, w)
    share = sum(m.sum() for m in w.mask) / sum(m.numel() for m in w.mask)
    assert 0.3 < share <= 0.5


@pytest.fixture(scope="module")
def bench(tmp_path_factory, mnist_dir):
    """Every method but the slowest, two steps each, from the teacher that comes with the project."""
    folder = tmp_path_factory.mktemp("bench")
    chosen = ["esd", "salun", "embedding_copy", "sid", "sfd", "sfd_folded"]
    argv = ["--per-label", "4", "--data-dir", str(mnist_dir), "--out", str(folder / "out"),
            "--results", str(folder / "results" / "b.json"), "--method", *chosen]
    patch = pytest.MonkeyPatch()
    patch.setattr(baselines, "METHODS", SMALL)
    patch.setitem(baselines.ONE_STEP, "sfd", [*baselines.ONE_STEP["sfd"], "--steps", "2", "--batch", "8"])
    baselines.main(argv)
    yield folder, argv
    patch.undo()


def test_bench_writes_table_and_figure(bench):
    folder, _ = bench
    results = json.loads((folder / "results" / "b.json").read_text())
    assert (list(results["methods"]) == ["esd", "salun", "embedding_copy", "sid", "sfd", "sfd_folded"]
            and (folder / "results" / "b.png").exists())
    assert (results["methods"]["salun"]["real_data"] == "kept and forgotten"
            and results["methods"]["esd"]["nfe"] == 35 and results["methods"]["sid"]["nfe"] == 1)
    copied = results["methods"]["embedding_copy"]
    assert copied["ua"] > 0.9 and copied["kept_accuracy"] == pytest.approx(results["teacher"]["kept_accuracy"])
    assert results["methods"]["sid"]["ua"] < 0.3
    sfd, folded = results["methods"]["sfd"], results["methods"]["sfd_folded"]
    assert sfd["per_class_accuracy"] == pytest.approx(folded["per_class_accuracy"], abs=0.01), (
        "folding changed the images")
    assert baselines.table(results).count("\n") == 8


def test_bench_resumes_what_is_finished(bench, monkeypatch):
    folder, argv = bench
    with pytest.raises(common.BadInput, match="holds a run already"):
        baselines.main(argv)
    monkeypatch.setattr(baselines, "unlearn", lambda *a, **kw: pytest.fail("a finished method ran again"))
    baselines.main([*argv, "--resume"])
    for option, value, says in (("--per-label", "5", "per_label was 4 and is 5"), ("--to", "2", "to was 1 and is 2")):
        with pytest.raises(common.BadInput, match=says):
            baselines.main([*argv, "--resume", option, value])


def test_masked_weights_stay(bench):
    folder, _ = bench
    (v, _), (phi, _) = (load_checkpoint(folder / "out" / "salun" / "generator.pt"),
                        load_checkpoint(ROOT / "teachers" / "mnist.pt"))
    same = (sum((p == q).sum() for p, q in zip(v.parameters(), phi.parameters())).item()
            / sum(p.numel() for p in phi.parameters()))
    assert 0.4 < same < 0.95


def test_sweep_adds_only_what_is_missing(tmp_path, mnist_dir, monkeypatch):
    small = {k: dataclasses.replace(m, tried=m.tried[:1]) for k, m in SMALL.items()}
    monkeypatch.setattr(baselines, "METHODS", small)
    monkeypatch.setattr(baselines.Bench, "judge",
                        lambda *a: {"ua": 0.25, "override_share": 0.5, "kept_accuracy": 0.75, "fd": 1.0})
    argv = ["--sweep", "--method", "label_swap", "--data-dir", str(mnist_dir),
            "--out", str(tmp_path / "out"), "--results", str(tmp_path / "b.json")]
    baselines.main(argv)
    with open(tmp_path / "b_sweep.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert ([r["settings"] for r in rows] == ["steps=2 lr=0.01 only=map_label.weight", "steps=2 lr=0.0003"]
            and rows[0]["ua"] == "0.25")
    monkeypatch.setattr(baselines, "unlearn", lambda *a, **kw: pytest.fail("a row was made"))
    baselines.main(argv)
    for other in ("--forget", "3"), ("--to", "2"), ("--seed", "1"):
        with pytest.raises(pytest.fail.Exception, match="a row was made"):
            baselines.main([*argv, *other])


@pytest.mark.parametrize("words, says", [
    (["--method", "magic"], "not known"), (["--to", "0"], "itself to be forgotten"),
    (["--forget", "11"], "out of range"), (["--lr", "1"], "unrecognized"), (["--sweep"], "no meaning with --sweep"),
    (["--method", "sfd_folded", "--out", "nowhere"], "not there")])
def test_bad_input_is_refused(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["baselines.py", "--per-label", "2", *words])
    with pytest.raises(SystemExit) as stop:
        common.command(baselines.main)
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_command_resumes_from_a_method_s_checkpoint(tmp_path):
    """The command itself, as if stopped between training and judging:
    the training is not done again, and the number is the same."""
    script = tmp_path / "small.py"
    script.write_text(f"""
import dataclasses, sys
sys.path.insert(0, {str(ROOT)!r})
import baselines
from common import command
baselines.METHODS = {{k: dataclasses.replace(m, steps=min(m.steps, 6), batch=8) for k, m in baselines.METHODS.items()}}
command(baselines.main)
""")
    argv = [sys.executable, script, "--method", "label_swap", "--per-label", "4",
            "--out", "out", "--results", "b.json", "--save-every", "0.001"]
    run(*argv, cwd=tmp_path)
    whole = (tmp_path / "b.json").read_text()
    (tmp_path / "out" / "label_swap" / "metrics.json").unlink()
    run(*argv, "--resume", cwd=tmp_path)
    assert (json.loads((tmp_path / "b.json").read_text())["methods"]["label_swap"]["ua"]
            == json.loads(whole)["methods"]["label_swap"]["ua"])
