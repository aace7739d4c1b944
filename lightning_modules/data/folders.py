"""Your own pictures, sorted into class folders."""

import math
import os
from pathlib import Path
from typing import Literal

from lightning_modules.data.base import Augment, ImageData
from lightning_modules.data.picture_files import PictureFiles, list_pictures, open_picture
from lightning_modules.data.pictures import PictureSet

__all__ = ["Folders"]

MEMORY_LIMIT = 4 * 2**30
"""Bytes of pixels up to which a part (train, val or test) is decoded into memory once."""


class Folders(ImageData):
    """Colour pictures in `root/{train,test}/<class>/`, the layout of torchvision's ImageFolder.

    Where there is a `root/val/`, its pictures are the validation ones and `val_fraction` is ignored. Up to 4 GiB of
    pixels are kept in memory; beyond, files are read as they are needed, so give `num_workers`.

    Args:
        root: the folder of train/ and test/.
        image_size: height and width that pictures are resized (shorter side) and cropped (centre) to; None where all
            have one size.
        batch_size, val_fraction, split_seed, augment, num_workers: see `ImageData`.
        mean: three channel means of pictures in 0..1; None for ImageNet's.
        std: three channel standard deviations of pictures in 0..1; None for ImageNet's.

    Raises:
        FileNotFoundError: where a folder or its pictures are missing.
        ValueError: where parts differ in their classes, pictures in their sizes, or a file is no picture.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(
        self,
        root: str,
        *,
        image_size: int | None = None,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        augment: Augment | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        num_workers: int = 0,
    ) -> None:
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size is {image_size}: give the pixels of a side, such as --data.image_size 64")
        self.root = root
        self.image_size = image_size
        self.class_names = self._find_classes()
        self.input_shape = self._find_shape()
        super().__init__(
            batch_size=batch_size,
            val_fraction=val_fraction,
            split_seed=split_seed,
            augment=augment,
            mean=mean,
            std=std,
            num_workers=num_workers,
        )

    def load(self, part: Literal["train", "val", "test"]) -> PictureSet:
        files = PictureFiles(*list_pictures(self._path(part), self.class_names), self.image_size)
        return files.in_memory() if len(files) * math.prod(self.input_shape) <= MEMORY_LIMIT else files

    def picture_names(self) -> list[str]:
        paths, _ = list_pictures(self._path("test"), self.class_names)
        return [str(Path(path).relative_to(self._path("test"))) for path in paths]

    def load_val(self) -> PictureSet | None:
        return self.load("val") if self._path("val").is_dir() else None

    def _path(self, part: str) -> Path:
        return Path(self.root).absolute() / part

    def _find_classes(self) -> list[str]:
        """Names the class folders, which every part must agree on."""
        for part in ("train", "test"):
            if not self._path(part).is_dir():
                raise FileNotFoundError(
                    f"there is no {self._path(part)}: --data.root must name a folder with train/ and test/, each with "
                    "one folder per class"
                )
        class_names = _list_folders(self._path("train"))
        if not class_names:
            raise FileNotFoundError(
                f"{self._path('train')} has no class folders: expected one per class, with that class's pictures in it"
            )
        for part in ("val", "test"):
            if self._path(part).is_dir():
                different = sorted(set(class_names) ^ set(_list_folders(self._path(part))))
                if different:
                    raise ValueError(
                        f"{self._path('train')} and {self._path(part)} must have the same class folders, but only one "
                        f"of them has {', '.join(different)}: add or delete these"
                    )
        return class_names

    def _find_shape(self) -> tuple[int, int, int]:
        """(3, H, W) of the first picture."""
        first = self.class_names[:1]
        paths, _ = list_pictures(self._path("train"), first)
        width, height = open_picture(paths[0], self.image_size).size
        return 3, height, width


def _list_folders(folder: Path) -> list[str]:
    # Hidden folders are tools' own, such as .ipynb_checkpoints.
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
