"""The lines that make SFD, against independent computations;
and against themselves with a line broken, which must be noticed."""
import copy
import dataclasses
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import sfd_minimal
from lab.closed_form import ring

GOLDEN = Path(__file__).parent / "fixtures" / "official_losses_golden.npz"
SOURCE = Path(sfd_minimal.__file__).read_text()
TRUTH = ring()
SETTINGS = sfd_minimal.Settings(alpha=1.2, lambda_forget=0.7, lambda_anchor=0.3)


class Linear(torch.nn.Module):
    """The smallest denoiser with weights: D = A x + B label + s sigma, in float64."""

    def __init__(self, seed):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.A, self.B, self.s = (torch.nn.Parameter(torch.randn(*shape, generator=g, dtype=torch.float64) * 0.3)
                                  for shape in ((2, 2), (5, 2), (2,)))
        self.labels = []

    def forward(self, x, sigma, label):
        assert isinstance(sigma, torch.Tensor) and sigma.shape == (len(x), 1), "the contract's shape of sigma"
        self.labels.append(label.clone())
        return x @ self.A + label.double() @ self.B + sigma * self.s


def independent_S(teacher, fake, x_g, c_phi, c_psi, sigma, eps, alpha, omega=None):
    """The formula of the paper, term by term, for one sample at a time and with the algebra of the design:
    S omega = (D_phi - D_psi). (D_psi - x_g) + (1 - alpha) ||D_phi - D_psi||^2."""
    out, omegas = [], []
    for i in range(len(x_g)):
        x_t = x_g[i:i + 1] + sigma[i] * eps[i:i + 1]
        phi, psi = teacher(x_t, sigma[i:i + 1], c_phi[i:i + 1])[0], fake(x_t, sigma[i:i + 1], c_psi[i:i + 1])[0]
        w = (max(sum(abs((phi - x_g[i]).tolist()[j]) for j in range(len(phi))) / len(phi), 1e-5) if omega is None
             else omega[i])
        omegas.append(w)
        d = phi - psi
        out.append((torch.dot(d, psi - x_g[i]) + (1 - alpha) * torch.dot(d, d)) / w)
    return torch.stack(out), omegas


def case(B=6):
    g = torch.Generator().manual_seed(3)
    x_g = torch.randn(B, 2, generator=g, dtype=torch.float64)
    c_phi, c_psi = (torch.eye(5)[torch.randint(5, (B,), generator=g)] for _ in range(2))
    sigma = torch.rand(B, 1, generator=g, dtype=torch.float64) * 3 + 0.1
    torch.manual_seed(11)
    eps = torch.randn_like(x_g)
    return x_g, c_phi, c_psi, sigma, eps


def check_value_and_gradient(sfd):
    """S and dS/dx_g against finite differences of the independent formula, omega held fixed:
    that is what 'detached' means."""
    x_g, c_phi, c_psi, sigma, eps = case()
    fake = Linear(1)
    for alpha in (1.0, 1.2, 0.5):
        torch.manual_seed(11)
        x = x_g.clone().requires_grad_()
        S = sfd.score_identity_loss(TRUTH, fake, x, c_phi, c_psi, sigma, alpha)
        want, omega = independent_S(TRUTH, fake, x_g, c_phi, c_psi, sigma, eps, alpha)
        assert torch.allclose(S, want, rtol=1e-9), "value of S"
        gradient, = torch.autograd.grad(S.sum(), x)
        h = 1e-6
        for j in range(2):
            step = torch.zeros_like(x_g)
            step[:, j] = h
            up, down = (independent_S(TRUTH, fake, x_g + d, c_phi, c_psi, sigma, eps, alpha, omega)[0]
                        for d in (step, -step))
            assert torch.allclose(gradient[:, j], (up - down) / (2 * h), rtol=1e-5, atol=1e-7), "gradient of S in x_g"


def check_fake_loss(sfd):
    """L_psi against the formula, and minimal at the true denoiser of the images it sees."""
    x_g, _, c, sigma, eps = case()
    fake, sd = Linear(1), 0.5
    torch.manual_seed(11)
    got = sfd.fake_score_loss(fake, x_g, c, sigma, sd)
    D = fake(x_g + sigma * eps, sigma, c)
    want = torch.stack([(sigma[i, 0] ** 2 + sd ** 2) / (sigma[i, 0] * sd) ** 2 * ((D[i] - x_g[i]) ** 2).sum()
                        for i in range(len(x_g))])
    assert torch.allclose(got, want, rtol=1e-12), "value of L_psi"

    torch.manual_seed(0)
    k = torch.randint(5, (20_000,))
    x, label, sigma = TRUTH.sample(k), torch.eye(5)[k], (torch.randn(20_000, 1, dtype=torch.float64) * 1.2).exp()

    def loss(D):
        torch.manual_seed(1)
        return sfd.fake_score_loss(D, x, label, sigma).mean().item()

    best = loss(TRUTH)
    for name, worse in {"shifted": lambda *a: TRUTH(*a) + 0.05, "scaled": lambda *a: 1.03 * TRUTH(*a),
                        "unlabelled": lambda x, s, c: TRUTH(x, s, 0 * c),
                        "rolled labels": lambda x, s, c: TRUTH(x, s, c.roll(1, 1)),
                        "wrong sigma": lambda x, s, c: TRUTH(x, 1.2 * s, c)}.items():
        assert loss(worse) > best, f"{name} denoiser beats the true one"


def one_step(sfd, lambda_forget=0.7, anchor=None):
    """One sfd_step on tiny networks; everything that a check may want to look at."""
    torch.manual_seed(5)
    generator, fake, teacher = Linear(1), Linear(2), Linear(3)
    before = copy.deepcopy((generator.state_dict(), fake.state_dict(), teacher.state_dict()))
    theta, psi = torch.optim.SGD(generator.parameters(), 1e-2), torch.optim.SGD(fake.parameters(), 1e-2)
    override = torch.tensor([3, 1, 2, 3, 4])
    c_phi, c_psi, forgotten = sfd.draw_labels(32, override, torch.tensor([1, 2, 3, 4]), torch.eye(5))
    z = torch.randn(32, 2, dtype=torch.float64)
    settings = dataclasses.replace(SETTINGS, lambda_forget=lambda_forget)
    terms = sfd.sfd_step(generator, fake, teacher, theta, psi, z, c_phi, c_psi, forgotten, settings, anchor=anchor)
    return types.SimpleNamespace(**locals())


def check_labels(sfd):
    """Who is asked about what: the teacher about c_o, fake and generator about c_f,
    everyone about c where c is kept."""
    r = one_step(sfd)
    asked, told = r.c_psi.argmax(1), r.c_phi.argmax(1)
    assert torch.equal(told[asked == 0], torch.full_like(told[asked == 0], 3)) and (asked == 0).any()
    assert torch.equal(told[asked != 0], asked[asked != 0]) and torch.equal(r.forgotten, asked == 0)
    assert all(torch.equal(c, r.c_psi) for c in r.generator.labels) and len(r.generator.labels) == 1
    assert all(torch.equal(c, r.c_psi) for c in r.fake.labels) and len(r.fake.labels) == 2
    assert all(torch.equal(c, r.c_phi) for c in r.teacher.labels) and len(r.teacher.labels) == 1


def check_share(sfd):
    """With a share, the forgotten labels together are drawn that often, and all kept ones alike;
    without, every label alike."""
    torch.manual_seed(6)
    override, kept, n = torch.tensor([3, 1, -1, 3, 4]), torch.tensor([1, 3, 4]), 30_000
    for share, expected in ((0.4, [0.2, 0.2, 0.2, 0.2, 0.2]), (0.1, [0.05, 0.3, 0.05, 0.3, 0.3]), (None, [0.2] * 5)):
        c_phi, c_psi, forgotten = sfd.draw_labels(n, override, kept, torch.eye(5), share)
        assert torch.allclose(c_psi.mean(0), torch.tensor(expected), atol=0.015)  # more than six standard deviations
        assert torch.equal(forgotten, c_psi[:, [0, 2]].any(1)) and not c_phi[:, [0, 2]].any(), (
            "a teacher was asked about a forgotten label")


def check_stop_gradients(sfd):
    """The teacher never moves and gets no gradient; psi gets none in the theta step, theta none in the psi step."""
    r = one_step(sfd)
    for name, value in r.teacher.state_dict().items():
        assert torch.equal(value, r.before[2][name]), "the teacher moved"
    assert all(p.grad is None for p in r.teacher.parameters()), "gradient reached the teacher"

    # the psi step alone, redone by hand: what the step left in fake.grad must be its gradient and nothing else
    torch.manual_seed(5)
    c_phi, c_psi, _ = sfd.draw_labels(32, r.override, torch.tensor([1, 2, 3, 4]), torch.eye(5))
    z = torch.randn(32, 2, dtype=torch.float64)
    generator, fake = Linear(1), Linear(2)
    with torch.no_grad():
        x_g = generator(2.5 * z, torch.full((32, 1), 2.5), c_psi)
    sigma = (1.2 * torch.randn(32)).exp().view(-1, 1)
    x_t = x_g + sigma * torch.randn_like(x_g)
    L = (((sigma ** 2 + 0.25) / (0.5 * sigma) ** 2) * (fake(x_t, sigma, c_psi) - x_g) ** 2).sum(1).mean()
    L.backward()
    for p, q in zip(fake.parameters(), r.fake.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-6), "psi's gradient is not that of L_psi alone"
    with torch.no_grad():
        for p in fake.parameters():
            p -= 1e-2 * p.grad

    u = 0.8 * torch.rand(32)  # the theta step by hand, after psi's update
    sigma = (0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    eps = torch.randn_like(x_g)
    x = generator(2.5 * z, torch.full((32, 1), 2.5), c_psi)
    S, _ = independent_S(Linear(3), fake, x, c_phi, c_psi, sigma.view(-1, 1), eps, 1.2)
    L = (S * torch.where(r.forgotten, 0.7, 1.0)).mean()
    for p, q in zip(torch.autograd.grad(L, list(generator.parameters())), r.generator.parameters()):
        assert torch.allclose(p, q.grad, rtol=1e-5), "theta's gradient is not that of L_theta alone"
    assert torch.allclose(r.terms["L_keep"] + 0.7 * r.terms["L_forget"], L), "L_theta is not the sum of its two terms"


def check_anchor(sfd):
    """What an anchor adds: lambda_anchor ||x_g - x_0||^2 under the labels to keep, to theta's gradient alone;
    it gets none itself."""
    anchor = Linear(4)
    r, plain = one_step(sfd, anchor=anchor), one_step(sfd)
    generator = Linear(1)
    x_g, x_0 = (D(2.5 * r.z, torch.full((32, 1), 2.5), r.c_psi) for D in (generator, Linear(4)))
    L = 0.3 * ((x_g - x_0.detach())[~r.forgotten] ** 2).sum() / 32
    for p, q, g in zip(r.generator.parameters(), plain.generator.parameters(),
                       torch.autograd.grad(L, list(generator.parameters()))):
        assert torch.allclose(p.grad - q.grad, g, rtol=1e-9), "the anchor's part of theta's gradient"
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(r.fake.parameters(), plain.fake.parameters())), (
        "an anchor changed the psi step")
    assert all(p.grad is None for p in anchor.parameters()), "gradient reached the anchor"


def check_guided(sfd):
    """D_phi(c_f) + g (D_phi(c_o) - D_phi(c_f)) in the rows to forget, the teacher's own answer in the others,
    and its gradient; no row to forget is fine."""
    x_t, sigma = torch.randn(6, 2, dtype=torch.float64, requires_grad=True), torch.rand(6, 1)
    c_phi, c_psi = torch.eye(5)[[3, 1, 3, 0, 2, 4]], torch.eye(5)[[1, 1, 2, 0, 2, 1]]
    for forgotten in (torch.tensor([True, False, True, False, False, True]), torch.zeros(6, dtype=torch.bool)):
        D_phi, D_f = (Linear(3)(x_t, sigma, c) for c in (c_phi, c_psi))
        expected = torch.where(forgotten[:, None], 1.7 * D_phi - 0.7 * D_f, D_phi)
        D = sfd.guided(Linear(3), c_psi, forgotten, 1.7)(x_t, sigma, c_phi)
        assert torch.allclose(D, expected, rtol=1e-9)
        weight = torch.randn_like(D)
        for a, b in zip(*(torch.autograd.grad((v * weight).sum(), x_t) for v in (D, expected))):
            assert torch.allclose(a, b, rtol=1e-9), "the gradient of the guided teacher"


def check_part_that_learns(sfd):
    """A generator of which only some weights learn: the others stay and get no gradient, and the gradient of a second
    step is that step's alone."""
    torch.manual_seed(5)
    generator, fake, teacher = Linear(1), Linear(2), Linear(3)
    generator.A.requires_grad_(False)
    before, gradients = generator.A.clone(), []
    theta = torch.optim.SGD([generator.B, generator.s], 0.0)  # at a rate of zero both steps have the same gradient
    psi = torch.optim.SGD(fake.parameters(), 0.0)
    labels = sfd.draw_labels(32, torch.tensor([3, 1, 2, 3, 4]), torch.tensor([1, 2, 3, 4]), torch.eye(5))
    z = torch.randn(32, 2, dtype=torch.float64)
    for _ in range(2):
        torch.manual_seed(6)
        sfd.sfd_step(generator, fake, teacher, theta, psi, z, *labels, SETTINGS)
        gradients.append(generator.B.grad.clone())
    assert torch.equal(generator.A, before) and generator.A.grad is None, "a frozen weight was asked to learn"
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0, "theta's gradient is not that of one step"


def check_omega_floor(sfd):
    """Where the teacher returns x_g itself, omega is its floor, 1e-5."""
    x_g = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    S = sfd.score_identity_loss(lambda *_: x_g, lambda *_: x_g - 0.5, x_g, None, None,
                                torch.ones(2, 1, 1, 1), alpha=1.2)
    assert torch.allclose(S, torch.full((2,), -1.2 * 0.25 * 48 / 1e-5, dtype=torch.float64))


CHECKS = [check_value_and_gradient, check_fake_loss, check_labels, check_share, check_stop_gradients, check_anchor,
          check_guided, check_part_that_learns, check_omega_floor]


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_the_method(check):
    check(sfd_minimal)


@pytest.mark.parametrize("name, alpha", [("sid_10", 1.0), ("sid_12", 1.2), ("ddpm_10", 1.0), ("ddpm_12", 1.2),
                                         ("sid_psi", None), ("ddpm_psi", None)])
def test_losses_are_those_of_the_official_code(name, alpha, monkeypatch):
    """S and dS/dx_g, or L_psi, as the official SiD code (EDM) and the official SFD code (DDPM) computed them."""
    with np.load(GOLDEN) as file:
        golden = {k: torch.tensor(file[k]) for k in file.files}
    x_g, c_phi, c_psi = golden["x_g"].requires_grad_(), golden["c_phi"], golden["c_psi"]
    teacher, fake = (lambda x, sigma, c, A=golden[f"A_{of}"], b=golden[f"b_{of}"]:
                     torch.tanh(x.flatten(1) @ A / (1 + sigma.flatten(1)) + c @ b).view_as(x) for of in ("phi", "psi"))
    sid = name.startswith("sid")
    alpha_bar = (1 - golden["ddpm_betas"].double()).cumprod(0)[golden["ddpm_t"]].view(-1, 1, 1, 1)
    sigma = golden[f"{name}_sigma"] if sid else ((1 - alpha_bar) / alpha_bar).sqrt().float()
    monkeypatch.setattr(torch, "randn_like", lambda _: golden[f"{name}_eps" if sid else "ddpm_eps"])
    if alpha is None:
        got, want = sfd_minimal.fake_score_loss(fake, x_g.detach(), c_psi, sigma), golden[f"{name}_L"]
        if not sid:  # the official DDPM code weighs by 1 / sigma^2
            got = got * 0.5 ** 2 / (sigma.flatten() ** 2 + 0.5 ** 2)
    else:
        got, want = sfd_minimal.score_identity_loss(teacher, fake, x_g, c_phi, c_psi, sigma, alpha), golden[f"{name}_S"]
        gradient, expected = torch.autograd.grad(got.sum(), x_g)[0], golden[f"{name}_grad"]
        assert (gradient - expected).norm() < 1e-5 * expected.norm()
    assert (got - want).norm() < 1e-5 * want.norm()


MUTATIONS = {  # name: (line as it is, line broken)
    "teacher and fake swapped": ("S = score_identity_loss(teacher, fake,", "S = score_identity_loss(fake, teacher,"),
    "D_phi and D_psi swapped": ("S = (D_phi - D_psi)", "S = (D_psi - D_phi)"),
    "c_f in the teacher's label": ("x_g, c_phi, c_psi, sigma, s.alpha)", "x_g, c_psi, c_psi, sigma, s.alpha)"),
    "omega not detached": ("(D_phi - x_g).detach().abs()", "(D_phi - x_g).abs()"),
    "omega not floored": (".mean(1).clamp(min=1e-5)", ".mean(1)"),
    "omega summed": (".abs().flatten(1).mean(1)", ".abs().flatten(1).sum(1)"),
    "sign of alpha flipped": ("- alpha * (D_phi - D_psi)", "+ alpha * (D_phi - D_psi)"),
    "psi fed the override label": ("x_g, c_phi, c_psi, sigma, s.alpha)", "x_g, c_phi, c_phi, sigma, s.alpha)"),
    "psi trained on the override label": ("x_g.detach(), c_psi, sigma", "x_g.detach(), c_phi, sigma"),
    "x_g not detached in the psi step": ("fake_score_loss(fake, x_g.detach(),", "fake_score_loss(fake, x_g,"),
    "gradient left in psi and phi": ("L_theta.backward(inputs=theta)", "L_theta.backward()"),
    "theta's last gradient kept": ("    optimizer_theta.zero_grad()\n", ""),
    "forgetting weight ignored": ("L_keep + s.lambda_forget * L_forget", "L_keep + L_forget"),
    "kept and forgotten swapped": ("(S * ~forgotten)", "(S * forgotten)"),
    "anchor on the forgotten labels": (".sum(1) * ~forgotten).sum() / len", ".sum(1) * forgotten).sum() / len"),
    "anchor without its weight": ("L_theta + s.lambda_anchor *", "L_theta +"),
    "anchor at another noise level": ("anchor_loss(anchor, x_g, sigma_init * z,", "anchor_loss(anchor, x_g, z,"),
    "guidance of the kept labels": ("index_put((rows,), D_f + guidance * (D_phi[rows]",
                                    "index_put((~forgotten,), D_f + guidance * (D_phi[~forgotten]"),
    "guidance towards the forgotten label": ("D_f + guidance * (D_phi[rows] - D_f)",
                                             "D_phi[forgotten] + guidance * (D_f - D_phi[forgotten])"),
    "guidance counted twice": ("D_f + guidance *", "D_phi[forgotten] + guidance *"),
    "guidance from the override itself": ("each(and_rows, c_phi, c_psi)", "each(and_rows, c_phi, c_phi)"),
    "weight of L_psi inverted": ("/ (sigma * sigma_data) ** 2", "* (sigma * sigma_data) ** 2"),
    "share of the wrong labels": ("where(to_forget,", "where(~to_forget,"),
    "override ignored": ("conditions[c_o], conditions[c],", "conditions[c], conditions[c],"),
    "frozen weights asked to learn": ("for p in generator.parameters() if p.requires_grad]",
                                      "for p in generator.parameters()]"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_line_is_noticed(name):
    line, broken = MUTATIONS[name]
    assert SOURCE.count(line) == 1, f"the line to break is not there once: {line}"
    module = types.ModuleType("mutant")
    module.__file__ = sfd_minimal.__file__
    exec(compile(SOURCE.replace(line, broken), "mutant", "exec"), module.__dict__)
    noticed = []
    for check in CHECKS:
        try:
            check(module)
        except (AssertionError, RuntimeError) as e:
            noticed.append(f"{check.__name__}: {e}")
    assert noticed, f"no check noticed: {name}"
