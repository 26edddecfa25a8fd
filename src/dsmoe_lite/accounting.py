"""Parameters, FLOPs and KV cache of a config, counted from its numbers alone: no weight is built.

A matrix from a to b channels has a*b weights (no biases anywhere in this package), and a token that passes through it
costs 2*a*b FLOPs forward and twice that backward: 6 FLOPs a weight in training. The rest is knowing which weights a
token meets.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dsmoe_lite.common.errors import require_whole
from dsmoe_lite.config import AnyAttention, AttentionConfig, MLAConfig, ModelConfig


@dataclass(frozen=True)
class Count:
    """Parameters of one component: those that exist, and those that one token meets."""

    total: int
    active: int

    def __add__(self, other: "Count") -> "Count":
        return Count(self.total + other.total, self.active + other.active)


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model by component; everything that is stored is counted once, norms and router too.

    Papers leave different things out of "activated parameters", so there are three names for it: `active_all` (all but
    the experts a token did not choose), `active_no_input_embed` (also without the input embedding, which is a look-up
    and no product) and `active_no_embed` (also without the output head). A tied embedding works as head, and so only
    the last leaves it out.
    """

    embed_in: Count
    lm_head: Count  # 0 when tied: the weights are embed_in's
    attention: Count
    dense_ffn: Count
    router: Count  # 0 for hash routing: a table is no parameter, nor is a balancing bias
    routed_experts: Count
    shared_experts: Count
    norms: Count

    def rows(self) -> dict[str, Count]:
        """Component name -> Count, in the order in which a token meets them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def ffn(self) -> Count:
        """All FFN weights, dense or experts, no router: the "expert params" of DeepSeekMoE's Tables 2, 8 and 9."""
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
    """Count the parameters of `config` by component, total and active."""
    D, L = config.d_model, config.n_layers
    embedding = config.vocab_size * D
    moe_layers = sum(config.is_moe_layer(layer) for layer in range(L))
    router = routed = shared = Count(0, 0)
    if config.moe is not None:
        moe = config.moe
        expert = swiglu(D, moe.expert_width)
        matrices = 0 if moe.scoring_func == "hash" else 2 if moe.noisy_gating else 1
        router = always(moe_layers * matrices * D * moe.n_routed_experts)
        routed = Count(moe_layers * moe.n_routed_experts * expert, moe_layers * moe.top_k * expert)
        shared = always(moe_layers * moe.n_shared_experts * expert)
    norms = (2 * L + 1) * D + L * latent_norms(config.attention)  # of blocks: before attention and FFN; one at the end
    return Parameters(
        embed_in=always(embedding),
        lm_head=always(0 if config.tie_embeddings else embedding),
        attention=always(L * attention_weights(D, config.attention)),
        dense_ffn=always((L - moe_layers) * swiglu(D, config.ffn_width)),
        router=router,
        routed_experts=routed,
        shared_experts=shared,
        norms=always(norms),
    )


def always(parameters: int) -> Count:
    """A component that every token meets."""
    return Count(parameters, parameters)


def swiglu(d_model: int, width: int) -> int:
    """Weights of one SwiGLU FFN or expert: gate and up (D to F) and down (F to D)."""
    return 3 * d_model * width


def attention_weights(d_model: int, config: AnyAttention) -> int:
    """Weights of one block's attention, without norms.

    MHA, GQA, MQA: queries D to H d, keys and values D to G d each, output H d to D. MLA (DeepSeek-V2,
    arXiv:2405.04434, Section 2.1): queries, through their latent where they have one; down to latent and shared rotated
    key, up to keys and values, output.
    """
    D, H = d_model, config.n_heads
    if isinstance(config, AttentionConfig):
        return 2 * D * H * config.head_dim + 2 * D * config.kv_heads * config.head_dim
    queries, latent = H * config.qk_dim, config.kv_lora_rank
    query = D * queries if config.q_lora_rank is None else config.q_lora_rank * (D + queries)
    down = D * (latent + config.qk_rope_head_dim)
    up = latent * H * (config.qk_nope_head_dim + config.v_head_dim)
    return query + down + up + H * config.v_head_dim * D


def latent_norms(config: AnyAttention) -> int:
    """Weights of one block's RMSNorms inside attention: MLA's, on its latent vectors."""
    return config.kv_lora_rank + (config.q_lora_rank or 0) if isinstance(config, MLAConfig) else 0


def attention_kind(config: AnyAttention) -> str:
    """MHA, GQA, MQA or MLA."""
    if isinstance(config, MLAConfig):
        return "MLA"
    return "MHA" if config.kv_heads == config.n_heads else "MQA" if config.kv_heads == 1 else "GQA"


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of one training sequence (forward and backward) by component."""

    seq_len: int
    attention: int  # the projections
    attention_scores: int  # queries with keys, weights with values
    dense_ffn: int
    router: int  # small; not in `total`, as the papers leave it out
    routed_experts: int
    shared_experts: int
    lm_head: int

    def rows(self) -> dict[str, int]:
        """Component name -> FLOPs, the router's included."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "seq_len"}

    @property
    def total(self) -> int:
        """What DeepSeekMoE's tables print: everything but the router."""
        return sum(self.rows().values()) - self.router

    @property
    def forward_per_token(self) -> int:
        """A third of training (backward costs twice forward), over the tokens."""
        return self.total // (3 * self.seq_len)


def training_flops(config: ModelConfig, seq_len: int) -> TrainingFlops:
    """Count the training FLOPs of one sequence of `seq_len` tokens.

    F = s [6 L (4 d^2 + 8 d^2 m) + 12 L d s + 6 V d], with m the activated FFN weights over 8 d^2. No paper prints it;
    it gives the rows "FLOPs per 2K/4K Tokens" of DeepSeekMoE (arXiv:2401.06066), Tables 1 to 6, and its core is
    DeepSeek LLM (arXiv:2401.02954), Equation 2. Here 4 d^2 and 8 d^2 m are the config's real widths, and 12 L d s^2 is
    6 L s^2 H (d_qk + d_v): a head's query with its key, its weights with its values. All s^2 scores are counted, also
    those that the causal mask or a window hides; MLA's as they are trained, not absorbed. Embedding look-up, norms and
    router are not.
    """
    met, heads = parameters(config), config.attention
    per_weight = 6 * seq_len
    return TrainingFlops(
        seq_len=seq_len,
        attention=per_weight * met.attention.active,
        attention_scores=6 * config.n_layers * seq_len**2 * heads.n_heads * (heads.qk_dim + heads.v_dim),
        dense_ffn=per_weight * met.dense_ffn.active,
        router=per_weight * met.router.active,
        routed_experts=per_weight * met.routed_experts.active,
        shared_experts=per_weight * met.shared_experts.active,
        lm_head=per_weight * config.vocab_size * config.d_model,  # tied or not, the product is done
    )


def by_component(config: ModelConfig, seq_len: int) -> list[dict[str, Any]]:
    """One row a component: weights stored and used by a token, FLOPs of a training sequence and forward for a token."""
    weights, work = parameters(config).rows(), training_flops(config, seq_len).rows()
    names = list(weights)
    names.insert(names.index("attention") + 1, "attention_scores")  # work without weights
    rows = []
    for name in names:
        count, flops = weights.get(name, Count(0, 0)), work.get(name, 0)
        rows.append({"component": name, "total": count.total, "active": count.active})
        rows[-1] |= {"training_flops": flops, "forward_flops_per_token": flops // (3 * seq_len)}
    return rows


def split_rows(models: Mapping[str, tuple[ModelConfig, int]]) -> list[dict[str, Any]]:
    """Rows {model, component, total, active, flops} of several (config, seq_len); flops forward, for a token."""
    return [
        {"model": name, **{key: row[key] for key in ("component", "total", "active")}}
        | {"flops": row["forward_flops_per_token"]}
        for name, (config, seq_len) in models.items()
        for row in by_component(config, seq_len)
        if row["total"] or row["training_flops"]
    ]


def formula_flops(*, n_layers: int, d_model: int, vocab_size: int, ffn_units: float, seq_len: int) -> float:
    """The same F from the five numbers a paper prints: L, d, V, m (in standard FFNs of 8 d^2 weights) and s."""
    L, d, V, m, s = n_layers, d_model, vocab_size, ffn_units, seq_len
    return s * (6 * L * (4 * d**2 + 8 * d**2 * m) + 12 * L * d * s + 6 * V * d)


def kv_cache_elements(config: ModelConfig) -> int:
    """Numbers cached for one token in all layers: 2 L G d_head with G heads of keys and values, (d_c + d_h^R) L in MLA.

    DeepSeek-V2 (arXiv:2405.04434), Table 1.
    """
    return config.n_layers * config.attention.cache_width


def kv_cache_bytes(config: ModelConfig, n_tokens: int, bits: int, batch_size: int = 1) -> int:
    """Bytes that `batch_size` sequences of `n_tokens` tokens keep, at `bits` a number, rounded up to whole bytes.

    With a sliding window the cache rolls: it holds the last `window` tokens at most. InputError for n_tokens below 0,
    batch_size below 1 and bits outside 1..64.
    """
    require_whole("n_tokens", n_tokens, 0)
    require_whole("bits", bits, 1, 64)
    require_whole("batch_size", batch_size, 1)
    window = config.attention.window if isinstance(config.attention, AttentionConfig) else None
    kept = n_tokens if window is None else min(n_tokens, window)
    return -(-kv_cache_elements(config) * kept * batch_size * bits // 8)


def cache_rows(models: Mapping[str, ModelConfig]) -> list[dict[str, Any]]:
    """Rows {model, kind, elements_per_token} of several configs; kind is MHA, GQA, MQA or MLA."""
    return [
        {"model": name, "kind": attention_kind(config.attention), "elements_per_token": kv_cache_elements(config)}
        for name, config in models.items()
    ]
