"""Forgetting between the labels too, not at the ten one-hot ones alone: an option, not in the paper. What it does and
what it does not: results/label_search.md."""
import torch


def drawn_anywhere(n, K):
    """(n, K) label vectors, a third each: mixes of labels, labels with noise, and vectors of up to four times a label's
    length."""
    mixes = torch.distributions.Dirichlet(torch.full((K,), 0.5)).sample((n,))
    noisy = torch.eye(K)[torch.randint(K, (n,))] + 0.3 * torch.randn(n, K)
    far = 4 * torch.rand(n, 1) * torch.nn.functional.normalize(torch.randn(n, K))
    return torch.stack([mixes, noisy, far])[torch.randint(3, (n,)), torch.arange(n)]


def anywhere(ask, share, c_f, c_o):
    """`ask`(batch) -> c_phi, c_psi, forgotten, with a `share` of the rows anywhere in label space: generator and fake
    score are asked about v (n, K), the teacher about v M, which moves the coordinate of c_f[i] onto c_o[i]; at a label
    to forget that is the override. These rows count as forgotten."""
    def ask_anywhere(batch):
        c_phi, c_psi, forgotten = ask(batch)
        n, K = round(share * batch), c_psi.shape[1]
        v, M = drawn_anywhere(n, K).to(c_psi), torch.eye(K).to(c_psi)
        M[c_f] = M[c_o]
        of_all = lambda rows, of: torch.cat([rows, of[n:]])
        return of_all(v @ M, c_phi), of_all(v, c_psi), of_all(torch.ones_like(forgotten[:n]), forgotten)
    return ask_anywhere


@torch.no_grad()
def tie(network, c_f, c_o):
    """Column c_o of the label embedding over column c_f: exactly c_o's images under c_f. As the last step of forgetting
    it takes what no training had touched from a search; alone it forgets nothing, c_f is one column away."""
    network.model.map_label.weight[:, c_f] = network.model.map_label.weight[:, c_o]
