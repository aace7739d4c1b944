"""The sets of small pictures that torchvision knows how to download."""

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torchvision import datasets

from lightning_modules.data.base import ImageData
from lightning_modules.data.pictures import Pictures, PictureSet
from tnlayers.errors import UserError

__all__ = ["CIFAR10", "CIFAR100", "FashionMNIST"]

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR100_NAMES = [
    *("apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle"),
    *("bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle"),
    *("chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur"),
    *("dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard"),
    *("lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain"),
    *("mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree"),
    *("plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket"),
    *("rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider"),
    *("squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger"),
    *("tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm"),
]


class Downloadable(ImageData):
    """A data set in the files of its authors, as torchvision downloads them; a subclass gives the class attributes.

    Args:
        root: folder that holds the data set's own folder.
        download: fetches the files that are missing.
        **options: those of `ImageData`.

    Raises:
        UserError: from `setup`, where the files are missing or damaged; from `prepare_data`, where the download fails.
    """

    source: ClassVar[Any]
    """torchvision's data set."""
    folder: ClassVar[str]
    """Where it lies under `root`."""

    def __init__(self, root: str = "data", *, download: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.root = root
        self.download = download

    def prepare_data(self) -> None:
        if not self.download:
            return
        try:
            self.source(self.root, download=True)
        # Whatever a download meets: no network, a full disk, a wrong checksum.
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"cannot download {type(self).__name__} to {self._path()} ({reason}): fetch it on a machine that can, "
                "copy the folder there and leave out --data.download"
            ) from error

    def load(self, part: Literal["train", "test"]) -> PictureSet:
        try:
            source = self.source(self.root, train=part == "train")
        # torchvision's word for missing and damaged alike.
        except RuntimeError as error:
            raise UserError(
                f"{type(self).__name__} is missing or damaged: expected its files in {self._path()}, so set --data.root "
                f"to the folder that holds {self.folder} or add --data.download true"
            ) from error
        pictures = torch.as_tensor(source.data)
        # Grey (N, H, W) or colour (N, H, W, C).
        pictures = pictures.unsqueeze(1) if pictures.ndim == 3 else pictures.permute(0, 3, 1, 2).contiguous()
        return Pictures(pictures, torch.as_tensor(source.targets))

    def _path(self) -> Path:
        return Path(self.root).absolute() / self.folder


class CIFAR10(Downloadable):
    """60,000 colour 32x32 pictures of ten classes, 10,000 of them for the test.

    Source: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """

    source = datasets.CIFAR10
    folder = "cifar-10-batches-py"
    class_names = CIFAR10_NAMES
    input_shape = (3, 32, 32)
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)


class CIFAR100(Downloadable):
    """60,000 colour 32x32 pictures of a hundred classes, 10,000 of them for the test.

    Source: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """

    source = datasets.CIFAR100
    folder = "cifar-100-python"
    class_names = CIFAR100_NAMES
    input_shape = (3, 32, 32)
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)


class FashionMNIST(Downloadable):
    """70,000 grey 28x28 pictures of ten kinds of clothes, 10,000 of them for the test.

    Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST", 2017, https://arxiv.org/abs/1708.07747.
    """

    source = datasets.FashionMNIST
    folder = "FashionMNIST/raw"
    class_names = datasets.FashionMNIST.classes
    input_shape = (1, 28, 28)
    mean = (0.2860,)
    std = (0.3530,)
