"""The page of the second protocol agrees with the code: every try, every model, every comparison, and the pilot."""

import json
from itertools import combinations
from math import sqrt
from statistics import fmean, stdev

import numpy as np
from page_tables import rows_below
from scipy.stats import t as student

from dsmoe_lite.common import paths
from dsmoe_lite.common.stats import seeds_needed
from dsmoe_lite.study import ledger, text_pilot, text_protocol
from dsmoe_lite.study.grids import grid, records
from dsmoe_lite.study.text_pilot import CORPUS_SHA256
from dsmoe_lite.study.text_protocol import LR, MODELS, UNITS

PAGE = (paths.NOTEBOOKS / "07_text_protocol.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())


def test_every_try_is_listed() -> None:
    listed = {(name, run, int(seed)): cells for name, run, seed, *cells in rows_below(PAGE, "grid")}
    recorded = {}
    for path in (paths.DATA / "runs").glob("text-pilot-*/*.json"):
        record, (run, seed) = json.loads(path.read_text(encoding="utf-8")), path.stem.rsplit("-seed", 1)
        train = record["train"]
        recorded[path.parent.name.removeprefix("text-pilot-"), run, int(seed)] = [
            f"{train['steps']}",
            f"{train['batch_size'] * train['seq_len']:,}",
            f"{train['lr']:g}",
            f"{record['heldout_bits_per_byte']['all']:.4f}",
        ]
    assert listed == recorded


def pilot() -> dict[str, dict[float, list[float]]]:
    """Bits per byte of the pilot's six models at both rates, on seeds 100 to 102."""
    found: dict[str, dict[float, list[float]]] = {}
    for seed in text_pilot.SEEDS:
        for name in text_pilot.RATES:
            rate, model = name.split("-", 1)
            for grid_name in ("rates", "spread", "rates-again"):
                path = paths.DATA / "runs" / f"text-pilot-{grid_name}" / f"{name}-seed{seed}.json"
                if path.exists():
                    record = json.loads(path.read_text(encoding="utf-8"))
                    found.setdefault(model, {}).setdefault(float(rate), []).append(
                        record["heldout_bits_per_byte"]["all"]
                    )
    assert all(len(values) == 3 for rates in found.values() for values in rates.values())
    return found


def test_each_model_has_the_better_rate_of_the_pilot() -> None:
    better = {model: min(rates, key=lambda rate: fmean(rates[rate])) for model, rates in pilot().items()}
    assert len(better) == 6
    assert better == {model: LR[model] for model in better}
    assert LR["0+2-of-16-x1.5"] == LR["1+1-of-15"] == better["0+2-of-16"]
    assert LR["0+8-of-64"] == LR["0+8-of-64-m"] == better["1+7-of-63-m"] == better["1+7-of-63"]


def test_the_number_of_seeds_follows_from_the_spread() -> None:
    at_best = {model: rates[LR[model]] for model, rates in pilot().items()}
    spreads = [
        stdev(a - b for a, b in zip(at_best[one], at_best[other], strict=True))
        for one, other in combinations(at_best, 2)
    ]
    spread = sqrt(fmean(value**2 for value in spreads))
    assert f"is {spread:.3f} bits per byte" in WORDS
    assert f"from {min(spreads):.3f} to {max(spreads):.3f}" in WORDS
    assert seeds_needed(spread, 0.046) == 5
    assert seeds_needed(spread, 0.0271) == 10
    lead = fmean(at_best["dense"]) - fmean(at_best["gshard"])
    assert f"lead in the pilot, {lead:.3f}, would be {lead * 0.059 / 0.193:.3f}" in WORDS
    assert f"would be {lead * 0.016 / 0.193:.4f}" in WORDS


def test_models_and_sizes_are_those_of_the_code() -> None:
    rows = {name: cells for name, *cells in rows_below(PAGE, "model")}
    assert list(rows) == list(MODELS) == list(LR)
    for name, (_, gates, units, rate) in rows.items():
        assert units == f"{UNITS[name][0]}, {UNITS[name][1]}"
        assert float(rate) == LR[name]
        printed = {"divided": "printed", "undivided": "softmax", "times m": "softmax x m"}
        if gates != "-" and name != "switch":
            assert MODELS[name][1] == printed[gates]
    assert list(grid("text-long").jobs) == list(MODELS)
    assert tuple(grid("text-short").jobs) == text_protocol.SHORTER
    for name in ("text-short", "text-long"):
        plan = grid(name)
        assert plan.protocol == text_protocol.VERSION == 2
        for model, job in plan.jobs.items():
            assert job.train.lr == LR[model]
            assert job.corpus.sha256 == CORPUS_SHA256
            assert f"{job.train.steps:,} steps (grid `{name}`)" in WORDS
    assert len(grid("text-long").seeds_of("gshard")) == len(grid("text-long").seeds_of("1+7-of-63-m")) == 10


def test_comparisons_are_the_claims_of_the_ledger() -> None:
    listed = {id.strip("`"): cells for id, *cells in rows_below(PAGE, "claim")}
    trends = {claim.id: claim.trend for claim in ledger.load() if claim.trend and claim.trend.grid == "text-long"}
    assert set(listed) == set(trends)
    for id, (first, second, expected) in listed.items():
        trend = trends[id]
        assert first == f"{trend.model}, {trend.metric}"
        assert second == f"{trend.other}, {trend.other_metric or trend.metric}"
        assert expected == trend.expected
        assert trend.margin == 0
        assert trend.figure == "text"  # all are corrected together
        assert not trend.after_runs


def test_records_are_of_one_text_and_of_no_pilot_seed() -> None:
    for name in ("text-short", "text-long"):
        for record in records(name, diverged=True):
            assert record["seed"] < 10
            assert "diverged" in record or record["corpus"]["sha256"] == CORPUS_SHA256


def test_the_page_of_results_has_the_means_of_the_records() -> None:
    page = (paths.NOTEBOOKS / "pages" / "text_results.md").read_text(encoding="utf-8")
    seen = 0
    for name, steps, seeds, *cells in rows_below(page, "model | steps | seeds"):
        folder = paths.DATA / "runs" / {"750": "text-short", "1,500": "text-long"}[steps]
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{name}-seed?.json"))]
        assert len(runs) == int(seeds)
        bits = np.array([list(run["heldout_bits_per_byte"].values()) for run in runs])
        half = student.ppf(0.975, len(runs) - 1) * bits.std(axis=0, ddof=1) / np.sqrt(len(runs))
        of_all, *of_domains = bits.mean(axis=0)
        assert cells[0].split() == [f"{of_all:.3f}", "±", f"{half[0]:.3f}"]
        assert cells[1:-1] == [f"{mean:.3f}" for mean in of_domains]
        assert (cells[-1] == "-") == (name == "dense")
        seen += len(runs)
    assert seen == 100
