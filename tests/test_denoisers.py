"""A network that predicts noise, v or a velocity is the same denoiser; what it is asked with may have any structure."""
import pytest
import torch

from lab.closed_form import ring
from lab.denoisers import FromEpsilon, FromFlow, FromV, each
from sfd_minimal import Settings, begin, distill, guided

# Stable Diffusion's schedule; its last sigma is 14.6. The second one goes on to 50 and beyond.
SCALED = (1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
WIDE = 1 / (1 + torch.logspace(-2, 2, 400, dtype=torch.float64) ** 2)


class Known(torch.nn.Module):
    """What a perfect network would predict of Gaussians whose denoiser is known: "eps", "v" or "flow"."""

    def __init__(self, predicts, ln_sigma=None):
        super().__init__()
        self.predicts, self.ln_sigma, self.D = predicts, ln_sigma, ring()

    def forward(self, x, t, c):
        t = t.view(-1, 1)
        if self.predicts == "flow":
            sigma = t / (1 - t)
            x_0 = self.D(x * (1 + sigma), sigma, c)
            return (x - x_0) / t  # of (1 - t) x_0 + t eps: the velocity eps - x_0
        below = t.long().clamp(max=len(self.ln_sigma) - 2)
        sigma = torch.lerp(self.ln_sigma[below], self.ln_sigma[below + 1], t - below).exp()
        x_0 = self.D(x * (1 + sigma ** 2).sqrt(), sigma, c)
        eps = (x * (1 + sigma ** 2).sqrt() - x_0) / sigma
        return eps if self.predicts == "eps" else (eps - sigma * x_0) / (1 + sigma ** 2).sqrt()


def adapted(predicts, alphas_cumprod):
    conditions, ln_sigma = torch.eye(5, dtype=torch.float64), (1 / alphas_cumprod - 1).log() / 2
    if predicts == "flow":
        return FromFlow(Known("flow"), conditions, (2,))
    return {"eps": FromEpsilon, "v": FromV}[predicts](Known(predicts, ln_sigma), alphas_cumprod, conditions, (2,))


@pytest.mark.parametrize("predicts", ["eps", "v", "flow"])
@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.7, 2.5, 9.0, 14.0, 50.0])
def test_every_prediction_is_the_same_denoiser(predicts, sigma):
    torch.manual_seed(0)
    schedule, sigma = WIDE if sigma > 14 or sigma < 0.03 else SCALED, torch.full((64, 1), sigma, dtype=torch.float64)
    x = 3 * torch.randn(64, 2, dtype=torch.float64) + sigma * torch.randn(64, 2, dtype=torch.float64)
    c = torch.eye(5, dtype=torch.float64)[torch.arange(64) % 5]
    D = adapted(predicts, schedule)
    expected = ring()(x, sigma, c)
    assert (D(x, sigma, c) - expected).norm() < 1e-5 * expected.norm()


def test_beyond_the_schedule_time_stops():
    D = adapted("eps", SCALED)
    t = D.time(torch.tensor([[1e-6], [0.5], [1e6]]))
    assert t[0] == 0 and t[2] == 999 and 0 < t[1] < 999
    between = (D.ln_sigma[300] + D.ln_sigma[301]).div(2).exp().view(1, 1)
    assert D.time(between).item() == pytest.approx(300.5, abs=1e-6)


class Asked(torch.nn.Module):
    """Predicts noise from states and a mask, which come as `kind`: a tuple or a dict of them."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.read, self.net = kind, torch.nn.Linear(4, 3), torch.nn.Linear(2 + 1 + 3, 2)

    def forward(self, x, t, c):
        assert type(c) is self.kind
        states, mask = c.values() if self.kind is dict else c
        read = (self.read(states) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.net(torch.cat([x, t[:, None] / 1000, read], 1))


@pytest.mark.parametrize("kind", [tuple, dict])
def test_a_condition_may_be_a_tuple_or_a_dict(kind):
    """Whole steps of SFD with guidance, on states (3, 7, 4) and masks (3, 7), of which the first is forgotten."""
    torch.manual_seed(0)
    parts = {"states": torch.randn(3, 7, 4), "mask": torch.ones(3, 7)}
    prompts = parts if kind is dict else tuple(parts.values())
    teacher = FromEpsilon(Asked(kind), SCALED, prompts, (2,))

    def ask(batch):
        k = torch.randint(3, (batch,))
        about = lambda rows: each(lambda part: part[rows], prompts)
        return about(torch.where(k == 0, 2, k)), about(k), k == 0
    s = Settings(steps=3, batch=8, guidance=4.5)
    state = begin(s, teacher)
    losses = list(distill(s, ask, teacher, **state))
    assert len(losses) == 3 and all(torch.isfinite(v) for terms in losses for v in terms.values())
    assert not torch.equal(state["generator"].net.net.weight, teacher.net.net.weight)


def test_guidance_against_a_negative_prompt_and_the_null_prompt():
    """As the official code for Stable Diffusion has it: away from the concept to forget in its rows, from the null
    prompt in all others; where guidance is 1, nothing but the question itself counts."""
    D = lambda x, sigma, c: x + c["state"] * c["mask"]
    c = lambda *values: {"state": torch.tensor(values)[:, None], "mask": torch.ones(len(values), 1)}
    x, everywhere = torch.zeros(3, 1), torch.ones(3, dtype=torch.bool)
    asked, negative = c(1.0, 2.0, 3.0), c(10.0, 0.0, 0.0)  # row 0 is to forget
    for w in (1.0, 4.5):
        got = guided(D, negative, everywhere, w)(x, torch.ones(3, 1), asked)
        assert torch.allclose(got[:, 0], negative["state"][:, 0] + w * (asked["state"] - negative["state"])[:, 0])
