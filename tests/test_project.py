"""The files around the package agree with each other and with pyproject.toml."""

import os
import re
import statistics
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import dsmoe_lite
from dsmoe_lite.common.paths import REPOSITORY

INSTALLED_EXTRAS = ("course", "book", "test")  # what `make setup` installs
HEAVY = {"torch", "numpy", "altair", "IPython", "ipywidgets", "anywidget", "papermill", "nbformat", "jupytext", "PIL"}
IMPORT_BUDGET = 0.3  # seconds of CPU over torch's own import


def text(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


@cache
def pyproject() -> dict:
    return tomllib.loads(text("pyproject.toml"))


def requirements() -> list[Requirement]:
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    return [Requirement(line) for line in [*project["dependencies"], *(r for e in INSTALLED_EXTRAS for r in extras[e])]]


def pins() -> dict[str, Version]:
    lines = [line for line in text("constraints.txt").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "exact pins only, no local versions"
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


@cache
def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
        text=True,
    )
    files = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    assert REPOSITORY / "pyproject.toml" in files
    return [path for path in files if path.is_file()]


def texts() -> dict[str, str]:
    found = {}
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data:
            found[str(path.relative_to(REPOSITORY))] = data.decode("utf-8")  # every text file is UTF-8
    return found


# --- dependencies --------------------------------------------------------------------------------------------------


def test_environment_yml_is_pyproject_and_nothing_else() -> None:
    environment = yaml.safe_load(text("environment.yml"))
    python, pip, of_pip = environment["dependencies"]
    assert python == "python" + pyproject()["project"]["requires-python"]
    assert pip == "pip"
    assert of_pip == {"pip": [f"-e .[{','.join(INSTALLED_EXTRAS)}]"]}
    assert environment["name"] == pyproject()["project"]["name"]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda r: r.name)
def test_pin_lies_in_its_range(requirement: Requirement) -> None:
    assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_what_is_installed_here_is_what_is_pinned() -> None:
    if os.environ.get("NEWEST"):
        return  # the weekly workflow installs other versions on purpose
    from importlib.metadata import version

    assert {str(r): Version(version(r.name)).public for r in requirements()} == {
        str(r): str(pins()[canonicalize_name(r.name)]) for r in requirements()
    }


# --- continuous integration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "gpu", "weekly"])
def test_workflow_is_valid(name: str) -> None:
    validate("vendor.github-workflows", f".github/workflows/{name}.yml")


def test_citation_is_valid_and_of_this_version() -> None:
    validate("vendor.citation-file-format", "CITATION.cff")
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == dsmoe_lite.__version__ == version("dsmoe-lite")
    assert [author["name"] for author in citation["authors"]] == [a["name"] for a in pyproject()["project"]["authors"]]


def validate(schema: str, name: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(REPOSITORY / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_call_what_readers_call() -> None:
    def runs(name: str) -> tuple[dict, list[str]]:
        (job,) = yaml.safe_load(text(f".github/workflows/{name}.yml"))["jobs"].values()
        return job, [step["run"] for step in job["steps"] if "run" in step]

    job, commands = runs("cpu")
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert commands == [".ci/run"]
    job, commands = runs("gpu")
    assert 'make course ARGS="--profile gpu"' in commands
    assert text(".github/workflows/gpu.yml").count("self-hosted") == 1
    job, commands = runs("weekly")
    assert job["env"]["NEWEST"]
    assert ".ci/run test-all" in commands


def test_ci_script_starts_and_makes_missing_browsers_a_failure() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    assert "DSMOE_REQUIRE=browser,gxx,nvcc,triton" in script.read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", str(script)], check=True)


# --- make ------------------------------------------------------------------------------------------------------------


def make(*arguments: str, folder: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**clean, **environment}, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A clone's files that make reads, without .venv, in a folder with awkward signs in its name."""
    folder = tmp_path / "it's a (bare), clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).write_text(text(name), encoding="utf-8")
    return folder


def interpreter(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / name).chmod(0o755)
    return folder / name


def test_help_is_the_default_and_names_every_target() -> None:
    shown = make().stdout
    targets = re.search(r"^\.PHONY: (.*)$", text("Makefile"), re.MULTILINE)
    assert targets
    for target in set(targets[1].split()) - {"help", "before-tests", "moved"}:
        assert re.search(rf"\bmake {target}\b", shown), target


def test_other_pythons_are_refused_in_one_line(bare: Path, tmp_path: Path) -> None:
    old = interpreter(tmp_path / "old one", "python3", "echo 3.10.13; exit 1")
    done = make("setup", f"PYTHON={old}", folder=bare)
    assert done.returncode == 2
    message = done.stderr.splitlines()[0]
    assert f"{old} is 3.10.13" in message
    assert "Python 3.11, 3.12 or 3.13 is needed" in message
    assert not (bare / ".venv").exists()


def test_interpreter_that_does_not_start_is_passed_over(bare: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    interpreter(tools, "python3", "exit 127")
    interpreter(tools, "python3.13", "exit 127")
    interpreter(tools, "python3.12", 'case "$1" in -c) echo 3.12.9;; -m) echo "$@" >&2; exit 1;; esac')
    done = make("setup", folder=bare, PATH=f"{tools}:/usr/bin:/bin")
    assert "Making .venv with Python 3.12.9" in done.stdout
    assert "-m venv --clear .venv" in done.stderr


def test_failed_installation_leaves_no_stamp_and_runs_again(bare: Path) -> None:
    broken = 'case "$1" in -c) exit 0;; -m) exit 1;; esac'
    (bare / ".venv").mkdir()
    interpreter(bare / ".venv" / "bin", "python", broken)
    for _ in range(2):
        done = make("setup", folder=bare, PATH="/usr/bin:/bin")
        assert done.returncode == 2
        assert "Installing" in done.stdout
        assert not (bare / ".venv" / ".installed").exists()


def test_second_setup_does_nothing_until_a_pin_or_the_folder_changes(bare: Path) -> None:
    (bare / ".venv").mkdir()
    log = bare.with_name("log")
    interpreter(bare / ".venv" / "bin", "python", f'echo "$@" >> "{log}"')
    run = {"PATH": "/usr/bin:/bin"}
    assert make("setup", folder=bare, **run).returncode == 0
    assert "install" in log.read_text(encoding="utf-8")
    log.unlink()
    assert make("setup", folder=bare, **run).returncode == 0
    assert not log.exists()
    future = (bare / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(bare / "constraints.txt", (future, future))
    assert make("setup", folder=bare, **run).returncode == 0
    assert "-c constraints.txt" in log.read_text(encoding="utf-8")
    os.utime(bare / "constraints.txt", (0, 0))
    log.unlink()
    moved = bare.rename(bare.with_name("moved here"))
    assert make("setup", folder=moved, **run).returncode == 0
    assert "install" in log.read_text(encoding="utf-8")


def test_uv_is_used_where_installed_and_gets_pips_find_links(bare: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    interpreter(tools, "uv", f'echo "$UV_FIND_LINKS|$*" >> "{tmp_path}/uv.log"')
    (bare / ".venv").mkdir()
    interpreter(bare / ".venv" / "bin", "python", "exit 0")
    done = make("setup", folder=bare, PATH=f"{tools}:/usr/bin:/bin", PIP_FIND_LINKS="/one /two")
    assert done.returncode == 0, done.stderr
    links, arguments = (tmp_path / "uv.log").read_text(encoding="utf-8").strip().split("|")
    assert links.rstrip(",") == "/one,/two"
    assert "-c constraints.txt" in arguments


def test_uninstall_keeps_work_unless_told(bare: Path) -> None:
    for name in ("work", "runs", ".venv", "src", "tests", "notebooks"):
        (bare / name).mkdir()
        (bare / name / "file").touch()
    assert "make uninstall WORK=1" in make("uninstall", folder=bare).stdout
    assert not (bare / ".venv").exists()
    assert (bare / "work" / "file").exists()
    assert (bare / "runs" / "file").exists()
    assert make("uninstall", "WORK=1", folder=bare).returncode == 0
    assert not (bare / "work").exists()
    assert (bare / "notebooks" / "file").exists()


# --- what is in the repository ---------------------------------------------------------------------------------------


def test_readme_names_the_two_commands_first() -> None:
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text("README.md"), re.DOTALL)
    commands = [line.split("#")[0].strip() for line in blocks[0].splitlines()]
    assert [line for line in commands if line.startswith("make")] == ["make lab", "make test"]


def test_readme_links_to_files_that_exist() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        links = re.findall(r']\(([^)#]+)\)|src="([^"]+)"', text(name))
        for link in (markdown or html for markdown, html in links):
            assert link.startswith("https://") or (REPOSITORY / link).exists(), f"{name}: {link}"


def test_no_registry_and_no_path_of_one_machine_is_written_down() -> None:
    hosts = ["py" + "pi.org", "files.python" + "hosted", "download.py" + "torch", "conda.ana" + "conda"]
    places = [r"/ho" + r"me/\w+", r"/Us" + r"ers/\w+", r"/ro" + r"ot/", r"/wo" + r"rk/(main|shared)", r"C:\\" + "Users"]
    pattern = re.compile("|".join([*map(re.escape, hosts), *(rf"(?<![\w.]){place}" for place in places)]))
    found = {name: match.group() for name, content in texts().items() if (match := pattern.search(content))}
    assert found == {}


def test_licence_is_the_one_declared() -> None:
    assert pyproject()["project"]["license"] == "MIT AND CC-BY-4.0"
    assert "MIT License" in text("LICENSE")
    assert "Creative Commons Attribution 4.0 International" in text("LICENSE")


# --- import --------------------------------------------------------------------------------------------------------


def python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_pulls_nothing_heavy() -> None:
    loaded = python("import dsmoe_lite, sys; print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert not HEAVY & set(loaded)


def test_model_pulls_no_plotting_or_notebook_package() -> None:
    loaded = python("import dsmoe_lite.model, sys; print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert not (HEAVY - {"torch", "numpy"}) & set(loaded)


def test_import_costs_little_over_torch() -> None:
    script = (
        "import time, torch; before = time.process_time(); import dsmoe_lite, dsmoe_lite.model; "
        "print(time.process_time() - before)"
    )
    spent = statistics.median(float(python(script)) for _ in range(3))
    assert spent < IMPORT_BUDGET


def test_imports_point_down() -> None:
    from importlinter.cli import lint_imports

    here = Path.cwd()
    os.chdir(REPOSITORY)
    try:
        assert lint_imports(no_cache=True) == 0
    finally:
        os.chdir(here)
