"""One small chart of every kind, from made-up numbers; run as a script it prints their bundles' stable part."""

import json
import math
import random
from typing import Any

from dsmoe_lite.viz import charts, renderer

EXPERTS = 8
DOMAINS = ("facts", "arithmetic", "brackets", "code", "language B")
MODELS = ("dense", "dense, 2x width", "GShard top-2", "Switch top-1")


def curve_rows(n_models: int, seeds: int, steps: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    falling = [2 + 5 * math.exp(-step / 40) for step in range(steps)]
    return [
        {"model": f"model {m}", "seed": seed, "step": step, "loss": falling[step] + 0.1 * m + draw.random()}
        for m in range(n_models)
        for seed in range(seeds)
        for step in range(steps)
    ]  # fmt: skip


def routing(tokens: int, layers: int, k: int = 2) -> list[dict[str, Any]]:
    draw = random.Random(1)
    return [
        {
            "topk_ids": [draw.sample(range(EXPERTS), k) for _ in range(tokens)],
            "gates": [[0.9 - 0.2 * i for i in range(k)] for _ in range(tokens)],
            "kept": [[draw.random() > 0.2 for _ in range(k)] for _ in range(tokens)],
        }
        for _ in range(layers)
    ]


def kind_rows() -> list[dict[str, Any]]:
    draw = random.Random(3)
    return [
        {"kind": kind, "effect": effect, "value": draw.random() - 0.2, "part": part}
        for effect in ("shared expert", "one routed")
        for kind in ("function word", *DOMAINS)
        for part in range(4)
    ]


def balance_rows() -> list[dict[str, Any]]:
    draw = random.Random(3)
    return [
        {"method": f"method {m}", "family": f"family {m % 4}", "seed": seed, "gap": 0.01 * draw.gauss(),
         "max_vio": 0.1 * 1.5**m * draw.uniform(1, 2), "overflow": 0.03 * m}
        for m in range(10)
        for seed in range(5)
    ]  # fmt: skip


def table_rows() -> list[dict[str, Any]]:
    return [
        {"loss": f"loss {i}", "routing": routing, "value": 1.0 + i * j}
        for i in range(8)
        for j, routing in enumerate(("even", "one expert|for all", "one device", "each sequence|its own"))
    ]


def every_chart() -> dict[str, Any]:
    draw = random.Random(2)
    split = [
        {"model": model, "component": part, "total": 1e6 * (i + 1), "active": 5e5 * (i + 1), "flops": 1e6 * (i + 1)}
        for model in MODELS
        for i, part in enumerate(("embeddings", "attention", "router", "experts", "shared experts", "output head"))
    ]
    results = [
        {"model": model, "metric": metric, "value": 1 + 0.1 * i + 0.01 * draw.random(), "seed": seed}
        for metric in ("held-out loss", "recall, head", "recall, tail", "tokens/s over dense")
        for i, model in enumerate(MODELS)
        for seed in range(3)
    ]
    capacity = [
        {"model": model, "capacity_factor": c, "drop_rate": math.exp(-2 * c) / (i + 1), "loss": 2 + math.exp(-c)}
        for i, model in enumerate(MODELS)
        for c in (0.5, 1.0, 1.5, 2.0)
    ]
    null = [2 / EXPERTS] * EXPERTS
    shares = [{"domain": d, "expert": e, "share": draw.random() / 2} for d in DOMAINS for e in range(EXPERTS)]
    history = [{"step": 50 * s, "expert": e, "load": draw.random()} for s in range(10) for e in range(EXPERTS)]
    finer = [{"layer": f"m = {m}", "n_experts": 16 * m, "top_k": 2 * m} for m in (1, 2, 4, 8)]
    spread = [{"model": m, "value": 2 + draw.random(), "null": 3 + draw.random()} for m in MODELS for _ in range(16)]
    text = ["The", " capital", " of", " Norvania", " is", " Telmar", ".", "\n"] * 10
    balanced = balance_rows()
    return {
        "training_curves": charts.training_curves(curve_rows(4, 3, 200)),
        "training_curves, one": charts.training_curves(curve_rows(1, 1, 20)),
        "training_curves, long names": charts.training_curves(
            [{**row, "model": f"{row['model']}, dense of two widths"} for row in curve_rows(4, 2, 20)]
        ),
        "training_curves, many": charts.training_curves(curve_rows(7, 2, 200)),
        "parameter_split": charts.parameter_split(split),
        "model_comparison": charts.model_comparison(results),
        "expert_load": charts.expert_load([10, 30, 20, 5, 0, 60, 20, 15], capacity=25),
        "expert_load, 64": charts.expert_load([draw.random() for _ in range(64)]),
        "expert_load, history": charts.expert_load(history, capacity=0.6),
        "domain_heatmap": charts.domain_heatmap(shares, null=null),
        "router_probabilities": charts.router_probabilities([0.4, 0.3, 0.1, 0.1, 0.05, 0.05], [0, 1], token=" of"),
        "effects_by_kind": charts.effects_by_kind(kind_rows(), overall={"shared expert": 0.1, "one routed": 0.5}),
        "effects_by_kind, one part": charts.effects_by_kind(
            [{"kind": d, "effect": "layer 1", "value": 0.2} for d in DOMAINS], overall={"layer 1": 0.2}, number=".0%"
        ),
        "capacity_curve": charts.capacity_curve(capacity),
        "finer_experts": charts.finer_experts(finer),
        "expert_spread": charts.expert_spread(spread, x_title="effective number of domains"),
        "loss_table": charts.loss_table(table_rows(), balanced="even"),
        "balance_scatter": charts.balance_scatter(balanced),
        "balance_scatter, one seed": charts.balance_scatter([row for row in balanced if row["seed"] == 0][:1]),
        "reach_curve": charts.reach_curve(
            [{"scores": s, "limit": m, "reached": min(m, 4.5), "kept": m / (m + i)} for i, s in enumerate(("random",
             "trained")) for m in range(1, 9)]
        ),
        "token_routing": charts.token_routing(text, routing(len(text), 4)),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps({name: renderer.stable(chart.to_dict()) for name, chart in every_chart().items()}))
