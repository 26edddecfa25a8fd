"""`dsmoe labs list`, `show` and `release`."""

from pathlib import Path

import click

from dsmoe_lite.cli.labs.options import FOLDER, lab_argument, secret_option, students_option
from dsmoe_lite.cli.tables import json_option, print_rows
from dsmoe_lite.common.errors import InputError, require


@click.command(name="list", epilog="\b\nExample:\n  dsmoe labs list")
@json_option
def list_labs(as_json: bool) -> None:
    """List the labs of the course."""
    from dsmoe_lite.teaching.lab import LABS, labs, read_lab

    found = [read_lab(path) for path in labs()]
    require(
        bool(found), "labs", str(LABS), "there are none: they come with a clone of the repository, not with a wheel"
    )
    rows = [
        {
            "lab": lab.name,
            "title": lab.title,
            "minutes": lab.minutes,
            "questions": len(lab.questions),
            "points": lab.points,
        }
        for lab in found
    ]
    print_rows(rows, as_json=as_json)


@click.command(epilog="\b\nExample:\n  dsmoe labs show balance")
@lab_argument
@json_option
def show(lab: str, as_json: bool) -> None:
    """Show the questions of LAB, a name or a .py file, and what differs between students."""
    from dsmoe_lite.teaching.lab import find_lab, read_lab

    one = read_lab(find_lab(lab))
    questions = [
        {
            "question": name,
            "function": question.settings.function,
            "points": question.settings.points,
            "seconds": question.settings.seconds,
            "hint": question.settings.hint,
        }
        for name, question in one.questions.items()
    ]
    varied = [
        {"parameter": name, "values": f"{allowed[0]}..{allowed[-1]}" if isinstance(allowed, range) else list(allowed)}
        for name, allowed in one.varied.items()
    ]
    if as_json:
        print_rows([{"lab": one.name, "questions": questions, "differs": varied}], as_json=True)
        return
    click.echo(f"{one.title}\n{one.minutes} minutes, {one.points:g} points; {one.path}\n")
    print_rows(questions, as_json=False)
    if varied:
        print_rows([{**row, "values": str(row["values"])} for row in varied], as_json=False, title="Differs")


@click.command(
    epilog="""\b
Example:
  dsmoe labs release balance --students students.csv --out handouts
  dsmoe labs release balance --student ann --out handouts"""
)
@lab_argument
@students_option
@click.option("--student", "single", multiple=True, metavar="ID", help="One student; may be repeated.")
@secret_option
@click.option("--out", type=FOLDER, default=Path("handouts"), show_default=True, help="Folder of the notebooks.")
@json_option
def release(lab: str, students: Path | None, single: tuple[str, ...], secret: Path, out: Path, as_json: bool) -> None:
    """Write one notebook of LAB per student, with the student's own values and without keys.

    The first release of a course makes its secret. The same student gets the same file again, byte for byte.
    """
    from dsmoe_lite.common.progress import progress
    from dsmoe_lite.teaching.lab import find_lab, read_lab
    from dsmoe_lite.teaching.release import write_release
    from dsmoe_lite.teaching.roster import read_roster
    from dsmoe_lite.teaching.variant import make_secret, read_secret, require_student, variant

    one = read_lab(find_lab(lab))
    names = [*([] if students is None else read_roster(students)), *single]
    if not names:
        raise InputError("students: give --students FILE, or --student ID")
    for name in names:
        require_student(name)
    earlier = next(out.glob(f"{one.name}-*.ipynb"), None)
    if earlier is not None and not secret.expanduser().exists():
        raise InputError(f"secret {secret}: missing, but {earlier} exists; give the file that made it with --secret")
    if make_secret(secret):
        click.echo(f"{secret}: the course's new secret; keep it, grading needs it", err=True)
    key = read_secret(secret)
    rows = []
    for name in progress(dict.fromkeys(names), desc="handouts", unit="notebook"):
        path, is_new = write_release(one, variant(one, name, key), out)
        rows.append({"student": name, "notebook": str(path), "new": is_new})
    if as_json:
        print_rows(rows, as_json=True)
    else:
        made = sum(row["new"] is True for row in rows)
        click.echo(f"{out}: {made} notebooks written, {len(rows) - made} were there already")
