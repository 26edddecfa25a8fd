"""Functions of a notebook in several processes: what they say arrives, and none outlives its listener."""

import os
import signal
import time

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


def stumble() -> None:
    import os

    if os.environ["RANK"] == "1":
        raise ValueError("the second process stumbles")


def wait_for_each_other() -> None:
    import time

    import torch.distributed as dist

    from dsmoe_lite.labs.workers import emit

    dist.init_process_group("gloo")
    for step in range(20):
        dist.barrier()
        emit(at=step)
        time.sleep(0.1)


def test_every_process_is_heard() -> None:
    events = list(run_workers(count, 2, 3))
    for rank in (0, 1):
        own = [event for event in events if event["rank"] == rank]
        assert [event["step"] for event in own] == [1, 2, 3]
        assert len({event["pid"] for event in own}) == 1
    assert all(event["restart"] == 0 for event in events)


def test_what_failed_is_said() -> None:
    with pytest.raises(RunError, match=r"stumble: its processes failed: .*ValueError: the second process stumbles"):
        list(run_workers(stumble, 2))


def test_who_stops_listening_ends_them() -> None:
    pids = set()
    for event in run_workers(count, 2, 10_000):
        pids.add(event["pid"])
        if len(pids) == 2:
            break
    del event
    for _ in range(100):
        if not any(map(psutil.pid_exists, pids)):
            break
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, pids))


def test_a_process_that_dies_is_started_again() -> None:
    killed = False
    seen = []
    for event in run_workers(wait_for_each_other, 2, restarts=1):
        if event["rank"] == 1 and event["at"] == 5 and not killed:
            os.kill(event["pid"], signal.SIGKILL)
            killed = True
        seen.append((event["restart"], event["at"]))
    assert killed
    assert max(seen) == (1, 19)
    assert (0, 19) not in seen


@pytest.mark.parametrize(("processes", "restarts", "said"), [(0, 0, "processes = 0"), (2, -1, "restarts = -1")])
def test_numbers_that_cannot_be_are_named(processes: int, restarts: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        next(run_workers(count, processes, 1, restarts=restarts))
