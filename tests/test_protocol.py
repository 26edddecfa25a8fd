"""The paper's models at another size: what the paper holds equal stays equal."""

from itertools import pairwise

import pytest

from dsmoe_lite import accounting, pilot
from dsmoe_lite.errors import InputError
from dsmoe_lite.pilot import FACTS
from dsmoe_lite.protocol import MODELS, Tier

TIER = pilot._tier(16)
LADDER = ("gshard", "1+1-of-15", "1+3-of-31", "deepseekmoe", "0+8-of-64", "2+6-of-62", "4+4-of-60")


def experts(name: str) -> tuple[int, int]:
    """Total and active parameters of FFNs and experts, without the router."""
    found = accounting.parameters(TIER.job(name).model)
    parts = (found.dense_ffn, found.routed_experts, found.shared_experts)
    return sum(part.total for part in parts), sum(part.active for part in parts)


def test_one_size_in_all_and_for_a_token() -> None:
    unit = experts("dense")[0]
    assert {experts(name) for name in LADDER} == {(16 * unit, 2 * unit)}
    assert experts("switch") == experts("hash") == (16 * unit, unit)
    assert experts("dense-x4") == (4 * unit, 4 * unit)
    assert experts("dense-x16") == (16 * unit, 16 * unit)
    assert experts("1+3-of-63") == (16 * unit, unit)
    assert experts("gshard-x1.5") == (24 * unit, 3 * unit)
    assert experts("gshard-x1.2")[0] / experts("gshard")[0] == pytest.approx(1.2, abs=0.02)


@pytest.mark.parametrize(("gates", "m4"), [("printed", 1.0), ("softmax", 4.0), ("sigmoid", 4.0)])
def test_gates(gates: str, m4: float) -> None:
    tier = Tier(TIER.dense, TIER.train, TIER.corpus, TIER.vocab_size, gates, TIER.balance)
    fine, coarse = tier.job("deepseekmoe").model.moe, tier.job("gshard").model.moe
    assert fine is not None
    assert coarse is not None
    assert (fine.routed_scaling_factor, coarse.routed_scaling_factor) == (m4, 1.0)
    assert coarse.norm_topk_prob == (gates == "printed")
    assert fine.scoring_func == coarse.scoring_func == ("sigmoid" if gates == "sigmoid" else "softmax")


def test_only_learned_routers_are_balanced() -> None:
    for name in ("dense", "hash"):
        assert TIER.job(name).train.balance == {}
    for name in ("switch", "gshard", "deepseekmoe"):
        assert TIER.job(name).train.balance == {"expert": 0.001}


def test_unknown_gates_are_refused() -> None:
    with pytest.raises(InputError, match="gates = 'tanh'"):
        Tier(TIER.dense, TIER.train, TIER.corpus, TIER.vocab_size, "tanh", TIER.balance)


def test_pilot_runs_read_text_of_their_own() -> None:
    job = FACTS["r16-gshard"]
    starts = [job.seeded(seed, 200).first_document for seed in range(105)]
    read = job.train.steps * job.train.batch_size * job.train.seq_len
    apart = min(b - a for a, b in pairwise(starts))
    assert apart > read / 25, "a document has 25 tokens at least"
    assert set(MODELS) >= {name.split("-", 1)[1] for name in FACTS}
