"""`dsmoe labs`: run a notebook over combinations of parameters, and sum up its results."""

import os
from pathlib import Path

import click

from dsmoe_lite.cli.tables import json_option, print_rows
from dsmoe_lite.common import paths

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group(name="labs")
def command() -> None:
    """For instructors: sweeps over parameters, and their results in one table."""


@command.command(
    epilog="""\b
Example, with the sweep of "Teaching with it":
  dsmoe labs run sweep.yml --plan
  dsmoe labs run sweep.yml"""
)
@click.argument("sweep", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--out", type=FOLDER, help="Folder of the results.  [default: runs/NAME OF THE SWEEP]")
@click.option(
    "--processes", default=os.cpu_count() or 1, show_default=True, type=click.IntRange(1), help="Runs at once."
)
@click.option("--plan", "only_plan", is_flag=True, help="Only check the sweep and list the missing runs.")
@json_option
def run(sweep: Path, out: Path | None, processes: int, only_plan: bool, as_json: bool) -> None:
    """Run every combination of parameters in the file SWEEP that has no result yet.

    All of it is checked before anything runs. If it is stopped, the same command continues. No result is overwritten.
    """
    from dsmoe_lite.teaching.sweep import failures, plan, run_sweep
    from dsmoe_lite.teaching.sweep_file import read_sweep

    checked = read_sweep(sweep)
    folder = out or paths.RUNS / checked.name
    todo = plan(checked, folder)
    n = len(todo.missing)
    if not as_json:
        click.echo(f"{checked.notebook.stem}: {todo.n_runs} runs, {todo.n_runs - n} have a result, {n} are missing")
        if n and todo.seconds is not None:
            minutes = todo.seconds * -(-n // processes) / 60
            each = f"{todo.seconds:.0f} s each, {processes} at a time"
            click.echo(f"about {minutes:.1f} minutes ({each}, on a machine with as many free cores)")
    if only_plan:
        if n or as_json:
            print_rows(todo.missing, as_json=as_json)
        return
    outcomes = []
    for outcome in run_sweep(checked, todo, folder, processes):
        outcomes.append(outcome)
        if not as_json:
            click.echo(outcome.notebook or f"failed: {outcome.failure}")
    if as_json:
        print_rows([{**o.parameters, "notebook": o.notebook, "failure": o.failure} for o in outcomes], as_json=True)
    failures(outcomes)


@command.command(
    epilog="""\b
Example:
  dsmoe labs report runs/sweep --metric "training loss, last step" --by tables --chart loss.svg"""
)
@click.argument("folder", type=FOLDER)
@click.option("--metric", help="The result to sum up.  [default: list the results]")
@click.option("--by", multiple=True, metavar="PARAMETER", help="Group by this parameter; may be repeated.")
@click.option("--table", type=click.Path(path_type=Path), help="Write all runs to this .csv or .parquet file.")
@click.option("--chart", type=click.Path(path_type=Path), help="Draw the metric by the groups: .svg or .png.")
@json_option
def report(
    folder: Path, metric: str | None, by: tuple[str, ...], table: Path | None, chart: Path | None, as_json: bool
) -> None:
    """Sum up the results in FOLDER: means, with 95% intervals, of a metric by parameters."""
    from dsmoe_lite.teaching.report import draw
    from dsmoe_lite.teaching.results import LEAST_RUNS, other_varied, read_results, summary, write_table

    results = read_results(folder)
    for path in results.edited:
        click.echo(f"dsmoe: {path.name} was edited and is left out", err=True)
    if table is not None:
        write_table(results, table)
        click.echo(f"{table}: {len(results.rows)} runs", err=as_json)
    if metric is None:
        print_rows([{"metric": name} for name in results.metrics], as_json=as_json)
        return
    rows = summary(results, metric, by)
    print_rows(rows, as_json=as_json, title=metric)
    if mixed := other_varied(results, by):
        click.echo(f"dsmoe: the groups mix values of {', '.join(mixed)}: add --by {mixed[0]}", err=True)
    if few := sum(row["n"] < LEAST_RUNS for row in rows):
        click.echo(f"dsmoe: {few} of {len(rows)} groups have fewer than {LEAST_RUNS} runs: add seeds", err=True)
    if chart is not None:
        draw(results, metric, by, chart)
        click.echo(str(chart), err=as_json)
