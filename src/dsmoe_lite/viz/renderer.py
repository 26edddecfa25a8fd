"""The Altair renderer of the course: outputs that JupyterLab draws offline, GitHub shows, and tests compare exactly."""

import base64
import io
import json
import math
import re
from typing import Any

import altair as alt

from dsmoe_lite.viz.theme import check_description

MIME = "application/vnd.vegalite.v5+json"  # bundled with JupyterLab 4.6, which would show Altair 6's own v6 as text
SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
VEGALITE = "5.8"  # the oldest version in vl-convert: what it draws, JupyterLab draws too
SCALE = 1.5  # pixels of the PNG per pixel of the chart
COLOURS = 128  # of the PNG's palette
DIGITS = 4  # significant
_NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # vl-convert would abort the process
_GENERATED_NAME = re.compile(r"(view|param)_(\d+|[0-9a-f]{16}(_\d+)?)")  # by Altair, from a counter or a hash


def enable() -> None:
    """Display every Altair chart of this process through `bundle`."""
    alt.renderers.register("dsmoe", bundle)
    alt.renderers.enable("dsmoe")


def bundle(spec: dict[str, Any], **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the MIME bundle of a chart (live v5 spec, PNG, description) and its metadata.

    Raises InputError if the chart has no description of at least 30 characters.
    """
    description = check_description(spec.get("description"))
    spec = stable(spec)
    picture, width = png(spec)
    data = {MIME: spec, "image/png": base64.b64encode(picture).decode("ascii"), "text/plain": description}
    # by default JupyterLab draws on a canvas, which a screen reader cannot read
    return data, {"image/png": {"width": width}, MIME: {"embed_options": {"renderer": "svg"}}}


def stable(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the spec as Vega-Lite 5, identical in every run: numbers have 4 significant digits, names are renumbered.

    Altair names views, parameters and data sets by a counter of the process or by a hash of the unrounded numbers; here
    they are renumbered in order of appearance. Characters that are invalid in SVG become U+FFFD.
    """
    names: dict[str, str] = {}
    _collect_names(spec, names)
    for name in spec.get("datasets", {}):
        # not "data_1": Vega gives such names to the tables that it derives
        names[name] = f"rows_{1 + sum(new.startswith('rows_') for new in names.values())}"
    text = json.dumps({**_rounded(spec), "$schema": SCHEMA}, ensure_ascii=False)
    if names:
        pattern = re.compile(r"\b(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + r")(?![0-9a-z])")
        text = pattern.sub(lambda match: names[match[1]], text)
    result: dict[str, Any] = json.loads(text)
    return result


def png(spec: dict[str, Any]) -> tuple[bytes, int]:
    """Draw a palette PNG at 1.5 times the chart's size; return it with the width in px at which to show it."""
    import vl_convert
    from PIL import Image

    raw = vl_convert.vegalite_to_png(spec, vl_version=VEGALITE, scale=SCALE)
    image = Image.open(io.BytesIO(raw)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue(), round(image.width / SCALE)


def _collect_names(node: Any, names: dict[str, str]) -> None:
    if isinstance(node, dict):
        name = node.get("name")
        if isinstance(name, str) and (match := _GENERATED_NAME.fullmatch(name)) and name not in names:
            kind = match[1]
            names[name] = f"{kind}_{1 + sum(new.startswith(kind) for new in names.values())}"
        for key, value in node.items():
            if key not in ("values", "datasets"):
                _collect_names(value, names)
    elif isinstance(node, list):
        for value in node:
            _collect_names(value, names)


def _rounded(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _rounded(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_rounded(value) for value in node]
    if isinstance(node, float):
        return _round(node)
    if isinstance(node, str):
        return _NOT_IN_XML.sub("\ufffd", node)
    return node


def _round(number: float) -> float | int | None:
    if not math.isfinite(number):
        return None
    rounded = float(f"{number:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
