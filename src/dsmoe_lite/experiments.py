"""Named grids of runs, recorded one file a run in data/runs/; only what is missing is run."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from difflib import get_close_matches
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from dsmoe_lite.errors import InputError, RunError, require_whole
from dsmoe_lite.files import write_json
from dsmoe_lite.job import CorpusConfig, Job
from dsmoe_lite.paths import DATA
from dsmoe_lite.presets import preset
from dsmoe_lite.progress import progress
from dsmoe_lite.train import TrainConfig


@dataclass(frozen=True)
class Grid:
    """Jobs by name, each run with every seed."""

    jobs: Mapping[str, Job]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def job(self, name: str, seed: int) -> Job:
        """The run of one job and one seed; the seed draws the weights and sets where reading starts."""
        job = self.jobs[name]
        start = seed * job.corpus.world.n_documents // len(self.seeds)
        return replace(job, train=replace(job.train, seed=seed), first_document=start)


def _course(model: str, balance: dict[str, float], bias_speed: float = 0.0) -> Job:
    """A course size trained on 2.46M tokens of the world: one setting for every grid, balance apart."""
    train = TrainConfig(steps=1200, batch_size=32, seq_len=64, lr=3e-3, balance=balance, bias_speed=bias_speed)
    return Job(preset(model), train, CorpusConfig())


GRIDS = {
    # Chapter 02: the dense FFN of one width and of two, and three routers over the same 16 experts.
    "neighbours": Grid(
        {
            name: _course(name, {"switch": 0.01})
            for name in ("course-dense", "course-dense-x2", "course-gshard", "course-switch", "course-hash")
        }
    ),
}


def grid(name: str) -> Grid:
    """The grid of that name; raises InputError naming the known ones."""
    if name in GRIDS:
        return GRIDS[name]
    close = get_close_matches(name, GRIDS, n=3) or list(GRIDS)
    raise InputError(f"experiment = {name!r}: there is none; try {', '.join(close)}")


def record_path(name: str, model: str, seed: int) -> Path:
    """Where the record of one run lies."""
    return DATA / "runs" / name / f"{model}-seed{seed}.json"


def missing(name: str) -> list[tuple[str, int]]:
    """The (name, seed) pairs of a grid that have no record yet, seed by seed."""
    plan = grid(name)
    pairs = ((name, seed) for seed in plan.seeds for name in plan.jobs)
    return [pair for pair in pairs if not record_path(name, *pair).is_file()]


def records(name: str) -> list[dict[str, Any]]:
    """The records of a grid's finished runs, job by job, each with `model_name` and `seed` beside what it holds."""
    plan, found = grid(name), []
    for model in plan.jobs:
        for seed in plan.seeds:
            path = record_path(name, model, seed)
            if path.is_file():
                found.append({"model_name": model, "seed": seed, **json.loads(path.read_text(encoding="utf-8"))})
    return found


def run_missing(name: str, processes: int, run: Callable[[Job], dict[str, Any]]) -> Iterator[tuple[str, int]]:
    """Run what is missing in processes of one thread each; yield each pair as its record is written."""
    require_whole("processes", processes, 1)
    todo, plan = missing(name), grid(name)
    with (
        ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_one_quiet_thread) as pool,
        progress(total=len(todo), desc=name, unit="run") as bar,
    ):
        waiting = {pool.submit(run, plan.job(*pair)): pair for pair in todo}
        try:
            for done in as_completed(waiting):
                write_json(record_path(name, *waiting[done]), done.result())
                bar.update()
                yield waiting[done]
        except BrokenProcessPool:
            raise RunError(f"{name}: a process died (out of memory?); what is recorded stays, run it again") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one_quiet_thread() -> None:
    import torch

    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
