"""Call a student's functions where they can do no harm: bubblewrap, no network, a read-only system, limits.

The checks stay outside. They get plain data from the sandbox, and nothing that the student's code does to its own
process can change what a check compares.
"""

import contextlib
import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.teaching.plain import MOST_BYTES, decode, encode

PACKAGE = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(PACKAGE.parent),
    "PYTHONHASHSEED": "0",
}
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/alternatives", "/etc/ld.so.cache")
PROBE = ("--ro-bind", "/", "/", "--unshare-all", "--die-with-parent", "true")
LOOK_EVERY = 0.05  # seconds between two looks at the processes
START = 60.0  # seconds for Python and torch to start


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one answer: wall seconds, memory of all processes together, their number, and what they may write."""

    seconds: float = 10.0
    memory_mb: int = 2000
    processes: int = 32
    files_mb: int = 64


@dataclass(frozen=True)
class Reply:
    """verdict: "ok", "error", "time", "memory", "processes" or "missing"."""

    verdict: str
    value: Any = None
    message: str = ""
    seconds: float = 0.0
    peak_mb: float = 0.0


def require_isolation() -> None:
    """Raise InputError with the remedy if this machine cannot isolate."""
    reason = why_not()
    if reason is not None:
        raise InputError(
            f"no isolation: {reason}; --unsafe runs the answers as you, with all that you can read and write"
        )


def _absent(module: str) -> list[str]:
    """Options that hide a module of this package, or a package of it, and its compiled files."""
    source = PACKAGE.parent.joinpath(*module.split("."))
    if source.is_dir():
        return ["--tmpfs", str(source)]
    hidden = ["--ro-bind", os.devnull, str(source.with_suffix(".py"))]
    compiled = source.parent / "__pycache__"
    return [*hidden, "--tmpfs", str(compiled)] if compiled.is_dir() else hidden


def why_not() -> str | None:
    """Why this machine cannot isolate, with the remedy; None if it can."""
    if sys.platform != "linux":
        return "isolation needs Linux: grade on a Linux machine"
    program = shutil.which("bwrap")
    if program is None:
        return "bubblewrap is not installed: apt install bubblewrap"
    tried = subprocess.run([program, *PROBE], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        return None
    line = (tried.stderr.strip().splitlines() or ["no message"])[-1]
    if "Permission denied" in line or "Operation not permitted" in line:
        remedy = "allow user namespaces: on Ubuntu 24.04 give /usr/bin/bwrap an AppArmor profile with `userns,`"
        return f"bubblewrap may not make namespaces ({line}): {remedy}"
    return f"bubblewrap does not work ({line})"


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

        Raises RunError if the lab's own cells fail.
        """
        if self._ended is None and self._process is None:
            self._begin()
        if self._ended is not None:
            return self._ended
        return self._timed({"name": name, "arguments": list(arguments)})

    def _begin(self) -> None:
        command = [sys.executable, "-B", "-m", "dsmoe_lite.teaching.inside", str(self.limits.memory_mb)]
        if self.isolated:
            command = [*self._walls(), *command]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipes)
        for source in self.setup:
            reply = self._ask({"source": source}, START)
            if reply.verdict != "ok":
                raise RunError(f"a given cell of the lab fails in the sandbox ({reply.verdict}: {reply.message})")
        reply = self._timed({"source": self.answer})
        if reply.verdict != "ok":
            self._ended = reply

    def _timed(self, request: dict[str, Any]) -> Reply:
        reply = self._ask(request, self._left)
        self._left -= reply.seconds
        if self._process is None:
            self._ended = reply
        return reply

    def _walls(self) -> list[str]:
        prefixes = {sys.prefix, sys.base_prefix, str(PACKAGE)}
        walls = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
        for name, value in ENVIRONMENT.items():
            walls += ["--setenv", name, value]
        walls += ["--proc", "/proc", "--dev", "/dev", "--size", str(self.limits.files_mb * 2**20), "--tmpfs", "/tmp"]
        for path in (*SYSTEM, *sorted(prefixes)):
            walls += ["--ro-bind-try", path, path]
        for module in self.forbidden:
            walls += _absent(module)
        return [*walls, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]

    def _ask(self, request: dict[str, Any], seconds: float) -> Reply:
        process, start = self._process, time.monotonic()
        assert process is not None
        assert process.stdin is not None
        watch = _Watch(process, self.limits)
        try:
            process.stdin.write(encode(request))
            process.stdin.flush()
            line, broken = watch.line(start + seconds)
        except OSError:
            line, broken = b"", "error"
        took = time.monotonic() - start
        if broken:
            self._stop()
            return Reply(
                broken, message="the process ended" if broken == "error" else "", seconds=took, peak_mb=watch.peak
            )
        try:
            reply = decode(line)
            if reply.get("memory"):
                return Reply("memory", seconds=took, peak_mb=watch.peak)
            if "error" in reply:
                verdict = "missing" if reply["error"] == "missing" else "error"
                return Reply(verdict, message=str(reply["error"]), seconds=took, peak_mb=watch.peak)
            return Reply("ok", reply["value"], seconds=took, peak_mb=watch.peak)
        except (InputError, AttributeError, KeyError, TypeError):
            self._stop()
            return Reply("error", message="the reply is damaged", seconds=took, peak_mb=watch.peak)

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
    """Reads one line from a process while it looks at its memory and its children."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits) -> None:
        self.process, self.limits, self.peak = process, limits, 0.0

    def line(self, until: float) -> tuple[bytes, str]:
        """The line, or the limit that was broken."""
        out = self.process.stdout
        assert out is not None
        found = bytearray()
        with selectors.DefaultSelector() as ready:
            ready.register(out, selectors.EVENT_READ)
            while time.monotonic() < until:
                if ready.select(LOOK_EVERY):
                    chunk = os.read(out.fileno(), 2**20)
                    found += chunk
                    if not chunk:
                        return b"", "error"
                    if found.endswith(b"\n"):
                        self._look()
                        return bytes(found), ""
                    if len(found) > 2 * MOST_BYTES:
                        return b"", "memory"
                if broken := self._look():
                    return b"", broken
        return b"", "time"

    def _look(self) -> str:
        family = _family(self.process.pid)
        memory = 0.0
        for one in family:
            with contextlib.suppress(psutil.Error):
                memory += one.memory_info().rss / 1e6
        self.peak = max(self.peak, memory)
        if memory > self.limits.memory_mb:
            return "memory"
        return "processes" if len(family) > self.limits.processes else ""


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []
