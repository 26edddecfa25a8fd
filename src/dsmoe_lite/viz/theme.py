"""The look of every chart: fonts, a palette of colours by role for light and dark pages, and the Vega-Lite config.

Charts are drawn on a white card in LIGHT, which reads well on JupyterLab's light and dark pages and on GitHub. A stored
Vega-Lite spec contains only literal colours, so the book redraws a chart in DARK by looking up each light colour in the
palette. No two roles may therefore share a light colour: roles that look alike, such as line1 and starved, differ in
the last digit.

Text marks have a `style` if the book draws them otherwise on a phone (book/static/narrow.js): `in_cell` and
`in_segment` shrink or vanish where they do not fit, `line_name` at the end of a line becomes an entry of a legend,
`row_name` and `row_text` beside a row move into it, `row_place` vanishes.
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
    # lines, dots and bars that stand for no model of the course, and text beside them
    "line1": ("#44546F", "#A9BAD6"),
    "line2": ("#009E73", "#2FC79A"),
    "line3": ("#A87400", "#E3B341"),
    "line4": ("#B83280", "#F07AB4"),
    "line1_label": ("#3B4A63", "#AABBD7"),
    "line2_label": ("#007A58", "#30C89B"),
    "line3_label": ("#805800", "#E4B442"),
    "line4_label": ("#9E2A6E", "#F17BB5"),
    # models and kinds of attention: lines, dots and bars, variants, text beside them (viz/identity.py)
    "dense": ("#6B7480", "#9AA6B5"),
    "dense_tint": ("#8A939E", "#7B8694"),
    "dense_label": ("#59636F", "#9BA7B6"),
    "hash": ("#7A8FC9", "#A9B8EA"),
    "hash_tint": ("#7B90CA", "#AAB9EB"),
    "hash_label": ("#5568B0", "#ABBAEC"),
    "switch": ("#4694CE", "#8CCBF0"),
    "switch_tint": ("#4795CF", "#8DCCF1"),
    "switch_label": ("#2A74AD", "#8ECDF2"),
    "gshard": ("#0072B2", "#56B4E9"),
    "gshard_tint": ("#4A9ACB", "#3E7FA6"),
    "gshard_label": ("#00639C", "#57B5EA"),
    "deepseekmoe": ("#D55E00", "#FF8C42"),
    "deepseekmoe_tint": ("#E08A4A", "#C0703A"),
    "deepseekmoe_label": ("#B04D00", "#FF8D43"),
    "mha": ("#77706C", "#B5AEA9"),
    "mha_tint": ("#78716D", "#B6AFAA"),
    "mha_label": ("#66605C", "#B7B0AB"),
    "gqa": ("#0B7F82", "#3CC4C6"),
    "gqa_tint": ("#0C8083", "#3DC5C7"),
    "gqa_label": ("#0A6F72", "#3EC6C8"),
    "mqa": ("#2F9FA2", "#8FE0E1"),
    "mqa_tint": ("#30A0A3", "#90E1E2"),
    "mqa_label": ("#1C7A7D", "#91E2E3"),
    "mla": ("#7B4FB5", "#B794F0"),
    "mla_tint": ("#9B78CC", "#8E6CC4"),
    "mla_label": ("#6B41A3", "#B895F1"),
    # frames and marks that point something out
    "frame": ("#E0A100", "#FFC83D"),
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
    "starved": ("#8790A0", "#7A8494"),
    "fair": ("#B8BFC9", "#5C6675"),
    "overloaded": ("#2E3A4A", "#DCE3EC"),
    # kinds of text, devices
    "fill1": ("#897CED", "#897DED"),
    "fill2": ("#C7D554", "#C7D555"),
    "fill3": ("#C77099", "#C7709A"),
    "fill4": ("#92DDA5", "#92DDA6"),
    "fill5": ("#958F00", "#958F01"),
    "fill6": ("#FBBAD6", "#FBBAD7"),
    "fill7": ("#70956B", "#70956C"),
    "fill8": ("#A8B1FB", "#A8B1FC"),
    # components of a model
    "part1": ("#DED9C8", "#DED9C9"),
    "part2": ("#C3BCA4", "#C3BCA5"),
    "part3": ("#B79AD6", "#B79AD7"),
    "part4": ("#DCCBEF", "#DCCBF0"),
    "part5": ("#9AA6B4", "#9AA6B6"),
    "part6": ("#EFEFF0", "#EFEFF1"),
    "part7": ("#F2C14E", "#F2C14F"),
    "part8": ("#7FB6E0", "#7FB6E1"),
    "part9": ("#7D8590", "#7D8591"),
    # two groups of one kind, such as the halves of a batch
    "group1": ("#8E9DB8", "#8E9DB9"),
    "group2": ("#D5DCE8", "#D5DCE9"),
    # text on a fill, a part or a group
    "on_fill": ("#111111", "#111112"),
}
LIGHT = {role: light for role, (light, _) in PALETTE.items()}
DARK = {role: dark for role, (_, dark) in PALETTE.items()}

N_LINES = 4  # that can be distinguished in one panel
DASHES: list[list[float]] = [[1, 0], [7, 3], [2, 2], [8, 3, 2, 3]]
RAMP = [LIGHT[f"ramp{i}"] for i in range(1, 6)]
GROUPS = [LIGHT["group1"], LIGHT["group2"]]
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
