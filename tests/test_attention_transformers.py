"""Attention layers and full models compared with those of transformers: the same weights, its cache and ours.

The DeepSeek-V2 and V3 models of transformers rotate neighbouring channels; pairs_to_halves converts their weights.
Further differences:

- There, cos and sin are float32 tables of float32 angles, and norms run in float32. So full models in float64 agree to
  about 3e-6 with logits near 1. V3's layer with float64 norms and our tables agrees up to rounding; V2's layer rotates
  in float32 for any input.
- The routers of V2 and V3 run in float32, Mixtral's in the dtype of the model, ours in the wider of the two.
- Norms on the latents have eps = 1e-6 for any rms_norm_eps; ours have norm_eps.
- With YaRN, only mscale_all_dim scales the softmax there. cos and sin, and so only the rotated channels, are multiplied
  by the factor of mscale over the factor of mscale_all_dim. In the released models both are equal; our `mscale` is
  that case. Without mscale_all_dim, the softmax is not scaled, in V2 and in V3. Models that rotate full heads scale cos
  and sin instead, which has the same effect.
- The cache of a sliding window has window - 1 tokens there, window tokens here.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_by_hand import spread, tables
from torch import Tensor, nn
from transformers_models import attention_weights, both, latent_options, rope_parameters

from dsmoe_lite.config import AttentionConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig
from dsmoe_lite.generate import generate
from dsmoe_lite.layers.attention import Attention
from dsmoe_lite.layers.cache import Cache
from dsmoe_lite.layers.mla import MLA
from dsmoe_lite.layers.rope import rope_frequencies

VOCAB, D, LENGTH = 61, 24, 64
YARN = YarnConfig(factor=4, original_max_len=16, beta_fast=2.0, mscale=0.707)
GQA = AttentionConfig(n_heads=4, head_dim=6, n_kv_heads=2)
LATENT = MLAConfig(n_heads=4, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, kv_lora_rank=8)
COMPRESSED = replace(LATENT, q_lora_rank=10)
V3 = MoEConfig(
    n_routed_experts=8,
    top_k=3,
    expert_width=12,
    n_shared_experts=1,
    scoring_func="sigmoid",
    expert_bias=True,
    norm_topk_prob=True,
    n_group=2,
    topk_group=1,
    group_score="top2",
    routed_scaling_factor=2.5,
)


def of(attention: AttentionConfig | MLAConfig, moe: MoEConfig | None = None) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB,
        d_model=D,
        n_layers=2,
        attention=attention,
        ffn_width=32,
        moe=moe,
        n_dense_layers=int(moe is V3),
        max_seq_len=LENGTH,
    )


MODELS = {
    "llama, gqa": of(GQA),
    "llama, mqa, yarn": of(replace(GQA, n_kv_heads=1, rope_theta=100.0, yarn=YARN)),
    "mixtral, window": of(
        replace(GQA, window=5), MoEConfig(n_routed_experts=6, top_k=2, expert_width=12, norm_topk_prob=True)
    ),
    "deepseek-v2, dense": of(LATENT),
    "deepseek-v2, compressed queries, yarn": of(
        replace(COMPRESSED, yarn=YARN), MoEConfig(n_routed_experts=8, top_k=3, expert_width=12, n_shared_experts=2)
    ),
    "deepseek-v3, compressed queries": of(COMPRESSED, V3),
    "deepseek-v3, yarn": of(replace(LATENT, yarn=replace(YARN, mscale=1.0)), V3),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# One layer


def layer_of(version: int, c: MLAConfig, **change: Any) -> nn.Module:
    """The attention of DeepseekV2 or DeepseekV3 in float64, including its norms."""
    options = latent_options(c) | {"hidden_size": D, "max_position_embeddings": LENGTH} | change
    if version == 2:
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2Config

        return _in_float64(DeepseekV2Attention(DeepseekV2Config(**options), 0))
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3Config

    return _in_float64(DeepseekV3Attention(DeepseekV3Config(**options), 0))


def _in_float64(layer: nn.Module) -> nn.Module:
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        norm = getattr(layer, name)
        if norm is not None:
            setattr(layer, name, nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon))
    return spread(layer).double()


def turns(version: int, cos: Tensor, sin: Tensor) -> Any:
    """Our tables in the form of transformers' layers."""
    if version == 2:
        return torch.complex(cos, sin)[None]
    return tuple(torch.cat((table, table), dim=-1)[None] for table in (cos, sin))


@pytest.mark.parametrize("path", ["naive", "absorbed"])
@pytest.mark.parametrize("yarn", [None, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("c", [LATENT, COMPRESSED], ids=["v2-lite", "compressed queries"])
@pytest.mark.parametrize("version", [2, 3])
def test_mla_equals_deepseeks_forward_and_backward(
    version: int, c: MLAConfig, yarn: YarnConfig | None, path: str
) -> None:
    torch.manual_seed(0)
    c = replace(c, yarn=yarn)
    theirs, ours = layer_of(version, c), MLA(D, c).double().use(path)
    ours.load_state_dict(attention_weights(theirs, c))
    assert ours.scale == pytest.approx(theirs.scaling, rel=1e-15)
    cos, sin = tables(c, 40)
    x = torch.randn(2, 40, D, dtype=torch.float64)
    mine, yours = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual = ours(mine, cos, sin)
    expected, _ = theirs(hidden_states=yours, attention_mask=None, position_embeddings=turns(version, cos, sin))
    close = {"rtol": 1e-11, "atol": 1e-11} if version == 3 else {"rtol": 1e-5, "atol": 1e-5}
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, **close)
    target = torch.randn_like(actual)
    (actual * target).sum().backward()
    (expected * target).sum().backward()
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad, yours.grad, **close)
    down, theirs_down = ours.kv_down.weight.grad, theirs.get_parameter("kv_a_proj_with_mqa.weight").grad
    assert down is not None
    torch.testing.assert_close(down[:8], theirs_down[:8], **close)
    torch.testing.assert_close(down[8:], theirs_down[8:][[0, 2, 1, 3]], **close)  # four channels as halves


def test_weights_that_are_not_converted_give_other_numbers() -> None:
    torch.manual_seed(0)
    theirs, ours = layer_of(3, LATENT), MLA(D, LATENT).double()
    weights = attention_weights(theirs, LATENT)
    weights["query.weight"] = theirs.get_parameter("q_proj.weight").detach()
    ours.load_state_dict(weights)
    cos, sin = tables(LATENT, 20)
    x = torch.randn(1, 20, D, dtype=torch.float64)
    expected, _ = theirs(hidden_states=x, attention_mask=None, position_embeddings=turns(3, cos, sin))
    assert (ours(x, cos, sin) - expected).abs().max() > 0.05


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("mscale", [0.707, 1.0])
def test_yarn_at_published_sizes_equals_theirs(version: int, mscale: float) -> None:
    """Frequencies and scale that their configs give at the sizes of DeepSeek."""
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    c = MLAConfig(
        n_heads=2,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        kv_lora_rank=512,
        yarn=YarnConfig(factor=40, original_max_len=4096, mscale=mscale),
    )
    theirs = layer_of(version, c, max_position_embeddings=163_840)
    assert MLA(D, c).scale == pytest.approx(theirs.scaling, rel=1e-15)
    rotary = (DeepseekV2RotaryEmbedding if version == 2 else DeepseekV3RotaryEmbedding)(theirs.config)
    assert rotary.attention_scaling == 1.0
    torch.testing.assert_close(rope_frequencies(64, yarn=c.yarn).float(), rotary.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize("version", [2, 3])
def test_without_mscale_all_dim_transformers_scales_the_tables_instead(version: int) -> None:
    c = replace(LATENT, yarn=YARN)
    parameters = rope_parameters(c)
    del parameters["mscale_all_dim"]
    theirs = layer_of(version, c, rope_parameters=parameters)
    assert theirs.scaling == pytest.approx(1 / math.sqrt(10))
    assert MLA(D, c).scale > 1.15 * theirs.scaling


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_attention_equals_mixtrals_with_a_window_and_groups(window: int | None) -> None:
    """In transformers, the model makes the mask; here the test does."""
    from transformers.models.mixtral.modeling_mixtral import MixtralAttention, MixtralConfig

    torch.manual_seed(0)
    c = replace(GQA, window=window)
    config = MixtralConfig(
        hidden_size=D, num_attention_heads=4, num_key_value_heads=2, head_dim=6, sliding_window=window,
        attn_implementation="sdpa",
    )  # fmt: skip
    theirs, ours = spread(MixtralAttention(config, 0)).double(), Attention(D, c).double()
    ours.load_state_dict(attention_weights(theirs, c))
    cos, sin = tables(c, 12)
    distance = torch.arange(12)[:, None] - torch.arange(12)
    mask = (distance >= 0) & (distance < (window or 12))
    x = torch.randn(2, 12, D, dtype=torch.float64)
    expected, _ = theirs(x, position_embeddings=turns(3, cos, sin), attention_mask=mask[None, None])
    torch.testing.assert_close(ours(x, cos, sin), expected, rtol=1e-11, atol=1e-12)


# Whole models


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name: str) -> None:
    ours, theirs = both(MODELS[name])
    tokens = torch.randint(0, VOCAB, (2, 40))
    with torch.no_grad():
        actual, expected = ours(tokens).logits, theirs(tokens).logits
    assert expected.std() > 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_decoding_step_by_step_equals_theirs(name: str) -> None:
    from transformers import DynamicCache

    ours, theirs = both(MODELS[name], seed=1)
    tokens, c = torch.randint(0, VOCAB, (2, 40)), MODELS[name].attention
    our_cache, their_cache = Cache(ours.config, 2, reserve=40), DynamicCache(config=theirs.config)
    with torch.no_grad():
        for part in tokens.split([7, 1, 1, 1, 1, 4, 1, 1, 9, 1, 1, 1, 11], dim=1):
            expected = theirs(part, past_key_values=their_cache, use_cache=True).logits
            torch.testing.assert_close(ours(part, our_cache).logits, expected, rtol=0, atol=2e-5)
    theirs_cached = sum(layer.keys.numel() + layer.values.numel() for layer in their_cache.layers)
    our_tokens, their_tokens = (40, 40) if c.window is None else (c.window, c.window - 1)
    assert theirs_cached == 2 * 2 * their_tokens * c.cache_width
    assert our_cache.nbytes == 2 * 2 * our_tokens * c.cache_width * 8


@pytest.mark.parametrize("name", ["llama, gqa", "mixtral, window", "deepseek-v3, compressed queries"])
def test_greedy_tokens_equal_theirs(name: str) -> None:
    ours, theirs = both(MODELS[name], seed=2)
    prompts = torch.randint(0, VOCAB, (3, 6))
    with torch.no_grad():
        generated = theirs.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=30, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    assert generate(ours, prompts, 30) == generated[:, 6:].tolist()
