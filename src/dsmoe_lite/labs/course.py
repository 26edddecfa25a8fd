"""Run the whole course, chapter by chapter, and time it."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.common.machine import require_profile
from dsmoe_lite.common.progress import progress
from dsmoe_lite.labs.chapters import chapter_schema, chapters, find_chapter
from dsmoe_lite.labs.execute import run_chapter
from dsmoe_lite.labs.parameters import find_parameter, parse_value


@dataclass(frozen=True)
class Outcome:
    """Result of one chapter: its seconds, or why it failed."""

    chapter: str
    wall_s: float | None = None
    cpu_s: float | None = None
    failure: str = ""


def run_course(profile: str, names: Sequence[str] = (), out: Path | None = None) -> list[Outcome]:
    """Run the chapters `names`, or all in the order of book.yml, with `profile`; continue after one that fails.

    Raises InputError for an unknown chapter, and for profile gpu without a GPU.
    """
    require_profile(profile)
    selected = [find_chapter(name) for name in names] or chapters()
    bar = progress(selected, desc="course", unit="chapter", disable=None)
    return [_run_one(chapter, profile, out) for chapter in bar]


def describe_machine() -> str:
    """Describe this machine in one line, to print with a table of times."""
    return (
        f"{os.cpu_count()} CPU threads, {_cpu_name()}, {platform.system()}, "
        f"Python {platform.python_version()}, torch {version('torch')}"
    )


def _run_one(chapter: Path, profile: str, out: Path | None) -> Outcome:
    try:
        parameters = {"profile": parse_value(find_parameter(chapter_schema(chapter), "profile"), profile)}
        executed = run_chapter(chapter, parameters, out)
    except (InputError, RunError) as error:
        return Outcome(chapter.stem, failure=str(error))
    return Outcome(chapter.stem, round(executed.wall_s, 1), round(executed.cpu_s, 1))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
