"""Corpora of real text: the standard library, a folder, a dataset; memory does not depend on their size."""

import ast
import io
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import tokenize
import types
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.data.folder import Folder
from dsmoe_lite.data.hub import Hub
from dsmoe_lite.data.stdlib import Stdlib, split_source
from dsmoe_lite.data.tokenizer import load_tokenizer

# The standard library


@pytest.fixture(scope="module")
def stdlib():
    return Stdlib()


def test_source_is_split_into_code_docstrings_and_comments():
    source = (
        '"""Title."""\n# first\nimport os  # inline\n\n\nclass A:\n    # before\n    """About A."""\n\n'
        '    text = "# not a comment"\n\n    def f(self):\n        r"""About\n        f."""\n        "second"\n'
        '        return """no docstring"""\n\n\ndef g():\n    "short"  # why\n    "a".strip()\n'
    )
    texts = {document.domain: document.text for document in split_source(source)}
    assert texts["comment"] == "# first\n# inline\n# before\n# why\n"
    assert texts["docstring"] == '"""Title."""\n"""About A."""\nr"""About\n        f."""\n"short"\n'
    assert texts["code"] == (
        'import os\nclass A:\n    text = "# not a comment"\n    def f(self):\n        "second"\n'
        '        return """no docstring"""\ndef g():\n    "a".strip()\n'
    )
    assert split_source("") == []


def test_stdlib_docstrings_and_comments_are_those_of_its_files():
    """Compared, file by file, with the results of ast and tokenize."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "dataclasses.py", "json/decoder.py", "abc.py", "textwrap.py"):
        source = (root / name).read_text(encoding="utf-8")
        texts = {"code": "", "docstring": "", "comment": ""}
        for document in split_source(source):
            texts[document.domain] += document.text
        comments = [token.string for token in _tokens(source) if token.type == tokenize.COMMENT]
        assert texts["comment"].splitlines() == comments
        nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        written = [ast.get_docstring(node, clean=False) for node in nodes]
        assert Counter(ast.literal_eval(f"[{_listed(texts['docstring'])}]")) == Counter(filter(None, written))
        assert tokenize.COMMENT not in {t.type for t in _tokens(texts["code"])}
        n_words = sum(len(text.split()) for text in texts.values())
        assert n_words == pytest.approx(len(source.split()), rel=0.01)


def _tokens(text):
    return tokenize.generate_tokens(io.StringIO(text).readline)


def _listed(docstrings):
    return ",".join(token.string for token in _tokens(docstrings) if token.type == tokenize.STRING)


def test_stdlib_documents(stdlib):
    documents = list(stdlib.documents("heldout"))
    assert {document.domain for document in documents} == set(stdlib.domains) == {"code", "docstring", "comment"}
    assert len(documents) > 300
    lengths = [len(document.text) for document in documents]
    assert sorted(lengths)[-5] <= 2000
    assert len({document.text for document in documents[:40]}) == 40
    assert len({document.domain for document in documents[:20]}) > 1  # shuffled, not one domain after another


def test_stdlib_order_is_fixed_and_can_be_read_from_any_document(stdlib):
    first = list(islice(stdlib.documents("train"), 400))
    assert list(islice(Stdlib().documents("train", 350), 50)) == first[350:]
    assert list(islice(stdlib.documents("train", 390), 10)) == first[390:]  # skips by the counts of files read before


def test_stdlib_is_split_by_file(stdlib):
    train, heldout = stdlib._files["train"], stdlib._files["heldout"]
    assert not set(train) & set(heldout)
    assert 0.05 < len(heldout) / len(train + heldout) < 0.15
    assert not [name for name in train + heldout if "test" in name.split("/") or "site-packages" in name]


def test_stdlib_fingerprint_names_the_python(stdlib):
    fingerprint = stdlib.fingerprint()
    assert fingerprint == Stdlib().fingerprint()
    assert fingerprint["python"] == sys.version.split()[0]
    assert fingerprint["bytes"] > 5_000_000
    assert re.fullmatch("[0-9a-f]{64}", fingerprint["sha256"])


# A folder


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def numbered(n, start=0, word="línea"):
    return "".join(f"{word} {i} {'x' * (i % 90)}\n" for i in range(start, start + n))


def all_texts(folder):
    return [document.text for split in ("train", "heldout") for document in folder.documents(split)]


@pytest.fixture
def many(tmp_path):
    for i in range(40):
        write(tmp_path / "my texts" / ("poems" if i % 2 else "letters") / f"{i}.txt", numbered(30 + 20 * i, 10_000 * i))
    write(tmp_path / "my texts" / "top.md", numbered(30, 900_000))
    write(tmp_path / "my texts" / "empty.txt", "")
    (tmp_path / "my texts" / ".hidden").write_bytes(b"\0\0")
    return tmp_path / "my texts"


def test_folder_yields_every_line_once(many):
    lines = [line for text in all_texts(Folder(many)) for line in text.splitlines()]
    written = [line for path in many.rglob("*.[tm]*") for line in path.read_text(encoding="utf-8").splitlines()]
    assert Counter(lines) == Counter(written)


def test_folder_domains_are_its_subfolders(many):
    folder = Folder(many)
    assert folder.domains == ("letters", "poems", "text")
    for document in folder.documents("train"):
        number = int(document.text.split()[1])
        assert document.domain == ("text" if number >= 900_000 else ("letters", "poems")[number // 10_000 % 2])


def test_folder_holds_out_whole_files(many):
    folder = Folder(many)
    files = {s: {int(d.text.split()[1]) // 10_000 for d in folder.documents(s)} for s in ("train", "heldout")}
    assert not files["train"] & files["heldout"]
    assert len(files["train"] | files["heldout"]) == 41
    assert 1 <= len(files["heldout"]) <= 10


def test_folder_order_is_shuffled_fixed_and_can_be_read_from_any_document(many):
    documents = list(Folder(many).documents("train"))
    assert documents == list(Folder(str(many)).documents("train"))
    for start in (1, 17, len(documents) - 1, len(documents)):
        assert list(Folder(many).documents("train", start)) == documents[start:]
    first = [int(document.text.split()[1]) // 10_000 for document in documents[:20]]
    assert len(set(first)) > 8


@pytest.mark.parametrize("size", [8_200, 20_000, 81_920, 300_000])
@pytest.mark.parametrize("unit", ["abc é\n", "żółw", "🐢", "a"])
def test_one_file_is_held_out_by_pieces(tmp_path, size, unit):
    text = (unit * size)[: size // len(unit.encode()) * len(unit)]
    write(tmp_path / "all.txt", text)
    folder = Folder(tmp_path)
    assert folder.domains == ("text",)
    parts = {split: [d.text for d in folder.documents(split)] for split in ("train", "heldout")}
    assert Counter("".join(parts["train"] + parts["heldout"])) == Counter(text)
    assert all(len(piece.encode()) <= 2 * 4096 + 512 for piece in chain_of(parts))
    pieces = len(parts["train"]) + len(parts["heldout"])
    assert len(parts["heldout"]) == max(1, pieces // 10)
    assert len(parts["train"]) >= 1


def chain_of(parts):
    return [piece for pieces in parts.values() for piece in pieces]


def test_pieces_of_one_file_are_its_lines(tmp_path):
    write(tmp_path / "all.txt", numbered(5000))
    lines = [line for text in all_texts(Folder(tmp_path)) for line in text.splitlines()]
    assert Counter(lines) == Counter(numbered(5000).splitlines())


def test_two_small_files_are_enough(tmp_path):
    write(tmp_path / "a.txt", "one\n")
    write(tmp_path / "b.txt", "two\n")
    assert sorted(all_texts(Folder(tmp_path))) == ["one\n", "two\n"]


def test_folder_fingerprint_follows_names_and_bytes(many):
    before = Folder(many).fingerprint()
    assert before == Folder(many).fingerprint()
    assert before["bytes"] == sum(path.stat().st_size for path in many.rglob("*.[tm]*"))
    write(many / "top.md", numbered(30, 900_001))
    changed = Folder(many).fingerprint()
    (many / "top.md").rename(many / "other.md")
    assert len({fingerprint["sha256"] for fingerprint in (before, changed, Folder(many).fingerprint())}) == 3


def refusal(path):
    with pytest.raises(InputError) as refused:
        list(islice(Folder(path).documents("train"), 1000)) + list(Folder(path).documents("heldout"))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_folders_that_hold_no_text_are_refused(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "is not a folder" in refusal(write(tmp_path / "file.txt", "text"))
    (tmp_path / "empty").mkdir()
    assert "holds no text" in refusal(tmp_path / "empty")
    write(tmp_path / "blank" / "a.txt", "")
    assert "holds no text" in refusal(tmp_path / "blank")
    write(tmp_path / "little" / "a.txt", "few words")
    assert "too little text" in refusal(tmp_path / "little")


def test_binary_files_are_named_when_the_folder_is_opened(many):
    (many / "poems" / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    with pytest.raises(InputError, match=r"photo\.png: is binary \(a zero byte at 8\)"):
        Folder(many)


def test_other_encodings_are_named_with_their_byte(many):
    (many / "letters" / "old.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(InputError, match=r"old\.txt: is not UTF-8 \(byte 2\)"):
        Folder(many)


@pytest.mark.parametrize(("bad", "word"), [(b"\0", "is binary"), (b"\xff", "is not UTF-8"), (b"\x80" * 9, "not UTF-8")])
@pytest.mark.parametrize("position", [4095, 4096, 30_000, 49_999])
def test_bad_bytes_deep_in_a_file_are_found_while_it_streams(tmp_path, bad, word, position):
    content = (b"some text\n" * 6000)[:50_000]
    (tmp_path / "deep.txt").write_bytes(content[:position] + bad + content[position:])
    message = refusal(tmp_path)
    assert word in message
    assert "deep.txt" in message
    assert re.search(rf"\b{position}\b", message)


def test_unreadable_files_are_named(many, monkeypatch):
    """Through open(), since tests may run as root, which may read everything."""
    opened = Path.open

    def refuse(self, *args, **kwargs):
        if self.name == "7.txt":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert refusal(many).endswith("7.txt: cannot be read: Permission denied")


# Links


def with_link(root, name, target):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).symlink_to(target, target_is_directory=True)


def test_linked_folders_are_read(many, tmp_path):
    before = Folder(many).fingerprint()
    for i in range(3):
        write(tmp_path / "elsewhere" / "deep" / f"{i}.txt", numbered(20, 100 * i, "linked"))
    with_link(many, "linked", tmp_path / "elsewhere")
    folder = Folder(many)
    assert {"linked", "letters", "poems"} <= set(folder.domains)
    lines = [line for text in all_texts(folder) for line in text.splitlines()]
    assert sum(line.startswith("linked ") for line in lines) == 60
    assert folder.fingerprint()["files"] == before["files"] + 3
    assert folder.fingerprint() == Folder(many).fingerprint() != before


@pytest.mark.parametrize("name", ["aaa", "zzz", "letters/again", "letters/0/1/2"])
@pytest.mark.parametrize("target", [".", "poems", ".."])
def test_a_link_to_what_is_read_already_adds_nothing(many, name, target):
    """Also a cycle: the folder itself, and the one above it, which holds nothing else."""
    before = Folder(many).fingerprint()
    with_link(many, name, (many / target).resolve())
    assert Folder(many).fingerprint() == before


def test_two_links_to_one_folder_read_it_once(many, tmp_path):
    write(tmp_path / "elsewhere" / "a.txt", numbered(20, 700_000))
    with_link(tmp_path / "elsewhere", "back", many)  # a cycle through another folder
    before = Folder(many).fingerprint()
    for name in ("second", "first"):
        with_link(many, name, tmp_path / "elsewhere")
    after = Folder(many)
    assert after.fingerprint()["files"] == before["files"] + 1
    assert "first" in after.domains
    assert "second" not in after.domains


def test_a_corpus_that_is_a_link_is_the_same_corpus(many, tmp_path):
    with_link(tmp_path, "link", many)
    assert Folder(tmp_path / "link").fingerprint() == Folder(many).fingerprint()
    assert all_texts(Folder(tmp_path / "link")) == all_texts(Folder(many))


@pytest.mark.parametrize(("name", "target"), [("gone", "nowhere"), ("poems/gone", "nowhere"), ("self", "self")])
def test_broken_links_are_named(many, name, target):
    with_link(many, name, target)
    assert f"{name}: is a broken link" in refusal(many)


def test_hidden_links_are_left_out(many, tmp_path):
    before = Folder(many).fingerprint()
    write(tmp_path / "elsewhere" / "a.txt", numbered(20))
    with_link(many, ".linked", tmp_path / "elsewhere")
    with_link(many, ".gone", "nowhere")
    assert Folder(many).fingerprint() == before


# A dataset


class FakeRows:
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)

    def skip(self, n):
        return FakeRows(self.rows[n:])


@pytest.fixture
def fake_datasets(monkeypatch):
    """A fake of the optional package: it records its arguments and has rows to stream."""
    module = types.ModuleType("datasets")
    module.asked = []

    def load_dataset(path, name=None, **options):
        module.asked.append((path, name, options))
        if path == "nobody/nothing":
            raise FileNotFoundError("Dataset 'nobody/nothing' doesn't exist\non the Hub")
        return FakeRows([{"text": f"row {i}", "id": i} for i in range(95)])

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_hub_streams_and_holds_out_every_tenth_row(fake_datasets):
    hub = Hub("some/set", subset="small", revision="v1")
    assert fake_datasets.asked == [("some/set", "small", {"split": "train", "streaming": True, "revision": "v1"})]
    rows = {split: [int(d.text.split()[1]) for d in hub.documents(split)] for split in ("train", "heldout")}
    assert rows["heldout"] == list(range(9, 95, 10))
    assert rows["train"] == [i for i in range(95) if i % 10 != 9]
    for split, numbers in rows.items():
        for start in range(len(numbers) + 1):
            assert [int(d.text.split()[1]) for d in hub.documents(split, start)] == numbers[start:]
    assert hub.fingerprint()["source"]["dataset"] == "some/set"
    assert hub.fingerprint()["sha256"] != Hub("some/set").fingerprint()["sha256"]


def test_hub_refusals_are_one_line(fake_datasets, monkeypatch):
    with pytest.raises(InputError, match=r"^dataset = 'nobody/nothing': cannot be loaded: Dataset .* doesn't exist$"):
        Hub("nobody/nothing")
    with pytest.raises(InputError, match="column = 'body': holds no text in some/set: its columns are text, id"):
        next(Hub("some/set", column="body").documents("train"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the package datasets: pip install -e '\.\[hub\]'"):
        Hub("some/set")


# Memory

MEASURE = """
import json, sys
from itertools import islice
from pathlib import Path
import psutil
from dsmoe_lite.data.batches import Batches
from dsmoe_lite.data.folder import Folder
from dsmoe_lite.data.tokenizer import load_tokenizer
from tokenizers import Tokenizer

root, n_batches, cached = sys.argv[1], int(sys.argv[2]), sys.argv[3]
process, most = psutil.Process(), 0
folder, has_tokenizer = Folder(root), cached.endswith(".json")
stored = json.loads(Path(cached).read_text())["tokenizer"] if has_tokenizer else ""
tokenizer = Tokenizer.from_str(stored) if has_tokenizer else load_tokenizer(folder, 1024, folder=Path(cached))
batches, epochs = Batches(folder, tokenizer, 16, 256), set()
for i, batch in enumerate(islice(batches, n_batches)):
    if i % 20 == 0:
        most = max(most, process.memory_info().rss)
pieces = sum(1 for _ in folder.documents("train")) if has_tokenizer else 0
most = max(most, process.memory_info().rss)
print(json.dumps({"megabytes": most / 1e6, "pieces": pieces, "epoch": batches.state_dict()["epoch"]}))
"""


def fill(root, megabytes, n_files=5):
    """Write files of varied text."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(20_000)]
    block = "".join(" ".join(rng.choices(words, k=12)) + "\n" for _ in range(12_000)).encode()
    for i in range(n_files):
        path = root / f"part{i}" / "text.txt"
        path.parent.mkdir(parents=True)
        with path.open("wb") as file:
            while file.tell() < megabytes * 1_000_000 / n_files:
                start = rng.randrange(len(block) // 2)
                file.write(block[start:])
    return root


def measure(root, n_batches, cached):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "src")}
    command = [sys.executable, "-c", MEASURE, str(root), str(n_batches), str(cached)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_does_not_follow_the_size_of_the_folder(tmp_path):
    small, large = fill(tmp_path / "small", 5), fill(tmp_path / "large", 60)
    load_tokenizer(Folder(small), 400, folder=tmp_path)
    cached = next(tmp_path.glob("*.json"))
    few, many = measure(small, 300, cached), measure(large, 300, cached)
    assert many["pieces"] > 8 * few["pieces"]
    assert many["megabytes"] - few["megabytes"] < 20, (few, many)


@pytest.mark.slow
def test_memory_grows_under_50_mb_from_50_mb_to_1_gb(tmp_path):
    """Including the training of the tokenizer, which reads 20 MB of both."""
    small, large = fill(tmp_path / "small", 50), fill(tmp_path / "large", 1000)
    few, many = measure(small, 1500, tmp_path / "few"), measure(large, 1500, tmp_path / "many")
    print(few, many)
    assert many["megabytes"] - few["megabytes"] < 50, (few, many)
    cached = next((tmp_path / "few").glob("*.json"))
    few, many = measure(small, 20, cached), measure(large, 20, cached)
    print(few, many)
    assert many["pieces"] > 15 * few["pieces"]
    assert many["megabytes"] - few["megabytes"] < 50, (few, many)
