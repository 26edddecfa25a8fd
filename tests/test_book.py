"""The book: built completely or not at all, numbered, cited, and made of local files only."""

import re
import weakref
from html.parser import HTMLParser
from pathlib import Path

import book_fixture
import nbformat
import pytest
import yaml
from click.testing import CliRunner
from nbformat.v4 import new_markdown_cell

from dsmoe_lite.book import api_source, conf, mime, terms
from dsmoe_lite.book import build as builder
from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.study import equations
from dsmoe_lite.study.equations import Equation
from dsmoe_lite.viz import theme

LOADS = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "object": "data"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("a book")
    return builder.build(book_fixture.write(root), root / "build" / "book").parent


class Loaded(HTMLParser):
    """The addresses that a page loads."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attributes):
        address = dict(attributes).get(LOADS.get(tag, ""))
        if address:
            self.addresses.append(address)


def test_pages_load_local_files_that_exist(pages):
    for page in pages.glob("*.html"):
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        for address in loaded.addresses:
            assert not re.match(r"([a-z]+:)?//", address), (page.name, address)
            if not address.startswith(("data:", "#")):
                assert (pages / address.split("?")[0].split("#")[0]).exists(), (page.name, address)


def test_equations_are_numbered_by_chapter_and_referred_to(pages):
    second = (pages / "01_second.html").read_text(encoding="utf-8")
    assert "(1.1)" in second
    assert "Eq. (1.1)" in second
    first = (pages / "00_first.html").read_text(encoding="utf-8")
    assert 'href="01_second.html#equation-eq-gate">Eq. (1.1)</a>' in first


def test_citations_link_to_the_references(pages):
    second = (pages / "01_second.html").read_text(encoding="utf-8")
    assert re.search(r'Dai <em>et al.</em> \[<a class="reference internal" href="references.html#id\d+"', second)
    references = (pages / "references.html").read_text(encoding="utf-8")
    assert "Towards Ultimate Expert Specialization" in references
    assert "Mixtral of Experts" not in references  # listed only where cited


def test_charts_have_their_description_and_results_are_hidden(pages):
    second = (pages / "01_second.html").read_text(encoding="utf-8")
    assert second.count('<figure class="chart">') == 2
    assert 'aria-label="Line chart of training loss' in second
    assert "vnd.dsmoe.result" not in second
    assert "IntSlider" not in second
    assert "Here JupyterLab shows a control" in second


def test_the_first_page_redirects_to_the_first_chapter(pages):
    assert 'url=00_first.html"' in (pages / "index.html").read_text(encoding="utf-8")


def test_an_old_page_leads_to_the_chapter_that_it_became(tmp_path):
    book = book_fixture.write(tmp_path, ())
    moved = {"07_second": "notebooks/01_second"}
    book.write_text(yaml.safe_dump({**book_fixture.BOOK, "moved": moved}), encoding="utf-8")
    folder = builder.build(book, tmp_path / "out").parent
    assert 'url=01_second.html"' in (folder / "07_second.html").read_text(encoding="utf-8")


def test_a_dead_weak_proxy_elsewhere_in_the_process_does_no_harm(tmp_path):
    class Gone:
        pass

    gone = Gone()
    proxy = weakref.proxy(gone)
    del gone
    assert builder.build(book_fixture.write(tmp_path, ()), tmp_path / "out").is_file()
    with pytest.raises(ReferenceError):  # it was dead during the build
        proxy.anything()


def test_the_first_use_of_a_word_of_the_glossary_leads_to_it(pages):
    html = (pages / "01_second.html").read_text(encoding="utf-8")
    links = re.findall(r'<a class="term [^"]*" href="([^"]*)" title="([^"]*)">([^<]*)</a>', html)
    assert links == [
        ("glossary.html#term-expert", "One of several FFNs.", "expert"),  # not the title before it
        ("glossary.html#term-expert-of-a-token", "The one that a token uses.", "expert of a token"),
        ("glossary.html#term-GATE", "An acronym.", "GATE"),
    ]
    assert 'id="term-expert"' in (pages / "glossary.html").read_text(encoding="utf-8")
    assert 'class="term ' not in (pages / "references.html").read_text(encoding="utf-8")


def test_every_word_of_the_glossary_is_used_in_a_chapter():
    prose = "\n".join(
        cell.source
        for path in paths.NOTEBOOKS.glob("[0-9]*.ipynb")
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "markdown"
    )
    words = re.findall(r"^(\S.*)\n  \S", (paths.NOTEBOOKS / "pages" / "glossary.md").read_text(encoding="utf-8"), re.M)
    assert len(words) > 35
    assert words == sorted(words, key=str.lower)
    assert [word for word in words if not terms.use(word).search(prose)] == []


def test_every_light_colour_has_its_dark_one(pages):
    script = (pages / "_static" / "themes.js").read_text(encoding="utf-8")
    for role, colour in theme.LIGHT.items():
        assert f'"{colour}": "{theme.DARK[role]}"' in script


def test_a_reference_of_the_package_is_below_the_chapters(tmp_path, monkeypatch):
    shown = (
        "dsmoe_lite", "dsmoe_lite.config", "dsmoe_lite.config.moe", "dsmoe_lite.layers", "dsmoe_lite.layers.router",
    )  # fmt: skip
    monkeypatch.setattr(
        builder, "read_package", lambda folder: [m for m in api_source.read_package(folder) if m.name in shown]
    )
    gate = Equation("gate", "arXiv:2401.06066, Equation 7", "layers.router.Router", "test")
    monkeypatch.setattr(equations, "load", lambda: [gate, Equation("missing", "nowhere", "model.Block", "test")])
    book = book_fixture.write(tmp_path, ())
    book.write_text(yaml.safe_dump({**book_fixture.BOOK, "api": True}), encoding="utf-8")
    folder = builder.build(book, tmp_path / "out").parent
    assert book_fixture.assert_links_work(folder) > 100
    page = (folder / "api" / "layers.html").read_text(encoding="utf-8")
    assert 'id="dsmoe_lite.layers.router.Router.forward"' in page
    assert r"\operatorname{Topk}" in page
    assert 'href="../01_second.html#equation-eq-gate">A layer</a>' in page
    assert 'href="https://arxiv.org/abs/2401.06066">arXiv:2401.06066</a>' in page
    assert 'href="config.html#dsmoe_lite.config.moe.MoEConfig"' in page  # in the signature
    assert not set("‘’“”") & set(page)
    assert not (tmp_path / "notebooks" / "api").exists()


def test_a_warning_fails_and_leaves_the_old_book(tmp_path):
    book = book_fixture.write(tmp_path, ())
    out = tmp_path / "out"
    (out / "_static").mkdir(parents=True)
    (out / "_static" / "charts.js").touch()
    (out / "index.html").write_text("old", encoding="utf-8")
    cells = [new_markdown_cell("# Start\n\nSee {eq}`eq:nowhere` and {cite:t}`Nobody1900`.")]
    book_fixture.save(tmp_path / "notebooks" / "00_first.ipynb", cells)
    with pytest.raises(RunError, match="warnings") as failure:
        builder.build(book, out)
    assert "eq:nowhere" in str(failure.value)
    assert "Nobody1900" in str(failure.value)
    assert (out / "index.html").read_text(encoding="utf-8") == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"book.yml", "notebooks", "out"}


def test_a_folder_with_other_content_is_left_alone(tmp_path):
    book = book_fixture.write(tmp_path / "course", ())
    letter = tmp_path / "home" / "letter.txt"
    letter.parent.mkdir()
    letter.write_text("keep", encoding="utf-8")
    with pytest.raises(InputError, match="something other than a book"):
        builder.build(book, letter.parent)
    assert [path.name for path in letter.parent.iterdir()] == ["letter.txt"]


def test_a_second_book_replaces_the_first(tmp_path):
    book = book_fixture.write(tmp_path, ())
    builder.build(book, tmp_path / "out")
    (tmp_path / "out" / "leftover.html").touch()
    builder.build(book, tmp_path / "out")
    assert not (tmp_path / "out" / "leftover.html").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"book.yml", "notebooks", "out"}


def test_a_missing_chapter_is_named(tmp_path):
    book = book_fixture.write(tmp_path, ())
    (tmp_path / "notebooks" / "01_second.ipynb").unlink()
    with pytest.raises(InputError, match="01_second"):
        builder.build(book, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("[", "cannot be read"), ("just text", "missing"), ("title: a", "author, bibliography"),
     ("{title: a, author: b, bibliography: c, toc: {}}", "cannot be read"),
     ("{title: a, author: b, bibliography: c, toc: {root: d, chapters: [e]}}", "cannot be read"),
     ("{title: a, author: b, bibliography: c, toc: {root: d}, moved: e}", "cannot be read"),
     ("{title: a, author: b, bibliography: c, toc: {root: d}, moved: {e: f}}", "moved leads to f")],
)  # fmt: skip
def test_a_bad_book_file_is_named(tmp_path, text, message):
    book = tmp_path / "book.yml"
    if text is not None:
        book.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        builder.build(book, tmp_path / "out")


def test_only_chapters_are_numbered():
    toc = conf.toc(book_fixture.BOOK)
    assert toc["root"] == "00_first"
    assert toc["parts"] == [
        {"numbered": 1, "chapters": [{"file": "01_second"}]},
        {"chapters": [{"file": "glossary"}, {"file": "references"}]},
    ]
    with_reference = conf.toc(book_fixture.BOOK, reference=[("api/index", "API"), ("api/layers", "layers")])
    below = [{"file": "api/layers", "title": "layers"}]
    assert with_reference["parts"][1]["chapters"][-1] == {"file": "api/index", "title": "API", "sections": below}
    with_page = {**book_fixture.BOOK["toc"], "chapters": [{"file": "notebooks/01_more.md"}]}
    assert conf.toc({**book_fixture.BOOK, "toc": with_page})["parts"] == [{"chapters": [{"file": "01_more"}]}]


def test_chart_html_is_escaped():
    markup = mime.chart_html({"description": 'a "quoted" <b> & more', "title": "</script><b>"})
    assert 'aria-label="a &quot;quoted&quot; &lt;b&gt; &amp; more"' in markup
    assert markup.count("</script>") == 1


def test_the_course_book_names_what_exists():
    book = yaml.safe_load((paths.REPOSITORY / "book.yml").read_text(encoding="utf-8"))
    assert book["author"] == "dsmoe-lite contributors"
    assert (paths.REPOSITORY / book["bibliography"]).exists()
    entries = (paths.REPOSITORY / book["bibliography"]).read_text(encoding="utf-8")
    keys = re.findall(r"^@\w+\{(\w+),", entries, flags=re.MULTILINE)
    assert len(keys) == len(set(keys)) >= 17
    for entry in re.split(r"^@", entries, flags=re.MULTILINE)[1:]:
        on_paper = "journal = " in entry and "pages = " in entry  # older than arXiv
        assert re.search(r"arXiv:\d{4}\.\d{4,5}\b", entry) or on_paper, entry


def test_the_command_writes_to_the_given_folder(tmp_path, monkeypatch):
    from dsmoe_lite.cli.book import command

    book_fixture.write(tmp_path / "course", ())
    monkeypatch.setattr(paths, "REPOSITORY", tmp_path / "course")
    result = CliRunner().invoke(command, ["--out", str(tmp_path / "pages")])
    assert result.exit_code == 0, result.output
    assert Path(result.output.split("The book is in ")[1].strip()) == tmp_path / "pages" / "index.html"
    assert (tmp_path / "pages" / "01_second.html").exists()
