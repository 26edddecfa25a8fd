"""Balance losses at perfect balance, at collapse, against hand sums, and their gradients."""

import math

import pytest
import torch

from dsmoe_lite.layers.balance import gshard_loss, switch_loss, z_loss
from dsmoe_lite.layers.router import Routing
from dsmoe_lite.routing.metrics import domain_share, drop_rate, load, max_vio


def routing_of(scores: torch.Tensor, ids: torch.Tensor) -> Routing:
    return Routing(
        scores.log(), scores, ids, scores.gather(1, ids), torch.ones_like(ids, dtype=torch.bool), (1, len(ids))
    )


def balanced(E: int = 8, K: int = 2, rounds: int = 4) -> Routing:
    """Uniform scores; the K chosen experts rotate so that each expert is chosen equally often."""
    T = E * rounds
    ids = torch.stack([(torch.arange(T) + k) % E for k in range(K)], dim=1)
    return routing_of(torch.full((T, E), 1 / E, dtype=torch.float64), ids)


def collapsed(E: int = 8, T: int = 32) -> Routing:
    scores = torch.zeros(T, E, dtype=torch.float64)
    scores[:, 3] = 1
    return routing_of(scores, torch.tensor([[3, 0]]).repeat(T, 1))


@pytest.mark.parametrize("E", [2, 8, 64])
def test_values_at_balance_and_at_collapse(E: int) -> None:
    assert float(gshard_loss(balanced(E))) == pytest.approx(1 / E**2, rel=1e-6)
    assert float(switch_loss(balanced(E))) == pytest.approx(1.0, rel=1e-6)
    if E > 3:
        assert float(gshard_loss(collapsed(E))) == pytest.approx(1 / E, rel=1e-6)
        assert float(switch_loss(collapsed(E))) == pytest.approx(E, rel=1e-6)


def test_against_sums_written_from_the_papers() -> None:
    torch.manual_seed(0)
    T, E = 50, 6
    logits = torch.randn(T, E, dtype=torch.float64)
    scores = logits.softmax(dim=-1)
    r = Routing(
        logits, scores, scores.topk(2).indices, scores.topk(2).values, torch.ones(T, 2, dtype=torch.bool), (1, T)
    )
    gshard = switch = z = 0.0
    for e in range(E):
        c = sum(int(scores[t].argmax()) == e for t in range(T))
        m = sum(float(scores[t, e]) for t in range(T)) / T
        gshard += c / T * m / E
        switch += E * (c / T) * m
    for t in range(T):
        z += math.log(sum(math.exp(float(v)) for v in logits[t])) ** 2 / T
    assert float(gshard_loss(r)) == pytest.approx(gshard, rel=1e-6)
    assert float(switch_loss(r)) == pytest.approx(switch, rel=1e-6)
    assert float(z_loss(r)) == pytest.approx(z, rel=1e-9)


def test_z_loss_at_zero_logits() -> None:
    r = balanced(8)
    zero = Routing(torch.zeros(32, 8), r.scores, r.topk_ids, r.gates, r.kept, r.batch_shape)
    assert float(z_loss(zero)) == pytest.approx(math.log(8) ** 2, rel=1e-6)


def test_gradient_flows_through_mean_scores_only() -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 5, dtype=torch.float64, requires_grad=True)
    scores = logits.softmax(dim=-1)
    ids = scores.topk(2).indices
    r = Routing(logits, scores, ids, scores.gather(1, ids), torch.ones_like(ids, dtype=torch.bool), (1, 40))
    (got,) = torch.autograd.grad(switch_loss(r), logits)
    share = torch.tensor([float((ids[:, 0] == e).sum()) / 40 for e in range(5)], dtype=torch.float64)
    s = scores.detach()
    for t in range(40):  # d/dlogit of 5 * sum_e share_e * s_te / 40, softmax's Jacobian by hand
        inner = sum(float(share[e] * s[t, e]) for e in range(5))
        for e in range(5):
            assert float(got[t, e]) == pytest.approx(5 / 40 * float(s[t, e]) * (float(share[e]) - inner), abs=1e-9)


def test_z_loss_gradient_is_twice_the_log_sum_times_the_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    r = balanced(5)
    (got,) = torch.autograd.grad(z_loss(Routing(logits, r.scores, r.topk_ids, r.gates, r.kept, (1, 7))), logits)
    for t in range(7):
        exps = [math.exp(float(v)) for v in logits[t].detach()]
        for e in range(5):
            assert float(got[t, e]) == pytest.approx(2 / 7 * math.log(sum(exps)) * exps[e] / sum(exps), rel=1e-9)


def test_metrics_at_balance_and_at_collapse() -> None:
    assert load(balanced()).tolist() == [1.0] * 8
    assert max_vio(balanced()) == 0
    assert max_vio(collapsed(E=8)) == 8 / 2 - 1
    assert drop_rate(balanced()) == 0


def test_domain_share_counts_assignments() -> None:
    r = routing_of(torch.full((4, 3), 1 / 3), torch.tensor([[0, 1], [0, 2], [1, 2], [1, 0]]))
    share = domain_share(r, torch.tensor([0, 0, 1, 1]), 3)
    assert share.tolist() == [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.0, 0.0, 0.0]]
