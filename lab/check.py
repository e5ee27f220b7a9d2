"""Check your own implementation of SFD. A bug that is in the list below is named.

    from lab.check import check

    def my_fake_score_loss(fake, x_g, c, sigma, sigma_data=0.5):
        x_t = x_g + sigma * torch.randn_like(x_g)
        return ((fake(x_t, sigma, c) - x_g) ** 2).flatten(1).sum(1)

    check(my_fake_score_loss)
    # fake_score_loss: wrong. This is the result when the weight w of L_psi is left out.

Four functions can be checked: fake_score_loss, score_identity_loss, draw_labels and sfd_step, with the arguments and
results of those in sfd_minimal.py. `check` compares values, gradients and updates of weights with an independent
implementation of the formulas. Where they differ, it compares them with the same implementation with one line broken,
for each bug of the list. A function that returns None, or raises NotImplementedError, is "not yet".

You may draw random numbers in any order and in any way: the networks of a check keep what they are given, and the
comparison uses the same noise. This file needs torch alone, and can be copied.
"""
import functools
import inspect
import textwrap
import traceback
from types import SimpleNamespace

import torch

NAMES = ("fake_score_loss", "score_identity_loss", "draw_labels", "sfd_step")


def check(f, name=None, strict=False):
    """Print in one line whether the function f is right, and if not, what is wrong. Returns True or False.

    name: one of NAMES. Without it, the one that is part of the name of f. strict: of an sfd_step, also the argument
    extra_loss, and that it refuses, by a ValueError, masks `forgotten` that are no bool tensors of shape (B,).
    """
    name = name or name_of(f)
    if name not in NAMES:
        raise ValueError(f"name is one of {', '.join(NAMES)}, not {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        right, line = outcome(f, name, strict)
    print(f"{name}: {line}")
    return right


def name_of(f):
    """The one of NAMES that is part of the name of a function."""
    own = getattr(f, "__name__", "")
    for name in NAMES:
        if name in own:
            return name
    raise ValueError(f"the name {own!r} does not tell which function this is: check(f, {NAMES[0]!r})")


# ------------------------------------------------------------------------------------------------------- the reference
# The formulas once more, in another form than in sfd_minimal.py where there is one. The argument `noise` is eps, or in
# a whole step the noise levels and eps of both updates.

def fake_score_loss(fake, x_g, c, sigma, sigma_data, noise):
    x_t = x_g + sigma * noise
    D_psi = fake(x_t, sigma, c)
    squared = (D_psi - x_g) ** 2
    w = 1 / sigma ** 2 + 1 / sigma_data ** 2            # the same as (sigma^2 + sd^2) / (sigma sd)^2
    return (w * squared).flatten(1).sum(1)


def score_identity_loss(teacher, fake, x_g, c_phi, c_psi, sigma, alpha, noise):
    x_t = x_g + sigma * noise
    D_phi = teacher(x_t, sigma, c_phi)
    D_psi = fake(x_t, sigma, c_psi)
    apart = D_phi - D_psi
    S = apart * (D_psi - x_g) + (1 - alpha) * apart ** 2    # the same as apart * ((D_phi - x_g) - alpha * apart)
    error = (D_phi - x_g).detach()
    omega = error.abs().flatten(1).mean(1).clamp(min=1e-5)
    S_omega = S.flatten(1).sum(1)
    return S_omega / omega


def draw_labels(batch, override, conditions):
    numbers = torch.arange(len(override))
    kept = numbers[override == numbers]
    c = torch.ones(len(override)).multinomial(batch, replacement=True)
    random = kept[torch.ones(len(kept)).multinomial(batch, replacement=True)]
    c_o = override[c]
    c_o = torch.where(c_o < 0, random, c_o)
    forgotten = c_o != c
    return conditions[c_o], conditions[c], forgotten


def psi_noise_levels(s, n):
    ln_sigma = s.p_mean + s.p_std * torch.randn(n)
    return ln_sigma.exp()


def theta_noise_levels(s, n):
    u = s.u_max * torch.rand(n)
    root = (1 - u) * s.sigma_min ** (1 / 7) + u * s.sigma_max ** (1 / 7)
    return root ** 7


def sum_over_rows(S, rows):
    return S[rows].sum() / len(S)


def sfd_step(generator, fake, teacher, optimizer_theta, optimizer_psi, z, c_phi, c_psi, forgotten, s, sigma_data, noise,
             extra_loss=None):
    if forgotten.dtype != torch.bool:
        raise ValueError("the mask is no bool tensor")
    if forgotten.shape != (len(z),):
        raise ValueError("the mask has another shape")
    sigma_init = torch.full((len(z), 1, 1, 1), s.sigma_init)
    x_g = generator(s.sigma_init * z, sigma_init, c_psi)
    images = x_g.detach()
    L_psi = fake_score_loss(fake, images, c_psi, noise.sigma_psi, sigma_data, noise.eps_psi).mean()
    optimizer_psi.zero_grad()
    L_psi.backward()
    optimizer_psi.step()

    S = score_identity_loss(teacher, fake, x_g, c_phi, c_psi, noise.sigma_theta, s.alpha, noise.eps_theta)
    L_keep = sum_over_rows(S, ~forgotten)
    L_forget = sum_over_rows(S, forgotten)
    L_theta = L_keep + s.lambda_forget * L_forget
    if extra_loss is not None:
        L_theta = L_theta + extra_loss(x_g, z, c_psi, forgotten)
    learning = [p for p in generator.parameters() if p.requires_grad]
    optimizer_theta.zero_grad()
    L_theta.backward(inputs=learning)
    optimizer_theta.step()
    return {"L_psi": L_psi.detach(), "L_keep": L_keep.detach(), "L_forget": L_forget.detach()}


PARTS = {   # the functions that each function consists of
    "fake_score_loss": (fake_score_loss,),
    "score_identity_loss": (score_identity_loss,),
    "draw_labels": (draw_labels,),
    "sfd_step": (fake_score_loss, score_identity_loss, psi_noise_levels, theta_noise_levels, sum_over_rows, sfd_step),
}


@functools.cache
def source_of(name):
    """The source of these functions."""
    return "\n".join(inspect.getsource(part) for part in PARTS[name])


def reference(name, bug=None):
    """The functions of the reference that `name` consists of, with one of BUGS or without, as attributes."""
    source = source_of(name)
    if bug:
        line, broken = BUGS[bug]
        assert source.count(line) == 1, f"the line of the bug is not there once: {line}"
        source = source.replace(line, broken)
    functions = {"torch": torch}
    exec(source, functions)
    return SimpleNamespace(**functions)


# ------------------------------------------------------------------------------------------------------------ the bugs

BUGS = {  # "This is the result when ...": (a line of the reference or a part of it, the same with the bug)
    # L_psi
    "the weight w of L_psi is left out": ("(w * squared)", "squared"),
    "the weight w of L_psi multiplies by (sigma sd)^2 and does not divide by it": (
        "w = 1 / sigma ** 2 + 1 / sigma_data ** 2", "w = (sigma ** 2 + sigma_data ** 2) * (sigma * sigma_data) ** 2"),
    "sigma_data is 0.5, whatever is passed": ("1 / sigma_data ** 2 ", "1 / 0.5 ** 2 "),
    "L_psi compares with x_t, not with x_g": ("squared = (D_psi - x_g) ** 2", "squared = (D_psi - x_t) ** 2"),
    "L_psi is a mean over pixels, not a sum": ("(w * squared).flatten(1).sum(1)", "(w * squared).flatten(1).mean(1)"),
    "the fake score is detached in L_psi": ("squared = (D_psi - x_g) ** 2", "squared = (D_psi.detach() - x_g) ** 2"),
    # S
    "the first factor of S is D_psi - D_phi": ("return S_omega / omega", "return -S_omega / omega"),
    "alpha has the wrong sign": ("(1 - alpha) * apart ** 2", "(1 + alpha) * apart ** 2"),
    "alpha is 1, whatever is passed": ("(1 - alpha) * apart ** 2", "0 * apart ** 2"),
    "S is a mean over pixels, not a sum": ("S_omega = S.flatten(1).sum(1)", "S_omega = S.flatten(1).mean(1)"),
    "omega is not detached": ("error = (D_phi - x_g).detach()", "error = D_phi - x_g"),
    "omega has no floor of 1e-5": (".mean(1).clamp(min=1e-5)", ".mean(1)"),
    "omega is a sum over pixels, not a mean": ("error.abs().flatten(1).mean(1)", "error.abs().flatten(1).sum(1)"),
    "omega is one number for the whole batch": (
        "error.abs().flatten(1).mean(1).clamp(min=1e-5)", "error.abs().mean().clamp(min=1e-5)"),
    "omega is left out": ("return S_omega / omega", "return S_omega"),
    "omega is the error of the fake score, not of the teacher": (
        "error = (D_phi - x_g).detach()", "error = (D_psi - x_g).detach()"),
    "no gradient flows through the teacher": (
        "D_phi = teacher(x_t, sigma, c_phi)", "D_phi = teacher(x_t, sigma, c_phi).detach()"),
    "no gradient flows through the fake score": (
        "    D_psi = fake(x_t, sigma, c_psi)", "    D_psi = fake(x_t, sigma, c_psi).detach()"),
    "x_t is detached": ("    D_phi = teacher(x_t,", "    x_t = x_t.detach()\n    D_phi = teacher(x_t,"),
    # labels
    "the override is ignored": ("return conditions[c_o], conditions[c],", "return conditions[c], conditions[c],"),
    "c_phi and c_psi are swapped": ("return conditions[c_o], conditions[c],", "return conditions[c], conditions[c_o],"),
    "a random override may be a label to forget": ("kept = numbers[override == numbers]", "kept = numbers"),
    "one random override is drawn for the whole batch": (
        "multinomial(batch, replacement=True)]", "multinomial(1)]"),
    "an override of -1 is taken for the last label": ("c_o = torch.where(c_o < 0, random, c_o)", "c_o = c_o"),
    "a label to forget is never drawn": (
        "c = torch.ones(len(override)).multinomial", "c = (override == numbers).float().multinomial"),
    "forgotten is true for the labels to keep": ("forgotten = c_o != c", "forgotten = c_o == c"),
    # generation
    "z is not multiplied by sigma_init": ("generator(s.sigma_init * z,", "generator(z,"),
    "the generator is given the override, c_phi": ("sigma_init, c_psi)", "sigma_init, c_phi)"),
    # the psi step
    "p_mean is ignored": ("ln_sigma = s.p_mean + ", "ln_sigma = "),
    "p_std is ignored": ("s.p_std * torch.randn(n)", "torch.randn(n)"),
    "x_g is not detached in the psi step": ("images = x_g.detach()", "images = x_g"),
    "the fake score is trained under the override, c_phi": (
        "fake_score_loss(fake, images, c_psi,", "fake_score_loss(fake, images, c_phi,"),
    "optimizer_psi.zero_grad() is missing": ("    optimizer_psi.zero_grad()\n", ""),
    "optimizer_psi.step() is missing": ("    optimizer_psi.step()\n", ""),
    # the theta step
    "u_max is ignored": ("u = s.u_max * torch.rand(n)", "u = torch.rand(n)"),
    "the power of the noise levels is not 7": ("return root ** 7", "return root ** 5"),
    "u counts from sigma_max down, not from sigma_min up": (
        "    root = (1 - u) *", "    u = 1 - u\n    root = (1 - u) *"),
    "teacher and fake score are swapped in S": (
        "S = score_identity_loss(teacher, fake, x_g,", "S = score_identity_loss(fake, teacher, x_g,"),
    "the teacher is given the label to forget, c_psi, not its override": (
        "x_g, c_phi, c_psi, noise.sigma_theta", "x_g, c_psi, c_psi, noise.sigma_theta"),
    "the fake score is given the override, c_phi, in S": (
        "x_g, c_phi, c_psi, noise.sigma_theta", "x_g, c_phi, c_phi, noise.sigma_theta"),
    "x_g is detached in the theta step": (
        "S = score_identity_loss(teacher, fake, x_g,", "S = score_identity_loss(teacher, fake, images,"),
    "L_keep is taken over the labels to forget": (
        "L_keep = sum_over_rows(S, ~forgotten)", "L_keep = sum_over_rows(S, forgotten)"),
    "L_keep is taken over all labels": ("L_keep = sum_over_rows(S, ~forgotten)", "L_keep = S.mean()"),
    "both terms are divided by their own number of rows, not by the batch": (
        "return S[rows].sum() / len(S)", "return S[rows].mean()"),
    "lambda_forget is ignored": ("L_keep + s.lambda_forget * L_forget", "L_keep + L_forget"),
    "lambda_forget weighs the labels to keep": (
        "L_keep + s.lambda_forget * L_forget", "s.lambda_forget * L_keep + L_forget"),
    "L_theta.backward() leaves a gradient in the fake score": (
        "L_theta.backward(inputs=learning)", "L_theta.backward()"),
    "weights of the generator that are frozen are to get a gradient": (
        "for p in generator.parameters() if p.requires_grad]", "for p in generator.parameters()]"),
    "optimizer_theta.zero_grad() is missing": ("    optimizer_theta.zero_grad()\n", ""),
    "optimizer_theta.step() is missing": ("    optimizer_theta.step()\n", ""),
    # strict
    "a mask of integers is taken": ("forgotten.dtype != torch.bool", "False"),
    "a mask of another shape is taken": ("forgotten.shape != (len(z),)", "False"),
    "extra_loss is ignored": ("if extra_loss is not None:", "if False:"),
    "extra_loss is given x_g without its gradient": ("extra_loss(x_g, z, c_psi,", "extra_loss(images, z, c_psi,"),
    "extra_loss is given the override, c_phi": ("extra_loss(x_g, z, c_psi,", "extra_loss(x_g, z, c_phi,"),
}


# --------------------------------------------------------------------------------------------- what a function is given

SHAPE = (1, 2, 2)       # of an image
SIGMA_DATA = 0.4
SETTINGS = SimpleNamespace(alpha=1.3, lambda_forget=0.6, sigma_init=2.0, p_mean=0.8, p_std=0.6, sigma_min=0.01,
                           sigma_max=60.0, u_max=0.7)
OVERRIDE = torch.tensor([3, 1, -1, 3, 4])       # of the labels 0 to 4, of which 0 and 2 are to be forgotten
RATE = 1e-3             # learning rate of both optimizers, which are plain gradient descent
LOSSES = ("L_psi", "L_keep", "L_forget")
PSI_LEVELS, THETA_LEVELS = "noise levels of the psi step", "noise levels of the theta step"
SECOND = " in the second step"
TOLERANCES = {          # by how much results may differ that depend on chance; of all others, by 0.01 %
    "frequencies of (c_psi, c_phi, forgotten)": 0.02, "number of random overrides in a batch": 0.3,
    PSI_LEVELS: 0.3, THETA_LEVELS: 0.3}


class Wrong(Exception):
    """The function is wrong in a way that is seen before its results are compared. The message says how."""


class Network(torch.nn.Module):
    """A small denoiser of images (B, 1, 2, 2) under conditions (B, 3), in float64. It keeps what it is given."""

    def __init__(self, name, seed):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        for weight, shape in {"A": (4, 4), "C": (3, 4), "b": (4,)}.items():
            values = torch.randn(*shape, generator=g, dtype=torch.float64) / 2
            self.register_parameter(weight, torch.nn.Parameter(values))
        self.name, self.calls = name, []

    def forward(self, x, sigma, c):
        B = len(x)
        for word, value, shape in (("x", x, (B, *SHAPE)), ("sigma", sigma, (B, 1, 1, 1)), ("c", c, (B, 3))):
            expect_shape(f"{word} of the {self.name}", value, shape)
        size = (1 + sigma ** 2).sqrt()
        hidden = (x / size).double().flatten(1) @ self.A + c.double() @ self.C + sigma.flatten(1).log() * self.b
        D = x / size ** 2 + hidden.tanh().view(x.shape)
        self.calls.append(SimpleNamespace(x=x.detach(), sigma=sigma.detach(), D=D.detach()))
        return D

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.parameters()])

    def gradients(self):
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters()])


def a_batch(n, seed):
    """Noise or images (n, 1, 2, 2), noise levels (n, 1, 1, 1), c_phi and c_psi (n, 3), forgotten (n,)."""
    g = torch.Generator().manual_seed(seed)
    conditions = torch.randn(len(OVERRIDE), 3, generator=g, dtype=torch.float64)
    c = torch.randint(len(OVERRIDE), (n,), generator=g)
    c_o = torch.where(OVERRIDE[c] < 0, 4, OVERRIDE[c])
    x = torch.randn(n, *SHAPE, generator=g, dtype=torch.float64)
    sigma = (torch.randn(n, 1, 1, 1, generator=g, dtype=torch.float64)).exp()
    return x, sigma, conditions[c_o], conditions[c], c_o != c


def expect_shape(what, value, shape):
    """Raise Wrong where a value is no tensor of this shape."""
    if not torch.is_tensor(value):
        raise Wrong(f"wrong shape: {what} is a {type(value).__name__}, not a tensor of shape {tuple(shape)}")
    if value.shape != shape:
        raise Wrong(f"wrong shape: {what} is {tuple(value.shape)}, not {tuple(shape)}")


def noise_of(x_g, call, sigma):
    """eps of the noisy image x_g + sigma eps that a network was given. Wrong where it is not standard normal noise."""
    expect_shape("the noisy image", call.x, x_g.shape)
    eps = ((call.x - x_g) / sigma).flatten(1)
    mean, deviation = eps.mean().item(), eps.std().item()
    if abs(mean) > 0.2 or abs(deviation - 1) > 0.2:
        raise Wrong("wrong. A network is not given x_t = x_g + sigma eps with eps ~ N(0, I): (x_t - x_g) / sigma has a "
                    f"mean of {mean:.2f} and a standard deviation of {deviation:.2f}")
    if min(eps.std(0).mean(), eps.std(1).mean()) < 0.7:     # over the images, over the pixels
        raise Wrong("wrong. eps is not drawn anew for every pixel of every image")
    return eps.view(x_g.shape)


def expect_same(call, other):
    """Raise Wrong where teacher and fake score were not given the same x_t."""
    if not torch.allclose(call.x, other.x):
        raise Wrong("wrong. Teacher and fake score are not given the same x_t: draw the noise once for both")


# --------------------------------------------------------------------------------------------- what the function does
# Each of these calls f and yields results, {what: tensor}. It adds the noise that f drew to the list `noises`, also
# where f then raises an error. NotImplementedError where f returns None.

def observe_fake_score_loss(f, noises, strict):
    x_g, sigma, _, c, _ = a_batch(256, seed=1)
    fake = Network("fake score", seed=2)
    L = f(fake, x_g, c, sigma, SIGMA_DATA)
    if L is None:
        raise NotImplementedError
    noises.append(noise_of(x_g, last_call(fake), sigma))
    expect_shape("the loss", L, (256,))
    yield {"value": L.detach(), "gradient in the fake score": gradient(L, list(fake.parameters()))}


def observe_score_identity_loss(f, noises, strict):
    x_g, sigma, c_phi, c_psi, _ = a_batch(256, seed=1)
    teacher, fake = Network("teacher", seed=3), Network("fake score", seed=2)

    def perfect_teacher(x_t, sigma, c):
        teacher(x_t, sigma, c)
        return x

    for D_phi, title in ((teacher, ""), (perfect_teacher, " where the teacher returns x_g")):
        x = x_g.clone().requires_grad_()
        S = f(D_phi, fake, x, c_phi, c_psi, sigma, SETTINGS.alpha)
        if S is None:
            raise NotImplementedError
        noises.append(noise_of(x_g, last_call(fake), sigma))
        expect_same(last_call(teacher), last_call(fake))
        expect_shape("S", S, (256,))
        yield {f"value{title}": S.detach(), f"gradient in x_g{title}": gradient(S, [x])}


def observe_draw_labels(f, noises, strict):
    conditions = torch.randn(len(OVERRIDE), 3, generator=torch.Generator().manual_seed(0))
    batch, K, drawn = 150, len(OVERRIDE), []
    for _ in range(400):
        result = f(batch, OVERRIDE.clone(), conditions)
        if result is None:
            raise NotImplementedError
        if not isinstance(result, tuple) or len(result) != 3:
            raise Wrong("wrong shape: the result is not a tuple (c_phi, c_psi, forgotten)")
        for what, part, shape in zip(("c_phi", "c_psi", "forgotten"), result, ((batch, 3), (batch, 3), (batch,))):
            expect_shape(what, part, shape)
        if result[2].dtype != torch.bool:
            raise Wrong(f"wrong. forgotten is {result[2].dtype}, not torch.bool")
        drawn.append(result)
    c_phi, c_psi, forgotten = (torch.cat(parts) for parts in zip(*drawn))
    c_o, c = label_numbers("c_phi", c_phi, conditions), label_numbers("c_psi", c_psi, conditions)
    count = (2 * (K * c + c_o) + forgotten).bincount(minlength=2 * K * K)
    different = [len(overrides[labels == 2].unique()) for labels, overrides in zip(c.split(batch), c_o.split(batch))]
    yield {"frequencies of (c_psi, c_phi, forgotten)": count / len(c),
           "number of random overrides in a batch": torch.tensor(different).float().mean()}  # of label 2


def observe_sfd_step(f, noises, strict):
    """Two steps in a row."""
    generator, fake = Network("generator", seed=4), Network("fake score", seed=2)
    teacher = Network("teacher", seed=3).requires_grad_(False)
    generator.b.requires_grad_(False)
    optimizers = torch.optim.SGD([generator.A, generator.C], RATE), torch.optim.SGD(fake.parameters(), RATE)
    options = {"extra_loss": an_extra_loss} if strict else {}
    for title, seed in (("", 5), (SECOND, 6)):
        z, _, *labels = a_batch(2048, seed)
        before = generator.weights(), fake.weights()
        for network in (generator, fake, teacher):
            network.calls.clear()
        try:
            terms = f(generator, fake, teacher, *optimizers, z, *labels, SETTINGS, SIGMA_DATA, **options)
        finally:
            if generator.calls and teacher.calls and len(fake.calls) > 1:
                noises.append(noise_of_step(generator, fake, teacher))
        theta_update, psi_update = ((old - n.weights()) / RATE for old, n in zip(before, (generator, fake)))
        if terms is None and not theta_update.any() and not psi_update.any():
            raise NotImplementedError
        expect_terms(terms)
        for network, calls in ((generator, 1), (fake, 2), (teacher, 1)):
            if len(network.calls) < calls:
                raise Wrong(f"wrong. The {network.name} is evaluated {len(network.calls)} times in a step, not {calls}")
        yield {f"{loss}{title}": terms[loss].detach() for loss in LOSSES}
        yield {f"update of the generator{title}": theta_update, f"update of the fake score{title}": psi_update,
               f"gradient left in the fake score{title}": share_unused(fake.gradients(), psi_update)}
    if strict:
        yield refusals(f)


OBSERVE = {"fake_score_loss": observe_fake_score_loss, "score_identity_loss": observe_score_identity_loss,
           "draw_labels": observe_draw_labels, "sfd_step": observe_sfd_step}


def last_call(network):
    """The last call of a network. Wrong where there was none."""
    if not network.calls:
        raise Wrong(f"wrong. The {network.name} is not evaluated")
    return network.calls[-1]


def gradient(loss, inputs):
    """Gradient of the sum of a loss in all inputs, as a vector. Zeros where no gradient flows."""
    parts = [None] * len(inputs)
    if loss.requires_grad:
        parts = torch.autograd.grad(loss.sum(), inputs, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(inputs, parts)])


def label_numbers(what, rows, conditions):
    """Numbers (N,) of the labels of which the rows (N, 3) are the conditions."""
    distance, number = torch.cdist(rows.float(), conditions).min(1)
    if distance.max() > 1e-3:
        raise Wrong(f"wrong. {what} has rows that are no rows of conditions")
    return number


def share_unused(left, used):
    """Share of the gradient `left` in the weights that the optimizer has not used. None need be left."""
    share = (left - used).norm() / left.norm() if left.any() else torch.zeros(())
    return share if share > 1e-6 else torch.zeros(())       # rounding


def an_extra_loss(x_g, z, c, forgotten):
    squared = ((x_g - z) ** 2).flatten(1).sum(1) * c.square().sum(1)
    return torch.where(forgotten, 2 * squared, squared).mean()


def noise_of_step(generator, fake, teacher):
    """The noise of one step: noise levels and eps of both updates."""
    first, last, D_phi = fake.calls[0], fake.calls[-1], teacher.calls[-1]
    if torch.equal(first.sigma, D_phi.sigma) and not torch.equal(last.sigma, D_phi.sigma):
        raise Wrong("wrong. The theta step comes before the psi step")
    eps_psi = noise_of(generator.calls[0].D, first, first.sigma)
    eps_theta = noise_of(generator.calls[-1].D, last, last.sigma)
    expect_same(D_phi, last)
    return SimpleNamespace(sigma_psi=first.sigma, eps_psi=eps_psi, sigma_theta=last.sigma, eps_theta=eps_theta)


def expect_terms(terms):
    """Raise Wrong where a step does not return its three losses."""
    if not isinstance(terms, dict) or not set(LOSSES) <= terms.keys():
        raise Wrong(f"wrong shape: the result is no dict with {', '.join(LOSSES)}")
    for loss in LOSSES:
        expect_shape(loss, terms[loss], ())


def quantiles(levels):
    """{what: quantiles of ln sigma} of {what: noise levels}: they tell one distribution from another."""
    at = torch.tensor([0.25, 0.5, 0.9], dtype=torch.float64)
    return {what: sigma.flatten().double().log().quantile(at) for what, sigma in levels.items()}


def refusals(f):
    """1 for each kind of mask that is refused by a ValueError, else 0."""
    z, _, c_phi, c_psi, forgotten = a_batch(8, seed=7)
    seen = {}
    for title, mask in (("a mask of integers is refused", forgotten.long()),
                        ("a mask of another shape is refused", forgotten[:, None])):
        networks = [Network(name, seed) for seed, name in enumerate(("generator", "fake score", "teacher"))]
        optimizers = [torch.optim.SGD(network.parameters(), RATE) for network in networks[:2]]
        seen[title] = torch.tensor(0.0)
        try:
            f(*networks, *optimizers, z, c_phi, c_psi, mask, SETTINGS, SIGMA_DATA)
        except ValueError:
            seen[title] = torch.tensor(1.0)
        except Exception:   # an error that does not name the mask
            pass
    return seen


# ------------------------------------------------------------------------------------------------------- the comparison

def results(f, name, strict, noises):
    """Yield the results of your function. The noise that it drew is added to `noises`."""
    yield from OBSERVE[name](f, noises, strict)
    if name == "sfd_step":
        yield quantiles({PSI_LEVELS: torch.cat([noise.sigma_psi for noise in noises]),
                         THETA_LEVELS: torch.cat([noise.sigma_theta for noise in noises])})


def results_of_reference(name, strict, noises, bug=None):
    """Yield the results of the reference, with one of BUGS or without, from the same noise."""
    functions, remaining = reference(name, bug), list(noises)
    f = getattr(functions, name)

    def from_the_same_noise(*arguments, **options):
        return f(*arguments, noise=remaining.pop(0) if remaining else None, **options)

    yield from OBSERVE[name](f if name == "draw_labels" else from_the_same_noise, [], strict)
    if name == "sfd_step":
        yield quantiles({PSI_LEVELS: functions.psi_noise_levels(SETTINGS, 10_000),
                         THETA_LEVELS: functions.theta_noise_levels(SETTINGS, 10_000)})


def error_text(e):
    return f"{type(e).__name__}: {textwrap.shorten(str(e), 110, placeholder=' ...')}"


def agree(what, value, expected):
    """Whether two results are the same, up to rounding, or up to chance where they depend on it."""
    if what in TOLERANCES:
        return bool(((value - expected).abs() < TOLERANCES[what]).all())
    size = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else 0
    return torch.allclose(value.double(), expected.double(), rtol=1e-4, atol=1e-4 * float(size), equal_nan=True)


def explains(bug, name, strict, noises, seen, error):
    """Whether the reference with a bug has these results, and then raises this error or none."""
    try:
        for part in results_of_reference(name, strict, noises, bug):
            if not all(what in seen and agree(what, seen[what], expected) for what, expected in part.items()):
                return False
    except Exception as e:
        return error_text(e) == error
    return error is None


def outcome(f, name, strict):
    """(whether f is right, the line to print)."""
    seen, noises, error = {}, [], None
    try:
        for part in results(f, name, strict, noises):
            seen |= part
    except NotImplementedError:
        return False, "not yet"
    except Wrong as e:
        return False, str(e)
    except Exception as e:  # whatever the code of a student raises
        error, line = error_text(e), line_of_error(f, e)

    if error is None:
        expected = {}
        for part in results_of_reference(name, strict, noises):
            expected |= part
        right = [what for what in seen if agree(what, seen[what], expected[what])]
        if len(right) == len(seen):
            return True, "right"
        wrong = [what for what in seen if what not in right]

    possible = [bug for bug, (part_of_line, _) in BUGS.items() if part_of_line in source_of(name)]
    found = [bug for bug in possible if explains(bug, name, strict, noises, seen, error)]
    this_is = f"This is the result when {', or when '.join(found)}."
    if error is not None:
        return False, f"raises {error}{line}. {this_is}" if found else f"raises {error}{line}"
    if found:
        return False, f"wrong. {this_is}"
    return False, f"wrong: {listed(wrong)}. Right: {listed(right)}. No bug of the list gives this result."


def line_of_error(f, e):
    """In words, the line of f in which an error was raised. Empty where the source of f is unknown."""
    own = getattr(f, "__name__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.name == own]
    return f", in line {lines[-1]}" if lines else ""


def listed(names):
    """Names of results, without those of the second step that are there of the first step too."""
    shown = []
    for name in names:
        of_first_step = name.removesuffix(SECOND)
        if name == of_first_step or of_first_step not in names:
            shown.append(name)
    return ", ".join(shown) or "nothing"
