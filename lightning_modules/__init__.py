"""Lightning training for networks with tensorized layers: classifier, data, nets, compression, reports, command line."""

from importlib import import_module
from typing import Any

_HOMES = {
    "Compression": "compression",
    "ImageClassifier": "classifier",
    "NETS": "nets",
    "Report": "report",
    "TensorizedCheckpoint": "tensorized",
    "build_net": "nets",
    "compress": "compression",
    "load_net": "classifier",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: the command line answers --help without waiting for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
