"""The still picture that leads from the front page to the playground: the lesson on collapse over ten seeds."""

from math import log10
from statistics import median
from typing import NamedTuple

from dsmoe_lite.book import svg
from dsmoe_lite.book.svg import line, text
from dsmoe_lite.viz.playground import evidence

WIDTH, HEIGHT, LEFT, RIGHT = 520, 168, 170, 492  # px
ROWS = {"a": (84, "A: left alone", svg.MUTED), "b": (116, "B: with a balance loss", svg.MAGENTA)}
TICKS = (0.01, 0.1, 1.0)  # error of the painted picture


class Still(NamedTuple):
    """An SVG, its height in px, and what it shows in words."""

    svg: str
    height: int
    description: str


def playground_picture() -> Still:
    """Draw the final errors of both models of the lesson, a dot per seed, on a logarithmic axis."""
    lesson = evidence()["collapse"]
    title = "Collapse: two routers, ten starts each"
    errors = {model: [float(error) for error in lesson[model]] for model in ROWS}
    middle = {model: f"{median(found):.0%}" for model, found in errors.items()}
    described = (
        f"Sixteen experts learn a picture, in {len(errors['a'])} runs. The router that is left alone ends with an error"
        f" of {middle['a']} (median), the one with a balance loss with {middle['b']}."
    )
    drawn = [
        text(20, 32, title, size=15, weight=650),
        text(20, 52, "Share of the picture that is not learnt, a dot per start; left is better.", color=svg.MUTED),
    ]
    for tick in TICKS:
        drawn.append(line(_x(tick), 66, _x(tick), 132, svg.IDLE))
        drawn.append(text(_x(tick), 148, f"{tick:.0%}", color=svg.MUTED, size=11, anchor="middle"))
    for model, (y, name, color) in ROWS.items():
        drawn.append(text(20, y + 4, name))
        drawn += [
            f'<circle cx="{_x(error):.1f}" cy="{y}" r="5" fill="{color}" fill-opacity="0.6"/>'
            for error in errors[model]
        ]
    return Still(svg.drawing(WIDTH, HEIGHT, title, described, drawn), HEIGHT, described)


def _x(error: float) -> float:
    return LEFT + (RIGHT - LEFT) * (log10(error) - log10(TICKS[0])) / (log10(TICKS[-1]) - log10(TICKS[0]))
