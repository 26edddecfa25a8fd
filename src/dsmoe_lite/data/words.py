"""Pronounceable made-up words, the same for the same seed everywhere."""

import hashlib
from collections.abc import Collection, Sequence
from itertools import product

VOWELS = "aeiou"
LAST_VOWELS = "aiou"  # no final e: made-up words stay clear of English ones such as "made" and "late"


def number(*key: object) -> int:
    """A number in [0, 2^64) that depends on `key` alone."""
    text = "/".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def shuffled(items: Collection[str], *key: object) -> list[str]:
    """`items` in an order that depends on them and on `key` alone."""
    return sorted(items, key=lambda item: number(*key, item))


class WordMaker:
    """Makes words of open syllables, never the same twice.

    Few syllables are used for few words: a byte-pair tokenizer then needs few merges on its way to whole words.
    """

    def __init__(self, consonants: str, n_words: int, seed: int, taken: Collection[str] = ()) -> None:
        starts = shuffled([c + v for c, v in product(consonants, VOWELS)], seed, "starts", consonants)
        ends = shuffled([c + v for c, v in product(consonants, LAST_VOWELS)], seed, "ends", consonants)
        parts: Sequence[Sequence[str]] = [starts, ends]
        while _combinations(parts) < n_words + len(taken):
            parts = [starts, *parts]
        width = 1
        while _combinations([part[:width] for part in parts]) < 1.5 * n_words + len(taken) and width < len(starts):
            width += 1
        words = {"".join(word) for word in product(*(part[:width] for part in parts))}
        self._left = shuffled(words - set(taken), seed, "words")

    def take(self, n: int, *, capital: bool = False) -> list[str]:
        """The next `n` words."""
        words, self._left = self._left[:n], self._left[n:]
        return [word.capitalize() for word in words] if capital else words


def _combinations(parts: Sequence[Sequence[str]]) -> int:
    count = 1
    for part in parts:
        count *= len(part)
    return count
