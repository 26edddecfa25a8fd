"""The protocol of a corpus: documents, each with a domain, in a fixed order that can be read from any point."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from dsmoe_lite.common.errors import require_choice

SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Document:
    """A piece of text and the domain of all its tokens."""

    text: str
    domain: str


class Corpus(Protocol):
    """A source of documents; the label of a token is the index of its document's domain in `domains`."""

    @property
    def name(self) -> str: ...

    @property
    def domains(self) -> tuple[str, ...]: ...

    def documents(self, split: str, start: int = 0) -> Iterator[Document]:
        """Yield the documents of "train" or "heldout" lazily, from number `start` on; skipping is cheap."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Facts for the run record that identify the corpus: at least "name" and "sha256"."""
        ...


def require_split(split: str) -> None:
    """Require "train" or "heldout"."""
    require_choice("split", split, SPLITS)
