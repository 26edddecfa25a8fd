"""Functions of a notebook in several worker processes: events arrive, and no worker outlives its listener."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

import psutil
import pytest

from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.labs.workers import run_workers


def count(steps: int) -> None:
    import time

    from dsmoe_lite.labs.workers import emit

    for step in range(1, steps + 1):
        emit(step=step, of=steps)
        time.sleep(0.05)


def fail_on_rank_1() -> None:
    import os

    if os.environ["RANK"] == "1":
        raise ValueError("rank 1 fails")


def wait_for_each_other() -> None:
    import time

    import torch.distributed as dist

    from dsmoe_lite.labs.workers import emit

    dist.init_process_group("gloo")
    for step in range(20):
        dist.barrier()
        emit(at=step)
        time.sleep(0.1)


def all_end(pids: Collection[int]) -> bool:
    """Whether all processes end within ten seconds."""
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(map(psutil.pid_exists, pids))


# A process that runs workers and prints the id of the worker of each event
CALLER = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
sys.path.insert(0, {tests!r})
from test_workers import count
from dsmoe_lite.labs.workers import run_workers
for event in run_workers(count, 2, 10_000):
    print(event["pid"], flush=True)
"""


def test_events_of_every_process_arrive() -> None:
    events = list(run_workers(count, 2, 3))
    for rank in (0, 1):
        of_rank = [event for event in events if event["rank"] == rank]
        assert [event["step"] for event in of_rank] == [1, 2, 3]
        assert len({event["pid"] for event in of_rank}) == 1
    assert all(event["restart"] == 0 for event in events)


def test_a_failure_is_reported() -> None:
    with pytest.raises(RunError, match=r"fail_on_rank_1: its processes failed: .*ValueError: rank 1 fails"):
        list(run_workers(fail_on_rank_1, 2))


def test_workers_end_if_nobody_listens() -> None:
    pids = set()
    for event in run_workers(count, 2, 10_000):
        pids.add(event["pid"])
        if len(pids) == 2:
            break
    del event
    assert all_end(pids)


def test_a_process_that_dies_is_restarted() -> None:
    killed = False
    progress = []
    for event in run_workers(wait_for_each_other, 2, restarts=1):
        if event["rank"] == 1 and event["at"] == 5 and not killed:
            os.kill(event["pid"], signal.SIGKILL)
            killed = True
        progress.append((event["restart"], event["at"]))
    assert killed
    assert max(progress) == (1, 19)
    assert (0, 19) not in progress


@pytest.mark.parametrize(("processes", "restarts", "message"), [(0, 0, "processes = 0"), (2, -1, "restarts = -1")])
def test_bad_numbers_are_one_line(processes: int, restarts: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        next(run_workers(count, processes, 1, restarts=restarts))


# However the caller or torchrun is stopped, no process is left


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_workers_and_torchrun_end_with_their_caller(stop: signal.Signals) -> None:
    code = CALLER.format(tests=str(Path(__file__).parent))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        workers: set[int] = set()
        while len(workers) < 2:
            workers.add(int(caller.stdout.readline()))
        everyone = {process.pid for process in psutil.Process(caller.pid).children(recursive=True)}
        assert everyone > workers
        caller.send_signal(stop)
        assert caller.wait(10) == -stop
    assert all_end(everyone)


def test_workers_end_with_torchrun() -> None:
    workers: set[int] = set()

    def kill_torchrun() -> None:
        for event in run_workers(count, 2, 10_000):
            workers.add(event["pid"])
            if len(workers) == 2:
                os.kill(psutil.Process(event["pid"]).ppid(), signal.SIGKILL)

    with pytest.raises(RunError, match="count: its processes failed"):
        kill_torchrun()
    assert all_end(workers)


# A machine whose own name does not resolve


def without_name(*command: str) -> list[str]:
    """`command` on a machine whose name is unknown: in a namespace of its own."""
    script = 'hostname no-such-host-xyz && exec "$@"'
    named = ["unshare", "--uts", "sh", "-c", script, "sh"]
    try:
        permitted = subprocess.run([*named, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        permitted = False
    if not permitted:
        pytest.skip("needs root and unshare to give this machine another name")
    return [*named, *command]


MEETING = """
import sys
sys.path.insert(0, {tests!r})
from test_workers import wait_for_each_other
from dsmoe_lite.labs.workers import run_workers
print(max(event["at"] for event in run_workers(wait_for_each_other, 2)))
"""


def test_workers_meet_on_a_machine_whose_name_does_not_resolve() -> None:
    code = MEETING.format(tests=str(Path(__file__).parent))
    ran = subprocess.run(without_name(sys.executable, "-c", code), capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, "19\n"), ran.stderr
