"""Endless batches of tokens and domain labels, streamed from a corpus. They resume at exactly the same token."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from dsmoe_lite.common.errors import InputError, require, require_int
from dsmoe_lite.data.corpus import Corpus, Document, require_split
from dsmoe_lite.data.tokenizer import END_ID

GROUP_CHARACTERS = 65_536  # encoded together: enough to keep the threads of the tokenizer busy, and little memory


@dataclass(frozen=True)
class Batch:
    """Tokens (B, S + 1) int64, whose first S are inputs and last S are targets; domain labels (B, S + 1) uint8."""

    tokens: torch.Tensor
    domains: torch.Tensor


@dataclass(frozen=True)
class _Group:
    """Consecutive documents, encoded as one row of tokens."""

    epoch: int
    document: int  # number of the first document
    tokens: np.ndarray  # (n_tokens,) int64
    domains: np.ndarray  # (n_tokens,) uint8


class Batches:
    """An endless iterator of batches. Documents, each with <|end|> behind it, are packed into rows of S + 1 tokens.

    After the last document, the corpus starts again. Memory does not depend on the size of the corpus. Raises
    InputError for sizes below 1, an unknown split, and more than 256 domains.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, batch_size: int, seq_len: int, *, split: str = "train"
    ) -> None:
        require_int("batch_size", batch_size, 1)
        require_int("seq_len", seq_len, 1)
        require_split(split)
        require(len(corpus.domains) <= 256, "domains", len(corpus.domains), "must be at most 256: labels are bytes")
        self._corpus, self._tokenizer, self._split = corpus, tokenizer, split
        self._shape = (batch_size, seq_len + 1)
        self._seek(epoch=0, document=0, offset=0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._read(self._shape[0] * self._shape[1])

    @property
    def epoch(self) -> int:
        """How often the corpus has been read to the end."""
        return self.state_dict()["epoch"]

    def describe(self) -> dict[str, Any]:
        """What the batches are made of, as plain data. A run resumes only if nothing of it has changed."""
        vocabulary = self._tokenizer.to_str().encode()
        return {
            "corpus": self._corpus.fingerprint(),
            "tokenizer_sha256": hashlib.sha256(vocabulary).hexdigest(),
            "split": self._split,
            "shape": list(self._shape),
        }

    def state_dict(self) -> dict[str, int]:
        """The position of the next batch, as plain data."""
        group = self._current_group()
        return {"epoch": group.epoch, "document": group.document, "offset": self._offset}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position that `state_dict` returned; the batches that follow are the same.

        Raises InputError for a position that this corpus and tokenizer cannot have.
        """
        for name in ("epoch", "document", "offset"):
            require_int(name, state.get(name), 0)
        self._seek(state["epoch"], state["document"], state["offset"])
        require(self.state_dict() == state, "state", state, "belongs to another corpus or tokenizer")

    def _seek(self, epoch: int, document: int, offset: int) -> None:
        self._stream = _groups(self._corpus, self._tokenizer, self._split, epoch, document)
        self._group: _Group | None = None
        self._offset = offset  # tokens of the group that were read

    def _current_group(self) -> _Group:
        """The group with the next token."""
        if self._group is None:
            self._group = next(self._stream)
        if self._offset >= len(self._group.tokens):
            self._group, self._offset = next(self._stream), 0
        return self._group

    def _read(self, n_tokens: int) -> Batch:
        tokens, domains = np.empty(n_tokens, np.int64), np.empty(n_tokens, np.uint8)
        filled = 0
        while filled < n_tokens:
            group = self._current_group()
            span = min(n_tokens - filled, len(group.tokens) - self._offset)
            tokens[filled : filled + span] = group.tokens[self._offset : self._offset + span]
            domains[filled : filled + span] = group.domains[self._offset : self._offset + span]
            filled, self._offset = filled + span, self._offset + span
        return Batch(torch.from_numpy(tokens).view(self._shape), torch.from_numpy(domains).view(self._shape))


def heldout_batches(corpus: Corpus, tokenizer: Tokenizer, batch_size: int, seq_len: int, n_batches: int) -> list[Batch]:
    """Return the first `n_batches` of the held-out split. Raises InputError if it is too small."""
    require_int("n_batches", n_batches, 1)
    batches = Batches(corpus, tokenizer, batch_size, seq_len, split="heldout")
    heldout: list[Batch] = []
    for batch in islice(batches, n_batches):
        if _has_wrapped(batches):
            raise InputError(
                f"n_batches = {n_batches}: the held-out text of {corpus.name} fills {len(heldout)} batches "
                f"of {batch_size} x {seq_len + 1} tokens: use fewer or smaller batches"
            )
        heldout.append(batch)
    return heldout


def _has_wrapped(batches: Batches) -> bool:
    """Whether a token was read twice; at the start of epoch 1 each was read once."""
    state = batches.state_dict()
    return state["epoch"] > 0 and state != {"epoch": 1, "document": 0, "offset": 0}


def _groups(corpus: Corpus, tokenizer: Tokenizer, split: str, epoch: int, document: int) -> Iterator[_Group]:
    while True:
        is_empty = True
        for documents in _split_by_size(corpus.documents(split, document)):
            yield _encode(corpus, tokenizer, documents, epoch, document)
            document += len(documents)
            is_empty = False
        if is_empty and document == 0:
            raise InputError(f"{corpus.name}: its {split} split has no documents")
        epoch, document = epoch + 1, 0


def _split_by_size(documents: Iterator[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encode(corpus: Corpus, tokenizer: Tokenizer, documents: list[Document], epoch: int, first: int) -> _Group:
    encodings: list[Any] = tokenizer.encode_batch_fast([document.text for document in documents])
    ids: list[int] = []
    lengths = []
    for encoding in encodings:
        row = encoding.ids
        ids += row
        ids.append(END_ID)
        lengths.append(len(row) + 1)
    labels = [corpus.domains.index(document.domain) for document in documents]
    domains = np.repeat(np.array(labels, np.uint8), lengths)
    return _Group(epoch, first, np.array(ids, np.int64), domains)
