"""The students of a course: a CSV file with the column `id`, and if known `name` and `email`."""

from dataclasses import dataclass
from pathlib import Path

from dsmoe_lite.common.errors import InputError, find_name, require
from dsmoe_lite.teaching.csv_files import read_csv
from dsmoe_lite.teaching.variant import require_student

COLUMNS = ("id", "name", "email")
TOO_LONG = "has more entries than the first line; put quotes around a name with a comma"


@dataclass(frozen=True)
class Student:
    """One line of the file."""

    id: str
    name: str = ""
    email: str = ""


def read_roster(path: Path) -> dict[str, Student]:
    """The students by id, in the order of the file. Raises InputError naming the line that is wrong."""
    rows = read_csv(path)
    require(bool(rows), "students", str(path), f"must have a first line {','.join(COLUMNS)}, and a line per student")
    names = rows[0][1]
    require(";" not in "".join(names), f"{path}, first line", ",".join(names), "separate the columns with commas")
    for name in names:
        hint = "columns are in small letters: " if name.lower() in COLUMNS else ""
        require(name in COLUMNS, f"{path}, column", name, f"{hint}{find_name(name.lower(), COLUMNS)}")
    require("id" in names, "students", str(path), "has no column id")
    require(len(rows) > 1, "students", str(path), "lists nobody: add a line per student")
    found: dict[str, Student] = {}
    for line, row in rows[1:]:
        try:
            require(len(row) <= len(names), "line", ",".join(row), TOO_LONG)
            student = Student(**{"id": "", **dict(zip(names, row, strict=False))})
            require_student(student.id)
            require(student.id not in found, "student", student.id, "is listed twice")
        except InputError as error:
            raise InputError(f"{path}, line {line}: {error}") from None
        found[student.id] = student
    return found
