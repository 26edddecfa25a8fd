"""A sweep: one notebook, fixed parameters, and lists of values whose combinations are run.

notebook: "14"               # a chapter's number or name, or the path of a notebook
parameters: {profile: smoke} # the same for all runs; may be left out
sweep:
  tables: [none, first]
  seed: [0, 1, 2]
"""

import io
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import yaml

from dsmoe_lite.common.errors import InputError, find_name
from dsmoe_lite.common.machine import require_profile
from dsmoe_lite.labs.chapters import chapter_schema, find_notebook
from dsmoe_lite.labs.executed import source_digest
from dsmoe_lite.labs.parameters import Parameter, find_parameter, parse_value

KEYS = ("notebook", "parameters", "sweep")
MOST_RUNS = 10_000


@dataclass(frozen=True)
class Sweep:
    """A checked sweep: `runs` has the parameters that each run is given, in the order of the file; the last list varies
    fastest."""

    name: str
    notebook: Path
    varied: tuple[str, ...]
    runs: list[dict[str, Any]]


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep before anything runs.

    Raises InputError with the file, the line and the nearest name or the allowed values.
    """
    return _Reader(path).sweep()


class _Reader:
    """One file. `fail` names it, and the line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.loader = yaml.SafeLoader(io.StringIO(path.read_text(encoding="utf-8")))
            self.root = self.loader.get_single_node()
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        except yaml.MarkedYAMLError as error:
            line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
            raise InputError(f"{path}{line}: is not YAML: {error.problem}") from None
        except (UnicodeDecodeError, yaml.YAMLError):
            raise InputError(f"{path}: is no text in UTF-8") from None
        except RecursionError:
            raise InputError(f"{path}: is nested too deeply") from None

    def fail(self, node: yaml.Node | None, message: str) -> NoReturn:
        line = 1 if node is None else node.start_mark.line + 1
        raise InputError(f"{self.path}, line {line}: {message}") from None

    def sweep(self) -> Sweep:
        entries = self.mapping(self.root, "must map notebook, parameters and sweep to their values")
        for key, (key_node, _) in entries.items():
            if key not in KEYS:
                self.fail(key_node, f"unknown key {key}: {find_name(key, KEYS)}")
        for key in ("notebook", "sweep"):
            if key not in entries:
                self.fail(self.root, f"the key {key} is missing")
        notebook, schema = self.notebook(entries["notebook"][1])
        given = entries["parameters"][1] if "parameters" in entries else None
        fixed_nodes = {} if given is None else self.mapping(given, "must map names to values", empty=True)
        fixed = {name: self.value(schema, *nodes) for name, nodes in fixed_nodes.items()}
        lists = {}
        for name, (name_node, value_node) in self.mapping(entries["sweep"][1], "must map names to lists").items():
            if name in fixed:
                self.fail(name_node, f"{name} is in parameters, too: remove one of them")
            lists[name] = self.values(schema, name_node, value_node)
        n_runs = math.prod(map(len, lists.values()))
        if n_runs > MOST_RUNS:
            self.fail(entries["sweep"][0], f"{n_runs:,} runs: must be at most {MOST_RUNS:,}")
        runs = [fixed | dict(zip(lists, values, strict=True)) for values in product(*lists.values())]
        return Sweep(self.path.stem, notebook, tuple(lists), runs)

    def mapping(
        self, node: yaml.Node | None, message: str, *, empty: bool = False
    ) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """The names of a mapping with the nodes of name and value."""
        if not isinstance(node, yaml.MappingNode) or not (node.value or empty):
            self.fail(node, message)
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for name_node, value_node in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                self.fail(name_node, "a name must be one word")
            name = name_node.value
            if name in found:
                self.fail(name_node, f"{name} is given twice")
            found[name] = name_node, value_node
        return found

    def notebook(self, node: yaml.Node) -> tuple[Path, dict[str, Parameter]]:
        if not isinstance(node, yaml.ScalarNode):
            self.fail(node, "notebook must be a chapter's number or name, or the path of a notebook")
        try:
            beside = (self.path.parent / node.value).resolve()
            is_beside = node.value.endswith(".ipynb") and beside.is_file()
            notebook = find_notebook(str(beside) if is_beside else node.value)
            schema = chapter_schema(notebook)
            source_digest(notebook.read_bytes())
        except InputError as error:
            self.fail(node, str(error))
        except (OSError, ValueError, RuntimeError):
            self.fail(node, f"{node.value!r} cannot be read as a notebook")
        return notebook, schema

    def values(self, schema: dict[str, Parameter], name: yaml.Node, node: yaml.Node) -> list[Any]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            self.fail(node, f"{name.value} must have a list of values, as in [0, 1, 2]")
        values: list[Any] = []
        for item in node.value:
            value = self.value(schema, name, item)
            if value in values:
                self.fail(item, f"{name.value} = {value!r} is listed twice")
            values.append(value)
        return values

    def value(self, schema: dict[str, Parameter], name: yaml.Node, node: yaml.Node) -> Any:
        """The value as it is written, read as on the command line: 010 is ten, and `none` is a text."""
        try:
            parameter = find_parameter(schema, name.value)
        except InputError as error:
            self.fail(name, str(error))
        if not isinstance(node, yaml.ScalarNode):
            self.fail(node, f"{name.value} must have one value here, {parameter.describe()}")
        try:
            value = parse_value(parameter, node.value)
            if parameter.name == "profile":
                require_profile(value)
        except InputError as error:
            self.fail(node, str(error))
        return value
