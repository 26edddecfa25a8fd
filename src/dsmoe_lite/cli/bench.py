"""dsmoe bench: ratios measured in one process."""

import os

import click

from dsmoe_lite.cli.tables import json_option, print_rows
from dsmoe_lite.errors import InputError


@click.command(help="Measure ratios in one process: `layer` (experts beside a dense FFN) or `train` (training steps).")
@click.argument("what", type=click.Choice(["layer", "train"]))
@click.option(
    "--rounds", default=30, show_default=True, type=click.IntRange(3, 10_000), help="Turns to take medians over."
)
@click.option("--profile", is_flag=True, help="layer: print where the time goes, by torch operation.")
@json_option
def command(what: str, rounds: int, profile: bool, as_json: bool) -> None:
    """Print a row for each contender."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler prints a line whenever it starts or stops
    import torch

    from dsmoe_lite.bench.layer import bench_layer, profile_layer
    from dsmoe_lite.bench.train import bench_train

    if profile and what != "layer":
        raise InputError(f"--profile: is for `layer`, not for `{what}`")
    threads = f"{torch.get_num_threads()} threads"
    if what == "train":
        rows = bench_train(rounds)
        title = f"dsmoe bench train: medians of {rounds} turns, ratios to the first row, {threads}"
    elif profile:
        rows = profile_layer(rounds)
        title = f"dsmoe bench layer --profile: milliseconds a step, {rounds} steps, {threads}"
    else:
        rows = bench_layer(rounds)
        title = (
            f"dsmoe bench layer: medians of {rounds} alternated pairs, 95% intervals by order statistics, {threads}; "
            "above 1 is slower or larger, a gap above 0 misses the goal"
        )
    print_rows(rows, as_json=as_json, title=title)
