"""Call a student's functions where they can do no harm, within limits.

The checks stay outside. They get plain data from the sandbox, and nothing that the student's code does to its own
process can change what a check compares.
"""

import contextlib
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.teaching.plain import MOST_REPLY, decode, encode
from dsmoe_lite.teaching.walls import ENVIRONMENT, walls

LOOK_EVERY = 0.05  # seconds between two looks at the processes
START = 60.0  # seconds for Python and torch to start
MOST_THREADS = 200  # of all processes together
RESERVE = 0.05  # share of the machine's memory that must stay free


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one answer: wall seconds, memory of all processes together, their number, and what they may write."""

    seconds: float = 10.0
    memory_mb: int = 2000
    processes: int = 16
    files_mb: int = 64


@dataclass(frozen=True)
class Reply:
    """verdict: "ok", "error", "time", "memory", "processes" or "missing"."""

    verdict: str
    value: Any = None
    message: str = ""
    seconds: float = 0.0
    peak_mb: float = 0.0


@dataclass
class Sandbox:
    """One process for a student's answer. Use it as a context; a call that breaks a limit ends the process.

    setup: the lab's own cells, run before `answer`, the student's cell. forbidden: modules of this package that are
    absent inside. isolated: False runs the answer without walls, as this user.
    """

    setup: Sequence[str]
    answer: str
    limits: Limits = Limits()
    forbidden: Sequence[str] = ()
    isolated: bool = True
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _left: float = field(default=0.0, repr=False)  # seconds
    _ended: Reply | None = field(default=None, repr=False)  # what every further call gets

    def __enter__(self) -> "Sandbox":
        self._left = self.limits.seconds
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def call(self, name: str, *arguments: Any) -> Reply:
        """Call the function `name` with plain data. All calls together, and the cell before them, share the seconds.

        Raises RunError if the lab's own cells fail, or its arguments are no plain data.
        """
        try:
            request = encode({"name": name, "arguments": list(arguments)})
        except InputError as error:
            raise RunError(f"a check of the lab calls {name} with what cannot be sent: {error}") from None
        if self._ended is None and self._process is None:
            self._begin()
        return self._ended or self._timed(request)

    def _begin(self) -> None:
        limits = self.limits
        inside = ["dsmoe_lite.teaching.inside", str(limits.memory_mb), str(limits.files_mb)]
        command = [sys.executable, "-B", "-m", *inside]
        if self.isolated:
            command = [*walls(limits.files_mb, self.forbidden), *command]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipes)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        for source in self.setup:
            reply = self._ask(encode({"given": source}), START)
            if reply.verdict != "ok":
                raise RunError(f"a given cell of the lab fails in the sandbox ({reply.verdict}: {reply.message})")
        reply = self._timed(encode({"answer": self.answer}))
        if reply.verdict != "ok":
            self._ended = reply

    def _timed(self, request: bytes) -> Reply:
        reply = self._ask(request, self._left)
        self._left -= reply.seconds
        if self._process is None:
            self._ended = reply
        return reply

    def _ask(self, request: bytes, seconds: float) -> Reply:
        assert self._process is not None
        start, watch = time.monotonic(), _Watch(self._process, self.limits)
        try:
            line, broken = watch.exchange(request, start + seconds)
        except OSError:
            line, broken = b"", "error"
        took = time.monotonic() - start
        if broken:
            self._stop()
            return Reply(broken, message="the process ended", seconds=took, peak_mb=watch.peak)
        try:
            reply = decode(line)
        except InputError:
            reply = None
        if not isinstance(reply, dict):
            self._stop()
            return Reply("error", message="the reply is damaged", seconds=took, peak_mb=watch.peak)
        if reply.get("memory") is True:
            return Reply("memory", seconds=took, peak_mb=watch.peak)
        if "error" in reply:
            verdict = "missing" if reply["error"] is None else "error"
            return Reply(verdict, message=str(reply["error"])[:300], seconds=took, peak_mb=watch.peak)
        return Reply("ok", reply.get("value"), seconds=took, peak_mb=watch.peak)

    def _stop(self) -> None:
        if self._process is not None:
            for one in _family(self._process.pid):
                with contextlib.suppress(psutil.Error):
                    one.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
            self._process = None


class _Watch:
    """Sends one line to a process and reads one from it, while it looks at its memory and its children."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits) -> None:
        self.process, self.limits, self.peak = process, limits, 0.0

    def exchange(self, request: bytes, until: float) -> tuple[bytes, str]:
        """The line, or the limit that was broken. A reply that is there counts, however late this process looks."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        left, found, is_late = memoryview(request), bytearray(), False
        with selectors.DefaultSelector() as ready:
            ready.register(stdout, selectors.EVENT_READ)
            ready.register(stdin, selectors.EVENT_WRITE)
            while not is_late:
                is_late = time.monotonic() >= until
                for key, _ in ready.select(0 if is_late else LOOK_EVERY):
                    if key.fd == stdin.fileno():
                        left = left[os.write(key.fd, left[: 2**16]) :]
                        if not left:
                            ready.unregister(stdin)
                        continue
                    chunk = os.read(key.fd, 2**20)
                    found += chunk
                    if not chunk:
                        return b"", "error"
                    if found.endswith(b"\n"):
                        self._look()
                        return bytes(found), ""
                    if len(found) > MOST_REPLY:
                        return b"", "memory"
                if broken := self._look():
                    return b"", broken
        return b"", "time"

    def _look(self) -> str:
        family = _family(self.process.pid)
        memory, threads = 0.0, 0
        for one in family:
            with contextlib.suppress(psutil.Error):
                memory += one.memory_info().rss / 1e6
                threads += one.num_threads()
        self.peak = max(self.peak, memory)
        machine = psutil.virtual_memory()
        if memory > self.limits.memory_mb or machine.available < RESERVE * machine.total:
            return "memory"
        return "processes" if len(family) > self.limits.processes or threads > MOST_THREADS else ""


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []
