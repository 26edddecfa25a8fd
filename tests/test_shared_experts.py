"""A model with a shared expert, shipped or trained briefly: results lie in the intervals recorded for chapter 05."""

from dataclasses import replace

import pytest
import torch

from dsmoe_lite import MoEConfig, TrainConfig, Transformer, load_model, preset, train
from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.data.batches import Batches, heldout_batches
from dsmoe_lite.data.tokenizer import load_tokenizer, read_tokenizer
from dsmoe_lite.data.world import World
from dsmoe_lite.evaluate import heldout_loss
from dsmoe_lite.routing.contributions import contributions
from dsmoe_lite.routing.interventions import mask_top, swap_shared, with_active

WORLD = World()
GSHARD, DEEPSEEKMOE = (DATA / "models" / f"world-{name}.safetensors" for name in ("gshard", "deepseekmoe"))


def test_the_best_experts_carry_most_and_four_active_ones_are_enough() -> None:
    tokenizer = read_tokenizer(read_metadata(DEEPSEEKMOE)["tokenizer"])
    parts = heldout_batches(WORLD, tokenizer, 64, 64, 2)
    gshard, model = load_model(GSHARD), load_model(DEEPSEEKMOE)

    def loss(changed: Transformer) -> float:
        return heldout_loss(changed, parts, WORLD.domains).loss

    intact = {"gshard": loss(gshard), "ours": loss(model)}
    rise = {
        (name, share): loss(mask_top(one, share)) - intact[name]
        for name, one in (("gshard", gshard), ("ours", model))
        for share in (1 / 16, 1 / 4)
    }
    assert 0.2 <= rise["ours", 1 / 16] - rise["gshard", 1 / 16] <= 0.6
    assert -0.3 <= rise["ours", 1 / 4] - rise["gshard", 1 / 4] <= 0.2
    assert 0.5 <= rise["gshard", 1 / 16] / rise["gshard", 1 / 4] <= 0.65
    assert 0.75 <= rise["ours", 1 / 16] / rise["ours", 1 / 4] <= 0.95

    assert -0.015 <= intact["gshard"] - intact["ours"] <= 0.02
    assert -0.015 <= loss(with_active(model, 4)) - intact["gshard"] <= 0.02
    assert 0.005 <= loss(with_active(model, 3)) - intact["ours"] <= 0.04

    shares = []
    for shared, routed in contributions(model, parts[0].tokens[:, :-1]):
        ours, others = shared.norm(dim=1), routed.norm(dim=1)
        shares.append((ours / (ours + others)).mean().item())
    assert 0.2 <= shares[0] <= 0.27
    assert 0.1 <= shares[1] <= 0.2


@pytest.mark.slow
def test_short_runs_with_and_without_a_shared_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals: four standard deviations over seeds 0 to 4. They guard against mistakes and cannot rank the models."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(WORLD, 1024)
    held_out = heldout_batches(WORLD, tokenizer, 64, 64, 8)
    config = TrainConfig(steps=250, batch_size=16, seq_len=64, lr=3e-3, balance={"expert": 0.01})
    losses = {}
    for shared in (0, 1):
        moe = MoEConfig(
            n_routed_experts=64 - shared,
            top_k=8 - shared,
            expert_width=32,
            n_shared_experts=shared,
            routed_scaling_factor=4.0,
        )
        torch.manual_seed(0)
        model = Transformer(replace(preset("course-dense"), vocab_size=tokenizer.get_vocab_size(), moe=moe))
        train(model, Batches(WORLD, tokenizer, 16, 64), config)
        losses[shared] = heldout_loss(model, held_out, WORLD.domains).loss
    assert -0.12 <= losses[1] - losses[0] <= 0.1
    assert 0.0 <= heldout_loss(swap_shared(model, 1), held_out, WORLD.domains).loss - losses[1] <= 0.05
