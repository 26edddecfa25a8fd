"""Find a needle at four times the trained length, with plain rotary positions, interpolated positions and YaRN.

A small MLA model is pretrained at 64 tokens, first on strings that repeat (`data.needle.copy_batch`), then on needles.
Its recall is measured at 64, 128 and 256 tokens: with the same weights and other positions, and after a short training
at 256 tokens.

data/README.md lists what was tried on seeds 100 to 104 before these settings were fixed.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F

from dsmoe_lite.common.errors import DivergedError, require, require_choice, require_int, require_number, require_same
from dsmoe_lite.common.progress import progress
from dsmoe_lite.common.schema import RECORD_REMEDY, require_entries, require_schema
from dsmoe_lite.config import MLAConfig, ModelConfig, YarnConfig, from_dict, to_dict
from dsmoe_lite.data.needle import NeedleBatch, NeedleConfig, copy_batch, depth_bins, needle_batch
from dsmoe_lite.layers.attention import Attention
from dsmoe_lite.layers.mla import MLA
from dsmoe_lite.layers.rope import RopeTables, rope_frequencies, softmax_scale
from dsmoe_lite.model import Transformer, eval_mode
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.optimizer import learning_rate, make_optimizer, set_learning_rate
from dsmoe_lite.training.provenance import provenance

BATCHES = {"copy": copy_batch, "needle": needle_batch}
KINDS = ("plain", "sharper", "interpolated", "yarn-frequencies", "yarn")
EXTENDED = ("plain", "interpolated", "yarn")  # also trained further at the greater length
SCHEMA_VERSION = 1
ENTRIES = {"finished": bool, "job": dict, "curve": list, "recall": dict, "extension": dict, "provenance": dict}
CURVE_EVERY = 10  # steps between two entries of the recorded curve
EVALUATION_ROWS = 64  # batch size of an evaluation


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Training steps on rows of one kind and length."""

    rows: str  # copy or needle
    seq_len: int
    batch_size: int
    steps: int

    def __post_init__(self) -> None:
        require_choice("rows", self.rows, tuple(BATCHES))
        for name in ("seq_len", "batch_size", "steps"):
            require_int(name, getattr(self, name), 1)


def _model() -> ModelConfig:
    """Two layers of MLA with 8 rotated pairs: in 64 tokens two of them turn more than once, and a third just once."""
    attention = MLAConfig(n_heads=4, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, kv_lora_rank=32)
    return ModelConfig(
        vocab_size=NeedleConfig().vocab_size,
        d_model=64,
        n_layers=2,
        attention=attention,
        ffn_width=64,
        max_seq_len=256,
        init_std=0.1,
    )


@dataclass(frozen=True, kw_only=True)
class NeedleJob:
    """All settings of a run.

    YaRN has the printed beta_fast = 32 and beta_slow = 1. No pair turns 32 times in 64 tokens (the fastest turns 10.2
    times). So only the fastest pair keeps its frequency, and those from the fourth on are divided by the full factor.
    """

    model: ModelConfig = field(default_factory=_model)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    stages: tuple[Stage, ...] = (
        Stage(rows="copy", seq_len=16, batch_size=64, steps=200),
        Stage(rows="copy", seq_len=32, batch_size=32, steps=150),
        Stage(rows="copy", seq_len=64, batch_size=16, steps=150),
        Stage(rows="needle", seq_len=64, batch_size=32, steps=200),
    )
    lr: float = 3e-3
    yarn: YarnConfig = field(default_factory=lambda: YarnConfig(factor=4.0, original_max_len=64))
    extension: Stage = field(default_factory=lambda: Stage(rows="needle", seq_len=256, batch_size=8, steps=50))
    extension_lr: float = 1e-3
    probes: tuple[int, ...] = (5, 10, 20)  # steps of the extension after which recall is measured at its length
    lengths: tuple[int, ...] = (64, 128, 256)
    bins: int = 8  # of the needle's depth
    per_bin: int = 64  # questions per bin
    seed: int = 0

    def __post_init__(self) -> None:
        n, expected = self.model.vocab_size, self.needle.vocab_size
        require(n == expected, "vocab_size", n, f"must be {expected}, as in the needle config")
        longest = max(*self.lengths, self.extension.seq_len, *(stage.seq_len for stage in self.stages))
        fits = longest <= self.model.max_seq_len
        require(fits, "max_seq_len", self.model.max_seq_len, f"must be at least {longest}, the longest row")
        for name in ("lr", "extension_lr"):
            require_number(name, getattr(self, name), 0.0, open_low=True)
        for step in self.probes:
            require_int("probes", step, 1, self.extension.steps)
        require_int("seed", self.seed, 0)

    def seeded(self, seed: int, n_streams: int) -> "NeedleJob":
        """Return the same run with another seed, which decides weights, rows and questions."""
        return replace(self, seed=seed)

    def run(self, folder: Path | None = None) -> dict[str, Any]:
        """Pretrain, change the positions, extend, measure recall; return the record. It cannot resume from `folder`."""
        wall, cpu = time.perf_counter(), time.process_time()
        model, curve = pretrain(self)
        questions = {length: self.questions(length) for length in self.lengths}
        recall = {kind: _recall_by_length(with_positions(model, kind, self.yarn), questions) for kind in KINDS}
        extension = {}
        for kind in EXTENDED:
            extended = with_positions(model, kind, self.yarn)
            extension[kind] = self.extend(extended)
            recall[f"{kind}-extended"] = _recall_by_length(extended, questions)
        return {
            "schema_version": SCHEMA_VERSION,
            "finished": True,
            "job": to_dict(self),
            "seconds": round(time.perf_counter() - wall, 3),
            "cpu_seconds": round(time.process_time() - cpu, 3),
            "curve": curve,
            "recall": recall,
            "extension": extension,
            "provenance": provenance(),
        }

    def check_record(self, record: Mapping[str, Any]) -> None:
        """Raise InputError if `record` has an unknown schema version, or naming the first setting that differs."""
        require_schema(record.get("schema_version"), {SCHEMA_VERSION}, RECORD_REMEDY)
        require_entries(record, ENTRIES, f"not the record of a run; {RECORD_REMEDY}")
        require_same(to_dict(from_dict(NeedleJob, record["job"])), to_dict(self))

    def questions(self, length: int) -> list[NeedleBatch]:
        """Draw the questions of this seed at one length: one batch per depth bin, the same for all kinds."""
        return depth_bins(self.needle, length, self.bins, self.per_bin, "asked", self.seed)

    def extend(self, model: Transformer) -> dict[str, Any]:
        """Train `model` further at the greater length; return its curve, and its mean recall there at `probes`."""
        questions, means = self.questions(self.extension.seq_len), {}

        def probe(step: int) -> None:
            if step in self.probes:
                means[str(step)] = mean(needle_recall(model, questions))

        config = TrainConfig(steps=self.extension.steps, lr=self.extension_lr, warmup_steps=5, weight_decay=0.01)
        curve = _fit(model, [self.extension], self.needle, config, ("extension", self.seed), after=probe)
        return {"curve": curve, "recall": means}


def pretrain(job: NeedleJob) -> tuple[Transformer, list[dict[str, Any]]]:
    """Train a model through the job's stages; return it and its curve, rows {step, rows, seq_len, loss, right}.

    Embeddings start with standard deviation 1. If they started as small as other weights, the outputs of the layers
    would drown them in the residual stream, and the model would not learn the order of tokens.
    """
    torch.manual_seed(job.seed)
    model = Transformer(job.model)
    torch.nn.init.normal_(model.embed.weight)
    config = TrainConfig(steps=sum(stage.steps for stage in job.stages), lr=job.lr, weight_decay=0.01)
    return model, _fit(model, job.stages, job.needle, config, ("learn", job.seed))


def with_positions(model: Transformer, kind: str, yarn: YarnConfig) -> Transformer:
    """Return a copy of `model` with another kind of positions.

    plain: unchanged. sharper: the same frequencies, and attention scores multiplied as in YaRN. interpolated: every
    frequency divided by the factor (arXiv:2306.15595), scores unchanged. yarn-frequencies: YaRN without its factor on
    scores. yarn: YaRN. Raises InputError for any other kind.
    """
    require_choice("kind", kind, KINDS)
    attention = model.config.attention
    if kind.startswith("yarn"):
        attention = replace(attention, yarn=yarn if kind == "yarn" else replace(yarn, mscale=0.0))
    copy = Transformer(replace(model.config, attention=attention)).to(model.embed.weight.device)
    copy.load_state_dict(model.state_dict())
    if kind == "interpolated":
        positions = torch.arange(model.config.max_seq_len, dtype=torch.float64) / yarn.factor
        angles = torch.outer(positions, rope_frequencies(attention.rope_dim, attention.rope_theta))
        copy.rope = RopeTables(angles.cos().float(), angles.sin().float())
    if kind == "sharper":
        for module in copy.modules():
            if isinstance(module, Attention | MLA):
                module.scale = softmax_scale(attention.qk_dim, yarn)
    return copy


@torch.no_grad()
def needle_recall(model: Transformer, bins: Sequence[NeedleBatch]) -> list[float]:
    """The share of questions whose answer is the likeliest token, for each batch."""
    device, shares = model.embed.weight.device, []
    with eval_mode(model):
        for batch in bins:
            parts = batch.tokens.to(device).split(EVALUATION_ROWS)
            right = sum(int((model(part[:, :-1]).logits[:, -1].argmax(dim=-1) == part[:, -1]).sum()) for part in parts)
            shares.append(right / len(batch.tokens))
    return shares


def _recall_by_length(model: Transformer, questions: Mapping[int, Sequence[NeedleBatch]]) -> dict[str, list[float]]:
    return {str(length): needle_recall(model, bins) for length, bins in questions.items()}


def _fit(
    model: Transformer,
    stages: Sequence[Stage],
    needle: NeedleConfig,
    config: TrainConfig,
    key: tuple[object, ...],
    after: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Train through `stages` with one optimizer and one schedule; call after(steps taken) after each step."""
    optimizer, curve, device = make_optimizer(model, config), [], model.embed.weight.device
    model.train()
    steps = [stage for stage in stages for _ in range(stage.steps)]
    for step, stage in enumerate(progress(steps, desc="needle", unit="step")):
        set_learning_rate(optimizer, learning_rate(step, config))
        batch = BATCHES[stage.rows](needle, stage.batch_size, stage.seq_len, *key, step)
        scored = batch.weights.to(device) > 0
        targets = batch.tokens[:, 1:].to(device)[scored]
        logits = model(batch.tokens[:, :-1].to(device)).logits[scored]
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        if not math.isfinite(loss.item()):
            raise DivergedError(f"loss = {loss.item()} at step {step}: lower lr = {config.lr:g}")
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % CURVE_EVERY == 0 or step == config.steps - 1:
            right = (logits.argmax(dim=-1) == targets).float().mean().item()
            figures = {"loss": round(loss.item(), 5), "right": round(right, 4)}
            curve.append({"step": step, "rows": stage.rows, "seq_len": stage.seq_len, **figures})
        if after is not None:
            after(step + 1)
            model.train()
    return curve
