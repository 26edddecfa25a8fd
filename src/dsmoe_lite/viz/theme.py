"""How every chart looks: fonts, colours by role, and the config that each chart carries with it.

Charts are drawn on their own card in LIGHT, which reads well on JupyterLab's light and dark pages and on GitHub. No two
roles share a colour, so the book can redraw a chart in DARK by replacing each colour with the same role's dark one.
"""

from collections.abc import Iterable
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError

FONT = "Inter, 'Source Sans 3', system-ui, sans-serif"
MONO = "'JetBrains Mono', 'DejaVu Sans Mono', monospace"
MAX_WIDTH = 720  # px, axes and labels included
SHORTEST_DESCRIPTION = 30
SMALLEST_TEXT = 9.5

LIGHT = {
    "card": "#FFFFFF", "ink": "#1B1F24", "muted": "#5B6470", "grid": "#E6E8EB",
    "line1": "#0072B2", "line2": "#D55E00", "line3": "#009E73", "line4": "#AA4499",
    "label1": "#00639C", "label2": "#B04D00", "label3": "#007A58", "label4": "#96388A",
    "ramp1": "#F4F7FA", "ramp2": "#BBD7EE", "ramp3": "#6AAAD8", "ramp4": "#1F6FB2", "ramp5": "#0B3A66",
    "on_pale": "#010203", "on_deep": "#FEFEFE",
    "starved": "#0173B3", "fair": "#B8BFC9", "overloaded": "#D45F01",
    "fill1": "#897CED", "fill2": "#C7D554", "fill3": "#C77099", "fill4": "#92DDA5",
    "fill5": "#958F00", "fill6": "#FBBAD6", "fill7": "#70956B", "fill8": "#A8B1FB",
    "on_fill": "#111111",
}  # fmt: skip
DARK = {
    "card": "#14181F", "ink": "#E8EBF0", "muted": "#A6AEBB", "grid": "#2A313C",
    "line1": "#56B4E9", "line2": "#FF8C42", "line3": "#2FC79A", "line4": "#E07BC8",
    "label1": "#57B5EA", "label2": "#FF8D43", "label3": "#30C89B", "label4": "#E17CC9",
    "ramp1": "#1C232D", "ramp2": "#1C3A57", "ramp3": "#1D4B73", "ramp4": "#4484BA", "ramp5": "#BFE0F8",
    "on_pale": "#FCFDFE", "on_deep": "#030405",
    "starved": "#58B6EB", "fair": "#6B7482", "overloaded": "#FF8E44",
    "fill1": "#897DED", "fill2": "#C7D555", "fill3": "#C7709A", "fill4": "#92DDA6",
    "fill5": "#958F01", "fill6": "#FBBAD7", "fill7": "#70956C", "fill8": "#A8B1FC",
    "on_fill": "#111112",
}  # fmt: skip

LINES = [LIGHT[f"line{i}"] for i in range(1, 5)]
LINE_LABELS = [LIGHT[f"label{i}"] for i in range(1, 5)]
DASHES: list[list[float]] = [[1, 0], [7, 3], [2, 2], [8, 3, 2, 3]]
RAMP = [LIGHT[f"ramp{i}"] for i in range(1, 6)]
FILLS = [LIGHT[f"fill{i}"] for i in range(1, 9)]
DEEP_FROM = 0.7  # along RAMP: text is on_pale up to here, on_deep above


def config() -> dict[str, Any]:
    """The Vega-Lite config of every chart."""
    return {
        "background": LIGHT["card"],
        "padding": 14,
        "font": FONT,
        "title": {
            "anchor": "start", "frame": "bounds", "offset": 12,
            "fontSize": 15, "fontWeight": 600, "color": LIGHT["ink"],
            "subtitleFontSize": 12.5, "subtitleColor": LIGHT["muted"], "subtitlePadding": 5, "subtitleLineHeight": 16,
        },
        "axis": {
            "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 500,
            "labelColor": LIGHT["muted"], "titleColor": LIGHT["muted"],
            "gridColor": LIGHT["grid"], "domainColor": LIGHT["grid"], "tickColor": LIGHT["grid"],
            "domain": False, "ticks": False, "labelPadding": 6, "titlePadding": 8,
        },
        "legend": {
            "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 500, "labelLimit": 200,
            "labelColor": LIGHT["ink"], "titleColor": LIGHT["muted"], "offset": 10,
        },
        "header": {"labelFontSize": 12, "labelColor": LIGHT["ink"], "title": None},
        "text": {"fontSize": 12, "color": LIGHT["ink"]},
        "view": {"stroke": None},
        "concat": {"spacing": 22},
    }  # fmt: skip


def finish(chart: Any, title: str, subtitle: str | Iterable[str], description: str) -> Any:
    """Give a chart its title, subtitle (a list is one line each), description and the theme.

    Raises InputError for a description too short to replace the picture for someone who cannot see it.
    """
    check_description(description)
    lines = [subtitle] if isinstance(subtitle, str) else list(subtitle)
    heading = alt.TitleParams(text=title, subtitle=lines) if any(lines) else alt.TitleParams(text=title)
    return chart.properties(title=heading, description=description).configure(**config())


def check_description(description: object) -> str:
    """Return the description, or raise InputError where it is missing or under 30 characters."""
    if not isinstance(description, str) or len(description.strip()) < SHORTEST_DESCRIPTION:
        raise InputError(
            f"description = {description!r}: say in at least {SHORTEST_DESCRIPTION} characters what the chart shows"
        )
    return description.strip()


def ramp(domain: tuple[float, float]) -> alt.Scale:
    """The sequential scale over `domain`, clamped: values outside take the end colours."""
    return alt.Scale(domain=list(domain), range=RAMP, clamp=True, interpolate="rgb")
