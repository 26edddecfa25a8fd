"""Coarse and fine experts, trained briefly on the world: results lie in the intervals recorded for chapter 04."""

from dataclasses import replace

import pytest
import torch

from dsmoe_lite import MoEConfig, TrainConfig, Transformer, preset, train
from dsmoe_lite.data.batches import Batches, heldout_batches
from dsmoe_lite.data.tokenizer import load_tokenizer
from dsmoe_lite.data.world import World
from dsmoe_lite.evaluate import heldout_loss
from dsmoe_lite.layers.router import Routing
from dsmoe_lite.routing.coactivation import coactivation, coactivation_null
from dsmoe_lite.routing.specialization import specialization

PIECES = (1, 2, 4)  # of an expert; gates are multiplied by their number


def domains_served(routing: Routing, labels: torch.Tensor, n_domains: int) -> torch.Tensor:
    """The effective number of domains of each expert that met at least 50 tokens."""
    share = specialization(routing.topk_ids, labels, n_domains, routing.n_experts)[:, routing.counts >= 50]
    mix = share / share.sum(dim=0, keepdim=True)
    return torch.special.entr(mix).sum(dim=0).exp()


@pytest.mark.slow
def test_short_runs_of_coarse_and_fine_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals: four standard deviations over seeds 0 to 4. They guard against mistakes and cannot rank the models."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)
    world = World()
    tokenizer = load_tokenizer(world, 1024)
    held_out = heldout_batches(world, tokenizer, 64, 64, 8)
    tokens, labels = held_out[0].tokens[:, :-1], held_out[0].domains[:, :-1].flatten()
    config = TrainConfig(steps=300, batch_size=16, seq_len=64, lr=3e-3, balance={"expert": 0.01})
    losses, served, routings = {}, {}, []
    for m in PIECES:
        moe = MoEConfig(n_routed_experts=16 * m, top_k=2 * m, expert_width=128 // m, routed_scaling_factor=float(m))
        torch.manual_seed(0)
        model = Transformer(replace(preset("course-dense"), vocab_size=tokenizer.get_vocab_size(), moe=moe))
        train(model, Batches(world, tokenizer, 16, 64), config)
        losses[m] = heldout_loss(model, held_out, world.domains).loss
        with torch.no_grad():
            routings = model.eval()(tokens).routings
        found = [domains_served(routing, labels, len(world.domains)) for routing in routings]
        served[m] = float(torch.cat(found).mean())

    for m in PIECES[1:]:
        assert -0.1 <= losses[m] - losses[1] <= 0.12
    assert 3.1 <= served[1] <= 3.9
    assert -0.6 <= served[4] - served[1] <= 0.5

    together = coactivation(routings[0].topk_ids, 64)
    null = coactivation_null(routings[0].topk_ids, 64, torch.Generator().manual_seed(0), draws=10)
    pairs = ~torch.eye(64, dtype=torch.bool)
    above, below = (together > null.amax(dim=0)) & pairs, (together < null.amin(dim=0)) & pairs
    assert 0.27 <= above.sum() / pairs.sum() <= 0.37
    assert 0.46 <= below.sum() / pairs.sum() <= 0.59
