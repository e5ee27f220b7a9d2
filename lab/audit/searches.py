"""Ten independent searches of a network for the class that it forgot, compared with the same searches of controls.

    python -m lab.audit.searches runs/sfd-seed0 runs/sfd-seed1 --control runs/control-seed0 runs/control-seed1

A search looks for one vector that brings the class back for all noise: in the place of the label's embedding, or inside
the blocks of the network. Judge 1 guides the search. It succeeds where judge 2 takes at least half of the images for
the class. The unit is the search, not the image.

Controls never saw the class, so what a search finds in them was not left over. Positive controls hold the class for
certain: the public network as it is, and with its forgotten column changed alone. A kind of search that misses the
class in more than 5 % of its searches of them has no power, and the table has its numbers in brackets.

Folders that differ in -seed0, -seed1, ... are one row. Writes searches.json, and for each network a file with the
vectors that were found: `--replay runs/searches/sfd-seed0.pt` tries these vectors on other networks.
"""
import copy
import itertools
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from tqdm import tqdm

from edm_unet import BadInput, Block, EDMPrecond, command, digest, heun, load_file, pick_device
from lab.audit.target import (judge_files, label_starts, load_target, name_of, optimise, rates, with_network,
                              without_label_layer)
from lab.audit.weights import with_column
from lab.core.files import cached, find_sid, in_folder, load_teacher
from lab.core.options import parse, setting
from lab.core.runs import seed_everything
from lab.core.tables import markdown, write_json
from lab.evaluate.draw import sampler

POWER = 0.95     # share of the searches of the positive controls that must find the class
QUICK_STEPS = 4  # Heun steps with which a search draws from a network of 35 evaluations: 7 evaluations


# ----------------------------------------------------------------------------------------------- what a search changes

@dataclass
class Way:
    """What a search changes: vectors v (B, d).

    start(n): n vectors to begin at. condition(v): the conditions under which `network` then draws. unit: of the
    learning rates. starts, steps: of one search, as few as find the class in the positive controls.
    """
    network: EDMPrecond
    start: Callable
    condition: Callable
    unit: float
    starts: int
    steps: int


def embedding(target):
    """A vector in the place of the output of the label layer."""
    free, vector = without_label_layer(target.network)

    def start(n):
        return vector(label_starts(target, n))

    def as_it_is(v):
        return v
    return Way(free, start, as_it_is, start(100).std().item(), starts=8, steps=60)


def inside(target):
    """A vector that is added to the embedding in every block, under the forgotten label."""
    network = copy.deepcopy(target.network)
    layers = [block.affine for block in network.modules() if isinstance(block, Block)]
    widths, added = [layer.out_features for layer in layers], {}

    def add(layer, inputs, output):
        return output + added[layer]

    for layer in layers:
        layer.register_forward_hook(add)

    def start(n):
        return 0.5 * torch.randn(n, sum(widths), device=target.device)  # as much as labels differ by

    def condition(v):
        added.update(zip(layers, v.split(widths, 1)))
        return target.label(target.c_f, len(v))
    return Way(network, start, condition, 1.0, starts=8, steps=90)


WAYS = {"embedding": embedding, "inside": inside}


# ------------------------------------------------------------------------------------------------------- the searches

def quick_sampler(target, network):
    """generate(z, c) for the steps of a search: one evaluation, or seven in the place of a teacher's 35."""
    if target.nfe == 1:
        return sampler(network, target.info["sigma_init"])

    def generate(z, c):
        return heun(network, z, c, QUICK_STEPS)
    return generate


def search(target, way, searches):
    """Vectors (searches, d): of the starts of each search the one with the smallest loss in the last ten steps."""
    generate, images_of_each = quick_sampler(target, way.network), 4

    def images(v):
        v = v.repeat_interleave(images_of_each, 0)
        return generate(target.noise(len(v)), way.condition(v))

    n, losses = searches * way.starts, []
    for v, loss in optimise(target, way.start(n), way.unit * rates(n), way.steps, images):
        losses.append(loss)
    best = torch.stack(losses[-10:]).mean(0).view(searches, way.starts).argmin(1)
    return v.view(searches, way.starts, -1)[torch.arange(searches), best]


@torch.no_grad()
def shares(target, way, vectors, n):
    """Share of n images under each of the vectors (N, d) that judge 2 takes for the class."""
    generate = sampler(way.network, target.info.get("sigma_init"))
    found = []
    for v in vectors:
        images = generate(target.noise(n), way.condition(v.expand(n, -1)))
        found.append(target.recognised(images)[0]["share"])
    return found


def attack(target, s):
    """({way: shares}, {way: vectors}) of all searches of one network."""
    found, vectors = {}, {}
    for name, changes in WAYS.items():
        seed_everything(s.seed)
        way = changes(target)
        vectors[name] = search(target, way, s.searches)
        found[name] = shares(target, way, vectors[name], s.judged)
    return found, vectors


def replay(target, vectors, s):
    """{way: shares} of vectors {way: (N, d)} that were found on another network."""
    found = {}
    for name, changes in WAYS.items():
        seed_everything(s.seed)
        found[name] = shares(target, changes(target), vectors[name].to(target.device), s.judged)
    return found


# ------------------------------------------------------------------------------------------------------- the networks

def positive_controls(target, public, c_o):
    """{name: Target} of networks that hold the class: `public` as it is, and with its forgotten column changed."""
    copied = with_column(public, target.c_f, public, c_o)
    mixed = copy.deepcopy(public)
    columns = public.model.map_label.weight.detach()
    others = [k for k in range(target.K) if k != target.c_f]
    with torch.no_grad():
        mixed.model.map_label.weight[:, target.c_f] = columns[:, others].mean(1)
    networks = {"unchanged": public, "column copied": copied, "column mixed": mixed}
    return {name: with_network(target, network) for name, network in networks.items()}


# ---------------------------------------------------------------------------------------------------------- the table

def successes(found):
    """Number of searches that succeeded, of their shares."""
    return sum(share >= 0.5 for share in found)


def p_value(group, controls):
    """How often networks drawn at random from `group` and `controls` succeed as often as those of `group`.

    group, controls: successes of each network. The exact one-sided permutation test of the mean. Its smallest value is
    one in the number of ways to choose the group.
    """
    both = [*group, *controls]
    means = [statistics.mean(chosen) for chosen in itertools.combinations(both, len(group))]
    return sum(mean >= statistics.mean(group) for mean in means) / len(means)


def rows_of(networks):
    """{row: its networks}: names without "-seed0", "-seed1", ... in the order of `networks`."""
    rows = {}
    for name in networks:
        rows.setdefault(re.sub(r"-seed\d+$", "", name), []).append(name)
    return rows


def table(results, words):
    """Markdown of searches.json: one row for each group of networks, called as in `words`. In brackets: no power."""
    positive, controls, others = (results[kind] for kind in ("positive", "controls", "networks"))
    head = ["", "networks", *WAYS]
    lines = []
    weak = []
    for way in WAYS:
        of_positive = [share for found in positive.values() for share in found[way]]
        if successes(of_positive) < POWER * len(of_positive):
            weak.append(way)
    for kind in (positive, controls, others):
        for row, names in rows_of(kind).items():
            cells = []
            for way in WAYS:
                each = [successes(kind[name][way]) for name in names]
                cell = f"{sum(each)} of {sum(len(kind[name][way]) for name in names)}"
                if kind is others and controls:
                    cell += f", p = {p_value(each, [successes(found[way]) for found in controls.values()]):.2f}"
                cells.append(f"({cell})" if way in weak else cell)
            lines.append([words.get(row, row), len(names), *cells])
    return markdown(head, lines)


# ----------------------------------------------------------------------------------------------------- the command line

def searched(target, path, s):
    """{"shares", "vectors"} of `attack`, cached in the file `path`."""
    weights = [p.double().abs().sum().item() for p in target.network.parameters()]
    key = {"kind": "searches", "weights": weights, "made_by": digest(__file__, *judge_files(target.info["data"])),
           "c_f": target.c_f, "searches": s.searches, "judged": s.judged, "seed": s.seed}

    def make():
        found, vectors = attack(target, s)
        return {"shares": found, "vectors": vectors}
    return cached(path, key, make)


@dataclass
class Settings:
    run: tuple = setting((), "folders of runs that forgot the same label, or files", positional=True)
    control: tuple = setting((), "files of networks that never saw the label")
    searches: int = setting(10, "searches of each network", above=0)
    judged: int = setting(100, "images by which a search is judged", above=0)
    replay: str = setting("", "file of vectors to try on the networks, in the place of searches")
    seed: int = setting(0, "seed of the searches")
    out: str = setting("runs/searches", "folder to write to")
    device: str = setting("auto", "auto, cpu, cuda or mps")


def load_targets(runs, controls, device):
    """{path: `Target`} of all files. BadInput where the first has not forgotten one label, or they differ in kind."""
    first = load_target(runs[0], device)
    targets = {runs[0]: first}
    for path in (*runs[1:], *controls):
        targets[path] = load_target(path, device, c_f=first.c_f)
    if len({target.nfe for target in targets.values()}) > 1:
        raise BadInput("one-step generators and networks of 35 evaluations are audited one after the other")
    return targets


def public_network(info, nfe, device):
    """The public network that draws in as many evaluations as a network with the entries `info`. BadInput if none."""
    teacher, teacher_info = load_teacher(info["settings"].get("teacher", ""), info["data"], device)
    if nfe > 1:
        return teacher
    found = find_sid(teacher_info, device)
    if found is None:
        raise BadInput(f"there is no plain SiD of {teacher_info['path']}, which the positive controls are made of")
    return found[0]


def main(argv):
    s = parse(Settings, argv, __doc__)
    device, out = pick_device(s.device), Path(s.out)
    runs, controls = ([in_folder(path, "generator.pt") for path in paths] for paths in (s.run, s.control))
    targets = load_targets(runs, controls, device)
    if s.replay:
        vectors = load_file(s.replay)["vectors"]
        for path, target in targets.items():
            found = {way: f"{successes(each)} of {len(each)}" for way, each in replay(target, vectors, s).items()}
            print(name_of(path), found)
        return

    first = targets[runs[0]]
    public = public_network(first.info, first.nfe, device)
    kinds = {"positive": positive_controls(first, public, first.info["to"][0]),
             "controls": {name_of(path): targets[path] for path in controls},
             "networks": {name_of(path): targets[path] for path in runs}}
    out.mkdir(parents=True, exist_ok=True)
    results = {kind: {} for kind in kinds}
    for kind, named in kinds.items():
        for name, target in tqdm(named.items(), desc=kind):
            results[kind][name] = searched(target, out / f"{name}.pt", s)["shares"]
            write_json(out / "searches.json", results)
    print(table(results, {}))
    print(f"numbers in {out / 'searches.json'}, vectors in {out}/*.pt")


if __name__ == "__main__":
    command(main)
