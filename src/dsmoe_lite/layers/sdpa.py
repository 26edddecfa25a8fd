"""Which tokens a query may see, and the one call to PyTorch's fused attention that all attention layers share."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_lite.layers.cache import LayerCache


def visible(queries: Tensor, keys: Tensor, window: int | None = None, pad: Tensor | None = None) -> Tensor | None:
    """Say which keys each query sees, as bool (S, N), or (B, 1, S, N) with `pad`; None where plain causality says it.

    queries (S,) and keys (N,): positions, counted from the left edge of the batch. pad (B,): how many tokens at the
    left of each row are padding and seen by no other token (a row of a softmax cannot be empty, so they see
    themselves). None means: the queries are the keys, or the one query sees every key.
    """
    S, N = len(queries), len(keys)
    hidden_by_window = window is not None and bool(queries[-1] - keys.min() >= window)
    if pad is None and not hidden_by_window and (S == N or S == 1):
        return None
    distance = queries[:, None] - keys  # (S, N)
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    if pad is None:
        return seen
    real = keys >= pad[:, None]  # (B, N)
    return (seen & (real[:, None] | (distance == 0)))[:, None]


def mask_of(
    n_tokens: int,
    device: torch.device,
    *,
    cache: LayerCache | None = None,
    window: int | None = None,
    pad: Tensor | None = None,
) -> Tensor | None:
    """Say what n_tokens new tokens see of those in `cache` and of themselves, as `visible` does."""
    new = torch.arange(n_tokens) + (0 if cache is None else cache.length)
    keys = new if cache is None else cache.key_positions(n_tokens)
    mask = visible(new, keys, window, None if pad is None else pad.cpu())
    return None if mask is None else mask.to(device)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """softmax(scale q k^T) v over the keys that `mask` shows, with None as `visible` means it.

    q (B, H, S, d), k (B, G, N, d), v (B, G, N, d_v), G dividing H -> (B, H, S, d_v). The H / G queries of a group share
    its key and value. A narrower v is padded to d and the result cut: the fused kernels want equal widths.
    """
    B, H, S, d = q.shape
    G, N, d_v = k.shape[1], k.shape[2], v.shape[-1]
    if S == 1 and G < H and not _suits_fused(k):
        return attend_by_products(q.view(B, G, H // G, d), k, v, scale, mask).reshape(B, H, 1, d_v)
    if d_v < d:
        v = F.pad(v, (0, d - d_v))
    if S == 1 and G < H:
        q = q.view(B, G, H // G, d)  # one product for the group, not H / G
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return mixed.reshape(B, H, 1, -1)[..., :d_v]
    causal = mask is None and S == N
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=G < H)
    return mixed[..., :d_v]


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """The same for one new token, its queries by group: q (B, G, H / G, d) -> (B, G, H / G, d_v); two matrix products.

    Scores lie as (N, H / G), not the other way round: BLAS shares the products of tall matrices better among threads.
    """
    scores = torch.matmul(k, (q * scale).transpose(-1, -2))  # (B, G, N, H / G)
    if mask is not None:
        scores = scores.masked_fill(~mask.transpose(-1, -2), -torch.inf)
    exact = torch.float32 if scores.dtype in (torch.float16, torch.bfloat16) else scores.dtype
    weights = scores.softmax(dim=-2, dtype=exact).to(v.dtype)
    return torch.matmul(v.transpose(-1, -2), weights).transpose(-1, -2)


def _suits_fused(k: Tensor) -> bool:
    """Whether fused attention is fast for one new token and shared keys k (B, G, N, d).

    On a CPU it gives each of the B G groups to one thread; where there are fewer, the threads wait for each other in
    many small products instead. On a GPU none takes heads wider than 256, such as MLA's latent.
    """
    if k.device.type == "cpu":
        return k.shape[0] * k.shape[1] >= torch.get_num_threads()
    return k.shape[-1] <= 256
