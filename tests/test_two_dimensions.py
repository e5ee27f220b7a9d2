"""The fixed point of SFD, on a mixture with scores in closed form: under c_f the generator draws c_o, and only because
of the score-forgetting term. The step is that of sfd_minimal.py, with small MLPs for generator and fake score."""
import copy
import math

import pytest
import torch

from closed_form import MLP, SD, Guided, fit, ring
from edm_unet import heun_sampler
from sfd_minimal import Networks, Settings, draw_labels, override_labels, set_learning_rates, sfd_step, update_average

C_F, C_O = 0, 2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks of this size gain nothing from a second thread, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pretrained(one_thread):
    """(the mixture, an MLP that was fitted to its denoiser)."""
    torch.manual_seed(0)
    truth = ring(dtype=torch.float32)
    return truth, fit(MLP(), truth)


def run(truth, start, lambda_forget, steps):
    """The running average of a generator after `steps` of SFD."""
    torch.manual_seed(1)
    generator, average, fake = (copy.deepcopy(start) for _ in range(3))
    theta, psi = (torch.optim.Adam(m.parameters(), betas=(0.0, 0.999), fused=True) for m in (generator, fake))
    s = Settings(lambda_forget=lambda_forget, steps=steps, lr=1e-3, lr_fake=1e-3)
    n = Networks(truth, generator, average, fake, theta, psi)
    override = override_labels([C_F], [C_O], 5)
    for step in range(steps):
        set_learning_rates(n, s, step)
        c_phi, c_psi, forgotten = draw_labels(256, override, torch.eye(5))
        sfd_step(generator, fake, truth, theta, psi, torch.randn(256, 2), c_phi, c_psi, forgotten, s, SD)
        update_average(average, generator, 0.998, step)
    return average


@torch.no_grad()
def moments(generator, k, n=20_000):
    """Mean and covariance of what the generator draws under label k."""
    x = generator(2.5 * torch.randn(n, 2), torch.full((n, 1), 2.5), torch.eye(5)[[k] * n])
    return x.mean(0), x.T.cov()


def distance(generator, k, truth, component):
    """How far what is drawn under label k is from a component of the mixture.

    The largest error of the mean, in standard deviations of the component, and the relative error of the covariance.
    """
    mean, cov = moments(generator, k)
    of_mean = (mean - truth.means[component]).abs() / truth.covs[component].diagonal().sqrt()
    of_cov = (cov - truth.covs[component]).norm() / truth.covs[component].norm()
    return of_mean.max().item(), of_cov.item()


def test_the_forgotten_label_draws_the_override(pretrained):
    truth, start = pretrained
    generator = run(truth, start, lambda_forget=1.0, steps=2500)
    for k in range(5):
        mean, cov = distance(generator, k, truth, C_O if k == C_F else k)
        assert mean < 0.1 and cov < 0.15, (
            f"label {k}: mean off by {mean:.3f} standard deviations, covariance by {cov:.1%}")


def test_without_the_term_nothing_is_forgotten(pretrained):
    """The same labels are drawn, the teacher is given c_o and the fake score learns c_f. L_forget has no weight.

    With its weight, 0.5 standard deviations are left by then.
    """
    truth, start = pretrained
    generator = run(truth, start, lambda_forget=0.0, steps=500)
    mean, _ = distance(generator, C_F, truth, C_O)
    assert mean > 2


def test_a_one_step_generator_takes_guidance_further_than_the_sampler(pretrained):
    """At high noise a guided denoiser points beyond the data.

    The sampler passes high noise levels first and corrects at lower ones, while S weighs all of them alike. So the
    generator goes further out than the sampler, and as far as the sampler where guidance is left to low noise levels.
    """
    truth, start = pretrained
    c = torch.eye(5)[[1] * 2000]

    def reach(below):
        """Distance from the centre of the sampler's mean and of the generator's. Real points are at 2."""
        sampled = heun_sampler(Guided(ring(), 1.5, below), torch.randn(2000, 2), c)
        mean, _ = moments(run(Guided(truth, 1.5, below), start, 1.0, steps=500), 1)
        return sampled.mean(0).norm().item(), mean.norm().item()

    sampler, generator = reach(math.inf)
    assert generator > sampler + 0.2
    sampler, generator = reach(1.5)
    assert abs(generator - sampler) < 0.1
