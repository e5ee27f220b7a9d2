"""Files <-> networks. A checkpoint is a plain dict of settings and tensors, read with weights_only=True, so that no
file can run code. The one place that knows how a network is stored, and where."""
import dataclasses
import hashlib
import os
import warnings
from pathlib import Path

import torch

from edm_unet import EDMPrecond, NetSettings
from lab.data import KNOWN, class_names, data_name, misfit
from lab.device import has_fast_bf16, machine
from lab.edm_pickle import read_published
from lab.errors import BadInput

SHIPPED = Path(__file__).parent.parent / "teachers"


# --------------------------------------------------------------------------------------------------------------- files

def save_atomically(obj, path):
    """torch.save to a temporary file beside `path`, then rename: a kill or a full disk leaves the old file whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as f:
            torch.save(obj, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:  # torch's zip writer turns a full disk into a RuntimeError
        partial.unlink(missing_ok=True)
        kept = "the previous file there is unharmed" if path.exists() else "nothing was written"
        raise OSError(f"could not write {path} ({e}); {kept}") from e


def read_file(path, kind):
    """The dict in a file that `save_atomically` wrote, on the CPU.
    BadInput, in one line, if it is anything else than a `kind`."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            # torch warns of some foreign pickles before it refuses them; the refusal says enough
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged or hostile file can raise anything; whatever it is, the file is refused
        reason = ("it is empty" if path.stat().st_size == 0
                  else f"truncated, or not a checkpoint ({type(e).__name__}); nothing in it was run")
        raise BadInput(f"{path}: cannot be read: {reason}") from e
    if not isinstance(content, dict) or content.get("kind") != kind:
        found = repr(content.get("kind")) if isinstance(content, dict) else type(content).__name__
        raise BadInput(f"{path}: expected a {kind} file of this project, found {found}")
    return content


def remembered(memory, key, make, enough=lambda content: True):
    """The dict that make() gives, and what it depends on, the dict `key`; kept in the file `memory`, and taken from it
    where that has the same key and is `enough`."""
    key = {"kind": "measured", **key}
    try:
        content = read_file(memory, "measured") if Path(memory).exists() else {}
        if key.items() <= content.items() and enough(content):
            return content
    except BadInput as e:
        print(f"note: this will be measured again: {e}")
    content = key | make()
    try:
        save_atomically(content, memory)
    except OSError as e:
        print(f"note: this will be measured again next time: {e}")
    return content


def digest(*paths):
    """sha256 of the bytes of files, one after the other."""
    return hashlib.sha256(b"".join(Path(p).read_bytes() for p in paths)).hexdigest()


def in_folder(path, name):
    """The file of that name where `path` is the folder of a run, else the path itself."""
    return Path(path) / name if Path(path).is_dir() else Path(path)


def weight_files(data, what, named=""):
    """Paths of the `what` (teacher, judge, judge2, sid) of a data set that are there: the one named, else the one that
    comes with the project, for the data sets that it knows, and the one that was trained in runs/."""
    file = {"teacher": "teacher.pt", "sid": "both.pt"}.get(what, "judge.pt")
    paths = [SHIPPED / (f"{data}.pt" if what == "teacher" else f"{data}_{what}.pt")] if data in KNOWN else []
    paths += [Path("runs") / f"{data_name(data)}-{what}" / file]
    return [path for path in ([in_folder(named, file)] if named else paths) if path.exists()]


def find_weights(data, what, named=""):
    """The first of `weight_files`, None where there is none."""
    return next(iter(weight_files(data, what, named)), None)


def measured_file(path):
    """Where what is said of the network in the file at `path` is remembered."""
    return Path(path).with_name(Path(path).stem + "_measured.pt")


def known_size(data, what, kind):
    """What a folder's images were resized to for its `what`, a file of that kind that is there; None if to nothing."""
    if data in KNOWN or not (path := find_weights(data, what)):
        return None
    if size := read_file(path, kind).get("size"):
        print(f"note: images of {data} are resized to {size}x{size}, as for {path}")
    return size


# ------------------------------------------------------------------------------------------------------------ networks

def pack(model, half=False):
    """Settings and weights of an EDMPrecond as a plain dict; `half` stores the weights in float16."""
    state = {k: v.detach().to("cpu", torch.float16 if half else None) for k, v in model.state_dict().items()}
    return {"net": dataclasses.asdict(model.settings), "weights": state}


def unpack(packed):
    """The EDMPrecond that `pack` took apart, float32, on the CPU.
    BadInput where settings and weights do not fit."""
    try:
        # "folded" is a setting of earlier versions, False in all that can still be read
        settings = NetSettings(**{k: v for k, v in packed["net"].items() if k != "folded" or v})
        with torch.device("meta"):  # shapes only: settings that ask for an absurd size cost nothing
            model = EDMPrecond(settings)
        model.load_state_dict({k: v.float() for k, v in packed["weights"].items()}, assign=True)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise BadInput(f"settings and weights do not fit together: {str(e).splitlines()[0]}") from e
    return model


def load_checkpoint(path, device="cpu", data="cifar10"):
    """(denoiser, content): the EDMPrecond in a checkpoint of this project or a published edm-*.pkl, which does not say
    that it is of `data`, in eval mode, and the file's other entries. bfloat16 is on where the device computes it fast.
    BadInput, in one line, for a file that is neither."""
    if Path(path).suffix.lower() == ".pkl":
        content = read_published(path)
        content |= {"data": data, "classes": class_names(data, content["net"]["num_classes"])}
    else:
        content = read_file(path, "denoiser")
        if lacking := {"net", "weights", "data", "classes"} - content.keys():
            raise BadInput(f"{path} lacks {', '.join(sorted(lacking))}")
    try:
        model = unpack(content).to(device).eval()
    except BadInput as e:
        raise BadInput(f"{path}: {e}") from e
    model.bf16 = has_fast_bf16(device)
    return model, content


def load_teacher(path, data, device):
    """(teacher, its file's other entries and "sha256", "path"); path "": the data set's.
    BadInput where the file is no teacher of the data set."""
    found = find_weights(data, "teacher", path)
    if found is None:
        raise BadInput(f"no teacher at {path or f'runs/{data_name(data)}-teacher'}: train one with "
                       f"`python train_teacher.py --data {data}`, or name one with --teacher")
    teacher, info = load_checkpoint(found, device, data)
    if "sigma_init" in info:
        raise BadInput(f"{found} is a one-step generator, not a teacher")
    if data_name(info["data"]) != data_name(data):
        raise BadInput(f"{found} was trained on {info['data']}, not on {data}: say --data {info['data']}")
    if differs := misfit(data, info["classes"], teacher.shape, info.get("size")):
        raise BadInput(f"{found} {differs}: train another with `python train_teacher.py --data {data}`")
    return teacher.requires_grad_(False), info | {"sha256": digest(found), "path": found}


def un_erased(info, device):
    """(path, generator, its file's other entries) of the one-step generator that is there, forgot nothing and is of the
    teacher with the entries `info`; None where there is none."""
    for path in weight_files(info["data"], "sid"):
        generator, content = load_checkpoint(path, device)
        if content["teacher_sha256"] == info["sha256"]:
            return path, generator, content


def load_start(path, generator, fake, sigma_init, info=None):
    """Load generator and fake score from the both.pt of an earlier run at `path`; `info` as of `load_teacher`.
    BadInput where it is of another network, noise level or data set; a note where it is of another teacher."""
    path = in_folder(path, "both.pt")
    content = read_file(path, "denoiser")
    if "fake" not in content:
        raise BadInput(f"{path} holds no fake score: --init-from takes the both.pt of a run, "
                       "or teachers/<data>_sid.pt")
    networks = unpack(content), unpack({**content, "weights": content["fake"]})
    if info and data_name(content.get("data", "")) != data_name(info["data"]):
        raise BadInput(f"{path} is of {content.get('data')}, not of {info['data']}")
    if networks[0].settings != generator.settings:
        raise BadInput(f"{path} is of another network than the teacher")
    if content.get("sigma_init", sigma_init) != sigma_init:
        raise BadInput(f"{path} was distilled at --sigma-init {content['sigma_init']}: say so")
    if info and content.get("teacher_sha256") != info["sha256"]:
        print(f"note: {path} was distilled from another teacher than {info['path']}, which is used from here on")
    for model, start in zip((generator, fake), networks):
        model.load_state_dict(start.state_dict())


def save_generator(run, info, c_f, c_o, generator, fake):
    """generator.pt of a `Run`, the one-step generator alone, and both.pt, with its fake score in half precision.
    info as of `load_teacher`, c_f and c_o as of `label_numbers`. Returns what both files say beside the weights."""
    device = next(generator.parameters()).device
    content = {"kind": "denoiser", "data": info["data"], "classes": info["classes"], "size": info.get("size"),
               "sigma_init": run.s.sigma_init, "forget": c_f, "to": c_o, "teacher_sha256": info["sha256"],
               "seconds": run.seconds,
               "settings": dataclasses.asdict(run.s), "machine": machine(device)}
    save_atomically(content | pack(generator), run.out / "generator.pt")
    save_atomically(content | pack(generator, half=True) | {"fake": pack(fake, half=True)["weights"]},
                    run.out / "both.pt")
    return content
