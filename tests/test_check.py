"""Before the first cell: `dsmoe check`, the guard against missing packages, readers' copies, JupyterLab."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner
from nbformat.sign import NotebookNotary

from dsmoe_lite.cli.check import command
from dsmoe_lite.common import machine
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.labs import jupyter_server, jupyter_settings, packages, reader_copies


def rows() -> dict[str, dict[str, str | None]]:
    result = CliRunner().invoke(command, ["--json"])
    assert result.exit_code == 0, result.output
    return {row["part"]: row for row in json.loads(result.output)}


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the only entry of PATH; a test adds programs to it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(machine, "MAC_CHROME", "none")
    return folder


def test_check_reports_what_is_installed() -> None:
    import torch

    found = rows()
    assert found["Python"]["found"] == sys.version.split()[0]
    assert found["torch"]["found"] == torch.__version__
    assert found["course packages"]["found"] == "all installed"
    assert found["profile"]["found"] == ("gpu" if torch.cuda.is_available() else "cpu")


def test_missing_tools_get_remedies(bare: Path) -> None:
    found = rows()
    assert found["profile"]["found"] == "cpu"
    for part in ("GPU", "g++", "chromium"):
        assert found[part]["found"] is None
        assert found[part]["how to get it"]


def test_the_gpu_decides_the_profile(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bare, "nvidia-smi", "echo 'NVIDIA H200, 143771 MiB'")
    monkeypatch.setattr(machine, "torch_cuda", lambda: "12.8")
    assert rows()["GPU"] == {"part": "GPU", "found": "NVIDIA H200, 143771 MiB", "how to get it": ""}
    assert rows()["profile"]["found"] == "gpu"
    monkeypatch.setattr(machine, "torch_cuda", lambda: None)
    assert "CPU build" in str(rows()["GPU"]["found"])
    assert "CUDA build" in str(rows()["GPU"]["how to get it"])
    assert rows()["profile"]["found"] == "cpu"


def test_a_broken_driver_counts_as_no_gpu(bare: Path) -> None:
    program(bare, "nvidia-smi", "echo 'no devices were found'; exit 6")
    assert rows()["GPU"]["found"] is None


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    there = machine.version
    monkeypatch.setattr(machine, "version", lambda name: None if name in ("torch", "altair", "sphinx") else there(name))
    found = rows()
    assert found["torch"]["found"] is None
    assert found["torch"]["how to get it"] == "make setup"
    assert found["course packages"]["found"] is None
    assert found["course packages"]["how to get it"] == "torch, altair not installed: make setup"  # sphinx: book's


def test_check_works_without_torch_and_imports_no_heavy_package() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from dsmoe_lite.cli import main\n"
        "try: main(['check'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'altair', 'IPython', 'jupyterlab', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_the_guard_names_missing_packages_only() -> None:
    packages.require_packages("json", "pathlib")
    with pytest.raises(InputError) as caught:
        packages.require_packages("json", "no_such_package", "nor_this.one")
    line = str(caught.value)
    assert "no_such_package, nor_this.one" in line
    assert "make setup" in line
    assert sys.executable in line
    assert "json" not in line
    assert "\n" not in line


def test_the_guard_shows_one_line_in_a_notebook() -> None:
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from nbformat.v4 import new_code_cell, new_notebook

    cell = new_code_cell("from dsmoe_lite.labs.packages import require_packages\nrequire_packages('torchh')")
    notebook: nbformat.NotebookNode = new_notebook(cells=[cell])
    with pytest.raises(CellExecutionError):
        NotebookClient(notebook, timeout=60).execute()
    (output,) = notebook.cells[0].outputs
    assert len(output["traceback"]) == 1
    assert "needs torchh" in output["traceback"][0]


def test_copies_are_made_once_and_replaced_on_request(course) -> None:
    chapter = course.write()
    (course.notebooks / "images").mkdir()
    (course.notebooks / "images" / "one.svg").write_text("<svg/>", encoding="utf-8")
    before = chapter.read_bytes()
    folder = course.root / "work"
    assert reader_copies.copy_chapters(course.notebooks, folder) == []
    copy = folder / chapter.name
    assert (folder / "images" / "one.svg").read_text(encoding="utf-8") == "<svg/>"
    assert "jupytext" not in json.loads(copy.read_text(encoding="utf-8"))["metadata"]

    copy.write_text(copy.read_text(encoding="utf-8").replace("A small chapter", "My notes"), encoding="utf-8")
    assert reader_copies.copy_chapters(course.notebooks, folder) == []
    assert "My notes" in copy.read_text(encoding="utf-8")

    chapter.write_text(chapter.read_text(encoding="utf-8").replace("A small chapter", "A better one"), encoding="utf-8")
    (line,) = reader_copies.copy_chapters(course.notebooks, folder)
    assert chapter.name in line
    assert "dsmoe lab --fresh 03" in line
    assert "My notes" in copy.read_text(encoding="utf-8")

    backups = [reader_copies.renew(chapter, folder) for _ in range(2)]
    assert [path.name for path in backups if path] == ["03_small.ipynb.bak", "03_small.ipynb.bak2"]
    assert backups[0] is not None
    assert "My notes" in backups[0].read_text(encoding="utf-8")
    assert "A better one" in copy.read_text(encoding="utf-8")
    assert before != chapter.read_bytes()
    assert reader_copies.copy_chapters(course.notebooks, folder) == []


def test_a_copy_is_trusted_until_it_is_changed_elsewhere(course) -> None:
    chapter = course.write()
    reader_copies.copy_chapters(course.notebooks, course.root / "work")
    copy = nbformat.read(course.root / "work" / chapter.name, as_version=4)
    assert NotebookNotary().check_signature(copy)
    copy.cells[-1].source += "  # changed"
    assert not NotebookNotary().check_signature(copy)


def test_a_broken_copy_is_left_alone(course) -> None:
    chapter = course.write()
    copy = course.root / "work" / chapter.name
    copy.parent.mkdir()
    copy.write_text("not a notebook", encoding="utf-8")
    assert reader_copies.copy_chapters(course.notebooks, copy.parent) == []
    assert copy.read_text(encoding="utf-8") == "not a notebook"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["07"], "07"), (["--fresh", "07"], "07"), (["--port", "80"], "at least 1024"), (["--port", "many"], "many")],
)
def test_lab_refuses_bad_input_in_one_line(course, capfd, arguments: list[str], words: str) -> None:
    from dsmoe_lite.cli import main

    course.write()
    with pytest.raises(SystemExit) as end:
        main(["lab", *arguments])
    assert end.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line


def test_no_browser_without_a_display(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CI", "container", "DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jupyter_server, "CONTAINER_MARKER", tmp_path / "none")
    monkeypatch.setattr(sys, "platform", "linux")
    assert not jupyter_server.has_display()
    monkeypatch.setenv("DISPLAY", ":0")
    assert jupyter_server.has_display()
    monkeypatch.setenv("CI", "true")
    assert not jupyter_server.has_display()


def test_settings_are_merged_into_existing_ones(tmp_path: Path) -> None:
    path = tmp_path / "overrides.json"
    path.write_text('{"mine": {"a": 1}, "@jupyterlab/docmanager-extension:plugin": {"autosave": false}}')
    assert jupyter_settings.write_settings(path)
    assert not jupyter_settings.write_settings(path)
    settings = json.loads(path.read_text(encoding="utf-8"))
    assert settings["mine"] == {"a": 1}
    assert settings["@jupyterlab/docmanager-extension:plugin"] == {
        "autosave": False,
        "defaultViewers": {"python": "Jupytext Notebook"},
    }
    assert os.listdir(tmp_path) == ["overrides.json"]
