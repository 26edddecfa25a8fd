"""A made-up world with common knowledge: each word of a fact also obeys a rule that all facts share.

Predicting a value needs two things at once: who has what, which differs from person to person, and the ending that the
hour and the place demand, which is the same for all.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from random import Random
from typing import Any

from dsmoe_lite.common.errors import require, require_int, require_number
from dsmoe_lite.data.corpus import Document, require_split
from dsmoe_lite.data.words import make_words, stable_hash

CONSONANTS = "bdfgklmnprstvz"
HASHED_DOCUMENTS = 1000  # enough to distinguish two worlds


@dataclass(frozen=True, kw_only=True)
class InflectedConfig:
    """The size of the world. n_endings = 1 has no rule, and is the control: hour and place then mean nothing."""

    seed: int = 0
    n_first: int = 32  # first names
    n_last: int = 32  # last names
    n_entities: int = 512  # pairs of names
    n_relations: int = 8
    n_stems: int = 32  # values of a relation, before their ending
    n_lists: int = 2  # lists of stems that relations use in turn
    n_hours: int = 16
    n_places: int = 16
    n_endings: int = 4  # of each stem; hour and place decide which
    zipf: float = 0.75  # documents are about the entity of rank r with weight r^-zipf
    facts_per_document: int = 6
    n_documents: int = 20_000_000
    n_heldout: int = 4_000

    def __post_init__(self) -> None:
        for name in ("n_first", "n_last", "n_entities", "n_relations", "n_hours", "n_places", "n_endings"):
            require_int(name, getattr(self, name), 1)
        for name in ("n_documents", "n_heldout"):
            require_int(name, getattr(self, name), 1)
        require_int("seed", self.seed, 0)
        require_int("n_stems", self.n_stems, 2)
        require_int("n_lists", self.n_lists, 1, self.n_relations)
        pairs = self.n_first * self.n_last
        require(self.n_entities <= pairs, "n_entities", self.n_entities, f"must be at most n_first * n_last = {pairs}")
        require_int("facts_per_document", self.facts_per_document, 1, self.n_relations)
        require_number("zipf", self.zipf, 0.0, 4.0)


class Inflected:
    """The corpus `inflected`: documents about one person each, with facts `relation hour place value`."""

    name = "inflected"
    domains = ("facts",)

    def __init__(self, config: InflectedConfig | None = None) -> None:
        self.config = c = config or InflectedConfig()
        counts = {"first": c.n_first, "last": c.n_last, "relation": c.n_relations, "hour": c.n_hours}
        counts |= {"place": c.n_places, "value": c.n_lists * c.n_stems * c.n_endings}
        self.words: dict[str, list[str]] = {}
        taken: list[str] = []
        for kind, n in counts.items():
            self.words[kind] = make_words(CONSONANTS, n, c.seed, kind, taken=taken)
            taken += self.words[kind]
        pairs = [(first, last) for first in range(c.n_first) for last in range(c.n_last)]
        pairs.sort(key=lambda pair: stable_hash(c.seed, "pair", *pair))
        self.entities = pairs[: c.n_entities]
        self._up_to = list(accumulate(int(1e9 / rank**c.zipf) for rank in range(1, c.n_entities + 1)))

    def stem(self, first: int, last: int, relation: int) -> int:
        """The number of the stem that a pair of names has for a relation, 0 to n_stems - 1."""
        return stable_hash(self.config.seed, "stem", first, last, relation) % self.config.n_stems

    def ending(self, hour: int, place: int) -> int:
        """The number of the ending, 0 to n_endings - 1: the rule that all facts share."""
        return stable_hash(self.config.seed, "ending", hour, place) % self.config.n_endings

    def value(self, relation: int, stem: int, ending: int) -> str:
        """The word of a stem of this relation with this ending; nothing of its letters shows either."""
        c = self.config
        return self.words["value"][((relation % c.n_lists) * c.n_stems + stem) * c.n_endings + ending]

    def documents(self, split: str, start: int = 0) -> Iterator[Document]:
        """Yield the documents of a split, from number `start` on. Each has a separate seed, so skipping is free."""
        require_split(split)
        count = self.config.n_documents if split == "train" else self.config.n_heldout
        for index in range(start, count):
            yield Document(self._write(Random(stable_hash(self.config.seed, split, index))), "facts")

    def fingerprint(self) -> dict[str, Any]:
        """The config, and the sha256 and length of the first documents."""
        texts = [document.text for document, _ in zip(self.documents("train"), range(HASHED_DOCUMENTS), strict=False)]
        config = asdict(self.config)
        return {
            "name": self.name,
            "sha256": hashlib.sha256(json.dumps([config, texts]).encode()).hexdigest(),
            "hashed_documents": len(texts),
            "characters": sum(map(len, texts)),
            "config": config,
        }

    def _write(self, rng: Random) -> str:
        c, words = self.config, self.words
        first, last = self.entities[bisect_right(self._up_to, int(rng.random() * self._up_to[-1]))]
        unused = list(range(c.n_relations))
        facts = []
        for _ in range(c.facts_per_document):
            relation = unused.pop(int(rng.random() * len(unused)))
            hour, place = int(rng.random() * c.n_hours), int(rng.random() * c.n_places)
            value = self.value(relation, self.stem(first, last, relation), self.ending(hour, place))
            facts.append(f"{words['relation'][relation]} {words['hour'][hour]} {words['place'][place]} {value}")
        return f"{words['first'][first]} {words['last'][last]} {' '.join(facts)}"
