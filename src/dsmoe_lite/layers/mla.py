"""Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434, Equations 9-19 and Appendix C)."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from dsmoe_lite.common.errors import require_choice
from dsmoe_lite.config import MLAConfig
from dsmoe_lite.layers.cache import LayerCache
from dsmoe_lite.layers.rope import apply_rope, softmax_scale
from dsmoe_lite.layers.sdpa import attend, mask_of

PATHS = ("auto", "naive", "absorbed")


class MLA(nn.Module):
    """Keys and values of all heads from one latent c = RMSNorm(W_DKV h) and one rotated key k^R a token.

    The cache holds c and k^R alone, as one tensor (B, 1, S, d_c + d_h^R). Two paths give the same numbers: `naive`
    makes keys and values of every head from c; `absorbed` takes W_UK into the query and W_UV into the output, and looks
    at c itself, as multi-query attention with keys of d_c + d_h^R and values of d_c channels. The scale is
    1 / sqrt(d_h + d_h^R) in both. `auto` takes the path with fewer multiplications.

    Equations have no norms; released models have one on each latent, and so has this.
    """

    def __init__(self, d_model: int, config: MLAConfig, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.config = config
        self.scale = softmax_scale(config.qk_dim, config.yarn)
        self.path = "auto"
        H, rank = config.n_heads, config.q_lora_rank
        if rank is None:
            self.query: nn.Module = nn.Linear(d_model, H * config.qk_dim, bias=False)
        else:
            down, up = nn.Linear(d_model, rank, bias=False), nn.Linear(rank, H * config.qk_dim, bias=False)
            norm = nn.RMSNorm(rank, eps=norm_eps)
            self.query = nn.Sequential(OrderedDict(down=down, norm=norm, up=up))
        self.kv_down = nn.Linear(d_model, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
        self.kv_norm = nn.RMSNorm(config.kv_lora_rank, eps=norm_eps)
        self.kv_up = nn.Linear(config.kv_lora_rank, H * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.output = nn.Linear(H * config.v_head_dim, d_model, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """x (B, S, D); cos, sin (S, d_h^R / 2), or (B, 1, S, d_h^R / 2) -> (B, S, D).

        mask and cache as in Attention.forward.
        """
        B, S, _ = x.shape
        c = self.config
        q = self.query(x).view(B, S, c.n_heads, c.qk_dim).transpose(1, 2)  # (B, H, S, d_h + d_h^R)
        q_nope, q_rope = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        q_rope = apply_rope(q_rope, cos, sin)
        down = self.kv_down(x)[:, None]  # (B, 1, S, d_c + d_h^R)
        latent, k_rope = down.split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        kept = torch.cat((self.kv_norm(latent), apply_rope(k_rope, cos, sin)), dim=-1)
        if mask is None:
            mask = mask_of(S, x.device, cache=cache)
        if cache is not None:
            (kept,) = cache.extend(kept)
        look = self._absorbed if self._absorbs(S, kept.shape[2]) else self._naive
        mixed = look(q_nope, q_rope, kept, mask)  # (B, H, S, v_head_dim)
        return self.output(mixed.transpose(1, 2).reshape(B, S, -1))

    def use(self, path: str) -> "MLA":
        """Fix the path: naive, absorbed, or auto. Returns itself."""
        require_choice("path", path, PATHS)
        self.path = path
        return self

    def _naive(self, q_nope: Tensor, q_rope: Tensor, kept: Tensor, mask: Tensor | None) -> Tensor:
        c = self.config
        latent, k_rope = kept.split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        heads = self.kv_up(latent[:, 0]).unflatten(-1, (c.n_heads, -1)).transpose(1, 2)  # (B, H, N, d_h + d_v)
        k_nope, v = heads.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, c.n_heads, -1, -1)), dim=-1)
        return attend(torch.cat((q_nope, q_rope), dim=-1), k, v, self.scale, mask)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, kept: Tensor, mask: Tensor | None) -> Tensor:
        c = self.config
        of_keys, of_values = self.kv_up.weight.unflatten(0, (c.n_heads, -1)).split(
            (c.qk_nope_head_dim, c.v_head_dim), dim=1
        )  # (H, d_h, d_c) and (H, d_v, d_c)
        q = torch.cat((torch.einsum("bhsd,hdc->bhsc", q_nope, of_keys), q_rope), dim=-1)
        seen = attend(q, kept, kept, self.scale, mask)  # as values, kept needs no copy; its rotated part is cut
        return torch.einsum("bhsc,hvc->bhsv", seen[..., : c.kv_lora_rank], of_values)

    def _absorbs(self, S: int, N: int) -> bool:
        if self.path != "auto":
            return self.path == "absorbed"
        c = self.config
        through_kv_up = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)  # multiplications a head and token
        naive = N * through_kv_up + S * N * (c.qk_dim + c.v_head_dim)
        absorbed = S * through_kv_up + S * N * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
        return absorbed < naive
