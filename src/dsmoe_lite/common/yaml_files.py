"""YAML files of settings, read by the rules of YAML 1.2, without the traps of 1.1."""

import re
from pathlib import Path
from typing import Any

from dsmoe_lite.common.errors import InputError, shorten

MAX_VALUES = 100_000  # of a file, with its aliases written out
SCALARS = {  # YAML 1.2's core schema, without octal and hexadecimal numbers: 010, 1:30 and yes are text
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read the mapping in a YAML or JSON file.

    Raises InputError naming the file, and the line if there is one: for a file that is not UTF-8 or not YAML, a name
    that is given twice, and a file that is nested too deeply or too large once its aliases are written out.
    """
    import yaml

    try:
        loader = _loader()(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        _require_small(path, node)
        values = None if node is None else loader.construct_document(node)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}: is not YAML: {error.problem}{line}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an integer of more than 4300 digits
        raise InputError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must be a mapping of names to values")
    return values


def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a name that is given twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {}  # not those of YAML 1.1
    for tag, pattern in SCALARS.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), None)
    return Loader


def _require_small(path: Path, root: Any) -> None:
    sizes: dict[int, int] = {}

    def size(node: Any, parents: frozenset[int]) -> int:
        if id(node) in parents:
            raise InputError(f"{path}: an alias contains itself; write the values out")
        if id(node) not in sizes:
            nested = node.value if isinstance(node.value, list) else []
            children = [one for child in nested for one in (child if isinstance(child, tuple) else (child,))]
            sizes[id(node)] = 1 + sum(size(child, parents | {id(node)}) for child in children)
        return sizes[id(node)]

    total = 0 if root is None else size(root, frozenset())
    if total > MAX_VALUES:
        raise InputError(f"{path}: holds {shorten(total)} values; must be at most {MAX_VALUES}")
