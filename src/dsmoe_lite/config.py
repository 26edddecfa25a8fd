"""Model configs: frozen, keyword-only dataclasses that refuse values that cannot work when they are created.

The letters of all shapes and formulas; each has one meaning in the whole course:

    B  batch: sequences in a batch
    S  sequence: tokens in a sequence
    T  tokens in a batch, B * S
    V  vocabulary: token ids
    D  model width
    L  layers
    H  attention heads
    d  channels of a head
    H_kv  heads of keys and values: H in MHA, fewer in GQA, 1 in MQA
    S_kv  keys that attention reads: cached tokens and the S new ones
    W  sliding window: the tokens a token sees, itself included
    E  routed experts in a layer
    K  top-k: routed experts chosen per token
    F  expert width: hidden channels of a routed expert
    N  rows: choices (token, expert) that are kept, at most T * K
    C  capacity: the most rows an expert takes
    m  segmentation: fine-grained experts made from one ordinary expert
    G  devices, each with a group of E / G experts: n_group
    M  device limit: devices that a token may reach, topk_group
    P  processes that train one model
    alpha  weight of a balance loss
    gamma  bias speed: how far loss-free balancing moves a bias per step
    lambda  weight of the loss of multi-token prediction (MTP)

Letters of a single paper, such as those of MLA and YaRN, are introduced in the module that uses them.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, is_dataclass
from numbers import Number
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import dacite

from dsmoe_lite.common.errors import (
    InputError,
    find_name,
    require,
    require_bool,
    require_choice,
    require_int,
    require_number,
    require_type,
    shorten,
)

SCORING_FUNCS = ("softmax", "sigmoid", "hash")
CHOOSERS = ("token", "expert")
GROUP_SCORES = ("max", "top2")
SECOND_CHOICES = ("all", "random")
BACKENDS = ("loop", "padded", "grouped", "triton", "cuda", "auto")

MAX_LAYERS = 10_000

C = TypeVar("C")


def make_plain(config: Any) -> None:
    """Replace numpy's numbers in the fields of a frozen config by Python's, which JSON can store."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Number) and hasattr(value, "item"):
            object.__setattr__(config, field.name, value.item())


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


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """One mixture-of-experts layer. The designs of the papers are these settings:

    - Shazeer 2017: `noisy_gating=True, norm_topk_prob=True`.
    - GShard: `top_k=2, norm_topk_prob=True, second_choice="random"` and a capacity. Switch: `top_k=1` and a capacity.
    - Hash Layer: `scoring_func="hash", top_k=1`. Expert choice: `chooser="expert"`.
    - Mixtral, DBRX: `norm_topk_prob=True`. A softmax over the K chosen logits equals the softmax over all E logits,
      divided by its sum over the chosen ones.
    - DeepSeekMoE: many narrow experts, and `n_shared_experts` that every token visits; gates are not normalised.
    - DeepSeek-V2: also `n_group`, `topk_group` (devices), `routed_scaling_factor`, `group_capacity_factor`.
    - DeepSeek-V3: `scoring_func="sigmoid", expert_bias=True, norm_topk_prob=True, group_score="top2"`.
    """

    n_routed_experts: int  # E
    top_k: int  # K; with chooser = "expert", the mean number of experts per token
    expert_width: int  # F, hidden width of one routed expert
    n_shared_experts: int = 0  # each of width F and with gate 1
    scoring_func: str = "softmax"
    chooser: str = "token"  # "expert": every expert takes the T * K / E tokens with the highest scores
    noisy_gating: bool = False  # in training, add noise of a learnt size to the logits
    expert_bias: bool = False  # add a bias to the scores that choose experts, not to the gates
    n_group: int = 1  # G, groups of E / G neighbouring experts: devices in V2, nodes in V3
    topk_group: int = 1  # M, groups a token may reach
    group_score: str = "max"  # of a group: its highest score (V2) or "top2", the sum of its highest two (V3)
    norm_topk_prob: bool = False  # divide the gates by their sum over the K chosen experts
    routed_scaling_factor: float = 1.0  # multiplies the gates of routed experts
    scale_normalised: bool = True  # as V3; False as V2's published code, which does not scale normalised gates
    second_choice: str = "all"  # "random": in training, keep the second with probability min(1, 2 * its share)
    capacity_factor: float | None = None  # an expert's slots over its fair share T * K / E; None: drop no token
    eval_capacity_factor: float | None = None  # the same outside training
    group_capacity_factor: float | None = None  # in training, a group's slots over its fair share T * K / n_group
    never_drop_share: float = 0.1  # share of a batch's sequences, rounded, that a full group does not drop
    routing_groups: int = 1  # equal parts of a batch, each with separate slots: GShard's groups
    backend: str = "auto"

    def __post_init__(self) -> None:
        make_plain(self)
        E, K = self.n_routed_experts, self.top_k
        for name in ("n_routed_experts", "top_k", "expert_width", "n_group", "topk_group", "routing_groups"):
            require_int(name, getattr(self, name), 1)
        require_int("n_shared_experts", self.n_shared_experts, 0)
        for name in ("noisy_gating", "expert_bias", "norm_topk_prob", "scale_normalised"):
            require_bool(name, getattr(self, name))
        require(K <= E, "top_k", K, f"must be at most n_routed_experts = {E}")
        require_choice("scoring_func", self.scoring_func, SCORING_FUNCS)
        require_choice("chooser", self.chooser, CHOOSERS)
        require_choice("group_score", self.group_score, GROUP_SCORES)
        require_choice("second_choice", self.second_choice, SECOND_CHOICES)
        require_choice("backend", self.backend, BACKENDS)
        require_number("routed_scaling_factor", self.routed_scaling_factor, 0.0, open_low=True)
        require_number("never_drop_share", self.never_drop_share, 0.0, 1.0)
        for name in ("capacity_factor", "eval_capacity_factor", "group_capacity_factor"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), 0.0, open_low=True)
        self._check_groups()
        self._check_choice()
        needed = self.routing_groups == 1 or self.competes
        remedy = "must be 1 if tokens do not compete for slots: set a capacity or chooser = 'expert'"
        require(needed, "routing_groups", self.routing_groups, remedy)

    @property
    def competes(self) -> bool:
        """Whether tokens compete for slots: which tokens an expert takes depends on the rest of the batch."""
        factors = (self.capacity_factor, self.eval_capacity_factor, self.group_capacity_factor)
        return self.chooser == "expert" or any(factor is not None for factor in factors)

    @property
    def routes_alone(self) -> bool:
        """Whether, outside training, a token's experts depend on that token alone, not on its batch."""
        return self.chooser == "token" and self.eval_capacity_factor is None

    def _check_groups(self) -> None:
        E, G, M = self.n_routed_experts, self.n_group, self.topk_group
        require(E % G == 0, "n_group", G, f"must divide n_routed_experts = {E}")
        require(M <= G, "topk_group", M, f"must be at most n_group = {G}")
        reachable = M * (E // G)
        remedy = f"must be at most {reachable}: topk_group = {M} groups hold {reachable} experts"
        require(self.top_k <= reachable, "top_k", self.top_k, remedy)
        two = self.group_score != "top2" or E // G >= 2
        require(two, "group_score", self.group_score, f"needs two experts per group; n_group = {G} leaves one")

    def _check_choice(self) -> None:
        K = self.top_k
        remedy = "must be False with top_k = 1: the gate would be the constant 1 and the router would get no gradient"
        require(not (self.norm_topk_prob and K == 1), "norm_topk_prob", self.norm_topk_prob, remedy)
        if self.scoring_func == "hash":
            remedy = "must be 1 with scoring_func = 'hash': the table names one expert per token id"
            require(K == 1, "top_k", K, remedy)
            self._require_defaults(
                ("chooser", "noisy_gating", "expert_bias", "n_group"),
                "scoring_func = 'hash': the table alone chooses",
            )
        if self.chooser == "expert":
            self._require_defaults(
                (
                    "noisy_gating",
                    "expert_bias",
                    "n_group",
                    "norm_topk_prob",
                    "second_choice",
                    "capacity_factor",
                    "eval_capacity_factor",
                    "group_capacity_factor",
                ),
                "chooser = 'expert': every expert fills its slots exactly",
            )
        remedy = "needs top_k = 2 and norm_topk_prob = True, the only case GShard defines"
        defined = K == 2 and self.norm_topk_prob
        require(self.second_choice == "all" or defined, "second_choice", self.second_choice, remedy)
        grouped = self.group_capacity_factor is None or self.n_group > 1
        require(grouped, "group_capacity_factor", self.group_capacity_factor, "needs n_group of at least 2")

    def _require_defaults(self, names: Collection[str], reason: str) -> None:
        """Require the default value of each field in `names`."""
        for field in fields(self):
            if field.name in names:
                value = getattr(self, field.name)
                require(value == field.default, field.name, value, f"must be {field.default!r} with {reason}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer: RMSNorm before attention and FFN, SwiGLU, RoPE.

    Without `moe`, every FFN is dense and has width `ffn_width`. With `moe`, the first `n_dense_layers` stay dense, and
    every `interleave`-th layer after them has experts: 1 in DeepSeekMoE-16B (one dense layer first), 2 in GLaM.
    """

    vocab_size: int  # V
    d_model: int  # D
    n_layers: int  # L
    attention: AnyAttention
    ffn_width: int
    moe: MoEConfig | None = None
    n_dense_layers: int = 0
    interleave: int = 1
    max_seq_len: int = 2048
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("vocab_size", "d_model", "ffn_width", "interleave", "max_seq_len"):
            require_int(name, getattr(self, name), 1)
        require_int("n_layers", self.n_layers, 1, MAX_LAYERS)
        require_type("attention", self.attention, AttentionConfig, MLAConfig)
        require_type("moe", self.moe, MoEConfig, type(None))
        require_int("n_dense_layers", self.n_dense_layers, 0, self.n_layers)
        if self.moe is not None:
            rest = self.n_layers - self.n_dense_layers
            remedy = f"must be below n_layers = {self.n_layers}: no layer is left for experts"
            require(rest > 0, "n_dense_layers", self.n_dense_layers, remedy)
            remedy = f"must be at most {rest}, the layers that n_dense_layers = {self.n_dense_layers} leaves"
            require(self.interleave <= rest, "interleave", self.interleave, remedy)
        require_bool("tie_embeddings", self.tie_embeddings)
        require_number("norm_eps", self.norm_eps, 0.0, 1.0, open_low=True)
        require_number("init_std", self.init_std, 0.0, 10.0, open_low=True)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer`, counted from 0, has experts."""
        index = layer - self.n_dense_layers + 1
        return self.moe is not None and index > 0 and index % self.interleave == 0


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a config into plain data, for JSON or YAML."""
    return asdict(config)


def from_dict(cls: type[C], values: dict[str, Any]) -> C:
    """Make a config of class `cls` from plain data. Raises InputError for unknown fields and wrong types."""
    _require_fields(cls, values, "")
    config = dacite.Config(strict=True, cast=[tuple], type_hooks={AnyAttention: _attention})  # type: ignore[dict-item]
    try:
        return dacite.from_dict(cls, values, config=config)
    except dacite.WrongTypeError as error:
        path, found = error.field_path, type(error.value).__name__
        wanted = getattr(error.field_type, "__name__", None) or str(error.field_type)
        raise InputError(f"{path} = {shorten(error.value)}: must be {wanted}, not {found}") from None
    except dacite.MissingValueError as error:
        raise InputError(f"{error.field_path}: is missing; {cls.__name__} needs it") from None
    except dacite.DaciteError as error:
        raise InputError(f"{cls.__name__}: {error}") from None


def _attention(values: Any) -> Any:
    """Make the attention config that has the fields of `values`."""
    return from_dict(_attention_class(values), values) if isinstance(values, dict) else values


def _attention_class(values: dict[str, Any]) -> type[AnyAttention]:
    return MLAConfig if "kv_lora_rank" in values else AttentionConfig


def _require_fields(cls: Any, values: Any, path: str) -> None:
    """Require a mapping whose names are fields of `cls`, with lists and mappings where the fields have them.

    Nested configs are checked too; `path` leads to `values`.
    """
    require(isinstance(values, dict), path.removesuffix(".") or cls.__name__, values, "must be a mapping of names")
    types = get_type_hints(cls)
    for name, value in values.items():
        if name not in types:
            raise InputError(f"{path}{name} = {shorten(value)}: no such field; {find_name(name, types)}")
        if get_origin(types[name]) is tuple:
            require(isinstance(value, list | tuple), f"{path}{name}", value, "must be a list")
        if get_origin(types[name]) is dict:
            require(isinstance(value, dict), f"{path}{name}", value, "must be a mapping of names")
        nested = _config_class(types[name], value)
        if nested is not None and value is not None:
            _require_fields(nested, value, f"{path}{name}.")


def _config_class(annotation: Any, value: Any) -> Any:
    """The config class that `value` is made of under a field's annotation; None if that is no config."""
    union = get_origin(annotation) in (Union, UnionType)
    classes = [one for one in (get_args(annotation) if union else [annotation]) if is_dataclass(one)]
    if len(classes) > 1 and isinstance(value, dict):
        return _attention_class(value)
    return classes[0] if classes else None
