"""Pronounceable made-up words, the same for the same seed everywhere."""

import hashlib
from collections.abc import Collection
from itertools import product

VOWELS = "aeiou"
LAST_VOWELS = "aiou"  # no final e: made-up words stay clear of English ones such as "made" and "late"


def number(*key: object) -> int:
    """A number in [0, 2^64) that depends on `key` alone."""
    text = "/".join(map(str, key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def shuffled(items: Collection[str], *key: object) -> list[str]:
    """`items` in an order that depends on them and on `key` alone."""
    return sorted(items, key=lambda item: number(*key, item))


def make_words(consonants: str, n: int, *key: object, taken: Collection[str] = ()) -> list[str]:
    """`n` different words of two or more open syllables, none of them in `taken`.

    As few syllables as will do are used: a byte-pair tokenizer then needs few merges on its way to whole words.
    """
    starts = _syllables(consonants, VOWELS, *key, "starts")
    ends = _syllables(consonants, LAST_VOWELS, *key, "ends")
    taken, length, width = set(taken), 2, 1
    while True:
        if len(starts[:width]) ** (length - 1) * len(ends[:width]) >= n:
            parts = [starts[:width]] * (length - 1) + [ends[:width]]
            words = {"".join(word) for word in product(*parts)} - taken
            if len(words) >= n:
                return shuffled(words, *key, "words")[:n]
        if width < len(starts):
            width += 1
        else:
            length, width = length + 1, 2


def _syllables(consonants: str, vowels: str, *key: object) -> list[str]:
    """All syllables, each consonant once before any comes twice: few syllables then still sound unlike each other."""
    first, then = shuffled(consonants, *key), shuffled(vowels, *key)
    return [c + then[(turn + i) % len(then)] for turn in range(len(then)) for i, c in enumerate(first)]
