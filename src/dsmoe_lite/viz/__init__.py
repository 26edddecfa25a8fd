"""Charts and widgets of the course: call `renderer.enable()` once, then end a cell with `charts.<name>(rows)`."""

import importlib
import sys
from typing import Any

# Altair imports jsonschema, which imports this package if it is installed: two seconds for a grammar of web addresses
# that no chart needs. Without it jsonschema checks such addresses less strictly.
_modules: dict[str, Any] = sys.modules
if "rfc3987_syntax" not in _modules:
    _modules["rfc3987_syntax"] = None
    try:
        importlib.import_module("altair")
    finally:
        del _modules["rfc3987_syntax"]
