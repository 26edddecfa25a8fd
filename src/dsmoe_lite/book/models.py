"""The models that the book's explorers can run without Python: scripts beside the pages, loaded when a reader asks."""

import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from dsmoe_lite.checkpoint import load_model, read_metadata
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.data.tokenizer import read_tokenizer
from dsmoe_lite.viz.packed_model import fingerprint, pack

STATE = "application/vnd.jupyter.widget-state+json"


def write_models(notebooks: Iterable[Path], folder: Path, also: Collection[Path] = ()) -> None:
    """Write models.js, the list of models, and one script for each shipped model that a saved explorer names.

    also: files of models that other pages need.
    """
    wanted = {weights for notebook in notebooks for weights in _named(notebook)}
    shipped = []
    for path in sorted((DATA / "models").glob("*.safetensors")) if wanted or also else []:
        model = load_model(path)
        weights = fingerprint(model)
        if weights in wanted or path in also:
            packed = pack(model, read_tokenizer(read_metadata(path)["tokenizer"]))
            script = folder / "models" / f"{weights}.js"
            script.parent.mkdir(exist_ok=True)
            script.write_text(f'window.dsmoeModels["{weights}"] = {json.dumps(packed)};\n', encoding="utf-8")
            shipped.append(weights)
    lines = [
        "window.dsmoeModels = {};",
        f"window.dsmoeShipped = {json.dumps(shipped)};",
        'window.dsmoeModelFolder = new URL("models/", document.currentScript.src).href;',
    ]
    (folder / "models.js").write_text("\n".join([*lines, ""]), encoding="utf-8")


def _named(notebook: Path) -> Iterator[str]:
    """The fingerprints of the weights that the explorers saved in a notebook name."""
    saved = json.loads(notebook.read_text(encoding="utf-8"))["metadata"].get("widgets", {}).get(STATE, {})
    for widget in saved.get("state", {}).values():
        live: dict[str, Any] = widget["state"].get("live") or {}
        yield from (model["weights"] for model in live.get("models", []))
