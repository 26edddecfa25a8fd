"""`dsmoe labs run`: run a notebook over combinations of parameters."""

from pathlib import Path

import click

from dsmoe_lite.cli.labs.options import FOLDER
from dsmoe_lite.cli.tables import json_option, print_rows


@click.command(
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
