"""Functions of a notebook in several worker processes: events arrive, and no worker outlives its listener."""

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
    for _ in range(100):
        if not any(map(psutil.pid_exists, pids)):
            break
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, pids))


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
