"""A slider or menu of a chart that chooses among rows computed beforehand: it works without a kernel."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz.helpers import plain


@dataclass(frozen=True)
class Control:
    """Which field of the rows the reader chooses, the label beside the control, and the value at the start.

    The choices are the values of the field: a slider if they are evenly spaced, a menu otherwise. With a `base`, the
    slider moves over their logarithms; the chart should then show the value itself, `reading`.
    """

    field: str
    label: str
    value: Any
    base: int | None = None

    @property
    def name(self) -> str:
        """The name of the parameter."""
        return f"log_{self.field}" if self.base else self.field

    @property
    def reading(self) -> str:
        """The Vega expression of the chosen value."""
        return f"pow({self.base}, {self.name})" if self.base else self.name

    def values(self, rows: Iterable[dict[str, Any]]) -> list[Any]:
        """Return the choices in rising order. Raises InputError if the initial value is none of them."""
        found = sorted({plain(row[self.field]) for row in rows if self.field in row})
        if not any(_close(value, self.value) for value in found):
            raise InputError(f"{self.field} = {self.value!r}: must be one of {', '.join(map(str, found))}")
        return found

    def param(self, rows: Iterable[dict[str, Any]]) -> alt.Parameter:
        """Return the parameter with its slider or menu."""
        values, label = self.values(rows), self.label
        if self.base:
            label, values = f"{label} = {self.base}^", [self._log(value) for value in values]
        value = self._log(self.value) if self.base else self.value
        return alt.param(name=self.name, value=value, bind=binding(label, values))

    def filter(self, chart: Any) -> Any:
        """Keep the rows that are chosen, and rows without the field; the renderer rounds numbers to four digits."""
        return chart.transform_filter(f"!isValid(datum.{self.field}) || {self._is_chosen()}")

    def _is_chosen(self) -> str:
        datum = f"datum.{self.field}"
        if self.base:
            return f"abs(log({datum}) / log({self.base}) - {self.name}) < 0.01"
        if isinstance(self.value, str):
            return f"{datum} == {self.name}"
        return f"abs({datum} - {self.name}) <= 0.002 * abs({self.name})"

    def _log(self, value: float) -> float:
        return round(math.log(value, self.base or math.e), 3)


def binding(label: str, values: list[Any]) -> Any:
    """Return a slider if the values are evenly spaced numbers, or a menu."""
    if len(values) > 2 and not isinstance(values[0], str):
        steps = [later - earlier for earlier, later in pairwise(values)]
        if all(math.isclose(step, steps[0], rel_tol=1e-6) for step in steps):
            return alt.binding_range(min=values[0], max=values[-1], step=round(steps[0], 6), name=f"{label} ")
    return alt.binding_select(options=values, name=f"{label} ")


def _close(one: Any, other: Any) -> bool:
    return bool(one == other) if isinstance(other, str) else math.isclose(one, other, rel_tol=1e-9)
