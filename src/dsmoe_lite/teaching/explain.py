"""Why an answer stopped, as far as its source tells. Never what it raised: that may carry the inputs of a check."""

import ast
import builtins
from collections.abc import Iterable, Sequence


def explain(source: str, given: Sequence[str], names: Iterable[str], forbid: Sequence[str]) -> str:
    """One sentence on a syntax error, a forbidden import, or a name that the cell does not define; "" if none is found.

    given: the sources that run before it; names: those that are there besides.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return f"Line {error.lineno} is not Python: {error.msg}."
    except (ValueError, RecursionError, MemoryError):
        return "The cell is not Python."
    forbidden = [module for module in _imports(tree) if any(_is_within(module, one) for one in forbid)]
    if forbidden:
        return f"It imports {forbidden[0]}, which this question does not allow."
    known = {*dir(builtins), *names, "__name__"}.union(*map(defined_names, given), defined_names(source))
    unknown = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id not in known]
    return f"It uses {unknown[0]}, which its cell does not define; an answer is graded alone." if unknown else ""


def defined_names(source: str) -> set[str]:
    """The names that a cell defines, in any scope; none if it is not Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
    return found


def _imports(tree: ast.AST) -> list[str]:
    """Full names of what is imported, `from a import b` as a.b."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def _is_within(module: str, forbidden: str) -> bool:
    return module == forbidden or module.startswith(f"{forbidden}.")
