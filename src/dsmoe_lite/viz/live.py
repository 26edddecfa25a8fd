"""A chart that Python draws again when the reader moves a control."""

import asyncio
from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets  # type: ignore[import-untyped]
from IPython.display import display

from dsmoe_lite.common.errors import InputError, RunError

SECONDS = 0.5  # between two drawings


def live(draw: Callable[..., Any], **controls: ipywidgets.ValueWidget) -> None:
    """Show `controls` and beneath them the chart `draw(**their values)`, drawn again when one moves.

    At most twice a second, with the last values. While Python works the line under the controls says so; where `draw`
    raises, it holds the error, and the chart stays as it was. Without a kernel the first chart remains, and can be
    read everywhere.
    """
    for control in controls.values():
        control.style.description_width = "initial"
    first = draw(**_values(controls))
    status = ipywidgets.HTML()
    row = ipywidgets.HBox(list(controls.values()), layout=ipywidgets.Layout(flex_flow="row wrap"))
    view = ipywidgets.VBox([row, status])._repr_mimebundle_()
    names = ", ".join(control.description or name for name, control in controls.items())
    display({**view, "text/plain": f"Here JupyterLab shows what can be moved: {names}."}, raw=True)
    redraw = _Redraw(draw, controls, status, display(first, display_id=True))
    for control in controls.values():
        control.observe(redraw.soon, names="value")


class _Redraw:
    """Draws once for many movements: now, or as soon as the last drawing is old enough."""

    def __init__(self, draw: Callable[..., Any], controls: dict[str, Any], status: Any, shown: Any) -> None:
        self._draw, self._controls, self._status, self._shown = draw, controls, status, shown
        self._waiting = False
        self._free_at = 0.0  # of the loop's clock

    def soon(self, _: Any) -> None:
        if self._waiting:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no kernel
            self._now()
            return
        self._waiting = True
        self._say("Computing …")
        loop.call_at(max(self._free_at, loop.time()), self._in_loop, loop)

    def _in_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        self._waiting = False
        self._now()
        self._free_at = loop.time() + SECONDS

    def _now(self) -> None:
        try:
            chart = self._draw(**_values(self._controls))
        except (InputError, RunError) as error:
            self._say(str(error), wrong=True)
        except Exception as error:  # a reader's own code, perhaps: the page must not hang
            self._say(f"{type(error).__name__}: {error}", wrong=True)
        else:
            self._shown.update(chart)
            self._say("")

    def _say(self, text: str, *, wrong: bool = False) -> None:
        weight = "bold" if wrong else "normal"
        self._status.value = f'<span role="status" style="font-weight: {weight}">{escape(text)}</span>'


def _values(controls: dict[str, Any]) -> dict[str, Any]:
    return {name: control.value for name, control in controls.items()}
