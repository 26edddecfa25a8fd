"""Start JupyterLab for a reader: on this machine only, with a token, quiet, and with the address in one line."""

import os
import secrets
import signal
import socket
import sys
import webbrowser
from pathlib import Path
from urllib.parse import quote

import click

from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.machine import path_with_programs
from dsmoe_lite.labs.guesses import READER
from dsmoe_lite.labs.jupyter_settings import write_settings

PORT = 8888  # Jupyter's default; if it is in use, the next free port
CONTAINER_MARKER = Path("/.dockerenv")
STYLES = Path(__file__).parent / "static"  # of custom.css, the name that JupyterLab asks for


def has_display() -> bool:
    """Whether the user would see a browser that this process opens."""
    environ = os.environ
    if environ.get("CI") or environ.get("container") or CONTAINER_MARKER.exists():
        return False
    if environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY"):
        return True
    return sys.platform in ("darwin", "win32") and not environ.get("SSH_CONNECTION")


def serve(root: Path, opened: Path, *, ip: str, port: int | None, browser: bool) -> None:
    """Run JupyterLab in `root` and open the file `opened`, until Ctrl-C or SIGTERM.

    The root is not work/: in a clone, data/ and the chapters' sources can be browsed; elsewhere, runs/.
    """
    arguments = _arguments(root, ip, port)
    write_settings(_config() / "labconfig" / "default_setting_overrides.json")
    token = secrets.token_hex(24)
    os.environ.update(_environment(token))
    from jupyterlab.labapp import LabApp

    server = LabApp.initialize_server(arguments)
    server.web_app.settings["static_custom_path"].insert(0, str(STYLES))  # no option of the server sets this
    host = "localhost" if ip in ("127.0.0.1", "0.0.0.0") else ip
    path = quote(opened.relative_to(root).as_posix())
    address = f"http://{host}:{server.port}{server.base_url}lab/tree/{path}?token={token}"
    click.echo(f"JupyterLab: {address}\n(Ctrl-C stops it)")
    if browser:
        server.io_loop.call_later(0.5, webbrowser.open, address)
    for stop in (signal.SIGINT, signal.SIGTERM):  # stop without the confirmation that Jupyter asks for at a terminal
        signal.signal(stop, lambda *_: server.stop(from_signal=True))
    server.start()


def _require_free(ip: str, port: int) -> None:
    if not 1024 <= port <= 65535:
        raise InputError(f"port = {port}: must be at least 1024 and at most 65535")
    with socket.socket() as probe:
        if sys.platform != "win32":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ip, port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"port = {port}: {reason}; without --port the next free one is taken") from None


def _config() -> Path:
    """A folder of settings for this server alone: the environment may not be the reader's to write into."""
    return paths.cache() / "jupyter"


def _environment(token: str) -> dict[str, str]:
    installed = str(Path(sys.prefix) / "share" / "jupyter")
    return {
        "PATH": path_with_programs(),  # of kernels and terminals: the chapters call `dsmoe run`
        "JUPYTER_TOKEN": token,  # not an argument: every user of the machine can read the arguments
        # Kernels run in this environment, even if the reader has installed kernels elsewhere.
        "JUPYTER_PATH": os.pathsep.join(filter(None, [installed, os.environ.get("JUPYTER_PATH")])),
        "JUPYTER_CONFIG_PATH": os.pathsep.join(filter(None, [str(_config()), os.environ.get("JUPYTER_CONFIG_PATH")])),
        "JUPYTER_PREFER_ENV_PATH": "1",
        READER: str(paths.WORK),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


def _lent() -> list[Path]:
    """The folder of what explorers need without a kernel; none if it cannot be made: they then ask for one."""
    from dsmoe_lite.viz.page_models import lent_folder

    try:
        return [lent_folder(sorted(paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")))]
    except OSError:
        return []


def _arguments(root: Path, ip: str, port: int | None) -> list[str]:
    if port is not None:
        _require_free(ip, port)
    arguments = [
        f"--ServerApp.root_dir={root}",
        f"--ServerApp.ip={ip}",
        f"--ServerApp.port={port or PORT}",
        f"--ServerApp.port_retries={50 if port is None else 0}",
        "--ServerApp.open_browser=False",
        "--ServerApp.log_level=ERROR",
        "--LabApp.log_level=ERROR",
        "--LabApp.extension_manager=readonly",  # never downloads the list of extensions
        "--LabApp.custom_css=True",
        *(f"--ServerApp.extra_static_paths={folder}" for folder in _lent()),
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        arguments.append("--allow-root")
    return arguments
