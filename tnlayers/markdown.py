"""Tables in Markdown."""

from collections.abc import Collection, Iterable, Sequence

__all__ = ["markdown_table"]


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]], numbers: Collection[int] = ()) -> str:
    """Writes a table as Markdown.

    Args:
        header: the heading of each column.
        rows: the cells of each row.
        numbers: the places of the columns that are set flush right.

    Returns:
        The lines, without a line break at the end.
    """
    rule = ["---:" if place in numbers else "---" for place in range(len(header))]
    lines = [[str(cell).replace("|", "\\|") for cell in line] for line in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
