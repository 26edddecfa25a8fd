"""The folders of sharded checkpoints: `step-00000100`. An incomplete checkpoint has another name."""

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"  # the folder of checkpoints, in a run folder


def complete_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints in `folder`, newest last."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in `folder`, or None."""
    return next(reversed(complete_checkpoints(folder)), None)
