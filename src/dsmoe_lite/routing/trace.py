"""One text's way through a model: which experts each token chose, with which gates, and what it cost."""

import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from dsmoe_lite.common.errors import InputError, RunError, require, require_whole
from dsmoe_lite.common.files import atomic_write
from dsmoe_lite.common.progress import progress
from dsmoe_lite.data.corpus import Document
from dsmoe_lite.layers.load import expert_counts
from dsmoe_lite.layers.router import Routing
from dsmoe_lite.model import Transformer, eval_mode
from dsmoe_lite.routing.token_types import token_types

SCHEMA_VERSION = 1
MOST_CHARACTERS = 1_000_000
MOST_DEVICES = 127  # int8


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """What charts, metrics and the explorer read. T tokens, L MoE layers, K experts a token, E routed experts.

    Text is cut into windows that know nothing of each other; every array runs over all windows in order.
    """

    tokens: tuple[str, ...]  # T; joined they are the text; "" where a token is a further byte of a character
    token_ids: np.ndarray  # (T,) int32
    domain: tuple[str, ...]  # T, "" where unknown
    token_type: tuple[str, ...]  # T, of token_types.TYPES
    expert: np.ndarray  # (L, T, K) int16, highest gate first; -1: none
    gate: np.ndarray  # (L, T, K) float16, 0 where there is no expert
    kept: np.ndarray  # (L, T, K) bool, False where capacity dropped the choice
    scores: np.ndarray  # (L, T, E) float16, the router's affinities
    loss: np.ndarray  # (T,) float32, nats, of predicting this token from those before it; NaN at a window's start
    device_of: np.ndarray  # (E,) int8
    n_shared: int
    n_devices: int

    @property
    def n_layers(self) -> int:
        """L."""
        return self.expert.shape[0]

    @property
    def n_routed(self) -> int:
        """E."""
        return self.scores.shape[-1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.expert.shape[-1]

    @property
    def mean_loss(self) -> float:
        """Nats a token, over the tokens that were predicted; NaN where none was."""
        known = self.loss[np.isfinite(self.loss)]
        return float(known.mean()) if len(known) else float("nan")

    def layer(self, number: int) -> "LayerTrace":
        """One MoE layer, counted from 0, as the metrics take it. InputError for a layer that is not there."""
        require_whole("layer", number, 0, self.n_layers - 1)
        return LayerTrace(
            torch.from_numpy(self.expert[number].astype(np.int64)),
            torch.from_numpy(self.kept[number]),
            self.n_routed,
        )

    @classmethod
    def of(
        cls,
        model: Transformer,
        tokenizer: Tokenizer,
        text: str | Sequence[Document],
        *,
        window: int | None = None,
        n_devices: int | None = None,
    ) -> Self:
        """Run `model`, in evaluation mode, over a text or over documents with their domains.

        Every document starts a new window of at most `window` tokens (max_seq_len, but a model trained on shorter
        sequences should get their length). Experts stand on `n_devices` devices in order; by default as many as the
        config has groups. InputError for an empty text, one too long, a model without experts, a tokenizer with more
        ids than the model.
        """
        _check_model(model, tokenizer)
        documents = [Document(text, "")] if isinstance(text, str) else list(text)
        _check_text(documents)
        window = model.config.max_seq_len if window is None else window
        require_whole("window", window, 1, model.config.max_seq_len)
        moe = model.config.moe
        assert moe is not None
        n_devices = moe.n_group if n_devices is None else n_devices
        require_whole("n_devices", n_devices, 1, min(moe.n_routed_experts, MOST_DEVICES))
        pieces_of = [cut(tokenizer, document.text) for document in documents]
        ids = [token_id for pieces in pieces_of for token_id, _ in pieces]
        tokens = [token for pieces in pieces_of for _, token in pieces]
        windows = [
            [token_id for token_id, _ in pieces[at : at + window]]
            for pieces in pieces_of
            for at in range(0, len(pieces), window)
        ]
        routings, losses = _run(model, windows)
        return cls(
            tokens=tuple(tokens),
            token_ids=np.array(ids, np.int32),
            domain=tuple(
                document.domain for document, pieces in zip(documents, pieces_of, strict=True) for _ in pieces
            ),
            token_type=token_types(tokens),
            **_stack(routings),
            loss=losses,
            device_of=(np.arange(moe.n_routed_experts) * n_devices // moe.n_routed_experts).astype(np.int8),
            n_shared=moe.n_shared_experts,
            n_devices=n_devices,
        )

    def save(self, path: Path) -> None:
        """Write an .npz without pickles, whole or not at all."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {name: _packed(getattr(self, name)) for name in _WORDS}
        arrays |= {name: np.int64(getattr(self, name)) for name in _NUMBERS}
        arrays["schema_version"] = np.int64(SCHEMA_VERSION)
        with atomic_write(path) as aside, aside.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. InputError when missing, damaged or of another version."""
        if not path.is_file():
            raise InputError(f"{path}: no such trace")
        try:
            with np.load(path, allow_pickle=False) as file:
                version = int(file["schema_version"])
                if version != SCHEMA_VERSION:
                    raise InputError(
                        f"{path}: schema_version = {version}: this package reads {SCHEMA_VERSION}; trace the text again"
                    )
                fields: dict[str, Any] = {name: file[name] for name in _ARRAYS}
                fields |= {name: tuple(json.loads(file[name].tobytes())) for name in _WORDS}
                fields |= {name: int(file[name]) for name in _NUMBERS}
        except InputError:
            raise
        except _DAMAGE as error:
            raise InputError(
                f"{path}: is no trace, or damaged ({type(error).__name__}); trace the text again"
            ) from None
        trace = cls(**fields)
        _check_shapes(path, trace)
        return trace


_DAMAGE = (OSError, ValueError, RuntimeError, KeyError, EOFError, TypeError, AttributeError, zlib.error,
           zipfile.BadZipFile)  # fmt: skip
_WORDS = ("tokens", "domain", "token_type")
_NUMBERS = ("n_shared", "n_devices")
_ARRAYS = {
    "token_ids": np.int32, "expert": np.int16, "gate": np.float16, "kept": np.bool_, "scores": np.float16,
    "loss": np.float32, "device_of": np.int8,
}  # fmt: skip


@dataclass(frozen=True)
class LayerTrace:
    """What metrics read of a layer, as a Routing has it."""

    topk_ids: Tensor  # (T, K) int64
    kept: Tensor  # (T, K) bool
    n_experts: int

    @property
    def counts(self) -> Tensor:
        """How many tokens chose each expert, (E,) int64."""
        return expert_counts(self.topk_ids, self.n_experts)


def _check_model(model: Transformer, tokenizer: Tokenizer) -> None:
    require(bool(model.moe_layers), "model", "dense", "has no MoE layers: there is no routing to trace")
    size = tokenizer.get_vocab_size()
    most = model.config.vocab_size
    require(
        size <= most, "tokenizer", size, f"has more ids than the model's vocab_size = {most}: it belongs to another"
    )


def _check_text(documents: Sequence[Document]) -> None:
    length = sum(len(document.text) for document in documents)
    if not all(document.text for document in documents) or not documents:
        raise InputError("text = '': is empty; give at least one character")
    if length > MOST_CHARACTERS:
        raise InputError(f"text = {length:,} characters: must be at most {MOST_CHARACTERS:,}")


def cut(tokenizer: Tokenizer, text: str) -> list[tuple[int, str]]:
    """(id, characters) of each token. A character of several tokens, as an emoji, belongs to the first of them."""
    try:
        encoding = tokenizer.encode(text, add_special_tokens=False)
    except (UnicodeEncodeError, TypeError):
        raise InputError("text: holds half a character (a lone surrogate), which no encoding has") from None
    pieces, done = [], 0
    for token_id, (_, end) in zip(encoding.ids, encoding.offsets, strict=True):
        pieces.append((token_id, text[done:end]))
        done = max(done, end)
    return pieces


@torch.no_grad()
def _run(model: Transformer, windows: Sequence[list[int]]) -> tuple[list[tuple[Routing, ...]], np.ndarray]:
    """Routings of each window and all losses (T,). One window a call: what capacity drops depends on the call."""
    device = model.embed.weight.device
    routings, losses = [], []
    try:
        with eval_mode(model):
            for ids in progress(windows, desc="trace", unit="window", delay=2):
                tokens = torch.tensor([ids], device=device)
                output = model(tokens)
                routings.append(output.routings)
                known = F.cross_entropy(output.logits[0, :-1].float(), tokens[0, 1:], reduction="none")
                losses.append(F.pad(known, (1, 0), value=float("nan")).cpu())
    except RunError as error:
        raise RunError(f"trace: {error}") from None
    return routings, torch.cat(losses).numpy().astype(np.float32)


def _stack(routings: Sequence[tuple[Routing, ...]]) -> dict[str, np.ndarray]:
    """Expert, gate, kept and scores of all windows, (L, T, ...), each token's experts by falling gate."""
    most = max(routing.topk_ids.shape[1] for layers in routings for routing in layers)

    def rows(routing: Routing) -> dict[str, Tensor]:
        missing = (0, most - routing.topk_ids.shape[1])  # expert choice gives a token as many as want it
        ids = F.pad(routing.topk_ids, missing, value=-1)
        gates = F.pad(routing.gates, missing).masked_fill(ids < 0, -1.0)
        kept = F.pad(routing.kept, missing, value=False)
        order = gates.sort(dim=1, descending=True, stable=True).indices
        by_gate = {"expert": ids, "gate": gates.clamp(min=0), "kept": kept}
        return {name: value.gather(1, order) for name, value in by_gate.items()} | {"scores": routing.scores}

    layers = [[rows(routing) for routing in windows] for windows in zip(*routings, strict=True)]
    return {
        name: torch.stack([torch.cat([window[name].cpu() for window in layer]) for layer in layers])
        .numpy()
        .astype(_ARRAYS[name])
        for name in ("expert", "gate", "kept", "scores")
    }


def _packed(words: Sequence[str]) -> np.ndarray:
    """Words as UTF-8 JSON: numpy's own text would lose a NUL at the end, and objects would need pickles."""
    return np.frombuffer(json.dumps(list(words)).encode(), np.uint8)


def _check_shapes(path: Path, trace: RoutingTrace) -> None:
    """Whether the parts belong together: one row a token, experts and devices that are there."""

    def whole(holds: bool, what: str) -> None:
        if not holds:
            raise InputError(f"{path}: {what}: damaged; trace the text again")

    whole(trace.expert.ndim == trace.scores.ndim == 3, f"expert and scores have {trace.expert.ndim} dimensions")
    T, (L, _, K), E = len(trace.tokens), trace.expert.shape, trace.n_routed
    shapes = {"token_ids": (T,), "expert": (L, T, K), "gate": (L, T, K), "kept": (L, T, K), "scores": (L, T, E),
              "loss": (T,), "device_of": (E,)}  # fmt: skip
    for name, kind in _ARRAYS.items():
        found = getattr(trace, name)
        whole(found.shape == shapes[name] and found.dtype == kind, f"{name} is {found.dtype}{list(found.shape)}")
    for name in _WORDS:
        whole(len(getattr(trace, name)) == T, f"{name} has {len(getattr(trace, name))} entries, not {T}")
    whole(bool(((trace.expert >= -1) & (trace.expert < E)).all()), f"expert holds numbers beyond {E - 1}")
    devices = trace.device_of
    whole(bool(((devices >= 0) & (devices < trace.n_devices)).all()), "device_of holds devices that are not there")
