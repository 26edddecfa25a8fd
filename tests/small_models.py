"""One small model with experts, and tokens for it."""

import torch
from torch import Tensor, nn

from dsmoe_lite.config import AttentionConfig, ModelConfig, MoEConfig
from dsmoe_lite.model import Transformer

MOE = MoEConfig(n_routed_experts=6, top_k=2, expert_width=12, n_shared_experts=1)
CONFIG = ModelConfig(
    vocab_size=41,
    d_model=16,
    n_layers=2,
    attention=AttentionConfig(n_heads=2, head_dim=8),
    ffn_width=24,
    moe=MOE,
    max_seq_len=32,
    init_std=0.2,
)
TOKENS = torch.arange(24).view(2, 12) % 41


def made(config: ModelConfig = CONFIG) -> Transformer:
    """A model of this config, always with the same weights, in evaluation mode."""
    torch.manual_seed(0)
    return Transformer(config).eval()


def logits(model: nn.Module) -> Tensor:
    """The logits of TOKENS."""
    with torch.no_grad():
        return model(TOKENS).logits
