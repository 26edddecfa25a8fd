"""The decoder-only Transformer of the whole course: its FFNs dense or made of experts, as the config says."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsmoe_lite.config import ModelConfig
from dsmoe_lite.errors import require, require_number, require_whole
from dsmoe_lite.layers.attention import Attention
from dsmoe_lite.layers.ffn import SwiGLU
from dsmoe_lite.layers.moe import MoELayer
from dsmoe_lite.layers.rope import rope_tables
from dsmoe_lite.layers.router import Routing


@dataclass(frozen=True)
class Output:
    """What a forward pass gives."""

    logits: Tensor  # (B, S, V)
    routings: tuple[Routing, ...]  # one for each MoE layer, first layer first


class Block(nn.Module):
    """u = x + Attention(RMSNorm(x)); h = u + FFN(RMSNorm(u)) (DeepSeekMoE Eq 1-2), the FFN dense or of experts."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D = config.d_model
        self.attention_norm = nn.RMSNorm(D, eps=config.norm_eps)
        self.attention = Attention(D, config.attention)
        self.ffn_norm = nn.RMSNorm(D, eps=config.norm_eps)
        self.ffn: SwiGLU | MoELayer
        if config.moe is not None and config.is_moe_layer(layer):
            self.ffn = MoELayer(D, config.moe, config.vocab_size, layer)
        else:
            self.ffn = SwiGLU(D, config.ffn_width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, token_ids: Tensor) -> tuple[Tensor, Routing | None]:
        """x (B, S, D), token_ids (B, S) -> (B, S, D) and the routing, None for a dense block."""
        u = x + self.attention(self.attention_norm(x), cos, sin)
        inner = self.ffn_norm(u)
        if isinstance(self.ffn, MoELayer):
            y, routing = self.ffn(inner, token_ids)
            return u + y, routing
        return u + self.ffn(inner), None


class Transformer(nn.Module):
    """Token ids (B, S) to next-token logits (B, S, V)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        cos, sin = rope_tables(config.attention.head_dim, config.max_seq_len, config.attention.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, weight in self.named_parameters():
            if "norm" not in name and not name.endswith("router.noise"):  # noise starts at softplus(0) for all
                nn.init.normal_(weight, std=config.init_std)

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The layers of experts, first block first: one for each of Output.routings."""
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MoELayer)]

    def forward(self, tokens: Tensor) -> Output:
        """Tokens (B, S) int64, S at most max_seq_len -> Output. InputError when the sequence is too long."""
        S = tokens.shape[1]
        require(
            self.config.max_seq_len >= S,
            "sequence length",
            S,
            f"must be at most max_seq_len = {self.config.max_seq_len}",
        )
        x, routings = self.embed(tokens), []
        for block in self.blocks:
            x, routing = block(x, self.cos[:S], self.sin[:S], tokens)
            if routing is not None:
                routings.append(routing)
        return Output(self.head(self.norm(x)), tuple(routings))


@torch.no_grad()
def generate(
    model: Transformer,
    tokens: Tensor,
    n_new: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Append n_new tokens to tokens (B, S): the likeliest at temperature 0, else from softmax(logits / temperature).

    Only the last max_seq_len tokens are seen. The model is left in the mode it was in.
    """
    require_whole("n_new", n_new, 0)
    require_number("temperature", temperature, 0.0)
    was_training = model.training
    model.eval()
    try:
        for _ in range(n_new):
            logits = model(tokens[:, -model.config.max_seq_len :]).logits[:, -1]  # (B, V)
            if temperature == 0:
                choice = logits.argmax(dim=-1, keepdim=True)
            else:
                choice = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
            tokens = torch.cat((tokens, choice), dim=1)
    finally:
        model.train(was_training)
    return tokens
