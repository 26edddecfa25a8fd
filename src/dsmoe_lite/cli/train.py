"""dsmoe train: one model from one config file."""

from pathlib import Path
from statistics import fmean

import click

from dsmoe_lite.cli.tables import json_option, print_rows

FIGURES = ("max_vio", "drop_rate")  # of held-out text


@click.command(
    help="Train the model that a YAML file describes; run it again to go on after a stop. "
    "Started by torchrun, its experts are spread over all processes: torchrun ... -m dsmoe_lite train CONFIG."
)
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Run folder; default runs/<name of the config file>.")
@click.option("--patience", default=600.0, show_default=True, help="Seconds to wait for a process of torchrun's.")
@json_option
def command(config: Path, out: Path | None, patience: float, as_json: bool) -> None:
    """Train, evaluate, and leave checkpoint, model and record in the run folder."""
    from dsmoe_lite.common.paths import RUNS
    from dsmoe_lite.training.job import read_job, run_job
    from dsmoe_lite.training.launch import launched_processes

    folder = out or RUNS / config.stem
    with launched_processes(patience) as processes:
        record = run_job(read_job(config), folder, processes=processes)
    if not processes.is_rank0:
        return
    layers = record.get("heldout_experts", [])
    experts = {f"{name}, mean over layers": fmean(layer[name] for layer in layers) for name in FIGURES if layers}
    rows = [
        {
            "run": str(folder),
            "finished": record["finished"],
            "held-out loss": record["heldout_loss"],
            **{f"recall {group}": share for group, share in record["recall"].items()},
            **experts,
            "tokens/s": record["tokens_per_second"],
        }
    ]
    print_rows(rows, as_json=as_json, title="Training run")
