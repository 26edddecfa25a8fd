"""Tables that show every value in full, on a terminal or in a pipe, or the same rows as JSON."""

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import click

GAP = "  "  # between columns
LEAST_TEXT = 16  # characters to which a column of text may be narrowed, unless one of its words is longer

json_option = click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")


def print_rows(rows: Sequence[dict[str, Any]], *, as_json: bool, title: str = "") -> None:
    """Print `rows`, one dict per row, all with the same keys: as JSON, or as a table that fits the terminal."""
    if as_json:
        click.echo(json.dumps(list(rows), indent=1))
        return
    for line in table_lines(rows, title, terminal_width()):
        click.echo(line)
    click.echo()


def terminal_width() -> int | None:
    """Columns of the terminal; None if stdout is a pipe or a file, whose lines may have any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table_lines(rows: Sequence[dict[str, Any]], title: str, width: int | None) -> list[str]:
    """Lay out `rows` under `title` in at most `width` columns (None: no limit) without cutting a value.

    Columns of numbers are right-aligned, and columns of text wrap between words. Rows that still do not fit become
    records, one line per value. Only a single word longer than a line exceeds the width.
    """
    names = list(rows[0])
    numeric = [all(_is_number(row[name]) for row in rows) for name in names]
    cells = [[_format(row[name]) for name in names] for row in rows]
    widths = _column_widths(names, cells, numeric, width)
    lines = _records(names, cells, numeric, width) if widths is None else _grid(names, cells, numeric, widths)
    return [line.rstrip() for line in (*(_wrap(title, width) if title else []), *lines)]


def _column_widths(
    names: list[str], cells: list[list[str]], numeric: list[bool], width: int | None
) -> list[int] | None:
    """The width of each column, or None if the columns do not fit into `width`."""
    columns = list(zip(names, *cells, strict=True))
    full = [max(map(len, column)) for column in columns]
    available = sum(full) if width is None else width - len(GAP) * (len(names) - 1)
    if sum(full) <= available:
        return full
    widths = []
    for (name, *values), number in zip(columns, numeric, strict=True):
        words = [*name.split(), *(values if number else " ".join(values).split())]
        least = 0 if number else min(LEAST_TEXT, max(map(len, values)))
        widths.append(max(least, *map(len, words)))
    if sum(widths) > available:
        return None
    while sum(widths) < available:  # one more character for the column that wraps most
        most = max(range(len(widths)), key=lambda i: full[i] / widths[i])
        widths[most] += 1
    return widths


def _grid(names: list[str], cells: list[list[str]], numeric: list[bool], widths: list[int]) -> Iterator[str]:
    for line in (names, ["-" * width for width in widths], *cells):
        wrapped = [_wrap(cell, width) for cell, width in zip(line, widths, strict=True)]
        for pieces in zip_longest(*wrapped, fillvalue=""):
            aligned = zip(pieces, widths, numeric, strict=True)
            yield GAP.join(piece.rjust(width) if number else piece.ljust(width) for piece, width, number in aligned)


def _records(names: list[str], cells: list[list[str]], numeric: list[bool], width: int | None) -> Iterator[str]:
    """One line of name and value per cell, and an empty line between rows."""
    label = max(map(len, names))
    digits = max((len(cell) for row in cells for cell, number in zip(row, numeric, strict=True) if number), default=0)
    for number_of_row, row in enumerate(cells):
        if number_of_row:
            yield ""
        for name, cell, number in zip(names, row, numeric, strict=True):
            start = name.ljust(label) + GAP
            if number:
                yield start + cell.rjust(digits)
            else:
                yield from _wrap(cell, width, start)


def _wrap(text: str, width: int | None, start: str = "") -> list[str]:
    """Break `text` between words; the first line begins with `start`, and the others are indented as far."""
    if width is None or len(start) + len(text) <= width:
        return [start + text]
    return textwrap.wrap(
        text,
        width,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _format(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return " ".join(str(value).splitlines())
