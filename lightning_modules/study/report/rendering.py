"""The files of a study's report, by templates: Markdown, the same as one HTML file with its pictures, and the rules."""

import base64
import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markdown_it import MarkdownIt
from markupsafe import Markup

from lightning_modules.plots import png
from lightning_modules.study.findings import Findings, points
from lightning_modules.study.report.pictures import study_pictures
from lightning_modules.study.report.tables import TABLES
from lightning_modules.study.rows import Row
from tnlayers.files import write_files

__all__ = ["summary", "write_report"]

_DPI = 110


def write_report(rows: Sequence[Row], folder: Path) -> None:
    """Writes report.md, report.html with the pictures in it, the pictures, and rules.yaml where there is a recommendation.

    The same rows give the same bytes.

    Args:
        rows: those of a study, its own first; one that is not finished does.
        folder: is made; files of these names in it are replaced.

    Raises:
        ValueError: the rows do not begin with a Study.
        UserError: the files cannot be written, and those that are there stay.
    """
    of = Findings(rows)
    templates = _templates()
    drawn = study_pictures(of)
    pictures = {name: png(figure, _DPI) for pages in drawn.values() for name, figure in pages.items()}
    found = templates.get_template("report.md.jinja").render(of=of, tables=TABLES, pictures=drawn)
    text = "\n\n".join(filter(None, map(_paragraph, re.split(r"\n\s*\n", found)))) + "\n"
    body = MarkdownIt("commonmark", {"html": False}).enable("table").disable("emphasis").render(text)
    for name, content in pictures.items():
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{base64.b64encode(content).decode()}"')
    title, page = f"How compressible is {of.study.net}?", templates.get_template("report.html.jinja")
    files = {"report.md": text, "report.html": page.render(title=title, body=Markup(body))}
    if of.recommendation is not None:
        files["rules.yaml"] = templates.get_template("rules.yaml.jinja").render(of=of)
    write_files(folder, {**pictures, **files})


def summary(rows: Sequence[Row]) -> list[str]:
    """Returns the sentences that the report opens with."""
    of = Findings(rows)
    return _templates().get_template("sentences.jinja").make_module({"of": of}).opening  # type: ignore[attr-defined]


@cache
def _templates() -> Environment:
    """Finds the templates of this folder, with what they write figures by."""
    found = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=select_autoescape(["html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    found.filters |= {"mean": fmean, "points": points, "shown": format}
    found.filters |= {"epochs": _epochs, "one_line": _one_line, "yaml": _yaml}
    return found


def _paragraph(block: str) -> str:
    """Puts a paragraph of Markdown into one line; lists and tables keep their lines."""
    return block.strip() if block.lstrip().startswith(("- ", "|")) else _one_line(block)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _epochs(count: int) -> str:
    return f"{count} epoch{'' if count == 1 else 's'}"


def _yaml(rule: dict[str, Any]) -> str:
    """Writes a rule in one line."""
    return yaml.safe_dump(rule, sort_keys=False, default_flow_style=True, width=math.inf).strip()
