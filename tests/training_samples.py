"""Small models and batches for the tests of training."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from dsmoe_lite.checkpoint import save_training
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.data.batches import Batches
from dsmoe_lite.data.tokenizer import load_tokenizer
from dsmoe_lite.data.world import World, WorldConfig
from dsmoe_lite.model import Transformer
from dsmoe_lite.presets import preset
from dsmoe_lite.training.config import TrainConfig

WORLD = WorldConfig(n_entities=40, n_control=8, n_head=8, n_tail=8, n_documents=400, n_heldout=100)
CONFIG = TrainConfig(steps=12, batch_size=4, seq_len=32, warmup_steps=3, checkpoint_every=1)
SMALL = replace(preset("course-gshard"), d_model=32, max_seq_len=64)
V3 = MoEConfig(
    n_routed_experts=8,
    top_k=2,
    expert_width=16,
    n_shared_experts=1,
    scoring_func="sigmoid",
    expert_bias=True,
    norm_topk_prob=True,
    n_group=4,
    topk_group=2,
    group_score="top2",
)


@cache
def small_world() -> tuple[World, Tokenizer]:
    world = World(WORLD)
    return world, load_tokenizer(world, 512)


def make(
    seed: int = 0, moe: MoEConfig | None = SMALL.moe, batch_size: int = CONFIG.batch_size, **changes: Any
) -> tuple[Transformer, Batches]:
    """A model with these experts and other changes, and batches of the small world."""
    world, tokenizer = small_world()
    torch.manual_seed(seed)
    model = Transformer(replace(SMALL, moe=moe, vocab_size=tokenizer.get_vocab_size(), **changes))
    return model, Batches(world, tokenizer, batch_size, CONFIG.seq_len)


def save_then_die_at(step: int) -> Callable[..., None]:
    """A stand-in for save_training that saves, and raises KeyboardInterrupt after this step."""

    def save(path: Path, model: Transformer, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        save_training(path, model, optimizer, state)
        if len(state["losses"]) == step:
            raise KeyboardInterrupt

    return save
