"""The report of a truncation study: the same sections as Markdown and as one HTML file, the pictures, and the rules."""

import base64
import html
import math
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from lightning_modules.files import write_files
from lightning_modules.plots import png
from lightning_modules.study.findings import Measured, effect, points
from lightning_modules.study.rows import Row
from lightning_modules.study.sections import Section, sections
from lightning_modules.study.sentences import opening

__all__ = ["summary", "write_report"]

_DPI = 110
_STYLE = """
body { margin: 0 auto; max-width: 62rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: #333; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #c9cfd6 }
.wide { overflow-x: auto; margin: 1rem 0 }
img { display: block; width: auto; max-width: 100%; min-width: min(100%, 40rem); height: auto }
table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .15rem .8rem .15rem 0; text-align: left; white-space: nowrap; border-bottom: 1px solid #e6e9ec }
code { background: #f2f4f6; padding: 0 .2rem; overflow-wrap: anywhere }
@media (max-width: 42rem) { img { max-width: none; width: 44rem } }
@media print { body { max-width: none; padding: 0; font-size: 11px } img { max-width: 100%; width: auto; max-height: 24cm; min-width: 0 }
  .wide { overflow: visible } h2 { break-after: avoid } img, tr, li { break-inside: avoid } }
"""


def write_report(rows: Sequence[Row], folder: Path) -> None:
    """report.md, report.html with the pictures in it, the pictures, and rules.yaml where there is a recommendation.

    The same rows give the same bytes.

    Args:
        rows: of a study, its own first; one that is not finished does.
        folder: is made; files of these names in it are replaced.

    Raises:
        ValueError: rows that do not begin with a Study.
        OSError: the files cannot be written, and those that are there stay.
    """
    measured = Measured.of(rows)
    title = f"How compressible is {measured.study.net}?"
    found = sections(measured)
    pictures = {name: png(figure, _DPI) for section in found for name, figure in _pages(section)}
    files = {"report.md": _markdown(title, found), "report.html": _html(title, found, pictures)}
    if measured.recommendation is not None:
        files["rules.yaml"] = _rules(measured)
    write_files(folder, {**pictures, **files})


def summary(rows: Sequence[Row]) -> list[str]:
    """The sentences that the report opens with."""
    return opening(Measured.of(rows))


def _markdown(title: str, found: Sequence[Section]) -> str:
    blocks = [f"# {title}"]
    for section in found:
        blocks.append(f"## {section.heading}")
        if section.listed:
            blocks.append("\n".join(f"- {text}" for text in section.paragraphs))
        else:
            blocks += section.paragraphs
        blocks += [f"![{section.heading}]({name})" for name, _ in _pages(section)]
        if section.table:
            lines = [section.table.header, ("---",) * len(section.table.header), *section.table.rows]
            blocks.append(
                "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
            )
    return "\n\n".join(blocks) + "\n"


def _html(title: str, found: Sequence[Section], pictures: dict[str, bytes]) -> str:
    parts = [
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">',
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n<h1>{html.escape(title)}</h1>",
    ]
    for section in found:
        parts.append(f"<h2>{html.escape(section.heading)}</h2>")
        texts = [re.sub(r"`(.*?)`", r"<code>\1</code>", html.escape(text)) for text in section.paragraphs]
        if section.listed:
            parts.append("<ul>\n" + "\n".join(f"<li>{text}</li>" for text in texts) + "\n</ul>")
        else:
            parts += [f"<p>{text}</p>" for text in texts]
        for name, _ in _pages(section):
            content = base64.b64encode(pictures[name]).decode()
            alt = html.escape(section.heading, quote=True)
            parts.append(f'<div class="wide"><img alt="{alt}" src="data:image/png;base64,{content}"></div>')
        if section.table:
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in section.table.header)
            body = "\n".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                for row in section.table.rows
            )
            parts.append(
                f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
            )
    return "\n".join(parts) + "\n</html>\n"


def _pages(section: Section) -> list[tuple[str, Figure]]:
    """File names and figures; several pages are numbered."""
    several = len(section.picture) > 1
    return [
        (f"{section.name}-{page}.png" if several else f"{section.name}.png", figure)
        for page, figure in enumerate(section.picture, 1)
    ]


def _rules(measured: Measured) -> str:
    study, found = measured.study, measured.recommendation
    assert found is not None
    head = [
        f"{study.net} from {study.checkpoint} (sha256 {study.sha256[:16]}): for each layer the cheapest factorization whose",
        f"truncation, alone, loses at most {points(found.tolerance, 2)} on {study.pictures:,} test pictures ({study.data}).",
        f"Kept of the whole net: {found.params_kept:.1%} of the parameters, {found.macs_kept:.1%} of the MACs.",
        f"tnlayers compress -c path/to/config.yaml --checkpoint path/to/{study.checkpoint} --out path/to/compressed",
    ]
    rules = [yaml.safe_dump(rule, sort_keys=False, default_flow_style=True, width=math.inf) for rule in found.rules]
    if not measured.within(found.accuracy[-1]):
        head.insert(2, f"NOT within the tolerance: {effect(measured.lost(found.accuracy[-1]))}.")
    lines = [*(f"# {line}\n" for line in head), "model:\n", "  rules:\n" if rules else "  rules: []\n"]
    return "".join([*lines, *(f"    - {rule}" for rule in rules)])
