"""One file per method: index strings, decomposition, source."""

from tnlayers.factorizations.adtn import ADTN
from tnlayers.factorizations.base import Factorization, Slice
from tnlayers.factorizations.cp import CP
from tnlayers.factorizations.lowrank import LowRank
from tnlayers.factorizations.mps import MPS
from tnlayers.factorizations.tt import TT
from tnlayers.factorizations.ttconv import TTConv
from tnlayers.factorizations.tucker import Tucker

__all__ = ["ADTN", "CP", "METHODS", "MPS", "TT", "Factorization", "LowRank", "Slice", "TTConv", "Tucker"]

METHODS: tuple[type[Factorization], ...] = (Tucker, CP, MPS, LowRank, TTConv, TT, ADTN)
