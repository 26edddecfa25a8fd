"""Build the book from the executed chapters, without executing or downloading anything."""

import gc
import importlib.util
import io
import json
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

import dsmoe_lite
from dsmoe_lite.book import api, conf
from dsmoe_lite.book.api_source import read_package
from dsmoe_lite.book.widget_modules import write_modules
from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.common.progress import progress
from dsmoe_lite.study import equations

STATIC = Path(__file__).parent / "static"
BUILT = "_static/charts.js"  # marks a folder as a book that we built
REDIRECT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="refresh" content="0; url={page}"></head><body><p><a href="{page}">{title}</a></p></body></html>
"""


def build(book_file: Path, out: Path) -> Path:
    """Build the pages of `book_file` and move them to `out` when complete; return the first page.

    Raises InputError for a book.yml that cannot be read or names a missing page, and for a folder `out` that has other
    content. Raises RunError with the warnings of Sphinx, if there are any.
    """
    if out.exists() and any(out.iterdir()) and not (out / BUILT).exists():
        raise InputError(f"out = {out}: contains something other than a book; name a new or empty folder")
    book = _read(book_file)
    sources = book_file.parent / Path(book["toc"]["root"]).parent
    for page in _names(book):
        page = page.removesuffix(".md")
        if not any((book_file.parent / f"{page}{suffix}").exists() for suffix in (".ipynb", ".md")):
            raise InputError(f"book.yml names {page}, but there is no {page}.ipynb or .md: run `make refresh`")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".book-", dir=out.parent) as temporary:
        pages = Path(temporary) / "html"
        _sphinx(book, sources, Path(temporary), pages)
        for old, new in {"index": book["toc"]["root"], **book.get("moved", {})}.items():
            page = REDIRECT.format(title=book["title"], page=f"{Path(new).name}.html")
            (pages / f"{old}.html").write_text(page, encoding="utf-8")
        if book.get("front"):
            from dsmoe_lite.book.front import write_front
            from dsmoe_lite.book.playground import write_playground

            chapters = [book_file.parent / f"{name}.ipynb" for name in _names(book) if Path(name).name[0].isdigit()]
            chapters = [path for path in chapters if path.exists()]
            write_front(pages, book["title"], chapters)
            write_playground(pages, book["title"], {path.name[:2]: f"{path.stem}.html" for path in chapters})
        _replace(out, pages)
    return out / "index.html"


def _read(book_file: Path) -> dict[str, Any]:
    try:
        book = yaml.safe_load(book_file.read_text(encoding="utf-8"))
        missing = [name for name in ("title", "author", "bibliography", "toc") if name not in book]
        if not missing:
            unknown = set(dict(book.get("moved", {})).values()) - set(_names(book))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{book_file}: cannot be read as a book ({type(error).__name__})") from None
    if missing:
        raise InputError(f"{book_file}: {', '.join(missing)} missing")
    if unknown:
        raise InputError(f"{book_file}: moved leads to {', '.join(sorted(unknown))}, which toc does not list")
    return dict(book)


def _names(book: dict[str, Any]) -> list[str]:
    """The names of the pages in book.yml, in order."""
    return [book["toc"]["root"], *(entry["file"] for entry in book["toc"].get("chapters", []))]


def _sphinx(book: dict[str, Any], sources: Path, temporary: Path, pages: Path) -> None:
    from sphinx.application import Sphinx
    from sphinx.errors import SphinxError
    from sphinx.util.docutils import docutils_namespace, patch_docutils
    from sphinx_external_toc import collectors

    from dsmoe_lite.book.front import MODELS
    from dsmoe_lite.viz.page_models import SCRIPTS, write_models

    vars(collectors)["gc"] = SimpleNamespace(get_objects=_without_proxies)
    toc_file, loaded, copied = temporary / "toc.yml", temporary / "static", temporary / "sources" / sources.name
    shutil.copytree(sources, copied, ignore=shutil.ignore_patterns(".*"))
    chapters = [os.path.relpath(name, sources.name) for name in _names(book)]
    modules = read_package(Path(dsmoe_lite.__file__).parent) if book.get("api") else []
    reference = api.write(copied, modules, chapters, equations.load()) if modules else []
    toc = conf.toc(book, sources.name, [(page.file, page.title) for page in reference])
    toc_file.write_text(yaml.safe_dump(toc), encoding="utf-8")
    _copy_scripts(loaded)
    _themes(loaded / "themes.js")
    for script in SCRIPTS:
        shutil.copy(script, loaded)
    notebooks = sorted(copied.rglob("*.ipynb"))
    write_models(notebooks, loaded, MODELS.values() if book.get("front") else ())
    write_modules(notebooks, loaded)
    n_steps = 2 * (len(chapters) + len(reference)) + (3 if reference else 2)  # read and written; index, search, modules
    warnings = io.StringIO()
    settings = conf.settings(book, toc_file, [STATIC, loaded], sources.name)
    try:
        with patch_docutils(), docutils_namespace():
            app = Sphinx(copied, None, pages, temporary / "doctrees", "html", settings, status=None, warning=warnings)
            with progress(total=n_steps, desc="book", unit="page") as bar:
                _show(app, bar)
                app.connect("html-page-context", _remove_list_role)
                app.build(force_all=True)
    except SphinxError as error:
        raise RunError(f"the book cannot be built: {error}") from None
    if messages := warnings.getvalue().strip().replace(str(copied), str(sources)):
        raise RunError(f"the book has warnings:\n{messages}")


def _without_proxies() -> list[Any]:
    """The objects of this process but weak proxies: the collectors ask each for its class, and a dead proxy raises."""
    return [found for found in gc.get_objects() if type(found) not in weakref.ProxyTypes]


def _show(app: Any, bar: Any) -> None:
    """Move `bar` once per page read and once per page written."""

    def page(*_: Any) -> None:  # returns None: Sphinx takes a return value as the name of a template
        bar.update()

    app.connect("source-read", page)
    app.connect("html-page-context", page)


def _remove_list_role(_: Any, page: str, template: str, context: dict[str, Any], __: Any) -> None:
    """Remove the ARIA role `list` from the references, because docutils does not mark their entries as list items."""
    if "body" in context:
        context["body"] = context["body"].replace(
            '<div role="list" class="citation-list">', '<div class="citation-list">'
        )


def _copy_scripts(folder: Path) -> None:
    """Write Vega from vl-convert, wrapped in a function to hide its names, and MathJax without its fonts."""
    import vl_convert

    folder.mkdir()
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    (folder / "vega.js").write_text(f"(function(){{\n{bundle}\n}})();\n", encoding="utf-8")
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("sphinx-mathjax-offline", name="sphinx-mathjax-offline")
    mathjax = Path(package.origin).parent / "static" / "mathjax"
    (folder / "mathjax").mkdir()
    shutil.copy(mathjax / "tex-svg.js", folder / "mathjax")
    # loaded when an equation first needs them
    shutil.copytree(mathjax / "input" / "tex" / "extensions", folder / "mathjax" / "input" / "tex" / "extensions")


def _themes(path: Path) -> None:
    """Write the dark counterpart of each light colour, for static/charts.js."""
    from dsmoe_lite.viz import theme

    dark = {light: theme.DARK[role] for role, light in theme.LIGHT.items()}
    path.write_text(f"window.dsmoeDark = {json.dumps(dark, indent=1)};\n", encoding="utf-8")


def _replace(out: Path, pages: Path) -> None:
    """Replace the old book `out` by the finished pages; restore it if that fails."""
    old = pages.parent / "old"
    if out.exists():
        out.rename(old)
    try:
        pages.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
