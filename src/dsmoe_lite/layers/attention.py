"""Causal self-attention with rotary positions: MHA (Vaswani et al. 2017, arXiv:1706.03762), MQA (Shazeer 2019,
arXiv:1911.02150), GQA (Ainslie et al. 2023, arXiv:2305.13245) and the sliding window of Mistral (arXiv:2310.06825).
"""

from torch import Tensor, nn

from dsmoe_lite.config import AttentionConfig
from dsmoe_lite.layers.cache import LayerCache
from dsmoe_lite.layers.rope import apply_rope, softmax_scale
from dsmoe_lite.layers.sdpa import attention_mask, sdpa


class Attention(nn.Module):
    """o = W_o [softmax(scale q_i k_g^T) v_g]_i over heads i, without biases.

    Head i reads the keys and values of its group g, one of H_kv groups.
    """

    def __init__(self, d_model: int, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = softmax_scale(config.head_dim, config.yarn)
        width, kv_width = config.n_heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = nn.Linear(d_model, width, bias=False)
        self.key = nn.Linear(d_model, kv_width, bias=False)
        self.value = nn.Linear(d_model, kv_width, bias=False)
        self.output = nn.Linear(width, d_model, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """x (B, S, D); cos, sin (S, head_dim / 2), or (B, 1, S, head_dim / 2) -> (B, S, D).

        mask: from `attention_mask`; if it is None, the layer makes its own, without padding. With `cache`, the S tokens
        follow the cached ones. They join the cache when the caller calls its `advance(S)`.
        """
        B, S, _ = x.shape
        q = apply_rope(self._heads(self.query(x)), cos, sin)  # (B, H, S, head_dim)
        k = apply_rope(self._heads(self.key(x)), cos, sin)  # (B, H_kv, S, head_dim)
        v = self._heads(self.value(x))
        if mask is None:
            mask = attention_mask(S, x.device, cache=cache, window=self.config.window)
        if cache is not None:
            k, v = cache.extend(k, v)
        mixed = sdpa(q, k, v, self.scale, mask)
        return self.output(mixed.transpose(1, 2).reshape(B, S, -1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
