"""The results of a training run: losses, balance figures, times, and the JSON record."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dsmoe_lite.common.errors import DivergedError
from dsmoe_lite.config import to_dict
from dsmoe_lite.layers.load import relative_load
from dsmoe_lite.layers.router import Routing
from dsmoe_lite.model import Transformer
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.processes import Processes
from dsmoe_lite.training.provenance import provenance

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)  # version 1 has one balance loss, and no loads
ENTRIES = {  # of every record of a run on a corpus
    "model": dict, "train": dict, "finished": bool, "losses": list, "corpus": dict, "first_document": int,
    "heldout_loss": float, "heldout_by_domain": dict, "recall": dict, "provenance": dict,
}  # fmt: skip


@dataclass
class Run:
    """The results so far: a loss per step, balance figures every routing_every steps, and times."""

    losses: list[float] = field(default_factory=list)  # next-token cross-entropy in nats, without balance losses
    routing: list[dict[str, Any]] = field(default_factory=list)  # as `routing_figures` returns them
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0

    @property
    def steps_done(self) -> int:
        """Optimizer steps taken."""
        return len(self.losses)

    @property
    def tokens_per_second(self) -> float:
        """Training tokens per second of wall clock."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def add_step(self, loss: float, config: TrainConfig, stopwatch: "Stopwatch") -> None:
        """Record one step. Raises DivergedError if its loss is not finite."""
        if not math.isfinite(loss):
            raise DivergedError(
                f"loss = {loss} at step {self.steps_done}: lower lr = {config.lr:g} or raise warmup_steps"
            )
        seconds, cpu_seconds = stopwatch.lap()
        self.losses.append(loss)
        self.tokens += config.batch_size * config.grad_accum * config.seq_len
        self.seconds += seconds
        self.cpu_seconds += cpu_seconds


class Stopwatch:
    """Wall and CPU seconds since the last lap."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        """Return the wall and CPU seconds since the last lap, and start the next one."""
        wall, cpu = time.perf_counter(), time.process_time()
        elapsed = wall - self._wall, cpu - self._cpu
        self._wall, self._cpu = wall, cpu
        return elapsed


def routing_figures(step: int, routings: Sequence[Routing], processes: Processes) -> dict[str, Any]:
    """Balance figures of one batch: step, max_vio and drop_rate (means over MoE layers), loads (MoE layers, E).

    Collective: every process passes the routings of its own rows of the batch.
    """
    counts = processes.all_reduce_sum(torch.stack([routing.counts for routing in routings]))  # (MoE layers, E)
    n_kept = processes.all_reduce_sum(torch.stack([routing.kept.sum() for routing in routings])).tolist()
    n_choices, n_layers = counts.sum(dim=1).clamp(min=1).tolist(), len(routings)
    loads = relative_load(counts).tolist()
    max_vio = sum(max(layer) - 1 for layer in loads) / n_layers
    drop_rate = sum(1 - kept / choices for kept, choices in zip(n_kept, n_choices, strict=True)) / n_layers
    rounded = [[round(value, 3) for value in layer] for layer in loads]
    return {"step": step, "max_vio": round(max_vio, 4), "drop_rate": round(drop_rate, 4), "loads": rounded}


def run_record(run: Run, model: Transformer, config: TrainConfig, **facts: Any) -> dict[str, Any]:
    """Return the JSON-able record of a run: configs with the seed, curve, speed, `facts` and provenance."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": to_dict(model.config),
        "train": to_dict(config),
        "finished": run.steps_done == config.steps,
        "tokens": run.tokens,
        "seconds": round(run.seconds, 3),
        "cpu_seconds": round(run.cpu_seconds, 3),
        "tokens_per_second": round(run.tokens_per_second, 1),
        "losses": [round(loss, 5) for loss in run.losses],
        "routing": run.routing,
        **facts,
        "provenance": provenance(),
    }
