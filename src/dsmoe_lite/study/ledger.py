"""The ledger of claims, data/claims.yml: what papers claim, what settles it here, and what came out."""

import math
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
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.common.stats import EXPECTED, LEAST_SEEDS, WITH_MARGIN, holm, p_value, paired, trend_verdict
from dsmoe_lite.config import from_dict, read_yaml
from dsmoe_lite.layers.rope import softmax_scale
from dsmoe_lite.presets import preset
from dsmoe_lite.study.grids import grid, records
from dsmoe_lite.study.published import as_printed

PATH = DATA / "claims.yml"
SCHEMA_VERSION = 1
VERDICTS = ("exact", "differs", "holds", "leans", "inconclusive", "reversed", "not tested")
DECIMALS = 4  # of what is stored of runs

EXACT: dict[str, Callable[..., float]] = {
    "parameters": lambda model, count: getattr(parameters(preset(model)), count),
    "expert_parameters": lambda model, count: getattr(parameters(preset(model)).ffn, count),
    "training_flops": lambda model, seq_len: training_flops(preset(model), seq_len).total,
    "formula_flops": formula_flops,
    "combinations": lambda n, k: math.comb(n, k),
    "kv_cache_elements": lambda model: kv_cache_elements(preset(model)),
    "kv_cache_bytes": lambda model, bits: kv_cache_bytes(preset(model), 1, bits),
    "cache_reduction": lambda model, against: 1 - kv_cache_elements(preset(model)) / kv_cache_elements(preset(against)),
    "cache_in_groups": lambda model: _groups(model),
    "yarn_scale": lambda model: _yarn_scale(model),
}

METRICS: dict[str, Callable[[dict[str, Any]], float]] = {
    "loss": lambda record: record["heldout_loss"],
    "recall, frequent people": lambda record: record["recall"]["head"],
    "recall, rare people": lambda record: record["recall"]["tail"],
    "MaxVio": lambda record: mean(layer["max_vio"] for layer in record["heldout_experts"]),
    "loss, shared expert swapped": lambda record: record["shared_swapped"]["heldout_loss"],
    "loss, 4 routed experts": lambda record: record["active"]["4"]["heldout_loss"],
    "rise, best experts masked": lambda record: (
        mean(found["heldout_loss"] for found in record["masked"].values()) - record["heldout_loss"]
    ),
    "needles at 256, RoPE": lambda record: mean(record["recall"]["plain"]["256"]),
    "needles at 256, YaRN": lambda record: mean(record["recall"]["yarn"]["256"]),
    "needles at 256, RoPE trained on": lambda record: mean(record["recall"]["plain-extended"]["256"]),
    "needles at 256, YaRN trained on": lambda record: mean(record["recall"]["yarn-extended"]["256"]),
}


@dataclass(frozen=True)
class Exact:
    """A number that one of EXACT computes; it must be the published one, in its unit and to its digits."""

    function: str
    arguments: dict[str, Any]

    def __post_init__(self) -> None:
        require_choice("function", self.function, EXACT)


@dataclass(frozen=True)
class Trend:
    """A difference over the seeds of a grid: `metric` of `model` minus `other_metric` of `other`, seed by seed.

    Claims of one figure are corrected together (Holm). margin: how far apart equals may lie, or how far above `other`
    a model may be that is no worse.
    """

    grid: str
    figure: str
    model: str
    other: str
    metric: str
    expected: str
    other_metric: str | None = None  # None: the same
    margin: float = 0.0

    def __post_init__(self) -> None:
        known = grid(self.grid).jobs
        for name in ("model", "other"):
            require_choice(name, getattr(self, name), known)
        for metric in (self.metric, self.other_metric or self.metric):
            require_choice("metric", metric, METRICS)
        require_choice("expected", self.expected, EXPECTED)
        fits = (self.margin > 0) == (self.expected in WITH_MARGIN)
        require(fits, "margin", self.margin, f"goes with expected = {' or '.join(map(repr, WITH_MARGIN))}")


@dataclass(frozen=True)
class Claim:
    """One claim and what became of it. `where` is a chapter's number and one of its headings."""

    id: str
    says: str  # in our words
    source: str
    published: str  # as printed; of a trend, what the paper found
    where: str = ""
    exact: Exact | None = None
    trend: Trend | None = None
    ours: str = ""
    verdict: str = "not tested"
    why: str = ""

    def __post_init__(self) -> None:
        require(self.exact is None or self.trend is None, "claim", self.id, "has exact or trend, not both")
        require_choice("verdict", self.verdict, VERDICTS)


def load(path: Path = PATH) -> list[Claim]:
    """Read the ledger. InputError names the claim that is wrong, or a schema that is not this package's."""
    values = read_yaml(path)
    version = values.get("schema_version")
    require(version == SCHEMA_VERSION, "schema_version", version, f"{path}: this package reads {SCHEMA_VERSION}")
    found = []
    for entry in values["claims"]:
        try:
            found.append(from_dict(Claim, entry))
        except InputError as error:
            raise InputError(f"{path}: claim {entry.get('id')!r}: {error}") from None
    twice = {claim.id for claim in found if sum(other.id == claim.id for other in found) > 1}
    require(not twice, "claims", sorted(twice), f"{path}: an id stands for one claim")
    return found


def write(claims: Sequence[Claim], path: Path = PATH) -> None:
    """Write the ledger whole."""
    entries = [{key: value for key, value in asdict(claim).items() if value not in (None, "")} for claim in claims]
    for entry in entries:
        if "trend" in entry:
            entry["trend"] = {key: value for key, value in entry["trend"].items() if value not in (None, 0.0)}
    content = {"schema_version": SCHEMA_VERSION, "claims": entries}
    write_text(path, yaml.safe_dump(content, sort_keys=False, width=110, allow_unicode=True))


def settle(claims: Sequence[Claim]) -> list[Claim]:
    """The claims with `ours` and `verdict` recomputed: exact ones from configs, trends from recorded runs."""
    by_figure: dict[str, dict[str, float]] = {}
    trends = {claim.id: claim.trend for claim in claims if claim.trend is not None}
    runs = {name: records(name, diverged=True) for name in {trend.grid for trend in trends.values()}}
    found = {id: differences(trend, runs[trend.grid]) for id, trend in trends.items()}
    for claim in claims:
        if claim.trend is not None and _whole(claim.trend, found[claim.id]):
            p = p_value(list(found[claim.id].values()), claim.trend.expected, claim.trend.margin)
            by_figure.setdefault(claim.trend.figure, {})[claim.id] = p
    corrected = {id: p for p_values in by_figure.values() for id, p in holm(p_values).items()}
    p_values = {id: p for found_in in by_figure.values() for id, p in found_in.items()}
    return [
        _counted(claim)
        if claim.exact is not None
        else _tried(claim, found[claim.id], p_values, corrected)
        if claim.trend is not None
        else replace(claim, ours="", verdict="not tested")
        for claim in claims
    ]


def differences(trend: Trend, found: Sequence[dict[str, Any]]) -> dict[int, float]:
    """The trend's difference of each seed whose two runs are among the records `found` and did not diverge."""
    runs = {(record["model_name"], record["seed"]): record for record in found if "diverged" not in record}
    one, other = METRICS[trend.metric], METRICS[trend.other_metric or trend.metric]
    seeds = [seed for seed in grid(trend.grid).seeds if {(trend.model, seed), (trend.other, seed)} <= set(runs)]
    return {seed: one(runs[trend.model, seed]) - other(runs[trend.other, seed]) for seed in seeds}


def _whole(trend: Trend, found: Mapping[int, float]) -> bool:
    return set(found) == set(grid(trend.grid).seeds)


def _counted(claim: Claim) -> Claim:
    assert claim.exact is not None
    ours = as_printed(EXACT[claim.exact.function](**claim.exact.arguments), claim.published)
    return replace(claim, ours=ours, verdict="exact" if ours == claim.published else "differs")


def _tried(
    claim: Claim, found: Mapping[int, float], p_values: Mapping[str, float], corrected: Mapping[str, float]
) -> Claim:
    trend = claim.trend
    assert trend is not None
    if not _whole(trend, found) or len(found) < LEAST_SEEDS:
        missing = sorted(set(grid(trend.grid).seeds) - set(found))
        return replace(claim, ours=f"n = {len(found)}, seeds missing or diverged: {missing}", verdict="not tested")
    result = paired(list(found.values()))
    p, p_holm = p_values[claim.id], corrected[claim.id]
    ours = (
        f"{result.mean:+.{DECIMALS}f}, 95% from {result.low:+.{DECIMALS}f} to {result.high:+.{DECIMALS}f}, "
        f"n = {result.n}, d_z = {result.effect:+.2f}, p = {p:.2g}, corrected {p_holm:.2g}"
    )
    return replace(claim, ours=ours, verdict=trend_verdict(result, trend.expected, p, p_holm, trend.margin))


def by_id(claims: Sequence[Claim], id: str) -> Claim:
    """The claim of that id; raises InputError naming close ones."""
    known = {claim.id: claim for claim in claims}
    if id in known:
        return known[id]
    close = get_close_matches(id, known, n=3, cutoff=0.3)
    raise InputError(f"claim = {id!r}: there is none; close: {', '.join(close) or 'none'}")


def _groups(model: str) -> float:
    """Groups of GQA with heads of d_h channels whose cache is as large as the model's, layer by layer."""
    config = preset(model)
    return kv_cache_elements(config) / config.n_layers / (2 * config.attention.v_dim)


def _yarn_scale(model: str) -> float:
    """What YaRN multiplies the scale of scores by."""
    attention = preset(model).attention
    assert attention.yarn is not None
    return softmax_scale(attention.qk_dim, attention.yarn) * math.sqrt(attention.qk_dim)
