"""The benchmark of kernels on a CPU: everything is checked before it is timed, and failures are noted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import needs_gxx

from dsmoe_lite.bench import grouped_products, kernels
from dsmoe_lite.bench.attempt import attempt
from dsmoe_lite.bench.grouped_products import DENSE, Case, check_products, runnable, time_products
from dsmoe_lite.bench.kernels import SETUPS, bench_kernels, goals, newest_record
from dsmoe_lite.cli import main
from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.kernels import cuda

FLOAT = ("cpu", torch.float32)
UNKNOWN = json.dumps({"schema_version": 2, "date": "2026-01-01"})


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of records."""
    monkeypatch.setattr(paths, "DATA_FOLDERS", (tmp_path,))
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def dsmoe(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code


@pytest.mark.parametrize("case", [case for setup in SETUPS.values() for case in (*setup.cases, setup.checked)])
def test_the_rows_of_a_case_add_up(case: Case) -> None:
    counts = case.counts()
    assert len(counts) == case.experts
    assert sum(counts) == case.experts * case.rows
    assert counts == sorted(counts, reverse=True)
    assert (counts[0] == counts[-1]) == (case.routing == "uniform")


@needs_gxx
def test_the_command_measures_everything(capsys: pytest.CaptureFixture) -> None:
    assert dsmoe("bench", "kernels", "--device", "cpu", "--rounds", "3", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    setup = SETUPS["cpu"]
    assert [row["by"] for row in result["ladder"]] == ["naive", "tiled", "F.grouped_mm", "loop over products", DENSE]
    assert {row["by"] for row in result["products"]} == {"tiled", "F.grouped_mm", "loop over products", DENSE}
    assert len(result["products"]) == 4 * len(setup.cases)
    for row in result["ladder"] + result["products"]:
        assert 0 < row["low"] <= row["milliseconds"] <= row["high"]
        flops = 2 * row["experts"] * row["rows"] * row["k"] * row["n"]
        assert row["TFLOP/s"] == pytest.approx(flops / row["milliseconds"] / 1e9)
        assert row["by"] != DENSE or row["of dense"] == 1
    assert {row["by"] for row in result["checks"]} >= {
        "tiled", "cuda", "grouped", "transformers eager", "transformers grouped_mm",
    }  # fmt: skip
    assert all(row["error"] <= 1e-5 for row in result["checks"])
    assert {(row["what"], row["by"]) for row in result["moves"]} == {
        ("copy", "copy"), ("permute", "cuda"), ("combine", "cuda"),
    }  # fmt: skip
    backends = {row["by"]: row for row in result["backends"] if row["what"] == "forward and backward"}
    assert set(backends) == {"grouped", "cuda", "transformers eager", "transformers grouped_mm"}
    assert backends["grouped"]["times grouped"] == backends["grouped"]["of grouped"] == 1
    assert any(note.startswith("triton: ") for note in result["notes"])
    assert result["goals"] == goals(result["products"], result["moves"], result["backends"])


@needs_gxx
def test_a_kernels_peak_memory_is_far_below_the_grouped_path() -> None:
    """Measured by torch's profile of allocations, which is equal on all devices; 1/32 of the widths of V2-Lite."""
    from dsmoe_lite.bench.backends import Layer
    from dsmoe_lite.config import MoEConfig

    layer = Layer(MoEConfig(n_routed_experts=16, top_k=6, expert_width=44), 64, 300)
    cuda_peak, grouped_peak = (layer.contender(name, *FLOAT).peak_bytes() for name in ("cuda", "grouped"))
    assert cuda_peak / grouped_peak <= 0.7


@needs_gxx
def test_a_wrong_kernel_ends_the_benchmark_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cuda.multiply
    monkeypatch.setattr(grouped_products.cuda, "multiply", lambda *arguments: right(*arguments) * 1.001)
    with pytest.raises(RunError, match=r"naive: differs from float64 by 1\.0e-03 of the norm; nothing was timed"):
        bench_kernels(3, "cpu")
    monkeypatch.undo()
    backward = cuda.weights_backward
    monkeypatch.setattr(cuda, "weights_backward", lambda *arguments: backward(*arguments) * 1.001)
    with pytest.raises(RunError, match=r"experts by cuda: differ from the loop by .* nothing was timed"):
        bench_kernels(3, "cpu")


def failing(error: Exception) -> Callable[[], torch.Tensor]:
    def step() -> torch.Tensor:
        raise error

    return step


def test_a_step_that_fails_is_noted_and_left_out() -> None:
    notes: list[str] = []
    steps = {
        "one": failing(InputError("needs a GPU")),
        "two": failing(torch.OutOfMemoryError("CUDA out of memory.\nTried to")),
        "three": lambda: torch.ones(1),
    }
    assert list(runnable(steps, notes)) == ["three"]
    assert notes == ["one: needs a GPU", "two: out of this GPU's memory"]


def test_a_case_without_its_dense_product_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(grouped_products, "products", lambda *_: {DENSE: failing(RuntimeError("out of memory"))})
    assert time_products(Case(2, 8, 8, 3), (), *FLOAT, 3, 1, notes) == []
    assert "the dense product failed" in notes[-1]


def test_torchs_own_product_is_compared_with_float64_too() -> None:
    found = check_products(Case(3, 8, 16, 5, "skewed"), (), *FLOAT, [])
    assert {row["by"] for row in found} == {"F.grouped_mm", "loop over products"}


def product(by: str, rows: int, of_dense: float) -> dict[str, Any]:
    return {"experts": 64, "k": 2048, "n": 1408, "routing": "uniform", "rows": rows, "by": by, "of dense": of_dense}


def test_goals_take_the_best_rung_at_its_worst() -> None:
    rows = [product("hopper", 1024, 0.8), product("hopper", 4096, 0.7), product("hopper", 64, 0.1)]
    rows += [product("mma", 1024, 0.4), product("mma", 4096, 0.5), product("F.grouped_mm", 1024, 0.75)]
    rows += [{**product("hopper", 1024, 0.01), "routing": "skewed"}, {**product("hopper", 1024, 0.01), "experts": 16}]
    moves = [{"what": "permute", "by": "cuda", "of copy": 0.9}, {"what": "permute", "by": "triton", "of copy": 0.1}]
    backends = [{"what": "forward and backward", "by": "cuda", "times grouped": 1.5, "of grouped": 0.71}]
    assert [(row["value"], row["reached"]) for row in goals(rows, moves, backends)] == [
        (0.7, False), (0.7 / 0.75, False), (0.4, True), (None, False),
        (0.9, True), (None, False), (1.5, True), (0.71, False),
    ]  # fmt: skip


def test_the_newest_record_is_found_by_its_date(runs: Path) -> None:
    assert newest_record() is None
    for name, date in (("a", "2026-02-01T00:00:00+00:00"), ("b", "2026-01-01T00:00:00+00:00")):
        record = {"schema_version": 1, "date": date, "provenance": {"device": f"NVIDIA {name}"}}
        assert kernels.record_path(record) == runs / f"bench-kernels-nvidia-{name}.json"
        kernels.record_path(record).write_text(json.dumps(record), encoding="utf-8")
    assert newest_record()["provenance"]["device"] == "NVIDIA a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a mapping"),
        ("{}", "schema_version = None"),
        (UNKNOWN.replace("2,", "1,"), "provenance = None: must be a mapping"),
        ('{"date": NaN}', "is not JSON"),
        (UNKNOWN, "schema_version = 2: this package reads 1"),
    ],
)
def test_a_file_that_is_no_record_is_named(text: str, message: str, runs: Path) -> None:
    (runs / "bench-kernels-x.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=rf"bench-kernels-x\.json: .*{message}"):
        newest_record()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "torch finds no GPU here; try the command on tiny sizes with --device cpu"),
        (["--device", "cuda"], "torch finds no GPU here"),
        (["--device", "cpu", "--record"], "--record: times of kernels on a CPU say nothing about a GPU"),
        (["--profile"], "--profile: is for `layer`"),
    ],
)
def test_bad_calls_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dsmoe("bench", "kernels", *arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1


# Failures on a GPU


def test_a_failure_that_is_no_runtime_error_is_noted_too() -> None:
    """Triton's compiler raises its own classes, and so may another version of transformers."""
    notes: list[str] = []
    assert attempt("one", failing(TypeError("unexpected argument\nmore")), notes) is None
    assert attempt("two", failing(Exception()), notes) is None
    assert attempt("three", lambda: 3, notes) == 3
    assert notes == ["one: unexpected argument", "two: Exception"]


def test_a_kernel_that_breaks_the_gpu_ends_the_benchmark_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RunError, match=r"hopper: CUDA error: an illegal memory access; the GPU is now unusable"):
        attempt("hopper", lambda: torch.ones(1), [])


@needs_gxx
def test_other_parts_survive_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def time(*_: object) -> None:
        raise KeyError("copy")

    for part in ("time_moves", "time_backends"):
        monkeypatch.setattr(kernels, part, time)
    result = bench_kernels(3, "cpu")
    assert (result["moves"], result["backends"]) == ([], [])
    assert result["products"]
    assert {"permute and combine: 'copy'", "experts: 'copy'"} <= set(result["notes"])
    assert [row["value"] for row in result["goals"]] == [None] * 8


@pytest.mark.parametrize(("traced", "peak"), [(900, 900), (0, 600), (2000, 1000)])
def test_the_peak_on_a_gpu_lies_within_its_allocators_bounds(
    traced: int, peak: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peak of 1000 bytes, and gradients of 400 bytes of which all were allocated at the peak, or none."""
    from dsmoe_lite.bench import memory

    monkeypatch.setattr(memory, "peak_bytes", lambda *_: traced)
    for name, value in (("synchronize", None), ("reset_peak_memory_stats", None), ("memory_allocated", 50)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1050)
    assert memory.peak_bytes_on_gpu(list, list, lambda: [torch.ones(100)]) == peak
