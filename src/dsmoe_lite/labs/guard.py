"""One line instead of a traceback when a chapter opens in a Python that lacks its packages."""

import sys
from importlib.util import find_spec

from dsmoe_lite.common.errors import InputError


class MissingPackageError(InputError):
    """A chapter was opened in a Python without the packages it imports."""


def need(*modules: str) -> None:
    """Raise MissingPackageError, in one line with the remedy, unless this Python can import every one of `modules`."""
    missing = [module for module in modules if find_spec(module.partition(".")[0]) is None]
    if missing:
        raise MissingPackageError(
            f"This chapter needs {', '.join(missing)}, not installed in {sys.executable}: "
            "run `make setup` in the course's folder and open the chapter with `make lab`."
        )
