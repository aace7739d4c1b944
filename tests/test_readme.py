"""The README's Python runs as it is printed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.tolerances import EXACT, FLOAT64
from tnlayers import Factorization, ParamsKept, fraction_kept, methods_table, summarize

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(word: str) -> str:
    (found,) = [text for text in BLOCKS if word in text]
    return found


@pytest.mark.data
def test_the_main_job(resnet20_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(block("import MacsKept").replace("resnet20-12fca82f.th", str(resnet20_checkpoint)), names)
    assert "97 entries matched, prefix 'module.' taken off" in capsys.readouterr().out
    kept = summarize(names["net"], names["example"], measure=False).totals.macs_kept
    assert 0.49 <= kept <= 0.51  # the first layer and the classifier are outside of the budget
    exec(block("save_safetensors").replace("compressed.", f"{tmp_path}/compressed."), names)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(names["again"].eval()(x), names["net"].eval()(x), **EXACT)
    exec(block("resolve_truncation"), names)
    assert fraction_kept(names["net"], ParamsKept) <= 0.3


def test_a_layer_alone() -> None:
    names: dict[str, Any] = {"dense_conv": nn.Conv2d(64, 128, 3, padding=1)}
    exec(block("from_dense"), names)
    assert names["conv"].rank == (16, 8)
    assert type(names["dense_conv"]) is nn.Conv2d


def test_the_table_of_methods_is_the_codes() -> None:
    printed = re.search(r"<!-- methods.*?-->\n(.*?)\n<!--", README, re.DOTALL)
    assert printed, "README.md has no table of methods"
    assert printed[1] == methods_table(), "paste the output of `tnlayers methods` into README.md"


def test_a_method_is_one_file() -> None:
    """The closed form is the optimum: its error is what the SVD of the same unfolding discards."""
    names: dict[str, Any] = {"__name__": "channelsvd"}
    exec(block("ChannelSVD"), names)
    method: Callable[[int], Factorization] = names["ChannelSVD"]
    weight = torch.randn(12, 8, 3, 3, dtype=torch.float64)
    for rank in (1, 5, 12):
        _, error = method(rank).decompose(weight, (rank,))
        assert error**2 == pytest.approx(method(rank).error_estimate(weight)((rank,)), abs=1e-12)
    factors, _ = method(12).decompose(weight, method(12).max_ranks((12, 8, 3, 3)))
    torch.testing.assert_close(method(12).network((12, 8, 3, 3)).reconstruct(factors), weight, **FLOAT64)
