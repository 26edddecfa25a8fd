"""What a training run leaves: losses, balance figures, time, and its JSON record."""

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

SCHEMA_VERSION = 2  # version 1 had one balance loss, and no loads


@dataclass
class Run:
    """One loss per step, balance figures every routing_every steps, time and progress."""

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
        """Record one step. DivergedError if its loss is not finite."""
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
        """Return the seconds since the last lap, and start the next."""
        wall, cpu = time.perf_counter(), time.process_time()
        took = wall - self._wall, cpu - self._cpu
        self._wall, self._cpu = wall, cpu
        return took


def routing_figures(step: int, routings: Sequence[Routing], processes: Processes) -> dict[str, Any]:
    """Balance figures of one batch: step, max_vio and drop_rate (means over MoE layers), loads (MoE layers, E).

    Collective: every process passes the routings of its own part of the batch.
    """
    counts = processes.all_reduce_sum(torch.stack([routing.counts for routing in routings]))  # (MoE layers, E)
    kept = processes.all_reduce_sum(torch.stack([routing.kept.sum() for routing in routings])).tolist()
    assigned, n_layers = counts.sum(dim=1).clamp(min=1).tolist(), len(routings)
    loads = relative_load(counts).tolist()
    vio = sum(max(layer) - 1 for layer in loads) / n_layers
    dropped = sum(1 - k / n for k, n in zip(kept, assigned, strict=True)) / n_layers
    rounded = [[round(value, 3) for value in layer] for layer in loads]
    return {"step": step, "max_vio": round(vio, 4), "drop_rate": round(dropped, 4), "loads": rounded}


def run_record(run: Run, model: Transformer, config: TrainConfig, **facts: Any) -> dict[str, Any]:
    """Return the JSON-able record of a run: configs, seeds, curve, speed, versions, commit, and `facts`."""
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
