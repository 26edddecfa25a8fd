"""What this machine has for the course. What imports torch does so late: `dsmoe check` is fast."""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dsmoe_lite.common.errors import require
from dsmoe_lite.common.paths import install_command

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC_CHROME = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"


@dataclass(frozen=True)
class Part:
    """One thing that the course can use: what was found, or None, and how to get it if it is missing."""

    name: str
    found: str | None
    remedy: str = ""


def parts() -> list[Part]:
    """Look for everything that the course can use."""
    return [
        Part("Python", platform.python_version()),
        Part("torch", version("torch"), install_command()),
        Part("course packages", *_course_packages()),
        Part("CPU threads", str(cpu_threads())),
        Part("GPU", *_gpu_with_remedy()),
        Part("triton", version("triton"), f"comes with torch's CUDA builds on Linux, else {install_command('triton')}"),
        Part(
            "nvcc",
            _first_line_version(find_nvcc()),
            f"{install_command('nvcc')}, or NVIDIA's CUDA toolkit; only CUDA kernels use it",
        ),
        Part("g++", _first_line_version(shutil.which("g++")), "apt install g++, or xcode-select --install on macOS"),
        Part("chromium", find_chromium(), "apt install chromium, or install Chrome; only the browser tests use it"),
    ]


def profile() -> str:
    """The profile for chapters on this machine: "gpu" if torch can use a CUDA GPU, else "cpu"."""
    return "gpu" if gpu() and torch_cuda() else "cpu"


def require_profile(name: str) -> None:
    """Raises InputError if the profile of a chapter is "gpu" and torch finds no GPU."""
    if name == "gpu":
        import torch

        require(torch.cuda.is_available(), "profile", name, "torch finds no GPU here; use cpu or smoke")


def resolve_device(name: str) -> str:
    """Return "cpu" or "cuda"; "auto" is the GPU if torch finds one. Raises InputError for "cuda" without a GPU."""
    import torch

    has_gpu = torch.cuda.is_available()
    require(name != "cuda" or has_gpu, "device", name, "torch finds no GPU here; use auto or cpu")
    return ("cuda" if has_gpu else "cpu") if name == "auto" else name


def memory_bytes(device: str) -> int | None:
    """The memory of the CPU's machine, or of the first GPU for "cuda"; None if the system does not report it."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_properties(0).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def version(package: str) -> str | None:
    """The installed version of `package`, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_threads() -> int:
    """How many CPU threads this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpu() -> str | None:
    """Name and memory of the first NVIDIA GPU, as its driver reports them, or None."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    answer = _output(query) if shutil.which("nvidia-smi") else None
    return answer.splitlines()[0].strip() if answer else None


def torch_cuda() -> str | None:
    """The CUDA version that the installed torch was built for, or None for a CPU build or no torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version_file = Path(spec.origin).with_name("version.py")  # it has assignments only
    return runpy.run_path(str(version_file)).get("cuda") if version_file.exists() else None


def path_with_programs() -> str:
    """The PATH with the programs of this environment first, so that a cell or a terminal finds `dsmoe`."""
    programs = str(Path(sys.executable).parent)
    others = [folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder != programs]
    return os.pathsep.join([programs, *others])


def find_nvcc() -> str | None:
    """Find NVIDIA's compiler: on the PATH, in the usual folder of its toolkit, or where pip puts the extra `nvcc`."""
    toolkits = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", sysconfig.get_path("purelib") + "/nvidia/cu13"]
    candidates = ["nvcc", *(f"{folder}/bin/nvcc" for folder in toolkits if folder)]
    return next((path for name in candidates if (path := shutil.which(name))), None)


def find_chromium() -> str | None:
    """Find Chromium or Chrome, which the browser tests drive."""
    return next((path for name in (*CHROMIUMS, MAC_CHROME) if (path := shutil.which(name))), None)


def missing_packages(extra: str) -> list[str]:
    """Required packages, including those of pyproject's `extra`, that are not installed."""
    needed = [line for line in metadata.requires("dsmoe-lite") or [] if "extra ==" not in line or _names(line, extra)]
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in needed]
    return [name for name in names if version(name) is None]


def _names(requirement: str, extra: str) -> bool:
    return re.search(rf"""extra == ["']{extra}["']""", requirement) is not None


def _course_packages() -> tuple[str | None, str]:
    try:
        missing = missing_packages("course")
    except metadata.PackageNotFoundError:
        return None, f"dsmoe-lite itself is not installed: {install_command()}"
    return (None, f"{', '.join(missing)} not installed: {install_command()}") if missing else ("all installed", "")


def _gpu_with_remedy() -> tuple[str | None, str]:
    name = gpu()
    if name is None:
        return None, "not needed: the course runs on a CPU; a CUDA GPU serves the gpu profile"
    if torch_cuda() is None:
        return f"{name}, not usable: torch is a CPU build", "install a CUDA build of torch into .venv"
    return name, ""


def _first_line_version(program: str | None) -> str | None:
    if program is None:
        return None
    numbers = re.findall(r"\d+\.\d+(?:\.\d+)?", _output([program, "--version"]) or "")
    return numbers[0] if numbers else program


def _output(command: list[str]) -> str | None:
    try:
        finished: Any = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return finished.stdout
