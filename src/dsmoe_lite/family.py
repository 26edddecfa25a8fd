"""Published models whose sizes the course compares, as configs for `dsmoe count`; they are not for training.

The numbers come from the papers named in data/published.json and from the configs released with the weights. If a model
has another norm, position embedding or activation with as many parameters, its config has RMSNorm, RoPE or SwiGLU
instead. Further differences between a config and its model:

- deepseek-v3: without the module that predicts one more token (MTP), which the published 671B excludes as well.
- deepseek-v2, deepseek-v2-lite: a context of 160K, the released setting of YaRN; the papers report 128K and 32K.
- qwen2.5-72B: without the biases of queries, keys and values, 819,200 parameters.
- llama-3.1-405B: without its scaling of RoPE, which is not YaRN.
- mixtral-8x22B: the vocabulary of its first release, 32000; later releases have 32768.
- dbrx: RMSNorm instead of LayerNorm without bias; queries, keys and values are not clipped at 8.
- grok-1: two norms per block instead of four, SwiGLU instead of a gated FFN with GELU; neither scaled embeddings nor
  capped logits.
- v2-small-mha, v2-large-mha: DeepSeek-V2 (arXiv:2405.04434), Table 9, prints the caches and sizes of these models but
  not their shapes, which are inferred. V2-Lite with full attention reproduces both cache and sizes. V2 with 56 full
  heads reproduces the cache only: it has 235.6B parameters, the table prints 250.8B.
"""

from dataclasses import replace

from dsmoe_lite.config import AttentionConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig

_V2_YARN = YarnConfig(factor=40, original_max_len=4096, mscale=0.707)
_V3_YARN = replace(_V2_YARN, mscale=1.0)


def _mla(n_heads: int, yarn: YarnConfig, q_lora_rank: int | None = 1536) -> MLAConfig:
    """MLA of the shape that V2, V2-Lite and V3 share: d_h 128, d_h^R 64, d_c 512."""
    return MLAConfig(
        n_heads=n_heads,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        kv_lora_rank=512,
        q_lora_rank=q_lora_rank,
        yarn=yarn,
    )


def _deepseek(*, d_model: int, n_layers: int, attention: AttentionConfig | MLAConfig, ffn_width: int) -> ModelConfig:
    """A dense model with the vocabulary, context length and initialisation that DeepSeek's models share up to V2."""
    return ModelConfig(
        vocab_size=102_400,
        d_model=d_model,
        n_layers=n_layers,
        attention=attention,
        ffn_width=ffn_width,
        max_seq_len=4096,
        init_std=0.006,
    )


def _mha(n_heads: int) -> AttentionConfig:
    return AttentionConfig(n_heads=n_heads, head_dim=128)


def _gqa8(n_heads: int, rope_theta: float = 10_000.0) -> AttentionConfig:
    return AttentionConfig(n_heads=n_heads, head_dim=128, rope_theta=rope_theta, n_kv_heads=8)


def _top_k(n_experts: int, top_k: int, width: int) -> MoEConfig:
    """Full-width experts in every block, with gates that sum to 1."""
    return MoEConfig(n_routed_experts=n_experts, top_k=top_k, expert_width=width, norm_topk_prob=True)


_MOE_16B = replace(
    _deepseek(d_model=2048, n_layers=28, attention=_mha(16), ffn_width=10_944),
    moe=MoEConfig(n_routed_experts=64, top_k=6, expert_width=1408, n_shared_experts=2),
    n_dense_layers=1,
)
_V2_LITE = replace(
    _MOE_16B,
    n_layers=27,
    attention=_mla(16, _V2_YARN, q_lora_rank=None),
    max_seq_len=163_840,
)
_V2 = ModelConfig(
    vocab_size=102_400,
    d_model=5120,
    n_layers=60,
    attention=_mla(128, _V2_YARN),
    ffn_width=12_288,
    moe=MoEConfig(
        n_routed_experts=160,
        top_k=6,
        expert_width=1536,
        n_shared_experts=2,
        n_group=8,
        topk_group=3,
        routed_scaling_factor=16.0,
        group_capacity_factor=1.0,
    ),
    n_dense_layers=1,
    max_seq_len=163_840,
    init_std=0.006,
)
V3_EXPERTS = MoEConfig(
    n_routed_experts=256,
    top_k=8,
    expert_width=2048,
    n_shared_experts=1,
    scoring_func="sigmoid",
    expert_bias=True,
    n_group=8,
    topk_group=4,
    group_score="top2",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
)
_V3 = ModelConfig(
    vocab_size=129_280,
    d_model=7168,
    n_layers=61,
    attention=_mla(128, _V3_YARN),
    ffn_width=18_432,
    moe=V3_EXPERTS,
    n_dense_layers=3,
    max_seq_len=163_840,
    init_std=0.006,
)

FAMILY = {
    "deepseek-7B": _deepseek(d_model=4096, n_layers=30, attention=_mha(32), ffn_width=11_008),
    "deepseek-67B": _deepseek(d_model=8192, n_layers=95, attention=_gqa8(64), ffn_width=22_016),
    "deepseekmoe-16B": _MOE_16B,
    "deepseek-v2-lite": _V2_LITE,
    "deepseek-v2": _V2,
    "deepseek-v3": _V3,
    "v2-small-mha": replace(_V2_LITE, attention=_mha(16), max_seq_len=4096),
    "v2-large-mha": replace(_V2, attention=_mha(56), max_seq_len=4096),
    "llama2-7B": ModelConfig(
        vocab_size=32_000,
        d_model=4096,
        n_layers=32,
        attention=_mha(32),
        ffn_width=11_008,
        max_seq_len=4096,
        norm_eps=1e-5,
    ),
    "llama-3.1-405B": ModelConfig(
        vocab_size=128_256,
        d_model=16_384,
        n_layers=126,
        attention=_gqa8(128, 5e5),
        ffn_width=53_248,
        max_seq_len=131_072,
        norm_eps=1e-5,
    ),
    "qwen2.5-72B": ModelConfig(
        vocab_size=152_064,
        d_model=8192,
        n_layers=80,
        attention=_gqa8(64, 1e6),
        ffn_width=29_568,
        max_seq_len=131_072,
        norm_eps=1e-5,
    ),
    "mixtral-8x7B": ModelConfig(
        vocab_size=32_000,
        d_model=4096,
        n_layers=32,
        attention=_gqa8(32, 1e6),
        ffn_width=14_336,
        moe=_top_k(8, 2, 14_336),
        max_seq_len=32_768,
        norm_eps=1e-5,
    ),
    "mixtral-8x22B": ModelConfig(
        vocab_size=32_000,
        d_model=6144,
        n_layers=56,
        attention=_gqa8(48, 1e6),
        ffn_width=16_384,
        moe=_top_k(8, 2, 16_384),
        max_seq_len=65_536,
        norm_eps=1e-5,
    ),
    "dbrx": ModelConfig(
        vocab_size=100_352,
        d_model=6144,
        n_layers=40,
        attention=_gqa8(48, 5e5),
        ffn_width=10_752,
        moe=_top_k(16, 4, 10_752),
        max_seq_len=32_768,
        norm_eps=1e-5,
    ),
    "grok-1": ModelConfig(
        vocab_size=131_072,
        d_model=6144,
        n_layers=64,
        attention=_gqa8(48),
        ffn_width=32_768,
        moe=MoEConfig(n_routed_experts=8, top_k=2, expert_width=32_768),
        max_seq_len=8192,
        tie_embeddings=True,
        norm_eps=1e-5,
    ),
}
