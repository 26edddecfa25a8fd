"""The chapters and their order, which book.yml defines."""

import difflib
from pathlib import Path

import yaml

from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError


def chapters() -> list[Path]:
    """The notebooks of the chapters in the book's order. Raises InputError if one that book.yml names is missing."""
    book = paths.REPOSITORY / "book.yml"
    try:
        toc = yaml.safe_load(book.read_text(encoding="utf-8"))["toc"]
        names = [toc["root"], *(entry["file"] for entry in toc.get("chapters", []))]
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"{book}: has no readable table of contents ({type(error).__name__})") from None
    # the book also lists pages of text; only the name of a chapter begins with a number and lacks the suffix .md
    numbered = [name for name in names if Path(name).name[:1].isdigit() and not name.endswith(".md")]
    return [_existing(paths.REPOSITORY / f"{name}.ipynb") for name in numbered]


def find_chapter(name: str, suffix: str = ".ipynb") -> Path:
    """The chapter with the given number (2, 02), name (02_gshard, gshard) or path.

    Raises InputError with the nearest name and all known chapters.
    """
    known = {path.stem: path for path in sorted(paths.NOTEBOOKS.glob(f"[0-9]*{suffix}"))}
    wanted = Path(name).stem if name.endswith((".ipynb", ".py")) else name
    for stem, path in known.items():
        number, _, title = stem.partition("_")
        if wanted in (stem, title) or (wanted.isdecimal() and number.isdecimal() and int(wanted) == int(number)):
            return path
    near = difflib.get_close_matches(wanted, [form for stem in known for form in (stem, stem.partition("_")[2])], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    listing = f"the chapters are {', '.join(known)}" if known else f"{paths.NOTEBOOKS} has none"
    raise InputError(f"no chapter {name}: {hint}{listing}")


def _existing(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"book.yml names {path.stem}, but {path} is missing: run `dsmoe refresh`")
    return path
