"""Tucker of a tensorized matrix: features split into small modes, one matrix for each mode and a core that joins them all.

Tjandra, Sakti and Nakamura, Tensor decomposition for compressing recurrent neural network (2018), arXiv 1802.10410, section
III-B; the fit is HOOI, De Lathauwer, De Moor and Vandewalle (2000), algorithm 4.2.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from torch import Tensor

from tnlayers.layers import FactorizedLinear
from tnlayers.linalg import tucker
from tnlayers.methods.tt import Tensorized
from tnlayers.network import Network
from tnlayers.ranks import Ranks

__all__ = ["TuckerLinear", "TuckerMatrix"]


@dataclass(frozen=True)
class TuckerMatrix(Tensorized):
    """W[(o1 o2),(i1 i2)] = sum output1[o1,r1] output2[o2,r2] core[r1,r2,s1,s2] input1[s1,i1] input2[s2,i2]; rank = (r1, r2, s1, s2).

    It is a method apart from `Tucker`, so that a rule for all layers may take Tucker-2 for the convolutions alone.

    Args:
        in_shape, out_shape: the modes (i1, ..., id) and (o1, ..., od) whose products are the features, at most four of
            each; two balanced ones by default, since the core has as many entries as the product of all 2 d ranks.
    """

    replaces: ClassVar[tuple[str, ...]] = ("Linear",)
    source: ClassVar[str] = "Tjandra et al. 2018, arXiv 1802.10410"
    cores: ClassVar[int] = 2
    most_cores: ClassVar[int] = 4

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _network(len(self.shapes(weight_shape)[0]))

    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        core, bases = tucker(self.tensorized(weight), dict(enumerate(ranks)))
        count = len(ranks) // 2
        outputs = {f"output{n + 1}": bases[n] for n in range(count)}
        inputs = {f"input{n + 1}": bases[count + n].mT for n in range(count)}
        return inputs | {"core": core} | outputs


@lru_cache
def _network(count: int) -> Network:
    modes = range(1, count + 1)
    rank = " ".join([*(f"r{n}" for n in modes), *(f"s{n}" for n in modes)])
    inputs = {f"input{n}": f"s{n} i{n}" for n in modes}
    outputs = {f"output{n}": f"o{n} r{n}" for n in modes}
    weight = "({}) ({})".format(*(" ".join(f"{end}{n}" for n in modes) for end in "oi"))
    return Network(inputs | {"core": rank} | outputs, weight=weight, rank=rank)


class TuckerLinear(FactorizedLinear):
    """Tucker of a tensorized linear; `rank` has one int for each of the modes `out_shape`, then `in_shape`.

    See `TuckerMatrix` and `nn.Linear`.
    """

    method = TuckerMatrix
