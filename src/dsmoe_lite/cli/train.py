"""`dsmoe train`: train one model from one config file."""

from pathlib import Path
from statistics import fmean

import click

from dsmoe_lite.cli.tables import json_option, print_rows
from dsmoe_lite.common.errors import require

EXPERT_METRICS = ("max_vio", "drop_rate")  # on held-out text


@click.command(
    help="Train the model that the YAML file CONFIG describes. If a run is stopped, the same command resumes it. "
    "Under torchrun, the experts are sharded over all processes: torchrun ... -m dsmoe_lite train CONFIG."
)
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/<name of CONFIG>]")
@click.option("--patience", default=600.0, show_default=True, help="Seconds to wait for another process of torchrun.")
@json_option
def command(config: Path, out: Path | None, patience: float, as_json: bool) -> None:
    """Train, evaluate, and write checkpoint, model and record into the run folder."""
    from dsmoe_lite.common import paths
    from dsmoe_lite.training.job import read_job, run_job
    from dsmoe_lite.training.launch import launched_processes

    folder = out or paths.RUNS / _run_name(config)
    paths.require_writable(folder)
    with launched_processes(patience) as processes:
        record = run_job(read_job(config), folder, processes=processes)
    if not processes.is_rank0:
        return
    layers = record.get("heldout_experts", [])
    experts = {f"{name}, mean over layers": fmean(layer[name] for layer in layers) for name in EXPERT_METRICS if layers}
    rows = [
        {
            "run": str(folder),
            "finished": record["finished"],
            "held-out loss": record["heldout_loss"],
            **{f"recall {group}": recall for group, recall in record["recall"].items()},
            **experts,
            "tokens/s": record["tokens_per_second"],
        }
    ]
    print_rows(rows, as_json=as_json, title="Training run")


def _run_name(config: Path) -> str:
    """The name of the run folder below runs/: that of the config without its suffix."""
    remedy = "its name without .yaml is no name for a run folder; rename it, or name a folder with --out"
    require(not config.stem.startswith(".") and config.stem != "", "config", str(config), remedy)
    return config.stem
