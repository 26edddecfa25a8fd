"""A recorded run trained again, to have its weights: records hold results only."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dsmoe_lite.common.errors import InputError, require, require_choice
from dsmoe_lite.common.files import atomic_write
from dsmoe_lite.common.paths import RUNS
from dsmoe_lite.study.grids import grid, record_path, records
from dsmoe_lite.training.job import Job, run_job


@dataclass(frozen=True)
class Replayed:
    """The files that a replay left, and the held-out loss then and now.

    The two are equal on a machine like the record's; elsewhere other rounding leads to other weights.
    """

    files: tuple[Path, ...]
    recorded: float
    replayed: float


def replay(name: str, model: str, seed: int, out: Path, snapshots: Collection[int] = ()) -> Replayed:
    """Train one run of a grid again; leave NAME-MODEL-seedS.safetensors in `out`, and one file more a snapshot.

    `snapshots`: numbers of steps. Interrupted, it goes on from its run folder. InputError where there is no record.
    """
    plan = grid(name)
    require_choice("model", model, plan.jobs)
    job = plan.jobs[model]
    require(isinstance(job, Job), "experiment", name, "its runs leave no model")
    finished = [record for record in records(name, diverged=True) if "diverged" not in record]
    known = {(record["model_name"], record["seed"]): record["heldout_loss"] for record in finished}
    if (model, seed) not in known:
        raise InputError(f"{record_path(name, model, seed)} holds no finished run: `dsmoe experiment {name}` first")
    folder = RUNS / "replay" / f"{name}-{model}-seed{seed}"
    with _one_thread():
        record = run_job(plan.job(model, seed), folder, snapshots=snapshots)
    files = []
    for ours in ("model", *(f"step{step}" for step in sorted(snapshots))):
        target = out / (f"{folder.name}.safetensors" if ours == "model" else f"{folder.name}-{ours}.safetensors")
        source = folder / f"{ours}.safetensors"
        require(source.is_file(), "snapshot", ours, f"{folder} holds a run that went past it; remove that folder")
        with atomic_write(target) as aside:
            shutil.copyfile(source, aside)
        files.append(target)
    return Replayed(tuple(files), known[model, seed], record["heldout_loss"])


@contextmanager
def _one_thread() -> Iterator[None]:
    """As records are made: more threads add in another order, and the weights drift apart."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
