"""`dsmoe labs grade` and `export`."""

import os
from dataclasses import replace
from pathlib import Path

import click

from dsmoe_lite.cli.labs.options import FILE, FOLDER, lab_argument, secret_option, students_option
from dsmoe_lite.cli.tables import json_option, print_rows
from dsmoe_lite.common.errors import InputError, require


@click.command(
    epilog="""\b
Example, with a folder of notebooks or the zip file that Moodle makes:
  dsmoe labs grade balance submissions.zip --students students.csv --out graded/balance"""
)
@lab_argument
@click.argument("submissions", type=click.Path(path_type=Path))
@students_option
@secret_option
@click.option("--out", type=FOLDER, help="Folder of records and feedback.  [default: graded/LAB]")
@click.option("--processes", type=click.IntRange(1), help="Students at once.  [default: one per core]")
@click.option("--similar", is_flag=True, help="Also list answers that look alike; needs the extra `similarity`.")
@click.option("--unsafe", is_flag=True, help="Run answers without isolation, as you; every record says so.")
@json_option
def grade(
    lab: str,
    submissions: Path,
    students: Path | None,
    secret: Path,
    out: Path | None,
    processes: int | None,
    similar: bool,
    unsafe: bool,
    as_json: bool,
) -> None:
    """Grade the notebooks in SUBMISSIONS, a folder or a zip file.

    Each answer is called in a sandbox without network, files or secrets. If grading is stopped, the same command
    continues; an answer that has changed since is graded again.
    """
    from dsmoe_lite.common.progress import progress
    from dsmoe_lite.teaching.class_report import by_student
    from dsmoe_lite.teaching.feedback import write_feedback
    from dsmoe_lite.teaching.grade import Graded, grade_all, not_submitted, read_graded, record_path, write_record
    from dsmoe_lite.teaching.lab import find_lab, read_lab
    from dsmoe_lite.teaching.roster import read_roster
    from dsmoe_lite.teaching.similarity import require_copydetect, similar_pairs
    from dsmoe_lite.teaching.submissions import read_submissions
    from dsmoe_lite.teaching.variant import read_secret
    from dsmoe_lite.teaching.walls import require_hidden

    one, key = read_lab(find_lab(lab)), read_secret(secret)
    if similar:
        require_copydetect()
    if not unsafe:
        require_hidden((secret, submissions))
    found = read_submissions(submissions, one)
    roster = None if students is None else read_roster(students)
    if roster is not None:
        for student, submission in list(found.items()):
            if student not in roster:
                raise InputError(f"{submission.file}: {student} is not in {students}: add the student, or move it away")
            if submission.name and roster[student].name and submission.name != roster[student].name:
                remark = f"handed in by {submission.name}, made for {roster[student].name}"
                found[student] = replace(submission, remark=remark)
    folder = out or Path("graded") / one.name
    with progress(total=len(found), desc="grading", unit="student") as bar:

        def after(graded: Graded) -> None:
            bar.update()

        graded = grade_all(
            one, found, key, folder,
            processes=processes or os.cpu_count() or 1, isolated=not unsafe, after=after,
        )  # fmt: skip
    absent = [] if roster is None else [student for student in roster if student not in found]
    for missing in not_submitted(one, absent, key):
        earlier = record_path(folder, missing.student)
        if earlier.is_file() and read_graded(earlier).file:  # of another batch
            graded.append(read_graded(earlier))
            continue
        write_record(one, missing, folder)
        graded.append(missing)
    for record in graded:
        if record.student in found or not record.file:  # else of another batch
            write_feedback(one, record, found.get(record.student), folder)
    rows_of_students = by_student(graded)
    pairs = [vars(pair) for pair in similar_pairs(one, found)] if similar else []
    if as_json:
        print_rows([{"students": rows_of_students, "similar": pairs}], as_json=True)
    else:
        print_rows(rows_of_students, as_json=False, title=one.title)
        if pairs:
            print_rows(pairs, as_json=False, title="Alike: look before you judge, short answers often are")
        elif similar:
            click.echo("no two answers look alike")
        click.echo(f"{folder}: records and feedback of {len(graded)} students")
    if unsafe:
        click.echo("dsmoe: --unsafe: answers ran without isolation; their points prove less", err=True)


@click.command(
    epilog="""\b
Example:
  dsmoe labs export graded/balance --students students.csv --format moodle --out points.csv"""
)
@click.argument("folder", type=FOLDER)
@click.option("--students", type=FILE, required=True, help="CSV file of the students: id, and if known name, email.")
@click.option("--format", "form", type=click.Choice(["moodle", "canvas"]), default="moodle", show_default=True)
@click.option("--overrides", type=FILE, help="CSV file of points given by hand: student,question,points,reason.")
@click.option("--title", help="Name of the assignment.  [default: the lab's name]")
@click.option("--out", type=FILE, help="Write to this file.  [default: print]")
@json_option
def export(
    folder: Path, students: Path, form: str, overrides: Path | None, title: str | None, out: Path | None, as_json: bool
) -> None:
    """Export the points in FOLDER for the grade import of Moodle or Canvas."""
    from dsmoe_lite.common.files import write_text
    from dsmoe_lite.teaching.export import export as as_csv
    from dsmoe_lite.teaching.export import read_overrides, with_overrides
    from dsmoe_lite.teaching.grade import read_all_graded
    from dsmoe_lite.teaching.roster import read_roster

    graded, roster = read_all_graded(folder), read_roster(students)
    changes = {} if overrides is None else read_overrides(overrides, graded)
    require(out is None or out.suffix == ".csv", "out", str(out), "must end in .csv")
    text = as_csv(title or graded[0].lab, graded, roster, changes, form)
    if out is not None:
        write_text(out, text)
        click.echo(f"{out}: {len(graded)} students, {len(changes)} points given by hand", err=as_json)
    if as_json:
        rows = []
        for one in graded:
            changed, lines = with_overrides(one, changes)
            rows.append({"student": one.student, "points": changed.points, "by hand": lines})
        print_rows(rows, as_json=True)
    elif out is None:
        click.echo(text, nl=False)
