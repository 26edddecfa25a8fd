"""A slider or menu of a chart that chooses among rows computed beforehand: it works without a kernel."""

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

    The choices are the values of the field: a slider if they are evenly spaced, a menu otherwise.
    """

    field: str
    label: str
    value: Any

    def values(self, rows: Iterable[dict[str, Any]]) -> list[Any]:
        """Return the choices in rising order. Raises InputError if a row has none, or none is the initial value."""
        found = sorted({plain(row[self.field]) for row in rows if self.field in row})
        if not any(_close(value, self.value) for value in found):
            raise InputError(f"{self.field} = {self.value!r}: must be one of {', '.join(map(str, found))}")
        return found

    def param(self, rows: Iterable[dict[str, Any]]) -> alt.Parameter:
        """Return the parameter, named like the field, with its slider or menu."""
        values = self.values(rows)
        return alt.param(name=self.field, value=self.value, bind=binding(self.label, values))

    def filter(self, chart: Any) -> Any:
        """Keep the rows that are chosen. Numbers may differ in the last of the renderer's four digits."""
        if isinstance(self.value, bool | str):
            return chart.transform_filter(f"datum.{self.field} == {self.field}")
        return chart.transform_filter(f"abs(datum.{self.field} - {self.field}) <= 0.002 * abs({self.field})")


def binding(label: str, values: list[Any]) -> Any:
    """Return a slider if the values are evenly spaced numbers, or a menu."""
    if len(values) > 2 and not any(isinstance(value, bool | str) for value in values):
        steps = [later - earlier for earlier, later in pairwise(values)]
        if all(_close(step, steps[0]) for step in steps):
            return alt.binding_range(min=values[0], max=values[-1], step=steps[0], name=f"{label} ")
    return alt.binding_select(options=values, name=f"{label} ")


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, bool | str) or isinstance(other, bool | str):
        return bool(one == other)
    return abs(float(one) - float(other)) <= 1e-9 * max(abs(one), abs(other))
