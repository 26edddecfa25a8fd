"""The ledger of claims, data/claims.yml: what papers claim, how we test it, and the verdict."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from dsmoe_lite.accounting import formula_flops, kv_cache_bytes, kv_cache_elements, parameters, training_flops
from dsmoe_lite.common.errors import InputError, require, require_choice
from dsmoe_lite.common.files import write_text
from dsmoe_lite.common.paths import find_data
from dsmoe_lite.common.schema import require_schema
from dsmoe_lite.common.stats import EXPECTED, LEAST_SEEDS, LEVEL, WITH_MARGIN, holm, p_value, paired, trend_verdict
from dsmoe_lite.common.yaml_files import read_yaml
from dsmoe_lite.config import from_dict
from dsmoe_lite.layers.rope import softmax_scale
from dsmoe_lite.presets import preset
from dsmoe_lite.study.grids import grid, missing, records
from dsmoe_lite.study.published import as_printed

PATH = find_data("claims.yml")
SCHEMA_VERSION = 1
VERDICTS = ("exact", "differs", "holds", "leans", "inconclusive", "reversed", "not tested")
DECIMALS = 4  # of the stored results of trends


def _cache_in_groups(model: str) -> float:
    """Groups of GQA, with heads of d_h channels, whose cache per layer is as large as the model's."""
    config = preset(model)
    return kv_cache_elements(config) / config.n_layers / (2 * config.attention.v_dim)


def _yarn_scale(model: str) -> float:
    """The factor by which YaRN multiplies attention scores."""
    attention = preset(model).attention
    assert attention.yarn is not None
    return softmax_scale(attention.qk_dim, attention.yarn) * math.sqrt(attention.qk_dim)


EXACT: dict[str, Callable[..., float]] = {
    "parameters": lambda model, count: getattr(parameters(preset(model)), count),
    "expert_parameters": lambda model, count: getattr(parameters(preset(model)).ffn, count),
    "training_flops": lambda model, seq_len: training_flops(preset(model), seq_len).total,
    "formula_flops": formula_flops,
    "combinations": lambda n, k: math.comb(n, k),
    "kv_cache_elements": lambda model: kv_cache_elements(preset(model)),
    "kv_cache_bytes": lambda model, bits: kv_cache_bytes(preset(model), 1, bits),
    "cache_reduction": lambda model, against: 1 - kv_cache_elements(preset(model)) / kv_cache_elements(preset(against)),
    "cache_in_groups": _cache_in_groups,
    "yarn_scale": _yarn_scale,
}


def _rise(record: Mapping[str, Any], changed: Mapping[str, Any]) -> float:
    """By how many bits per byte an intervention raises the held-out loss."""
    rise = changed["heldout_loss"] - record["heldout_loss"]
    return float(rise * record["heldout_bits_per_byte"]["all"] / record["heldout_loss"])


def _best_sixteenth(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The results with each token's best sixteenth of the routed experts masked, and silenced."""
    n_experts = record["model"]["moe"]["n_routed_experts"]
    return record["masked"][str(1 / 16)], record["silenced"][str(round(n_experts / 16))]


METRICS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "loss": lambda record: record["heldout_loss"],
    "logarithm of the loss": lambda record: math.log(record["heldout_loss"]),
    "recall, frequent people": lambda record: record["recall"]["head"],
    "recall, rare people": lambda record: record["recall"]["tail"],
    "MaxVio": lambda record: mean(layer["max_vio"] for layer in record["heldout_experts"]),
    "loss, shared expert swapped": lambda record: record["shared_swapped"]["heldout_loss"],
    "loss, 3 routed experts": lambda record: record["active"]["3"]["heldout_loss"],
    "loss, 4 routed experts": lambda record: record["active"]["4"]["heldout_loss"],
    "rise, best experts masked": lambda record: (
        mean(masked["heldout_loss"] for masked in record["masked"].values()) - record["heldout_loss"]
    ),
    "bits per byte": lambda record: record["heldout_bits_per_byte"]["all"],
    "rise, best sixteenth replaced": lambda record: _rise(record, _best_sixteenth(record)[0]),
    "gain of replacements, best sixteenth": lambda record: (
        _rise(record, _best_sixteenth(record)[1]) - _rise(record, _best_sixteenth(record)[0])
    ),
    "rise, shared expert swapped": lambda record: _rise(record, record["shared_swapped"]),
    "rise, best routed expert replaced": lambda record: _rise(
        record, record["masked"][str(1 / record["model"]["moe"]["n_routed_experts"])]
    ),
    "domain in the choice": lambda record: mean(layer["uncertainty"] for layer in record["domain_use"]["trained"]),
    "domain in the choice, untrained": lambda record: mean(record["domain_use"]["untrained"]),
    "needles at 256, RoPE": lambda record: mean(record["recall"]["plain"]["256"]),
    "needles at 256, YaRN": lambda record: mean(record["recall"]["yarn"]["256"]),
    "needles at 256, RoPE trained on": lambda record: mean(record["recall"]["plain-extended"]["256"]),
    "needles at 256, YaRN trained on": lambda record: mean(record["recall"]["yarn-extended"]["256"]),
}


@dataclass(frozen=True)
class Exact:
    """A number computed by one of EXACT. It must equal the published one, in its unit and to its last digit."""

    function: str
    arguments: dict[str, Any]

    def __post_init__(self) -> None:
        require_choice("function", self.function, EXACT)


@dataclass(frozen=True)
class Trend:
    """A paired difference over the seeds of a grid: `metric` of `model` minus `other_metric` of `other`.

    The p-values of one figure's claims are corrected together (Holm). margin: the largest difference that still counts
    as "equal" or "not above". control: two more models, whose difference in the same metrics is subtracted.
    """

    grid: str
    figure: str
    model: str
    other: str
    metric: str
    expected: str
    other_metric: str | None = None  # None: the same as `metric`
    margin: float = 0.0
    control: tuple[str, str] | None = None
    after_runs: bool = False  # chosen after the runs were seen: exploration, whatever its verdict

    def __post_init__(self) -> None:
        known = grid(self.grid).jobs
        for name in ("model", "other"):
            require_choice(name, getattr(self, name), known)
        for model in self.control or ():
            require_choice("control", model, known)
        for metric in (self.metric, self.other_metric or self.metric):
            require_choice("metric", metric, METRICS)
        require_choice("expected", self.expected, EXPECTED)
        fits = (self.margin > 0) == (self.expected in WITH_MARGIN)
        remedy = f"must be above 0 if expected is {' or '.join(map(repr, WITH_MARGIN))}, and 0 otherwise"
        require(fits, "margin", self.margin, remedy)


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, our result and the verdict."""

    id: str
    says: str  # the claim in our words
    source: str
    published: str  # as printed; for a trend, what the paper found
    short: str = ""  # the claim for a chart, in at most 44 characters
    where: str = ""  # the chapter's number and heading that test it, as in "07, Figure 4"
    exact: Exact | None = None
    trend: Trend | None = None
    ours: str = ""  # our result
    verdict: str = "not tested"
    survives: bool | None = None  # a claim of a protocol that holds: also if corrected over all of its claims?
    why: str = ""
    easy: str = ""  # why the claim could hardly have failed here

    def __post_init__(self) -> None:
        require(self.exact is None or self.trend is None, "claim", self.id, "must have exact or trend, not both")
        require_choice("verdict", self.verdict, VERDICTS)


def load(path: Path = PATH) -> list[Claim]:
    """Read the ledger. Raises InputError if its schema version is unknown, or naming the claim that is wrong."""
    values = read_yaml(path)
    require_schema(values.get("schema_version"), {SCHEMA_VERSION}, "restore the file from the repository", path)
    claims = []
    for entry in values["claims"]:
        try:
            claims.append(from_dict(Claim, entry))
        except InputError as error:
            raise InputError(f"{path}: claim {entry.get('id')!r}: {error}") from None
    repeated = sorted(id for id, count in Counter(claim.id for claim in claims).items() if count > 1)
    require(not repeated, "claims", repeated, f"{path}: an id must be unique")
    return claims


def write(claims: Sequence[Claim], path: Path = PATH) -> None:
    """Write the ledger atomically."""
    entries = [{key: value for key, value in asdict(claim).items() if value not in (None, "")} for claim in claims]
    for entry in entries:
        if "trend" in entry:
            entry["trend"] = {key: value for key, value in entry["trend"].items() if value}
    content = {"schema_version": SCHEMA_VERSION, "claims": entries}
    write_text(path, yaml.safe_dump(content, sort_keys=False, width=110, allow_unicode=True))


def settle(claims: Sequence[Claim]) -> list[Claim]:
    """Return the claims with `ours` and `verdict` computed anew: exact ones from configs, trends from recorded runs."""
    trends = {claim.id: claim.trend for claim in claims if claim.trend is not None}
    runs = {name: records(name, diverged=True) for name in {trend.grid for trend in trends.values()}}
    gaps = {id: differences(trend, runs[trend.grid]) for id, trend in trends.items()}
    p_values = {id: p_value(list(gaps[id].values()), trend.expected, trend.margin)
                for id, trend in trends.items() if _is_complete(trend, gaps[id])}  # fmt: skip
    by_figure = _corrected(p_values, {id: trend.figure for id, trend in trends.items()})
    complete = {name for name in runs if not missing(name)}
    protocols = {id: _protocol(trend) if trend.grid in complete else None for id, trend in trends.items()}
    by_protocol = _corrected(p_values, protocols)

    def settled(claim: Claim) -> Claim:
        if claim.exact is not None:
            return _settle_exact(claim, claim.exact)
        if claim.trend is not None:
            tested = claim.id in p_values
            p = (p_values[claim.id], by_figure[claim.id], by_protocol.get(claim.id)) if tested else None
            return _settle_trend(claim, claim.trend, gaps[claim.id], p)
        return replace(claim, ours="", verdict="not tested", survives=None)

    return [settled(claim) for claim in claims]


def differences(trend: Trend, results: Sequence[dict[str, Any]]) -> dict[int, float]:
    """The trend's difference by seed, for seeds with all of its runs among the records `results`, none diverged."""
    runs = {(record["model_name"], record["seed"]): record for record in results if "diverged" not in record}
    metric, other_metric = METRICS[trend.metric], METRICS[trend.other_metric or trend.metric]

    def difference(model: str, other: str, seed: int) -> float:
        return metric(runs[model, seed]) - other_metric(runs[other, seed])

    return {
        seed: difference(trend.model, trend.other, seed) - (difference(*trend.control, seed) if trend.control else 0.0)
        for seed in _seeds(trend)
        if all((model, seed) in runs for model in _models(trend))
    }


def _models(trend: Trend) -> tuple[str, ...]:
    return (trend.model, trend.other, *(trend.control or ()))


def _protocol(trend: Trend) -> int | None:
    """The protocol that fixed the trend before its runs, or None."""
    return None if trend.after_runs else grid(trend.grid).protocol


def _corrected(p_values: Mapping[str, float], families: Mapping[str, object]) -> dict[str, float]:
    """Correct p-values within each family by Holm's method; those of family None are left out."""
    corrected: dict[str, float] = {}
    for family in {families[id] for id in p_values} - {None}:
        corrected |= holm({id: p for id, p in p_values.items() if families[id] == family})
    return corrected


def _is_complete(trend: Trend, gaps: Mapping[int, float]) -> bool:
    return set(gaps) == set(_seeds(trend))


def _seeds(trend: Trend) -> list[int]:
    """The seeds that all models of a trend have."""
    plan = grid(trend.grid)
    return [seed for seed in plan.seeds_of(trend.model) if all(seed in plan.seeds_of(m) for m in _models(trend))]


def _settle_exact(claim: Claim, exact: Exact) -> Claim:
    ours = as_printed(EXACT[exact.function](**exact.arguments), claim.published)
    return replace(claim, ours=ours, verdict="exact" if ours == claim.published else "differs")


def _settle_trend(
    claim: Claim, trend: Trend, gaps: Mapping[int, float], p_values: tuple[float, float, float | None] | None
) -> Claim:
    """Settle a trend by its p-value: as it is, corrected within its figure, and over all claims of its protocol."""
    if p_values is None or len(gaps) < LEAST_SEEDS:
        missing = sorted(set(_seeds(trend)) - set(gaps))
        ours = f"n = {len(gaps)}, seeds missing or diverged: {missing}"
        return replace(claim, ours=ours, verdict="not tested", survives=None)
    result = paired(list(gaps.values()))
    p, corrected, over_all = p_values
    ours = (
        f"{result.mean:+.{DECIMALS}f}, 95% from {result.low:+.{DECIMALS}f} to {result.high:+.{DECIMALS}f}, "
        f"n = {result.n}, d_z = {result.effect:+.2f}, p = {p:.2g}, corrected {corrected:.2g}"
    )
    verdict = trend_verdict(result, trend.expected, p, corrected, trend.margin)
    survives = None if over_all is None or verdict != "holds" else over_all < LEVEL
    if over_all is not None:
        ours += f", over all {over_all:.2g}"
    return replace(claim, ours=ours, verdict=verdict, survives=survives)


def by_id(claims: Sequence[Claim], id: str) -> Claim:
    """Return the claim with this id. Raises InputError naming close ids if there is none."""
    known = {claim.id: claim for claim in claims}
    if id in known:
        return known[id]
    close = get_close_matches(id, known, n=3, cutoff=0.3)
    raise InputError(f"claim = {id!r}: there is no such claim; close ids: {', '.join(close) or 'none'}")
