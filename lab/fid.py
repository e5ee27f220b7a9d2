"""FID, the Frechet distance on Inception's features that the literature reports. Made for a GPU.

    python -m lab.fid runs/cifar10-forgetairplane-toautomobile/generator.pt
    python -m lab.fid teachers/cifar10.pt --data-dir data    # a teacher: all labels, 35 evaluations per image

Compares 5,000 images under each label that is kept with all training images of these classes. Needs an optional
package: pip install torch-fidelity.
"""
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import torch

from edm_unet import BadInput, command, pick_device
from lab.core.files import in_folder
from lab.core.images import load_images
from lab.core.options import parse, setting
from lab.evaluate.draw import draw_images, in_float32, load_generator


class Images(torch.utils.data.Dataset):
    """Images uint8 (N, C, H, W) as torch-fidelity takes them: with three channels."""

    def __init__(self, images):
        self.images = images.expand(-1, 3, -1, -1)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def inception():
    """Name and file of torch-fidelity's Inception, as arguments of `fid`. Downloads the weights where they are missing.

    BadInput where torch-fidelity or the weights are missing.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url
    except ImportError as e:
        raise BadInput("FID needs torch-fidelity: pip install torch-fidelity") from e
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.exists():
        print(f"Inception's weights are downloaded from {url}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path, hash_prefix=path.stem.split("-")[-1])
        except (urllib.error.URLError, OSError, RuntimeError) as e:
            raise BadInput(f"Inception's weights are missing ({e}): put {path.name} into {path.parent}") from e
    torch.load(path, weights_only=True, map_location="cpu")  # torch-fidelity would run code in the file
    return {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": str(path)}


def fid(images, real, device, **extractor):
    """FID of images uint8 (N, C, H, W) to real ones (M, C, H, W). extractor: as from `inception`."""
    import torch_fidelity
    numbers = torch_fidelity.calculate_metrics(
        input1=Images(images), input2=Images(real), fid=True, cuda=device.type == "cuda", batch_size=256, cache=False,
        save_cpu_ram=True, verbose=False, **extractor)
    return numbers["frechet_inception_distance"]


def fid_of_network(generate, network, info, data_dir, device, per_label, extractor):
    """{"fid", "n_fid", "n_real", "labels_fid"} of a generator on its kept labels, or of a teacher on all.

    generate, network, info: as from `load_generator`. data_dir: folder of torchvision's training images.
    """
    kept = torch.tensor([k for k in range(len(network.conditions)) if k not in info.get("forget", [])])
    real, labels, _ = load_images(info["data"], data_dir, info.get("size"), train=True)
    real = real[torch.isin(labels, kept)]
    with in_float32(network):  # as in every evaluation
        images = draw_images(generate, kept.repeat_interleave(per_label), network, seed=2000, progress="drawing")
    return {"fid": fid(images, real, device, **extractor), "n_fid": len(images), "n_real": len(real),
            "labels_fid": kept.tolist()}


@dataclass
class Settings:
    file: str = setting("", "the network: a generator.pt, the folder of a run, or a teacher", positional=True)
    data_dir: str = setting("data", "where torchvision keeps or downloads the training images")
    per_label: int = setting(5000, "images to draw under each label", above=0)
    device: str = setting("auto", "auto, cpu, cuda or mps")


def main(argv):
    s = parse(Settings, argv, __doc__)
    device = pick_device(s.device)
    extractor = inception()
    found = load_generator(in_folder(s.file, "generator.pt"), device)
    numbers = fid_of_network(*found, s.data_dir, device, s.per_label, extractor)
    print(f"FID {numbers['fid']:.2f}: {numbers['n_fid']} images under the labels "
          f"{' '.join(map(str, numbers['labels_fid']))} against {numbers['n_real']} training images of them")


if __name__ == "__main__":
    command(main)
