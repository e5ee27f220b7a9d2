"""Networks that predict something else, and published EDM pickles, are denoisers of the contract. Hostile pickles are
refused."""
import collections
import copy
import math
import os
import pickle

import numpy as np
import pytest
import torch

import lab.distill
import sfd_minimal
from closed_form import ring
from conftest import CPU, ROOT, tiny_network
from edm_unet import BadInput, UNet
from lab.adapters import pickles
from lab.adapters.denoisers import (FromEpsilon, FromFlow, FromV, FromX0, InParts, check_noise_range, map_condition)
from lab.adapters.pickles import load_published
from lab.core.files import load_any, load_teacher
from test_network import golden, inputs, small_network

BETAS = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
SCALED = (1 - BETAS).cumprod(0)  # the schedule of Stable Diffusion, whose largest sigma is 14.6
WIDE = 1 / (1 + torch.logspace(-2, 2, 400, dtype=torch.float64) ** 2)  # sigma from 0.01 to 100
ADAPTERS = {"eps": FromEpsilon, "v": FromV, "x_0": FromX0, "flow": FromFlow}


# --------------------------------------------------------------------------------------------------- other predictions

class Perfect(torch.nn.Module):
    """What a perfect network predicts of Gaussians, whose denoiser is in closed form."""

    def __init__(self, predicts, ln_sigma):
        super().__init__()
        self.predicts, self.ln_sigma, self.D = predicts, ln_sigma, ring()

    def forward(self, x, t, c):
        t = t.view(-1, 1)
        if self.predicts == "flow":
            sigma = t / (1 - t)
            return (x - self.D(x * (1 + sigma), sigma, c)) / t  # x = (1 - t) x_0 + t eps, so this is eps - x_0
        below = t.long().clamp(max=len(self.ln_sigma) - 2)
        sigma = torch.lerp(self.ln_sigma[below], self.ln_sigma[below + 1], t - below).exp()
        r = (1 + sigma ** 2).sqrt()
        x_0 = self.D(x * r, sigma, c)
        eps = (x * r - x_0) / sigma
        return {"eps": eps, "v": (eps - sigma * x_0) / r, "x_0": x_0}[self.predicts]


def adapted(predicts, alphas_cumprod=SCALED):
    conditions, ln_sigma = torch.eye(5, dtype=torch.float64), (1 / alphas_cumprod - 1).log() / 2
    schedule = () if predicts == "flow" else (alphas_cumprod,)
    return ADAPTERS[predicts](Perfect(predicts, ln_sigma), *schedule, conditions, (2,))


@pytest.mark.parametrize("predicts", ADAPTERS)
@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.7, 2.5, 9.0, 14.0, 50.0])
def test_every_prediction_is_the_same_denoiser(predicts, sigma):
    torch.manual_seed(0)
    D = adapted(predicts, SCALED if 0.03 < sigma < 14.6 else WIDE)
    x = (9 + sigma ** 2) ** 0.5 * torch.randn(64, 2, dtype=torch.float64)
    c = torch.eye(5, dtype=torch.float64)[torch.arange(64) % 5]
    expected = ring()(x, sigma, c)
    for level in (torch.full((64, 1), sigma, dtype=torch.float64), torch.full((64,), sigma), sigma):
        assert (D(x, level, c) - expected).norm() < 1e-5 * expected.norm()


def test_time_is_interpolated_in_the_schedule_and_stops_at_its_ends():
    D = adapted("eps")
    t = D.time(torch.tensor([[1e-6], [0.5], [1e6]]))
    assert t[0] == 0 and t[2] == 999 and 0 < t[1] < 999
    between = (D.ln_sigma[300] + D.ln_sigma[301]).div(2).exp().view(1, 1)
    assert D.time(between).item() == pytest.approx(300.5, abs=1e-3)
    steps = torch.arange(1000)
    assert (D.time((1 / SCALED - 1).sqrt()) - steps).abs().max() < 1e-3
    assert D.sigma_min == pytest.approx(0.0292, abs=1e-4) and D.sigma_max == pytest.approx(14.615, abs=1e-3)


@pytest.mark.parametrize("alphas_cumprod", [
    BETAS, 1 - BETAS, SCALED.flip(0), torch.full((10,), 0.5), torch.cat([torch.ones(1), SCALED]),
    torch.cat([SCALED, torch.zeros(1)]), torch.tensor([0.9, float("nan"), 0.1]), 1 / SCALED],
    ids=["betas", "alphas", "rising", "constant", "begins with 1", "ends with 0", "nan", "above 1"])
def test_what_is_no_schedule_is_refused(alphas_cumprod):
    with pytest.raises(ValueError):
        adapted("eps", alphas_cumprod)


@pytest.mark.parametrize("kind", [torch.Tensor.float, torch.Tensor.numpy, torch.Tensor.tolist])
def test_a_schedule_is_a_tensor_an_array_or_a_list(kind):
    D = FromV(torch.nn.Identity(), kind(SCALED), None, (2,))
    assert torch.allclose(D.ln_sigma, adapted("v").ln_sigma, rtol=1e-4)


def test_learned_variances_are_refused():
    class Doubled(torch.nn.Module):
        def forward(self, x, t, c):
            return torch.cat([x, x], 1)

    D = FromEpsilon(Doubled(), SCALED, torch.eye(2), (1, 4, 4))
    with pytest.raises(ValueError):
        D(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 1, 1), torch.eye(2))


def test_conditions_and_schedule_move_with_the_network():
    """Conditions in a tuple or dict as well. The schedule is float32, since some devices have no float64."""
    states, mask = torch.zeros(2, 3), torch.ones(2, dtype=torch.long)
    for conditions in (states, (states, mask), {"states": states, "masks": (mask, None)}, None):
        D = FromEpsilon(torch.nn.Linear(1, 1), SCALED, conditions, (2,)).to("meta")
        moved = []
        map_condition(moved.append, D.conditions)
        assert all(tensor.device.type == "meta" for tensor in [D.ln_sigma, *moved])
        assert D.ln_sigma.dtype == torch.float32
        assert type(D.conditions) is type(conditions)


class Prompted(torch.nn.Module):
    """Predicts noise from states (B, 7, 4) and a mask (B, 7), in a tuple or a dict."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.read, self.net = kind, torch.nn.Linear(4, 3), torch.nn.Linear(2 + 1 + 3, 2)

    def forward(self, x, t, c):
        assert type(c) is self.kind
        states, mask = c.values() if self.kind is dict else c
        read = (self.read(states) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.net(torch.cat([x, t[:, None] / 1000, read], 1))


@pytest.mark.parametrize("kind", [tuple, dict])
@pytest.mark.parametrize("autocast", [False, True])
def test_steps_of_sfd_on_an_adapter(kind, autocast):
    """With guidance, in parts, on conditions in a tuple or dict. Under the caller's autocast no weight is stale."""
    torch.manual_seed(0)
    parts = {"states": torch.randn(3, 7, 4), "mask": torch.ones(3, 7)}
    prompts = parts if kind is dict else tuple(parts.values())
    s = sfd_minimal.Settings(steps=3, lr=1e-2, lr_fake=1e-2)
    n = sfd_minimal.begin(FromEpsilon(Prompted(kind), SCALED, prompts, (2,)), s)
    generator, fake, teacher = (InParts(network, 3) for network in (n.generator, n.fake, n.teacher))
    for _ in range(3):
        k = torch.randint(3, (8,))
        forgotten = k == 0
        c_psi = map_condition(lambda tensor: tensor[k], prompts)
        c_phi = map_condition(lambda tensor: tensor[torch.where(forgotten, 2, k)], prompts)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            D = lab.distill.guided(teacher, c_psi, forgotten, 4.5)
            terms = sfd_minimal.sfd_step(generator, fake, D, n.optimizer_theta, n.optimizer_psi, torch.randn(8, 2),
                                         c_phi, c_psi, forgotten, s)
            x, sigma = torch.randn(8, 2), torch.ones(8, 1)
            used = fake(x, sigma, c_psi)
            fresh = copy.deepcopy(n.fake)(x, sigma, c_psi)
        assert all(value.isfinite() for value in terms.values())
        assert used.dtype == torch.float32 and torch.allclose(used, fresh), "old weights were used"
    assert not torch.equal(n.generator.net.net.weight, n.teacher.net.net.weight)


def test_guidance_is_away_from_the_concept_or_the_null_prompt():
    """The teacher is guided away from the concept in rows to forget, and from the null prompt in others."""
    def D(x, sigma, c):
        return x + c["state"] * c["mask"]

    def c(*values):
        return {"state": torch.tensor(values)[:, None], "mask": torch.ones(len(values), 1)}

    x, everywhere = torch.zeros(3, 1), torch.ones(3, dtype=torch.bool)
    prompt, negative = c(1.0, 2.0, 3.0), c(10.0, 0.0, 0.0)  # row 0 is to forget
    for g in (1.0, 4.5):
        found = lab.distill.guided(D, negative, everywhere, g)(x, torch.ones(3, 1), prompt)
        expected = negative["state"] + g * (prompt["state"] - negative["state"])
        assert torch.allclose(found, expected)


@pytest.mark.parametrize("changes, accepted", [
    ({}, True), ({"sigma_max": 80.0}, False), ({"sigma_max": 80.0, "u_max": 0.6}, True), ({"u_max": 1.0}, True),
    ({"sigma_min": 0.002}, False), ({"sigma_init": 20.0}, False), ({"sigma_init": 0.01}, False),
    ({"p_mean": -1.2}, True), ({"p_mean": -2.4}, False), ({"p_mean": 2.4}, False)])
def test_noise_levels_beyond_the_schedule_are_refused(changes, accepted):
    D = adapted("eps")
    within = {"sigma_min": D.sigma_min, "sigma_max": D.sigma_max, "u_max": 0.95}
    s = sfd_minimal.Settings(**{**within, **changes})
    check_noise_range(adapted("flow"), s)  # a flow has learned all noise levels
    if accepted:
        check_noise_range(D, s)
    else:
        with pytest.raises(ValueError):
            check_noise_range(D, s)


# ------------------------------------------------------------------------------------------------------------ in parts

def kept_bytes(D):
    """(bytes that an evaluation keeps for the gradient, without the weights, and the gradient)."""
    sizes = {}

    def note(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x, sigma, c = inputs()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = D(x.requires_grad_(), sigma, c).square().sum()
    weights = {p.untyped_storage().data_ptr() for p in D.parameters()}
    kept = sum(size for pointer, size in sizes.items() if pointer not in weights)
    return kept, torch.autograd.grad(loss, [x, *D.parameters()])


def test_parts_keep_less_and_give_the_same_gradient():
    network = small_network()
    whole, gradient = kept_bytes(network)
    parts, gradient_of_parts = kept_bytes(InParts(network, 2))
    assert parts < whole / 20
    for p, q in zip(gradient_of_parts, gradient):
        assert (p - q).norm() <= 1e-5 * q.norm() + 1e-7
    for p, q in zip(kept_bytes(InParts(network, 8))[1], gradient):
        assert torch.equal(p, q), "a batch that fits is evaluated as a whole"


def test_parts_are_a_denoiser_with_the_parameters_of_the_network():
    network = small_network()
    parts = InParts(network, 2)
    assert parts.shape == network.shape and parts.sigma_data == network.sigma_data
    assert torch.equal(parts.conditions, network.conditions)
    for p, q in zip(parts.parameters(), network.parameters(), strict=True):
        assert p is q
    x, sigma, c = inputs()
    assert torch.allclose(parts(x, sigma, None), network(x, sigma, None), atol=1e-6)
    other = copy.deepcopy(parts)
    assert other.network is not network and torch.equal(other(x, sigma, c), parts(x, sigma, c))


def test_a_micro_batch_is_for_generator_fake_score_and_teacher(monkeypatch):
    """Four evaluations in a step, each repeated for its gradient."""
    sizes, forward = [], UNet.forward

    def noted(self, x, c_noise, c):
        sizes.append(len(x))
        return forward(self, x, c_noise, c)

    monkeypatch.setattr(UNet, "forward", noted)
    for micro_batch, expected in ((0, 4 * [8]), (3, 8 * [2] + 16 * [3])):
        s = lab.distill.Settings(steps=1, batch=8, micro_batch=micro_batch)
        n = sfd_minimal.begin(tiny_network(), s)
        sizes.clear()
        list(lab.distill.distill(s, n, torch.tensor([1, 1]), torch.eye(10)[:2]))
        assert sorted(sizes) == expected


# --------------------------------------------------------------------------------------------------- published pickles

FILE = ROOT / "tests" / "fixtures" / "edm_ddpmpp_official_format.pkl"


def test_a_published_pickle_is_the_official_network(golden):
    same, given, expected = golden
    network, info = load_published(FILE)
    network.bf16 = False
    with torch.no_grad():
        assert (network(*given) - expected).norm() < 1e-5 * expected.norm()
    assert network.settings == same.settings and not network.training
    assert info["data"] == "cifar10" and info["classes"][:3] == ["airplane", "automobile", "bird"]
    assert info["path"] == str(FILE) and len(info["sha256"]) == 64


def test_a_published_pickle_is_a_teacher(tmp_path):
    """Of the data set that the caller names, in capitals too. Labels are numbers where the data set is not CIFAR-10."""
    path = tmp_path / "NETWORK.PKL"
    path.write_bytes(FILE.read_bytes())
    teacher, info = load_teacher(path, "objects", CPU)
    assert info["data"] == "objects" and info["classes"] == [str(k) for k in range(10)] and teacher.shape == (3, 16, 16)
    s = sfd_minimal.Settings(steps=2, batch=4)
    n = sfd_minimal.begin(load_any(path)[0], s)
    for terms in sfd_minimal.distill(s, n, sfd_minimal.override_labels([0], [1], 10)):
        assert all(value.isfinite() for value in terms.values())


def changed_file(monkeypatch, change):
    """Let the unpickler read FILE with change(net, unet) made to its content."""
    load = pickles._Unpickler.load

    def load_and_change(self):
        content = load(self)
        change(content["ema"], content["ema"]["_modules"]["model"])
        return content

    monkeypatch.setattr(pickles._Unpickler, "load", load_and_change)


@pytest.mark.parametrize("part, name, value", [
    ("net", "label_dim", 0), ("net", "class_name", "VPPrecond"), ("net", "class_name", "iDDPMPrecond"),
    ("unet", "class_name", "DhariwalUNet"), ("unet", "embedding_type", "fourier"),
    ("unet", "resample_filter", [1, 3, 3, 1]), ("unet", "encoder_type", "residual"), ("unet", "decoder_type", "skip"),
    ("unet", "channel_mult_noise", 2)])
def test_another_kind_of_published_network_is_named(part, name, value, monkeypatch):
    def change(net, unet):
        found = {"net": net, "unet": unet}[part]
        options = found if name in found else found["_init_kwargs"]
        options[name] = value

    changed_file(monkeypatch, change)
    word = "label_dim" if name == "label_dim" else str(value).replace("[", r"\[")
    with pytest.raises(BadInput, match=word):
        load_published(FILE)


@pytest.mark.parametrize("name, value", [
    ("model_channels", 10 ** 9), ("num_blocks", 10 ** 9), ("channel_mult", 10 ** 5 * [1]), ("channel_mult", [])])
def test_absurd_sizes_are_refused_at_no_cost(name, value, monkeypatch):
    changed_file(monkeypatch, lambda net, unet: unet["_init_kwargs"].update({name: value}))
    with pytest.raises(BadInput):
        load_published(FILE)


def test_content_that_grows_when_it_is_visited_is_refused(monkeypatch):
    """Thirty modules that hold each other twice are a billion visits; thirty lists are a billion letters."""
    def modules(net, unet):
        module = {"_parameters": {}, "_modules": {}}
        for _ in range(30):
            module = {"_parameters": {}, "_modules": {"a": module, "b": module}}
        unet["_modules"]["more"] = module

    def lists(net, unet):
        value = []
        for _ in range(30):
            value = [value, value]
        unet["_init_kwargs"]["embedding_type"] = value

    for change in (modules, lists):
        with monkeypatch.context() as patch:
            changed_file(patch, change)
            with pytest.raises(BadInput):
                load_published(FILE)


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Unknown:
    pass


def tensor(size, stride, offset=0, hooks=None):
    """A tensor of that shape in a storage of three numbers."""
    return Call(torch._utils._rebuild_tensor_v2, torch.zeros(3).storage(), offset, size, stride, False,
                hooks or collections.OrderedDict())


TOUCH = Call(os.system, "touch code-ran")
HOSTILE = {
    "os.system": lambda: {"ema": TOUCH},
    "eval": lambda: {"ema": Call(eval, "open('code-ran', 'w')")},
    "a call outside the network": lambda: {"ema": None, "extra": Call(open, "code-ran", "w")},
    "an unknown class": lambda: {"ema": Unknown()},
    "a pickle in a storage": lambda: {"ema": Call(torch.storage._load_from_bytes, pickle.dumps(TOUCH, protocol=2))},
    "a numpy array of objects": lambda: {"ema": np.array([Unknown()], dtype=object)},
    "a storage that is too small": lambda: {"ema": tensor((1000, 1000), (1000, 1))},
    "a number repeated": lambda: {"ema": tensor((10 ** 12,), (0,))},
    "a negative offset": lambda: {"ema": tensor((2,), (1,), offset=-4)},
    "a tensor with hooks": lambda: {"ema": tensor((2,), (1,), hooks={1: 2})},
    "no network": lambda: {"something": 1},
    "no dict": lambda: [1, 2],
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.pkl").write_bytes(pickle.dumps(HOSTILE[name](), protocol=4))
    with pytest.raises(BadInput):
        load_published(tmp_path / "hostile.pkl")
    assert [p.name for p in tmp_path.iterdir()] == ["hostile.pkl"], "code in the file was run"


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_the_unpickler_reads_a_tensor_that_fits():
    content = pickle.dumps(tensor((2, 1), (1, 2), offset=1), protocol=4)
    assert torch.equal(pickles._Unpickler(pickle.io.BytesIO(content)).load(), torch.zeros(2, 1))


def test_truncated_pickles_are_refused(tmp_path):
    for length in (0, 1, 100, 50_000, 1_800_000):
        (tmp_path / "cut.pkl").write_bytes(FILE.read_bytes()[:length])
        with pytest.raises(BadInput):
            load_published(tmp_path / "cut.pkl")
    with pytest.raises(BadInput):
        load_published(tmp_path / "nowhere.pkl")
