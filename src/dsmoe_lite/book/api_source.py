"""The public names of the package, read from its source: nothing is imported, so no GPU, Triton or nvcc is needed.

A name is public if neither it nor its module begins with an underscore and the module defines it. Type variables are
left out.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "dsmoe_lite"
NOT_PROSE = re.compile(r"\s*#?\s*(type: ignore|noqa|fmt: |pragma: ).*")  # instructions to tools, in a comment
TYPE_VARIABLES = ("TypeVar", "ParamSpec", "TypeVarTuple")
LONGEST_VALUE = 72  # characters; the value of a constant is left out if it is longer


@dataclass(frozen=True, kw_only=True)
class Name:
    """One public name: a class, function, constant, method, property or field."""

    kind: str  # its directive in Sphinx: class, exception, function, data, method, property or attribute
    name: str
    line: int  # in the source, from 1
    signature: str = ""  # parameters and return type; the package's types by their full names
    options: tuple[str, ...] = ()  # of the directive, such as ":classmethod:" or ":type: int"
    text: str = ""  # docstring, or comment of a field or constant
    bases: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    decorators: tuple[str, ...] = ()
    members: tuple["Name", ...] = ()


@dataclass(frozen=True, kw_only=True)
class Module:
    """One module: its docstring, its public names in the order of the source, what it imports from the package."""

    name: str  # such as dsmoe_lite.layers.router
    file: str  # such as dsmoe_lite/layers/router.py
    text: str  # docstring
    names: tuple[Name, ...]
    scope: Mapping[str, str]  # every name of the package that the module defines or imports -> full name
    exports: tuple[str, ...] = ()  # full names that __all__ offers from other modules

    def walk(self) -> Iterator[tuple[str, Name]]:
        """Every name and member, each with its path in the module, such as Router.forward."""
        for name in self.names:
            yield name.name, name
            for member in name.members:
                yield f"{name.name}.{member.name}", member


def read_package(folder: Path, package: str = PACKAGE) -> list[Module]:
    """Read the public modules of the package in `folder`, in alphabetical order; the package itself is first."""
    modules = []
    for path in folder.rglob("*.py"):
        file = Path(package, path.relative_to(folder)).as_posix()
        parts = file.removesuffix(".py").removesuffix("/__init__").split("/")
        if not any(part.startswith("_") for part in parts):
            modules.append(read_module(path.read_text(encoding="utf-8"), ".".join(parts), file))
    return sorted(modules, key=lambda module: module.name)


def read_module(code: str, name: str, file: str) -> Module:
    """Read the source of the module `name`."""
    tree = ast.parse(code)
    package = name.split(".")[0]
    statements = list(_statements(tree.body))
    scope = _imports(statements, package)
    defined = {target for node in statements if not _is_type_variable(node) for target in _targets(node)}
    scope |= {target: f"{name}.{target}" for target in defined if not target.startswith("_")}
    reader = _Reader(scope, _comments(code), code)
    names = [name for node in statements for name in reader.names(node, inside_class=False)]
    exports = [scope[word] for word in _all(statements) if word in scope and word not in defined]
    return Module(
        name=name,
        file=file,
        text=ast.get_docstring(tree) or "",
        names=tuple(_first_of_each(names)),
        scope=scope,
        exports=tuple(exports),
    )


def _first_of_each(names: Sequence[Name]) -> list[Name]:
    """Drop second definitions of a name, such as another branch of an `if` or the setter of a property."""
    return list({name.name: name for name in reversed(names)}.values())[::-1]


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, including those inside `if` and `try`; none if the body ends by raising."""
    if body and isinstance(body[-1], ast.Raise):
        return
    for node in body:
        if isinstance(node, ast.If):
            yield from _statements(node.body)
            yield from _statements(node.orelse)
        elif isinstance(node, ast.Try):
            for part in (node.body, *(handler.body for handler in node.handlers), node.orelse, node.finalbody):
                yield from _statements(part)
        else:
            yield node


def _imports(statements: Sequence[ast.stmt], package: str) -> dict[str, str]:
    """What a module imports from the package: name in the module -> full name."""
    scope: dict[str, str] = {}
    for node in statements:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            scope |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return scope


def _targets(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    if isinstance(node, ast.Assign):
        stored = [one for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name)]
        return [one.id for one in stored if isinstance(one.ctx, ast.Store)]
    return []


def _is_type_variable(node: ast.stmt) -> bool:
    value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
    return isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in TYPE_VARIABLES


def _all(statements: Sequence[ast.stmt]) -> list[str]:
    """The strings of `__all__`; none if it is not a plain list."""
    for node in statements:
        if isinstance(node, ast.Assign) and _targets(node) == ["__all__"] and isinstance(node.value, ast.List):
            return [
                one.value for one in node.value.elts if isinstance(one, ast.Constant) and isinstance(one.value, str)
            ]
    return []


def _comments(code: str) -> dict[int, tuple[str, bool]]:
    """Line -> its comment, and whether the comment follows code."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            text = NOT_PROSE.sub("", token.string).removeprefix("#").removeprefix(":").strip()
            comments[token.start[0]] = (text, bool(token.line[: token.start[1]].strip()))
    return comments


class _Qualify(ast.NodeTransformer):
    """Write full names of the package in annotations, so that Sphinx can link them, and remove quotes."""

    def __init__(self, scope: Mapping[str, str]) -> None:
        self.scope = scope

    def visit_arguments(self, node: ast.arguments) -> ast.arguments:  # defaults stay as they are
        for one in _all_parameters(node):
            self.generic_visit(one)
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.parse(self.scope[node.id], mode="eval").body if node.id in self.scope else node

    def visit_Constant(self, node: ast.Constant) -> Any:
        return self.visit(ast.parse(node.value, mode="eval").body) if isinstance(node.value, str) else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if ast.unparse(node.value) != "Literal":
            self.generic_visit(node)
        return node


class _Reader:
    """Read the public names that statements define."""

    def __init__(self, scope: Mapping[str, str], comments: Mapping[int, tuple[str, bool]], code: str) -> None:
        self.scope, self.comments, self.code = scope, comments, code.splitlines()

    def names(self, node: ast.stmt, *, inside_class: bool) -> list[Name]:
        """The public names that a statement of a module or class defines."""
        public = [name for name in _targets(node) if not name.startswith("_")]
        if not public:
            return []
        if isinstance(node, ast.ClassDef):
            return [self._class(node)]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return [self._function(node, inside_class)]
        return self._constant(node, public, inside_class)

    def _class(self, node: ast.ClassDef) -> Name:
        members = [member for one in node.body for member in self.names(one, inside_class=True)]
        bases = tuple(ast.unparse(base) for base in node.bases)
        is_error = any(base.split(".")[-1].endswith(("Error", "Exception")) for base in bases)
        init = next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
        return Name(
            kind="exception" if is_error else "class",
            name=node.name,
            line=node.lineno,
            signature="" if init is None else f"({self._arguments(init.args, drop_first=True)})",
            text=ast.get_docstring(node) or "",
            bases=bases,
            parameters=() if init is None else _parameters(init.args),
            decorators=tuple(ast.unparse(one) for one in node.decorator_list),
            members=tuple(_first_of_each(members)),
        )

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, inside_class: bool) -> Name:
        decorators = tuple(ast.unparse(one) for one in node.decorator_list)
        returns = "" if node.returns is None else self._annotation(node.returns)
        is_property = inside_class and bool(
            {"property", "cached_property", "functools.cached_property"} & {*decorators}
        )
        options = [f":type: {returns}"] if is_property and returns else []
        options += [f":{word}:" for word in ("classmethod", "staticmethod") if word in decorators]
        options += [":abstractmethod:"] if "abstractmethod" in decorators else []
        options += [":async:"] if isinstance(node, ast.AsyncFunctionDef) else []
        arguments = self._arguments(node.args, drop_first=inside_class and "staticmethod" not in decorators)
        return Name(
            kind="property" if is_property else "method" if inside_class else "function",
            name=node.name,
            line=node.lineno,
            signature="" if is_property else f"({arguments})" + (f" -> {returns}" if returns else ""),
            options=tuple(options),
            text=ast.get_docstring(node) or "",
            parameters=_parameters(node.args),
            decorators=decorators,
        )

    def _constant(self, node: ast.stmt, public: Sequence[str], inside_class: bool) -> list[Name]:
        assert isinstance(node, (ast.Assign, ast.AnnAssign))
        if _is_type_variable(node):
            return []
        options = []
        if isinstance(node, ast.AnnAssign):
            options.append(f":type: {self._annotation(node.annotation)}")
        value = self._written(node.value)
        if 0 < len(value) <= LONGEST_VALUE and len(public) == 1:
            options.append(f":value: {value}")
        kind = "attribute" if inside_class else "data"
        text = self._comment(node)
        return [Name(kind=kind, name=name, line=node.lineno, options=tuple(options), text=text) for name in public]

    def _written(self, node: ast.expr | None) -> str:
        """A value as written in the source; empty if there is none or it spans several lines."""
        if node is None or node.lineno != node.end_lineno:
            return ""
        return self.code[node.lineno - 1].encode()[node.col_offset : node.end_col_offset].decode()

    def _comment(self, node: ast.stmt) -> str:
        """The comment at the end of the statement's last or first line, or else the comment lines directly above it."""
        assert node.end_lineno is not None
        for line in (node.end_lineno, node.lineno):
            text, follows_code = self.comments.get(line, ("", False))
            if text and follows_code:
                return text
        above: list[str] = []
        line = node.lineno - 1
        while line in self.comments and not self.comments[line][1]:
            above.insert(0, self.comments[line][0])
            line -= 1
        return "" if any(text.startswith("---") for text in above) else " ".join(above)

    def _annotation(self, node: ast.expr) -> str:
        return ast.unparse(_Qualify(self.scope).visit(node))

    def _arguments(self, arguments: ast.arguments, *, drop_first: bool) -> str:
        """The parameters as written, without `self` or `cls`."""
        if drop_first:
            del (arguments.posonlyargs or arguments.args)[:1]
        return ast.unparse(_Qualify(self.scope).visit(arguments))


def _all_parameters(arguments: ast.arguments) -> list[ast.arg]:
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
    return [one for one in every if one is not None]


def _parameters(arguments: ast.arguments) -> tuple[str, ...]:
    return tuple(one.arg for one in _all_parameters(arguments))
