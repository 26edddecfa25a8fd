"""Points for Moodle and Canvas, with changes by hand and the reason for each.

An overrides file is a CSV file `student,question,points,reason`: it replaces the points of one question.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsmoe_lite.common.errors import InputError, find_name, require
from dsmoe_lite.teaching.csv_files import read_csv
from dsmoe_lite.teaching.grade import Graded
from dsmoe_lite.teaching.roster import Student

FORMATS = ("moodle", "canvas")
OVERRIDE = ("student", "question", "points", "reason")


@dataclass(frozen=True)
class Override:
    """The points of one question, given by hand, and why."""

    points: float
    reason: str


def read_overrides(path: Path, graded: Sequence[Graded]) -> dict[tuple[str, str], Override]:
    """By student and question. Raises InputError naming the line that is wrong."""
    rows = read_csv(path)
    first = tuple(rows[0][1]) if rows else ()
    require(first == OVERRIDE, "first line", ",".join(first), f"{path} must begin {','.join(OVERRIDE)}")
    found: dict[tuple[str, str], Override] = {}
    students = {one.student: one for one in graded}
    for line, row in rows[1:]:
        try:
            student, question, override = _override(row, students)
            require((student, question) not in found, "override", f"{student}, {question}", "is given twice")
        except InputError as error:
            raise InputError(f"{path}, line {line}: {error}") from None
        found[student, question] = override
    return found


def _override(row: Sequence[str], students: Mapping[str, Graded]) -> tuple[str, str, Override]:
    require(
        len(row) == len(OVERRIDE), "line", ",".join(row), "must have 4 entries; put quotes around a reason with a comma"
    )
    student, question, text, reason = row
    require(student in students, "student", student, find_name(student, students))
    questions = students[student].questions
    require(question in questions, "question", question, find_name(question, questions))
    try:
        points = float(text)
    except ValueError:
        points = -1.0
    most = questions[question].of
    require(0 <= points <= most, "points", text, f"must be a number from 0 to {most:g}")
    require(bool(reason), "reason", reason, "is missing: the student gets to read it")
    return student, question, Override(points, reason)


def with_overrides(graded: Graded, overrides: Mapping[tuple[str, str], Override]) -> tuple[Graded, list[str]]:
    """The record with the points given by hand, and one line for each change."""
    questions, lines = dict(graded.questions), []
    for name, grade in graded.questions.items():
        override = overrides.get((graded.student, name))
        if override is not None:
            questions[name] = replace(grade, points=override.points)
            lines.append(f"{name}: {override.points:g} of {grade.of:g} points by hand: {override.reason}")
    return replace(graded, questions=questions), lines


def export(
    title: str,
    graded: Sequence[Graded],
    students: Mapping[str, Student],
    overrides: Mapping[tuple[str, str], Override],
    form: str,
) -> str:
    """The CSV text for Moodle's or Canvas's grade import, by student. Raises InputError for a student not in the list.

    Students in the list without a record are left out, so that an import changes nothing of theirs.
    """
    for one in graded:
        require(one.student in students, "student", one.student, "has a record, but is not in the list of students")
    rows: list[list[str]] = []
    for one in sorted(graded, key=lambda one: one.student):
        changed, lines = with_overrides(one, overrides)
        student, points = students[one.student], f"{changed.points:g}"
        comment = "; ".join([*(f"{name}: {grade.verdict}" for name, grade in one.questions.items()), *lines])
        if form == "moodle":
            rows.append([student.id, student.name, student.email, points, comment])
        else:
            rows.append([student.name, "", student.id, student.email, "", points])
    of = f"{graded[0].of:g}"
    if form == "moodle":
        head = [["ID number", "Full name", "Email address", f"{title} (of {of})", "Feedback comments"]]
    else:
        columns = ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", title]
        head = [columns, ["    Points Possible", "", "", "", "", of]]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([*head, *([_harmless(entry) for entry in row] for row in rows)])
    return text.getvalue()


def _harmless(entry: str) -> str:
    """A spreadsheet takes what begins like this for a formula."""
    return f"'{entry}" if entry.startswith(("=", "+", "-", "@", "\t")) else entry
