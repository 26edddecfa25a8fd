"""Attention masks, and the one call to PyTorch's fused attention that all attention layers share."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_lite.layers.cache import LayerCache


def visible_keys(queries: Tensor, keys: Tensor, window: int | None = None, pad: Tensor | None = None) -> Tensor | None:
    """Return which keys each query sees: bool (S, S_kv), or (B, 1, S, S_kv) with `pad`; None if no mask is needed.

    queries (S,) and keys (S_kv,): positions, counted from the left edge of the batch. pad (B,): how many tokens at the
    left of each row are padding. Only a padding token itself sees it: a row of a softmax cannot be empty. None means
    causal attention: either the queries are the keys, or one query sees every key.
    """
    S, S_kv = len(queries), len(keys)
    hidden_by_window = window is not None and bool(queries[-1] - keys.min() >= window)
    if pad is None and not hidden_by_window and (S_kv == S or S == 1):
        return None
    distance = queries[:, None] - keys  # (S, S_kv)
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    if pad is None:
        return seen
    real = keys >= pad[:, None]  # (B, S_kv)
    return (seen & (real[:, None] | (distance == 0)))[:, None]


def attention_mask(
    n_tokens: int,
    device: torch.device,
    *,
    cache: LayerCache | None = None,
    window: int | None = None,
    pad: Tensor | None = None,
) -> Tensor | None:
    """Return the mask for n_tokens new tokens over the cache and themselves, in the form of `visible_keys`."""
    queries = torch.arange(n_tokens, device="cpu") + (0 if cache is None else cache.length)
    keys = queries if cache is None else cache.key_positions(n_tokens)
    mask = visible_keys(queries, keys, window, None if pad is None else pad.cpu())
    return None if mask is None else mask.to(device)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Return softmax(scale q k^T) v over the keys that `mask` shows, a mask in the form of `visible_keys`.

    q (B, H, S, d), k (B, H_kv, S_kv, d), v (B, H_kv, S_kv, d_v), H_kv dividing H -> (B, H, S, d_v). The H / H_kv
    queries of a group share a key and a value. If v is narrower than d, it is padded and the result is cut: the fused
    kernels need equal widths.
    """
    B, H, S, d = q.shape
    H_kv, S_kv, d_v = k.shape[1], k.shape[2], v.shape[-1]
    if S == 1 and H_kv < H and not _fused_is_fast(k):
        return sdpa_by_matmul(q.view(B, H_kv, H // H_kv, d), k, v, scale, mask).reshape(B, H, 1, d_v)
    if d_v < d:
        v = F.pad(v, (0, d - d_v))
    if S == 1 and H_kv < H:
        q = q.view(B, H_kv, H // H_kv, d)  # one product per group instead of H / H_kv
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return mixed.reshape(B, H, 1, -1)[..., :d_v]
    causal = mask is None and S_kv == S
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=H_kv < H)
    return mixed[..., :d_v]


def sdpa_by_matmul(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """`sdpa` of one new token as two matrix products, with q by group: (B, H_kv, H / H_kv, d) -> (..., d_v).

    The scores have shape (S_kv, H / H_kv) and not its transpose: BLAS shares the products of tall matrices better
    among threads.
    """
    scores = torch.matmul(k, (q * scale).transpose(-1, -2))  # (B, H_kv, S_kv, H / H_kv)
    if mask is not None:
        scores = scores.masked_fill(~mask.transpose(-1, -2), -torch.inf)
    exact = torch.float32 if scores.dtype in (torch.float16, torch.bfloat16) else scores.dtype
    weights = scores.softmax(dim=-2, dtype=exact).to(v.dtype)
    return torch.matmul(v.transpose(-1, -2), weights).transpose(-1, -2)


def _fused_is_fast(k: Tensor) -> bool:
    """Whether fused attention is fast for one new token and shared keys k (B, H_kv, S_kv, d).

    On a CPU, each of the B * H_kv groups goes to one thread. If there are fewer groups than threads, the threads wait
    for each other in many small products. On a GPU, no fused kernel takes heads wider than 256, such as MLA's latent.
    """
    if k.device.type == "cpu":
        return k.shape[0] * k.shape[1] >= torch.get_num_threads()
    return k.shape[-1] <= 256
