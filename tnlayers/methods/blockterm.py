"""Block terms: a sum of Tucker-2 blocks, computed as one convolution with as many groups as there are blocks.

De Lathauwer, Decompositions of a higher-order tensor in block terms, part II: definitions and uniqueness (2008), SIAM J. Matrix
Anal. Appl. 30, the type-2 decomposition in rank-(L, M, .) terms; the fit is the alternating least squares (ALS) of part III (De
Lathauwer and Nion 2008). As layers: Chen, Jin, Kang, Feng and Yan, Sharing residual units through collective tensor
factorization (2017), arXiv 1703.02180, where ResNeXt's bottleneck is a sum of such blocks.

A sum of blocks has no SVD, and ALS needs a start. Here the singular vectors of the output are dealt out to the blocks like cards,
and each block takes the best inputs for its own. What blocks of disjoint outputs lose adds up, so that the start's error is known
before it is made. It vanishes when every output is dealt out and every block has all the inputs that it can use.

Legend: o, i are output and input channels, k the positions of the window, b the blocks, r and s the two ranks of each block.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from tnlayers.contraction import Indices
from tnlayers.errors import UserError
from tnlayers.layers import FactorizedConv2d
from tnlayers.linalg import decomposing, leading_subspace, relative_error, tails, unfold
from tnlayers.method import CONVOLUTIONS, Factorization
from tnlayers.methods.tucker import Tucker
from tnlayers.network import Network, window_of
from tnlayers.ranks import Ranks

__all__ = ["BlockTerm", "BlockTermConv2d"]

_SWEEPS = 30
_TOLERANCE = 1e-4  # of the relative error, between two sweeps
_DAMPING = 1e-2  # of the squared error; see `_als`
_MOST_WORK = 100_000_000_000  # multiply-accumulates of all sweeps, some ten seconds; above there are fewer sweeps

Block = tuple[Tensor, Tensor, Tensor]
"""The output's basis (o, r), the core (r, s, k) and the input's basis (i, s); both are orthonormal after a step of ALS."""


@dataclass(frozen=True)
class BlockTerm(Factorization):
    """W[o,i,h,w] = sum_brs output[o,b,r] core[b,r,s,h,w] input[b,s,i]; rank = (rank_out, rank_in) = (r, s) of each block.

    At the same number of inner channels the core has `blocks` times fewer parameters and multiplications than that of `Tucker`.

    Ranks that a rule chooses are those that the start of the fit needs, so that the error of the fit is smaller than asked.

    Args:
        blocks: how many, at most one for each output channel of a group.

    Raises:
        ValueError: fewer blocks than one.
    """

    blocks: int = 4

    replaces: ClassVar[tuple[str, ...]] = CONVOLUTIONS
    source: ClassVar[str] = "De Lathauwer 2008, rank-(L, M, .) terms"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.blocks) is not int or self.blocks < 1:
            raise UserError(f"blocks {self.blocks!r}: expected how many blocks are summed, an int such as 4")

    def network(self, weight_shape: tuple[int, ...]) -> Network:
        return _network(window_of(weight_shape))

    def mode_sizes(self, weight_shape: tuple[int, ...]) -> dict[str, int]:
        return super().mode_sizes(weight_shape) | {"b": min(self.blocks, _outputs(weight_shape))}

    def bonds(self, weight_shape: tuple[int, ...]) -> Indices:
        return ("r", "s")

    def clamp(self, weight_shape: tuple[int, ...], ranks: Ranks) -> Ranks:
        """Returns the ranks that a block attains, the first at most its share of the outputs."""
        share = math.ceil(_outputs(weight_shape) / self.mode_sizes(weight_shape)["b"])
        return Tucker(1).clamp(weight_shape, (min(ranks[0], share), ranks[1]))

    def ranks_from(self, network: Network, shapes: Mapping[str, Sequence[int]]) -> Ranks:
        sizes = network.sizes_from(shapes)
        return sizes["r"], sizes["s"]

    def error_estimate(self, weight: Tensor) -> Callable[[Ranks], float]:
        """Returns at most what the start loses when the inputs of each block are singular vectors of the whole weight's input."""
        tensor, blocks = weight.flatten(2), self.mode_sizes(tuple(weight.shape))["b"]
        with decomposing():
            inputs = leading_subspace(unfold(tensor, [1]), min(unfold(tensor, [1]).shape))
            dealt = torch.tensordot(_dealt(tensor, blocks), tensor, dims=([0], [0]))  # (b, r, i, k)
            energy = torch.einsum("brik,is->brsk", dealt, inputs).square().sum(dim=-1)
            # of the first r outputs of every block, what is in its s weakest inputs
            weakest = energy.cumsum(dim=1).sort(dim=2).values.cumsum(dim=2).sum(dim=0).cpu().numpy()
        undealt = tails(energy.sum(dim=(0, 2)).tolist())

        def error(ranks: Ranks) -> float:
            dropped = weakest.shape[1] - ranks[1]
            lost = undealt[ranks[0]] + (weakest.item(ranks[0] - 1, dropped - 1) if dropped > 0 else 0.0)
            return lost / undealt[0] if undealt[0] > 0 else 0.0

        return error

    def _decompose(self, weight: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        shape, tensor = tuple(weight.shape), weight.flatten(2)
        blocks = _start(tensor, self.mode_sizes(shape)["b"], ranks)
        if ranks != self.max_ranks(shape) and weight.any():
            blocks = min(_als(tensor, blocks), blocks, key=lambda blocks: relative_error(tensor, _product(blocks)))
        outputs, cores, inputs = map(torch.stack, zip(*blocks, strict=True))
        return {
            "input": inputs.mT,
            "core": cores.reshape(*cores.shape[:3], *shape[2:]),
            "output": outputs.transpose(0, 1),
        }


@lru_cache
def _network(window: str) -> Network:
    factors = {"input": "b s i", "core": f"b r s {window}", "output": "o b r"}
    return Network(factors, weight=f"o i {window}", rank="r s")


def _outputs(weight_shape: tuple[int, ...]) -> int:
    """Returns how many directions of the output a weight of this shape has at most."""
    return min(weight_shape[0], math.prod(weight_shape[1:]))


def _dealt(tensor: Tensor, blocks: int) -> Tensor:
    """Returns (o, b, r), the singular vectors of the output, one after the other to one block after the other; zeros at the end."""
    rows = unfold(tensor, [0])
    basis = leading_subspace(rows, min(rows.shape))
    padded = torch.nn.functional.pad(basis, (0, -basis.shape[1] % blocks))
    return padded.unflatten(1, (-1, blocks)).transpose(1, 2)


def _start(tensor: Tensor, blocks: int, ranks: Ranks) -> list[Block]:
    rank_out, rank_in = ranks
    found = []
    for output in _dealt(tensor, blocks)[..., :rank_out].unbind(1):
        core = torch.tensordot(output, tensor, dims=([0], [0]))  # (r, i, k)
        inputs = leading_subspace(unfold(core, [1]), rank_in)
        found.append((output, torch.einsum("rik,is->rsk", core, inputs), inputs))
    return found


def _als(tensor: Tensor, start: Sequence[Block]) -> list[Block]:
    """Fits each block in turn to what the others leave.

    A ridge weighs the norms of the blocks, as in `tnlayers.methods.cp`: every step lowers error^2 + ridge * sum_b ||block_b||^2, so that
    blocks that cancel each other cost more than they gain.
    """
    blocks, rest = list(start), tensor - _product(start)
    size, left = tensor.square().sum(), rest.square().sum()
    work = tensor.numel() * len(blocks) * (3 * start[0][0].shape[1] + start[0][2].shape[1])
    for _ in range(min(_SWEEPS, 1 + _MOST_WORK // work)):
        ridge = _DAMPING * left / size
        for place, block in enumerate(blocks):
            wanted = rest + _product([block])
            blocks[place] = _improved(block, wanted, 1 + ridge)
            rest = wanted - _product([blocks[place]])
        before, left = left, rest.square().sum()
        if (before / size).sqrt() - (left / size).sqrt() <= _TOLERANCE:
            break
    return blocks


def _improved(block: Block, wanted: Tensor, damping: Tensor) -> Block:
    """Solves for the input's basis, for the output's and for the core; a basis is any orthonormal one of the solution's columns."""
    output, core, _ = block
    seen = torch.tensordot(output, wanted, dims=([0], [0]))
    inputs = torch.linalg.qr(torch.einsum("rik,rsk->is", seen, core)).Q
    core = torch.einsum("rik,is->rsk", seen, inputs)
    seen = torch.einsum("oik,is->osk", wanted, inputs)
    output = torch.linalg.qr(torch.einsum("osk,rsk->or", seen, core)).Q
    return output, torch.einsum("osk,or->rsk", seen, output) / damping, inputs


def _product(blocks: Sequence[Block]) -> Tensor:
    """Returns (o, i, k), the sum of the blocks."""
    outputs = torch.cat([output for output, _, _ in blocks], dim=1)
    return torch.tensordot(outputs, torch.cat([torch.einsum("rsk,is->rik", *rest) for _, *rest in blocks]), dims=1)


class BlockTermConv2d(FactorizedConv2d):
    """A sum of Tucker-2 blocks; `rank=(rank_out, rank_in)` of each, `blocks` is how many. See `BlockTerm` and `nn.Conv2d`."""

    method = BlockTerm
