"""edm_unet.py against the official network's outputs and against closed forms."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import save_network
from edm_unet import EDMPrecond, NetSettings, heun_sampler, sigma_grid
from lab.checkpoint import load_checkpoint
from lab.closed_form import Gaussians, ring

GOLDEN = Path(__file__).parent / "fixtures" / "edm_ddpmpp_golden.npz"
GOLDEN_NET = NetSettings(resolution=16, channels=3, model_channels=16, channel_mult=(1, 2, 2), num_blocks=2,
                         attn_resolutions=(8,), dropout=0.13)


def golden():
    with np.load(GOLDEN) as file:
        data = {k: file[k] for k in file.files}
    weights = {k.removeprefix("param/"): torch.tensor(data[k]) for k in data
               if k.startswith("param/") and "resample_filter" not in k and "map_augment" not in k}
    return weights, *(torch.tensor(data[k]) for k in ("x", "sigma", "class_labels", "D_x"))


def test_reproduces_the_official_network():
    weights, x, sigma, label, D_x = golden()
    model = EDMPrecond(GOLDEN_NET).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        D = model(x, sigma, label)
    error = (D - D_x).flatten(1).norm(dim=1) / D_x.flatten(1).norm(dim=1)
    assert error.max() < 1e-5, error


def test_contract_of_sigma_and_label():
    torch.manual_seed(0)
    model = EDMPrecond(NetSettings(resolution=8, model_channels=16, channel_mult=(1, 1), num_blocks=1,
                                   attn_resolutions=(), patch=2)).eval()
    x, label = torch.randn(3, 1, 8, 8), torch.eye(10)[:3]
    with torch.no_grad():
        D = [model(x, sigma, label)
             for sigma in (0.7, torch.tensor(0.7), torch.full((3,), 0.7), torch.full((3, 1, 1, 1), 0.7))]
        assert all(torch.equal(D[0], d) for d in D) and D[0].shape == x.shape and D[0].dtype == torch.float32
        assert model(x.double(), 0.7, label).dtype == torch.float32
        torch.nn.init.normal_(model.model.dec["4x4_aux_conv"].weight)
        assert not torch.equal(model(x, 0.7, label), model(x, 0.7, torch.zeros_like(label)))
        assert torch.equal(model(x, 0.7, None), model(x, 0.7, torch.zeros_like(label)))
        assert not torch.equal(model(x, 0.7, label), model(x, 0.8, label))


def test_a_teacher_says_what_to_ask_for_and_what_it_draws():
    model = EDMPrecond(NetSettings(resolution=8, channels=3, num_classes=4, model_channels=16, channel_mult=(1,),
                                   num_blocks=1, attn_resolutions=(), sigma_data=0.7))
    assert torch.equal(model.conditions, torch.eye(4)) and model.shape == (3, 8, 8) and model.sigma_data == 0.7
    model.to("meta")
    assert model.conditions.device.type == "meta", "the labels go with the network"


def test_patch_folds_and_unfolds():
    """With patch p the net sees (p^2 C, H/p, W/p); the identity in F must come back as the identity."""
    model = EDMPrecond(NetSettings(resolution=8, model_channels=16, channel_mult=(1,), num_blocks=1,
                                   attn_resolutions=(), patch=4))
    assert model.model.enc["2x2_conv"].in_channels == 16 and model.model.dec["2x2_aux_conv"].out_channels == 16


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.5, 3.0, 80.0])
def test_preconditioning(sigma):
    """Whatever denoiser the closed form prescribes, F = (D - c_skip x) / c_out must give it back;
    and inputs and targets of F have unit variance on data of standard deviation sigma_data."""
    torch.manual_seed(0)
    sd = 0.5
    model = EDMPrecond(NetSettings(resolution=4, model_channels=16, channel_mult=(1,), num_blocks=1,
                                   attn_resolutions=(), sigma_data=sd))
    x_0 = sd * torch.randn(4000, 1, 4, 4, dtype=torch.float64)
    x = x_0 + sigma * torch.randn_like(x_0)
    D = x * sd ** 2 / (sd ** 2 + sigma ** 2)  # the posterior mean of N(0, sd^2)
    c_skip, c_out = sd ** 2 / (sigma ** 2 + sd ** 2), sigma * sd / (sigma ** 2 + sd ** 2) ** 0.5
    seen = {}

    def F(x_in, c_noise, label):
        seen.update(x=x_in, c_noise=c_noise)
        return ((D - c_skip * x) / c_out).float()

    model.model.forward = F
    out = model(x, sigma, torch.zeros(len(x), 10))
    assert (out.double() - D).abs().max() < 1e-5 * D.abs().max() + 1e-6
    assert abs(seen["x"].std().item() - 1) < 0.02
    assert abs(((x_0 - c_skip * x) / c_out).std().item() - 1) < 0.02
    assert torch.allclose(seen["c_noise"], torch.tensor(sigma).log() / 4)


def test_grid_ends_where_edm_says():
    assert sigma_grid(0.0) == pytest.approx(80) and sigma_grid(1.0) == pytest.approx(0.002)


def test_heun_draws_the_mixture():
    """From quasi-random noise, whose moments 2,048 points have as 100,000 random ones would."""
    mixture = ring()
    truth = lambda x, sigma, c: mixture(x, sigma[:1], c)  # all rows are at one level: its matrices, once
    u = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(2048, dtype=torch.float64)
    z = math.sqrt(2) * torch.erfinv(2 * u - 1)
    for k in range(len(mixture.means)):
        x = heun_sampler(truth, z, torch.eye(5)[[k] * len(z)], steps=64)
        std = mixture.covs[k].diagonal().sqrt()
        assert ((x.mean(0) - mixture.means[k]).abs() / std).max() < 0.05
        assert (x.T.cov() - mixture.covs[k]).norm() / mixture.covs[k].norm() < 0.05
    # no label: all of it
    x = heun_sampler(truth, z, torch.zeros(len(z), 5), steps=64)
    share = torch.cdist(x, mixture.means).argmin(1).bincount() / len(x)
    assert (share - 0.2).abs().max() < 0.02
    second = (mixture.covs + mixture.means[:, :, None] * mixture.means[:, None]).mean(0)
    assert x.mean(0).norm() < 0.06 and (x.T.cov() - second).norm() / second.norm() < 0.04


def test_heun_is_of_second_order():
    """On one Gaussian the flow is known: x(0) = m + (x(80) - m) s / sqrt(s^2 + 80^2).
    Halving the step quarters the error."""
    truth = Gaussians(torch.tensor([[0.3, -0.2]], dtype=torch.float64), 0.25 * torch.eye(2, dtype=torch.float64)[None])
    torch.manual_seed(0)
    z = torch.randn(200, 2, dtype=torch.float64)
    exact = truth.means + (80 * z - truth.means) * 0.5 / (0.25 + 80 ** 2) ** 0.5
    error = [(heun_sampler(truth, z, torch.ones(200, 1), steps=n) - exact).norm().item() for n in (16, 32, 64)]
    assert 3.3 < error[0] / error[1] < 5.5 and 3.3 < error[1] / error[2] < 5.5, error


def test_heun_from_a_lower_noise_level():
    """The probability flow of one Gaussian is a line of algebra:
    x_0 = m + s (s^2 + sigma^2)^(-1/2) (x_sigma - m), from sigma = 2 as from 80."""
    D = lambda x, sigma, label: 1 + 0.09 / (0.09 + sigma ** 2) * (x - 1)
    z = torch.randn(100, 2, dtype=torch.float64)
    exact = 1 + (0.09 / 4.09) ** 0.5 * (2 * z - 1)
    assert torch.allclose(heun_sampler(D, z, torch.ones(100, 1), steps=64, sigma_max=2.0), exact, atol=2e-3)


def test_heun_evaluations_and_guidance():
    calls = []

    def D(x, sigma, label):
        calls.append(label.sum().item())
        return x * 0.5 + label.sum(1)[:, None]

    z = torch.randn(4, 2)
    heun_sampler(D, z, torch.eye(4), steps=18)
    assert len(calls) == 35
    plain = heun_sampler(D, z, torch.eye(4))
    assert not torch.allclose(plain, heun_sampler(D, z, torch.eye(4), guidance=2.0))
    # D(0) + 2 (D(c) - D(0)), by hand
    twice = heun_sampler(lambda x, s, c: x * 0.5 + 2 * c.sum(1)[:, None], z, torch.eye(4))
    assert torch.allclose(heun_sampler(D, z, torch.eye(4), guidance=2.0), twice, atol=1e-6)


@pytest.mark.parametrize("shape, level", [((4, 3, 8, 8), (4, 1, 1, 1)), ((4, 2), (4, 1))])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_heun_keeps_to_the_contract(shape, level, guidance):
    """Every call: sigma one number for each sample, with as many dimensions as x, from 80 down to 0.002."""
    sigmas = []

    def D(x, sigma, c):
        assert sigma.shape == level and x.shape == shape and c.shape == (4, 4) and (sigma == sigma[0]).all()
        sigmas.append(sigma.flatten()[0].item())
        return x / (1 + sigma ** 2)

    x = heun_sampler(D, torch.randn(shape), torch.eye(4), steps=18, guidance=guidance)
    assert x.shape == shape and x.dtype == torch.float32
    assert len(sigmas) == (35 if guidance == 1 else 70) and sigmas == sorted(sigmas, reverse=True)
    assert sigmas[0] == pytest.approx(80) and sigmas[-1] == pytest.approx(0.002)


def test_checkpoint_keeps_the_network(tmp_path):
    weights, x, sigma, label, D_x = golden()
    model = EDMPrecond(GOLDEN_NET).eval()
    model.load_state_dict(weights)
    for half, tolerance in ((False, 1e-6), (True, 2e-3)):
        save_network(model, tmp_path / "net.pt", half, data="x")
        again, info = load_checkpoint(tmp_path / "net.pt")
        again.bf16 = False
        assert again.settings == GOLDEN_NET and info["data"] == "x"
        with torch.no_grad():
            assert (again(x, sigma, label) - D_x).norm() / D_x.norm() < tolerance


def test_bfloat16_stays_close():
    weights, x, sigma, label, D_x = golden()
    model = EDMPrecond(GOLDEN_NET).eval()
    model.load_state_dict(weights)
    model.bf16 = True
    with torch.no_grad():
        D = model(x, sigma, label)
    assert D.dtype == torch.float32 and 1e-6 < (D - D_x).norm() / D_x.norm() < 0.02
