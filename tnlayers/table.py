"""The table of methods, read off the code."""

from dataclasses import fields

from tnlayers.layers import named_layers
from tnlayers.markdown import markdown_table
from tnlayers.method import Factorization

__all__ = ["methods_table"]

_WEIGHT_SHAPES = {"Conv2d": (64, 64, 3, 3), "Linear": (64, 64), "Embedding": (64, 1000)}
_COMMON = {field.name for field in fields(Factorization)}


def methods_table() -> str:
    """Writes a line of Markdown for each layer: what it replaces, its weight as a sum over the bonds, rank, options, source."""
    headings = [
        "layer",
        "`method` in rules",
        "replaces",
        "its weight, summed over the bonds",
        "`rank`",
        "options",
        "source",
    ]
    rows = []
    for layer in named_layers():
        method = layer.method(1)
        shape = _WEIGHT_SHAPES[layer.dense_type.__name__]
        bonds = method.bonds(shape)
        options = [field.name for field in fields(method) if field.name not in _COMMON]
        rows.append(
            [
                f"`{layer.__name__}`",
                f"`{layer.method.__name__}`",
                f"`nn.{layer.dense_type.__name__}`",
                f"`{method.formula(shape)}`",
                f"({', '.join(bonds)})" if len(bonds) > 1 else bonds[0],
                ", ".join(f"`{name}`" for name in options),
                method.source,
            ]
        )
    return markdown_table(headings, rows)
