"""The files around the package agree with each other and with pyproject.toml."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
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


@pytest.mark.parametrize("name", ["cpu", "gpu", "release", "weekly"])
def test_workflow_is_valid(name: str) -> None:
    validate("vendor.github-workflows", f".github/workflows/{name}.yml")


@pytest.mark.parametrize("name", ["bug", "content", "idea"])
def test_issue_form_is_valid(name: str) -> None:
    validate("vendor.github-issue-forms", f".github/ISSUE_TEMPLATE/{name}.yml")


def test_settings_of_github_are_valid() -> None:
    validate("vendor.github-issue-config", ".github/ISSUE_TEMPLATE/config.yml")
    validate("vendor.dependabot", ".github/dependabot.yml")


def test_the_form_for_errors_in_chapters_lists_every_chapter() -> None:
    form = yaml.safe_load(text(".github/ISSUE_TEMPLATE/content.yml"))
    options = form["body"][0]["attributes"]["options"]
    numbers = [path.name[:2] for path in sorted((REPOSITORY / "notebooks").glob("[0-9]*.py"))]
    assert [option[:2] for option in options[:-1]] == numbers


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
    (kernels,) = (command for command in commands if "pytest" in command)
    assert "tests/test_cuda.py tests/test_triton.py" in kernels
    assert any("dsmoe_lite.layers.selftest" in command for command in commands)
    assert (
        yaml.safe_load(text(".github/workflows/release.yml"))["jobs"]["test"]["uses"] == "./.github/workflows/cpu.yml"
    )
    job, commands = runs("weekly")
    assert job["env"]["NEWEST"]
    assert ".ci/run test-all" in commands


def test_ci_script_starts_and_makes_missing_browsers_a_failure() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    assert "DSMOE_REQUIRE=browser,copydetect,dpkg,gxx,nvcc,pyarrow,triton" in script.read_text(encoding="utf-8")
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


# --- releases --------------------------------------------------------------------------------------------------------


def release_headings() -> list[tuple[str, str]]:
    """(version, date or "unreleased") of every section of CHANGELOG.md, the newest first."""
    headings = re.findall(r"^## (.*)$", text("CHANGELOG.md"), re.MULTILINE)
    parsed = [re.fullmatch(r"(\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d|unreleased)\)", heading) for heading in headings]
    assert all(parsed), headings
    return [(match[1], match[2]) for match in parsed if match]


def test_changelog_has_one_section_per_release_and_begins_with_this_version() -> None:
    (newest, _), *older = release_headings()
    assert newest == dsmoe_lite.__version__
    versions = [Version(version) for version, _ in release_headings()]
    assert versions == sorted(set(versions), reverse=True)
    assert all(date != "unreleased" for _, date in older)


def release_notes(folder: Path, tag: str) -> subprocess.CompletedProcess:
    command = [str(folder / ".ci" / "release-notes"), tag]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_release_notes_are_the_section_of_the_tag_if_all_versions_agree(tmp_path: Path) -> None:
    for name in (".ci/release-notes", "CITATION.cff", "src/dsmoe_lite/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    number = dsmoe_lite.__version__
    changes = tmp_path / "CHANGELOG.md"
    changes.write_text(
        f"# Changes\n\n## {number} (2026-12-24)\n\n- new\n\n## 0.0.1 (2026-01-01)\n\n- old\n", encoding="utf-8"
    )
    done = release_notes(tmp_path, f"v{number}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "- new"
    assert "tag = v9.9.9: src/dsmoe_lite/__init__.py has version" in release_notes(tmp_path, "v9.9.9").stderr
    changes.write_text(f"## {number} (unreleased)\n\n- new\n", encoding="utf-8")
    done = release_notes(tmp_path, f"v{number}")
    assert done.returncode == 2
    assert done.stderr.startswith("CHANGELOG.md: has no section")
    (tmp_path / "CITATION.cff").write_text("version: 0.0.1\n", encoding="utf-8")
    assert release_notes(tmp_path, f"v{number}").stderr.startswith("CITATION.cff: its version is not")


def test_release_publishes_what_passed_the_tests_without_a_stored_password() -> None:
    workflow = yaml.safe_load(text(".github/workflows/release.yml"))
    jobs = workflow["jobs"]
    assert workflow["permissions"] == {"contents": "read"}
    assert {name: job.get("needs") for name, job in jobs.items()} == {
        "test": None,
        "build": "test",
        "publish": "build",
        "book": "publish",
        "announce": "publish",
    }
    commands = [step.get("run") for step in jobs["build"]["steps"]]
    assert '.ci/release-notes "$GITHUB_REF_NAME" > notes.md' in commands
    assert ".venv/bin/python -m build" in commands
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["environment"] == "release"
    assert "secrets." not in text(".github/workflows/release.yml")


def test_zenodo_describes_what_pyproject_and_citation_describe() -> None:
    described, project = json.loads(text(".zenodo.json")), pyproject()["project"]
    citation = yaml.safe_load(text("CITATION.cff"))
    assert set(described) == {
        *("title", "upload_type", "description", "creators", "access_right", "license", "notes", "keywords"),
        "related_identifiers",
    }  # all of them fields of Zenodo's deposits; the version is the tag's
    assert described["title"] == citation["title"]
    assert described["upload_type"] == "software"
    assert described["description"].startswith(f"<p>{project['description'].rstrip('.')}")
    assert [creator["name"] for creator in described["creators"]] == [author["name"] for author in project["authors"]]
    assert described["license"] in citation["license"]
    assert described["keywords"] == project["keywords"]
    (paper,) = described["related_identifiers"]
    assert citation["references"][0]["url"].endswith(paper["identifier"].removeprefix("arXiv:"))


# --- containers and hosted notebooks ---------------------------------------------------------------------------------


def dockerfile() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile as (name, arguments), with continued lines joined."""
    lines = [line for line in text("Dockerfile").splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [(name, arguments) for name, _, arguments in (line.partition(" ") for line in joined)]


def test_dockerfile_is_pinned_and_its_last_user_is_not_root() -> None:
    instructions = dockerfile()
    assert {name for name, _ in instructions} <= {"FROM", "WORKDIR", "COPY", "RUN", "USER", "ARG", "EXPOSE", "CMD"}
    stages: list[str] = []
    bases = set()
    for arguments in (arguments for name, arguments in instructions if name == "FROM"):
        base, _, stage = arguments.partition(" AS ")
        assert stage, "every stage has a name"
        if base not in stages:
            bases.add(base)
        stages.append(stage)
    (base,) = bases
    release = re.fullmatch(r"python:(\d+\.\d+\.\d+)-slim-[a-z]+", base)
    assert release, "an exact version of Python and a named Debian"
    assert release[1] in SpecifierSet(pyproject()["project"]["requires-python"])
    commands = [arguments for name, arguments in instructions if name == "RUN"]
    for command in (command for command in commands if "apt-get" in command):
        assert command.startswith("apt-get update && apt-get install --yes --no-install-recommends ")
        assert "&& rm -rf /var/lib/apt/lists/*" in command
    installs = [command for command in commands if "pip install" in command]
    assert installs
    assert all("--constraint" in command and "--no-cache-dir" in command for command in installs)
    users = [arguments for name, arguments in instructions if name == "USER"]
    assert set(users) == {"1000"}
    last = [name for name, _ in instructions]
    assert last.index("USER") > 0
    assert last[::-1].index("USER") < last[::-1].index("FROM"), "the last stage sets its user"
    name, command = instructions[-1]
    assert name == "CMD"
    assert json.loads(command)[:2] == ["dsmoe", "lab"]


def test_dockerfile_copies_nothing_that_is_built_or_private() -> None:
    ignored = text(".dockerignore").split()
    for name in (".git", ".venv", "build", "dist", "runs", "work", "**/__pycache__"):
        assert name in ignored


def test_development_container_is_a_stage_of_the_dockerfile_and_sets_up_as_readers_do() -> None:
    container = json.loads(text(".devcontainer/devcontainer.json"))
    stages = [arguments.partition(" AS ")[2] for name, arguments in dockerfile() if name == "FROM"]
    assert container["build"]["target"] in stages
    assert (REPOSITORY / ".devcontainer" / container["build"]["dockerfile"]).resolve() == REPOSITORY / "Dockerfile"
    assert container["postCreateCommand"] == "make setup"  # which installs the pins of constraints.txt
    assert f"useradd --create-home --home-dir /course --uid 1000 {container['remoteUser']}" in text("Dockerfile")


def test_binder_installs_the_pins(tmp_path: Path) -> None:
    environment = yaml.safe_load(text("binder/environment.yml"))
    python, torch = environment["dependencies"]
    assert python.removeprefix("python=") + ".0" in SpecifierSet(pyproject()["project"]["requires-python"])
    assert torch == f"pytorch-cpu={pins()['torch']}"
    script = REPOSITORY / "binder" / "postBuild"
    assert os.access(script, os.X_OK)
    log = tmp_path / "log"
    interpreter(tmp_path / "tools", "python", f'echo "$@" >> "{log}"')
    path = f"{tmp_path / 'tools'}:{os.environ['PATH']}"
    subprocess.run([str(script)], cwd=REPOSITORY, env={**os.environ, "PATH": path}, check=True)
    install, *modules = log.read_text(encoding="utf-8").splitlines()
    assert install == "-m pip install --no-cache-dir --constraint constraints.txt --editable .[course]"
    assert modules == ["-m dsmoe_lite.labs.jupyter_settings", "-m dsmoe_lite.labs.reader_copies"]


@pytest.mark.parametrize("script", [".ci/run", ".ci/release-notes", "binder/postBuild"])
def test_shell_scripts_are_clean(script: str) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "shellcheck"), script], cwd=REPOSITORY, capture_output=True
    )
    assert done.returncode == 0, done.stdout.decode()


def test_colab_cell_installs_this_version_and_leaves_the_server_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsmoe_lite.labs import colab

    calls: list[tuple[str, str]] = []

    class Shell:
        def run_line_magic(self, name: str, line: str) -> None:
            calls.append((name, line))

    source = colab.header_cell()
    exec(compile(source, "cell", "exec"), {})
    assert calls == []
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    monkeypatch.setattr("IPython.get_ipython", Shell)
    exec(compile(source, "cell", "exec"), {})
    ((name, line),) = calls
    assert name == "pip"
    _, quiet, *packages = line.split()
    assert quiet == "--quiet"
    assert packages[0] == f"dsmoe-lite=={dsmoe_lite.__version__}"
    course = {canonicalize_name(Requirement(r).name) for r in pyproject()["project"]["optional-dependencies"]["course"]}
    assert {canonicalize_name(name) for name in colab.SERVER} < course
    installed = dict(package.split("==") for package in packages[1:])
    assert set(map(canonicalize_name, installed)) == course - {canonicalize_name(name) for name in colab.SERVER}
    assert all(Version(version) == pins()[canonicalize_name(name)] for name, version in installed.items())


# --- what is in the repository ---------------------------------------------------------------------------------------


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
