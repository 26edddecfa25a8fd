"""Recorded runs as the rows that charts and tables of several chapters take."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

Records = Sequence[Mapping[str, Any]]

METRICS = {
    "held-out loss": lambda record: record["heldout_loss"],
    "recall, frequent people": lambda record: record["recall"]["head"],
    "recall, rare people": lambda record: record["recall"]["tail"],
}


def metric_rows(records: Records, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows {model, seed, metric, value} of the models in `names` (name in the grid -> name to show)."""
    return [
        {"model": names[record["model_name"]], "seed": record["seed"], "metric": metric, "value": value_of(record)}
        for metric, value_of in METRICS.items()
        for record in records
        if record["model_name"] in names
    ]


def curve_rows(records: Records, names: Mapping[str, str], window: int) -> list[dict[str, Any]]:
    """Rows {model, seed, step, loss}: training losses, each the mean of `window` steps."""
    return [
        {"model": names[record["model_name"]], "seed": record["seed"], "step": step, "loss": mean(losses)}
        for record in records
        if record["model_name"] in names
        for step in range(window, len(record["losses"]) + 1, window)
        if (losses := record["losses"][step - window : step])
    ]


def gaps(records: Records, model: str, other: str, metric: str) -> dict[int, float]:
    """`metric` of `model` minus that of `other`, by seed: both have seen the same text in the same order."""
    value = {(r["model_name"], r["seed"]): METRICS[metric](r) for r in records}
    seeds = sorted(seed for name, seed in value if name == model)
    return {seed: value[model, seed] - value[other, seed] for seed in seeds}
