"""Running chapters: parameters, results, claims, exercises, `dsmoe run` and `dsmoe course`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch

from dsmoe_lite.cli import main
from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.labs import check_exercise, claim, claims, predict
from dsmoe_lite.labs.chapters import PARAMETERS, chapter_schema, chapters, find_chapter
from dsmoe_lite.labs.execute import run_chapter
from dsmoe_lite.labs.parameters import (
    check_value,
    find_parameter,
    parse_assignments,
    parse_value,
    read_schema,
)
from dsmoe_lite.labs.session import check_parameters

CELL = """\
profile: str = "cpu"  # size of the run: smoke | cpu | gpu
seed: int = 0  # seed of weights and data order: 0..2147483647
top_k: int = 2  # experts a token visits: 1..4
capacity_factor: float = 1.25  # slots over the fair share: 0.5..8.0
rate: float = 3e-4  # peak rate: 1e-5..1e-1 a step
width: int = 64  # of one expert: 32 | 64 | 128
shared: bool = False  # one expert is always on
sentence: str = (
    "a: b"
)  # text to colour: 1..6 characters
"""
EXIT_INPUT, EXIT_FAILURE, EXIT_STOPPED = 2, 1, 130


def exit_status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code


# parameters


def test_the_schema_is_read_from_the_comments():
    schema = read_schema(CELL)
    assert list(schema) == ["profile", "seed", "top_k", "capacity_factor", "rate", "width", "shared", "sentence"]
    assert schema["profile"].choices == ("smoke", "cpu", "gpu")
    assert schema["width"].choices == (32, 64, 128)
    assert (schema["seed"].low, schema["seed"].high) == (0, 2**31 - 1)
    assert (schema["rate"].low, schema["rate"].high) == (1e-5, 1e-1)
    assert schema["capacity_factor"].help == "slots over the fair share"
    assert schema["sentence"].default == "a: b"


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("top_k = 2  # experts: 1..4", "line 1"),
        ("top_k: int = 2", "top_k"),
        ("top_k: int = 2  # experts", "top_k"),
        ("top_k: int = 2  # experts: many", "top_k"),
        ("top_k: int = 2  # experts: 4..1", "top_k"),
        ("top_k: int = 2  # experts: 1..x", "top_k"),
        ("top_k: int = 9  # experts: 1..4", "top_k"),
        ("top_k: int = 1 + other  # experts: 1..4", "literal"),
        ("top_k: list = []  # experts: 1..4", "list"),
        ("shared: bool = True", "shared"),
        ("import os", "line 1"),
        ("top_k: int = = 2", "line 1"),
    ],
)
def test_a_cell_that_is_no_schema_is_refused(line, word):
    with pytest.raises(InputError, match=word):
        read_schema(line)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("top_k", "4", 4),
        ("capacity_factor", "2", 2.0),
        ("shared", "True", True),
        ("width", "128", 128),
        ("rate", "1e-3", 1e-3),
    ],
)
def test_text_becomes_a_value_of_the_right_type(name, text, value):
    parsed = parse_value(read_schema(CELL)[name], text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message_part"),
    [
        ("top_k", "5", "1..4"),
        ("top_k", "0", "1..4"),
        ("top_k", "two", "whole number"),
        ("top_k", "2.0", "whole number"),
        ("capacity_factor", "nan", "0.5..8.0"),
        ("capacity_factor", "inf", "0.5..8.0"),
        ("profile", "fast", "smoke, cpu, gpu"),
        ("width", "65", "32, 64, 128"),
        ("shared", "maybe", "true or false"),
        ("sentence", "", "1..6 characters"),
        ("sentence", "longer than six", "1..6 characters"),
    ],
)
def test_bad_text_is_refused_in_one_line(name, text, message_part):
    with pytest.raises(InputError) as refused:
        parse_value(read_schema(CELL)[name], text)
    message = str(refused.value)
    assert name in message
    assert repr(text) in message or text in message
    assert message_part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", True), ("top_k", 2.0), ("shared", 1), ("sentence", None), ("rate", "1")]
)
def test_a_value_of_another_type_is_refused(name, value):
    with pytest.raises(InputError, match=name):
        check_value(read_schema(CELL)[name], value)


def test_an_unknown_name_gets_the_nearest_and_all_known_names():
    with pytest.raises(InputError, match=r"topk: did you mean top_k\? .*profile, seed, top_k"):
        find_parameter(read_schema(CELL), "topk")


@pytest.mark.parametrize("assignments", [["top_k"], ["top_k=1", "top_k=2"], ["topk=1"]])
def test_bad_assignments_are_refused(assignments):
    with pytest.raises(InputError):
        parse_assignments(read_schema(CELL), assignments)


def run_cells(*cells: str, **more) -> dict:
    """The namespace of a session in which `cells` were run; one that fails keeps its place in the history."""
    namespace = {"In": ["", *cells], **more}
    for cell in cells:
        exec(cell, namespace)
    return namespace


def test_current_values_of_parameters_are_checked():
    assert check_parameters(run_cells("import os", CELL))
    with pytest.raises(InputError, match=r"top_k = 9: must be a whole number, 1\.\.4"):
        check_parameters(run_cells(CELL, "top_k = 9"))
    with pytest.raises(InputError, match="unknown parameter topk"):
        check_parameters(run_cells(CELL, "# Parameters\ntopk = 1\n"))
    assert check_parameters(run_cells(CELL, "# Parameters\ntopk = 1\n", "# Parameters\ntop_k = 2\n"))
    with pytest.raises(InputError, match="from its top"):
        check_parameters(run_cells("import os"))


def test_a_corrected_value_counts_without_a_restart():
    refused = CELL.replace("top_k: int = 2", "top_k: int = 99")
    with pytest.raises(InputError, match=r"top_k = 99: must be a whole number, 1\.\.4"):
        check_parameters(run_cells(refused))
    session = run_cells(refused, CELL)
    assert check_parameters(session)
    assert session["top_k"] == 2
    for broken in (
        CELL.replace("top_k: int = 2", "top_k: int = two", 1),
        CELL.replace(": 1..4", ""),
        "top_k: int = = 2",
    ):
        assert check_parameters({**run_cells(CELL), "In": ["", broken, CELL]})


def test_a_parameter_without_its_type_or_range_is_named():
    for cell, name in ((CELL.replace("top_k: int", "top_k"), "line 3"), (CELL.replace(": 1..4", ""), "top_k = 2")):
        with pytest.raises(InputError, match=name):
            check_parameters(run_cells(cell))


def test_an_edit_in_a_session_is_no_default_of_an_own_notebook():
    assert not check_parameters(run_cells(CELL, CELL.replace("top_k: int = 2", "top_k: int = 3")))
    assert not check_parameters(run_cells(CELL, "top_k = 3"))
    assert check_parameters(run_cells(CELL.replace("top_k: int = 2", "top_k: int = 3")))  # the notebook's own value


@pytest.mark.parametrize("source", sorted(paths.NOTEBOOKS.glob("[0-9]*.py")), ids=lambda path: path.stem)
def test_an_edited_value_is_not_the_chapters_own(source):
    """Also in a fresh session, whose history has only the edited cell."""
    (cell,) = PARAMETERS.findall(source.read_text(encoding="utf-8"))
    assert check_parameters(run_cells(cell))
    assert chapter_schema(source) == chapter_schema(source.with_suffix(".ipynb"))
    for parameter in chapter_schema(source).values():
        if parameter.choices:
            other = next(choice for choice in parameter.choices if choice != parameter.default)
        elif parameter.type == "str":
            other = "x"
        else:
            other = next(end for end in (parameter.low, parameter.high) if end != parameter.default)
        lines = cell.splitlines()
        (at,) = [i for i, line in enumerate(lines) if line.startswith(f"{parameter.name}: ")]
        lines[at] = f"{parameter.name}: {parameter.type} = {other!r}  # {lines[at].split('  # ')[1]}"
        own = parameter.name in ("profile", "seed")
        assert check_parameters(run_cells("\n".join(lines))) is own
        assert check_parameters(run_cells(cell, f"# Parameters\n{parameter.name} = {other!r}\n")) is own


def test_the_defaults_are_those_of_a_wheel_too(course):
    """A wheel has the notebooks and not their sources."""
    course.write().with_suffix(".py").unlink()
    (course.notebooks / "04_damaged.ipynb").write_text("{")
    cell = CELL.partition("rate: ")[0]
    assert check_parameters(run_cells(cell))
    assert not check_parameters(run_cells(cell.replace("top_k: int = 2", "top_k: int = 3")))
    assert not check_parameters(
        run_cells(cell.replace("top_k: int = 2", "top_k: int = 3") + "extra: bool = True  # e\n")
    )


@pytest.mark.parametrize("name", ["01_dense_transformer", "06_balance"])
def test_a_chapter_as_a_script_says_how_to_run_it(name):
    """Without the imports of the cell, which take seconds."""
    code = f"from dsmoe_lite.labs import begin; __file__ = 'notebooks/{name}.py'; begin(globals())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    remedy = f"open it with `make lab`, or run it with `dsmoe run {name[:2]}`"
    assert (run.returncode, run.stderr) == (EXIT_FAILURE, f"{name}.py is a notebook: {remedy}\n")


def test_the_check_loads_nothing_heavy():
    heavy = ["torch", "numpy", "altair", "IPython", "papermill", "nbformat", "ipywidgets"]
    code = f"import dsmoe_lite.labs, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# claims and exercises


def claim_output(monkeypatch, *args, **more):
    shown = []
    monkeypatch.setattr(claims, "display", lambda values, text: shown.append((values, text)))
    claim(*args, **more)
    return shown[0]


def test_claims_inside_their_interval_differ_only_in_the_value(monkeypatch):
    name = "loss at M = 3, due: value"
    lines = [claim_output(monkeypatch, name, value, (-0.4, -0.02)) for value in (-0.38999, -0.02, torch.tensor(-0.1))]
    assert lines[0] == ({name: -0.39}, f"{name} = -0.39, inside [-0.4, -0.02]")
    assert {claims.without_value(text) for _, text in lines} == {f"{name}, inside [-0.4, -0.02]"}
    assert claims.without_value("loss: 3.2 (dense), 2.1 (GShard)") == ""


def test_a_claim_with_other_parameters_only_reports_inside_or_outside(monkeypatch):
    for value, where in ((-0.2, "inside"), (0.5, "outside")):
        _, line = claim_output(monkeypatch, "gap", value, (-0.4, -0.02), asserted=False)
        assert line == f"gap = {value}, {where} [-0.4, -0.02], recorded for the default parameters"
        assert where in claims.without_value(line)


@pytest.mark.parametrize("value", [-0.41, 0.0, float("nan")])
def test_a_claim_outside_names_value_and_interval(value):
    with pytest.raises(AssertionError, match=rf"gap: {value:.4g} is outside \[-0.4, -0.02\]"):
        claim("gap", value, (-0.4, -0.02))


def _doubles(answer):
    assert answer(3) == 6, "expected 6\nfor 3"


@pytest.mark.parametrize(
    ("answer", "verdict", "message_part"),
    [
        (lambda x: 2 * x, True, "right"),
        (lambda x: x + 1, False, "not right yet: expected 6 for 3"),
        (lambda x: None, None, "not solved yet"),
        (None, None, "not solved yet"),
        (lambda: 6, False, "not right yet: it stops with TypeError"),
    ],
)
def test_an_exercise_never_raises(answer, verdict, message_part, capsys):
    assert check_exercise(answer, _doubles) is verdict
    printed = capsys.readouterr().out
    assert printed.startswith(message_part)
    assert printed.count("\n") == 1


@pytest.mark.parametrize("answer", ["lambda x: x + 1", "lambda x: 2 * x", "None", "5"])
def test_no_exercise_is_judged_without_assertions(answer):
    code = f"""
def test(answer):
    assert answer(3) == 6

from dsmoe_lite.labs import check_exercise
print(check_exercise({answer}, test))
"""
    run = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    line, verdict = run.stdout.splitlines()
    assert line.startswith("not checked: Python runs without assertions here")
    assert verdict == "None"


def test_an_exercise_takes_a_value():
    def is_four(answer):
        assert answer == 4

    assert check_exercise(4, is_four) is True
    assert check_exercise(5, is_four) is False


def test_an_exercise_names_a_missing_program(capsys):
    assert check_exercise(lambda x: 2 * x, _doubles, needs="no-such-program") is None
    assert capsys.readouterr().out == "not checked: no-such-program not found (apt install no-such-program)\n"
    assert check_exercise(lambda x: 2 * x, _doubles, needs="sh") is True


def test_predictions_are_stored_outside_the_notebook(course, capsys):
    predict("02/drops", None)
    assert course.files() == {"book.yml"}
    predict("02/drops", "a third")
    predict("02/loss", 3.5)
    predict("02/drops", "half")
    stored = json.loads((course.root / "work" / "predictions.json").read_text(encoding="utf-8"))
    assert stored == {"02/drops": "half", "02/loss": 3.5}
    assert capsys.readouterr().out == ""


# order


def test_chapters_are_found_by_number_name_and_path(course):
    path = course.write()
    assert chapters() == [path]
    for name in ("3", "03", "03_small", "12_small", "small", "notebooks/03_small.ipynb"):
        assert find_chapter(name) == path
    with pytest.raises(InputError, match="did you mean small"):
        find_chapter("smal")


@pytest.mark.parametrize("name", ["mine/03_small.ipynb", "mine/03_small.py", "../notebooks/03_small.ipynb"])
def test_a_path_elsewhere_is_no_chapter(course, name):
    course.write()
    with pytest.raises(InputError, match="the chapters are in"):
        find_chapter(name)


def test_a_book_that_names_a_missing_chapter_is_refused(course):
    with pytest.raises(InputError, match="03_small"):
        chapters()


# run


def test_three_parameter_sets_give_three_results(course, monkeypatch, tmp_path, capsys):
    chapter = course.write()
    before = chapter.read_bytes()
    monkeypatch.chdir(tmp_path)
    losses = []
    for top_k in (1, 2, 4):
        assert exit_status("run", "03", "-p", f"top_k={top_k}", "-p", "capacity_factor=2", "--json") == 0
        row = json.loads(capsys.readouterr().out)[0]
        losses.append(row["result"]["loss"])
        assert row["parameters"] == {"top_k": top_k, "capacity_factor": 2.0}
    assert losses == [3.333, 3.667, 4.333]
    assert len(list(course.runs.iterdir())) == 3
    assert chapter.read_bytes() == before
    executed = nbformat.read(row["notebook"], as_version=4)
    assert "jupytext" not in executed.metadata
    assert str(tmp_path) not in Path(row["notebook"]).read_text(encoding="utf-8")
    assert not any(
        output.get("name") == "stderr" and "it/s" in output.text
        for c in executed.cells
        for output in c.get("outputs", [])
    )


def test_a_notebook_outside_the_course_is_run_itself(course, monkeypatch, tmp_path, capsys):
    """With its own schema, and without replacing the result of the chapter that has its name."""
    chapter = course.write("\n# %%\nfrom dsmoe_lite.labs import report\n\nreport(top_k=top_k)\n")
    mine = tmp_path / "mine" / chapter.name
    mine.parent.mkdir()
    text = chapter.read_text(encoding="utf-8")
    mine.write_text(text.replace("top_k: int = 2", "top_k: int = 7").replace("1..4", "1..9"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name, top_k in (("03", 2), (f"mine/{chapter.name}", 7), (str(mine), 7)):
        assert exit_status("run", name, "--json") == 0
        assert json.loads(capsys.readouterr().out)[0]["result"] == {"top_k": top_k}
    assert len(list(course.runs.iterdir())) == 2
    assert exit_status("run", f"mine/{chapter.name}", "-p", "top_k=10") == EXIT_INPUT
    assert "1..9" in capsys.readouterr().err
    monkeypatch.chdir(mine.parent)
    assert exit_status("run", chapter.name, "-p", "top_k=8", "--json", "--out", "out.ipynb") == 0
    assert json.loads(capsys.readouterr().out)[0]["result"] == {"top_k": 8}
    assert exit_status("run", chapter.name, "--out", chapter.name) == EXIT_INPUT
    assert "is no unedited result" in capsys.readouterr().err
    assert exit_status("run", "elsewhere/03_small.ipynb") == EXIT_INPUT
    assert "the chapters are in" in capsys.readouterr().err


def test_a_result_that_a_person_edited_is_kept(course, capsys):
    course.write("\n# %%\nprint(top_k)\n")
    command = ("run", "03", "-p", "seed=3")
    assert [exit_status(*command), exit_status(*command)] == [0, 0]
    (result,) = course.runs.iterdir()  # unedited: replaced
    capsys.readouterr()
    notebook = nbformat.read(result, as_version=4)
    notebook.metadata["language_info"]["version"] = "3"  # as JupyterLab writes it
    nbformat.write(notebook, result)
    assert exit_status(*command) == 0
    assert capsys.readouterr().err == ""

    notebook.cells.append(nbformat.v4.new_markdown_cell("my notes"))
    nbformat.write(notebook, result)
    edited = result.read_bytes()
    for _ in range(2):
        assert exit_status(*command, "--json") == 0
        printed = capsys.readouterr()
        assert printed.err == f"dsmoe: {result} was edited and is kept; this run is {result.stem}-2.ipynb\n"
        assert json.loads(printed.out)[0]["notebook"] == str(result.with_name(f"{result.stem}-2.ipynb"))
        assert result.read_bytes() == edited
    assert len(list(course.runs.iterdir())) == 2

    assert exit_status(*command, "--out", str(result)) == EXIT_INPUT
    assert "is no unedited result of `dsmoe run`; name another file" in capsys.readouterr().err
    assert result.read_bytes() == edited


@pytest.mark.parametrize(
    "content", ["{}", "not JSON", '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}']
)
def test_a_file_of_another_origin_is_not_replaced(course, capsys, content):
    course.write()
    other = course.root / "other.ipynb"
    other.write_text(content)
    assert exit_status("run", "03", "--out", str(other)) == EXIT_INPUT
    assert "is no unedited result" in capsys.readouterr().err
    assert other.read_text() == content


def test_text_with_an_equals_sign_gives_no_warning_of_papermill(course):
    course.write()
    source = course.notebooks / "03_small.py"
    import jupytext

    more = 'text: str = "a = b"  # some text: 1..9\n\n# %%\nfrom dsmoe'
    source.write_text(source.read_text(encoding="utf-8").replace("\n# %%\nfrom dsmoe", more, 1), encoding="utf-8")
    jupytext.write(jupytext.read(source), source.with_suffix(".ipynb"))
    code = (
        "import sys; from pathlib import Path; from dsmoe_lite.common import paths; from dsmoe_lite.cli import main;"
        "root = Path(sys.argv[1]); paths.NOTEBOOKS = root / 'notebooks'; paths.RUNS = root / 'runs';"
        "main(['run', '03', '-p', 'text=c = d'])"
    )
    run = subprocess.run([sys.executable, "-c", code, str(course.root)], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", [["run", "03", "-p", "profile=gpu"], ["course", "--profile", "gpu"]])
def test_profile_gpu_without_a_gpu_is_refused_before_a_kernel_starts(course, capsys, monkeypatch, command):
    course.write()
    monkeypatch.setattr("dsmoe_lite.labs.execute._execute", None)
    assert exit_status(*command) == EXIT_INPUT
    assert capsys.readouterr().err == "dsmoe: profile = 'gpu': torch finds no GPU here; use cpu or smoke\n"


def test_a_cell_finds_the_command(course):
    chapter = course.write(
        "\n# %%\nimport shutil\n\nfrom dsmoe_lite.labs import report\n\nreport(found=shutil.which('python'))\n"
    )
    assert run_chapter(chapter, {}).result == {"found": str(Path(sys.executable).with_name("python"))}


@pytest.mark.parametrize("command", [["check"], ["count", "course-gshard"], ["claims"], ["run", "…"]])
def test_a_terminal_of_ascii_gets_every_line(command):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    run = subprocess.run(
        [sys.executable, "-m", "dsmoe_lite", *command], capture_output=True, text=True, env=environment
    )
    assert "Unicode" not in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message_part"),
    [
        (["03", "-p", "topk=1"], "did you mean top_k"),
        (["03", "-p", "top_k=5"], "1..4"),
        (["03", "-p", "top_k=x"], "whole number"),
        (["03", "-p", "top_k"], "name=value"),
        (["04"], "03_small"),
        (["03", "--out", "{notebooks}"], "in place"),
        (["03", "--out", "{notebooks}/03_small.py/x"], "in place"),
    ],
)
def test_bad_input_leaves_nothing_behind(course, capsys, arguments, message_part):
    course.write()
    before = course.files()
    assert exit_status("run", *(a.format(notebooks=course.notebooks) for a in arguments)) == EXIT_INPUT
    message = capsys.readouterr().err
    assert message_part in message
    assert message.count("\n") == 1
    assert course.files() == before
    assert not course.runs.exists()


def test_a_failed_cell_is_named_and_the_notebook_saved_separately(course, capsys):
    course.write('\n# %%\nprint("so far")\n\n# %%\nraise ValueError("no good\\nat all")\n')
    assert exit_status("run", "03") == EXIT_FAILURE
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert re.search(r"03_small: cell In \[4\] stopped with ValueError: no good; kept as .*\.failed\.ipynb", message)
    (failed,) = course.runs.iterdir()
    assert failed.name.endswith(".failed.ipynb")
    assert "so far" in failed.read_text(encoding="utf-8")


def test_a_failure_leaves_the_earlier_result_unchanged(course, capsys):
    course.write("\n# %%\nprint(1)\n")
    assert exit_status("run", "03") == 0
    (good,) = course.runs.iterdir()
    before = good.read_bytes()
    course.write("\n# %%\nimport os\n\nos._exit(9)\n")
    assert exit_status("run", "03") == EXIT_FAILURE
    assert "the kernel died" in capsys.readouterr().err
    assert good.read_bytes() == before


def test_a_damaged_chapter_is_bad_input(course, capsys):
    course.write().write_text('{"cells": [', encoding="utf-8")
    assert exit_status("run", "03") == EXIT_INPUT
    assert "is not a notebook any more" in capsys.readouterr().err


def test_bad_input_rejected_by_the_chapter_exits_as_bad_input(course, capsys):
    course.write(
        '\n# %%\nfrom dsmoe_lite.common.errors import require\n\nrequire(top_k < 2, "top_k", top_k, "must be 1 here")\n'
    )
    assert exit_status("run", "03") == EXIT_INPUT
    assert "top_k = 2: must be 1 here" in capsys.readouterr().err
    assert not course.runs.exists()


def test_the_kernel_is_this_interpreter_whatever_is_installed(course, monkeypatch, tmp_path):
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps({"argv": ["/bin/false"], "display_name": "wrong", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    chapter = course.write(
        "\n# %%\nimport sys\n\nfrom dsmoe_lite.labs import report\n\nreport(python=sys.executable)\n"
    )
    assert run_chapter(chapter, {}).result == {"python": sys.executable}


def test_ctrl_c_leaves_no_partial_files(course, tmp_path):
    sign = tmp_path / "kernel.pid"
    course.write(
        f"\n# %%\nimport os, time\n\nopen({str(sign)!r}, 'w').write(str(os.getpid()))\ntime.sleep(120)\n",
    )
    before = course.files()
    (tmp_path / "tmp").mkdir()
    code = (
        "import sys; from pathlib import Path; from dsmoe_lite.common import paths; from dsmoe_lite.cli import main;"
        "root = Path(sys.argv[1]); paths.NOTEBOOKS = root / 'notebooks'; paths.RUNS = root / 'runs';"
        "main(['run', '03'])"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", code, str(course.root)],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (sign.exists() and sign.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, message = running.communicate(timeout=60)
    assert running.returncode == EXIT_STOPPED
    assert message.split() == ["dsmoe:", "stopped"]
    assert course.files() == before
    assert list((tmp_path / "tmp").iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(sign.read_text()), 0)


# course


def test_course_prints_times_and_exits_with_1_on_a_failure(course, capsys):
    course.write("\n# %%\nsum(range(10**6))\n")
    assert exit_status("course", "--profile", "smoke", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["chapter"] == "03_small"
    assert row["CPU s"] > 0
    assert row["wall s"] > 0
    assert exit_status("course", "3", "--profile", "smoke", "--json") == 0
    assert [row["chapter"] for row in json.loads(capsys.readouterr().out)] == ["03_small"]
    assert exit_status("course", "nonesuch") == EXIT_INPUT
    assert "no chapter nonesuch" in capsys.readouterr().err
    course.write("\n# %%\n1 / 0\n")
    assert exit_status("course", "--profile", "smoke") == EXIT_FAILURE
    printed = capsys.readouterr()
    assert "CPU threads" in printed.out
    assert "ZeroDivisionError" in printed.err
