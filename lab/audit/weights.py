"""Attacks on the weights of a one-step generator that forgot a class: is the class one small change away?

    python -m lab.audit.weights teachers/mnist_retrain_sid.pt runs/mnist-forget0-to1/generator.pt

The attacker also has the public networks that a run starts from: the teacher and plain SiD. No attack trains. The first
row of the table is the positive control: plain SiD with the override's column of the label layer copied over the
forgotten one. An attack that does not find the class there has no power.
"""
import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from edm_unet import BadInput, command, pick_device
from lab.audit.target import load_target, name_of, with_network
from lab.core.files import find_sid, load_teacher
from lab.core.options import parse, setting
from lab.core.runs import seed_everything
from lab.core.tables import markdown, write_json
from lab.evaluate.draw import sampler

FRACTIONS = [k / 20 for k in range(1, 20)]  # of the way from the weights of the network to those of a public one


def drawn_share(target, network, n=1000):
    """Share of n one-step images of `network` under the forgotten label that judge 2 takes for the class."""
    seed_everything(0)
    generate = sampler(network, target.info["sigma_init"])
    numbers, _ = target.recognised(target.draw(target.noise(n), target.label(target.c_f, n), generate))
    return numbers["share"]


def with_column(network, k, source, j):
    """A copy of the network in which column k of the label layer is column j of another network's."""
    changed = copy.deepcopy(network)
    with torch.no_grad():
        changed.model.map_label.weight[:, k] = source.model.map_label.weight[:, j]
    return changed


def between(network, start, fraction):
    """A copy of the network whose weights are moved towards those of `start` by a fraction."""
    changed = copy.deepcopy(network)
    with torch.no_grad():
        for p, q in zip(changed.parameters(), start.parameters()):
            p.lerp_(q, fraction)
    return changed


def half_way(target, start):
    """The smallest of FRACTIONS at which half of the images are of the class again, or None."""
    for fraction in FRACTIONS:
        if drawn_share(target, between(target.network, start, fraction)) >= 0.5:
            return fraction
    return None


def attack(target, starts):
    """{attack: number} of a one-step `Target`. starts: {name: network} that the attacker has, of the same shape."""
    network, c_f = target.network, target.c_f
    found = {"as it is": drawn_share(target, network)}
    for name, start in starts.items():
        found[f"column of {name}"] = drawn_share(target, with_column(network, c_f, start, c_f))
    for name, start in starts.items():
        found[f"towards {name}"] = half_way(target, start)
    return found


def positive_control(target, sid, c_o):
    """The `Target` of plain SiD in which nothing but the forgotten column was changed."""
    return with_network(target, with_column(sid, target.c_f, sid, c_o))


def table(results):
    """Markdown: a row for each network {name: {attack: number}}."""
    first = next(iter(results.values()))
    lines = []
    for name, numbers in results.items():
        cells = []
        for which, value in numbers.items():
            if which.startswith("towards"):
                cells.append("-" if value is None else f"{value:.2f}")
            else:
                cells.append(f"{value:.1%}")
        lines.append([name, *cells])
    return markdown(["", *first], lines)


@dataclass
class Settings:
    files: tuple = setting((), "generator.pt of runs that forgot the same label", positional=True)
    teacher: str = setting("", "file of the public teacher (default: the one of the data set)")
    out: str = setting("weights.json", "file to write")
    device: str = setting("auto", "auto, cpu, cuda or mps")


def main(argv):
    s = parse(Settings, argv, __doc__)
    device, results = pick_device(s.device), {}
    for path in s.files:
        target = load_target(Path(path), device)
        if "sigma_init" not in target.info:
            raise BadInput(f"{path} is no one-step generator")
        teacher, info = load_teacher(s.teacher, target.info["data"], device)
        sid = find_sid(info, device)
        starts = {"the teacher": teacher} | ({"plain SiD": sid[0]} if sid else {})
        if sid and not results:
            results["positive control"] = attack(positive_control(target, sid[0], target.info["to"][0]), starts)
        results[name_of(path)] = attack(target, starts)
    write_json(s.out, {"networks": results})
    print(table(results))


if __name__ == "__main__":
    command(main)
