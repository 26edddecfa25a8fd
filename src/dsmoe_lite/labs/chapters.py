"""The chapters and their order, which book.yml defines."""

import difflib
import json
import re
from pathlib import Path

import yaml

from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.labs.parameters import Parameter, read_schema

PARAMETERS = re.compile(r'^# %%[^\n]*tags=\[[^]\n]*"parameters"[^\n]*\n(.*?)(?=^# %%|\Z)', re.MULTILINE | re.DOTALL)


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


def find_notebook(name: str) -> Path:
    """The notebook to run: the .ipynb file at the path `name` if there is one, else the chapter (`find_chapter`)."""
    path = Path(name).expanduser()
    return path.resolve() if path.suffix == ".ipynb" and path.is_file() else find_chapter(name)


def find_chapter(name: str, suffix: str = ".ipynb") -> Path:
    """The chapter with the given number (2, 02), name (02_gshard, gshard) or path in notebooks/ or work/.

    A name finds its chapter whatever its number, because chapters have moved.

    Raises InputError with the nearest name and all known chapters, and for a path in another folder.
    """
    known = {path.stem: path for path in sorted(paths.NOTEBOOKS.glob(f"[0-9]*{suffix}"))}
    is_path = name.endswith((".ipynb", ".py"))
    if is_path and not _is_in_course(Path(name).expanduser()):
        raise InputError(f"no chapter {name}: the chapters are in {paths.NOTEBOOKS}; name one by its number")
    wanted = Path(name).stem if is_path else name
    without_number = re.sub(r"^\d+_", "", wanted)
    for stem, path in known.items():
        number, _, title = stem.partition("_")
        if without_number == title or (wanted.isdecimal() and number.isdecimal() and int(wanted) == int(number)):
            return path
    near = difflib.get_close_matches(wanted, [form for stem in known for form in (stem, stem.partition("_")[2])], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    listing = f"the chapters are {', '.join(known)}" if known else f"{paths.NOTEBOOKS} has none"
    raise InputError(f"no chapter {name}: {hint}{listing}")


def chapter_schema(chapter: Path) -> dict[str, Parameter]:
    """The parameters of a chapter, read from its notebook or its .py source.

    Raises InputError if no cell is tagged `parameters`, or that cell is no schema.
    """
    text = chapter.read_text(encoding="utf-8", errors="replace")
    cells = PARAMETERS.findall(text) if chapter.suffix == ".py" else _parameters_cells(chapter, text)
    if not cells:
        raise InputError(f"{chapter.name} has no cell tagged parameters")
    return read_schema(cells[0])


def chapter_schemas() -> list[dict[str, Parameter]]:
    """The parameters of all chapters that can be read: from the .py sources, which a wheel does not have."""
    notebooks = {path.stem: path for path in paths.NOTEBOOKS.glob("[0-9]*.ipynb")}
    sources = {path.stem: path for path in paths.NOTEBOOKS.glob("[0-9]*.py")}
    schemas = []
    for _, path in sorted({**notebooks, **sources}.items()):
        try:
            schemas.append(chapter_schema(path))
        except (InputError, OSError):  # a chapter that is being written does not stop another one
            continue
    return schemas


def _parameters_cells(notebook: Path, text: str) -> list[str]:
    try:
        cells = json.loads(text)["cells"]
        return ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{notebook} is not a notebook any more: restore it from the repository") from None


def _is_in_course(path: Path) -> bool:
    folders = [folder.resolve() for folder in (paths.NOTEBOOKS, paths.WORK)]
    return str(path.parent) in (".", "notebooks", "work") or path.parent.resolve() in folders


def _existing(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"book.yml names {path.stem}, but {path} is missing: run `dsmoe refresh`")
    return path
