"""The settings of JupyterLab for the course, written only into this environment."""

import sys
from pathlib import Path
from typing import Any

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.files import read_json, write_json

SETTINGS: dict[str, dict[str, Any]] = {
    # A chapter's .py source opens as a notebook.
    "@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"python": "Jupytext Notebook"}},
    # A saved chapter keeps its widgets, and shows them before any cell is run.
    "@jupyter-widgets/jupyterlab-manager:plugin": {"saveState": True},
    # No pop-ups about news or new versions, and no requests for them.
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    # Arrow keys move the slider of a chart, and do not leave its cell.
    "@jupyterlab/shortcuts-extension:shortcuts": {
        "shortcuts": [
            {"command": f"notebook:move-cursor-heading-{command}", "keys": [key], "disabled": True,
             "selector": ".jp-Notebook.jp-mod-commandMode:not(.jp-mod-readWrite) :focus"}
            for key, command in (("ArrowLeft", "above-or-collapse"), ("ArrowRight", "below-or-expand"))
        ]
    },
}  # fmt: skip


def overrides_path(prefix: Path | None = None) -> Path:
    """The file from which JupyterLab reads the defaults of an environment."""
    return (prefix or Path(sys.prefix)) / "share" / "jupyter" / "lab" / "settings" / "overrides.json"


def write_settings(path: Path) -> bool:
    """Merge SETTINGS into the file at `path` and keep its other settings; return whether the file changed."""
    try:
        before = read_json(path)
    except InputError:
        before = {}
    after = dict(before)
    for plugin, values in SETTINGS.items():
        after[plugin] = {**before.get(plugin, {}), **values}
    if after == before:
        return False
    write_json(path, after)
    return True


if __name__ == "__main__":
    write_settings(overrides_path())
