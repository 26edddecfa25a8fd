"""The sources of the Python standard library: real text that every reader has already."""

import hashlib
import io
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from dsmoe_lite.common.errors import RunError
from dsmoe_lite.data.corpus import Document, require_split
from dsmoe_lite.data.words import stable_hash, stable_shuffle

DOMAINS = ("code", "docstring", "comment")
EXCLUDED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
DOCUMENT_CHARACTERS = 2000
ENDS_STATEMENT = (tokenize.NEWLINE, tokenize.COMMENT)
FILES_PER_GROUP = 32  # files whose documents are shuffled together, so that a batch is not from one file


class Stdlib:
    """The corpus `stdlib`, split by file. It differs between Python versions, so no comparison may depend on it.

    Raises RunError if this Python has no sources.
    """

    name = "stdlib"
    domains = DOMAINS

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_path("stdlib"))
        names = sorted(_sources(self._root))
        if not names:
            raise RunError(f"{self._root}: no sources of the standard library here")
        heldout = {name for name in names if stable_hash("heldout", name) % 10 == 0}
        self._files = {
            "train": stable_shuffle([name for name in names if name not in heldout], "files"),
            "heldout": stable_shuffle(heldout, "files"),
        }
        self._counts: dict[tuple[str, int], int] = {}  # documents in each group of files that was read before

    def documents(self, split: str, start: int = 0) -> Iterator[Document]:
        """Yield the documents of a split, from number `start` on; skipped files are read once per process."""
        require_split(split)
        files = self._files[split]
        for first in range(0, len(files), FILES_PER_GROUP):
            count = self._counts.get((split, first))
            if count is None or count > start:
                documents = self._shuffled_documents(files[first : first + FILES_PER_GROUP])
                count = self._counts[split, first] = len(documents)
                yield from islice(documents, start, None)
            start = max(0, start - count)

    def fingerprint(self) -> dict[str, Any]:
        """The Python version, and the sha256 and size of all files."""
        digest, size = hashlib.sha256(platform.python_version().encode()), 0
        for name in sorted([*self._files["train"], *self._files["heldout"]]):
            content = (self._root / name).read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
            size += len(content)
        files = sum(map(len, self._files.values()))
        return {
            "name": self.name,
            "sha256": digest.hexdigest(),
            "bytes": size,
            "files": files,
            "python": platform.python_version(),
        }

    def _shuffled_documents(self, names: list[str]) -> list[Document]:
        documents = [document for name in names for document in split_source(self._read(name))]
        order = sorted(range(len(documents)), key=lambda i: stable_hash(names[0], i))
        return [documents[i] for i in order]

    def _read(self, name: str) -> str:
        with tokenize.open(self._root / name) as file:
            return file.read()


def _sources(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in EXCLUDED]
        yield from (Path(folder, name).relative_to(root).as_posix() for name in names if name.endswith(".py"))


def split_source(source: str) -> list[Document]:
    """Split Python source into documents of code, docstrings and comments, each at most 2000 characters or one line."""
    parts: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    lines = [*io.StringIO(source), ""]
    end = (1, 0)
    for domain, token in _comments_and_docstrings(source):
        parts["code"].append(_between(lines, end, token.start))
        parts[domain].append(token.string + "\n")
        end = token.end
    parts["code"].append(_between(lines, end, (len(lines), 0)))
    texts = {domain: "".join(pieces) for domain, pieces in parts.items()}
    texts["code"] = "".join(line.rstrip() + "\n" for line in texts["code"].splitlines() if line.strip())
    return [Document(text, domain) for domain in DOMAINS for text in _split_lines(texts[domain])]


def _comments_and_docstrings(source: str) -> Iterator[tuple[str, tokenize.TokenInfo]]:
    """Yield comments, and strings that are the first statement of a file or a block."""
    previous = tokenize.INDENT
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    for token, following in pairwise(tokens):
        if token.type == tokenize.COMMENT:
            yield "comment", token
        elif token.type == tokenize.STRING and previous == tokenize.INDENT and following.type in ENDS_STATEMENT:
            yield "docstring", token
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            previous = token.type


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """The source from `start` to `end`, each (line from 1, column from 0)."""
    (first, left), (last, right) = start, end
    if first == last:
        return lines[first - 1][left:right]
    return "".join([lines[first - 1][left:], *lines[first : last - 1], lines[last - 1][:right]])


def _split_lines(text: str) -> Iterator[str]:
    """Yield `text` in pieces of full lines and at most DOCUMENT_CHARACTERS characters, or one line."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if piece and size + len(line) > DOCUMENT_CHARACTERS:
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if piece:
        yield "".join(piece)
