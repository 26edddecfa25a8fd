"""A chart with controls: Python redraws it when the reader moves a slider or chooses from a menu."""

import asyncio
from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets  # type: ignore[import-untyped]
from IPython.display import display

from dsmoe_lite.common.errors import InputError, RunError

REDRAW_INTERVAL = 0.5  # seconds, at least


def live(draw: Callable[..., Any], **controls: ipywidgets.ValueWidget) -> None:
    """Show `controls` and, below them, the chart `draw(**their values)`, redrawn when a control moves.

    The chart is redrawn at most twice per second, with the latest values. A status line below the controls reports that
    Python is working; if `draw` raises, it shows the error and the chart stays as it was. Without a kernel the first
    chart remains visible.
    """
    for control in controls.values():
        control.style.description_width = "initial"
    first = draw(**_values(controls))
    status = ipywidgets.HTML()
    row = ipywidgets.HBox(list(controls.values()), layout=ipywidgets.Layout(flex_flow="row wrap"))
    view = ipywidgets.VBox([row, status])._repr_mimebundle_()
    names = ", ".join(control.description or name for name, control in controls.items())
    display({**view, "text/plain": f"JupyterLab shows controls here: {names}."}, raw=True)
    redraw = _Redraw(draw, controls, status, display(first, display_id=True))
    for control in controls.values():
        control.observe(redraw.schedule, names="value")


class _Redraw:
    """Combines many changes into one redraw: now, or `REDRAW_INTERVAL` after the last one."""

    def __init__(self, draw: Callable[..., Any], controls: dict[str, Any], status: Any, output: Any) -> None:
        self._draw, self._controls, self._status, self._output = draw, controls, status, output
        self._scheduled = False
        self._next_redraw = 0.0  # earliest, by the event loop's clock

    def schedule(self, _: Any) -> None:
        if self._scheduled:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no kernel
            self._redraw()
            return
        self._scheduled = True
        self._report("Computing …")
        loop.call_at(max(self._next_redraw, loop.time()), self._redraw_in_loop, loop)

    def _redraw_in_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        self._scheduled = False
        self._redraw()
        self._next_redraw = loop.time() + REDRAW_INTERVAL

    def _redraw(self) -> None:
        try:
            chart = self._draw(**_values(self._controls))
        except (InputError, RunError) as error:
            self._report(str(error), is_error=True)
        except Exception as error:  # perhaps from a reader's own code
            self._report(f"{type(error).__name__}: {error}", is_error=True)
        else:
            self._output.update(chart)
            self._report("")

    def _report(self, text: str, *, is_error: bool = False) -> None:
        weight = "bold" if is_error else "normal"
        self._status.value = f'<span role="status" style="font-weight: {weight}">{escape(text)}</span>'


def _values(controls: dict[str, Any]) -> dict[str, Any]:
    return {name: control.value for name, control in controls.items()}
