"""A training run's processes, as torchrun has started them, and how they end when one of them is lost."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from dsmoe_lite.errors import InputError, RunError, require_number
from dsmoe_lite.parallel.alone import Alone


@contextmanager
def launched(patience: float = 600.0) -> Iterator[Alone]:
    """Yield all of torchrun's processes, or this one alone where torchrun did not start it.

    patience: seconds that one may keep the others waiting. Where one is lost, or silent for longer, the others raise
    RunError, one a host; NCCL instead ends them with words of its own. An error in all of them, or an interrupt, is
    raised in the first, and ends the others in silence.
    """
    require_number("patience", patience, 0.0, open_low=True)
    if not dist.is_torchelastic_launched():
        yield Alone()
        return
    from dsmoe_lite.parallel.processes import Together  # half a second that one process need not wait

    store, rank, size = next(dist.rendezvous("env://"))
    store.set_timeout(timedelta(seconds=patience))
    processes = Together(store, rank, size, patience)
    try:
        yield processes
    except (InputError, RunError, OSError) as error:
        processes.leave(error)
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        processes.lose(" ".join(str(error).split()))
    except KeyboardInterrupt:
        if processes.leads:
            raise
        raise SystemExit(130) from None
    if dist.is_initialized():
        dist.destroy_process_group()


def _is_loss(error: RuntimeError) -> bool:
    """Whether an exchange failed: NCCL has a class for it, gloo only words."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
