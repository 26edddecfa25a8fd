"""What pages need to run models without Python: the scripts that compute, and each model as a script.

The book has them beside its pages; JupyterLab's server lends them to explorers that no kernel answers.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from dsmoe_lite.checkpoint import load_model, read_metadata
from dsmoe_lite.common.paths import DATA, cache
from dsmoe_lite.data.tokenizer import read_tokenizer
from dsmoe_lite.viz.packed_model import fingerprint, pack

SCRIPTS = tuple(Path(__file__).parent / "static" / f"{name}.js" for name in ("engine", "compute", "answers"))
KEPT_DAYS = 30  # that a lent folder is kept after its last use
LENT = "dsmoe"  # the folder below the server's static/, known to explorer/without_kernel.js
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


def lent_folder(notebooks: Collection[Path]) -> Path:
    """Return a folder for the server's static files, with the scripts and models of these notebooks in `LENT`.

    It is kept in the cache and made again after a change. Raises OSError if the cache cannot be written.
    """
    sources = [*sorted(notebooks), *sorted((DATA / "models").glob("*.safetensors")), *SCRIPTS]
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    folder = cache() / "lent" / hashlib.sha256(repr(states).encode()).hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.iterdir():  # a server of another clone may lend from a newer one
        if time.time() - other.stat().st_mtime > KEPT_DAYS * 86_400:
            shutil.rmtree(other, ignore_errors=True)
    if folder.exists():
        folder.touch()
    else:
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        (made / LENT).mkdir()
        for script in SCRIPTS:
            shutil.copy(script, made / LENT)
        write_models(notebooks, made / LENT)
        try:
            made.rename(folder)
        except OSError:  # another server has just made it, or the cache cannot be written
            shutil.rmtree(made, ignore_errors=True)
            if not folder.exists():
                raise
    return folder


def _named(notebook: Path) -> Iterator[str]:
    """The fingerprints of the weights that the explorers saved in a notebook name."""
    saved = json.loads(notebook.read_text(encoding="utf-8"))["metadata"].get("widgets", {}).get(STATE, {})
    for widget in saved.get("state", {}).values():
        live: dict[str, Any] = widget["state"].get("live") or {}
        yield from (model["weights"] for model in live.get("models", []))
