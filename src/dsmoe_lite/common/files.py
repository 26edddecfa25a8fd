"""Atomic writes: a file is complete, or it is not there."""

import glob
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from dsmoe_lite.common.errors import InputError, RunError

NUMBERS = re.compile(r"\[\n\s*-?\d[^\s,]*(?:,\n\s*-?\d[^\s,]*)*\n\s*\]")  # a list of numbers in JSON with an indent


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure.

    Also removes what processes that were killed left of this file. Raises RunError naming `path` if the system refuses,
    for example because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_remains(path)
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path}: not written ({error.strerror or error}); an earlier file is intact") from None
    finally:
        temporary.unlink(missing_ok=True)


def _remove_remains(path: Path) -> None:
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        pid = part.name.split(".")[-2]
        if pid.isdecimal() and not _is_alive(int(pid)):
            part.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read the mapping in a JSON file.

    Raises InputError naming the file if it is missing or damaged, or holds NaN or a number too large for a float.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error}); restore a copy, or move it away") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must be a mapping of names to values; restore a copy, or move it away")
    return values


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"it has the value {constant}")


def _finite_float(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refuse_constant(digits)


def write_json(path: Path, value: Any, *, flat: bool = False) -> None:
    """Write JSON, atomically, with an indent of one space and keys in the order given.

    flat: each list of numbers on one line, which makes a record of a run a quarter smaller.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False)
    if flat:
        text = NUMBERS.sub(lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
    write_text(path, text + "\n")
