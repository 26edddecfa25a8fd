"""What the course's pictures share: their card, their text, and the style that gives them a dark form.

A picture is written in light colours. On a dark page the style replaces each of them by its dark counterpart. It asks
`prefers-color-scheme`, which inside an <img> follows the `color-scheme` of the page: the switches of the book and of
GitHub work too. A program that reads no styles draws the light form, which is readable on any page.
"""

import html
from collections.abc import Iterable

CARD, INK, MUTED, IDLE, BORDER, EDGE = "#FFFFFF", "#1B1F24", "#5B6470", "#E6E8EB", "#C9CED6", "#9AA3AF"
BLUE, ORANGE, GREEN, MAGENTA = "#0072B2", "#D55E00", "#009E73", "#B83280"
DARK = {  # light -> dark
    CARD: "#14181F",  # also text on a filled shape
    INK: "#E8EBF0",
    MUTED: "#A6AEBB",
    IDLE: "#2A313C",
    BORDER: "#3D4654",
    EDGE: "#7A8492",
    "#B8BFC9": "#6B7482",  # a fair load
    "#F7F8FA": "#1C232D",  # boxes on the card
    "#BBD7EE": "#1C3A57",  # pale blue
    "#F2C8A6": "#7A4A28",  # pale orange
    BLUE: "#56B4E9",
    ORANGE: "#FF8C42",
    GREEN: "#2FC79A",
    "#007A58": "#30C89B",
    "#AA4499": "#E07BC8",
    MAGENTA: "#F07AB4",
    "#6B7480": "#9AA6B5",  # the dense model
    "#7A8FC9": "#A9B8EA",  # Hash
    "#4694CE": "#8CCBF0",  # Switch
    "#B04D00": "#FF8D43",
}
SAME = {"#897CED", "#C7D554", "#C77099", "#92DDA5", "#958F00", "#111111"}  # fills, and the ink on them
RULES = [f'[{kind}="{light}"]{{{kind}:{dark}}}' for light, dark in DARK.items() for kind in ("fill", "stroke")]
DARK_STYLE = f"<style>@media (prefers-color-scheme: dark) {{ {' '.join(RULES)} }}</style>"
FONT = "Inter, 'Source Sans 3', system-ui, sans-serif"


def drawing(width: float, height: float, title: str, description: str, content: Iterable[str]) -> str:
    """A picture: `content` on a card, with a title and a description for those who cannot see it."""
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    role = f'role="img" aria-labelledby="title desc" font-family="{FONT}"'
    card = f'x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="12" fill="{CARD}" stroke="{BORDER}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {role}>',
            f'<title id="title">{html.escape(title)}</title>',
            f'<desc id="desc">{html.escape(description)}</desc>',
            DARK_STYLE,
            f"<rect {card}/>",
            *content,
            "</svg>\n",
        ]
    )


def text(
    x: float, y: float, words: str, *, size: float = 12.5, color: str = INK, weight: int = 400, anchor: str = "start"
) -> str:
    """One line of text whose baseline is at y."""
    style = f'font-size="{size:g}" font-weight="{weight}" fill="{color}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{html.escape(words)}</text>'


def line(x0: float, y0: float, x1: float, y1: float, color: str, width: float = 1) -> str:
    """A straight line."""
    return f'<line x1="{x0:.5g}" y1="{y0:g}" x2="{x1:.5g}" y2="{y1:g}" stroke="{color}" stroke-width="{width:g}"/>'
