"""Training steps of the course's models, beside the same dense architecture built from transformers' Llama classes."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dsmoe_lite.accounting import training_flops
from dsmoe_lite.bench.ratios import compare
from dsmoe_lite.common.errors import RunError
from dsmoe_lite.common.machine import resolve_device
from dsmoe_lite.config import ModelConfig
from dsmoe_lite.model import Transformer
from dsmoe_lite.presets import preset
from dsmoe_lite.study.protocol import GPU

LLAMA = "transformers Llama, dense"
MATMULS = 10  # timed together


@dataclass(frozen=True)
class Place:
    """Where steps are measured, and of what: the first model is dense, and has Llama beside it."""

    models: Mapping[str, ModelConfig]
    batch_size: int
    seq_len: int
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """In which matrices are multiplied."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16


COURSE = ("course-dense", "course-dense-x2", "course-gshard", "course-switch", "course-hash")
PLACES = {
    "cpu": Place({name: preset(name) for name in COURSE}, batch_size=32, seq_len=64),
    "cuda": Place(
        {name: GPU.job(name).model for name in ("dense", "switch", "gshard", "deepseekmoe")},
        GPU.train.batch_size,
        GPU.train.seq_len,
        "cuda",
    ),
}


def bench_train(rounds: int, place: Place = PLACES["cpu"]) -> list[dict[str, Any]]:
    """Time one training step (forward, backward, AdamW) of each model; ratios are to Llama's dense model.

    `of matmul`: the FLOPs a second of a step, as `training_flops` counts them, over those of a product of the shape of
    the dense model's FFN, (tokens, D) x (D, F), in the same turns. InputError for a GPU that is not there.
    """
    resolve_device(place.device)
    tokens = torch.randint(0, 1024, (place.batch_size, place.seq_len + 1), generator=torch.Generator().manual_seed(0))
    tokens, dense = tokens.to(place.device), next(iter(place.models.values()))
    models = {LLAMA: _llama(dense), **{name: Transformer(config) for name, config in place.models.items()}}
    steps = {name: training_step(model.to(place.device), tokens) for name, model in models.items()}
    *rows, product = compare(steps | {"matmul": _products(dense, place)}, rounds)
    of_product = MATMULS * 2 * place.batch_size * place.seq_len * dense.d_model * dense.ffn_width
    for row in rows:
        flops = place.batch_size * training_flops(place.models.get(row["what"], dense), place.seq_len).total
        row["of matmul"] = (flops / row["milliseconds"]) / (of_product / product["milliseconds"])
    return rows


def training_step(model: torch.nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    """What takes one training step of `model` on `tokens` (B, S + 1): forward, backward, AdamW; on a GPU in bf16."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16) if tokens.is_cuda else nullcontext():
            logits = model(tokens[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if tokens.is_cuda:
            torch.cuda.synchronize()

    return step


def _products(dense: ModelConfig, place: Place) -> Callable[[], None]:
    rows = torch.randn(place.batch_size * place.seq_len, dense.d_model, dtype=place.dtype, device=place.device)
    matrix = torch.randn(dense.d_model, dense.ffn_width, dtype=place.dtype, device=place.device)
    out = rows.new_empty(len(rows), dense.ffn_width)

    def step() -> None:
        for _ in range(MATMULS):
            torch.mm(rows, matrix, out=out)
        if out.is_cuda:
            torch.cuda.synchronize()

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
