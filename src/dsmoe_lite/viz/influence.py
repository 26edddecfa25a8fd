"""The chart `influence`: which outputs of a layer change if one of its input tokens changes?"""

from collections.abc import Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.helpers import CHARACTER_WIDTH, data, distinct, require_rows, word_list

MAX_PANELS, MAX_CELL, GAP = 2, 30, 24  # px: size of a cell, distance of the panels


def influence(
    rows: Sequence[dict[str, Any]],
    *,
    title: str = "Whose output changes?",
    subtitle: str | Sequence[str] = "",
    description: str = "",
) -> alt.HConcatChart:
    """Draw one panel per part: a row per token whose input is changed, a column per token whose output is compared.

    rows: {part, input, output, changes}; input and output are tokens, and changes is true or false. At most two parts.
    """
    require_rows(rows, "part", "input", "output", "changes")
    parts, tokens = distinct(row["part"] for row in rows), distinct(row["input"] for row in rows)
    if len(parts) > MAX_PANELS:
        raise InputError(f"parts = {len(parts)}: at most {MAX_PANELS} panels fit side by side")
    cells = [{**row, "changes": "changes" if row["changes"] else "stays"} for row in rows]
    n_changed = {part: sum(cell["part"] == part and cell["changes"] == "changes" for cell in cells) for part in parts}
    if not description:
        found = word_list([f"{part}: {n} of {len(tokens) ** 2} pairs" for part, n in n_changed.items()])
        description = f"Grid of changed input tokens by outputs that change. {found}."
    subtitle = subtitle or "Row: the token that is changed. Filled: this column's output changes."
    label_width = int(max(map(len, tokens)) * 12 * CHARACTER_WIDTH) + 8
    available = theme.MAX_WIDTH - 80 - label_width - GAP * (len(parts) - 1)
    size = min(MAX_CELL, available // (len(parts) * len(tokens)))
    panels = [
        _panel([cell for cell in cells if cell["part"] == part], tokens, 0 if i else label_width).properties(
            width=size * len(tokens),
            height=size * len(tokens),
            title=alt.TitleParams(part, fontSize=12.5, offset=6, frame="group"),
        )
        for i, part in enumerate(parts)
    ]
    return theme.finish(alt.hconcat(*panels, spacing=GAP), title, subtitle, description)


def _panel(cells: list[dict[str, Any]], tokens: list[str], label_width: int) -> Any:
    """`label_width`: px for the names of the rows, 0 to leave them out."""
    x = alt.X("output:N", sort=tokens, title="output of", axis=alt.Axis(orient="top", labelAngle=-60))
    y = alt.Y("input:N", sort=tokens, title="input changed" if label_width else None,
              axis=alt.Axis(labels=label_width > 0, minExtent=label_width, labelColor=theme.LIGHT["ink"]))  # fmt: skip
    scale = alt.Scale(domain=["stays", "changes"], range=[theme.LIGHT["ramp1"], theme.LIGHT["ramp4"]])
    color = alt.Color("changes:N", scale=scale, legend=None)
    return (
        alt.Chart(data(cells))
        .mark_rect(stroke=theme.LIGHT["card"], strokeWidth=2)
        .encode(x=x, y=y, color=color, tooltip=["input:N", "output:N", "changes:N"])
    )
