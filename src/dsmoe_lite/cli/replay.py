"""`dsmoe replay`: train a recorded run again for its weights."""

from pathlib import Path

import click

from dsmoe_lite.cli.tables import json_option, print_rows


@click.command(help="Train the recorded run of MODEL in the grid NAME again, and save the model.")
@click.argument("name")
@click.argument("model")
@click.option("--seed", default=0, show_default=True, help="Seed of the run.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the weights.")
@click.option(
    "--snapshot",
    "snapshots",
    multiple=True,
    type=int,
    help="Also save the model after this many steps; may be repeated.",
)
@json_option
def command(name: str, model: str, seed: int, out: Path, snapshots: tuple[int, ...], as_json: bool) -> None:
    """Write NAME-MODEL-seedS.safetensors into the folder, and print its loss beside the recorded loss."""
    from dsmoe_lite.study.replay import replay

    result = replay(name, model, seed, out, snapshots)
    rows = [{"file": str(path), "bytes": path.stat().st_size} for path in result.files]
    for row in rows:
        row |= {"held-out loss recorded": result.recorded, "now": result.replayed}
    print_rows(rows, as_json=as_json, title="Weights")
