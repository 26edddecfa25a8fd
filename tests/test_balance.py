"""Balance losses at perfect balance, at collapse, against sums written from the papers, and their gradients."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers.balance import (
    communication_loss,
    device_loss,
    expert_loss,
    gshard_loss,
    importance_loss,
    load_loss,
    sequence_loss,
    switch_loss,
    update_bias,
    z_loss,
)
from dsmoe_lite.layers.router import Router, Routing
from dsmoe_lite.layers.selection import expert_choice, group_of, ordered_topk
from dsmoe_lite.routing.metrics import drop_rate, load, max_vio

EXACT = 1e-12


def routing_of(scores: Tensor, ids: Tensor, batch_shape: tuple[int, int] | None = None) -> Routing:
    chosen = ids >= 0
    gates = scores.gather(1, ids.clamp(min=0)) * chosen
    return Routing(scores.log(), scores, ids, gates, chosen, batch_shape or (1, len(ids)))


def balanced(E: int = 8, K: int = 2, rounds: int = 4) -> Routing:
    """Uniform scores; the K chosen experts rotate so that each expert is chosen equally often, first and at all."""
    T = E * rounds
    ids = torch.stack([(torch.arange(T) + k) % E for k in range(K)], dim=1)
    return routing_of(torch.full((T, E), 1 / E, dtype=torch.float64), ids, (rounds, E))


def collapsed(E: int = 8, K: int = 1, T: int = 32) -> Routing:
    """Every token chooses the same K neighbours, which share all the mass."""
    scores = torch.zeros(T, E, dtype=torch.float64)
    scores[:, :K] = 1 / K
    return routing_of(scores, torch.arange(K).expand(T, K), (4, T // 4))


def random_routing(seed: int, scoring_func: str = "softmax", T: int = 24, E: int = 8, K: int = 3) -> Routing:
    torch.manual_seed(seed)
    logits = 2 * torch.randn(T, E, dtype=torch.float64)
    return of_logits(logits, scoring_func, K)


def of_logits(logits: Tensor, scoring_func: str = "softmax", K: int = 3, ids: Tensor | None = None) -> Routing:
    scores = logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(dim=-1)
    ids = ordered_topk(scores, K) if ids is None else ids
    return replace(routing_of(scores, ids, (4, len(logits) // 4)), logits=logits)


# Perfect balance and collapse


@pytest.mark.parametrize("E", [2, 8, 64])
def test_losses_of_the_first_choice(E: int) -> None:
    assert float(gshard_loss(balanced(E))) == pytest.approx(1 / E**2, rel=EXACT)
    assert float(switch_loss(balanced(E))) == pytest.approx(1.0, rel=EXACT)
    assert float(gshard_loss(collapsed(E))) == pytest.approx(1 / E, rel=EXACT)
    assert float(switch_loss(collapsed(E))) == pytest.approx(E, rel=EXACT)


@pytest.mark.parametrize(("E", "K", "D"), [(16, 2, 4), (160, 6, 8), (8, 1, 2), (64, 8, 8)])
def test_losses_of_every_choice(E: int, K: int, D: int) -> None:
    device_of = group_of(E, D)
    even, odd = balanced(E, K), collapsed(E, K)  # K neighbours sit on one device: E / D >= K
    for loss in (expert_loss, sequence_loss, lambda r: sequence_loss(r, selected=True)):
        assert float(loss(even)) == pytest.approx(1.0, rel=EXACT)
        assert float(loss(odd)) == pytest.approx(E / K, rel=EXACT)
    assert float(device_loss(even, device_of=device_of)) == pytest.approx(1.0, rel=EXACT)
    assert float(device_loss(odd, device_of=device_of)) == pytest.approx(D, rel=EXACT)


def test_the_printed_oracles() -> None:
    assert float(expert_loss(collapsed(16, 2))) == pytest.approx(8)
    assert float(device_loss(collapsed(16, 2), device_of=group_of(16, 4))) == pytest.approx(4)
    assert float(expert_loss(collapsed(160, 6))) == pytest.approx(26.67, abs=0.005)
    assert float(device_loss(collapsed(160, 6), device_of=group_of(160, 8))) == pytest.approx(8)


@pytest.mark.parametrize(("D", "M"), [(4, 2), (4, 1), (8, 3), (8, 8)])
def test_communication_counts_a_device_once(D: int, M: int) -> None:
    E, T = 4 * D, 2 * D
    device_of, uniform = group_of(E, D), torch.full((T, E), 1 / E, dtype=torch.float64)
    start = torch.arange(T).unsqueeze(1)

    def loss(ids: Tensor, scores: Tensor = uniform) -> float:
        return float(communication_loss(routing_of(scores, ids), device_of=device_of, topk_group=M))

    every = torch.stack([(start[:, 0] + m) % D * 4 for m in range(M)], dim=1)  # one expert on each of M devices
    assert loss(every) == pytest.approx(1.0, rel=EXACT)
    assert loss(torch.cat((every, every + 1), dim=1)) == pytest.approx(1.0, rel=EXACT)  # two on each: sent once
    alone = start % D * 4 + torch.arange(3)  # three experts on one device, devices in turn
    assert loss(alone) == pytest.approx(1 / M, rel=EXACT)
    mass = torch.zeros(T, E, dtype=torch.float64)
    mass[:, :3] = 1 / 3
    assert loss(torch.arange(3).expand(T, 3), mass) == pytest.approx(D / M, rel=EXACT)


@pytest.mark.parametrize("E", [2, 8, 64])
def test_importance_is_0_and_n_minus_1(E: int) -> None:
    assert float(importance_loss(balanced(E))) == pytest.approx(0, abs=EXACT)
    assert float(importance_loss(collapsed(E))) == pytest.approx(E - 1, rel=EXACT)


@pytest.mark.parametrize("E", [2, 8, 64])
def test_load_is_0_and_n_minus_1(E: int) -> None:
    zeros = torch.zeros(32, E, dtype=torch.float64)
    even = replace(of_logits(zeros, K=1), clean_logits=zeros, noise_scale=zeros + 1)
    assert float(load_loss(even)) == pytest.approx(0, abs=EXACT)
    clean = zeros.clone()
    clean[:, 1] = 100
    assert float(load_loss(replace(of_logits(clean, K=1), clean_logits=clean, noise_scale=zeros + 1))) == (
        pytest.approx(E - 1, rel=EXACT)
    )


def test_z_loss_at_zero_logits() -> None:
    for E in (2, 8, 64):
        assert float(z_loss(of_logits(torch.zeros(32, E), K=1))) == pytest.approx(math.log(E) ** 2, rel=1e-6)


# Random routings against sums


def variation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


DEVICES = [0, 0, 1, 2, 2, 2, 3, 1]  # unequal, and not in order


def by_hand(routing: Routing) -> dict[str, float]:
    """Every loss as its paper's sum; -1 in ids is nobody."""
    s, ids, gates = routing.scores.tolist(), routing.topk_ids.tolist(), routing.gates.tolist()
    T, E, K = len(s), len(s[0]), len(ids[0])
    D, M = max(DEVICES) + 1, 2
    (B, S), tokens, experts = routing.batch_shape, range(len(s)), range(len(s[0]))
    s = [[v / sum(row) for v in row] for row in s]  # DeepSeek-V3 Eq 19; softmax sums to 1 already
    assigned = sum(e >= 0 for row in ids for e in row)  # K T where each token chooses K
    f = [E / assigned * sum(e in ids[t] for t in tokens) for e in experts]
    P = [sum(s[t][e] for t in tokens) / T for e in experts]
    first = [sum(ids[t][0] == e for t in tokens) / T for e in experts]
    on = [[e for e in experts if DEVICES[e] == d] for d in range(D)]
    sent = [sum(any(e in ids[t] for e in on[d]) for t in tokens) for d in range(D)]
    unbiased = [sorted(experts, key=lambda e: (-s[t][e], e))[:K] for t in tokens]
    parts = [range(b * S, (b + 1) * S) for b in range(B)]

    def within(chosen: list[list[int]]) -> float:
        total = 0.0
        for part in parts:
            here = sum(e >= 0 for t in part for e in chosen[t])
            for e in experts:
                count = sum(e in chosen[t] for t in part)
                total += E / here * count * sum(s[t][e] for t in part) / S
        return total / B

    of_expert = [sum(g for t in tokens for e, g in zip(ids[t], gates[t], strict=True) if e == i) for i in experts]
    return {
        "importance": variation(of_expert),
        "gshard": sum(first[e] * P[e] for e in experts) / E,
        "switch": E * sum(first[e] * P[e] for e in experts),
        "expert": sum(f[e] * P[e] for e in experts),
        "device": sum(sum(f[e] for e in on[d]) / len(on[d]) * sum(P[e] for e in on[d]) for d in range(D)),
        "communication": sum(D / (M * T) * sent[d] * sum(P[e] for e in on[d]) for d in range(D)),
        "sequence": within(unbiased),
        "sequence, selected": within(ids),
    }


LOSSES: dict[str, Callable[[Routing], Tensor]] = {
    "importance": importance_loss,
    "gshard": gshard_loss,
    "switch": switch_loss,
    "expert": expert_loss,
    "device": lambda r: device_loss(r, device_of=torch.tensor(DEVICES)),
    "communication": lambda r: communication_loss(r, device_of=torch.tensor(DEVICES), topk_group=2),
    "sequence": sequence_loss,
    "sequence, selected": lambda r: sequence_loss(r, selected=True),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "biased", "expert choice"])
def test_against_sums_written_from_the_papers(kind: str, seed: int) -> None:
    routing = random_routing(seed, "softmax" if kind == "softmax" else "sigmoid")
    if kind == "biased":  # others are chosen than those with the best scores
        ids = ordered_topk(routing.scores + torch.randn(8), 3)
        assert not torch.equal(ids, routing.topk_ids)
        routing = routing_of(routing.scores, ids, routing.batch_shape)
    if kind == "expert choice":
        ids = expert_choice(routing.scores, 9)
        assert (ids < 0).any()
        routing = routing_of(routing.scores, ids, routing.batch_shape)
    expected = by_hand(routing)
    assert expected.keys() == LOSSES.keys()
    for name, loss in LOSSES.items():
        assert float(loss(routing)) == pytest.approx(expected[name], rel=EXACT), name


def test_z_loss_is_the_mean_of_squared_logsumexp() -> None:
    routing = random_routing(0)
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in routing.logits.tolist()) / 24
    assert float(z_loss(routing)) == pytest.approx(expected, rel=EXACT)


def noisy(seed: int, K: int, E: int = 6, T: int = 16) -> Routing:
    torch.manual_seed(seed)
    clean, scale = torch.randn(T, E, dtype=torch.float64), torch.rand(T, E, dtype=torch.float64) + 0.2
    logits = clean + torch.randn(T, E, dtype=torch.float64) * scale
    return replace(of_logits(logits, K=K), clean_logits=clean, noise_scale=scale)


@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_load_leaves_each_expert_out_in_turn(seed: int, K: int) -> None:
    routing = noisy(seed, K)
    noisy_logits, clean, scale = routing.logits.tolist(), routing.clean_logits.tolist(), routing.noise_scale.tolist()
    loads = [0.0] * 6
    for t in range(16):
        for i in range(6):
            others = sorted((v for e, v in enumerate(noisy_logits[t]) if e != i), reverse=True)
            u = (clean[t][i] - others[K - 1]) / scale[t][i]
            loads[i] += 0.5 * (1 + math.erf(u / math.sqrt(2)))
    assert float(load_loss(routing)) == pytest.approx(variation(loads), rel=1e-9)


def test_load_is_what_drawing_again_gives() -> None:
    routing, draws = noisy(0, K=2, T=4), 40_000
    torch.manual_seed(1)
    loads = []
    for i in range(6):
        again = routing.logits.unsqueeze(1).repeat(1, draws, 1)  # (T, draws, E), new noise on expert i alone
        noise = torch.randn(4, draws, dtype=torch.float64) * routing.noise_scale[:, i : i + 1]
        again[:, :, i] = routing.clean_logits[:, i : i + 1] + noise
        chosen = (again.topk(2, dim=-1).indices == i).any(dim=-1)
        loads.append(float(chosen.double().mean(dim=1).sum()))
    error = 10 / math.sqrt(draws)  # a load moves by less than 4 * 4 / 2 / sqrt(draws)
    assert float(load_loss(routing)) == pytest.approx(variation(loads), abs=error)


def test_load_of_all_experts_is_even_and_needs_noise() -> None:
    assert float(load_loss(noisy(0, K=6))) == 0
    with pytest.raises(InputError, match=r"load loss: needs noise on the logits; set noisy_gating=True"):
        load_loss(random_routing(0))


def test_device_of_is_checked() -> None:
    routing = random_routing(0)
    for wrong in ([0, 1], [0, 0, 0, 0, 2, 2, 2, 2], [-1, 0, 0, 0, 1, 1, 1, 1]):
        with pytest.raises(InputError, match="device_of = ") as error:
            device_loss(routing, device_of=torch.tensor(wrong))
        assert "\n" not in str(error.value)
    for topk_group in (0, 5):
        with pytest.raises(InputError, match=f"topk_group = {topk_group}: must be 1 to 4"):
            communication_loss(routing, device_of=torch.tensor(DEVICES), topk_group=topk_group)


# Gradients


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", [*LOSSES, "z"])
def test_gradients_are_those_of_finite_differences(name: str, scoring_func: str) -> None:
    loss, ids = {**LOSSES, "z": z_loss}[name], random_routing(3, scoring_func, T=12).topk_ids
    logits = random_routing(3, scoring_func, T=12).logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(of_logits(x, scoring_func, ids=ids)), (logits,))
    (gradient,) = torch.autograd.grad(loss(of_logits(logits, scoring_func)), logits)
    assert gradient.abs().max() > 1e-5


@pytest.mark.parametrize("K", [1, 2])
def test_load_gradient_reaches_logits_and_noise(K: int) -> None:
    routing = noisy(2, K, T=6)
    given = [routing.logits, routing.clean_logits, routing.noise_scale]

    def loss(logits: Tensor, clean: Tensor, scale: Tensor) -> Tensor:
        return load_loss(replace(routing, logits=logits, clean_logits=clean, noise_scale=scale))

    assert torch.autograd.gradcheck(loss, [value.clone().requires_grad_() for value in given])


def test_gradient_flows_through_mean_scores_only() -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 5, dtype=torch.float64, requires_grad=True)
    r = of_logits(logits, K=2)
    (got,) = torch.autograd.grad(switch_loss(r), logits)
    share = [sum(e == first for first, _ in r.topk_ids.tolist()) / 40 for e in range(5)]
    s = r.scores.tolist()
    for t in range(40):  # d/dlogit of 5 * sum_e share_e * s_te / 40, softmax's Jacobian by hand
        inner = sum(share[e] * s[t][e] for e in range(5))
        for e in range(5):
            assert float(got[t, e]) == pytest.approx(5 / 40 * s[t][e] * (share[e] - inner), abs=1e-12)


def test_z_loss_gradient_is_twice_the_log_sum_times_the_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(z_loss(of_logits(logits, K=1)), logits)
    for t in range(7):
        exps = [math.exp(v) for v in logits[t].tolist()]
        for e in range(5):
            assert float(got[t, e]) == pytest.approx(2 / 7 * math.log(sum(exps)) * exps[e] / sum(exps), rel=1e-9)


# No tokens; affinities that vanish


@pytest.mark.parametrize("K", [0, 3])  # 0: expert choice of nothing
def test_a_batch_without_tokens_gives_0(K: int) -> None:
    empty = torch.zeros(0, 8, dtype=torch.float64, requires_grad=True)
    for name, loss in {**LOSSES, "z": z_loss}.items():
        value = loss(of_logits(empty, ids=torch.zeros(0, K, dtype=torch.int64)))
        assert value.item() == 0, name
        if value.requires_grad:
            value.backward()
            assert torch.isfinite(empty.grad).all()


def test_sigmoids_that_all_vanish_give_no_nan() -> None:
    logits = torch.full((8, 8), -500.0, requires_grad=True)  # float32: sigmoid is 0
    for name, loss in LOSSES.items():
        value = loss(of_logits(logits, "sigmoid"))
        assert torch.isfinite(value), name
        (gradient,) = torch.autograd.grad(value, logits)
        assert torch.isfinite(gradient).all(), name


# Loss-free balancing


def test_bias_goes_up_for_the_idle_and_down_for_the_busy() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        counts = torch.randint(0, 9, (8,))
        bias = torch.randn(8, dtype=torch.float64)
        before, mean = bias.clone(), sum(counts.tolist()) / 8
        update_bias(bias, counts, 0.001)
        for old, new, count in zip(before.tolist(), bias.tolist(), counts.tolist(), strict=True):
            step = 0.0 if count == mean else 0.001 if count < mean else -0.001
            assert new == pytest.approx(old + step, abs=1e-15)


@pytest.mark.parametrize("name", ["expert", "device"])
def test_choices_of_earlier_micro_batches_count(name: str) -> None:
    """Two micro-batches, each on its own half of the experts: uneven alone, even together."""
    first, second = (
        of_logits(torch.tensor([likes] * 8).double(), K=2, ids=torch.tensor([ids] * 8))
        for likes, ids in (([2.0, 2.0, 0.0, 0.0], [0, 1]), ([0.0, 0.0, 2.0, 2.0], [2, 3]))
    )
    options = {"device_of": torch.tensor([0, 0, 1, 1])} if name == "device" else {}
    loss = {"expert": expert_loss, "device": device_loss}[name]
    assert float(loss(second, earlier=first.counts, **options)) == pytest.approx(1.0, rel=EXACT)
    assert float(loss(second, **options)) > 1.7
    assert torch.equal(loss(second, earlier=torch.zeros_like(first.counts), **options), loss(second, **options))


def test_a_bounded_step_is_small_near_balance_and_moves_no_mean() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        counts, kappa = torch.randint(0, 9, (8,)), 2.0
        counts[0] += 1
        bias = torch.randn(8, dtype=torch.float64)
        before, mean = bias.tolist(), sum(counts.tolist()) / 8
        update_bias(bias, counts, 0.001, kappa)
        steps = [math.tanh(kappa * (1 - count / mean)) for count in counts.tolist()]
        for old, new, step in zip(before, bias.tolist(), steps, strict=True):
            assert new == pytest.approx(old + 0.001 * (step - sum(steps) / 8), abs=1e-15)
    far, near = torch.zeros(2), torch.zeros(2)
    update_bias(far, torch.tensor([1000, 0]), 1.0, 2.0)
    update_bias(near, torch.tensor([501, 499]), 1.0, 2.0)
    assert far[1] == pytest.approx(math.tanh(2.0))
    assert near[1] == pytest.approx(0.004, rel=1e-3)
    idle = torch.zeros(4)
    update_bias(idle, torch.zeros(4, dtype=torch.int64), 0.1, 2.0)
    assert not idle.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_balance_moves_no_bias(dtype: torch.dtype) -> None:
    for count, E in [(0, 4), (1, 3), (349_525, 63), (16_777_217, 64)]:  # some sums are no float32
        bias = torch.zeros(E, dtype=dtype)
        update_bias(bias, torch.full((E,), count), 0.1)
        assert not bias.any()
    bias = torch.zeros(2, dtype=dtype)
    update_bias(bias, torch.tensor([16_777_217, 16_777_216]), 0.5)  # one token apart
    assert bias.tolist() == [-0.5, 0.5]


def test_a_bias_that_would_round_its_steps_away_is_refused() -> None:
    bias = torch.full((2,), 0.5, dtype=torch.bfloat16)
    assert torch.equal(bias + 0.001, bias)
    with pytest.raises(InputError, match=r"expert_bias = torch.bfloat16: loses small steps; keep it in float32"):
        update_bias(bias, torch.tensor([1, 0]), 0.001)


def test_bias_alone_evens_out_a_skewed_router() -> None:
    torch.manual_seed(0)
    config = MoEConfig(
        n_routed_experts=8, top_k=2, expert_width=4, scoring_func="sigmoid", expert_bias=True, norm_topk_prob=True
    )
    router, x = Router(6, config, 16), torch.randn(4000, 6) + 1.0
    torch.nn.init.normal_(router.weight, std=0.5)
    skewed = max_vio(router(x, (1, 4000)))
    for _ in range(600):
        update_bias(router.expert_bias, router(x, (1, 4000)).counts, 0.002)
    assert skewed > 1
    assert max_vio(router(x, (1, 4000))) < 0.1


# Metrics


def test_metrics_at_balance_and_at_collapse() -> None:
    assert load(balanced()).tolist() == [1.0] * 8
    assert max_vio(balanced()) == 0
    assert max_vio(collapsed(8, 2)) == 8 / 2 - 1
    assert drop_rate(balanced()) == 0
    half = replace(balanced(), kept=balanced().topk_ids % 2 == 0)
    assert drop_rate(half) == 0.5


def test_metrics_count_nobody_for_minus_one() -> None:
    routing = routing_of(torch.full((3, 3), 1 / 3), torch.tensor([[0, 1], [0, -1], [-1, -1]]))
    assert routing.counts.tolist() == [2, 1, 0]
    assert load(routing).tolist() == [2.0, 1.0, 0.0]
    assert max_vio(routing) == 1
    assert drop_rate(routing) == 0
