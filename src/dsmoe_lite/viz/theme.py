"""The look of every chart: fonts, a palette of colours by role for light and dark pages, and the Vega-Lite config.

Charts are drawn on a white card in LIGHT, which reads well on JupyterLab's light and dark pages and on GitHub. A stored
Vega-Lite spec contains only literal colours, so the book redraws a chart in DARK by looking up each light colour in the
palette. No two roles may therefore share a light colour: roles that look alike, such as line1 and starved, differ in
the last digit.

Text marks have a `style` if the book draws them otherwise on a phone (book/static/narrow.js): `in_cell` and
`in_segment` shrink or vanish where they do not fit, `line_name` at the end of a line becomes an entry of a legend,
`row_text` right of a row moves into it.
"""

from collections.abc import Iterable
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError

FONT = "Inter, 'Source Sans 3', system-ui, sans-serif"
MONO = "'JetBrains Mono', 'DejaVu Sans Mono', monospace"
MAX_WIDTH = 720  # px, including axes and labels
MIN_DESCRIPTION = 30  # characters
MIN_FONT_SIZE = 9.5  # px

PALETTE = {  # role: (light, dark)
    # background, text, secondary text, grid lines
    "card": ("#FFFFFF", "#14181F"),
    "ink": ("#1B1F24", "#E8EBF0"),
    "muted": ("#5B6470", "#A6AEBB"),
    "grid": ("#E6E8EB", "#2A313C"),
    # lines, dots and bars
    "line1": ("#0072B2", "#56B4E9"),
    "line2": ("#D55E00", "#FF8C42"),
    "line3": ("#009E73", "#2FC79A"),
    "line4": ("#AA4499", "#E07BC8"),
    # text in the colour of a line
    "label1": ("#00639C", "#57B5EA"),
    "label2": ("#B04D00", "#FF8D43"),
    "label3": ("#007A58", "#30C89B"),
    "label4": ("#96388A", "#E17CC9"),
    # a sequential scale, low to high
    "ramp1": ("#F4F7FA", "#1C232D"),
    "ramp2": ("#BBD7EE", "#1C3A57"),
    "ramp3": ("#6AAAD8", "#1D4B73"),
    "ramp4": ("#1F6FB2", "#4484BA"),
    "ramp5": ("#0B3A66", "#BFE0F8"),
    # text on the scale, below and above DEEP_FROM
    "on_pale": ("#010203", "#FCFDFE"),
    "on_deep": ("#FEFEFE", "#030405"),
    # load of an expert
    "starved": ("#0173B3", "#58B6EB"),
    "fair": ("#B8BFC9", "#6B7482"),
    "overloaded": ("#D45F01", "#FF8E44"),
    # categories in stacked bars, devices
    "fill1": ("#897CED", "#897DED"),
    "fill2": ("#C7D554", "#C7D555"),
    "fill3": ("#C77099", "#C7709A"),
    "fill4": ("#92DDA5", "#92DDA6"),
    "fill5": ("#958F00", "#958F01"),
    "fill6": ("#FBBAD6", "#FBBAD7"),
    "fill7": ("#70956B", "#70956C"),
    "fill8": ("#A8B1FB", "#A8B1FC"),
    # text on a fill
    "on_fill": ("#111111", "#111112"),
}
LIGHT = {role: light for role, (light, _) in PALETTE.items()}
DARK = {role: dark for role, (_, dark) in PALETTE.items()}

LINES = [LIGHT[f"line{i}"] for i in range(1, 5)]
LINE_LABELS = [LIGHT[f"label{i}"] for i in range(1, 5)]
DASHES: list[list[float]] = [[1, 0], [7, 3], [2, 2], [8, 3, 2, 3]]
RAMP = [LIGHT[f"ramp{i}"] for i in range(1, 6)]
FILLS = [LIGHT[f"fill{i}"] for i in range(1, 9)]
DEEP_FROM = 0.7  # share of RAMP above which text is on_deep, not on_pale


def config() -> dict[str, Any]:
    """Return the Vega-Lite config of every chart."""
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
    """Add title, subtitle (a list has one line per entry), description and theme to a chart.

    Raises InputError if the description is too short to replace the picture for a reader who cannot see it.
    """
    check_description(description)
    lines = [subtitle] if isinstance(subtitle, str) else list(subtitle)
    heading = alt.TitleParams(text=title, subtitle=lines) if any(lines) else alt.TitleParams(text=title)
    return chart.properties(title=heading, description=description).configure(**config())


def check_description(description: object) -> str:
    """Return the description without outer spaces. Raises InputError if it is missing or shorter than 30 characters."""
    if not isinstance(description, str) or len(description.strip()) < MIN_DESCRIPTION:
        raise InputError(
            f"description = {description!r}: describe what the chart shows in at least {MIN_DESCRIPTION} characters"
        )
    return description.strip()


def ramp(domain: tuple[float, float]) -> alt.Scale:
    """Return the sequential colour scale over `domain`; values outside are clamped to the end colours."""
    return alt.Scale(domain=list(domain), range=RAMP, clamp=True, interpolate="rgb")
