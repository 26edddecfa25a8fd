"""`dsmoe experiment`: train the missing runs of a grid."""

import os
from math import inf

import click

from dsmoe_lite.cli.tables import json_option, print_rows


@click.command(
    help="Train the runs that the grid NAME (paper, balance, ...) still lacks, and record each in data/runs/. "
    "If it is stopped, the same command continues."
)
@click.argument("name")
@click.option(
    "--profile",
    default="cpu",
    show_default=True,
    type=click.Choice(["cpu", "gpu"]),
    help="gpu: the larger version of the grid, if it has one, with all runs on one GPU.",
)
@click.option("--models", metavar="NAME,NAME,...", help="Only these models of the grid.")
@click.option(
    "--processes",
    default=os.cpu_count() or 1,
    show_default=True,
    type=click.IntRange(1),
    help="Runs in parallel.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="Stop after so long; the same command resumes.  [default: no limit]",
)
@click.option("--plan", is_flag=True, help="Only list the missing runs.")
@json_option
def command(
    name: str, profile: str, models: str | None, processes: int, minutes: float | None, plan: bool, as_json: bool
) -> None:
    """Train every missing (model, seed) of the grid."""
    from dsmoe_lite.common import paths
    from dsmoe_lite.study.grids import grid_name, missing, run_missing

    name, only = grid_name(name, profile), tuple(models.split(",")) if models else ()
    todo = missing(name, only)
    if not todo and not as_json:
        click.echo(f"{name}: every run is recorded.")
    elif plan:
        print_rows([{"model": model, "seed": seed} for model, seed in todo], as_json=as_json, title=f"{name}: missing")
    else:
        paths.require_writable(paths.data_to_write("runs"))
        for model, seed in run_missing(name, processes, models=only, minutes=minutes or inf):
            click.echo(f"recorded {model}, seed {seed}")
        if left := missing(name, only):
            click.echo(f"{name}: stopped after {minutes:g} minutes; {len(left)} runs are missing: run it again")
