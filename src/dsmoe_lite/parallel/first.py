"""Work for the first process of the default group, whose outcome all of them learn."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from dsmoe_lite.errors import InputError, RunError

T = TypeVar("T")


def first(work: Callable[[], T]) -> T:
    """Do `work` in the first process and return what it returned, plain data, in all; each of them must call.

    InputError, RunError and what a disk refuses, as RunError, are raised in all.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except (InputError, RunError) as error:
            outcome[1] = error
        except OSError as error:
            outcome[1] = RunError(str(error))
        except Exception as error:  # the others must not wait for it
            dist.broadcast_object_list([None, RunError(f"the first process failed: {type(error).__name__}: {error}")])
            raise
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
