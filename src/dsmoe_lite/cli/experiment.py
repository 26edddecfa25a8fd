"""dsmoe experiment: run what a named grid is still missing."""

import os

import click

from dsmoe_lite.cli.tables import json_option, print_rows


@click.command(help="Run what is missing of a named grid of runs, recorded in data/runs/.")
@click.argument("name")
@click.option(
    "--profile",
    default="cpu",
    show_default=True,
    type=click.Choice(["cpu", "gpu"]),
    help="gpu: the larger tier of the grid, where it has one, all runs on one GPU.",
)
@click.option("--models", metavar="NAME,NAME,...", help="Only these of the grid's models.")
@click.option(
    "--processes", default=os.cpu_count() or 1, show_default=True, type=click.IntRange(1), help="Runs side by side."
)
@click.option("--plan", is_flag=True, help="Only list what is missing.")
@json_option
def command(name: str, profile: str, models: str | None, processes: int, plan: bool, as_json: bool) -> None:
    """Train every missing (model, seed) of grid NAME; killed at any point, the next call goes on."""
    from dsmoe_lite.study.grids import in_profile, missing, run_missing

    name, only = in_profile(name, profile), tuple(models.split(",")) if models else ()
    todo = missing(name, only)
    if not todo and not as_json:
        click.echo(f"{name}: every run is recorded.")
    elif plan:
        print_rows([{"model": model, "seed": seed} for model, seed in todo], as_json=as_json, title=f"{name}: missing")
    else:
        for model, seed in run_missing(name, processes, models=only):
            click.echo(f"recorded {model}, seed {seed}")
