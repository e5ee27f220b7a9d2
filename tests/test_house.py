"""The project is built as lab/README.md says: imports go down only, and three files at the root stand alone."""
import ast
import graphlib
import re
import sys

import pytest

from conftest import ROOT, run

FLOORS = [  # from the ground up; each string is a floor of rooms, and a room imports from its own and from floors below
    "edm_unet",
    "sfd_minimal, train_teacher",
    "lab.core",
    "lab.adapters",
    "lab.evaluate lab.judge lab.sample lab.fid",  # one room
    "lab.distill",
    "lab.baselines, lab.audit, lab.adapters.stable_diffusion, lab.ablation, lab.clean",
    "lab.prompts",
    "lab.report lab.readme lab.movie lab.check lab.notebook",
]
UPWARDS = {  # imports inside of functions, of what is not needed to import or train
    ("sfd_minimal", "lab.evaluate"),
    ("train_teacher", "lab.core.images"),
    ("lab.core.files", "lab.adapters.pickles"),
}


def module_name(path):
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8"))
           for path in (*ROOT.glob("*.py"), *ROOT.glob("lab/**/*.py")) if module_name(path) != "lab"}


def imported(nodes):
    """Modules of the project that the import statements among nodes of a syntax tree name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


def place(name):
    """(floor, room) of a module: those of the longest name that it begins with."""
    places = {}
    for floor, rooms in enumerate(FLOORS):
        for room in rooms.split(", "):
            places.update({prefix: (floor, room) for prefix in room.split()})
    found = [prefix for prefix in places if name == prefix or name.startswith(prefix + ".")]
    assert found, f"{name} is in no room"
    return places[max(found, key=len)]


def test_imports_go_down_only():
    arrows = {name: imported(tree.body) for name, tree in MODULES.items()}
    for name in arrows:
        floor, room = place(name)
        for other in arrows[name]:
            other_floor, other_room = place(other)
            assert other_room == room or other_floor < floor, f"{name} imports {other}"
    graphlib.TopologicalSorter(arrows).prepare()  # CycleError


def test_imports_inside_of_functions_are_few():
    upwards = set()
    for name, tree in MODULES.items():
        for other in imported(ast.walk(tree)) - imported(tree.body):
            if place(other)[1] != place(name)[1] and place(other)[0] >= place(name)[0]:
                upwards.add((name, other))
    assert upwards == UPWARDS


@pytest.mark.parametrize("name, allowed", [("edm_unet", set()), ("sfd_minimal", {"edm_unet"}),
                                           ("train_teacher", {"edm_unet"})])
def test_the_files_at_the_root_import_edm_unet_alone(name, allowed):
    assert imported(MODULES[name].body) == allowed
    assert {path.stem for path in ROOT.glob("*.py")} == {"edm_unet", "sfd_minimal", "train_teacher"}


def test_an_import_touches_no_gpu(tmp_path):
    code = ("import torch; torch.cuda.is_available = torch.cuda._lazy_init = lambda *a, **k: 1 / 0\n"
            f"import {', '.join(MODULES)}")
    run(sys.executable, "-c", code, cwd=tmp_path)


# --------------------------------------------------------------------------------------------- packages, paths, pages

PACKAGES = {"PIL": "pillow", "torch_fidelity": "torch-fidelity", "nbformat": "nbclient", "IPython": "ipykernel"}


def test_each_requirement_has_a_reason_and_each_import_a_requirement():
    listed = set()
    for path in (ROOT / "requirements.txt", ROOT / "lab" / "requirements.txt"):
        for line in path.read_text().splitlines():
            assert re.match(r"^[a-z-]+>=[\d.]+ +# \S", line), line
            listed.add(line.split(">=")[0])
    for path in (*ROOT.glob("*.py"), *ROOT.glob("lab/**/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("notebooks/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"lab"}:
                own = (ROOT / f"{name}.py", path.parent / f"{name}.py", ROOT / "notebooks" / f"{name}.py")
                assert any(file.exists() for file in own) or PACKAGES.get(name, name) in listed, (path.name, name)


PAGES = [ROOT / "README.md", *ROOT.glob("*/*.md")]


def test_no_path_of_a_machine_is_committed():
    for path in (*PAGES, *ROOT.glob("*.py"), *ROOT.glob("lab/**/*.py"), *ROOT.glob("notebooks/*"),
                 *ROOT.glob("results/*.json"), *ROOT.glob("results/*.csv")):
        if path.is_file():
            assert not re.search(r"/(tmp|work|root|home|Users)/", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text):
        assert (page.parent / name).exists(), name
    for name in re.findall(r"`((?:lab|teachers|results|notebooks|tests)/[\w./-]+)`(?!\s+of\s+commit)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`python -m (lab[\w.]*)", text):
        assert name in MODULES or f"{name}.__main__" in MODULES, name
