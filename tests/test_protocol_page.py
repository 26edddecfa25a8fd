"""The page of the protocol agrees with the code: every pilot run, every family, every comparison."""

from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

from page_tables import rows_below

from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.stats import seeds_needed
from dsmoe_lite.config import from_dict
from dsmoe_lite.study import ledger
from dsmoe_lite.study.grids import GRIDS, grid, records
from dsmoe_lite.study.protocol import CPU, FAMILIES, MODELS, VERSION
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.job import Job

PAGE = (paths.NOTEBOOKS / "07_protocol.md").read_text(encoding="utf-8")


def test_exactly_the_pilot_runs_are_listed() -> None:
    listed = {(f"pilot-{name}", run, int(seed)): cells for name, run, seed, *cells in rows_below(PAGE, "grid")}
    recorded = {
        (name, record["model_name"], record["seed"]): [
            f"{record['train']['lr']:g}",
            f"{record['heldout_loss']:.4f}",
            f"{record['recall']['head']:.3f}",
            f"{record['recall']['tail']:.3f}",
        ]
        for name in GRIDS
        if name.startswith("pilot-")
        for record in records(name)
    }
    assert listed == recorded


def test_families_have_the_gates_and_learning_rates_of_the_tier() -> None:
    rows = {family: cells for family, *cells in rows_below(PAGE, "family")}
    assert set(rows) == set(FAMILIES.values())
    for family, (models, gates, rate) in rows.items():
        assert models.split(", ") == [name for name in MODELS if FAMILIES[name] == family]
        assert gates == CPU.gates.get(family, "-" if family in ("dense", "hash") else "as printed")
        assert float(rate) == CPU.lr.get(family, CPU.train.lr)


def test_comparisons_are_the_claims_of_the_ledger() -> None:
    listed = {id.strip("`"): cells for id, *cells in rows_below(PAGE, "claim")}
    of_paper = {claim.id: claim.trend for claim in ledger.load() if claim.trend and claim.trend.grid == "paper"}
    trends = {id: trend for id, trend in of_paper.items() if not trend.after_runs}
    assert set(listed) == set(trends)
    for id, (figure, first, second, expected) in listed.items():
        trend = trends[id]
        assert trend.figure == f"moe-{figure}"
        assert first == f"{trend.model}, {trend.metric}"
        assert second == f"{trend.other}, {trend.other_metric or trend.metric}"
        assert expected == trend.expected + (f" by {trend.margin:g}" if trend.margin else "")


def test_the_grid_agrees_with_the_page() -> None:
    plan = grid("paper")
    assert f"Version {VERSION}." in PAGE
    assert plan.protocol == VERSION
    assert plan.jobs == CPU.jobs()
    assert f"Seeds 0 to {plan.seeds[-1]}" in PAGE
    assert plan.seeds == tuple(range(len(plan.seeds)))


def test_the_number_of_seeds_follows_from_the_pilot() -> None:
    text = " ".join(PAGE.split())
    runs = [record for name in GRIDS if name.startswith("pilot-") for record in records(name)]

    def chosen(model: str) -> dict[int, float]:
        """Held-out loss by seed of the pilot runs with the settings of the tier."""
        job = CPU.jobs()[model]
        return {r["seed"]: r["heldout_loss"] for r in runs if _is_of(job.seeded(r["seed"], 200), r)}

    dense, gshard, ours = (chosen(model) for model in ("dense", "gshard", "deepseekmoe"))
    differences = [ours[seed] - gshard[seed] for seed in sorted(gshard)]
    assert sorted(gshard) == [100, 101, 102, 103, 104]
    assert ", ".join(f"{d:+.3f}" for d in differences[:-1]) + f" and {differences[-1]:+.3f}" in text
    assert f"standard deviation {stdev(differences):.4f}." in text
    assert seeds_needed(stdev(differences), 0.012) == len(grid("paper").seeds) == 10
    lead = dense[100] - gshard[100]
    assert f"lead of {lead:.3f} here DeepSeekMoE's would be {lead * 0.059 / 0.193:.3f}." in text


def test_chapter_says_what_the_pilot_found_about_gates() -> None:
    """At the final rate, on three seeds: DeepSeekMoE as printed, and GShard with both kinds of gates."""
    pilot = [r for name in GRIDS if name.startswith("pilot-") for r in records(name)]

    def loss(model: str, gates: str) -> float:
        job = CPU.job_of(model, gates, CPU.train.lr)
        return fmean(next(r["heldout_loss"] for r in pilot if _is_of(job.seeded(s, 200), r)) for s in (100, 101, 102))

    chapter = " ".join((paths.NOTEBOOKS / "07_paper_experiments.py").read_text(encoding="utf-8").split())
    divided = loss("gshard", "printed")
    assert f"{loss('deepseekmoe', 'printed'):.3f} against {divided:.3f}, mean of three seeds" in chapter
    assert f"led by {loss('gshard', 'softmax') - divided:.3f} on three seeds" in chapter.replace(" # ", " ")


def _is_of(job: Job, record: dict[str, Any]) -> bool:
    """Whether a record has the settings of this job, except the first document and how much the pilot recorded."""
    every = from_dict(TrainConfig, record["train"]).routing_every
    same = replace(job, first_document=record["first_document"], train=replace(job.train, routing_every=every))
    try:
        replace(same, masked=(), active=()).check_record({**record, "masked": {}, "active": {}})
    except InputError:
        return False
    return True
