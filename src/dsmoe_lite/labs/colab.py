"""The cell that installs the course in Colab, where a chapter opened by its address finds no package.

Colab's own server, kernel and torch stay as they are: replacing them breaks the running notebook.
"""

import re
from importlib.metadata import requires
from pathlib import Path

from dsmoe_lite import __version__
from dsmoe_lite.common.paths import REPOSITORY

# Of extra `course`; Colab has its own.
SERVER = ("jupyterlab", "jupytext", "ipykernel", "papermill", "nbclient", "nbconvert", "psutil")


def header_cell(constraints: Path = REPOSITORY / "constraints.txt") -> str:
    """The source of a code cell for the top of a chapter: installs this version in Colab, does nothing elsewhere.

    Packages of the extra `course` come in the versions of `constraints`.
    """
    pins = dict(line.split("==") for line in constraints.read_text(encoding="utf-8").splitlines() if "==" in line)
    names = [
        re.split(r"[^\w.-]", line, maxsplit=1)[0]
        for line in requires("dsmoe-lite") or []
        if re.search(r"""extra == ["']course["']""", line)
    ]
    wanted = [f"dsmoe-lite=={__version__}", *(f"{name}=={pins[name]}" for name in names if name not in SERVER)]
    packages = "\n".join(f'        "{package} "' for package in wanted)
    return f"""\
import sys

if "google.colab" in sys.modules:
    from IPython import get_ipython

    get_ipython().run_line_magic(
        "pip",
        "install --quiet "
{packages},
    )
"""


if __name__ == "__main__":
    print(header_cell(), end="")
