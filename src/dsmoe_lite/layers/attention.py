"""Causal multi-head self-attention with rotary positions (Vaswani et al. 2017, arXiv:1706.03762)."""

import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_lite.config import AttentionConfig
from dsmoe_lite.layers.rope import apply_rope


class Attention(nn.Module):
    """o = W_o [softmax(q_i k_i^T / sqrt(head_dim)) v_i]_i over heads i, causal; no biases."""

    def __init__(self, d_model: int, config: AttentionConfig) -> None:
        super().__init__()
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        width = config.n_heads * config.head_dim
        self.query = nn.Linear(d_model, width, bias=False)
        self.key = nn.Linear(d_model, width, bias=False)
        self.value = nn.Linear(d_model, width, bias=False)
        self.output = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, S, D); cos, sin (S, head_dim / 2) -> (B, S, D)."""
        B, S, _ = x.shape
        heads = (B, S, self.n_heads, self.head_dim)
        q = apply_rope(self.query(x).view(heads).transpose(1, 2), cos, sin)  # (B, H, S, head_dim)
        k = apply_rope(self.key(x).view(heads).transpose(1, 2), cos, sin)
        v = self.value(x).view(heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(B, S, -1))
