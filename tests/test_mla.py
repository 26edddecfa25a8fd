"""MLA: its two forms compared with a float64 loop over DeepSeek-V2's Equations 9-19, its cache, and three mistakes."""

import copy
import math
import pickle
from dataclasses import replace
from types import MethodType

import pytest
import torch
from attention_by_hand import (
    frequencies_by_hand,
    make_model,
    mla_by_hand,
    normed,
    rotated,
    same_gradients,
    spread,
    tables,
    weighted,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import MLAConfig, ModelConfig, YarnConfig
from dsmoe_lite.layers.cache import Cache, GrowingCache
from dsmoe_lite.layers.mla import MLA
from dsmoe_lite.model import Transformer

D = 7
BASE = MLAConfig(n_heads=3, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, kv_lora_rank=8)
YARN = YarnConfig(factor=4, original_max_len=16, beta_fast=2.0, mscale=0.7)
CASES = {
    "v2-lite": BASE,
    "compressed queries": replace(BASE, q_lora_rank=5),
    "yarn": replace(BASE, yarn=YARN),
    "compressed queries, yarn": replace(BASE, q_lora_rank=5, yarn=YARN),
    "values wider than keys": replace(BASE, v_head_dim=13),
    "a narrow latent": replace(BASE, kv_lora_rank=2),
    "one head": replace(BASE, n_heads=1),
    "another base": replace(BASE, rope_theta=50.0, qk_rope_head_dim=6),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(config: MLAConfig, seed: int = 0) -> MLA:
    torch.manual_seed(seed)
    layer = MLA(D, config).double()
    spread(layer)
    return layer


def run(layer: MLA, x: Tensor, form: str = "auto") -> Tensor:
    return layer.use(form)(x, *tables(layer.config, x.shape[1]))


# The two forms


@pytest.mark.parametrize("name", CASES)
def test_both_forms_equal_the_loop_forward_and_backward(name: str) -> None:
    layer = make(CASES[name])
    x = torch.randn(2, 6, D, dtype=torch.float64, requires_grad=True)
    expected = mla_by_hand(layer, x)
    assert expected.std() > 0.1
    for form in ("naive", "absorbed"):
        actual = run(layer, x, form)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
        same_gradients(layer, actual, mla_by_hand(layer, x), x)


@given(
    heads=st.integers(1, 4), nope=st.integers(1, 6), half=st.integers(1, 3), d_v=st.integers(1, 6),
    rank=st.integers(1, 9), q_rank=st.none() | st.integers(1, 6), B=st.integers(1, 3), S=st.integers(1, 9),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_both_forms_agree_in_all_shapes(heads, nope, half, d_v, rank, q_rank, B, S, seed) -> None:
    layer = make(
        MLAConfig(
            n_heads=heads,
            qk_nope_head_dim=nope,
            qk_rope_head_dim=2 * half,
            v_head_dim=d_v,
            kv_lora_rank=rank,
            q_lora_rank=q_rank,
        ),
        seed,
    )
    x = torch.randn(B, S, D, dtype=torch.float64)
    torch.testing.assert_close(run(layer, x, "absorbed"), run(layer, x, "naive"), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_both_forms_scale_by_the_full_key_width(name: str) -> None:
    c = CASES[name]
    sharpened = 1 if c.yarn is None else (0.1 * 0.7 * math.log(4) + 1) ** 2
    expected = sharpened / math.sqrt(c.qk_nope_head_dim + c.qk_rope_head_dim)
    assert make(c).scale == pytest.approx(expected, rel=1e-15)


def test_use_returns_the_layer_and_refuses_other_names() -> None:
    layer = make(BASE)
    assert layer.form == "auto"
    assert layer.use("naive") is layer
    with pytest.raises(InputError, match="form = 'fast': must be one of auto, naive, absorbed"):
        layer.use("fast")
    assert layer.form == "naive"
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        x = torch.randn(1, 3, D, dtype=torch.float64)
        assert again.form == "naive"
        assert torch.equal(again(x, *tables(BASE, 3)), layer(x, *tables(BASE, 3)))


def test_weights_have_the_shapes_and_names_of_their_parts() -> None:
    sizes = {name: tuple(weight.shape) for name, weight in make(CASES["compressed queries"]).named_parameters()}
    assert sizes == {
        "query.down.weight": (5, D),
        "query.norm.weight": (5,),
        "query.up.weight": (30, 5),
        "kv_down.weight": (12, D),
        "kv_norm.weight": (8,),
        "kv_up.weight": (33, 8),
        "output.weight": (D, 15),
    }
    assert "query.weight" in dict(make(BASE).named_parameters())


def test_norms_of_latents_have_the_models_epsilon() -> None:
    config = ModelConfig(
        vocab_size=11, d_model=D, n_layers=2, attention=CASES["compressed queries"], ffn_width=8, norm_eps=0.125
    )
    norms = {name: module.eps for name, module in Transformer(config).named_modules() if isinstance(module, nn.RMSNorm)}
    assert len(norms) == 2 * 4 + 1
    assert set(norms.values()) == {0.125}


# Which form `auto` takes


def taken(layer: MLA, S: int, old: int) -> str:
    """The form of S tokens that follow `old` others."""
    seen: list[str] = []
    for form in ("_naive", "_absorbed"):

        def spy(self: MLA, *tensors: Tensor, form: str = form) -> Tensor:
            seen.append(form[1:])
            return getattr(MLA, form)(self, *tensors)

        setattr(layer, form, MethodType(spy, layer))
    cache = GrowingCache()
    cos, sin = tables(layer.config, old + S)
    with torch.no_grad():
        if old:
            layer(torch.randn(1, old, D, dtype=torch.float64), cos[:old], sin[:old], cache=cache)
            cache.advance(old)
            seen.clear()
        layer(torch.randn(1, S, D, dtype=torch.float64), cos[old:], sin[old:], cache=cache)
    del layer._naive, layer._absorbed
    (form,) = seen
    return form


def multiplications(c: MLAConfig, S: int, S_kv: int) -> dict[str, int]:
    """Multiplications of one head, without the projections that both forms share and with all S * S_kv scores."""
    d_h, d_r, d_v, d_c = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
    keys, values = S_kv * d_h * d_c, S_kv * d_v * d_c
    query, out = S * d_h * d_c, S * d_v * d_c
    return {
        "naive": keys + values + S * S_kv * (d_h + d_r) + S * S_kv * d_v,
        "absorbed": query + out + S * S_kv * (d_c + d_r) + S * S_kv * d_c,
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v2-lite", {"naive", "absorbed"}),
        ("one head", {"naive", "absorbed"}),
        ("a narrow latent", {"absorbed"}),  # narrower than half a head: absorbed is always cheaper
    ],
)
def test_auto_takes_the_path_with_fewer_multiplications(name: str, expected: set[str]) -> None:
    layer, met = make(CASES[name]), set()
    for S in (1, 2, 3, 5, 8, 13, 21, 40):
        for old in (0, 1, 2, 5, 14, 60):
            counts = multiplications(layer.config, S, old + S)
            best = "absorbed" if counts["absorbed"] < counts["naive"] else "naive"
            assert taken(layer.use("auto"), S, old) == best, (S, old, counts)
            met.add(best)
    assert met == expected


def test_break_even_of_deepseek_v3() -> None:
    """For any number of heads: decoding uses the absorbed form after the first token, prefill never does."""
    c = MLAConfig(n_heads=1, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512)
    layer = MLA(8, c)
    for S_kv in (2, 100, 100_000):
        assert layer._use_absorbed(1, S_kv)
        assert not layer._use_absorbed(S_kv, S_kv)
    least = next(S_kv for S_kv in range(2, 10_000) if layer._use_absorbed(100, S_kv))  # of 100 new tokens
    for S_kv, form in ((least - 1, "naive"), (least, "absorbed")):
        counts = multiplications(c, 100, S_kv)
        assert min(counts, key=lambda key: counts[key]) == form
    assert not layer.use("naive")._use_absorbed(1, 100)
    assert layer.use("absorbed")._use_absorbed(100, 100)


# What is cached


@pytest.mark.parametrize("n_heads", [1, 3, 16])
def test_the_cache_holds_the_latent_and_one_rotated_key_whatever_the_heads(n_heads: int) -> None:
    config = replace(BASE, n_heads=n_heads, q_lora_rank=5)
    assert config.cache_width == 8 + 4
    layer, cache = make(config), GrowingCache(reserve=6)
    x, (cos, sin) = torch.randn(2, 6, D, dtype=torch.float64), tables(config, 6)
    with torch.no_grad():
        layer(x, cos, sin, cache=cache)
    cache.advance(6)
    assert cache.nbytes == 2 * 6 * (8 + 4) * 8  # bytes of float64
    with torch.no_grad():
        (cached,) = cache.extend(torch.zeros(2, 1, 0, 12, dtype=torch.float64))
    turn = frequencies_by_hand(4, 10_000.0)
    for b in range(2):
        for t in range(6):
            down = layer.kv_down.weight @ x[b, t]
            expected = torch.cat((normed(down[:8], layer.kv_norm), rotated(down[8:], t, turn)))
            torch.testing.assert_close(cached[b, 0, t], expected.detach(), rtol=1e-12, atol=1e-12)


def test_a_models_cache_has_the_published_size() -> None:
    """9/2 d_h l numbers a token where d_c = 4 d_h and d_h^R = d_h / 2, as 2.25 groups of GQA (V2, Section 2.1.4)."""
    config = MLAConfig(n_heads=4, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, kv_lora_rank=32)
    model = make_model(config, max_seq_len=16, n_layers=3)
    cache = Cache(model.config, 2, reserve=16)
    with torch.no_grad():
        model(torch.zeros(2, 1, dtype=torch.long), cache)
    assert cache.nbytes == 2 * 16 * 3 * (9 * 8 // 2) * 8
    assert config.cache_width == 2.25 * 2 * 8


# Three mistakes


def scores_of(layer: MLA, x: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Queries and keys without positions of the first head, and the latents, of one sequence (S, D)."""
    c = layer.config
    latents = [normed(layer.kv_down.weight[: c.kv_lora_rank] @ h, layer.kv_norm) for h in x]
    queries = [(layer.query.get_parameter("weight") @ h)[: c.qk_nope_head_dim] for h in x]
    return queries, [layer.kv_up.weight[: c.qk_nope_head_dim] @ latent for latent in latents], latents


def test_wrong_scale_of_the_absorbed_width() -> None:
    layer = make(BASE)
    x = torch.randn(1, 6, D, dtype=torch.float64)
    right = run(layer, x, "absorbed").detach()
    layer.scale = 1 / math.sqrt(BASE.kv_lora_rank + BASE.qk_rope_head_dim)
    wrong = run(layer, x, "absorbed").detach()
    torch.testing.assert_close(wrong[:, 0], right[:, 0])  # a single key has weight 1 at any scale
    assert float((wrong - right)[:, 1:].abs().max()) > 0.01


def test_wrong_positions_on_the_compressed_keys_forbid_absorption() -> None:
    """The product of two rotations is between W_UQ and W_UK: a matrix for every distance instead of one for all."""
    layer, turn = make(BASE), frequencies_by_hand(6, 10_000.0)
    x = torch.randn(6, D, dtype=torch.float64)
    queries, keys, latents = scores_of(layer, x)
    w_uk = layer.kv_up.weight[:6].detach()
    apart = []
    for t, q in enumerate(queries):
        torch.testing.assert_close((w_uk.T @ q) @ latents[0], q @ keys[0])  # without positions, absorption works
        for j in range(t + 1):
            score = rotated(q, t, turn) @ rotated(keys[j], j, turn)
            absorbed = (w_uk.T @ rotated(q, t, turn)) @ latents[j]  # without the rotation of the key
            of_the_distance = (w_uk.T @ rotated(q, t - j, turn)) @ latents[j]
            torch.testing.assert_close(of_the_distance, score)
            apart.append((t, float((absorbed - score).detach().abs())))
    assert max(difference for t, difference in apart if t > 0) > 0.1
    # so every key would need its own absorbed query: S matrices per token instead of one
    matrices = [w_uk.T @ torch.stack([rotated(e, n, turn) for e in torch.eye(6).double()]).T for n in range(6)]
    assert min(float((a - b).abs().max()) for i, a in enumerate(matrices) for b in matrices[:i]) > 0.1


def test_wrong_rotated_key_per_head_enlarges_the_cache() -> None:
    """The keys of N tokens span d_h^R dimensions if shared, H d_h^R if there are H: no smaller cache can hold them."""
    torch.manual_seed(0)
    H, d_r, N = 3, 4, 20
    x, turn = torch.randn(N, 30, dtype=torch.float64), frequencies_by_hand(d_r, 10_000.0)
    for heads in (1, H):
        w_kr = torch.randn(heads * d_r, 30, dtype=torch.float64)
        keys = torch.stack(
            [torch.cat([rotated(part, t, turn) for part in (w_kr @ h).split(d_r)]) for t, h in enumerate(x)]
        )
        assert int(torch.linalg.matrix_rank(keys)) == heads * d_r
    assert replace(BASE, n_heads=H).cache_width == BASE.kv_lora_rank + d_r < BASE.kv_lora_rank + H * d_r


def test_one_head_of_the_loop_is_plain_attention() -> None:
    """The helper of the loops compared with softmax."""
    q, keys, values = torch.randn(4), torch.randn(5, 4), torch.randn(5, 3)
    expected = (0.3 * keys @ q).softmax(dim=0) @ values
    torch.testing.assert_close(weighted(q, list(keys), list(values), 0.3), expected)
