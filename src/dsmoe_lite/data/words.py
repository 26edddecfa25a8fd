"""Hashes, shuffles and pronounceable made-up words that depend on a key alone, on every platform."""

import hashlib
from collections.abc import Collection
from itertools import product

VOWELS = "aeiou"
LAST_VOWELS = "aiou"  # no final e, so that no made-up word is an English one such as "made" or "late"


def stable_hash(*key: object) -> int:
    """Return an integer in [0, 2^64) that depends on `key` alone."""
    text = "/".join(map(str, key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def stable_shuffle(items: Collection[str], *key: object) -> list[str]:
    """Return `items` in an order that depends on them and on `key` alone."""
    return sorted(items, key=lambda item: stable_hash(*key, item))


def make_words(consonants: str, n: int, *key: object, taken: Collection[str] = ()) -> list[str]:
    """Return `n` different words of two or more open syllables, none of them in `taken`.

    The words use as few different syllables as possible, so that a byte-pair tokenizer needs few merges to form them.
    """
    starts = _syllables(consonants, VOWELS, *key, "starts")
    ends = _syllables(consonants, LAST_VOWELS, *key, "ends")
    taken, length, width = set(taken), 2, 1
    while True:
        if len(starts[:width]) ** (length - 1) * len(ends[:width]) >= n:
            parts = [starts[:width]] * (length - 1) + [ends[:width]]
            words = {"".join(word) for word in product(*parts)} - taken
            if len(words) >= n:
                return stable_shuffle(words, *key, "words")[:n]
        if width < len(starts):
            width += 1
        else:
            length, width = length + 1, 2


def _syllables(consonants: str, vowels: str, *key: object) -> list[str]:
    """Return all syllables, each consonant once before any comes twice, so that the first ones differ in sound."""
    firsts, seconds = stable_shuffle(consonants, *key), stable_shuffle(vowels, *key)
    return [c + seconds[(turn + i) % len(seconds)] for turn in range(len(seconds)) for i, c in enumerate(firsts)]
