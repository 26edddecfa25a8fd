"""A table for people, or the same rows as JSON for machines."""

import json
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

json_option = click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")


def print_rows(rows: Sequence[dict[str, Any]], *, as_json: bool, title: str = "") -> None:
    """Print `rows` (one dict a row, all with the same keys); numbers stand right-aligned."""
    if as_json:
        click.echo(json.dumps(list(rows), indent=1))
        return
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        numeric = all(isinstance(row[name], int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console = Console()
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
