"""A class at a glance: how each question went, which was the hardest, and who has how many points."""

from collections.abc import Sequence
from typing import Any

from dsmoe_lite.teaching.grade import VERDICTS, Graded


def by_question(graded: Sequence[Graded]) -> list[dict[str, Any]]:
    """One row per question, in the order of the lab: verdicts, and the share of the submissions that are right.

    Students who handed in nothing do not count.
    """
    handed_in = [one for one in graded if one.file]
    rows = []
    for name in dict.fromkeys(name for one in graded for name in one.questions):
        grades = [one.questions[name] for one in handed_in if name in one.questions]
        counts = {verdict: sum(grade.verdict == verdict for grade in grades) for verdict in VERDICTS}
        share = round(100 * counts["right"] / len(grades)) if grades else 0
        rows.append({"question": name, "submissions": len(grades), **counts, "right %": share})
    return rows


def hardest(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The question with the smallest share of right answers; None if all are the same."""
    shares = {row["right %"] for row in rows}
    return min(rows, key=lambda row: row["right %"]) if len(shares) > 1 else None


def by_student(graded: Sequence[Graded], *, anonymous: bool = False) -> list[dict[str, Any]]:
    """One row per student, most points first. anonymous: numbers for names, and no notes."""
    ordered = sorted(graded, key=lambda one: (-one.points, one.student))
    rows = []
    for number, one in enumerate(ordered, start=1):
        verdicts = {name: grade.verdict for name, grade in one.questions.items()}
        row = {"student": f"student {number}" if anonymous else one.student, "points": one.points, "of": one.of}
        rows.append(row | verdicts | ({} if anonymous else {"note": one.note}))
    return rows
