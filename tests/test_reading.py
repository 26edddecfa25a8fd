"""What a chapter asks of its reader: words, charts, visible code, and the minutes that its first lines state."""

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from dsmoe_lite.common import paths
from dsmoe_lite.viz.renderer import MIME as CHART

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("[0-9]*.ipynb"))
WORDS, CHARTS, LINES, MINUTES = 1800, 8, 350, 35  # the most of a chapter
COLUMNS = 88  # of visible code: what the book shows without scrolling
LONGER = {"08", "09", "10", "12"}  # not yet written to these limits
STATED = re.compile(r"\*\*Reading\s+time\*\* (\d+)\s+minutes")
IN_THE_MAP = re.compile(r"^\| (\d\d) .*\| (\d+) \|$", re.MULTILINE)
MATHS = re.compile(r"\$\$.*?\$\$(?: \(eq:[\w-]+\))?", re.DOTALL)
FENCE = re.compile(r"```.*?```", re.DOTALL)
PICTURE = re.compile(r"!\[.*?\]\(.*?\)", re.DOTALL)


def until_exercises(path: Path) -> Iterator[nbformat.NotebookNode]:
    """The cells that are read: all before the exercises."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            before = re.split(r"^## (?:An )?[Ee]xercise", cell.source, flags=re.MULTILINE)
            yield nbformat.from_dict({**cell, "source": before[0]})
            if len(before) > 1:
                return
        else:
            yield cell


def is_visible(cell: nbformat.NotebookNode) -> bool:
    return not {"hide-input", "hide-cell", "remove-input", "remove-cell"} & set(cell.metadata.get("tags", []))


def reading(path: Path) -> dict[str, int]:
    """Words, charts and visible lines of code before the exercises, and minutes: 200 words, 3 charts, 15 lines each."""
    words = charts = lines = 0
    for cell in until_exercises(path):
        if cell.cell_type == "markdown":
            prose = PICTURE.sub(" ", FENCE.sub(" ", MATHS.sub(" equation ", cell.source)))
            words += sum(bool(re.search(r"\w", word)) for word in prose.split())
            charts += len(PICTURE.findall(cell.source))
        elif cell.cell_type == "code":
            charts += sum(CHART in output.get("data", {}) for output in cell.outputs)
            if is_visible(cell):
                lines += sum(bool(line.strip()) for line in cell.source.splitlines())
    return {"words": words, "charts": charts, "lines": lines, "minutes": round(words / 200 + charts / 3 + lines / 15)}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_chapter_states_the_minutes_that_it_takes(notebook: Path) -> None:
    found, text = reading(notebook), nbformat.read(notebook, as_version=4).cells[0].source
    print(notebook.stem, found)
    number, start = notebook.name[:2], nbformat.read(NOTEBOOKS[0], as_version=4)
    in_the_map = dict(IN_THE_MAP.findall("\n".join(cell.source for cell in start.cells)))
    assert abs(int(in_the_map[number]) - found["minutes"]) <= 2, found
    assert abs(int(STATED.search(text)[1]) - found["minutes"]) <= 2, found
    if number not in LONGER:
        assert found["words"] <= WORDS
        assert found["charts"] <= CHARTS
        assert found["lines"] <= LINES
        assert found["minutes"] <= MINUTES


WRITTEN = [path for path in NOTEBOOKS if path.name[:2] not in LONGER]


@pytest.mark.parametrize("notebook", WRITTEN, ids=lambda path: path.stem)
def test_visible_code_fits_the_page(notebook: Path) -> None:
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    # a parameter's comment stands on its own line of code, so a long default cannot be wrapped
    code = [cell for cell in cells if is_visible(cell) and "parameters" not in cell.metadata.get("tags", [])]
    lines = [line for cell in code for line in cell.source.splitlines()]
    assert [line for line in lines if len(line) > COLUMNS] == []
