"""The playground, a widget: two mixtures of experts side by side learn a picture, in the page and without Python."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import altair as alt
import anywidget
import traitlets

from dsmoe_lite.common.errors import require
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.viz import renderer, theme

FOLDER = Path(__file__).parent / "static" / "playground"
PARTS = (  # each uses those before it
    "moe", "tasks", "report", "lessons", "run", "elements", "drawing", "panel", "controls", "seeds", "story", "page",
)  # fmt: skip
SEEDS = DATA / "playground.json"  # errors of each lesson over seeds, from book/playground.py
TITLES = {  # of the picture for pages without scripts: the lesson, and what A and B are
    "collapse": ("Collapse", "no balancing", "balance loss"),
    "capacity": ("A capacity limit", "no balancing", "balance loss"),
    "strong": ("Too much balance", "balance loss of weight 1", "of weight 30"),
    "bias": ("A bias instead of a loss", "balance loss", "bias"),
    "finer": ("Finer experts", "1 of 8 experts", "4 of 32 experts"),
    "shared": ("Shared experts", "8 of 32 experts", "4 of 28 and 4 shared"),
}
LESSONS = tuple(TITLES)
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

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the widget and, where scripts are off, a picture of what ten seeds of the lesson show."""
        bundle = super()._repr_mimebundle_(**kwargs)
        picture, metadata = renderer.bundle(still(self.lesson).to_dict())
        data = {**(bundle[0] if bundle else {}), "image/png": picture["image/png"], "text/plain": picture["text/plain"]}
        return data, {"image/png": metadata["image/png"]}


def still(lesson: str) -> Any:
    """Chart the recorded errors of a lesson: one dot per model and seed."""
    found, (name, a, b) = evidence()[lesson], TITLES[lesson]
    labels = {"a": f"A: {a}", "b": f"B: {b}"}
    rows = [{"model": labels[key], "error": error} for key in labels for error in found[key]]
    middle = {key: f"{100 * median(found[key]):.2g}%" for key in labels}
    logarithmic = alt.Scale(type="log", domain=[0.0005, 1])
    chart = (
        alt.Chart(alt.Data(values=rows), width=420, height=80)
        .mark_circle(size=90, opacity=0.7)
        .encode(
            x=alt.X("error:Q", title="share of the picture unexplained", scale=logarithmic)
            .axis(format="~%", values=[0.001, 0.01, 0.1, 1]),
            y=alt.Y("model:N", title=None, sort=None).axis(labelLimit=300, labelColor=theme.LIGHT["ink"]),
            color=alt.Color("model:N", legend=None, sort=None)
            .scale(domain=list(labels.values()), range=[theme.LIGHT[ROLES["a"]], theme.LIGHT[ROLES["b"]]]),
        )
    )  # fmt: skip
    title = f"{name}: which of two models paints better?"
    subtitle = f"Ten seeds, {found['steps']:,} steps. With scripts on, both models train here in front of you."
    description = (
        f"Playground, lesson {name}: the share of the picture that two models leave unexplained after training, for "
        f"ten seeds. Median: A ({a}) {middle['a']}, B ({b}) {middle['b']}."
    )
    return theme.finish(chart, title, subtitle, description)


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
