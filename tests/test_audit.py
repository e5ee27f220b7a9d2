"""The audit finds what is there: a network that has not forgotten is caught by every attempt that can catch it."""
import json
import subprocess

import pytest
import torch

import audit
import evaluate
from conftest import ROOT, program
from edm_unet import load_checkpoint, pack, save_atomically

CPU = torch.device("cpu")


def accused(folder, network, content):
    """A run's folder whose network is said to have forgotten label 0."""
    keep = {k: v for k, v in content.items() if k not in ("net", "weights", "fake", "kind")}
    save_atomically({"kind": "denoiser", **pack(network, half=True), **keep, "forget": [0], "to": [1]},
                    folder / "generator.pt")


@pytest.fixture(scope="module")
def audited(tmp_path_factory, mnist_dir):
    """The one-step generator that has forgotten nothing, the one that has, the teacher,
    and one whose label 0 was overwritten; all accused."""
    folder = tmp_path_factory.mktemp("accused")
    accused(folder / "guilty", *load_checkpoint(ROOT / "teachers" / "mnist_sid.pt"))
    accused(folder / "forgetful", *load_checkpoint(ROOT / "teachers" / "mnist_forget0_to1.pt"))
    teacher, content = load_checkpoint(ROOT / "teachers" / "mnist.pt")
    accused(folder / "unchanged", teacher, content)
    with torch.no_grad():
        teacher.model.map_label.weight[:, 0] = teacher.model.map_label.weight[:, 1]
    accused(folder / "overwritten", teacher, content)
    return folder, audit.audit(folder, CPU, mnist_dir, fast=True)


def test_guilty_is_caught(audited):
    """Both draw it when asked. The generator has half lost the other noise levels,
    and has them back in the three steps that a quick look takes."""
    r, teacher = audited[1]["guilty"], audited[1]["unchanged"]
    assert (r["other seeds"]["share"] > 0.9
            and r["latent search"]["share"] > 0.5 and r["latent search"]["restarts_needed"] == 1)
    assert r["other noise levels"]["share"] > audited[1]["forgetful"]["other noise levels"]["share"]
    assert r["relearning"]["own"]["steps"] in (0, 3) and r["relearning"]["own"]["share"] >= 0.5
    assert (teacher["other seeds"]["share"] > 0.9 and teacher["other noise levels"]["share"] > 0.9
            and teacher["relearning"]["own"]["steps"] == 0)


def test_forgetful_does_not_draw_it(audited):
    r = audited[1]["forgetful"]
    assert r["other seeds"]["share"] < 0.02 and r["other seeds"]["n"] == 500 and r["evaluations"] == 1


def test_overwritten_label_is_a_network_of_35_evaluations(audited):
    r = audited[1]["overwritten"]
    assert r["evaluations"] == 35 and r["other seeds"]["share"] < 0.2


def test_few_images_of_the_class_are_not_mixed_with_others(audited, mnist_dir):
    s = audit.Suspect(audited[0] / "guilty" / "generator.pt", CPU, fast=True)
    images = audit.real_images("mnist", mnist_dir, 0, CPU)
    numbers, _ = audit.inversion(s, images | {"forgotten": images["forgotten"][:1]})
    assert numbers["n"] == 1 and numbers["harder_than_kept"] in (0, 1)


def test_an_audit_is_remembered_for_these_judges_alone(audited, mnist_dir, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(audit, "ATTEMPTS", {"once": lambda s, images: (asked.append(1) or {}, None)})
    (tmp_path / "generator.pt").write_bytes((audited[0] / "guilty" / "generator.pt").read_bytes())
    for _ in range(2):
        audit.audit_one(tmp_path, CPU, mnist_dir)
    assert len(asked) == 1
    find = evaluate.find_weights
    monkeypatch.setattr(evaluate, "find_weights",
                        lambda data, what: find(data, {"judge": "judge", "judge2": "judge"}[what]))
    audit.audit_one(tmp_path, CPU, mnist_dir)
    assert len(asked) == 2
    audit.audit_one(tmp_path, CPU, mnist_dir, fast=True)
    assert len(asked) == 3, "a quick look is no audit"


def test_report_is_complete(audited):
    folder, results = audited
    saved = json.loads((folder / "audit.json").read_text())
    assert set(saved["networks"]) == {"guilty", "forgetful", "unchanged", "overwritten"} and saved["machine"]["torch"]
    for r in saved["networks"].values():
        assert set(audit.ATTEMPTS) <= set(r) and all(0 <= r[a]["share"] <= 1 and r[a]["n"] > 0 for a in audit.ATTEMPTS)
        assert (set(r["relearning"]) >= {"own", "kept", "10", "100"}
                and {"error_forgotten", "error_kept", "error_foreign"} <= set(r["inversion"]))
    assert (folder / "audit.png").exists() and audit.table(results).count("\n") == 5
    assert len(audit.in_words("sfd", results["guilty"]).split("\n")) == 3


def test_finished_audits_are_remembered(audited, mnist_dir, monkeypatch):
    folder, results = audited
    monkeypatch.setattr(audit, "real_images", lambda *a: pytest.fail("a finished audit ran again"))
    assert audit.audit(folder, CPU, mnist_dir, fast=True) == results


def test_searches_go_through_the_generator_itself():
    """What is searched with a gradient is what is drawn without one, from noise on the sphere."""
    s = audit.Suspect(ROOT / "teachers" / "mnist_forget0_to1.pt", CPU, fast=True)
    torch.manual_seed(0)
    z, label = s.noise(4), s.label(3, 4)
    assert torch.allclose(s.differentiable(z, label), s.draw(z, label), atol=1e-5)
    assert z.flatten(1).norm(dim=1).tolist() == pytest.approx([28.0] * 4, rel=1e-5)


def test_command_refuses_what_has_forgotten_nothing(mnist_dir, tmp_path):
    teacher, content = load_checkpoint(ROOT / "teachers" / "mnist.pt")
    save_atomically({"kind": "denoiser", **pack(teacher), "data": "mnist", "classes": content["classes"]},
                    tmp_path / "generator.pt")
    for where, says in ((tmp_path, "forgotten 0 labels"), (tmp_path / "nowhere", "no generator.pt")):
        done = subprocess.run([*program("evaluate.py"), where, "--audit", "--data-dir", mnist_dir],
                              capture_output=True, text=True)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
