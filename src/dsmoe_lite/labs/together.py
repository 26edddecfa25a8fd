"""A function of a notebook, run by several processes that torchrun starts, as it would on a cluster."""

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

from dsmoe_lite.errors import RunError, require_whole
from dsmoe_lite.progress import progress

MAIN = "\n\nif __name__ == '__main__':\n    import json, sys\n\n    {name}(*json.loads(sys.argv[1]))\n"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # torch 2.13 cannot start its processes again without
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10",  # seconds until it kills what does not end
}
PATIENCE = 30.0  # seconds for them to end when nobody listens any more


def together(work: Callable[..., None], processes: int, *arguments: Any, restarts: int = 0) -> Iterator[dict[str, Any]]:
    """Run `work(*arguments)` in each of `processes` processes; yield what they `say`, in the order in which it arrives,
    and print what else they print.

    `work` is sent as text: it imports what it needs itself. Arguments are JSON-able. Events with `step` and `of` move a
    bar, one a process. restarts: how often all are started again when one dies. Whoever stops listening ends them all.
    RunError, with the last line that was written, where they fail.
    """
    require_whole("processes", processes, 1)
    require_whole("restarts", restarts, 0)
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile("w+") as complaints:
        script = Path(place) / f"{work.__name__}.py"
        script.write_text(dedent(inspect.getsource(work)) + MAIN.format(name=work.__name__), encoding="utf-8")
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        start += [f"--max-restarts={restarts}", str(script), json.dumps(arguments)]
        environment, heard = os.environ | ENVIRONMENT, subprocess.PIPE
        run = subprocess.Popen(
            [sys.executable, *start],
            env=environment,
            stdout=heard,
            stderr=complaints,
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
                raise RunError(f"{work.__name__}: its processes failed: {_last_line(complaints)}")
        finally:
            for bar in bars.values():
                bar.close()
            _end(run)


def _show(event: dict[str, Any], bars: dict[int, Any], processes: int) -> None:
    if "step" in event and "of" in event:
        for rank in range(len(bars), processes):  # in order, whoever speaks first
            bars[rank] = progress(total=event["of"], desc=f"process {rank}", unit="step")
        bar = bars[event["rank"]]
        bar.n = event["step"]  # back, where a process was started again
        bar.refresh()


def _last_line(complaints: IO[str]) -> str:
    """What the first process that failed said last; torchrun's own report follows it."""
    complaints.seek(0)
    errors = [line for line in complaints.read().splitlines() if "Error: " in line and "ChildFailedError" not in line]
    return errors[0].strip() if errors else "they left no word"


def _end(run: subprocess.Popen[str]) -> None:
    if run.poll() is None:
        run.terminate()
        try:
            run.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    if run.stdout is not None:
        run.stdout.close()
