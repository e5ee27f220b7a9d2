"""Read the published EDM checkpoints (edm-*.pkl) without running the code in them.

Such a file is a pickle that carries, and would execute, its own source code. The unpickler here knows the ten names
that such a file needs, and gives each a harmless meaning. Of these networks, this project has the DDPM++ of the files
*-cond-vp.pkl.
"""
import io
import math
import pickle
import struct
from pathlib import Path
from reprlib import repr as short  # of what a hostile file may have made long

import torch

from edm_unet import BadInput, digest, has_fast_bf16, unpack

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


# ------------------------------------------------------------------------------------------------------- the unpickler

class _State(dict):
    """The attributes of a pickled object. Stands in for every class of the official code."""

    def __setstate__(self, state):
        self.update(state)


class _DType(str):
    """The name of a numpy type."""

    def __new__(cls, name, *_):
        return super().__new__(cls, name)

    def __setstate__(self, state):
        if state[1] != "<":
            raise pickle.UnpicklingError("a big-endian numpy type")


def _persistent_object(meta):
    return _State(meta["state"], class_name=meta["class_name"])


def _storage(data):
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage, offset, size, stride, requires_grad, hooks, metadata=None):
    if hooks:
        raise pickle.UnpicklingError("a tensor with hooks")
    data = storage._untyped_storage
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    inside = (last + 1) * storage.dtype.itemsize <= data.nbytes()
    repeats = math.prod(size) > data.nbytes()  # by a stride of 0
    if min((offset, *size, *stride)) < 0 or len(size) != len(stride) or not inside or repeats:
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} reaches beyond its storage "
                                     f"of {data.nbytes()} bytes")
    return torch.tensor([], dtype=storage.dtype).set_(data, offset, size, stride)


def _parameter(data, requires_grad, hooks):
    return data


def _scalar(dtype, data):
    if dtype != "f8":
        raise pickle.UnpicklingError(f"a numpy scalar of type {dtype}")
    return struct.unpack("<d", data)[0]


class _Unpickler(pickle.Unpickler):
    """Reads plain containers and tensors. UnpicklingError for every name that is not in MEANINGS."""
    MEANINGS = {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
        ("collections", "OrderedDict"): dict,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch.storage", "_load_from_bytes"): _storage,
        ("torch.nn.modules.container", "ModuleDict"): _State,
        ("numpy._core.multiarray", "scalar"): _scalar,
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy", "dtype"): _DType,
        ("dnnlib.util", "EasyDict"): _State,
    }

    def find_class(self, module, name):
        if (module, name) not in self.MEANINGS:
            raise pickle.UnpicklingError(f"the file needs {module}.{name}, which no EDM checkpoint needs")
        return self.MEANINGS[module, name]

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("the file refers to data outside itself")


# --------------------------------------------------------------------------------------------------------- the network

DDPMPP = {  # options of the official SongUNet that make it a DDPM++, not an NCSN++. They are its defaults too
    "embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard", "channel_mult_noise": 1,
    "resample_filter": [1, 1],
}
DEFAULTS = {"model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4, "attn_resolutions": [16],
            "dropout": 0.1}


def _check_kind(net, unet):
    """Raise ValueError, with the name of what differs, where the network is no label-conditional DDPM++ of EDM."""
    for part, expected in ((net, "EDMPrecond"), (unet, "SongUNet")):
        if part["class_name"] != expected:
            raise ValueError(f"the file holds a {short(part['class_name'])}, expected is {expected}")
    if not net["label_dim"]:
        raise ValueError("the network has no labels (label_dim is 0)")
    for name, expected in DDPMPP.items():
        found = unet["_init_kwargs"].get(name, expected)
        if found != expected:
            raise ValueError(f"the network is no DDPM++: its {name} is {short(found)}, expected is {expected}")


def _settings(net, unet):
    """Settings of `edm_unet.NetSettings`, as a dict."""
    options = {**DEFAULTS, **unet["_init_kwargs"]}
    return {"resolution": net["img_resolution"], "channels": net["img_channels"], "num_classes": net["label_dim"],
            "sigma_data": float(net["sigma_data"]), **{name: options[name] for name in DEFAULTS}}


def _weights(unet):
    """{name: tensor} of all parameters. ValueError where a module occurs twice: visiting it again could go on forever.
    """
    weights, seen, waiting = {}, set(), [("model.", unet)]
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in seen:
            raise ValueError("a module occurs twice")
        seen.add(id(module))
        for name, tensor in module["_parameters"].items():
            if tensor is not None:
                weights[prefix + name] = tensor
        for name, child in module["_modules"].items():
            if child is not None:
                waiting.append((f"{prefix}{name}.", child))
    weights.pop("model.map_augment.weight", None)  # the labels of augmentation, its input, are zero
    return weights


def load_published(path, device="cpu", data="cifar10"):
    """(network, info) of a published edm-*.pkl, like `edm_unet.load_network`. BadInput for any other file.

    data: name of the data set, which such a file does not hold. Labels get the class names of CIFAR-10, or numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        with open(path, "rb") as f:
            net = _Unpickler(f).load()["ema"]
        unet = net["_modules"]["model"]
        _check_kind(net, unet)
        network = unpack({"net": _settings(net, unet), "weights": _weights(unet)})
    except Exception as e:  # a hostile pickle can raise anything, and is refused whatever it raises
        raise BadInput(f"{path} is no published EDM checkpoint that this project can read: "
                       f"{type(e).__name__}: {e}") from e
    network.bf16 = has_fast_bf16(device)
    K = network.settings.num_classes
    classes = CIFAR10 if data == "cifar10" and K == len(CIFAR10) else [str(k) for k in range(K)]
    return network.to(device), {"data": data, "classes": classes, "path": str(path), "sha256": digest(path)}
