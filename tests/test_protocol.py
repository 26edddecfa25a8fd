"""The paper's models at another size: what the paper holds equal stays equal."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from dsmoe_lite import accounting
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.study import pilot
from dsmoe_lite.study.pilot import FACTS
from dsmoe_lite.study.protocol import CPU, FAMILIES, GPU, MODELS
from dsmoe_lite.training.job import Job

TIER = pilot._tier(16)
LADDER = ("gshard", "0+2-of-16", "1+1-of-15", "1+3-of-31", "deepseekmoe", "0+8-of-64", "2+6-of-62", "4+4-of-60")


def experts(name: str) -> tuple[int, int]:
    """Total and active parameters of FFNs and experts, without the router."""
    count = accounting.parameters(TIER.job(name).model)
    parts = (count.dense_ffn, count.routed_experts, count.shared_experts)
    return sum(part.total for part in parts), sum(part.active for part in parts)


def test_total_and_active_sizes_are_those_of_the_paper() -> None:
    unit = experts("dense")[0]
    assert {experts(name) for name in LADDER} == {(16 * unit, 2 * unit)}
    assert experts("switch") == experts("hash") == (16 * unit, unit)
    assert experts("dense-x4") == (4 * unit, 4 * unit)
    assert experts("dense-x16") == (16 * unit, 16 * unit)
    assert experts("1+3-of-63") == (16 * unit, unit)
    assert experts("gshard-x1.5") == (24 * unit, 3 * unit)
    assert experts("gshard-x1.2")[0] / experts("gshard")[0] == pytest.approx(1.2, abs=0.02)


@pytest.mark.parametrize(
    ("gates", "m4"),
    [
        ("printed", 1.0),
        ("softmax", 1.0),
        ("softmax x m", 4.0),
        ("sigmoid", 1.0),
        ("sigmoid x m", 4.0),
        ("normalised x m", 4.0),
    ],
)
def test_gates(gates: str, m4: float) -> None:
    tier = replace(TIER, gates={"gshard": gates, "deepseekmoe": gates})
    fine, coarse = tier.job("deepseekmoe").model.moe, tier.job("gshard").model.moe
    assert fine is not None
    assert coarse is not None
    assert (fine.routed_scaling_factor, coarse.routed_scaling_factor) == (m4, 1.0)
    assert coarse.norm_topk_prob == (gates in ("printed", "normalised x m"))
    assert fine.norm_topk_prob == (gates == "normalised x m")
    assert fine.scoring_func == coarse.scoring_func == ("sigmoid" if "sigmoid" in gates else "softmax")


def test_a_family_may_have_its_own_learning_rate() -> None:
    tier = replace(TIER, lr={"gshard": 0.5})
    rates = {name: tier.job(name).train.lr for name in MODELS}
    assert {name for name, lr in rates.items() if lr == 0.5} == {"gshard", "gshard-x1.2", "gshard-x1.5"}
    assert {lr for name, lr in rates.items() if FAMILIES[name] != "gshard"} == {TIER.train.lr}


def test_only_learned_routers_are_balanced() -> None:
    for name in ("dense", "hash"):
        assert TIER.job(name).train.balance == {}
    for name in ("switch", "gshard", "deepseekmoe"):
        assert TIER.job(name).train.balance == {"expert": 0.001}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gates": {"gshard": "tanh"}}, "gates = 'tanh'"),
        ({"gates": {"gshrad": "softmax"}}, "family = 'gshrad'"),
        ({"lr": {"gshrad": 0.1}}, "family = 'gshrad'"),
    ],
)
def test_unknown_names_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(TIER, **changes)
    with pytest.raises(InputError, match="model = 'gshrad'"):
        TIER.job("gshrad")


def test_pilot_runs_do_not_share_text() -> None:
    job = FACTS["r16-gshard"]
    starts = [job.seeded(seed, 200).first_document for seed in range(105)]
    n_tokens = job.train.steps * job.train.batch_size * job.train.seq_len
    distance = min(b - a for a, b in pairwise(starts))
    assert distance > n_tokens / 25, "a document has 25 tokens at least"
    assert set(MODELS) >= {name.split("-", 1)[1] for name in FACTS}


def test_a_tier_whose_widths_cannot_be_cut_is_refused_before_anything_trains() -> None:
    assert set(TIER.jobs()) == set(MODELS)
    uncut = replace(TIER, dense=replace(TIER.dense, ffn_width=30))
    with pytest.raises(InputError, match=r"expert parameters = .*: .* needs .* divisible by 4"):
        uncut.jobs()


def test_the_models_of_figures_4_and_5_have_their_evaluations() -> None:
    jobs = TIER.jobs()
    assert {name for name, job in jobs.items() if job.masked} == {"gshard", "gshard-x1.5", "deepseekmoe"}
    assert {name for name, job in jobs.items() if job.active} == {"deepseekmoe"}


def test_the_larger_tier_is_the_smaller_one_enlarged() -> None:
    small, large = CPU.jobs(), GPU.jobs()
    assert {job.device for job in small.values()} == {"cpu"}, "fp32, even on a machine with a GPU"
    assert {job.device for job in large.values()} == {"cuda"}

    def facts(job: Job) -> int:
        return job.corpus.world.n_entities * job.corpus.world.n_relations

    def weights(job: Job) -> int:
        return accounting.parameters(job.model).ffn.total

    def tokens(job: Job) -> int:
        return job.train.steps * job.train.batch_size * job.train.seq_len

    for name, job in small.items():
        assert facts(large[name]) / facts(job) == 16
        assert weights(large[name]) / weights(job) == pytest.approx(16, rel=0.02), "whole channels"
        assert tokens(large[name]) / tokens(job) == 16
        assert large[name].train.lr == job.train.lr * job.model.d_model / large[name].model.d_model
