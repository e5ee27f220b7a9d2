"""Each baseline minimises the loss of its formula, and a comparison is complete, resumable and kept to its folder."""
import copy
import dataclasses
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from conftest import CPU, ROOT, image_folder, module, run, save_network, tiny_network
from edm_unet import BadInput, Stopped, load_network, save_file
from lab.baselines import __main__ as command
from lab.baselines import compare, grid, methods
from lab.baselines.compare import Comparison
from lab.baselines.methods import METHODS, Method
from lab.core.images import load_images
from lab.core.tables import read_json, read_rows
from lab.evaluate import draw
from lab.evaluate.evaluator import Evaluator
from lab.evaluate.judges import Judge, class_stats

C_F, C_O = 0, 1
RECORD_FEW = partial(methods.record_paths, n=4)
FISHER_OF_FEW = partial(methods.replay_and_fisher, n=20)
FEW = {methods.record_paths: RECORD_FEW, methods.replay_and_fisher: FISHER_OF_FEW}


def small(method):
    """A method with two steps of eight images."""
    before = FEW.get(method.before, method.before)
    return dataclasses.replace(method, steps=min(method.steps, 2), batch=8, before=before)


SMALL = {name: small(method) for name, method in METHODS.items()}


@pytest.fixture
def world(tiny):
    """A network that unlearns and its world: a teacher of random weights, with recorded paths."""
    torch.manual_seed(0)
    teacher, _ = load_network(tiny)
    teacher.bf16 = False  # the tests compare numbers that bfloat16 cannot tell apart
    network = copy.deepcopy(teacher)
    teacher.requires_grad_(False)
    images = torch.randint(256, (60, 1, 28, 28), dtype=torch.uint8)
    w = methods.World(teacher, C_F, C_O, {"p_mean": 0.2, "guidance": 1.3}, 8, CPU,
                      lambda: (images, torch.arange(60) % 10))
    w.eta, w.beta, w.lam, w.scattered = 1.0, 0.5, 10.0, False
    RECORD_FEW(network, w)
    return network, w


# ---------------------------------------------------------------------------------------------------------- the losses

def test_recorded_paths_are_the_samplers(world):
    _, w = world
    assert w.states.shape == (35, 4, 1, 28, 28) and w.sigmas.shape == (35, 1, 1, 1)
    assert w.sigmas[0].item() == pytest.approx(80) and w.sigmas.min().item() == pytest.approx(0.002, rel=1e-3)
    assert w.states[0].std().item() == pytest.approx(80, rel=0.1)
    y, sigma, c_f, c_o = w.recorded_states()
    assert torch.equal(c_f, w.label(C_F)) and torch.equal(c_o, w.label(C_O))
    assert y.shape == (8, 1, 28, 28) and sigma.shape == (8, 1, 1, 1)
    for row, level in zip(y, sigma.flatten()):  # each state has the noise level at which it was recorded
        i, _ = (w.states == row).flatten(2).all(2).nonzero()[0].tolist()
        assert w.sigmas[i] == level


def test_copying_the_label_is_the_fixed_point_of_swapping_it(world):
    network, w = world
    assert methods.label_swap(network, w) > 1e-6 and methods.all_but_one(network, w) > 1e-6
    methods.copy_label(network, w)
    assert methods.label_swap(network, w) < 1e-10 and methods.all_but_one(network, w) < 1e-10
    weight, before = network.model.map_label.weight, w.teacher.model.map_label.weight
    assert (weight != before).any(0).nonzero().flatten().tolist() == [C_F], "no other column changes"


def test_all_but_one_holds_the_unconditional_score_by_beta(world):
    """A network that is off by the same amount under c_f and under no label has the right guidance term."""
    network, w = world
    methods.copy_label(network, w)
    with torch.no_grad():
        network.model.dec["7x7_aux_conv"].bias += 0.1
    w.beta = 0.0
    assert methods.all_but_one(network, w) < 1e-10
    w.beta = 0.5
    assert methods.all_but_one(network, w) > 1e-3


def test_esd_without_guidance_moves_to_the_unconditional_score(world):
    network, w = world
    with torch.no_grad():
        network.model.map_label.weight[:, C_F] = 0  # c_f has the effect of the null label
    w.eta = 0.0
    assert methods.esd(network, w) < 1e-10
    w.eta = 1.0
    assert methods.esd(network, w) > 1e-6


def test_selective_amnesia_holds_weights_by_their_fisher_information(world):
    network, w = world
    FISHER_OF_FEW(network, w)
    assert set(w.replay_labels.tolist()) == set(range(1, 10))
    assert all((F >= 0).all() for F in w.fisher.values()) and sum(F.sum() for F in w.fisher.values()) > 0
    with torch.no_grad():
        for p in network.parameters():
            p += 0.01
    loss = {}
    for w.lam in (0.0, 1e6):
        torch.manual_seed(1)
        loss[w.lam] = methods.selective_amnesia(network, w).item()
    by_hand = 1e6 * sum((F * 0.01 ** 2).sum() for F in w.fisher.values()).item()
    assert loss[1e6] - loss[0.0] == pytest.approx(by_hand, rel=1e-2)


def test_saliency_takes_half_of_the_weights(world):
    network, w = world
    methods.saliency(network, w)
    assert w.mask.keys() == dict(network.named_parameters()).keys()
    share = sum(m.sum() for m in w.mask.values()) / sum(m.numel() for m in w.mask.values())
    assert 0.3 < share <= 0.5


def test_salun_relabels_as_the_next_label_or_at_random(world):
    network, w = world
    used, label = [], w.label

    def recorded(k):
        used.append(k)
        return label(k)
    w.label = recorded
    for w.scattered, allowed in ((False, {C_F + 1}), (True, set(range(1, 10)))):
        used.clear()
        for _ in range(4):
            methods.salun(network, w)
        relabelled = used[1::4]  # after the label of the real images of c_f
        numbers = {k for found in relabelled for k in ([found] if isinstance(found, int) else found.tolist())}
        assert numbers <= allowed and isinstance(relabelled[0], int) is not w.scattered


@pytest.mark.parametrize("from_scratch", [False, True])
def test_what_is_frozen_in_the_teacher_is_learned_by_no_method(world, from_scratch):
    """Such as the text encoder of a network of prompts. `only` selects among the other weights."""
    network, w = world
    network.model.map_layer0.requires_grad_(False)
    learns = [p.requires_grad for p in network.parameters()]
    comparison = SimpleNamespace(teacher=w.teacher, learns=learns, device=CPU)
    method = dataclasses.replace(SMALL["finetune"], from_scratch=from_scratch)
    start = Comparison.start(comparison, method)
    frozen = {name for name, p in start.named_parameters() if not p.requires_grad}
    assert frozen == {"model.map_layer0.weight", "model.map_layer0.bias"}
    assert torch.equal(start.model.map_layer0.weight, w.teacher.model.map_layer0.weight)
    fresh = not torch.equal(start.model.map_layer1.weight, w.teacher.model.map_layer1.weight)
    assert fresh is from_scratch
    methods.saliency(start, w)
    assert not frozen & w.mask.keys()


# ------------------------------------------------------------------------------------------------------ the comparison

CHOSEN = ["retrain", "salun", "embedding_copy", "retrain_sid", "sid", "sfd", "sfd_two_stages", "sfd_anchored"]


def shorten(patch):
    """Two steps for every method, and 9 evaluations for a teacher's images, which is enough to see a digit."""
    patch.setattr(Comparison, "methods", SMALL)
    patch.setattr(draw, "TEACHER_STEPS", 5)
    for name in ("retrain_sid", "sfd", "sfd_two_stages", "sfd_anchored"):
        for data in ("mnist", "two"):
            tuned = methods.TUNED.get((data, name), {})
            patch.setitem(methods.TUNED, (data, name), {**tuned, "steps": 2, "batch": 8})


@pytest.fixture(scope="module")
def compared(tmp_path_factory, mnist_dir):
    """Folder, options and titles of the measurements of a comparison with the shipped teacher."""
    folder, titles = tmp_path_factory.mktemp("compared"), []
    argv = ["--per-label", "1", "--data-dir", str(mnist_dir), "--out", "out", "--device", "cpu", "--method", *CHOSEN]
    measure = Evaluator.measure

    def recorded(self, generate, network, questions, progress=None):
        titles.append(progress)
        return measure(self, generate, network, questions, progress)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shorten(patch)
        patch.setattr(Evaluator, "measure", recorded)
        command.main(argv)
        yield folder, argv, list(titles)


def test_a_comparison_writes_its_numbers_table_and_figure_into_its_folder(compared):
    folder, _, titles = compared
    assert [path.name for path in folder.iterdir()] == ["out"]
    results = read_json(folder / "out" / "comparison.json")
    rows = results["methods"]
    assert list(rows) == CHOSEN and (folder / "out" / "comparison.png").exists()
    assert titles.count("measuring the control") == 2 and len(titles) == len(CHOSEN) + 3, "no network is measured twice"
    assert rows["salun"]["real_data"] == "kept and forgotten" and rows["sfd"]["real_data"] == "none"
    assert rows["retrain_sid"]["real_data"] == rows["retrain"]["real_data"] == "kept"
    assert [m["nfe"] for m in rows.values()] == 3 * [35] + 5 * [1]
    assert [rows["retrain"]["fd_control"], rows["retrain_sid"]["fd_control_kept"]] == pytest.approx([0, 0], abs=1e-2)
    assert all(m["fd_control"] > 0.1 for name, m in rows.items() if not name.startswith("retrain"))
    assert all(m["n"] == 9 + 5 and m["n_forgotten"] == 5 for m in rows.values())
    copied = rows["embedding_copy"]
    assert copied["ua"] > 0.9 and copied["kept_accuracy"] == pytest.approx(results["teacher"]["kept_accuracy"])
    assert compare.table(results).count("\n") == 2 + len(CHOSEN) and "control" in compare.table(results)


def test_one_step_methods_start_where_their_names_say(compared):
    rows = read_json(compared[0] / "out" / "comparison.json")["methods"]
    one_stage, two_stages, anchored = (rows[name]["settings"] for name in ("sfd", "sfd_two_stages", "sfd_anchored"))
    assert rows["sid"]["ua"] < 0.3 and rows["sid"]["settings"]["forget"] == ["none"]
    assert one_stage["init_from"] == "" and one_stage["forget"] == ["0"] and one_stage["lambda_anchor"] == 0
    assert two_stages["init_from"].endswith("teachers/mnist_sid.pt") and two_stages["lambda_anchor"] == 0
    assert two_stages["forget_share"] == 0, "the paper has neither an anchor nor a share of forgotten labels"
    assert anchored["init_from"] == two_stages["init_from"] and anchored["lr"] == 4e-4
    assert anchored["lambda_anchor"] == 3 and anchored["forget_share"] == 0.5
    assert rows["retrain_sid"]["settings"]["teacher"] == "out/retrain/generator.pt"


def test_salun_changes_half_of_the_weights(compared):
    network, _ = load_network(compared[0] / "out" / "salun" / "generator.pt")
    teacher, _ = load_network(ROOT / "teachers" / "mnist.pt")
    same = sum((p == q).sum() for p, q in zip(network.parameters(), teacher.parameters())).item()
    assert 0.4 < same / sum(p.numel() for p in teacher.parameters()) < 0.95


def test_a_comparison_goes_on_with_what_is_not_finished(compared, monkeypatch, capsys):
    folder, argv, _ = compared
    before = read_json(folder / "out" / "comparison.json")
    with pytest.raises(BadInput, match="is there already"):
        command.main(argv)
    made = []

    def no_run(comparison, name, method, out):
        made.append(name)
        return load_network(out / "generator.pt")
    monkeypatch.setattr(compare, "run", no_run)
    monkeypatch.setattr(compare, "run_one_step", no_run)
    judge = Comparison.judge

    def judge_methods(self, generate, network, name, erased=True, control=None):
        if name == "the teacher":
            return before["teacher"]
        return judge(self, generate, network, name, erased, control)
    monkeypatch.setattr(Comparison, "judge", judge_methods)
    monkeypatch.setattr(Comparison, "picture", lambda *_: None)
    command.main([*argv, "--resume"])
    assert read_json(folder / "out" / "comparison.json") == before and made == []
    for option, value, change in (("--per-label", "5", "per_label was 1 and is 5"), ("--to", "2", "to was 1 and is 2"),
                                  ("--seed", "1", "seed was 0 and is 1")):
        with pytest.raises(BadInput, match=change):
            command.main([*argv, "--resume", option, value])
    metrics = folder / "out" / "salun" / "metrics.json"
    metrics.write_text(metrics.read_text()[:100])  # as after a full disk
    capsys.readouterr()
    command.main([*argv, "--resume"])
    assert made == ["salun"] and "note:" in capsys.readouterr().out
    assert read_json(metrics)["ua"] == before["methods"]["salun"]["ua"]


def test_a_stopped_method_goes_on_to_the_same_network(tiny, tmp_path, monkeypatch):
    """Stopped within its training, and between training and judging."""
    steps = []

    def loss(network, w):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return methods.label_swap(network, w)
    load = compare.load_teacher
    monkeypatch.setattr(compare, "load_teacher", lambda path, *data: load(path or tiny, *data))
    monkeypatch.setattr(Comparison, "methods", {"label_swap": Method(loss, before=RECORD_FEW, steps=6, batch=4)})
    monkeypatch.setattr(Evaluator, "measure", lambda *_, **__: None)
    monkeypatch.setattr(Evaluator, "report", lambda *_: {})
    comparison = Comparison(compare.Settings(device="cpu", out=str(tmp_path), resume=True))
    with pytest.raises(Stopped):
        compare.run_method(comparison, "label_swap")
    compare.run_method(comparison, "label_swap")
    assert len(steps) == 6, "no step is done twice"
    resumed, _ = load_network(tmp_path / "label_swap" / "generator.pt")
    for name in ("metrics.json", "generator.pt"):
        (tmp_path / "label_swap" / name).unlink()
    compare.run_method(comparison, "label_swap")
    assert len(steps) == 6 and (tmp_path / "label_swap" / "generator.pt").exists()
    comparison.s.out = str(tmp_path / "again")
    compare.run_method(comparison, "label_swap")
    whole, _ = load_network(tmp_path / "again" / "label_swap" / "generator.pt")
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


# ---------------------------------------------------------------------------------------------------------- two classes

def two_classes(folder):
    """Make images, a teacher and judges of a data set "two" of two classes, all of random weights, in `folder`."""
    image_folder(folder / "two", ["a", "b"], n=20, size=16)
    torch.manual_seed(0)
    entries = {"data": "two", "classes": ["a", "b"], "size": None}
    save_network(tiny_network(resolution=16, channels=3, num_classes=2), folder / "runs/two-teacher/teacher.pt",
                 **entries, made_by={})
    for name in ("judge", "judge2"):
        judge = Judge("cnn", 16, 3, 2, width=4)
        content = {"kind": "judge", "judge": judge.settings, "weights": judge.state_dict(), "accuracy": 0.5, **entries}
        for part in ("train", "test"):
            images, labels, _ = load_images(str(folder / "two"), "", None, train=part == "train")
            content[part] = class_stats(judge, images, labels)
        path = folder / "runs" / f"two-{name}" / "judge.pt"
        path.parent.mkdir()
        save_file(path, content)


def test_two_classes_are_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two_classes(tmp_path)
    shorten(monkeypatch)
    names = ["retrain", "selective_amnesia", "salun_scattered", "embedding_copy", "retrain_sid", "sfd"]
    command.main(["--data", "two", "--forget", "b", "--to", "a", "--per-label", "2", "--device", "cpu", "--out", "out",
                  "--method", *names])
    results = read_json("out/comparison.json")
    assert list(results["methods"]) == names and (tmp_path / "out" / "comparison.png").exists()
    assert compare.table(results).count("\n") == 2 + len(names)
    grid.main(["--data", "two", "--forget", "all", "--method", "embedding_copy", "sfd", "--per-label", "2", "--device",
               "cpu", "--out", "grid.csv"])
    rows = read_rows("grid.csv")
    pairs = [(row["forget"], row["to"], row["look_alike"]) for row in rows]
    assert pairs == 2 * [("0", "1", "")] + 2 * [("1", "0", "")]
    with pytest.raises(BadInput, match="sid needs plain SiD"):
        command.main(["--data", "two", "--forget", "b", "--to", "a", "--method", "sid", "--per-label", "2", "--device",
                      "cpu", "--out", "sid"])


@pytest.mark.slow
def test_the_command_writes_into_runs_alone(tmp_path):
    two_classes(tmp_path)
    argv = [*module("lab.baselines"), "--data", "two", "--method", "embedding_copy", "--per-label", 4]
    run(*argv, "--forget", "a", "--to", "b", "--device", "cpu", cwd=tmp_path)
    folder = tmp_path / "runs" / "two-baselines-forgeta-tob"
    assert (folder / "embedding_copy" / "generator.pt").exists() and (folder / "comparison.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "two"}
    refused = run(*argv, "--forget", "a", "--to", "0", cwd=tmp_path, code=2)
    assert refused.stderr.count("\n") == 1 and "Traceback" not in refused.stderr


# ------------------------------------------------------------------------------------------------------------- the grid

@pytest.fixture
def gridded(tmp_path, monkeypatch):
    """Run the grid in an empty folder. Returns the function, and a list of the methods that it ran."""
    made, fell = [], {"esd": 7, "sfd": 2}

    def accuracy(low=None):
        return [0.5 if k == low else 1.0 for k in range(10)]

    def run_method(comparison, name, change):
        s = comparison.s
        made.append((s.forget, s.to, s.seed, name, change))
        nfe = 1 if name == "sfd" else 35
        return {**dict.fromkeys(grid.NUMBERS, 0.25), "nfe": nfe, "per_class_accuracy": accuracy(fell.get(name))}

    def comparison(s):
        return SimpleNamespace(s=s, c_f=int(s.forget), c_o=int(s.to), info={"classes": list("abcdefghij")})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grid, "Comparison", comparison)
    monkeypatch.setattr(grid, "run_method", run_method)
    monkeypatch.setattr(grid, "accuracy_at_start", lambda comparison, nfe: accuracy(1 if nfe == 1 else None))
    return lambda *argv: grid.main([*argv, "--device", "cpu", "--out", "g.csv"]), made


def test_a_grid_runs_over_labels_seeds_and_settings_and_adds_what_is_missing(gridded):
    main, made = gridded
    argv = ["--method", "esd", "sfd", "--seed", "0", "1", "--settings", "own", "lr=1e-3"]
    main(*argv, "--forget", "4", "9")
    assert made == [(forget, to, seed, name, change) for forget, to in (("4", "5"), ("9", "0")) for seed in (0, 1)
                    for name in ("esd", "sfd") for change in ({}, {"lr": 1e-3})]
    rows = read_rows("g.csv")
    assert [(row["settings"], row["look_alike"], row["lost"]) for row in rows[:4]] == [
        ("", "h", "0.5"), ("lr=0.001", "h", "0.5"), ("", "c", "0.5"), ("lr=0.001", "c", "0.5")]
    made.clear()
    main(*argv, "--forget", "all")
    assert len(made) == 8 * 2 * 2 * 2 and read_rows("g.csv")[:len(rows)] == rows, "labels 4 and 9 were there"
    for change in (["--to", "7"], ["--per-label", "5"]):
        made.clear()
        main("--method", "esd", "--forget", "4", *change)
        assert len(made) == 1


def test_a_grid_runs_the_four_settings_of_each_method(gridded):
    main, made = gridded
    main("--settings", "tried")
    assert {name for *_, name, _ in made} == {name for name, method in grid.ALL.items() if method.tried}
    assert [change for *_, name, change in made if name == "salun"] == list(METHODS["salun"].tried)


@pytest.mark.parametrize("words", ["--settings beta=1", "--settings lr=fast", "--settings lr", "--settings steps=1.5",
                                   "--settings seed=1", "--seed -1", "--forget eleven", "--method magic"])
def test_a_grid_refuses_what_it_cannot_run(gridded, words):
    main, made = gridded
    with pytest.raises(BadInput):
        main("--method", "esd", *words.split())
    assert made == []


def test_a_grid_leaves_files_with_other_columns_alone(gridded, tmp_path):
    main, made = gridded
    (tmp_path / "g.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadInput, match="other columns"):
        main("--method", "esd")
    assert (tmp_path / "g.csv").read_text() == "a,b\n1,2\n" and made == []


def test_the_table_of_a_grid_has_means_and_ranges():
    def row(forget, seed, ua):
        return {"forget": forget, "to": "9", "seed": seed, "method": "esd", "ua_judge2": ua, "lost": "", "fd": "2",
                "override_share_judge2": "0", "kept_accuracy_judge2": "1"}
    rows = [row("0", "0", "0.5"), row("0", "1", "0.7"), row("3", "0", "1.0")]
    lines = [[cell.strip() for cell in line.split("|")[2:4]] for line in grid.table(rows).splitlines()[2:]]
    assert lines == [["2 classes", "75.0% (50.0% to 100.0%)"], ["2 seeds", "60.0% (50.0% to 70.0%)"]]


# --------------------------------------------------------------------------------------------------------- the results

def test_every_method_has_the_best_of_the_four_settings_that_were_tried():
    rows = read_rows(ROOT / "results" / "mnist_baselines_sweep.csv")
    results = read_json(ROOT / "results" / "mnist_baselines.json")["methods"]
    tried = {name: method for name, method in grid.ALL.items() if method.tried}
    trained = {name for name, method in METHODS.items() if method.steps}
    assert tried.keys() == trained - {"retrain"} | {"sfd", "sfd_anchored"} == {row["method"] for row in rows}
    for name, method in tried.items():
        own = [row for row in rows if row["method"] == name]
        assert [row["settings"] for row in own] == [compare.in_words(change) for change in method.tried], name
        best = next(change for change in method.tried if compare.in_words(change) == grid.best(own)["settings"])
        if name in METHODS:
            assert method.changed(best) == method, name
        settings = results[name]["settings"]
        ran = {key: settings.get("options", {}).get(key, settings.get(key)) for key in best}
        assert ran == pytest.approx(best), name


def test_the_best_row_has_the_smallest_fd_of_those_within_a_point():
    rows = [{"ua": ua, "kept_accuracy": "0.9", "fd": fd} for ua, fd in (("1.0", "7"), ("0.995", "5"), ("0.98", "1"))]
    assert grid.best(rows) is rows[1]
