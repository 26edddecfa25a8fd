"""The folders of sharded checkpoints, named by their step: `step-00000100`. An unfinished one has another name."""

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"  # the folder, within a run's folder, that holds them


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, newest last."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    return next(reversed(complete(folder)), None)
