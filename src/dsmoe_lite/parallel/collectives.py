"""Collectives of the default process group: an all-reduce with gradient, and work on rank 0 for all processes."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from dsmoe_lite.common.errors import InputError, RunError

T = TypeVar("T")


def all_reduce_sum(part: Tensor) -> Tensor:
    """Sum `part` over all processes; the gradient is that of this process's `part`. Collective.

    A loss built from such sums equals the loss of the full batch on every process, and the gradients of the processes
    add up to its gradient. FSDP averages gradients over processes, so the training loop multiplies the loss by their
    number before the backward pass.
    """
    summed = part.detach().clone()
    dist.all_reduce(summed)
    return summed + (part - part.detach())


def on_rank0(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result, which must be plain data, on every process. Collective.

    InputError and RunError are raised on every process; OSError becomes a RunError.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except (InputError, RunError) as error:
            outcome[1] = error
        except OSError as error:
            outcome[1] = RunError(str(error))
        except Exception as error:  # the other processes must not wait for a result
            dist.broadcast_object_list([None, RunError(f"rank 0 failed: {type(error).__name__}: {error}")])
            raise
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
