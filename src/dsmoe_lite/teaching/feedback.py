"""What a student gets back: verdict, points and the author's hint for each question, as JSON and as one HTML page.

Never what the student's code raised or returned in the check: that may carry the check's own inputs.
"""

from pathlib import Path
from typing import Any

from dsmoe_lite.common.files import write_json, write_text
from dsmoe_lite.teaching.grade import Graded
from dsmoe_lite.teaching.lab import Lab
from dsmoe_lite.teaching.submissions import Submission

FEEDBACK = "feedback"  # folder of the pages, below that of the results
MEANING = {
    "right": "Right.",
    "wrong": "Not right: a value differs from what the question asks for.",
    "time": "Stopped: it took too long.",
    "memory": "Stopped: it took too much memory.",
    "error": "Stopped with an error, or it returned something that is not plain data.",
    "missing": "Not answered.",
}
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid #8886; border-radius: 6px; font-size: 14px; }
.prompt, .anchor-link { display: none; }
.k, .kn, .ow { font-weight: 600; } .c1 { opacity: .7; }
"""


def write_feedback(lab: Lab, graded: Graded, submission: Submission | None, out: Path) -> Path:
    """Write STUDENT.json and STUDENT.html below `out`; return the path of the page."""
    rows = [feedback_row(lab, graded, name) for name in graded.questions]
    values = {"lab": lab.name, "student": graded.student, "points": graded.points, "of": graded.of}
    if not graded.isolated:
        values["isolated"] = False
    page = out / FEEDBACK / f"{graded.student}.html"
    write_json(page.with_suffix(".json"), values | {"note": graded.note, "questions": rows})
    write_text(page, _page(lab, graded, rows, {} if submission is None else submission.answers))
    return page


def feedback_row(lab: Lab, graded: Graded, question: str) -> dict[str, Any]:
    """One question: verdict, points, and what may help: the reason of an error, or the hint of a wrong answer."""
    grade = graded.questions[question]
    hint = lab.questions[question].settings.hint if grade.verdict == "wrong" else ""
    row = {"question": question, "verdict": grade.verdict, "points": grade.points, "of": grade.of}
    return row | ({"reason": grade.reason} if grade.reason else {}) | ({"hint": hint} if hint else {})


def _page(lab: Lab, graded: Graded, rows: list[dict[str, Any]], answers: dict[str, str]) -> str:
    import nbformat
    from nbconvert import HTMLExporter

    cells = [nbformat.v4.new_markdown_cell(_head(lab, graded))]
    for row in rows:
        hint = f" {row['reason']}" if "reason" in row else ""
        hint += f"\n\nHint: {row['hint']}" if "hint" in row else ""
        text = f"## {row['question']}: {row['points']:g} of {row['of']:g} points\n\n**{MEANING[row['verdict']]}**{hint}"
        cells.append(nbformat.v4.new_markdown_cell(text))
        if row["question"] in answers:
            cells.append(nbformat.v4.new_code_cell(answers[row["question"]]))
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(nbformat.v4.new_notebook(cells=cells))
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<title>{lab.name}, {graded.student}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _head(lab: Lab, graded: Graded) -> str:
    note = f"\n\nNote: {graded.note}." if graded.note else ""
    return f"# {lab.title}\n\n{graded.student}: **{graded.points:g} of {graded.of:g} points**{note}"
