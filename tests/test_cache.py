"""Caches: any split of a sequence into calls equals the full forward pass; memory; calls that fail leave no trace."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_by_hand import EXPERTS, KINDS, VOCAB, D, make_model, tables
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_samples import line_of, seeded
from torch import Tensor

from dsmoe_lite.config import AttentionConfig, ModelConfig
from dsmoe_lite.layers.cache import Cache, GrowingCache, RollingCache
from dsmoe_lite.model import Transformer

LENGTH = 24
DOUBLE = 8  # bytes


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@torch.no_grad()
def run(model: Transformer, tokens: Tensor, cache: Cache | None = None, pad: Tensor | None = None) -> Tensor:
    return model(tokens, cache, pad).logits


def buffers(thing: Any) -> list[Tensor]:
    """Every tensor that can be reached from an object."""
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, list | tuple):
        return [tensor for item in thing for tensor in buffers(item)]
    return [tensor for item in vars(thing).values() for tensor in buffers(item)] if hasattr(thing, "__dict__") else []


def in_memory(thing: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in buffers(thing))


def random_tokens(B: int, S: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (B, S), generator=seeded(seed))


# Equal to the full forward pass


@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("name", KINDS)
@given(
    parts=st.lists(st.just(1) | st.integers(1, 12), min_size=1, max_size=12), reserve=st.sampled_from([0, 3, 64]),
    padded=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=6, deadline=None)
def test_any_split_into_calls_equals_the_full_forward_pass(name, moe, parts, reserve, padded, seed) -> None:
    model = made(name, moe)
    tokens = random_tokens(2, sum(parts), seed)[:, :64]
    pad = torch.tensor([0, min(5, tokens.shape[1] - 1)]) if padded else None
    expected, cache = run(model, tokens, pad=pad), Cache(model.config, 2, reserve=reserve)
    done = 0
    for part in parts:
        actual = run(model, tokens[:, done : done + part], cache, pad) if done < 64 else expected[:, 64:]
        torch.testing.assert_close(actual, expected[:, done : done + part], rtol=1e-9, atol=1e-9)
        done = min(64, done + part)
        assert cache.length == done


_MADE: dict[Any, Transformer] = {}


def made(name: str, moe: Any = None) -> Transformer:
    """Models by name, made once and shared by the examples of hypothesis."""
    if (name, moe) not in _MADE:
        _MADE[name, moe] = make_model(KINDS[name], moe)
    return _MADE[name, moe]


@pytest.mark.parametrize("window", [1, 2, 3, 8, 23, 24, 25, 1000])
def test_single_steps_of_any_window_equal_the_full_mask(window: int) -> None:
    model = make_model(AttentionConfig(n_heads=4, head_dim=6, n_kv_heads=2, window=window), max_seq_len=LENGTH)
    tokens, cache = random_tokens(2, LENGTH), Cache(model.config, 2)
    actual = torch.cat([run(model, part, cache) for part in tokens.split(1, dim=1)], dim=1)
    torch.testing.assert_close(actual, run(model, tokens), rtol=1e-9, atol=1e-9)
    assert cache.nbytes == in_memory(cache) <= 2 * 2 * min(2 * LENGTH, window) * 24 * DOUBLE
    chunked = Cache(model.config, 2, reserve=LENGTH)
    actual = torch.cat([run(model, part, chunked) for part in tokens.split([9, 1, 1, 7, 1, 5], dim=1)], dim=1)
    torch.testing.assert_close(actual, run(model, tokens), rtol=1e-9, atol=1e-9)
    assert chunked.nbytes == 2 * 2 * min(LENGTH, window) * 24 * DOUBLE


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_a_layer_without_a_mask_asks_its_cache(name: str) -> None:
    """Inside a model, the model passes a mask."""
    layer, attention = made(name).blocks[0].attention, KINDS[name]
    x, (cos, sin) = torch.randn(2, 14, D, generator=seeded(0), dtype=torch.float64), tables(attention, 14)
    cache = GrowingCache() if attention.window is None else RollingCache(attention.window)
    expected, start = layer(x, cos, sin), 0
    for n in (3, 1, 1, 1, 5, 1, 2):
        part = slice(start, start + n)
        y = layer(x[:, part], cos[part], sin[part], cache=cache)
        cache.advance(n)
        torch.testing.assert_close(y, expected[:, part], rtol=1e-11, atol=1e-11)
        start += n


@pytest.mark.parametrize("name", KINDS)
def test_float32_stays_within_1e_4_of_the_full_pass(name: str) -> None:
    model, tokens = make_model(KINDS[name], EXPERTS).float(), random_tokens(2, 64)
    cache = Cache(model.config, 2)
    actual = torch.cat([run(model, part, cache) for part in tokens.split([30, *[1] * 20, 14], dim=1)], dim=1)
    torch.testing.assert_close(actual, run(model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_half_precision_and_autocast_keep_caches_of_their_own_kind(name: str) -> None:
    model, tokens = make_model(KINDS[name]).float(), random_tokens(2, 12)
    exact, parts = run(model, tokens), tokens.split([5, 1, 3, 1, 2], dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        cache = Cache(model.config, 2)
        automatic = torch.cat([run(model, part, cache) for part in parts], dim=1)
    assert {tensor.dtype for tensor in buffers(cache)} == {torch.bfloat16}
    half, cache = model.bfloat16(), Cache(model.config, 2)
    for actual in (automatic, torch.cat([run(half, part, cache) for part in parts], dim=1)):
        assert float((actual - exact).abs().mean() / exact.std()) < 0.1
    assert {tensor.dtype for tensor in buffers(cache)} == {torch.bfloat16}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("reserve", [0, 64])
def test_inference_mode_and_no_grad_can_alternate(name: str, reserve: int) -> None:
    model, tokens = made(name), random_tokens(2, 20)
    cache, actual = Cache(model.config, 2, reserve=reserve), []
    for n, part in enumerate(tokens.split([4, 1, 1, 7, 1, 1, 1, 4], dim=1)):
        with torch.inference_mode() if n % 2 == 0 else nullcontext():
            actual.append(run(model, part, cache))
    torch.testing.assert_close(torch.cat(actual, dim=1), run(model, tokens), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_a_copied_cache_is_independent(name: str) -> None:
    model, tokens, cache = made(name), random_tokens(2, 12), Cache(made(name).config, 2)
    run(model, tokens[:, :8], cache)
    other = copy.deepcopy(cache)
    run(model, random_tokens(2, 4, seed=1), other)
    torch.testing.assert_close(run(model, tokens[:, 8:], cache), run(model, tokens)[:, 8:], rtol=1e-9, atol=1e-9)


# Memory


@pytest.mark.parametrize("name", KINDS)
def test_nbytes_is_the_allocated_memory(name: str) -> None:
    """Elements times bytes times length if the length was reserved; at most the window."""
    model, attention = made(name), KINDS[name]
    for reserve in (0, 11, 20):
        cache = Cache(model.config, 3, reserve=reserve)
        assert cache.nbytes == in_memory(cache) == 0
        for part in random_tokens(3, 20).split([6, 1, 3, 1, 1, 8], dim=1):
            run(model, part, cache)
            assert cache.nbytes == in_memory(cache) == sum(layer.nbytes for layer in cache.layers)
            assert cache.nbytes >= 3 * 2 * min(cache.length, attention.window or 64) * attention.cache_width * DOUBLE
    assert cache.nbytes == 3 * 2 * min(20, attention.window or 64) * attention.cache_width * DOUBLE


@torch.no_grad()
@pytest.mark.parametrize(("reserve", "limit"), [(0, 10**9), (0, 300), (7, 10**9), (300, 300)])
def test_growing_copies_each_token_twice_at_most(reserve: int, limit: int) -> None:
    n, copies, moves = 300, 0, 0
    cache, before = GrowingCache(reserve, limit), []
    for t in range(n):
        cache.extend(torch.full((1, 2, 1, 3), float(t)), torch.zeros(1, 2, 1, 5))
        now = buffers(cache)
        if before and now[0].data_ptr() != before[0].data_ptr():  # the old buffer is alive, so no address is reused
            copies, moves = copies + t, moves + 1
        before = now
        cache.advance(1)
        assert cache.nbytes == in_memory(cache)
    assert copies <= 2 * n
    assert moves <= 10
    assert (moves == 0) == (reserve == n)
    assert before[0].shape[-2] <= min(2 * n, limit)
    assert before[0][0, 1, :n, 2].tolist() == list(range(n))


@torch.no_grad()
@pytest.mark.parametrize("reserve", [0, 3, 100])
def test_rolling_keeps_the_window_and_no_more(reserve: int) -> None:
    window, cache, length = 7, RollingCache(7, reserve), 0
    for n in (2, 1, 1, 5, 1, 30, 1, 7, 8, 1, 1):
        new = torch.arange(length, length + n, dtype=torch.float64).view(1, 1, n, 1)
        (seen,) = cache.extend(new)
        positions = cache.key_positions(n)
        assert seen.flatten().tolist() == positions.tolist()
        assert set(positions.tolist()) == set(range(max(0, length - window + 1), length + n))
        cache.advance(n)
        length += n
        assert cache.length == length
        assert all(tensor.shape[-2] <= window for tensor in buffers(cache))
        assert cache.nbytes == in_memory(cache) <= window * DOUBLE


def test_no_more_is_allocated_than_a_sequence_can_hold() -> None:
    for attention in (KINDS["gqa"], replace(KINDS["gqa"], window=1000)):
        model = make_model(attention, max_seq_len=20)
        cache = Cache(model.config, 1)
        for token in random_tokens(1, 20).split(1, dim=1):
            run(model, token, cache)
        assert cache.nbytes == 2 * 20 * attention.cache_width * DOUBLE


# Calls that fail


@contextmanager
def raising(model: Transformer, error: BaseException) -> Iterator[None]:
    """Raise inside the second layer, after its attention and before its experts."""

    def stop(*_: Any) -> None:
        raise error

    handle = model.blocks[1].ffn.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def bad_token(model: Transformer, tokens: Tensor, cache: Cache) -> None:
    wrong = tokens.clone()
    wrong[-1, -1] = VOCAB
    run(model, wrong, cache)


def in_the_second_layer(model: Transformer, tokens: Tensor, cache: Cache) -> None:
    with raising(model, RuntimeError("in the second layer")):
        run(model, (tokens + 1) % VOCAB, cache)


def interrupted(model: Transformer, tokens: Tensor, cache: Cache) -> None:
    with raising(model, KeyboardInterrupt()):
        run(model, (tokens + 1) % VOCAB, cache)


def too_long(model: Transformer, tokens: Tensor, cache: Cache) -> None:
    run(model, tokens.repeat(1, 65), cache)


def of_another_batch(model: Transformer, tokens: Tensor, cache: Cache) -> None:
    run(model, tokens[:1], cache)


def with_gradients(model: Transformer, tokens: Tensor, cache: Cache) -> None:
    model((tokens + 1) % VOCAB, cache)


def of_another_kind(model: Transformer, tokens: Tensor, cache: Cache) -> None:
    run(copy.deepcopy(model).float(), (tokens + 1) % VOCAB, cache)


def nothing(model: Transformer, tokens: Tensor, cache: Cache) -> None:
    run(model, tokens[:, :0], cache)


FAILURES: list[Callable[[Transformer, Tensor, Cache], None]] = [
    bad_token, in_the_second_layer, interrupted, too_long, of_another_batch, with_gradients, of_another_kind, nothing,
]  # fmt: skip


@pytest.mark.parametrize("fail", FAILURES)
@pytest.mark.parametrize("n", [1, 4], ids=["single", "chunk"])
@pytest.mark.parametrize("name", ["gqa", "window", "mla"])
def test_a_call_that_fails_leaves_no_trace(name: str, n: int, fail) -> None:
    """Before the first call, while buffers grow, and after the window is full; in single tokens and chunks."""
    model, tokens = made(name, EXPERTS), random_tokens(2, 17)
    cache, untouched = Cache(model.config, 2), Cache(model.config, 2)
    for part in tokens.split([3, 1, 4, 1, 1, 6, 1], dim=1):
        length, attempt = cache.length, torch.randint(0, VOCAB, (2, n))
        if length > 0 or fail is not of_another_kind:  # an empty cache accepts any dtype
            with pytest.raises((Exception, KeyboardInterrupt)) as error:
                fail(model, attempt, cache)
            assert "\n" not in str(error.value)
            assert cache.length == length
        assert torch.equal(run(model, part, cache), run(model, part, untouched))


def test_a_first_call_that_fails_settles_no_dtype() -> None:
    model, cache = made("gqa"), Cache(made("gqa").config, 2)
    with pytest.raises(RuntimeError, match="second"), raising(model, RuntimeError("second")):
        run(model, random_tokens(2, 3), cache)
    single = copy.deepcopy(model).float()
    assert torch.equal(run(single, random_tokens(2, 3), cache), run(single, random_tokens(2, 3)))


def test_an_interrupt_between_layers_is_noticed() -> None:
    """Only here can a call leave layers of different lengths: `advance` cannot be undone."""
    model, cache = made("gqa"), Cache(made("gqa").config, 2)
    run(model, random_tokens(2, 3), cache)
    cache.layers[0].advance(1)
    line = line_of(lambda: run(model, random_tokens(2, 1), cache))
    assert line.startswith("lengths of the layers = {3, 4}")


def test_invalid_calls_are_refused_in_one_line() -> None:
    model, cache = made("gqa"), Cache(made("gqa").config, 2)
    run(model, random_tokens(2, 60), cache)
    lines = {fail: line_of(lambda fail=fail: fail(model, random_tokens(2, 1), cache)) for fail in FAILURES[3:]}
    assert lines[too_long] == "sequence length = 125: must be at most max_seq_len = 64"
    assert lines[of_another_batch] == "batch size = 1: must be 2, the batch size of the cache"
    assert lines[with_gradients].startswith("gradients = 'on': must be off: no gradient passes through a cache")
    assert lines[of_another_kind].startswith("cache = torch.float64 on cpu: the new tokens are torch.float32 on cpu")
    assert lines[nothing].startswith("sequence length = 0: must be at least 1")
    assert "token id = 61" in line_of(lambda: bad_token(model, random_tokens(2, 1), cache))


@pytest.mark.parametrize(
    "change",
    [
        {"attention": replace(KINDS["gqa"], n_kv_heads=1)},
        {"attention": replace(KINDS["gqa"], window=5)},
        {"attention": replace(KINDS["gqa"], rope_theta=500.0)},
        {"attention": KINDS["mla"]},
        {"n_layers": 3},
    ],
)
def test_a_cache_of_another_model_is_refused(change: dict[str, Any]) -> None:
    config = made("gqa").config
    other = Transformer(replace(config, **change)).double()
    line = line_of(lambda: run(other, random_tokens(2, 3), Cache(config, 2)))
    assert line.startswith("cache = 2 layers of AttentionConfig(n_heads=4, head_dim=6")
    assert line.endswith("make one with Cache(model.config, batch_size)")


def test_a_model_with_equal_attention_may_use_the_cache() -> None:
    """The cache does not depend on width, vocabulary and FFNs."""
    config = made("gqa").config
    wide = Transformer(replace(config, vocab_size=97, d_model=40, ffn_width=8, max_seq_len=128)).double().eval()
    cache, tokens = Cache(config, 2), random_tokens(2, 70)
    actual = torch.cat([run(wide, part, cache) for part in tokens.split([5, *[1] * 65], dim=1)], dim=1)
    torch.testing.assert_close(actual, run(wide, tokens), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("batch_size", "reserve", "message"),
    [
        (0, 0, "batch_size = 0"),
        (2.0, 0, "batch_size = 2.0"),
        (1, -1, "reserve = -1"),
        (1, 65, "reserve = 65: must be a whole number of at least 0 and at most 64"),
        (1, True, "reserve = True"),
    ],
)
def test_invalid_caches_are_refused(batch_size: int, reserve: int, message: str) -> None:
    config = ModelConfig(vocab_size=VOCAB, d_model=D, n_layers=2, attention=KINDS["mla"], ffn_width=32, max_seq_len=64)
    assert message in line_of(lambda: Cache(config, batch_size, reserve=reserve))


def test_the_cache_keeps_the_padding_of_its_first_call() -> None:
    model = make_model(KINDS["gqa"])
    tokens, pad = random_tokens(2, 12), torch.tensor([0, 4])
    expected, cache = run(model, tokens, pad=pad), Cache(model.config, 2)
    actual = [
        run(model, tokens[:, :7], cache, pad),
        run(model, tokens[:, 7:9], cache),
        run(model, tokens[:, 9:], cache),
    ]
    torch.testing.assert_close(torch.cat(actual, dim=1), expected)
    refusal = "must be that of the call that filled the cache, or omitted"
    other = torch.tensor([4, 0])
    assert line_of(lambda: run(model, tokens[:, :1], cache, other)) == f"pad = [4, 0]: {refusal}"
    plain = Cache(model.config, 2)
    run(model, tokens[:, :7], plain)
    assert line_of(lambda: run(model, tokens[:, 7:], plain, pad)) == f"pad = [0, 4]: {refusal}"
    torch.testing.assert_close(run(model, tokens[:, 7:], plain), run(model, tokens)[:, 7:])
