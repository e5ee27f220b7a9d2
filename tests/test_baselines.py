"""The other methods: each loss against what its formula says, and the whole bench at a tiny size."""
import copy
import csv
import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from conftest import CPU, ROOT, module, run
from lab import baselines, methods, sample, sweep, tour
from lab.checkpoint import load_checkpoint
from lab.errors import BadInput
from lab.evaluate import Evaluator
from test_runs import stopped_after

C_F, C_O = 0, 1
FEW = partial(methods.record_paths, n=4)
SMALL = {k: dataclasses.replace(m, steps=min(m.steps, 2), batch=8, **{"before": FEW} if m.before is methods.record_paths
                                else {}) for k, m in methods.METHODS.items()}
CHOSEN = ["retrain", "esd", "salun", "embedding_copy", "retrain_sid", "sid", "sfd", "sfd_two_stage"]


@pytest.fixture
def world(tiny):
    """A teacher of random weights, recorded paths of it, and a network that unlearns: a copy."""
    torch.manual_seed(0)
    phi, _ = load_checkpoint(tiny)
    phi.requires_grad_(False)
    phi.bf16 = False  # what is compared here differs by less than bfloat16 can tell
    data = lambda: (torch.randint(256, (60, 1, 28, 28), dtype=torch.uint8), torch.arange(60) % 10)
    w = methods.World(phi, C_F, C_O, {"p_mean": 0.2, "guidance": 1.3}, 8, CPU, data)
    w.eta, w.beta, w.lam, w.scattered = 1.0, 0.5, 10.0, False
    network = copy.deepcopy(phi).requires_grad_(True)
    FEW(network, w)
    return network, w


def test_paths_are_the_samplers(world):
    _, w = world
    assert (w.states.shape == (35, 4, 1, 28, 28) and w.sigmas[0].item() == pytest.approx(80)
            and w.sigmas.shape == (35, 1, 1, 1) and w.sigmas.min().item() == pytest.approx(0.002, rel=1e-3))
    assert w.states[0].std().item() == pytest.approx(80, rel=0.1)
    y, sigma, c_f, c_o = w.partial()
    assert torch.equal(c_f, w.label(C_F)) and torch.equal(c_o, w.label(C_O))
    assert y.shape == (8, 1, 28, 28) and sigma.shape == (8, 1, 1, 1)
    for row, level in zip(y, sigma.flatten()):  # each state with the noise level that it was recorded at
        i, _ = (w.states == row).flatten(2).all(2).nonzero()[0].tolist()
        assert w.sigmas[i] == level


def test_copying_the_label_is_the_fixed_point_of_swapping_it(world):
    network, w = world
    assert methods.label_swap(network, w) > 1e-6 and methods.all_but_one(network, w) > 1e-6
    methods.copy_label(network, w)
    assert methods.label_swap(network, w) < 1e-10 and methods.all_but_one(network, w) < 1e-10


def test_all_but_one_holds_the_unconditional_by_beta(world):
    """A network that is off by the same amount under c_f and under no label: its guidance is right, the rest is not."""
    network, w = world
    methods.copy_label(network, w)
    with torch.no_grad():
        network.model.dec["7x7_aux_conv"].bias += 0.1
    w.beta = 0.0
    assert methods.all_but_one(network, w) < 1e-10
    w.beta = 0.5
    assert methods.all_but_one(network, w) > 1e-3


def test_esd_without_guidance_asks_for_the_unconditional(world):
    network, w = world
    w.eta = 0.0
    with torch.no_grad():
        network.model.map_label.weight[:, C_F] = 0  # then c_f is answered like the null label
    assert methods.esd(network, w) < 1e-10
    w.eta = 1.0
    assert methods.esd(network, w) > 1e-6


def test_amnesia_holds_what_matters(world):
    network, w = world
    methods.replay_and_fisher(network, w)
    assert (set(w.replay_labels.tolist()) == set(range(1, 10))
            and all((f >= 0).all() for f in w.fisher) and sum(f.sum() for f in w.fisher) > 0)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.01
    loss = {}
    for w.lam in (0.0, 1e6):
        torch.manual_seed(1)
        loss[w.lam] = methods.selective_amnesia(network, w).item()
    by_hand = 1e6 * sum((f * 0.01 ** 2).sum() for f in w.fisher).item()
    assert loss[1e6] - loss[0.0] == pytest.approx(by_hand, rel=1e-2)


def test_saliency_takes_half_of_the_weights(world):
    network, w = world
    methods.saliency(network, w)
    share = sum(m.sum() for m in w.mask) / sum(m.numel() for m in w.mask)
    assert 0.3 < share <= 0.5


@pytest.fixture
def of_tiny(tiny, monkeypatch):
    """Benches and sweeps start from the teacher that has learned nothing."""
    load = baselines.load_teacher
    monkeypatch.setattr(baselines, "load_teacher", lambda path, *of: load(path or tiny, *of))


@pytest.fixture(scope="module")
def bench(tmp_path_factory, mnist_dir):
    """Every method but those of replay and of recorded paths alone, two steps each, from the shipped teacher; and the
    number of times that the judges were asked."""
    folder, judged = tmp_path_factory.mktemp("bench"), []
    argv = ["--per-label", "1", "--data-dir", str(mnist_dir), "--out", "out", "--results", "results/b.json",
            "--device", "cpu", "--method", *CHOSEN]
    measure = Evaluator.measure
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(baselines, "METHODS", SMALL)
        patch.setattr(sample, "TEACHER_STEPS", 6)  # 11 evaluations are enough to see a digit
        for name in ("retrain_sid", "sfd", "sfd_two_stage"):
            tuned = baselines.TUNED.get(("mnist", name), {})
            patch.setitem(baselines.TUNED, ("mnist", name), tuned | dict(steps=2, batch=8))
        patch.setattr(Evaluator, "measure", lambda *a, **kw: judged.append(kw["progress"]) or measure(*a, **kw))
        baselines.main(argv)
        yield folder, argv, list(judged)


def test_bench_writes_table_and_figure(bench):
    folder, _, judged = bench
    results = json.loads((folder / "results" / "b.json").read_text())
    rows = results["methods"]
    assert list(rows) == CHOSEN and (folder / "results" / "b.png").exists()
    methods_judged = [what for what in judged if what != "judging the control"]
    assert methods_judged == [f"judging {name}" for name in ("teacher", *CHOSEN)], "each once"
    assert len(judged) == len(methods_judged) + 2, "the two controls once each, whatever is held against them"
    assert rows["salun"]["real_data"] == "kept and forgotten" and rows["esd"]["real_data"] == "none"
    assert rows["retrain_sid"]["real_data"] == rows["retrain"]["real_data"] == "kept"
    assert [m["nfe"] for m in rows.values()] == [35, 35, 35, 35, 1, 1, 1, 1]
    assert [rows["retrain"]["fd_control"], rows["retrain_sid"]["fd_control_kept"]] == pytest.approx([0, 0], abs=1e-2)
    assert all(m["fd_control"] > 0.1 for name, m in rows.items() if not name.startswith("retrain"))
    assert all(m["n"] == 9 + 5 and m["n_forgotten"] == 5 for m in rows.values())
    copied = rows["embedding_copy"]
    assert copied["ua"] > 0.9 and copied["kept_accuracy"] == pytest.approx(results["teacher"]["kept_accuracy"])
    assert rows["sid"]["ua"] < 0.3 and rows["sid"]["settings"]["forget"] == ["none"]
    assert (rows["sfd"]["settings"]["steps"] == 2 and rows["sfd"]["settings"]["forget"] == ["0"]
            and rows["sfd"]["settings"]["init_from"] == "" and rows["sfd"]["settings"]["forget_share"] is None)
    two = rows["sfd_two_stage"]["settings"]
    assert two["init_from"].endswith("teachers/mnist_sid.pt") and two["forget_share"] == 0.5
    assert rows["retrain_sid"]["settings"]["teacher"] == "out/retrain/generator.pt"
    table = baselines.table(results)
    assert table.count("\n") == 2 + len(CHOSEN) and "FD to the control: c_f" in table
    for m in rows.values():
        del m["fd_control"], m["fd_control_kept"]
    assert "control:" not in baselines.table(results)


def test_bench_resumes_what_is_finished(bench, monkeypatch):
    folder, argv, _ = bench
    before = json.loads((folder / "results" / "b.json").read_text())
    with pytest.raises(BadInput, match="holds a run already"):
        baselines.main(argv)
    for what in ("unlearn", "distill"):
        monkeypatch.setattr(baselines, what, lambda *a, **kw: pytest.fail("a finished method ran again"))
    monkeypatch.setattr(baselines.Bench, "picture", lambda *a: None)
    monkeypatch.setattr(baselines.Bench, "judge", lambda self, *a, erased: before["teacher"])  # the teacher's row alone
    baselines.main([*argv, "--resume"])
    assert json.loads((folder / "results" / "b.json").read_text()) == before
    for option, value, says in (("--per-label", "5", "per_label was 1 and is 5"), ("--to", "2", "to was 1 and is 2"),
                                ("--seed", "1", "seed was 0 and is 1")):
        with pytest.raises(BadInput, match=says):
            baselines.main([*argv, "--resume", option, value])


def test_masked_weights_stay(bench):
    folder, _, _ = bench
    (v, _), (phi, _) = (load_checkpoint(folder / "out" / "salun" / "generator.pt"),
                        load_checkpoint(ROOT / "teachers" / "mnist.pt"))
    same = (sum((p == q).sum() for p, q in zip(v.parameters(), phi.parameters())).item()
            / sum(p.numel() for p in phi.parameters()))
    assert 0.4 < same < 0.95


def test_sweep_adds_only_what_is_missing(of_tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(baselines, "METHODS", SMALL)
    monkeypatch.setattr(sweep, "TRIED", {"label_swap": ({"lr": 0.01}, {"lr": 3e-4})})
    monkeypatch.setattr(baselines.Bench, "judge",
                        lambda *a: {"ua": 0.25, "override_share": 0.5, "kept_accuracy": 0.75, "fd": 1.0})
    argv = ["--method", "label_swap", "--device", "cpu", "--results", "b.csv"]
    sweep.main(argv)
    with open(tmp_path / "b.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["settings"] for r in rows] == ["lr=0.01", "lr=0.0003"] and rows[0]["ua"] == "0.25"
    monkeypatch.setattr(baselines, "unlearn", lambda *a, **kw: pytest.fail("a row was made"))
    sweep.main(argv)
    for other in ("--forget", "3"), ("--to", "2"), ("--seed", "1"):
        with pytest.raises(pytest.fail.Exception, match="a row was made"):
            sweep.main([*argv, *other])
    monkeypatch.setattr(baselines, "unlearn", lambda *a, **kw: (None, {}, 0.0))
    sweep.main([*argv, "--seed", "1"])
    with open(tmp_path / "b.csv", newline="") as f:
        assert [r["seed"] for r in csv.DictReader(f)] == ["0", "0", "1", "1"], "what was there is kept"


def test_a_method_s_training_is_not_done_again(of_tiny, tmp_path, monkeypatch):
    """As if stopped between training and judging, and as if stopped within training: the same numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(baselines, "METHODS",
                        {"label_swap": dataclasses.replace(SMALL["label_swap"], steps=6, batch=4)})
    argv = ["--method", "label_swap", "--per-label", "2", "--device", "cpu", "--out", "out", "--results", "b.json",
            "--save-every", "1e-9"]
    numbers = lambda: {k: v for k, v in json.loads((tmp_path / "b.json").read_text())["methods"]["label_swap"].items()
                       if k != "seconds"}
    baselines.main(argv)
    whole, (network, _) = numbers(), load_checkpoint(tmp_path / "out" / "label_swap" / "generator.pt")
    (tmp_path / "out" / "label_swap" / "metrics.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "update_average", lambda *a: pytest.fail("trained again"))
        baselines.main([*argv, "--resume"])
    assert numbers() == whole
    with stopped_after(3):
        baselines.main([*argv, "--overwrite"])
    baselines.main([*argv, "--resume"])
    again, _ = load_checkpoint(tmp_path / "out" / "label_swap" / "generator.pt")
    assert numbers() == whole and all(map(torch.equal, again.parameters(), network.parameters()))


def test_the_command(tmp_path):
    out = run(*module("lab.baselines"), "--method", "embedding_copy", "--per-label", 1, "--device", "cpu",
              cwd=tmp_path).stdout
    folder = "runs/mnist-baselines-forget0-to1"
    assert "`embedding_copy`" in out and f"next: python -m lab.audit {folder}" in out
    assert (tmp_path / folder / "embedding_copy" / "generator.pt").exists()
    assert {f.name for f in (tmp_path / "results").iterdir()} == {"mnist_baselines.json", "mnist_baselines.png"}


def test_every_method_is_tried_at_four_settings_and_has_one_of_them():
    tried = {name for name, m in methods.METHODS.items() if m.steps} - {"retrain"}
    assert set(sweep.TRIED) == tried | {"sfd", "sfd_two_stage"}
    assert all(len(settings) == 4 for settings in sweep.TRIED.values())
    for name in tried:
        m = methods.METHODS[name]
        assert sum(m.changed(change) == m for change in m.tried) == 1, name


def test_salun_relabels_as_its_code_does_or_at_random(world):
    network, w = world
    methods.saliency(network, w)
    asked, label = [], w.label
    w.label = lambda k: asked.append(k) or label(k)
    for w.scattered, which in ((False, {C_F + 1}), (True, set(range(1, 10)))):
        asked.clear()
        for _ in range(4):
            methods.salun(network, w)
        relabelled = asked[1::4]
        assert {k for of in relabelled for k in ([of] if isinstance(of, int) else of.tolist())} <= which
        assert isinstance(relabelled[0], int) is not w.scattered


def test_a_tour_starts_from_the_teacher_and_what_forgot_nothing(monkeypatch):
    monkeypatch.setattr(sample, "TEACHER_STEPS", 6)
    bench = baselines.Bench(baselines.Settings(per_label=3, device="cpu"))
    start = tour.starts(bench)
    assert list(start) == [35, 1] and all(m["n"] == 30 and m["kept_accuracy"] > 0.9 for m in start.values())
    assert start[35]["fd"] != start[1]["fd"]
    monkeypatch.setattr(baselines, "un_erased", lambda info, device: None)
    with pytest.raises(BadInput, match="needs a one-step generator"):
        tour.starts(bench)


def test_a_tour_goes_round_and_adds_only_what_is_missing(tmp_path, monkeypatch):
    """Each class is overridden by the next, and held against the network that it started from."""
    made, fell = [], {"esd": 7, "sfd_two_stage": 2}
    of = lambda low=None: {"per_class_accuracy": [0.5 if k == low else 1.0 for k in range(10)]}

    def run_method(name, bench):
        made.append((bench.s.forget, bench.s.to, bench.s.seed, name))
        return of(fell[name]) | dict.fromkeys(tour.NUMBERS, 0.25) | {
            "nfe": 1 if name == "sfd_two_stage" else 35, "forget": int(bench.s.forget), "to": int(bench.s.to)}
    monkeypatch.setattr(baselines, "Bench", lambda s: SimpleNamespace(s=s))
    monkeypatch.setattr(tour, "starts", lambda bench: {35: of(), 1: of(1)})
    monkeypatch.setattr(baselines, "run_method", run_method)
    monkeypatch.chdir(tmp_path)
    argv = ["--method", "esd", "sfd_two_stage", "--results", "t.csv", "--device", "cpu"]
    tour.main([*argv, "--forget", "4", "9", "--seed", "0", "1"])
    assert made == [(f, to, seed, name) for f, to in (("4", "5"), ("9", "0")) for seed in (0, 1)
                    for name in ("esd", "sfd_two_stage")]
    with open("t.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["look_alike"], r["lost"]) for r in rows] == 4 * [("7 - seven", "0.5"), ("2 - two", "0.5")]
    made.clear()
    tour.main(argv)
    assert len(made) == 2 * 10 - 4, "seed 0 of 4 and 9 is there"
