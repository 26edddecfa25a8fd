"""A small made-up world: who has what, in many wordings and two languages, and also sums, brackets and code.

It uses the standard library only, and only arithmetic that is the same on every platform: a seed gives the same bytes
everywhere.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from random import Random
from typing import Any

from dsmoe_lite.common.errors import require, require_choice, require_int, require_number, require_type
from dsmoe_lite.data.corpus import Document, require_split
from dsmoe_lite.data.words import make_words, stable_hash

DOMAINS = ("facts", "parallel", "arithmetic", "brackets", "code")
GROUPS = ("head", "tail", "control")

# Every wording starts with a function word, so that a name always follows a space. Values come after their entity.
STATEMENTS = (
    "The {relation} of {name} is {value}.",
    "As {relation} {name} has {value}.",
    "To {name} belongs the {relation} {value}.",
    "Here {name} has {facts}.",
    "For {name} we know {facts}.",
    "Look at {name}: {facts}.",
)
FACT = "{relation} {value}"  # an item of {facts}
MOST_FACTS = 4  # in one sentence
QUESTION = "Which {relation} does {name} have? {value}."
RELATIONS = ("craft", "home", "drink", "song", "tree", "stone", "pet", "tool")  # further ones are made up
WORD = re.compile(r"(?<![{\w])[A-Za-z]+(?![}\w])")  # a word of a wording, not a {placeholder}
NATIVE, FOREIGN = "bdlmnrstv", "fhjwyz"  # the consonants of made-up words in the two languages
BRACKETS = ("()", "[]", "{}", "<>")
HASHED_DOCUMENTS = 1000  # enough to distinguish two worlds


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """The size of the world and of its corpus. `shares` are shares of documents, in the order of DOMAINS."""

    seed: int = 0
    n_first: int = 32  # first names
    n_last: int = 32  # last names; an entity is a pair of names, so a fact depends on two tokens
    n_entities: int = 512
    n_control: int = 64  # pairs of the same names that no document ever mentions
    n_head: int = 128  # the most frequent entities, asked as group "head"
    n_tail: int = 128  # the rarest, asked as group "tail"
    n_relations: int = 8
    n_values: int = 32  # values of one relation; chance is 1 / n_values
    n_value_lists: int | None = None  # lists of values that relations use in turn; None: one list per relation
    zipf: float = 0.75  # documents are about the entity of rank r with weight r^-zipf
    facts_per_document: int = 8
    question_share: float = 0.15  # how often a fact that training may ask is asked instead of stated
    asked_share: float = 0.2  # share of facts that evaluation asks: training states them but never asks them
    n_documents: int = 40_000  # one epoch of the train split
    n_heldout: int = 4_000
    shares: tuple[float, ...] = (0.77, 0.08, 0.05, 0.05, 0.05)

    def __post_init__(self) -> None:
        require_type("shares", self.shares, tuple)
        for name in ("n_first", "n_last", "n_entities", "n_relations", "n_documents", "n_heldout"):
            require_int(name, getattr(self, name), 1)
        require_int("seed", self.seed, 0)
        require_int("n_values", self.n_values, 2)
        if self.n_value_lists is not None:
            require_int("n_value_lists", self.n_value_lists, 1, self.n_relations)
        pairs = self.n_first * self.n_last
        require_int("n_control", self.n_control, 0, pairs)
        fits = self.n_entities + self.n_control <= pairs
        require(fits, "n_entities", self.n_entities, f"with n_control must be at most n_first * n_last = {pairs}")
        require_int("n_head", self.n_head, 0, self.n_entities)
        require_int("n_tail", self.n_tail, 0, self.n_entities - self.n_head)
        require_int("facts_per_document", self.facts_per_document, 1, self.n_relations)
        require_number("zipf", self.zipf, 0.0, 4.0)
        require_number("question_share", self.question_share, 0.0, 1.0)
        require_number("asked_share", self.asked_share, 0.0, 1.0)
        require(
            len(self.shares) == len(DOMAINS),
            "shares",
            self.shares,
            f"must be {len(DOMAINS)} numbers: {', '.join(DOMAINS)}",
        )
        for domain, share in zip(DOMAINS, self.shares, strict=True):
            require_number(f"share of {domain}", share, 0.0, 1.0)
        require(abs(sum(self.shares) - 1) < 1e-9, "shares", self.shares, "must sum to 1")


@dataclass(frozen=True)
class Question:
    """A question about a fact. `prompt` ends before the space of `answer`, which is a space and a value word."""

    prompt: str
    answer: str
    group: str
    relation: str


@dataclass(frozen=True)
class Language:
    """The words for names, relations and values, and the wordings of statements and questions."""

    first: list[str]
    last: list[str]
    relations: list[str]
    values: list[list[str]]  # [relation][value]; two relations share all value words or none
    statements: list[str]
    question: str


class World:
    """The corpus `world`: domains facts, parallel (the same in a second language), arithmetic, brackets and code."""

    name = "world"
    domains = DOMAINS

    def __init__(self, config: WorldConfig | None = None) -> None:
        self.config = config = config or WorldConfig()
        native, foreign = _languages(config)
        self.language, self.foreign = native, foreign
        self.entities, self.controls = _choose_pairs(config)
        weights = [int(1e9 / rank**config.zipf) for rank in range(1, config.n_entities + 1)]
        self._up_to = list(accumulate(weights))
        self._share_up_to = [*list(accumulate(config.shares))[:-1], 1.0]
        self._functions = make_words(NATIVE, 6, config.seed, "functions")
        self._writers: tuple[Callable[[Random], str], ...] = (
            lambda rng: self._facts(rng, native),
            lambda rng: self._facts(rng, foreign),
            _sums,
            _brackets,
            lambda rng: _code(rng, self._functions),
        )

    def documents(self, split: str, start: int = 0) -> Iterator[Document]:
        """Yield the documents of a split, from number `start` on. Each has a separate seed, so skipping is free."""
        require_split(split)
        count = self.config.n_documents if split == "train" else self.config.n_heldout
        for index in range(start, count):
            rng = Random(stable_hash(self.config.seed, split, index))
            domain = bisect_right(self._share_up_to, rng.random())
            yield Document(self._writers[domain](rng), DOMAINS[domain])

    def fingerprint(self) -> dict[str, Any]:
        """The config, and the sha256 and length of the first documents."""
        texts = [document.text for document, _ in zip(self.documents("train"), range(HASHED_DOCUMENTS), strict=False)]
        config = asdict(self.config)
        content = json.dumps([config, texts])
        return {
            "name": self.name,
            "sha256": hashlib.sha256(content.encode()).hexdigest(),
            "hashed_documents": len(texts),
            "characters": sum(map(len, texts)),
            "config": config,
        }

    def questions(self, group: str, limit: int | None = None) -> list[Question]:
        """Questions, shuffled: held-out facts of the "head" or "tail" entities, or all facts of the "control" ones."""
        require_choice("group", group, GROUPS)
        c = self.config
        pairs = {
            "head": self.entities[: c.n_head],
            "tail": self.entities[c.n_entities - c.n_tail :],
            "control": self.controls,
        }
        facts = [(*pair, relation) for pair in pairs[group] for relation in range(c.n_relations)]
        asked = [fact for fact in facts if group == "control" or self.is_held_out(*fact)]
        asked.sort(key=lambda fact: stable_hash(c.seed, "order", *fact))
        return [self._question(group, *fact) for fact in asked[:limit]]

    def all_questions(self) -> list[Question]:
        """The questions of every group."""
        return [question for group in GROUPS for question in self.questions(group)]

    def value(self, first: int, last: int, relation: int) -> int:
        """The number of the value that the pair of names has for `relation`, 0 to n_values - 1."""
        return stable_hash(self.config.seed, "value", first, last, relation) % self.config.n_values

    def is_held_out(self, first: int, last: int, relation: int) -> bool:
        """Whether a fact is held out for evaluation: training states it, but never in the wording of the question."""
        return stable_hash(self.config.seed, "asked", first, last, relation) < self.config.asked_share * 2**64

    def _question(self, group: str, first: int, last: int, relation: int) -> Question:
        language = self.language
        sentence = self._sentence(language, language.question, first, last, [relation])
        answer = f" {language.values[relation][self.value(first, last, relation)]}"
        return Question(sentence[: sentence.rindex(answer)], answer, group, language.relations[relation])

    def _sentence(self, language: Language, wording: str, first: int, last: int, relations: list[int]) -> str:
        name = f"{language.first[first]} {language.last[last]}"
        facts = [
            {
                "relation": language.relations[relation],
                "value": language.values[relation][self.value(first, last, relation)],
            }
            for relation in relations
        ]
        return wording.format(name=name, facts=", ".join(FACT.format(**fact) for fact in facts), **facts[0])

    def _facts(self, rng: Random, language: Language) -> str:
        first, last = self.entities[bisect_right(self._up_to, int(rng.random() * self._up_to[-1]))]
        unused = list(range(self.config.n_relations))
        chosen = [unused.pop(int(rng.random() * len(unused))) for _ in range(self.config.facts_per_document)]
        sentences = []
        while chosen:
            asked = rng.random() < self.config.question_share and not self.is_held_out(first, last, chosen[0])
            wording = language.question if asked else _pick(rng, language.statements)
            n = 1 + int(rng.random() * MOST_FACTS) if "{facts}" in wording else 1
            sentences.append(self._sentence(language, wording, first, last, chosen[:n]))
            chosen = chosen[n:]
        return " ".join(sentences)


def _languages(config: WorldConfig) -> tuple[Language, Language]:
    english = sorted({word.lower() for wording in (*STATEMENTS, QUESTION) for word in WORD.findall(wording)})
    invented = make_words(NATIVE, max(0, config.n_relations - len(RELATIONS)), config.seed, "relations")
    relations = [*RELATIONS, *invented][: config.n_relations]
    dictionary = make_words(FOREIGN, len(english) + config.n_relations, config.seed, "dictionary")
    translations = dict(zip(english, dictionary, strict=False))
    native = _language(config, NATIVE, relations, [*STATEMENTS, QUESTION], [*english, *relations])
    wordings = [_translate(wording, translations) for wording in (*STATEMENTS, QUESTION)]
    foreign = _language(config, FOREIGN, dictionary[len(english) :], wordings, dictionary)
    return native, foreign


def _language(
    config: WorldConfig, consonants: str, relations: list[str], wordings: list[str], taken: list[str]
) -> Language:
    n, n_values, n_lists = config.n_first, config.n_values, config.n_value_lists or len(relations)
    names = make_words(consonants, n + config.n_last, config.seed, "names", taken=taken)
    words = make_words(consonants, n_lists * n_values, config.seed, "values", taken=[*taken, *names])
    lists = [words[start : start + n_values] for start in range(0, len(words), n_values)]
    values = [lists[relation % n_lists] for relation in range(len(relations))]
    capitalized = [name.capitalize() for name in names]
    return Language(
        first=capitalized[:n],
        last=capitalized[n:],
        relations=relations,
        values=values,
        statements=wordings[:-1],
        question=wordings[-1],
    )


def _translate(wording: str, translations: dict[str, str]) -> str:
    def word(match: re.Match[str]) -> str:
        foreign = translations[match[0].lower()]
        return foreign.capitalize() if match[0][0].isupper() else foreign

    return WORD.sub(word, wording)


def _choose_pairs(config: WorldConfig) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    pairs = [(first, last) for first in range(config.n_first) for last in range(config.n_last)]
    pairs.sort(key=lambda pair: stable_hash(config.seed, "pair", *pair))
    entities = pairs[: config.n_entities]
    firsts, lasts = {first for first, _ in entities}, {last for _, last in entities}
    unused = [pair for pair in pairs[config.n_entities :] if pair[0] in firsts and pair[1] in lasts]
    remedy = f"must be at most {len(unused)}, the unused pairs of names that entities have"
    require(len(unused) >= config.n_control, "n_control", config.n_control, remedy)
    return entities, unused[: config.n_control]


def _pick(rng: Random, items: Any) -> Any:
    return items[int(rng.random() * len(items))]


def _sums(rng: Random) -> str:
    return " ".join(_sum(rng) for _ in range(7))


def _sum(rng: Random) -> str:
    a, b = int(rng.random() * 100), int(rng.random() * 100)
    sign = _pick(rng, "+-*")
    if sign == "+":
        return f"{a}+{b}={a + b}."
    if sign == "-":
        return f"{max(a, b)}-{min(a, b)}={max(a, b) - min(a, b)}."
    return f"{a % 10}*{b % 10}={a % 10 * (b % 10)}."


def _brackets(rng: Random, length: int = 56) -> str:
    brackets: list[str] = []
    to_close: list[str] = []
    while len(brackets) + len(to_close) < length:
        if to_close and rng.random() < 0.45:
            brackets.append(to_close.pop())
        else:
            opening, closing = _pick(rng, BRACKETS)
            brackets.append(opening)
            to_close.append(closing)
    return " ".join(brackets + to_close[::-1])


def _code(rng: Random, functions: list[str]) -> str:
    name = _pick(rng, functions)
    lines = [f"def {name}(x, y):", f"    z = x {_pick(rng, '+-*')} y"]
    if rng.random() < 0.5:
        lines += [f"    if z > {_digit(rng)}:", f"        z = z {_pick(rng, '+-*')} {_digit(rng)}"]
    if rng.random() < 0.5:
        lines += [f"    for i in range({_digit(rng)}):", f"        z = z {_pick(rng, '+-*')} {_pick(rng, 'xyi')}"]
    lines += ["    return z", f"print({name}({_digit(rng)}, {_digit(rng)}))"]
    return "\n".join(lines)


def _digit(rng: Random) -> int:
    return 1 + int(rng.random() * 9)
