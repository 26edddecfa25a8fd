"""A recorded trace of a text through a model: the experts that each token chose, their gates, and the loss."""

import json
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from dsmoe_lite.common.errors import InputError, RunError, require, require_int
from dsmoe_lite.common.files import atomic_write
from dsmoe_lite.common.progress import progress
from dsmoe_lite.data.corpus import Document
from dsmoe_lite.layers.load import expert_counts
from dsmoe_lite.layers.router import Routing
from dsmoe_lite.model import Transformer, eval_mode
from dsmoe_lite.routing.token_types import token_types

SCHEMA_VERSION = 1
MAX_CHARACTERS = 1_000_000
MAX_DEVICES = 127  # device_of is int8
MAX_INT16_EXPERTS = 2**15  # their ids fit 16 bits


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The routing of T tokens in L MoE layers, K of E routed experts per token: read by charts and the explorer.

    The text is split into windows that cannot attend to each other; every array runs over all windows in order.
    `layer` gives one layer in the form that metrics read. A stored trace calls topk_ids `expert` and gates `gate`.
    """

    tokens: tuple[str, ...]  # T; joined they are the text; a further byte of a character is ""
    token_ids: np.ndarray  # (T,) int32
    domain: tuple[str, ...]  # T; "" if unknown
    token_type: tuple[str, ...]  # T, each one of token_types.TYPES
    topk_ids: np.ndarray  # (L, T, K) int16 (int32 if E > 32768), highest gate first; -1 for no expert
    gates: np.ndarray  # (L, T, K) float16; 0 for no expert
    kept: np.ndarray  # (L, T, K) bool; False if capacity dropped the choice
    scores: np.ndarray  # (L, T, E) float16, the router's affinities
    loss: np.ndarray  # (T,) float32, nats, of predicting this token; NaN at the start of a window
    device_of: np.ndarray  # (E,) int8, the device of each expert
    n_shared: int
    n_devices: int

    @property
    def n_layers(self) -> int:
        """L."""
        return self.topk_ids.shape[0]

    @property
    def n_experts(self) -> int:
        """E."""
        return self.scores.shape[-1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.topk_ids.shape[-1]

    @property
    def mean_loss(self) -> float:
        """Mean loss in nats per token over the tokens that were predicted; NaN if there are none."""
        losses = self.loss[np.isfinite(self.loss)]
        return float(losses.mean()) if len(losses) else float("nan")

    def layer(self, number: int) -> "LayerTrace":
        """Return one MoE layer, counted from 0, for the metrics. Raises InputError if there is no such layer."""
        require_int("layer", number, 0, self.n_layers - 1)
        return LayerTrace(
            torch.from_numpy(self.topk_ids[number].astype(np.int64)),
            torch.from_numpy(self.kept[number]),
            self.n_experts,
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
        on_logits: Callable[[Tensor], object] | None = None,
    ) -> Self:
        """Run `model`, in evaluation mode, over a text or over documents with their domains, and record its routing.

        Every document starts a new window of at most `window` tokens: by default max_seq_len; for a model trained on
        shorter sequences pass their length. Experts are placed on `n_devices` devices in order; by default there are as
        many devices as the config has groups. on_logits: called with the logits (S, V) of each window, in order. Raises
        InputError if the text is empty or too long, if the model has no experts, or if the tokenizer has more ids than
        the model.
        """
        _check_model(model, tokenizer)
        documents = [Document(text, "")] if isinstance(text, str) else list(text)
        _check_text(documents)
        window = model.config.max_seq_len if window is None else window
        require_int("window", window, 1, model.config.max_seq_len)
        moe = model.config.moe
        assert moe is not None
        n_devices = moe.n_group if n_devices is None else n_devices
        require_int("n_devices", n_devices, 1, min(moe.n_routed_experts, MAX_DEVICES))
        tokenized = [tokenize(tokenizer, document.text) for document in documents]
        ids = [token_id for pieces in tokenized for token_id, _ in pieces]
        tokens = [token for pieces in tokenized for _, token in pieces]
        windows = [
            [token_id for token_id, _ in pieces[start : start + window]]
            for pieces in tokenized
            for start in range(0, len(pieces), window)
        ]
        routings, losses = _run(model, windows, on_logits)
        return cls(
            tokens=tuple(tokens),
            token_ids=np.array(ids, np.int32),
            domain=tuple(
                document.domain for document, pieces in zip(documents, tokenized, strict=True) for _ in pieces
            ),
            token_type=token_types(tokens),
            **_stack(routings),
            loss=losses,
            device_of=(np.arange(moe.n_routed_experts) * n_devices // moe.n_routed_experts).astype(np.int8),
            n_shared=moe.n_shared_experts,
            n_devices=n_devices,
        )

    def save(self, path: Path) -> None:
        """Write an .npz without pickles, atomically."""
        arrays: dict[str, Any] = {_stored_name(name): getattr(self, name) for name in _ARRAYS}
        arrays |= {name: _pack_strings(getattr(self, name)) for name in _STRINGS}
        arrays |= {name: np.int64(getattr(self, name)) for name in _INTEGERS}
        arrays["schema_version"] = np.int64(SCHEMA_VERSION)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises InputError if the file is missing, damaged or of another schema version."""
        if not path.is_file():
            raise InputError(f"{path}: no such trace")
        try:
            with np.load(path, allow_pickle=False) as file:
                version = int(file["schema_version"])
                if version != SCHEMA_VERSION:
                    raise InputError(
                        f"{path}: schema_version = {version}: this package reads {SCHEMA_VERSION}; trace the text again"
                    )
                fields: dict[str, Any] = {name: file[_stored_name(name)] for name in _ARRAYS}
                fields |= {name: tuple(json.loads(file[name].tobytes())) for name in _STRINGS}
                fields |= {name: int(file[name]) for name in _INTEGERS}
        except InputError:
            raise
        except _READ_ERRORS as error:
            raise InputError(
                f"{path}: not a trace, or damaged ({type(error).__name__}); trace the text again"
            ) from None
        trace = cls(**fields)
        _check_shapes(path, trace)
        return trace


_READ_ERRORS = (OSError, ValueError, RuntimeError, KeyError, EOFError, TypeError, AttributeError, OverflowError,
                zlib.error, zipfile.BadZipFile)  # fmt: skip
_STRINGS = ("tokens", "domain", "token_type")
_INTEGERS = ("n_shared", "n_devices")
_ARRAYS = {
    "token_ids": np.int32, "topk_ids": np.int16, "gates": np.float16, "kept": np.bool_, "scores": np.float16,
    "loss": np.float32, "device_of": np.int8,
}  # fmt: skip
_STORED_NAMES = {"topk_ids": "expert", "gates": "gate"}  # the names in schema version 1; all others are the field's


def _stored_name(field: str) -> str:
    return _STORED_NAMES.get(field, field)


def _dtype(field: str, n_experts: int) -> Any:
    """The dtype of an array, in memory and in the file: ids of very many experts need 32 bits."""
    return np.int32 if field == "topk_ids" and n_experts > MAX_INT16_EXPERTS else _ARRAYS[field]


@dataclass(frozen=True)
class LayerTrace:
    """One layer of a trace, with the fields of a `Routing` that metrics read."""

    topk_ids: Tensor  # (T, K) int64
    kept: Tensor  # (T, K) bool
    n_experts: int

    @property
    def counts(self) -> Tensor:
        """How many tokens chose each expert, (E,) int64."""
        return expert_counts(self.topk_ids, self.n_experts)


def _check_model(model: Transformer, tokenizer: Tokenizer) -> None:
    require(bool(model.moe_layers), "model", "dense", "has no MoE layers, so there is no routing to trace")
    n_ids, vocab_size = tokenizer.get_vocab_size(), model.config.vocab_size
    remedy = f"has more ids than the model's vocab_size = {vocab_size}: pass the model's own tokenizer"
    require(n_ids <= vocab_size, "tokenizer", n_ids, remedy)


def _check_text(documents: Sequence[Document]) -> None:
    n_characters = sum(len(document.text) for document in documents)
    if not all(document.text for document in documents) or not documents:
        raise InputError("text = '': is empty; give at least one character")
    if n_characters > MAX_CHARACTERS:
        raise InputError(f"text = {n_characters:,} characters: must be at most {MAX_CHARACTERS:,}")


def tokenize(tokenizer: Tokenizer, text: str) -> list[tuple[int, str]]:
    """Return (id, characters) of each token. A character of several tokens, such as an emoji, belongs to the first."""
    try:
        encoding = tokenizer.encode(text, add_special_tokens=False)
    except (UnicodeEncodeError, TypeError):
        raise InputError("text: has half a character (a lone surrogate), which cannot be encoded; remove it") from None
    pieces, start = [], 0
    for token_id, (_, end) in zip(encoding.ids, encoding.offsets, strict=True):
        pieces.append((token_id, text[start:end]))
        start = max(start, end)
    return pieces


@torch.no_grad()
def _run(
    model: Transformer, windows: Sequence[list[int]], on_logits: Callable[[Tensor], object] | None
) -> tuple[list[tuple[Routing, ...]], np.ndarray]:
    """Return the routings of each window and all losses (T,). One window per call: capacity depends on the batch."""
    device = model.embed.weight.device
    routings, losses = [], []
    try:
        with eval_mode(model):
            for ids in progress(windows, desc="trace", unit="window", delay=2):
                tokens = torch.tensor([ids], device=device)
                output = model(tokens)
                routings.append(output.routings)
                predicted = F.cross_entropy(output.logits[0, :-1].float(), tokens[0, 1:], reduction="none")
                losses.append(F.pad(predicted, (1, 0), value=float("nan")).cpu())
                if on_logits is not None:
                    on_logits(output.logits[0])
    except RunError as error:
        raise RunError(f"trace: {error}") from None
    return routings, torch.cat(losses).numpy().astype(np.float32)


def _stack(routings: Sequence[tuple[Routing, ...]]) -> dict[str, np.ndarray]:
    """Stack topk_ids, gates, kept and scores of all windows, (L, T, ...), each token's experts by falling gate."""
    K = max(routing.topk_ids.shape[1] for layers in routings for routing in layers)

    def sorted_by_gate(routing: Routing) -> dict[str, Tensor]:
        padding = (0, K - routing.topk_ids.shape[1])  # under expert choice, windows differ in K
        ids = F.pad(routing.topk_ids, padding, value=-1)
        gates = F.pad(routing.gates, padding).masked_fill(ids < 0, -1.0)
        kept = F.pad(routing.kept, padding, value=False)
        order = gates.sort(dim=1, descending=True, stable=True).indices
        arrays = {"topk_ids": ids, "gates": gates.clamp(min=0), "kept": kept}
        return {name: value.gather(1, order) for name, value in arrays.items()} | {"scores": routing.scores}

    layers = [[sorted_by_gate(routing) for routing in windows] for windows in zip(*routings, strict=True)]
    n_experts = layers[0][0]["scores"].shape[1]
    return {
        name: torch.stack([torch.cat([window[name].cpu() for window in layer]) for layer in layers])
        .numpy()
        .astype(_dtype(name, n_experts))
        for name in ("topk_ids", "gates", "kept", "scores")
    }


def _pack_strings(strings: Sequence[str]) -> np.ndarray:
    """Pack strings as UTF-8 JSON: NumPy's string dtype drops a trailing NUL, and object arrays need pickles."""
    return np.frombuffer(json.dumps(list(strings)).encode(), np.uint8)


def _check_shapes(path: Path, trace: RoutingTrace) -> None:
    """Check that the parts fit together: one row per token, experts and devices that exist, gates that are numbers."""

    def check(valid: bool, problem: str) -> None:
        if not valid:
            raise InputError(f"{path}: {problem}: damaged; trace the text again")

    ids, devices = trace.topk_ids, trace.device_of
    check(ids.ndim == trace.scores.ndim == 3, f"expert and scores have {ids.ndim} dimensions")
    T, (L, _, K), E = len(trace.tokens), ids.shape, trace.n_experts
    shapes = {"token_ids": (T,), "topk_ids": (L, T, K), "gates": (L, T, K), "kept": (L, T, K), "scores": (L, T, E),
              "loss": (T,), "device_of": (E,)}  # fmt: skip
    for name in _ARRAYS:
        array = getattr(trace, name)
        valid = array.shape == shapes[name] and array.dtype == _dtype(name, E)
        check(valid, f"{_stored_name(name)} is {array.dtype}{list(array.shape)}")
    for name in _STRINGS:
        strings = getattr(trace, name)
        check(len(strings) == T, f"{name} has {len(strings)} entries, not {T}")
        check(all(isinstance(string, str) for string in strings), f"{name} has entries that are no strings")
    check(bool(((ids >= -1) & (ids < E)).all()), f"expert has ids beyond {E - 1}")
    ordered = np.sort(ids, axis=2)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    check(not twice.any(), "expert has an id twice for one token")
    check(bool((trace.gates >= 0).all()), "gate has values that are negative or not a number")
    check(not np.isnan(trace.scores).any(), "scores has values that are not a number")
    check(trace.n_shared >= 0, f"n_shared = {trace.n_shared}")
    most = min(E, MAX_DEVICES)
    check(1 <= trace.n_devices <= most, f"n_devices = {trace.n_devices} is not from 1 to {most}")
    check(bool(((devices >= 0) & (devices < trace.n_devices)).all()), "device_of has devices that do not exist")
