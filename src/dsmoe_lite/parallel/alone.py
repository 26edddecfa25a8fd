"""One process that trains by itself; many do the same things together (`processes.Together`)."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dsmoe_lite.checkpoint import CHECKPOINT, load_training, save_training
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.errors import require
from dsmoe_lite.model import Transformer
from dsmoe_lite.parallel.steps import SPREAD, newest

T = TypeVar("T")


class Alone:
    """One process: it has every row, and its sums are the whole."""

    rank, size = 0, 1
    stopped_by: tuple[signal.Signals, ...] = (signal.SIGINT,)  # signals that end training after the current step

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks, evaluates and writes what needs one writer."""
        return self.rank == 0

    def join(self, device: str) -> None:
        """Be one of them, with tensors on `device`, cpu or cuda."""

    def same(self, settings: dict[str, Any]) -> None:
        """Raise InputError unless JSON-able `settings` are those of every process."""

    def spread(self, model: Transformer, expert: int) -> None:
        """Spread the model in place; `expert` processes share one set of experts, 0: all do."""

    def whole(self, model: Transformer) -> Transformer | None:
        """The model as one process has it, where this one leads; all must call."""
        return model

    def rows(self, n_sequences: int, moe: MoEConfig | None) -> slice:
        """The sequences of a batch that are this process's."""
        return slice(0, n_sequences)

    def total(self, part: Tensor) -> Tensor:
        """The sum over processes; its gradient is that of this process's part."""
        return part

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return flag

    def norm(self, weights: list[nn.Parameter]) -> Tensor:
        """The norm of all gradients together, before it is clipped."""
        return torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns, plain data; it is done in the process that leads, and its errors are raised in all."""
        return work()

    def save(
        self, folder: Path, step: int, model: Transformer, optimizer: torch.optim.AdamW, state: dict[str, Any]
    ) -> None:
        """Write a checkpoint of the run in `folder`. RunError where the disk refuses."""
        save_training(folder / CHECKPOINT, model, optimizer, state)

    def own_noise(self, step: int) -> None:
        """Draw noise, from `step` on, that no other process draws."""

    def load(self, folder: Path, model: Transformer, optimizer: torch.optim.AdamW) -> dict[str, Any] | None:
        """Restore the last checkpoint and return its `state`, or None. InputError where it does not fit."""
        begun = newest(folder / SPREAD)
        remedy = "processes of torchrun wrote it; go on with torchrun, of one process if need be"
        require(begun is None, "checkpoint", str(begun), remedy)
        checkpoint = folder / CHECKPOINT
        return load_training(checkpoint, model, optimizer) if checkpoint.is_file() else None
