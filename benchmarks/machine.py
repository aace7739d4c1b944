"""What figures depend on: the device, the versions and the commit."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__all__ = ["ROOT", "commit", "machine"]

ROOT = Path(__file__).parents[1]
_PACKAGES = ("torch", "torchvision", "tensorly")


def machine(device: torch.device, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Describes the device and the versions, those of further packages too."""
    cuda = device.type == "cuda"
    versions = {"python": platform.python_version(), **{name: version(name) for name in (*_PACKAGES, *packages)}}
    versions |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())} if cuda else {}
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({_processor()}, {os.cpu_count()} cores)",
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _processor() -> str:
    """Returns its name where Linux tells it, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """Returns the commit that is checked out; None where git does not say."""
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return asked.stdout.strip()
