"""The decoder-only Transformer of the course. Its config chooses dense FFNs or experts, and the kind of attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsmoe_lite.common.errors import RunError, require
from dsmoe_lite.config import ModelConfig
from dsmoe_lite.layers.block import Block, Positions
from dsmoe_lite.layers.cache import Cache
from dsmoe_lite.layers.moe import MoELayer
from dsmoe_lite.layers.mtp import MTPModule
from dsmoe_lite.layers.rope import RopeTables, rope_tables
from dsmoe_lite.layers.router import Routing
from dsmoe_lite.layers.sdpa import attention_mask


@dataclass(frozen=True)
class Output:
    """The result of a forward pass."""

    logits: Tensor  # (B, S, V)
    routings: tuple[Routing, ...]  # one per MoE layer, first layer first
    hidden: Tensor | None = None  # (B, S, D), what the head reads
    ahead: tuple[Tensor, ...] = ()  # in training, of MTP module k (B, S - k, V): position i predicts token i + k + 1
    ahead_routings: tuple[Routing, ...] = ()  # of the MTP modules that have experts


def require_finite(logits: Tensor) -> None:
    """Raise RunError if a logit of a trained model is NaN or infinite, as with damaged weights."""
    if not torch.isfinite(logits).all():
        raise RunError("logits: NaN or infinite; training diverged, or the weights are damaged: load other weights")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode, then back into its earlier mode, also after an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Transformer(nn.Module):
    """Token ids (B, S) to next-token logits (B, S, V)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.mtp = nn.ModuleList(MTPModule(config, k) for k in range(1, config.n_mtp + 1))
        attention = config.attention
        tables = rope_tables(attention.rope_dim, config.max_seq_len, attention.rope_theta, attention.yarn)
        self.rope = RopeTables(*tables)
        for name, weight in self.named_parameters():
            if weight.ndim > 1 and not name.endswith("router.noise"):  # noise starts at softplus(0) for every expert
                nn.init.normal_(weight, std=config.init_std)

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers, first block first, in the order of Output.routings; without those of MTP modules."""
        return [module for block in self.blocks for module in block.modules() if isinstance(module, MoELayer)]

    @property
    def all_moe_layers(self) -> list[MoELayer]:
        """The MoE layers, those of MTP modules last."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    def forward(self, tokens: Tensor, cache: Cache | None = None, pad: Tensor | None = None) -> Output:
        """Tokens (B, S) int64 -> Output.

        With `cache`, the tokens follow the cached ones and join them; gradients must be off. A call that fails leaves
        the cache as it was. pad (B,): how many tokens at the left of each row are padding; a cache remembers it.
        Raises InputError for tokens or a pad of another shape, no tokens, ids outside the vocabulary, more than
        max_seq_len tokens in total, and a cache of another model or batch size.
        """
        self._check(tokens, 0 if cache is None else cache.length, pad)
        B, S = tokens.shape
        if cache is not None:
            cache.check(self.config, B)
            pad = cache.padding(pad)
        positions = self._positions(S, tokens.device, cache, pad)
        x, routings = self.embed(tokens), []
        for index, block in enumerate(self.blocks):
            x, routing = block(x, positions, tokens, None if cache is None else cache.layers[index])
            if routing is not None:
                routings.append(routing)
        hidden = self.norm(x)
        looks_ahead = self.training and self.config.n_mtp > 0 and cache is None and pad is None
        ahead, ahead_routings = self._ahead(hidden, tokens) if looks_ahead else ((), ())
        output = Output(self.head(hidden), tuple(routings), hidden, ahead, ahead_routings)
        if cache is not None:
            cache.pad = pad
            cache.advance(S)
        return output

    def _ahead(self, hidden: Tensor, tokens: Tensor) -> tuple[tuple[Tensor, ...], tuple[Routing, ...]]:
        """Logits and routings of all MTP modules for hidden (B, S, D) of the tokens (B, S)."""
        S, n_mtp = tokens.shape[1], self.config.n_mtp
        require(n_mtp < S, "sequence length", S, f"must be above n_mtp = {n_mtp}, the tokens that modules look ahead")
        logits, routings = [], []
        for k, module in enumerate(self.mtp, start=1):
            positions = self._positions(S - k, tokens.device, None, None)
            hidden, routing = module(hidden[:, : S - k], self.embed(tokens[:, k:]), positions, tokens[:, k:])
            logits.append(self.head(hidden))
            if routing is not None:
                routings.append(routing)
        return tuple(logits), tuple(routings)

    def _check(self, tokens: Tensor, start: int, pad: Tensor | None) -> None:
        two_dims = tokens.ndim == 2 and tokens.shape[0] > 0
        require(two_dims, "shape of tokens", tuple(tokens.shape), "must be (batch, sequence), with at least one row")
        if pad is not None:
            shape = tuple(pad.shape) if isinstance(pad, Tensor) else pad
            fits = shape == tokens.shape[:1] and not pad.is_floating_point()
            require(fits, "pad", shape, f"must be a tensor of {len(tokens)} whole numbers, one per row")
        S, longest, V = tokens.shape[1], self.config.max_seq_len, self.config.vocab_size
        require(S > 0, "sequence length", S, "must be at least 1: give the model a token to continue")
        require(start + S <= longest, "sequence length", start + S, f"must be at most max_seq_len = {longest}")
        if tokens.device.type == "cpu":  # reading ids on a GPU would wait for it
            low, high = int(tokens.min()), int(tokens.max())
            wrong = low if low < 0 else high
            require(low >= 0 and high < V, "token id", wrong, f"must be from 0 to {V - 1}, the model's vocabulary")

    def _positions(self, S: int, device: torch.device, cache: Cache | None, pad: Tensor | None) -> Positions:
        start = 0 if cache is None else cache.length
        layer_cache = None if cache is None else cache.layers[0]  # all layers cache the same positions
        mask = attention_mask(S, device, cache=layer_cache, window=self.config.attention.window, pad=pad)
        cos, sin = self.rope.on(device)
        if pad is None:
            return Positions(cos[start : start + S], sin[start : start + S], mask)
        columns = torch.arange(start, start + S, device=pad.device)
        positions = (columns - pad[:, None, None]).clamp(min=0)  # (B, 1, S): each row counts from its first token
        return Positions(cos[positions], sin[positions], mask)
