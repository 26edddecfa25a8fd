"""Small charts of every kind, from made-up numbers; run as a script, it prints their stable specs."""

import json
import math
import random
from typing import Any

from dsmoe_lite import preset
from dsmoe_lite.accounting import split_rows
from dsmoe_lite.kernels.work import grouped_product
from dsmoe_lite.layers.capacity import capacity
from dsmoe_lite.viz import charts, renderer

EXPERTS = 8
DOMAINS = ("facts", "arithmetic", "brackets", "code", "language B")
ABLATIONS = ("1st choice", "shared expert", "2nd choice", "3rd choice")
MANY_KINDS = ("function word", "mark", "first name", "last name", "relation", "value", "second language", *DOMAINS[1:4])
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


def speed_rows(*names: str) -> list[dict[str, Any]]:
    return [{"by": name, "rows": n, "TFLOP/s": (600 - 90 * i) * n / (n + 200)}
            for i, name in enumerate(names) for n in (64, 256, 1024, 4096)]  # fmt: skip


def kind_rows() -> list[dict[str, Any]]:
    draw = random.Random(3)
    return [
        {"kind": kind, "effect": effect, "value": draw.random() - 0.2, "part": part}
        for effect in ("shared expert", "one routed")
        for kind in ("function word", *DOMAINS)
        for part in range(4)
    ]


def table_rows() -> list[dict[str, Any]]:
    return [
        {"loss": f"loss {i}", "routing": routing, "value": 1.0 + i * j}
        for i in range(8)
        for j, routing in enumerate(("even", "one expert|for all", "one device", "each sequence|its own"))
    ]


def coactivation_shares(experts: int) -> tuple[list[list[float]], list[list[float]]]:
    """Co-activation of experts in four groups, and the same by chance."""
    draw = random.Random(5)
    null = [[0.05 + 0.1 * draw.random() for _ in range(experts)] for _ in range(experts)]
    shares = [[null[i][j] * draw.uniform(0.5, 1.5) * (2.5 if i % 4 == j % 4 else 0.7) for j in range(experts)]
              for i in range(experts)]  # fmt: skip
    return shares, null


def specialization_rows(layers: int, experts: int) -> list[dict[str, Any]]:
    draw = random.Random(7)
    return [
        {"what": f"layer {i}", "expert": e, "value": 0.3 + 0.2 * abs(draw.gauss()), "null_low": null - 0.05,
         "null": null, "null_high": null + 0.05}
        for i in range(1, layers + 1)
        for e in range(experts)
        for null in [0.3 + 0.2 * draw.random()]
    ]  # fmt: skip


def token_points() -> list[dict[str, Any]]:
    """The products of 6 of 64 experts, and of a dense FFN with the same work, by the tokens of a batch."""
    products = {"dense FFN": (1, 1, 6 * 1408), "6 of 64": (64, 6, 1408)}
    return [
        {"name": name, "tokens": 2**n, "intensity": grouped_product(2**n * k, experts, 2048, width).intensity}
        for n in range(17)
        for name, (experts, k, width) in products.items()
    ]


def scaling_rows() -> list[dict[str, Any]]:
    """The speed that a device keeps: less with more devices, and more with more tokens or faster links."""
    slow = {"16B": 0.02, "145B": 0.05, "DeepSeek-V2": 0.06, "DeepSeek-V3": 0.1}
    return [
        {"model": model, "devices": 2**n, "tokens": tokens, "bandwidth": bandwidth, "schedule": schedule,
         "value": 1 / (1 + n * share * (4096 / tokens) * (50 / bandwidth) / (1 + (schedule == "overlapped")))}
        for tokens in (1024, 4096, 16_384)
        for bandwidth in (25.0, 50.0, 100.0)
        for schedule in ("in turn", "overlapped")
        for model, share in slow.items()
        for n in range(3, 13)
    ]  # fmt: skip


def chance_rows() -> list[dict[str, Any]]:
    """Devices, of 8, that k of 64 experts reach by chance."""
    return [{"top_k": k, "reached": 8 * (1 - math.comb(56, k) / math.comb(64, k))} for k in range(1, 17)]


def length_rows() -> list[dict[str, Any]]:
    """Where the parameters and FLOPs of a dense model are, by the length of its texts, beside one of fixed length."""
    dense = preset("course-dense")
    moving = [{**row, "seq_len": 2**n} for n in range(9, 18) for row in split_rows({"dense": (dense, 2**n)})]
    return [*moving, *split_rows({"dense, S = 64": (dense, 64)})]


CAPACITY_LOADS = [100, 300, 200, 50, 0, 600, 200, 150]


def capacity_rows() -> list[dict[str, Any]]:
    """Slots and the share of dropped choices of CAPACITY_LOADS, by capacity factor."""
    rows = []
    for factor in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0):
        slots = capacity(sum(CAPACITY_LOADS), 1, len(CAPACITY_LOADS), factor)
        lost = sum(max(0, load - slots) for load in CAPACITY_LOADS)
        rows.append({"capacity_factor": factor, "slots": slots, "drop_rate": lost / sum(CAPACITY_LOADS)})
    return rows


def bias_rows() -> list[dict[str, Any]]:
    """MaxVio of 40 batches at five speeds: slow ones are still falling, fast ones overshoot."""
    draw = random.Random(11)
    speeds = [10 ** (power / 2) for power in range(-8, -3)]
    return [
        {"speed": speed, "batch": batch, "max_vio": max(8 - 300 * speed * batch, 100 * speed) + 0.1 * draw.random()}
        for speed in speeds
        for batch in range(40)
    ]


def step_rows() -> list[dict[str, Any]]:
    """Growths that fall with the spread of the logits for one kind of scores, and rise for the other."""
    return [
        {"scores": name, "experts": experts, "spread": spread, "growth": experts / 1e4 * spread**power}
        for name, power in (("sigmoid", 2), ("root of softplus", -1))
        for experts in (16, 64, 256)
        for spread in (0.5, 1.0, 2.0, 4.0)
    ]


def outlier_rows() -> list[dict[str, Any]]:
    """Relative errors that grow with an outlier, the more numbers share its scale."""
    return [
        {"scales": f"{n} numbers", "outlier": 10.0**power, "error": min(1.0, 0.02 + n * 10.0 ** (power - 10))}
        for n in (1024, 128, 32)
        for power in range(9)
    ]


def cost_rows(runs: int) -> list[dict[str, Any]]:
    draw = random.Random(8)
    slopes = {"MHA": 0.9, "GQA": 0.5, "MLA naive": 1.05, "MLA absorbed": 0.3}
    return [
        {"method": method, "context": 2**power, "milliseconds": 2 ** (slope * (power - 10)) * draw.uniform(0.2, 0.22)}
        for method, slope in slopes.items()
        for power in range(10, 15)
        for _ in range(runs)
    ]  # fmt: skip


def needle_rows(kinds: tuple[str, ...], depths: int, seeds: int) -> list[dict[str, Any]]:
    draw = random.Random(9)
    return [
        {"kind": kind, "length": length, "depth": d / (depths - 1), "seed": seed,
         "recall": max(0.0, 1 - 0.4 * i * draw.random() * length / 2048)}
        for i, kind in enumerate(kinds)
        for length in (256, 512, 1024, 2048)
        for d in range(depths)
        for seed in range(seeds)
    ]  # fmt: skip


CACHES = [
    {"model": model, "kind": kind, "elements_per_token": elements}
    for model, kind, elements in (
        ("DeepSeek-V3", "MLA", 35_136), ("LLaMA-3.1-405B", "GQA", 258_048), ("LLaMA2-7B", "MHA", 262_144),
        ("DeepSeek-V2-Lite", "MLA", 15_552), ("Mixtral 8x7B", "GQA", 65_536), ("V3 with MHA", "MHA", 1_998_848),
        ("one KV head", "MQA", 5_000),
    )
]  # fmt: skip
TRENDS = [
    {"label": "a beats b", "place": "Table 1", "mean": 0.0225, "low": 0.003, "high": 0.042, "verdict": "holds"},
    {"label": "a beats c", "place": "Table 1", "mean": 0.01, "low": 0.001, "high": 0.019, "verdict": "leans"},
    {"label": "a is as good as d", "place": "Table 2", "mean": -0.001, "low": -0.015, "high": 0.013,
     "verdict": "inconclusive", "margins": [-0.012]},
    {"label": "a beats b", "place": "Figure 4", "mean": -1.74, "low": -2.05, "high": -1.43, "verdict": "reversed"},
]  # fmt: skip
POINTS = [
    {"name": "experts, 1 token", "intensity": 1, "flops": 1.9e12},
    {"name": "experts, 64 tokens", "intensity": 8},
    {"name": "experts, 4096 tokens", "intensity": 500, "flops": 4.1e14},
    {"name": "attention", "intensity": 90, "flops": 9e13},
    {"name": "router", "intensity": 85},
    {"name": "output head", "intensity": 900},
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
    drops = [
        {"model": model, "capacity_factor": c, "drop_rate": math.exp(-2 * c) / (i + 1), "loss": 2 + math.exp(-c)}
        for i, model in enumerate(MODELS)
        for c in (0.5, 1.0, 1.5, 2.0)
    ]
    history = [{"step": 50 * s, "expert": e, "load": draw.random()} for s in range(10) for e in range(EXPERTS)]
    text = ["The", " capital", " of", " Norvania", " is", " Telmar", ".", "\n"] * 10
    pairs, null_of_pairs = coactivation_shares(64)
    return {
        "training_curves": charts.training_curves(curve_rows(4, 3, 200)),
        "training_curves, one": charts.training_curves(curve_rows(1, 1, 20)),
        "training_curves, long names": charts.training_curves(
            [{**row, "model": f"{row['model']}, dense of two widths"} for row in curve_rows(4, 2, 20)]
        ),
        "training_curves, many": charts.training_curves(curve_rows(7, 2, 200)),
        "parameter_split": charts.parameter_split(split),
        "parameter_split, lengths": charts.parameter_split(length_rows(), shares=True, seq_len=2048),
        "model_comparison": charts.model_comparison(results),
        "expert_load": charts.expert_load([10, 30, 20, 5, 0, 60, 20, 15]),
        "expert_load, 64": charts.expert_load([draw.random() for _ in range(64)]),
        "expert_load, history": charts.expert_load(history),
        "expert_capacity": charts.expert_capacity(CAPACITY_LOADS, capacity_rows(), factor=1.25),
        "effects_by_kind": charts.effects_by_kind(kind_rows(), overall={"shared expert": 0.1, "one routed": 0.5}),
        "effects_by_kind, one part": charts.effects_by_kind(
            [{"kind": d, "effect": "layer 1", "value": 0.2} for d in DOMAINS], overall={"layer 1": 0.2}, number=".0%"
        ),
        "capacity_curve": charts.capacity_curve(drops),
        "finer_experts": charts.finer_experts(),
        "finer_experts, many": charts.finer_experts(n_experts=64, top_k=16, pieces=8),
        "bias_speed": charts.bias_speed(bias_rows(), speed=0.001, last=20),
        "fp8_error": charts.fp8_error(outlier_rows(), outlier=1e4),
        "bias_step": charts.bias_step(step_rows(), experts=64),
        "router_choice": charts.router_choice(
            {name: preset(name).moe for name in ("deepseek-v2", "deepseek-v3", "course-v4")}, model="deepseek-v3"
        ),
        "loss_table": charts.loss_table(table_rows(), balanced="even"),
        "reach_curve": charts.reach_curve(
            [{"scores": s, "limit": m, "reached": min(m, 4.5), "affinity": m / (m + i)} for i, s in enumerate(("random",
             "trained")) for m in range(1, 9)]
        ),
        "reach_by_chance": charts.reach_by_chance(chance_rows(), devices=8, top_k=6),
        "cache_calculator": charts.cache_calculator(CACHES),
        "cache_calculator, one": charts.cache_calculator(CACHES[:1], context=1024, bits=6, memory=None),
        "cache_by_design": charts.cache_by_design(),
        "cache_by_design, few": charts.cache_by_design(heads=16, groups=1, head_dim=64),
        "decode_cost": charts.decode_cost(cost_rows(1)),
        "decode_cost, runs": charts.decode_cost(cost_rows(3)[:30]),
        "rotary_frequencies": charts.rotary_frequencies(),
        "rotary_frequencies, close": charts.rotary_frequencies(channels=16, theta=500_000.0, factor=1, trained=512),
        "needle": charts.needle(needle_rows(("RoPE", "window", "YaRN"), 5, 3)),
        "needle, many": charts.needle(needle_rows(("a", "b", "c", "d", "e"), 10, 1)),
        "coactivation": charts.coactivation(
            pairs, null=null_of_pairs, order=sorted(range(64), key=lambda e: e % 4), marked=[(0, 4), (7, 3)]
        ),
        "coactivation, few": charts.coactivation(coactivation_shares(8)[0]),
        "effect_matrix": charts.effect_matrix(
            [{"model": m, "without": a, "on": b, "value": (1.7 if a == b else 0.1) - 0.2 * i + 0.01 * run}
             for i, m in enumerate(("GShard", "DeepSeekMoE")) for run in range(3)
             for a in DOMAINS for b in DOMAINS]
        ),
        "effect_matrix, one": charts.effect_matrix(
            [{"model": "a", "without": a, "on": b, "value": -0.1} for a in "xy" for b in "xy"]
        ),
        "expert_mix": charts.expert_mix(
            [{"expert": e, "kind": kind, "share": 1 + (3 * e + 5 * k) % 7} for e in range(16)
             for k, kind in enumerate(DOMAINS)]
        ),
        "expert_mix, 64": charts.expert_mix([{"expert": e, "kind": "ab"[e % 2], "share": 1} for e in range(64)]),
        "influence": charts.influence(
            [{"part": part, "input": f"token {i}", "output": f"token {j}", "changes": j >= i if part == "a" else i == j}
             for part in "ab" for i in range(8) for j in range(8)]
        ),
        "ablation_matrix": charts.ablation_matrix(
            [{"kind": kind, "effect": effect, "value": 0.9 / (1 + i) ** 2 - 0.01 * j + 0.001 * part, "part": part}
             for i, effect in enumerate(ABLATIONS) for j, kind in enumerate(MANY_KINDS) for part in range(3)],
            overall={effect: 0.5 / (1 + i) ** 2 for i, effect in enumerate(ABLATIONS)}, apart=ABLATIONS[0],
        ),
        "ablation_matrix, one": charts.ablation_matrix(
            [{"kind": "code", "effect": "all experts", "value": -0.1}], overall={"all experts": 0.0}
        ),
        "expert_worth": charts.expert_worth(
            [{"model": m, "expert": e, "counted": 1 + (e * 7 % 5) / 4, "worth": 0.02 * (e % 3) - 0.005}
             for m in ("GShard", "DeepSeekMoE") for e in range(8)]
        ),
        "trend_intervals": charts.trend_intervals(TRENDS),
        "trend_intervals, seeds": charts.trend_intervals(
            [{**row, "seeds": n, "mean": row["mean"] * 8 / n, "low": row["low"] * 10 / n, "high": row["high"] * 8 / n,
              "verdict": row["verdict"] if n > 8 else "inconclusive"} for n in range(8, 11) for row in TRENDS[:2]],
            seeds=10,
        ),
        "launch_counts": charts.launch_counts(
            [{"backend": name, "forward": n, "backward": 2 * n} for name, n in (("loop", 395), ("ours", 4))]
        ),
        "exchange_matrix": charts.exchange_matrix([[90, 30, 40, 12], [20, 80, 9, 8], [1, 2, 99, 3], [0, 7, 6, 50]]),
        "exchange_matrix, large": charts.exchange_matrix([[1000 + p * q for q in range(16)] for p in range(16)]),
        "link_timeline": charts.link_timeline(
            [
                {"lane": f"lane {n}", "group": f"half {n % 2}", "what": what, "start": start, "end": start + 25}
                for n in range(6)
                for what, start in (("dispatch", 40 * n), ("up", 40 * n + 28))
            ],
            spans=[{"start": 90, "end": 130, "text": "waits"}],
        ),
        "link_timeline, bandwidth": charts.link_timeline(
            [
                {"lane": lane, "group": "A", "what": what, "start": start, "end": end, "bandwidth": bandwidth}
                for bandwidth in (25.0, 50.0, 100.0)
                for lane, what, start, end in (
                    ("links", "go", 0, 50 / bandwidth), ("units", "exp", 50 / bandwidth, 1 + 50 / bandwidth),
                )
            ],
            unit="ms", bandwidth=50.0,
        ),
        "scaling_curve": charts.scaling_curve(scaling_rows(), tokens=4096, bandwidth=50.0, schedule="in turn"),
        "bank_groups": charts.bank_groups(
            {"as it lies": [list(range(8))] * 8, "swizzled": [[p ^ r for p in range(8)] for r in range(8)]}, 3
        ),
        "product_speed": charts.product_speed(speed_rows("hopper", "mma", "triton"), dense=speed_rows("dense")),
        "product_speed, one": charts.product_speed(speed_rows("hopper")[:2]),
        "roofline": charts.roofline(POINTS, peak=989e12, bandwidth=3.35e12, device="H100, bfloat16"),
        "roofline, tokens": charts.roofline(token_points(), peak=989e12, bandwidth=3.35e12, tokens=1024),
        "roofline, one": charts.roofline(POINTS[1:2], peak=2e11, bandwidth=4e10),
        "specialization_against_null": charts.specialization_against_null(specialization_rows(4, 64)),
        "specialization_against_null, layers": charts.specialization_against_null(
            [{key: row[key] for key in row if key != "expert"} for row in specialization_rows(5, 1)]
        ),
        "token_routing": charts.token_routing(text, routing(len(text), 4)),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps({name: renderer.stable(chart.to_dict()) for name, chart in every_chart().items()}))
