"""The autograder passes right code, whatever its order of random numbers, and names every planted bug of the method."""
import ast
import re
import sys

import nbformat
import pytest
import torch

import sfd_minimal
from conftest import ROOT
from lab import check as grader
from lab.check import NAMES, check
from planted_bugs import BUGS, module_with_bug

PASTED = (ROOT / "sfd_minimal.py").read_text().split("SFD: copy from here")[1].split("to here")[0]
PLANTED = {  # planted bug of the code to paste: how the autograder names it
    "teacher and fake swapped": "teacher and fake score are swapped in S",
    "D_phi and D_psi swapped": "the first factor of S is D_psi - D_phi",
    "c_f in the teacher's label": "the teacher is given the label to forget, c_psi, not its override",
    "omega not detached": "omega is not detached",
    "omega not floored": "omega has no floor of 1e-5",
    "omega summed": "omega is a sum over pixels, not a mean",
    "sign of alpha flipped": "alpha has the wrong sign",
    "psi fed the override label": "the fake score is given the override, c_phi, in S",
    "psi trained on the override label": "the fake score is trained under the override, c_phi",
    "x_g not detached in the psi step": "x_g is not detached in the psi step",
    "weight of L_psi inverted": "the weight w of L_psi multiplies by (sigma sd)^2 and does not divide by it",
    "gradient left in psi and phi": "L_theta.backward() leaves a gradient in the fake score",
    "frozen weights trained": "weights of the generator that are frozen are to get a gradient",
    "theta's last gradient kept": "optimizer_theta.zero_grad() is missing",
    "psi's last gradient kept": "optimizer_psi.zero_grad() is missing",
    "psi never steps": "optimizer_psi.step() is missing",
    "forgetting weight ignored": "lambda_forget is ignored",
    "kept and forgotten swapped": "L_keep is taken over the labels to forget",
    "forgotten rows in both terms": "L_keep is taken over all labels",
    "a mask of integers taken": "a mask of integers is taken",
    "a mask of another shape taken": "a mask of another shape is taken",
    "extra loss ignored": "extra_loss is ignored",
    "extra loss without gradient": "extra_loss is given x_g without its gradient",
    "extra loss under the override label": "extra_loss is given the override, c_phi",
    "generator evaluated at another noise level": "z is not multiplied by sigma_init",
    "generated under the override label": "the generator is given the override, c_phi",
    "u_max ignored": "u_max is ignored",
    "another rho": "the power of the noise levels is not 7",
    "the upper part of the grid": "u counts from sigma_max down, not from sigma_min up",
    "p_std ignored": "p_std is ignored",
    "override ignored": "the override is ignored",
    "a random label that may be forgotten": "a random override may be a label to forget",
    "one random label for the batch": "one random override is drawn for the whole batch",
}


def grade(capsys, f, name=None, strict=False):
    """(True or False, the line that check prints)."""
    right = check(f, name, strict)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    return right, line.strip()


def function_of(line):
    """The function of sfd_minimal.py that has this line."""
    head = PASTED[:PASTED.index(line)]
    return re.findall(r"^def (\w+)", head, re.M)[-1]


# ------------------------------------------------------------------------------------------------------- what is right

@pytest.mark.parametrize("name", NAMES)
def test_the_method_is_right(capsys, name):
    state = torch.get_rng_state()
    assert grade(capsys, getattr(sfd_minimal, name), strict=True) == (True, f"{name}: right")
    assert torch.equal(torch.get_rng_state(), state), "a check changes no random state"


def test_the_folded_solutions_are_right(capsys):
    notebook = nbformat.read(ROOT / "notebooks" / "02_mnist_line_by_line.ipynb", as_version=4)
    solutions = [c.source for c in notebook.cells if "solution" in c.metadata.get("tags", []) and "check(" in c.source]
    namespace = {"torch": torch, "check": check}
    for source in solutions:
        exec(source, namespace)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["fake_score_loss: right", "score_identity_loss: right", "sfd_step: right"]


def test_a_step_in_another_order_of_random_numbers_is_right(capsys):
    """The generator is evaluated twice, as in the official code, and gradients are removed at the end of the step."""
    def my_sfd_step(generator, fake, teacher, optimizer_theta, optimizer_psi, z, c_phi, c_psi, forgotten, s,
                    sigma_data):
        per_sample = (len(z), 1, 1, 1)
        u = s.u_max * torch.rand(per_sample, dtype=z.dtype)
        sigma_theta = (s.sigma_min ** (1 / 7) * (1 - u) + s.sigma_max ** (1 / 7) * u) ** 7
        sigma_init = torch.full(per_sample, s.sigma_init, dtype=z.dtype)
        with torch.no_grad():
            x_g = generator(z * sigma_init, sigma_init, c_psi)
        sigma_psi = (torch.randn(per_sample) * s.p_std + s.p_mean).exp()
        L_psi = sfd_minimal.fake_score_loss(fake, x_g, c_psi, sigma_psi, sigma_data).mean()
        L_psi.backward()
        optimizer_psi.step()
        optimizer_psi.zero_grad()
        fake.requires_grad_(False)
        x_g = generator(z * sigma_init, sigma_init, c_psi)
        S = sfd_minimal.score_identity_loss(teacher, fake, x_g, c_phi, c_psi, sigma_theta, s.alpha)
        L_keep, L_forget = S[~forgotten].sum() / len(z), S[forgotten].sum() / len(z)
        (L_keep + s.lambda_forget * L_forget).backward()
        optimizer_theta.step()
        optimizer_theta.zero_grad()
        fake.requires_grad_(True)
        return {"L_psi": L_psi, "L_keep": L_keep, "L_forget": L_forget}

    assert grade(capsys, my_sfd_step) == (True, "sfd_step: right")


# ------------------------------------------------------------------------------------------------------- what is wrong

def test_every_planted_bug_of_the_code_to_paste_has_a_name():
    planted = {bug for bug, (file, line, _) in BUGS.items() if file == "sfd_minimal.py" and line in PASTED}
    assert PLANTED.keys() == planted
    assert set(PLANTED.values()) <= grader.BUGS.keys()


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_named(capsys, bug):
    name = function_of(BUGS[bug][1])
    strict = bug.startswith(("a mask", "extra loss"))
    right, line = grade(capsys, getattr(module_with_bug(bug), name), strict=strict)
    assert not right and PLANTED[bug] in named(line), line


def named(line):
    """The bugs that a line names."""
    return line.split("This is the result when ")[1].rstrip(".").split(", or when ")


@pytest.mark.parametrize("bug", grader.BUGS.keys() - PLANTED.values())
def test_the_other_bugs_of_the_list_are_named(capsys, bug):
    name = next(name for name in NAMES if grader.BUGS[bug][0] in grader.source_of(name))
    right, line = grade(capsys, with_own_noise(name, bug), name)
    assert not right and bug in named(line) and len(named(line)) <= 2, line


def with_own_noise(name, bug):
    """A function with a bug of the list that draws its noise itself, as the code of a student does."""
    functions = grader.reference(name, bug)
    f = getattr(functions, name)

    def loss(*arguments):
        image = arguments[1] if name == "fake_score_loss" else arguments[2]
        return f(*arguments, noise=torch.randn_like(image))

    def step(*arguments, **options):
        z, s = arguments[5], arguments[9]
        levels = [draw(s, len(z)).view(-1, 1, 1, 1) for draw in (functions.psi_noise_levels,
                                                                functions.theta_noise_levels)]
        noise = grader.SimpleNamespace(sigma_psi=levels[0], eps_psi=torch.randn_like(z), sigma_theta=levels[1],
                                       eps_theta=torch.randn_like(z))
        return f(*arguments, noise=noise, **options)

    return {"sfd_step": step, "draw_labels": f}.get(name, loss)


def test_each_outcome_is_one_line(capsys):
    def my_draw_labels(batch, override, conditions):
        return None

    assert grade(capsys, my_draw_labels) == (False, "draw_labels: not yet")

    def fake_score_loss(fake, x_g, c, sigma, sigma_data=0.5):
        raise NotImplementedError

    assert grade(capsys, fake_score_loss) == (False, "fake_score_loss: not yet")

    def loss(fake, x_g, c, sigma, sigma_data=0.5):
        return fake(x_g + sigma * torch.randn_like(x_g), sigma, c).mean() / missing  # noqa: F821

    right, line = grade(capsys, loss, "fake_score_loss")
    assert not right
    assert re.fullmatch(r"fake_score_loss: raises NameError: name 'missing' is not defined, in line \d+", line)

    def loss(fake, x_g, c, sigma, sigma_data=0.5):
        return sfd_minimal.fake_score_loss(fake, x_g, c, sigma, sigma_data).mean()

    assert grade(capsys, loss, "fake_score_loss") == (False, "fake_score_loss: wrong shape: the loss is (), not (256,)")

    def loss(fake, x_g, c, sigma, sigma_data=0.5):
        return fake(x_g + sigma * torch.randn_like(x_g), sigma.flatten(), c)

    assert grade(capsys, loss, "fake_score_loss") == (False, (
        "fake_score_loss: wrong shape: sigma of the fake score is (256,), not (256, 1, 1, 1)"))

    def loss(fake, x_g, c, sigma, sigma_data=0.5):
        return 3 * sfd_minimal.fake_score_loss(fake, x_g, c, sigma, sigma_data)

    assert grade(capsys, loss, "fake_score_loss") == (False, (
        "fake_score_loss: wrong: value, gradient in the fake score. Right: nothing. "
        "No bug of the list gives this result."))

    def loss(fake, x_g, c, sigma, sigma_data=0.5):
        return fake(x_g, sigma, c).flatten(1).sum(1)

    assert "is not given x_t = x_g + sigma eps" in grade(capsys, loss, "fake_score_loss")[1]


def test_a_function_without_a_telling_name_needs_one():
    for name in (None, "sfd"):
        with pytest.raises(ValueError, match="fake_score_loss"):
            check(print, name)


def test_it_needs_torch_alone():
    tree = ast.parse((ROOT / "lab" / "check.py").read_text())
    imported = {node.names[0].name for node in ast.walk(tree) if isinstance(node, ast.Import)}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - sys.stdlib_module_names == {"torch"}
