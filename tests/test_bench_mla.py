"""Attention's benchmark: rows that say what they should, two paths that agree in it, and slopes by hand."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dsmoe_lite.bench import mla
from dsmoe_lite.bench.mla import (
    METHODS,
    PLACES,
    V2_LITE,
    Layers,
    Shape,
    cache_ratio,
    decode_costs,
    filled_cache,
    slopes,
)
from dsmoe_lite.cli import main
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import AttentionConfig, MLAConfig
from dsmoe_lite.layers.sdpa import attend_by_products

TINY = Shape(
    12,
    AttentionConfig(n_heads=4, head_dim=8),
    AttentionConfig(n_heads=4, head_dim=8, n_kv_heads=2),
    MLAConfig(n_heads=4, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, kv_lora_rank=16),
)
TINY_PLACE = replace(PLACES["cpu"], copied_bytes=1000, matmul_width=16)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The command on tiny layers; returns where its records go."""
    monkeypatch.setattr(mla, "PLACES", {"cpu": TINY_PLACE})
    monkeypatch.setattr(mla, "bench_mla", partial(mla.bench_mla, shape=TINY, prefills=((5, 3), (9, 4))))
    monkeypatch.setattr(mla, "DATA", tmp_path)
    return tmp_path / "runs"


def dsmoe(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return left.value.code


# What the rows say


def test_a_row_for_every_method_and_context() -> None:
    rows = decode_costs((3, 5, 8), 4, shape=TINY, place=TINY_PLACE)
    assert [(row["method"], row["context"]) for row in rows] == [(method, n) for n in (3, 5, 8) for method in METHODS]
    for row in rows:
        assert 0 < row["low"] <= row["milliseconds"] <= row["high"]
        assert row["times absorbed"] > 0
        assert (row["method"] != "MLA absorbed") or row["times absorbed"] == 1
    numbers = {"MHA": 2 * 4 * 8, "GQA": 2 * 2 * 8, "MLA naive": 16 + 4, "MLA absorbed": 16 + 4}
    assert all(row["cache bytes"] == 4 * row["context"] * numbers[row["method"]] for row in rows)


def test_flops_are_those_of_the_matrix_products() -> None:
    """Against torch's own counter, which does not look into fused attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    cut = {"MLA naive": 4, "MLA absorbed": 4}  # channels of a head's values that are computed and not used
    layers = Layers(TINY, TINY_PLACE)
    for method in METHODS:
        counted = []
        for context in (6, 9):
            step = layers.decode(method, filled_cache(layers.config(method), context, TINY_PLACE))
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                step()
            counted.append(counter.get_total_flops())
        assert counted[1] - counted[0] == 2 * 3 * (mla._multiplications(TINY, method) + 4 * cut.get(method, 0)), method


def test_the_cache_of_mla_is_less_than_a_seventh() -> None:
    found = cache_ratio(8192)
    assert found == {"tokens": 8192, "MHA bytes": 8192 * 4096 * 4, "MLA bytes": 8192 * 576 * 4, "MLA / MHA": 576 / 4096}
    assert found["MLA / MHA"] <= mla.CACHE_GOAL


def test_slopes_are_by_hand() -> None:
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


def test_peaks_count_what_is_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmoe_lite.bench.timing.seconds_of", lambda step: 1e-6)
    assert mla.peaks(3, TINY_PLACE) == {"copy GB/s": 2.0, "matmul GFLOP/s": round(2 * 16**3 / 1000, 3)}


# What is timed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch_size", "threads"), [(1, 1), (3, 1), (1, 2)])
def test_both_paths_give_the_same_in_what_is_timed(dtype: torch.dtype, batch_size: int, threads: int) -> None:
    torch.set_num_threads(threads)  # fused attention, or two products where threads are more than sequences
    place = replace(TINY_PLACE, dtype=dtype, batch_size=batch_size)
    layers = Layers(TINY, place)
    cache = filled_cache(TINY.mla, 9, place)
    naive, absorbed = (layers.decode(method, cache)() for method in ("MLA naive", "MLA absorbed"))
    assert naive.shape == (batch_size, 1, TINY.d_model)
    assert naive.dtype == dtype
    assert naive.std() > 0.01
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype] * float(naive.std())
    torch.testing.assert_close(naive, absorbed, rtol=0, atol=tolerance)


@pytest.mark.parametrize("masked", ["no", "for all", "for each"])
def test_two_products_are_fused_attention(masked: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, d, dtype=torch.float64) for n, d in ((4, 8), (9, 8), (9, 8)))
    mask = {"no": None, "for all": torch.rand(1, 9) < 0.7, "for each": torch.rand(2, 1, 1, 9) < 0.7}[masked]
    if mask is not None:
        mask[..., 4] = True  # none sees nothing
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(attend_by_products(q, k, v, 0.3, mask), fused)
    torch.testing.assert_close(attend_by_products(q, k, v[..., :5], 0.3, mask), fused[..., :5])


def test_a_step_leaves_the_cache_as_long_and_looks_at_all_of_it() -> None:
    for method in METHODS:
        layers = Layers(TINY, TINY_PLACE)
        cache = filled_cache(layers.config(method), 6, TINY_PLACE)
        step, before = layers.decode(method, cache), cache.nbytes
        first = step()
        assert torch.equal(step(), first)
        assert (cache.length, cache.nbytes) == (5, before)
        for token in range(5):
            (buffer, *_) = cache._buffers
            kept = buffer[..., token, :].clone()
            buffer[..., token, :] += 1
            assert not torch.equal(step(), first)
            buffer[..., token, :] = kept
        assert torch.equal(step(), first)


def test_a_prompt_fills_its_cache_and_both_layers_are_causal() -> None:
    layers = Layers(TINY, TINY_PLACE)
    for method in ("MHA", "MLA naive"):
        long, short = (layers.prefill(method, n)() for n in (7, 7))
        assert torch.equal(long, short)
        assert long.shape == (1, 7, TINY.d_model)
    (row,) = mla.prefill_ratios((7,), 3, shape=TINY, place=TINY_PLACE)
    assert row["tokens"] == 7
    assert 0 < row["low"] <= row["MLA / MHA"] <= row["high"]


def test_absorbed_decoding_is_many_times_as_fast() -> None:
    """Ten times and more where machines are quiet; one thread, which others slow down alike."""
    rows = decode_costs((1024, 4096), 3)
    (naive,) = (row for row in rows if (row["method"], row["context"]) == ("MLA naive", 4096))
    assert naive["times absorbed"] >= mla.ABSORBED_GOAL


# The command


def test_the_command_prints_and_records(small: Path, capsys: pytest.CaptureFixture) -> None:
    assert dsmoe("bench", "mla", "--rounds", "3", "--contexts", "4,6,9", "--json", "--record") == 0
    found = json.loads(capsys.readouterr().out)
    (path,) = small.iterdir()
    assert path.name == "bench-mla-cpu.json"
    assert json.loads(path.read_text(encoding="utf-8")) == found
    assert found["place"] == {"device": "cpu", "dtype": "torch.float32", "batch_size": 1, "rounds": 3}
    assert found["slopes"] == slopes(found["decode"], found["peaks"])
    assert [row["tokens"] for row in found["prefill"]] == [5, 9]
    assert found["cache"]["MLA / MHA"] == 20 / 64
    assert len(found["goals"]) == 5
    assert {row["what"]: row["reached"] for row in found["goals"]}["cache of 9: MLA / MHA"] is False
    assert found["provenance"]["threads"] == 1
    assert dsmoe("bench", "mla", "--rounds", "3", "--contexts", "4,6") == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("one token", "A prompt", "each token in the cache", "Goals"))
    assert json.loads(path.read_text(encoding="utf-8")) == found  # no --record, nothing written


def test_the_record_of_the_repository_reads_as_it_was_written() -> None:
    found = json.loads(mla.record_path("cpu").read_text(encoding="utf-8"))
    assert found["schema_version"] == mla.SCHEMA_VERSION
    assert found["shape"]["mla"] == {**vars(V2_LITE.mla)}
    assert found["slopes"] == slopes(found["decode"], found["peaks"])
    assert [(row["method"], row["context"]) for row in found["decode"]] == [
        (method, context) for context in mla.CONTEXTS for method in METHODS
    ]
    assert [row["what"] for row in found["goals"] if not row["reached"]] in (
        [],
        ["cache bytes a second, absorbed / copy"],  # bound by arithmetic: 15 FLOPs a byte
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
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
def test_bad_input_is_one_line(arguments: str, said: str, small: Path, capsys: pytest.CaptureFixture) -> None:
    assert dsmoe("bench", "mla", *arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert said in printed.err
    assert not small.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture) -> None:
    for what in ("mla", "train"):
        assert dsmoe("bench", what, "--device", "cuda") == 2
        assert "torch finds no GPU here" in capsys.readouterr().err


def test_options_of_mla_are_for_mla(capsys: pytest.CaptureFixture) -> None:
    for option, those in ((("--contexts", "4,6"), "`mla`"), (("--record",), "`mla` and `kernels`")):
        assert dsmoe("bench", "train", *option) == 2
        assert f"{option[0]}: is for {those}, not for `train`" in capsys.readouterr().err
    assert dsmoe("bench", "layer", "--device", "cpu") == 2
    assert "--device: is for `train`, `mla` and `kernels`, not for `layer`" in capsys.readouterr().err


def test_functions_refuse_too_few_rounds() -> None:
    for measure in (partial(decode_costs, (4, 6)), partial(mla.prefill_ratios, (4,)), mla.peaks):
        with pytest.raises(InputError, match="rounds = 2: must be a whole number of at least 3"):
            measure(2)
