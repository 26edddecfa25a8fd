"""How hard a balance loss has to pull once a router has settled: intervals recorded for chapter 06, now a test."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsmoe_lite import MoEConfig, TrainConfig, Transformer, preset, train
from dsmoe_lite.data.batches import Batches, heldout_batches
from dsmoe_lite.data.tokenizer import load_tokenizer
from dsmoe_lite.data.world import World


@pytest.mark.slow
def test_a_late_loss_takes_tokens_away_from_their_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train only the vectors of a router that was left alone, to keep its affinities and to be even by weight alpha."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)
    world, E = World(), 16
    tokenizer = load_tokenizer(world, 1024)
    torch.manual_seed(0)
    moe = MoEConfig(n_routed_experts=E, top_k=1, expert_width=128)
    model = Transformer(replace(preset("course-dense"), vocab_size=tokenizer.get_vocab_size(), moe=moe))
    train(model, Batches(world, tokenizer, 16, 64), TrainConfig(steps=300, balance={}, seed=0))
    read: list[torch.Tensor] = []
    router = model.eval().moe_layers[0].router
    router.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    with torch.no_grad():
        scores = model(heldout_batches(world, tokenizer, 64, 64, 1)[0].tokens[:, :-1]).routings[0].scores
    u, had = read[0], scores.argmax(dim=1)

    def pulled(alpha: float) -> tuple[float, float]:
        e = router.weight.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([e], lr=0.02)
        for _ in range(60):
            s = (u @ e.T).softmax(dim=-1)
            f = torch.bincount(s.argmax(dim=1), minlength=E) * E / len(u)
            loss = F.cross_entropy(u @ e.T, scores) + alpha * (f * s.mean(dim=0)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        chosen = (u @ e.T).argmax(dim=1)
        max_vio = float(torch.bincount(chosen, minlength=E).max()) * E / len(u) - 1
        return max_vio, float((chosen == had).float().mean())

    weak, strong = pulled(0.001), pulled(10.0)
    assert 2.0 <= weak[0] - strong[0] <= 15.0
    assert 0.3 <= weak[1] - strong[1] <= 1.0
