"""`dsmoe labs`: run a notebook over combinations of parameters, and sum up its results."""

from pathlib import Path

import click

from dsmoe_lite.cli.tables import json_option, print_rows
from dsmoe_lite.common.errors import require

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group(name="labs")
def command() -> None:
    """For instructors: sweeps over parameters, and their results in one table."""


@command.command(
    epilog="""\b
Example, with the sweep of the page "Teaching with it":
  dsmoe labs run scores.yml --plan
  dsmoe labs run scores.yml"""
)
@click.argument("sweep", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--out", type=FOLDER, help="Folder of the results.  [default: runs/NAME OF THE SWEEP]")
@click.option("--processes", type=click.IntRange(1), help="Runs at once.  [default: one per core; one on a GPU]")
@click.option("--plan", "only_plan", is_flag=True, help="Only check the sweep and list the missing runs.")
@json_option
def run(sweep: Path, out: Path | None, processes: int | None, only_plan: bool, as_json: bool) -> None:
    """Run every combination of parameters in the file SWEEP that has no result yet.

    All of it is checked before anything runs. If it is stopped, the same command continues. No result is overwritten.
    """
    from dsmoe_lite.teaching.sweep import failures, plan, run_sweep
    from dsmoe_lite.teaching.sweep_file import read_sweep

    checked = read_sweep(sweep)
    todo = plan(checked, out, processes)
    n = len(todo.missing)
    if not as_json:
        click.echo(f"{checked.notebook.stem}: {todo.n_runs} runs, {todo.n_runs - n} have a result, {n} are missing")
        if n and todo.seconds is not None:
            minutes = todo.seconds * -(-n // todo.processes) / 60
            each = f"{todo.seconds:.0f} s each, {todo.processes} at a time"
            click.echo(f"about {minutes:.1f} minutes ({each}, on a machine with as many free cores)")
    if only_plan:
        if n or as_json:
            print_rows(todo.missing, as_json=as_json)
        return
    outcomes = []
    for outcome in run_sweep(checked, todo):
        outcomes.append(outcome)
        if not as_json:
            click.echo(outcome.notebook or f"failed: {outcome.failure}")
    if as_json:
        print_rows([{**o.parameters, "notebook": o.notebook, "failure": o.failure} for o in outcomes], as_json=True)
    failures(outcomes, todo.missing)


@command.command(
    epilog="""\b
Example, after the sweep of the page "Teaching with it":
  dsmoe labs report runs/scores --metric "experts shared by the same token" --by tables --chart scores.svg"""
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

    if metric is None and (by or chart):
        raise click.UsageError("--by and --chart need --metric")
    results = read_results(folder)
    groups = [] if metric is None else summary(results, metric, by)
    for path in results.edited:
        click.echo(f"dsmoe: {path.name} was edited and is left out", err=True)
    if table is not None:
        write_table(results, table)
        click.echo(f"{table}: {len(results.rows)} runs", err=as_json)
    if metric is None:
        require(bool(results.metrics), "folder", str(folder), "its runs report no results")
        print_rows([{"metric": name} for name in results.metrics], as_json=as_json)
        return
    if chart is not None:
        draw(results, metric, by, chart)
        click.echo(str(chart), err=as_json)
    half = "half_width" if as_json else "95% ±"
    rows = [
        {**{f"by {n}" if n in ("n", "mean") else n: v for n, v in zip(by, group.values, strict=True)},
         "n": group.n, "mean": group.mean, half: group.half_width}
        for group in groups
    ]  # fmt: skip
    print_rows(rows, as_json=as_json, title=metric)
    if mixed := other_varied(results, by):
        click.echo(f"dsmoe: the groups mix different values of {', '.join(mixed)}", err=True)
    if few := sum(group.n < LEAST_RUNS for group in groups):
        click.echo(f"dsmoe: {few} of {len(groups)} groups have fewer than {LEAST_RUNS} runs: add seeds", err=True)
