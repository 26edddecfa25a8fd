"""ARCHITECTURE.md is what the code is: its picture, its tables, its names, and its links."""

import ast
import re
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dsmoe_lite.book import architecture, generated
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.paths import REPOSITORY

TEXT = architecture.PAGE.read_text(encoding="utf-8")
LINKS = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", TEXT)
SVG = "{http://www.w3.org/2000/svg}"


def section(title: str) -> str:
    return re.split(r"^## ", TEXT.split(f"## {title}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def test_generated_files_are_up_to_date() -> None:
    assert [path.name for path in generated.stale()] == [], "run `make generate`"


def test_stale_files_are_named_and_written(tmp_path, monkeypatch, capsys) -> None:
    copy = tmp_path / "copy.md"
    copy.write_text(TEXT.replace("| [common]", "| [comon]"), encoding="utf-8")
    monkeypatch.setattr(architecture, "PAGE", copy)
    monkeypatch.setattr(architecture, "PICTURE", tmp_path / "picture.svg")
    monkeypatch.setattr(architecture, "BOOK_PAGE", tmp_path / "page.md")
    monkeypatch.setattr(generated.scoreboard, "PICTURE", tmp_path / "claims.svg")
    monkeypatch.setattr(generated.scoreboard, "picture", lambda claims: "<svg/>")
    assert generated.main([]) == 1
    assert "copy.md: out of date: run `make generate`" in capsys.readouterr().out
    assert generated.main(["--write"]) == 0
    assert copy.read_text(encoding="utf-8") == architecture.page(TEXT)
    assert generated.main([]) == 0


@pytest.mark.parametrize(
    ("link", "in_book"),
    [
        ("[`Routing`](./src/dsmoe_lite/layers/router.py)", "{py:obj}`Routing <dsmoe_lite.layers.router.Routing>`"),
        ("[`charts.py`](./src/dsmoe_lite/viz/charts.py)", "{py:mod}`charts.py <dsmoe_lite.viz.charts>`"),
        ("[`train`](./src/dsmoe_lite/training/train.py)", "{py:obj}`train <dsmoe_lite.training.train.train>`"),
        ("[cli](./src/dsmoe_lite/cli/__init__.py)", "{py:mod}`cli <dsmoe_lite.cli>`"),
        ("[`test_balance.py`](./tests/test_balance.py)", "`test_balance.py`"),
        ("![a](./notebooks/images/a.svg)", "![a](../images/a.svg)"),
        ("[here](#where-is-it)", "[here](#where-is-it)"),
    ],
)  # fmt: skip
def test_links_of_the_page_of_the_book_lead_into_the_reference(link: str, in_book: str) -> None:
    assert architecture.book_page(link).splitlines()[-1] == in_book


def test_a_block_that_nothing_writes_is_refused() -> None:
    with pytest.raises(InputError, match="generated: cooks: must be one of packages, letters, charts"):
        architecture.page("<!-- generated: cooks -->\n<!-- end -->\n")


# --- the picture -----------------------------------------------------------------------------------------------------


def test_the_contract_names_every_part_and_imports_point_down_it() -> None:
    order, imported = architecture.parts(), architecture.imports()
    assert set(order) == set(imported)
    assert len(order) == len(set(order))
    for part, below in imported.items():
        assert all(order.index(part) < order.index(one) for one in below), part


def test_lines_and_floors_say_what_the_imports_say() -> None:
    imported = {"a": {"b", "c", "d"}, "b": {"d"}, "c": {"d"}, "d": set(), "e": set()}
    imported = {part: frozenset(below) for part, below in imported.items()}
    assert architecture.floors(imported) == [["a"], ["b", "c"], ["d", "e"]]
    assert architecture.shortest(imported) == {**imported, "a": frozenset({"b", "c"})}


def test_imports_are_read_from_code(tmp_path: Path) -> None:
    (tmp_path / "low.py").write_text("", encoding="utf-8")
    (tmp_path / "high").mkdir()
    (tmp_path / "high" / "__init__.py").write_text("from dsmoe_lite import low\n", encoding="utf-8")
    (tmp_path / "top.py").write_text("def f():\n    import dsmoe_lite.high.x\n    import os\n", encoding="utf-8")
    assert architecture.imports(tmp_path) == {"high": {"low"}, "low": set(), "top": {"high"}}


def test_every_part_is_drawn_above_what_it_imports() -> None:
    drawn = ElementTree.fromstring(architecture.picture())
    names = [text for text in drawn.iter(f"{SVG}text") if text.get("font-size") == "14"]
    height = {name.text.removesuffix("/").removesuffix(".py"): float(name.get("y")) for name in names}
    assert set(height) == set(architecture.parts())
    for part, below in architecture.imports().items():
        assert all(height[part] < height[one] for one in below), part
    boxes = [(float(box.get("x")), float(box.get("y"))) for box in drawn.iter(f"{SVG}rect") if box.get("rx") == "6"]
    assert len(set(boxes)) == len(names)
    n_lines = sum(map(len, architecture.shortest(architecture.imports()).values()))
    assert len(list(drawn.iter(f"{SVG}path"))) == n_lines


def test_text_fits_into_its_box() -> None:
    for part in architecture.parts():
        lines = architecture._fitted(architecture.purpose(architecture.source(part)))
        assert 1 <= len(lines) <= architecture.LINES, part
        assert max(map(len, lines)) <= architecture.LINE, part


# --- the letters and the charts --------------------------------------------------------------------------------------


def test_letters_are_those_of_the_legend_and_no_letter_has_two_meanings() -> None:
    rows = re.findall(r"^\| (\S+) \| (.+) \|$", section("Letters"), flags=re.MULTILINE)
    letters = [letter for letter, _ in rows if letter not in ("letter", "---")]
    legend = ast.get_docstring(
        ast.parse((architecture.PACKAGE / "config" / "__init__.py").read_text(encoding="utf-8")), clean=False
    )
    assert letters == [letter for letter, _ in architecture.LETTER.findall(legend or "")]
    assert len(letters) == len(set(letters))
    assert {"B", "S", "T", "D", "H", "E", "K", "F", "V", "L", "G", "M", "m", "C", "N", "P"} <= set(letters)


def test_charts_are_found_with_their_titles() -> None:
    chapter = ast.parse(
        "charts.one()\n"
        "charts.one(title='given')\n"
        "def drawn(n):\n    title = f'{n} of {n + 1}'\n    return charts.one(title=title)\n"
        "def verdict(title):\n    return charts.one(title=title)\n"
        "verdict('first')\n"
        "verdict('second')\n"
        "explore(models)\n"
    )
    drawing = {"one": (Path("one.py"), "by default"), "explore": (Path("explorer.py"), "the explorer")}
    titles = ["by default", "given", "… of …", "first", "second", "the explorer"]
    assert [title for title, _ in architecture._charts_of(chapter, drawing)] == titles


def test_every_chart_of_the_package_has_a_row_or_no_chapter_draws_it() -> None:
    drawing = architecture._chart_functions()
    code = "".join(path.read_text(encoding="utf-8") for path in architecture.NOTEBOOKS.glob("[0-9]*.py"))
    for name in drawing:
        used = re.search(rf"\bcharts\.{name}\(", code) if name != "explore" else True
        assert bool(used) == (f"[`{name}`](./" in section("Which file draws which chart")), name


# --- names and links -------------------------------------------------------------------------------------------------


@cache
def defined(path: Path) -> set[str]:
    """Names of functions, classes, their members, and module-level values."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def test_links_lead_to_files_and_to_headings() -> None:
    headings = re.findall(r"^#+ (.+)$", TEXT, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for _, target in LINKS:
        if target.startswith("#"):
            assert target[1:] in anchors, target
        else:  # "./", so that the page of the book finds them too
            assert target.startswith("./"), target
            assert (REPOSITORY / target).is_file(), target


def test_names_are_defined_in_the_files_they_link_to() -> None:
    named = [(text.strip("`"), REPOSITORY / target) for text, target in LINKS if text.startswith("`")]
    assert len(named) > 100
    for name, path in named:
        if name.endswith("/"):
            assert path == path.parent / "__init__.py", name
            assert path.parent.name == name[:-1]
        elif name.endswith(".py"):
            assert path.name == name
        else:
            assert name in defined(path), f"{path.name} defines no {name}"


def test_questions_of_strangers_are_answered_first() -> None:
    table = section("Where is it?")
    for words in ("balance losses", "chart X of chapter 06", "run record", "token dropped"):
        (row,) = [line for line in table.splitlines() if line.startswith("|") and words in line.split("|")[1]]
        assert "](" in row, words


def test_glossary_is_in_order_and_one_line_each() -> None:
    rows = [line.split(" | ") for line in section("Glossary").splitlines() if line.startswith("| ")][1:]
    terms = [row[0].removeprefix("| ") for row in rows]
    assert terms == sorted(terms, key=str.lower)
    assert len(terms) == len(set(terms)) > 50
    assert all(len(row) == 2 and len(row[1]) < 200 for row in rows)
