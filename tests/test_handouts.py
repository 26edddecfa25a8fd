"""Labs: the format, variants, and the notebooks that students get."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from toy_lab import SCRIPT, SECRET, YAML, toy, write_lab

from dsmoe_lite.cli import main
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.teaching.lab import Lab, find_lab, labs, read_lab
from dsmoe_lite.teaching.release import release, write_release
from dsmoe_lite.teaching.roster import read_roster
from dsmoe_lite.teaching.variant import make_secret, read_secret, variant

STUDENTS = "id,name,email\nann,Ann Example,ann@example.org\nbob,=Bob,bob@example.org\ncid,,\n"


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return toy(tmp_path / "lab")


# The format


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("yml", "minutes: 60", "minuts: 60", "toy.yml: minuts = 60: no such field; did you mean minutes?"),
        ("yml", "  scale:\n    function: scale", "  scale:\n    function: scales", "answer of question scale"),
        ("yml", "[3, 4, 5]", "[3, 40]", "n = 40: must be a whole number, 1..10"),
        ("yml", "  n: [3", "  m: [3", "parameter = 'm': the script's parameters are n, rule, seed"),
        ("yml", "points: 2", "points: 0", "question scale: points = 0: must be a finite number above 0"),
        ("yml", "forbid: [dsmoe_lite.layers.balance]", "forbid: dsmoe_lite.layers", "question order: forbid"),
        ("yml", "[dsmoe_lite.layers.balance]", "[dsmoe_lite.nothing]", "forbid = 'dsmoe_lite.nothing': must be a list"),
        ("yml", "hint: Multiply", "hints: Multiply", "question scale: hints = 'Multiply by n.': no such field"),
        ("yml", "  order:\n", "  oder:\n", "question = 'oder': no cell of the script has it; did you mean order?"),
        ("py", "    return n * x", "    return n * * x", "solution of question scale, line 2: invalid syntax"),
        ("yml", "0..999999", "9..", "seed = '9..': must be a list of values, or low..high"),
        ("py", 'tags=["hidden"] question="scale"', 'tags=["hid"] question="scale"', "scale = ['hidden']: no cell"),
        ("py", 'tags=["answer"] question="order"', 'tags=["answer"]', 'needs question="NAME"'),
        ("py", 'tags=["solution"] question="order"', 'tags=["answer"] question="order"', "two cells have this role"),
        ("py", "def check(answer, reference, random):\n    for", "def t():\n    for", "define the function check"),
    ],
)  # fmt: skip
def test_a_lab_that_does_not_fit_is_one_line(tmp_path: Path, file: str, old: str, new: str, message: str) -> None:
    texts = {"py": SCRIPT, "yml": YAML}
    assert old in texts[file]
    texts[file] = texts[file].replace(old, new)
    path = write_lab(tmp_path, texts["py"], texts["yml"])
    with pytest.raises(InputError) as found:
        read_lab(path)
    assert message in str(found.value)
    assert "\n" not in str(found.value)
    assert "toy." in str(found.value)


def test_deleting_an_entry_removes_the_question(tmp_path: Path) -> None:
    whole = toy(tmp_path / "whole")
    start, end = YAML.index("  scale:"), YAML.index("  order:")
    short = read_lab(write_lab(tmp_path / "short", settings=YAML[:start] + YAML[end:]))
    assert (whole.points, short.points, list(short.questions)) == (5, 3, ["order"])
    text = release(short, variant(short, "ann", SECRET))
    assert "scale" not in text
    assert "scale" in release(whole, variant(whole, "ann", SECRET))


def test_labs_are_found_by_name_or_path(tmp_path: Path) -> None:
    assert find_lab("balance") == next(path for path in labs() if path.stem == "balance")
    with pytest.raises(InputError, match="lab = 'balanc': did you mean balance"):
        find_lab("balanc")
    with pytest.raises(InputError, match="no such file"):
        find_lab(str(tmp_path / "none.py"))
    assert find_lab(str(write_lab(tmp_path))) == tmp_path / "toy.py"


# Variants and handouts


def test_a_student_gets_the_same_bytes_again_and_another_gets_others(lab: Lab) -> None:
    handouts = {name: release(lab, variant(lab, name, SECRET)) for name in (f"s{n}" for n in range(30))}
    assert len(set(handouts.values())) == 30
    assert {name: release(lab, variant(lab, name, SECRET)) for name in handouts} == handouts
    values = [variant(lab, name, SECRET).values for name in handouts]
    assert {value["n"] for value in values} == {3, 4, 5}
    assert {value["rule"] for value in values} == {"up", "down"}
    assert all(value["profile"] == "cpu" for value in values if "profile" in value)
    assert variant(lab, "s1", SECRET).values != variant(lab, "s1", SECRET + b"x").values


def test_a_handout_of_yesterday_is_that_of_today_in_any_process(lab: Lab, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom dsmoe_lite.teaching.lab import read_lab\n"
        "from dsmoe_lite.teaching.release import release\nfrom dsmoe_lite.teaching.variant import variant\n"
        f"lab = read_lab(Path({str(lab.path)!r}))\nsys.stdout.write(release(lab, variant(lab, 'ann', {SECRET!r})))"
    )
    environments = [os.environ | {"PYTHONHASHSEED": seed} for seed in ("1", "2")]
    command = [sys.executable, "-c", code]
    seen = {subprocess.run(command, capture_output=True, env=one, check=True).stdout for one in environments}
    assert seen == {release(lab, variant(lab, "ann", SECRET)).encode()}


@pytest.mark.parametrize("path", labs(), ids=lambda path: path.stem)
def test_a_handout_holds_no_key_and_no_output(path: Path) -> None:
    lab = read_lab(path)
    made = nbformat.reads(release(lab, variant(lab, "ann", SECRET)), as_version=4)
    text = nbformat.writes(made)
    for question in lab.questions.values():
        for role in ("solution", "hidden"):
            lines = [line.strip() for line in question.cells[role].splitlines() if len(line.strip()) > 30]
            given = "\n".join(cell.source for cell in lab.cells if cell.role not in ("solution", "hidden"))
            assert all(line in given or json.dumps(line)[1:-1] not in text for line in lines), (question.name, role)
        assert question.settings.hint not in text
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in made.cells)
    assert "{{" not in text
    assert SECRET.decode() not in text


@pytest.mark.parametrize("path", labs(), ids=lambda path: path.stem)
def test_a_handout_runs_to_its_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    lab = read_lab(path)
    made = nbformat.reads(release(lab, variant(lab, "ann", SECRET)), as_version=4)
    for cell in made.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "\nprofile = 'smoke'"
    NotebookClient(made, timeout=300, kernel_name="python3").execute()
    printed = [output.get("text", "") for cell in made.cells for output in cell.get("outputs", [])]
    checks = sum("check" in cell.metadata.get("tags", []) for cell in made.cells)
    expected = (
        "not right yet" if lab.name == "bug_museum" else "not solved yet"
    )  # there stubs are real code, with a bug
    assert sum(expected in text for text in printed) == checks > 0


def test_a_different_file_is_not_overwritten(lab: Lab, tmp_path: Path) -> None:
    path, is_new = write_release(lab, variant(lab, "ann", SECRET), tmp_path)
    assert (path.name, is_new) == ("toy-ann.ipynb", True)
    assert write_release(lab, variant(lab, "ann", SECRET), tmp_path) == (path, False)
    path.write_text("mine")
    with pytest.raises(InputError, match="exists and differs"):
        write_release(lab, variant(lab, "ann", SECRET), tmp_path)
    assert path.read_text() == "mine"


def test_the_secret_is_made_once_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "course.secret"
    with pytest.raises(InputError, match="No such file"):
        read_secret(path)
    assert make_secret(path)
    secret = read_secret(path)
    assert (len(secret), path.stat().st_mode & 0o077) == (64, 0)
    assert not make_secret(path)
    assert read_secret(path) == secret
    path.write_text("short")
    with pytest.raises(InputError, match="5 bytes': needs 16 or more"):
        read_secret(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id;name\nann;x\n", "separate the columns with commas"),
        ("ID\nann\n", "columns are in small letters: did you mean id?"),
        ("id,nam\nann,x\n", "column = 'nam': did you mean name?"),
        ("name\nann\n", "has no column id"),
        ("id\nann\nann\n", "line 3: student = 'ann': is listed twice"),
        ("id\n../x\n", "line 2: student = '../x': must be 1..64 letters"),
        ("id\nann,x\n", "put quotes around a name with a comma"),
        ("", "must have a first line"),
    ],
)
def test_a_list_of_students_that_does_not_fit_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "students.csv"
    path.write_text(text)
    with pytest.raises(InputError) as found:
        read_roster(path)
    assert message in str(found.value)


def test_a_new_secret_is_not_made_beside_handouts_of_another(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for expected, secret in ((0, "course.secret"), (2, "other.secret")):
        with pytest.raises(SystemExit) as ended:
            main(["labs", "release", str(lab.path), "--student", "ann", "--secret", secret])
        assert ended.value.code == expected
    assert "missing, but handouts/toy-ann.ipynb exists; give the file that made it" in capsys.readouterr().err
    assert not Path("other.secret").exists()


def test_a_handout_says_what_must_not_be_imported(lab: Lab) -> None:
    text = release(lab, variant(lab, "ann", SECRET))
    assert text.count("must not import `dsmoe_lite.layers.balance`") == 1
