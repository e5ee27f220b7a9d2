"""The network is EDM's DDPM++, its loss and sampler are EDM's, and its file is read back whole or refused."""
import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sfd_minimal
from closed_form import Gaussians, Guided, ring
from conftest import ROOT, assert_same, save_network, tiny_network
from edm_unet import (BadInput, EDMPrecond, NetSettings, RunFailed, UNet, edm_loss, heun_sampler, load_network, pack,
                      save_file, sigma_grid, stratified_normal, unpack)
from train_teacher import guided_edm_loss

GOLDEN = ROOT / "tests" / "fixtures" / "edm_ddpmpp_golden.npz"
GOLDEN_NET = NetSettings(resolution=16, channels=3, model_channels=16, channel_mult=(1, 2, 2), num_blocks=2,
                         attn_resolutions=(8,), dropout=0.13)


@pytest.fixture(scope="module")
def golden():
    """(network with the official weights, its inputs x, sigma, c, and what the official network gives for them)."""
    with np.load(GOLDEN) as file:
        data = {k: torch.tensor(file[k]) for k in file.files}
    network, weights = EDMPrecond(GOLDEN_NET).eval(), {}
    for name, value in data.items():
        if name.startswith("param/") and "resample_filter" not in name and "map_augment" not in name:
            weights[name.removeprefix("param/")] = value
    network.load_state_dict(weights)
    return network, (data["x"], data["sigma"], data["class_labels"]), data["D_x"]


def small_network(seed=0):
    """A network with two levels and attention, none of whose weights are zero."""
    torch.manual_seed(seed)
    network = EDMPrecond(NetSettings(resolution=8, num_classes=3, model_channels=16, channel_mult=(1, 1), num_blocks=1,
                                     attn_resolutions=(8,)))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return network


def inputs(n=8):
    torch.manual_seed(3)
    return torch.randn(n, 1, 8, 8), torch.rand(n, 1, 1, 1) + 0.1, torch.eye(3)[torch.arange(n) % 3]


# --------------------------------------------------------------------------------------------------------- the network

def test_the_network_is_the_official_one(golden):
    network, given, expected = golden
    with torch.no_grad():
        D = network(*given)
    error = (D - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < 1e-5, error


def test_sigma_and_labels_are_taken_in_every_form_of_the_contract():
    network = small_network()
    x, _, c = inputs(3)
    with torch.no_grad():
        D = network(x, torch.full((3, 1, 1, 1), 0.7), c)
        assert D.shape == x.shape and D.dtype == torch.float32 and network(x.double(), 0.7, c).dtype == torch.float32
        for sigma in (0.7, torch.tensor(0.7), torch.full((3,), 0.7)):
            assert torch.equal(network(x, sigma, c), D)
        any_label = network(x, 0.7, None)
        assert torch.equal(any_label, network(x, 0.7, torch.zeros_like(c)))
        assert not torch.equal(any_label, D) and not torch.equal(network(x, 0.8, c), D)
        assert not torch.equal(network(x, 0.7, c.flip(0)), D)


def test_a_teacher_has_conditions_shape_and_sigma_data():
    network = tiny_network(resolution=8, channels=3, num_classes=4, sigma_data=0.7)
    assert torch.equal(network.conditions, torch.eye(4)) and network.shape == (3, 8, 8) and network.sigma_data == 0.7
    assert network.to("meta").conditions.device.type == "meta"


def test_a_patch_is_folded_into_channels_and_unfolded():
    """With patch 2, F is the network of half the resolution and four times the channels."""
    torch.manual_seed(0)
    folded = UNet(NetSettings(resolution=8, patch=2, model_channels=16, channel_mult=(1,), num_blocks=1))
    plain = UNet(NetSettings(resolution=4, channels=4, model_channels=16, channel_mult=(1,), num_blocks=1))
    plain.load_state_dict(folded.state_dict())
    x, c_noise, c = torch.randn(2, 1, 8, 8), torch.randn(2), torch.eye(10)[:2]
    expected = F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), c_noise, c), 2)
    assert torch.allclose(folded(x, c_noise, c), expected, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.5, 3.0, 80.0])
def test_preconditioning(sigma, monkeypatch):
    """F = (D - c_skip x) / c_out gives back the D of a closed form. Input and target of F have unit variance."""
    torch.manual_seed(0)
    network, sd = tiny_network(resolution=4, sigma_data=0.5), 0.5
    x_0 = sd * torch.randn(4000, 1, 4, 4, dtype=torch.float64)
    x = x_0 + sigma * torch.randn_like(x_0)
    D = x * sd ** 2 / (sd ** 2 + sigma ** 2)  # the posterior mean of N(0, sd^2)
    c_skip, c_out = sd ** 2 / (sigma ** 2 + sd ** 2), sigma * sd / (sigma ** 2 + sd ** 2) ** 0.5
    given = {}

    def unet(x_in, c_noise, c):
        given.update(x_in=x_in, c_noise=c_noise)
        return ((D - c_skip * x) / c_out).float()

    monkeypatch.setattr(network.model, "forward", unet)
    out = network(x, sigma, torch.zeros(len(x), 10))
    assert (out.double() - D).abs().max() < 1e-5 * D.abs().max() + 1e-6
    assert abs(given["x_in"].std().item() - 1) < 0.02
    assert abs(((x_0 - c_skip * x) / c_out).std().item() - 1) < 0.02
    assert torch.allclose(given["c_noise"], torch.tensor(sigma).log() / 4)


def test_bfloat16_stays_close(golden):
    network, given, expected = golden
    network = copy.deepcopy(network)
    network.bf16 = True
    with torch.no_grad():
        D = network(*given)
    assert D.dtype == torch.float32 and 1e-6 < (D - expected).norm() / expected.norm() < 0.02


def test_the_autocast_of_the_caller_is_followed_and_never_stale():
    """Inside the caller's autocast, weights that an optimizer moved are those that the next evaluation uses."""
    network = small_network()
    with torch.no_grad():
        exact = network(*inputs())
        network.bf16 = True
        fast = network(*inputs())
        network.bf16 = False
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(network(*inputs()), fast) and not torch.equal(exact, fast)
            assert torch.is_autocast_enabled("cpu"), "the caller's autocast is left on"
    results = []
    for outer in (True, False):
        network = small_network()
        network.bf16 = True
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            network(*inputs()).sum().backward()
            torch.optim.SGD(network.parameters(), 1e-3).step()
            results.append(network(*inputs()).detach())
    assert torch.equal(*results)


def test_a_copy_is_independent():
    network = small_network()
    before = network(*inputs())
    other = copy.deepcopy(network)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    assert torch.equal(network(*inputs()), before) and not torch.equal(other(*inputs()), before)


class WeightGradients(TorchDispatchMode):
    """Counts the convolutions whose backward pass computes the gradient of the weight."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            output_mask = args[-1]  # gradients of input, weight and bias
            self.count += output_mask[1]
        return function(*args, **(kwargs or {}))


def step(n, s):
    torch.manual_seed(1)
    c_phi, c_psi, forgotten = sfd_minimal.draw_labels(8, torch.tensor([1, 1, 2]), torch.eye(3))
    sfd_minimal.sfd_step(n.generator, n.fake, n.teacher, n.optimizer_theta, n.optimizer_psi,
                         torch.randn(8, *n.teacher.shape), c_phi, c_psi, forgotten, s)


def test_a_step_computes_no_weight_gradient_of_a_frozen_network():
    """Those of the fake score in the psi step, those of the generator in the theta step, and no others."""
    s = sfd_minimal.Settings()
    n = sfd_minimal.begin(small_network(), s)
    with WeightGradients() as seen:
        step(n, s)
    convolutions = [m for m in n.generator.modules() if isinstance(m, torch.nn.Conv2d)]
    assert seen.count == 2 * len(convolutions)


def test_gradients_in_another_memory_layout_take_the_same_step():
    """Compiled convolutions give gradients in channels_last, which Adam's fused step on the CPU would misread."""
    def channels_last(gradient):
        return gradient.contiguous(memory_format=torch.channels_last)

    s, weights = sfd_minimal.Settings(lr=1e-2, lr_fake=1e-2), []
    for hooked in (False, True):
        n = sfd_minimal.begin(small_network(), s)
        for p in [*n.generator.parameters(), *n.fake.parameters()]:
            if hooked and p.ndim == 4:
                p.register_hook(channels_last)
        step(n, s)
        weights.append([*n.generator.parameters(), *n.fake.parameters()])
    for p, q in zip(*weights):
        assert (p - q).norm() <= 1e-5 * q.norm() + 1e-7


# --------------------------------------------------------------------------------------------------------- the sampler

def test_the_grid_ends_at_the_noise_levels_of_edm():
    assert sigma_grid(0.0) == pytest.approx(80) and sigma_grid(1.0) == pytest.approx(0.002)


def test_heun_draws_the_mixture():
    """From quasi-random noise, whose moments 2,048 points have as 100,000 random points would."""
    mixture = ring()

    def D(x, sigma, c):
        return mixture(x, sigma[:1], c)  # all rows are at one noise level: the matrices once

    u = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(2048, dtype=torch.float64)
    z = math.sqrt(2) * torch.erfinv(2 * u - 1)
    for k in range(len(mixture.means)):
        x = heun_sampler(D, z, torch.eye(5)[[k] * len(z)], steps=64)
        std = mixture.covs[k].diagonal().sqrt()
        assert ((x.mean(0) - mixture.means[k]).abs() / std).max() < 0.05
        assert (x.T.cov() - mixture.covs[k]).norm() / mixture.covs[k].norm() < 0.05
    x = heun_sampler(D, z, torch.zeros(len(z), 5), steps=64)  # any label: the whole mixture
    share = torch.cdist(x, mixture.means).argmin(1).bincount() / len(x)
    assert (share - 0.2).abs().max() < 0.02
    cov = (mixture.covs + mixture.means[:, :, None] * mixture.means[:, None]).mean(0)
    assert x.mean(0).norm() < 0.06 and (x.T.cov() - cov).norm() / cov.norm() < 0.04


@pytest.mark.parametrize("sigma_max", [80.0, 2.0])
def test_heun_is_of_second_order(sigma_max):
    """The flow of one Gaussian is x_0 = m + (x - m) s / sqrt(s^2 + sigma^2). Half the step has a quarter of the error.
    """
    truth = Gaussians(torch.tensor([[0.3, -0.2]], dtype=torch.float64), 0.25 * torch.eye(2, dtype=torch.float64)[None])
    torch.manual_seed(0)
    z = torch.randn(200, 2, dtype=torch.float64)
    exact = truth.means + (sigma_max * z - truth.means) * 0.5 / (0.25 + sigma_max ** 2) ** 0.5
    error = []
    for steps in (16, 32, 64):
        x = heun_sampler(truth, z, torch.ones(200, 1), steps=steps, sigma_max=sigma_max)
        error.append((x - exact).norm().item())
    assert 3.3 < error[0] / error[1] < 5.5 and 3.3 < error[1] / error[2] < 5.5, error


@pytest.mark.parametrize("shape, level", [((4, 3, 8, 8), (4, 1, 1, 1)), ((4, 2), (4, 1))])
def test_heun_keeps_to_the_contract(shape, level):
    """18 steps are 35 evaluations, each at one noise level with as many dimensions as x, from 80 down to 0.002."""
    sigmas = []

    def D(x, sigma, c):
        assert sigma.shape == level and x.shape == shape and c.shape == (4, 4) and (sigma == sigma[0]).all()
        sigmas.append(sigma.flatten()[0].item())
        return x / (1 + sigma ** 2)

    x = heun_sampler(D, torch.randn(shape), torch.eye(4))
    assert x.shape == shape and x.dtype == torch.float32
    assert len(sigmas) == 35 and sigmas == sorted(sigmas, reverse=True)
    assert sigmas[0] == pytest.approx(80) and sigmas[-1] == pytest.approx(0.002)


# ------------------------------------------------------------------------------------------------------------ the loss

def points(n):
    """(x_0, sigma, c) of n points of the ring, with noise levels."""
    torch.manual_seed(0)
    k = torch.randint(5, (n,))
    return ring().sample(k), (0.5 + 1.2 * torch.randn(n, 1, dtype=torch.float64)).exp(), torch.eye(5)[k]


def test_edm_loss_is_its_formula_and_smallest_at_the_posterior_mean():
    x, sigma, c = points(20_000)

    class Worse(torch.nn.Module):
        sigma_data = 1.5

        def __init__(self, scale, shift):
            super().__init__()
            self.scale, self.shift = scale, shift

        def forward(self, x, sigma, c):
            return self.scale * ring()(x, sigma, c) + self.shift

    def loss(scale=1.0, shift=0.0):
        torch.manual_seed(1)
        return edm_loss(Worse(scale, shift), x, sigma, c)

    torch.manual_seed(1)
    x_t = x + sigma * torch.randn_like(x)
    total = 0.0
    for j in range(2):
        squared = (ring()(x_t, sigma, c)[:, j] - x[:, j]) ** 2
        total += (squared * (sigma[:, 0] ** 2 + 1.5 ** 2) / (1.5 * sigma[:, 0]) ** 2).mean() / 2
    assert loss() == pytest.approx(total.item())
    for worse in (loss(shift=0.05), loss(shift=-0.05), loss(scale=1.03), loss(scale=0.97)):
        assert worse > loss()


@pytest.mark.parametrize("guidance, below, low, high, expected", [
    (1.0, math.inf, 0, math.inf, 1.0), (1.3, math.inf, 0, math.inf, 1.3), (2.0, math.inf, 0, math.inf, 2.0),
    (2.0, 1.5, 0, 1.4, 2.0), (2.0, 1.5, 1.5, math.inf, 1.0)])
def test_guided_loss_is_smallest_at_the_guided_denoiser(guidance, below, low, high, expected):
    """Its slope in g is linear, and crosses zero at the guidance, at the noise levels that have it."""
    x, sigma, c = points(40_000)
    sigma = sigma.clamp(low, high)

    def slope(g):
        torch.manual_seed(1)
        D = Guided(ring(), g)
        return torch.autograd.grad(guided_edm_loss(D, x, sigma, c, guidance, below), D.g)[0].item()

    at_low, at_high = slope(0.5), slope(3.0)
    assert 0.5 - 2.5 * at_low / (at_high - at_low) == pytest.approx(expected, rel=0.02)


def test_stratified_numbers_are_normal_with_one_in_each_part():
    torch.manual_seed(0)
    x = stratified_normal(1000, "cpu")
    part = 1000 * 0.5 * (1 + torch.erf(x / math.sqrt(2))) - torch.arange(1000)
    assert part.min() > -1e-3 and part.max() < 1 + 1e-3 and part.std() > 0.25
    assert abs(x.mean()) < 0.005 and abs(x.std() - 1) < 0.01
    assert torch.cat([stratified_normal(1, "cpu") for _ in range(1000)]).std() > 0.9


@pytest.mark.parametrize("u", [0.0, 1.0])
def test_stratified_numbers_are_finite_where_rounding_ends(u, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n, device: torch.full((n,), u))
    assert stratified_normal(4, "cpu").isfinite().all()


# ------------------------------------------------------------------------------------------------------------ the file

def test_a_file_gives_back_the_network(golden, tmp_path):
    network, given, expected = golden
    for half, tolerance in ((False, 1e-5), (True, 2e-3)):
        save_network(network, tmp_path / "net.pt", half, data="x", classes=["a"])
        again, info = load_network(tmp_path / "net.pt")
        assert again.settings == GOLDEN_NET and not again.training and info["data"] == "x" and info["classes"] == ["a"]
        assert {"path", "sha256", "data", "classes"} == info.keys()
        assert all(p.dtype == torch.float32 for p in again.parameters())
        again.bf16 = False
        with torch.no_grad():
            assert (again(*given) - expected).norm() / expected.norm() < tolerance
    assert_same(unpack(pack(network)).state_dict(), network.state_dict())


@pytest.mark.parametrize("value, half", [(math.nan, False), (math.inf, False), (math.nan, True), (1e5, True)])
def test_weights_that_no_file_can_hold_are_refused(value, half):
    """Not finite, or beyond float16."""
    network = tiny_network()
    network.model.map_layer0.bias.data[0] = value
    with pytest.raises(RunFailed):
        pack(network, half)


class RunsCode:
    """Pickles as a call that makes a file."""

    def __reduce__(self):
        return open, ("code-ran", "w")


def good_content():
    return {"data": "mnist", "classes": ["0"], **pack(tiny_network(resolution=8))}


def hostile_contents():
    """What the file of a network must not hold."""
    yield [1, 2]
    yield RunsCode()
    for key in good_content():
        content = good_content()
        del content[key]
        yield content
    for key, value in (("net", 5), ("weights", 5), ("net", {}), ("weights", {}), ("weights", {"model": RunsCode()})):
        yield {**good_content(), key: value}
    settings = [("channel_mult", mult) for mult in ([10 ** 9], [], 10 ** 5 * [1], None)]
    settings += [("attn_resolutions", 8), ("attn_resolutions", [2]), ("patch", 0), ("patch", 2), ("another", True)]
    settings += [("attn_resolutions", ["x"]), ("attn_resolutions", "2")]
    settings += [("dropout", value) for value in ("x", None, [0.1], 1.0, -0.1, math.nan)]
    settings += [("sigma_data", value) for value in ("x", None, [0.5], 0.0, -0.5, math.nan, math.inf)]
    for name in ("resolution", "channels", "num_classes", "model_channels", "num_blocks"):
        settings += [(name, size) for size in (10 ** 9, 2 ** 80, 0, -4, 3.5, "8", None, [8])]
    for name, value in settings:
        content = good_content()
        content["net"][name] = value
        yield content
    first = next(iter(good_content()["weights"]))
    for name, value in ((first, torch.zeros(3)), (first, "no tensor"), (first, None), ("another", torch.zeros(3))):
        content = good_content()
        content["weights"][name] = value
        yield content
    content = good_content()
    del content["weights"][first]
    yield content


def test_hostile_and_truncated_files_are_refused(tmp_path, monkeypatch):
    """No code in them is run, and sizes that no file has the weights for take no memory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pt"
    for content in hostile_contents():
        torch.save(content, path)
        with pytest.raises(BadInput):
            load_network(path)
    save_network(tiny_network(), path)
    whole = path.read_bytes()
    plain_pickle = pickle.dumps(RunsCode())
    for data in (b"", b"text", plain_pickle, *(whole[:n] for n in (1, 100, 2000, len(whole) // 2, len(whole) - 1))):
        path.write_bytes(data)
        with pytest.raises(BadInput):
            load_network(path)
    for missing in (tmp_path / "nowhere.pt", tmp_path):
        with pytest.raises(BadInput):
            load_network(missing)
    assert [p.name for p in tmp_path.iterdir()] == ["file.pt"], "code in a file was run"


def test_a_setting_of_another_version_is_ignored_where_it_is_off(tmp_path):
    content = good_content()
    content["net"]["folded"] = False
    save_file(tmp_path / "net.pt", content)
    assert load_network(tmp_path / "net.pt")[0].settings == tiny_network(resolution=8).settings
