"""dsmoe replay: the weights of a recorded run."""

from pathlib import Path

import click

from dsmoe_lite.cli.tables import json_option, print_rows


@click.command(help="Train a recorded run of a grid again, and keep its model.")
@click.argument("name")
@click.argument("model")
@click.option("--seed", default=0, show_default=True, help="Which of the grid's seeds.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the weights.")
@click.option("--snapshot", "snapshots", multiple=True, type=int, help="Keep the model after so many steps, too.")
@json_option
def command(name: str, model: str, seed: int, out: Path, snapshots: tuple[int, ...], as_json: bool) -> None:
    """Leave NAME-MODEL-seedS.safetensors in the folder, and say how its loss compares with the record."""
    from dsmoe_lite.study.replay import replay

    found = replay(name, model, seed, out, snapshots)
    rows = [{"file": str(path), "bytes": path.stat().st_size} for path in found.files]
    for row in rows:
        row |= {"held-out loss recorded": found.recorded, "now": found.replayed}
    print_rows(rows, as_json=as_json, title="Weights")
