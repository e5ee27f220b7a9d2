"""The switches of lab.ablation: each does what it is called, and without them the run is that of sfd_minimal.py."""
import pytest
import torch

import sfd_minimal
from conftest import tiny_network
from edm_unet import BadInput, Block
from lab import ablation
from sfd_minimal import begin, fake_score_loss, override_labels


def trained(distill, switches=(), steps=4, **changes):
    """The `Networks` after a few steps."""
    s = ablation.Settings(steps=steps, batch=8, switches=switches, **changes)
    torch.manual_seed(0)
    n = begin(tiny_network(), s)
    ablation.prepare(n, switches)
    for _ in distill(s, n, override_labels([0], [1], 10)):
        pass
    return n


def weights(n):
    return torch.cat([p.detach().flatten() for network in (n.generator, n.fake) for p in network.parameters()])


def test_without_switches_a_run_is_that_of_sfd_minimal_bit_for_bit():
    assert torch.equal(weights(trained(ablation.distill)), weights(trained(sfd_minimal.distill)))


@pytest.mark.parametrize("switch", set(ablation.SWITCHES) - {"equal-rates", "alpha", "unguided-teacher"})
def test_every_switch_changes_the_run(switch):
    assert not torch.equal(weights(trained(ablation.distill, (switch,))), weights(trained(sfd_minimal.distill)))


def test_noise_levels_are_those_of_the_official_code():
    sigmas = ablation.ddpm_sigmas()
    assert len(sigmas) == 674
    assert sigmas[0].item() == pytest.approx(0.137, abs=5e-4) and sigmas[-1].item() == pytest.approx(13.01, abs=0.005)


def test_the_weight_of_noise_prediction_gives_its_loss():
    x_g, sigma, noise = torch.randn(4, 1, 8, 8), torch.rand(4, 1, 1, 1) + 0.1, []

    def fake(x_t, sigma, c):
        noise.append((x_t - x_g) / sigma)
        return 0.3 * x_t

    L_psi = ablation.as_noise_prediction(fake_score_loss(fake, x_g, None, sigma), sigma.flatten(), 0.5)
    predicted = (x_g + sigma * noise[0] - 0.3 * (x_g + sigma * noise[0])) / sigma
    torch.testing.assert_close(L_psi, ((predicted - noise[0]) ** 2).flatten(1).sum(1))


def test_the_label_to_forget_has_a_batch_of_its_own():
    c_phi, c_psi, forgotten = ablation.draw_two_batches(50, override_labels([0], [1], 10), torch.eye(10))
    assert forgotten.tolist() == [False] * 50 + [True] * 50
    assert set(c_psi[:50].argmax(1).tolist()) <= set(range(1, 10))
    assert torch.equal(c_phi[:50], c_psi[:50])
    assert set(c_psi[50:].argmax(1).tolist()) == {0} and set(c_phi[50:].argmax(1).tolist()) == {1}


def test_both_losses_of_the_label_to_forget_weigh_a_hundredth(monkeypatch):
    """With losses that are one number for each row, the weights are all that is left."""
    rows = torch.cat([torch.zeros(8), torch.ones(8)])  # no loss under labels to keep

    def psi(fake, x_g, c, sigma, sigma_data):
        return rows + 0 * fake(x_g, sigma, c).sum()

    def theta(teacher, fake, x_g, c_phi, c_psi, sigma, alpha):
        return rows + 0 * x_g.sum()

    monkeypatch.setattr(ablation, "fake_score_loss", psi)
    monkeypatch.setattr(ablation, "score_identity_loss", theta)
    s = ablation.Settings(batch=8, switches=("own-batch",), **ablation.SETTINGS["own-batch"])
    terms = ablation.step(s, begin(tiny_network(), s), override_labels([0], [1], 10))
    assert terms["L_psi"].item() == pytest.approx(0.01)
    assert terms["L_forget"].item() == pytest.approx(0.01) and terms["L_keep"] == 0


def test_clipping_holds_each_entry_of_both_gradients_between_minus_one_and_one():
    before, n = trained(ablation.distill, steps=1), trained(ablation.distill, ("clipping",), steps=1)
    gradients = [torch.cat([p.grad.flatten() for p in network.parameters()])
                 for network in (before.fake, before.generator, n.fake, n.generator)]
    assert gradients[0].abs().max() > 1 and gradients[1].abs().max() > 1
    assert torch.equal(gradients[2], gradients[0].clamp(-1, 1)), "no other change of the fake score's gradient"
    assert gradients[3].abs().max() == 1


def test_dropout_is_on_in_each_network_in_its_own_update_alone():
    s = ablation.Settings(batch=4, switches=("dropout",))
    n = begin(tiny_network(), s)
    ablation.prepare(n, s.switches)
    rates = [{m.dropout for m in network.modules() if isinstance(m, Block)}
             for network in (n.generator, n.fake, n.teacher, n.average)]
    assert rates == [{0.1}, {0.1}, {0.0}, {0.0}]
    calls = []
    for name in ("generator", "fake"):
        network = getattr(n, name)
        network.register_forward_hook(lambda network, *_, name=name: calls.append(
            (name, "dropout" if network.training else "no dropout", torch.is_grad_enabled())))
    ablation.step(s, n, override_labels([0], [1], 10))
    assert calls == [("generator", "dropout", True), ("generator", "no dropout", False),
                     ("fake", "dropout", True), ("fake", "no dropout", True)]


def test_official_is_every_switch_and_an_unknown_one_is_refused():
    assert ablation.expand(("official",)) == tuple(ablation.SWITCHES)
    with pytest.raises(BadInput, match="no switch dropuot"):
        ablation.expand(("dropuot",))
