"""The data modules: split, loaders, augmentation, real file formats, and what a wrong folder says."""

import gzip
import hashlib
import os
import pickle
import re
import socket
import struct
import tarfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from PIL import ExifTags, Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from lightning_modules.data import CIFAR10, CIFAR100, Digits, FashionMNIST, Folders, ImageData, folders, picture_files
from lightning_modules.data.augment import crop_flip, normalise
from lightning_modules.data.picture_files import PictureError, PictureFiles, open_picture
from lightning_modules.data.pictures import Pictures
from lightning_modules.nets import build_net
from tests.commands import CONFIGS, QUIET, tnlayers
from tests.damaged_pictures import check, damaged_pictures
from tnlayers.errors import UserError


def fingerprints(loader: Any) -> list[bytes]:
    """One value per picture of a loader, in its order."""
    return [bytes(picture.numpy()) for pictures, _ in loader for picture in pictures]


# ---- augment


def test_crop_is_a_window_of_the_padded_picture() -> None:
    x = torch.randint(1, 256, (64, 3, 5, 7), dtype=torch.uint8)
    cropped = crop_flip(x, padding=2, flip=False)
    windows = F.pad(x, (2,) * 4).unfold(2, 5, 1).unfold(3, 7, 1).flatten(2, 3)  # (n, c, windows, h, w)
    matches = (windows == cropped.unsqueeze(2)).all(dim=(1, 3, 4))
    assert matches.shape == (64, 25)
    assert matches.any(1).all()
    # Every picture draws its own window, and all 25 occur sooner or later.
    assert len(matches.int().argmax(1).unique()) > 15


def test_flip_mirrors_about_half_of_the_pictures() -> None:
    x = torch.randint(0, 256, (400, 1, 4, 4), dtype=torch.uint8)
    flipped = crop_flip(x, padding=0)
    mirrored = (flipped == x.flip(-1)).all(dim=(1, 2, 3))
    kept = (flipped == x).all(dim=(1, 2, 3))
    assert (mirrored | kept).all()
    assert 150 < mirrored.sum() < 250


def test_same_picture_is_cropped_differently_across_the_batch() -> None:
    x = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8).expand(32, -1, -1, -1)
    assert len(crop_flip(x).unique(dim=0)) > 16


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_crop_flip_keeps_shape_dtype_and_device(dtype: torch.dtype, device: str) -> None:
    x = torch.zeros(2, 3, 4, 6, dtype=dtype, device=device)
    cropped = crop_flip(x)
    assert (cropped.shape, cropped.dtype, cropped.device) == (x.shape, x.dtype, x.device)
    assert cropped.is_contiguous()


def test_normalise() -> None:
    x = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    expected = torch.tensor([-2.0, 1.5]).view(1, 2, 1, 1)
    torch.testing.assert_close(normalise(x, (0.5, 0.25), (0.25, 0.5)), expected)


# ---- what every data module does, on the digits


class Net(LightningModule):
    """Keeps the pictures it is shown, stage by stage."""

    def __init__(self, num_classes: int, input_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.net = build_net("cnn4", num_classes=num_classes, input_shape=input_shape, widths=[4, 4, 4, 4], hidden=8)
        self.seen: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        self.seen["train"].append(batch[0])
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self.seen["val"].append(batch[0])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self.seen["test"].append(batch[0])

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        return self.net(batch[0]).argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def make_trainer(**options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def test_facts_are_known_before_setup() -> None:
    data = Digits()
    assert data.num_classes == 10
    assert data.class_names == list("0123456789")
    assert data.input_shape == (1, 8, 8)
    assert (data.batch_size, data.augment) == (128, "none")


def test_constants_are_those_of_the_training_pictures() -> None:
    data = Digits(val_fraction=0, batch_size=2000)
    data.setup()
    pictures, labels = next(iter(data.train_dataloader()))
    assert (pictures.dtype, pictures.shape, labels.dtype) == (torch.uint8, (1437, 1, 8, 8), torch.int64)
    values = pictures.double() / 255
    assert data.mean == (round(values.mean().item(), 4),)
    assert data.std == (round(values.std().item(), 4),)
    _, labels = next(iter(data.test_dataloader()))
    assert set(labels.bincount().tolist()) <= {35, 36, 37}


def test_split_is_fixed_complete_and_without_overlap() -> None:
    first, again, other = Digits(), Digits(), Digits(split_seed=1)
    for data in (first, again, other):
        data.setup("fit")
        torch.rand(1)
    train, val = fingerprints(first.train_dataloader()), fingerprints(first.val_dataloader())
    assert (len(train), len(val)) == (1294, 143)
    assert not set(train) & set(val)
    assert val == fingerprints(again.val_dataloader())
    assert sorted(train) == sorted(fingerprints(again.train_dataloader()))
    assert val != fingerprints(other.val_dataloader())
    whole = Digits(val_fraction=0)
    whole.setup("fit")
    assert sorted(train + val) == sorted(fingerprints(whole.train_dataloader()))
    whole.setup("test")
    assert not set(train + val) & set(fingerprints(whole.test_dataloader()))


def test_setup_reads_once_and_only_what_the_stage_needs() -> None:
    class Counting(Digits):
        parts: tuple[str, ...] = ()

        def load(self, part: Any) -> Any:
            self.parts += (part,)
            return super().load(part)

    data = Counting()
    data.setup("test")
    data.setup("predict")
    assert data.parts == ("test",)
    data.setup("fit")
    data.setup("validate")
    data.setup()
    assert data.parts == ("test", "train")


def test_loaders_shuffle_in_training_only_and_show_each_picture_once() -> None:
    data = Digits()
    data.setup()
    loader = data.train_dataloader()
    once, twice = fingerprints(loader), fingerprints(loader)
    assert once != twice
    assert sorted(once) == sorted(twice)
    assert fingerprints(data.test_dataloader()) == fingerprints(data.predict_dataloader())
    assert len(set(fingerprints(data.test_dataloader()))) == 360


def test_workers_read_the_same_pictures() -> None:
    data, reference = Digits(num_workers=1), Digits()
    for each in (data, reference):
        each.setup("test")
    assert data.test_dataloader().persistent_workers
    assert not reference.test_dataloader().persistent_workers
    assert fingerprints(data.test_dataloader()) == fingerprints(reference.test_dataloader())


def test_trainer_passes_normalise_everywhere_and_augment_in_training_only() -> None:
    data = Digits(augment="crop")
    net = Net(data.num_classes, data.input_shape)
    trainer = make_trainer()
    trainer.fit(net, datamodule=data)
    trainer.test(net, datamodule=data, verbose=False)
    predictions = trainer.predict(net, datamodule=data)
    assert predictions is not None
    assert sum(map(len, predictions)) == 360
    seen = {part: torch.cat(batches) for part, batches in net.seen.items()}
    assert {part: len(pictures) for part, pictures in seen.items()} == {"train": 1294, "val": 143, "test": 360}
    assert all(pictures.dtype == torch.float32 for pictures in seen.values())
    torch.testing.assert_close(seen["val"], normalise(torch.cat([x for x, _ in data.val_dataloader()]), *moments(data)))
    torch.testing.assert_close(
        seen["test"], normalise(torch.cat([x for x, _ in data.test_dataloader()]), *moments(data))
    )
    untouched = normalise(torch.cat([x for x, _ in data.train_dataloader()]), *moments(data))
    known = set(map(bytes, untouched.numpy()))
    changed = sum(bytes(picture.numpy()) not in known for picture in seen["train"])
    # One crop in nine leaves a picture where it is.
    assert changed > 1000


def test_batches_of_one_accumulated_step_are_shifted_differently() -> None:
    class OnePicture(Digits):
        def load(self, part: Any) -> Any:
            return Pictures(*super().load(part).__getitems__([0] * 128))

    data = OnePicture(augment="crop", batch_size=32, val_fraction=0)
    net = Net(data.num_classes, data.input_shape)
    make_trainer(accumulate_grad_batches=4).fit(net, datamodule=data)
    assert len(torch.stack(net.seen["train"]).unique(dim=0)) == 4


def moments(data: ImageData) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return data.mean, data.std


def test_no_validation_part() -> None:
    data = Digits(val_fraction=0)
    net = Net(data.num_classes, data.input_shape)
    trainer = make_trainer()
    trainer.fit(net, datamodule=data)
    assert data.val_dataloader() == []
    assert sum(map(len, net.seen["train"])) == 1437
    assert net.seen["val"] == []


def test_calibration_batches_are_fixed_and_plain() -> None:
    data = Digits(augment="crop", batch_size=100)
    batches = data.calibration_batches(3)
    assert [batch.shape for batch in batches] == [(100, 1, 8, 8)] * 3
    torch.rand(1)
    for batch, again in zip(batches, data.calibration_batches(3), strict=True):
        torch.testing.assert_close(batch, again, rtol=0, atol=0)
    plain = normalise(torch.cat([x for x, _ in data.train_dataloader()]), data.mean, data.std)
    assert set(map(bytes, torch.cat(batches).numpy())) <= set(map(bytes, plain.numpy()))
    # More than there are: the same number of batches, each a little smaller.
    sizes = [len(batch) for batch in data.calibration_batches(20)]
    assert (len(sizes), sum(sizes), max(sizes) - min(sizes)) == (20, 1294, 1)


def test_own_mean_and_std() -> None:
    data = Digits(mean=(0.0,), std=(1.0,))
    pictures = data.calibration_batches(1)[0]
    assert (pictures.min(), pictures.max()) == (0, 1)


def test_cnn4_learns_the_digits() -> None:
    data = Digits(batch_size=64)
    data.setup()
    net = build_net("cnn4", num_classes=data.num_classes, input_shape=data.input_shape)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8 * len(data.train_dataloader()))
    for _ in range(8):
        for batch in data.train_dataloader():
            pictures, labels = data.on_after_batch_transfer(batch, 0)
            optimizer.zero_grad()
            F.cross_entropy(net(pictures), labels).backward()
            optimizer.step()
            schedule.step()
    net.eval()
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()]
    correct = sum(int((net(pictures).argmax(1) == labels).sum()) for pictures, labels in batches)
    assert correct >= 0.985 * 360


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0: give at least 1"),
        ({"val_fraction": 1.0}, r"val_fraction is 1\.0: give the part .* from 0 to below 1"),
        ({"num_workers": -1}, "num_workers is -1: give 0"),
        ({"num_workers": 100_000}, r"num_workers is 100000: .* at most \d+ processes; .* --data.num_workers"),
        ({"augment": "flip"}, "augment is 'flip': give one of none, crop, crop_flip"),
        ({"mean": (0.5, 0.5)}, r"mean is \(0\.5, 0\.5\) .*one mean and one positive std for each of the 1 channels"),
        ({"std": (0.0,)}, r"std \(0\.0,\): give one mean and one positive std"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**options)


@pytest.mark.parametrize("n", [0, 2000])
def test_calibration_needs_a_picture_per_batch(n: int) -> None:
    with pytest.raises(ValueError, match=f"cannot make {n} calibration batches of 1294 training pictures"):
        Digits().calibration_batches(n)


# ---- class folders


def draw(path: Path, size: tuple[int, int] = (6, 4), value: int | None = None) -> None:
    """Writes one RGB picture of (width, height), random or of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3)
    pixels = np.random.randint(0, 256, shape, np.uint8) if value is None else np.full(shape, value, np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six training and two test pictures of 6x4 in two classes."""
    for part, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            for index in range(count):
                draw(tmp_path / part / name / f"{index}.png")
    return tmp_path


def test_folders_read_what_is_there(pictures: Path) -> None:
    (pictures / "train" / ".cache").mkdir()
    (pictures / "train" / "cat" / "notes.txt").write_text("not a picture")
    data = Folders(str(pictures), val_fraction=0)
    assert (data.class_names, data.input_shape, data.num_classes) == (["cat", "dog"], (3, 4, 6), 2)
    data.setup()
    [(batch, labels)] = data.test_dataloader()
    assert labels.tolist() == [0, 1]
    expected = np.stack([np.array(Image.open(pictures / "test" / name / "0.png")) for name in ("cat", "dog")])
    torch.testing.assert_close(batch, torch.from_numpy(expected).permute(0, 3, 1, 2), rtol=0, atol=0)
    assert len(fingerprints(data.train_dataloader())) == 6


def test_folders_read_lazily_beyond_the_limit(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, lazy = Folders(str(pictures)), Folders(str(pictures), num_workers=1)
    memory.setup("test")
    monkeypatch.setattr(folders, "MEMORY_LIMIT", 0)
    lazy.setup("test")
    assert isinstance(memory._test, Pictures)
    assert isinstance(lazy._test, PictureFiles)
    assert fingerprints(lazy.test_dataloader()) == fingerprints(memory.test_dataloader())
    assert len(lazy.calibration_batches(2)) == 2


def test_folders_resize_the_shorter_side_and_crop_the_centre(pictures: Path) -> None:
    draw(pictures / "test" / "cat" / "0.png", (16, 8))
    data = Folders(str(pictures), image_size=4)
    assert data.input_shape == (3, 4, 4)
    data.setup("test")
    [(batch, _)] = data.test_dataloader()
    assert batch.shape == (2, 3, 4, 4)
    with Image.open(pictures / "test" / "cat" / "0.png") as picture:
        expected = pil_to_tensor(center_crop(resize(picture, [4]), [4]))
    torch.testing.assert_close(batch[0].int(), expected.int(), rtol=0, atol=1)


def test_folders_convert_grey_to_colour(pictures: Path) -> None:
    Image.new("L", (6, 4), 7).save(pictures / "test" / "cat" / "0.png")
    data = Folders(str(pictures))
    data.setup("test")
    assert (data.load("test")[0][0] == 7).all()


def test_folders_take_their_own_validation_pictures(pictures: Path) -> None:
    for name in ("cat", "dog"):
        draw(pictures / "val" / name / "0.png", value=9)
    data = Folders(str(pictures), val_fraction=0.5)
    data.setup()
    [(batch, labels)] = data.val_dataloader()
    assert (batch == 9).all()
    assert labels.tolist() == [0, 1]
    assert len(fingerprints(data.train_dataloader())) == 6


def test_missing_root(tmp_path: Path) -> None:
    message = f"there is no {tmp_path}/nowhere/train: --data.root must name a folder with train/ and test/"
    with pytest.raises(UserError, match=message):
        Folders(str(tmp_path / "nowhere"))


def test_missing_test_part(pictures: Path) -> None:
    (pictures / "test").rename(pictures / "exam")
    with pytest.raises(UserError, match=f"there is no {pictures}/test: "):
        Folders(str(pictures))


def test_no_class_folders(tmp_path: Path) -> None:
    for part in ("train", "test"):
        draw(tmp_path / part / "0.png")
    with pytest.raises(UserError, match=f"{tmp_path}/train has no class folders: expected one per class"):
        Folders(str(tmp_path))


def test_empty_class_folder(pictures: Path) -> None:
    (pictures / "test" / "dog" / "0.png").unlink()
    data = Folders(str(pictures))
    with pytest.raises(UserError, match=f"class folder {pictures}/test/dog holds no picture: put files"):
        data.setup("test")


@pytest.mark.parametrize("part", ["test", "val"])
def test_classes_must_agree(pictures: Path, part: str) -> None:
    draw(pictures / part / "cat" / "0.png")
    draw(pictures / part / "dog" / "0.png")
    draw(pictures / part / "eel" / "0.png")
    with pytest.raises(ValueError, match=f"{part} must have the same class folders, but only one of them has eel: "):
        Folders(str(pictures))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nand no more"])
def test_unreadable_picture(pictures: Path, content: bytes) -> None:
    broken = pictures / "train" / "dog" / "1.png"
    broken.write_bytes(content)
    data = Folders(str(pictures))
    with pytest.raises(ValueError, match=f"{broken} cannot be read as a picture .*: replace it or delete it"):
        data.setup("fit")


def test_truncated_picture(pictures: Path) -> None:
    broken = pictures / "train" / "dog" / "1.png"
    draw(broken, (60, 40))
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(ValueError, match=f"{broken} cannot be read as a picture"):
        Folders(str(pictures), image_size=4).setup("fit")


def test_mixed_sizes_need_an_image_size(pictures: Path) -> None:
    draw(pictures / "train" / "dog" / "2.png", (5, 5))
    data = Folders(str(pictures))
    with pytest.raises(ValueError, match=r"cat/0.png is 6x4 but .*dog/2.png is 5x5: .*--data\.image_size"):
        data.setup("fit")
    Folders(str(pictures), image_size=4).setup("fit")


@pytest.mark.parametrize("part", ["test", "val"])
@pytest.mark.parametrize("lazy", [False, True])
def test_parts_of_another_size_are_refused(
    pictures: Path, part: str, lazy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat", "dog"):
        draw(pictures / part / name / "0.png", (8, 8))
    monkeypatch.setattr(folders, "MEMORY_LIMIT", 0 if lazy else folders.MEMORY_LIMIT)
    message = rf"train/cat/0.png is 6x4 but {pictures}/{part}/cat/0.png is 8x8: .*--data\.image_size"
    with pytest.raises(ValueError, match=message):
        Folders(str(pictures))  # of whatever command: a training would be followed by a test
    draw(pictures / part / "cat" / "0.png")
    if not lazy:  # else it is read when its batch is
        with pytest.raises(ValueError, match=message.replace("cat/0.png is 8", "dog/0.png is 8")):
            Folders(str(pictures)).setup("test" if part == "test" else "fit")
    Folders(str(pictures), image_size=4).setup()


def test_one_class_alone(tmp_path: Path) -> None:
    for part in ("train", "test"):
        draw(tmp_path / part / "cat" / "0.png")
    with pytest.raises(
        ValueError, match=f"{tmp_path}/train has one class folder alone, cat: there must be two or more"
    ):
        Folders(str(tmp_path))


# ---- what pixels become


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}
"""EXIF's orientations: how the stored rows and columns become the picture."""


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "lzw.tif", "16.png", "16.tif", "L.tif", "P.tif"])
def test_pictures_are_the_way_up_that_their_exif_says(kind: str, orientation: int, tmp_path: Path) -> None:
    pixels = np.random.randint(0, 256, (4, 6, 3), np.uint8)
    stored = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256 if "16" in kind else pixels)
    stored = stored.convert(kind[0]) if kind[0] in "LP" else stored
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options: dict[str, Any] = {"webp": {"lossless": True}, "lzw.tif": {"compression": "tiff_lzw"}}.get(kind, {})
    stored.save(tmp_path / f"turned.{kind}", exif=exif, **options)
    stored.save(tmp_path / f"stored.{kind}", **options)
    expected = UPRIGHT[orientation](np.asarray(open_picture(str(tmp_path / f"stored.{kind}"), None)))
    np.testing.assert_array_equal(open_picture(str(tmp_path / f"turned.{kind}"), None), expected)


def test_sizes_are_those_of_upright_pictures(pictures: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for path in pictures.rglob("*.png"):
        Image.new("RGB", (4, 6)).save(path, exif=exif)
    draw(pictures / "test" / "dog" / "0.png")
    data = Folders(str(pictures))
    data.setup()
    assert data.input_shape == (3, 4, 6)


RAMP = np.linspace(0, 65535, 512).astype(np.uint16).reshape(-1, 4)


def tiff(pixels: np.ndarray, bits: int, white: int, data: bytes) -> bytes:
    """A grey TIFF of one strip; `white` is its photometric interpretation."""
    height, width = pixels.shape
    tags = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, white),
        (273, 122),
        (278, height),
        (279, len(data)),
    ]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (339, 1)])
    return b"II*\0" + struct.pack("<IH", 8, 9) + directory + bytes(4) + data


@pytest.mark.parametrize(
    "name", ["png", "tif", "lzw.tif", "big.tif", "pgm", "text.pgm", "white.tif", "12.tif", "12.pgm"]
)
def test_16_bits_become_8_by_their_range(name: str, tmp_path: Path) -> None:
    path, expected = tmp_path / f"ramp.{name}", RAMP >> 8
    if name == "text.pgm":
        path.write_text(f"P2 4 {len(RAMP)} 65535\n" + " ".join(map(str, RAMP.flat)))
    elif name == "12.pgm":
        path.write_bytes(b"P5 4 %d 4095\n" % len(RAMP) + (RAMP >> 4).astype(">u2").tobytes())
    elif name == "white.tif":
        path.write_bytes(tiff(RAMP, 16, 0, RAMP.tobytes()))
        expected = 255 - expected
    elif name == "12.tif":
        bits = np.unpackbits(RAMP.astype(">u2").view(np.uint8)).reshape(-1, 16)
        path.write_bytes(tiff(RAMP, 12, 1, np.packbits(bits[:, :12]).tobytes()))
    else:
        options = {"compression": "tiff_lzw"} if name == "lzw.tif" else {}
        Image.fromarray(RAMP.astype(">u2") if name == "big.tif" else RAMP).save(path, **options)
    picture = np.asarray(open_picture(str(path), None))
    np.testing.assert_array_equal(picture, np.repeat(expected[..., None], 3, 2))
    assert (picture.min(), picture.max()) == (0, 255)


@pytest.mark.parametrize(("dtype", "values"), [(np.int32, "32 bits"), (np.float32, "floating-point numbers")])
def test_values_of_unknown_range_are_refused(dtype: type, values: str, tmp_path: Path) -> None:
    path = tmp_path / "ramp.tif"
    Image.fromarray(RAMP.astype(dtype)).save(path)
    with pytest.raises(PictureError, match=f"{path} .*{values}, whose range is not known; save it with 8 or 16 bits"):
        open_picture(str(path), None)


@pytest.mark.parametrize(
    "kind", ["1 png", "L jpg", "P png", "LA png", "RGB jpg", "RGBA webp", "CMYK jpg", "LAB tif", "YCbCr tif"]
)
def test_other_modes_are_converted_as_pil_does(kind: str, tmp_path: Path) -> None:
    mode, suffix = kind.split()
    path = tmp_path / f"a.{suffix}"
    picture = Image.fromarray(np.random.randint(0, 256, (5, 7, 3), np.uint8))
    picture.convert("L" if mode == "LA" else "RGB").convert(mode).save(path)
    with Image.open(path) as file:
        np.testing.assert_array_equal(open_picture(str(path), None), file.convert("RGB"))


# ---- what is no picture


@pytest.mark.parametrize("seed", range(3))
def test_damaged_pictures_are_read_or_refused(seed: int, pictures: Path) -> None:
    some = [Image.fromarray(np.random.randint(0, 256, (20, 30, 3), np.uint8)), Image.new("RGB", (6, 4), "red")]
    outcomes = []
    with warnings.catch_warnings(action="error"):
        for suffix, content in damaged_pictures(some, 54, seed):
            path = pictures / "test" / "dog" / f"1{suffix}"
            path.write_bytes(content)
            outcomes.append(check(pictures, path))
            path.unlink()
    assert 27 < outcomes.count("refused") < 54


STRANGE: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "damaged PPM": lambda path: path.write_bytes(b"P6 6 x4 255\n" + bytes(72)),
    "damaged 16-bit TIFF": lambda path: path.write_bytes(tiff(RAMP, 16, 1, RAMP.tobytes())[:900]),
    "bomb": lambda path: path.write_bytes(b"P6 20000 20000 255\n"),
    "no width": lambda path: path.write_bytes(tiff(RAMP[:, :0], 16, 1, b"")),
}


@pytest.mark.parametrize(
    ("strange", "way"), [*product(STRANGE, ["memory", "lazy"]), ("pipe", "workers"), ("bomb", "workers")]
)
def test_what_is_no_picture_is_named(
    strange: str, way: str, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures)  # a socket's path is short
    monkeypatch.setattr(folders, "MEMORY_LIMIT", folders.MEMORY_LIMIT if way == "memory" else 0)
    STRANGE[strange](Path("test/dog/1.png"))
    data = Folders(str(pictures), image_size=4, num_workers=int(way == "workers"))
    limit = "limit of 178956970 pixels" if strange == "bomb" else ""
    path = pictures / "test/dog/1.png"
    with pytest.raises(PictureError) as caught:  # noqa: PT012
        data.setup("test")
        list(data.test_dataloader())
    assert re.fullmatch(
        rf"{path} cannot be read as a picture \(.*{limit}.*\): replace it or delete it", str(caught.value)
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_command_answers_in_one_line(
    num_workers: int, pictures: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folders, "MEMORY_LIMIT", 0)
    os.mkfifo(pictures / "test/dog/1.png")
    data = ["-c", str(CONFIGS / "data/folders.yaml"), "--data.root", str(pictures), "--data.image_size", "8"]
    trainer = ["--trainer.logger", "false", "--trainer.default_root_dir", str(pictures), "--trainer.accelerator", "cpu"]
    assert tnlayers("test", *data, "--data.num_workers", str(num_workers), *trainer, *QUIET) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tnlayers: error")]
    assert len(errors) == 1
    assert errors[0].startswith(f"tnlayers: error: {pictures}/test/dog/1.png cannot be read as a picture (")


def test_large_pictures_are_read_without_a_warning(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # PIL warns from here on, and refuses twice as many
    with warnings.catch_warnings(action="error"):
        Folders(str(pictures)).setup()


def test_folders_that_cannot_be_walked(pictures: Path) -> None:
    (pictures / "test" / "dog" / "again").symlink_to(pictures / "test")
    with pytest.raises(
        PictureError, match=f"{pictures}/test/dog/again is a link to a folder that it lies in: delete it"
    ):
        Folders(str(pictures)).setup("test")


def test_folders_that_may_not_be_listed(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def forbidding(path: Any) -> Any:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    with pytest.raises(PictureError, match=r"test/dog cannot be listed \(Permission denied\): allow it or delete it"):
        Folders(str(pictures)).setup("test")


@pytest.mark.parametrize("image_size", [20_000, 10**9])
def test_image_size_that_fills_the_memory(pictures: Path, image_size: int) -> None:
    message = (
        rf"a batch of 1 pictures of {image_size}x{image_size} takes .* above the limit of 4 GiB: .*--data.image_size"
    )
    with pytest.raises(ValueError, match=message):
        Folders(str(pictures), image_size=image_size)


def test_batches_that_fill_the_memory(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "BATCH_LIMIT", 5 * 6 * 4 * 3 * 4)
    Folders(str(pictures)).setup("test")  # two pictures, however large a batch may be
    Folders(str(pictures), batch_size=5).setup("fit")
    with pytest.raises(
        ValueError, match=r"a batch of 6 pictures of 6x4 takes .* --data.image_size or --data.batch_size"
    ):
        Folders(str(pictures)).setup("fit")


def test_image_size_out_of_range(pictures: Path) -> None:
    with pytest.raises(ValueError, match="image_size is 0: give the pixels of a side"):
        Folders(str(pictures), image_size=0)


@pytest.mark.data
def test_real_pictures(cifar10_png: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is decoded once, beside the first of each part, whose sizes are compared."""
    decoded: list[str] = []

    def counting(path: str, image_size: int | None) -> Image.Image:
        decoded.append(path)
        return open_picture(path, image_size)

    monkeypatch.setattr(picture_files, "open_picture", counting)
    data = Folders(str(cifar10_png))
    assert data.class_names == CIFAR10.class_names
    assert data.input_shape == (3, 32, 32)
    data.setup()
    assert len(set(decoded)) == 6102
    assert len(decoded) - 6102 < 10
    assert (len(data.load("test")), len(fingerprints(data.train_dataloader()))) == (1017, 4577)


# ---- downloads, in the true files


def write_cifar(folder: Path, source: Any, label_key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four pictures in each of a CIFAR's batch files, whose checksums replace the true ones."""
    folder.mkdir(parents=True)

    def write(name: str, content: dict[str, Any]) -> tuple[str, str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(name: str) -> tuple[str, str]:
        rows = np.random.randint(0, 256, (4, 3072), np.uint8)
        # Red, green, blue, row by row: the first picture's pixel (0, 1) is (1, 2, 3).
        rows[0, [1, 1025, 2049]] = [1, 2, 3]
        return write(name, {"data": rows, label_key: [3, 1, 0, 2]})

    for table in ("train_list", "test_list"):
        monkeypatch.setattr(source, table, [batch(name) for name, _ in getattr(source, table)])
    _, checksum = write(source.meta["filename"], {source.meta["key"]: ["a", "b", "c", "d"]})
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": checksum})


@pytest.mark.parametrize(
    ("data_class", "label_key", "num_train"), [(CIFAR10, "labels", 20), (CIFAR100, "fine_labels", 4)]
)
def test_cifar_files(
    data_class: Any, label_key: str, num_train: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path / data_class.folder, data_class.source, label_key, monkeypatch)
    data = data_class(str(tmp_path), val_fraction=0)
    assert (data.input_shape, data.augment) == ((3, 32, 32), "crop_flip")
    data.prepare_data()
    data.setup()
    [(batch, labels)] = data.test_dataloader()
    assert (batch.shape, batch.dtype, labels.tolist()) == ((4, 3, 32, 32), torch.uint8, [3, 1, 0, 2])
    assert batch[0, :, 0, 1].tolist() == [1, 2, 3]
    assert batch.is_contiguous()
    assert len(fingerprints(data.train_dataloader())) == num_train


def test_class_names() -> None:
    assert (CIFAR10().num_classes, CIFAR100().num_classes, FashionMNIST().num_classes) == (10, 100, 10)
    assert FashionMNIST.class_names == datasets.FashionMNIST.classes
    for names in (CIFAR10.class_names, CIFAR100.class_names):
        # The authors numbered them by the alphabet.
        assert names == sorted(set(names))


def write_idx(folder: Path, *, compress: bool) -> None:
    """Six training and three test pictures in Fashion-MNIST's files."""
    folder.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 3)):
        pixels = np.random.randint(0, 256, (count, 28, 28), np.uint8)
        pixels[0, 0, 1] = 77
        images = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in pixels.shape) + pixels.tobytes()
        labels = b"\0\0\x08\x01" + count.to_bytes(4, "big") + bytes(range(count))
        for name, content in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


def check_fashion(data: FashionMNIST) -> None:
    data.prepare_data()
    data.setup()
    [(batch, labels)] = data.test_dataloader()
    assert (batch.shape, labels.tolist(), batch[0, 0, 0, 1].item()) == ((3, 1, 28, 28), [0, 1, 2], 77)
    assert len(fingerprints(data.train_dataloader())) == 6


def test_fashion_files(tmp_path: Path) -> None:
    write_idx(tmp_path / "FashionMNIST" / "raw", compress=False)
    check_fashion(FashionMNIST(str(tmp_path), val_fraction=0))


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a web server on this machine that serves `tmp_path`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


def test_fashion_download(tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path / "mirror", compress=True)
    checksums = [
        (name, hashlib.md5((tmp_path / "mirror" / name).read_bytes()).hexdigest())
        for name, _ in datasets.FashionMNIST.resources
    ]
    monkeypatch.setattr(datasets.FashionMNIST, "resources", checksums)
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"{mirror}/mirror/"])
    check_fashion(FashionMNIST(str(tmp_path / "data"), download=True, val_fraction=0))


def test_cifar_download(tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path / CIFAR10.folder, datasets.CIFAR10, "labels", monkeypatch)
    archive = tmp_path / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / CIFAR10.folder, CIFAR10.folder)
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{mirror}/{archive.name}")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    data = CIFAR10(str(tmp_path / "data"), download=True)
    data.prepare_data()
    data.setup("test")
    assert len(data.load("test")) == 4


@pytest.mark.parametrize("data_class", [CIFAR10, CIFAR100, FashionMNIST])
def test_missing_files(data_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = data_class()
    data.prepare_data()
    message = re.escape(
        f"{data_class.__name__} is missing or damaged: expected its files in {tmp_path}/data/{data.folder}"
    )
    with pytest.raises(UserError, match=f"{message}.*--data.root .*--data.download true$"):
        data.setup("fit")


@pytest.mark.parametrize("data_class", [CIFAR10, FashionMNIST])
def test_failed_download(data_class: Any, tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = f"{mirror}/nowhere/"
    if data_class is CIFAR10:
        monkeypatch.setattr(datasets.CIFAR10, "url", nowhere)
    else:
        monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [nowhere])
    data = data_class(str(tmp_path), download=True)
    with pytest.raises(ValueError, match=rf"cannot download {data_class.__name__} to .*\(.*404.*\): fetch it"):
        data.prepare_data()
