"""Picture files with what happens to files: cut off, flipped bits, parts overwritten, sizes that are not theirs.

    python -m tests.damaged_pictures --number 1000 --seed 0

Reads that many, some of them by `tnlayers test` too, and lists those with which a law is broken that `check` and
`check_command` state. For some TIFF files libtiff writes lines of its own to stderr.
"""

import argparse
import faulthandler
import io
import random
import re
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION
from sklearn.datasets import load_sample_image

from lightning_modules.data import Folders, folders
from lightning_modules.data.picture_files import PictureError
from lightning_modules.data.pictures import PictureSet
from tests.commands import CONFIGS, QUIET
from tests.processes import Forks

__all__ = ["FromFiles", "check", "check_command", "damaged_pictures"]

# (format, mode, how it is written)
KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("jpeg", "RGB", {}),
    ("jpeg", "L", {"progressive": True}),
    ("jpeg", "CMYK", {}),
    ("png", "RGB", {}),
    ("png", "P", {"transparency": b"\0\x80"}),
    ("png", "I;16", {}),
    ("ppm", "RGB", {}),
    ("ppm", "I;16", {}),
    ("bmp", "RGB", {}),
    ("bmp", "P", {}),
    ("gif", "P", {}),
    ("webp", "RGB", {}),
    ("webp", "RGBA", {"lossless": True}),
    ("tiff", "RGB", {}),
    ("tiff", "RGB", {"compression": "jpeg"}),
    ("tiff", "I;16", {}),
    ("tiff", "I;16", {"compression": "tiff_lzw"}),
    ("tiff", "1", {"compression": "group4"}),
]
SUFFIXES = [".png", ".jpg", ".ppm", ".bmp", ".tif", ".webp"]


def encode(picture: Image.Image, kind: int) -> bytes:
    """An RGB picture in the bytes of a file."""
    name, mode, options = KINDS[kind]
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # lies on its side
    picture.convert(mode).save(file, name, exif=exif, **options)
    return file.getvalue()


def damage(content: bytes, rng: random.Random) -> bytes:
    """One to three things that happen to a file."""
    for _ in range(rng.randint(1, 3)):
        content = rng.choice([cut_off, flip_bits, overwrite, put_in, leave_out, declare_another_size])(content, rng)
    return content


def cut_off(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    reach = rng.choice([32, 200, len(changed)])  # headers matter most
    for _ in range(rng.choice([1, 4, 30]) if changed else 0):
        changed[rng.randrange(min(reach, len(changed)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(content: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(content) + 1), rng.choice([1, 4, 64, 1024])
    filling = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)])
    return content[:start] + filling + content[start + length :]


def put_in(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + rng.randbytes(rng.choice([1, 7, 500])) + content[start:]


def leave_out(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start + rng.choice([1, 7, 500]) :]


def declare_another_size(content: bytes, rng: random.Random) -> bytes:
    """Another width and height where the format keeps them, from none to more than there can be."""
    width, height = (rng.choice([0, 1, 31, 5_000, 40_000, 2**16 - 1, 2**31 - 1, 2**32 - 1]) for _ in range(2))
    short = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    if content.startswith(b"\x89PNG"):
        header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
        return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    if content.startswith(b"BM"):
        return content[:18] + struct.pack("<II", width, height) + content[26:]
    if content.startswith(b"GIF"):
        return content[:6] + short + content[10:]
    if content[:2] in (b"P5", b"P6"):
        return content[:2] + f"\n{width} {height}\n".encode() + b"\n".join(content.split(b"\n")[2:])
    if content.startswith(b"II*\0"):
        for tag, value in ((256, width), (257, height)):
            place = content.find(struct.pack("<H", tag))
            content = content[:place] + struct.pack("<HHII", tag, 4, 1, value) + content[place + 12 :]
        return content
    place = content.find(b"\xff\xc0") + 5 if content.startswith(b"\xff\xd8") else 26
    return content[:place] + short + content[place + 4 :]


def damaged_pictures(pictures: list[Image.Image], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(suffix, content) of files: each kind in turn, of a picture drawn from those given."""
    rng = random.Random(seed)
    with warnings.catch_warnings(action="ignore"):
        for place in range(count):
            content = encode(rng.choice(pictures), place % len(KINDS))
            yield rng.choice(SUFFIXES), damage(content, rng)


# ---- what becomes of them

SIZE = 4
HANGING = 300
"""Seconds after which the reading of one small file hangs."""


class FromFiles(Folders):
    """Reads no test picture before its batch, however few there are, so that workers do it."""

    def load(self, part: Literal["train", "val", "test"]) -> PictureSet:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folders, "MEMORY_LIMIT", 0)
            return super().load(part)


def pixels(content: bytes) -> Image.Image | None:
    """What PIL makes of a file in memory, as RGB of 8 bits and upright; None where it or we do not know the pixels."""
    try:
        with Image.open(io.BytesIO(content)) as file:
            file.load()
            upright = ImageOps.exif_transpose(file)
            tags = getattr(file, "tag_v2", {})
            if file.mode == "F" or (file.mode == "I" and file.format == "TIFF") or 0 in file.size:
                return None
            if file.mode[0] != "I":
                return upright.convert("RGB")
            grey = np.asarray(upright) >> (tags.get(BITSPERSAMPLE, (16,))[0] - 8)
            grey = 255 - grey if tags.get(PHOTOMETRIC_INTERPRETATION) == 0 else grey
            return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    except Exception:  # there is hardly a kind of error that PIL does not raise
        return None


def check(root: Path, path: Path) -> Literal["taken", "refused"]:
    """Reads the test pictures, the last of which is in this file.

    The laws: what PIL reads is taken with those pixels; all else is refused in one line that names the file.

    Raises:
        AssertionError: one of them is broken.
    """
    with warnings.catch_warnings(action="ignore"):
        expected = pixels(path.read_bytes())
    found = _last(Folders(str(root), image_size=SIZE))
    if isinstance(found, PictureError):
        line = rf"{re.escape(str(path))} cannot be read as a picture \(.+\): replace it or delete it"
        assert re.fullmatch(line, str(found)), f"refused by {found!r}"
        assert expected is None, f"refused although PIL reads it: {found}"
        return "refused"
    assert expected is not None, "taken although PIL does not read it"
    fitted = np.asarray(ImageOps.fit(expected, (SIZE, SIZE), Image.Resampling.BILINEAR))
    torch.testing.assert_close(found, torch.tensor(fitted).permute(2, 0, 1), rtol=0, atol=0)
    return "taken"


def _last(data: Folders) -> torch.Tensor | PictureError:
    """The last test picture, or why the test pictures cannot be read."""
    try:
        data.setup("test")
        (batch,) = data.test_dataloader()
    except PictureError as error:
        return error
    assert len(batch[0]) == len(data.picture_names())
    return batch[0][-1]


def check_command(forks: Forks, root: Path, path: Path, outcome: str, *, workers: int) -> None:
    """Runs `tnlayers test` on them.

    The laws: what is taken ends with exit code 0, what is refused with 2 and one line that names the file, at the end; there
    is no traceback and it does not hang.

    Raises:
        AssertionError: one of them is broken.
    """
    reading = ["--data", "tests.damaged_pictures.FromFiles", "--data.num_workers", workers] if workers else []
    data = ["-c", CONFIGS / "data/folders.yaml", *reading, "--data.root", root, "--data.image_size", SIZE]
    fork = forks.start(["test", *data, "--trainer.logger", "false", "--trainer.accelerator", "cpu", *QUIET], root)
    code = fork.wait(HANGING)
    errors = [line for line in fork.said.splitlines() if line.startswith("tnlayers: error: ")]
    said = f"exit code {code} for what is {outcome}, {workers} workers: {fork.said[-3000:]}"
    assert "Traceback" not in said, said
    assert code == (0 if outcome == "taken" else 2), said
    assert len(errors) == (0 if outcome == "taken" else 1), said
    if errors:
        assert fork.said.splitlines()[-1] == errors[0], said
        assert errors[0].startswith(f"tnlayers: error: {path} cannot be read as a picture ("), said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    photo = Image.fromarray(load_sample_image("flower.jpg")).resize((90, 60))
    noise = Image.fromarray(np.random.default_rng(given.seed).integers(0, 256, (20, 30, 3), np.uint8))
    counts, slowest = Counter[str](), (0.0, -1)
    with tempfile.TemporaryDirectory() as temporary, Forks() as forks:
        root = Path(temporary)
        for folder in ("train/cat", "train/dog", "test/cat", "test/dog"):
            (root / folder).mkdir(parents=True)
            photo.save(root / folder / "0.png")
        for number, (suffix, content) in enumerate(damaged_pictures([photo, noise], given.number, given.seed)):
            path = root / f"test/dog/1{suffix}"
            path.write_bytes(content)
            faulthandler.dump_traceback_later(HANGING, exit=True)  # nothing else ends compiled code that hangs
            begin = time.monotonic()
            try:
                outcome = check(root, path)
                slowest = max(slowest, (time.monotonic() - begin, number))
                faulthandler.cancel_dump_traceback_later()
                counts[outcome] += 1
                if number % 20 == 0:  # one after the other with a worker and without
                    check_command(forks, root, path, outcome, workers=number // 20 % 2)
                    counts["commands"] += 1
            except Exception as error:
                counts["broken"] += 1
                print(f"{number}, {KINDS[number % len(KINDS)]}: {type(error).__name__}: {error}", flush=True)
            path.unlink()
    print(
        f"{given.number} damaged pictures from seed {given.seed}: {counts['taken']} taken with the right pixels, "
        f"{counts['refused']} refused in one line, {counts['broken']} broke a law; {counts['commands']} commands; "
        f"the slowest, {slowest[1]}, took {slowest[0]:.1f} s"
    )
    return min(counts["broken"], 1)


if __name__ == "__main__":
    sys.exit(main())
