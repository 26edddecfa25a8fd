"""Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434, Equations 9-19 and Appendix C)."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from dsmoe_lite.common.errors import require, require_choice
from dsmoe_lite.config import MLAConfig
from dsmoe_lite.layers.cache import LayerCache
from dsmoe_lite.layers.rope import apply_rope, softmax_scale
from dsmoe_lite.layers.sdpa import attention_mask, sdpa

FORMS = ("auto", "naive", "absorbed")


class MLA(nn.Module):
    """Keys and values of all heads come from one latent c = RMSNorm(W_DKV h) and one rotated key k^R per token.

    The cache stores only c and k^R, as one tensor (B, 1, S, d_c + d_h^R). Two forms give the same numbers. The `naive`
    form computes the keys and values of every head from c. The `absorbed` form multiplies W_UK into the query and W_UV
    into the output, and attends to c itself: multi-query attention with keys of d_c + d_h^R channels and values of d_c
    channels. The scale is 1 / sqrt(d_h + d_h^R) in both. `auto` takes the form with fewer multiplications. The absorbed
    form reads the matrix of `kv_up` and never calls it, so a `kv_up` that does more than multiply (an adapter, a hook,
    a bias) is only used in the naive form.

    The equations omit norms; released models normalise each latent, as this layer does.
    """

    def __init__(self, d_model: int, config: MLAConfig, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.config = config
        self.scale = softmax_scale(config.qk_dim, config.yarn)
        self.form = "auto"
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

        mask and cache: as in Attention.forward.
        """
        B, S, _ = x.shape
        c = self.config
        q = self.query(x).view(B, S, c.n_heads, c.qk_dim).transpose(1, 2)  # (B, H, S, d_h + d_h^R)
        q_nope, q_rope = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        q_rope = apply_rope(q_rope, cos, sin)
        down = self.kv_down(x)[:, None]  # (B, 1, S, d_c + d_h^R)
        latent, k_rope = down.split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        latents = torch.cat((self.kv_norm(latent), apply_rope(k_rope, cos, sin)), dim=-1)
        if mask is None:
            mask = attention_mask(S, x.device, cache=cache)
        if cache is not None:
            (latents,) = cache.extend(latents)  # (B, 1, S_kv, d_c + d_h^R)
        attend = self._absorbed if self._use_absorbed(S, latents.shape[2]) else self._naive
        mixed = attend(q_nope, q_rope, latents, mask)  # (B, H, S, v_head_dim)
        return self.output(mixed.transpose(1, 2).reshape(B, S, -1))

    def use(self, form: str) -> "MLA":
        """Set the form: naive, absorbed or auto. Returns the layer.

        Raises InputError for another name, and for absorbed if `kv_up` does more than multiply by its matrix.
        """
        require_choice("form", form, FORMS)
        self._require_form(form)
        self.form = form
        return self

    def _naive(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        c = self.config
        latent, k_rope = latents.split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        heads = self.kv_up(latent[:, 0]).unflatten(-1, (c.n_heads, -1)).transpose(1, 2)  # (B, H, S_kv, d_h + d_v)
        k_nope, v = heads.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, c.n_heads, -1, -1)), dim=-1)
        return sdpa(torch.cat((q_nope, q_rope), dim=-1), k, v, self.scale, mask)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        c = self.config
        w_uk, w_uv = self.kv_up.weight.unflatten(0, (c.n_heads, -1)).split(
            (c.qk_nope_head_dim, c.v_head_dim), dim=1
        )  # (H, d_h, d_c) and (H, d_v, d_c)
        q = torch.cat((torch.einsum("bhsd,hdc->bhsc", q_nope, w_uk), q_rope), dim=-1)
        mixed = sdpa(q, latents, latents, self.scale, mask)  # as values they need no copy; the rotated part is cut
        return torch.einsum("bhsc,hvc->bhsv", mixed[..., : c.kv_lora_rank], w_uv)

    def _use_absorbed(self, S: int, S_kv: int) -> bool:
        self._require_form(self.form)  # kv_up may have changed
        if self.form != "auto":
            return self.form == "absorbed"
        if not _only_multiplies(self.kv_up):
            return False
        c = self.config
        kv_up = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)  # multiplications per head and token
        naive = S_kv * kv_up + S * S_kv * (c.qk_dim + c.v_head_dim)
        absorbed = S * kv_up + S * S_kv * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
        return absorbed < naive

    def _require_form(self, form: str) -> None:
        possible = form != "absorbed" or _only_multiplies(self.kv_up)
        require(possible, "form", form, "kv_up has an adapter, a hook or a bias, which this form bypasses; use 'naive'")


def _only_multiplies(module: nn.Module) -> bool:
    """Whether calling `module` only multiplies by its `weight`, also if that is parametrized."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and module.bias is None
    return plain and not ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)
