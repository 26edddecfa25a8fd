"""The provenance of a result: versions, device and commit."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsmoe_lite import __version__
from dsmoe_lite.common.paths import IS_CLONE, REPOSITORY


def provenance() -> dict[str, Any]:
    """Return versions, device, threads and commit for a record. Uncommitted changes add `+changes` to the commit."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "dsmoe_lite": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenizers": version("tokenizers"),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "processor": _processor(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The processor's model name, or "" if the system does not report it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()  # Linux: platform reports nothing
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str | None:
    """The commit of the checkout, with `+changes` if files differ from it; None outside one."""
    if not IS_CLONE:
        return None  # the environment may be inside the checkout of another project

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None  # not a git checkout
