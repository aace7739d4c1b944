"""Pictures in files, decoded when they are needed.

Shapes: H rows, W columns, N pictures.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms.functional import pil_to_tensor

from lightning_modules.data.pictures import Batch, Pictures, PictureSet

__all__ = ["PictureFiles", "list_pictures", "open_picture"]


def list_pictures(folder: Path, class_names: Sequence[str]) -> tuple[list[str], Tensor]:
    """The picture files of each class folder, in the order of names, and their labels.

    Raises:
        FileNotFoundError: for a class folder without pictures.
    """
    classes = {name: label for label, name in enumerate(class_names)}
    samples = make_dataset(folder, classes, extensions=IMG_EXTENSIONS, allow_empty=True)
    labels = torch.tensor([label for _, label in samples], dtype=torch.long)
    counts = torch.bincount(labels, minlength=len(class_names)).tolist()
    for name, count in zip(class_names, counts, strict=True):
        if count == 0:
            raise FileNotFoundError(
                f"class folder {folder / name} holds no picture: put files there that end in one of "
                f"{', '.join(IMG_EXTENSIONS)}, or delete it"
            )
    return [path for path, _ in samples], labels


def open_picture(path: str, image_size: int | None) -> Image.Image:
    """Reads one picture as RGB; where `image_size` is given, resizes its shorter side to that and crops the centre.

    Raises:
        ValueError: for a file that is no picture.
    """
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    # PIL reports some damaged files as a SyntaxError.
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}): replace it or delete it") from error
    if image_size is None:
        return picture
    return ImageOps.fit(picture, (image_size, image_size), Image.Resampling.BILINEAR)


class PictureFiles(PictureSet):
    """Pictures of one size in files.

    Args:
        paths: N files.
        labels: int64 (N,).
        image_size: H and W of the pictures once resized; None where they all have the size of the first.

    Raises:
        ValueError: when a batch is read, for a file that is no picture or one of another size.
    """

    def __init__(self, paths: list[str], labels: Tensor, image_size: int | None) -> None:
        super().__init__(labels)
        self.paths = paths
        self.image_size = image_size
        self.width_height = open_picture(paths[0], image_size).size

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return torch.stack([self.read(index) for index in indices]), self.labels[torch.as_tensor(indices)]

    def read(self, index: int) -> Tensor:
        """uint8 (3, H, W)."""
        picture = open_picture(self.paths[index], self.image_size)
        if picture.size != self.width_height:
            raise ValueError(
                f"{self.paths[0]} is {_size(self.width_height)} but {self.paths[index]} is {_size(picture.size)}: "
                "give one size for all, such as --data.image_size 64"
            )
        return pil_to_tensor(picture)

    def in_memory(self) -> Pictures:
        """Decodes all the pictures at once."""
        width, height = self.width_height
        pictures = torch.empty(len(self), 3, height, width, dtype=torch.uint8)
        # PIL decodes outside Python's lock, so threads do.
        with ThreadPoolExecutor() as pool:
            for index, picture in enumerate(pool.map(self.read, range(len(self)))):
                pictures[index] = picture
        return Pictures(pictures, self.labels)


def _size(width_height: tuple[int, int]) -> str:
    width, height = width_height
    return f"{width}x{height}"
