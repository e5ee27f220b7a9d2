"""The audit finds what is there: a network that has not forgotten is caught by every attempt that can catch it."""
import json

import pytest
import torch

from conftest import CPU, ROOT, module, run, save_network
from lab import audit, evaluate, label_search, suspect
from lab.checkpoint import load_checkpoint
from lab.device import seed_everything
from lab.errors import BadInput
from lab.label_space import tie


def accused(folder, network, content, to=1):
    """A run's folder whose network is said to have forgotten label 0."""
    keep = {k: v for k, v in content.items() if k not in ("net", "weights", "fake", "kind")}
    save_network(network, folder / "generator.pt", half=True, **keep | {"forget": [0], "to": [to]})


def drawn(s):
    """The share of 30 images under the label it is accused of that show it."""
    return s.seen(s.draw(s.noise(30), s.label(0, 30)))[0]["share"]


@pytest.fixture(scope="module", autouse=True)
def short_looks():
    """Relearning looks at 50 images after a few steps of training: here at 10, each five times."""
    def look(D, z, c, steps=18, **kw):
        return sampler(D, z[:10], c[:10], steps).repeat(5, 1, 1, 1) if steps == 9 else sampler(D, z, c, steps, **kw)
    sampler = audit.heun_sampler
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "heun_sampler", look)
        yield


@pytest.fixture(scope="module")
def audited(tmp_path_factory, mnist_dir, tiny, short_looks):
    """The one-step generator that has forgotten nothing, and a network of 35 evaluations, accused: by every attack."""
    folder = tmp_path_factory.mktemp("accused")
    accused(folder / "guilty", *load_checkpoint(ROOT / "teachers" / "mnist_sid.pt"))
    accused(folder / "blank", *load_checkpoint(tiny))
    return folder, audit.audit(folder, CPU, mnist_dir, cut=20)


@pytest.fixture
def under(tmp_path, mnist_dir):
    """(suspect, numbers) of an accused network and of single attacks on it."""
    def ask(network, content, *attacks):
        accused(tmp_path, network, content)
        s, images, found = suspect.Suspect(tmp_path / "generator.pt", CPU, cut=20), {}, []
        for attack in attacks:
            images = images or audit.real_images("mnist", mnist_dir, None, 0, CPU)
            seed_everything(0)
            found.append(attack(s, images)[0])
        return s, *found
    return ask


def test_guilty_is_caught(audited, under):
    """Both draw it when asked. The generator has half lost the other noise levels,
    and has them back in the three steps that a quick look takes."""
    r = audited[1]["guilty"]
    assert r["other seeds"]["share"] > 0.9 and r["latent search"]["share"] > 0.5
    assert r["relearning"]["own"]["steps"] in (0, 3) and r["relearning"]["own"]["share"] >= 0.5
    s, levels, relearned = under(*load_checkpoint(ROOT / "teachers" / "mnist.pt"), audit.noise_levels, audit.relearning)
    assert drawn(s) > 0.9 and levels["share"] > 0.9 and relearned["own"]["steps"] == 0


def test_forgetful_does_not_draw_it(audited, under):
    s, seeds, levels = under(*load_checkpoint(ROOT / "teachers" / "mnist_forget0_to1.pt"),
                             audit.seeds, audit.noise_levels)
    assert seeds["share"] < 0.02 and seeds["n"] == 100 and s.nfe == 1
    assert levels["share"] < audited[1]["guilty"]["other noise levels"]["share"]


def test_overwritten_label_is_a_network_of_35_evaluations(under):
    network, content = load_checkpoint(ROOT / "teachers" / "mnist.pt")
    with torch.no_grad():
        network.model.map_label.weight[:, 0] = network.model.map_label.weight[:, 1]
    (s,) = under(network, content)
    assert s.nfe == 35 and drawn(s) < 0.2


def test_few_images_of_the_class_are_not_mixed_with_others(audited, mnist_dir):
    s = suspect.Suspect(audited[0] / "guilty" / "generator.pt", CPU, cut=20)
    images = audit.real_images("mnist", mnist_dir, None, 0, CPU)
    numbers, _ = audit.inversion(s, images | {"forgotten": images["forgotten"][:1]})
    assert numbers["n"] == 1 and numbers["harder_than_kept"] in (0, 1)


def test_an_audit_is_remembered_for_these_judges_alone(audited, mnist_dir, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(audit, "ATTACKS", {"once": lambda s, images: (asked.append(1) or {}, None)})
    (tmp_path / "generator.pt").write_bytes((audited[0] / "guilty" / "generator.pt").read_bytes())
    for _ in range(2):
        audit.audit_one(tmp_path, CPU, mnist_dir)
    assert len(asked) == 1
    find = evaluate.find_weights
    monkeypatch.setattr(evaluate, "find_weights",
                        lambda data, what: find(data, {"judge": "judge", "judge2": "judge"}[what]))
    audit.audit_one(tmp_path, CPU, mnist_dir)
    assert len(asked) == 2
    audit.audit_one(tmp_path, CPU, mnist_dir, cut=20)
    assert len(asked) == 3, "a quick look is no audit"


def test_report_is_complete(audited):
    folder, results = audited
    saved = json.loads((folder / "audit.json").read_text())
    assert set(saved["networks"]) == {"guilty", "blank"}
    assert all(network["machine"]["torch"] for network in saved["networks"].values())
    assert [saved["networks"][name]["nfe"] for name in ("guilty", "blank")] == [1, 35]
    for r in saved["networks"].values():
        assert set(audit.ATTACKS) <= set(r) and all(0 <= r[a]["share"] <= 1 and r[a]["n"] > 0 for a in audit.ATTACKS)
        assert (set(r["relearning"]) >= {"own", "kept", "10", "100"}
                and {"error_forgotten", "error_kept", "error_foreign"} <= set(r["inversion"]))
    assert (folder / "audit.png").exists() and audit.table(results).count("\n") == 3
    assert len(audit.in_words("sfd", results["guilty"]).split("\n")) == 3


def test_finished_audits_are_remembered(audited, mnist_dir, monkeypatch):
    folder, results = audited
    monkeypatch.setattr(audit, "real_images", lambda *a: pytest.fail("a finished audit ran again"))
    assert audit.audit(folder, CPU, mnist_dir, cut=20) == results


def test_searches_go_through_the_generator_itself():
    """What is searched with a gradient is what is drawn without one, from noise on the sphere."""
    s = suspect.Suspect(ROOT / "teachers" / "mnist_forget0_to1.pt", CPU, cut=20)
    torch.manual_seed(0)
    z, label = s.noise(4), s.label(3, 4)
    assert torch.allclose(s.generate(z, label), s.draw(z, label), atol=1e-5)
    assert z.flatten(1).norm(dim=1).tolist() == pytest.approx([28.0] * 4, rel=1e-5)


def test_every_network_is_searched_alike(audited):
    """From as many starts in as many steps, and a one-step generator a second time, with 35 times as much."""
    guilty, blank = (audited[1][name] for name in ("guilty", "blank"))
    for attack in ("latent search", "embedding search", "label and latent"):
        same, all_of_it = guilty[attack]["same starts"], guilty[attack]
        assert (same["starts"], same["steps"]) == (blank[attack]["starts"], blank[attack]["steps"])
        assert all_of_it["starts"] * all_of_it["steps"] == 35 * same["starts"] * same["steps"]
    assert "same starts" not in blank["latent search"]


class Known:
    """What a search needs of a suspect, about images that are vectors: the nearer to `there`, the surer is judge A."""
    there, nfe, cut, network = torch.tensor([1.0, -2.0]), 1, 1, None
    guided_loss = lambda self, x: (x - self.there).square().sum(1)
    effort = lambda self, n: n


def test_a_search_gets_there_from_every_start_at_its_own_rate():
    start, seen = torch.tensor([[0.0, 0.0], [3.0, 3.0]]), []
    for v, loss in suspect.climb(Known(), start, [0.05, 0.1], 200, lambda v: seen.append(v.detach()) or v):
        pass
    assert torch.allclose(v, Known.there.expand(2, 2), atol=0.05) and loss.max() < 0.01
    moved = (seen[1] - start).abs()  # Adam's first step is the rate itself
    assert torch.allclose(moved, torch.tensor([[0.05, 0.05], [0.1, 0.1]]), atol=1e-4)


@pytest.mark.parametrize("share, n, low, high", [(0.5, 100, 0.404, 0.596), (0.0, 24, 0.0, 0.138), (1.0, 50, 0.929, 1)])
def test_intervals(share, n, low, high):
    """Against Wilson's, as tables have them."""
    r = suspect.with_interval(share, n)
    assert (r["low"], r["high"]) == pytest.approx((low, high), abs=1e-3) and (r["share"], r["n"]) == (share, n)


def test_an_embedding_takes_the_place_of_what_the_label_layer_makes(under):
    """Asked with it, a network draws as if asked with the label; and a search may then leave what labels can say."""
    network, content = load_checkpoint(ROOT / "teachers" / "mnist_sid.pt")
    (s,) = under(network, content)
    s.network.bf16, (z, label) = False, (s.noise(4), s.label(3, 4))
    free, vector = suspect.asked_with_embeddings(s.network)
    assert torch.allclose(s.chain(free)(z, vector(label)), s.draw(z, label), atol=1e-4)


def test_command_refuses_what_has_forgotten_nothing(mnist_dir, tmp_path):
    teacher, _ = load_checkpoint(ROOT / "teachers" / "mnist.pt")
    save_network(teacher, tmp_path / "generator.pt")
    done = run(*module("lab.audit"), tmp_path, "--data-dir", mnist_dir, "--device", "cpu", cwd=tmp_path, code=2)
    assert "forgotten 0 labels" in done.stderr and "Traceback" not in done.stderr


def test_a_long_label_search_finds_what_is_there(under, monkeypatch, tmp_path, mnist_dir):
    """In a generator that has forgotten nothing soon, from most starts; and a tied column draws the override."""
    monkeypatch.setattr(label_search, "SEEN", 20)
    monkeypatch.setattr(label_search, "PER_START", 4)
    (s,) = under(*load_checkpoint(ROOT / "teachers" / "mnist_sid.pt"))
    seed_everything(0)
    found = label_search.search(s, looks=(1, 30))
    assert found[1]["found"] < found[30]["found"] and found[30]["most"] > 0.8
    before = drawn(s)
    tie(s.network, 0, 1)
    assert before > 0.9 and drawn(s) < 0.1


def test_the_label_search_command(mnist_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(label_search, "search", lambda s: {25: {"share": 0.5, "most": 0.75, "found": 3}})
    generator = str(ROOT / "teachers" / "mnist_forget0_to1.pt")
    label_search.main(["--network", generator, "--tie", "--device", "cpu", "--out", str(tmp_path / "r.json")])
    assert "| mnist_forget0_to1, tied | 50%, 3 of 16 |" in capsys.readouterr().out
    assert [of["tied"] for _, of in json.loads((tmp_path / "r.json").read_text())] == [False, True]
    network, content = load_checkpoint(generator)
    tie(network, [0], [1])
    accused(tmp_path / "anywhere", network, content)
    label_search.main(["--network", str(tmp_path / "anywhere" / "generator.pt"), "--device", "cpu", "--out",
                       str(tmp_path / "r.json")])
    assert capsys.readouterr().out.count("%") == 1 and (tmp_path / "r.png").exists()
    label_search.main(["--network", generator, "--seed", "1", "--device", "cpu", "--out", str(tmp_path / "r.json")])
    assert "| mnist_forget0_to1, starts 1 | 50%, 3 of 16 |" in capsys.readouterr().out
    label_search.main(["--network", generator, "--device", "cpu", "--out", str(tmp_path / "r.json")])
    of = [(name, of["tied"], of["seed"]) for name, of in label_search.read(tmp_path / "r.json")]
    assert of == [("mnist_forget0_to1", True, 0), ("anywhere", True, 0),  # tied by its training
                  ("mnist_forget0_to1", False, 1), ("mnist_forget0_to1", False, 0)], "what was searched again is last"
    accused(tmp_path / "any", *load_checkpoint(generator), to=-1)
    at_random = ["--network", str(tmp_path / "any" / "generator.pt"), "--tie"]
    teacher = ["--network", str(ROOT / "teachers" / "mnist_retrain.pt")]
    for argv, says in (([], "takes the files"), (teacher, "no one-step"), (at_random, "draws a random label instead")):
        with pytest.raises(BadInput, match=says):
            label_search.main([*argv, "--device", "cpu"])
