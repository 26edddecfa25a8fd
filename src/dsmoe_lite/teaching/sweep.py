"""Run what a sweep still lacks, several runs at once, each by a process of its own."""

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError, RunError, require, require_int
from dsmoe_lite.common.machine import cpu_threads
from dsmoe_lite.common.progress import progress
from dsmoe_lite.labs.execute import require_results_folder
from dsmoe_lite.labs.executed import Executed, parameter_defaults, read_executed, source_digest
from dsmoe_lite.teaching.sweep_file import Sweep
from dsmoe_lite.training.run_folder import lock

TIMES = re.compile(r"^\| (\d\d) [^|]*\| (\d+) \| (\d+) \|$", re.MULTILINE)  # of notebooks/pages/run_times.md
RESULT = '[\n {\n  "notebook"'  # how the output of `dsmoe run --json` begins, after what the notebook itself printed


@dataclass(frozen=True)
class Plan:
    """What a sweep has to do, and in which folder.

    processes: runs at once. seconds: of one run, by earlier ones or the page of run times; None if neither has it.
    """

    folder: Path
    missing: list[dict[str, Any]]
    n_runs: int
    processes: int
    seconds: float | None


@dataclass(frozen=True)
class Outcome:
    """One run that ended: its notebook, or why it failed."""

    parameters: dict[str, Any]
    notebook: str = ""
    failure: str = ""


def plan(sweep: Sweep, out: Path | None = None, processes: int | None = None) -> Plan:
    """Compare a sweep with the results in a folder (default: runs/NAME), of which edited ones do not count.

    processes: as many as there are cores by default, or one at a time on a GPU. Raises InputError for a folder that
    cannot be written, or that has results of another notebook or of another version of it: they could not be compared.
    """
    folder = (out or paths.RUNS / sweep.name).expanduser().resolve()
    require(folder.suffix != ".ipynb", "out", str(folder), "must be a folder, not a notebook")
    require_results_folder(folder)
    digest, defaults, done = source_digest(sweep.notebook.read_bytes()), parameter_defaults(sweep.notebook), []
    for result in read_executed(folder):
        if result.chapter != sweep.notebook.stem or (result.source != digest and not result.edited):
            remedy = f"is a result of another version of {sweep.notebook.name}, or of another notebook"
            raise InputError(f"{result.path}: {remedy}; name another --out, or move it away")
        if not result.edited:
            done.append(result)
    finished = {_key(result.parameters) for result in done}
    missing = [run for run in sweep.runs if _key(defaults | run) not in finished]
    profiles = {(defaults | run).get("profile") for run in missing}
    if processes is None:
        processes = 1 if "gpu" in profiles else cpu_threads()
    require_int("processes", processes, 1)
    return Plan(folder, missing, len(sweep.runs), processes, _seconds(sweep.notebook, done, profiles))


def run_sweep(sweep: Sweep, todo: Plan) -> Iterator[Outcome]:
    """Run `todo.missing` and yield each outcome as it ends.

    One run is the command `dsmoe run`: it writes its notebook when it has ended, never over an edited one. A run that
    fails does not stop the others; the next sweep tries it again. Raises RunError if another sweep uses the folder.
    """
    running: set[subprocess.Popen[str]] = set()
    with (
        lock(todo.folder),
        ThreadPoolExecutor(todo.processes) as pool,
        progress(total=len(todo.missing), desc=sweep.name, unit="run", disable=None) as bar,
    ):
        futures = [pool.submit(_run, sweep.notebook, parameters, todo, running) for parameters in todo.missing]
        try:
            for future in as_completed(futures):
                bar.update()
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()


def failures(outcomes: Sequence[Outcome], in_order: Sequence[dict[str, Any]]) -> None:
    """Raise RunError if a run failed, with how many and the reason of the first one in the order of the sweep."""
    failed = sorted((one for one in outcomes if one.failure), key=lambda one: in_order.index(one.parameters))
    if failed:
        raise RunError(f"{len(failed)} of {len(outcomes)} runs failed, the first one: {failed[0].failure}")


def _run(notebook: Path, parameters: dict[str, Any], todo: Plan, running: set[subprocess.Popen[str]]) -> Outcome:
    command = [sys.executable, "-m", "dsmoe_lite", "run", str(notebook), "--json", "--out", str(todo.folder)]
    for name, value in parameters.items():
        command += ["-p", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    threads = {"OMP_NUM_THREADS": str(max(1, cpu_threads() // todo.processes))}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    try:
        process = subprocess.Popen(command, env=threads | dict(os.environ), **pipes)
        running.add(process)
        try:
            printed, errors = process.communicate()
        finally:
            running.discard(process)
        if process.returncode == 0:
            return Outcome(parameters, notebook=json.loads(printed[printed.rindex(RESULT) :])[0]["notebook"])
        lines = errors.strip().splitlines() or [f"exit status {process.returncode}"]
        return Outcome(parameters, failure=lines[-1].removeprefix("dsmoe: "))
    except (OSError, ValueError, LookupError) as error:  # a value that no command line can carry, for example
        return Outcome(parameters, failure=f"{type(error).__name__}: {error}")


def _key(parameters: dict[str, Any]) -> str:
    return json.dumps(parameters, sort_keys=True)


def _seconds(notebook: Path, done: Sequence[Executed], profiles: set[Any]) -> float | None:
    """Seconds of one run: the median of results with these profiles, or the longest on the page of run times."""
    alike = [result.record["wall_s"] for result in done if result.parameters.get("profile") in profiles]
    if alike:
        return statistics.median(alike)
    page = paths.NOTEBOOKS / "pages" / "run_times.md"
    if not page.is_file() or notebook.parent != paths.NOTEBOOKS:
        return None
    rows = TIMES.findall(page.read_text(encoding="utf-8"))
    times = {
        (number, profile): int(s) for number, *both in rows for profile, s in zip(("cpu", "smoke"), both, strict=True)
    }
    found = [times.get((notebook.stem[:2], profile)) for profile in profiles]
    known = [seconds for seconds in found if seconds is not None]
    return max(known) if known and len(known) == len(found) else None
