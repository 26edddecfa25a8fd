"""Recorded runs as the rows that charts and tables of several chapters take."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from dsmoe_lite.common.stats import mean_and_half_width, paired
from dsmoe_lite.study.ledger import Claim, differences

Records = Sequence[Mapping[str, Any]]

METRICS = {
    "held-out loss": lambda record: record["heldout_loss"],
    "recall, frequent people": lambda record: record["recall"]["head"],
    "recall, rare people": lambda record: record["recall"]["tail"],
}


def metric_rows(records: Records, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows {model, seed, metric, value} of the models in `names` (name in the grid -> name to show), in that order."""
    return [
        {"model": shown, "seed": record["seed"], "metric": metric, "value": value_of(record)}
        for metric, value_of in METRICS.items()
        for name, shown in names.items()
        for record in records
        if record["model_name"] == name
    ]


def curve_gaps(records: Records, names: Mapping[str, str], baseline: str, window: int) -> list[dict[str, Any]]:
    """Rows {model, seed, step, loss}: training loss minus the baseline's of the same seed, means of `window` steps."""
    curves = {(record["model_name"], record["seed"]): record["losses"] for record in records}
    return [
        {"model": names[name], "seed": seed, "step": end, "loss": mean(a - b for a, b in both[end - window : end])}
        for (name, seed), losses in curves.items()
        if name in names and (baseline, seed) in curves
        for both in [list(zip(losses, curves[baseline, seed], strict=True))]
        for end in range(window, len(both) + 1, window)
    ]


def overtaken_at(rows: Sequence[Mapping[str, Any]], model: str) -> int:
    """The last step of `curve_gaps` up to which `model` is not below the baseline, in the mean over seeds."""
    by_step: dict[int, list[float]] = {}
    for row in rows:
        if row["model"] == model:
            by_step.setdefault(row["step"], []).append(row["loss"])
    return max((step for step, found in by_step.items() if mean(found) >= 0), default=0)


def gaps(records: Records, model: str, other: str, metric: str) -> dict[int, float]:
    """`metric` of `model` minus that of `other`, by seed that both have: they saw the same text in the same order."""
    value = {(r["model_name"], r["seed"]): METRICS[metric](r) for r in records}
    seeds = sorted(seed for name, seed in value if name == model and (other, seed) in value)
    return {seed: value[model, seed] - value[other, seed] for seed in seeds}


def balance_rows(records: Records, names: Mapping[str, tuple[str, str]], baseline: str) -> list[dict[str, Any]]:
    """Rows {method, family, seed, gap, max_vio, overflow} on held-out text, the last two as means over MoE layers.

    names: name in the grid -> (method to show, its family). gap: loss minus the baseline's of the same seed; seeds that
    the baseline lacks are left out.
    """
    of_baseline = {record["seed"]: record["heldout_loss"] for record in records if record["model_name"] == baseline}
    return [
        {
            "method": names[name][0],
            "family": names[name][1],
            "seed": record["seed"],
            "gap": record["heldout_loss"] - of_baseline[record["seed"]],
            **{field: mean(layer[field] for layer in record["heldout_experts"]) for field in ("max_vio", "overflow")},
        }
        for name in names
        for record in records
        if record["model_name"] == name and record["seed"] in of_baseline
    ]


def masked_rows(records: Records, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows {model, seed, share, loss}: held-out loss with that share of each token's best experts out of reach."""
    return [
        {"model": names[r["model_name"]], "seed": r["seed"], "share": float(share), "loss": found["heldout_loss"]}
        for r in records
        if r["model_name"] in names
        for share, found in {"0": r, **r["masked"]}.items()
    ]


def active_rows(records: Records, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows {model, seed, active, loss}: held-out loss with so many routed experts a token, those of training too."""
    return [
        {"model": names[r["model_name"]], "seed": r["seed"], "active": int(active), "loss": found["heldout_loss"]}
        for r in records
        if r["model_name"] in names
        for active, found in {**r["active"], r["model"]["moe"]["top_k"]: r}.items()
    ]


def trend_rows(claims: Sequence[Claim], records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows {what, figure, mean, low, high, verdict, limits} of claims that are trends, in their order.

    limits: where the margin of "equal" and "not above" ends. Claims that are not tested are left out.
    """
    rows = []
    for claim in claims:
        trend = claim.trend
        if trend is None or claim.verdict == "not tested":
            continue
        found = paired(list(differences(trend, records).values()))
        measured = trend.metric.removeprefix("loss, ").partition(",")[0]
        of_itself = f"{trend.model}: {measured}"
        model = trend.model if measured == "loss" else f"{trend.model} ({measured})"
        sides = {"equal": (-1, 1), "not above": (1,)}.get(trend.expected, ())
        expected = trend.expected + (f" {trend.margin:g}" if trend.expected == "not above" else "")
        rows.append(
            {
                "what": of_itself if trend.other == trend.model else f"{model} - {trend.other}",
                "figure": f"{claim.source.partition(', ')[2]}: {expected}",
                "mean": found.mean,
                "low": found.low,
                "high": found.high,
                "verdict": claim.verdict,
                "limits": [side * trend.margin for side in sides],
            }
        )
    return rows


def needle_rows(records: Records, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows {kind, length, depth, recall, seed} of grid `needle`; depth is the middle of its bin.

    Depth 0 is the beginning of the text. names: kind in the record -> kind to show.
    """
    return [
        {"kind": shown, "length": int(length), "depth": (place + 0.5) / len(bins), "recall": share, "seed": r["seed"]}
        for kind, shown in names.items()
        for r in records
        for length, bins in r["recall"][kind].items()
        for place, share in enumerate(bins)
    ]


def needle_gaps(records: Records, kind: str, other: str, length: int) -> dict[int, float]:
    """Mean recall of `kind` minus that of `other` at one length, by seed: same weights at first, same questions."""
    found = {r["seed"]: [mean(r["recall"][name][str(length)]) for name in (kind, other)] for r in records}
    return {seed: a - b for seed, (a, b) in sorted(found.items())}


def seed_line(values: Mapping[int, float]) -> str:
    """Mean ± half its 95% interval, then each seed's value, as one line; fewer than two seeds have no interval."""
    each = " ".join(f"{values[seed]:+.3f}" for seed in sorted(values))
    if len(values) < 2:
        return each or "no run yet"
    middle, half = mean_and_half_width(list(values.values()))
    return f"{middle:+.3f} ± {half:.3f}   {each}"
