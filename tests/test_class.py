"""A graded class: reports, feedback, points by hand, export, and all commands in a row."""

import csv
import io
import json
import os
import random
from pathlib import Path

import nbformat
import pytest
from needs import needs_bwrap, needs_copydetect
from toy_lab import RIGHT, SECRET, notebook, submission, toy

from dsmoe_lite.cli import main
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.teaching.class_report import by_question, by_student, hardest
from dsmoe_lite.teaching.export import export, read_overrides
from dsmoe_lite.teaching.grade import Grade, Graded, grade_one, read_all_graded
from dsmoe_lite.teaching.lab import Lab, find_lab, labs, read_lab
from dsmoe_lite.teaching.roster import Student, read_roster
from dsmoe_lite.teaching.similarity import similar_pairs
from dsmoe_lite.teaching.variant import read_secret, variant

STUDENTS = "id,name,email\nann,Ann Example,ann@example.org\nbob,=Bob,bob@example.org\ncid,,\n"


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return toy(tmp_path / "lab")


# Reports, feedback and export


def record(student: str, *verdicts: str, file: str = "x.ipynb") -> Graded:
    points = {"scale": 2.0, "order": 3.0}
    grades = {
        name: Grade(verdict, of if verdict == "right" else 0.0, of, 0.1, 50)
        for (name, of), verdict in zip(points.items(), verdicts, strict=True)
    }
    return Graded("toy", student, file, "", grades, True, "" if file else "nothing was handed in")


CLASS = [record("ann", "right", "right"), record("bob", "wrong", "right"), record("cid", "time", "right"),
         record("dan", "missing", "missing", file="")]  # fmt: skip


def test_a_class_by_question_and_by_student() -> None:
    rows = by_question(CLASS)
    assert [(row["question"], row["submissions"], row["right"], row["time"], row["right %"]) for row in rows] == [
        ("scale", 3, 1, 1, 33),
        ("order", 3, 3, 0, 100),
    ]
    assert (hardest(rows) or {})["question"] == "scale"
    assert hardest(by_question(CLASS[:1])) is None
    assert [row["student"] for row in by_student(CLASS)] == ["ann", "bob", "cid", "dan"]
    hidden = by_student(CLASS, anonymous=True)
    assert [row["student"] for row in hidden] == ["student 1", "student 2", "student 3", "student 4"]
    assert not any(name in str(hidden) for name in ("ann", "bob", "cid", "dan", "x.ipynb"))


def test_points_by_hand_have_a_reason_and_reach_both_formats(tmp_path: Path) -> None:
    (tmp_path / "students.csv").write_text(STUDENTS + "dan,Dan,\neve,,\n")
    students = read_roster(tmp_path / "students.csv")
    changes = tmp_path / "changes.csv"
    changes.write_text("student,question,points,reason\nbob,scale,1.5,the idea is right\n")
    overrides = read_overrides(changes, CLASS)
    moodle = list(csv.DictReader(io.StringIO(export("Toy", CLASS, students, overrides, "moodle"))))
    assert [row["Toy (of 5)"] for row in moodle] == ["5", "4.5", "3", "0"]
    assert moodle[1]["Full name"] == "'=Bob"
    assert (
        moodle[1]["Feedback comments"]
        == "scale: wrong; order: right; scale: 1.5 of 2 points by hand: the idea is right"
    )
    canvas = list(csv.reader(io.StringIO(export("Toy", CLASS, students, {}, "canvas"))))
    assert canvas[0] == ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "Toy"]
    assert canvas[1] == ["    Points Possible", "", "", "", "", "5"]
    assert [row[2] + " " + row[5] for row in canvas[2:]] == ["ann 5", "bob 3", "cid 3", "dan 0"]
    with pytest.raises(InputError, match="student = 'ann': has a record, but is not in the list"):
        export("Toy", CLASS, {"bob": Student("bob")}, {}, "moodle")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bo,scale,1,x", "line 2: student = 'bo': did you mean bob?"),
        ("bob,scal,1,x", "line 2: question = 'scal': did you mean scale?"),
        ("bob,scale,9,x", "line 2: points = '9': must be a number from 0 to 2"),
        ("bob,scale,much,x", "line 2: points = 'much'"),
        ("bob,scale,1,", "line 2: reason = '': is missing"),
        ("bob,scale,1", "must have 4 entries; put quotes around a reason with a comma"),
        ("bob,scale,1,x\nbob,scale,2,y", "line 3: override = 'bob, scale': is given twice"),
    ],
)
def test_an_override_that_does_not_fit_names_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "changes.csv"
    path.write_text(f"student,question,points,reason\n{line}\n")
    with pytest.raises(InputError) as found:
        read_overrides(path, CLASS)
    assert message in str(found.value)


@needs_copydetect
def test_alike_answers_are_shown_and_stubs_are_not(lab: Lab) -> None:
    long = """
def order(values):
    result = []
    for value in values:
        place = 0
        while place < len(result) and (value > result[place]) == (rule == "up"):
            place += 1
        result.insert(place, value)
    return result
"""
    renamed = long.replace("result", "out").replace("place", "k").replace("value", "v")
    other = """
def order(values):
    import heapq
    heapq.heapify(values)
    up = [heapq.heappop(values) for _ in range(len(values))]
    return up if rule == "up" else up[::-1]
"""
    handed_in = {
        name: submission(lab, {"order": source}, name)
        for name, source in (("ann", long), ("bob", renamed), ("cid", other))
    }
    (pair,) = similar_pairs(lab, handed_in)
    assert (pair.first, pair.second, pair.question) == ("ann", "bob", "order")
    assert pair.share > 0.8


@needs_bwrap
def test_the_commands_from_handout_to_export(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    Path("students.csv").write_text(STUDENTS)

    def dsmoe(*arguments: str) -> tuple[str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["labs", *arguments])
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        return out, err

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["labs", *arguments])
        assert ended.value.code == 2
        return capsys.readouterr().err.strip()

    toy_path = str(lab.path)
    assert "balance" in dsmoe("list")[0]
    assert {row["lab"] for row in json.loads(dsmoe("list", "--json")[0])} == {path.stem for path in labs()}
    assert "Multiply by n." in dsmoe("show", toy_path)[0]
    assert json.loads(dsmoe("show", toy_path, "--json")[0])[0]["differs"][2] == {
        "parameter": "seed",
        "values": "0..999999",
    }
    assert refused("release", toy_path) == "dsmoe: students: give --students FILE, or --student ID"
    assert "course.secret: the course's new secret" in dsmoe("release", toy_path, "--students", "students.csv")[1]
    assert (
        dsmoe("release", toy_path, "--students", "students.csv")[0]
        == "handouts: 0 notebooks written, 3 were there already\n"
    )
    secret = read_secret(Path("course.secret"))
    os.mkdir("in")
    for name in ("ann", "bob"):
        answers = (
            RIGHT
            if name == "ann"
            else {"scale": "def scale(x):\n    return '<script>alert(1)</script>'", "order": RIGHT["order"]}
        )
        nbformat.write(notebook(lab, variant(lab, name, secret), answers), f"in/toy-{name}.ipynb")
    out, _ = dsmoe("grade", toy_path, "in", "--students", "students.csv")
    assert "graded/toy: records and feedback of 3 students" in out
    assert (
        json.loads(dsmoe("grade", toy_path, "in", "--students", "students.csv", "--json")[0])[0]["students"][0][
            "points"
        ]
        == 5
    )
    page = Path("graded/toy/feedback/bob.html").read_text()
    assert "Multiply by n." in page
    assert "<script" not in page
    assert "http" not in page
    feedback = json.loads(Path("graded/toy/feedback/bob.json").read_text())
    assert feedback["questions"][0] == {
        "question": "scale",
        "verdict": "wrong",
        "points": 0.0,
        "of": 2,
        "hint": "Multiply by n.",
    }
    out, _ = dsmoe("report", "graded/toy", "--anonymous", "--table", "class.csv")
    assert "hardest: scale, 50% of 2 submissions are right" in out
    assert "ann" not in Path("class.csv").read_text()
    assert json.loads(dsmoe("report", "graded/toy", "--json")[0])[0]["questions"][0]["submissions"] == 2
    out, _ = dsmoe("export", "graded/toy", "--students", "students.csv", "--out", "points.csv", "--json")
    assert [row["points"] for row in json.loads(out)] == [5, 3, 0]
    assert "ann,Ann Example,ann@example.org,5" in Path("points.csv").read_text()
    assert len(read_all_graded(Path("graded/toy"))) == 3
    Path("students.csv").write_text("id\nann\nbobby\n")
    message = refused("grade", toy_path, "in", "--students", "students.csv")
    assert message == "dsmoe: toy-bob.ipynb: bob is not in students.csv: add the student, or move it away"


@needs_bwrap
def test_what_a_student_is_given_back_carries_no_input_of_the_check(lab: Lab, tmp_path: Path) -> None:
    spying = "def scale(x):\n    raise ValueError(f'the input was {x} SPY')"
    graded = grade_one(lab, submission(lab, {"scale": spying}), variant(lab, "ann", SECRET), SECRET)
    from dsmoe_lite.teaching.feedback import write_feedback

    page = write_feedback(lab, graded, submission(lab, {"scale": "def scale(x):\n    raise ValueError"}), tmp_path)
    assert "SPY" not in page.read_text() + page.with_suffix(".json").read_text()
    assert graded.questions["scale"].verdict == "error"


def test_random_numbers_of_a_check_differ_by_student_and_question() -> None:
    from dsmoe_lite.teaching.variant import grading_random

    lab = read_lab(find_lab("balance"))

    def draws(student: str, question: str) -> float:
        return grading_random(lab, student, question, SECRET).random()

    assert draws("ann", "loads") == draws("ann", "loads")
    assert len({draws(s, q) for s in ("ann", "bob") for q in lab.questions}) == 2 * len(lab.questions)
    assert isinstance(grading_random(lab, "ann", "loads", SECRET), random.Random)
