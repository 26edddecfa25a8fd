"""The page of the third protocol agrees with the code: the pilot, every model, every comparison."""

from math import sqrt
from statistics import stdev

import pytest
from page_tables import rows_below

from dsmoe_lite.accounting import parameters
from dsmoe_lite.common import paths
from dsmoe_lite.common.stats import seeds_needed
from dsmoe_lite.study import common_knowledge, ledger
from dsmoe_lite.study.grids import grid, records
from dsmoe_lite.study.protocol import CPU
from dsmoe_lite.study.rows import gaps

PAGE = (paths.NOTEBOOKS / "07_common_protocol.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())


def test_the_pilot_is_listed() -> None:
    listed = {(run, int(seed)): cells for run, seed, *cells in rows_below(PAGE, "run")}
    recorded = {
        (r["model_name"], r["seed"]): [
            f"{r['heldout_loss']:.4f}",
            f"{r['shared_swapped']['heldout_loss']:.4f}" if "shared_swapped" in r else "-",
        ]
        for r in records("common-pilot")
    }
    assert listed == recorded
    loss = {r["model_name"]: r["heldout_loss"] for r in records("common-pilot")}
    leads = [loss[f"{world}-0+8-of-64-m"] - loss[f"{world}-1+7-of-63-m"] for world in ("rule", "control")]
    assert f"by {leads[0]:.3f} nats with the rule and by {leads[1]:.3f} without it" in WORDS
    assert f"a difference of {leads[0] - leads[1]:.3f}." in WORDS


def test_the_number_of_seeds_follows_from_the_first_protocol() -> None:
    runs = records("paper")
    fine = stdev(gaps(runs, "deepseekmoe", "0+8-of-64", "held-out loss").values())
    coarse = stdev(gaps(runs, "1+1-of-15", "0+2-of-16", "held-out loss").values())
    assert f"standard deviation of {fine:.4f}." in WORDS
    assert (
        f"has {fine * sqrt(2):.4f}: five seeds find 0.030 with 80% power before correction, ten seeds 0.018." in WORDS
    )
    assert f"had {coarse:.4f}, of which five seeds find 0.044." in WORDS
    assert seeds_needed(fine * sqrt(2), 0.030) == seeds_needed(coarse, 0.044) == 5
    assert seeds_needed(fine * sqrt(2), 0.018) == 10


def test_models_are_of_one_size_and_differ_from_the_first_protocol_only_in_their_text() -> None:
    plan, listed = grid("common"), [name for name, _ in rows_below(PAGE, "model")]
    assert listed == list(common_knowledge.MODELS)
    assert set(plan.jobs) == {f"{world}-{name}" for world in ("rule", "control") for name in listed}
    unit = parameters(CPU.dense).ffn.total
    for name, job in plan.jobs.items():
        ffn = parameters(job.model).ffn
        assert (ffn.total, ffn.active) == (16 * unit, 2 * unit)
        assert job.corpus.inflected.n_endings == (4 if name.startswith("rule") else 1)
        assert (job.train.lr, job.train.steps, job.train.balance) == (0.02, 1200, {"expert": 0.001})
        assert len(plan.seeds_of(name)) == (10 if "of-6" in name else 5)
    assert grid("common-pilot").seeds == (100,)
    assert plan.protocol == common_knowledge.VERSION == 3


def test_comparisons_are_the_claims_of_the_ledger() -> None:
    listed = {id.strip("`"): cells for id, *cells in rows_below(PAGE, "claim")}
    trends = {claim.id: claim.trend for claim in ledger.load() if claim.trend and claim.trend.grid == "common"}
    assert set(listed) == set(trends)
    for id, (first, second, control, expected) in listed.items():
        trend = trends[id]
        assert first == f"{trend.model}, {trend.metric}"
        assert second == f"{trend.other}, {trend.other_metric or trend.metric}"
        assert control == (", ".join(trend.control) if trend.control else "-")
        assert expected == trend.expected
        assert trend.margin == 0
        assert trend.figure == "common"  # all are corrected together
        assert not trend.after_runs


def test_the_difference_in_the_control_is_subtracted() -> None:
    trend = ledger.by_id(ledger.load(), "common-rule-widens-lead").trend
    assert trend is not None
    assert trend.control is not None
    losses = {trend.model: 1.0, trend.other: 1.5, trend.control[0]: 2.0, trend.control[1]: 2.125}
    made_up = [
        {"model_name": name, "seed": seed, "heldout_loss": loss + seed * weight}
        for weight, (name, loss) in enumerate(losses.items())
        for seed in (0, 1)
    ]
    # by hand: seed 0 is -0.5 + 0.125; seed 1 adds 0 - 1 - (2 - 3)
    assert ledger.differences(trend, made_up) == pytest.approx({0: -0.375, 1: -0.375})
    without = [record for record in made_up if (record["model_name"], record["seed"]) != (trend.control[0], 1)]
    assert ledger.differences(trend, without) == pytest.approx({0: -0.375})
