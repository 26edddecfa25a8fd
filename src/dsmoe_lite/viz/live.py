"""An output with controls that Python computes anew: for what the reader's own model or code gives.

What can be computed beforehand needs no Python: `viz.controls`.
"""

import asyncio
import sys
from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets
from IPython.display import display

from dsmoe_lite.common.errors import InputError, RunError

REDRAW_INTERVAL = 0.5  # seconds, at least
RELOADED = "The page was loaded again, which cut the chart off from its controls: run this cell again."


def live(draw: Callable[..., Any], **controls: ipywidgets.ValueWidget) -> None:
    """Show `controls` and, below them, the chart or text `draw(**their values)`, redrawn when a control moves.

    It is redrawn at most twice per second, with the latest values. A status line below the controls reports that Python
    is working; if `draw` raises, it shows the error and the output stays as it was. Without a kernel the first output
    remains visible. When the page is loaded again while the kernel runs, JupyterLab restores the controls as they are
    now and the output as it was saved, and can no longer update it: the status line then asks to run the cell again.
    """
    for control in controls.values():
        control.style.description_width = "initial"
    first = draw(**_values(controls))
    status = _Status()
    row = ipywidgets.HBox(list(controls.values()), layout=ipywidgets.Layout(flex_flow="row wrap"))
    view = ipywidgets.VBox([row, status])._repr_mimebundle_()
    names = ", ".join(control.description or name for name, control in controls.items())
    display({**view, "text/plain": f"JupyterLab shows controls here: {names}."}, raw=True)
    redraw = _Redraw(draw, controls, status, display(first, display_id=True))
    for control in controls.values():
        control.observe(redraw.schedule, names="value")


class _Status(ipywidgets.HTML):
    """The status line, which knows whether a page shows it that did not run its cell."""

    def __init__(self) -> None:
        self._page: str | None = None  # while the widget is being made
        super().__init__()
        self._page = _current_page()

    def is_reloaded(self) -> bool:
        """Whether the message that Python works on came from another page than the one that ran the cell."""
        return _current_page() != self._page

    def report(self, text: str, *, is_error: bool = False) -> None:
        """Show one line."""
        weight = "bold" if is_error else "normal"
        self.value = f'<span role="status" style="font-weight: {weight}">{escape(text)}</span>'

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
        """The widget's state; all of it (no `key`) is what a page asks for when it is loaded."""
        if key is None and self._page is not None and self.is_reloaded():
            self.report(RELOADED, is_error=True)
        return super().get_state(key, drop_defaults)


class _Redraw:
    """Combines many changes into one redraw: now, or `REDRAW_INTERVAL` after the last one."""

    def __init__(self, draw: Callable[..., Any], controls: dict[str, Any], status: _Status, output: Any) -> None:
        self._draw, self._controls, self._status, self._output = draw, controls, status, output
        self._scheduled = False
        self._next_redraw = 0.0  # earliest, by the event loop's clock

    def schedule(self, _: Any) -> None:
        if self._status.is_reloaded():
            self._status.report(RELOADED, is_error=True)
            return
        if self._scheduled:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no kernel
            self._redraw()
            return
        self._scheduled = True
        self._status.report("Computing …")
        loop.call_at(max(self._next_redraw, loop.time()), self._redraw_in_loop, loop)

    def _redraw_in_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        self._scheduled = False
        self._redraw()
        self._next_redraw = loop.time() + REDRAW_INTERVAL

    def _redraw(self) -> None:
        try:
            chart = self._draw(**_values(self._controls))
        except (InputError, RunError) as error:
            self._status.report(str(error), is_error=True)
        except Exception as error:  # perhaps from a reader's own code
            self._status.report(f"{type(error).__name__}: {error}", is_error=True)
        else:
            self._output.update(chart)
            self._status.report("")


def _current_page() -> str | None:
    """The page whose message the kernel works on: the id of its session, or None without a kernel."""
    ipython = sys.modules.get("IPython")
    kernel = getattr(ipython.get_ipython(), "kernel", None) if ipython else None
    return kernel.get_parent("shell").get("header", {}).get("session") if kernel else None


def _values(controls: dict[str, Any]) -> dict[str, Any]:
    return {name: control.value for name, control in controls.items()}
