"""Multi-token prediction against a loop over positions, its place in training, and decoding that drafts with it."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training_samples import CONFIG, SMALL, V3, make

from dsmoe_lite.accounting import parameters
from dsmoe_lite.checkpoint import load_model, save_model
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import AttentionConfig, MLAConfig, ModelConfig, MoEConfig, from_dict, to_dict
from dsmoe_lite.generate import generate
from dsmoe_lite.generate.speculative import Speculation, _Draw, _State, speculate
from dsmoe_lite.layers.balance import expert_loss
from dsmoe_lite.layers.cache import Cache
from dsmoe_lite.model import Output, Transformer
from dsmoe_lite.presets import preset
from dsmoe_lite.routing.interventions import swap_shared, without_capacity
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.objective import balance_terms, mtp_loss
from dsmoe_lite.training.train import train

D, V = 12, 40
MOE = MoEConfig(n_routed_experts=6, top_k=2, expert_width=8, n_shared_experts=1, scoring_func="sigmoid",
                expert_bias=True, norm_topk_prob=True)  # fmt: skip
DENSE = ModelConfig(vocab_size=V, d_model=D, n_layers=2, attention=AttentionConfig(n_heads=2, head_dim=6),
                    ffn_width=10, n_mtp=2, init_std=0.4, max_seq_len=32)  # fmt: skip
MLA = MLAConfig(n_heads=2, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4, kv_lora_rank=6)
MODELS = {
    "dense": DENSE,
    "experts": replace(DENSE, moe=MOE),
    "released order": replace(DENSE, moe=MOE, mtp_order="embedding_first", n_mtp=1),
    "hash layers before": replace(DENSE, moe=MOE, n_hash_layers=2, n_mtp=3),
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)


def made(config: ModelConfig, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config).double()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


# The equations


@pytest.mark.parametrize("name", MODELS)
def test_a_module_is_the_loop_over_positions(name: str) -> None:
    """Position i alone: its projection by hand, then the module's block on the sequence of projections so far."""
    config = MODELS[name]
    model, eps = made(config).train(), config.norm_eps
    tokens = torch.randint(V, (2, 9))
    output = model(tokens)
    assert output.hidden is not None
    assert len(output.ahead) == config.n_mtp
    hidden = output.hidden
    for k, module in enumerate(model.mtp, start=1):
        next_hidden = []
        for row in range(2):
            joined = []
            for i in range(9 - k):
                h = rms_norm(hidden[row, i], module.hidden_norm.weight, eps)
                e = rms_norm(model.embed.weight[tokens[row, i + k]], module.embedding_norm.weight, eps)
                parts = [h, e] if config.mtp_order == "hidden_first" else [e, h]
                joined.append(module.project.weight @ torch.cat(parts))
            x = torch.stack(joined)[None]
            own = []
            for i in range(9 - k):  # only what position i may see
                seen = module.block(
                    x[:, : i + 1], model._positions(i + 1, x.device, None, None), tokens[row : row + 1, k : k + i + 1]
                )[0]
                own.append(rms_norm(seen[0, -1], module.norm.weight, eps))
            next_hidden.append(torch.stack(own))
        hidden = torch.stack(next_hidden)
        logits = torch.stack([torch.stack([model.head.weight @ h for h in rows]) for rows in hidden])
        assert output.ahead[k - 1].shape == (2, 9 - k, V)
        torch.testing.assert_close(output.ahead[k - 1], logits, rtol=1e-9, atol=1e-9)


def test_the_two_orders_are_one_layer_with_its_halves_exchanged() -> None:
    ours, theirs = made(MODELS["released order"]).train(), made(replace(DENSE, moe=MOE, n_mtp=1)).train()
    weights = ours.state_dict()
    weights["mtp.0.project.weight"] = weights["mtp.0.project.weight"].roll(D, dims=1)
    theirs.load_state_dict(weights)
    tokens = torch.randint(V, (2, 7))
    torch.testing.assert_close(theirs(tokens).ahead[0], ours(tokens).ahead[0], rtol=1e-12, atol=1e-12)


def test_nothing_ahead_leaks_into_a_prediction() -> None:
    model = made(MODELS["experts"]).train()
    tokens = torch.randint(V, (1, 10))
    before = model(tokens)
    tokens[0, 6] = (tokens[0, 6] + 1) % V
    after = model(tokens)
    for k in (1, 2):  # position i reads tokens up to i + k
        assert torch.equal(before.ahead[k - 1][0, : 6 - k], after.ahead[k - 1][0, : 6 - k])
        assert not torch.equal(before.ahead[k - 1][0, 6 - k], after.ahead[k - 1][0, 6 - k])


def test_modules_change_nothing_for_the_model_and_are_silent_outside_training() -> None:
    plain, with_modules = made(replace(MODELS["experts"], n_mtp=0)), made(MODELS["experts"])
    shared = {name: weight for name, weight in with_modules.state_dict().items() if not name.startswith("mtp.")}
    plain.load_state_dict(shared)
    tokens = torch.randint(V, (2, 8))
    assert torch.equal(plain.train()(tokens).logits, with_modules.train()(tokens).logits)
    output = with_modules.eval()(tokens)
    assert output.ahead == output.ahead_routings == ()
    assert len(with_modules.moe_layers) == len(output.routings) == 2
    counted = parameters(MODELS["experts"])
    assert counted.total == sum(w.numel() for n, w in with_modules.named_parameters() if not n.startswith("mtp."))
    assert counted.mtp.total == sum(w.numel() for n, w in with_modules.named_parameters() if n.startswith("mtp."))
    idle = 2 * (6 - 2) * 3 * D * 8  # of each of two modules, the experts that a token does not choose
    assert counted.mtp.active == counted.mtp.total - idle
    assert parameters(DENSE).mtp.active == parameters(DENSE).mtp.total
    assert from_dict(ModelConfig, to_dict(MODELS["released order"])) == MODELS["released order"]


# The loss


def test_the_loss_is_the_papers_sum() -> None:
    model = made(MODELS["experts"]).train()
    tokens = torch.randint(V, (3, 9))  # S = 8 and the last target
    output = model(tokens[:, :-1])
    total = 0.0
    for k in (1, 2):
        log_p = output.ahead[k - 1].log_softmax(-1)
        terms = [-log_p[row, i, tokens[row, i + k + 1]].item() for row in range(3) for i in range(8 - k)]
        total += sum(terms) / (3 * 8)
    assert mtp_loss(output, tokens).item() == pytest.approx(total / 2, rel=1e-10)


def test_its_weight_falls_after_two_thirds_of_the_steps() -> None:
    config = TrainConfig(steps=148)
    weights = [config.mtp_weight_at(step) for step in range(148)]
    assert weights == [0.3] * 100 + [0.1] * 48  # V3: 10 and 4.8 of 14.8 trillion tokens
    assert {TrainConfig(steps=3, mtp_share=0.0).mtp_weight_at(step) for step in range(3)} == {0.1}


def test_training_adds_the_loss_and_balances_the_modules_experts() -> None:
    model, batches = make(moe=V3, n_mtp=1)
    reference, same = copy.deepcopy(model), make(moe=V3, n_mtp=1)[1]
    config = replace(CONFIG, steps=1, warmup_steps=0, balance={"expert": 0.5}, bias_speed=0.25, grad_clip=1e9,
                     weight_decay=0.0)  # fmt: skip
    run = train(model, batches, config)
    tokens = next(same).tokens
    output = reference.train()(tokens[:, :-1])
    loss = F.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert run.losses == [pytest.approx(loss.item(), rel=1e-5)]  # the model's own, without what is added
    terms = 0.5 * sum(expert_loss(r) for r in (*output.routings, *output.ahead_routings))
    torch.testing.assert_close(balance_terms(output, reference.config, {"expert": 0.5}), terms)
    (loss + terms + 0.3 * mtp_loss(output, tokens)).backward()
    moved = [
        (mine - before).sign().eq(-weight.grad.sign())[weight.grad.abs() > 1e-6].double().mean().item()
        for mine, before, weight in zip(
            model.mtp.parameters(), copy.deepcopy(reference).mtp.parameters(), reference.mtp.parameters(), strict=True
        )
    ]
    assert min(moved) == 1.0  # the first step of Adam is against the sign of the gradient
    counts = output.ahead_routings[0].counts
    expected = 0.25 * (counts.sum() - len(counts) * counts).sign()
    assert torch.equal(model.mtp[0].block.ffn.router.expert_bias, expected.float())


def test_training_learns_to_predict_the_token_after_next() -> None:
    model, batches = make(moe=V3, n_mtp=1)
    train(model, batches, replace(CONFIG, steps=120, lr=1e-2, checkpoint_every=0))
    tokens = next(batches).tokens
    with torch.no_grad():
        learnt = mtp_loss(model.train()(tokens[:, :-1]), tokens).item()
    assert learnt < math.log(model.config.vocab_size) - 1.5


# Decoding


def spelled(model: Transformer, prompt: list[int], n_new: int) -> list[int]:
    return generate(model, [prompt], n_new)[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", MODELS)
def test_greedy_speculation_is_greedy_decoding(name: str, seed: int) -> None:
    model = made(MODELS[name], seed)
    prompt = torch.randint(V, (3,)).tolist()
    for n_new in (0, 1, 2, 3, 20, 29):
        found = speculate(model, prompt, n_new)
        assert found.tokens == spelled(model, prompt, n_new)
        assert len(found.accepted) == n_new
        assert sum(found.accepted) <= found.n_drafts <= max(0, n_new - 1)
        assert found.n_forward == n_new - sum(found.accepted)


def test_a_module_that_knows_the_future_halves_the_passes() -> None:
    """The head ignores all but a counter: every draft is right."""
    model = made(replace(DENSE, n_mtp=1))
    with torch.no_grad():
        for module in (model, model.mtp[0]):
            module.norm.weight.fill_(1.0)
        model.head.weight.zero_()
    found = speculate(model, [3], 20)  # all logits are equal: token 0 always
    assert found.tokens == [0] * 20
    assert found.acceptance == 1.0
    assert found.n_forward == 11  # the prompt, nine pairs, and one without room for a draft
    assert found.tokens_per_forward == 20 / 11


@pytest.mark.parametrize("attention", [None, MLA], ids=["mha", "mla"])
def test_a_draft_is_what_the_module_learns_to_predict(attention: MLAConfig | None) -> None:
    """Through both caches, at every step, the draft's logits are those of training for the same tokens."""
    config = replace(MODELS["experts"], n_mtp=1, **({} if attention is None else {"attention": attention}))
    model = made(config, 5)
    state = _State(model.eval(), [3, 1, 4, 1], 14)
    with torch.no_grad():
        state.push(int(state.read(1)[-1].argmax()))
        for step in range(5):
            expected = model.train()(torch.tensor([state.tokens])).ahead[0][0, -1]
            model.eval()
            drafted = state.draft()
            torch.testing.assert_close(drafted, expected, rtol=1e-9, atol=1e-9)
            state.push(int(drafted.argmax()))
            _, after = state.read(2)
            if step % 2:
                state.take_back()
            state.push(step if step % 2 else int(after.argmax()))


def test_a_stop_in_an_accepted_draft_ends_the_continuation() -> None:
    model = made(replace(DENSE, n_mtp=1))
    with torch.no_grad():
        model.head.weight.zero_()  # model and module agree that all tokens are equally likely

    def drawn(**options: set[int]) -> Speculation:
        return speculate(model, [3], 28, temperature=1.0, generator=torch.Generator().manual_seed(0), **options)

    whole = drawn()
    firsts = [i for i, token in enumerate(whole.tokens) if token not in whole.tokens[:i] and whole.accepted[i]]
    assert len(firsts) > 5
    for i in firsts:
        assert drawn(stop={whole.tokens[i]}).tokens == whole.tokens[: i + 1]


def test_any_temperature_above_zero_works() -> None:
    model = made(replace(DENSE, n_mtp=1), 1)
    assert speculate(model, [3], 12, temperature=1e-300).tokens == spelled(model, [3], 12)


def test_training_mode_reads_a_cache_without_looking_ahead() -> None:
    model = made(MODELS["experts"]).train()
    cache = Cache(model.config, 1)
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3, 4]]), cache).ahead == ()
        assert model(torch.tensor([[5]]), cache).ahead == ()
        assert model(torch.tensor([[1, 2, 3, 4]]), pad=torch.tensor([1])).ahead == ()


def test_interventions_change_the_modules_too(tmp_path) -> None:
    model = Transformer(replace(MODELS["experts"], moe=replace(MOE, eval_capacity_factor=1.0)))
    assert [layer.router.config.eval_capacity_factor for layer in without_capacity(model).all_moe_layers] == [None] * 4
    swapped = swap_shared(model, 1)
    assert {layer.router.config.top_k for layer in swapped.all_moe_layers} == {3}
    save_model(tmp_path / "swapped.safetensors", swapped)
    assert load_model(tmp_path / "swapped.safetensors").config == swapped.config


def test_the_loss_is_computed_inside_autocast() -> None:
    model, batches = make(moe=V3, n_mtp=1)
    seen = []
    original = torch.nn.functional.cross_entropy

    def watched(logits: Tensor, targets: Tensor) -> Tensor:
        loss = original(logits, targets)
        seen.append(loss.dtype)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", watched)
        train(model, batches, replace(CONFIG, steps=1, precision="bf16"))
    assert seen == [torch.float32, torch.float32]


def test_stop_ends_a_continuation() -> None:
    model = made(MODELS["experts"], 3)
    whole = spelled(model, [1, 2], 25)
    for token in set(whole):
        found = speculate(model, [1, 2], 25, stop={token})
        assert found.tokens == whole[: whole.index(token) + 1]
        assert len(found.accepted) == len(found.tokens)


def is_distributed_as(counts: Tensor, p: Tensor) -> bool:
    """A chi-square test, at four standard deviations, of the cells where at least five are expected."""
    expected = counts.sum() * p
    large = expected > 5
    statistic = ((counts - expected).square() / expected)[large].sum().item()
    degrees = int(large.sum()) - 1
    assert degrees >= 3
    return statistic < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("seed", range(3))
def test_a_draft_that_is_accepted_or_replaced_has_the_distribution_of_the_model(seed: int) -> None:
    """20,000 draws from logits p of the model, drafted from other logits q; a wrong rule is found out."""
    torch.manual_seed(seed)
    p, q = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    draw, n = _Draw(0.7, torch.Generator().manual_seed(seed)), 20_000
    counts, unreplaced, accepted = torch.zeros(6), torch.zeros(6), 0
    for _ in range(n):
        token = draw.token(q)
        if draw.accepts(p, q, token):
            accepted += 1
            unreplaced[token] += 1
        else:
            token = draw.instead(p, q)
        counts[token] += 1
    exact_p, exact_q = (p / 0.7).softmax(-1), (q / 0.7).softmax(-1)
    assert is_distributed_as(counts, exact_p)
    assert not is_distributed_as(unreplaced, exact_p)
    assert not is_distributed_as(counts, exact_q)
    overlap = torch.minimum(exact_p, exact_q).sum().item()  # the probability of acceptance
    assert abs(accepted / n - overlap) < 4 * math.sqrt(overlap * (1 - overlap) / n)


def test_sampled_speculation_has_the_distribution_of_the_model() -> None:
    """Three tokens in a row, 1,500 times, against exact probabilities."""
    config = replace(DENSE, vocab_size=3, n_layers=1, n_mtp=1, init_std=0.6)
    model, n = made(config, 1).eval(), 1_500
    generator = torch.Generator().manual_seed(0)
    drawn = [speculate(model, [2], 3, temperature=0.8, generator=generator) for _ in range(n)]
    assert 0.2 < sum(found.acceptance for found in drawn) / n < 0.98
    counts, exact = torch.zeros(3, 3, 3), torch.zeros(3, 3, 3, dtype=torch.float64)
    for found in drawn:
        counts[tuple(found.tokens)] += 1
    with torch.no_grad():
        for a, b in itertools.product(range(3), range(3)):
            p = (model(torch.tensor([[2, a, b]])).logits[0] / 0.8).softmax(-1)
            exact[a, b] = p[0, a] * p[1, b] * p[2]
    assert is_distributed_as(counts, exact)


def test_a_draft_from_the_models_own_distribution_is_always_accepted() -> None:
    draw_from_same = made(replace(DENSE, vocab_size=5, n_mtp=1), 2)
    with torch.no_grad():
        draw_from_same.head.weight.zero_()
    found = speculate(draw_from_same, [0], 30, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert found.acceptance == 1.0
    assert len(set(found.tokens)) > 2


def test_a_cache_forgets_its_last_tokens() -> None:
    model = made(replace(DENSE, n_mtp=0)).eval()
    tokens = torch.randint(V, (2, 9))
    cache = Cache(model.config, 2)
    with torch.no_grad():
        model(tokens[:, :5], cache)
        model(torch.randint(V, (2, 3)), cache)
        cache.forget(3)
        again = model(tokens[:, 5:], cache).logits
        whole = model(tokens).logits[:, 5:]
    torch.testing.assert_close(again, whole, rtol=1e-10, atol=1e-10)
    with pytest.raises(InputError, match="n_tokens = 10: must be"):
        cache.forget(10)
    windowed = replace(DENSE, attention=AttentionConfig(n_heads=2, head_dim=6, window=4))
    with pytest.raises(InputError, match="window = 4: a rolling cache cannot forget"):
        Cache(windowed, 1).forget(0)


# What is refused


def test_bad_input_is_one_line() -> None:
    model = made(MODELS["experts"])
    with pytest.raises(InputError, match="sequence length = 2: must be above n_mtp = 2"):
        model.train()(torch.zeros(1, 2, dtype=torch.int64))
    for changes, message in (
        ({"n_mtp": -1}, "n_mtp = -1: must be"),
        ({"n_mtp": 0.5}, "n_mtp = 0.5: must be"),
        ({"mtp_order": "both"}, "mtp_order = 'both': must be one of hidden_first, embedding_first"),
    ):
        with pytest.raises(InputError, match=message):
            replace(DENSE, **changes)
    plain = Transformer(replace(DENSE, n_mtp=0))
    windowed = Transformer(replace(DENSE, attention=AttentionConfig(n_heads=2, head_dim=6, window=4)))
    slots = Transformer(replace(DENSE, moe=replace(MOE, eval_capacity_factor=1.0)))
    for wrong, arguments, message in (
        (plain, ([1], 3), "n_mtp = 0: the model has no MTP module to draft with"),
        (windowed, ([1], 3), "window = 4: a rolling cache cannot forget a draft"),
        (slots, ([1], 3), "moe = 'token': must have experts without capacities that tokens choose"),
        (model, ([], 3), r"prompt 0 = \[\]: must have at least one token"),
        (model, ([V], 3), f"token id in prompt 0 = {V}: must be"),
        (model, (5, 3), "prompts, of type list: must be a list of prompts"),
        (model, ([1], 32), "n_new = 32: must be at most 31"),
        (model, ([1], -1), "n_new = -1: must be"),
    ):
        with pytest.raises(InputError, match=message):
            speculate(wrong, *arguments)
    with pytest.raises(InputError, match="stop = 5: must be a list or set"):
        speculate(model, [1], 3, stop=5)
    with pytest.raises(InputError, match="token id in stop = -7"):
        speculate(model, [1], 3, stop={-7})
    with pytest.raises(InputError, match="temperature = -1"):
        speculate(model, [1], 3, temperature=-1.0)
    for name, value in (("mtp_weight", -0.1), ("mtp_share", 1.5), ("mtp_final_weight", math.nan)):
        with pytest.raises(InputError, match=name):
            TrainConfig(steps=1, **{name: value})


def test_a_result_without_drafts_has_rates() -> None:
    assert Speculation().acceptance == Speculation().tokens_per_forward == 0.0
    assert mtp_loss(Output(torch.zeros(1, 3, V), ()), torch.zeros(1, 4, dtype=torch.int64)).item() == 0.0
    assert preset("course-v3").n_mtp == SMALL.n_mtp == 0
