"""Run a function of a notebook in several processes under torchrun, as on a cluster, and collect their events."""

import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from threading import Thread
from typing import IO, Any

from dsmoe_lite.common.errors import RunError, require_int
from dsmoe_lite.common.progress import progress

MAIN = """

if __name__ == "__main__":
    import json, sys

    from dsmoe_lite.labs.workers import exit_with_parent

    exit_with_parent(int(sys.argv[2]))
    {name}(*json.loads(sys.argv[1]))
"""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # torch 2.13 cannot restart its processes without it
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10",  # seconds until torchrun kills processes that do not end
}
PATIENCE = 30.0  # seconds until processes that were asked to terminate are killed
PARENT_EVERY = 0.5  # seconds between two looks for the parent


def run_workers(
    work: Callable[..., None], processes: int, *arguments: Any, restarts: int = 0
) -> Iterator[dict[str, Any]]:
    """Run `work(*arguments)` in each of `processes` processes; yield the events they `emit` as they arrive.

    `work` is passed as source text, so it must import what it needs; arguments must be JSON-able. Events with `step`
    and `of` move one progress bar per process; other output is printed. restarts: how often to restart all processes
    when one dies. Closing the iterator terminates all processes, and they exit if this process is killed. If they fail,
    raises RunError with the first error.
    """
    require_int("processes", processes, 1)
    require_int("restarts", restarts, 0)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as stderr:
        script = Path(folder) / f"{work.__name__}.py"
        script.write_text(dedent(inspect.getsource(work)) + MAIN.format(name=work.__name__), encoding="utf-8")
        options = ["--standalone", "--local-addr=127.0.0.1"]  # the name of this machine may not resolve
        options += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
        launcher = subprocess.Popen(
            [sys.executable, "-m", __name__, str(os.getpid()), *options, str(script), json.dumps(arguments)],
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        bars: dict[int, Any] = {}
        try:
            assert launcher.stdout is not None
            for line in launcher.stdout:
                if line.startswith("{"):
                    event = json.loads(line)
                    _show(event, bars, processes)
                    yield event
                else:
                    print(line, end="")
            if launcher.wait() != 0:
                raise RunError(f"{work.__name__}: its processes failed: {_first_error(stderr)}")
        finally:
            for bar in bars.values():
                bar.close()
            _terminate(launcher)


def emit(**event: Any) -> None:
    """Called by `work`: print a JSON-able event with this process's rank, its id and its number of restarts.

    Each line is one write, so lines of up to 4096 bytes from processes that share a pipe do not mix.
    """
    sender = {
        "rank": int(os.environ["RANK"]),
        "pid": os.getpid(),
        "restart": int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
    }
    sys.stdout.write(json.dumps(sender | event) + "\n")
    sys.stdout.flush()


def exit_with_parent(parent: int) -> None:
    """Exit this process soon after its parent, whose id is `parent`, however the parent ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_EVERY)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _torchrun(caller: int, arguments: list[str]) -> None:
    """Be torchrun for the process `caller`; its workers get the id of this process as their last argument."""
    exit_with_parent(caller)
    from torch.distributed.run import main

    main([*arguments, str(os.getpid())])


def _show(event: dict[str, Any], bars: dict[int, Any], processes: int) -> None:
    if "step" in event and "of" in event:
        for rank in range(len(bars), processes):  # in order, whichever process reports first
            bars[rank] = progress(total=event["of"], desc=f"process {rank}", unit="step")
        bar = bars[event["rank"]]
        bar.n = event["step"]  # smaller than before after a restart
        bar.refresh()


def _first_error(stderr: IO[str]) -> str:
    """The error of the first process that failed, which precedes the report of torchrun."""
    stderr.seek(0)
    errors = [line for line in stderr.read().splitlines() if "Error: " in line and "ChildFailedError" not in line]
    return errors[0].strip() if errors else "they printed no error"


def _terminate(launcher: subprocess.Popen[str]) -> None:
    if launcher.poll() is None:
        launcher.terminate()
        try:
            launcher.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    if launcher.stdout is not None:
        launcher.stdout.close()


if __name__ == "__main__":
    _torchrun(int(sys.argv[1]), sys.argv[2:])
