"""The scripts of saved widgets as files beside the pages: a strict content security policy forbids any other import."""

import json
from collections.abc import Iterable
from pathlib import Path

from dsmoe_lite.viz.page_models import STATE


def write_modules(notebooks: Iterable[Path], folder: Path) -> None:
    """Write the script of each saved anywidget of `notebooks` to folder/modules, named by what it contains."""
    for notebook in notebooks:
        saved = json.loads(notebook.read_text(encoding="utf-8"))["metadata"].get("widgets", {}).get(STATE, {})
        for widget in saved.get("state", {}).values():
            if script := widget["state"].get("_esm"):
                path = folder / "modules" / f"{name_of(script)}.js"
                path.parent.mkdir(exist_ok=True)
                path.write_text(script, encoding="utf-8", newline="\n")


def name_of(script: str) -> str:
    """Its length and its FNV-1a hash of 32 bits, over UTF-16 code units: static/widgets.js computes the same."""
    units = script.encode("utf-16-le")
    found = 0x811C9DC5
    for low, high in zip(units[::2], units[1::2], strict=True):
        found = ((found ^ (low | high << 8)) * 0x01000193) & 0xFFFFFFFF
    return f"{len(units) // 2}-{found:08x}"
