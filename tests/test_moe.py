"""One MoE layer against a float64 loop over tokens, forward and backward, on every backend."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers.dispatch import dispatch
from dsmoe_lite.layers.experts import choose_backend, run_loop, run_padded
from dsmoe_lite.layers.moe import MoELayer

D, F_WIDTH, VOCAB = 12, 8, 64
CONFIGS = {
    "gshard": MoEConfig(8, 2, F_WIDTH, norm_topk_prob=True, capacity_factor=0.7, eval_capacity_factor=0.7),
    "switch": MoEConfig(8, 1, F_WIDTH, capacity_factor=0.8, eval_capacity_factor=0.8),
    "hash": MoEConfig(8, 1, F_WIDTH, scoring_func="hash"),
    "deepseekmoe": MoEConfig(16, 4, F_WIDTH, n_shared_experts=2),
    "every expert": MoEConfig(4, 4, F_WIDTH),
}


def make_layer(config: MoEConfig, seed: int = 0) -> MoELayer:
    torch.manual_seed(seed)
    layer = MoELayer(D, config, VOCAB).double()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return layer


def by_hand(layer: MoELayer, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """y_t = sum of gate * FFN over the experts that keep token t, one token at a time; capacity counted by hand."""
    config = layer.router.config
    flat, ids = x.flatten(0, 1), tokens.flatten()
    T, E, K = len(flat), config.n_routed_experts, config.top_k
    chosen, gates = [], []
    for t in range(T):
        if config.scoring_func == "hash":
            scores = torch.zeros(E, dtype=x.dtype)
            scores[layer.router.hash_table[ids[t]]] = 1
        else:
            scores = (layer.router.weight @ flat[t]).softmax(dim=0)
        best = sorted(range(E), key=lambda e: (-scores[e].item(), e))[:K]
        g = [scores[e] for e in best]
        chosen.append(best)
        gates.append([value / sum(g) for value in g] if config.norm_topk_prob else g)
    slots = float("inf")
    if config.capacity_factor is not None:
        slots = -(-config.capacity_factor * T * K // E)
    count, rows = [0] * E, [torch.zeros(D, dtype=x.dtype) for _ in range(T)]
    for k in range(K):
        for t in range(T):
            e = chosen[t][k]
            if count[e] < slots:
                w = layer.experts
                hidden = F.silu(w.gate[e] @ flat[t]) * (w.up[e] @ flat[t])
                rows[t] = rows[t] + gates[t][k] * (w.down[e] @ hidden)
            count[e] += 1
    y = torch.stack(rows)
    if layer.shared is not None:
        for part in range(config.n_shared_experts):  # one shared expert after the other
            own = slice(part * F_WIDTH, (part + 1) * F_WIDTH)
            s = layer.shared
            hidden = F.silu(flat @ s.gate.weight[own].T) * (flat @ s.up.weight[own].T)
            y = y + hidden @ s.down.weight[:, own].T
    return y.view_as(x)


@pytest.mark.parametrize("backend", ["loop", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_layer_equals_the_loop_over_tokens(name: str, backend: str) -> None:
    layer = make_layer(CONFIGS[name])
    layer.experts.backend = backend
    x = torch.randn(3, 7, D, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, VOCAB, (3, 7))
    target = torch.randn(3, 7, D, dtype=torch.float64)
    y, routing = layer(x, tokens)
    expected = by_hand(layer, x, tokens)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    weights = [x, *layer.parameters()]
    mine = torch.autograd.grad((y * target).sum(), weights, allow_unused=True)
    theirs = torch.autograd.grad((expected * target).sum(), weights, allow_unused=True)
    for a, b in zip(mine, theirs, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    if CONFIGS[name].capacity_factor is not None:
        assert not routing.kept.all(), "the case should drop tokens"


@pytest.mark.parametrize("counts", [[3, 0, 4, 0], [0, 0, 0, 1], [7, 0, 0, 0], [0, 0, 0, 0], [2, 2, 2, 2]])
def test_backends_agree_with_empty_experts(counts: list[int]) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(4, 6, 5).double(), torch.randn(4, 6, 5).double(), torch.randn(4, 5, 6).double()]
    x = torch.randn(sum(counts), 5, dtype=torch.float64)
    loop = run_loop(x, torch.tensor(counts), *weights)
    torch.testing.assert_close(run_padded(x, torch.tensor(counts), *weights), loop)
    assert loop.shape == x.shape


def test_auto_avoids_padding_a_skewed_load() -> None:
    assert choose_backend(torch.tensor([10, 10, 10, 10, 10, 10, 10, 10])) == "padded"
    assert choose_backend(torch.tensor([80, 0, 0, 0, 0, 0, 0, 0])) == "loop"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.data())
def test_dispatch_sorts_by_expert_and_loses_nothing(T: int, E: int, data: st.DataObject) -> None:
    K = data.draw(st.integers(1, E))
    layer = make_layer(MoEConfig(E, K, F_WIDTH), seed=T)
    x = torch.randn(1, T, D, dtype=torch.float64)
    _, routing = layer(x)
    sent = dispatch(x[0], routing)
    counts = sent.ends.diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist()
    owner = [e for e in range(E) for _ in range(counts[e])]
    pairs = [(e, int(t)) for e, t in zip(owner, sent.token, strict=True)]
    assert pairs == sorted((int(e), t) for t in range(T) for e in routing.topk_ids[t])
    assert torch.equal(sent.x_sorted, x[0][sent.token])


def test_a_token_that_every_expert_refuses_gets_zero() -> None:
    layer = make_layer(MoEConfig(4, 1, F_WIDTH, capacity_factor=0.01, eval_capacity_factor=0.01))
    y, routing = layer(torch.randn(1, 50, D, dtype=torch.float64))
    refused = ~routing.kept.any(dim=1)
    assert refused.sum() >= 46
    assert not y[0][refused].any()
    assert y[0][~refused].any()


def test_one_token_batch() -> None:
    y, routing = make_layer(CONFIGS["deepseekmoe"])(torch.randn(1, 1, D, dtype=torch.float64))
    assert y.shape == (1, 1, D)
    assert routing.batch_shape == (1, 1)
