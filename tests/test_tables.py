"""Tables on the command line: every value of every command in full, at 80 columns and in a pipe."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dsmoe_lite.cli import check, course, group, run, tables
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.labs.course import Outcome
from dsmoe_lite.labs.execute import ExecutedChapter
from dsmoe_lite.presets import PRESETS

WIDTH = 80
Rows = list[dict[str, Any]]

LAYER = {
    "size": "6+2/64", "what": "experts", "by": "auto", "routing": "uniform", "MaxVio": 0.2734375,
    "against": "transformers grouped_mm", "time": 0.84213, "low": 0.8123, "high": 0.90112, "time goal": 1 / 1.3,
    "time gap": 0.0729, "memory": 1.4142, "memory goal": None, "memory gap": None,
}  # fmt: skip
OPERATION = {"size": "6+2/64", "operation": "aten::_scaled_dot_product_flash_attention_for_cpu_backward"}
OPERATION |= {"dense": 12345.678, "layer": 23.45, "experts": 0.001234, "transformers": 1.5e10}
TRAIN = {"what": "transformers Llama of the same size", "milliseconds": 123.4, "speed ratio": 1.0, "of matmul": 0.4321}
KERNELS = {
    "notes": ["hopper: needs a GPU of compute capability 9.0"],
    "place": {"rounds": 10, "dtype": "torch.bfloat16"},
    "provenance": {"device": "NVIDIA H200"},
    "checks": [{"what": "experts, forward and backward", "by": "transformers grouped_mm", "error": 1.2e-3}],
    "products": [
        {
            "experts": 160, "k": 2048, "n": 1408, "rows": 4096, "routing": "uniform", "by": "loop over products",
            "milliseconds": 1.234, "low": 1.2, "high": 1.3, "TFLOP/s": 612.3, "of dense": 0.8123,
        }
    ],
    "moves": [{"what": "permute", "by": "triton", "GB/s": 3456.789, "of copy": 0.912}],
    "backends": [
        {
            "what": "forward and backward", "by": "transformers grouped_mm", "milliseconds": 98.7,
            "times grouped": 1.31, "peak bytes": 12_345_678_901, "of grouped": 0.71,
        }
    ],
    "goals": [
        {"what": "experts, forward and backward: speed / grouped", "value": 1.31, "goal": ">= 1.3", "reached": True}
    ],
}  # fmt: skip
KERNELS["ladder"] = KERNELS["products"]
RECORD = {
    "finished": True,
    "heldout_loss": 3.14159,
    "recall": {"head": 0.75, "tail": 0.123456, "control": 0.0},
    "heldout_experts": [{"max_vio": 1.25, "drop_rate": 0.04}],
    "tokens_per_second": 1_234_567.8,
}
EXECUTED = ExecutedChapter(
    notebook=Path("runs/02_gshard-profile_smoke-0123abcd.ipynb"),
    parameters={"profile": "smoke"},
    result={"loss": 3.333, "experts used most often in each of the layers": [3, 14, 15, 9, 2, 6, 5], "resolved": False},
    wall_s=1.0,
    cpu_s=1.0,
)


class Screen:
    """Runs commands as if stdout were `width` columns wide; keeps the rows of every table and the text."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, width: int | None) -> None:
        self.width, self.tables, self.blocks = width, [], []
        lay_out = tables.table_lines

        def record(rows: Rows, title: str, width: int | None) -> list[str]:
            lines = lay_out(rows, title, width)
            self.tables.append(rows)
            self.blocks.append((title, lines))
            return lines

        monkeypatch.setattr(tables, "terminal_width", lambda: width)
        monkeypatch.setattr(tables, "table_lines", record)

    def run(self, *arguments: str) -> str:
        command = CliRunner().invoke(group, list(arguments), catch_exceptions=False)
        assert command.exit_code == 0, command.output
        return command.output


def values_of(rows: Rows, name: str) -> list[str]:
    return " ".join(tables._format(row[name]) for row in rows).split()


def columns_of(names: list[str], lines: list[str], n_rows: int) -> dict[str, list[str]]:
    """The words below each header of a grid, or beside each name of the records; they may be wrapped."""
    rule = next((i for i, line in enumerate(lines) if re.fullmatch(r"-+(  -+)*", line)), None)
    if rule is not None:
        spans = [match.span() for match in re.finditer("-+", lines[rule])]
        assert len(spans) == len(names)
        return {
            name: " ".join(line[start:end] for line in lines[rule + 1 :]).split()
            for name, (start, end) in zip(names, spans, strict=True)
        }
    label, words = max(map(len, names)), {name: [] for name in names}
    current = ""
    for line in lines:
        current = line[:label].strip() or current
        if line:
            words[current] += line[label:].split()
    return words


def assert_complete(screen: Screen) -> None:
    """Every value is in its column; no line is too long; in a pipe, a row is a line."""
    assert screen.tables
    for rows, (title, lines) in zip(screen.tables, screen.blocks, strict=True):
        n_titles = len(tables._wrap(title, screen.width)) if title else 0
        assert " ".join(lines[:n_titles]).split() == title.split()
        body = lines[n_titles:]
        shown = columns_of(list(rows[0]), body, len(rows))
        for name in rows[0]:
            assert shown[name] == values_of(rows, name), name
        if screen.width is None:
            assert len(body) == len(rows) + 2
        else:
            assert max(map(len, lines)) <= screen.width


@pytest.fixture(params=[WIDTH, None], ids=["80 columns", "pipe"])
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Screen:
    return Screen(monkeypatch, request.param)


# Layout


def lay_out(rows: Rows, width: int | None, title: str = "") -> str:
    return "\n".join(tables.table_lines(rows, title, width))


def test_numbers_are_right_aligned_and_text_is_left_aligned() -> None:
    rows = [{"name": "a", "count": 1, "share": 0.5}, {"name": "long name", "count": 1_234_567, "share": None}]
    assert lay_out(rows, None) == (
        "name           count  share\n"
        "---------  ---------  -----\n"
        "a                  1    0.5\n"
        "long name  1,234,567      -"
    )


def test_text_wraps_between_words() -> None:
    rows = [
        {"part": "g++", "how to get it": "apt install g++, or xcode-select --install"},
        {"part": "-", "how to get it": ""},
    ]
    assert lay_out(rows, 28, "What to install, on Linux and macOS") == (
        "What to install, on Linux\n"
        "and macOS\n"
        "part  how to get it\n"
        "----  ----------------------\n"
        "g++   apt install g++, or\n"
        "      xcode-select --install\n"
        "-"
    )


def test_rows_that_do_not_fit_become_records() -> None:
    rows = [
        {"quantity": "FLOPs", "a-model": 438_320_074_189_701_120, "b": 17},
        {"quantity": "total", "a-model": 0, "b": 0},
    ]
    assert lay_out(rows, 33) == (
        "quantity  FLOPs\n"
        "a-model   438,320,074,189,701,120\n"
        "b                              17\n"
        "\n"
        "quantity  total\n"
        "a-model                         0\n"
        "b                               0"
    )
    assert lay_out([{"file": "x" * 50, "bytes": 1}], 20) == f"file   {'x' * 50}\nbytes  1"  # one word: never cut


def test_brackets_are_not_markup() -> None:
    assert "pip install -e '.[triton]' [bold]" in lay_out([{"remedy": "pip install -e '.[triton]' [bold]"}], WIDTH)


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "yes"), (False, "no"), (None, "-"), (12345, "12,345"), (0.123456, "0.1235"), (12345.6, "12,346"),
     (9.11e14, "9.11e+14"), (-3e-5, "-3e-05"), (float("nan"), "nan"), ("two\nlines", "two lines"), ([1, 2], "[1, 2]")],
)  # fmt: skip
def test_values_are_written_for_people(value: object, text: str) -> None:
    assert lay_out([{"value": value}], None).splitlines()[-1].strip() == text


# Every command that prints a table


def test_count(screen: Screen) -> None:
    for preset in PRESETS:
        screen.run("count", preset)
    screen.run("count", *PRESETS)
    assert len(screen.tables) == 2 * len(PRESETS) + 1
    assert_complete(screen)


def test_check(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    screen.run("check")
    missing = [check.machine.Part(part.name, None, part.remedy) for part in check.machine.parts()]
    monkeypatch.setattr(check.machine, "parts", lambda: missing)
    screen.run("check")
    assert any("[triton]" in row["how to get it"] for row in screen.tables[-1])
    assert_complete(screen)


def test_claims(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmoe_lite.study.ledger.settle", lambda claims: claims)  # as stored
    assert "inconclusive" in screen.run("claims")
    assert_complete(screen)


def test_course(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [Outcome("08_what_experts_learn", 12345.6, 23456.7), Outcome("10_kernels", 9.5, 8.1)]
    monkeypatch.setattr(course, "run_course", lambda profile, chapters: outcomes)
    screen.run("course")
    assert_complete(screen)


def test_run(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "run_chapter", lambda *arguments: EXECUTED)
    assert str(EXECUTED.notebook) in screen.run("run", "02")
    assert_complete(screen)


def test_train(screen: Screen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsmoe_lite.training.job.read_job", lambda config: None)
    monkeypatch.setattr("dsmoe_lite.training.job.run_job", lambda job, folder, processes: RECORD)
    screen.run("train", "job.yaml", "--out", "a run")
    assert_complete(screen)


def test_experiment(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [("deepseekmoe, 2 shared", 0), ("gshard", 9)]
    monkeypatch.setattr("dsmoe_lite.study.grids.missing", lambda name, models: missing)
    screen.run("experiment", "paper", "--plan")
    assert_complete(screen)


def test_replay(screen: Screen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dsmoe_lite.study.replay import Replayed

    monkeypatch.chdir(tmp_path)
    files = tuple(Path(f"paper-deepseekmoe-seed0{end}.safetensors") for end in ("", "-step1000"))
    for file in files:
        file.write_bytes(bytes(3_456_789))
    monkeypatch.setattr("dsmoe_lite.study.replay.replay", lambda *arguments: Replayed(files, 2.345678, 2.345679))
    screen.run("replay", "paper", "deepseekmoe", "--out", ".")
    assert_complete(screen)


@pytest.mark.parametrize(
    ("arguments", "function", "results"),
    [
        (["layer"], "layer.bench_layer", [LAYER, LAYER | {"memory goal": 1.3, "memory gap": 0.1}]),
        (["layer", "--profile"], "layer.profile_layer", [OPERATION]),
        (["train"], "train.bench_train", [TRAIN]),
        (["mla"], "mla.bench_mla", json.loads((DATA / "runs" / "bench-mla-cpu.json").read_text(encoding="utf-8"))),
        (["kernels"], "kernels.bench_kernels", KERNELS),
    ],
    ids=["layer", "profile", "train", "mla", "kernels"],
)
def test_bench(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, arguments: list[str], function: str, results: object
) -> None:
    monkeypatch.setattr(f"dsmoe_lite.bench.{function}", lambda *arguments: results)
    screen.run("bench", *arguments)
    assert_complete(screen)


# The real command, on a real terminal and in a real pipe


def on_a_terminal(*arguments: str) -> str:
    """What `dsmoe` prints on a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "dsmoe_lite", *arguments]
    with subprocess.Popen(command, stdout=theirs, env=environment) as running:
        os.close(theirs)
        pieces = []
        try:
            while piece := os.read(ours, 65_536):
                pieces.append(piece)
        except OSError:  # Linux's sign that the other end is closed
            pass
        os.close(ours)
    assert running.returncode == 0
    return b"".join(pieces).decode().replace("\r\n", "\n")


def test_a_terminal_gets_its_width_and_a_pipe_the_full_width() -> None:
    lines = on_a_terminal("check").splitlines()
    assert 60 < max(map(len, lines)) <= WIDTH
    command = [sys.executable, "-m", "dsmoe_lite", "check"]
    piped = subprocess.run(command, env=os.environ | {"COLUMNS": "40"}, capture_output=True, text=True, check=True)
    rows = json.loads(CliRunner().invoke(group, ["check", "--json"]).output)
    for row in rows:
        (line,) = (line for line in piped.stdout.splitlines() if line.startswith(f"{row['part']}  "))
        assert (row["how to get it"] or "") in line
