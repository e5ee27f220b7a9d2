"""Forgetting between the labels too, not at the one-hot ones alone: an option, not in the paper. What it does and what
it does not: results/label_search.md."""
import torch


def mixes(n, K, concentration=1.0):
    """(n, K) random mixes of labels, Dirichlet; on the CPU, as not every device draws them."""
    return torch.distributions.Dirichlet(torch.full((K,), concentration)).sample((n,))


def drawn_anywhere(n, K):
    """(n, K) label vectors, a third each: mixes of labels, labels with noise, and vectors of up to four times a label's
    length."""
    mixed = mixes(n, K, 0.5)
    noisy = torch.eye(K)[torch.randint(K, (n,))] + 0.3 * torch.randn(n, K)
    far = 4 * torch.rand(n, 1) * torch.nn.functional.normalize(torch.randn(n, K))
    return torch.stack([mixed, noisy, far])[torch.randint(3, (n,)), torch.arange(n)]


def anywhere(ask, share, M):
    """`ask`(batch) -> c_phi, c_psi, forgotten, with a `share` of the rows anywhere in label space: generator and fake
    score are asked about v (n, K), the teacher about v M. Row k of M (K, K) is what it is asked about for label k, so
    that M moves the coordinate of each label to forget onto its override's. These rows count as forgotten."""
    def ask_anywhere(batch):
        c_phi, c_psi, forgotten = ask(batch)
        v = drawn_anywhere(n := round(share * batch), len(M)).to(M)
        of_all = lambda rows, of: torch.cat([rows, of[n:]])
        return of_all(v @ M, c_phi), of_all(v, c_psi), of_all(torch.ones_like(forgotten[:n]), forgotten)
    return ask_anywhere


@torch.no_grad()
def tie(network, c_f, c_o):
    """Column c_o of the label embedding over column c_f: exactly c_o's images under c_f. As the last step of forgetting
    it takes what no training had touched from a search; alone it forgets nothing, c_f is one column away."""
    network.model.map_label.weight[:, c_f] = network.model.map_label.weight[:, c_o]
