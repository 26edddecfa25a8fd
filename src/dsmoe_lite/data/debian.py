"""Real text that every Debian system can fetch: seven domains, made from packages of the distribution."""

import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from gzip import decompress
from pathlib import Path, PurePosixPath
from typing import Any

from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import RunError, require
from dsmoe_lite.common.files import read_json, write_json
from dsmoe_lite.common.progress import progress
from dsmoe_lite.data.folder import Folder
from dsmoe_lite.data.words import stable_shuffle

RECIPE = 2  # raise it if the documents that the same packages give change
DOMAIN_BYTES = 3_000_000  # about as much text of each domain; Chinese has less
LEAST_BYTES = 500  # shorter files are stubs that point to others
N_DOCUMENTS = 33_000  # at least, for training
PIECE_BYTES = 512  # a document: short, so that a batch has several domains
ENTRIES_BYTES = 8192  # entries of the dictionary that make a file
MANIFEST = ".packages.json"
HERE = "this corpus is made from packages of Debian: use Debian or a container of it, or kind = 'stdlib'"

Files = Iterator[tuple[str, bytes]]  # the path in a package, and the content
Texts = Iterator[tuple[str, str]]  # the name of a text, and the text


class Debian(Folder):
    """The corpus `debian`, in the folder that `make_debian` filled; split by file.

    Raises InputError if the folder is missing or was made by another recipe.
    """

    name = "debian"

    def __init__(self, path: Path | None = None) -> None:
        root = path or default_folder()
        require(root.is_dir(), "corpus", str(root), "is missing: make it with `dsmoe corpus debian`")
        manifest = read_json(root / MANIFEST)
        remedy = "was made by another version: remove it, and make it with `dsmoe corpus debian`"
        require(manifest.get("recipe") == RECIPE, "corpus", str(root), remedy)
        self._packages: dict[str, Any] = manifest["packages"]
        super().__init__(root, piece_bytes=PIECE_BYTES)

    def fingerprint(self) -> dict[str, Any]:
        """The sha256 and size of all texts, and the version of every package."""
        return super().fingerprint() | {"recipe": RECIPE, "packages": self._packages}


def default_folder() -> Path:
    """Where the corpus is unless another folder is named: in the cache."""
    return paths.cache() / "debian"


@dataclass(frozen=True)
class _Source:
    """How to read the texts of a domain from a package, `depends` if its name holds a version that changes."""

    package: str
    read: Callable[[Files], Texts]
    depends: bool = False


def _kernel(files: Files) -> Texts:
    for name, content in files:
        if "/Documentation/" in name and "/translations/" not in name and name.endswith(".rst.gz"):
            yield _below(name, "Documentation"), _decode(decompress(content))


def _chinese(files: Files) -> Texts:
    for name, content in files:
        if "/translations/zh_CN/" in name and name.endswith(".rst.gz"):
            yield _below(name, "zh_CN"), _decode(decompress(content))


def _man_pages(files: Files) -> Texts:
    for name, content in files:
        if re.search(r"/man/\w+/man\d/[^/]*\.gz$", name):
            yield PurePosixPath(name).stem, plain_man_page(_decode(decompress(content)))


def _dictionary(files: Files) -> Texts:
    for name, content in files:
        if name.endswith("/gcide.dict.dz"):
            entries = re.split(r"\n(?=\S)", _decode(decompress(content)))
            text, n = "", 0
            for entry in entries:
                if entry.startswith(("00-database", "Begin", "End")) or "\\" not in entry.partition("\n")[0]:
                    continue  # notices of the edition; a headword is followed by its pronunciation between backslashes
                text += re.sub(r"^\s*\[[^]]*\]\n", "", entry + "\n", flags=re.MULTILINE)  # lines that name a source
                if len(text.encode()) >= ENTRIES_BYTES:
                    yield f"entries-{n:05}", text
                    text, n = "", n + 1


def _bible(files: Files) -> Texts:
    """Modules of SWORD: `bzs` has the offset, the compressed size and the size of every book in `bzz`."""
    parts = {PurePosixPath(name).name: content for name, content in files if re.search(r"/[on]t\.bz[sz]$", name)}
    for testament in ("ot", "nt"):
        for offset, size, _ in struct.iter_unpack("<III", parts.get(f"{testament}.bzs", b"")):
            if size:
                book = _decode(zlib.decompress(parts[f"{testament}.bzz"][offset : offset + size]))
                for chapter in re.split(r"(?=<chapter [^>]*sID=)", book)[1:]:
                    title = re.search(r'osisID="([^"]+)"', chapter)
                    plain = re.sub(r"<note.*?</note>|<[^>]*>", "", chapter, flags=re.DOTALL)
                    if title:
                        yield title[1], " ".join(plain.split()).replace(" ¶ ", "\n").replace("¶ ", "") + "\n"


def _python(files: Files) -> Texts:
    for name, content in files:
        if name.endswith(".py") and not re.search(r"/(test|tests|idlelib|lib2to3)/", name):
            yield re.sub(r"^.*?/python3[^/]*/", "", name), _decode(content)


SOURCES = {  # domain -> package
    "bible": _Source("sword-text-kjv", _bible),
    "chinese": _Source("linux-doc", _chinese, depends=True),
    "dictionary": _Source("dict-gcide", _dictionary),
    "french": _Source("manpages-fr", _man_pages),
    "german": _Source("manpages-de", _man_pages),
    "kernel": _Source("linux-doc", _kernel, depends=True),
    "python": _Source("libpython3-stdlib", _python, depends=True),
}


def make_debian(folder: Path, packages: Path | None = None) -> dict[str, Any]:
    """Write the corpus into `folder`, which must not exist, and return its manifest.

    packages: a folder with the packages' .deb files; None: fetch them with apt-get, into a folder that is removed.
    Needs neither root nor an installed package. Raises InputError without apt-get or dpkg-deb, for a folder that
    exists, and if a package is missing; RunError if apt-get fails. Nothing is left half-written.
    """
    require(not folder.exists(), "folder", str(folder), "exists already: name another, or remove it")
    for tool in ("dpkg-deb", *(() if packages else ("apt-get", "apt-cache"))):
        require(shutil.which(tool) is not None, tool, "not found", HERE)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        found = _find(packages) if packages else _fetch(Path(temporary, "packages"))
        corpus = Path(temporary, "corpus")
        for domain, source in progress(SOURCES.items(), desc="corpus", unit="domain"):
            _write_domain(corpus / domain, domain, source, found[source.package])
        used = {field["Package"]: field for field in map(_describe, dict.fromkeys(found.values()))}
        manifest = {"recipe": RECIPE, "packages": {name: used[name]["Version"] for name in sorted(used)}}
        write_json(corpus / MANIFEST, manifest)
        corpus.rename(folder)
    return manifest


def plain_man_page(roff: str) -> str:
    """The text of a man page without comments, requests and changes of font."""
    lines = []
    for line in roff.splitlines():
        request = re.match(r"[.']\s*(\S*)\s*(.*)", line)
        if request:
            if request[1] not in ("SH", "SS", "B", "I", "BR", "BI", "IB", "IR", "RB", "RI", "SM", "IP"):
                continue
            line = request[2].replace('"', "")
        line = re.sub(r"\\f(\[[^]]*\]|\(..|.)", "", line)
        line = re.sub(r"\\\((..)|\\\[(\w+)\]", lambda found: _GLYPHS.get(found[1] or found[2], ""), line)
        line = re.sub(r"\\[-e ]", lambda found: {"-": "-", "e": "\\", " ": " "}[found[0][1]], line)
        line = re.sub(r"\\[&/,:%|^~0]", "", line)
        if line.strip():
            lines.append(line)
    return "\n".join(lines) + "\n"


_GLYPHS = {"aq": "'", "cq": "'", "oq": "'", "dq": '"', "lq": '"', "rq": '"', "em": "-", "en": "-", "bu": "*", "ti": "~",
           "ha": "^", "rs": "\\", "co": "©", "Fo": "«", "Fc": "»"}  # fmt: skip


def _write_domain(folder: Path, domain: str, source: _Source, package: Path) -> None:
    """Write texts in an order that depends on their names until the domain is full."""
    texts = {name: text for name, text in source.read(_contents(package)) if len(text.encode()) >= LEAST_BYTES}
    require(bool(texts), "package", str(package), f"has no text of the domain {domain}: is it another release's?")
    left = DOMAIN_BYTES
    folder.mkdir(parents=True)
    for name in stable_shuffle(texts, domain):
        if left <= 0:
            break
        left -= len(texts[name].encode())
        (folder / f"{name.replace('/', '__').lstrip('.')}.txt").write_text(texts[name], encoding="utf-8")


def _fetch(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    sources = {source.package: source.depends for source in SOURCES.values()}
    names = {package: _dependency(package) if depends else package for package, depends in sources.items()}
    _run("apt-get", "--quiet", "download", *names.values(), folder=folder)
    return _found(names, folder)


def _dependency(package: str) -> str:
    """The package on which a package without content depends, such as linux-doc-6.1 of linux-doc."""
    lines = _run("apt-cache", "depends", package).splitlines()
    found = [line.split()[-1] for line in lines if line.strip().startswith("Depends:")]
    require(bool(found), "package", package, "is unknown to apt: run `apt-get update` first")
    return found[0]


def _find(folder: Path) -> dict[str, Path]:
    """The .deb files in a folder, by the names in SOURCES."""
    files = [_describe(path)["Package"] for path in sorted(folder.glob("*.deb"))]
    names = {}
    for source in SOURCES.values():
        pattern = source.package
        if source.depends:  # linux-doc-6.1, libpython3.11-stdlib
            pattern = pattern.replace("python3", r"python3\.\d+").replace("linux-doc", r"linux-doc-[\d.]+")
        names[source.package] = next((name for name in files if re.fullmatch(pattern, name)), source.package)
    return _found(names, folder)


def _found(names: dict[str, str], folder: Path) -> dict[str, Path]:
    found = {}
    for package, name in names.items():
        path = next(iter(sorted(folder.glob(f"{name}_*.deb"))), None)
        require(path is not None, "package", name, f"is not in {folder}: fetch it with `apt-get download {name}`")
        assert path is not None
        found[package] = path
    return found


def _describe(package: Path) -> dict[str, str]:
    fields = _run("dpkg-deb", "--field", str(package), "Package", "Version").splitlines()
    return dict(line.split(": ", 1) for line in fields)


def _contents(package: Path) -> Files:
    """Stream the regular files of a package."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    stream = archive.extractfile(member) if member.isfile() else None
                    if stream is not None:
                        yield member.name, stream.read()
        except tarfile.TarError as error:
            raise RunError(f"{package}: is damaged ({error}): fetch it again") from None


def _run(*command: str, folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{' '.join(command)}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout


def _below(name: str, folder: str) -> str:
    return name.partition(f"/{folder}/")[2].removesuffix(".gz")


def _decode(content: bytes) -> str:
    return content.decode("utf-8", errors="ignore")  # a few bytes of old encodings
