"""Networks against numpy's einsum, and the laws that follow from their strings."""

import itertools
import math
import random

import numpy as np
import pytest
import torch

from tests.tolerances import FLOAT64
from tnlayers import Network

SIZES = {"o": 5, "i": 4, "h": 3, "w": 2, "r": 3, "s": 2, "a": 3, "b": 4, "c": 2}
SIZES |= {"o1": 2, "o2": 3, "o3": 2, "i1": 3, "i2": 2, "i3": 2, "g": 2}

NETWORKS = {
    "tucker": ({"input": "s i", "core": "r s h w", "output": "o r"}, "o i h w", "si,rshw,or->oihw"),
    "cp": ({"input": "i r", "height": "h r", "width": "w r", "output": "o r"}, "o i h w", "ir,hr,wr,or->oihw"),
    "mps": ({"input": "i a", "height": "a h b", "width": "b w c", "output": "c o"}, "o i h w", "ia,ahb,bwc,co->oihw"),
    "lowrank": ({"vertical": "r i h", "horizontal": "o r w"}, "o i h w", "rih,orw->oihw"),
    "ttfc": (
        {"core1": "i1 o1 a", "core2": "a i2 o2 b", "core3": "b i3 o3"},
        "(o1 o2 o3) (i1 i2 i3)",
        "xua,ayvb,bzw->uvwxyz",
    ),
    "ttconv": (
        {"spatial": "h w a", "core1": "a i1 o1 b", "core2": "b i2 o2"},
        "(o1 o2) (i1 i2) h w",
        "hwa,axub,byv->uvxyhw",
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_reconstruction_is_the_einsum(name: str) -> None:
    factors, weight, einsum = NETWORKS[name]
    network = Network(factors, weight)
    values = {key: torch.randn(shape, dtype=torch.float64) for key, shape in network.shapes(SIZES).items()}
    expected = np.einsum(einsum, *(value.numpy() for value in values.values())).reshape(network.weight_shape(SIZES))
    torch.testing.assert_close(network.reconstruct(values), torch.from_numpy(expected), **FLOAT64)
    assert network.num_params(SIZES) == sum(value.numel() for value in values.values())
    assert network.sizes_from(network.shapes(SIZES)).items() <= SIZES.items()


@pytest.mark.parametrize("name", NETWORKS)
def test_grouped_network_is_one_network_per_group(name: str) -> None:
    factors, weight, _ = NETWORKS[name]
    network = Network(factors, weight)
    grouped = network.grouped()
    values = {key: torch.randn(shape, dtype=torch.float64) for key, shape in grouped.shapes(SIZES).items()}
    parts = [network.reconstruct({key: value[group] for key, value in values.items()}) for group in range(SIZES["g"])]
    torch.testing.assert_close(grouped.reconstruct(values), torch.cat(parts), **FLOAT64)
    assert grouped.bonds == network.bonds


@pytest.mark.parametrize("name", NETWORKS)
def test_initial_scale(name: str) -> None:
    factors, weight, _ = NETWORKS[name]
    network = Network(factors, weight)
    sizes = dict.fromkeys(SIZES, 8)
    std = network.init_std(sizes, 0.1)
    draws = [{key: std * torch.randn(shape) for key, shape in network.shapes(sizes).items()} for _ in range(200)]
    variance = torch.stack([network.reconstruct(values).square().mean() for values in draws]).mean()
    assert variance.sqrt() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tucker", {"s": ("i",), "r": ("o",)}),
        ("mps", {"a": ("i",), "b": ("i", "h"), "c": ("o",)}),
        ("ttfc", {"a": ("o1", "i1"), "b": ("o3", "i3")}),
    ],
)
def test_a_bond_cuts_the_weight_in_two(name: str, expected: dict[str, tuple[str, ...]]) -> None:
    network = Network(*NETWORKS[name][:2])
    for bond, side in expected.items():
        sides = network.cut(bond)
        assert set(side) in (set(sides[0]), set(sides[1]))
        assert sorted((*sides[0], *sides[1])) == sorted(network.weight_indices)


def test_attainable_ranks_are_the_smaller_sides_of_the_cuts() -> None:
    for name in ("tucker", "mps", "ttfc", "lowrank"):
        network = Network(*NETWORKS[name][:2])
        clamped = network.clamp(SIZES | dict.fromkeys(network.bonds, 10**9))
        for bond in network.bonds:
            sides = [math.prod(SIZES[index] for index in side) for side in network.cut(bond)]
            assert clamped[bond] == min(sides), (name, bond)


@pytest.mark.parametrize(
    ("factors", "weight", "message"),
    [
        ({"a": "o r", "b": "i r"}, "o i h", "index 'h' of the weight .* is in no factor"),
        ({"a": "o r", "b": "i"}, "o i", "index 'r' of factor 'a' is in no other factor"),
        ({"a": "o o r", "b": "i r"}, "o i", "has index 'o' twice"),
        ({"a": "o r", "b": "i r"}, "o o i", "has index 'o' twice"),
    ],
)
def test_bad_strings_are_named(factors: dict[str, str], weight: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Network(factors, weight)


def test_a_rank_order_may_only_name_bonds() -> None:
    with pytest.raises(ValueError, match="names a bond that no factor has"):
        Network({"a": "o r", "b": "i r"}, "o i", rank="q")


def test_a_hyperedge_is_no_cut() -> None:
    with pytest.raises(ValueError, match="does not cut the network"):
        Network(*NETWORKS["cp"][:2]).cut("r")


def test_shapes_that_disagree_are_named() -> None:
    network = Network(*NETWORKS["tucker"][:2])
    shapes = network.shapes(SIZES)
    with pytest.raises(ValueError, match="index 'r' is"):
        network.sizes_from(shapes | {"output": (5, 4)})
    with pytest.raises(ValueError, match="factor 'core' has shape None"):
        network.sizes_from({key: shape for key, shape in shapes.items() if key != "core"})


@pytest.mark.parametrize("name", NETWORKS)
def test_a_contraction_is_the_einsum(name: str) -> None:
    """Of any factors, with the indices that are left in any order."""
    network = Network(*NETWORKS[name][:2])
    letters = {index: chr(97 + n) for n, index in enumerate((*network.weight_indices, *network.bonds))}
    factors = {key: torch.randn(shape, dtype=torch.float64) for key, shape in network.shapes(SIZES).items()}
    rng = random.Random(0)
    for count in range(1, len(factors) + 1):
        for names in itertools.combinations(factors, count):
            elsewhere = {index for key in factors if key not in names for index in network.indices[key]}
            held = dict.fromkeys(index for key in names for index in network.indices[key])
            output = [index for index in held if index in elsewhere or index in network.weight_indices]
            rng.shuffle(output)
            product = network.contraction(names, output)
            assert len(product.products) == count - 1
            given = [("".join(letters[index] for index in network.indices[key])) for key in names]
            equation = f"{','.join(given)}->{''.join(letters[index] for index in output)}"
            expected = torch.einsum(equation, *(factors[key] for key in names))
            torch.testing.assert_close(product(factors), expected, **FLOAT64)


def test_networks_are_equal_where_their_hashes_are() -> None:
    """The order of the factors is that in which they meet the activation, so it counts."""
    one = Network({"a": "i r", "b": "r o"}, weight="o i")
    same, other = Network({"a": "i r", "b": "r o"}, weight="o i"), Network({"b": "r o", "a": "i r"}, weight="o i")
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert len({one, same, other}) == 2
