"""Train a recorded run again for its weights: a record has results only."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError, require, require_choice
from dsmoe_lite.common.files import atomic_write
from dsmoe_lite.study.grids import grid, record_path, records
from dsmoe_lite.training.job import Job, run_job


@dataclass(frozen=True)
class Replayed:
    """The files that a replay wrote, and the held-out losses of the record and of the replay.

    The two losses are equal on a machine like the record's. Elsewhere, rounding may lead to other weights.
    """

    files: tuple[Path, ...]
    recorded: float
    replayed: float


def replay(name: str, model: str, seed: int, out: Path, snapshots: Collection[int] = ()) -> Replayed:
    """Train one run of a grid again; write NAME-MODEL-seedS.safetensors into `out`, and one more file per snapshot.

    snapshots: numbers of steps. An interrupted replay resumes from its run folder. Raises InputError if the run has no
    record, or if a folder cannot be written.
    """
    plan = grid(name)
    require_choice("model", model, plan.jobs)
    job = plan.jobs[model]
    require(isinstance(job, Job), "experiment", name, "its runs save no model; choose another experiment")
    finished = [record for record in records(name, diverged=True) if "diverged" not in record]
    recorded = {(record["model_name"], record["seed"]): record["heldout_loss"] for record in finished}
    if (model, seed) not in recorded:
        raise InputError(f"{record_path(name, model, seed)}: no finished run; run `dsmoe experiment {name}` first")
    for target in (out, paths.RUNS):
        paths.require_writable(target)
    folder = paths.RUNS / "replay" / f"{name}-{model}-seed{seed}"
    with _one_thread():
        record = run_job(plan.job(model, seed), folder, snapshots=snapshots)
    files = []
    for saved in ("model", *(f"step{step}" for step in sorted(snapshots))):
        target = out / (f"{folder.name}.safetensors" if saved == "model" else f"{folder.name}-{saved}.safetensors")
        source = folder / f"{saved}.safetensors"
        require(source.is_file(), "snapshot", saved, f"the run in {folder} is past that step; remove the folder")
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)
        files.append(target)
    return Replayed(tuple(files), recorded[model, seed], record["heldout_loss"])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread, as recorded runs do: more threads add in another order, and the weights drift apart."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
