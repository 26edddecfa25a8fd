"""The folder that JupyterLab's server lends to explorers without a kernel."""

import os
import re

import pytest

from dsmoe_lite.common import paths
from dsmoe_lite.labs import jupyter_server
from dsmoe_lite.viz.page_models import LENT, SCRIPTS, lent_folder

WITH_EXPLORERS = [paths.NOTEBOOKS / "00_start_here.ipynb"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_has_the_scripts_and_the_models_that_saved_explorers_name(cache):
    folder = lent_folder(WITH_EXPLORERS) / LENT
    assert {script.name for script in SCRIPTS} | {"models.js"} == {path.name for path in folder.glob("*.js")}
    (model,) = (folder / "models").glob("*.js")
    assert f'"{model.stem}"' in (folder / "models.js").read_text(encoding="utf-8")
    saved = WITH_EXPLORERS[0].read_text(encoding="utf-8")
    assert re.search(rf'"weights": "{model.stem}"', saved)


def test_it_is_made_once_and_again_after_a_change(cache, tmp_path):
    notebook = tmp_path / "00_a.ipynb"
    notebook.write_bytes(WITH_EXPLORERS[0].read_bytes())
    first = lent_folder([notebook])
    made_at = (first / LENT / "models.js").stat().st_mtime_ns
    assert lent_folder([notebook]) == first
    assert (first / LENT / "models.js").stat().st_mtime_ns == made_at
    os.utime(notebook, (1, 1))
    second = lent_folder([notebook])
    assert second != first
    assert {*(cache / "lent").iterdir()} == {first, second}  # nothing half-made
    os.utime(first, (1, 1))
    lent_folder([notebook])
    assert {*(cache / "lent").iterdir()} == {second}  # what was not used for a month is gone


def test_a_cache_that_cannot_be_written_leaves_the_server_without_it(cache):
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file in the way")
    assert jupyter_server._lent() == []
