"""A function of a notebook, run by several processes that torchrun starts, as on a cluster; and what they report."""

import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import IO, Any

from dsmoe_lite.common.errors import RunError, require_whole
from dsmoe_lite.common.progress import progress

MAIN = "\n\nif __name__ == '__main__':\n    import json, sys\n\n    {name}(*json.loads(sys.argv[1]))\n"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # torch 2.13 cannot restart its processes without it
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10",  # seconds until torchrun kills what does not end
}
PATIENCE = 30.0  # seconds for the processes to end when nobody reads their events any more


def run_workers(
    work: Callable[..., None], processes: int, *arguments: Any, restarts: int = 0
) -> Iterator[dict[str, Any]]:
    """Run `work(*arguments)` in each of `processes` processes; yield the events they `emit` as they arrive.

    `work` is sent as source text, so it must import what it needs. Arguments are JSON-able. Events with `step` and `of`
    move a progress bar, one per process; other output is printed. restarts: how often to restart all processes when one
    dies. Closing the iterator terminates all processes. If they fail, RunError gives the first error line.
    """
    require_whole("processes", processes, 1)
    require_whole("restarts", restarts, 0)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as stderr:
        script = Path(folder) / f"{work.__name__}.py"
        script.write_text(dedent(inspect.getsource(work)) + MAIN.format(name=work.__name__), encoding="utf-8")
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        torchrun += [f"--max-restarts={restarts}", str(script), json.dumps(arguments)]
        run = subprocess.Popen(
            [sys.executable, *torchrun],
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        bars: dict[int, Any] = {}
        try:
            assert run.stdout is not None
            for line in run.stdout:
                if line.startswith("{"):
                    event = json.loads(line)
                    _show(event, bars, processes)
                    yield event
                else:
                    print(line, end="")
            if run.wait() != 0:
                raise RunError(f"{work.__name__}: its processes failed: {_first_error(stderr)}")
        finally:
            for bar in bars.values():
                bar.close()
            _terminate(run)


def emit(**event: Any) -> None:
    """Within `work`: print a JSON-able event with this process's rank, its id, and how often torchrun restarted it.

    One write per line, so lines of processes that share a pipe do not mix, up to 4096 bytes.
    """
    sender = {
        "rank": int(os.environ["RANK"]),
        "pid": os.getpid(),
        "restart": int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
    }
    sys.stdout.write(json.dumps(sender | event) + "\n")
    sys.stdout.flush()


def _show(event: dict[str, Any], bars: dict[int, Any], processes: int) -> None:
    if "step" in event and "of" in event:
        for rank in range(len(bars), processes):  # in order, whichever process reports first
            bars[rank] = progress(total=event["of"], desc=f"process {rank}", unit="step")
        bar = bars[event["rank"]]
        bar.n = event["step"]  # smaller than before after a restart
        bar.refresh()


def _first_error(stderr: IO[str]) -> str:
    """The error of the first process that failed; torchrun's own report follows it."""
    stderr.seek(0)
    errors = [line for line in stderr.read().splitlines() if "Error: " in line and "ChildFailedError" not in line]
    return errors[0].strip() if errors else "they printed no error"


def _terminate(run: subprocess.Popen[str]) -> None:
    if run.poll() is None:
        run.terminate()
        try:
            run.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    if run.stdout is not None:
        run.stdout.close()
