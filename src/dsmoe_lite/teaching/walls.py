"""The walls around a student's code: what bubblewrap shows of this machine, and whether it works here."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from dsmoe_lite.common.errors import InputError

PACKAGE = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(PACKAGE.parent),
    "PYTHONHASHSEED": "0",
}
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/alternatives", "/etc/ld.so.cache")
ISOLATE = ("--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL")  # root keeps no rights, either
ENDS = ("--die-with-parent", "--new-session", "--clearenv")


def walls(files_mb: int = 64, forbidden: Sequence[str] = ()) -> list[str]:
    """The command that runs another one inside: no network, no rights, a read-only system, files_mb of /tmp.

    forbidden: modules of this package that are absent inside.
    """
    command = [shutil.which("bwrap") or "bwrap", *ISOLATE, *ENDS]
    for name, value in ENVIRONMENT.items():
        command += ["--setenv", name, value]
    command += ["--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys", "--dev", "/dev"]
    command += ["--size", str(files_mb * 2**20), "--tmpfs", "/tmp"]
    for path in (*SYSTEM, *_visible()):
        command += ["--ro-bind-try", path, path]
    for module in forbidden:
        command += _absent(module)
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]


def _visible() -> list[str]:
    """Python, its packages and this package; a virtual environment by both names if a link leads to it."""
    prefixes = {path for prefix in (sys.prefix, sys.base_prefix) for path in (prefix, os.path.realpath(prefix))}
    return sorted({*prefixes, str(PACKAGE)})


def _absent(module: str) -> list[str]:
    """Options that hide a module of this package, or a package of it, and its compiled files, by all its names."""
    options = []
    for folder in _folders_of_package():
        source = folder.parent.joinpath(*module.split("."))
        hidden = source if source.is_dir() else source.parent / "__pycache__"
        if not source.is_dir():
            options += ["--ro-bind", os.devnull, str(source.with_suffix(".py"))]
        if hidden.is_dir():
            options += ["--tmpfs", str(hidden), "--remount-ro", str(hidden)]
    return options


def _folders_of_package() -> list[Path]:
    """The folder of this package by all the names under which it is visible."""
    folders = [PACKAGE]
    for prefix in _visible():
        real = Path(os.path.realpath(prefix))
        if str(real) != prefix and PACKAGE.is_relative_to(real):
            folders.append(Path(prefix, PACKAGE.relative_to(real)))
    return folders


def require_hidden(paths: Iterable[Path]) -> None:
    """Raise InputError if a student's code could see one of `paths`."""
    for path in paths:
        real = path.expanduser().resolve()
        for visible in (*SYSTEM, *_visible()):
            if real.is_relative_to(os.path.realpath(visible)):
                raise InputError(f"{path}: is below {visible}, which answers can read; move it elsewhere")


def require_isolation() -> None:
    """Raise InputError with the remedy if this machine cannot isolate."""
    reason = why_not()
    if reason is not None:
        raise InputError(
            f"no isolation: {reason}; --unsafe runs the answers as you, with all that you can read and write"
        )


def why_not() -> str | None:
    """Why this machine cannot isolate, with the remedy; None if it can."""
    if sys.platform != "linux":
        return "isolation needs Linux: grade on a Linux machine"
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed: apt install bubblewrap"
    tried = subprocess.run([*walls(), "true"], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        return None
    line = (tried.stderr.strip().splitlines() or ["no message"])[-1]
    if "Permission denied" in line or "Operation not permitted" in line:
        remedy = "allow user namespaces: on Ubuntu 24.04 give /usr/bin/bwrap an AppArmor profile with `userns,`"
        return f"bubblewrap may not make namespaces ({line}): {remedy}"
    if "nknown option" in line:
        return f"bubblewrap is too old ({line}): 0.8 or newer is needed"
    return f"bubblewrap does not work ({line})"
