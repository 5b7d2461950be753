"""Tables as text: with rich where it is installed, in plain columns elsewhere."""

from __future__ import annotations

import io
from collections.abc import Sequence


def render(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of ``rows`` under ``columns`` as text; columns of numbers are right-aligned."""
    cells = [["" if value is None else str(value) for value in row] for row in rows]
    numeric = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(columns))]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return _plain(title, columns, cells, numeric)
    table = Table(title=title, title_justify="left")
    for name, right in zip(columns, numeric, strict=True):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    console = Console(record=True, file=io.StringIO(), width=160)
    console.print(table)
    return console.export_text()


def _plain(title: str, columns: Sequence[str], cells: list[list[str]], numeric: list[bool]) -> str:
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    lines = [
        "  ".join(
            text.rjust(w) if right else text.ljust(w) for text, w, right in zip(row, widths, numeric, strict=True)
        )
        for row in [list(columns), ["-" * w for w in widths], *cells]
    ]
    return "\n".join([title, *(line.rstrip() for line in lines)])
