"""Weights & Biases that never stands in the way: without a key or a network the run is logged offline, and says so."""

import logging
import os
import socket
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

__all__ = ["WandB"]

_log = logging.getLogger(__name__)
_CONNECT_SECONDS = 3.0


class WandB(WandbLogger):
    """Lightning's `WandbLogger`, offline where W&B cannot be reached.

    Args:
        project: the W&B project.
        name: the run's name; W&B invents one by default.
        save_dir: where the files go.
        offline: True or False to insist; None goes offline when there is no key, or no connection. `WANDB_MODE` wins.
        kwargs: what else `WandbLogger` and `wandb.init` take.
    """

    def __init__(
        self,
        project: str = "tnlayers",
        name: str | None = None,
        save_dir: str = "runs",
        offline: bool | None = None,
        **kwargs: Any,
    ) -> None:
        mode = os.environ.get("WANDB_MODE")
        if offline is None and mode is None:
            reason = _unreachable()
            offline = bool(reason)
            if reason:
                _say_offline(reason, save_dir)
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        # The mode goes to wandb.init alone: WandbLogger(offline=True) would set an environment variable for the process.
        settings = kwargs if mode is not None else {"mode": "offline" if offline else "online", **kwargs}
        super().__init__(project=project, name=name, save_dir=save_dir, **settings)
        self._wandb_init.pop("anonymous", None)  # wandb warns of it whatever it is


@rank_zero_only
def _say_offline(reason: str, save_dir: str) -> None:
    _log.warning("W&B is offline (%s); upload later with: wandb sync %s/wandb/offline-run-*", reason, save_dir)


def _unreachable() -> str:
    """Why W&B cannot be used online; empty if it can."""
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    if not os.environ.get("WANDB_API_KEY") and not _key_in_netrc(host):
        return "no API key; `wandb login` sets one"
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_SECONDS):
            return ""
    except OSError as error:
        return f"{host} cannot be reached: {error}"


def _key_in_netrc(host: str) -> bool:
    """Whether `wandb login` has left a key where it leaves it."""
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if path and netrc(Path(path).expanduser()).authenticators(host):
                return True
        except (OSError, NetrcParseError):
            continue
    return False
