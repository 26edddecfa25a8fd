"""What a user can get wrong, as one readable line."""

from collections.abc import Collection, Mapping
from typing import Any


class InputError(ValueError):
    """Bad input: the message names the thing, its value and what would be right. The CLI exits with status 2."""

    def _render_traceback_(self) -> list[str]:  # what IPython shows instead of the frames
        return [str(self)]


class RunError(RuntimeError):
    """Good input, but the work failed (disk full, a run folder in use). The CLI exits with status 1."""


class DivergedError(RunError):
    """A training loss that is not finite."""


def require(condition: bool, name: str, value: Any, remedy: str) -> None:
    """Raise InputError(`name = value: remedy`) unless `condition` holds."""
    if not condition:
        raise InputError(f"{name} = {value!r}: {remedy}")


def require_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Require an int (not a bool) in [low, high]."""
    upper = "" if high is None else f" and at most {high}"
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    require(fits, name, value, f"must be a whole number of at least {low}{upper}")


def require_number(name: str, value: Any, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """Require a finite number in [low, high], or in (low, high] with `open_low`. NaN never passes."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    above = number and (value > low if open_low else value >= low)
    upper = "" if high == float("inf") else f" and at most {high:g}"
    bound = f"{'above' if open_low else 'of at least'} {low:g}{upper}"
    require(bool(above and value <= high and value != float("inf")), name, value, f"must be a finite number {bound}")


def require_bool(name: str, value: Any) -> None:
    """Require True or False itself, not something that counts as it."""
    require(isinstance(value, bool), name, value, "must be True or False")


def require_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Require one of `choices`."""
    require(value in choices, name, value, f"must be one of {', '.join(choices)}")


def require_same(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> None:
    """Require two nested mappings to be equal; the message names the first entry in which they differ."""
    for name in dict.fromkeys((*wanted, *found)):
        one, other = found.get(name), wanted.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            require_same(one, other, f"{prefix}{name}.")
        else:
            require(one == other, f"{prefix}{name}", one, f"this run has {other!r}")
