"""Folders of checkpoints by their number of steps: `step-00000100`; what is only half there has another name."""

import re
from pathlib import Path

SPREAD = "checkpoints"  # where they are in the folder of a run


def complete(folder: Path) -> list[Path]:
    """Those in `folder`, the latest last."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def newest(folder: Path) -> Path | None:
    """That of the latest step in `folder`."""
    return next(reversed(complete(folder)), None)


def step_of(path: Path) -> int:
    """The number of steps that a checkpoint has behind it."""
    return int(path.name.removeprefix("step-"))
