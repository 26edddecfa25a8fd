"""Try a measurement that may fail; a failure is left out of the results, with a note that gives the reason."""

from collections.abc import Callable
from typing import TypeVar

import torch

from dsmoe_lite.common.errors import RunError

Notes = list[str]
T = TypeVar("T")


def attempt(name: str, run: Callable[[], T], notes: Notes) -> T | None:
    """Return run(), or None with a note if it fails. Raises RunError with its name if it leaves the GPU unusable."""
    try:
        result = run()
        _synchronize()  # a kernel's failure is reported after its launch: here, not in the next measurement
        return result
    except torch.OutOfMemoryError:
        reason = "out of this GPU's memory"
    except Exception as error:  # compilers and other packages raise their own classes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    notes.append(f"{name}: {reason}")
    try:
        _synchronize()
    except RuntimeError:  # no kernel can run in this process any more
        raise RunError(f"{name}: {reason}; the GPU is now unusable, so nothing after it was measured") from None
    return None


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
