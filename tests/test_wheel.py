"""Install without a clone: the wheel is built from a source distribution and used from an empty folder."""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import nbformat
import pytest
import yaml
from packaging.version import Version

from dsmoe_lite import __version__
from dsmoe_lite.cli import main
from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.study import grids

LIMIT = 30_000_000  # bytes of the wheel
TINY = {
    "model": "course-gshard",
    "train": {"steps": 2, "batch_size": 2, "seq_len": 16, "warmup_steps": 1},
    "corpus": {
        "world": {"n_entities": 40, "n_control": 8, "n_head": 8, "n_tail": 8, "n_documents": 400, "n_heldout": 100}
    },
    "vocab_size": 300,
    "n_heldout_batches": 1,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as a release builds it: the sources are packed, and the wheel is made from the unpacked ones."""
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=paths.REPOSITORY,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (paths.REPOSITORY / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(paths.REPOSITORY / name, clone / name)
    isolation = ["--no-isolation"] if Version(version("setuptools")) >= Version("77") else []
    command = [sys.executable, "-m", "build", *isolation, "--outdir", str(out), str(clone)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


class Installed:
    """An environment with the wheel, and a folder that was empty at first."""

    def __init__(self, prefix: Path, folder: Path) -> None:
        self.prefix, self.folder = prefix, folder
        (self.packages,) = prefix.glob("lib/python*/site-packages")
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JUPYTER", "DSMOE"))
        }
        home = folder.parent / "home"
        self.environment = {
            **clean,
            "HOME": str(home),
            "DSMOE_CACHE": str(home / "cache"),
            "JUPYTERLAB_DIR": str(Path(sys.prefix) / "share" / "jupyter" / "lab"),  # of the environment of the tests
            "PYTHONDONTWRITEBYTECODE": "1",
            "TQDM_DISABLE": "1",
        }

    def run(self, *command: str) -> subprocess.CompletedProcess:
        """Run a program of the environment in the folder."""
        program = [str(self.prefix / "bin" / command[0]), *command[1:]]
        return subprocess.run(
            program, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=300
        )

    def dsmoe(self, *arguments: str) -> str:
        """The output of a `dsmoe` command that succeeds."""
        done = self.run("dsmoe", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refusal(self, *arguments: str) -> str:
        """The one line of a `dsmoe` command that is refused."""
        done = self.run("dsmoe", *arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        (line,) = done.stderr.splitlines()
        return line

    def written(self) -> set[str]:
        """The top-level names in the folder."""
        return {path.name for path in self.folder.iterdir()}


def contents(prefix: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below `prefix`."""
    files = (path for path in prefix.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """The wheel in a fresh environment that sees the packages of the tests, not the clone. It must not change."""
    root = tmp_path_factory.mktemp("installed")
    prefix, folder = root / "environment", root / "an empty folder"
    folder.mkdir()
    venv.create(prefix, symlinks=True)
    course = Installed(prefix, folder)
    # A folder named in a .pth file is only searched: its own .pth files, one of which leads to the clone, are not read.
    (course.packages / "of_the_tests.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(prefix / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--no-compile", "--force-reinstall", str(wheel)], check=True)
    before = contents(prefix)
    yield course
    assert contents(prefix) == before, "something was written into the environment"


def test_wheel_is_small_enough(wheel: Path) -> None:
    assert wheel.name == f"dsmoe_lite-{__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < LIMIT


def test_package_is_imported_from_the_environment(installed: Installed) -> None:
    script = (
        "import json, sys, dsmoe_lite; from importlib.metadata import version; from dsmoe_lite.common import paths; "
        "print(json.dumps([dsmoe_lite.__file__, version('dsmoe-lite'), sys.path, str(paths.FOLDER), str(paths.DATA)]))"
    )
    module, number, path, folder, data = json.loads(installed.run("python", "-c", script).stdout)
    assert Path(module) == installed.packages / "dsmoe_lite" / "__init__.py"
    assert number == __version__
    assert str(paths.REPOSITORY / "src") not in path
    assert Path(folder) == installed.folder
    assert Path(data) == installed.packages / "dsmoe_lite" / "_course" / "data"


def test_wheel_carries_what_a_reader_opens(installed: Installed) -> None:
    carried = installed.packages / "dsmoe_lite" / "_course"
    for pattern in ("notebooks/[0-9]*.ipynb", "notebooks/images/*.svg", "data/models/*", "data/runs/**/*.json"):
        names = {path.relative_to(paths.REPOSITORY) for path in paths.REPOSITORY.glob(pattern)}
        assert names
        assert names == {path.relative_to(carried) for path in carried.glob(pattern)}
    for chapter in carried.glob("notebooks/*.ipynb"):
        for picture in re.findall(r"\bimages/[\w.-]+\.\w+", chapter.read_text(encoding="utf-8")):
            assert (chapter.parent / picture).is_file(), f"{chapter.name}: {picture}"


def fetched(address: str) -> dict:
    """The JSON at an address that may not answer yet."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urlopen(address.replace("localhost", "127.0.0.1"), timeout=60) as answer:
                return json.load(answer)
        except URLError as error:
            if isinstance(error, HTTPError) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextmanager
def lab(installed: Installed) -> Iterator[tuple[str, str, str]]:
    """Run `dsmoe lab`; yield its address, the path of the file that it opens, and its token."""
    server = subprocess.Popen(
        [str(installed.prefix / "bin" / "dsmoe"), "lab", "--no-browser"],
        cwd=installed.folder,
        env=installed.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        line = next((line for line in server.stdout if line.startswith("JupyterLab: ")), "")
        address = re.fullmatch(r"JupyterLab: (http://localhost:\d+)/lab/tree/(\S+)\?token=(\w+)\n", line)
        assert address, line
        yield address[1], address[2], address[3]
        server.terminate()
        assert server.wait(timeout=60) == 0
    finally:
        server.kill()
        server.communicate()


def test_lab_serves_all_chapters_in_an_empty_folder(installed: Installed) -> None:
    with lab(installed) as (address, opened, token):
        assert fetched(f"{address}/api/contents/{opened}?content=0&token={token}")["path"] == "work/00_start_here.ipynb"
        notification = f"{address}/lab/api/settings/@jupyterlab/apputils-extension:notification?token={token}"
        assert fetched(notification)["schema"]["properties"]["fetchNews"]["default"] == "false"
    chapters = {path.name for path in paths.NOTEBOOKS.glob("[0-9]*.ipynb")}
    assert {path.name for path in (installed.folder / "work").glob("*.ipynb")} == chapters
    assert (installed.folder / "work" / "images" / "overview.svg").is_file()


def test_chapter_runs_into_the_current_folder(installed: Installed) -> None:
    notebook = Path(installed.dsmoe("run", "00", "-p", "profile=smoke").splitlines()[0])
    assert notebook.parent == installed.folder / "runs"
    cells = nbformat.read(notebook, as_version=4).cells
    assert all(cell.execution_count for cell in cells if cell.cell_type == "code" and cell.source.strip())


def test_kernel_of_a_chapter_knows_the_folder(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "00_start_here.ipynb").touch()
    script = "from dsmoe_lite.common import paths; print(paths.FOLDER)"
    done = subprocess.run(
        [installed.prefix / "bin" / "python", "-c", script],
        cwd=tmp_path / "work",  # where JupyterLab starts it
        env=installed.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(tmp_path)


def test_training_writes_into_the_current_folder(installed: Installed) -> None:
    (installed.folder / "tiny.yml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    (row,) = json.loads(installed.dsmoe("train", "tiny.yml", "--json"))
    assert Path(row["run"]) == installed.folder / "runs" / "tiny"
    record = json.loads((installed.folder / "runs" / "tiny" / "record.json").read_text(encoding="utf-8"))
    assert record["finished"]
    assert record["provenance"]["commit"] is None  # whatever repository the folder or the environment is in


def test_claims_are_recomputed_and_stored_in_the_current_folder(installed: Installed) -> None:
    printed = installed.dsmoe("claims", "--write")
    assert "holds" in printed
    stored = installed.folder / "data" / "claims.yml"
    assert stored.read_bytes() == (paths.DATA / "claims.yml").read_bytes()
    assert (installed.folder / "work" / "claims.md").is_file()


def test_shipped_records_and_counts_are_read(installed: Installed) -> None:
    assert "every run is recorded" in installed.dsmoe("experiment", "paper")
    assert "deepseek-v3" in installed.dsmoe("count", "deepseek-v3")


def test_what_needs_a_clone_is_refused_in_one_line(installed: Installed) -> None:
    for command in ("refresh", "book"):
        remedy = "works in a clone of the repository only; get one and run `make setup` there"
        assert installed.refusal(command) == f"dsmoe: {command}: {remedy}"
    assert not {"build", "notebooks"} & installed.written()


def test_wheel_without_its_extras_names_them(installed: Installed) -> None:
    hidden = "import sys; sys.modules['jupyterlab'] = None; from dsmoe_lite.cli import main; main(['lab'])"
    done = installed.run("python", "-c", hidden)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "jupyterlab, not installed in" in line
    assert 'run `pip install "dsmoe-lite[course]"`' in line


# In this process, as if the package had been installed from a wheel


@pytest.fixture
def without_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The paths of an installed wheel whose shipped data is in tmp_path/shipped; returns the current folder."""
    folder, shipped = tmp_path / "current", tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(paths, "IS_CLONE", False)
    monkeypatch.setattr(paths, "FOLDER", folder)
    monkeypatch.setattr(paths, "WORK", folder / "work")
    monkeypatch.setattr(paths, "RUNS", folder / "runs")
    monkeypatch.setattr(paths, "DATA_FOLDERS", (folder / "data", shipped))
    return folder


def test_new_records_go_beside_the_shipped_ones(
    without_clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = grids.grid("neighbours").jobs["course-dense"]
    monkeypatch.setitem(grids.GRIDS, "small", grids.Grid({"a": job}, (0, 1), 2))
    monkeypatch.setattr(type(job), "check_record", lambda self, record: None)
    shipped = tmp_path / "shipped" / "runs" / "small" / "a-seed0.json"
    shipped.parent.mkdir(parents=True)
    shipped.write_text('{"x": 0}', encoding="utf-8")
    assert grids.missing("small") == [("a", 1)]
    new = paths.data_to_write("runs/small/a-seed1.json")
    assert new == without_clone / "data" / "runs" / "small" / "a-seed1.json" == grids.record_path("small", "a", 1)
    new.parent.mkdir(parents=True)
    new.write_text('{"x": 1}', encoding="utf-8")
    assert grids.missing("small") == []
    assert [record["x"] for record in grids.records("small")] == [0, 1]
    paths.data_to_write("runs/small/a-seed0.json").write_text('{"x": 2}', encoding="utf-8")
    assert [record["x"] for record in grids.records("small")] == [2, 1]  # the reader's own come first


@pytest.mark.parametrize("command", [["lab", "--no-browser"], ["train", "tiny.yml"], ["experiment", "paper-gpu"]])
def test_a_folder_that_cannot_be_written_is_one_line(
    command: list[str], without_clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{without_clone} cannot be written; change to a folder of your own" in line
    assert list(without_clone.iterdir()) == []


def test_a_clone_is_not_asked_for_in_a_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    paths.require_clone("refresh")
    assert paths.install_command() == "make setup"
    monkeypatch.setattr(paths, "IS_CLONE", False)
    assert paths.install_command("triton") == 'pip install "dsmoe-lite[triton]"'
    with pytest.raises(InputError, match="refresh: works in a clone of the repository only"):
        paths.require_clone("refresh")
