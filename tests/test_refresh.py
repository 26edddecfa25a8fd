"""Reference outputs: refreshing twice changes nothing, and nbval compares each kind of cell by its rules."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import RunError
from dsmoe_lite.labs.refresh import refresh_chapter
from dsmoe_lite.labs.results import MIME, read_result

PYTEST = [
    sys.executable,
    "-m",
    "pytest",
    "-c",
    str(paths.REPOSITORY / "pyproject.toml"),
    "-p",
    "no:cacheprovider",
    "-q",
]


def test_a_second_refresh_changes_no_byte(course):
    source = course.write().with_suffix(".py")
    assert refresh_chapter(source)
    target = source.with_suffix(".ipynb")
    first = target.read_bytes()
    assert not refresh_chapter(source)
    assert target.read_bytes() == first
    notebook = nbformat.read(target, as_version=4)
    nbformat.validate(notebook)
    assert read_result(target) == {"loss": 3.667}
    widgets = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    assert sorted(widgets) == [f"{number:032x}" for number in range(len(widgets))]
    assert len(widgets) >= 3  # slider, layout, style
    text = first.decode()
    assert "a warning\\n" not in text
    assert "it/s" not in text
    assert sys.version.split()[0] not in text
    assert refresh_chapter(source, measure=True)
    assert target.read_bytes() != first


def test_refresh_refuses_a_large_notebook_and_a_failing_cell(course):
    target = course.write('\n# %%\nprint("x" * 1_100_000)\n')
    before = target.read_bytes()
    with pytest.raises(RunError, match=r"over the limit of 1,000,000.*print"):
        refresh_chapter(target.with_suffix(".py"))
    assert target.read_bytes() == before
    target = course.write("\n# %%\n1 / 0\n")
    before = target.read_bytes()
    with pytest.raises(RunError, match=r"cell In \[3\] stopped with ZeroDivisionError"):
        refresh_chapter(target.with_suffix(".py"))
    assert target.read_bytes() == before


def _change(path: Path, copy: Path, changes: dict[str, tuple[str, str]]) -> None:
    """Copy the notebook and edit stored outputs: replace `old` by `new` in the cell whose source contains the key."""
    notebook = nbformat.read(path, as_version=4)
    for part, (old, new) in changes.items():
        (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and part in cell.source]
        text = json.dumps(cell.outputs)
        assert re.search(old, text), (part, text)
        cell.outputs = nbformat.from_dict(json.loads(re.sub(old, new, text)))
    nbformat.write(notebook, copy)


def test_nbval_compares_by_the_kind_of_cell(course):
    target = course.write()
    refresh_chapter(target.with_suffix(".py"))
    allowed = {
        "claim(": ("3.667", "3.668"),
        "time.time()": (r"\d{9}", "123456789"),
        "IntSlider": ("value=2", "value=3"),
    }
    _change(target, course.notebooks / "allowed.ipynb", allowed)
    forbidden = {"claim(": (r"inside \[3", "inside [2"), "sys.stderr": ("1.25", "1.5"), "progress": ("2", "3")}
    _change(target, course.notebooks / "forbidden.ipynb", forbidden)
    _change(target, course.notebooks / "missing.ipynb", {"claim(": (re.escape(MIME), "application/json")})
    target.unlink()
    report = subprocess.run([*PYTEST, "--nbval", str(course.notebooks), "-rA"], capture_output=True, text=True, cwd="/")
    failed = sorted(re.findall(r"^FAILED .*?(\w+\.ipynb::Cell \d)", report.stdout, re.MULTILINE))
    assert failed == [
        "forbidden.ipynb::Cell 2",
        "forbidden.ipynb::Cell 3",
        "forbidden.ipynb::Cell 6",
        "missing.ipynb::Cell 3",
    ]
    assert "17 passed" in report.stdout  # 7 cells in each of three notebooks, less the four
