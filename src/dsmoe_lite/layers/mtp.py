"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, Section 2.2): modules that predict tokens further ahead.

Module k = 1 .. n_mtp makes, from the state h^{k-1} of token i and the embedding of token i + k,

    h'_i = M_k [RMSNorm(h_i^{k-1}); RMSNorm(Emb(t_{i+k}))]   (Eq 21)
    h^k = TRM_k(h')   (Eq 22)
    P_{i+k+1} = OutHead(h_i^k)   (Eq 23)

Embedding and head are the model's. h^0 is the state that the head reads, after the last norm; each module has a norm of
its own before the head, as the released weights do, and hands that state on. The equations name no norm here.
"""

import torch
from torch import Tensor, nn

from dsmoe_lite.config import ModelConfig
from dsmoe_lite.layers.block import Block, Positions
from dsmoe_lite.layers.cache import LayerCache
from dsmoe_lite.layers.router import Routing


class MTPModule(nn.Module):
    """Module `depth` = 1 .. n_mtp. Its block is that of layer L + depth, if the model went on: with experts or dense.

    `project` multiplies [hidden; embedding] with `mtp_order` "hidden_first", as Eq 21 prints it, and [embedding;
    hidden] with "embedding_first", as the released weights have it.
    """

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        D, eps = config.d_model, config.norm_eps
        self.hidden_first = config.mtp_order == "hidden_first"
        self.hidden_norm = nn.RMSNorm(D, eps=eps)
        self.embedding_norm = nn.RMSNorm(D, eps=eps)
        self.project = nn.Linear(2 * D, D, bias=False)
        self.block = Block(config, config.n_layers + depth - 1)
        self.norm = nn.RMSNorm(D, eps=eps)

    def forward(
        self,
        hidden: Tensor,
        embedded: Tensor,
        positions: Positions,
        token_ids: Tensor,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """hidden and embedded (B, S, D), token_ids (B, S): h^{k-1} of tokens i, and tokens i + k -> h^k and Routing."""
        parts = self.hidden_norm(hidden), self.embedding_norm(embedded)
        joined = torch.cat(parts if self.hidden_first else parts[::-1], dim=-1)
        h, routing = self.block(self.project(joined), positions, token_ids, cache)
        return self.norm(h), routing
