"""The book's API reference, written when the book is built: one page per subpackage with every public name.

Signatures, docstrings and the comments of fields are read from the source (`api_source`). If data/equations.yml names
a function, the function also shows the equations it computes, as the chapters print them.
"""

import json
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import dsmoe_lite
from dsmoe_lite.book.api_source import PACKAGE, Module, Name
from dsmoe_lite.book.api_text import escape, inline, summary, to_rst
from dsmoe_lite.study.equations import Equation

FOLDER = "api"
TITLE = "API reference"
DISPLAYED = re.compile(r"\$\$(.+?)\$\$(?: \(eq:([\w-]+)\))?", re.DOTALL)
HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
FEW = 3  # names of a module that need no list above them


@dataclass(frozen=True, kw_only=True)
class ChapterEquation:
    """A numbered equation of a chapter."""

    latex: str
    page: str  # the chapter's file, without suffix
    section: str  # the heading above the equation


@dataclass(frozen=True, kw_only=True)
class Page:
    """One page of the reference."""

    file: str  # relative to the folder of the chapters, without suffix
    title: str  # in the table of contents
    text: str  # reStructuredText


def chapter_equations(folder: Path, pages: Sequence[str]) -> dict[str, ChapterEquation]:
    """The equations of the notebooks among `pages` that are labelled `(eq:label)`, by label."""
    equations = {}
    for page in pages:
        path = folder / f"{page}.ipynb"
        if not path.exists():
            continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        headings = [(match.start(), _plain(match[2])) for match in HEADING.finditer(text)]
        for match in DISPLAYED.finditer(text):
            if match[2]:
                section = next((title for start, title in reversed(headings) if start < match.start()), page)
                equations[match[2]] = ChapterEquation(latex=match[1], page=page, section=section)
    return equations


def _plain(heading: str) -> str:
    return heading.replace("`", "").replace("$", "").strip()


def hosting(environment: Mapping[str, str]) -> str:
    """The address of the published source if a GitHub workflow builds the book, else an empty string."""
    words = [environment.get(f"GITHUB_{word}", "") for word in ("SERVER_URL", "REPOSITORY", "SHA")]
    return "{}/{}/blob/{}".format(*words) if all(words) else ""


def reference(
    modules: Sequence[Module],
    ledger: Sequence[Equation] = (),
    equations: Mapping[str, ChapterEquation] | None = None,
    host: str = "",
) -> list[Page]:
    """Return the pages: first the names to import from the package and its subpackages, then one per subpackage.

    A function shows those of its equations in `ledger` that are among `equations`. `host`: address of the published
    source.
    """
    writer = _Writer(modules, ledger, equations or {}, host)
    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(_group(module, modules), []).append(module)
    pages = [
        Page(file=f"{FOLDER}/{_short(name)}", title=_short(name), text=writer.package(name, group))
        for name, group in groups.items()
    ]
    return [Page(file=f"{FOLDER}/index", title=TITLE, text=writer.front(groups)), *pages]


def _group(module: Module, modules: Sequence[Module]) -> str:
    """The package whose page documents a module: a subpackage, or the top for the modules outside them."""
    top = ".".join(module.name.split(".")[:2])
    is_package = any(other.name == top and other.file.endswith("/__init__.py") for other in modules)
    return top if is_package else PACKAGE


def _short(name: str) -> str:
    return name.removeprefix(f"{PACKAGE}.")


def write(folder: Path, modules: Sequence[Module], chapters: Sequence[str], ledger: Sequence[Equation]) -> list[Page]:
    """Write the reference of `modules` below `folder`, which holds the book's `chapters`; return its pages."""
    pages = reference(modules, ledger, chapter_equations(folder, chapters), hosting(os.environ))
    (folder / FOLDER).mkdir()
    for page in pages:
        (folder / f"{page.file}.rst").write_text(page.text, encoding="utf-8")
    return pages


class _Writer:
    """Write RST of modules and names, with links between them."""

    def __init__(
        self,
        modules: Sequence[Module],
        ledger: Sequence[Equation],
        equations: Mapping[str, ChapterEquation],
        host: str,
    ) -> None:
        self.host = host
        self.modules = {module.name: module for module in modules}
        self.named = {f"{module.name}.{inside}": name for module in modules for inside, name in module.walk()}
        classes: dict[str, list[str]] = {}
        for full, name in self.named.items():
            if name.kind in ("class", "exception"):
                classes.setdefault(name.name, []).append(full)
        self.classes = {name: full_names[0] for name, full_names in classes.items() if len(full_names) == 1}
        self.equations: dict[str, list[tuple[Equation, ChapterEquation]]] = {}
        for entry in ledger:
            if entry.label in equations:
                of_function = self.equations.setdefault(f"{PACKAGE}.{entry.function}", [])
                of_function.append((entry, equations[entry.label]))

    # pages

    def front(self, groups: Mapping[str, Sequence[Module]]) -> str:
        """The first page: what can be imported from the package itself, then its packages."""
        top = self.modules[PACKAGE]
        version = escape(dsmoe_lite.__version__)
        parts = [
            _heading(TITLE, "="),
            f"Every public name of ``{PACKAGE}`` {version}, from its docstring. Shapes and formulas use the letters of "
            f":py:mod:`config <{PACKAGE}.config>`; a function that computes an equation of a chapter shows it.",
            _heading("Import from the package", "-"),
            f"These names are loaded when they are first used: ``from {PACKAGE} import MoELayer, train``.",
            self._listing(
                self.canonical(top.scope.get(name, f"{PACKAGE}.{name}"))
                for name in dsmoe_lite.__all__
                if not name.startswith("_")
            ),
            _heading("Packages", "-"),
        ]
        for name, group in groups.items():
            text = summary(self.modules[name].text)
            if name == PACKAGE:
                text = "The modules at the top: " + ", ".join(_short(module.name) for module in group[1:]) + "."
            parts.append(
                f":doc:`{_short(name)} <{_short(name)}>`\n   {inline(text, self._resolver(self.modules[name]))}"
            )
        parts.append("Every name in one list: :ref:`the index <genindex>`.")
        return "\n\n".join(parts) + "\n"

    def package(self, name: str, group: Sequence[Module]) -> str:
        """The page of one package: its modules, a section each."""
        parts = [_heading(name, "="), "The modules at the top of the package." if name == PACKAGE else ""]
        for module in group:
            if module.name == name and name != PACKAGE:
                parts += [_module(module), *self._body(module)]
            elif module.names or module.exports:
                parts += [_heading(_short(module.name), "-"), _module(module), *self._body(module)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _body(self, module: Module) -> Iterator[str]:
        yield to_rst(module.text, self._resolver(module))
        if module.names or module.exports:
            yield self._source(module)
        if module.exports:
            yield f"Import from ``{module.name}``:"
            yield self._listing(map(self.canonical, module.exports))
        if len(module.names) > FEW:
            links = (f":py:obj:`{name.name} <{module.name}.{name.name}>`" for name in module.names)
            yield ".. rst-class:: api-names\n\n" + " ".join(links)
        for name in module.names:
            yield self._entry(module, name, name.name)

    def _source(self, module: Module, line: int | None = None) -> str:
        """The file of a module, or the line of one of its names; a link if the source is published."""
        file = f"src/{module.file}"
        where = escape(file if line is None else f"{Path(file).name}, line {line}")
        if self.host:
            where = f"`{where} <{self.host}/{file}{'' if line is None else f'#L{line}'}>`__"
        return f".. rst-class:: api-source\n\n{where}"

    def _listing(self, names: Iterator[str]) -> str:
        """Names and their first sentences, as a list of definitions."""
        return "\n\n".join(self._listed(name) for name in names)

    def _listed(self, full: str) -> str:
        if full not in self.named:
            return f"``{full}``"
        name = self.named[full]
        module = self.modules[self._module_of(full)]
        return f":py:obj:`{name.name} <{full}>`\n   {inline(summary(name.text), self._resolver(module, name))}"

    # names

    def _entry(self, module: Module, name: Name, inside: str) -> str:
        """The directive of one name with its text, equations and members."""
        full = f"{module.name}.{inside}"
        resolve = self._resolver(module, name, inside)
        body = [*_notes(name), to_rst(name.text, resolve)]
        if name.bases:
            body.insert(0, "Extends " + ", ".join(inline(f"`{base}`", resolve) for base in name.bases) + ".")
        body += [self._equation(entry, equation) for entry, equation in self.equations.get(full, ())]
        if name.kind in ("class", "exception", "function"):
            body.append(self._source(module, name.line))
        body += [self._entry(module, member, f"{inside}.{member.name}") for member in name.members]
        head = [f".. py:{name.kind}:: {name.name}{name.signature}", *(f"   {option}" for option in name.options)]
        content = textwrap.indent("\n\n".join(part for part in body if part), "   ")
        return "\n".join(head) + ("\n\n" + content if content else "")

    def _equation(self, entry: Equation, equation: ChapterEquation) -> str:
        latex = "\n".join(line for line in equation.latex.splitlines() if line.strip())
        page = f"../{equation.page}.html#equation-eq-{entry.label}"
        source = inline(entry.source, lambda _: None)
        caption = f":eq:`eq:{entry.label}`, `{escape(equation.section)} <{page}>`__; {source}"
        return "\n\n".join(
            [
                ".. container:: api-equation",
                textwrap.indent(f".. math::\n\n{textwrap.indent(latex, '   ')}\n\n{caption}", "   "),
            ]
        )

    # links

    def canonical(self, full: str) -> str:
        """The full name of a definition, for a name by which another module imports it."""
        seen = set()
        while full not in self.named and full not in seen:
            seen.add(full)
            module, _, word = full.rpartition(".")
            if module not in self.modules:
                break
            full = self.modules[module].scope.get(word, full)
        return full

    def _module_of(self, full: str) -> str:
        while full not in self.modules:
            full = full.rpartition(".")[0]
        return full

    def _resolver(self, module: Module, name: Name | None = None, inside: str = "") -> Callable[[str], str | None]:
        """Find what a word in a docstring names: as Python would there, or else the one class of that name."""
        parameters = () if name is None else name.parameters
        owner = f"{module.name}.{inside if name is not None and name.members else inside.rpartition('.')[0]}"

        def resolve(word: str) -> str | None:
            word = word.removesuffix("()")
            head, dot, rest = word.partition(".")
            if not re.fullmatch(r"[A-Za-z_][\w.]*", word) or word in parameters:
                return None
            candidates = [f"{owner}.{word}", self.canonical(module.scope.get(head, "")) + dot + rest, word]
            candidates += [f"{PACKAGE}.{word}"] if dot else [self.classes.get(word, "")]
            target = next((one for one in candidates if one in self.named or one in self.modules), None)
            return None if target == f"{module.name}.{inside}" else target

        return resolve


def _heading(text: str, line: str) -> str:
    shown = escape(text)
    return f"{shown}\n{line * len(shown)}"


def _module(module: Module) -> str:
    return f".. py:module:: {module.name}"


def _notes(name: Name) -> list[str]:
    """What the decorators of a name turn it into."""
    notes = []
    options = {"frozen=True": "frozen", "kw_only=True": "keyword-only"}
    for decorator in name.decorators:
        if re.match(r"(dataclasses\.)?dataclass\b", decorator):
            words = [word for option, word in options.items() if option in decorator]
            notes.append(f"Dataclass: {', '.join(words)}." if words else "Dataclass.")
        elif re.fullmatch(r"(contextlib\.)?(async)?contextmanager", decorator):
            notes.append("Context manager.")
    return notes
