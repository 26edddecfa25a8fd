"""Build the book from the executed chapters: nothing is executed, nothing is fetched."""

import importlib.util
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from dsmoe_lite.book import conf
from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.common.progress import progress

STATIC = Path(__file__).parent / "static"
BUILT = "_static/charts.js"  # a folder that has it is a book of ours
REDIRECT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="refresh" content="0; url={page}"></head><body><p><a href="{page}">{title}</a></p></body></html>
"""


def build(book_file: Path, out: Path) -> Path:
    """Build the pages of `book_file` into `out`, which is replaced only by a whole book; return its first page.

    Raises InputError for a book.yml that cannot be read or names a page that is missing and for a folder `out` that
    holds something else, RunError with Sphinx's own words for anything it warns about.
    """
    if out.exists() and any(out.iterdir()) and not (out / BUILT).exists():
        raise InputError(f"out = {out}: holds something other than a book; name a new or empty folder")
    book = _read(book_file)
    sources = book_file.parent / Path(book["toc"]["root"]).parent
    for page in _names(book):
        page = page.removesuffix(".md")
        if not any((book_file.parent / f"{page}{suffix}").exists() for suffix in (".ipynb", ".md")):
            raise InputError(f"book.yml names {page}, but there is no {page}.ipynb or .md: run `make refresh`")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".book-", dir=out.parent) as aside:
        pages = Path(aside) / "html"
        _sphinx(book, sources, Path(aside), pages)
        first = f"{Path(book['toc']['root']).name}.html"
        (pages / "index.html").write_text(REDIRECT.format(title=book["title"], page=first), encoding="utf-8")
        _own(out, pages)
    return out / "index.html"


def _read(book_file: Path) -> dict[str, Any]:
    try:
        book = yaml.safe_load(book_file.read_text(encoding="utf-8"))
        missing = [name for name in ("title", "author", "bibliography", "toc") if name not in book]
        if not missing:
            _names(book)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{book_file}: cannot be read as a book ({type(error).__name__})") from None
    if missing:
        raise InputError(f"{book_file}: {', '.join(missing)} missing")
    return dict(book)


def _names(book: dict[str, Any]) -> list[str]:
    """The pages in order, as book.yml names them."""
    return [book["toc"]["root"], *(entry["file"] for entry in book["toc"].get("chapters", []))]


def _sphinx(book: dict[str, Any], sources: Path, aside: Path, pages: Path) -> None:
    from sphinx.application import Sphinx
    from sphinx.errors import SphinxError
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    toc_file, loaded = aside / "toc.yml", aside / "static"
    toc_file.write_text(yaml.safe_dump(conf.toc(book, sources.name)), encoding="utf-8")
    _scripts_of_others(loaded)
    _themes(loaded / "themes.js")
    warnings = io.StringIO()
    settings = conf.settings(book, toc_file, [STATIC, loaded], sources.name)
    try:
        with patch_docutils(), docutils_namespace():
            app = Sphinx(sources, None, pages, aside / "doctrees", "html", settings, status=None, warning=warnings)
            with progress(total=2 * len(_names(book)) + 2, desc="book", unit="page") as bar:
                _show(app, bar)
                app.connect("html-page-context", _honest_roles)
                app.build(force_all=True)
    except SphinxError as error:
        raise RunError(f"the book cannot be built: {error}") from None
    if warnings.getvalue().strip():
        raise RunError(f"the book has warnings:\n{warnings.getvalue().strip()}")


def _show(app: Any, bar: Any) -> None:
    """Move `bar` once a page read and once a page written."""

    def page(*_: Any) -> None:  # Sphinx takes anything returned for the name of a template
        bar.update()

    app.connect("source-read", page)
    app.connect("html-page-context", page)


def _honest_roles(_: Any, page: str, template: str, context: dict[str, Any], __: Any) -> None:
    """Take away the list role that docutils gives the references: their entries are no list items."""
    if "body" in context:
        context["body"] = context["body"].replace(
            '<div role="list" class="citation-list">', '<div class="citation-list">'
        )


def _scripts_of_others(folder: Path) -> None:
    """Vega from vl-convert, wrapped so that its names stay its own; MathJax from its package, fonts left out."""
    import vl_convert

    folder.mkdir()
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    (folder / "vega.js").write_text(f"(function(){{\n{bundle}\n}})();\n", encoding="utf-8")
    found = importlib.util.find_spec("sphinx-mathjax-offline")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("sphinx-mathjax-offline", name="sphinx-mathjax-offline")
    mathjax = Path(found.origin).parent / "static" / "mathjax"
    (folder / "mathjax").mkdir()
    shutil.copy(mathjax / "tex-svg.js", folder / "mathjax")
    # what MathJax loads when an equation first needs it
    shutil.copytree(mathjax / "input" / "tex" / "extensions", folder / "mathjax" / "input" / "tex" / "extensions")


def _themes(path: Path) -> None:
    """The dark colour of every light one, for static/charts.js."""
    from dsmoe_lite.viz import theme

    dark = {light: theme.DARK[role] for role, light in theme.LIGHT.items()}
    path.write_text(f"window.dsmoeDark = {json.dumps(dark, indent=1)};\n", encoding="utf-8")


def _own(out: Path, pages: Path) -> None:
    """Put the finished pages where the old ones were."""
    old = pages.parent / "old"
    if out.exists():
        out.rename(old)
    try:
        pages.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
