"""Your own pictures, sorted into class folders."""

import math
import os
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_modules.data.base import ImageData
from lightning_modules.data.picture_files import PictureFiles, list_pictures, refuse_folder
from lightning_modules.data.pictures import PictureSet
from tnlayers.errors import UserError

__all__ = ["Folders"]

MEMORY_LIMIT = 4 * 2**30
"""Bytes of pixels up to which a part (train, val or test) is decoded into memory once."""
BATCH_LIMIT = 4 * 2**30
"""Bytes that the pictures of one batch may take as float32."""


class Folders(ImageData):
    """Colour pictures in `root/{train,test}/<class>/`, the layout of torchvision's ImageFolder.

    Where there is a `root/val/`, its pictures are the validation ones and `val_fraction` is ignored. Up to 4 GiB of
    pixels are kept in memory; beyond, files are read as they are needed, so give `num_workers`. Pictures are turned as
    their EXIF says, 16 bits become 8 by their range, and transparency is ignored.

    Args:
        root: the folder of train/ and test/.
        image_size: height and width that pictures are resized (shorter side) and cropped (centre) to; None where all
            have one size.
        **options: those of `ImageData`; `mean` and `std` are ImageNet's where they are None.

    Raises:
        UserError: a folder or its pictures are missing, there is one class alone, parts differ in their classes, pictures
            in their sizes, a file is no picture, or a batch takes more than 4 GiB.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(self, root: str, *, image_size: int | None = None, **options: Any) -> None:
        if image_size is not None and image_size < 1:
            raise UserError(f"image_size is {image_size}: give the pixels of a side, such as --data.image_size 64")
        self.root = root
        self.image_size = image_size
        self.class_names = self._find_classes()
        self._first = list_pictures(self._path("train"), self.class_names[:1])[0][0]
        self.input_shape = self._find_shape()
        super().__init__(**options)

    def load(self, part: Literal["train", "val", "test"]) -> PictureSet:
        files = PictureFiles(*list_pictures(self._path(part), self.class_names), self.image_size, self._first)
        self._require_room(min(self.batch_size, len(files)), self.input_shape)
        return files.in_memory() if len(files) * math.prod(self.input_shape) <= MEMORY_LIMIT else files

    def picture_names(self) -> list[str]:
        paths, _ = list_pictures(self._path("test"), self.class_names)
        return [str(Path(path).relative_to(self._path("test"))) for path in paths]

    def load_val(self) -> PictureSet | None:
        return self.load("val") if self._has("val") else None

    def _path(self, part: str) -> Path:
        return Path(self.root).absolute() / part

    def _has(self, part: str) -> bool:
        # Path.is_dir raises an error of its own for too long a name, or inside of a folder that may not be entered.
        return os.path.isdir(self._path(part))

    def _find_classes(self) -> list[str]:
        """Returns the names of the class folders, on which all parts must agree."""
        for part in ("train", "test"):
            if not self._has(part):
                raise UserError(
                    f"there is no {self._path(part)}: --data.root must name a folder with train/ and test/, each with "
                    "one folder per class"
                )
        class_names = _list_folders(self._path("train"))
        if not class_names:
            raise UserError(
                f"{self._path('train')} has no class folders: expected one per class, with that class's pictures in it"
            )
        if len(class_names) == 1:
            raise UserError(
                f"{self._path('train')} has one class folder alone, {class_names[0]}: there must be two or more, since "
                "there is nothing to tell one class from"
            )
        for part in ("val", "test"):
            if self._has(part):
                different = sorted(set(class_names) ^ set(_list_folders(self._path(part))))
                if different:
                    raise UserError(
                        f"{self._path('train')} and {self._path(part)} must have the same class folders, but only one "
                        f"of them has {', '.join(different)}: add or delete these"
                    )
        return class_names

    def _find_shape(self) -> tuple[int, int, int]:
        """Returns (3, H, W) of the first training picture, and checks that the first one of each other part is of that size.

        A part checks its other pictures when it is read, which for the test is after the training.
        """
        if self.image_size is not None:
            self._require_room(1, (3, self.image_size, self.image_size))
        firsts = [
            list_pictures(self._path(part), self.class_names[:1])[0][0] for part in ("val", "test") if self._has(part)
        ]
        for path in [self._first, *firsts]:
            width, height = PictureFiles([path], torch.zeros(1), self.image_size, self._first).width_height
        return 3, height, width

    def _require_room(self, num_pictures: int, shape: tuple[int, int, int]) -> None:
        """Refuses a batch that would fill the memory, before it does."""
        size = num_pictures * math.prod(shape) * 4
        if size > BATCH_LIMIT:
            _, height, width = shape
            raise UserError(
                f"a batch of {num_pictures} pictures of {width}x{height} takes {size / 2**30:.1f} GiB, above the limit of "
                f"{BATCH_LIMIT / 2**30:.0f} GiB: give a smaller --data.image_size or --data.batch_size"
            )


def _list_folders(folder: Path) -> list[str]:
    _, folders, _ = next(os.walk(folder, onerror=refuse_folder))
    # Hidden folders are tools' own, such as .ipynb_checkpoints.
    return sorted(name for name in folders if not name.startswith("."))
