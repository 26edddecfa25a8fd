"""What was tried, on seeds 100 to 104 only, before the protocol of the paper's experiments was fixed."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dsmoe_lite.config import AttentionConfig, ModelConfig
from dsmoe_lite.data.world import WorldConfig
from dsmoe_lite.job import CorpusConfig, Job
from dsmoe_lite.protocol import Tier
from dsmoe_lite.train import TrainConfig

SEEDS = (100, 101, 102, 103, 104)


def _world(n_relations: int) -> WorldConfig:
    """960 people, whose relations share eight lists of 32 values: every word is one token."""
    return WorldConfig(
        n_entities=960,
        n_control=32,
        n_relations=n_relations,
        n_value_lists=8,
        n_documents=20_000_000,
        shares=(0.9, 0.0, 0.03, 0.03, 0.04),
    )


def _tier(n_relations: int, width: int = 32, **changes: Any) -> Tier:
    """Two layers; `width` is that of the model and of a standard FFN."""
    dense = ModelConfig(1024, width, 2, AttentionConfig(4, width // 4), width, max_seq_len=256)
    train = TrainConfig(600, batch_size=64, seq_len=64, lr=5e-3)
    corpus = CorpusConfig(world=_world(n_relations))
    return replace(Tier(dense, train, corpus, 1024, "sigmoid", balance=0.001), **changes)


def _tries(tiers: Mapping[str, Tier], *models: str) -> dict[str, Job]:
    return {f"{label}-{model}": tier.job(model) for label, tier in tiers.items() for model in models}


# How much there is to know: 15,360 or 30,720 facts.
FACTS = _tries({"r16": _tier(16), "r32": _tier(32)}, "dense", "gshard", "deepseekmoe")
