"""What students handed in: a folder or a zip file, as Moodle makes them, with one notebook per student.

A notebook is named by the label that `release` put into its metadata, or else by its file name, LAB-STUDENT.ipynb.
Nothing in it is run here, and of the notebook only the answers are used.
"""

import hashlib
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dsmoe_lite.common.errors import InputError, require
from dsmoe_lite.teaching.lab import Lab, functions_in
from dsmoe_lite.teaching.release import METADATA
from dsmoe_lite.teaching.variant import STUDENT

MOST_BYTES = 50 * 2**20  # of one notebook
MOST_FILES = 10_000
MOST_CHARACTERS = 20_000  # of a cell
MAGIC = re.compile(r"^(\s*)(?:\w+\s*=\s*)?(?:[%!?].*|[\w.]+\?{1,2}\s*)$")
MOST_PROBLEMS = 10  # that one message lists
MOODLE = "_assignsubmission_"  # in a folder of Moodle: "Full Name_123456_assignsubmission_file"


@dataclass(frozen=True)
class Submission:
    """answers: question -> source; of a notebook that cannot be read there is none, and `problem` says why.

    mark: the label's variant, "" if there is none. name: the full name in Moodle's folder, if there is one.
    """

    student: str
    file: str
    answers: dict[str, str]
    mark: str = ""
    name: str = ""
    problem: str = ""
    remark: str = ""  # for the instructor

    @property
    def digest(self) -> str:
        """The hash of the answers."""
        return hashlib.sha256(json.dumps(self.answers, sort_keys=True).encode("utf-8", "replace")).hexdigest()[:16]


def read_submissions(source: Path, lab: Lab) -> dict[str, Submission]:
    """The submissions by student. Raises InputError if two are of one student, or a file belongs to nobody."""
    found: dict[str, Submission] = {}
    problems = []
    for name, contents in _notebooks(source.expanduser()):
        try:
            one = read_submission(name, contents, lab)
        except InputError as error:
            problems.append(str(error))
            continue
        other = found.setdefault(one.student, one)
        if other is not one:
            problems.append(f"{other.file} and {name} are both of {one.student}: move one away")
    if problems:
        more = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise InputError(f"{source}: {'; '.join(problems[:MOST_PROBLEMS])}{more}")
    require(bool(found), "submissions", str(source), "holds no notebooks (.ipynb)")
    return found


def read_submission(name: str, contents: bytes, lab: Lab) -> Submission:
    """One notebook. Raises InputError if neither its label nor its name says whose it is."""
    label, cells, problem = _read(contents)
    folders, shown = PurePosixPath(name).parts[:-1], _readable(name)
    full_name = _readable(next((f.split("_")[0] for f in folders if MOODLE in f), ""))
    if label and label.get("lab") != lab.name:
        other = _readable(str(label.get("lab")))
        raise InputError(f"{shown}: is of the lab {other!r}, not {lab.name!r}; move it away")
    student = str(label.get("student", "")) if label else _student_of(name, lab)
    if STUDENT.fullmatch(student) is None:
        raise InputError(f"{shown}: names no student; rename it to {lab.name}-STUDENT.ipynb, or move it away")
    return Submission(student, shown, _answers(cells, lab), str(label.get("variant", "")), full_name, problem)


def _readable(name: str) -> str:
    """A name from outside, without what a terminal or a page would take for more than text."""
    return "".join(char if char.isalnum() or char in " ._-+@(),'/" else "?" for char in name)


def _student_of(name: str, lab: Lab) -> str:
    """From LAB-STUDENT.ipynb; also if a browser or a system has added " (1)" to the name."""
    stem = PurePosixPath(name).stem.split(" ")[0]
    return stem.removeprefix(f"{lab.name}-") if stem.startswith(f"{lab.name}-") else ""


def _notebooks(source: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the notebooks, by name. Links, hidden files and huge files are refused or passed over."""
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*.ipynb") if path.is_file() and not path.is_symlink())
        for path in paths:
            name = path.relative_to(source)
            if not any(part.startswith(".") for part in name.parts):
                _require_size(name.as_posix(), path.stat().st_size)
                yield name.as_posix(), path.read_bytes()
        return
    require(source.is_file(), "submissions", str(source), "is no folder and no zip file")
    try:
        with zipfile.ZipFile(source) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.filename)
            require(len(entries) <= MOST_FILES, "zip file", str(source), f"has more than {MOST_FILES:,} files")
            for entry in entries:
                hidden = any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(entry.filename).parts)
                if entry.filename.endswith(".ipynb") and not hidden:
                    _require_size(entry.filename, entry.file_size)
                    yield entry.filename, _unpacked(archive, entry)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{source}: is no zip file that can be read ({error})") from None


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as file:
        contents = io.BytesIO(file.read(MOST_BYTES + 1)).getvalue()  # the size in the archive may be made up
    _require_size(entry.filename, len(contents))
    return contents


def _require_size(name: str, size: int) -> None:
    require(
        size <= MOST_BYTES, "notebook", name, f"is larger than {MOST_BYTES / 2**20:.0f} MB; ask for it without outputs"
    )


def _read(contents: bytes) -> tuple[dict[str, object], list[dict[str, object]], str]:
    """The label, the code cells that are not too long, and what is wrong with the notebook."""
    try:
        notebook = json.loads(contents)  # in any of the encodings of JSON
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for cell in cells:
            source = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
            cell["source"] = source.encode("utf-8", "replace").decode("utf-8")  # without halves of characters
        label = notebook.get("metadata", {}).get(METADATA, {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, [], "the notebook is damaged"
    short = [cell for cell in cells if len(cell["source"]) <= MOST_CHARACTERS]
    problem = "" if len(short) == len(cells) else f"a cell of more than {MOST_CHARACTERS:,} characters was left out"
    return (label if isinstance(label, dict) else {}), short, problem


def _answers(cells: list[dict[str, object]], lab: Lab) -> dict[str, str]:
    """The answer of each question: its cells by metadata, or the last cell that defines its function.

    A stub that was left as it was does not count if another cell defines the function.
    """
    sources = [(cell, plain_python(str(cell["source"]))) for cell in cells]
    defined = [functions_in(source) for _, source in sources]
    answers = {}
    for name, question in lab.questions.items():
        function, stub = question.settings.function, question.cells["answer"].split()
        labelled = [source for cell, source in sources if _is_answer(cell, name)]
        written = [source for source in labelled if source.split() != stub]
        others = [source for (_, source), names in zip(sources, defined, strict=True)
                  if function in names and source.split() != stub]  # fmt: skip
        joined = "\n\n".join(written)
        if function in functions_in(joined) or not others:
            answers[name] = joined or next(iter(labelled), "")
        else:
            answers[name] = others[-1]
    return {name: source for name, source in answers.items() if source}


def _is_answer(cell: dict[str, object], question: str) -> bool:
    metadata = cell.get("metadata")
    if not isinstance(metadata, dict):
        return False
    tags = metadata.get("tags")
    return metadata.get("question") == question and isinstance(tags, list) and "answer" in tags


def plain_python(source: str) -> str:
    """Without what only IPython understands: magics, shell commands and questions become `pass`."""
    return "\n".join(MAGIC.sub(r"\1pass", line) for line in re.split(r"\r\n|\r|\n", source))
