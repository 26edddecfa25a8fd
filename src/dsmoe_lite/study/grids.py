"""Named grids of runs. data/runs/ has one record per run; only missing runs are trained."""

import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import TIMEOUT_MAX, Thread, Timer
from typing import Any, Protocol

from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import (
    DivergedError,
    InputError,
    RunError,
    require,
    require_choice,
    require_int,
    require_number,
)
from dsmoe_lite.common.files import read_json, write_json
from dsmoe_lite.common.progress import progress
from dsmoe_lite.config import AnyAttention, AttentionConfig, MLAConfig
from dsmoe_lite.presets import preset
from dsmoe_lite.study import common_knowledge, pilot, protocol, successors, text_pilot, text_protocol
from dsmoe_lite.study.needle import NeedleJob
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.job import CorpusConfig, Job
from dsmoe_lite.training.provenance import provenance


class Runnable(Protocol):
    """A run of a grid, for any seed."""

    def seeded(self, seed: int, n_streams: int) -> "Runnable":
        """Return the run with this seed, one of 0 to n_streams - 1."""

    def run(self, folder: Path | None = None) -> dict[str, Any]:
        """Run it and return its record; a run that can resume does so from `folder`."""

    def check_record(self, record: Mapping[str, Any]) -> None:
        """Raise InputError if `record` belongs to a run with other settings."""


@dataclass(frozen=True)
class Grid:
    """Jobs by name; each is run with every seed, and some with more."""

    jobs: Mapping[str, Runnable]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    n_streams: int = 5  # parts of the corpus, one per seed
    more_seeds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # further seeds of some jobs
    protocol: int | None = None  # the version of the protocol that it follows, stored in its records

    def __post_init__(self) -> None:
        for name in self.more_seeds:
            require_choice("more_seeds", name, self.jobs)
        for seed in (*self.seeds, *(seed for more in self.more_seeds.values() for seed in more)):
            require_int("seed", seed, 0, self.n_streams - 1)

    def seeds_of(self, name: str) -> tuple[int, ...]:
        """All seeds of one job."""
        return (*self.seeds, *self.more_seeds.get(name, ()))

    def runs(self) -> list[tuple[str, int]]:
        """All pairs (job, seed), seed by seed."""
        seeds = dict.fromkeys(seed for name in self.jobs for seed in self.seeds_of(name))
        return [(name, seed) for seed in seeds for name in self.jobs if seed in self.seeds_of(name)]

    def job(self, name: str, seed: int) -> Any:
        """Return the run of one job with one seed."""
        return self.jobs[name].seeded(seed, self.n_streams)


def _course(model: str, balance: dict[str, float], *, steps: int = 1200, bias_speed: float = 0.0, **moe: Any) -> Job:
    """A course-size model with some MoE fields changed, on the world: 2048 tokens per step in all grids."""
    config = preset(model)
    if moe:
        assert config.moe is not None
        config = replace(config, moe=replace(config.moe, **moe))
    train = TrainConfig(steps=steps, batch_size=32, seq_len=64, lr=3e-3, balance=balance, bias_speed=bias_speed)
    return Job(model=config, train=train, corpus=CorpusConfig())


def _cut(m: int, **moe: Any) -> Job:
    """2 of 16 experts, each cut into m finer ones."""
    cut = {"n_routed_experts": 16 * m, "top_k": 2 * m, "expert_width": 128 // m, "routed_scaling_factor": float(m)}
    return _course("course-deepseekmoe", _EXPERT, **cut | {"n_shared_experts": 0} | moe)


def _attention(attention: AnyAttention, ffn_width: int) -> Job:
    """The dense course size with other attention; ffn_width keeps the number of parameters equal."""
    job = _course("course-dense", {})
    return replace(job, model=replace(job.model, attention=attention, ffn_width=ffn_width))


_EXPERT = {"expert": 0.01}
_V2 = {"expert": 0.003, "device": 0.05}  # weights of DeepSeek-V2
_REMEDIES: dict[str, dict[str, Any]] = {
    "none": {"balance": {}},
    "importance+load": {"balance": {"importance": 0.1, "load": 0.1}, "noisy_gating": True},
    "switch": {"balance": {"switch": 0.01}},
    "z": {"balance": {"z": 0.001}},
    "expert-0.001": {"balance": {"expert": 0.001}},
    "expert-0.01": {"balance": _EXPERT},
    "expert-0.1": {"balance": {"expert": 0.1}},
    "sequence": {"balance": {"sequence": 0.01}},
    "device": {"balance": _V2},
    "communication": {"balance": _V2 | {"communication": 0.02}, "topk_group": 3},
    "bias": {"balance": {}, "bias_speed": 0.001, "expert_bias": True},
}


GRIDS = {
    # Chapter 02: a dense FFN of one width and of twice that width, and three routers over the same 16 experts.
    "neighbours": Grid(
        {
            name: _course(name, {"switch": 0.01})
            for name in ("course-dense", "course-dense-x2", "course-gshard", "course-switch", "course-hash")
        }
    ),
    # Chapters 04 and 05: experts cut into m finer ones, with equal total and active parameters; then one and two of the
    # finer experts shared. Gates are multiplied by m, except in "plain", which has them as printed.
    "deepseekmoe": Grid(
        {
            "m1": _cut(1),
            "m2": _cut(2),
            "m4": _cut(4),
            "m4-plain": _cut(4, routed_scaling_factor=1.0),
            "shared-1": _course("course-deepseekmoe", _EXPERT),
            "shared-1-plain": _course("course-deepseekmoe", _EXPERT, routed_scaling_factor=1.0),
            "shared-2": _course("course-deepseekmoe", _EXPERT, n_routed_experts=62, top_k=6, n_shared_experts=2),
        }
    ),
    # Chapter 06: the shape of DeepSeekMoE 16B on eight devices, with each remedy against imbalance; half as many steps.
    "balance": Grid({name: _course("course-devices", steps=600, **remedy) for name, remedy in _REMEDIES.items()}),
    # Chapter 12: the same shape with the loss weights of DeepSeek-V2; a token may reach M of the eight devices.
    "reach": Grid(
        {
            f"M{m}": _course("course-devices", _V2 | {"communication": 0.02}, steps=600, topk_group=m)
            for m in (1, 2, 3, 4, 8)
        }
    ),
    # Chapter 09: four kinds of attention in models of equal size. MLA has d_c = 2 d_h, because the 4 d_h of DeepSeek-V2
    # would be as wide as the model here; d_h^R = d_h / 2 as in V2. Numbers cached per token and layer: MLA 40, MQA 32,
    # GQA 64, MHA 128.
    "attention": Grid(
        {
            "mha": _attention(AttentionConfig(n_heads=4, head_dim=16), 128),
            "gqa": _attention(AttentionConfig(n_heads=4, head_dim=16, n_kv_heads=2), 149),
            "mqa": _attention(AttentionConfig(n_heads=4, head_dim=16, n_kv_heads=1), 160),
            "mla": _attention(
                MLAConfig(n_heads=4, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, kv_lora_rank=32), 125
            ),
        }
    ),
    # Chapter 09: a needle at four times the trained length; one run tests all kinds of positions.
    "needle": Grid({"mla": NeedleJob()}),
    # The pilot, before chapter 07's protocol was fixed.
    "pilot-facts": Grid(pilot.FACTS, pilot.SEEDS[:2], n_streams=200),
    "pilot-fewer": Grid(pilot.FEWER, pilot.SEEDS[:1], n_streams=200),
    "pilot-gates": Grid(pilot.GATES, pilot.SEEDS[:2], n_streams=200),
    "pilot-wider": Grid(pilot.WIDER, pilot.SEEDS[:1], n_streams=200),
    "pilot-rates": Grid(pilot.RATES, pilot.SEEDS[:1], n_streams=200),
    "pilot-higher": Grid(pilot.HIGHER, pilot.SEEDS[:1], n_streams=200),
    "pilot-more": Grid(pilot.MORE, pilot.SEEDS[:1], n_streams=200),
    "pilot-gates-again": Grid(pilot.GATES_AGAIN, pilot.SEEDS[:1], n_streams=200),
    "pilot-finalists": Grid(pilot.FINALISTS, pilot.SEEDS[1:3], n_streams=200),
    "pilot-normalised": Grid(pilot.NORMALISED, pilot.SEEDS[:3], n_streams=200),
    "pilot-last": Grid(pilot.LAST, pilot.SEEDS[3:], n_streams=200),
    # Chapter 07, by its protocol; "paper-gpu" is its larger tier.
    "paper": Grid(protocol.CPU.jobs(), tuple(range(10)), n_streams=200, protocol=protocol.VERSION),
    # Outside the protocol, added after Figure 4: GShard with DeepSeekMoE's kind of gates and its top experts masked.
    "paper-gates": Grid(
        {"0+2-of-16": replace(protocol.CPU.job("0+2-of-16"), masked=protocol.MASKED)}, tuple(range(10)), n_streams=200
    ),
    # Outside the protocol, after a review: Figure 4 with and without stand-ins, both kinds of gates for GShard, and
    # DeepSeekMoE as printed.
    "paper-figure-4": Grid(protocol.FIGURE_4, tuple(range(10)), n_streams=200),
    # The pilot, before the protocol on real text was fixed.
    "text-pilot-small-steps": Grid(text_pilot.SMALL_STEPS, text_pilot.SEEDS[:1], n_streams=200),
    "text-pilot-few-steps": Grid(text_pilot.FEW_STEPS, text_pilot.SEEDS[:1], n_streams=200),
    "text-pilot-rates": Grid(text_pilot.RATES, text_pilot.SEEDS[:1], n_streams=200),
    "text-pilot-spread": Grid(text_pilot.SPREAD, text_pilot.SEEDS[1:], n_streams=200),
    "text-pilot-rates-again": Grid(text_pilot.RATES_AGAIN, text_pilot.SEEDS[1:], n_streams=200),
    # A world with common knowledge: what was tried before its protocol was fixed.
    "common-pilot": Grid(common_knowledge.PILOT, common_knowledge.PILOT_SEEDS, n_streams=200),
    # Chapter 07 in that world, by the third protocol.
    "common": Grid(
        common_knowledge.JOBS,
        common_knowledge.SEEDS,
        n_streams=200,
        more_seeds=dict.fromkeys(common_knowledge.MORE, common_knowledge.MORE_SEEDS),
        protocol=common_knowledge.VERSION,
    ),
    # Chapter 07 on real text, by the second protocol.
    "text-short": Grid(
        text_protocol.jobs(text_protocol.SHORT, text_protocol.SHORTER),
        text_protocol.SEEDS,
        n_streams=10,
        protocol=text_protocol.VERSION,
    ),
    "text-long": Grid(
        text_protocol.jobs(text_protocol.LONG),
        text_protocol.SEEDS,
        n_streams=10,
        more_seeds=dict.fromkeys(text_protocol.MORE, text_protocol.MORE_SEEDS),
        protocol=text_protocol.VERSION,
    ),
    # Chapter 13: what DeepSeek-V3 and V4 changed. The pilot, before the fourth protocol was fixed.
    "successors-pilot": Grid(successors.PILOT, successors.PILOT_SEEDS, n_streams=200),
    # Chapters 13 and 14, by the fourth protocol.
    "successors": Grid(successors.JOBS, successors.SEEDS, n_streams=200, protocol=successors.VERSION),
    "text-long-gpu": Grid(text_protocol.larger_jobs(), n_streams=10, protocol=text_protocol.VERSION),
    "paper-gpu": Grid(protocol.GPU.jobs(), n_streams=10, protocol=protocol.VERSION),
}


def grid(name: str) -> Grid:
    """Return the grid called `name`. Raises InputError naming close ones if there is none."""
    if name in GRIDS:
        return GRIDS[name]
    close = get_close_matches(name, GRIDS, n=3) or list(GRIDS)
    raise InputError(f"experiment = {name!r}: there is no such grid; try {', '.join(close)}")


def grid_name(name: str, profile: str) -> str:
    """Return the name of a grid's tier for a profile, cpu or gpu. Raises InputError if it has no such tier."""
    if profile == "cpu":
        return name
    larger = [grid.removesuffix("-gpu") for grid in GRIDS if grid.endswith("-gpu")]
    require(name in larger, "profile", profile, f"{name} has no such tier; choose from {', '.join(larger)}")
    return f"{name}-gpu"


def record_path(name: str, model: str, seed: int) -> Path:
    """The path of one run's record."""
    return paths.find_data(f"runs/{name}/{model}-seed{seed}.json")


def missing(name: str, models: Collection[str] = ()) -> list[tuple[str, int]]:
    """Return the (model, seed) pairs of a grid that have no record yet, seed by seed.

    models: only these; all if empty. Raises InputError if the grid lacks one of them.
    """
    plan = grid(name)
    for model in models:
        require_choice("model", model, plan.jobs)
    pairs = [pair for pair in plan.runs() if pair[0] in (models or plan.jobs)]
    return [pair for pair in pairs if not record_path(name, *pair).is_file()]


def records(name: str, *, diverged: bool = False) -> list[dict[str, Any]]:
    """Read the records of a grid's runs, job by job, and add `model_name` and `seed` to each.

    diverged: also return the records of diverged runs, which have an entry `diverged` and no results. Raises InputError
    naming the file for a record that is damaged, of another schema version, protocol or setting than the grid's, or of
    an unwanted diverged run.
    """
    plan, results = grid(name), []
    for model in plan.jobs:
        for seed in plan.seeds_of(model):
            path = record_path(name, model, seed)
            if path.is_file():
                record = read_json(path) | {"model_name": model, "seed": seed}
                try:
                    _check_record(record, plan, diverged)
                except InputError as error:
                    raise InputError(f"{path}: {error}") from None
                results.append(record)
    return results


def _check_record(record: Mapping[str, Any], plan: Grid, diverged: bool) -> None:
    version = record.get("protocol")
    remedy = f"this grid follows {plan.protocol}; move the file away and run the experiment again"
    require(version == plan.protocol, "protocol", version, remedy)
    if "diverged" in record:
        require(diverged, "diverged", record["diverged"], "this run has no results to compare")
    else:
        plan.job(record["model_name"], record["seed"]).check_record(record)


def run_one(job: Runnable, folder: Path | None = None) -> dict[str, Any]:
    """Run one job in a worker process; if training diverges, the record reports it."""
    try:
        return job.run(folder)
    except DivergedError as error:
        return {"diverged": str(error), "provenance": provenance()}


def run_missing(
    name: str,
    processes: int,
    run: Callable[[Any, Path | None], dict[str, Any]] = run_one,
    models: Collection[str] = (),
    minutes: float = math.inf,
) -> Iterator[tuple[str, int]]:
    """Run the missing runs in processes of one thread each; yield each (model, seed) once its record is written.

    After `minutes`, and if interrupted, the runs under way stop with a checkpoint below runs/, from which the next call
    resumes them; only an interrupt raises KeyboardInterrupt.
    """
    require_int("processes", processes, 1)
    if minutes != math.inf:
        require_number("minutes", minutes, 0.0, open_low=True)
    pairs, plan, end = missing(name, models), grid(name), time.time() + 60 * minutes
    with (
        ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_quiet_worker) as pool,
        progress(total=len(pairs), desc=name, unit="run") as bar,
    ):
        pair_of = {pool.submit(_run_until, end, run, plan.job(*pair), _folder(name, *pair)): pair for pair in pairs}
        try:
            for future in as_completed(pair_of):
                version = {} if plan.protocol is None else {"protocol": plan.protocol}
                write_json(record_path(name, *pair_of[future]), version | future.result(), flat=True)
                shutil.rmtree(_folder(name, *pair_of[future]), ignore_errors=True)
                bar.update()
                yield pair_of[future]
        except BrokenProcessPool:
            message = f"{name}: a process died (out of memory?); its finished runs are recorded, so run it again"
            raise RunError(message) from None
        except BaseException as error:
            in_time = time.time() < end
            pool.shutdown(wait=not in_time, cancel_futures=True)
            if in_time or not isinstance(error, KeyboardInterrupt):
                raise


def _folder(name: str, model: str, seed: int) -> Path:
    """Where a run keeps its checkpoint until it is recorded."""
    return paths.RUNS / "experiments" / name / f"{model}-seed{seed}"


def _run_until(
    end: float, run: Callable[[Any, Path | None], dict[str, Any]], job: Runnable, folder: Path
) -> dict[str, Any]:
    """Run a job, and interrupt it at the time `end`."""
    left = end - time.time()
    if left <= 0:
        raise KeyboardInterrupt
    timer = Timer(min(left, TIMEOUT_MAX), os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()
    try:
        return run(job, folder)
    finally:
        timer.cancel()


def _quiet_worker() -> None:
    import torch

    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit if the parent is killed: it cannot stop its workers, which would compete with those of the next call."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
