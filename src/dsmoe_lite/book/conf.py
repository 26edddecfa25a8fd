"""The Sphinx configuration of the book, derived from book.yml."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MYST = ["dollarmath", "amsmath", "colon_fence", "attrs_inline"]


def toc(book: dict[str, Any], folder: str = "notebooks", reference: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """The table of contents in the format of sphinx-external-toc, with paths relative to `folder`.

    Chapters, whose file names begin with a digit, are numbered. Pages of text, whose names may end in .md, follow
    without numbers.
    Then comes the API reference, (file, title) of each page: the first contains the others.
    """
    pages = [os.path.relpath(entry["file"], folder) for entry in book["toc"].get("chapters", [])]
    chapters = [page for page in pages if page[0].isdigit() and not page.endswith(".md")]
    parts: list[dict[str, Any]] = [
        {"numbered": 1, "chapters": [{"file": page} for page in chapters]},
        {"chapters": [{"file": page.removesuffix(".md")} for page in pages if page not in chapters]},
    ]
    if reference:
        first, *others = [{"file": file, "title": title} for file, title in reference]
        parts[1]["chapters"].append({**first, "sections": others})
    root = os.path.relpath(book["toc"]["root"], folder)
    return {"format": "jb-book", "root": root, "parts": [part for part in parts if part["chapters"]]}


def settings(book: dict[str, Any], toc_file: Path, static: list[Path], folder: str = "notebooks") -> dict[str, Any]:
    """Sphinx settings for sources in `folder`; `static`: folders of files that the pages load."""
    return {
        "project": book["title"],
        "author": book["author"],
        "copyright": book["author"],
        "html_title": book["title"],
        "language": "en",
        "extensions": [
            "myst_nb",
            "sphinx_external_toc",
            "sphinxcontrib.bibtex",
            "dsmoe_lite.book.api_sphinx",
            "dsmoe_lite.book.terms",
        ],
        "source_suffix": {".ipynb": "myst-nb", ".md": "myst-nb", ".rst": "restructuredtext"},
        "exclude_patterns": ["**.ipynb_checkpoints"],
        "external_toc_path": str(toc_file),
        "external_toc_exclude_missing": True,
        "nb_execution_mode": "off",
        "nb_merge_streams": True,
        "nb_render_markdown_format": "gfm",  # outputs may hold tables
        "nb_ipywidgets_js": {},
        "nb_code_prompt_show": "Show the code",
        "nb_code_prompt_hide": "Hide the code",
        "myst_enable_extensions": MYST,
        "myst_heading_anchors": 3,
        "bibtex_bibfiles": [os.path.relpath(book["bibliography"], folder)],
        "bibtex_default_style": "plain",
        "bibtex_reference_style": "author_year",
        "numfig": True,
        "math_numfig": True,
        "math_eqref_format": "Eq. ({number})",
        "mathjax_path": "mathjax/tex-svg.js",
        # the API reference
        "add_module_names": False,
        "toc_object_entries": False,  # the contents of every page would list every name
        "maximum_signature_line_length": 76,
        "python_use_unqualified_type_names": True,
        "html_theme": "sphinx_book_theme",
        "html_context": {"default_mode": "auto"},
        "html_theme_options": {
            "home_page_in_toc": True,
            "navbar_persistent": [],
            "show_navbar_depth": 1,
            "show_toc_level": 2,
            "use_download_button": True,
            "use_fullscreen_button": False,
            "use_issues_button": False,
            "use_repository_button": False,
            "pygments_light_style": "a11y-high-contrast-light",
            "pygments_dark_style": "a11y-high-contrast-dark",
        },
        "html_static_path": [str(path) for path in static],
        "html_css_files": ["book.css"],
        # if the Vega bundle is not wrapped, or loads after Sphinx's scripts, it breaks Sphinx's search
        "html_js_files": [
            ("vega.js", {"priority": 100}),
            "themes.js",
            "narrow.js",
            "rows.js",
            "charts.js",
            "engine.js",
            "models.js",
            "compute.js",
            "answers.js",
            "widgets.js",
            "pictures.js",
        ],
        "html_copy_source": True,
        "html_show_sphinx": False,
        "html_last_updated_fmt": None,
    }
