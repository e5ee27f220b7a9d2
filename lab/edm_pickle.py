"""Reading the published EDM checkpoints (edm-*.pkl) without running them: they are pickles that carry, and would
execute, their own source code. The unpickler here knows the ten names that such a file needs, and gives each
a harmless meaning."""
import io
import pickle
import struct
from pathlib import Path

import torch

from lab.errors import BadInput


class _State(dict):
    """What is left of a pickled object: its attributes. Stands in for every class of the official code."""

    def __setstate__(self, state):
        self.update(state)


def _persistent_object(meta):
    return _State(meta["state"], class_name=meta["class_name"])


def _storage(data):
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage, offset, size, stride, requires_grad, hooks, metadata=None):
    if hooks:
        raise pickle.UnpicklingError("a tensor with hooks")
    bytes_, last = storage._untyped_storage, offset + sum((n - 1) * step for n, step in zip(size, stride))
    if (min((offset, *size, *stride)) < 0 or len(size) != len(stride)
            or (last + 1) * storage.dtype.itemsize > bytes_.nbytes()):
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} reaches beyond its storage "
                                     f"of {bytes_.nbytes()} bytes")
    return torch.tensor([], dtype=storage.dtype).set_(bytes_, offset, size, stride)


def _parameter(data, requires_grad, hooks):
    return data


def _scalar(dtype, data):
    if dtype != "f8":
        raise pickle.UnpicklingError(f"a numpy scalar of type {dtype}")
    return struct.unpack("<d", data)[0]


class _DType(str):
    def __new__(cls, name, *_):
        return super().__new__(cls, name)

    def __setstate__(self, state):
        if state[1] != "<":
            raise pickle.UnpicklingError("a big-endian numpy type")


class _Unpickler(pickle.Unpickler):
    """Knows these names and no others;
    each stands for a function above that only builds plain containers and tensors."""
    KNOWN = {("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
             ("collections", "OrderedDict"): dict,
             ("torch._utils", "_rebuild_parameter"): _parameter, ("torch._utils", "_rebuild_tensor_v2"): _tensor,
             ("torch.storage", "_load_from_bytes"): _storage, ("torch.nn.modules.container", "ModuleDict"): _State,
             ("numpy._core.multiarray", "scalar"): _scalar, ("numpy.core.multiarray", "scalar"): _scalar,
             ("numpy", "dtype"): _DType, ("dnnlib.util", "EasyDict"): _State}

    def find_class(self, module, name):
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, "
                                         "which is not on the list of what such a file needs")
        return self.KNOWN[module, name]

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to data outside itself")


def read_published(path):
    """{"net": settings, "weights": ...} of a published edm-*.pkl (DDPM++, label-conditional), as lab.checkpoint packs a
    network. BadInput, naming the reason, for anything else."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        with open(path, "rb") as f:
            net = _Unpickler(f).load()["ema"]
        if (found := net["class_name"]) != "EDMPrecond":
            raise ValueError(f"its preconditioning is {found}, expected is EDMPrecond")
        unet, weights = net["_modules"]["model"], {}
        if (found := unet["class_name"]) != "SongUNet":
            raise ValueError(f"its network is {found}, expected is SongUNet")
        if not net["label_dim"]:
            raise ValueError("it has no labels (label_dim is 0), of which one could be forgotten")
        settings = dict(resolution=net["img_resolution"], channels=net["img_channels"], num_classes=net["label_dim"],
                        sigma_data=net["sigma_data"], **_unet_settings(unet))

        def collect(module, prefix):
            for name, tensor in module["_parameters"].items():
                if tensor is not None:
                    weights[prefix + name] = tensor
            for name, child in module["_modules"].items():
                if child is not None:
                    collect(child, f"{prefix}{name}.")

        collect(unet, "model.")
    except Exception as e:  # a hostile pickle can raise anything; whatever it is, the file is refused
        raise BadInput(f"{path} is not a published EDM checkpoint that this project can read: "
                       f"{type(e).__name__}: {e}") from e
    weights.pop("model.map_augment.weight", None)  # its input, the augmentation labels, is zero
    return {"net": settings, "weights": weights}


def _unet_settings(unet):
    """Settings that the official module does not keep as such, read off the blocks that they made."""
    blocks = [(int(name.split("x")[0]), block)
              for name, block in unet["_modules"]["enc"]["_modules"].items() if "_block" in name]
    levels = sorted({res for res, _ in blocks}, reverse=True)
    model_channels = unet["_modules"]["map_label"]["_parameters"]["weight"].shape[0]
    widths = [next(block["out_channels"] for res, block in blocks if res == level) for level in levels]
    return dict(model_channels=model_channels, channel_mult=[w // model_channels for w in widths],
                num_blocks=len(blocks) // len(levels),
                attn_resolutions=[level for level in levels
                                  if any(res == level and block["num_heads"] for res, block in blocks)],
                dropout=float(blocks[0][1]["dropout"]))
