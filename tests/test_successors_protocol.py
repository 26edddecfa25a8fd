"""The page of the fourth protocol agrees with the code: the pilot, every model, every comparison, the spread."""

from dataclasses import replace
from itertools import combinations
from math import log
from statistics import mean, median, stdev

import numpy as np
from page_tables import rows_below
from scipy.stats import t

from dsmoe_lite.accounting import Count, parameters
from dsmoe_lite.common import paths
from dsmoe_lite.common.stats import seeds_needed
from dsmoe_lite.study import ledger, successors
from dsmoe_lite.study.grids import grid, records
from dsmoe_lite.study.ledger import METRICS

PAGE = (paths.NOTEBOOKS / "13_protocol.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())
COMPARED = (("sigmoid-bias", "softmax-batch"), ("v3", "sigmoid-bias"), ("v3-mtp", "v3"), ("v3-fp8", "v3"), ("v4", "v3"))


def spread(losses: dict[tuple[str, int], float], one: str, other: str) -> float:
    seeds = sorted({seed for _, seed in losses})
    return stdev(losses[one, seed] - losses[other, seed] for seed in seeds)


def losses_of(name: str) -> dict[tuple[str, int], float]:
    return {(r["model_name"], r["seed"]): r["heldout_loss"] for r in records(name)}


def test_the_pilot_is_listed_with_its_spread() -> None:
    listed = {(run, int(seed)): cells for run, seed, *cells in rows_below(PAGE, "run")}
    recorded = {
        (r["model_name"], r["seed"]): [f"{r['heldout_loss']:.4f}", f"{METRICS['MaxVio'](r):.3f}"]
        for r in records("successors-pilot")
    }
    assert listed == recorded
    spreads = [spread(losses_of("successors-pilot"), *pair) for pair in COMPARED]
    assert f"standard deviations of {min(spreads):.4f} to {max(spreads):.4f} nats" in WORDS


def test_the_margin_follows_from_runs_of_the_same_length() -> None:
    losses = losses_of("deepseekmoe")
    pairs = list(combinations(sorted({model for model, _ in losses}), 2))
    typical = median(spread(losses, *pair) for pair in pairs)
    assert f"the {len(pairs)} pairs of models have a median of {typical:.4f}." in WORDS
    assert seeds_needed(typical, 0.018) == 5
    neighbours = losses_of("neighbours")
    lead = sum(neighbours["course-dense", seed] - neighbours["course-gshard", seed] for seed in range(5)) / 5
    assert f"leads the dense model of chapter 02 by {lead:.3f} nats" in WORDS


def test_models_have_one_size_and_differ_as_the_table_says() -> None:
    plan, listed = grid("successors"), {name: cells for name, *cells in rows_below(PAGE, "model")}
    assert list(listed) == list(plan.jobs)
    assert plan.protocol == successors.VERSION == 4
    assert plan.seeds == (0, 1, 2, 3, 4)
    assert len({replace(parameters(job.model), mtp=Count(0, 0)) for job in plan.jobs.values()}) == 1
    scores = {"softmax": "softmax", "sigmoid": "sigmoid", "sqrtsoftplus": "root of softplus"}
    for name, (score, balance, groups) in listed.items():
        job = plan.jobs[name]
        moe, train = job.model.moe, job.train
        assert moe is not None
        assert score.startswith(scores[moe.scoring_func])
        assert ("table" in score) == (job.model.n_hash_layers == 1)
        assert moe.expert_bias == (train.bias_speed > 0) == (not balance.startswith("loss"))
        assert train.balance == {
            "loss over the batch, weight 0.01": {"expert": 0.01},
            "loss over each sequence, weight 0.01": {"sequence": 0.01},
        }.get(balance, {"sequence": 1e-4})
        assert (train.bias_kappa, train.bias_speed) in ((0.0, 0.0), (0.0, 0.001), (2.0, 0.001))
        assert (train.bias_kappa == 2.0) == (name == "sigmoid-bounded")
        assert groups == (
            "all experts" if moe.n_group == 1 else f"{moe.topk_group} of 8 groups".replace("8 of 8", "all")
        )
        assert (job.model.n_mtp, train.precision) == (int(name == "v3-mtp"), "fp8" if name == "v3-fp8" else "auto")
        assert (train.steps, train.batch_size, train.seq_len, train.lr) == (1200, 32, 64, 0.003)
        assert (moe.swiglu_limit == 10.0) == (name in ("sqrtsoftplus", "v4"))
    assert plan.jobs["v3-fp8"].train.fp8_block == 32
    assert {job.train.steps for job in grid("successors-pilot").jobs.values()} == {600}


def test_comparisons_are_the_claims_of_the_ledger() -> None:
    listed = {id.strip("`"): cells for id, *cells in rows_below(PAGE, "claim")}
    trends = {claim.id: claim.trend for claim in ledger.load() if claim.trend and claim.trend.grid == "successors"}
    assert set(listed) == {id for id, trend in trends.items() if not trend.after_runs}
    for id, cells in listed.items():
        trend = trends[id]
        margin = f"{trend.margin:g}" if trend.margin else "-"
        assert cells == [trend.figure, trend.model, trend.other, trend.metric, trend.expected, margin]
        assert trend.control is None
        assert trend.other_metric is None


def power_of_equality(deviation: float, margin: float, n: int) -> float:
    """How often n seeds show two equal models equal within the margin, by drawing: two one-sided t-tests at 5%."""
    drawn = np.random.default_rng(0).normal(0, deviation, (20_000, n))
    half = t.ppf(0.95, n - 1) * drawn.std(axis=1, ddof=1) / np.sqrt(n)
    return float((np.abs(drawn.mean(axis=1)) + half < margin).mean())


def test_seeds_for_the_margins_of_fp8() -> None:
    """As planned, from the spread of earlier runs, and as found, for the words of chapter 13."""
    losses = losses_of("successors")
    planned = 0.0103 / mean(losses["v3", seed] for seed in range(5))  # of the logarithm of the loss
    assert power_of_equality(0.0103, 0.02, 5) > 0.8
    assert "it would take more than 150." in WORDS
    assert power_of_equality(planned, 0.0025, 150) < 0.8
    found = spread({key: log(loss) for key, loss in losses.items()}, "v3-fp8", "v3")
    assert power_of_equality(found, 0.0025, 55) < 0.8 < power_of_equality(found, 0.0025, 65)
    (chapter,) = paths.NOTEBOOKS.glob("13_*.py")
    words = " ".join(chapter.read_text(encoding="utf-8").replace("\n#", " ").split())
    assert "by the spread that we found, it takes about 60." in words
