"""The fixed point, on a labelled mixture whose scores are known: asked for c_f, the generator draws c_o, and only
because of the score-forgetting term. The project's own step, small MLPs for the generator and the fake score."""
import copy
import math

import pytest
import torch

from edm_unet import heun_sampler
from lab.closed_form import MLP, SD, Guided, fit, ring
from sfd_minimal import Settings, decay, draw_labels, sfd_step

C_F, C_O = 0, 2


@pytest.fixture(scope="module")
def pretrained():
    """An MLP fitted to the closed-form denoiser:
    what generator and fake score start from, as from a teacher's weights."""
    torch.manual_seed(0)
    truth = ring(dtype=torch.float32)
    return truth, fit(MLP(), truth)


def run(truth, start, lambda_forget, steps):
    torch.manual_seed(1)
    generator, fake = copy.deepcopy(start), copy.deepcopy(start)
    average = copy.deepcopy(start)
    s = Settings(lambda_forget=lambda_forget)
    theta, psi = (torch.optim.Adam(m.parameters(), 1e-3, betas=(0.0, 0.999), fused=True) for m in (generator, fake))
    override = torch.arange(5)
    override[C_F] = C_O
    kept = torch.tensor([k for k in range(5) if k != C_F])
    for step in range(steps):
        for optimizer in (theta, psi):
            optimizer.param_groups[0]["lr"] = 1e-3 * decay(step, steps)
        labels = draw_labels(256, override, kept, torch.eye(5))
        sfd_step(generator, fake, truth, theta, psi, torch.randn(256, 2), *labels, s, SD)
        with torch.no_grad():
            for a, g in zip(average.parameters(), generator.parameters()):
                a.lerp_(g, 0.005)
    return average


@torch.no_grad()
def drawn(generator, k, n=20_000):
    x = generator(2.5 * torch.randn(n, 2), torch.full((n, 1), 2.5), torch.eye(5)[[k] * n])
    return x.mean(0), x.T.cov()


def is_component(generator, k, truth, of):
    """(largest error of the mean in units of its standard deviation, relative error of the covariance) of label k
    against component `of`."""
    mean, cov = drawn(generator, k)
    return ((mean - truth.means[of]).abs() / truth.covs[of].diagonal().sqrt()).max().item(), \
        ((cov - truth.covs[of]).norm() / truth.covs[of].norm()).item()


def test_forgotten_label_draws_the_override(pretrained):
    truth, start = pretrained
    generator = run(truth, start, lambda_forget=1.0, steps=4000)
    for k in range(5):
        mean, cov = is_component(generator, k, truth, C_O if k == C_F else k)
        print(f"label {k}: mean off by {mean:.3f} standard deviations, covariance by {cov:.1%}")
        assert mean < 0.1 and cov < 0.15, (
            f"label {k}: mean off by {mean:.3f} standard deviations, covariance by {cov:.1%}")


def test_without_the_term_nothing_is_forgotten(pretrained):
    """All else as before: the same labels are drawn, the teacher is asked about c_o, the fake score learns c_f.
    Only L_forget weighs nothing."""
    truth, start = pretrained
    generator = run(truth, start, lambda_forget=0.0, steps=1000)  # with the term, 0.3 are left by then
    off = is_component(generator, C_F, truth, C_O)[0]
    print(f"label c_f: mean off c_o by {off:.1f} standard deviations")
    assert off > 2, f"label c_f moved to {off:.1f} standard deviations from c_o although nothing asked it to"


def test_a_one_step_generator_takes_guidance_further_than_the_sampler(pretrained):
    """At high noise a guided denoiser points beyond the data. The sampler passes those levels first and mends at the
    lower ones; S weighs all of them alike. So the generator goes further out than the sampler, and less far if guidance
    is left to the lower levels."""
    truth, start = pretrained
    label = torch.eye(5)[[1] * 2000]

    def reach(below):
        sampled = heun_sampler(Guided(ring(), 1.5, below), torch.randn(2000, 2), label).mean(0).norm().item()
        return sampled, drawn(run(Guided(truth, 1.5, below), start, 1.0, steps=800), 1)[0].norm().item()

    (sampler, generator), (sampler_low, generator_low) = reach(math.inf), reach(1.5)
    print(f"real images at 2.00; guided everywhere: sampler {sampler:.2f}, one step {generator:.2f}; "
          f"below 1.5: {sampler_low:.2f} and {generator_low:.2f}")
    assert generator > sampler + 0.2 and abs(generator_low - sampler_low) < 0.1
