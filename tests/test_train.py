"""The training loop: losses, optimizer, bias and precision, step by step from their equations."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from training_samples import CONFIG, SMALL, V3, make, small_world

from dsmoe_lite.config import MoEConfig
from dsmoe_lite.data.batches import Batches, heldout_batches
from dsmoe_lite.evaluate import heldout_loss
from dsmoe_lite.layers import balance
from dsmoe_lite.model import Transformer
from dsmoe_lite.presets import preset
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.objective import BALANCE_LOSSES, balance_terms
from dsmoe_lite.training.optimizer import learning_rate, make_optimizer
from dsmoe_lite.training.record import Run, run_record
from dsmoe_lite.training.train import train


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)


def test_training_lowers_the_loss_and_reports_balance() -> None:
    model, batches = make()
    run = train(model, batches, replace(CONFIG, steps=60, lr=1e-2))
    assert run.losses[0] == pytest.approx(math.log(model.config.vocab_size), abs=0.2)
    assert sum(run.losses[-10:]) / 10 < run.losses[0] - 1
    assert [entry["step"] for entry in run.routing] == [0, 20, 40]
    assert all(0 <= entry["drop_rate"] < 1 and entry["max_vio"] >= 0 for entry in run.routing)
    assert run.tokens == 60 * 4 * 32


def test_learning_rate_warms_up_and_ends_at_its_share() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, lr=1.0, final_lr_share=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert 0.1 < rates[99] < 0.101
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_router_and_norms_are_not_decayed() -> None:
    model, _ = make()
    decayed, plain = make_optimizer(model, CONFIG).param_groups
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert {names[id(w)] for w in plain["params"]} == {n for n in names.values() if "norm" in n or "router" in n}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert plain["weight_decay"] == 0.0


def test_gradient_accumulation_equals_one_large_batch() -> None:
    config = replace(CONFIG, balance={}, steps=5)
    dense = replace(preset("course-dense"), d_model=32, max_seq_len=64)

    def losses(batch_size: int, accum: int) -> list[float]:
        world, tokenizer = small_world()
        torch.manual_seed(0)
        model = Transformer(replace(dense, vocab_size=tokenizer.get_vocab_size())).double()
        batches = Batches(world, tokenizer, batch_size, CONFIG.seq_len)
        return train(model, batches, replace(config, batch_size=batch_size, grad_accum=accum)).losses

    assert losses(2, 4) == pytest.approx(losses(8, 1), rel=1e-9)


@pytest.mark.parametrize("balance_loss", ["switch", "gshard"])
def test_four_steps_written_out(balance_loss: str) -> None:
    """AdamW, warm-up, clipping, accumulation and the balance losses, in float64 from their equations."""
    config = TrainConfig(
        steps=4, batch_size=2, seq_len=16, grad_accum=2, lr=0.01, warmup_steps=2, weight_decay=0.3, beta1=0.8,
        beta2=0.9, grad_clip=0.5, balance={balance_loss: 0.7, "z": 0.05},
    )  # fmt: skip
    rates = [
        0.005,
        0.01,
        0.01,
        0.01 * (0.1 + 0.9 / 2),
    ]  # warm-up: half, end; cosine: start, middle
    world, tokenizer = small_world()
    moe = replace(SMALL.moe, second_choice="all", capacity_factor=0.8)
    torch.manual_seed(0)
    model = Transformer(replace(SMALL, moe=moe, vocab_size=tokenizer.get_vocab_size())).double()
    reference = copy.deepcopy(model).train()
    run = train(model, Batches(world, tokenizer, 2, 16), config)

    batches, clipped = Batches(world, tokenizer, 2, 16), []
    first, second = ([torch.zeros_like(weight) for weight in reference.parameters()] for _ in range(2))
    for step, rate in enumerate(rates):
        gradients = [torch.zeros_like(weight) for weight in reference.parameters()]
        for _ in range(2):
            tokens = next(batches).tokens
            output = reference(tokens[:, :-1])
            picked = output.logits.log_softmax(dim=-1).gather(2, tokens[:, 1:, None])
            loss = -picked.mean()
            for routing in output.routings:
                E = 16
                share = torch.stack([(routing.topk_ids[:, 0] == e).double().mean() for e in range(E)])
                dot = (share * routing.scores.mean(dim=0)).sum()
                loss = loss + 0.7 * (E * dot if balance_loss == "switch" else dot / E)
                loss = loss + 0.05 * (routing.logits.exp().sum(dim=1).log() ** 2).mean()
            for total, part in zip(gradients, torch.autograd.grad(loss, list(reference.parameters())), strict=True):
                total += part / 2
        if step == 0:
            counts = [torch.bincount(r.topk_ids.flatten(), minlength=16).double() for r in output.routings]
            vio = sum(float(c.max() / c.mean()) - 1 for c in counts) / len(counts)
            dropped = sum(float((~r.kept).double().mean()) for r in output.routings) / len(counts)
            assert dropped > 0
            (figures,) = run.routing
            loads = figures.pop("loads")
            assert figures == {"step": 0, "max_vio": round(vio, 4), "drop_rate": round(dropped, 4)}
            assert loads == [[pytest.approx(float(n / c.mean()), abs=6e-4) for n in c] for c in counts]
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        clipped.append(norm > 0.5)
        with torch.no_grad():
            for (name, weight), g, m, v in zip(reference.named_parameters(), gradients, first, second, strict=True):
                g *= min(1.0, 0.5 / norm)
                m.copy_(0.8 * m + 0.2 * g)
                v.copy_(0.9 * v + 0.1 * g**2)
                if "norm" not in name and "router" not in name:
                    weight *= 1 - rate * 0.3
                weight -= rate * (m / (1 - 0.8 ** (step + 1))) / ((v / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
    assert any(clipped), "the case should clip"
    for (name, got), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7, msg=name)


def test_every_balance_loss_has_its_weight_in_every_layer() -> None:
    moe = MoEConfig(n_routed_experts=8, top_k=2, expert_width=16, noisy_gating=True, n_group=4, topk_group=4)
    model, batches = make(moe=moe)
    output = model.train()(next(batches).tokens[:, :-1])
    devices = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    losses = {name: getattr(balance, f"{name}_loss") for name in BALANCE_LOSSES}
    losses["device"] = lambda r: balance.device_loss(r, device_of=devices)
    losses["communication"] = lambda r: balance.communication_loss(r, device_of=devices, topk_group=4)
    weights = {name: 0.1 * (number + 1) for number, name in enumerate(BALANCE_LOSSES)}
    expected = sum(weight * losses[name](r) for r in output.routings for name, weight in weights.items())
    got = balance_terms(output, model.config, weights)
    assert len(output.routings) == 2
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    weights["load"] = 0.0  # a loss with weight 0 is not computed: it needs training mode
    model.eval()
    balance_terms(model(next(batches).tokens[:, :-1]), model.config, weights)


def test_the_bias_moves_once_per_step_by_the_counts_of_all_micro_batches() -> None:
    model, batches = make(moe=V3, batch_size=2)
    before, same = copy.deepcopy(model), make(moe=V3, batch_size=2)[1]
    counts = [torch.zeros(8), torch.zeros(8)]
    for _ in range(3):
        for total, routing in zip(counts, before.train()(next(same).tokens[:, :-1]).routings, strict=True):
            for e in routing.topk_ids.flatten().tolist():
                total[e] += 1
    train(model, batches, replace(CONFIG, steps=1, batch_size=2, grad_accum=3, bias_speed=0.25))
    for layer, total in zip(model.moe_layers, counts, strict=True):
        mean = 3 * 2 * CONFIG.seq_len * 2 / 8
        expected = [0.25 * ((mean > n) - (mean < n)) for n in total.tolist()]
        assert layer.router.expert_bias.tolist() == expected
        assert set(expected) >= {0.25, -0.25}


def test_a_global_batch_counts_the_micro_batches_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[torch.Tensor]] = []

    def terms(*given: object) -> torch.Tensor:
        seen.append([torch.as_tensor(counts).clone() for counts in given[4]])
        return balance_terms(*given)

    monkeypatch.setattr("dsmoe_lite.training.train.balance_terms", terms)
    model, batches = make(moe=V3, batch_size=2)
    before, same = copy.deepcopy(model).train(), make(moe=V3, batch_size=2)[1]
    config = replace(CONFIG, steps=1, batch_size=2, grad_accum=3, balance={"expert": 0.5}, global_batch=True)
    train(model, batches, config)
    expected = [torch.tensor(0), torch.tensor(0)]
    for found in seen:
        for counts, wanted in zip(found, expected, strict=True):
            assert torch.equal(counts, wanted)
        routings = before(next(same).tokens[:, :-1]).routings
        expected = [wanted + routing.counts for wanted, routing in zip(expected, routings, strict=True)]
    assert len(seen) == 3


def test_a_bounded_step_of_the_bias_is_used_if_asked_for() -> None:
    model, batches = make(moe=V3, batch_size=2)
    counts = [
        r.counts for r in copy.deepcopy(model).train()(next(make(moe=V3, batch_size=2)[1]).tokens[:, :-1]).routings
    ]
    train(model, batches, replace(CONFIG, steps=1, batch_size=2, bias_speed=0.25, bias_kappa=2.0))
    for layer, n in zip(model.moe_layers, counts, strict=True):
        expected = torch.zeros(8)
        balance.update_bias(expected, n, 0.25, 2.0)
        torch.testing.assert_close(layer.router.expert_bias, expected)
        assert len(set(expected.abs().tolist())) > 2


def test_a_hash_layer_has_neither_bias_nor_balance_loss() -> None:
    moe = replace(V3, scoring_func="sqrtsoftplus")
    model, batches = make(moe=moe, n_hash_layers=1)
    output = model.train()(next(batches).tokens[:, :-1])
    terms = balance_terms(output, model.config, {"expert": 0.5})
    torch.testing.assert_close(terms, 0.5 * balance.expert_loss(output.routings[1]))
    train(model, batches, replace(CONFIG, steps=1, bias_speed=0.25, balance={"sequence": 1e-4}))
    hashed, scored = model.moe_layers
    assert not hasattr(hashed.router, "expert_bias")
    assert scored.router.expert_bias.abs().sum() > 0


def test_loss_free_balancing_lowers_the_violation() -> None:
    world, tokenizer = small_world()
    held_out = heldout_batches(world, tokenizer, 4, 32, 12)

    def violation(bias_speed: float) -> float:
        """MaxVio_global, the mean over two seeds and two layers."""
        max_vios = []
        for seed in range(2):
            model, batches = make(seed, V3, batch_size=8)
            config = replace(CONFIG, steps=100, batch_size=8, lr=1e-2, balance={}, bias_speed=bias_speed)
            train(model, batches, config)
            max_vios += [use.max_vio for use in heldout_loss(model, held_out, world.domains).experts]
        return sum(max_vios) / len(max_vios)

    assert violation(0.003) < 0.5 * violation(0.0)


@pytest.mark.parametrize(("precision", "dtype"), [("auto", "float32"), ("fp32", "float32"), ("bf16", "bfloat16")])
def test_precision_decides_the_dtype_of_matrix_products(precision: str, dtype: str) -> None:
    model, batches = make()
    dtypes = []
    model.head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    train(model, batches, replace(CONFIG, steps=1, precision=precision))
    assert dtypes == [getattr(torch, dtype)]


def test_a_record_gives_speed_over_all_seconds() -> None:
    model, _ = make()
    run = Run(losses=[3.0] * 12, seconds=4.0, tokens=100)
    assert run_record(run, model, CONFIG)["tokens_per_second"] == 25
    assert run_record(run, model, CONFIG)["finished"]
    assert not run_record(run, model, replace(CONFIG, steps=13))["finished"]
