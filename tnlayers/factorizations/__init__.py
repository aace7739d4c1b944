"""One file per method: index strings, decomposition, source."""

from tnlayers.factorizations.base import Factorization
from tnlayers.factorizations.cp import CP
from tnlayers.factorizations.mps import MPS
from tnlayers.factorizations.tt import TT
from tnlayers.factorizations.tucker import Tucker

__all__ = ["CP", "METHODS", "MPS", "TT", "Factorization", "Tucker"]

METHODS: tuple[type[Factorization], ...] = (Tucker, CP, MPS, TT)
