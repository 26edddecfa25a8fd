"""Any folder of UTF-8 text files, read in pieces, so that no full file is in memory."""

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
from dsmoe_lite.data.words import stable_hash

PIECE_BYTES = 4096  # a document, give or take a line
LINE_BYTES = 512  # how far a piece may extend to end with a line
HELDOUT_EVERY = 10  # one in ten is held out
MAX_DOMAINS = 255


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    domain: str
    heldout: bool
    piece_bytes: int

    @property
    def pieces(self) -> int:
        return max(1, self.size // self.piece_bytes)


class Folder:
    """The text files of a folder. The domain is the first subfolder, or "text" for files outside any subfolder.

    Links are followed; a folder that is linked several times, or is linked and inside the folder, is read once.
    One file in ten is held out, or one piece in ten if files would leave a split empty. Raises InputError for a folder
    that is missing, empty or unreadable, for a broken link, and for a file that is binary or not UTF-8, even if only
    streaming finds it.
    """

    name = "folder"

    def __init__(self, path: Path | str, *, piece_bytes: int = PIECE_BYTES) -> None:
        self._root = Path(path)
        files = _list_files(self._root, piece_bytes)
        for file in files:
            _read_piece(file, 0)
        self.domains = tuple(sorted({file.domain for file in files}))
        if len(self.domains) > MAX_DOMAINS:
            raise InputError(f"{path}: {len(self.domains)} subfolders: must be at most {MAX_DOMAINS}: each is a domain")
        self._files = files
        heldout, train = [f for f in files if f.heldout], [f for f in files if not f.heldout]
        if heldout and train:
            self._pieces = {"train": _Pieces(train), "heldout": _Pieces(heldout)}
        else:
            self._pieces = {"train": _Pieces(files, every_tenth=False), "heldout": _Pieces(files, every_tenth=True)}
        if not len(self._pieces["heldout"]):
            raise InputError(f"{path}: too little text to hold some out: needs two files or {2 * piece_bytes} bytes")

    def documents(self, split: str, start: int = 0) -> Iterator[Document]:
        """Yield the pieces of a split in a fixed shuffled order, from number `start` on; skipping is free."""
        require_split(split)
        pieces = self._pieces[split]
        for index in range(start, len(pieces)):
            file, piece = pieces.at(index)
            yield Document(_read_piece(file, piece), file.domain)

    def fingerprint(self) -> dict[str, Any]:
        """The sha256 and size of all files; the hash includes their names."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file.path.relative_to(self._root).as_posix()}\0{file.size}\0".encode())
            with _open(file.path) as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        size = sum(file.size for file in self._files)
        return {"name": self.name, "sha256": digest.hexdigest(), "bytes": size, "files": len(self._files)}


class _Pieces:
    """The pieces of some files in a shuffled order that needs no memory: i -> (a i + b) mod n, with a coprime to n.

    every_tenth: None takes all pieces, True only every tenth, False all others.
    """

    def __init__(self, files: list[_File], every_tenth: bool | None = None) -> None:
        self._files = files
        self._ends = list(accumulate(file.pieces for file in files))
        total = self._ends[-1]
        self._step, self._tenth = min(HELDOUT_EVERY, total), every_tenth
        heldout = total // self._step if total > 1 else 0
        self._count = {None: total, True: heldout, False: total - heldout}[every_tenth]
        self._stride = next(a for a in range(int(self._count * 0.618) + 1, total + 2) if gcd(a, self._count) == 1)

    def __len__(self) -> int:
        return self._count

    def at(self, index: int) -> tuple[_File, int]:
        """Return the file and the piece number of document `index`."""
        piece = (index * self._stride + self._count // 3) % self._count
        if self._tenth is True:
            piece = piece * self._step + self._step - 1
        elif self._tenth is False:
            piece += piece // (self._step - 1)
        file = bisect_right(self._ends, piece)
        return self._files[file], piece - (self._ends[file - 1] if file else 0)


def _list_files(root: Path, piece_bytes: int) -> list[_File]:
    if not root.is_dir():
        raise InputError(
            f"{root}: {'is not a folder' if root.exists() else 'no such folder'}: name a folder of text files"
        )
    files = []
    for folder, names in _walk(root):
        for name in sorted(name for name in names if not name.startswith(".")):
            path = folder / name
            try:
                size = path.stat().st_size
            except OSError as error:
                if path.is_symlink():
                    raise InputError(f"{path}: is a broken link: remove it, or restore its target") from None
                _refuse_unreadable(error)
            if size and path.is_file():
                relative = path.relative_to(root)
                domain = relative.parts[0] if len(relative.parts) > 1 else "text"
                heldout = stable_hash("heldout", relative.as_posix()) % HELDOUT_EVERY == 0
                files.append(_File(path, size, domain, heldout, piece_bytes))
    if not files:
        raise InputError(f"{root}: holds no text: put UTF-8 text files into it")
    return files


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield the folders below `root` with the names of their files, each folder once: linked ones after all others."""
    seen: set[str] = set()
    links = [root]
    while links:
        found: list[Path] = []
        for link in links:
            for folder, folders, names in os.walk(link, onerror=_refuse_unreadable):
                real = os.path.realpath(folder)
                if real in seen:
                    folders.clear()
                    continue
                seen.add(real)
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                found += [path for name in folders if (path := Path(folder, name)).is_symlink()]
                yield Path(folder), names
        links = found


def _read_piece(file: _File, piece: int) -> str:
    with _open(file.path) as stream:
        start = _boundary(stream, piece * file.piece_bytes)
        end = file.size if piece + 1 == file.pieces else _boundary(stream, (piece + 1) * file.piece_bytes)
        stream.seek(start)
        content = stream.read(end - start)
    if b"\0" in content:
        position = start + content.index(b"\0")
        raise InputError(f"{file.path}: is binary (a zero byte at {position}): remove it, or convert it to text")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        position = start + error.start
        raise InputError(f"{file.path}: is not UTF-8 (byte {position}): convert it, or remove it") from None


def _boundary(stream: BinaryIO, near: int) -> int:
    """Return where a piece starts: the first line that starts at `near` or soon after, or else the first character."""
    if near == 0:
        return 0
    stream.seek(near - 1)
    window = stream.read(LINE_BYTES)
    line = window.find(b"\n")
    if line >= 0:
        return near + line
    return near + next((i for i, byte in enumerate(window[1:5]) if byte & 0xC0 != 0x80), 0)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        _refuse_unreadable(error)


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
