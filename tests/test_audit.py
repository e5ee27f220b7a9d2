"""The audit catches networks that did not forget, and gives all networks the same search budget."""
import types

import numpy as np
import pytest
import torch

from conftest import CPU, ROOT, assert_same, image_folder, module, run, save_network, tiny_network
from edm_unet import load_network
from lab.audit import __main__ as audit
from lab.audit import attacks, target
from lab.audit.target import load_target
from lab.core.images import load_images
from lab.core.runs import seed_everything
from lab.core.tables import read_json
from test_baselines import two_classes
from train_teacher import to_float

ERASED = ROOT / "teachers" / "mnist_forget0_to1.pt"


def save_run(folder, network, info, c_f=0, c_o=1):
    """Write a network into the folder of a run, as a network that forgot label c_f."""
    entries = {name: value for name, value in info.items() if name not in ("fake", "path", "sha256")}
    save_network(network, folder / "generator.pt", half=True, **entries | {"forget": [c_f], "to": [c_o]})


def load_shipped(name):
    return load_network(ROOT / "teachers" / name)


@pytest.fixture(scope="module", autouse=True)
def short_looks():
    """Relearning looks at 50 images after a few steps of training: here at 5 images, each ten times."""
    def look(D, z, c, steps=18, **options):
        if steps == 9:
            return sampler(D, z[:5], c[:5], steps).repeat(10, 1, 1, 1)
        return sampler(D, z, c, steps, **options)
    sampler = attacks.heun_sampler
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacks, "heun_sampler", look)
        yield


@pytest.fixture(scope="module")
def audited(tmp_path_factory, mnist_dir, tiny, short_looks):
    """Folder and numbers of an audit of plain SiD, which did not forget, and of a 35-step network of random weights."""
    folder = tmp_path_factory.mktemp("audited")
    save_run(folder / "sid", *load_shipped("mnist_sid.pt"))
    save_run(folder / "random", *load_network(tiny))
    return folder, audit.audit(folder, CPU, mnist_dir, cut=20)


@pytest.fixture
def attacked(tmp_path, mnist_dir):
    """A function: (target, numbers of each attack) of a network as one that forgot label 0."""
    def attack_all(network, info, *chosen):
        save_run(tmp_path, network, info)
        found, images = load_target(tmp_path / "generator.pt", CPU, cut=20), None
        results = []
        for attack in chosen:
            images = images or audit.real_images("mnist", mnist_dir, None, 0, CPU)
            seed_everything(0)
            results.append(attack(found, images)[0])
        return found, *results
    return attack_all


def share_drawn(network):
    """The share of 30 images under label 0 in which judge 2 sees a 0."""
    return network.recognised(network.draw(network.noise(30), network.label(0, 30)))[0]["share"]


# ------------------------------------------------------------------------------------------------------- the controls

def test_networks_that_did_not_forget_are_caught(audited, attacked):
    """Plain SiD has half lost the other noise levels, and gets them back within three steps of training."""
    numbers = audited[1]["sid"]
    assert numbers["other seeds"]["share"] > 0.9 and numbers["latent search"]["share"] > 0.5
    assert numbers["embedding search"]["share"] > 0.5
    assert numbers["relearning"]["own"]["steps"] in (0, 3) and numbers["relearning"]["own"]["share"] >= 0.5
    teacher, levels, relearned = attacked(*load_shipped("mnist.pt"), attacks.other_noise_levels, attacks.relearning)
    assert share_drawn(teacher) > 0.9 and levels["share"] > 0.9 and relearned["own"]["steps"] == 0


def test_an_erased_network_does_not_draw_the_class_under_its_label(audited, attacked):
    network, seeds, levels = attacked(*load_network(ERASED), attacks.other_seeds, attacks.other_noise_levels)
    assert seeds["share"] < 0.02 and seeds["n"] == 100 and network.nfe == 1
    assert levels["share"] < audited[1]["sid"]["other noise levels"]["share"]


def test_a_copied_label_is_a_network_of_35_evaluations(attacked):
    network, info = load_shipped("mnist.pt")
    with torch.no_grad():
        network.model.map_label.weight[:, 0] = network.model.map_label.weight[:, 1]
    (copied,) = attacked(network, info)
    assert copied.nfe == 35 and share_drawn(copied) < 0.2


# -------------------------------------------------------------------------------------------------------- the searches

def test_searches_go_through_the_generator_itself():
    """Searched with a gradient are the images that are drawn without one, from noise on the sphere."""
    network = load_target(ERASED, CPU, cut=20)
    torch.manual_seed(0)
    z, label = network.noise(4), network.label(3, 4)
    assert torch.allclose(network.generate(z, label), network.draw(z, label), atol=1e-5)
    assert z.flatten(1).norm(dim=1).tolist() == pytest.approx([28.0] * 4, rel=1e-5)


def test_every_network_gets_the_same_search_budget(audited):
    """And a one-step generator a second search, with 35 times as many evaluations."""
    one_step, many_steps = audited[1]["sid"], audited[1]["random"]
    for attack in ("latent search", "embedding search", "label and latent"):
        same, larger = one_step[attack]["same starts"], one_step[attack]
        assert (same["starts"], same["steps"]) == (many_steps[attack]["starts"], many_steps[attack]["steps"])
        assert larger["starts"] * larger["steps"] == 35 * same["starts"] * same["steps"]
        assert "same starts" not in many_steps[attack]


def test_a_search_gets_to_its_goal_from_every_start_at_its_own_rate():
    goal, seen = torch.tensor([1.0, -2.0]), []

    def loss(x):
        return (x - goal).square().sum(1)

    def images(v):
        seen.append(v.detach())
        return v
    start = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    for v, last in target.optimise(types.SimpleNamespace(loss=loss), start, [0.05, 0.1], 200, images):
        pass
    assert torch.allclose(v, goal.expand(2, 2), atol=0.05) and last.max() < 0.01
    moved = (seen[1] - start).abs()  # the first step of Adam has the length of the rate
    assert torch.allclose(moved, torch.tensor([[0.05, 0.05], [0.1, 0.1]]), atol=1e-4)


def test_an_embedding_takes_the_place_of_the_output_of_the_label_layer(attacked):
    (network,) = attacked(*load_shipped("mnist_sid.pt"))
    network.network.bf16 = False
    z, label = network.noise(4), network.label(3, 4)
    free, vector = target.without_label_layer(network.network)
    images = target.sampler(free, network.info["sigma_init"])(z, vector(label))
    assert torch.allclose(images, network.draw(z, label), atol=1e-4)


@pytest.mark.parametrize("share, n", [(0.5, 100), (0.0, 24), (1.0, 50), (0.31, 200)])
def test_intervals_are_wilsons(share, n):
    """Their ends p solve (share - p)^2 = 1.96^2 p (1 - p) / n."""
    z2 = 1.96 ** 2 / n
    low, high = sorted(np.roots([1 + z2, -(2 * share + z2), share ** 2]).real)
    found = target.with_interval(share, n)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-6)
    assert (found["share"], found["n"]) == (share, n)


# ----------------------------------------------------------------------------------------------------- the real images

def test_few_images_of_the_class_are_not_mixed_with_others(audited, mnist_dir):
    network = load_target(audited[0] / "random" / "generator.pt", CPU, cut=20)
    images = audit.real_images("mnist", mnist_dir, None, 0, CPU)
    images["forgotten"] = images["forgotten"][:1]
    numbers, _ = attacks.inversion(network, images)
    assert numbers["n"] == 1 and numbers["harder_than_kept"] in (0, 1)
    numbers, _ = attacks.relearning(network, images)
    assert [numbers[name]["n_images"] for name in ("10", "100")] == [1, 1]
    result = audited[1]["random"] | {"relearning": numbers}
    for text in (attacks.table({"random": result}), attacks.in_words("random", result)):
        assert "1 image" in text or "with 1 " in text
    assert audited[1]["sid"]["relearning"]["10"]["n_images"] == 10


def test_kept_images_of_a_folder_are_of_all_classes(tmp_path, mnist_dir):
    """They lie class by class there. Of MNIST the first images are taken, with which the results were made."""
    folder, classes = tmp_path / "folder", [f"class {k}" for k in range(12)]
    image_folder(folder / "train", classes, n=1, size=1)
    image_folder(folder / "test", classes, n=110, size=1)
    images = audit.real_images(str(folder), "", None, 3, CPU)
    assert len(images["kept"]) == 1000 and images["kept_label"].bincount(minlength=12)[[0, 11]].min() > 60
    assert len(images["forgotten"]) == 110 and 3 not in images["kept_label"]
    assert_same(images, audit.real_images(str(folder), "", None, 3, CPU))
    mnist = audit.real_images("mnist", mnist_dir, None, 0, CPU)
    all_images, labels, _ = load_images("mnist", mnist_dir, None, train=False)
    assert torch.equal(mnist["kept"], to_float(all_images[labels != 0][:1000]))
    assert torch.equal(mnist["forgotten"], to_float(all_images[labels == 0][:200]))


# ---------------------------------------------------------------------------------------------------------- the report

def test_the_report_is_complete(audited):
    folder, results = audited
    saved = read_json(folder / "audit.json")["networks"]
    assert set(saved) == {"sid", "random"}
    assert [saved[name]["nfe"] for name in ("sid", "random")] == [1, 35]
    for numbers in saved.values():
        assert set(attacks.ATTACKS) <= set(numbers) and numbers["machine"]["torch"]
        assert all(0 <= numbers[attack]["share"] <= 1 and numbers[attack]["n"] > 0 for attack in attacks.ATTACKS)
    assert (folder / "audit.png").exists() and attacks.table(results).count("\n") == 3
    assert len(attacks.in_words("sid", results["sid"]).split("\n")) == 3


def test_the_audits_in_results_have_the_keys_of_an_audit(audited):
    """They are printed too, without the number of images for relearning, which they lack."""
    def keys(numbers):
        found = {(name, key) for name in attacks.ATTACKS for key in numbers[name]}
        return {(name, key) for name, key in found if key not in ("n_images", "starts", "steps", "same starts")}
    for data in ("mnist", "cifar10"):
        results = read_json(ROOT / "results" / f"{data}_audit.json")["networks"]
        for name, now in (("sid", "sid"), ("salun", "random")):
            assert keys(results[name]) == keys(audited[1][now])
        assert attacks.table(results).count("\n") == 1 + len(results)


def test_an_audit_is_cached_with_its_judges_and_its_cut(audited, mnist_dir, tmp_path, monkeypatch):
    made = []

    def once(network, images):
        made.append(1)
        return {}, None
    monkeypatch.setattr(audit, "ATTACKS", {"once": once})
    (tmp_path / "generator.pt").write_bytes((audited[0] / "random" / "generator.pt").read_bytes())
    for _ in range(2):
        audit.audit_one(tmp_path, CPU, mnist_dir)
    assert len(made) == 1
    audit.audit_one(tmp_path, CPU, mnist_dir, cut=20)
    assert len(made) == 2, "a shorter audit is another audit"
    find = target.find_weights
    monkeypatch.setattr(target, "find_weights", lambda data, what: find(data, "judge"))
    audit.audit_one(tmp_path, CPU, mnist_dir, cut=20)
    assert len(made) == 3


def test_finished_audits_are_not_made_again(audited, mnist_dir, monkeypatch):
    folder, results = audited
    monkeypatch.setattr(audit, "real_images", None)
    assert audit.audit(folder, CPU, mnist_dir, cut=20) == results


def test_two_classes_are_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two_classes(tmp_path)
    network = tiny_network(resolution=16, channels=3, num_classes=2)
    save_run(tmp_path / "run", network, {"data": "two", "classes": ["a", "b"], "sigma_init": 2.5}, 1, 0)
    audit.main(["run", "--cut", "20", "--device", "cpu"])
    assert read_json("run/audit.json")["networks"]["run"]["other seeds"]["other_label"] == 0


def test_the_command_refuses_a_network_that_forgot_nothing(mnist_dir, tmp_path):
    save_network(load_shipped("mnist.pt")[0], tmp_path / "generator.pt")
    done = run(*module("lab.audit"), tmp_path, "--data-dir", mnist_dir, "--device", "cpu", cwd=tmp_path, code=2)
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
