"""Training steps of the course's models, with a dense Llama of transformers as the baseline."""

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
MATMULS = 10  # in one timing


@dataclass(frozen=True)
class Setup:
    """The models, the batch and the device of a benchmark. The first model is dense; Llama has its architecture."""

    models: Mapping[str, ModelConfig]
    batch_size: int
    seq_len: int
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """The data type of matrix products."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16


COURSE = ("course-dense", "course-dense-x2", "course-gshard", "course-switch", "course-hash")
SETUPS = {
    "cpu": Setup({name: preset(name) for name in COURSE}, batch_size=32, seq_len=64),
    "cuda": Setup(
        {name: GPU.job(name).model for name in ("dense", "switch", "gshard", "deepseekmoe")},
        GPU.train.batch_size,
        GPU.train.seq_len,
        "cuda",
    ),
}


def bench_train(rounds: int, setup: Setup = SETUPS["cpu"]) -> list[dict[str, Any]]:
    """Time one training step (forward, backward, AdamW) of each model; speed ratios are to Llama.

    `of matmul`: the FLOP/s of a step, as counted by `training_flops`, over those of a product of the shape of the dense
    model's FFN, (B * S, D) x (D, ffn_width), in the same rounds. Raises InputError if the setup's GPU is missing.
    """
    resolve_device(setup.device)
    tokens = torch.randint(0, 1024, (setup.batch_size, setup.seq_len + 1), generator=torch.Generator().manual_seed(0))
    tokens, dense = tokens.to(setup.device), next(iter(setup.models.values()))
    models = {LLAMA: _llama(dense), **{name: Transformer(config) for name, config in setup.models.items()}}
    steps = {name: training_step(model.to(setup.device), tokens) for name, model in models.items()}
    *rows, matmul = compare(steps | {"matmul": _matmuls(dense, setup)}, rounds)
    matmul_flops = MATMULS * 2 * setup.batch_size * setup.seq_len * dense.d_model * dense.ffn_width
    for row in rows:
        flops = setup.batch_size * training_flops(setup.models.get(row["what"], dense), setup.seq_len).total
        row["of matmul"] = (flops / row["milliseconds"]) / (matmul_flops / matmul["milliseconds"])
    return rows


def training_step(model: torch.nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    """Return a function that trains `model` for one step on `tokens` (B, S + 1) with AdamW; on a GPU in bf16."""
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


def _matmuls(dense: ModelConfig, setup: Setup) -> Callable[[], None]:
    rows = torch.randn(setup.batch_size * setup.seq_len, dense.d_model, dtype=setup.dtype, device=setup.device)
    matrix = torch.randn(dense.d_model, dense.ffn_width, dtype=setup.dtype, device=setup.device)
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
