"""The tables of methods, read off the code."""

from dataclasses import fields

from tnlayers.geometry import DENSE
from tnlayers.layers import named_layers
from tnlayers.markdown import markdown_table
from tnlayers.method import Factorization, known_methods

__all__ = ["kinds_table", "methods_table"]

_WEIGHT_SHAPES = {"Conv2d": (64, 64, 3, 3), "Linear": (64, 64), "Embedding": (64, 1000)}
_COMMON = {field.name for field in fields(Factorization)}
_KINDS = sorted((kind.__name__ for kind in DENSE), key=lambda name: (name[:4] == "Conv", "Transpose" in name, name))


def methods_table() -> str:
    """Writes a line of Markdown for each method: its weight as a sum over the bonds, rank, options, drop-in layers, source."""
    headings = ["`method` in rules", "its weight, summed over the bonds", "`rank`", "options", "layers", "source"]
    named: dict[type[Factorization], list[str]] = {}
    for layer in named_layers():
        named.setdefault(layer.method, []).append(f"`{layer.__name__}`")
    rows = []
    for name, kind in _methods().items():
        method = kind(1)
        shape = next(shape for dense, shape in _WEIGHT_SHAPES.items() if dense in method.replaces)
        bonds = method.bonds(shape)
        options = [field.name for field in fields(method) if field.name not in _COMMON]
        rows.append(
            [
                f"`{name}`",
                f"`{method.formula(shape)}`",
                f"({', '.join(bonds)})" if len(bonds) > 1 else bonds[0],
                ", ".join(f"`{option}`" for option in options),
                ", ".join(named.get(kind, [])),
                method.source,
            ]
        )
    return markdown_table(headings, rows)


def kinds_table() -> str:
    """Writes a line of Markdown for each method: which kinds of torch's layers it replaces."""
    rows = [
        [f"`{name}`", *("yes" if kind in method.replaces else "" for kind in _KINDS)]
        for name, method in _methods().items()
    ]
    return markdown_table(["method", *(f"`{kind}`" for kind in _KINDS)], rows)


def _methods() -> dict[str, type[Factorization]]:
    """Returns the methods of this package, by name."""
    return {name: method for name, method in sorted(known_methods().items()) if "." not in name}
