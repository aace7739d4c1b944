"""Fixtures every test shares: the real data, and a clean process around each test."""

import os
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401  (it and sklearn set environment variables when they are first imported)
import numpy as np
import pytest
import sklearn  # noqa: F401
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_modules.checkpoint_io import AtomicCheckpointIO
from tests.processes import Forks

# What pytest, torch's compiler and Jupyter set for the process when they are first used.
_OTHERS = ("PYTEST_", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_", "PYDEVD_")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of the real pictures and the published checkpoint; skips (in CI: fails) where there is none."""
    folder = os.environ.get("TNLAYERS_SHARED")
    if folder and (Path(folder) / "checkpoints").is_dir():
        return Path(folder)
    reason = f"TNLAYERS_SHARED is {folder!r}; set it to the folder that holds data/ and checkpoints/"
    if os.environ.get("TNLAYERS_REQUIRE_DATA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def resnet20_checkpoint(shared: Path) -> Path:
    return shared / "checkpoints" / "resnet20-12fca82f.th"


@pytest.fixture(scope="session")
def cifar10_png(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lossless CIFAR-10 pictures as class folders under train/ and test/."""
    folder = tmp_path_factory.mktemp("pictures")
    with tarfile.open(shared / "data" / "cifar10-png.tar.xz") as archive:
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4 on
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(folder)
    found = next(path.parent for path in folder.rglob("train") if path.is_dir())
    return found


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """Seeds every test alike and fails one that leaks what others would feel."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    environment = dict(os.environ)
    before = (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
    yield
    assert (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()) == before, (
        "torch's defaults leaked"
    )
    changed = {key for key in environment.keys() | os.environ.keys() if environment.get(key) != os.environ.get(key)}
    changed = {key for key in changed if not key.startswith(_OTHERS)}
    assert not changed, f"environment variables leaked: {sorted(changed)}"


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with Forks() as started:
        yield started


@pytest.fixture(scope="session", autouse=True)
def written_checkpoints() -> Iterator[list[Path]]:
    """The paths of the checkpoints that were written in this process."""
    paths: list[Path] = []

    def recording(save: Callable[..., None]) -> Callable[..., None]:
        def recorded(self: object, checkpoint: dict[str, Any], path: str, *args: Any, **options: Any) -> None:
            save(self, checkpoint, path, *args, **options)
            paths.append(Path(path))

        return recorded

    with pytest.MonkeyPatch.context() as patch:
        for writer in (TorchCheckpointIO, AtomicCheckpointIO):
            patch.setattr(writer, "save_checkpoint", recording(writer.save_checkpoint))
        yield paths


@pytest.fixture(autouse=True)
def plain_checkpoints(written_checkpoints: list[Path]) -> Iterator[None]:
    """Every checkpoint that a test, or a fixture of it, writes holds tensors and plain values: `weights_only` takes it."""
    yield
    while written_checkpoints:
        path = written_checkpoints.pop()
        if path.is_file():
            torch.load(path, weights_only=True)
