"""One block of the Transformer: attention, then a dense FFN or experts, each with a norm before and a sum after."""

from dataclasses import dataclass

from torch import Tensor, nn

from dsmoe_lite.config import MLAConfig, ModelConfig
from dsmoe_lite.layers.attention import Attention
from dsmoe_lite.layers.cache import LayerCache
from dsmoe_lite.layers.ffn import SwiGLU
from dsmoe_lite.layers.mla import MLA
from dsmoe_lite.layers.moe import MoELayer
from dsmoe_lite.layers.router import Routing


@dataclass(frozen=True)
class Positions:
    """Rotations and attention mask of the tokens of one call; all layers share them."""

    cos: Tensor  # (S, rope_dim / 2), or (B, 1, S, rope_dim / 2) with padding
    sin: Tensor
    mask: Tensor | None  # from `attention_mask`


class Block(nn.Module):
    """u = x + Attention(RMSNorm(x)); h = u + FFN(RMSNorm(u)) (DeepSeekMoE Eq 1-2); the FFN is dense or has experts."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D = config.d_model
        self.attention_norm = nn.RMSNorm(D, eps=config.norm_eps)
        self.attention: Attention | MLA
        if isinstance(config.attention, MLAConfig):
            self.attention = MLA(D, config.attention, config.norm_eps)
        else:
            self.attention = Attention(D, config.attention)
        self.ffn_norm = nn.RMSNorm(D, eps=config.norm_eps)
        moe = config.moe_of(layer)
        self.has_experts = moe is not None  # not the class of `ffn`, which others may wrap
        self.ffn: nn.Module
        if moe is not None:
            self.ffn = MoELayer(D, moe, config.vocab_size, layer)
        else:
            self.ffn = SwiGLU(D, config.ffn_width)

    def forward(
        self, x: Tensor, positions: Positions, token_ids: Tensor, cache: LayerCache | None = None
    ) -> tuple[Tensor, Routing | None]:
        """x (B, S, D), token_ids (B, S) -> (B, S, D) and the Routing, or None in a dense block."""
        u = x + self.attention(self.attention_norm(x), positions.cos, positions.sin, positions.mask, cache)
        normed = self.ffn_norm(u)
        if self.has_experts:
            y, routing = self.ffn(normed, token_ids)
            return u + y, routing
        return u + self.ffn(normed), None
