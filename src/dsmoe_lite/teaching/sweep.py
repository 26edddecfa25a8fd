"""Run what a sweep still lacks, several runs at once, each by a process of its own."""

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError, RunError, require_int
from dsmoe_lite.common.progress import progress
from dsmoe_lite.labs.executed import Executed, all_parameters, read_executed, source_digest
from dsmoe_lite.teaching.sweep_file import Sweep

TIMES = re.compile(r"^\| (\d\d) [^|]*\| (\d+) \| (\d+) \|$", re.MULTILINE)  # of notebooks/pages/run_times.md


@dataclass(frozen=True)
class Plan:
    """What a sweep has to do. seconds: of one run, by earlier runs or the page of run times; None if neither has it."""

    missing: list[dict[str, Any]]
    n_runs: int
    seconds: float | None


@dataclass(frozen=True)
class Outcome:
    """One run that ended: its notebook, or why it failed."""

    parameters: dict[str, Any]
    notebook: str = ""
    failure: str = ""


def plan(sweep: Sweep, out: Path) -> Plan:
    """Compare a sweep with the results in the folder `out`, of which edited ones do not count.

    Raises InputError if results there are of another version of the notebook: they would not be comparable.
    """
    digest, done = source_digest(sweep.notebook), []
    for result in read_executed(out):
        if result.chapter == sweep.notebook.stem and not result.edited:
            if result.source != digest:
                remedy = f"{sweep.notebook.name} has changed since; name another --out"
                raise InputError(f"{result.path.name}: {remedy}, or move the old results away")
            done.append(result)
    finished = [result.parameters for result in done]
    missing = [run for run in sweep.runs if all_parameters(sweep.notebook, run) not in finished]
    return Plan(missing, len(sweep.runs), _seconds(sweep, done))


def run_sweep(sweep: Sweep, todo: Plan, out: Path, processes: int) -> Iterator[Outcome]:
    """Run `todo.missing`, `processes` at a time, and yield each outcome as it ends.

    One run is the command `dsmoe run`: it writes its notebook when it has ended, never over an edited one. A run that
    fails does not stop the others; the next sweep tries it again.
    """
    require_int("processes", processes, 1)
    paths.require_writable(out)
    with (
        ThreadPoolExecutor(processes) as pool,
        progress(total=len(todo.missing), desc=sweep.name, unit="run", disable=None) as bar,
    ):
        futures = [pool.submit(_run, sweep.notebook, parameters, out) for parameters in todo.missing]
        try:
            for future in as_completed(futures):
                bar.update()
                yield future.result()
        except BaseException:  # Ctrl-C reached the runs, too
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run(notebook: Path, parameters: dict[str, Any], out: Path) -> Outcome:
    command = [sys.executable, "-m", "dsmoe_lite", "run", str(notebook), "--json", "--out", str(out)]
    for name, value in parameters.items():
        command += ["-p", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode == 0:
        return Outcome(parameters, notebook=json.loads(ended.stdout)[0]["notebook"])
    lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
    return Outcome(parameters, failure=lines[-1].removeprefix("dsmoe: "))


def _seconds(sweep: Sweep, done: list[Executed]) -> float | None:
    """Seconds of one run: the median of what is there, or what the page of run times has for the profile."""
    if done:
        return statistics.median(result.record["wall_s"] for result in done)
    profiles = {run.get("profile", all_parameters(sweep.notebook, run).get("profile")) for run in sweep.runs}
    page = paths.NOTEBOOKS / "pages" / "run_times.md"
    if not page.is_file() or sweep.notebook.parent != paths.NOTEBOOKS:
        return None
    times = {number: {"cpu": int(cpu), "smoke": int(smoke)} for number, cpu, smoke in TIMES.findall(page.read_text())}
    of_notebook = times.get(sweep.notebook.stem[:2], {})
    known = [of_notebook[profile] for profile in profiles if profile in of_notebook]
    return max(known) if known else None


def failures(outcomes: list[Outcome]) -> None:
    """Raise RunError if a run failed, with how many and the first reason."""
    failed = [outcome for outcome in outcomes if outcome.failure]
    if failed:
        raise RunError(f"{len(failed)} of {len(outcomes)} runs failed, the first one: {failed[0].failure}")
