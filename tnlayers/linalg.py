"""Dense linear algebra of unfoldings; thin factors only, float64, gradients and autocast off.

Shapes: an unfolding is (m, n), and k = min(m, n).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from tnlayers.errors import UserError

__all__ = [
    "check_finite",
    "decomposing",
    "effective_rank",
    "entropy",
    "fold",
    "leading_subspace",
    "left_singular_vectors",
    "left_svd",
    "precise",
    "relative_error",
    "scale_of",
    "singular_values",
    "tails",
    "tucker",
    "unfold",
    "wide",
]

_SWEEPS = 20
_TOLERANCE = 1e-6  # of the squared norm, between two sweeps
_WELL_CONDITIONED = 1e-9  # the least eigenvalue of a Gram matrix over the largest: rounding is 1e-15 of the largest


def precise(weight: Tensor) -> Tensor:
    """Returns the weight in float64, detached; on the CPU where its device has no float64."""
    device = "cpu" if weight.device.type == "mps" else weight.device
    return weight.detach().to(device=device, dtype=torch.float64)


def wide(tensor: Tensor) -> Tensor:
    """Returns a tensor in which sums of many squares stay in range and exact enough: 16 bits become 32."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def check_finite(weight: Tensor) -> None:
    """Refuses infinite or undefined values, which would be decomposed into nothing else.

    Raises:
        ValueError: there are some; it says how many.
    """
    spoilt = weight.numel() - int(torch.isfinite(weight).sum())
    if spoilt:
        raise UserError(
            f"{spoilt} of the {weight.numel()} values of its weight are not finite, and it cannot be decomposed; start from "
            "weights of before that"
        )


def scale_of(weight: Tensor) -> float:
    """Returns what to divide a weight in float64 by so that the squares of its entries stay in range: 1 but for odd ones."""
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    return largest if math.isfinite(largest) and largest > 0 and not 1e-100 < largest < 1e100 else 1.0


@contextmanager
def decomposing() -> Iterator[None]:
    """Turns gradients and autocast off, and TensorLy to torch, for this block and this thread only."""
    import tensorly  # here, since it brings SciPy, which takes half as long to import as torch does

    with (
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        tensorly.backend_context("pytorch", local_threadsafe=True),
    ):
        yield


def unfold(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Returns the matrix whose rows run over the given axes and whose columns run over the others, both in order."""
    columns = [axis for axis in range(tensor.dim()) if axis not in rows]
    return tensor.permute(*rows, *columns).reshape(math.prod(tensor.shape[axis] for axis in rows), -1)


def fold(matrix: Tensor, rows: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Returns the tensor of this shape whose unfolding is the matrix: the inverse of `unfold`."""
    order = [*rows, *(axis for axis in range(len(shape)) if axis not in rows)]
    back = [order.index(axis) for axis in range(len(shape))]
    return matrix.reshape([shape[axis] for axis in order]).permute(back).contiguous()


def singular_values(matrix: Tensor) -> Tensor:
    """Returns the (k,) singular values in descending order, each to 1e-6 of itself or 1e-15 of the largest.

    The Gram matrix takes half the time of an SVD and squares the condition number: it serves where that is small. Elsewhere there
    is a QR of the tall side first, whose cost is linear in the long side and which keeps nothing larger than the unfolding.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    if 0 not in tall.shape:
        energies = torch.linalg.eigvalsh(tall.mT @ tall).flip(0)
        if energies[-1] > _WELL_CONDITIONED * energies[0]:
            return energies.sqrt()
    if tall.shape[0] > 2 * tall.shape[1]:
        tall = torch.linalg.qr(tall, mode="r").R
    return torch.linalg.svdvals(tall)


def entropy(values: Tensor) -> float:
    """Returns the entanglement entropy of a cut in nats: -sum p ln p with p = s^2 / sum(s^2), 0 of zeros.

    Args:
        values: (k,) singular values.
    """
    energies = precise(values).square()
    total = energies.sum()
    return 0.0 if total == 0 else float(torch.special.entr(energies / total).sum())


def effective_rank(matrix: Tensor) -> float:
    """Returns the exponential of the entropy of the singular values: n for n equal ones, 1 for rank one, 0 for zeros.

    Roy & Vetterli (2007), "The effective rank: a measure of effective dimensionality", take the entropy of shares of sum(s);
    these are shares of the squared norm, which is what relative errors are made of. The squares are eigenvalues of
    the Gram matrix of the short side; that they are exact to 1e-16 of the largest alone does not show in the entropy.
    """
    if not torch.isfinite(matrix).all():
        return float("nan")
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    short = short / short.abs().amax().clamp(min=torch.finfo(short.dtype).tiny)  # squares of tiny weights would be zero
    energies = torch.linalg.eigvalsh(short @ short.mT).clamp(min=0)
    if energies.sum() == 0:
        return 0.0
    return math.exp(entropy(energies.sqrt()))


def left_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the left singular vectors (m, k), the best first, and their values (k,)."""
    m, n = matrix.shape
    if n > 2 * m:  # wide: the left vectors and the values of the small triangle are those of the whole
        matrix = torch.linalg.qr(matrix.mT, mode="r").R.mT
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left, values


def left_singular_vectors(matrix: Tensor) -> Tensor:
    """Returns the left singular vectors (m, k), the best first."""
    return left_svd(matrix)[0]


def leading_subspace(matrix: Tensor, rank: int) -> Tensor:
    """Returns the best (m, rank) left vectors, the best first, by the Gram matrix: several times as fast as an SVD.

    The vectors are orthonormal to rounding, so that a projection on them is one. Those of singular values below 1e-8 of the
    largest are in no particular order, which changes the error of a projection by less than that.
    """
    m, n = matrix.shape
    if n < m:
        return torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]
    return torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[:, -rank:].flip(1)


def tucker(tensor: Tensor, ranks: Mapping[int, int]) -> tuple[Tensor, dict[int, Tensor]]:
    """Returns a core and an orthonormal (n, rank) basis for each of the given axes, whose product is near the tensor.

    The fit is HOOI (De Lathauwer, De Moor and Vandewalle 2000, algorithm 4.2) from the truncated HOSVD, by eigenvectors of small
    Gram matrices: three times TensorLy's speed at 256 channels.

    Args:
        tensor: of any number of axes.
        ranks: axis -> rank, in the order in which a sweep improves the bases; the other axes stay whole in the core.
    """
    norm = torch.linalg.vector_norm(tensor)
    scaled = tensor / norm if norm > 0 else tensor
    bases = {axis: leading_subspace(unfold(scaled, [axis]), rank) for axis, rank in ranks.items()}
    core = _projected(scaled, bases)
    kept = core.square().sum()
    for _ in range(_SWEEPS):
        if 1 - kept <= _TOLERANCE:  # no sweep could gain more, and the Gram matrices would lose the small values
            break
        for axis, rank in ranks.items():
            others = _projected(scaled, {other: basis for other, basis in bases.items() if other != axis})
            bases[axis] = leading_subspace(unfold(others, [axis]), rank)
        core = _projected(scaled, bases)
        before, kept = kept, core.square().sum()
        if kept - before <= _TOLERANCE:
            break
    return norm * core, bases


def _projected(tensor: Tensor, bases: Mapping[int, Tensor]) -> Tensor:
    """Returns the coordinates of the tensor in the bases of some of its axes."""
    for axis, basis in bases.items():
        tensor = torch.tensordot(tensor, basis, dims=([axis], [0])).movedim(-1, axis)
    return tensor


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """Returns ||W - W~||_F / ||W||_F; 0 for a weight that is zero and stays so."""
    weight, approximation = precise(weight), precise(approximation)
    scale = scale_of(weight)
    difference = torch.linalg.vector_norm((weight - approximation) / scale)
    norm = torch.linalg.vector_norm(weight / scale)
    return float(difference / norm) if norm > 0 else float(difference)


def tails(spectrum: Sequence[float]) -> list[float]:
    """Returns the sums of what each rank leaves out: entry r is that of rank r."""
    return list(accumulate(reversed(spectrum), initial=0.0))[::-1]
