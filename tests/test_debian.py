"""The corpus `debian`, made from small packages that these tests build."""

import gzip
import json
import os
import struct
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from dsmoe_lite.cli import main
from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.data import debian
from dsmoe_lite.data.debian import Debian, make_debian, plain_man_page
from dsmoe_lite.presets import preset
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.job import CorpusConfig, Job, make_corpus
from tests.needs import needs_dpkg

DOC = "usr/share/doc/linux-doc-9.9/Documentation"
MODULE = "usr/share/sword/modules/texts/ztext/kjv"
GENESIS = (
    '<title>Genesis</title> <chapter n="1" osisID="Gen.1" sID="Gen.1"/> In the <w lemma="H1">beginning</w>.'
    '<note type="study">Or: at first.</note> ¶ And the earth was {n}. <chapter eID="Gen.1"/>'
    '<chapter n="2" osisID="Gen.2" sID="Gen.2"/> Thus the heavens were finished. <chapter eID="Gen.2"/>'
)
LONG = " word" * 120


def _text(topic: str, n: int) -> str:
    return f"About {topic} {n}.\n" + f"A line of {topic}, number {n}.\n" * 40


def _files() -> dict[str, dict[str, bytes]]:
    """The files of each package."""
    pages = {f"usr/share/man/de/man1/seite{n}.1.gz": gzip.compress(_text("Seiten", n).encode()) for n in range(30)} | {
        "usr/share/man/de/man1/stub.1.gz": gzip.compress(b".so man1/seite1.1\n")
    }
    french = {f"usr/share/man/fr/man2/page{n}.2.gz": gzip.compress(_text("pages é", n).encode()) for n in range(30)}
    kernel = {f"{DOC}/mm/file{n}.rst.gz": gzip.compress(_text("pages", n).encode()) for n in range(30)}
    kernel |= {
        f"{DOC}/translations/zh_CN/mm/file{n}.rst.gz": gzip.compress(_text("内存", n).encode()) for n in range(30)
    }
    kernel |= {f"{DOC}/translations/it_IT/mm/file.rst.gz": gzip.compress(_text("pagine", 0).encode())}
    python = {f"usr/lib/python3.14/pack/mod{n}.py": _text("code", n).encode() for n in range(30)}
    python |= {"usr/lib/python3.14/test/test_mod.py": _text("tests", 0).encode()}
    entries = "".join(
        f"Word{n} \\Word\\, n.\n   A meaning, number {n}:{LONG}.\n   [1913 Webster]\n\n" for n in range(500)
    )
    dictionary = f"\n\n00-database-info\n   A notice.\n\n{entries}".encode()
    books = [zlib.compress(GENESIS.format(n="void" + LONG).encode()), zlib.compress(b"<title>Empty</title>")]
    index = struct.pack("<III", 0, 0, 0) + struct.pack("<III", 0, len(books[0]), 1)
    index += struct.pack("<III", len(books[0]), len(books[1]), 1)
    return {
        "linux-doc-9.9": kernel,
        "manpages-de": pages,
        "manpages-fr": french,
        "libpython3.14-stdlib": python,
        "dict-gcide": {"usr/share/dictd/gcide.dict.dz": gzip.compress(dictionary)},
        "sword-text-kjv": {f"{MODULE}/ot.bzs": index, f"{MODULE}/ot.bzz": b"".join(books), f"{MODULE}/nt.bzs": b""},
    }


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    for name, files in _files().items():
        root = folder / "tree" / name
        for path, content in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
        (root / "DEBIAN").mkdir(parents=True)
        control = f"Package: {name}\nVersion: 1.2\nArchitecture: all\nMaintainer: none <none@none>\nDescription: test\n"
        (root / "DEBIAN" / "control").write_text(control)
        subprocess.run(["dpkg-deb", "--build", root, folder / f"{name}_1.2_all.deb"], check=True, capture_output=True)
    return folder


@needs_dpkg
def test_a_corpus_has_seven_domains_and_plain_text(packages: Path, tmp_path: Path) -> None:
    manifest = make_debian(tmp_path / "corpus", packages)
    assert manifest["packages"] == dict.fromkeys(sorted(_files()), "1.2")
    corpus = Debian(tmp_path / "corpus")
    assert corpus.domains == tuple(sorted(debian.SOURCES))
    texts = {path.relative_to(tmp_path / "corpus").as_posix(): path for path in (tmp_path / "corpus").rglob("*.txt")}
    read = {name: path.read_text(encoding="utf-8") for name, path in texts.items()}
    assert read["kernel/mm__file3.rst.txt"] == _text("pages", 3)
    assert read["chinese/mm__file3.rst.txt"] == _text("内存", 3)
    assert read["german/seite3.1.txt"] == _text("Seiten", 3)
    assert "german/stub.1.txt" not in read
    assert read["french/page29.2.txt"] == _text("pages é", 29)
    assert read["python/pack__mod7.py.txt"] == _text("code", 7)
    assert not any("test_mod" in name or "pagine" in text for name, text in read.items())
    assert read["bible/Gen.1.txt"] == f"In the beginning.\nAnd the earth was void{LONG}.\n"
    assert "bible/Gen.2.txt" not in read  # shorter than LEAST_BYTES
    words = read["dictionary/entries-00000.txt"]
    assert words.startswith("Word0 \\Word\\, n.\n   A meaning, number 0:")
    assert "Webster" not in words + read["dictionary/entries-00003.txt"]
    for split in ("train", "heldout"):
        assert {document.domain for document in corpus.documents(split)} <= set(corpus.domains)
    longest = max(len(document.text.encode()) for document in corpus.documents("train"))
    assert longest <= 2 * debian.PIECE_BYTES + 512


@needs_dpkg
def test_no_file_is_in_both_splits(packages: Path, tmp_path: Path) -> None:
    make_debian(tmp_path / "corpus", packages)
    corpus = Debian(tmp_path / "corpus")
    heldout = {d.text.partition("\n")[0] for d in corpus.documents("heldout") if d.text.startswith("About")}
    train = {d.text.partition("\n")[0] for d in corpus.documents("train") if d.text.startswith("About")}
    assert heldout
    assert train
    assert not heldout & train


@needs_dpkg
def test_the_same_packages_give_the_same_corpus(packages: Path, tmp_path: Path) -> None:
    for name in "ab":
        make_debian(tmp_path / name, packages)
    one, other = Debian(tmp_path / "a").fingerprint(), Debian(tmp_path / "b").fingerprint()
    assert one == other
    assert one["packages"]["dict-gcide"] == "1.2"
    assert one["name"] == "debian"
    (tmp_path / "b" / "german" / "seite3.1.txt").write_text("changed")
    assert Debian(tmp_path / "b").fingerprint()["sha256"] != one["sha256"]


@needs_dpkg
def test_a_domain_stops_when_it_is_full(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "DOMAIN_BYTES", 5000)
    make_debian(tmp_path / "corpus", packages)
    for domain in ("german", "french", "kernel", "python", "chinese"):
        sizes = [path.stat().st_size for path in (tmp_path / "corpus" / domain).iterdir()]
        assert sum(sizes) >= 5000 > sum(sizes) - max(sizes)


@needs_dpkg
def test_nothing_is_left_of_a_failure(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for path in packages.glob("*.deb"):
        if not path.name.startswith("manpages-fr"):
            (few / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"package = 'manpages-fr': is not in .*: fetch it with `apt-get download"):
        make_debian(tmp_path / "corpus", few)
    (few / "manpages-fr_1.2_all.deb").write_bytes((packages / "manpages-fr_1.2_all.deb").read_bytes()[:700])
    with pytest.raises(RunError, match="manpages-fr"):
        make_debian(tmp_path / "corpus", few)
    monkeypatch.setitem(debian.SOURCES, "french", replace(debian.SOURCES["french"], read=lambda files: iter(())))
    with pytest.raises(InputError, match="has no text of the domain french"):
        make_debian(tmp_path / "corpus", packages)
    assert [path.name for path in tmp_path.iterdir()] == ["few"]
    (tmp_path / "ready").mkdir()
    with pytest.raises(InputError, match=r"folder = '.*ready': exists already"):
        make_debian(tmp_path / "ready", packages)


def test_without_the_tools_of_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="dpkg-deb = 'not found': this corpus is made from packages of Debian"):
        make_debian(tmp_path / "corpus")


@needs_dpkg
def test_the_command_fetches_what_apt_names(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """apt-get and apt-cache are scripts here that know the packages of these tests."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apt-cache").write_text(
        "#!/bin/sh\ncase $2 in linux-doc) echo $2; echo '  Depends: linux-doc-9.9';;"
        " *) echo $2; echo '  Depends: libpython3.14-stdlib';; esac\n"
    )
    (tools / "apt-get").write_text(
        f'#!/bin/sh\nshift 2\nfor name in "$@"; do cp {packages}/$name"_1.2_all.deb" . || exit 100; done\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as status:
        main(["corpus", "debian", "--json"])
    assert status.value.code == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["domain"] for row in rows] == sorted(debian.SOURCES)
    assert next(row for row in rows if row["domain"] == "german")["files"] == 30
    assert Debian().fingerprint()["files"] == sum(row["files"] for row in rows)
    with pytest.raises(SystemExit) as status:
        main(["corpus", "debian"])
    assert status.value.code == 2
    assert "exists already" in capsys.readouterr().err
    (tools / "apt-get").write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    with pytest.raises(SystemExit) as status:
        main(["corpus", "debian", "--out", str(tmp_path / "other")])
    assert status.value.code == 1
    assert "E: Unable to locate package" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_corpus_that_is_not_there_or_of_another_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="is missing: make it with `dsmoe corpus debian`"):
        make_corpus(CorpusConfig(kind="debian"))
    (tmp_path / "debian").mkdir()
    (tmp_path / "debian" / ".packages.json").write_text('{"recipe": 0, "packages": {}}')
    with pytest.raises(InputError, match="was made by another version: remove it"):
        make_corpus(CorpusConfig(kind="debian"))


@needs_dpkg
def test_a_job_reads_the_corpus_and_checks_its_hash(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path))
    make_debian(tmp_path / "debian", packages)
    digest = Debian().fingerprint()["sha256"]
    job = Job(
        model=preset("course-deepseekmoe"),
        train=TrainConfig(steps=2, batch_size=2, seq_len=16, warmup_steps=1),
        corpus=CorpusConfig(kind="debian", sha256=digest),
        vocab_size=300,
        n_heldout_batches=2,
        device="cpu",
    )
    record = job.run()
    job.check_record(record)
    assert record["corpus"]["packages"]["linux-doc-9.9"] == "1.2"
    assert set(record["heldout_bits_per_byte"]) == {"all", *record["heldout_by_domain"]}
    other = replace(job, corpus=CorpusConfig(kind="debian", sha256="0" * 64))
    with pytest.raises(InputError, match="sha256 = '" + digest):
        other.check_record(record)
    with pytest.raises(InputError, match=r"sha256 of debian = .*: this run has 000"):
        other.run()


@pytest.mark.parametrize(
    ("roff", "text"),
    [
        ('.\\" a comment\n.TH LS 1\n.SH NAME\nls \\- list \\fIfiles\\fP\n', "NAME\nls - list files\n"),
        (".PP\n.B \"ls\" \\-a\nof \\f[B]all\\f[R]\\&.\n", "ls -a\nof all.\n"),
        ("\\(aqquoted\\(aq \\[lq]x\\[rq] a\\ b \\e\n'br\n\n", "'quoted' \"x\" a b \\\n"),
        (".IP \\(bu 2\ngrößer\n", "* 2\ngrößer\n"),
    ],
)  # fmt: skip
def test_man_pages_become_plain_text(roff: str, text: str) -> None:
    assert plain_man_page(roff) == text
