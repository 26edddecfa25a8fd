"""The processes of a training run as torchrun started them, and how they exit if one of them is lost."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from dsmoe_lite.common.errors import InputError, RunError, require_number
from dsmoe_lite.training.processes import SINGLE_PROCESS, Processes


@contextmanager
def launched_processes(timeout: float = 600.0) -> Iterator[Processes]:
    """Yield torchrun's processes, or a single process if torchrun did not start this one.

    timeout: seconds to wait for another process. If one is lost, silent for longer, or cannot be reached, raises
    RunError on one process per host; NCCL aborts with its own message instead. An error on all processes, or an
    interrupt, is raised on rank 0; the others exit silently.
    """
    require_number("patience", timeout, 0.0, open_low=True)  # named as the option of `dsmoe train`
    if not dist.is_torchelastic_launched():
        yield SINGLE_PROCESS
        return
    from dsmoe_lite.parallel.distributed import Distributed  # its import takes half a second

    store, rank, size = _rendezvous(timedelta(seconds=timeout))
    processes = Distributed(store, rank, size, timeout)
    try:
        yield processes
    except (InputError, RunError, OSError) as error:
        processes.exit_together(error)
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        processes.exit_after_failed_collective(" ".join(str(error).split()))
    except KeyboardInterrupt:
        if processes.is_rank0:
            raise
        raise SystemExit(130) from None
    if dist.is_initialized():
        dist.destroy_process_group()


def _rendezvous(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Connect to the store that torchrun named. Return it with this process's rank and the number of processes."""
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(1) from None
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        remedy = "on one machine, start torchrun with --local-addr=127.0.0.1; on several, give one that all reach"
        message = f"MASTER_ADDR = {address}: not reached within {timeout.total_seconds():g} s; {remedy}"
        raise RunError(message) from None
    store.set_timeout(timeout)
    return store, rank, size


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed: NCCL raises its own class, gloo only a message."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
