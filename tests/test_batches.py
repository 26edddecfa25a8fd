"""The tokenizer and the batches: lossless, labelled, exactly resumable."""

import json
from itertools import chain, cycle, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.data import batches as batches_module
from dsmoe_lite.data import tokenizer as tokenizer_module
from dsmoe_lite.data.batches import Batches, heldout_batches
from dsmoe_lite.data.corpus import Document
from dsmoe_lite.data.tokenizer import END_ID, load_tokenizer, read_tokenizer
from dsmoe_lite.data.world import World


class Shelf:
    """A corpus of given documents that counts how often it is read."""

    name = "shelf"
    domains = ("odd", "even")

    def __init__(self, n=60, sha256="shelf"):
        self.all = [Document("word " * (i % 7) + f"number {i} é", self.domains[i % 2 == 0]) for i in range(n)]
        self.sha256 = sha256
        self.reads = 0

    def documents(self, split, start=0):
        self.reads += 1
        chosen = self.all[: len(self.all) // 2] if split == "heldout" else self.all
        return iter(chosen[start:])

    def fingerprint(self):
        return {"name": self.name, "sha256": self.sha256}


@pytest.fixture(scope="module")
def shelf():
    return Shelf()


@pytest.fixture(scope="module")
def tokenizer(shelf, tmp_path_factory):
    return load_tokenizer(shelf, 300, folder=tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def world_tokenizer(tmp_path_factory):
    return load_tokenizer(World(), 1024, folder=tmp_path_factory.mktemp("world"))


# Tokenizer


@pytest.mark.parametrize(
    "text",
    ["a<|end|>b", "<|end|>", "<|end|><|end|>", "x <|end|> y", "<|end|>\n", "é<|end|>🙂", "<|end", "|end|>", "\0\ufeff"],
)
def test_a_text_that_looks_like_the_end_token_is_text(tokenizer, text):
    restored = read_tokenizer(tokenizer.to_str())
    for one in (tokenizer, restored):
        ids = one.encode(text).ids
        assert END_ID not in ids
        assert one.decode(ids) == text
        assert one.encode_batch_fast([text])[0].ids == ids


def test_markers_in_a_document_do_not_end_it(tokenizer):
    marked = Shelf(4)
    marked.all = [Document("a<|end|>b<|end|>", "odd")] * 4
    stream = next(Batches(marked, tokenizer, 1, 4 * (len(tokenizer.encode("a<|end|>b<|end|>").ids) + 1) - 1))
    assert (stream.tokens == END_ID).sum() == 4


def test_a_cached_tokenizer_of_another_corpus_is_refused(tmp_path):
    load_tokenizer(Shelf(sha256="one"), 300, folder=tmp_path)
    (one,) = tmp_path.iterdir()
    load_tokenizer(Shelf(9, sha256="two"), 300, folder=tmp_path)
    (two,) = set(tmp_path.iterdir()) - {one}
    before = one.read_bytes()
    for content in (two.read_bytes(), b"", b"{}", b"[]", b"null", before[:90], before.replace(b"BPE", b"BPX"), b"\xff"):
        one.write_bytes(content)
        with pytest.raises(InputError, match=one.name):
            load_tokenizer(Shelf(sha256="one"), 300, folder=tmp_path)


def test_the_end_token_has_id_zero(tokenizer):
    assert tokenizer.token_to_id("<|end|>") == 0
    assert tokenizer.get_vocab_size() <= 300


@given(text=st.text(max_size=60).filter(lambda text: "<|end|>" not in text))
def test_every_text_survives_encoding(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert 0 not in ids


def test_tokenizer_is_trained_once_and_cached(tmp_path):
    shelf = Shelf()
    first = load_tokenizer(shelf, 300, folder=tmp_path)
    assert shelf.reads == 1
    again = load_tokenizer(shelf, 300, folder=tmp_path)
    assert shelf.reads == 1
    assert again.to_str() == first.to_str()
    load_tokenizer(shelf, 280, folder=tmp_path)
    load_tokenizer(Shelf(sha256="another"), 300, folder=tmp_path)
    cached = sorted(path.name for path in tmp_path.iterdir())
    assert len(cached) == 3
    assert all(name.startswith("shelf-") and name.endswith(".json") for name in cached)


def test_interrupted_training_leaves_nothing(tmp_path):
    class Breaking(Shelf):
        def documents(self, split, start=0):
            yield self.all[0]
            raise KeyboardInterrupt

    with pytest.raises(BaseException):  # noqa: B017, PT011 - the binding wraps it
        load_tokenizer(Breaking(), 300, folder=tmp_path / "cache")
    assert not list(tmp_path.rglob("*.json*"))


def test_the_cache_folder_can_be_set(tmp_path, monkeypatch):
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path))
    load_tokenizer(Shelf(), 270)
    assert [path.parent.name for path in tmp_path.rglob("*.json")] == ["tokenizers"]


def test_tokenizer_learns_from_a_sample_of_fixed_size(tmp_path, monkeypatch):
    shelf = Shelf()
    seen = []
    shelf.documents = lambda split, start=0: (seen.append(i) or d for i, d in enumerate(shelf.all))
    monkeypatch.setattr(tokenizer_module, "SAMPLE_BYTES", 200)
    load_tokenizer(shelf, 270, folder=tmp_path)
    size = [len(document.text.encode()) for document in shelf.all[: len(seen)]]
    assert sum(size[:-1]) <= 200 < sum(size)
    assert tokenizer_module.SAMPLE_BYTES == 200


@pytest.mark.parametrize("size", [256, 1 << 17, 300.0, True])
def test_invalid_vocabulary_sizes_are_refused(size, tmp_path):
    with pytest.raises(InputError, match="vocab_size"):
        load_tokenizer(Shelf(), size, folder=tmp_path)


def test_training_is_the_same_every_time(tmp_path):
    shelf = Shelf()
    trained = [load_tokenizer(shelf, 290, folder=tmp_path / str(i)).to_str() for i in range(3)]
    assert len(set(trained)) == 1


def test_words_of_the_world_are_single_tokens(world_tokenizer):
    language = World().language
    names = [*language.first, *language.last, *language.relations]
    values = [word for values in language.values for word in values]
    single = {word: len(world_tokenizer.encode(f" {word}").ids) == 1 for word in names + values}
    assert all(single[word] for word in names)
    assert sum(single[word] for word in values) >= 0.95 * len(values)


def test_a_prompt_and_its_answer_are_the_tokens_of_the_sentence(world_tokenizer):
    for question in World().questions("head", 100):
        sentence = world_tokenizer.encode(f"{question.prompt}{question.answer}.").ids
        parts = [world_tokenizer.encode(part).ids for part in (question.prompt, question.answer, ".")]
        assert sentence == list(chain(*parts))


# Batches


def expected_stream(shelf, tokenizer, split="train"):
    """An endless row of (token, label), from the definition."""
    documents = list(shelf.documents(split))
    for document in cycle(documents):
        for token in [*tokenizer.encode(document.text).ids, 0]:
            yield token, shelf.domains.index(document.domain)


@pytest.mark.parametrize("group", [1, 100, 65_536])
@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 1), (2, 5), (3, 700)])
def test_batches_cut_one_row_of_documents(shelf, tokenizer, monkeypatch, group, batch_size, seq_len):
    monkeypatch.setattr(batches_module, "GROUP_CHARACTERS", group)
    stream = expected_stream(shelf, tokenizer)
    for batch in islice(Batches(shelf, tokenizer, batch_size, seq_len), 8):  # (3, 700): several epochs
        assert batch.tokens.shape == batch.domains.shape == (batch_size, seq_len + 1)
        assert batch.tokens.dtype == torch.int64
        assert batch.domains.dtype == torch.uint8
        pairs = list(islice(stream, batch_size * (seq_len + 1)))
        assert list(zip(batch.tokens.flatten().tolist(), batch.domains.flatten().tolist(), strict=True)) == pairs


@pytest.mark.parametrize("group", [1, 100, 65_536])
def test_resumed_batches_equal_uninterrupted_ones(shelf, tokenizer, monkeypatch, group):
    monkeypatch.setattr(batches_module, "GROUP_CHARACTERS", group)
    unbroken, states = Batches(shelf, tokenizer, 2, 37), []
    taken = []
    for _ in range(40):
        states.append(json.loads(json.dumps(unbroken.state_dict())))
        taken.append(next(unbroken))
    assert states[-1]["epoch"] >= 2
    for position in range(0, 40, 3):
        resumed = Batches(shelf, tokenizer, 2, 37)
        next(resumed)
        resumed.load_state_dict(states[position])
        assert resumed.state_dict() == states[position]
        for batch, same in zip(taken[position:], resumed, strict=False):
            assert torch.equal(batch.tokens, same.tokens)
            assert torch.equal(batch.domains, same.domains)
        assert resumed.state_dict() == unbroken.state_dict()


def test_state_does_not_grow_with_the_batch(shelf, tokenizer):
    batches = Batches(shelf, tokenizer, 8, 64)
    next(batches)
    assert set(batches.state_dict()) == {"epoch", "document", "offset"}


def test_reading_the_state_changes_nothing(shelf, tokenizer):
    read, unread = Batches(shelf, tokenizer, 1, 20), Batches(shelf, tokenizer, 1, 20)
    for _ in range(30):
        read.state_dict()
        assert torch.equal(next(read).tokens, next(unread).tokens)


@pytest.mark.parametrize("state", [{}, {"epoch": 0, "document": -1, "offset": 0}, {"epoch": 0, "document": 0}])
def test_broken_state_is_refused(shelf, tokenizer, state):
    with pytest.raises(InputError):
        Batches(shelf, tokenizer, 1, 4).load_state_dict(state)


@pytest.mark.parametrize("state", [{"document": 1, "offset": 99_999}, {"document": 61, "offset": 0}])
def test_state_of_another_corpus_is_refused(shelf, tokenizer, state):
    with pytest.raises(InputError, match="belongs to another corpus or tokenizer"):
        Batches(shelf, tokenizer, 1, 4).load_state_dict({"epoch": 0, **state})


def test_heldout_is_its_own_split(shelf, tokenizer):
    stream = expected_stream(shelf, tokenizer, "heldout")
    for batch in heldout_batches(shelf, tokenizer, 2, 9, 4):
        assert batch.tokens.flatten().tolist() == [token for token, _ in islice(stream, 20)]


def test_heldout_text_is_never_counted_twice(shelf, tokenizer):
    total = sum(len(tokenizer.encode(d.text).ids) + 1 for d in shelf.documents("heldout"))
    assert len(heldout_batches(shelf, tokenizer, 1, total - 1, 1)) == 1
    with pytest.raises(InputError, match="n_batches = 1: the held-out text of shelf fills 0 batches"):
        heldout_batches(shelf, tokenizer, 1, total, 1)
    with pytest.raises(InputError, match="fills 5 batches"):
        heldout_batches(shelf, tokenizer, 1, total // 5 - 1, 6)
    for times in (2, 3, 5):  # read to the end several times, exactly
        with pytest.raises(InputError, match="fills 0 batches"):
            heldout_batches(shelf, tokenizer, times, total - 1, 1)


def test_a_short_text_that_divides_the_batch_is_refused(tokenizer):
    short = Shelf(2)
    total = sum(len(tokenizer.encode(d.text).ids) + 1 for d in short.documents("heldout"))
    with pytest.raises(InputError, match="n_batches = 3: the held-out text of shelf fills 0 batches"):
        heldout_batches(short, tokenizer, 2 * total, total - 1, 3)


def test_a_corpus_without_documents_is_refused(tokenizer):
    with pytest.raises(InputError, match="no documents"):
        next(Batches(Shelf(0), tokenizer, 1, 4))


@pytest.mark.parametrize(("batch_size", "seq_len", "split"), [(0, 4, "train"), (1, 0, "train"), (1, 4, "test")])
def test_invalid_sizes_are_refused(shelf, tokenizer, batch_size, seq_len, split):
    with pytest.raises(InputError):
        Batches(shelf, tokenizer, batch_size, seq_len, split=split)


def test_labels_of_the_world(world_tokenizer):
    world = World()
    row = [(d.domain, world_tokenizer.encode(d.text).ids) for d in islice(world.documents("train"), 200)]
    labels = [label for domain, ids in row for label in [world.domains.index(domain)] * (len(ids) + 1)]
    batch = next(Batches(world, world_tokenizer, 1, len(labels) - 1))
    assert batch.domains[0].tolist() == labels
    assert set(labels) == set(range(5))
