"""Training steps of the course's models, beside the same dense architecture built from transformers' Llama classes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dsmoe_lite.bench.ratios import compare
from dsmoe_lite.config import ModelConfig
from dsmoe_lite.errors import RunError
from dsmoe_lite.model import Transformer
from dsmoe_lite.presets import preset

MODELS = ("course-dense", "course-dense-x2", "course-gshard", "course-switch", "course-hash")


def bench_train(rounds: int, batch_size: int = 32, seq_len: int = 64) -> list[dict[str, Any]]:
    """Time one training step (forward, backward, AdamW) of each model; ratios are to Llama's dense model."""
    tokens = torch.randint(0, 1024, (batch_size, seq_len + 1), generator=torch.Generator().manual_seed(0))
    steps = {"transformers Llama, dense": training_step(_llama(preset("course-dense")), tokens)}
    for name in MODELS:
        steps[name] = training_step(Transformer(preset(name)), tokens)
    return compare(steps, rounds)


def training_step(model: torch.nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    """What takes one training step of `model` on `tokens` (B, S + 1): forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        logits = model(tokens[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _llama(config: ModelConfig) -> torch.nn.Module:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ModuleNotFoundError:
        raise RunError("transformers is not installed: run `make setup`, or `pip install transformers`") from None
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.ffn_width,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.attention.n_heads,
        head_dim=config.attention.qk_dim,
        max_position_embeddings=config.max_seq_len,
        use_cache=False,
    )
    llama._attn_implementation = "sdpa"  # the same attention kernel as ours
    return LlamaForCausalLM(llama)
