"""dsmoe bench: ratios measured in one process."""

import click

from dsmoe_lite.cli.tables import json_option, print_rows


@click.command(help="Measure speed ratios in one process: `layer` (expert backends) or `train` (training steps).")
@click.argument("what", type=click.Choice(["layer", "train"]))
@click.option(
    "--rounds", default=30, show_default=True, type=click.IntRange(3, 10_000), help="Turns to take medians over."
)
@json_option
def command(what: str, rounds: int, as_json: bool) -> None:
    """Print a row for each contender."""
    from dsmoe_lite.bench.layer import bench_layer
    from dsmoe_lite.bench.train import bench_train

    measured = {"layer": bench_layer, "train": bench_train}[what](rounds)
    print_rows(
        measured, as_json=as_json, title=f"dsmoe bench {what}: medians of {rounds} turns, ratios to the first row"
    )
