"""The configs of attention: MHA, GQA and MQA, and multi-head latent attention, each with or without YaRN."""

from dataclasses import dataclass

from dsmoe_lite.common.errors import require, require_int, require_number, require_type
from dsmoe_lite.config.plain import make_plain


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN (Peng et al. 2023, arXiv:2309.00071) as DeepSeek-V2 and V3 use it: a context `factor` times as long.

    Channels that turn more than `beta_fast` times over `original_max_len` tokens keep their frequency. Channels that
    turn less than `beta_slow` times have it divided by `factor`. Between the two, the frequency is interpolated.
    Attention scores are multiplied by (0.1 mscale ln factor + 1)^2; mscale is 0.707 in V2 and 1 in V3.
    """

    factor: float
    original_max_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0

    def __post_init__(self) -> None:
        make_plain(self)
        require_number("factor", self.factor, 1.0)
        require_int("original_max_len", self.original_max_len, 1)
        require_number("beta_slow", self.beta_slow, 0.0, open_low=True)
        require_number("beta_fast", self.beta_fast, 0.0)
        remedy = f"must be above beta_slow = {self.beta_slow:g}"
        require(self.beta_fast > self.beta_slow, "beta_fast", self.beta_fast, remedy)
        require_number("mscale", self.mscale, 0.0)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Attention with rotary positions: MHA; GQA if `n_kv_heads` is below `n_heads`; MQA if it is 1.

    With a sliding `window`, a token sees itself and the window - 1 tokens before it (Mistral 7B, arXiv:2310.06825).
    """

    n_heads: int  # H
    head_dim: int  # even: RoPE rotates pairs of channels
    rope_theta: float = 10_000.0
    n_kv_heads: int | None = None  # H_kv; n_heads / n_kv_heads queries share a key and a value; None: n_heads
    window: int | None = None
    yarn: YarnConfig | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        require_type("yarn", self.yarn, YarnConfig, type(None))
        require_int("n_heads", self.n_heads, 1)
        require_int("head_dim", self.head_dim, 2)
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "must be even: RoPE rotates pairs of channels")
        require_number("rope_theta", self.rope_theta, 1.0, open_low=True)
        if self.n_kv_heads is not None:
            require_int("n_kv_heads", self.n_kv_heads, 1)
            remedy = f"must divide n_heads = {self.n_heads}"
            require(self.n_heads % self.n_kv_heads == 0, "n_kv_heads", self.n_kv_heads, remedy)
        if self.window is not None:
            require_int("window", self.window, 1)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, H_kv."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def rope_dim(self) -> int:
        """Channels of a head that RoPE rotates: all."""
        return self.head_dim

    @property
    def qk_dim(self) -> int:
        """Width of a head's query and key."""
        return self.head_dim

    @property
    def v_dim(self) -> int:
        """Width of a head's value."""
        return self.head_dim

    @property
    def cache_width(self) -> int:
        """Numbers cached per token and layer: a key and a value for each of H_kv heads."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434, Section 2.1): keys and values from one latent vector.

    Without `q_lora_rank`, queries are not compressed, as in V2-Lite.
    """

    n_heads: int  # H
    qk_nope_head_dim: int  # d_h, the part of a query or key without positions
    qk_rope_head_dim: int  # d_h^R, the rotated part; all heads share its key
    v_head_dim: int  # d_v
    kv_lora_rank: int  # d_c, width of the cached latent of keys and values
    q_lora_rank: int | None = None  # d_c', width of the latent of queries
    rope_theta: float = 10_000.0
    yarn: YarnConfig | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        require_type("yarn", self.yarn, YarnConfig, type(None))
        for name in ("n_heads", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank"):
            require_int(name, getattr(self, name), 1)
        require_int("qk_rope_head_dim", self.qk_rope_head_dim, 2)
        even = self.qk_rope_head_dim % 2 == 0
        require(even, "qk_rope_head_dim", self.qk_rope_head_dim, "must be even: RoPE rotates pairs of channels")
        if self.q_lora_rank is not None:
            require_int("q_lora_rank", self.q_lora_rank, 1)
        require_number("rope_theta", self.rope_theta, 1.0, open_low=True)

    @property
    def rope_dim(self) -> int:
        """Channels of a head that RoPE rotates."""
        return self.qk_rope_head_dim

    @property
    def qk_dim(self) -> int:
        """Width of a head's query and key, d_h + d_h^R; scores are divided by its root, also when absorbed."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def v_dim(self) -> int:
        """Width of a head's value."""
        return self.v_head_dim

    @property
    def window(self) -> None:
        """None: a token sees all tokens before it."""
        return None

    @property
    def cache_width(self) -> int:
        """Numbers cached per token and layer: d_c + d_h^R, for any number of heads."""
        return self.kv_lora_rank + self.qk_rope_head_dim


AnyAttention = AttentionConfig | MLAConfig
