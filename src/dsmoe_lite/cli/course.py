"""`dsmoe course`: run every chapter and time it."""

import click

from dsmoe_lite.cli.tables import json_option, print_rows
from dsmoe_lite.common.errors import RunError
from dsmoe_lite.labs.course import describe_machine, run_course


@click.command(name="course")
@click.argument("chapters", nargs=-1)
@click.option(
    "--profile",
    type=click.Choice(["smoke", "cpu", "gpu"]),
    default="cpu",
    show_default=True,
    help="Size of the runs: smoke takes seconds, gpu needs a CUDA GPU.",
)
@json_option
def command(chapters: tuple[str, ...], profile: str, as_json: bool) -> None:
    """Run CHAPTERS (all of them by default) in the order of the book; print their wall and CPU seconds."""
    outcomes = run_course(profile, chapters)
    rows = [{"chapter": o.chapter, "wall s": o.wall_s, "CPU s": o.cpu_s, "ended": not o.failure} for o in outcomes]
    if as_json:
        rows = [{**row, "profile": profile, "machine": describe_machine()} for row in rows]
    else:
        click.echo(f"profile {profile}; {describe_machine()}")
    print_rows(rows, as_json=as_json)
    failed = [outcome for outcome in outcomes if outcome.failure]
    for outcome in failed:
        click.echo(outcome.failure, err=True)
    if failed:
        raise RunError(f"{len(failed)} of {len(outcomes)} chapters failed: {', '.join(o.chapter for o in failed)}")
