"""The world with common knowledge: every fact obeys the rule, and the rule is the same for all."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import from_dict
from dsmoe_lite.data.inflected import Inflected, InflectedConfig
from dsmoe_lite.data.tokenizer import load_tokenizer
from dsmoe_lite.presets import preset
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.job import CorpusConfig, Job, corpus_of, make_corpus, run_job

pytestmark = pytest.mark.usefixtures("little_text")
SMALL = InflectedConfig(n_first=8, n_last=8, n_entities=20, n_hours=4, n_places=4, n_stems=5, n_heldout=200)


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train tokenizers on little text, to save time."""
    monkeypatch.setattr("dsmoe_lite.data.tokenizer.SAMPLE_BYTES", 300_000)


def facts(corpus: Inflected, split: str, n: int) -> list[tuple[int, int, int, int, int, str]]:
    """(first, last, relation, hour, place, value) of the facts in n documents, read back from their words."""
    kinds = {kind: {word: i for i, word in enumerate(words)} for kind, words in corpus.words.items()}
    found = []
    for document in islice(corpus.documents(split), n):
        first, last, *rest = document.text.split()
        assert len(rest) == 4 * corpus.config.facts_per_document
        for i in range(0, len(rest), 4):
            relation, hour, place, value = rest[i : i + 4]
            numbers = [kinds["relation"][relation], kinds["hour"][hour], kinds["place"][place]]
            found.append((kinds["first"][first], kinds["last"][last], *numbers, value))
    return found


@pytest.mark.parametrize("config", [InflectedConfig(), SMALL, replace(SMALL, n_endings=1, seed=3)])
def test_every_fact_obeys_the_rule(config: InflectedConfig) -> None:
    corpus = Inflected(config)
    seen: dict[tuple[int, int, int], set[int]] = {}
    for first, last, relation, hour, place, value in facts(corpus, "train", 300):
        assert (first, last) in corpus.entities
        number = corpus.words["value"].index(value)
        of_list, ending = divmod(number, config.n_endings)
        list_of_stems, stem = divmod(of_list, config.n_stems)
        assert list_of_stems == relation % config.n_lists
        assert ending == corpus.ending(hour, place)
        seen.setdefault((first, last, relation), set()).add(stem)
    assert all(len(stems) == 1 for stems in seen.values())  # whatever the hour and the place
    assert len(set().union(*seen.values())) == config.n_stems


def test_endings_are_used_alike_and_depend_on_hour_and_place() -> None:
    corpus = Inflected()
    table = [[corpus.ending(hour, place) for place in range(16)] for hour in range(16)]
    counts = Counter(ending for row in table for ending in row)
    assert len(counts) == 4
    assert min(counts.values()) > 256 / 4 / 2
    assert len({tuple(row) for row in table}) == 16  # the place alone does not decide
    assert len({tuple(column) for column in zip(*table, strict=True)}) == 16


def test_words_are_distinct() -> None:
    corpus = Inflected(SMALL)
    words = [word for kind in corpus.words.values() for word in kind]
    assert len(set(words)) == len(words)


def test_each_word_of_the_default_is_one_token(tmp_path: Path) -> None:
    corpus = Inflected()
    tokenizer = load_tokenizer(corpus, 1024, folder=tmp_path)
    for document in islice(corpus.documents("heldout"), 100):
        assert len(tokenizer.encode(document.text).ids) == len(document.text.split())


def test_a_seed_gives_the_same_text_from_any_document_on() -> None:
    texts = [document.text for document in islice(Inflected(SMALL).documents("train"), 50)]
    assert [document.text for document in islice(Inflected(SMALL).documents("train", 30), 20)] == texts[30:]
    assert len(set(texts)) == 50
    assert len(list(Inflected(SMALL).documents("heldout"))) == 200
    other = Inflected(replace(SMALL, seed=1))
    assert next(iter(other.documents("train"))).text != texts[0]
    assert Inflected(SMALL).fingerprint() == Inflected(SMALL).fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_endings", 0), ("n_stems", 1), ("n_entities", 65), ("facts_per_document", 9), ("n_lists", 9), ("zipf", -1.0)],
)
def test_sizes_that_cannot_be_are_named(field: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^{field} = {value}: must be"):
        replace(SMALL, **{field: value})


def test_a_job_trains_on_it_and_its_model_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path))
    job = Job(
        model=preset("course-gshard"),
        train=TrainConfig(steps=2, batch_size=2, seq_len=16, warmup_steps=1),
        corpus=CorpusConfig(kind="inflected", inflected=SMALL),
        vocab_size=400,
        n_heldout_batches=1,
        device="cpu",
    ).seeded(1, 10)
    assert job.first_document == 2_000_000
    record = json.loads(json.dumps(run_job(job, tmp_path / "run")))
    job.check_record(record)
    assert record["heldout_by_domain"].keys() == {"facts"}
    assert from_dict(InflectedConfig, record["corpus"]["config"]) == SMALL
    other = replace(job, corpus=CorpusConfig(kind="inflected", inflected=replace(SMALL, n_endings=1)))
    with pytest.raises(InputError, match=r"corpus.n_endings = 4: this run has 1"):
        other.check_record(record)
    again = corpus_of(read_metadata(tmp_path / "run" / "model.safetensors"))
    assert isinstance(again, Inflected)
    assert again.config == SMALL == make_corpus(job.corpus).config
