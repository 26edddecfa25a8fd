"""`dsmoe check`: what this machine has for the course."""

import click

from dsmoe_lite.cli.tables import json_option, print_rows
from dsmoe_lite.common import machine


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Print what this machine has (Python, torch, CPU, GPU, tools) and which profile suits it."""
    rows = [_row(part) for part in machine.parts()]
    rows.append({"part": "profile", "found": machine.profile(), "how to get it": ""})
    print_rows(rows, as_json=as_json)


def _row(part: machine.Part) -> dict[str, str | None]:
    remedy = part.remedy if part.found is None or "not usable" in part.found else ""
    return {"part": part.name, "found": part.found, "how to get it": remedy}
