"""How a chapter's outputs become HTML where myst-nb alone would not know."""

import html
import json
from typing import Any

from docutils import nodes  # type: ignore[import-untyped]

from dsmoe_lite.viz.renderer import MIME as CHART

RESULT = "application/vnd.dsmoe.result+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
LAST = 1000


class Chart:
    """A live chart: its spec beside an empty drawing, which static/charts.js fills; its description is the alt text."""

    mime_priority_overrides = (("html", CHART, 1),)

    @staticmethod
    def handle_mime(renderer: Any, data: Any, inline: bool) -> list[nodes.Element] | None:
        """Return the chart's HTML, or None for other outputs."""
        return [nodes.raw("", chart_html(data.content), format="html")] if data.mime_type == CHART else None


class Result:
    """Values for machines: nothing to see."""

    mime_priority_overrides = (("html", RESULT, LAST),)

    @staticmethod
    def handle_mime(renderer: Any, data: Any, inline: bool) -> list[nodes.Element] | None:
        """Return no nodes for a result, or None for other outputs."""
        return [] if data.mime_type == RESULT else None


class Widget:
    """A place for a widget: static/widgets.js fills it where the saved state suffices; else its note stays."""

    mime_priority_overrides = (("html", WIDGET, 1),)

    @staticmethod
    def handle_mime(renderer: Any, data: Any, inline: bool) -> list[nodes.Element] | None:
        """Return the widget's HTML, or None for other outputs."""
        return [nodes.raw("", widget_html(data.content), format="html")] if data.mime_type == WIDGET else None


def widget_html(view: dict[str, Any]) -> str:
    """The place of one widget."""
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
        f'<div class="chart-drawing" role="img" tabindex="0" aria-label="{alt}"></div>'
        f'<script type="application/json">{packed}</script>'
        f"<noscript><p>{alt}</p></noscript>"
        "</figure>"
    )
