"""Turn Ctrl-C, or the stop button of a notebook, into a request that is checked between two steps."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_requested(signals: Sequence[signal.Signals] = (signal.SIGINT,)) -> Iterator[threading.Event]:
    """Yield an Event that the first of `signals` sets; a second SIGINT raises KeyboardInterrupt as usual.

    Other signals stay caught, because a cluster sends them to every process and its launcher forwards them again.
    Outside the main thread, signals cannot be caught, and the Event is never set.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return

    def request_stop(signum: int, frame: FrameType | None) -> None:
        requested.set()
        if signum == signal.SIGINT:
            signal.signal(signum, earlier_handlers[signal.SIGINT])

    earlier_handlers = {signum: signal.signal(signum, request_stop) for signum in signals}
    try:
        yield requested
    finally:
        for signum, handler in earlier_handlers.items():
            signal.signal(signum, handler)
