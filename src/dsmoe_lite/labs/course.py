"""The whole course, chapter by chapter, with its times."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.common.progress import progress
from dsmoe_lite.labs.chapters import chapters, find_chapter
from dsmoe_lite.labs.execute import chapter_schema, run_chapter
from dsmoe_lite.labs.parameters import find, parse_value


@dataclass(frozen=True)
class Outcome:
    """How one chapter went: its seconds, or why it failed."""

    chapter: str
    wall_s: float | None = None
    cpu_s: float | None = None
    failure: str = ""


def run_course(profile: str, names: Sequence[str] = (), out: Path | None = None) -> list[Outcome]:
    """Run chapters in order with `profile`, every one of book.yml or those named; a failure does not stop the rest."""
    wanted = [find_chapter(name) for name in names] or chapters()
    return [_run(chapter, profile, out) for chapter in progress(wanted, desc="course", unit="chapter", disable=None)]


def machine() -> str:
    """This machine in one line, for a table of times."""
    return (
        f"{os.cpu_count()} CPU threads, {_cpu_name()}, {platform.system()}, "
        f"Python {platform.python_version()}, torch {version('torch')}"
    )


def _run(chapter: Path, profile: str, out: Path | None) -> Outcome:
    try:
        parameters = {"profile": parse_value(find(chapter_schema(chapter), "profile"), profile)}
        run = run_chapter(chapter, parameters, out)
    except (InputError, RunError) as error:
        return Outcome(chapter.stem, failure=str(error))
    return Outcome(chapter.stem, round(run.wall_s, 1), round(run.cpu_s, 1))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
