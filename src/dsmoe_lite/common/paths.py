"""Where files are: in a clone of the repository, or in an installed wheel and the current folder.

A clone is one folder for everything. A wheel carries the files that are only read (chapters, models, recorded runs);
what is written goes into the current folder, never into the environment.
"""

import os
from pathlib import Path

import platformdirs

from dsmoe_lite.common.errors import InputError, require

_PACKAGE = Path(__file__).resolve().parents[1]
_CARRIED = _PACKAGE / "_course"  # copied into the wheel by setup.py, at the same places as in the repository


def _current_folder() -> Path:
    """The current folder, or the folder above if this is a work/ with chapters: kernels of notebooks start there."""
    current = Path.cwd()
    has_chapters = next(current.glob("[0-9][0-9]_*.ipynb"), None) is not None
    return current.parent if current.name == "work" and has_chapters else current


IS_CLONE = not _CARRIED.is_dir()
REPOSITORY = _PACKAGE.parents[1] if IS_CLONE else _CARRIED  # book.yml, notebooks/, data/; a wheel's are only read
FOLDER = REPOSITORY if IS_CLONE else Path(os.environ.get("DSMOE_FOLDER") or _current_folder())  # work/, runs/
NOTEBOOKS = REPOSITORY / "notebooks"
DATA = REPOSITORY / "data"
DATA_FOLDERS = tuple(dict.fromkeys((FOLDER / "data", DATA)))  # new records go into the first; all are read
WORK = FOLDER / "work"  # readers' copies of the chapters
RUNS = FOLDER / "runs"  # what `dsmoe run` and `dsmoe train` write


def find_data(name: str) -> Path:
    """The path of a file below data/, such as "claims.yml": the reader's own, else the shipped one.

    If neither exists, where to write it.
    """
    candidates = [folder / name for folder in DATA_FOLDERS]
    return next((path for path in candidates if path.is_file()), candidates[0])


def data_to_write(name: str) -> Path:
    """Where to write a file below data/: in the clone, or in the current folder."""
    return DATA_FOLDERS[0] / name


def cache() -> Path:
    """The folder for trained tokenizers and compiled kernels: DSMOE_CACHE, or the cache folder of the platform."""
    return Path(os.environ.get("DSMOE_CACHE") or platformdirs.user_cache_dir("dsmoe-lite"))


def install_command(extra: str = "course") -> str:
    """The command that installs the packages of an extra."""
    if not IS_CLONE:
        return f'pip install "dsmoe-lite[{extra}]"'
    return "make setup" if extra in ("course", "book", "test") else f"pip install -e '.[{extra}]'"


def require_clone(command: str) -> None:
    """Raise InputError if the package was installed from a wheel: `command` works on the repository's own files."""
    if not IS_CLONE:
        raise InputError(f"{command}: works in a clone of the repository only; get one and run `make setup` there")


def require_writable(folder: Path) -> None:
    """Raise InputError if `folder`, or the folder that it would be made in, cannot be written."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    writable = os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir()  # a file in the way is another error
    require(writable, "folder", str(folder), f"{existing} cannot be written; change to a folder of your own")
