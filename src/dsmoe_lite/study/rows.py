"""Rows for charts and tables, computed from the records of runs."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from dsmoe_lite.common.stats import mean_and_half_width, paired
from dsmoe_lite.study.ledger import METRICS, Claim, Trend, differences

Records = Sequence[Mapping[str, Any]]

SHOWN_METRICS = {  # the name in charts -> the metric in the ledger
    "held-out loss": "loss",
    "recall, frequent people": "recall, frequent people",
    "recall, rare people": "recall, rare people",
}


def metric_rows(records: Records, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows {model, seed, metric, value} of the models in `names` (name in the grid -> name to show), in that order."""
    return [
        {"model": shown_name, "seed": record["seed"], "metric": shown_metric, "value": METRICS[metric](record)}
        for shown_metric, metric in SHOWN_METRICS.items()
        for name, shown_name in names.items()
        for record in records
        if record["model_name"] == name
    ]


def curve_gaps(records: Records, names: Mapping[str, str], baseline: str, window: int) -> list[dict[str, Any]]:
    """Rows {model, seed, step, loss}: training loss minus the baseline's with the same seed, mean of `window` steps."""
    curves = {(record["model_name"], record["seed"]): record["losses"] for record in records}
    rows = []
    for (name, seed), losses in curves.items():
        if name in names and (baseline, seed) in curves:
            gaps = [loss - other for loss, other in zip(losses, curves[baseline, seed], strict=True)]
            for end in range(window, len(gaps) + 1, window):
                row = {"model": names[name], "seed": seed, "step": end, "loss": mean(gaps[end - window : end])}
                rows.append(row)
    return rows


def overtaken_at(rows: Sequence[Mapping[str, Any]], model: str) -> int:
    """The last step in `curve_gaps` at which `model` is not below the baseline, in the mean over seeds."""
    by_step: dict[int, list[float]] = {}
    for row in rows:
        if row["model"] == model:
            by_step.setdefault(row["step"], []).append(row["loss"])
    return max((step for step, losses in by_step.items() if mean(losses) >= 0), default=0)


def gaps(records: Records, model: str, other: str, metric: str) -> dict[int, float]:
    """`metric` of `model` minus that of `other` for each seed that both have: they saw the same text in the same order.

    metric: one of SHOWN_METRICS.
    """
    value = {(r["model_name"], r["seed"]): METRICS[SHOWN_METRICS[metric]](r) for r in records}
    seeds = sorted(seed for name, seed in value if name == model and (other, seed) in value)
    return {seed: value[model, seed] - value[other, seed] for seed in seeds}


def balance_rows(records: Records, names: Mapping[str, tuple[str, str]], baseline: str) -> list[dict[str, Any]]:
    """Rows {method, family, seed, gap, max_vio, overflow} on held-out text, the last two as means over MoE layers.

    names: name in the grid -> (method to show, its family). gap: loss minus the baseline's with the same seed; seeds
    that the baseline lacks are left out.
    """
    baseline_loss = {record["seed"]: record["heldout_loss"] for record in records if record["model_name"] == baseline}
    return [
        {
            "method": names[name][0],
            "family": names[name][1],
            "seed": record["seed"],
            "gap": record["heldout_loss"] - baseline_loss[record["seed"]],
            **{field: mean(layer[field] for layer in record["heldout_experts"]) for field in ("max_vio", "overflow")},
        }
        for name in names
        for record in records
        if record["model_name"] == name and record["seed"] in baseline_loss
    ]


def trend_rows(claims: Sequence[Claim], records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows {label, place, mean, low, high, verdict, survives, margins} of the tested trends, those of a place together.

    Effects are positive in the direction that the paper reports. margins: the ends of the margin of "equal" and "not
    above". survives: the claim also holds if corrected over all claims of its protocol.
    """
    rows = [
        effect_row(claim, list(differences(claim.trend, records).values()))
        for claim in claims
        if claim.trend is not None and claim.verdict != "not tested"
    ]
    places = [row["place"] for row in rows]
    return sorted(rows, key=lambda row: places.index(row["place"]))


def effect_row(claim: Claim, found: Sequence[float]) -> dict[str, Any]:
    """The row of one claim whose trend found these differences, one per seed."""
    trend = claim.trend
    assert trend is not None
    result, sign = paired(found), 1 if trend.expected == "above" else -1
    low, high = sorted((sign * result.low, sign * result.high))
    sides = {"equal": (-1, 1), "not above": (-1,)}.get(trend.expected, ())
    return {
        "label": claim.short or _compared(trend),
        "place": claim.source.partition(", ")[2],
        "mean": sign * result.mean,
        "low": low,
        "high": high,
        "verdict": claim.verdict,
        "survives": bool(claim.survives),
        "margins": [side * trend.margin for side in sides],
    }


def _compared(trend: Trend) -> str:
    """What a trend compares, in a few words: two models, or a model before and after an intervention."""
    metric = trend.metric.removeprefix("loss, ").partition(",")[0]
    if trend.other == trend.model:
        return f"{trend.model}: {metric}"
    model = trend.model if metric == "loss" else f"{trend.model} ({metric})"
    beyond = f", beyond {trend.control[0]} - {trend.control[1]}" if trend.control else ""
    return f"{model} - {trend.other}{beyond}"


def needle_rows(records: Records, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows {kind, length, depth, recall, seed} of grid `needle`; depth is the middle of a bin, 0 the start of the text.

    names: kind in the record -> kind to show.
    """
    return [
        {"kind": shown, "length": int(length), "depth": (bin + 0.5) / len(bins), "recall": share, "seed": r["seed"]}
        for kind, shown in names.items()
        for r in records
        for length, bins in r["recall"][kind].items()
        for bin, share in enumerate(bins)
    ]


def needle_gaps(records: Records, kind: str, other: str, length: int) -> dict[int, float]:
    """Mean recall of `kind` minus that of `other` at one length, by seed: both from the same weights and questions."""
    recalls = {r["seed"]: [mean(r["recall"][name][str(length)]) for name in (kind, other)] for r in records}
    return {seed: recall - other_recall for seed, (recall, other_recall) in sorted(recalls.items())}


def seed_line(values: Mapping[int, float]) -> str:
    """One line: the mean ± half its 95% interval, then each seed's value; with fewer than two seeds, no interval."""
    each = " ".join(f"{values[seed]:+.3f}" for seed in sorted(values))
    if len(values) < 2:
        return each or "no run yet"
    middle, half = mean_and_half_width(list(values.values()))
    return f"{middle:+.3f} ± {half:.3f}   {each}"
