"""The config of a model: its sizes, its attention, and which layers have experts."""

from dataclasses import dataclass

from dsmoe_lite.common.errors import require, require_bool, require_choice, require_int, require_number, require_type
from dsmoe_lite.config.attention import AnyAttention, AttentionConfig, MLAConfig
from dsmoe_lite.config.moe import MoEConfig
from dsmoe_lite.config.plain import make_plain

MAX_LAYERS = 10_000
MTP_ORDERS = ("hidden_first", "embedding_first")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer: RMSNorm before attention and FFN, SwiGLU, RoPE.

    Without `moe`, every FFN is dense and has width `ffn_width`. With `moe`, the first `n_dense_layers` stay dense, and
    every `interleave`-th layer after them has experts: 1 in DeepSeekMoE-16B (one dense layer first), 2 in GLaM. In the
    first `n_hash_layers` of the layers with experts a table chooses them: 3 in DeepSeek-V4. With `n_mtp` the model also
    learns to predict tokens further ahead: 1 in DeepSeek-V3 and V4 (`layers.mtp`).
    """

    vocab_size: int  # V
    d_model: int  # D
    n_layers: int  # L
    attention: AnyAttention
    ffn_width: int
    moe: MoEConfig | None = None
    n_dense_layers: int = 0
    interleave: int = 1
    n_hash_layers: int = 0
    n_mtp: int = 0  # modules of multi-token prediction: how many tokens further the model learns to predict
    mtp_order: str = "hidden_first"  # in a module's projection; "embedding_first" in the released weights
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
        self._check_hash_layers()
        require_int("n_mtp", self.n_mtp, 0, MAX_LAYERS)
        require_choice("mtp_order", self.mtp_order, MTP_ORDERS)
        require_bool("tie_embeddings", self.tie_embeddings)
        require_number("norm_eps", self.norm_eps, 0.0, 1.0, open_low=True)
        require_number("init_std", self.init_std, 0.0, 10.0, open_low=True)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer`, counted from 0, has experts."""
        index = layer - self.n_dense_layers + 1
        return self.moe is not None and index > 0 and index % self.interleave == 0

    def moe_of(self, layer: int) -> MoEConfig | None:
        """The experts of block `layer`, counted from 0; None if its FFN is dense."""
        if self.moe is None or not self.is_moe_layer(layer):
            return None
        by_table = layer - self.n_dense_layers < self.n_hash_layers * self.interleave
        return self.moe.for_hash_layer() if by_table else self.moe

    @property
    def moe_layers(self) -> list[MoEConfig]:
        """The experts of each layer that has them, first layer first."""
        return [moe for moe in map(self.moe_of, range(self.n_layers)) if moe is not None]

    @property
    def all_moe_layers(self) -> list[MoEConfig]:
        """The same with the blocks of MTP modules, which follow the last layer."""
        return [moe for moe in map(self.moe_of, range(self.n_layers + self.n_mtp)) if moe is not None]

    def _check_hash_layers(self) -> None:
        require_int("n_hash_layers", self.n_hash_layers, 0)
        if self.n_hash_layers == 0:
            return
        n_moe_layers = sum(map(self.is_moe_layer, range(self.n_layers)))
        remedy = f"must be at most {n_moe_layers}, the layers with experts"
        require(self.n_hash_layers <= n_moe_layers, "n_hash_layers", self.n_hash_layers, remedy)
        assert self.moe is not None
        scored = self.moe.chooser == "token" and self.moe.scoring_func != "hash" and not self.moe.noisy_gating
        remedy = "must be 0 unless the other layers choose by scores without noise: chooser = 'token'"
        require(scored, "n_hash_layers", self.n_hash_layers, remedy)
