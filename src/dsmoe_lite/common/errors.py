"""Errors that a user can understand: one line with the thing, its value and the remedy."""

from collections.abc import Collection, Mapping
from typing import Any


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
        raise InputError(f"{name} = {value!r}: {remedy}")


def require_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Require an int in [low, high]; a bool is no int here."""
    upper = "" if high is None else f" and at most {high}"
    is_int = isinstance(value, int) and not isinstance(value, bool)
    inside = is_int and value >= low and (high is None or value <= high)
    require(inside, name, value, f"must be a whole number of at least {low}{upper}")


def require_number(name: str, value: Any, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """Require a finite number in [low, high], or in (low, high] with `open_low`. NaN never passes."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    above_low = is_number and (value > low if open_low else value >= low)
    inside = above_low and value <= high and value != float("inf")
    lower = f"above {low:g}" if open_low else f"of at least {low:g}"
    upper = "" if high == float("inf") else f" and at most {high:g}"
    require(inside, name, value, f"must be a finite number {lower}{upper}")


def require_bool(name: str, value: Any) -> None:
    """Require True or False, not just a truthy or falsy value."""
    require(isinstance(value, bool), name, value, "must be True or False")


def require_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Require one of `choices`."""
    require(value in choices, name, value, f"must be one of {', '.join(choices)}")


def require_same(actual: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> None:
    """Require two nested mappings to be equal. The message names the first entry that differs."""
    for name in dict.fromkeys((*expected, *actual)):
        value, wanted = actual.get(name), expected.get(name)
        if isinstance(value, Mapping) and isinstance(wanted, Mapping):
            require_same(value, wanted, f"{prefix}{name}.")
        else:
            require(value == wanted, f"{prefix}{name}", value, f"this run has {wanted!r}")
