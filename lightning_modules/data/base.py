"""The base of all sets of labelled pictures: the split, the loaders, and the work on a batch's device.

Shapes: N pictures, C channels, H rows, W columns.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Subset, random_split

from lightning_modules.data.augment import crop_flip, normalise
from lightning_modules.data.pictures import Batch, PictureSet, as_is
from lightning_modules.data.samplers import EpochSampler, LateLoader, Padded
from lightning_modules.processes import check_processes
from lightning_modules.seeds import batch_seed
from tnlayers.errors import UserError

__all__ = ["Augment", "ImageData"]

Augment = Literal["none", "crop", "crop_flip"]


class ImageData(LightningDataModule):
    """Labelled pictures; a subclass gives the class attributes and `load`.

    Loaders yield uint8 pictures and labels; `on_after_batch_transfer`, which the trainer calls on the batch's device,
    makes them float, normalises them and, in training only, augments them.

    Args:
        batch_size: pictures in a batch (per process under DDP).
        val_fraction: part of the training pictures that is held out for validation; 0 for no validation.
        split_seed: seeds that choice.
        augment: "crop" shifts training pictures at random, "crop_flip" also mirrors them; None for the data set's own.
        mean: C channel means of pictures in 0..1; None for the data set's own.
        std: C channel standard deviations of pictures in 0..1; None for the data set's own.
        num_workers: processes that read pictures; 0 is best for pictures in memory.

    Raises:
        UserError: a value is out of range.
    """

    class_names: list[str]
    """Name of each label."""
    input_shape: tuple[int, int, int]
    """(C, H, W)."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment = "crop_flip"
    padding: int = 4
    """Pixels by which a crop moves at most."""

    def __init__(
        self,
        *,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        augment: Augment | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.augment = self.augment if augment is None else augment
        self.mean = self.mean if mean is None else tuple(mean)
        self.std = self.std if std is None else tuple(std)
        self.num_workers = num_workers
        self._train: PictureSet | Subset[Batch] | None = None
        self._val: PictureSet | Subset[Batch] | None = None
        self._test: PictureSet | None = None
        self._check()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_train(self) -> int:
        """The number of pictures that are trained with; it reads them if they are not there."""
        self.setup("fit")
        assert self._train is not None
        return len(self._train)

    def load(self, part: Literal["train", "test"]) -> PictureSet:
        """Reads the training or the test pictures."""
        raise NotImplementedError

    def load_val(self) -> PictureSet | None:
        """Reads the validation pictures of a data set that brings its own; None where there are none."""
        return None

    def setup(self, stage: str | None = None) -> None:
        """Reads what a stage needs, once; everything where `stage` is None."""
        if stage in (None, "fit", "validate") and self._train is None:
            train, self._val = self.load("train"), self.load_val()
            if self._val is None:
                num_val = int(len(train) * self.val_fraction)
                generator = torch.Generator().manual_seed(self.split_seed)
                self._val, self._train = random_split(train, [num_val, len(train) - num_val], generator)
            else:
                self._train = train
        if stage in (None, "test", "predict") and self._test is None:
            self._test = self.load("test")

    def picture_names(self) -> Sequence[str]:
        """Returns what predictions call each test picture: its place, or its file where it has one."""
        return [str(place) for place in range(len(self._test or ()))]

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self._train is not None, "setup() comes before the loaders"
        sampler = EpochSampler(self._train, *self._processes(), done=self._done)
        return LateLoader(self._train, sampler=sampler, **self._reading())

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        return self._evaluation_loader(self._val) if self._val else []

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation_loader(self._test)

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation_loader(self._test)

    def on_after_batch_transfer(self, batch: Batch | Tensor, dataloader_idx: int) -> Batch | Tensor:
        """Turns uint8 (N, C, H, W) into float32 (N, C, H, W), normalised, and augmented in training."""
        if isinstance(batch, Tensor):  # the example that Lightning's model summary runs: floats already
            return batch
        pictures, labels = batch
        if self.augment != "none" and self.trainer is not None and self.trainer.training:
            # Before normalising, so that the zeros around a shifted picture are black.
            generator = torch.Generator(pictures.device).manual_seed(batch_seed(self.trainer))
            pictures = crop_flip(pictures, padding=self.padding, flip=self.augment == "crop_flip", generator=generator)
        return normalise(pictures, self.mean, self.std), labels

    def calibration_batches(self, n: int) -> list[Tensor]:
        """Returns the same n batches of training pictures at every call, to estimate statistics from; needs no trainer.

        Args:
            n: number of batches; they are smaller than `batch_size` where the training pictures do not fill n of them,
                so no picture comes twice.

        Returns:
            n float32 (N, C, H, W), normalised and not augmented.

        Raises:
            UserError: unless there is a picture for each batch.
        """
        self.setup("fit")
        assert self._train is not None
        if not 1 <= n <= len(self._train):
            raise UserError(
                f"cannot make {n} calibration batches of {len(self._train)} training pictures: ask for at least 1 and "
                "at most one per picture"
            )
        order = torch.randperm(len(self._train), generator=torch.Generator().manual_seed(0))
        batches = [part.tolist() for part in torch.tensor_split(order[: n * self.batch_size], n)]
        loader = DataLoader(self._train, batch_sampler=batches, num_workers=self.num_workers, collate_fn=as_is)
        return [normalise(pictures, self.mean, self.std) for pictures, _ in loader]

    def validation_batches(self) -> Iterator[Batch]:
        """Gives all validation pictures, normalised and not augmented, and their labels, in every process; needs no trainer.

        Raises:
            UserError: there are none.
        """
        self.setup("fit")
        if not self._val:
            raise UserError("there are no validation pictures; hold some out: --data.val_fraction 0.1")
        yield from self._plain_batches(self._val)

    def test_batches(self, n: int | None = None, seed: int = 0) -> Iterator[Batch]:
        """Gives test pictures, normalised and not augmented, and their labels, in every process; needs no trainer.

        Args:
            n: how many are drawn at random; None for all.
            seed: seeds that draw.

        Raises:
            UserError: there are not so many.
        """
        self.setup("test")
        assert self._test is not None
        if n is not None and not 1 <= n <= len(self._test):
            raise UserError(f"cannot draw {n} test pictures: there are {len(self._test)}")
        order = torch.randperm(len(self._test), generator=torch.Generator().manual_seed(seed))
        yield from self._plain_batches(Subset(self._test, sorted(order[:n].tolist())))

    def _plain_batches(self, pictures: PictureSet | Subset[Batch]) -> Iterator[Batch]:
        for chosen, labels in DataLoader(pictures, **self._reading()):
            yield normalise(chosen, self.mean, self.std), labels

    def _evaluation_loader(self, pictures: PictureSet | Subset[Batch] | None) -> DataLoader[Batch]:
        assert pictures is not None, "setup() comes before the loaders"
        processes, rank = self._processes()
        padded = Padded(pictures, processes)
        return DataLoader(padded, sampler=DistributedSampler(padded, processes, rank, shuffle=False), **self._reading())

    def _reading(self) -> dict[str, Any]:
        """Returns the arguments of every loader, all as keywords: Lightning builds some loaders anew from them."""
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "collate_fn": as_is,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
        }

    def _processes(self) -> tuple[int, int]:
        """Returns how many processes share the pictures, and which of them this is."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _done(self) -> int:
        """Returns how many pictures of this process the epoch was trained on before the run was resumed."""
        if self.trainer is None or not self.trainer.training:
            return 0
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        return batches * self.batch_size

    def _check(self) -> None:
        channels = self.input_shape[0]
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: give at least 1, such as --data.batch_size 128")
        if not 0 <= self.val_fraction < 1:
            raise UserError(
                f"val_fraction is {self.val_fraction}: give the part of the training pictures to hold out, from 0 to "
                "below 1, such as --data.val_fraction 0.1"
            )
        if self.num_workers < 0:
            raise UserError(f"num_workers is {self.num_workers}: give 0 to read in this process, or more")
        check_processes("data.num_workers", self.num_workers)
        if self.augment not in get_args(Augment):
            raise UserError(f"augment is {self.augment!r}: give one of {', '.join(get_args(Augment))}")
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise UserError(
                f"mean is {self.mean} and std {self.std}: give one mean and one positive std for each of the "
                f"{channels} channels, for pictures in 0..1"
            )
