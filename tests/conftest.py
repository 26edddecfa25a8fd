"""Fixtures that test files share: a small course of one chapter, the slowness of this machine, a headless browser."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from dsmoe_lite.common import paths
from dsmoe_lite.common.machine import find_chromium

settings.register_profile("course", deadline=None)  # how long an example takes depends on what else runs
settings.load_profile("course")

HEADER = """\
# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A small chapter

# %% tags=["parameters"]
profile: str = "cpu"  # size of the run: smoke | cpu | gpu
seed: int = 0  # seed of weights and data order: 0..2147483647
top_k: int = 2  # experts a token visits: 1..4
capacity_factor: float = 1.25  # slots over the fair share: 0.5..8.0

# %%
from dsmoe_lite.labs import check_parameters

check_parameters(globals())
"""

CELLS = """
# %%
import sys
import time

print("top_k", top_k, "capacity", capacity_factor)
print("a warning", file=sys.stderr)

# %% tags=["trained"]
from dsmoe_lite.labs import claim

claim("loss", 3 + top_k / 3, (3.0, 5.0))

# %% tags=["measured"]
time.time()

# %%
import ipywidgets

ipywidgets.IntSlider(value=top_k)

# %%
from dsmoe_lite.common.progress import progress

for step in progress(range(3)):
    print(step)
"""

BOOK = """\
title: Small
toc: {format: jb-book, root: notebooks/03_small, chapters: []}
"""


def pytest_configure() -> None:
    """Restore SIGINT for tests that send it: under a shell's background job it would be ignored, in children too."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


REFERENCE_SECONDS = 1.0  # what `slowness` measures on the idle reference machine, see notebooks/pages/run_times.md
SCREENSHOTS = paths.REPOSITORY / "build" / "screenshots"  # what CI keeps of a run


class Course:
    """A repository in a folder with a space in its name; `write` adds a chapter."""

    def __init__(self, root: Path) -> None:
        self.root, self.notebooks, self.runs = root, root / "notebooks", root / "runs"
        self.notebooks.mkdir(parents=True)
        (root / "book.yml").write_text(BOOK, encoding="utf-8")

    def write(self, cells: str = CELLS, name: str = "03_small") -> Path:
        """Write the chapter's .py and, unexecuted, its .ipynb; return the .ipynb."""
        import jupytext

        source = self.notebooks / f"{name}.py"
        source.write_text(HEADER + cells, encoding="utf-8")
        jupytext.write(jupytext.read(source), source.with_suffix(".ipynb"))
        return source.with_suffix(".ipynb")

    def files(self) -> set[str]:
        """Every file under the root."""
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()}


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Course:
    """A small course that the package takes for its own repository."""
    small = Course(tmp_path / "a course")
    monkeypatch.setattr(paths, "REPOSITORY", small.root)
    monkeypatch.setattr(paths, "FOLDER", small.root)
    monkeypatch.setattr(paths, "NOTEBOOKS", small.notebooks)
    monkeypatch.setattr(paths, "RUNS", small.runs)
    monkeypatch.setattr(paths, "WORK", small.root / "work")
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    return small


@pytest.fixture(scope="session")
def slowness() -> float:
    """How many times slower than the idle reference machine this machine is now: CPU time of a short training."""
    import torch

    from dsmoe_lite.model import Transformer
    from dsmoe_lite.presets import preset

    torch.set_num_threads(1)
    model, tokens = Transformer(preset("course-dense")), torch.randint(0, 1024, (32, 65))
    start = time.process_time()
    for _ in range(20):
        torch.nn.functional.cross_entropy(
            model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()
        ).backward()
    return max(1.0, (time.process_time() - start) / REFERENCE_SECONDS)


@pytest.fixture(scope="session")
def screenshots() -> Path:
    """The folder for screenshots, for people to look at."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    return SCREENSHOTS


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium without network access; if there is none, skip, or fail if DSMOE_REQUIRE names `browser`."""
    from playwright.sync_api import sync_playwright

    chromium = find_chromium()
    if chromium is None:
        missing = "chromium not found: apt install chromium"
        if "browser" in os.environ.get("DSMOE_REQUIRE", "").split(","):
            pytest.fail(missing)
        pytest.skip(missing)
    quiet = ["background-networking", "component-update", "sync", "quic"]
    flags = ["--no-sandbox", "--no-first-run", *(f"--disable-{service}" for service in quiet)]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield running
        running.close()
