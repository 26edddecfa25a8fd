"""JupyterLab, started for a reader: local, with a token, quiet, and with the address in one line."""

import os
import secrets
import signal
import socket
import sys
import webbrowser
from pathlib import Path
from urllib.parse import quote

import click

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.labs.jupyter_settings import overrides_path, write_settings

PORT = 8888  # Jupyter's own; the next free one is taken where it is in use
CONTAINER_MARK = Path("/.dockerenv")


def has_display() -> bool:
    """Whether a browser opened here would be seen by who types here."""
    environ = os.environ
    if environ.get("CI") or environ.get("container") or CONTAINER_MARK.exists():
        return False
    if environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY"):
        return True
    return sys.platform in ("darwin", "win32") and not environ.get("SSH_CONNECTION")


def serve(root: Path, opened: Path, *, ip: str, port: int | None, browser: bool) -> None:
    """Run JupyterLab in `root` with the file `opened` in front, until Ctrl-C or TERM.

    The root is the repository, not work/: work/ opens in front, while data/ and the chapters' sources can be browsed.
    """
    write_settings(overrides_path())
    token = secrets.token_hex(24)
    os.environ.update(_environment(token))
    from jupyterlab.labapp import LabApp  # type: ignore[import-untyped]

    server = LabApp.initialize_server(_arguments(root, ip, port))
    host = "localhost" if ip in ("127.0.0.1", "0.0.0.0") else ip
    path = quote(opened.relative_to(root).as_posix())
    address = f"http://{host}:{server.port}{server.base_url}lab/tree/{path}?token={token}"
    click.echo(f"JupyterLab: {address}\n(Ctrl-C stops it)")
    if browser:
        server.io_loop.call_later(0.5, webbrowser.open, address)
    for stop in (signal.SIGINT, signal.SIGTERM):  # at once: Jupyter would ask back, and only at a terminal
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


def _environment(token: str) -> dict[str, str]:
    own = str(Path(sys.prefix) / "share" / "jupyter")
    return {
        "JUPYTER_TOKEN": token,  # not an argument: those are seen by everyone on the machine
        # Kernels run in this environment, whatever kernels the reader has elsewhere.
        "JUPYTER_PATH": os.pathsep.join(filter(None, [own, os.environ.get("JUPYTER_PATH")])),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


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
        "--LabApp.extension_manager=readonly",  # no list of extensions is fetched
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        arguments.append("--allow-root")
    return arguments
