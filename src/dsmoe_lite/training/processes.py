"""The processes that train one model: the protocol, and a single process. `parallel.distributed` has many.

Everything in training that differs between one process and many is a method of this protocol.
"""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dsmoe_lite.checkpoint import CHECKPOINT, load_training, save_training
from dsmoe_lite.common.errors import require
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.model import Transformer
from dsmoe_lite.parallel.checkpoint_folders import CHECKPOINTS, newest_checkpoint

T = TypeVar("T")


class Processes(Protocol):
    """The processes of one run. All of them must call the collective methods, in the same order."""

    rank: int
    size: int
    stop_signals: tuple[signal.Signals, ...]  # signals that end training after the current step

    @property
    def is_rank0(self) -> bool:
        """Whether this process prints, evaluates and writes."""

    def join(self, device: str) -> None:
        """Join the process group, with tensors on `device`, "cpu" or "cuda". Collective."""

    def check_same(self, settings: dict[str, Any]) -> None:
        """Raise InputError unless all processes have the same JSON-able `settings`. Collective."""

    def shard(self, model: Transformer, expert_parallel: int) -> None:
        """Shard `model` in place over the processes. Collective.

        expert_parallel: processes that share one set of experts; 0: all. Raises InputError if it does not fit.
        """

    def gather_model(self, model: Transformer) -> Transformer | None:
        """Gather the full model on rank 0; None elsewhere. Collective."""

    def rows(self, n_sequences: int, moe: MoEConfig | None) -> slice:
        """The sequences of a batch that this process takes. Raises InputError if the batch cannot be divided."""

    def all_reduce_sum(self, part: Tensor) -> Tensor:
        """Sum `part` over processes; the gradient is that of this process's part. Collective."""

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any process. Collective."""

    def grad_norm(self, weights: list[nn.Parameter]) -> Tensor:
        """The norm of all gradients of the full model; `weights` are this process's. Collective."""

    def on_rank0(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0; return its result, which must be plain data, or raise its error on all. Collective."""

    def seed_rank(self, step: int) -> None:
        """Give each process its own random numbers from `step` on."""

    def save(
        self, folder: Path, step: int, model: Transformer, optimizer: torch.optim.AdamW, state: dict[str, Any]
    ) -> None:
        """Write a checkpoint into the run folder. Raises RunError if it cannot be written. Collective."""

    def load(self, folder: Path, model: Transformer, optimizer: torch.optim.AdamW) -> dict[str, Any] | None:
        """Restore the newest checkpoint and return its `state`, or None if there is none. Collective.

        Raises InputError if the checkpoint is damaged or of another model.
        """


class SingleProcess:
    """A single process: it takes all rows, and its sums are already complete."""

    rank, size = 0, 1
    is_rank0 = True
    stop_signals: tuple[signal.Signals, ...] = (signal.SIGINT,)

    def join(self, device: str) -> None:
        """Do nothing: there is no process group."""

    def check_same(self, settings: dict[str, Any]) -> None:
        """Do nothing: there is no other process."""

    def shard(self, model: Transformer, expert_parallel: int) -> None:
        """Leave the model unsharded."""

    def gather_model(self, model: Transformer) -> Transformer | None:
        """Return `model`."""
        return model

    def rows(self, n_sequences: int, moe: MoEConfig | None) -> slice:
        """Return all rows."""
        return slice(0, n_sequences)

    def all_reduce_sum(self, part: Tensor) -> Tensor:
        """Return `part`."""
        return part

    def any(self, flag: bool) -> bool:
        """Return `flag`."""
        return flag

    def grad_norm(self, weights: list[nn.Parameter]) -> Tensor:
        """Return the norm of all gradients."""
        return torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])

    def on_rank0(self, work: Callable[[], T]) -> T:
        """Run `work`."""
        return work()

    def seed_rank(self, step: int) -> None:
        """Keep the random state, which checkpoints restore exactly."""

    def save(
        self, folder: Path, step: int, model: Transformer, optimizer: torch.optim.AdamW, state: dict[str, Any]
    ) -> None:
        """Write one file in place of the earlier checkpoint."""
        save_training(folder / CHECKPOINT, model, optimizer, state)

    def load(self, folder: Path, model: Transformer, optimizer: torch.optim.AdamW) -> dict[str, Any] | None:
        """Read that file. Raises InputError if the folder has a checkpoint of torchrun's processes."""
        sharded = newest_checkpoint(folder / CHECKPOINTS)
        remedy = "torchrun's processes wrote it; continue with torchrun, which may start a single process"
        require(sharded is None, "checkpoint", str(sharded), remedy)
        checkpoint = folder / CHECKPOINT
        return load_training(checkpoint, model, optimizer) if checkpoint.is_file() else None


SINGLE_PROCESS = SingleProcess()
