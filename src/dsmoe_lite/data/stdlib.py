"""The Python standard library's own sources: real text that every reader already has."""

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
from dsmoe_lite.data.words import number, shuffled

DOMAINS = ("code", "docstring", "comment")
LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
DOCUMENT_CHARACTERS = 2000
ENDS_STATEMENT = (tokenize.NEWLINE, tokenize.COMMENT)
FILES_MIXED = 32  # files whose documents are shuffled together, so that a batch is not of one file


class Stdlib:
    """The corpus `stdlib`, split by file; it differs between Python versions, so nothing compared may depend on it.

    Raises RunError where this Python carries no sources.
    """

    name = "stdlib"
    domains = DOMAINS

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_path("stdlib"))
        names = sorted(_sources(self._root))
        if not names:
            raise RunError(f"{self._root}: no sources of the standard library here")
        heldout = {name for name in names if number("heldout", name) % 10 == 0}
        self._files = {
            "train": shuffled([name for name in names if name not in heldout], "files"),
            "heldout": shuffled(heldout, "files"),
        }
        self._counts: dict[tuple[str, int], int] = {}  # documents of a group of files read before

    def documents(self, split: str, start: int = 0) -> Iterator[Document]:
        """Yield the documents of a split; skipping reads the files skipped, once in a process."""
        require_split(split)
        files = self._files[split]
        for place in range(0, len(files), FILES_MIXED):
            count = self._counts.get((split, place))
            if count is None or count > start:
                documents = self._mixed(files[place : place + FILES_MIXED])
                count = self._counts[split, place] = len(documents)
                yield from islice(documents, start, None)
            start = max(0, start - count)

    def fingerprint(self) -> dict[str, Any]:
        """The Python version, and sha256 and bytes of all files."""
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

    def _mixed(self, names: list[str]) -> list[Document]:
        documents = [document for name in names for document in split_source(self._read(name))]
        order = sorted(range(len(documents)), key=lambda i: number(names[0], i))
        return [documents[i] for i in order]

    def _read(self, name: str) -> str:
        with tokenize.open(self._root / name) as file:
            return file.read()


def _sources(root: Path) -> Iterator[str]:
    for place, folders, names in os.walk(root):
        folders[:] = [folder for folder in folders if folder not in LEFT_OUT]
        yield from (Path(place, name).relative_to(root).as_posix() for name in names if name.endswith(".py"))


def split_source(source: str) -> list[Document]:
    """Python source as documents of at most 2000 characters (or one line): its code, its docstrings, its comments."""
    parts: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    lines = [*io.StringIO(source), ""]
    done = (1, 0)
    for domain, token in _apart(source):
        parts["code"].append(_between(lines, done, token.start))
        parts[domain].append(token.string + "\n")
        done = token.end
    parts["code"].append(_between(lines, done, (len(lines), 0)))
    texts = {domain: "".join(pieces) for domain, pieces in parts.items()}
    texts["code"] = "".join(line.rstrip() + "\n" for line in texts["code"].splitlines() if line.strip())
    return [Document(text, domain) for domain in DOMAINS for text in _cut(texts[domain])]


def _apart(source: str) -> Iterator[tuple[str, tokenize.TokenInfo]]:
    """The comments, and the strings that are the first statement of a file or a block."""
    before = tokenize.INDENT
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    for token, after in pairwise(tokens):
        if token.type == tokenize.COMMENT:
            yield "comment", token
        elif token.type == tokenize.STRING and before == tokenize.INDENT and after.type in ENDS_STATEMENT:
            yield "docstring", token
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            before = token.type


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    (first, left), (last, right) = start, end
    if first == last:
        return lines[first - 1][left:right]
    return "".join([lines[first - 1][left:], *lines[first : last - 1], lines[last - 1][:right]])


def _cut(text: str) -> Iterator[str]:
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
