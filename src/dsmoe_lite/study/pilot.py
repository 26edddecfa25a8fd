"""The pilot: what was tried, on seeds 100 to 104 only, before the protocol of the paper's experiments was fixed."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dsmoe_lite.config import AttentionConfig, ModelConfig
from dsmoe_lite.study.protocol import Tier, world
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.job import CorpusConfig, Job

SEEDS = (100, 101, 102, 103, 104)


def _tier(n_relations: int, n_entities: int = 960, d_model: int = 32, batch_size: int = 64, **changes: Any) -> Tier:
    """Two layers, a standard FFN of width 32, 2.46M tokens in steps of 64 * batch_size tokens."""
    dense = ModelConfig(
        vocab_size=1024,
        d_model=d_model,
        n_layers=2,
        attention=AttentionConfig(n_heads=4, head_dim=d_model // 4),
        ffn_width=32,
        max_seq_len=256,
    )
    train = TrainConfig(steps=38_400 // batch_size, batch_size=batch_size, seq_len=64, lr=5e-3)
    corpus = CorpusConfig(world=world(n_entities, n_relations))
    gates = {"gshard": "sigmoid", "deepseekmoe": "sigmoid x m"}
    return replace(Tier(dense, train, corpus, 1024, balance=0.001, gates=gates), **changes)


def _jobs(tiers: Mapping[str, Tier], *models: str) -> dict[str, Job]:
    return {f"{label}-{model}": tier.job(model) for label, tier in tiers.items() for model in models}


def _with_gates(lr: float, **labels: tuple[str, ...]) -> dict[str, Job]:
    """4,096 facts and some kinds of gates for each family; "-m" means times m."""
    return {
        f"{label}-{family}": _tier(
            8, 512, batch_size=32, gates={family: label.replace("-m", " x m")}, lr={family: lr}
        ).job(family)
        for family, kinds in labels.items()
        for label in kinds
    }


# The number of facts: 15,360 or 30,720.
FACTS = _jobs({"r16": _tier(16), "r32": _tier(32)}, "dense", "gshard", "deepseekmoe")
# Both were too many: models recalled at most a fifth. Fewer facts, smaller batches for as many tokens, a wider model.
FEWER = _jobs(
    {
        "e512": _tier(8, 512),
        "e512-b32": _tier(8, 512, batch_size=32),
        "e960-b32": _tier(8, batch_size=32),
        "r16-d64-b32": _tier(16, d_model=64, batch_size=32),
    },
    "gshard",
    "deepseekmoe",
    "dense",
)
# GShard recalled 4,096 facts and the dense model did not; DeepSeekMoE, with its sigmoid gates times 4, recalled hardly
# more than the dense model. Other gates for DeepSeekMoE, and for GShard all of those that differ there.
GATES = _with_gates(
    0.005,
    deepseekmoe=("printed", "softmax-m", "sigmoid", "sigmoid-m"),
    gshard=("printed", "softmax", "sigmoid"),
)
# GShard's sigmoid gates and DeepSeekMoE's softmax times m did best. Do finer experts gain from a wider model, whose
# router sees more channels? FEWER has GShard at r16-d64-b32.
_BEST = {"gshard": "sigmoid", "deepseekmoe": "softmax x m"}
WIDER = _jobs({"r16-d64-b32": _tier(16, d_model=64, batch_size=32, gates=_BEST)}, "deepseekmoe") | _jobs(
    {"e960-d64-b32": _tier(8, d_model=64, batch_size=32, gates=_BEST)}, "gshard", "deepseekmoe"
)
# Four learning rates per family; FEWER and GATES have 0.005 for three families. Also Switch with other gates.
RATES = {
    f"{lr:g}-{family}": _tier(8, 512, batch_size=32, gates=_BEST, lr={family: lr}).job(family)
    for family, rates in {
        "dense": (0.0025, 0.01, 0.02),
        "hash": (0.0025, 0.005, 0.01, 0.02),
        "switch": (0.0025, 0.005, 0.01, 0.02),
        "gshard": (0.0025, 0.01, 0.02),
        "deepseekmoe": (0.0025, 0.01, 0.02),
    }.items()
    for lr in rates
} | _with_gates(0.005, switch=("sigmoid",))
# The highest rate was the best for every family.
HIGHER = {
    f"{lr:g}-{family}": _tier(8, 512, batch_size=32, gates=_BEST, lr={family: lr}).job(family)
    for lr in (0.04, 0.08)
    for family in ("dense", "hash", "switch", "gshard", "deepseekmoe")
}
# The gates again, at four times the learning rate; RATES has those that won in GATES.
GATES_AGAIN = _with_gates(
    0.02,
    deepseekmoe=("printed", "sigmoid", "sigmoid-m"),
    gshard=("printed", "softmax"),
    switch=("sigmoid",),
)
# Twice the facts at that rate: facts about rare people are no longer memorised.
MORE = _jobs(
    {"e960-b32-0.02": _tier(8, batch_size=32, gates=_BEST, lr=dict.fromkeys(("dense", "gshard", "deepseekmoe"), 0.02))},
    "gshard",
    "deepseekmoe",
    "dense",
)
# At that rate the gates ranked differently, by hundredths on one seed. So three gates of each of two families on two
# more seeds. RATES and GATES_AGAIN have seed 100.
FINALISTS = _with_gates(
    0.02,
    gshard=("printed", "softmax", "sigmoid"),
    deepseekmoe=("printed", "softmax-m", "sigmoid"),
)
# GShard's printed gates, which are normalised, were far better than its others, and DeepSeekMoE had not been tried with
# normalised gates. So DeepSeekMoE with them times m: what GShard's gates become if its experts are cut into m.
NORMALISED = _with_gates(0.02, deepseekmoe=("normalised-m",))
# The best gates of each family on the last two seeds, to measure the spread over seeds.
LAST = {name: FINALISTS[name] for name in ("printed-gshard", "softmax-m-deepseekmoe")} | NORMALISED
