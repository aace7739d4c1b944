"""CP of a tensorized matrix: features split into small modes, and a sum of rank-one terms with one vector for each mode.

Tjandra, Sakti and Nakamura, Tensor decomposition for compressing recurrent neural network (2018), arXiv 1802.10410; the fit
is that of `tnlayers.methods.cp`.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from torch import Tensor

from tnlayers.layers import FactorizedLinear
from tnlayers.methods.cp import CP
from tnlayers.methods.tt import Tensorized
from tnlayers.network import Network

__all__ = ["CPLinear", "CPMatrix"]


@dataclass(frozen=True)
class CPMatrix(CP, Tensorized):
    """W[(o1 o2),(i1 i2)] = sum_r output1[o1,r] output2[o2,r] input1[i1,r] input2[i2,r]; rank = r.

    It is a method apart from `CP`, so that a rule for all layers may take CP for the convolutions alone.

    Args:
        in_shape, out_shape: the modes (i1, ..., id) and (o1, ..., od) whose products are the features, at most five of
            each; two balanced ones by default.
    """

    replaces: ClassVar[tuple[str, ...]] = ("Linear",)
    source: ClassVar[str] = "Tjandra et al. 2018, arXiv 1802.10410"
    cores: ClassVar[int] = 2
    most_cores: ClassVar[int] = 5

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _network(len(self.shapes(weight_shape)[0]))

    def tensor(self, weight: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """Returns the tensorized weight, its largest modes in front, as the terms that are exact are the fewer then."""
        tensor, network = self.tensorized(weight), self.network(tuple(weight.shape))
        order = sorted(range(tensor.dim()), key=lambda axis: -tensor.shape[axis])
        held = {indices[0]: name for name, indices in network.indices.items()}
        return tensor.permute(order), tuple(held[network.weight_indices[axis]] for axis in order)


@lru_cache
def _network(count: int) -> Network:
    modes = range(1, count + 1)
    inputs = {f"input{n}": f"i{n} r" for n in modes}
    outputs = {f"output{n}": f"o{n} r" for n in modes}
    weight = "({}) ({})".format(*(" ".join(f"{end}{n}" for n in modes) for end in "oi"))
    return Network(inputs | outputs, weight=weight)


class CPLinear(FactorizedLinear):
    """CP of a tensorized linear: `rank` terms, with one vector for each of the modes `out_shape` and `in_shape`.

    See `CPMatrix` and `nn.Linear`.
    """

    method = CPMatrix
