"""The literature's FID, on Inception's features, by torch-fidelity, an optional package: pip install torch-fidelity.

    python -m lab.fid runs/cifar10-forgetairplane-toautomobile/generator.pt
    python -m lab.fid teachers/cifar10.pt --data-dir data    # a teacher: all labels, 35 evaluations an image

5,000 images under each label that is kept, against all training images of those classes. For a GPU.
"""
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import torch

from lab.cli import check_ranges, command, parse, setting
from lab.data import load_images
from lab.device import pick_device
from lab.errors import BadInput
from lab.labels import labels_only
from lab.sample import draw, in_float32, load_generator

INCEPTION = "inception-v3-compat"
PER_LABEL = 5000


class Images(torch.utils.data.Dataset):
    """uint8 (N, C, H, W) as what torch-fidelity takes: three channels."""

    def __init__(self, images):
        self.images = images.expand(-1, 3, -1, -1)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def weights():
    """The file of Inception's weights in torch's cache, downloaded if it is not there; checked to be tensors alone,
    since torch-fidelity reads it by unpickling. BadInput where it cannot be had."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.exists():
        print(f"Inception's weights are downloaded from {url}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path, hash_prefix=path.stem.split("-")[-1])
        except (urllib.error.URLError, OSError, RuntimeError) as e:
            raise BadInput(f"Inception's weights cannot be had ({e}): put {path.name} into {path.parent}") from e
    torch.load(path, weights_only=True, map_location="cpu")
    return str(path)


def fid(images, real, device, extractor=INCEPTION):
    """FID of images uint8 (N, C, H, W) to real ones (M, C, H, W), on the features of a torch-fidelity extractor."""
    try:
        import torch_fidelity
    except ImportError as e:
        raise BadInput("FID needs torch-fidelity: pip install torch-fidelity") from e
    file = {"feature_extractor_weights_path": weights()} if extractor == INCEPTION else {}
    numbers = torch_fidelity.calculate_metrics(
        input1=Images(images), input2=Images(real), fid=True, cuda=device.type == "cuda", batch_size=256, cache=False,
        save_cpu_ram=True, feature_extractor=extractor, verbose=False, **file)
    return numbers["frechet_inception_distance"]


def fid_of(generate, network, info, data_dir, device, per_label=PER_LABEL, extractor=INCEPTION):
    """{"fid", "n_fid", "n_real", "labels_fid"} of a generator on its kept labels, or of a teacher; generate, network
    and info as of `load_generator`."""
    labels_only(info["data"], "there is no FID of them")
    kept = torch.tensor([k for k in range(len(network.conditions)) if k not in info.get("forget", [])])
    real, labels, _ = load_images(info["data"], data_dir, info.get("size"), train=True)
    real = real[torch.isin(labels, kept)]
    with in_float32(network):  # as every network is judged
        images = draw(generate, kept.repeat_interleave(per_label), network, seed=2000, progress="drawing")
    return {"fid": fid(images, real, device, extractor), "n_fid": len(images), "n_real": len(real),
            "labels_fid": kept.tolist()}


@dataclass
class Settings:
    file: str = setting("", "a generator.pt, or a teacher", positional=True)
    data_dir: str = setting("data", "where torchvision keeps or downloads the training images")
    per_label: int = setting(PER_LABEL, "images to draw under each label", above=0)
    device: str = setting("auto", "auto, cpu, cuda or mps")
    __post_init__ = check_ranges


def main(argv):
    s = parse(Settings, argv, __doc__)
    device = pick_device(s.device)
    of = fid_of(*load_generator(s.file, device), s.data_dir, device, s.per_label)
    print(f"FID {of['fid']:.2f}: {of['n_fid']} images under the labels {' '.join(map(str, of['labels_fid']))} "
          f"against {of['n_real']} training images of them")


if __name__ == "__main__":
    command(main)
