"""The benchmark of attention: its rows, two forms of MLA that agree, and slopes by hand."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dsmoe_lite.bench import mla
from dsmoe_lite.bench.mla import (
    METHODS,
    SETUPS,
    V2_LITE,
    Layers,
    Shape,
    cache_ratio,
    decode_costs,
    filled_cache,
    slopes,
)
from dsmoe_lite.cli import main
from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import AttentionConfig, MLAConfig
from dsmoe_lite.layers.sdpa import sdpa_by_matmul

TINY = Shape(
    12,
    AttentionConfig(n_heads=4, head_dim=8),
    AttentionConfig(n_heads=4, head_dim=8, n_kv_heads=2),
    MLAConfig(n_heads=4, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, kv_lora_rank=16),
)
TINY_SETUP = replace(SETUPS["cpu"], copied_bytes=1000, matmul_width=16)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The command on tiny layers; returns the folder of its records."""
    monkeypatch.setattr(mla, "SETUPS", {"cpu": TINY_SETUP})
    monkeypatch.setattr(mla, "bench_mla", partial(mla.bench_mla, shape=TINY, prefills=((5, 3), (9, 4))))
    monkeypatch.setattr(paths, "DATA_FOLDERS", (tmp_path,))
    return tmp_path / "runs"


def dsmoe(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code


# Rows


def test_there_is_a_row_for_every_method_and_context() -> None:
    rows = decode_costs((3, 5, 8), 4, shape=TINY, setup=TINY_SETUP)
    assert [(row["method"], row["context"]) for row in rows] == [(method, n) for n in (3, 5, 8) for method in METHODS]
    for row in rows:
        assert 0 < row["low"] <= row["milliseconds"] <= row["high"]
        assert row["times absorbed"] > 0
        assert (row["method"] != "MLA absorbed") or row["times absorbed"] == 1
    numbers = {"MHA": 2 * 4 * 8, "GQA": 2 * 2 * 8, "MLA naive": 16 + 4, "MLA absorbed": 16 + 4}
    assert all(row["cache bytes"] == 4 * row["context"] * numbers[row["method"]] for row in rows)


def test_flops_are_those_of_matrix_products() -> None:
    """Compared with torch's counter, which does not see into fused attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    unused = {"MLA naive": 4, "MLA absorbed": 4}  # channels of a head's values that are computed but not used
    layers = Layers(TINY, TINY_SETUP)
    for method in METHODS:
        counted = []
        for context in (6, 9):
            step = layers.decode(method, filled_cache(layers.config(method), context, TINY_SETUP))
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                step()
            counted.append(counter.get_total_flops())
        multiplications = mla._multiplications(TINY, method) + 4 * unused.get(method, 0)
        assert counted[1] - counted[0] == 2 * 3 * multiplications, method


def test_the_cache_of_mla_is_less_than_a_seventh() -> None:
    result = cache_ratio(8192)
    assert result == {
        "tokens": 8192,
        "MHA bytes": 8192 * 4096 * 4,
        "MLA bytes": 8192 * 576 * 4,
        "MLA / MHA": 576 / 4096,
    }
    assert result["MLA / MHA"] <= mla.CACHE_GOAL


def test_slopes_equal_those_by_hand() -> None:
    line = [
        {"method": "a", "context": n, "milliseconds": 3 + 0.002 * n, "cache bytes": 4000 * n, "FLOPs": 60_000 * n}
        for n in (100, 200, 400, 900)
    ]
    bent = [  # least squares through (0, 0), (1, 3), (2, 3): slope 3/2
        {"method": "b", "context": n, "milliseconds": ms, "cache bytes": 6e6 * n, "FLOPs": 0}
        for n, ms in ((0, 0), (1, 3), (2, 3))
    ]
    first, second = slopes(line + bent)
    assert first == {"method": "a", "ms per 1K tokens": 2.048, "GB/s": 2.0, "GFLOP/s": 30.0, "FLOPs a byte": 15.0}
    assert second == {"method": "b", "ms per 1K tokens": 1536, "GB/s": 4.0, "GFLOP/s": 0.0, "FLOPs a byte": 0.0}
    (first,) = slopes(line, {"copy GB/s": 8.0, "matmul GFLOP/s": 40.0})
    assert (first["of copy"], first["of matmul"]) == (0.25, 0.75)
    falling = [row | {"milliseconds": -row["milliseconds"]} for row in line]
    (none,) = slopes(falling, {"copy GB/s": 8.0, "matmul GFLOP/s": 40.0})
    assert [none[name] for name in ("GB/s", "GFLOP/s", "of copy", "of matmul")] == [None] * 4


def test_peaks_count_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmoe_lite.bench.timing.seconds_of", lambda step: 1e-6)
    assert mla.peaks(3, TINY_SETUP) == {"copy GB/s": 2.0, "matmul GFLOP/s": round(2 * 16**3 / 1000, 3)}


# The steps that are timed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch_size", "threads"), [(1, 1), (3, 1), (1, 2)])
def test_both_forms_of_mla_give_equal_results(dtype: torch.dtype, batch_size: int, threads: int) -> None:
    torch.set_num_threads(threads)  # fused attention, or two products if there are more threads than sequences
    setup = replace(TINY_SETUP, dtype=dtype, batch_size=batch_size)
    layers = Layers(TINY, setup)
    cache = filled_cache(TINY.mla, 9, setup)
    naive, absorbed = (layers.decode(method, cache)() for method in ("MLA naive", "MLA absorbed"))
    assert naive.shape == (batch_size, 1, TINY.d_model)
    assert naive.dtype == dtype
    assert naive.std() > 0.01
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype] * float(naive.std())
    torch.testing.assert_close(naive, absorbed, rtol=0, atol=tolerance)


@pytest.mark.parametrize("masked", ["no", "for all", "for each"])
def test_two_products_equal_fused_attention(masked: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, d, dtype=torch.float64) for n, d in ((4, 8), (9, 8), (9, 8)))
    mask = {"no": None, "for all": torch.rand(1, 9) < 0.7, "for each": torch.rand(2, 1, 1, 9) < 0.7}[masked]
    if mask is not None:
        mask[..., 4] = True  # every query sees at least one key
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(sdpa_by_matmul(q, k, v, 0.3, mask), fused)
    torch.testing.assert_close(sdpa_by_matmul(q, k, v[..., :5], 0.3, mask), fused[..., :5])


def test_a_step_reads_the_full_cache_and_keeps_its_length() -> None:
    for method in METHODS:
        layers = Layers(TINY, TINY_SETUP)
        cache = filled_cache(layers.config(method), 6, TINY_SETUP)
        step, before = layers.decode(method, cache), cache.nbytes
        first = step()
        assert torch.equal(step(), first)
        assert (cache.length, cache.nbytes) == (5, before)
        for token in range(5):
            (buffer, *_) = cache._buffers
            before_change = buffer[..., token, :].clone()
            buffer[..., token, :] += 1
            assert not torch.equal(step(), first)
            buffer[..., token, :] = before_change
        assert torch.equal(step(), first)


def test_prefill_is_deterministic_and_has_a_row() -> None:
    layers = Layers(TINY, TINY_SETUP)
    for method in ("MHA", "MLA naive"):
        long, short = (layers.prefill(method, n)() for n in (7, 7))
        assert torch.equal(long, short)
        assert long.shape == (1, 7, TINY.d_model)
    (row,) = mla.prefill_ratios((7,), 3, shape=TINY, setup=TINY_SETUP)
    assert row["tokens"] == 7
    assert 0 < row["low"] <= row["MLA / MHA"] <= row["high"]


def test_absorbed_decoding_is_many_times_as_fast() -> None:
    """Ten times or more on a quiet machine; on one thread, which other processes slow down alike."""
    rows = decode_costs((1024, 4096), 3)
    (naive,) = (row for row in rows if (row["method"], row["context"]) == ("MLA naive", 4096))
    assert naive["times absorbed"] >= mla.ABSORBED_GOAL


# The command


def test_the_command_prints_and_records(small: Path, capsys: pytest.CaptureFixture) -> None:
    assert dsmoe("bench", "mla", "--rounds", "3", "--contexts", "4,6,9", "--json", "--record") == 0
    result = json.loads(capsys.readouterr().out)
    (path,) = small.iterdir()
    assert path.name == "bench-mla-cpu.json"
    assert json.loads(path.read_text(encoding="utf-8")) == result
    assert result["place"] == {"device": "cpu", "dtype": "torch.float32", "batch_size": 1, "rounds": 3}
    assert result["slopes"] == slopes(result["decode"], result["peaks"])
    assert [row["tokens"] for row in result["prefill"]] == [5, 9]
    assert result["cache"]["MLA / MHA"] == 20 / 64
    assert len(result["goals"]) == 5
    assert {row["what"]: row["reached"] for row in result["goals"]}["cache of 9: MLA / MHA"] is False
    assert result["provenance"]["threads"] == 1
    assert dsmoe("bench", "mla", "--rounds", "3", "--contexts", "4,6") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(title in printed for title in ("one decode step", "Prefill", "Cost per cached token", "Goals"))
    assert json.loads(path.read_text(encoding="utf-8")) == result  # no --record, nothing written


def test_the_shipped_record_agrees_with_its_rows() -> None:
    result = json.loads(mla.record_path("cpu").read_text(encoding="utf-8"))
    assert result["schema_version"] == mla.SCHEMA_VERSION
    assert result["shape"]["mla"] == {**vars(V2_LITE.mla)}
    assert result["slopes"] == slopes(result["decode"], result["peaks"])
    assert [(row["method"], row["context"]) for row in result["decode"]] == [
        (method, context) for context in mla.CONTEXTS for method in METHODS
    ]
    assert [row["what"] for row in result["goals"] if not row["reached"]] in (
        [],
        ["cache bytes a second, absorbed / copy"],  # bound by arithmetic: 15 FLOPs a byte
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--contexts 1024", "contexts = [1024]: must be two or more"),
        ("--contexts 2048,1024", "contexts = [2048, 1024]: must be two or more, each longer"),
        ("--contexts 1024,1024", "each longer than the one before"),
        ("--contexts 1,1024", "context = 1: must be a whole number of at least 2"),
        ("--contexts 1K,2K", "--contexts 1K,2K: must be whole numbers with commas"),
        ("--rounds 2", "--rounds"),
        ("--device tpu", "'auto', 'cpu', 'cuda'"),
        ("--profile", "--profile: is for `layer`"),
    ],
)
def test_bad_input_is_one_line(arguments: str, message: str, small: Path, capsys: pytest.CaptureFixture) -> None:
    assert dsmoe("bench", "mla", *arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert not small.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line(capsys: pytest.CaptureFixture) -> None:
    for benchmark in ("mla", "train"):
        assert dsmoe("bench", benchmark, "--device", "cuda") == 2
        assert "torch finds no GPU here" in capsys.readouterr().err


def test_options_of_mla_are_refused_elsewhere(capsys: pytest.CaptureFixture) -> None:
    for option, benchmarks in ((("--contexts", "4,6"), "`mla`"), (("--record",), "`mla` and `kernels`")):
        assert dsmoe("bench", "train", *option) == 2
        assert f"{option[0]}: is for {benchmarks}, not for `train`" in capsys.readouterr().err
    assert dsmoe("bench", "layer", "--device", "cpu") == 2
    assert "--device: is for `train`, `mla` and `kernels`, not for `layer`" in capsys.readouterr().err


def test_functions_refuse_too_few_rounds() -> None:
    for measure in (partial(decode_costs, (4, 6)), partial(mla.prefill_ratios, (4,)), mla.peaks):
        with pytest.raises(InputError, match="rounds = 2: must be a whole number of at least 3"):
            measure(2)
