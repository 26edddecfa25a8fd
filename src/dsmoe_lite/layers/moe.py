"""One mixture-of-experts layer: route, dispatch, run the experts, combine; then add the shared experts."""

import torch
from torch import Tensor, nn

from dsmoe_lite.common.errors import require
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers.experts import Experts
from dsmoe_lite.layers.ffn import SwiGLU
from dsmoe_lite.layers.router import Router, Routing


class MoELayer(nn.Module):
    """y = sum over shared FFN_i(x) + sum over the chosen g_i FFN_i(x) (DeepSeekMoE Eq 9, arXiv:2401.06066).

    The residual connection is the block's, so a token that every expert drops passes through unchanged. `layer` is the
    block's number, for error messages.
    """

    def __init__(self, d_model: int, config: MoEConfig, vocab_size: int, layer: int | None = None) -> None:
        super().__init__()
        self.router = Router(d_model, config, vocab_size, layer)
        self.experts = Experts(
            config.n_routed_experts, d_model, config.expert_width, config.backend, config.swiglu_limit
        )
        shared = config.n_shared_experts * config.expert_width  # the sum of narrow FFNs is one FFN of their total width
        self.shared = SwiGLU(d_model, shared, config.swiglu_limit) if shared else None

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x (B, S, D), token_ids (B, S) for hash routing -> y (B, S, D) and the Routing of the T = B * S tokens.

        With expert parallelism (`parallel.shard`) dispatch and combine also exchange rows with the other processes.
        Raises InputError for x of another shape, or of another dtype than the weights outside autocast.
        """
        D, dtype = self.experts.gate.shape[-1], self.experts.gate.dtype
        require(x.ndim == 3 and x.shape[-1] == D, "shape of x", tuple(x.shape), f"must be (batch, sequence, {D})")
        mixed = torch.is_autocast_enabled(x.device.type) and x.is_floating_point()
        require(x.dtype == dtype or mixed, "dtype of x", x.dtype, f"must be that of the weights, {dtype}")
        B, S, _ = x.shape
        flat = x.flatten(0, 1)  # (T, D)
        routing = self.router(flat, (B, S), None if token_ids is None else token_ids.flatten())
        dispatched = self.experts.dispatch(flat, routing)
        y_sorted = self.experts(dispatched)  # (N, D), one row per kept choice, in expert order
        y = self.experts.combine(y_sorted, dispatched)  # (T, D)
        if self.shared is not None:
            y = y + self.shared(flat)
        return y.view_as(x), routing
