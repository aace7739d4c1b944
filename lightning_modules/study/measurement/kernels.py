"""What a study truncates: for every layer its cuts, alone and several at once, at bond dimensions found from norm losses."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.study.rows import CONTROLS, CUT_SETS, Single
from tnlayers.cuts import NormLoss, Split, norm_loss, random_weight, splits, truncate_cuts
from tnlayers.errors import UserError

__all__ = ["Kernel", "Trial"]


class Trial(NamedTuple):
    """A truncation of one layer, or its control: the key of a `Single`."""

    kind: str
    layer: str
    cuts: tuple[str, ...]
    bonds: tuple[int, ...]
    control: str


class Kernel:
    """A layer's weight as it was trained, and its truncations.

    Attributes:
        weight: (o, i, h, w), or (o, i) of a linear.

    Raises:
        ValueError: the weight has values that are not finite.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        assert isinstance(module.weight, Tensor)
        self.weight = module.weight.detach().clone()
        if not torch.isfinite(self.weight).all():
            raise UserError(f"the weight of {name} has values that are not finite: nothing can be said of its spectrum")

    @cached_property
    def splits(self) -> dict[str, Split]:
        """Cut -> its spectrum."""
        return splits(self.weight)

    def cut_sets(self) -> list[tuple[str, ...]]:
        """Lists every cut alone, then those sets of several that this weight has."""
        return [*((cut,) for cut in self.splits), *(cuts for cuts in CUT_SETS.values() if self.has(cuts))]

    def has(self, cuts: Sequence[str]) -> bool:
        return set(cuts) <= self.splits.keys()

    def bonds(self, cuts: Sequence[str], eps: float) -> tuple[int, ...]:
        """Finds for each cut the smallest bond dimension that loses at most `eps` there."""
        return tuple(self.splits[cut].bond(eps) for cut in cuts)

    def whole(self, cuts: Sequence[str]) -> tuple[int, ...]:
        return tuple(len(self.splits[cut].values) for cut in cuts)

    def trials(self, losses: Sequence[float]) -> list[Trial]:
        """Lists every truncation once, with the controls of the first cut; those that truncate nothing are left out."""
        found: dict[Trial, None] = {}
        for cuts in self.cut_sets():
            for bonds in (self.bonds(cuts, eps) for eps in losses):
                if bonds != self.whole(cuts):
                    controls = CONTROLS if cuts == self.cut_sets()[0] else ()
                    found |= {Trial(Single.kind, self.name, cuts, bonds, control): None for control in ("", *controls)}
        return list(found)

    def truncated(self, cuts: Sequence[str], bonds: Sequence[int]) -> Tensor:
        first, *others = zip(cuts, bonds, strict=True)
        return truncate_cuts(self.splits[first[0]].truncated(first[1]), others)

    def attempt(self, trial: Trial, seed: int) -> tuple[Tensor, NormLoss]:
        """Gives the weight that a trial puts in place of the layer's, and what of its norm is lost.

        A random weight is truncated like the layer's own and loses as much.
        """
        truncated = self.truncated(trial.cuts, trial.bonds)
        if not trial.control:
            return truncated, norm_loss(self.weight, truncated)
        (cut,), (bond,) = trial.cuts, trial.bonds
        values, shape = self.splits[cut].values, self.weight.shape
        generator = torch.Generator().manual_seed(_seed(seed, *map(str, trial)))
        if trial.control == "random weight":
            drawn = random_weight(shape, cut, values[:bond], generator).to(self.weight)
            return drawn, norm_loss(self.weight, truncated)
        drawn = self.weight + random_weight(shape, cut, values[bond:], generator).to(self.weight)
        return drawn, norm_loss(self.weight, drawn)


def _seed(*parts: object) -> int:
    """Makes a seed of what it is for alone, so that a study that goes on draws what it would have drawn."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6])
