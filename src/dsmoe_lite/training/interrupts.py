"""Ctrl-C, or the notebook's stop button, as a question asked between two steps."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_requested(signals: Sequence[signal.Signals] = (signal.SIGINT,)) -> Iterator[threading.Event]:
    """Yield an Event that the first of `signals` sets; a second SIGINT raises KeyboardInterrupt as usual.

    Other signals stay caught: a cluster sends them to a process, and its launcher passes them on once more. Outside the
    main thread signals cannot be caught, and the Event is never set.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return

    def note(signum: int, frame: FrameType | None) -> None:
        requested.set()
        if signum == signal.SIGINT:
            signal.signal(signum, before[signal.SIGINT])

    before = {signum: signal.signal(signum, note) for signum in signals}
    try:
        yield requested
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
