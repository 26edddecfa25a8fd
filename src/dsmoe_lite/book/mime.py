"""Convert the chapters' own MIME types to HTML, for myst-nb."""

import html
import json
from typing import Any

from docutils import nodes

from dsmoe_lite.labs.results import MIME as RESULT
from dsmoe_lite.viz.renderer import MIME as CHART

WIDGET = "application/vnd.jupyter.widget-view+json"
LAST = 1000  # priority: any other MIME type of the output is shown instead


class Chart:
    """A live chart: its spec and an empty element that static/charts.js draws into; its description is the alt text."""

    mime_priority_overrides = (("html", CHART, 1),)

    @staticmethod
    def handle_mime(renderer: Any, data: Any, inline: bool) -> list[nodes.Element] | None:
        """The HTML of a chart, or None for other outputs."""
        return [nodes.raw("", chart_html(data.content), format="html")] if data.mime_type == CHART else None


class Result:
    """Machine-readable results, which the page does not show."""

    mime_priority_overrides = (("html", RESULT, LAST),)

    @staticmethod
    def handle_mime(renderer: Any, data: Any, inline: bool) -> list[nodes.Element] | None:
        """No nodes for a result, or None for other outputs."""
        return [] if data.mime_type == RESULT else None


class Widget:
    """A placeholder for a widget: static/widgets.js replaces its note if the saved state is enough to show it."""

    mime_priority_overrides = (("html", WIDGET, 1),)

    @staticmethod
    def handle_mime(renderer: Any, data: Any, inline: bool) -> list[nodes.Element] | None:
        """The HTML of a widget, or None for other outputs."""
        return [nodes.raw("", widget_html(data.content), format="html")] if data.mime_type == WIDGET else None


def widget_html(view: dict[str, Any]) -> str:
    """The placeholder of one widget."""
    return (
        f'<div class="saved-widget" data-model="{html.escape(view["model_id"], quote=True)}">'
        '<p class="widget-note">Here JupyterLab shows a control: it needs Python.</p></div>'
    )


def chart_html(spec: dict[str, Any]) -> str:
    """The figure of one chart."""
    alt = html.escape(spec.get("description", ""), quote=True)
    packed = json.dumps(spec, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    return (
        '<figure class="chart">'
        '<div class="chart-controls"></div>'
        f'<div class="chart-drawing" role="img" aria-label="{alt}"></div>'
        '<details class="chart-rows" hidden><summary>The numbers</summary><div tabindex="0"></div></details>'
        f'<script type="application/json">{packed}</script>'
        f"<noscript><p>{alt}</p></noscript>"
        "</figure>"
    )
