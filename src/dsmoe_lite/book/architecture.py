"""The map of the package in ARCHITECTURE.md: its picture and its tables, all read from the source code."""

import ast
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import permutations
from pathlib import Path

from dsmoe_lite.book import svg
from dsmoe_lite.book.svg import text
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.paths import NOTEBOOKS, REPOSITORY

PACKAGE = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "ARCHITECTURE.md"
PICTURE = NOTEBOOKS / "images" / "architecture.svg"
BOOK_PAGE = NOTEBOOKS / "pages" / "architecture.md"

Imports = Mapping[str, frozenset[str]]  # part -> the parts it imports
GENERATED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(\./([^)]+)\)")
LETTER = re.compile(r"^    (\S+)  +(\S.*)$", re.MULTILINE)  # a line of the legend in the docstring of config

SLOTS = 3  # boxes of a floor
FIRST_SLOTS = {1: (1,), 2: (0, 2), 3: (0, 1, 2)}  # by the number of boxes
BOX, HEIGHT, GUTTER, GAP, LEFT, TOP = 250, 80, 50, 34, 20, 74  # px
LINE, LINES = 33, 3  # characters and lines of a box's text


# --- what the code says ----------------------------------------------------------------------------------------------


def parts() -> list[str]:
    """Return the parts of the package (modules and folders at its top) in the order of pyproject's contract."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    return list(contract["layers"])


def imports(folder: Path = PACKAGE) -> Imports:
    """Return which parts each part imports anywhere in its code, inside functions too."""
    known = {_part(path, folder) for path in folder.rglob("*.py")}
    found: dict[str, set[str]] = {part: set() for part in known - {"__init__"}}
    for path in folder.rglob("*.py"):
        part = _part(path, folder)
        if part != "__init__":
            imported = {name.split(".")[1] for name in _imported(path) if name.startswith("dsmoe_lite.")}
            found[part] |= imported & known - {part}
    return {part: frozenset(found[part]) for part in sorted(found)}


def _part(path: Path, folder: Path) -> str:
    return path.relative_to(folder).parts[0].removesuffix(".py")


def _imported(path: Path) -> Iterator[str]:
    """The full names of all that a module imports."""
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def floors(imported: Imports) -> list[list[str]]:
    """Group parts by the longest chain of imports below them; the top floor first, names in order."""
    level: dict[str, int] = {}

    def height(part: str) -> int:
        if part not in level:
            level[part] = 1 + max(map(height, imported[part]), default=-1)
        return level[part]

    top = max(map(height, imported))
    return [sorted(part for part in imported if level[part] == at) for at in range(top, -1, -1)]


def shortest(imported: Imports) -> Imports:
    """Leave out what follows from the rest: the import of a part that another imported part already reaches."""

    def reach(part: str) -> frozenset[str]:
        return imported[part].union(*map(reach, imported[part]))

    return {
        part: frozenset(one for one in below if not any(one in reach(other) for other in below - {one}))
        for part, below in imported.items()
    }


def source(part: str) -> Path:
    """The file whose docstring describes a part."""
    folder = PACKAGE / part
    return folder / "__init__.py" if folder.is_dir() else PACKAGE / f"{part}.py"


def purpose(path: Path) -> str:
    """The first sentence of a module's docstring."""
    docstring = " ".join((ast.get_docstring(_parsed(path)) or "").split())
    if not docstring:
        raise InputError(f"{path}: has no docstring; say in one line what it is for")
    return re.split(r"(?<=\.) ", docstring)[0]


# --- the picture -----------------------------------------------------------------------------------------------------


def picture() -> str:
    """Return the SVG: a box for each part, on a floor above all that it imports, and lines to its imports."""
    imported = imports()
    lines, stacked = shortest(imported), floors(imported)
    row, slot = _rows(stacked), _arranged(stacked, lines)
    width, height = 2 * LEFT + SLOTS * BOX + (SLOTS - 1) * GUTTER, TOP + len(stacked) * (HEIGHT + GAP)
    box = {part: (LEFT + slot[part] * (BOX + GUTTER), TOP + row[part] * (HEIGHT + GAP)) for part in imported}
    pairs = {(part, below) for part in lines for below in lines[part]}
    around = frozenset(pair for pair in pairs if _passes_a_box(*pair, row, slot))
    drawn = [*_lines(lines, box, around), *(_box(part, *box[part]) for part in sorted(box))]
    described = "; ".join(f"{part} imports {', '.join(sorted(lines[part]))}" for part in parts() if lines[part])
    rule = "A part imports only from parts below it. Lines: direct imports, except those that follow from other lines."
    head = [text(LEFT, 34, "src/dsmoe_lite", size=16, weight=650), text(LEFT, 55, rule, color=svg.MUTED)]
    title = "The parts of dsmoe_lite and what they import"
    return svg.drawing(width, height, title, f"Drawn from the imports. {described}.", [*head, *drawn])


def _arranged(stacked: Sequence[Sequence[str]], lines: Imports) -> dict[str, int]:
    """Give each part a slot of its floor so that lines are short and pass few boxes: improve floor by floor."""
    for floor in stacked:
        if len(floor) > SLOTS:
            raise InputError(f"{', '.join(floor)}: {len(floor)} parts on one floor, the picture has room for {SLOTS}")
    row = _rows(stacked)
    slot = {part: at for floor in stacked for part, at in zip(floor, FIRST_SLOTS[len(floor)], strict=True)}

    def cost() -> float:
        pairs = [(part, below) for part in lines for below in lines[part]]
        length = sum(abs(slot[part] - slot[below]) for part, below in pairs)
        return length + 3 * sum(_passes_a_box(part, below, row, slot) for part, below in pairs)

    for _ in range(4):
        for floor in stacked:
            tried = []
            for places in permutations(range(SLOTS), len(floor)):
                slot.update(zip(floor, places, strict=True))
                tried.append((cost(), places))
            slot.update(zip(floor, min(tried)[1], strict=True))
    return slot


def _rows(stacked: Sequence[Sequence[str]]) -> dict[str, int]:
    return {part: number for number, floor in enumerate(stacked) for part in floor}


def _passes_a_box(upper: str, lower: str, row: Mapping[str, int], slot: Mapping[str, int]) -> bool:
    """Whether a box stands in the slot of either end, on a floor between them."""
    between = range(row[upper] + 1, row[lower])
    return any(row[part] in between and slot[part] in (slot[upper], slot[lower]) for part in row)


def _lines(lines: Imports, box: Mapping[str, tuple[int, int]], around: frozenset[tuple[str, str]]) -> Iterator[str]:
    """A curve for every import; those in `around` run down the nearest gutter, each in a lane of its own."""
    lanes: dict[float, int] = {}
    for upper in sorted(lines):
        for lower in sorted(lines[upper]):
            x0, y0, x1, y1 = box[upper][0] + BOX / 2, box[upper][1] + HEIGHT, box[lower][0] + BOX / 2, box[lower][1]
            if (upper, lower) in around:
                side = 1 if x1 > x0 or (x1 == x0 and x0 < LEFT + 2 * BOX) else -1
                gutter = x0 + side * (BOX + GUTTER) / 2
                lanes[gutter] = lanes.get(gutter, 0) + 1
                x, turn = gutter + 9 * (lanes[gutter] - 1), GAP
                path = (
                    f"M{x0:g} {y0} C{x0:g} {y0 + turn} {x:g} {y0} {x:g} {y0 + turn} "
                    f"L{x:g} {y1 - turn} C{x:g} {y1} {x1:g} {y1 - turn} {x1:g} {y1}"
                )
            else:
                bend = GAP * 0.6 if y1 - y0 == GAP else (y1 - y0) / 3
                path = f"M{x0:g} {y0} C{x0:g} {y0 + bend:g} {x1:g} {y1 - bend:g} {x1:g} {y1}"
            yield f'<path d="{path}" fill="none" stroke="{svg.EDGE}" stroke-width="1.5"/>'


def _box(part: str, x: float, y: float) -> str:
    name = f"{part}/" if (PACKAGE / part).is_dir() else f"{part}.py"
    lines = enumerate(_fitted(purpose(source(part))))
    return "\n".join(
        [
            f'<rect x="{x:g}" y="{y:g}" width="{BOX}" height="{HEIGHT}" rx="6" fill="#F7F8FA" stroke="{svg.BORDER}"/>',
            text(x + 12, y + 21, name, size=14, weight=650),
            *(text(x + 12, y + 40 + 15 * number, line, size=12, color=svg.MUTED) for number, line in lines),
        ]
    )


def _fitted(sentence: str) -> list[str]:
    """The sentence in lines of a box; what does not fit is cut off, at a punctuation mark of its second half if any."""
    whole = sentence.replace("`", "")
    shown = whole
    while len(lines := textwrap.wrap(shown, LINE)) > LINES:
        shorter = re.split(r"[,:;.] [^,:;]*$", shown)[0]
        if shorter == shown or 2 * len(shorter) < len(whole):
            return textwrap.wrap(textwrap.shorten(whole, LINE * LINES - 8, placeholder=" …"), LINE)
        shown = shorter + "."
    return lines


# --- the tables ------------------------------------------------------------------------------------------------------


def packages_table() -> str:
    """One row per part, highest first: its purpose and what it imports directly."""
    imported, order = imports(), parts()
    rows = [
        f"| {_link(source(part), part)} | {purpose(source(part))} | "
        f"{', '.join(one for one in order if one in imported[part]) or '-'} |"
        for part in order
    ]
    return "\n".join(["| part | what it is for | imports |", "|---|---|---|", *rows])


def letters_table() -> str:
    """The legend in the docstring of `config`, one row per letter."""
    legend = LETTER.findall(ast.get_docstring(_parsed(PACKAGE / "config" / "__init__.py"), clean=False) or "")
    return "\n".join(
        ["| letter | meaning |", "|---|---|", *(f"| {letter} | {meaning} |" for letter, meaning in legend)]
    )


def charts_table() -> str:
    """For every chapter: the titles of its charts, the function that draws each, and that function's file."""
    drawing = _chart_functions()
    parts = []
    for path in sorted(NOTEBOOKS.glob("[0-9]*.py")):
        rows = [
            f"| {title} | {_link(drawing[name][0], f'`{name}`')} |"
            for title, name in _charts_of(_parsed(path), drawing)
        ]
        number = path.stem[:2]
        head = [f"**Chapter {number}**", "", "| chart | drawn by |", "|---|---|"]
        parts.append("\n".join([*head, *rows]))
    return "\n\n".join(parts)


def _link(path: Path, name: str) -> str:
    return f"[{name}](./{path.relative_to(REPOSITORY).as_posix()})"


def _chart_functions() -> dict[str, tuple[Path, str]]:
    """Every chart of viz/charts.py: the file of its function, and the title that it has by default."""
    found = {"explore": (PACKAGE / "viz" / "explorer.py", "the routing explorer")}
    for node in _parsed(PACKAGE / "viz" / "charts.py").body:
        if isinstance(node, ast.ImportFrom) and node.module:
            path = PACKAGE.parent / Path(*node.module.split(".")).with_suffix(".py")
            defined = {one.name: one for one in _parsed(path).body if isinstance(one, ast.FunctionDef)}
            for name in node.names:
                found[name.name] = (path, _default_title(defined[name.name]))
    return found


def _default_title(function: ast.FunctionDef) -> str:
    defaults = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    titles = [value for argument, value in defaults if argument.arg == "title"]
    return _words(titles[0]) if titles and titles[0] is not None else ""


def _charts_of(chapter: ast.Module, drawing: Mapping[str, tuple[Path, str]]) -> list[tuple[str, str]]:
    """(title, function) of every chart that a chapter draws, in its order."""
    found: list[tuple[int, str, str]] = []
    functions = [node for node in ast.walk(chapter) if isinstance(node, ast.FunctionDef)]
    inside = {id(node): function for function in functions for node in ast.walk(function)}
    for call in (node for node in ast.walk(chapter) if isinstance(node, ast.Call)):
        name = _called(call)
        if name not in drawing:
            continue
        given = next((word.value for word in call.keywords if word.arg == "title"), None)
        around = inside.get(id(call))
        titles = [(call.lineno, drawing[name][1])] if given is None else _titles(given, call.lineno, around, chapter)
        found += [(*title, name) for title in titles]
    return list(dict.fromkeys((title, name) for _, title, name in sorted(found)))


def _called(call: ast.Call) -> str:
    function = call.func
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "charts":
        return function.attr
    return "explore" if _name(function) == "explore" else ""


def _titles(given: ast.expr, line: int, around: ast.FunctionDef | None, chapter: ast.Module) -> list[tuple[int, str]]:
    """The words of a title and their line; if it is a name, of its assignment in `around` or of all calls of that."""
    if not isinstance(given, ast.Name) or around is None:
        return [(line, _words(given))]
    for node in ast.walk(around):
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [given.id]:
            return [(line, _words(node.value))]
    at = [argument.arg for argument in around.args.args].index(given.id)
    calls = [node for node in ast.walk(chapter) if isinstance(node, ast.Call) and _name(node.func) == around.name]
    return [(call.lineno, _words(call.args[at])) for call in calls]


def _name(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else ""


def _words(value: ast.expr) -> str:
    """A string as written, with … for what is filled in."""
    if isinstance(value, ast.Constant):
        return str(value.value)
    if isinstance(value, ast.JoinedStr):
        return "".join(_words(part) if isinstance(part, ast.Constant) else "…" for part in value.values)
    return "…"


# --- the page --------------------------------------------------------------------------------------------------------


def page(markdown: str) -> str:
    """Return ARCHITECTURE.md's text with its generated blocks renewed. InputError for a block that is not known."""
    tables = {"packages": packages_table, "letters": letters_table, "charts": charts_table}

    def renewed(block: re.Match[str]) -> str:
        if block[2] not in tables:
            raise InputError(f"{PAGE}: generated: {block[2]}: must be one of {', '.join(tables)}")
        return f"{block[1]}{tables[block[2]]()}\n{block[3]}"

    return GENERATED.sub(renewed, markdown)


def book_page(markdown: str) -> str:
    """Return ARCHITECTURE.md as a page in notebooks/pages: links to code become links into the API reference."""

    def linked(match: re.Match[str]) -> str:
        shown, target = match[1].strip("`"), match[2]
        if target.startswith("src/"):
            module = target.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            is_module = shown == match[1] or shown.endswith((".py", "/"))
            full = module if is_module else f"{module}.{shown}"
            return f"{{py:{'mod' if is_module else 'obj'}}}`{shown} <{full}>`"
        if target.startswith("notebooks/"):
            return f"[{match[1]}](../{target.removeprefix('notebooks/')})"
        return match[1]  # tests are not in the book

    return "% Written from ARCHITECTURE.md by `make generate`.\n\n" + LINK.sub(linked, markdown)
