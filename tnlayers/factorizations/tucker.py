"""Tucker-2: both channel modes compressed, the spatial ones left in the core.

Kim et al., Compression of deep convolutional neural networks for fast and low power mobile applications (2016),
arXiv 1511.06530, section 3; the fit is HOOI, De Lathauwer et al. (2000), algorithm 4.2.
"""

from dataclasses import dataclass
from typing import ClassVar

from tensorly.decomposition import partial_tucker
from torch import Tensor

from tnlayers.factorizations.base import Factorization
from tnlayers.network import Network
from tnlayers.ranks import Ranks

__all__ = ["Tucker"]

_NETWORK = Network({"input": "s i", "core": "r s h w", "output": "o r"}, weight="o i h w", rank="r s")


@dataclass(frozen=True)
class Tucker(Factorization):
    """W[o,i,h,w] = sum_rs output[o,r] core[r,s,h,w] input[s,i]; rank = (rank_out, rank_in) = (r, s)."""

    replaces: ClassVar[str] = "Conv2d"

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _NETWORK

    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        (core, (output, inputs)), _ = partial_tucker(weight, rank=list(ranks), modes=[0, 1], n_iter_max=50, tol=1e-6)
        return {"input": inputs.mT, "core": core, "output": output}
