"""What a model is, as frozen dataclasses that refuse what cannot work when they are made.

Shape legend, used in the whole package: B batch, S sequence, T = B*S tokens, D model, H heads, E experts, K top-k,
F expert width, V vocabulary.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import dacite

from dsmoe_lite.errors import InputError, require, require_choice, require_number, require_whole

SCORING_FUNCS = ("softmax", "hash")
SECOND_CHOICES = ("all", "random")
BACKENDS = ("loop", "padded", "auto")

C = TypeVar("C")


@dataclass(frozen=True)
class AttentionConfig:
    """Multi-head attention with rotary positions. `head_dim` is even: RoPE turns pairs of channels."""

    n_heads: int
    head_dim: int
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        require_whole("n_heads", self.n_heads, 1)
        require_whole("head_dim", self.head_dim, 2)
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "must be even: RoPE rotates pairs of channels")
        require_number("rope_theta", self.rope_theta, 1.0)


@dataclass(frozen=True)
class MoEConfig:
    """One mixture-of-experts layer, as data.

    GShard is `top_k=2, norm_topk_prob=True, second_choice="random"` with a capacity; Switch is `top_k=1` with one;
    DeepSeekMoE is many narrow experts, `n_shared_experts` of them always on; hash routing is `scoring_func="hash"`.
    """

    n_routed_experts: int  # E
    top_k: int  # K
    expert_width: int  # F, hidden width of one routed expert
    n_shared_experts: int = 0  # each of width F, gate 1
    scoring_func: str = "softmax"
    norm_topk_prob: bool = False  # gates divided by their sum over the K chosen
    second_choice: str = "all"  # "random": in training, keep the second expert with probability min(1, 2 * gate)
    capacity_factor: float | None = None  # slots an expert has, over its fair share T*K/E; None: no token is dropped
    eval_capacity_factor: float | None = None  # the same outside training
    backend: str = "auto"

    def __post_init__(self) -> None:
        require_whole("n_routed_experts", self.n_routed_experts, 1)
        require_whole("top_k", self.top_k, 1)
        require(
            self.top_k <= self.n_routed_experts,
            "top_k",
            self.top_k,
            f"must be at most n_routed_experts = {self.n_routed_experts}",
        )
        require_whole("expert_width", self.expert_width, 1)
        require_whole("n_shared_experts", self.n_shared_experts, 0)
        require_choice("scoring_func", self.scoring_func, SCORING_FUNCS)
        require_choice("second_choice", self.second_choice, SECOND_CHOICES)
        require_choice("backend", self.backend, BACKENDS)
        require(
            self.second_choice == "all" or self.top_k == 2,
            "second_choice",
            self.second_choice,
            "needs top_k = 2, the only case GShard defines",
        )
        require(
            self.scoring_func != "hash" or self.top_k == 1,
            "top_k",
            self.top_k,
            "must be 1 with scoring_func = 'hash': the table names one expert per token id",
        )
        require(
            not (self.norm_topk_prob and self.top_k == 1),
            "norm_topk_prob",
            self.norm_topk_prob,
            "must be False with top_k = 1: the gate would be the constant 1 and the router would get no gradient",
        )
        for name in ("capacity_factor", "eval_capacity_factor"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), 0.0, open_low=True)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer: RMSNorm before attention and FFN, SwiGLU, RoPE.

    Without `moe` every FFN is dense, of width `ffn_width`; with it the first `n_dense_layers` stay dense.
    """

    vocab_size: int  # V
    d_model: int  # D
    n_layers: int
    attention: AttentionConfig
    ffn_width: int
    moe: MoEConfig | None = None
    n_dense_layers: int = 0
    max_seq_len: int = 2048
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "ffn_width", "max_seq_len"):
            require_whole(name, getattr(self, name), 1)
        require_whole("n_dense_layers", self.n_dense_layers, 0, self.n_layers)
        require_number("norm_eps", self.norm_eps, 0.0, 1.0, open_low=True)
        require_number("init_std", self.init_std, 0.0, 10.0, open_low=True)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` (from 0) holds experts."""
        return self.moe is not None and layer >= self.n_dense_layers


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain data, for JSON or YAML."""
    return asdict(config)


def from_dict(cls: type[C], values: dict[str, Any]) -> C:
    """Make a config of class `cls` from plain data; unknown fields and wrong types raise InputError."""
    try:
        return dacite.from_dict(cls, values, config=dacite.Config(strict=True, cast=[tuple]))
    except dacite.DaciteError as error:
        raise InputError(f"{cls.__name__}: {error}") from None


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read the mapping in a YAML file, 3e-3 taken as a number; InputError names file and line of what is wrong."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1 takes 3e-3 for text."""

    exponent = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789"))
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)  # a SafeLoader
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}: is not YAML: {error.problem}{where}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2001-99-99
        raise InputError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must be a mapping of names to values")
    return values
