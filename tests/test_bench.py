"""Benchmarks: medians by hand on a fake clock, fixed routing, peak memory, contenders and their baselines."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from dsmoe_lite.accounting import training_flops
from dsmoe_lite.bench import layer, ratios
from dsmoe_lite.bench import train as train_bench
from dsmoe_lite.bench.contenders import dense_ffn, moe_layer, routed_experts, transformers_experts
from dsmoe_lite.bench.fixed_routing import max_violation, skewed_ids, uniform_ids, zipf_ids
from dsmoe_lite.bench.layer import SIZES
from dsmoe_lite.bench.memory import peak_bytes
from dsmoe_lite.bench.train import LLAMA, SETUPS, Setup, _llama, bench_train
from dsmoe_lite.cli import main
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers.experts import Experts
from dsmoe_lite.model import Transformer
from dsmoe_lite.presets import preset


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)


def test_ratios_are_medians_over_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(ratios.time, "perf_counter", lambda: now[0])

    def taking(name: str, *seconds: float) -> Callable[[], None]:
        left = iter([100.0, *seconds])  # the first call is not measured

        def step() -> None:
            now[0] += next(left)
            order.append(name)

        return step

    rows = ratios.compare({"base": taking("base", 4, 8, 6), "other": taking("other", 1, 4, 2)}, rounds=3)
    assert rows == [
        {"what": "base", "milliseconds": 6000, "speed ratio": 1},
        {"what": "other", "milliseconds": 2000, "speed ratio": 3},  # of 4/1, 8/4, 6/2
    ]
    assert order == ["base", "other"] * 4


def test_a_ratio_is_over_pairs_run_back_to_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(ratios.time, "perf_counter", lambda: now[0])

    def taking(name: str, *seconds: float) -> Callable[[], None]:
        left = iter([100.0, *seconds])

        def step() -> None:
            now[0] += next(left)
            order.append(name)

        return step

    ratio = ratios.time_ratio(taking("own", 6, 2, 8), taking("base", 3, 2, 2), rounds=3)
    assert ratio == (2, 1, 4)  # of 6/3, 2/2, 8/2
    assert order[2:] == ["base", "own", "own", "base", "base", "own"]


def test_the_interval_of_a_median_covers_it_in_95_of_100() -> None:
    """With draws from a skewed distribution of known median: order statistics assume nothing about its form."""
    draws = torch.distributions.Exponential(1.0)
    torch.manual_seed(0)
    for n in (6, 15, 30):
        hits = 0
        for _ in range(2000):
            _, low, high = ratios.median_interval(draws.sample((n,)).tolist())
            hits += low <= math.log(2) <= high
        assert 0.94 <= hits / 2000 <= 0.985
    assert ratios.median_interval(list(range(1, 31)))[1:] == (10, 21)  # the ranks in published tables for n = 30


def test_fixed_ids_are_distinct_and_have_their_skew() -> None:
    for E, K in ((16, 2), (64, 6)):
        even, zipf = uniform_ids(2048, E, K), zipf_ids(2048, E, K)
        for ids in (even, zipf, skewed_ids(2048, E, K, 1), skewed_ids(2048, E, K, 3)):
            assert ids.shape == (2048, K)
            assert all(len(set(row)) == K for row in ids.tolist())
            assert 0 <= int(ids.min()) <= int(ids.max()) < E
        assert torch.equal(even, uniform_ids(2048, E, K))
        assert max_violation(even, E) < 0.3 < 2 < max_violation(zipf, E)
        for violation in (1, 3):
            assert max_violation(skewed_ids(2048, E, K, violation), E) == pytest.approx(violation, abs=0.01)


def test_peak_memory_is_counted_by_hand() -> None:
    results: list[torch.Tensor] = []

    def step() -> None:
        results.clear()
        a = torch.empty(1000)
        b = torch.empty(3000)
        del a
        results.append(torch.empty(5000))
        del b
        torch.empty(100)

    assert peak_bytes(step, results.clear, list) == 4 * 8000
    assert peak_bytes(step, results.clear, lambda: results) == 4 * 4000


def test_memory_is_deterministic_and_excludes_gradients() -> None:
    dense = dense_ffn(SIZES[0].moe, 64, 32)
    first = dense.peak_bytes()
    assert all(dense.peak_bytes() == first for _ in range(3))
    hidden, width = 64 * 1024 * 4, 64 * 32 * 4
    # backward needs a, b, silu(a) and their product, adds the gradient of the product, and one more tensor at a time
    assert 5 * hidden <= first <= 7 * hidden + 3 * width


def test_contenders_compute_equal_results() -> None:
    moe, ids = MoEConfig(n_routed_experts=8, top_k=3, expert_width=16), uniform_ids(50, 8, 3)
    ours = routed_experts(moe, ids, "auto", 32)
    assert isinstance(ours.module, Experts)
    ours.step()
    for implementation in ("eager", "grouped_mm"):
        theirs = transformers_experts(ours.module, ids, implementation)
        torch.testing.assert_close(theirs.call(*theirs.inputs), ours.call(*ours.inputs))
        theirs.step()
        d_gate, d_up = theirs.module.gate_up_proj.grad.chunk(2, dim=1)
        for gradient, other in zip(ours.gradients(), (d_gate, d_up, theirs.module.down_proj.grad), strict=True):
            torch.testing.assert_close(gradient, other)
        for x, other in zip(ours.inputs, theirs.inputs, strict=True):
            torch.testing.assert_close(x.grad, other.grad)
    layer = moe_layer(moe, ids, "auto", 32)
    layer.step()
    _, routing = layer.module(layer.inputs[0][None])
    assert torch.equal(routing.topk_ids, ids)
    assert layer.module.router.router.weight.grad.any()  # what is timed includes the router and its gradient


def test_layer_bench_has_a_row_for_every_goal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(layer, "bench_layer", partial(layer.bench_layer, n_tokens=32, d_model=16))
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "layer", "--rounds", "3", "--json"])
    assert stopped.value.code == 0
    rows = json.loads(capsys.readouterr().out)
    goals = {(row["size"], row["what"], row["by"], row["routing"], row["against"]): row for row in rows}
    assert len(goals) == len(rows) == 22
    for size in SIZES:
        for routing in ("uniform", "Zipf"):
            assert goals[size.name, "layer", "auto", routing, "dense"]["time goal"] == size.time_goal
            for implementation in ("eager", "grouped_mm"):
                row = goals[size.name, "experts", "auto", routing, f"transformers {implementation}"]
                assert row["time goal"] == pytest.approx(1 / 1.3)
                assert row["time gap"] == pytest.approx(row["time"] - row["time goal"])
        for by, routing in (("auto", "uniform"), ("padded", "uniform"), ("padded", "busy 1"), ("padded", "busy 3")):
            assert goals[size.name, "layer", by, routing, "dense"]["memory goal"] == size.memory_goal
    assert all(0 < row["low"] <= row["time"] <= row["high"] for row in rows)


def test_layer_bench_compares_equal_active_widths() -> None:
    for size in SIZES:
        moe = size.moe
        dense = dense_ffn(moe, 8, 16).module
        assert dense.gate.weight.shape[0] == (moe.top_k + moe.n_shared_experts) * moe.expert_width == 1024


def test_profile_names_the_matrix_products(capsys: pytest.CaptureFixture) -> None:
    rows = layer.profile_layer(1, n_tokens=32, d_model=16)
    for size in SIZES:
        of_size = {row["operation"]: row for row in rows if row["size"] == size.name}
        # a dense FFN has no other products
        assert of_size["aten::mm"]["dense"] == of_size["matrix products"]["dense"] > 0
        for of in ("dense", "layer", "experts", "transformers"):
            listed = sum(of_size[name][of] for name in of_size if name not in ("matrix products", "all"))
            assert of_size["all"][of] >= listed > of_size["matrix products"][of] > 0
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "train", "--profile"])
    assert stopped.value.code == 2
    assert "--profile" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "limit"), list(zip(SIZES, (1.6, 2.0), strict=True)), ids=["2/16", "6+2/64"])
def test_a_layer_meets_its_time_goal(size: layer.Size, limit: float) -> None:
    """By pairs on one thread, which other processes slow down alike; with more pairs if a few are not conclusive."""
    ids = uniform_ids(layer.N_TOKENS, size.moe.n_routed_experts, size.moe.top_k)
    moe = moe_layer(size.moe, ids, "auto", layer.D_MODEL)
    dense = dense_ffn(size.moe, layer.N_TOKENS, layer.D_MODEL)
    ratio = ratios.time_ratio(moe.step, dense.step, 9)
    if not ratio.high <= limit:
        ratio = ratios.time_ratio(moe.step, dense.step, 41)
    assert ratio.median <= limit, ratio


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_a_layer_meets_its_memory_goal(size: layer.Size) -> None:
    E, K = size.moe.n_routed_experts, size.moe.top_k
    dense = dense_ffn(size.moe, layer.N_TOKENS, layer.D_MODEL)
    limit = size.memory_goal * dense.peak_bytes()
    for ids in (uniform_ids(2048, E, K), zipf_ids(2048, E, K), skewed_ids(2048, E, K, 1), skewed_ids(2048, E, K, 3)):
        for backend in ("auto", "padded"):
            assert moe_layer(size.moe, ids, backend, layer.D_MODEL).peak_bytes() <= limit


def test_train_bench_has_a_llama_of_the_same_size() -> None:
    ours, llama = Transformer(preset("course-dense")), _llama(preset("course-dense"))
    shapes = [sorted(tuple(w.shape) for w in model.parameters()) for model in (ours, llama)]
    assert shapes[0] == shapes[1]
    before = ours.head.weight.clone()
    train_bench.training_step(ours, torch.randint(0, 1024, (2, 9)))()
    assert not torch.equal(ours.head.weight, before)  # what is timed includes the step of the optimizer
    rows = bench_train(1, replace(SETUPS["cpu"], batch_size=2, seq_len=8))
    assert [row["what"] for row in rows] == [LLAMA, *SETUPS["cpu"].models]
    assert rows[0]["speed ratio"] == 1


def test_the_share_of_a_matmul_is_a_ratio_of_flops_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, gshard = preset("course-dense"), preset("course-gshard")
    setup = Setup({"dense": dense, "gshard": gshard}, batch_size=2, seq_len=8)
    milliseconds = {LLAMA: 4.0, "dense": 2.0, "gshard": 8.0, "matmul": 0.5}

    def timed(steps: dict[str, Callable[[], None]], rounds: int) -> list[dict[str, object]]:
        for step in steps.values():
            step()
        return [{"what": name, "milliseconds": milliseconds[name], "speed ratio": 1.0} for name in steps]

    monkeypatch.setattr(train_bench, "compare", timed)
    product = train_bench.MATMULS * 2 * 16 * dense.d_model * dense.ffn_width / 0.5
    of_dense, of_gshard = (2 * training_flops(config, 8).total for config in (dense, gshard))
    shares = {row["what"]: row["of matmul"] for row in bench_train(3, setup)}
    assert shares == pytest.approx(
        {LLAMA: of_dense / 4 / product, "dense": of_dense / 2 / product, "gshard": of_gshard / 8 / product}
    )
