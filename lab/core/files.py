"""Where teachers, judges and generators lie, and reading them. `edm_unet.load_network` reads a network's file."""
from pathlib import Path

from edm_unet import BadInput, command_line, digest, load_file, load_network, save_file
from lab.core.images import data_name, misfit
from train_teacher import TORCHVISION

SHIPPED = Path(__file__).parent.parent.parent / "teachers"
NAMES = {"teacher": "teacher.pt", "sid": "both.pt", "judge": "judge.pt", "judge2": "judge.pt"}


def in_folder(path, name):
    """The file of that name where `path` is the folder of a run, else the path itself."""
    return Path(path) / name if Path(path).is_dir() else Path(path)


def weight_files(data, what):
    """Existing files of a data set's `what` (teacher, sid, judge or judge2): first the one that comes with the project,
    then the one trained in runs/."""
    paths = [Path("runs") / f"{data_name(data)}-{what}" / NAMES[what]]
    if Path(data).name == data:
        paths.insert(0, SHIPPED / (f"{data}.pt" if what == "teacher" else f"{data}_{what}.pt"))
    return [path for path in paths if path.exists()]


def find_weights(data, what):
    """The first of `weight_files`, or None."""
    found = weight_files(data, what)
    return found[0] if found else None


def load_any(path, device="cpu", data="cifar10"):
    """`edm_unet.load_network`, which also takes a published edm-*.pkl: those do not name their data set."""
    if Path(path).suffix.lower() == ".pkl":
        from lab.adapters.pickles import load_published
        return load_published(path, device, data)
    return load_network(path, device)


def train_command(data):
    """The command that trains the teacher of a data set."""
    return command_line("train_teacher.py", "--data", data)


def load_teacher(path, data, device):
    """(teacher, info) from a file, or where `path` is empty from the data set's. info: `edm_unet.load_network`.

    BadInput where the file is no teacher, or one of another data set.
    """
    path = in_folder(path, "teacher.pt") if path else find_weights(data, "teacher")
    if path is None:
        raise BadInput(f"no teacher for {data}: train one with `{train_command(data)}`, or name its file with "
                       "--teacher")
    teacher, info = load_any(path, device, data)
    if "sigma_init" in info:
        raise BadInput(f"{path} is a one-step generator, not a teacher")
    if data_name(info["data"]) != data_name(data):
        raise BadInput(f"{path} was trained on {info['data']}, not on {data}")
    differs = misfit(data, info["classes"], teacher.shape, info.get("size"))
    if differs:
        raise BadInput(f"{path} {differs}: train another with `{train_command(data)}`")
    return teacher, info


def find_sid(info, device, load=load_network):
    """(generator, info) of plain SiD, the one-step generator of this teacher that forgot nothing, or None.

    info: the entries of the teacher's file.
    """
    for path in weight_files(info["data"], "sid"):
        generator, found = load(path, device)
        if found["teacher_sha256"] == info["sha256"]:
            return generator, found
    return None


def image_size(data, what):
    """The size to which the images of a folder were resized for its teacher or judge; None where there is neither."""
    path = None if data in TORCHVISION else find_weights(data, what)
    size = path and load_file(path).get("size")
    if size:
        print(f"note: images of {data} are resized to {size}x{size}, as for {path}")
    return size


def cached(path, key, make, enough=lambda content: True):
    """The dict of make(), cached in the file `path` with the dict `key` of everything that it depends on.

    The cache is used where it has the same key and is `enough`. A damaged cache is made again, with a note.
    """
    try:
        content = load_file(path) if Path(path).exists() else {}
        if content and key.items() <= content.items() and enough(content):
            return content
    except BadInput as e:
        print(f"note: {e}; it is made again")
    content = {**key, **make()}
    try:
        save_file(path, content)
    except OSError as e:
        print(f"note: {e}")
    return content


def measured_file(path):
    """The file in which the metrics of the network at `path` are cached."""
    return Path(path).with_name(Path(path).stem + "_measured.pt")


def save_run(run, content, average, fake, pack):
    """generator.pt and both.pt of a finished `lab.core.runs.Run`, as sfd_minimal.py writes them."""
    save_file(run.out / "generator.pt", {**content, **pack(average)})
    save_file(run.out / "both.pt", {**content, **pack(average, half=True), "fake": pack(fake, half=True)["weights"]})
