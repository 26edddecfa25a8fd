"""The API reference: every public name, its docstring as written, its fields and its equations."""

import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path

import pytest
import yaml
from docutils.core import publish_doctree
from hypothesis import given
from hypothesis import strategies as st

import dsmoe_lite
from dsmoe_lite.book import api, api_source, api_text
from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import RunError
from dsmoe_lite.study import equations

PACKAGE = Path(dsmoe_lite.__file__).parent
SOURCE = '''
"""A module."""
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers import router as routers

T = TypeVar("T")
LIMIT = 1_000  # tokens
# --- a divider ---
PLAIN = 1
# Two lines
# of comment.
TABLE = (
    1,  # inside
    2,
)
_PRIVATE = 3
if LIMIT < 0:
    bad = LIMIT
    raise ValueError(bad)

@dataclass(frozen=True, kw_only=True)
class Record:
    """What is stored."""

    scores: Tensor  # (T, E), affinities
    config: "MoEConfig | None" = None  # type: ignore[assignment]
    _hidden: int = 0

    def __post_init__(self) -> None: ...

    @property
    def size(self) -> int:
        """T."""

    @classmethod
    def of(cls, routing: routers.Routing, *, mode: str = "a") -> "Record":
        """Make one."""

class BadError(ValueError):
    """It failed."""

@contextmanager
def opened(path: T, key: Literal["a"]) -> Iterator[Record]:
    """Open `path`."""

def _helper(): ...
'''


@pytest.fixture(scope="module")
def modules():
    return api_source.read_package(PACKAGE)


@pytest.fixture(scope="module")
def pages(modules):
    """The pages of this package, with the equations of the chapters."""
    book = yaml.safe_load((paths.REPOSITORY / "book.yml").read_text(encoding="utf-8"))
    names = [Path(entry["file"]).name for entry in book["toc"]["chapters"]]
    found = api.chapter_equations(paths.NOTEBOOKS, names)
    return {page.file: page.text for page in api.reference(modules, equations.load(), found)}


def entry(text: str, name: str) -> str:
    """The lines below the directive of one top-level name."""
    found = re.search(rf"^\.\. py:\w+:: {name}\b.*\n((?:   .*\n|\n)*)", text, flags=re.MULTILINE)
    assert found, name
    return found[1]


def test_source_of_every_kind() -> None:
    module = api_source.read_module(SOURCE, "dsmoe_lite.some", "dsmoe_lite/some.py")
    names = dict(module.walk())
    assert module.text == "A module."
    assert list(names) == ["LIMIT", "PLAIN", "TABLE", "Record", "Record.scores", "Record.config", "Record.size",
                           "Record.of", "BadError", "opened"]  # fmt: skip
    assert (names["LIMIT"].text, names["LIMIT"].options) == ("tokens", (":value: 1_000",))
    assert (names["PLAIN"].text, names["TABLE"].text, names["TABLE"].options) == ("", "Two lines of comment.", ())
    assert names["Record.scores"].text == "(T, E), affinities"
    assert names["Record.config"].options == (":type: dsmoe_lite.config.MoEConfig | None", ":value: None")
    assert names["Record.config"].text == ""
    assert (names["Record.size"].kind, names["Record.size"].options) == ("property", (":type: int",))
    signature = "(routing: dsmoe_lite.layers.router.Routing, *, mode: str='a') -> dsmoe_lite.some.Record"
    assert names["Record.of"].signature == signature
    assert names["Record.of"].options == (":classmethod:",)
    assert names["BadError"].kind == "exception"
    assert names["opened"].signature == "(path: T, key: Literal['a']) -> Iterator[dsmoe_lite.some.Record]"
    assert SOURCE.splitlines()[names["Record"].line - 1] == "class Record:"


def test_docstrings_become_paragraphs_lists_and_blocks() -> None:
    text = """First of `Router` and
    `other()`, see arXiv:2401.06066.

    - one item
      goes on
    - x_i * `a*b`
    Then:
        indented  columns
    """
    rst = api_text.to_rst(inspect.cleandoc(text), {"Router": "dsmoe_lite.layers.router.Router"}.get)
    document = publish_doctree(rst.replace(":py:obj:", ""), settings_overrides={"report_level": 2, "halt_level": 2})
    assert [node.tagname for node in document] == ["paragraph", "bullet_list", "paragraph", "literal_block"]
    assert document[0].astext().startswith("First of Router <dsmoe_lite.layers.router.Router> and other()")
    assert [item.astext() for item in document[1]] == ["one item goes on", "x_i * a*b"]
    assert document[3].astext() == "indented  columns"
    assert ":py:obj:`Router <dsmoe_lite.layers.router.Router>`" in rst
    assert "`arXiv:2401.06066 <https://arxiv.org/abs/2401.06066>`__" in rst


@given(st.text(alphabet="ab1 .:-*_`|\\<>@#=[](){}\n'\"+~^>%/", max_size=80))
def test_no_docstring_can_break_the_build(text: str) -> None:
    rst = api_text.to_rst(inspect.cleandoc(text), lambda word: None)
    publish_doctree(rst, settings_overrides={"report_level": 1, "halt_level": 1})


def test_every_public_name_has_an_entry(pages: dict[str, str]) -> None:
    """Against the modules as Python imports them; constants are compared by the source alone."""
    missing = []
    for found in pkgutil.walk_packages([str(PACKAGE)], "dsmoe_lite."):
        if any(part.startswith("_") for part in found.name.split(".")):
            continue
        try:
            module = importlib.import_module(found.name)
        except (RunError, ImportError):  # needs Triton
            continue
        parts = found.name.split(".")
        page = pages.get(f"api/{parts[1]}", pages["api/dsmoe_lite"])
        section = page.split(f".. py:module:: {found.name}\n")[-1].split(".. py:module::")[0]
        for name, value in vars(module).items():
            defined = (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == found.name
            if defined and not name.startswith("_") and not re.search(rf"^\.\. py:\w+:: {name}\b", section, re.M):
                missing.append(f"{found.name}.{name}")
    assert missing == []


def test_kernels_of_triton_are_listed_without_triton(pages: dict[str, str]) -> None:
    assert "triton.jit" not in entry(pages["api/kernels"], "gate_up")
    assert "py:module:: dsmoe_lite.kernels.triton_kernels" in pages["api/kernels"]


def test_the_first_page_begins_with_the_names_of_the_package(pages: dict[str, str]) -> None:
    first = next(iter(pages))
    assert first == "api/index"
    head, packages = pages[first].split("Packages\n--------")
    for name in dsmoe_lite.__all__:
        assert name.startswith("_") or f":py:obj:`{name} <dsmoe_lite." in head, name
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {*re.findall(r"^:doc:`(\w+)", packages, re.M)} == folders | {"dsmoe_lite"}


def test_fields_carry_their_shapes(pages: dict[str, str]) -> None:
    routing = entry(pages["api/layers"], "Routing")
    assert "Dataclass: frozen." in routing
    field = routing.split(".. py:attribute:: topk_ids")[1].split(".. py:")[0]
    assert ":type: Tensor" in field
    assert "(T, K)" in field


def test_every_equation_of_the_ledger_is_shown_where_it_is_computed(pages: dict[str, str]) -> None:
    for equation in equations.load():
        module, name = equation.function.rsplit(".", 1)
        page = pages.get(f"api/{module.split('.')[0]}", pages["api/dsmoe_lite"])
        section = page.split(f".. py:module:: dsmoe_lite.{module}\n")[1].split(".. py:module::")[0]
        shown = entry(section, name)
        assert f":eq:`eq:{equation.label}`" in shown, equation
        assert shown.count(".. math::") >= 1


def test_words_link_to_what_python_finds(modules) -> None:
    writer = api._Writer(modules, (), {}, "")
    router = writer.modules["dsmoe_lite.layers.router"]
    names = dict(router.walk())
    resolve = writer._resolver(router, names["Router"], "Router")
    assert resolve("MoEConfig") == "dsmoe_lite.config.moe.MoEConfig"  # imported
    assert resolve("forbidden") == "dsmoe_lite.layers.router.Router.forbidden"  # a member
    assert resolve("RoutingTrace") == "dsmoe_lite.routing.trace.RoutingTrace"  # the one class of this name
    assert resolve("layer") is None  # a parameter
    assert resolve("Router") is None  # itself
    assert resolve("top_k=1") is None


def test_source_is_linked_where_a_workflow_publishes_it() -> None:
    assert api.hosting({}) == ""
    known = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "a/b", "GITHUB_SHA": "c0ffee"}
    host = api.hosting(known)
    assert host == "https://github.com/a/b/blob/c0ffee"
    source = textwrap.dedent('''
        """Top."""
        def one() -> None:
            """One."""
    ''')
    top = api_source.read_module('"""Top."""\n', "dsmoe_lite", "dsmoe_lite/__init__.py")
    module = api_source.read_module(source, "dsmoe_lite.ones", "dsmoe_lite/ones.py")
    page = api.reference([top, module], host=host)[1].text
    assert "`ones.py, line 3 <https://github.com/a/b/blob/c0ffee/src/dsmoe_lite/ones.py#L3>`__" in page
    page = api.reference([top, module])[1].text
    assert "ones.py, line 3\n" in page
