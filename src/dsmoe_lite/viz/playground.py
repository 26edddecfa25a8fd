"""The playground, a widget: two mixtures of experts side by side learn a picture, in the page and without Python."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from dsmoe_lite.common.errors import require
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.viz import theme

FOLDER = Path(__file__).parent / "static" / "playground"
PARTS = ("moe", "tasks", "lessons", "drawing", "page")  # each uses those before it
SEEDS = DATA / "playground.json"  # errors of each lesson over seeds, from book/playground.py
LESSONS = ("collapse", "capacity", "strong", "bias", "finer", "shared")
ROLES = {  # variable of the CSS: role of the theme
    "card": "card",
    "ink": "ink",
    "muted": "muted",
    "grid": "grid",
    "edge": "starved",
    "focus": "frame",
    "a": "line1",
    "b": "line4",
}
MOUNT = """
export default {
  render: ({ model, el }) =>
    globalThis.dsmoePlayground.mount(el, { lesson: model.get("lesson"), evidence: model.get("evidence") }),
};
"""


class Playground(anywidget.AnyWidget):
    """Two models of a lesson, to train and to change; raises InputError for a lesson that does not exist.

    lesson: "collapse", "capacity", "strong", "bias", "finer" or "shared".
    """

    _esm = ""
    _css = ""

    lesson = traitlets.Unicode().tag(sync=True)
    evidence: Any = traitlets.Dict().tag(sync=True)

    def __init__(self, lesson: str = "collapse") -> None:
        require(lesson in LESSONS, "lesson", lesson, f"must be one of {', '.join(LESSONS)}")
        self._esm, self._css = script() + MOUNT, style()
        super().__init__(lesson=lesson, evidence=evidence())

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return the widget and, where none can be shown, a line."""
        bundle = super()._repr_mimebundle_(**kwargs)
        shown, metadata = bundle or ({}, {})
        return {**shown, "text/plain": f"JupyterLab and the book show the playground here: {self.lesson}."}, metadata


def script() -> str:
    """Return the playground as one classic script, which defines `dsmoePlayground` alone."""
    return "\n".join((FOLDER / f"{part}.js").read_text(encoding="utf-8") for part in PARTS)


def style() -> str:
    """Return its CSS: colours of the theme as variables, light and dark, then the rules.

    A page whose box has the class `follows-system` is dark if the reader's system is.
    """

    def block(selector: str, colours: Mapping[str, str]) -> str:
        return f"{selector} {{ {' '.join(f'--pg-{role}: {colours[source]};' for role, source in ROLES.items())} }}\n"

    light = block(".dsmoe-playground", theme.LIGHT) + f".dsmoe-playground {{ --pg-font: {theme.FONT}; }}\n"
    dark = block(':is([data-jp-theme-light="false"], html[data-theme="dark"]) .dsmoe-playground', theme.DARK)
    system = block(".follows-system .dsmoe-playground", theme.DARK)
    rules = (FOLDER / "playground.css").read_text(encoding="utf-8")
    return f"{light}{dark}@media (prefers-color-scheme: dark) {{ {system} }}\n{rules}"


def evidence() -> dict[str, Any]:
    """Return the recorded errors of each lesson: {lesson: {"steps", "a": [of each seed], "b", "control"}}."""
    found: dict[str, Any] = json.loads(SEEDS.read_text(encoding="utf-8"))["lessons"]
    return found
