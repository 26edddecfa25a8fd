"""Try what may not be there; what fails is left out, with a note that says why."""

from collections.abc import Callable
from typing import TypeVar

import torch

from dsmoe_lite.common.errors import RunError

Notes = list[str]
T = TypeVar("T")


def attempt(name: str, run: Callable[[], T], notes: Notes) -> T | None:
    """Return run(), or None where it fails, with a note. RunError naming it where it leaves the GPU unusable."""
    try:
        result = run()
        _wait()  # a kernel's failure is reported after its launch: here, not to who comes next
        return result
    except Exception as error:  # compilers and other packages have errors of their own
        memory = isinstance(error, torch.OutOfMemoryError)
        reason = "out of this GPU's memory" if memory else (str(error).splitlines() or [type(error).__name__])[0]
    notes.append(f"{name}: {reason}")
    try:
        _wait()
    except RuntimeError:  # no kernel runs in this process any more
        raise RunError(f"{name}: {reason}; it leaves the GPU unusable, so nothing after it was measured") from None
    return None


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
