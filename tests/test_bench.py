"""Ratios: medians by hand on a clock of our own, and what stands beside what."""

import json
from collections.abc import Callable

import pytest
import torch

from dsmoe_lite.bench import layer, ratios
from dsmoe_lite.bench import train as train_bench
from dsmoe_lite.bench.layer import bench_layer
from dsmoe_lite.bench.train import MODELS, _llama, bench_train
from dsmoe_lite.cli import main
from dsmoe_lite.model import Transformer
from dsmoe_lite.presets import preset


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)


def test_ratios_are_medians_over_turns(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_layer_bench_compares_backends_with_the_dense_ffn(capsys: pytest.CaptureFixture) -> None:
    rows = bench_layer(1, n_tokens=32, d_model=8)
    assert [row["what"] for row in rows] == ["dense FFN, 2x width", "2 of 16 experts, loop", "2 of 16 experts, padded"]
    assert rows[0]["speed ratio"] == 1
    assert all(row["milliseconds"] > 0 for row in rows)
    with pytest.raises(SystemExit) as left:
        main(["bench", "layer", "--rounds", "3", "--json"])
    assert left.value.code == 0
    assert [row["what"] for row in json.loads(capsys.readouterr().out)] == [row["what"] for row in rows]


def test_layer_bench_is_of_equal_active_width(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list = []
    for name in ("SwiGLU", "MoELayer"):
        real = getattr(layer, name)
        monkeypatch.setattr(layer, name, lambda *a, real=real, **k: made.append(real(*a, **k)) or made[-1])
    bench_layer(1, n_tokens=32, d_model=8)
    dense, *sparse = made
    assert [one.experts.backend for one in sparse] == ["loop", "padded"]
    for one in sparse:
        assert one.router.config.top_k * one.experts.gate[0].numel() == dense.gate.weight.numel()


def test_train_bench_stands_on_a_llama_of_the_same_size() -> None:
    ours, llama = Transformer(preset("course-dense")), _llama(preset("course-dense"))
    shapes = [sorted(tuple(w.shape) for w in model.parameters()) for model in (ours, llama)]
    assert shapes[0] == shapes[1]
    before = ours.head.weight.clone()
    train_bench._step(ours, torch.randint(0, 1024, (2, 9)))()
    assert not torch.equal(ours.head.weight, before)  # the optimizer's step is in what is timed
    rows = bench_train(1, batch_size=2, seq_len=8)
    assert [row["what"] for row in rows] == ["transformers Llama, dense", *MODELS]
    assert rows[0]["speed ratio"] == 1
