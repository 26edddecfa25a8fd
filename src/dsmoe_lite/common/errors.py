"""Errors that a user can understand: one line with the thing, its value and the remedy."""

import difflib
import reprlib
import sys
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any

MAX_INT = 2**63 - 1  # of a tensor's size
MAX_FLOAT = sys.float_info.max


class InputError(ValueError):
    """Bad input. The message names the thing, its value and what would be right. The CLI exits with status 2."""

    def _render_traceback_(self) -> list[str]:  # IPython shows this instead of the stack
        return [str(self)]


class RunError(RuntimeError):
    """Good input, but the work failed: a full disk, a run folder in use. The CLI exits with status 1."""


class DivergedError(RunError):
    """A training loss that is not finite."""


def require(condition: bool, name: str, value: Any, remedy: str) -> None:
    """Raise InputError("name = value: remedy") unless `condition` is true."""
    if not condition:
        raise InputError(f"{name} = {shorten(value)}: {remedy}")


def shorten(value: Any) -> str:
    """The repr of `value`, or its beginning and end if it is long, deep or a number of many digits."""
    shortened = reprlib.Repr()  # Python 3.11 takes no limits here
    shortened.maxstring = shortened.maxother = 200
    shortened.maxlist = shortened.maxtuple = shortened.maxdict = 20
    try:
        return shortened.repr(value)
    except ValueError:  # Python does not print integers of more than 4300 digits
        return "a number of thousands of digits"


def find_name(name: Any, known: Collection[str]) -> str:
    """Return a hint for a name that does not exist: the nearest of `known`, or all of them."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def require_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Require a whole number in [low, high], Python's or numpy's; a bool is none. Without `high`, it fits 64 bits."""
    upper = "" if high is None else f" and at most {high}"
    is_int = isinstance(value, Integral) and not isinstance(value, bool)
    inside = is_int and low <= value <= (MAX_INT if high is None else high)
    require(inside, name, value, f"must be a whole number of at least {low}{upper}")


def require_number(
    name: str,
    value: Any,
    low: float,
    high: float = float("inf"),
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Require a finite number between low and high, Python's or numpy's; a bool is none, and NaN never passes.

    The interval is closed; `open_low` and `open_high` exclude an end.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    above_low = is_number and (value > low if open_low else value >= low)
    below_high = above_low and (value < high if open_high else value <= min(high, MAX_FLOAT))
    lower = f"above {low:g}" if open_low else f"of at least {low:g}"
    upper = "" if high == float("inf") else f" and {'below' if open_high else 'at most'} {high:g}"
    require(below_high, name, value, f"must be a finite number {lower}{upper}")


def require_bool(name: str, value: Any) -> None:
    """Require True or False, not just a truthy or falsy value."""
    require(isinstance(value, bool), name, value, "must be True or False")


def require_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Require one of `choices`."""
    require(value in tuple(choices), name, value, f"must be one of {', '.join(choices)}")  # value may be unhashable


def require_type(name: str, value: Any, *types: type) -> None:
    """Require an instance of one of `types`; NoneType allows None."""
    allowed = " or ".join("None" if one is type(None) else one.__name__ for one in types)
    require(isinstance(value, types), name, value, f"must be {allowed}, not {type(value).__name__}")


def require_same(actual: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> None:
    """Require two nested mappings to be equal. The message names the first entry that differs."""
    for name in dict.fromkeys((*expected, *actual)):
        value, wanted = actual.get(name), expected.get(name)
        if isinstance(value, Mapping) and isinstance(wanted, Mapping):
            require_same(value, wanted, f"{prefix}{name}.")
        else:
            require(value == wanted, f"{prefix}{name}", value, f"this run has {wanted!r}")
