"""One line instead of a traceback if a chapter is opened in a Python that lacks its packages."""

import sys
from importlib.util import find_spec

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.paths import IS_CLONE, install_command


class MissingPackageError(InputError):
    """The Python that opened a chapter lacks a package that the chapter imports."""


def require_packages(*modules: str, what: str = "This chapter") -> None:
    """Require that this Python has all `modules`. Raises MissingPackageError, one line with the remedy."""
    missing = [module for module in modules if find_spec(module.partition(".")[0]) is None]
    if missing:
        where = ("in the course's folder ", "make lab") if IS_CLONE else ("", "dsmoe lab")
        raise MissingPackageError(
            f"{what} needs {', '.join(missing)}, not installed in {sys.executable}: "
            f"run `{install_command()}` {where[0]}and open the chapter with `{where[1]}`."
        )
