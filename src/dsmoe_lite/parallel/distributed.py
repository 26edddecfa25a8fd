"""The processes that torchrun started, as they train one model: many processes for `training.processes`."""

import json
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from dsmoe_lite.checkpoint import CHECKPOINT
from dsmoe_lite.common.errors import RunError, require, require_same
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.model import Transformer
from dsmoe_lite.parallel.checkpoint import load_sharded, save_sharded
from dsmoe_lite.parallel.checkpoint_folders import CHECKPOINTS, newest_checkpoint
from dsmoe_lite.parallel.collectives import all_reduce_sum, on_rank0
from dsmoe_lite.parallel.mesh import make_mesh, rows_of_rank
from dsmoe_lite.parallel.shard import parallelize

T = TypeVar("T")


class Distributed:
    """Many processes: the model is sharded over them, and each takes its rows of every batch.

    `training.processes.Processes` documents the methods of this protocol.
    """

    stop_signals: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)  # a cluster sends SIGTERM

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._local_rank = int(os.environ.get("LOCAL_RANK", "0"))  # among the processes of this host
        self._timeout = timedelta(seconds=timeout)  # of one collective

    @property
    def is_rank0(self) -> bool:
        """Whether this process prints, evaluates and writes."""
        return self.rank == 0

    def join(self, device: str) -> None:
        """Start torch's default process group: NCCL with one GPU per process, or gloo on CPUs."""
        self._device = device
        if device == "cuda":
            n, rank = torch.cuda.device_count(), self._local_rank
            require(rank < n, "device", device, f"local rank {rank} has no GPU: this host has {n}")
            torch.cuda.set_device(rank)
        backend, store = "nccl" if device == "cuda" else "gloo", dist.PrefixStore("training", self._store)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=self._timeout)

    def check_same(self, settings: dict[str, Any]) -> None:
        """Raise the same InputError on all, naming the first rank whose settings differ from those of rank 0."""
        first, *others = self._all_gather(json.loads(json.dumps(settings)))
        for rank, other in enumerate(others, 1):
            require_same(other, first, f"process {rank}: ")

    def shard(self, model: Transformer, expert_parallel: int) -> None:
        """Make the mesh and shard the model over it. Raises InputError if the sizes do not fit."""
        parallelize(model, make_mesh(self._device, model.config.moe, expert_parallel, self._timeout))

    def gather_model(self, model: Transformer) -> Transformer | None:
        """Gather the weights on rank 0, one tensor at a time."""
        with torch.random.fork_rng(devices=[]):  # making a model must not change the random numbers of the next step
            full = Transformer(model.config).to(self._device) if self.is_rank0 else None
        target = {} if full is None else full.state_dict()
        for name, value in model.state_dict().items():
            gathered = value.full_tensor() if isinstance(value, DTensor) else value
            if full is not None:
                target[name].copy_(gathered)
        return full

    def rows(self, n_sequences: int, moe: MoEConfig | None) -> slice:
        """As `mesh.rows_of_rank`."""
        return rows_of_rank(self.rank, self.size, n_sequences, moe)

    def all_reduce_sum(self, part: Tensor) -> Tensor:
        """As `collectives.all_reduce_sum`."""
        return all_reduce_sum(part)

    def any(self, flag: bool) -> bool:
        """All-reduce with the maximum."""
        raised = torch.tensor(int(flag), device=self._device)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised)

    def grad_norm(self, weights: list[nn.Parameter]) -> Tensor:
        """Count every shard once. torch's own norm does one collective per mesh axis, and warns about it."""
        squares = torch.zeros((), device=self._device)
        for weight in weights:
            if weight.grad is not None:
                grad = cast(DTensor, weight.grad)
                replicas = [n for n, placement in zip(grad.device_mesh.shape, grad.placements, strict=True)
                            if isinstance(placement, Replicate)]  # fmt: skip
                local = grad.to_local()
                local = local.float() if local.element_size() < 4 else local
                squares = squares + local.square().sum() / math.prod(replicas)
        return all_reduce_sum(squares).sqrt()

    def on_rank0(self, work: Callable[[], T]) -> T:
        """As `collectives.on_rank0`."""
        return on_rank0(work)

    def save(
        self, folder: Path, step: int, model: Transformer, optimizer: torch.optim.AdamW, state: dict[str, Any]
    ) -> None:
        """As `checkpoint.save_sharded`."""
        save_sharded(folder / CHECKPOINTS, step, model, optimizer, state)

    def seed_rank(self, step: int) -> None:
        """Seed by rank and step, because another number of processes could not restore random states."""
        torch.manual_seed(hash((torch.initial_seed(), step, self.rank)))

    def load(self, folder: Path, model: Transformer, optimizer: torch.optim.AdamW) -> dict[str, Any] | None:
        """As `checkpoint.load_sharded`, from the newest checkpoint that rank 0 sees."""
        for rank, visible in enumerate(self._all_gather(folder.is_dir())):
            require(visible, "folder", str(folder), f"process {rank} cannot see it; choose one that all hosts share")
        path = on_rank0(lambda: _newest(folder))
        return None if path is None else load_sharded(Path(path), model, optimizer)

    def exit_together(self, error: Exception) -> NoReturn:
        """Raise `error` on rank 0; elsewhere exit silently if rank 0 has reported why, else raise it too."""
        patience = timedelta(seconds=2)  # the store may end with rank 0, so rank 0 waits until the others have read it
        if self.is_rank0:
            with suppress(RuntimeError):
                self._store.set("reported", str(error))
                deadline = time.monotonic() + patience.total_seconds()
                while self._store.add("read", 0) < self.size - 1 and time.monotonic() < deadline:
                    time.sleep(0.02)
            raise error
        with suppress(RuntimeError):  # rank 0 has reported nothing, or its store is gone
            self._store.wait(["reported"], patience)
            self._store.add("read", 1)
            raise SystemExit(1)
        raise error

    def exit_after_failed_collective(self, reason: str) -> NoReturn:
        """Raise RunError on the first process of each host, without communication: the network may be gone."""
        if self._local_rank > 0:
            raise SystemExit(1)
        failure = f"one of {self.size} processes is lost, or silent for {self._timeout.total_seconds():g} s"
        raise RunError(f"{failure}; run it again to continue from the last checkpoint ({reason})")

    def _all_gather(self, value: Any) -> list[Any]:
        """The value of each process, by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def _newest(folder: Path) -> str | None:
    """The path of the newest checkpoint. Raises InputError if the folder has a checkpoint of a single process."""
    single = folder / CHECKPOINT
    remedy = "one process without torchrun wrote it; continue without torchrun, or choose another folder"
    require(not single.is_file(), "checkpoint", str(single), remedy)
    path = newest_checkpoint(folder / CHECKPOINTS)
    return None if path is None else str(path)
