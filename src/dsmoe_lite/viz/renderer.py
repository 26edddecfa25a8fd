"""The course's Altair renderer: outputs that JupyterLab draws offline, that GitHub shows, and that compare equal."""

import base64
import io
import json
import math
import re
from typing import Any

import altair as alt

from dsmoe_lite.viz.theme import check_description

MIME = "application/vnd.vegalite.v5+json"  # what JupyterLab 4.6 bundles; Altair 6 would emit v6, which it shows as text
SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
VEGALITE = "5.8"  # the oldest that vl-convert carries: what it draws, JupyterLab draws
SCALE = 1.5
COLOURS = 128
DIGITS = 4
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # vl-convert aborts the process on them
_GIVEN = re.compile(r"(view|param)_(\d+|[0-9a-f]{16}(_\d+)?)")  # names that Altair gives, by a count or a hash


def enable() -> None:
    """Make every Altair chart in this process display through `bundle`."""
    alt.renderers.register("dsmoe", bundle)
    alt.renderers.enable("dsmoe")


def bundle(spec: dict[str, Any], **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The MIME bundle of a chart (live v5 spec, PNG, description) and its metadata.

    Raises InputError for a chart without a description of at least 30 characters.
    """
    description = check_description(spec.get("description"))
    spec = stable(spec)
    picture, width = png(spec)
    data = {MIME: spec, "image/png": base64.b64encode(picture).decode("ascii"), "text/plain": description}
    # JupyterLab would draw on a canvas, which says nothing to a screen reader
    return data, {"image/png": {"width": width}, MIME: {"embed_options": {"renderer": "svg"}}}


def stable(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec as Vega-Lite 5, the same in every run: numbers rounded to 4 significant digits, given names renumbered.

    Altair names views, parameters and data sets by a count over the whole process or by a hash of the unrounded
    numbers; they are renumbered here in order of appearance. Characters that no SVG can hold become U+FFFD.
    """
    names: dict[str, str] = {}
    _collect(spec, names)
    for name in spec.get("datasets", {}):
        names[name] = f"data_{1 + sum(new.startswith('data_') for new in names.values())}"
    text = json.dumps({**_rounded(spec), "$schema": SCHEMA}, ensure_ascii=False)
    if names:
        pattern = re.compile(r"\b(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + r")(?![0-9a-z])")
        text = pattern.sub(lambda match: names[match[1]], text)
    result: dict[str, Any] = json.loads(text)
    return result


def png(spec: dict[str, Any]) -> tuple[bytes, int]:
    """A palette PNG at 1.5 times the chart's size, and the width in px to show it at."""
    import vl_convert
    from PIL import Image

    raw = vl_convert.vegalite_to_png(spec, vl_version=VEGALITE, scale=SCALE)
    image = Image.open(io.BytesIO(raw)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue(), round(image.width / SCALE)


def _collect(node: Any, names: dict[str, str]) -> None:
    if isinstance(node, dict):
        name = node.get("name")
        if isinstance(name, str) and (match := _GIVEN.fullmatch(name)) and name not in names:
            kind = match[1]
            names[name] = f"{kind}_{1 + sum(new.startswith(kind) for new in names.values())}"
        for key, value in node.items():
            if key not in ("values", "datasets"):
                _collect(value, names)
    elif isinstance(node, list):
        for value in node:
            _collect(value, names)


def _rounded(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _rounded(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_rounded(value) for value in node]
    if isinstance(node, float):
        return _round(node)
    if isinstance(node, str):
        return _NO_XML.sub("\ufffd", node)
    return node


def _round(number: float) -> float | int | None:
    if not math.isfinite(number):
        return None
    short = float(f"{number:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
