"""Sweeps: bad files are refused with their line, runs resume, tables equal their notebooks, and nothing is lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pandas
import psutil
import pytest
from needs import needs_pyarrow

from dsmoe_lite.cli import main
from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.common.stats import mean_and_half_width
from dsmoe_lite.labs.execute import run_chapter
from dsmoe_lite.labs.executed import read_executed
from dsmoe_lite.teaching.report import draw
from dsmoe_lite.teaching.results import Group, other_varied, read_results, summary, write_table
from dsmoe_lite.teaching.sweep import Outcome, failures, plan, run_sweep
from dsmoe_lite.teaching.sweep_file import read_sweep
from dsmoe_lite.training.run_folder import lock

PARAMETERS = """\
profile: str = "smoke"  # size of the run: smoke | cpu | gpu
seed: int = 0  # seed: 0..100
rate: float = 0.25  # a rate: 0.0..1.0
kind: str = "none"  # a kind: none | 06 | yes
shared: bool = False  # something to switch on
"""
BODY = """\
from dsmoe_lite.labs import report
if rate == 0.5:
    raise ValueError("half a loaf")
report(loss=rate + seed / 7, n=seed, layers=[1.0, 2.5], kind=kind, seen={"a": shared})
"""
SWEEP = """\
notebook: toy.ipynb
parameters: {profile: smoke}
sweep:
  rate: [0.125, 2e-1]
  seed: [0, 3]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parameters = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(BODY)])
    nbformat.write(notebook, tmp_path / "toy.ipynb")
    (tmp_path / "grid.yml").write_text(SWEEP)
    return tmp_path


def test_a_sweep_is_every_combination_with_the_types_of_the_notebook(folder: Path) -> None:
    sweep = read_sweep(folder / "grid.yml")
    assert (sweep.name, sweep.notebook, sweep.varied) == ("grid", folder / "toy.ipynb", ("rate", "seed"))
    assert sweep.runs == [{"profile": "smoke", "rate": r, "seed": s} for r in (0.125, 0.2) for s in (0, 3)]
    (folder / "grid.yml").write_text(
        "notebook: toy.ipynb\nsweep: {kind: [none, 06, yes], shared: [true, false], rate: [1]}"
    )
    runs = read_sweep(folder / "grid.yml").runs
    assert [(run["kind"], run["shared"]) for run in runs] == [
        (kind, shared) for kind in ("none", "06", "yes") for shared in (True, False)
    ]
    assert all(type(run["rate"]) is float for run in runs)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("rate:", "rat:", 4, "unknown parameter rat: did you mean rate?"),
        ("[0, 3]", "[0, 300]", 5, "seed = 300: must be a whole number, 0..100"),
        ("[0, 3]", "[0, 0]", 5, "seed = 0 is listed twice"),
        ("[0, 3]", "3", 5, "seed must have a list of values"),
        ("[0, 3]", "[]", 5, "seed must have a list of values"),
        ("2e-1", "fast", 4, "rate = 'fast': must be a number, 0.0..1.0"),
        ("sweep:", "sweeps:", 3, "unknown key sweeps: did you mean sweep?"),
        ("toy.ipynb", "08_what_experts", 1, "no chapter 08_what_experts: did you mean 08_what_experts_learn?"),
        ("toy.ipynb", "[1]", 1, "notebook must be"),
        ("smoke}", "small}", 2, "profile = 'small': must be one of smoke, cpu, gpu"),
        ("smoke}", "smoke, seed: 1}", 5, "seed is in parameters, too"),
        ("  seed: [0, 3]", "  rate: [0.5]", 5, "rate is given twice"),
        ("[0, 3]", "[0, 3", 6, "is not YAML"),
        (SWEEP, "", 1, "must map notebook, parameters and sweep"),
        (SWEEP, "- a", 1, "must map notebook, parameters and sweep"),
        ("[0, 3]", "[0, [3]]", 5, "seed must have one value here, a whole number, 0..100"),
        ("[0, 3]", "[0, !!int abc]", 5, "seed = 'abc': must be a whole number"),
        ("[0, 3]", "[0, 1:30]", 5, "seed = '1:30': must be a whole number"),
        ("  seed:", "  ? [1]\n  :", 5, "a name must be one word"),
        ("toy.ipynb", "~nouser/x.ipynb", 1, "cannot be read as a notebook"),
        ("toy.ipynb", "'a\\0.ipynb'", 1, "no chapter"),
        ("smoke}", "*none}", 2, "is not YAML: found undefined alias"),
        ("notebook: toy.ipynb\n", "", 1, "the key notebook is missing"),
    ],
)
def test_a_bad_sweep_is_refused_with_its_line(folder: Path, old: str, new: str, line: int, message: str) -> None:
    assert old in SWEEP
    path = folder / "grid.yml"
    path.write_text(SWEEP.replace(old, new))
    with pytest.raises(InputError) as refused:
        read_sweep(path)
    text = str(refused.value)
    assert text.startswith(f"{path}, line {line}: ")
    assert message in text
    assert "\n" not in text


def test_a_sweep_of_a_million_runs_is_refused(folder: Path) -> None:
    (folder / "grid.yml").write_text(
        f"notebook: toy.ipynb\nsweep:\n  seed: {list(range(100))}\n  rate: {[n / 1000 for n in range(1000)]}\n"
    )
    with pytest.raises(InputError, match="100,000 runs: must be at most 10,000"):
        read_sweep(folder / "grid.yml")


def test_a_file_that_is_no_notebook_is_refused_before_it_runs(folder: Path) -> None:
    cell = {"cell_type": "code", "source": PARAMETERS, "metadata": {"tags": ["parameters"]}}
    (folder / "toy.ipynb").write_text(json.dumps({"cells": [cell]}))
    with pytest.raises(InputError, match="line 1: this is no valid notebook"):
        read_sweep(folder / "grid.yml")
    with pytest.raises(InputError, match="this is no valid notebook"):
        run_chapter(folder / "toy.ipynb", {}, folder / "out")
    assert not (folder / "out").exists()


def test_a_missing_file_is_one_line(folder: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yml: No such file"):
        read_sweep(folder / "none.yml")


def test_runs_resume_and_the_table_is_that_of_the_notebooks(folder: Path) -> None:
    out, sweep = folder / "out", read_sweep(folder / "grid.yml")
    first = run_chapter(sweep.notebook, sweep.runs[2], out)
    before = first.notebook.read_bytes()
    todo = plan(sweep, out, processes=2)
    assert (todo.n_runs, todo.missing) == (4, [sweep.runs[0], sweep.runs[1], sweep.runs[3]])
    assert todo.seconds == pytest.approx(first.wall_s, abs=0.1)
    outcomes = list(run_sweep(sweep, todo))
    failures(outcomes, todo.missing)
    assert sorted(map(str, (one.parameters for one in outcomes))) == sorted(map(str, todo.missing))
    assert plan(sweep, out).missing == []
    assert first.notebook.read_bytes() == before
    assert list(run_sweep(sweep, plan(sweep, out))) == []

    results = read_results(out)
    assert results.parameters == ["profile", "seed", "rate", "kind", "shared"]
    assert results.metrics == ["result.kind", "layers.0", "layers.1", "loss", "n", "seen.a"]
    assert len(results.rows) == 4
    for row in results.rows:
        notebook = nbformat.read(out / row["notebook"], as_version=4)
        given = notebook.metadata.papermill.parameters
        assert {name: row[name] for name in given} == given
        assert (row["kind"], row["shared"], row["result.kind"], row["seen.a"]) == ("none", False, "none", False)
        assert row["loss"] == pytest.approx(row["rate"] + row["seed"] / 7, rel=1e-3)
        assert (row["n"], row["layers.0"], row["layers.1"]) == (row["seed"], 1.0, 2.5)
        assert row["run.wall_s"] > 0
        if row["notebook"] != first.notebook.name:  # the tests before may have had larger processes
            assert row["run.peak_mb"] > 50
        assert set(row) >= {"run.commit", "run.dsmoe_lite", "run.python", "run.torch"}
    write_table(results, folder / "table.csv")
    table = pandas.read_csv(folder / "table.csv")
    assert list(table.columns) == list(results.rows[0])
    assert table["loss"].tolist() == [row["loss"] for row in results.rows]

    losses = {rate: [row["loss"] for row in results.rows if row["rate"] == rate] for rate in (0.125, 0.2)}
    expected = [Group((rate,), 2, *mean_and_half_width(values)) for rate, values in losses.items()]
    assert summary(results, "loss", ["rate"]) == expected
    assert other_varied(results, []) == ["rate"]
    assert other_varied(results, ["rate"]) == []
    with pytest.raises(InputError, match="unknown metric los: did you mean loss"):
        summary(results, "los", [])
    with pytest.raises(InputError, match="unknown parameter sed: did you mean seed"):
        summary(results, "loss", ["sed"])
    with pytest.raises(InputError, match=r"metric result\.kind = 'none': is no finite number"):
        summary(results, "result.kind", [])
    draw(results, "loss", ["rate"], folder / "loss.svg")
    assert ">0.125<" in (folder / "loss.svg").read_text()
    for bad in (lambda: draw(results, "loss", [], folder / "loss.pdf"), lambda: write_table(results, folder / "t.xls")):
        with pytest.raises(InputError, match="must end in"):
            bad()


@needs_pyarrow
def test_a_table_keeps_its_types_in_parquet(folder: Path) -> None:
    out, sweep = folder / "out", read_sweep(folder / "grid.yml")
    run_chapter(sweep.notebook, {"seed": 3, "kind": "06"}, out)
    write_table(read_results(out), folder / "table.parquet")
    table = pandas.read_parquet(folder / "table.parquet")
    types = {"seed": "Int64", "rate": "Float64", "kind": "string", "shared": "boolean", "layers.0": "Float64"}
    assert {name: str(table[name].dtype) for name in types} == types
    assert table.loc[0, ["seed", "kind"]].tolist() == [3, "06"]


def test_a_failed_run_stops_no_other_and_is_tried_again(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "grid.yml").write_text("notebook: toy.ipynb\nsweep: {rate: [0.5, 0.25]}\n")
    with pytest.raises(SystemExit) as stopped:
        main(["labs", "run", str(folder / "grid.yml"), "--out", str(folder / "out"), "--processes", "1"])
    printed = capsys.readouterr()
    assert stopped.value.code == 1
    assert "1 of 2 runs failed, the first one: toy: cell In" in printed.err
    assert "ValueError: half a loaf" in printed.err
    assert len(list(read_executed(folder / "out"))) == 1
    assert plan(read_sweep(folder / "grid.yml"), folder / "out").missing == [{"rate": 0.5}]


def test_results_of_a_changed_notebook_are_not_mixed(folder: Path) -> None:
    out, sweep = folder / "out", read_sweep(folder / "grid.yml")
    run_chapter(sweep.notebook, sweep.runs[0], out)
    notebook = nbformat.read(folder / "toy.ipynb", as_version=4)
    notebook.cells[1].source += "\nreport(more=1)"
    nbformat.write(notebook, folder / "toy.ipynb")
    with pytest.raises(InputError, match=r"is a result of another version of toy\.ipynb, or of another notebook"):
        plan(read_sweep(folder / "grid.yml"), out)
    run_chapter(sweep.notebook, sweep.runs[1], out)
    with pytest.raises(InputError, match="versions = "):
        read_results(out)


def test_an_edited_result_is_kept_and_does_not_count(folder: Path, capsys: pytest.CaptureFixture) -> None:
    out, sweep = folder / "out", read_sweep(folder / "grid.yml")
    run = run_chapter(sweep.notebook, sweep.runs[0], out)
    notebook = nbformat.read(run.notebook, as_version=4)
    notebook.cells.append(nbformat.v4.new_markdown_cell("my remark"))
    nbformat.write(notebook, run.notebook)
    edited = run.notebook.read_bytes()
    assert plan(sweep, out).missing == sweep.runs
    with pytest.raises(InputError, match="has only results that were edited"):
        read_results(out)
    run_chapter(sweep.notebook, sweep.runs[0], out)
    assert run.notebook.read_bytes() == edited
    assert plan(sweep, out).missing == sweep.runs[1:]
    main_exit(["labs", "report", str(out)], 0)
    assert f"{run.notebook.name} was edited and is left out" in capsys.readouterr().err


def main_exit(arguments: list[str], status: int) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == status


def test_a_report_warns_of_few_runs_and_of_mixed_groups(folder: Path, capsys: pytest.CaptureFixture) -> None:
    out, sweep = folder / "out", read_sweep(folder / "grid.yml")
    for run in sweep.runs[:3:2]:
        run_chapter(sweep.notebook, run, out)
    main_exit(["labs", "report", str(out), "--metric", "loss", "--json"], 0)
    printed = capsys.readouterr()
    (row,) = json.loads(printed.out)
    assert row["n"] == 2
    assert "the groups mix different values of rate" in printed.err
    assert "1 of 1 groups have fewer than 3 runs" in printed.err
    main_exit(["labs", "report", str(folder / "nowhere")], 2)


@pytest.mark.parametrize("send", [os.killpg, os.kill], ids=["Ctrl-C", "the parent alone"])
def test_an_interrupt_ends_all_runs_and_leaves_no_half_result(folder: Path, send: Callable[[int, int], None]) -> None:
    notebook = nbformat.read(folder / "toy.ipynb", as_version=4)
    notebook.cells[1].source = "import time; time.sleep(600)"
    nbformat.write(notebook, folder / "toy.ipynb")
    command = [
        sys.executable,
        "-m",
        "dsmoe_lite",
        "labs",
        "run",
        str(folder / "grid.yml"),
        "--out",
        str(folder / "out"),
    ]
    running = subprocess.Popen(
        [*command, "--processes", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    of_runs: list[psutil.Process] = []
    until = time.monotonic() + 90
    while len(of_runs) < 4 and time.monotonic() < until:  # two runs, each with its kernel
        time.sleep(0.5)
        of_runs = psutil.Process(running.pid).children(recursive=True)
    assert len(of_runs) >= 4
    send(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert errors.strip().splitlines()[-1] == "dsmoe: stopped"
    assert list((folder / "out").glob("*.ipynb")) == []
    _, alive = psutil.wait_procs(of_runs, timeout=30)
    assert alive == []


def test_the_page_on_teaching_has_a_sweep_that_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (paths.NOTEBOOKS / "pages" / "teaching.md").read_text(encoding="utf-8")
    text = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0]
    (tmp_path / "scores.yml").write_text(text)
    sweep = read_sweep(tmp_path / "scores.yml")
    assert plan(sweep, tmp_path / "out").seconds is not None  # by the page of run times
    commands = re.findall(r"^\.venv/bin/python -m dsmoe_lite (labs (?:run|report) .*scores.*)$", page, re.MULTILINE)
    assert len(commands) >= 3
    monkeypatch.chdir(tmp_path)
    main_exit([*commands[0].split(), "--json"], 0)
    assert "--plan" in commands[0]


def test_failures_name_the_first_reason_in_the_order_of_the_sweep() -> None:
    runs = [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    failures([Outcome(runs[0], notebook="a")], runs)
    outcomes = [Outcome(runs[2], failure="no disk"), Outcome(runs[0], notebook="a"), Outcome(runs[1], failure="no net")]
    with pytest.raises(RunError, match="2 of 3 runs failed, the first one: no net"):
        failures(outcomes, runs)


@pytest.mark.parametrize("out", ["x.ipynb", str(paths.NOTEBOOKS / "runs"), "toy.ipynb/deeper"])
def test_a_folder_that_cannot_hold_results_is_refused_before_anything_runs(folder: Path, out: str) -> None:
    with pytest.raises(InputError, match="out = "):
        plan(read_sweep(folder / "grid.yml"), folder / out)


def test_two_sweeps_do_not_share_a_folder(folder: Path) -> None:
    sweep = read_sweep(folder / "grid.yml")
    todo = plan(sweep, folder / "out")
    with lock(folder / "out"), pytest.raises(RunError, match="another process is using this folder"):
        next(run_sweep(sweep, todo))


def test_what_a_notebook_prints_by_other_programs_does_not_hide_its_result(folder: Path) -> None:
    (folder / "grid.yml").write_text("notebook: toy.ipynb\nsweep: {seed: [1]}\n")
    notebook = nbformat.read(folder / "toy.ipynb", as_version=4)
    notebook.cells[1].source = "import os; os.system('echo [1]; echo noise >&2')\n" + notebook.cells[1].source
    nbformat.write(notebook, folder / "toy.ipynb")
    sweep = read_sweep(folder / "grid.yml")
    (outcome,) = run_sweep(sweep, plan(sweep, folder / "out"))
    assert Path(outcome.notebook).is_file()
    assert outcome.failure == ""


def test_results_that_cannot_be_told_apart_are_refused(folder: Path) -> None:
    out, sweep = folder / "out", read_sweep(folder / "grid.yml")
    run = run_chapter(sweep.notebook, {"seed": 0}, out)
    (out / "copy.ipynb").write_bytes(run.notebook.read_bytes())
    with pytest.raises(InputError, match="have the same parameters: move one away"):
        read_results(out)
    (out / "copy.ipynb").write_text("{")
    with pytest.raises(InputError, match=r"copy\.ipynb: is damaged"):
        read_results(out)
    nbformat.write(nbformat.v4.new_notebook(), out / "copy.ipynb")  # somebody's own notebook
    assert len(read_results(out).rows) == 1


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("**{'run.wall_s': 1}", r"columns = \['run.wall_s'\]: two values of .* have this name"),
        ("**{'a.b': 1}, a={'b': 2}", r"columns = \['a.b'\]: two values of .* have this name"),
        ("notebook=3, flops=2**70, large=10**400", None),
    ],
)
def test_names_and_sizes_of_results(folder: Path, result: str, message: str | None) -> None:
    notebook = nbformat.read(folder / "toy.ipynb", as_version=4)
    notebook.cells[1].source = f"from dsmoe_lite.labs import report\nreport({result})"
    nbformat.write(notebook, folder / "toy.ipynb")
    run_chapter(folder / "toy.ipynb", {}, folder / "out")
    if message is not None:
        with pytest.raises(InputError, match=message):
            read_results(folder / "out")
        return
    results = read_results(folder / "out")
    write_table(results, folder / "t.csv")
    table = pandas.read_csv(folder / "t.csv", dtype=str)
    for name in results.metrics:
        assert float(table.loc[0, name]) == float(f"{results.rows[0][name]}")
    if "large" in results.metrics:
        assert results.metrics[-1] == "result.notebook"
        with pytest.raises(InputError, match="is no finite number"):
            summary(results, "large", [])


def test_options_of_a_report_are_checked_before_anything_is_written(folder: Path) -> None:
    out = folder / "out"
    run_chapter(folder / "toy.ipynb", {}, out)
    main_exit(["labs", "report", str(out), "--by", "seed"], 2)
    main_exit(["labs", "report", str(out), "--metric", "loss", "--by", "sed", "--table", str(folder / "t.csv")], 2)
    assert not (folder / "t.csv").exists()
