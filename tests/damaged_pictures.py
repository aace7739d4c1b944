"""Picture files with what happens to files: cut off, flipped bits, parts overwritten, sizes that are not theirs."""

import io
import random
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import ExifTags, Image

__all__ = ["damaged_pictures"]

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
