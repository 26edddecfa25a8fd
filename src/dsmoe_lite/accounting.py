"""Parameters, FLOPs and KV cache of a model, computed from its config; no weight is allocated.

A matrix from a to b channels has a * b weights; no layer in this package has a bias. A token that passes through the
matrix costs 2 * a * b FLOPs forward and twice that backward: 6 FLOPs per weight in training. What remains is to count
the weights that a token meets.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from dsmoe_lite.common.errors import require_int
from dsmoe_lite.config import AnyAttention, AttentionConfig, MLAConfig, ModelConfig


@dataclass(frozen=True)
class Count:
    """Parameters of one component: all that exist, and the active ones, which a token meets."""

    total: int
    active: int

    def __add__(self, other: "Count") -> "Count":
        return Count(self.total + other.total, self.active + other.active)


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model by component. Everything that is stored counts once, norms and router included.

    Papers exclude different components from their "activated parameters", so there are three counts. `active_all`
    excludes the experts that a token did not choose. `active_no_input_embed` also excludes the input embedding, which
    is a look-up and no product. `active_no_embed` also excludes the output head. A tied embedding serves as the head,
    so only `active_no_embed` excludes it.
    """

    embed_in: Count
    lm_head: Count  # 0 if tied: the weights count as embed_in
    attention: Count
    dense_ffn: Count
    router: Count  # 0 for hash routing; neither its table nor a balancing bias is a parameter
    routed_experts: Count
    shared_experts: Count
    norms: Count
    mtp: Count = Count(0, 0)  # modules of multi-token prediction, without the embedding and the head that they share

    def rows(self) -> dict[str, Count]:
        """Map component names to counts, in the order in which a token meets the components.

        Without MTP modules: papers do not count them among a model's parameters, nor `training_flops` among its FLOPs.
        """
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "mtp"}

    @property
    def ffn(self) -> Count:
        """All FFN weights, dense or of experts, without the router: "expert params" in DeepSeekMoE's Tables 2, 8, 9."""
        return self.dense_ffn + self.routed_experts + self.shared_experts

    @property
    def total(self) -> int:
        return sum(count.total for count in self.rows().values())

    @property
    def active_all(self) -> int:
        return sum(count.active for count in self.rows().values())

    @property
    def active_no_input_embed(self) -> int:
        tied = self.lm_head.active == 0
        return self.active_all - (0 if tied else self.embed_in.active)

    @property
    def active_no_embed(self) -> int:
        return self.active_all - self.embed_in.active - self.lm_head.active


def parameters(config: ModelConfig) -> Parameters:
    """Count the total and the active parameters of `config` by component."""
    D, L = config.d_model, config.n_layers
    embedding = config.vocab_size * D
    moe_layers = sum(config.is_moe_layer(layer) for layer in range(L))
    router = routed = shared = Count(0, 0)
    if config.moe is not None:
        moe = config.moe
        expert = _swiglu_weights(D, moe.expert_width)
        matrices = 0 if moe.scoring_func == "hash" else 2 if moe.noisy_gating else 1
        router = _all_active(moe_layers * matrices * D * moe.n_routed_experts)
        routed = Count(moe_layers * moe.n_routed_experts * expert, moe_layers * moe.top_k * expert)
        shared = _all_active(moe_layers * moe.n_shared_experts * expert)
    mtp = Count(0, 0)
    if config.n_mtp:  # blocks after the last, each with a projection from 2 D to D and three norms
        before, after = (parameters(replace(config, n_mtp=0, n_layers=L + n)) for n in (0, config.n_mtp))
        own = config.n_mtp * (2 * D * D + 3 * D)
        mtp = Count(after.total - before.total + own, after.active_all - before.active_all + own)
    norms = (2 * L + 1) * D + L * _latent_norm_weights(config.attention)  # two per block and one before the head
    return Parameters(
        embed_in=_all_active(embedding),
        lm_head=_all_active(0 if config.tie_embeddings else embedding),
        attention=_all_active(L * _attention_weights(D, config.attention)),
        dense_ffn=_all_active((L - moe_layers) * _swiglu_weights(D, config.ffn_width)),
        router=router,
        routed_experts=routed,
        shared_experts=shared,
        norms=_all_active(norms),
        mtp=mtp,
    )


def _all_active(parameters: int) -> Count:
    """The count of a component whose parameters are all active."""
    return Count(parameters, parameters)


def _swiglu_weights(d_model: int, width: int) -> int:
    """Weights of one SwiGLU FFN or expert: gate and up (D to F each) and down (F to D)."""
    return 3 * d_model * width


def _attention_weights(d_model: int, config: AnyAttention) -> int:
    """Weights of the attention in one block, without norms.

    MHA, GQA and MQA have matrices for queries (D to H d), keys and values (D to H_kv d each) and output (H d to D),
    with d channels per head. MLA (DeepSeek-V2, arXiv:2405.04434, Section 2.1) has queries, with their latent if there
    is one; down to the latent and the shared rotated key; up to keys and values; output.
    """
    D, H = d_model, config.n_heads
    if isinstance(config, AttentionConfig):
        return 2 * D * H * config.head_dim + 2 * D * config.kv_heads * config.head_dim
    queries, latent = H * config.qk_dim, config.kv_lora_rank
    query = D * queries if config.q_lora_rank is None else config.q_lora_rank * (D + queries)
    down = D * (latent + config.qk_rope_head_dim)
    up = latent * H * (config.qk_nope_head_dim + config.v_head_dim)
    return query + down + up + H * config.v_head_dim * D


def _latent_norm_weights(config: AnyAttention) -> int:
    """Weights of the RMSNorms in one block's attention: only MLA has them, on its latent vectors."""
    return config.kv_lora_rank + (config.q_lora_rank or 0) if isinstance(config, MLAConfig) else 0


def attention_kind(config: AnyAttention) -> str:
    """Name the kind of attention: MHA, GQA, MQA or MLA."""
    if isinstance(config, MLAConfig):
        return "MLA"
    if config.kv_heads == config.n_heads:
        return "MHA"
    return "MQA" if config.kv_heads == 1 else "GQA"


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of one training sequence (forward and backward) by component."""

    seq_len: int
    attention: int  # the projections
    attention_scores: int  # products of queries with keys, and of attention weights with values
    dense_ffn: int
    router: int  # small; excluded from `total`, as in the papers
    routed_experts: int
    shared_experts: int
    lm_head: int

    def rows(self) -> dict[str, int]:
        """Map component names to FLOPs, the router included."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "seq_len"}

    @property
    def total(self) -> int:
        """FLOPs of all components but the router, as in DeepSeekMoE's tables."""
        return sum(self.rows().values()) - self.router

    @property
    def forward_per_token(self) -> int:
        """Forward FLOPs per token: a third of training, since backward costs twice as much as forward."""
        return self.total // (3 * self.seq_len)


def training_flops(config: ModelConfig, seq_len: int) -> TrainingFlops:
    """Count the training FLOPs of one sequence of `seq_len` tokens.

    The FLOPs are S [6 L (4 D^2 + 8 D^2 u) + 12 L D S + 6 V D], where u is the active FFN weights over 8 D^2. No paper
    prints this formula. It gives the rows "FLOPs per 2K/4K Tokens" of DeepSeekMoE (arXiv:2401.06066), Tables 1 to 6,
    and its core is DeepSeek LLM (arXiv:2401.02954), Equation 2. This function uses the config's own widths for 4 D^2
    and 8 D^2 u, and 6 L S^2 H (d_qk + d_v) for 12 L D S^2: the products of queries with keys and of attention weights
    with values in every head. All S^2 scores count, also those that the causal mask or a window hides. MLA counts as
    it is trained, not absorbed. Embedding look-up, norms and router do not count.
    """
    counted, heads = parameters(config), config.attention
    per_weight = 6 * seq_len
    return TrainingFlops(
        seq_len=seq_len,
        attention=per_weight * counted.attention.active,
        attention_scores=6 * config.n_layers * seq_len**2 * heads.n_heads * (heads.qk_dim + heads.v_dim),
        dense_ffn=per_weight * counted.dense_ffn.active,
        router=per_weight * counted.router.active,
        routed_experts=per_weight * counted.routed_experts.active,
        shared_experts=per_weight * counted.shared_experts.active,
        lm_head=per_weight * config.vocab_size * config.d_model,  # the same product if tied
    )


def by_component(config: ModelConfig, seq_len: int) -> list[dict[str, Any]]:
    """One row per component: total and active weights, FLOPs of a training sequence, forward FLOPs per token."""
    counts, flops = parameters(config).rows(), training_flops(config, seq_len).rows()
    names = list(counts)
    names.insert(names.index("attention") + 1, "attention_scores")  # FLOPs without weights
    rows = []
    for name in names:
        count, training = counts.get(name, Count(0, 0)), flops.get(name, 0)
        rows.append(
            {
                "component": name,
                "total": count.total,
                "active": count.active,
                "training_flops": training,
                "forward_flops_per_token": training // (3 * seq_len),
            }
        )
    return rows


IN_WORDS = {"embed_in": "embeddings", "lm_head": "output head", "dense_ffn": "FFN"}


def split_rows(models: Mapping[str, tuple[ModelConfig, int]]) -> list[dict[str, Any]]:
    """Rows {model, component, total, active, flops} of several (config, seq_len), components named in words.

    flops are forward, per token.
    """
    return [
        {"model": name, "component": IN_WORDS.get(row["component"], row["component"].replace("_", " "))}
        | {"total": row["total"], "active": row["active"], "flops": row["forward_flops_per_token"]}
        for name, (config, seq_len) in models.items()
        for row in by_component(config, seq_len)
        if row["total"] or row["training_flops"]
    ]


def formula_flops(*, n_layers: int, d_model: int, vocab_size: int, ffn_units: float, seq_len: int) -> float:
    """Training FLOPs by the formula of `training_flops`, from numbers that papers print.

    `ffn_units` is u: the active FFN weights in units of a standard FFN, which has 8 D^2 weights.
    """
    L, D, V, u, S = n_layers, d_model, vocab_size, ffn_units, seq_len
    return S * (6 * L * (4 * D**2 + 8 * D**2 * u) + 12 * L * D * S + 6 * V * D)


def kv_cache_elements(config: ModelConfig) -> int:
    """Numbers cached per token in all layers: 2 L H_kv d_h in MHA, GQA and MQA; (d_c + d_h^R) L in MLA.

    DeepSeek-V2 (arXiv:2405.04434), Table 1.
    """
    return config.n_layers * config.attention.cache_width


def kv_cache_bytes(config: ModelConfig, n_tokens: int, bits: int, batch_size: int = 1) -> int:
    """Bytes of the KV cache of `batch_size` sequences of `n_tokens` tokens, with `bits` per number, rounded up.

    With a sliding window, the cache keeps the last `window` tokens only. Raises InputError if n_tokens is below 0,
    batch_size below 1 or bits outside 1..64.
    """
    require_int("n_tokens", n_tokens, 0)
    require_int("bits", bits, 1, 64)
    require_int("batch_size", batch_size, 1)
    window = config.attention.window
    cached = n_tokens if window is None else min(n_tokens, window)
    return -(-kv_cache_elements(config) * cached * batch_size * bits // 8)


def cache_rows(models: Mapping[str, ModelConfig]) -> list[dict[str, Any]]:
    """Rows {model, kind, elements_per_token} of several configs; kind is MHA, GQA, MQA or MLA."""
    return [
        {"model": name, "kind": attention_kind(config.attention), "elements_per_token": kv_cache_elements(config)}
        for name, config in models.items()
    ]
