"""One MoE layer against a float64 loop over tokens, forward and backward, on every backend."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_by_hand import Decision, decide

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers import balance
from dsmoe_lite.layers.dispatch import dispatch
from dsmoe_lite.layers.moe import MoELayer
from dsmoe_lite.layers.router import Routing
from dsmoe_lite.layers.selection import group_of
from dsmoe_lite.routing import metrics
from dsmoe_lite.routing.specialization import specialization

D, F_WIDTH, VOCAB = 16, 8, 64  # of 16 bytes and more, so that "auto" may group them
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the largest output
CONFIGS = {
    "gshard": MoEConfig(
        n_routed_experts=8,
        top_k=2,
        expert_width=F_WIDTH,
        norm_topk_prob=True,
        capacity_factor=0.7,
        eval_capacity_factor=0.7,
    ),
    "switch": MoEConfig(
        n_routed_experts=8, top_k=1, expert_width=F_WIDTH, capacity_factor=0.8, eval_capacity_factor=0.8
    ),
    "hash": MoEConfig(n_routed_experts=8, top_k=1, expert_width=F_WIDTH, scoring_func="hash"),
    "deepseekmoe": MoEConfig(n_routed_experts=16, top_k=4, expert_width=F_WIDTH, n_shared_experts=2),
    "deepseek-v2": MoEConfig(
        n_routed_experts=12,
        top_k=3,
        expert_width=F_WIDTH,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=3.0,
        group_capacity_factor=0.8,
        never_drop_share=0.3,
    ),
    "deepseek-v3": MoEConfig(
        n_routed_experts=12,
        top_k=3,
        expert_width=F_WIDTH,
        n_shared_experts=1,
        scoring_func="sigmoid",
        expert_bias=True,
        norm_topk_prob=True,
        n_group=3,
        topk_group=2,
        group_score="top2",
        routed_scaling_factor=2.5,
    ),
    "expert choice": MoEConfig(n_routed_experts=8, top_k=2, expert_width=F_WIDTH, chooser="expert"),
    "every expert": MoEConfig(n_routed_experts=4, top_k=4, expert_width=F_WIDTH),
}


def make_layer(config: MoEConfig, seed: int = 0) -> MoELayer:
    torch.manual_seed(seed)
    layer = MoELayer(D, config, VOCAB).double()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    if config.expert_bias:
        layer.router.expert_bias.normal_(std=0.5)
    return layer


def by_hand(layer: MoELayer, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """y_t = sum of gate * FFN over the experts that keep token t, one token at a time."""
    config, (B, S, _) = layer.router.config, x.shape
    flat, w = x.flatten(0, 1), layer.experts
    if config.scoring_func == "hash":
        home = [int(layer.router.hash_table[token]) for token in tokens.flatten()]
        one = torch.ones((), dtype=x.dtype)
        decision = Decision([], [[e] for e in home], [[one] for _ in home], set(enumerate(home)))
    else:
        bias = layer.router.expert_bias.tolist() if config.expert_bias else None
        logits = torch.stack([layer.router.weight @ row for row in flat])
        decision = decide(config, logits, (B, S), training=layer.training, bias=bias)
    rows = [torch.zeros(D, dtype=x.dtype) for _ in range(B * S)]
    for t, (ids, gates) in enumerate(zip(decision.chosen, decision.gates, strict=True)):
        for e, gate in zip(ids, gates, strict=True):
            if (t, e) in decision.kept:
                hidden = F.silu(w.gate[e] @ flat[t]) * (w.up[e] @ flat[t])
                rows[t] = rows[t] + gate * (w.down[e] @ hidden)
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
    if CONFIGS[name].capacity_factor is not None or CONFIGS[name].group_capacity_factor is not None:
        assert not routing.kept.all(), "the case should drop tokens"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.data())
def test_dispatch_sorts_by_expert_and_loses_nothing(T: int, E: int, data: st.DataObject) -> None:
    K = data.draw(st.integers(1, E))
    layer = make_layer(MoEConfig(n_routed_experts=E, top_k=K, expert_width=F_WIDTH), seed=T)
    x = torch.randn(1, T, D, dtype=torch.float64)
    _, routing = layer(x)
    dispatched = dispatch(x[0], routing)
    counts = dispatched.ends.diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist()
    owner = [e for e in range(E) for _ in range(counts[e])]
    pairs = [(e, int(t)) for e, t in zip(owner, dispatched.token, strict=True)]
    assert pairs == sorted((int(e), t) for t in range(T) for e in routing.topk_ids[t])
    assert torch.equal(dispatched.x_sorted, x[0][dispatched.token])


@st.composite
def moe_configs(draw: st.DrawFn) -> MoEConfig:
    """Any layer that MoEConfig accepts."""
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    experts, factor = groups * size, st.none() | st.floats(0.2, 2.0)
    shared, scale = draw(st.integers(0, 2)), draw(st.sampled_from([1.0, 2.5]))
    common = {"expert_width": F_WIDTH, "n_shared_experts": shared, "routed_scaling_factor": scale}
    kind = draw(st.sampled_from(["token", "token", "token", "expert", "hash"]))
    if kind == "hash":
        return MoEConfig(n_routed_experts=experts, top_k=1, scoring_func="hash", capacity_factor=draw(factor), **common)
    scoring = draw(st.sampled_from(["softmax", "sigmoid"]))
    if kind == "expert":
        return MoEConfig(
            n_routed_experts=experts,
            top_k=draw(st.integers(1, experts)),
            scoring_func=scoring,
            chooser="expert",
            **common,
        )
    reach = draw(st.integers(1, groups))
    K = draw(st.integers(1, reach * size))
    normalised = K > 1 and draw(st.booleans())
    return MoEConfig(
        n_routed_experts=experts,
        top_k=K,
        scoring_func=scoring,
        noisy_gating=draw(st.booleans()),
        expert_bias=draw(st.booleans()),
        n_group=groups,
        topk_group=reach,
        group_score=draw(st.sampled_from(["max", "top2"])) if size > 1 else "max",
        norm_topk_prob=normalised,
        scale_normalised=draw(st.booleans()),
        second_choice=draw(st.sampled_from(["all", "random"])) if K == 2 and normalised else "all",
        capacity_factor=draw(factor),
        eval_capacity_factor=draw(factor),
        group_capacity_factor=draw(factor) if groups > 1 else None,
        never_drop_share=draw(st.floats(0, 1)),
        **common,
    )


EVERY_ROUTER = {
    "softmax": {},
    "V3": {"scoring_func": "sigmoid", "expert_bias": True, "norm_topk_prob": True, "n_group": 2, "group_score": "top2"},
    "V2": {"n_group": 4, "topk_group": 2, "group_capacity_factor": 1.0},
    "GShard": {"norm_topk_prob": True, "second_choice": "random", "capacity_factor": 1.0},
    "Shazeer": {"norm_topk_prob": True, "noisy_gating": True},
    "hash": {"scoring_func": "hash", "top_k": 1},
    "expert choice": {"chooser": "expert"},
}


@pytest.mark.parametrize("backend", ["loop", "padded", "grouped"])
@pytest.mark.parametrize("design", EVERY_ROUTER)
def test_a_batch_without_tokens_goes_forward_and_back(design: str, backend: str) -> None:
    values = {"n_routed_experts": 8, "top_k": 2, "expert_width": F_WIDTH, "n_shared_experts": 1, "backend": backend}
    layer = MoELayer(D, MoEConfig(**(values | EVERY_ROUTER[design])), VOCAB)
    for shape in ((0, 4), (3, 0)):
        x = torch.randn(*shape, D, requires_grad=True)
        y, routing = layer(x, torch.zeros(shape, dtype=torch.int64))
        assert y.shape == x.shape
        assert not routing.counts.any()
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert all(weight.grad is None or not weight.grad.any() for weight in layer.parameters())


@settings(max_examples=150, deadline=None)
@given(moe_configs(), st.integers(0, 3), st.integers(0, 6), st.booleans(), st.sampled_from(list(TOLERANCE)), st.data())
def test_every_kept_assignment_is_computed_once(
    config: MoEConfig, B: int, S: int, training: bool, dtype: torch.dtype, data: st.DataObject
) -> None:
    layer = make_layer(config, seed=data.draw(st.integers(0, 9))).to(dtype).train(training)
    layer.experts.backend = data.draw(st.sampled_from(["loop", "padded", "auto"]))
    x, tokens = torch.randn(B, S, D).to(dtype), torch.randint(0, VOCAB, (B, S))
    y, routing = layer(x, tokens)
    E, T, ids = config.n_routed_experts, B * S, routing.topk_ids
    high = torch.promote_types(dtype, torch.float32)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert routing.logits.dtype == routing.scores.dtype == routing.gates.dtype == high
    assert routing.scores.shape == (T, E)
    assert ids.shape == routing.gates.shape == routing.kept.shape
    assert int(routing.counts.sum()) == int((ids >= 0).sum())

    # Who was chosen: distinct experts within reach, or exactly balanced
    rows = [[e for e in row if e >= 0] for row in ids.tolist()]
    assert all(len(set(row)) == len(row) for row in rows)
    assert all(e < E for row in ids.tolist() for e in row)
    if config.chooser == "expert":
        assert routing.counts.tolist() == [-(-T * config.top_k // E)] * E
        padding = ids < 0
        assert not routing.gates[padding].any()
        assert torch.equal(routing.kept, ~padding)
    else:
        assert ids.shape == (T, config.top_k)
        assert not ids.numel() or int(ids.min()) >= 0
        groups = ids // (E // config.n_group)
        assert all(len(set(row)) <= config.topk_group for row in groups.tolist())

    # What was computed: each kept pair once, with its own gate
    weight = torch.zeros(T, E, dtype=high)
    for t in range(T):
        for k in range(ids.shape[1]):
            if routing.kept[t, k]:
                weight[t, ids[t, k]] += routing.gates[t, k].detach()
    dispatched = dispatch(x.flatten(0, 1), routing)
    owner = torch.repeat_interleave(torch.arange(E), dispatched.ends.diff(prepend=torch.zeros(1, dtype=torch.int32)))
    pairs = sorted(zip(dispatched.token.tolist(), owner.tolist(), strict=True))
    assert pairs == sorted((t, int(ids[t, k])) for t, k in routing.kept.nonzero().tolist())
    flat, w = x.flatten(0, 1).double(), layer.experts
    hidden = F.silu(flat @ w.gate.double().mT) * (flat @ w.up.double().mT)  # (E, T, F)
    expected = ((hidden @ w.down.double().mT) * weight.T.unsqueeze(2)).sum(dim=0)
    if layer.shared is not None:
        expected = expected + layer.shared.double()(flat)
    size = float(expected.detach().abs().max()) if T else 0.0
    torch.testing.assert_close(y.flatten(0, 1).double(), expected, rtol=0, atol=TOLERANCE[dtype] * (1 + size))

    # The decision itself, where nothing was drawn and nothing rounded
    random = training and (config.noisy_gating or config.second_choice == "random")
    if dtype == torch.float64 and config.scoring_func != "hash" and not random:
        bias = layer.router.expert_bias.tolist() if config.expert_bias else None
        decision = decide(config, routing.logits.detach(), (B, S), training=training, bias=bias)
        assert rows == decision.chosen
        assert set(pairs) == decision.kept
        gates = [float(gate) for row in decision.gates for gate in row]
        assert routing.gates[ids >= 0].tolist() == pytest.approx(gates, rel=1e-10, abs=1e-15)
    check_figures(routing, config)


def check_figures(routing: Routing, config: MoEConfig) -> None:
    """Every loss and metric is a finite number, 0 where there are no tokens."""
    device_of = group_of(config.n_routed_experts, config.n_group)
    figures = {
        "importance": balance.importance_loss(routing),
        "gshard": balance.gshard_loss(routing),
        "switch": balance.switch_loss(routing),
        "z": balance.z_loss(routing),
        "expert": balance.expert_loss(routing),
        "sequence": balance.sequence_loss(routing),
        "sequence, selected": balance.sequence_loss(routing, selected=True),
        "device": balance.device_loss(routing, device_of=device_of),
        "communication": balance.communication_loss(routing, device_of=device_of, topk_group=config.topk_group),
        "max_vio": torch.tensor(metrics.max_vio(routing)),
        "drop_rate": torch.tensor(metrics.drop_rate(routing)),
        "load": metrics.load(routing),
        "specialization": specialization(routing.topk_ids, torch.zeros(len(routing.scores)), 2, routing.n_experts),
    }
    if routing.noise_scale is not None:
        figures["load loss"] = balance.load_loss(routing)
    for name, value in figures.items():
        assert torch.isfinite(value).all(), name
        assert (value >= -1e-9).all(), name
        if not len(routing.scores):
            assert not value.any(), name
    total = sum(value for value in figures.values() if value.requires_grad)
    if isinstance(total, torch.Tensor):
        (gradient,) = torch.autograd.grad(total, routing.logits)
        assert torch.isfinite(gradient).all()


def test_a_token_that_every_expert_refuses_gets_zero() -> None:
    layer = make_layer(
        MoEConfig(n_routed_experts=4, top_k=1, expert_width=F_WIDTH, capacity_factor=0.01, eval_capacity_factor=0.01)
    )
    y, routing = layer(torch.randn(1, 50, D, dtype=torch.float64))
    refused = ~routing.kept.any(dim=1)
    assert refused.sum() >= 46
    assert not y[0][refused].any()
    assert y[0][~refused].any()


def test_one_token_batch() -> None:
    y, routing = make_layer(CONFIGS["deepseekmoe"])(torch.randn(1, 1, D, dtype=torch.float64))
    assert y.shape == (1, 1, D)
    assert routing.batch_shape == (1, 1)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(2, 3, 9), r"shape of x = \(2, 3, 9\): must be \(batch, sequence, 8\)"),
        (torch.zeros(3, 8), r"shape of x = \(3, 8\): must be"),
        (torch.zeros(1, 2, 3, 8), r"shape of x = \(1, 2, 3, 8\): must be"),
        (torch.zeros(2, 3, 8, dtype=torch.int64), "dtype of x = torch.int64: must be that of the weights, torch.f"),
        (torch.zeros(2, 3, 8, dtype=torch.float64), "dtype of x = torch.float64"),
        (torch.zeros(2, 3, 8, dtype=torch.bfloat16), "dtype of x = torch.bfloat16"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["loop", "padded", "grouped", "auto"])
@pytest.mark.parametrize("shared", [0, 1])
def test_an_input_that_does_not_fit_is_named(x: torch.Tensor, said: str, backend: str, shared: int) -> None:
    config = MoEConfig(n_routed_experts=4, top_k=2, expert_width=8, n_shared_experts=shared, backend=backend)
    with pytest.raises(InputError, match=said):
        MoELayer(8, config, 32)(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_takes_both_dtypes(dtype: torch.dtype) -> None:
    layer = MoELayer(8, MoEConfig(n_routed_experts=4, top_k=2, expert_width=8, n_shared_experts=1), 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(2, 3, 8, dtype=dtype))[0].isfinite().all()
