"""Where things lie: the repository this package was installed from, and the user's cache."""

import os
from pathlib import Path

import platformdirs

REPOSITORY = Path(__file__).resolve().parents[3]
NOTEBOOKS = REPOSITORY / "notebooks"
DATA = REPOSITORY / "data"
WORK = REPOSITORY / "work"  # readers' copies of the chapters
RUNS = REPOSITORY / "runs"  # what `dsmoe run` and `dsmoe train` write


def cache() -> Path:
    """The folder for trained tokenizers and tokenised text: DSMOE_CACHE, or the platform's own place."""
    return Path(os.environ.get("DSMOE_CACHE") or platformdirs.user_cache_dir("dsmoe-lite"))
