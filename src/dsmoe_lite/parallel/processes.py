"""All processes that torchrun has started, training one model: the same things as one process, done together."""

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
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.errors import RunError, require, require_same
from dsmoe_lite.model import Transformer
from dsmoe_lite.parallel.alone import Alone
from dsmoe_lite.parallel.checkpoint import load_spread, save_spread
from dsmoe_lite.parallel.first import first
from dsmoe_lite.parallel.mesh import make_mesh
from dsmoe_lite.parallel.shard import parallelize
from dsmoe_lite.parallel.split import rows_of
from dsmoe_lite.parallel.steps import SPREAD, newest
from dsmoe_lite.parallel.total import total

T = TypeVar("T")


class Together(Alone):
    """All processes of a `store`: the model is spread over them, and each takes a part of every batch."""

    stopped_by = (signal.SIGINT, signal.SIGTERM)  # a cluster asks by SIGTERM

    def __init__(self, store: dist.Store, rank: int, size: int, patience: float) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._place = int(os.environ.get("LOCAL_RANK", "0"))  # among the processes of this host
        self._patience = timedelta(seconds=patience)  # for the others in one exchange

    def join(self, device: str) -> None:
        """Start torch's default process group: NCCL between GPUs, one a process, else gloo."""
        self._device = device
        if device == "cuda":
            n = torch.cuda.device_count()
            require(self._place < n, "device", device, f"process {self._place} of this host has none: it has {n} GPUs")
            torch.cuda.set_device(self._place)
        backend, store = "nccl" if device == "cuda" else "gloo", dist.PrefixStore("training", self._store)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=self._patience)

    def same(self, settings: dict[str, Any]) -> None:
        """Raise one InputError in all, of the first process that differs from the one that leads."""
        first, *others = self._all(json.loads(json.dumps(settings)))
        for rank, other in enumerate(others, 1):
            require_same(other, first, f"process {rank}: ")

    def spread(self, model: Transformer, expert: int) -> None:
        """Make the mesh and spread the model over it; InputError where sizes do not fit."""
        parallelize(model, make_mesh(self._device, model.config.moe, expert, self._patience))

    def whole(self, model: Transformer) -> Transformer | None:
        """Gather the weights, one after the other, where this process leads."""
        with torch.random.fork_rng(devices=[]):  # noise goes on as if nothing had been made
            made = Transformer(model.config).to(self._device) if self.leads else None
        wanted = {} if made is None else made.state_dict()
        for name, value in model.state_dict().items():
            gathered = value.full_tensor() if isinstance(value, DTensor) else value
            if made is not None:
                wanted[name].copy_(gathered)
        return made

    def rows(self, n_sequences: int, moe: MoEConfig | None) -> slice:
        """As `split.rows_of`."""
        return rows_of(self.rank, self.size, n_sequences, moe)

    def total(self, part: Tensor) -> Tensor:
        """As `total.total`."""
        return total(part)

    def any(self, flag: bool) -> bool:
        """Ask all."""
        said = torch.tensor(int(flag), device=self._device)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)

    def norm(self, weights: list[nn.Parameter]) -> Tensor:
        """Add the squares of every part once: torch's own takes one exchange a mesh axis, and says that it is slow."""
        squares = torch.zeros((), device=self._device)
        for weight in weights:
            if weight.grad is not None:
                part = cast(DTensor, weight.grad)
                holders = [n for n, where in zip(part.device_mesh.shape, part.placements, strict=True)
                           if isinstance(where, Replicate)]  # fmt: skip
                local = part.to_local()
                local = local.float() if local.element_size() < 4 else local
                squares = squares + local.square().sum() / math.prod(holders)
        return total(squares).sqrt()

    def first(self, work: Callable[[], T]) -> T:
        """As `first.first`."""
        return first(work)

    def save(
        self, folder: Path, step: int, model: Transformer, optimizer: torch.optim.AdamW, state: dict[str, Any]
    ) -> None:
        """As `checkpoint.save_spread`."""
        save_spread(folder / SPREAD, step, model, optimizer, state)

    def own_noise(self, step: int) -> None:
        """Seed by process and step: another number of processes could not take random states up."""
        torch.manual_seed(hash((torch.initial_seed(), step, self.rank)))

    def load(self, folder: Path, model: Transformer, optimizer: torch.optim.AdamW) -> dict[str, Any] | None:
        """As `checkpoint.load_spread`, of the folder that the first process finds newest."""
        unseen = [rank for rank, seen in enumerate(self._all(folder.is_dir())) if not seen]
        remedy = f"process {unseen[:1]} does not see it; it must be a folder that all hosts share"
        require(not unseen, "folder", str(folder), remedy)
        path = first(lambda: _newest_of_many(folder))
        return None if path is None else load_spread(Path(path), model, optimizer)

    def leave(self, error: Exception) -> NoReturn:
        """Raise `error`; end without a word where the process that leads says why."""
        patience = timedelta(seconds=2)  # to hear each other: the store may end with the first process
        if self.leads:
            with suppress(RuntimeError):
                self._store.set("said", str(error))
                until = time.monotonic() + patience.total_seconds()
                while self._store.add("heard", 0) < self.size - 1 and time.monotonic() < until:
                    time.sleep(0.02)
            raise error
        with suppress(RuntimeError):  # it has not said, or can no longer be asked
            self._store.wait(["said"], patience)
            self._store.add("heard", 1)
            raise SystemExit(1)
        raise error

    def lose(self, reason: str) -> NoReturn:
        """Raise RunError after a failed exchange, in the first process of each host; the network may be gone."""
        if self._place > 0:
            raise SystemExit(1)
        said = f"one of {self.size} processes is lost, or silent for {self._patience.total_seconds():g} s"
        raise RunError(f"{said}; run it again to go on from the last checkpoint ({reason})")

    def _all(self, value: Any) -> list[Any]:
        """What each process has."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


def _newest_of_many(folder: Path) -> str | None:
    """InputError where one process without torchrun has begun the run."""
    alone = folder / CHECKPOINT
    remedy = "one process without torchrun wrote it; go on without, or choose another folder"
    require(not alone.is_file(), "checkpoint", str(alone), remedy)
    found = newest(folder / SPREAD)
    return None if found is None else str(found)
