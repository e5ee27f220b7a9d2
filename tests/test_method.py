"""The method is the paper's: losses and steps against independent computations, and every planted bug is noticed."""
import copy
import importlib
import os
import re
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lab.distill
import sfd_minimal
from closed_form import ring
from conftest import ROOT, assert_same, tiny_network
from edm_unet import BadInput
from planted_bugs import BUGS, module_with_bug

GOLDEN = ROOT / "tests" / "fixtures" / "official_losses_golden.npz"
TRUTH = ring()
SETTINGS = sfd_minimal.Settings(alpha=1.2, lambda_forget=0.7, lr=1e-2, lr_fake=1e-2)
OVERRIDE = torch.tensor([3, 1, 2, 3, 4])  # label 0 is forgotten, 3 is drawn instead


class Linear(torch.nn.Module):
    """The smallest denoiser with weights, D = A x + B c + s sigma, in float64. It keeps the conditions it was given."""
    shape, sigma_data, conditions = (2,), 0.5, torch.eye(5)

    def __init__(self, seed):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.A = torch.nn.Parameter(torch.randn(2, 2, generator=g, dtype=torch.float64) * 0.3)
        self.B = torch.nn.Parameter(torch.randn(5, 2, generator=g, dtype=torch.float64) * 0.3)
        self.s = torch.nn.Parameter(torch.randn(2, generator=g, dtype=torch.float64) * 0.3)
        self.given = []

    def forward(self, x, sigma, c):
        assert isinstance(sigma, torch.Tensor) and sigma.shape == (len(x), 1), "the contract's shape of sigma"
        self.given.append(c.clone())
        return x @ self.A + c.to(self.B.dtype) @ self.B + sigma * self.s


def independent_S(teacher, fake, x_g, c_phi, c_psi, sigma, eps, alpha, omega=None):
    """(S (B,), omega of each sample), one sample at a time and in another form than the code's.

    S omega = (D_phi - D_psi).(D_psi - x_g) + (1 - alpha) ||D_phi - D_psi||^2.
    """
    out, omegas = [], []
    for i in range(len(x_g)):
        x_t = x_g[i:i + 1] + sigma[i] * eps[i:i + 1]
        D_phi = teacher(x_t, sigma[i:i + 1], c_phi[i:i + 1])[0]
        D_psi = fake(x_t, sigma[i:i + 1], c_psi[i:i + 1])[0]
        if omega is None:
            away = [abs(v) for v in (D_phi - x_g[i]).tolist()]
            omegas.append(max(sum(away) / len(away), 1e-5))
        else:
            omegas.append(omega[i])
        d = D_phi - D_psi
        out.append((torch.dot(d, D_psi - x_g[i]) + (1 - alpha) * torch.dot(d, d)) / omegas[i])
    return torch.stack(out), omegas


def case(B=6):
    """(x_g, c_phi, c_psi, sigma, eps). eps is what torch.randn_like(x_g) gives after the seed 11."""
    g = torch.Generator().manual_seed(3)
    x_g = torch.randn(B, 2, generator=g, dtype=torch.float64)
    c_phi, c_psi = (torch.eye(5)[torch.randint(5, (B,), generator=g)] for _ in range(2))
    sigma = torch.rand(B, 1, generator=g, dtype=torch.float64) * 3 + 0.1
    torch.manual_seed(11)
    return x_g, c_phi, c_psi, sigma, torch.randn_like(x_g)


# ----------------------------------------------------------------------- the losses and the step, of a module `sfd`

def check_value_and_gradient(sfd):
    """S, and dS/dx_g against finite differences of the independent formula with omega held fixed, as it is detached."""
    x_g, c_phi, c_psi, sigma, eps = case()
    fake = Linear(1)
    for alpha in (1.0, 1.2, 0.5):
        torch.manual_seed(11)
        x = x_g.clone().requires_grad_()
        S = sfd.score_identity_loss(TRUTH, fake, x, c_phi, c_psi, sigma, alpha)
        expected, omega = independent_S(TRUTH, fake, x_g, c_phi, c_psi, sigma, eps, alpha)
        assert torch.allclose(S, expected, rtol=1e-9), "value of S"
        gradient, = torch.autograd.grad(S.sum(), x)
        h = 1e-6
        for j in range(2):
            step = torch.zeros_like(x_g)
            step[:, j] = h
            up, _ = independent_S(TRUTH, fake, x_g + step, c_phi, c_psi, sigma, eps, alpha, omega)
            down, _ = independent_S(TRUTH, fake, x_g - step, c_phi, c_psi, sigma, eps, alpha, omega)
            assert torch.allclose(gradient[:, j], (up - down) / (2 * h), rtol=1e-5, atol=1e-7), "gradient of S in x_g"


def check_omega_floor(sfd):
    """Where the teacher returns x_g itself, omega is 1e-5."""
    x_g = torch.ones(2, 3, 4, 4, dtype=torch.float64)

    def teacher(x_t, sigma, c):
        return x_g

    def fake(x_t, sigma, c):
        return x_g - 0.5

    S = sfd.score_identity_loss(teacher, fake, x_g, None, None, torch.ones(2, 1, 1, 1), alpha=1.2)
    assert torch.allclose(S, torch.full((2,), -1.2 * 0.25 * 48 / 1e-5, dtype=torch.float64))


def check_fake_loss(sfd):
    """L_psi is its formula, and is smallest at the true denoiser of the images."""
    x_g, _, c, sigma, eps = case()
    fake, sd = Linear(1), 0.5
    torch.manual_seed(11)
    L = sfd.fake_score_loss(fake, x_g, c, sigma, sd)
    D = fake(x_g + sigma * eps, sigma, c)
    expected = []
    for i in range(len(x_g)):
        w = (sigma[i, 0] ** 2 + sd ** 2) / (sigma[i, 0] * sd) ** 2
        expected.append(w * ((D[i] - x_g[i]) ** 2).sum())
    assert torch.allclose(L, torch.stack(expected), rtol=1e-12), "value of L_psi"

    torch.manual_seed(0)
    k = torch.randint(5, (20_000,))
    x, label, sigma = TRUTH.sample(k), torch.eye(5)[k], (torch.randn(20_000, 1, dtype=torch.float64) * 1.2).exp()

    def loss(D):
        torch.manual_seed(1)
        return sfd.fake_score_loss(D, x, label, sigma).mean().item()

    best = loss(TRUTH)
    worse = {"shifted": lambda x, s, c: TRUTH(x, s, c) + 0.05,
             "scaled": lambda x, s, c: 1.03 * TRUTH(x, s, c),
             "without labels": lambda x, s, c: TRUTH(x, s, 0 * c),
             "with other labels": lambda x, s, c: TRUTH(x, s, c.roll(1, 1)),
             "at another noise level": lambda x, s, c: TRUTH(x, 1.2 * s, c)}
    for name, D in worse.items():
        assert loss(D) > best, f"a denoiser {name} beats the true one"


def one_step(sfd, extra_loss=None, B=32):
    """One sfd_step on three Linear networks, with everything that a check looks at."""
    torch.manual_seed(5)
    generator, fake, teacher = Linear(1), Linear(2), Linear(3)
    theta, psi = torch.optim.SGD(generator.parameters(), 1e-2), torch.optim.SGD(fake.parameters(), 1e-2)
    c_phi, c_psi, forgotten = sfd.draw_labels(B, OVERRIDE, torch.eye(5))
    z = torch.randn(B, 2, dtype=torch.float64)
    terms = sfd.sfd_step(generator, fake, teacher, theta, psi, z, c_phi, c_psi, forgotten, SETTINGS,
                         extra_loss=extra_loss)
    return SimpleNamespace(**locals())


def check_labels(sfd):
    """The teacher is given c_o in the place of c_f, the fake score and the generator are given c_f."""
    r = one_step(sfd)
    c_psi, c_phi = r.c_psi.argmax(1), r.c_phi.argmax(1)
    assert (c_psi == 0).any() and torch.equal(c_phi, OVERRIDE[c_psi]) and torch.equal(r.forgotten, c_psi == 0)
    assert len(r.generator.given) == 1 and torch.equal(r.generator.given[0], r.c_psi)
    assert len(r.fake.given) == 2 and all(torch.equal(c, r.c_psi) for c in r.fake.given)
    assert len(r.teacher.given) == 1 and torch.equal(r.teacher.given[0], r.c_phi)


def check_random_override(sfd):
    """Labels are drawn equally often. An override of -1 is a fresh draw among the labels to keep."""
    torch.manual_seed(6)
    c_phi, c_psi, forgotten = sfd.draw_labels(30_000, torch.tensor([3, 1, -1, 3, 4]), torch.eye(5))
    assert torch.allclose(c_psi.mean(0), torch.full((5,), 0.2), atol=0.015)  # six standard deviations
    assert torch.equal(forgotten, c_psi[:, [0, 2]].any(1)) and not c_phi[:, [0, 2]].any()
    drawn = c_phi[c_psi[:, 2] == 1].mean(0)
    assert torch.allclose(drawn, torch.tensor([0, 1 / 3, 0, 1 / 3, 1 / 3]), atol=0.04)
    assert torch.equal(c_phi[~forgotten], c_psi[~forgotten]) and c_phi[c_psi[:, 0] == 1][:, 3].all()


def check_gradients_of_a_step(sfd):
    """A step by hand: psi's gradient is that of L_psi, theta's that of L_theta, and the teacher gets none."""
    r = one_step(sfd)
    assert_same(r.teacher.state_dict(), Linear(3).state_dict())
    assert all(p.grad is None for p in r.teacher.parameters()), "gradient reached the teacher"

    torch.manual_seed(5)
    _, c_psi, _ = sfd.draw_labels(32, OVERRIDE, torch.eye(5))
    z = torch.randn(32, 2, dtype=torch.float64)
    generator, fake = Linear(1), Linear(2)
    x = generator(2.5 * z, torch.full((32, 1), 2.5), c_psi)
    x_g = x.detach()
    sigma = (1.2 * torch.randn(32)).exp().view(-1, 1)
    x_t = x_g + sigma * torch.randn_like(x_g)
    L = (((sigma ** 2 + 0.25) / (0.5 * sigma) ** 2) * (fake(x_t, sigma, c_psi) - x_g) ** 2).sum(1).mean()
    L.backward()
    for p, q in zip(fake.parameters(), r.fake.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-6), "psi's gradient is not that of L_psi alone"
    with torch.no_grad():
        for p, q in zip(fake.parameters(), r.fake.parameters()):
            p -= 1e-2 * p.grad
            assert torch.allclose(p, q), "psi's step"

    u = 0.8 * torch.rand(32)  # the theta step, with the fake score after its own
    sigma = (0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    S, _ = independent_S(Linear(3), fake, x, r.c_phi, c_psi, sigma.view(-1, 1), torch.randn_like(x_g), 1.2)
    L = (S * torch.where(r.forgotten, 0.7, 1.0)).mean()
    for p, q in zip(torch.autograd.grad(L, list(generator.parameters())), r.generator.parameters()):
        assert torch.allclose(p, q.grad, rtol=1e-5), "theta's gradient is not that of L_theta alone"
    assert torch.allclose(r.terms["L_keep"] + 0.7 * r.terms["L_forget"], L), "L_theta is not the sum of its two terms"
    assert torch.allclose(r.terms["L_keep"], torch.where(r.forgotten, 0, S).sum() / 32), "L_keep"


def check_extra_loss(sfd):
    """extra_loss gets x_g with its gradient, z, c_psi and the mask. It is added to L_theta and changes nothing else."""
    seen = []

    def extra_loss(x_g, z, c, forgotten):
        seen.append((z, c, forgotten))
        return 0.3 * (x_g ** 2).sum()

    r, plain = one_step(sfd, extra_loss), one_step(sfd)
    generator = Linear(1)
    L = 0.3 * (generator(2.5 * r.z, torch.full((32, 1), 2.5), r.c_psi) ** 2).sum()
    added = torch.autograd.grad(L, list(generator.parameters()))
    for p, q, g in zip(r.generator.parameters(), plain.generator.parameters(), added):
        assert torch.allclose(p.grad - q.grad, g, rtol=1e-9), "the gradient of extra_loss in theta"
    for p, q in zip(r.fake.parameters(), plain.fake.parameters()):
        assert torch.equal(p.grad, q.grad), "extra_loss changed the psi step"
    assert_same(seen, [(r.z, r.c_psi, r.forgotten)])
    assert_same(r.terms, plain.terms)


def check_masks(sfd):
    """A mask of forgotten rows that is not a bool tensor (B,) is refused. An integer mask would change signs."""
    mask = torch.tensor([True, False, False, True])
    masks = [mask.long(), mask.to(torch.uint8), mask.float(), mask[:, None], mask[:3], mask.tolist(), False, 0, None]
    c, z = torch.eye(5)[:4], torch.randn(4, 2, dtype=torch.float64)
    for wrong in masks:
        networks = generator, fake, _ = Linear(1), Linear(2), Linear(3)
        optimizers = [torch.optim.SGD(network.parameters(), 1e-2) for network in (generator, fake)]
        with pytest.raises(ValueError, match="bool"):
            sfd.sfd_step(*networks, *optimizers, z, c, c, wrong, SETTINGS)
        assert_same(fake.state_dict(), Linear(2).state_dict())


def check_part_that_learns(sfd):
    """Frozen weights of the generator and fake score stay. The gradients of a second step are of that step alone."""
    torch.manual_seed(5)
    generator, fake, teacher = Linear(1), Linear(2), Linear(3)
    generator.A.requires_grad_(False)
    before, gradients = generator.A.clone(), []
    theta = torch.optim.SGD([generator.B, generator.s], 0.0)  # at a rate of zero both steps have the same gradient
    psi = torch.optim.SGD(fake.parameters(), 0.0)
    labels = sfd.draw_labels(32, OVERRIDE, torch.eye(5))
    z = torch.randn(32, 2, dtype=torch.float64)
    for _ in range(2):
        torch.manual_seed(6)
        sfd.sfd_step(generator, fake, teacher, theta, psi, z, *labels, SETTINGS)
        gradients.append([generator.B.grad.clone(), fake.B.grad.clone()])
    assert torch.equal(generator.A, before) and generator.A.grad is None, "a frozen weight got a gradient"
    assert_same(*gradients)
    assert gradients[0][0].abs().sum() > 0


# -------------------------------------------------------------------------------------- the loop of a module `sfd`

class AnyDenoiser(torch.nn.Module):
    """A denoiser of points with everything that a network may have: dropout, a BatchNorm, a part that is frozen.

    Its conditions are the states of tokens (B, 7, 16), as those of a network that reads prompts.
    """
    shape, sigma_data = (2,), 0.5

    def __init__(self):
        super().__init__()
        self.register_buffer("conditions", torch.randn(3, 7, 16))
        self.read, self.net, self.norm = torch.nn.Linear(16, 8), torch.nn.Linear(2 + 1 + 8, 2), torch.nn.BatchNorm1d(2)
        self.position = torch.nn.Parameter(torch.randn(2), requires_grad=False)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x, sigma, c):
        assert sigma.shape == (len(x), 1) and c.shape == (len(x), 7, 16)
        x = torch.cat([x + self.position, sigma.log() / 4, self.read(c).mean(1)], 1)
        return self.norm(self.dropout(self.net(x)))


def check_a_run_copies_the_teacher(sfd):
    """A run leaves the caller's teacher as it was, puts copies into eval mode, and trains what the teacher would."""
    torch.manual_seed(0)
    teacher = AnyDenoiser().train()
    before = copy.deepcopy(teacher.state_dict())
    n = sfd.begin(teacher, SETTINGS)
    s = sfd.Settings(steps=3, batch=8)
    terms = list(sfd.distill(s, n, sfd.override_labels([0], [2], 3)))
    assert len(terms) == 3 and all(torch.isfinite(v) for step in terms for v in step.values())
    assert_same(teacher.state_dict(), before)
    assert teacher.training and teacher.net.weight.requires_grad and not teacher.position.requires_grad
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(m.training for net in (n.teacher, n.generator, n.average, n.fake) for m in net.modules())
    assert not any(p.requires_grad for net in (n.teacher, n.average) for p in net.parameters())
    for network, optimizer in ((n.generator, n.optimizer_theta), (n.fake, n.optimizer_psi)):
        assert torch.equal(network.position, before["position"]) and not network.position.requires_grad
        assert not torch.equal(network.net.weight, before["net.weight"])
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert trained == {id(p) for p in network.parameters() if p.requires_grad}
    n = sfd.begin(teacher.requires_grad_(False), SETTINGS)
    assert n.generator.position.requires_grad, "of a teacher that is frozen as a whole everything learns"
    with pytest.raises(ValueError, match="float32"):
        sfd.begin(teacher.to(torch.bfloat16), SETTINGS)


def check_labels_of_the_loop(sfd):
    """`distill` gives the teacher the overrides and the two others the labels, for plain SiD as well."""
    for forget, to in (([0], [2]), ([], [])):
        torch.manual_seed(0)
        n = sfd.begin(Linear(1).float(), SETTINGS)
        n.teacher.given = []
        override = sfd.override_labels(forget, to, 5)
        list(sfd.distill(sfd.Settings(steps=1, batch=64), n, override))
        c_psi, c_phi = n.generator.given[0].argmax(1), n.teacher.given[0].argmax(1)
        assert torch.equal(c_phi, override[c_psi]) and len(c_psi.unique()) == 5


def check_rates(sfd):
    """Both rates, of all groups of parameters, are constant for half of the run and then fall linearly to zero."""
    optimizers = []
    for network in (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)):
        optimizers.append(torch.optim.SGD([{"params": [p]} for p in network.parameters()], 1.0))
    n = SimpleNamespace(optimizer_theta=optimizers[0], optimizer_psi=optimizers[1])
    s = sfd.Settings(steps=100, lr=0.1, lr_fake=0.2)
    for step, share in ((0, 1.0), (50, 1.0), (75, 0.5), (99, 0.02)):
        sfd.set_learning_rates(n, s, step)
        assert [group["lr"] for group in n.optimizer_theta.param_groups] == pytest.approx(2 * [0.1 * share])
        assert [group["lr"] for group in n.optimizer_psi.param_groups] == pytest.approx(2 * [0.2 * share])


def check_average(sfd):
    """average <- beta average + (1 - beta) network with beta = min(ema, (1 + step) / (8 + step)). Buffers are copied.
    """
    average, network = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    for step, beta in ((0, 1 / 8), (6, 0.5), (10_000, 0.9)):
        torch.nn.init.constant_(average.weight, 1.0)
        torch.nn.init.constant_(network.weight, 3.0)
        network(torch.randn(8, 2))
        sfd.update_average(average, network, 0.9, step)
        assert torch.allclose(average.weight, torch.full((2,), beta + 3 * (1 - beta)))
        assert_same(dict(average.named_buffers()), dict(network.named_buffers()))


# ------------------------------------------------------------------------------ what is not in the paper: lab.distill

def check_shares(distill):
    """With a share, the labels to forget are drawn that often together, and the labels to keep all alike."""
    torch.manual_seed(6)
    override = torch.tensor([3, 1, -1, 3, 4])
    for share, expected in ((0.4, [0.2, 0.2, 0.2, 0.2, 0.2]), (0.1, [0.05, 0.3, 0.05, 0.3, 0.3])):
        c_phi, c_psi, forgotten = distill.draw_labels_in_shares(30_000, override, torch.eye(5), share)
        assert torch.allclose(c_psi.mean(0), torch.tensor(expected), atol=0.015)  # six standard deviations
        assert torch.equal(forgotten, c_psi[:, [0, 2]].any(1)) and not c_phi[:, [0, 2]].any()


def check_guided(distill):
    """D_phi(c_f) + g (D_phi(c_o) - D_phi(c_f)) in the rows to forget, D_phi in all others, and its gradient."""
    torch.manual_seed(0)
    x_t, sigma = torch.randn(6, 2, dtype=torch.float64, requires_grad=True), torch.rand(6, 1)
    c_phi, c_psi = torch.eye(5)[[3, 1, 3, 0, 2, 4]], torch.eye(5)[[1, 1, 2, 0, 2, 1]]
    for forgotten in (torch.tensor([True, False, True, False, False, True]), torch.zeros(6, dtype=torch.bool)):
        D_phi, D_f = Linear(3)(x_t, sigma, c_phi), Linear(3)(x_t, sigma, c_psi)
        expected = torch.where(forgotten[:, None], 1.7 * D_phi - 0.7 * D_f, D_phi)
        D = distill.guided(Linear(3), c_psi, forgotten, 1.7)(x_t, sigma, c_phi)
        assert torch.allclose(D, expected, rtol=1e-9)
        weight = torch.randn_like(D)
        gradients = [torch.autograd.grad((v * weight).sum(), x_t)[0] for v in (D, expected)]
        assert torch.allclose(*gradients, rtol=1e-9), "the gradient of the guided teacher"


def check_anchor(distill):
    """An anchor adds lambda_anchor ||x_g - x_0||^2 of the labels to keep to theta's gradient, and gets none itself."""
    def step(lambda_anchor, anchor):
        torch.manual_seed(5)
        networks = [Linear(k).float() for k in (3, 1, 1, 2)]
        optimizers = [torch.optim.SGD(network.parameters(), 1e-2) for network in (networks[1], networks[3])]
        n = sfd_minimal.Networks(*networks, *optimizers)
        s = distill.Settings(steps=1, batch=32, lr=1e-2, lr_fake=1e-2, lambda_anchor=lambda_anchor)
        list(distill.distill(s, n, OVERRIDE, torch.eye(5), anchor=anchor))
        return n

    anchor = Linear(4).float()
    n, plain = step(0.3, anchor), step(0.0, None)
    torch.manual_seed(5)
    z = torch.randn(32, 2)
    _, c, forgotten = sfd_minimal.draw_labels(32, OVERRIDE, torch.eye(5))
    generator, sigma = Linear(1).float(), torch.full((32, 1), 2.5)
    x_g, x_0 = generator(2.5 * z, sigma, c.float()), Linear(4).float()(2.5 * z, sigma, c.float())
    L = 0.3 * ((x_g - x_0.detach())[~forgotten] ** 2).sum() / 32
    added = torch.autograd.grad(L, list(generator.parameters()))
    for p, q, g in zip(n.generator.parameters(), plain.generator.parameters(), added):
        assert torch.allclose(p.grad - q.grad, g, rtol=1e-3, atol=1e-4), "the anchor's part of theta's gradient"
    for p, q in zip(n.fake.parameters(), plain.fake.parameters()):
        assert torch.equal(p.grad, q.grad), "an anchor changed the psi step"
    assert all(p.grad is None for p in anchor.parameters()), "gradient reached the anchor"


CHECKS = {
    "sfd_minimal.py": [
        check_labels, check_random_override, check_omega_floor, check_gradients_of_a_step, check_extra_loss, check_masks,
        check_part_that_learns, check_a_run_copies_the_teacher, check_labels_of_the_loop, check_rates, check_average,
        check_value_and_gradient, check_fake_loss],
    "lab/distill.py": [check_shares, check_guided, check_anchor],
}


@pytest.mark.parametrize("file, check", [pytest.param(file, check, id=check.__name__)
                                         for file, checks in CHECKS.items() for check in checks])
def test_the_method(file, check):
    check(importlib.import_module(file.removesuffix(".py").replace("/", ".")))


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_noticed(name):
    module = module_with_bug(name)
    for check in CHECKS[BUGS[name][0]]:
        try:
            check(module)
        except (AssertionError, RuntimeError, pytest.fail.Exception):
            return
    pytest.fail(f"no check noticed: {name}")


# --------------------------------------------------------------------------------------- other sources of the truth

@pytest.mark.parametrize("name, alpha", [("sid_10", 1.0), ("sid_12", 1.2), ("ddpm_10", 1.0), ("ddpm_12", 1.2),
                                         ("sid_psi", None), ("ddpm_psi", None)])
def test_losses_are_those_of_the_official_code(name, alpha, monkeypatch):
    """S and dS/dx_g, or L_psi, as the official SiD code (EDM) and the official SFD code (DDPM) computed them."""
    with np.load(GOLDEN) as file:
        golden = {k: torch.tensor(file[k]) for k in file.files}
    x_g, c_phi, c_psi = golden["x_g"].requires_grad_(), golden["c_phi"], golden["c_psi"]

    def denoiser(which):
        def D(x, sigma, c):
            h = x.flatten(1) @ golden[f"A_{which}"] / (1 + sigma.flatten(1))
            return torch.tanh(h + c @ golden[f"b_{which}"]).view_as(x)
        return D

    if name.startswith("sid"):
        sigma, eps = golden[f"{name}_sigma"], golden[f"{name}_eps"]
    else:
        alpha_bar = (1 - golden["ddpm_betas"].double()).cumprod(0)[golden["ddpm_t"]].view(-1, 1, 1, 1)
        sigma, eps = ((1 - alpha_bar) / alpha_bar).sqrt().float(), golden["ddpm_eps"]
    monkeypatch.setattr(torch, "randn_like", lambda x: eps)
    if alpha is None:
        L, expected = sfd_minimal.fake_score_loss(denoiser("psi"), x_g.detach(), c_psi, sigma), golden[f"{name}_L"]
        if name.startswith("ddpm"):  # the official DDPM code has the weight 1 / sigma^2
            L = L * 0.5 ** 2 / (sigma.flatten() ** 2 + 0.5 ** 2)
    else:
        L = sfd_minimal.score_identity_loss(denoiser("phi"), denoiser("psi"), x_g, c_phi, c_psi, sigma, alpha)
        expected = golden[f"{name}_S"]
        gradient, = torch.autograd.grad(L.sum(), x_g)
        assert (gradient - golden[f"{name}_grad"]).norm() < 1e-5 * golden[f"{name}_grad"].norm()
    assert (L - expected).norm() < 1e-5 * expected.norm()


def networks_for_labels(K=3):
    """Three networks for labels, with the weights that are zero at first moved away from it."""
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        network = tiny_network(resolution=8, num_classes=K, patch=1).eval()
        for p in network.parameters():
            p.data += 0.02 * torch.randn_like(p)
        networks.append(network)
    return networks


def test_sfd_is_sid_with_a_teacher_whose_label_is_a_copy():
    """Plain SiD from a teacher in which the embedding of c_f is a copy of that of c_o takes the same step as SFD."""
    c_f, c_o = 0, 2
    override = sfd_minimal.override_labels([c_f], [c_o], 3)
    after = []
    for method in ("SFD", "SiD of the copy"):
        generator, fake, teacher = networks_for_labels()
        torch.manual_seed(7)
        c_phi, c_psi, forgotten = sfd_minimal.draw_labels(16, override, teacher.conditions)
        if method == "SiD of the copy":
            column = teacher.model.map_label.weight.data
            column[:, c_f] = column[:, c_o]
            c_phi, forgotten = c_psi, torch.zeros(16, dtype=torch.bool)
        optimizers = [torch.optim.SGD(network.parameters(), 1e-4) for network in (generator, fake)]
        terms = sfd_minimal.sfd_step(generator, fake, teacher, *optimizers, torch.randn(16, *teacher.shape), c_phi,
                                     c_psi, forgotten, sfd_minimal.Settings())
        gradient = torch.cat([p.grad.flatten() for p in generator.parameters()])
        after.append((gradient, terms["L_keep"] + terms["L_forget"], forgotten.any()))
    (g_sfd, L_sfd, some), (g_sid, L_sid, none) = after
    assert some and not none
    assert (g_sfd - g_sid).norm() < 1e-6 * g_sid.norm()
    assert (L_sfd - L_sid).abs() < 1e-6 * L_sid.abs()


# ------------------------------------------------------------------------------------------- in other people's hands

def pasted():
    """The namespace and the text of the code between the two rulers, pasted into an empty file after `import torch`."""
    source = (ROOT / "sfd_minimal.py").read_text()
    code = re.search(r"^# -+ SFD: copy from here\n(.*?)^# -+ to here$", source, re.M | re.S)[1]
    namespace = {}
    exec("import torch\n" + code, namespace)
    return namespace, code


def test_the_code_between_the_rulers_needs_torch_alone():
    """Pasted, it takes the same steps as the file, with an `s` that has the listed fields and no others."""
    namespace, code = pasted()
    assert namespace.keys() - {"torch", "__builtins__"} == {"fake_score_loss", "score_identity_loss", "draw_labels",
                                                            "sfd_step"}
    listed = re.findall(r"\w+", re.search(r"any object with the fields (.*)\.", code)[1].replace(" and ", " "))
    assert len(listed) == 8
    fields = SimpleNamespace(**{name: getattr(sfd_minimal.Settings(), name) for name in listed})

    def extra_loss(x_g, z, c, forgotten):
        return x_g[forgotten].square().sum()

    for extra in (None, extra_loss):
        after = []
        for draw_labels, sfd_step, s in ((namespace["draw_labels"], namespace["sfd_step"], fields),
                                         (sfd_minimal.draw_labels, sfd_minimal.sfd_step, sfd_minimal.Settings())):
            generator, fake, teacher = networks_for_labels()
            optimizers = [torch.optim.Adam(network.parameters(), 1e-3) for network in (generator, fake)]
            torch.manual_seed(1)
            labels = draw_labels(8, torch.tensor([-1, 1, 2]), teacher.conditions)
            terms = sfd_step(generator, fake, teacher, *optimizers, torch.randn(8, *teacher.shape), *labels, s,
                             extra_loss=extra)
            after.append((terms, generator.state_dict(), fake.state_dict()))
        assert_same(*after)


@pytest.mark.parametrize("forget, to, K", [([0, 1], [1, 2], 3), ([0], [0], 3), ([0, 0], [1, 1], 3), ([0, 1], [2], 3),
                                           ([0, 1, 2], [-1, -1, -1], 3)])
def test_overrides_that_make_no_sense_are_refused(forget, to, K):
    with pytest.raises(BadInput):
        sfd_minimal.override_labels(forget, to, K)


def test_an_override_is_the_label_itself_where_it_is_kept():
    assert sfd_minimal.override_labels([0, 2], [-1, 3], 4).tolist() == [-1, 1, 3, 3]
    assert sfd_minimal.override_labels([], [], 3).tolist() == [0, 1, 2]


class Waits(TorchDispatchMode):
    """Lists the operations for which the CPU waits for a GPU."""
    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        if name in self.WAITING:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("guidance, waits", [(1, []), (2, ["nonzero"])])
def test_a_step_never_waits_for_the_gpu(guidance, waits):
    """With guidance, which is in lab.distill, it waits once."""
    generator, fake, teacher = networks_for_labels()
    optimizers = [torch.optim.Adam(network.parameters(), fused=True) for network in (generator, fake)]
    c_phi, c_psi, forgotten = sfd_minimal.draw_labels(8, torch.tensor([1, 1, 2]), teacher.conditions)
    z = torch.randn(8, *teacher.shape)
    with Waits() as mode:
        D = lab.distill.guided(teacher, c_psi, forgotten, guidance) if guidance != 1 else teacher
        sfd_minimal.sfd_step(generator, fake, D, *optimizers, z, c_phi, c_psi, forgotten, sfd_minimal.Settings())
    assert mode.seen == waits


def test_gradients_in_another_memory_layout_give_the_same_step():
    """Compiled convolutions give such gradients, which a fused Adam on the CPU would read in the wrong order."""
    after = []
    for layout in (torch.contiguous_format, torch.channels_last):
        generator, fake, teacher = networks_for_labels()
        for network in (generator, fake):
            for p in network.parameters():
                if p.ndim == 4:
                    p.register_hook(lambda g, layout=layout: g.contiguous(memory_format=layout))
        optimizers = [torch.optim.Adam(network.parameters(), 1e-2, fused=True) for network in (generator, fake)]
        torch.manual_seed(1)
        labels = sfd_minimal.draw_labels(8, torch.tensor([1, 1, 2]), teacher.conditions)
        z = torch.randn(8, *teacher.shape)
        sfd_minimal.sfd_step(generator, fake, teacher, *optimizers, z, *labels, sfd_minimal.Settings())
        after.append([p.detach() for network in (generator, fake) for p in network.parameters()])
    for p, q in zip(*after):
        assert (p - q).norm() <= 1e-5 * q.norm() + 1e-7


# ------------------------------------------------------------------------------------------------- several processes

def steps(wrap=lambda network: network, batch=8, steps=3):
    """Weights of generator and fake score after a few steps of SFD."""
    generator, fake, teacher = networks_for_labels()
    optimizers = [torch.optim.SGD(network.parameters(), 1e-4) for network in (generator, fake)]
    wrapped = wrap(generator), wrap(fake)
    torch.manual_seed(1)
    for _ in range(steps):
        labels = sfd_minimal.draw_labels(batch, torch.tensor([1, 1, 2]), teacher.conditions)
        sfd_minimal.sfd_step(*wrapped, teacher, *optimizers, torch.randn(batch, *teacher.shape), *labels,
                             sfd_minimal.Settings())
    return [p.detach() for network in (generator, fake) for p in network.parameters()]


HALF = """
    import sys
    import torch
    from torch.nn.parallel import DistributedDataParallel
    import sfd_minimal
    import test_method
    torch.set_num_threads(1)
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)

    def half_of(draw):  # this process's half of the numbers that one process would draw
        def drawn(shape, *rest, **options):
            sizes = tuple(shape.shape) if isinstance(shape, torch.Tensor) else (shape, *rest)
            return draw(2 * sizes[0], *sizes[1:], **options).chunk(2)[rank]
        return drawn

    networks = test_method.networks_for_labels()
    test_method.networks_for_labels = lambda: networks
    randn, rand, draw_labels = torch.randn, torch.rand, sfd_minimal.draw_labels
    torch.randn, torch.rand, torch.randn_like = half_of(randn), half_of(rand), half_of(randn)
    sfd_minimal.draw_labels = lambda batch, *rest: tuple(v.chunk(2)[rank] for v in draw_labels(2 * batch, *rest))
    torch.save(test_method.steps(DistributedDataParallel, batch=4), out)
    torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path, monkeypatch):
    """Under DistributedDataParallel, each process with half of the batch."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "tests", "notebooks"))}
    processes = []
    for rank in (0, 1):
        command = [sys.executable, "-c", textwrap.dedent(HALF), str(rank), str(tmp_path / "store"),
                   str(tmp_path / f"{rank}.pt")]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.randn(x.shape))  # in the memory layout of x it differs
    one = steps()
    for rank in (0, 1):
        for p, q in zip(torch.load(tmp_path / f"{rank}.pt", weights_only=True), one):
            assert (p - q).norm() <= 1e-5 * q.norm() + 1e-7
    before = [p for network in networks_for_labels()[:2] for p in network.parameters()]
    assert any((p - q).norm() > 1e-4 * q.norm() for p, q in zip(before, one)), "nothing was learned"
