"""How long does a label vector have to be searched for, until a one-step generator draws what it has forgotten?

    python -m lab.label_search --network runs/mnist-forget0-to1/generator.pt teachers/mnist_retrain_sid.pt --tie

16 starts: the even mix of labels, random mixes, and vectors of two and four times a label's length. Adam, at rates of
0.02 to 0.15, guided by judge A on 16 fresh images a start and step. After each number of steps judge B looks at 100
images under each vector. With --tie each network is searched once more with the column of the forgotten label
copied from its override's: then no label vector says anything that the others cannot say.

The file of results keeps what it has of other networks and other seeds; table and figure are of those that were named.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from lab.cli import check_ranges, command, parse, setting
from lab.device import machine, pick_device, seed_everything
from lab.errors import BadInput
from lab.figures import search_figure
from lab.label_space import tie
from lab.report import markdown
from lab.sample import in_float32
from lab.suspect import Suspect, climb, for_all_z, label_starts, rates

LOOKS = (25, 50, 75, 100, 150, 250)  # steps after which judge B looks
STARTS, PER_START, SEEN = 16, 16, 100


def search(s, looks=LOOKS):
    """{steps: {"share": of the vector that judge A is surest of, "most": of any, "found": how many vectors show c_f in
    more than half of their images}}; shares are judge B's, of SEEN images."""
    asked, out = for_all_z(s, s.generate, PER_START), {}
    way = climb(s, label_starts(s, STARTS), rates(STARTS), max(looks), asked)
    for step, (found, loss) in enumerate(tqdm(way, total=max(looks), desc="searching", leave=False), 1):
        if step in looks:
            with in_float32(s.network):
                shares = [s.seen(s.draw(s.noise(SEEN), v.expand(SEEN, -1)))[0]["share"] for v in found]
            out[step] = {"share": shares[loss.argmin()], "most": max(shares), "found": sum(p > 0.5 for p in shares)}
    return out


def read(path):
    """[(name, numbers)] of every search in the file; none where there is no file."""
    return json.loads(path.read_text()) if path.exists() else []


def table(results):
    """Markdown: judge B's share of images under the vector that judge A is surest of, and the starts that found it."""
    words = lambda name, of: name + ", tied" * of["tied"] + f", starts {of['seed']}" * bool(of["seed"])
    rows = [[words(name, of), *(f"{at['share']:.0%}, {at['found']} of {STARTS}" for at in of["after"].values())]
            for name, of in results]
    return markdown(["", *(f"{steps} steps" for steps in results[0][1]["after"])], rows)


@dataclass
class Settings:
    network: tuple = setting((), "files of one-step generators that have forgotten one label")
    tie: bool = setting(False, "search each once more, its forgotten label's column copied from the override's")
    seed: int = setting(0, "of the starts and of the noise", at_least=0, below=2 ** 32)
    device: str = setting("auto", "auto, cpu, cuda or mps")
    out: str = setting("", "file for the numbers, the figure beside it (default: results/mnist_label_search.json)")

    def __post_init__(self):
        check_ranges(self)
        if not self.network:
            raise BadInput("--network takes the files to search")


def main(argv):
    s = parse(Settings, argv, __doc__)
    path, results = Path(s.out or "results/mnist_label_search.json"), []
    before, key = read(path), lambda of: (of[0], of[1]["tied"], of[1]["seed"])
    for file in s.network:
        suspect = Suspect(file, pick_device(s.device))
        if suspect.nfe > 1:
            raise BadInput(f"{file} is no one-step generator")
        if s.tie and -1 in suspect.evaluator.c_o:
            raise BadInput(f"{file} draws a random label instead: there is no column to tie the forgotten one to")
        c_f, c_o, weight = suspect.evaluator.c_f, suspect.evaluator.c_o, suspect.network.model.map_label.weight
        already = torch.equal(weight[:, c_f], weight[:, c_o])  # by --anywhere
        for tied in (True,) if already else (False, True)[:1 + s.tie]:
            if tied:
                tie(suspect.network, c_f, c_o)
            seed_everything(s.seed)
            name = Path(file).parent.name if Path(file).stem == "generator" else Path(file).stem
            results.append((name, {"tied": tied, "seed": s.seed, "after": search(suspect),
                                   "machine": machine(suspect.device)}))
            path.parent.mkdir(parents=True, exist_ok=True)
            others = [of for of in before if key(of) not in map(key, results)]
            path.write_text(json.dumps(others + results, indent=1) + "\n")
    search_figure(results, path.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    command(main)
