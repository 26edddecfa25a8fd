"""Any folder of UTF-8 text files, read in pieces: a file is never in memory whole."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import gcd
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.data.corpus import Document, require_split
from dsmoe_lite.data.words import number

PIECE_BYTES = 4096  # one document, give or take a line
LINE_BYTES = 512  # how far a piece may reach to end with its line
HELDOUT_SHARE = 10  # one in ten is held out
MAX_DOMAINS = 255


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    domain: str
    heldout: bool

    @property
    def pieces(self) -> int:
        return max(1, self.size // PIECE_BYTES)


class Folder:
    """The corpus of a folder's text files; the domain is the first subfolder, "text" for files that lie in none.

    One file in ten is held out, or one piece in ten where that leaves a split empty. Raises InputError for a folder
    that is missing, empty or unreadable, and for a file that is binary or not UTF-8, also while it streams.
    """

    name = "folder"

    def __init__(self, path: Path | str) -> None:
        self._root = Path(path)
        files = _list_files(self._root)
        for file in files:
            _read_piece(file, 0)
        self.domains = tuple(sorted({file.domain for file in files}))
        if len(self.domains) > MAX_DOMAINS:
            raise InputError(f"{path}: {len(self.domains)} subfolders: must be at most {MAX_DOMAINS}, each is a domain")
        self._files = files
        by_file = {file.heldout for file in files} == {True, False}
        kept = {split: [f for f in files if f.heldout == (split == "heldout")] for split in ("train", "heldout")}
        self._pieces = {
            split: _Pieces(kept[split]) if by_file else _Pieces(files, every_tenth=split == "heldout")
            for split in ("train", "heldout")
        }
        if not len(self._pieces["heldout"]):
            raise InputError(f"{path}: too little text to hold some out: needs two files or {2 * PIECE_BYTES} bytes")

    def documents(self, split: str, start: int = 0) -> Iterator[Document]:
        """Yield the pieces of a split in a fixed mixed order; skipping costs nothing."""
        require_split(split)
        pieces = self._pieces[split]
        for index in range(start, len(pieces)):
            file, piece = pieces.at(index)
            yield Document(_read_piece(file, piece), file.domain)

    def fingerprint(self) -> dict[str, Any]:
        """Sha256 and bytes of all files, their names included."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file.path.relative_to(self._root).as_posix()}\0{file.size}\0".encode())
            with _opened(file.path) as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        size = sum(file.size for file in self._files)
        return {"name": self.name, "sha256": digest.hexdigest(), "bytes": size, "files": len(self._files)}


class _Pieces:
    """The pieces of some files in a mixed order that needs no memory: i -> (a i + b) mod n, a coprime to n."""

    def __init__(self, files: list[_File], every_tenth: bool | None = None) -> None:
        self._files = files
        self._ends = list(accumulate(file.pieces for file in files))
        total = self._ends[-1]
        self._step, self._tenth = min(HELDOUT_SHARE, total), every_tenth
        heldout = total // self._step if total > 1 else 0
        self._count = {None: total, True: heldout, False: total - heldout}[every_tenth]
        self._stride = next(a for a in range(int(self._count * 0.618) + 1, total + 2) if gcd(a, self._count) == 1)

    def __len__(self) -> int:
        return self._count

    def at(self, index: int) -> tuple[_File, int]:
        """File and piece number of document `index`."""
        place = (index * self._stride + self._count // 3) % self._count
        if self._tenth is True:
            place = place * self._step + self._step - 1
        elif self._tenth is False:
            place += place // (self._step - 1)
        which = bisect_right(self._ends, place)
        return self._files[which], place - (self._ends[which - 1] if which else 0)


def _list_files(root: Path) -> list[_File]:
    if not root.is_dir():
        raise InputError(
            f"{root}: {'is not a folder' if root.exists() else 'no such folder'}: name a folder of text files"
        )
    files = []
    for place, folders, names in os.walk(root, onerror=_refuse_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(place, name)
            try:
                size = path.stat().st_size
            except OSError as error:
                _refuse_unreadable(error)
            if size and path.is_file():
                inside = path.relative_to(root)
                domain = inside.parts[0] if len(inside.parts) > 1 else "text"
                files.append(_File(path, size, domain, number("heldout", inside.as_posix()) % HELDOUT_SHARE == 0))
    if not files:
        raise InputError(f"{root}: holds no text: put UTF-8 text files into it")
    return files


def _read_piece(file: _File, piece: int) -> str:
    with _opened(file.path) as stream:
        start = _boundary(stream, piece * PIECE_BYTES)
        end = file.size if piece + 1 == file.pieces else _boundary(stream, (piece + 1) * PIECE_BYTES)
        stream.seek(start)
        content = stream.read(end - start)
    if b"\0" in content:
        where = start + content.index(b"\0")
        raise InputError(f"{file.path}: is binary (a zero byte at {where}): leave it out, or convert it to text")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = start + error.start
        raise InputError(f"{file.path}: is not UTF-8 (byte {where}): convert it, or leave it out") from None


def _boundary(stream: BinaryIO, near: int) -> int:
    """Where a piece starts: at the first line, or else the first character, that starts at `near` or soon after."""
    if near == 0:
        return 0
    stream.seek(near - 1)
    window = stream.read(LINE_BYTES)
    line = window.find(b"\n")
    if line >= 0:
        return near + line
    return near + next((i for i, byte in enumerate(window[1:5]) if byte & 0xC0 != 0x80), 0)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        _refuse_unreadable(error)


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
