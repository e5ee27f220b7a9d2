"""How the project is built: arrows go down, files stay small, the method can be pasted, an import touches no GPU."""
import ast
import copy
import graphlib
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import lab
import sfd_minimal
from conftest import ROOT, run

FLOORS = [  # from the top; a module imports from floors below its own alone
    ["lab.bench", "lab.readme"],
    ["lab.sweep", "lab.tour", "lab.label_search"],
    ["lab.prompt_methods"],
    ["lab.baselines", "lab.audit"],
    ["lab.methods", "lab.stable_diffusion"],
    ["sfd_minimal", "train_teacher", "lab.suspect"],
    ["lab.evaluate"],
    ["lab.fid", "lab.prompt_judge"],
    ["lab.judge", "lab.sample"],
    ["lab.run", "lab.convert", "lab.report"],
    ["lab.cli", "lab.checkpoint", "lab.labels", "lab.label_space"],
    ["lab.device", "lab.data", "lab.prompts", "lab.recipes", "lab.edm_pickle", "lab.figures", "lab.frechet",
     "lab.closed_form", "lab.denoisers", "edm_unet"],
    ["lab.errors"],
]
MODULES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path.read_text()
           for path in (*ROOT.glob("*.py"), *ROOT.glob("lab/*.py"))}


def imported(source, modules):
    """Which of `modules` a source imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(["lab"] * (node.level > 0) + [node.module] * (node.module is not None))
            names = [package, *(f"{package}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= modules & set(names)
    return found


def faults(sources, floors):
    """What is wrong with the arrows between modules, {name: source}: a list of words, empty if all is well."""
    floor = {name: i for i, names in enumerate(floors) for name in names}
    arrows = {name: imported(source, sources.keys()) for name, source in sources.items()}
    found = [f"{name} is on no floor" for name in sorted(arrows.keys() - floor.keys())]
    found += [f"{name} is not there" for name in sorted(floor.keys() - arrows.keys())]
    found += [f"{a} -> {b} does not go down" for a in arrows for b in sorted(arrows[a])
              if a in floor and b in floor and floor[b] <= floor[a]]
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as e:
        found.append(f"a circle: {' -> '.join(e.args[1])}")
    return found


def test_arrows_go_down():
    assert faults({name: source for name, source in MODULES.items() if name != "lab.__init__"}, FLOORS) == []
    assert len(ast.parse(MODULES["lab.__init__"]).body) == 1, "the package itself is a docstring alone"


def test_the_docstring_of_the_package_names_the_same_floors():
    lines = [re.split(r" {2,}", line.strip())[0] for line in lab.__doc__.splitlines() if line.startswith("    ")]
    named = [[word.strip("[]") for word in line.split(", ")] for line in lines]
    assert named == [[name.removeprefix("lab.") + ".py" * (not name.startswith("lab.")) for name in floor]
                     for floor in FLOORS]


GOOD = {"top": "import middle", "middle": "from lab.ground import what", "lab.ground": "import math"}
ORDER = [["top"], ["middle"], ["lab.ground"]]


@pytest.mark.parametrize("changed, says", [
    ({}, []),
    ({"lab.ground": "def f():\n    import middle"},
     ["lab.ground -> middle does not go down", "a circle: middle -> lab.ground -> middle"]),
    ({"lab.ground": "from top import x", "top": ""}, ["lab.ground -> top does not go down"]),
    ({"middle": "from lab import ground", "lab.ground": "class A:\n    def f(self):\n        from top import x"},
     ["lab.ground -> top does not go down", "a circle: top -> lab.ground -> middle -> top"]),
    ({"lab.ground": "from . import side", "lab.side": ""}, ["lab.side is on no floor"]),
    ({"lab.ground": "from .ground import what"},
     ["lab.ground -> lab.ground does not go down", "a circle: lab.ground -> lab.ground"]),
    ({"top": "import middle as m; import lab.attic", "lab.attic": "if 1:\n    import top"},
     ["lab.attic is on no floor", "a circle: lab.attic -> top -> lab.attic"]),
])
def test_a_wrong_arrow_would_be_noticed(changed, says):
    """Which circle is found first, and where its name begins, is left open."""
    found = faults(GOOD | changed, ORDER)
    circle = lambda words: next((set(w.split(": ")[1].split(" -> ")) for w in words if "circle" in w), None)
    assert [w for w in found if "circle" not in w] == [w for w in says if "circle" not in w]
    assert circle(found) == circle(says)


def test_the_root_holds_three_modules():
    assert {path.name for path in ROOT.glob("*.py")} == {"sfd_minimal.py", "edm_unet.py", "train_teacher.py"}
    assert {path.parent.name for path in ROOT.glob("*/*.py")} == {"lab", "notebooks", "tests"}


@pytest.mark.parametrize("name, lines", [("sfd_minimal", 260), ("edm_unet", 290), ("train_teacher", 220)])
def test_what_is_read_first_is_short(name, lines):
    assert MODULES[name].count("\n") <= lines


def test_the_method_s_file_is_small_and_no_line_is_long():
    assert len(MODULES["sfd_minimal"].encode()) <= 21_000
    for path in (*ROOT.glob("*.py"), *ROOT.glob("lab/*.py"), *ROOT.glob("tests/*.py")):
        for i, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 120, f"{path.name}:{i}"


def test_the_method_needs_torch_and_nothing_else():
    """Pasted, from `fake_score_loss` to the end of `sfd_step`, it takes the step that the file takes."""
    source, pasted = MODULES["sfd_minimal"], {"torch": torch}
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    first, last = functions["fake_score_loss"].lineno, functions["sfd_step"].end_lineno
    exec("\n".join(source.splitlines()[first - 1:last]), pasted)
    assert pasted.keys() - {"torch", "__builtins__"} == {"fake_score_loss", "score_identity_loss", "draw_labels",
                                                          "sfd_step"}

    class Denoiser(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(2 + 1 + 3, 2)

        def forward(self, x, sigma, c):
            return self.net(torch.cat([x, sigma.log(), c], 1))

    torch.manual_seed(0)
    start = [Denoiser() for _ in range(3)]
    s = SimpleNamespace(sigma_init=2.5, p_mean=0.0, p_std=1.2, sigma_min=0.002, sigma_max=80.0, u_max=0.8, alpha=1.2,
                        lambda_forget=0.7)

    def step(draw_labels, sfd_step):
        torch.manual_seed(1)
        generator, fake, teacher = copy.deepcopy(start)
        optimizers = [torch.optim.Adam(m.parameters(), 0.1) for m in (generator, fake)]
        labels = draw_labels(16, torch.tensor([1, 1, 2]), torch.tensor([1, 2]), torch.eye(3))
        terms = sfd_step(generator, fake, teacher, *optimizers, torch.randn(16, 2), *labels, s)
        return terms, [m.net.weight.detach() for m in (generator, fake, teacher)]

    terms, after = step(pasted["draw_labels"], pasted["sfd_step"])
    assert terms.keys() == {"L_psi", "L_keep", "L_forget"} and all(torch.isfinite(v) for v in terms.values())
    assert [torch.equal(w, m.net.weight) for w, m in zip(after, start)] == [False, False, True]
    terms_here, after_here = step(sfd_minimal.draw_labels, sfd_minimal.sfd_step)
    assert terms == terms_here and all(map(torch.equal, after, after_here))


def test_no_gpu_is_touched_by_an_import(tmp_path):
    code = ("import torch; torch.cuda.is_available = torch.cuda._lazy_init = lambda *a, **k: 1 / 0\n"
            f"import {', '.join(MODULES)}")
    run(sys.executable, "-c", code, cwd=tmp_path)
