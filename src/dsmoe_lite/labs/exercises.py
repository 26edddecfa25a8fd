"""Exercises, which never stop a chapter, and predictions, which never appear in its outputs."""

import functools
import shutil
from collections.abc import Callable
from typing import Any

import filelock

from dsmoe_lite.common import paths
from dsmoe_lite.common.files import read_json, write_json

MESSAGE_LENGTH = 200  # characters


class _UnsolvedError(Exception):
    """The stub still returns None."""


def check_exercise(answer: Any, test: Callable[[Any], None], needs: str | None = None) -> bool | None:
    """Run `test(answer)`, print the verdict in one line and return it: True, False, or None if there is no answer yet.

    answer: a function or a value; None, or a function that returns None, counts as not solved yet.
    test: raises AssertionError with the expected result if the answer is wrong.
    needs: a program that the test runs; if it is missing, a line reports that and the verdict is None.
    The verdict is also None if Python runs without assertions (-O), because nothing would be wrong then.
    Never raises. End the cell's line with `;`.
    """
    if not __debug__:
        print("not checked: Python runs without assertions here; unset PYTHONOPTIMIZE and restart the kernel")
        return None
    if needs is not None and shutil.which(needs) is None:
        print(f"not checked: {needs} not found (apt install {needs})")
        return None
    try:
        if answer is None:
            raise _UnsolvedError
        test(_refuse_none(answer) if callable(answer) else answer)
    except _UnsolvedError:
        print("not solved yet")
        return None
    except AssertionError as error:
        print(f"not right yet: {_one_line(error) or 'the answer differs from what was expected'}")
        return False
    except Exception as error:
        print(f"not right yet: it stops with {type(error).__name__}: {_one_line(error)}")
        return False
    print("right")
    return True


def predict(key: str, prediction: Any) -> None:
    """Store the reader's prediction as `key` in work/predictions.json. None, a chapter's default, writes nothing."""
    if prediction is None:
        return
    path = paths.WORK / "predictions.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(".predictions.lock")):
        predictions = read_json(path) if path.exists() else {}
        write_json(path, {**predictions, key: prediction})


def _refuse_none(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if result is None:
            raise _UnsolvedError
        return result

    return checked


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:MESSAGE_LENGTH]
