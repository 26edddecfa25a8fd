"""Grading: what is handed in, and points that are earned; nothing is lost."""

import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from needs import needs_bwrap
from toy_lab import RIGHT, SCRIPT, SECRET, YAML, notebook, submission, toy, write_lab

from dsmoe_lite.cli import main
from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.teaching import walls as walls_module
from dsmoe_lite.teaching.explain import explain
from dsmoe_lite.teaching.feedback import write_feedback
from dsmoe_lite.teaching.grade import grade_all, grade_one, read_graded, record_path
from dsmoe_lite.teaching.lab import Lab, find_lab, read_lab
from dsmoe_lite.teaching.release import METADATA, release
from dsmoe_lite.teaching.sandbox import Sandbox
from dsmoe_lite.teaching.submissions import Submission, plain_python, read_submission, read_submissions
from dsmoe_lite.teaching.variant import variant
from dsmoe_lite.teaching.walls import why_not

STUDENTS = "id,name,email\nann,Ann Example,ann@example.org\nbob,=Bob,bob@example.org\ncid,,\n"


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return toy(tmp_path / "lab")


# What is handed in


def test_moodles_zip_file_and_names_of_browsers(lab: Lab, tmp_path: Path) -> None:
    made = {name: nbformat.writes(notebook(lab, variant(lab, name, SECRET), RIGHT)) for name in ("ann", "bob")}
    bare = nbformat.reads(made["bob"], as_version=4)
    del bare.metadata[METADATA]
    with zipfile.ZipFile(tmp_path / "moodle.zip", "w") as archive:
        archive.writestr("Ann Example_4711_assignsubmission_file_/my work.ipynb", made["ann"])
        archive.writestr("Bob Example_4712_assignsubmission_file/toy-bob (1).ipynb", nbformat.writes(bare))
        archive.writestr("__MACOSX/Ann/._my work.ipynb", "x")
        archive.writestr("Ann Example_4711_assignsubmission_file_/notes.txt", "x")
    found = read_submissions(tmp_path / "moodle.zip", lab)
    assert {name: (one.name, bool(one.mark), len(one.answers)) for name, one in found.items()} == {
        "ann": ("Ann Example", True, 2),
        "bob": ("Bob Example", False, 2),
    }


def test_answers_are_found_without_their_metadata_and_with_magics(lab: Lab) -> None:
    made = notebook(lab, variant(lab, "ann", SECRET), {"scale": "%timeit 1\n!ls\n" + RIGHT["scale"]})
    for cell in made.cells:
        cell.metadata = {}
    made.cells.append(nbformat.v4.new_code_cell(RIGHT["order"]))
    found = read_submission("toy-ann.ipynb", nbformat.writes(made).encode(), lab)
    assert found.answers == {"scale": "pass\npass\n" + RIGHT["scale"], "order": RIGHT["order"]}
    assert plain_python("x = 1\n%matplotlib inline") == "x = 1\npass"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a/toy-ann.ipynb": "same", "b/toy-ann.ipynb": "same"}, "are both of ann: move one away"),
        ({"homework.ipynb": "{}"}, "homework.ipynb: names no student; rename it to toy-STUDENT.ipynb"),
        ({"notes.txt": "x"}, "holds no notebooks"),
    ],
)
def test_what_nobody_can_assign_is_one_line(lab: Lab, tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(release(lab, variant(lab, "ann", SECRET)) if text == "same" else text)
    with pytest.raises(InputError) as found:
        read_submissions(tmp_path / "in", lab)
    assert message in str(found.value)
    (tmp_path / "broken.zip").write_text("no zip")
    with pytest.raises(InputError, match="is no zip file that can be read"):
        read_submissions(tmp_path / "broken.zip", lab)


# Grading


def test_without_isolation_grading_is_refused_with_the_remedy(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walls_module.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="no isolation: bubblewrap is not installed: apt install bubblewrap; --unsafe"):
        grade_all(lab, {"ann": submission(lab, RIGHT)}, SECRET, tmp_path)
    assert not list(tmp_path.glob("records"))
    (graded,) = grade_all(lab, {"ann": submission(lab, RIGHT)}, SECRET, tmp_path, isolated=False)
    assert (graded.points, graded.isolated) == (5, False)
    assert json.loads(record_path(tmp_path, "ann").read_text())["isolated"] is False
    program = tmp_path / "bwrap"
    program.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(walls_module.shutil, "which", lambda name: str(program))
    assert "Ubuntu 24.04" in (why_not() or "")
    assert "AppArmor profile" in (why_not() or "")


@needs_bwrap
def test_points_are_those_of_right_answers_and_records_resume(lab: Lab, tmp_path: Path) -> None:
    handed_in = {
        "ann": submission(lab, RIGHT),
        "bob": submission(lab, {"scale": "def scale(x):\n    return x + n", "order": RIGHT["order"]}, "bob"),
        "cid": submission(lab, {"order": "order = 7"}, "cid"),
        "dan": read_submission("toy-dan.ipynb", b"{not json", lab),
    }
    graded = grade_all(lab, handed_in, SECRET, tmp_path)
    verdicts = {one.student: [grade.verdict for grade in one.questions.values()] for one in graded}
    assert verdicts == {
        "ann": ["right", "right"],
        "bob": ["wrong", "right"],
        "cid": ["missing", "error"],
        "dan": ["missing", "missing"],
    }
    assert [one.points for one in graded] == [5, 3, 0, 0]
    assert graded[3].note == "the notebook is damaged"
    assert [read_graded(record_path(tmp_path, one.student)) for one in graded] == graded
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()}
    handed_in["bob"] = submission(lab, RIGHT, "bob")
    record_path(tmp_path, "cid").write_text("damaged")
    again = grade_all(lab, handed_in, SECRET, tmp_path)
    assert [one.points for one in again] == [5, 5, 0, 0]
    changed = {path.stem for path, at in before.items() if path.stat().st_mtime_ns != at}
    assert changed == {"bob", "cid"}


@needs_bwrap
def test_grading_twice_changes_nothing(lab: Lab) -> None:
    """An answer that is right or wrong by chance would show here, too."""
    half = {"scale": RIGHT["scale"], "order": "import random\ndef order(v):\n    random.shuffle(v)\n    return v"}
    of = variant(lab, "ann", SECRET)
    found = [grade_one(lab, submission(lab, half), of, SECRET) for _ in range(5)]
    seen = {tuple((grade.verdict, grade.points) for grade in one.questions.values()) for one in found}
    assert seen == {(("right", 2), ("wrong", 0.0))}


@needs_bwrap
def test_a_seeded_bug_loses_exactly_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the wrong answers of the lab on balance in each submission, and right ones in other styles beside them."""
    from lab_answers.balance import RIGHT as STYLES
    from test_course_labs import passes_hidden, wrong_answers

    lab = read_lab(find_lab("balance"))
    names = list(lab.questions)
    bugs = {name: [source for source, _ in wrong_answers(lab, lab.questions[name]).values()] for name in names}
    handed_in, expected = {}, {}
    for number in range(8):
        broken = [names[number % 4], names[(number + 1) % 4]]
        answers = {name: next(iter(STYLES[name].values())) for name in names}
        for name in broken:
            answers[name] = (
                bugs[name].pop() if bugs[name] else next(iter(wrong_answers(lab, lab.questions[name]).values()))[0]
            )
        for student in (f"s{number}x{k}" for k in range(40)):  # whose rule makes both wrong
            of = variant(lab, student, SECRET)
            if not any(passes_hidden(lab, lab.questions[name], answers[name], of) for name in broken):
                break
        handed_in[student] = submission(lab, answers, student)
        expected[student] = sum(lab.questions[name].settings.points for name in names if name not in broken)
    assert len(handed_in) == 8
    found = grade_all(lab, handed_in, SECRET, tmp_path)
    assert {one.student: one.points for one in found} == expected


@needs_bwrap
def test_a_hidden_check_that_calls_nothing_is_an_error_of_the_lab(tmp_path: Path) -> None:
    script = SCRIPT.replace("        assert answer(x) == reference(x)", "        assert reference(x) == reference(x)")
    lab = read_lab(write_lab(tmp_path, script))
    with pytest.raises(RunError, match="the hidden check of question scale never called the answer"):
        grade_one(lab, submission(lab, RIGHT), variant(lab, "ann", SECRET), SECRET)


@needs_bwrap
def test_a_stopped_grading_continues(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "course.secret").write_bytes(SECRET)
    (tmp_path / "in").mkdir()
    slow = "import time\ndef scale(x):\n    time.sleep(0.3)\n    return n * x"
    for number in range(8):
        made = notebook(lab, variant(lab, f"s{number}", SECRET), {"scale": slow, "order": RIGHT["order"]})
        nbformat.write(made, tmp_path / "in" / f"toy-s{number}.ipynb")
    command = [
        sys.executable,
        "-m",
        "dsmoe_lite",
        "labs",
        "grade",
        str(lab.path),
        "in",
        "--out",
        "out",
        "--processes",
        "1",
    ]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (done := list((tmp_path / "out" / "records").glob("s*.json"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert "Traceback" not in err
    kept = {path: path.read_bytes() for path in (tmp_path / "out" / "records").glob("s*.json")}
    assert 0 < len(done) <= len(kept) < 8
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert len(list((tmp_path / "out" / "records").glob("s*.json"))) == 8
    assert all(path.read_bytes() == before for path, before in kept.items())


@needs_bwrap
def test_the_lab_on_the_cache_refuses_keys_of_all_tokens_by_its_memory() -> None:
    """The naive form of latent attention gives the same numbers; the question asks for the other one."""
    lab = read_lab(find_lab("kv_cache"))
    key = lab.questions["decode"].cells["solution"]
    naive = "torch.stack([(latents @ W_UK[i].T) @ q[i] for i in range(len(q))])"
    assert key.count("absorbed @ latents.T") == 1
    answers = {"decode": key.replace("absorbed @ latents.T", naive)}
    of = variant(lab, "ann", SECRET)
    assert grade_one(lab, submission(lab, answers), of, SECRET).questions["decode"].verdict == "memory"
    assert grade_one(lab, submission(lab, {"decode": key}), of, SECRET).questions["decode"].verdict == "right"


@needs_bwrap
def test_a_lab_edited_after_the_release_refuses_its_handouts(lab: Lab, tmp_path: Path) -> None:
    handed_in = {"ann": submission(lab, RIGHT)}
    other = YAML.replace("[3, 4, 5]", "[6, 7]")
    edited = read_lab(write_lab(tmp_path / "edited", settings=other))
    with pytest.raises(InputError, match="its values are of another secret or of an edited lab"):
        grade_all(edited, handed_in, SECRET, tmp_path / "out")
    hint = read_lab(write_lab(tmp_path / "hint", settings=YAML.replace("Multiply by n.", "Times n.")))
    assert grade_all(hint, handed_in, SECRET, tmp_path / "out")[0].points == 5


@needs_bwrap
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "    return n * x",
            "    return factr * x",
            "key or hidden check fails .NameError: name 'factr'",
        ),
        ("    return n * x", "    return (n + 1) ** x", "question scale: the key does not pass the hidden check"),
        ("range(3)", "rang(3)", "key or hidden check fails .NameError"),
    ],
)
def test_a_lab_whose_key_fails_is_refused_before_anybody_is_graded(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    script = SCRIPT.replace(old, new)
    if "not pass" in message:
        script = script.replace("assert answer(x) == reference(x)", "assert answer(x) == n * x")
    lab = read_lab(write_lab(tmp_path / "lab", script))
    with pytest.raises(InputError, match=message):
        grade_all(lab, {"ann": submission(lab, RIGHT)}, SECRET, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_bwrap
def test_a_key_that_fails_later_is_an_error_of_the_lab(tmp_path: Path) -> None:
    lab = read_lab(write_lab(tmp_path, SCRIPT.replace("    return n * x", "    return n * x / 0")))
    with pytest.raises(RunError, match=r"the key of question scale fails \(ZeroDivisionError"):
        grade_one(lab, submission(lab, RIGHT), variant(lab, "ann", SECRET), SECRET)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f(x):\n    return helper(x)", "It uses helper, which its cell does not define"),
        ("def f(x):\n    return (x", "Line 2 is not Python: '(' was never closed."),
        ("from dsmoe_lite.layers import balance", "It imports dsmoe_lite.layers.balance, which this question"),
        ("import dsmoe_lite.layers.balance as b", "It imports dsmoe_lite.layers.balance, which this question"),
        ("def f(x, *rest, k=1):\n    y = [i for i in rest]\n    return given(math.pi, n, y, k, f)", ""),
        (
            "try:\n    import numpy as np\nexcept ImportError as e:\n    print(e)\nnp.zeros(1); a, (b, c) = 1, (2, 3)",
            "",
        ),
    ],
)
def test_an_error_is_explained_by_the_source_alone(source: str, reason: str) -> None:
    given = ["import math\ndef given(*a):\n    pass"]
    found = explain(source, given, ["n"], ["dsmoe_lite.layers.balance"])
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


@needs_bwrap
def test_the_reason_of_an_error_reaches_the_student_without_the_hint(lab: Lab, tmp_path: Path) -> None:
    one = submission(lab, {"scale": "def scale(x):\n    return factor(x)", "order": RIGHT["order"]})
    graded = grade_one(lab, one, variant(lab, "ann", SECRET), SECRET)
    page = write_feedback(lab, graded, one, tmp_path).read_text()
    assert "It uses factor, which its cell does not define" in page
    assert "Multiply by n." not in page


def test_all_problems_of_what_is_handed_in_are_listed_at_once(lab: Lab, tmp_path: Path) -> None:
    for name in ("one.ipynb", "two.ipynb", "sub/toy-ann.ipynb", "toy-ann.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError) as found:
        read_submissions(tmp_path, lab)
    assert all(part in str(found.value) for part in ("one.ipynb", "two.ipynb", "both of ann: move one away"))


def read(lab: Lab, *cells: dict[str, Any], name: str = "toy-ann.ipynb", encoding: str = "utf-8") -> Submission:
    """A notebook of these code cells, as a browser or an editor may have saved it."""
    code = [{"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, **cell} for cell in cells]
    return read_submission(name, json.dumps({"cells": code, "metadata": {}, "nbformat": 4}).encode(encoding), lab)


LABELLED = {"metadata": {"tags": ["answer"], "question": "scale"}}
STUB = "def scale(x):\n    return None\n"


def test_careless_notebooks_keep_their_answers(lab: Lab) -> None:
    mine = RIGHT["scale"]
    for encoding in ("utf-8-sig", "utf-16"):
        assert read(lab, {"source": mine}, encoding=encoding).answers == {"scale": mine}
    assert read(lab, {"source": STUB, **LABELLED}, {"source": mine}).answers == {"scale": mine}
    split = read(lab, {"source": "k = n", **LABELLED}, {"source": mine, **LABELLED})
    assert split.answers == {"scale": f"k = n\n\n{mine}"}
    assert read(lab, {"source": STUB, **LABELLED}).answers["scale"].split() == STUB.split()
    assert read(lab, {"source": f"# a\x0cb\u2028c\n{mine}"}).answers == {"scale": f"# a\x0cb\u2028c\n{mine}"}
    assert plain_python("if x:\n    %timeit y\nr = %timeit -o 1\nscale?\ny = x % 2") == (
        "if x:\n    pass\npass\npass\ny = x % 2"
    )
    halves = read(lab, {"source": "# \ud83d\n" + mine})
    assert halves.answers["scale"].encode("utf-8")
    long = read(lab, {"source": "1\n" * 20_000}, {"source": mine})
    assert (long.answers, long.problem) == ({"scale": mine}, "a cell of more than 20,000 characters was left out")


def test_names_from_outside_are_text(lab: Lab) -> None:
    one = read(lab, {"source": ""}, name="<img src=x onerror=alert(1)>\x1b_1_assignsubmission_file_/toy-ann.ipynb")
    assert one.name == "?img src?x onerror?alert(1)??"
    assert one.file == "?img src?x onerror?alert(1)??_1_assignsubmission_file_/toy-ann.ipynb"


def test_a_damaged_archive_is_one_line(lab: Lab, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("toy-ann.ipynb", release(lab, variant(lab, "ann", SECRET)))
    damaged = bytearray((tmp_path / "in.zip").read_bytes())
    damaged[60:90] = b"x" * 30
    (tmp_path / "in.zip").write_bytes(damaged)
    with pytest.raises(InputError, match="is no zip file that can be read"):
        read_submissions(tmp_path / "in.zip", lab)


@needs_bwrap
@pytest.mark.parametrize(
    "source",
    [
        RIGHT["scale"] + "\nprint(scale(undefined))",
        RIGHT["scale"] + "\nassert scale(1) == 100",
        "raise ValueError\n" + RIGHT["scale"],
        "from __future__ import annotations\nimport numpy\ndef scale(x):\n    return numpy.int64(n * x)",
    ],
)
def test_a_right_function_beside_a_failing_line_is_right(lab: Lab, source: str) -> None:
    graded = grade_one(lab, submission(lab, {"scale": source}), variant(lab, "ann", SECRET), SECRET)
    assert graded.questions["scale"].verdict == "right"


@needs_bwrap
def test_arrays_and_ranges_are_plain_data() -> None:
    source = "import numpy\ndef f():\n    return [numpy.arange(3.0), range(3), {'a': 1}.values(), numpy.float32(2)]"
    with Sandbox([], source) as sandbox:
        array, *others = sandbox.call("f").value
    assert (array.tolist(), others) == ([0.0, 1.0, 2.0], [[0, 1, 2], [1], 2.0])


@needs_bwrap
def test_a_check_that_passes_anything_is_refused(tmp_path: Path) -> None:
    script = SCRIPT.replace("        assert answer(x) == reference(x)", "        answer(x)")
    lab = read_lab(write_lab(tmp_path / "lab", script))
    with pytest.raises(InputError, match="question scale: the hidden check passes any answer"):
        grade_all(lab, {"ann": submission(lab, RIGHT)}, SECRET, tmp_path / "out")


@needs_bwrap
def test_a_second_batch_leaves_the_first_as_it_is(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    Path("students.csv").write_text(STUDENTS)
    Path("course.secret").write_bytes(SECRET)
    for name in ("ann", "bob"):
        Path(name).mkdir()
        nbformat.write(notebook(lab, variant(lab, name, SECRET), RIGHT), f"{name}/toy-{name}.ipynb")
        with pytest.raises(SystemExit) as ended:
            main(["labs", "grade", str(lab.path), name, "--students", "students.csv", "--out", "out", "--json"])
        assert ended.value.code == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out.split("\n]\n")[1] + "\n]")[0]["students"]
    assert {row["student"]: row["points"] for row in found} == {"ann": 5, "bob": 5, "cid": 0}
    assert (tmp_path / "out" / "feedback" / "ann.html").is_file()
