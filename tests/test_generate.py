"""Generation: the same with and without a cache, ragged prompts as each alone, sampling, and invalid input."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from attention_by_hand import EXPERTS, KINDS, VOCAB, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_samples import line_of, seeded
from torch import Tensor

from dsmoe_lite.config import AttentionConfig, MoEConfig
from dsmoe_lite.generate import generate, sample
from dsmoe_lite.layers.cache import Cache
from dsmoe_lite.model import Transformer

ROWS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1], [58], [10, 20, 30, 40, 50, 60]]
BY_BATCH = {
    "capacity": MoEConfig(n_routed_experts=4, top_k=2, expert_width=12, eval_capacity_factor=0.75),
    "expert choice": MoEConfig(n_routed_experts=4, top_k=2, expert_width=12, chooser="expert"),
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_model(KINDS["gqa"], max_seq_len=32)


# The same with and without a cache


@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("name", KINDS)
def test_200_tokens_are_the_same_with_a_cache_and_without(name: str, moe: MoEConfig | None) -> None:
    """Sampled, since greedy tokens soon repeat. At the first new token, a window of 5 has lost the start of the prompt.

    Without a cache, all logits come from one full pass: no token sees later ones.
    """
    model = make_model(KINDS[name], moe, max_seq_len=208, n_layers=1)
    drawn = {"temperature": 1.0, "top_p": 0.95}
    (generated,) = generate(model, [ROWS[0]], 200, use_cache=True, generator=seeded(7), **drawn)
    assert len(generated) == 200
    assert len(set(generated)) > VOCAB / 2, "the case should generate many different tokens"
    with torch.no_grad():
        logits = model(torch.tensor([ROWS[0] + generated])).logits[0, 7:-1]
    generator = seeded(7)
    assert generated == [int(sample(row[None], 1.0, 0.95, generator)) for row in logits]
    for options in ({"use_cache": False}, {"chunk": 3}):
        assert generate(model, [ROWS[0]], 12, generator=seeded(7), **options, **drawn) == [generated[:12]]


@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("name", KINDS)
def test_prompts_of_different_lengths_continue_as_each_alone(name: str, moe: MoEConfig | None) -> None:
    model = make_model(KINDS[name], moe)
    alone = [generate(model, [row], 12)[0] for row in ROWS]
    for options in ({}, {"chunk": 3}, {"use_cache": False}):
        assert generate(model, ROWS, 12, **options) == alone, options
    assert len({tuple(row) for row in alone}) == len(ROWS)


def test_greedy_follows_the_likeliest_token(model: Transformer) -> None:
    generated = generate(model, ROWS, 10)
    for row, continuation in zip(ROWS, generated, strict=True):
        for i, token in enumerate(continuation):
            with torch.no_grad():
                assert token == int(model(torch.tensor([row + continuation[:i]])).logits[0, -1].argmax())


def test_prompts_may_be_tensors_or_lists(model: Transformer) -> None:
    prompts = torch.randint(0, VOCAB, (3, 5))
    generated = generate(model, prompts, 6)
    assert generated == generate(model, prompts.tolist(), 6)
    assert generated == generate(model, prompts.int(), 6)
    assert generated == generate(model, prompts, 6, chunk=1) == generate(model, prompts, 6, chunk=100)
    assert generated == generate(model, tuple(map(tuple, prompts.tolist())), 6)
    assert all(type(token) is int for row in generated for token in row)


@pytest.mark.parametrize("name", BY_BATCH)
def test_experts_that_depend_on_the_batch_get_no_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(KINDS["gqa"], BY_BATCH[name])
    prompts = [row[:3] for row in ROWS if len(row) >= 3]
    tokens = torch.tensor(prompts)
    for _ in range(6):
        with torch.no_grad():
            tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(dim=-1)), dim=1)
    expected = tokens[:, 3:].tolist()
    monkeypatch.setattr("dsmoe_lite.generate.decode.Cache", None)
    for use_cache in (None, False):
        assert generate(model, prompts, 6, use_cache=use_cache) == expected
    assert line_of(lambda: generate(model, prompts, 6, use_cache=True)).startswith("use_cache = True: must be False: ")
    assert line_of(lambda: generate(model, ROWS, 6)).startswith(
        "prompts = 'of different lengths': must be equally long"
    )


def test_capacities_only_in_training_allow_a_cache() -> None:
    trained = MoEConfig(n_routed_experts=4, top_k=2, expert_width=12, capacity_factor=0.5)
    model = make_model(KINDS["gqa"], trained).train()
    alone = [generate(model, [row], 8, use_cache=False)[0] for row in ROWS]
    assert generate(model, ROWS, 8, use_cache=True) == alone


def test_the_cache_is_reserved_in_one_piece_and_reads_each_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read, caches = make_model(KINDS["mla"]), [], []

    class Watched(Cache):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            caches.append(self)

    monkeypatch.setattr("dsmoe_lite.generate.decode.Cache", Watched)
    handle = model.embed.register_forward_pre_hook(lambda module, inputs: read.append(tuple(inputs[0].shape)))
    generate(model, ROWS, 5, chunk=3)
    handle.remove()
    assert read == [(4, 3), (4, 3), (4, 2), (4, 1), (4, 1), (4, 1), (4, 1)]
    (cache,) = caches
    assert cache.nbytes == 4 * 2 * (8 + 5) * 12 * 8


# Sampling


def test_draws_are_repeatable_and_differ_by_seed(model: Transformer) -> None:
    options = {"temperature": 1.0, "top_p": 0.9}
    one, two, other = (generate(model, ROWS, 12, generator=seeded(n), **options) for n in (5, 5, 6))
    assert one == two != other
    assert generate(model, ROWS, 12, generator=seeded(5), use_cache=False, **options) == one
    state = torch.get_rng_state()
    generate(model, ROWS, 12, generator=seeded(5), **options)
    generate(model, ROWS, 12)
    assert torch.equal(torch.get_rng_state(), state), "with a generator, the global one does not change"


def test_temperature_near_zero_is_greedy_and_so_is_a_tiny_nucleus(model: Transformer) -> None:
    greedy = generate(model, ROWS, 12)
    for temperature in (1e-3, 1e-9, 5e-324):
        assert generate(model, ROWS, 12, temperature=temperature) == greedy
    for top_p in (1e-9, 5e-324):
        assert generate(model, ROWS, 12, temperature=1.0, top_p=top_p) == greedy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_choices_of_every_precision_are_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[30.0, 29.0, -30.0, 0.0], [0.0, 0.0, 0.0, -60000.0]], dtype=dtype)
    for temperature in (1e-300, 1e-6, 1e-3, 1.0, 1e6):
        for top_p in (0.1, 1.0):
            ids = sample(logits, temperature, top_p, seeded(0))
            assert ids.shape == (2,)
            assert ((ids >= 0) & (ids < 4)).all()
    assert sample(logits, 0.0).tolist() == [0, 0], "equal logits go to the lower id"


def nucleus(logits: Tensor, temperature: float, top_p: float) -> set[int]:
    """The smallest set of likeliest tokens that together reach top_p, found token by token."""
    weights = [math.exp((float(x) - float(logits.max())) / temperature) for x in logits]
    ids, total = set(), 0.0
    for token in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        if total >= top_p:
            break
        ids.add(token)
        total += weights[token] / sum(weights)
    return ids


@given(
    logits=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=9), temperature=st.floats(0.2, 3),
    top_p=st.floats(0.01, 1.0), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_exactly_the_nucleus_is_drawn_from(logits: list[float], temperature: float, top_p: float, seed: int) -> None:
    row = torch.tensor(logits, dtype=torch.float64)
    shares = (row / temperature).softmax(dim=0)
    cuts = shares.sort(descending=True).values.cumsum(dim=0)
    if ((cuts - top_p).abs() < 1e-9).any() and top_p < 1:
        return  # rounding decides
    expected = nucleus(row, temperature, top_p)
    drawn = Counter(sample(row.expand(4000, -1), temperature, top_p, seeded(seed)).tolist())
    assert set(drawn) <= expected
    total = sum(float(shares[i]) for i in expected)
    for token in expected:
        share = float(shares[token]) / total
        spread = math.sqrt(share * (1 - share) / 4000)
        assert abs(drawn[token] / 4000 - share) < 6 * spread + 1e-9, "renormalised to the nucleus"


def test_a_nucleus_that_is_reached_exactly_takes_no_further_token() -> None:
    """Four shares of exactly 1/4; lower ids come first."""
    for top_p, ids in ((0.25, {0}), (0.5, {0, 1}), (0.51, {0, 1, 2}), (0.75, {0, 1, 2})):
        assert set(sample(torch.zeros(200, 4), 1.0, top_p, seeded(0)).tolist()) == ids


def test_a_nucleus_of_everything_is_a_plain_draw() -> None:
    logits = torch.randn(500, 40, generator=seeded(0))
    plain = torch.multinomial(logits.double().softmax(dim=-1).float(), 1, generator=seeded(1))[:, 0]
    assert torch.equal(sample(logits, 1.0, 1.0, seeded(1)), plain)
    assert torch.equal(sample(logits, 1.0, 1.0 - 1e-12, seeded(1)), plain)


def test_half_precision_keeps_the_tail_out_of_the_nucleus() -> None:
    """In bfloat16 a sum stops growing long before thousands of small shares reach top_p."""
    drawn = sample(torch.zeros(40, 20_000, dtype=torch.bfloat16), 1.0, 0.5, seeded(0))
    assert drawn.max() < 10_000
    assert len(set(drawn.tolist())) > 30


def test_temperature_flattens_and_sharpens() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0]).expand(20_000, -1)
    for temperature in (0.5, 1.0, 4.0):
        counts = torch.bincount(sample(logits, temperature, generator=seeded(3)), minlength=3) / 20_000
        torch.testing.assert_close(counts, (logits[0] / temperature).softmax(dim=0), rtol=0, atol=0.02)


# Stopping


def test_stop_tokens_end_their_rows_only(model: Transformer) -> None:
    full = generate(model, ROWS, 20)
    stop = {full[0][4], full[1][9]}
    generated = generate(model, ROWS, 20, stop=stop)
    for continuation, full_continuation in zip(generated, full, strict=True):
        ends = [i for i, token in enumerate(full_continuation) if token in stop]
        assert continuation == full_continuation[: ends[0] + 1 if ends else 20]
    assert len({len(continuation) for continuation in generated}) > 1
    assert generate(model, ROWS, 20, stop=[full[0][4], full[1][9]]) == generated


def test_the_loop_ends_with_its_last_row(model: Transformer) -> None:
    first = {row[0] for row in generate(model, ROWS, 1)}
    calls: list[int] = []
    handle = model.head.register_forward_hook(lambda *_: calls.append(1))
    assert [len(row) for row in generate(model, ROWS, 20, stop=first)] == [1, 1, 1, 1]
    assert len(calls) == 1
    assert generate(model, ROWS, 0) == [[], [], [], []]
    handle.remove()
    assert len(calls) == 1


def test_on_step_receives_the_continuations_so_far(model: Transformer) -> None:
    seen: list[list[list[int]]] = []
    full = generate(model, ROWS, 6)
    stop = {full[0][2]}
    generated = generate(model, ROWS, 6, stop=stop, on_step=lambda rows: seen.append([list(row) for row in rows]))
    assert seen == [[row[: n + 1] for row in generated] for n in range(6)]
    assert seen[-1] == generated


def test_the_whole_context_may_be_filled(model: Transformer) -> None:
    assert len(generate(model, [[1]], 31)[0]) == 31
    assert generate(model, [[1] * 32], 0) == [[]]
    (generated,) = generate(model, [[1] * 31], 1)
    with torch.no_grad():
        assert generated == [int(model(torch.ones(1, 31, dtype=torch.long)).logits[0, -1].argmax())]


# Side effects


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = make_model(KINDS["mla"], EXPERTS).train(training)
    modes: list[bool] = []
    model.register_forward_hook(lambda module, *_: modes.append(module.training))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.embed.weight.requires_grad_(False)
    wanted = {name: weight.requires_grad for name, weight in model.named_parameters()}

    def fails(rows: list[list[int]]) -> None:
        assert not torch.is_grad_enabled()
        if len(rows[0]) == 2:
            raise KeyboardInterrupt

    generate(model, ROWS, 3)
    with pytest.raises(KeyboardInterrupt):
        generate(model, ROWS, 3, on_step=fails)
    assert modes == [False] * 5
    assert {module.training for module in model.modules()} == {training}
    assert torch.is_grad_enabled()
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == wanted
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_prompts_are_left_as_they_were(model: Transformer) -> None:
    prompts = [list(row) for row in ROWS]
    generated = generate(model, prompts, 3)
    assert prompts == ROWS
    assert len({id(row) for row in generated}) == len(generated)


# Invalid input

IDS = f"must be a whole number of at least 0 and at most {VOCAB - 1}"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts = []: must have at least one prompt"),
        (torch.zeros(0, 4, dtype=torch.long), "prompts = []"),
        ([[1], []], "prompt 1 = []: must have at least one token"),
        (torch.zeros(2, 0, dtype=torch.long), "prompt 0 = []"),
        ([1, 2, 3], "prompts, of type list: must be a list of prompts, each a list of token ids"),
        (torch.tensor([1, 2, 3]), "prompts, of type Tensor: must be a list of prompts"),
        (7, "prompts, of type int"),
        (None, "prompts, of type NoneType"),
        ("some words", f"token id in prompt 0 = 's': {IDS}"),
        (["some words"], f"token id in prompt 0 = 's': {IDS}"),
        (torch.zeros(1, 2, 3, dtype=torch.long), "token id in prompt 0 = [0, 0, 0]"),
        ([[1, 2], [3, VOCAB]], f"token id in prompt 1 = {VOCAB}: {IDS}"),
        ([[-1]], "token id in prompt 0 = -1"),
        ([[1.0]], "token id in prompt 0 = 1.0"),
        (torch.ones(1, 2), "token id in prompt 0 = 1.0"),
        ([[True]], "token id in prompt 0 = True"),
        ([[None]], "token id in prompt 0 = None"),
        ([[1] * 33], "tokens of prompt 0 = 33: must be at most max_seq_len = 32: shorten the prompt"),
        ([[1], [1] * 30], "n_new = 3: must be at most 2: max_seq_len = 32, and the longest prompt has 30 tokens"),
    ],
)
def test_invalid_prompts_are_refused_in_one_line(model: Transformer, prompts: Any, message: str) -> None:
    assert message in line_of(lambda: generate(model.train(), prompts, 3))
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_new": -1}, "n_new = -1"),
        ({"n_new": 2.0}, "n_new = 2.0"),
        ({"n_new": True}, "n_new = True"),
        ({"n_new": 32}, "n_new = 32: must be at most 24"),
        ({"temperature": -0.1}, "temperature = -0.1: must be a finite number of at least 0"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"temperature": "hot"}, "temperature = 'hot'"),
        ({"temperature": True}, "temperature = True"),
        ({"top_p": 0}, "top_p = 0: must be a finite number above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p = 1.01"),
        ({"top_p": math.nan}, "top_p = nan"),
        ({"top_p": None}, "top_p = None"),
        ({"chunk": 0}, "chunk = 0: must be a whole number of at least 1"),
        ({"chunk": -2}, "chunk = -2"),
        ({"chunk": 1.5}, "chunk = 1.5"),
        ({"stop": 5}, "stop = 5: must be a list or set of token ids"),
        ({"stop": None}, "stop = None"),
        ({"stop": "ab"}, f"token id in stop = 'a': {IDS}"),
        ({"stop": [1.0]}, "token id in stop = 1.0"),
        ({"stop": [True]}, "token id in stop = True"),
        ({"stop": {VOCAB}}, f"token id in stop = {VOCAB}"),
    ],
)
def test_invalid_options_are_refused_in_one_line(model: Transformer, options: dict[str, Any], message: str) -> None:
    assert message in line_of(lambda: generate(model, ROWS, **{"n_new": 3} | options))


def test_a_window_beyond_the_context_is_no_window() -> None:
    far, none = (
        make_model(AttentionConfig(n_heads=4, head_dim=6, window=window), max_seq_len=24) for window in (999, None)
    )
    assert generate(far, ROWS, 16) == generate(none, ROWS, 16)
