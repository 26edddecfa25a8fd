"""The students of a course: a CSV file with the column `id`, and if known `name` and `email`."""

import csv
from dataclasses import dataclass
from pathlib import Path

from dsmoe_lite.common.errors import InputError, find_name, require
from dsmoe_lite.teaching.variant import require_student

COLUMNS = ("id", "name", "email")


@dataclass(frozen=True)
class Student:
    """One line of the file."""

    id: str
    name: str = ""
    email: str = ""


def read_roster(path: Path) -> dict[str, Student]:
    """The students by id, in the order of the file. Raises InputError naming the line that is wrong."""
    try:
        with path.expanduser().open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is no CSV file in UTF-8; save it as CSV UTF-8 ({type(error).__name__})") from None
    require(bool(rows), "students", str(path), f"must have a first line {','.join(COLUMNS)}, and a line per student")
    names = [name for name in rows[0] if name is not None]
    require(";" not in "".join(names), f"{path}, first line", ";".join(names), "separate the columns with commas")
    for name in names:
        hint = "columns are in small letters: " if name.lower() in COLUMNS else ""
        require(name in COLUMNS, f"{path}, column", name, f"{hint}{find_name(name.lower(), COLUMNS)}")
    require("id" in names, "students", str(path), "has no column id")
    found: dict[str, Student] = {}
    for line, row in enumerate(rows, start=2):
        values = {name: (row.get(name) or "").strip() for name in COLUMNS}
        if not any(values.values()):
            continue
        try:
            require(
                None not in row,
                "line",
                row.get("id"),
                "has more entries than the first line; put quotes around a name with a comma",
            )
            require_student(values["id"])
            require(values["id"] not in found, "student", values["id"], "is listed twice")
        except InputError as error:
            raise InputError(f"{path}, line {line}: {error}") from None
        found[values["id"]] = Student(**values)
    return found
