"""Exercises that never stop a chapter, and predictions that never reach its outputs."""

import functools
import json
import shutil
from collections.abc import Callable
from typing import Any

import filelock

from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.files import write_json

LINE = 200  # characters of a message that are shown


class _UnsolvedError(Exception):
    """The stub still returns None."""


def check_exercise(answer: Any, test: Callable[[Any], None], needs: str | None = None) -> bool | None:
    """Try `test(answer)`, print the verdict in one line and return it: True, False, or None for an untouched stub.

    needs: a program without which the test cannot run; where it is missing that is said, and the verdict is None.

    `answer` is a function or a value. `test` raises AssertionError, saying what was expected, on a wrong answer. A stub
    is a value None, or a function that returns None. Nothing raises. End the cell's line with `;`.
    """
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
    """Keep the reader's prediction under `key` in work/predictions.json; None, the chapter's own, writes nothing."""
    if prediction is None:
        return
    path = paths.WORK / "predictions.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(".predictions.lock")):
        predictions = {}
        if path.exists():
            try:
                predictions = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise InputError(f"{path} is not JSON any more: repair it or move it away") from None
        write_json(path, {**predictions, key: prediction})


def _refuse_none(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if result is None:
            raise _UnsolvedError
        return result

    return watched


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:LINE]
