"""The parameters of a chapter: its typed, commented `parameters` cell is the schema.

    top_k: int = 2  # experts a token visits: 1..4
    profile: str = "cpu"  # size of the run: smoke | cpu | gpu
    sentence: str = "the cat"  # text to colour: 1..400 characters
    shared: bool = True  # one expert is always on

After the last colon comes the range (`low..high`, inclusive; for text, of its length) or the choices. A bool needs
neither.
"""

import ast
import difflib
import io
import re
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dsmoe_lite.common.errors import InputError, require

TYPES = {"str": str, "int": int, "float": float, "bool": bool}
TYPE_NAMES = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
RANGE = re.compile(r"(?P<low>[^\s.]\S*?)\.\.(?P<high>\S+)(?: .+)?")
SYNTAX = "write `name: type = value  # help: low..high` or `# help: this | that`"


@dataclass(frozen=True)
class Parameter:
    """One parameter, with its `choices` or its inclusive range `low` to `high` (for text, of its length)."""

    name: str
    type: str
    default: Any
    help: str
    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None

    def describe(self) -> str:
        """Describe the allowed values, for an error message."""
        if self.type == "bool":
            return TYPE_NAMES["bool"]
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        unit = " characters" if self.type == "str" else ""
        return f"{TYPE_NAMES[self.type]}, {self.low}..{self.high}{unit}"


def read_schema(source: str) -> dict[str, Parameter]:
    """Parse the parameters cell `source`. Raises InputError naming a line that is no typed, commented parameter."""
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise InputError(f"parameters cell, line {error.lineno}: {SYNTAX}") from None
    comments, schema = _comments(source), {}
    for statement in statements:
        parameter = _parse(statement, comments.get(statement.end_lineno or 0, ""))
        check_value(parameter, parameter.default)
        schema[parameter.name] = parameter
    return schema


def find_parameter(schema: Mapping[str, Parameter], name: str) -> Parameter:
    """The parameter `name`. Raises InputError with the nearest name and all known ones if there is none."""
    if name in schema:
        return schema[name]
    near = difflib.get_close_matches(name, schema, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"unknown parameter {name}: {hint}this chapter has {', '.join(schema)}")


def check_value(parameter: Parameter, value: Any) -> Any:
    """Return `value`, converted from int if the parameter is a float. Raises InputError if it is not allowed."""
    name, remedy = parameter.name, f"must be {parameter.describe()}"
    if parameter.type == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    require(type(value) is TYPES[parameter.type], name, value, remedy)
    if parameter.choices:
        require(value in parameter.choices, name, value, remedy)
    else:
        size = len(value) if parameter.type == "str" else value
        require(parameter.low <= size <= parameter.high, name, value, remedy)  # type: ignore[operator]
    return value


def parse_value(parameter: Parameter, text: str) -> Any:
    """Convert text from the command line to a checked value."""
    return check_value(parameter, _convert(parameter.type, text, text))


def parse_assignments(schema: Mapping[str, Parameter], assignments: Iterable[str]) -> dict[str, Any]:
    """Convert `name=value` strings to checked values. Raises InputError also for a name given twice."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"-p {assignment}: write -p name=value")
        parameter = find_parameter(schema, name.strip())
        require(parameter.name not in values, parameter.name, text, "is given twice")
        values[parameter.name] = parse_value(parameter, text)
    return values


def _parse(statement: ast.stmt, comment: str) -> Parameter:
    match statement:
        case ast.AnnAssign(target=ast.Name(id=name), annotation=ast.Name(id=kind), value=ast.expr() as value):
            pass
        case _:
            raise InputError(f"parameters cell, line {statement.lineno}: {SYNTAX}")
    require(kind in TYPES, name, kind, f"must have one of the types {', '.join(TYPES)}")
    try:
        default = ast.literal_eval(value)
    except ValueError:
        raise InputError(f"parameter {name}: its default must be a literal") from None
    if kind == "bool":
        require(bool(comment), name, default, f"needs a comment: {SYNTAX}")
        return Parameter(name, kind, default, comment, choices=(True, False))
    help_text, colon, spec = comment.rpartition(": ")
    require(bool(colon), name, default, f"needs a comment with its range: {SYNTAX}")
    if " | " in spec:
        choices = tuple(_convert(kind, choice.strip(), default, name) for choice in spec.split(" | "))
        return Parameter(name, kind, default, help_text, choices=choices)
    bounds = RANGE.fullmatch(spec)
    require(bounds is not None, name, spec, SYNTAX)
    assert bounds is not None
    number = "int" if kind == "str" else kind
    low, high = (_convert(number, bounds[end], spec, name) for end in ("low", "high"))
    require(low <= high, name, spec, "the range is empty")
    return Parameter(name, kind, default, help_text, low=low, high=high)


def _convert(kind: str, text: str, shown: Any, name: str = "") -> Any:
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        return TYPES[kind](text)
    except (KeyError, ValueError):
        if not name:
            return text  # `check_value` names the expected type
        raise InputError(f"{name} = {shown!r}: {text!r} is not {TYPE_NAMES[kind]}") from None


def _comments(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ").strip() for token in tokens if token.type == tokenize.COMMENT}
