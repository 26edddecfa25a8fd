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
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.labs import check_exercise, claim, claims, predict
from dsmoe_lite.labs.chapters import chapters, find_chapter
from dsmoe_lite.labs.execute import run_chapter
from dsmoe_lite.labs.parameters import (
    check_parameters,
    check_value,
    find_parameter,
    parse_assignments,
    parse_value,
    read_schema,
)

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


def test_current_values_of_parameters_are_checked():
    names = {p.name: p.default for p in read_schema(CELL).values()}
    assert check_parameters({"In": ["", "import os", CELL], **names})
    edited = {"In": ["", CELL, CELL.replace("1..4", "1..9")], **names, "top_k": 9}
    with pytest.raises(InputError, match=r"top_k = 9: must be a whole number, 1\.\.4"):
        check_parameters(edited)
    with pytest.raises(InputError, match="unknown parameter topk"):
        check_parameters({"In": ["", CELL, "# Parameters\ntopk = 1\n"], **names, "topk": 1})
    with pytest.raises(InputError, match="from its top"):
        check_parameters({"In": ["", "import os"], **names})


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
    for name in ("3", "03", "03_small", "small", "notebooks/03_small.ipynb"):
        assert find_chapter(name) == path
    with pytest.raises(InputError, match="did you mean small"):
        find_chapter("smal")


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
    assert message.strip().splitlines()[-1] == "dsmoe: stopped"
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
