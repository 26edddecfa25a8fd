"""Which parameters a running notebook has: read from the cells that were run in its session."""

import ast
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.paths import IS_CLONE
from dsmoe_lite.labs.chapters import chapter_schemas
from dsmoe_lite.labs.parameters import Parameter, check_value, find_parameter, read_schema

INJECTED = "# Parameters\n"  # first line of the cell that papermill adds
CONDITIONS = {"profile", "seed"}  # claims are recorded for any value of these


def check_parameters(namespace: MutableMapping[str, Any]) -> bool:
    """Check the current values of a chapter's parameters: call `check_parameters(globals())` in the cell after them.

    Return whether all except profile and seed have their default values; only for these the claims are recorded.

    Types and ranges are those of the parameters cell that was run last, so a corrected value counts at once. Defaults
    are those of the course's chapter with these parameters, so an edited value is no default. A notebook of your own
    has the defaults that its parameters cell had when the session began. Raises InputError for a value that is not
    allowed and for an injected name that the schema lacks.
    """
    if "In" not in namespace:
        raise SystemExit(_not_a_script(str(namespace.get("__file__", "this file"))))
    history = list(namespace["In"])
    cells = [i for i, source in enumerate(history) if _is_parameters_cell(source)]
    if not cells:
        raise InputError("no parameters cell has run in this session: run the notebook from its top")
    schema = read_schema(history[cells[-1]])
    injected = [source for source in history[cells[-1] :] if _is_injected(source)]
    for name in _assigned(injected[-1]) if injected else ():
        find_parameter(schema, name)
    for name, parameter in schema.items():
        namespace[name] = check_value(parameter, namespace.get(name))
    own = _chapter_with(set(schema)) or _first_valid([history[i] for i in cells]) or schema
    return all(namespace.get(name) == own[name].default for name in own if name not in CONDITIONS)


def _chapter_with(names: set[str]) -> dict[str, Parameter]:
    """The schema of the course's chapter with these parameters, of which a reader may have added one; or {}."""
    matches = [schema for schema in chapter_schemas() if CONDITIONS < set(schema) <= names]
    best = max(matches, key=len, default={})
    return best if len(names) - len(best) <= 1 else {}


def _first_valid(cells: list[str]) -> dict[str, Parameter]:
    for source in cells:
        try:
            return read_schema(source)
        except InputError:
            continue
    return {}


def _not_a_script(file: str) -> str:
    number = Path(file).name.partition("_")[0]
    lab = "make lab" if IS_CLONE else "dsmoe lab"
    return f"{Path(file).name} is a notebook: open it with `{lab}`, or run it with `dsmoe run {number}`"


def _is_parameters_cell(source: str) -> bool:
    return not _is_injected(source) and set(_assigned(source)) >= CONDITIONS


def _is_injected(source: str) -> bool:
    return source.lstrip().startswith(INJECTED)


def _assigned(source: str) -> list[str]:
    """The names that the statements of a cell assign, with or without a type."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return []
    targets = [target for s in statements if isinstance(s, ast.Assign) for target in s.targets]
    targets += [s.target for s in statements if isinstance(s, ast.AnnAssign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]
