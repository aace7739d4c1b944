"""Callbacks: truncations, interruptions, averages, and what is written during a run."""

from lightning_modules.callbacks.autotune import Autotune
from lightning_modules.callbacks.compression_log import CompressionLog
from lightning_modules.callbacks.ema import EMA
from lightning_modules.callbacks.freeze import Freeze
from lightning_modules.callbacks.rank_schedule import RankSchedule
from lightning_modules.callbacks.stopping import Interruptible, RunCheckpoint
from lightning_modules.callbacks.writers import PredictionWriter, RunConfig

__all__ = [
    "EMA",
    "Autotune",
    "CompressionLog",
    "Freeze",
    "Interruptible",
    "PredictionWriter",
    "RankSchedule",
    "RunCheckpoint",
    "RunConfig",
]
