"""Pictures in files, decoded when they are needed.

Shapes: H rows, W columns, N pictures.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor

from lightning_modules.data.pictures import Batch, Pictures, PictureSet
from tnlayers.errors import UserError

__all__ = ["PictureError", "PictureFiles", "list_pictures", "open_picture", "refuse_folder"]


class PictureError(UserError):
    """A file that cannot be used, in one line.

    torch hands a worker's error on as one of the same type, the text of which is the worker's whole traceback. The line
    stands at its end, and is the text here as well.
    """

    def __str__(self) -> str:
        return super().__str__().rpartition(f"{__name__}.{type(self).__name__}: ")[2].strip()


def list_pictures(folder: Path, class_names: Sequence[str]) -> tuple[list[str], Tensor]:
    """Returns the picture files of each class folder and of the folders in it, in the order of names, and their labels.

    Raises:
        UserError: a class folder has no pictures.
        PictureError: a folder cannot be listed, or is inside of itself by a link.
    """
    found = [list(_find_pictures(folder / name)) for name in class_names]
    for name, paths in zip(class_names, found, strict=True):
        if not paths:
            raise UserError(
                f"class folder {folder / name} holds no picture: put files there that end in one of "
                f"{', '.join(IMG_EXTENSIONS)}, or delete it"
            )
    labels = torch.arange(len(found)).repeat_interleave(torch.tensor([len(paths) for paths in found]))
    return [path for paths in found for path in paths], labels


def refuse_folder(error: OSError) -> None:
    """Objects to a folder that os.walk cannot list, which it would otherwise leave out."""
    raise PictureError(f"{error.filename} cannot be listed ({error.strerror}): allow it or delete it") from error


def _find_pictures(class_folder: Path) -> Iterator[str]:
    """Gives everything that is named like a picture; `open_picture` says what is none."""
    for folder, folders, files in sorted(os.walk(class_folder, onerror=refuse_folder, followlinks=True)):
        if os.path.islink(folder) and Path(folder).parent.resolve().is_relative_to(Path(folder).resolve()):
            raise PictureError(f"{folder} is a link to a folder that it lies in: delete it")
        for name in sorted(folders + files):
            if name.lower().endswith(IMG_EXTENSIONS):
                yield os.path.join(folder, name)


def open_picture(path: str, image_size: int | None) -> Image.Image:
    """Reads one picture as RGB, the way up that its EXIF says; transparency is ignored.

    Where `image_size` is given, its shorter side is resized to that and its centre cropped.

    Raises:
        PictureError: the file is no picture, or one of values whose range is not known.
    """
    try:
        # A named pipe would be waited for, for ever.
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("it is not a file but a folder, a pipe, a socket or a device")
        # PIL maps a file that it opens by name into memory, and then takes a TIFF on its side for an upright one.
        with open(path, "rb") as stream, Image.open(stream) as file:
            ImageOps.exif_transpose(file, in_place=True)
            picture = _to_8_bits(file).convert("RGB")
        if 0 in picture.size:
            raise UserError(f"its size is {_size(picture.size)}")
        if image_size is None:
            return picture
        return ImageOps.fit(picture, (image_size, image_size), Image.Resampling.BILINEAR)
    # There is hardly a kind of error that PIL does not raise for some damaged file.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "its format is none that PIL knows"
        raise PictureError(f"{path} cannot be read as a picture ({reason}): replace it or delete it") from error


def _to_8_bits(file: Image.Image) -> Image.Image:
    """Turns grey values of 16 bits into their high byte, as PIL reads 16 bits of colour, and leaves 8 bits as they are."""
    # PIL decodes 16-bit PGM, and older ones of it PNG, to int32.
    if file.mode.startswith("I;16") or (file.mode == "I" and file.format in ("PNG", "PPM")):
        tags = getattr(file, "tag_v2", {})
        (bits,) = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))  # 12 bits are the lower ones of 16
        grey = file.convert("I").point(lambda value: value * 2.0 ** (8 - bits)).convert("L")
        # PIL inverts what is white at 0 up to 8 bits, and leaves 16 bits as they are.
        return ImageOps.invert(grey) if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0 else grey
    if file.mode in ("I", "F"):
        values = {"I": "whole numbers with a sign or of 32 bits", "F": "floating-point numbers"}[file.mode]
        raise UserError(f"its values are {values}, whose range is not known; save it with 8 or 16 bits")
    return file


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Within this block PIL does not warn of pictures that it reads: of a size below its limit, of metadata, of transparency.

    Threads share the filters of warnings, so this has to be around what starts and ends them.
    """
    with warnings.catch_warnings(action="ignore"):
        yield


class PictureFiles(PictureSet):
    """Pictures of one size in files.

    Args:
        paths: N files.
        labels: int64 (N,).
        image_size: H and W of the pictures once resized; None where they all have one size.
        like: a picture of that size; the first by default.

    Raises:
        PictureError: at once for the first file, for others when a batch is read, where it is no picture or one of
            another size.
    """

    def __init__(self, paths: list[str], labels: Tensor, image_size: int | None, like: str | None = None) -> None:
        super().__init__(labels)
        self.paths = paths
        self.image_size = image_size
        self.like = like or paths[0]
        with _no_warnings():
            self.width_height = open_picture(self.like, image_size).size
            self.read(0)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        with _no_warnings():
            return torch.stack([self.read(index) for index in indices]), self.labels[torch.as_tensor(indices)]

    def read(self, index: int) -> Tensor:
        """Returns uint8 (3, H, W)."""
        picture = open_picture(self.paths[index], self.image_size)
        if picture.size != self.width_height:
            raise PictureError(
                f"{self.like} is {_size(self.width_height)} but {self.paths[index]} is {_size(picture.size)}: "
                "give one size for all, such as --data.image_size 64"
            )
        return pil_to_tensor(picture)

    def in_memory(self) -> Pictures:
        """Decodes all the pictures at once."""
        width, height = self.width_height
        pictures = torch.empty(len(self), 3, height, width, dtype=torch.uint8)
        # PIL decodes outside Python's lock, so threads do.
        with _no_warnings(), ThreadPoolExecutor() as pool:
            for index, picture in enumerate(pool.map(self.read, range(len(self)))):
                pictures[index] = picture
        return Pictures(pictures, self.labels)


def _size(width_height: tuple[int, int]) -> str:
    width, height = width_height
    return f"{width}x{height}"
