"""A needle in a haystack, in tokens: filler with a few pairs of key and value in it, and at the end a question for one.

A row of S + 1 tokens is filler, in it 1 + n_distractors needles `MARK key value`, then `ASK key` and the value asked
for. Keys and values of a row are all different, so the answer stands nowhere but in its needle and at the end.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsmoe_lite.common.errors import require, require_number, require_whole
from dsmoe_lite.data.words import number

MARK, ASK, FIRST_KEY = 0, 1, 2
NEEDLE = 3  # tokens: MARK, key, value
QUESTION = 2  # tokens: ASK, key


@dataclass(frozen=True, kw_only=True)
class NeedleConfig:
    """Vocabulary and haystack. Token ids: MARK, ASK, keys, values, filler."""

    n_keys: int = 16
    n_values: int = 16  # a guess is right once in n_values, one among the values in sight once in 1 + n_distractors
    n_filler: int = 16
    n_distractors: int = 3  # needles with other keys, elsewhere in the haystack
    zipf: float = 1.0  # the filler token of rank r comes with weight r^-zipf, whatever stands before it

    def __post_init__(self) -> None:
        require_whole("n_distractors", self.n_distractors, 0)
        for name in ("n_keys", "n_values"):
            remedy = f"must be a whole number above n_distractors = {self.n_distractors}: those of a row are different"
            value = getattr(self, name)
            require(isinstance(value, int) and value > self.n_distractors, name, value, remedy)
        require_whole("n_filler", self.n_filler, 1)
        require_number("zipf", self.zipf, 0.0, 4.0)

    @property
    def first_value(self) -> int:
        """Id of the first value; keys end before it."""
        return FIRST_KEY + self.n_keys

    @property
    def first_filler(self) -> int:
        """Id of the first and most frequent filler token; values end before it."""
        return self.first_value + self.n_values

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return self.first_filler + self.n_filler

    def n_starts(self, seq_len: int) -> int:
        """Where a needle may start: at 0 to n_starts - 1. InputError for a length that cannot hold all needles."""
        least = NEEDLE * (self.n_distractors + 2) + QUESTION - 1  # cells of three tokens, one lost to where they begin
        require_whole("seq_len", seq_len, least)
        return seq_len - QUESTION - NEEDLE + 1


@dataclass(frozen=True)
class NeedleBatch:
    """Rows of tokens, what to take the loss of, and where the needle asked for starts."""

    tokens: Tensor  # (B, S + 1) int64, the answer last
    weights: Tensor  # (B, S), of the loss at each target: 1 at answers, 0 where nothing but frequencies can be told
    starts: Tensor  # (B,) int64


def needle_batch(config: NeedleConfig, batch_size: int, seq_len: int, *key: object) -> NeedleBatch:
    """Rows that depend on `key` alone; the needle asked for starts anywhere, every place equally likely."""
    require_whole("batch_size", batch_size, 1)
    rng = np.random.default_rng(number("needle", *key))
    return _make(config, rng.integers(config.n_starts(seq_len), size=batch_size), seq_len, rng)


def copy_batch(config: NeedleConfig, batch_size: int, seq_len: int, *key: object) -> NeedleBatch:
    """Practice: rows of a random string of seq_len / 8 to seq_len / 2 tokens that begins again and again.

    To go on with the string is what a question asks for too: find the token before, say what came after it. Here most
    tokens of a row teach it, in a question's row one does. `starts` is where the string begins again.
    """
    require_whole("batch_size", batch_size, 1)
    require_whole("seq_len", seq_len, 8)
    rng = np.random.default_rng(number("copy", *key))
    strings = rng.integers(config.vocab_size, size=(batch_size, seq_len + 1))
    periods = rng.integers(seq_len // 8, seq_len // 2 + 1, size=(batch_size, 1))
    places = np.arange(seq_len + 1)
    tokens = np.take_along_axis(strings, places % periods, axis=1)
    told = places[1:] > periods  # the string's first token, seen again, says how it goes on
    return NeedleBatch(_tensor(tokens), torch.from_numpy(told.astype(np.float32)), _tensor(periods[:, 0]))


def depth_bins(config: NeedleConfig, seq_len: int, bins: int, per_bin: int, *key: object) -> list[NeedleBatch]:
    """One batch of `per_bin` rows for each of `bins` equal parts of the haystack, first part first.

    The needle asked for starts in that part, every place in it equally likely; its distractors stand anywhere.
    """
    require_whole("per_bin", per_bin, 1)
    n_starts = config.n_starts(seq_len)
    require_whole("bins", bins, 1, n_starts)
    batches = []
    for part in range(bins):
        rng = np.random.default_rng(number("needle", *key, seq_len, part, bins))
        low, high = (-(-n_starts * edge // bins) for edge in (part, part + 1))
        batches.append(_make(config, rng.integers(low, high, size=per_bin), seq_len, rng))
    return batches


def _make(config: NeedleConfig, starts: np.ndarray, seq_len: int, rng: np.random.Generator) -> NeedleBatch:
    """All needles of a row stand in cells of three tokens, counted from the one asked for: none overlaps another."""
    B, n = len(starts), 1 + config.n_distractors
    shares = np.arange(1, config.n_filler + 1) ** -config.zipf
    tokens = config.first_filler + rng.choice(config.n_filler, (B, seq_len + 1), p=shares / shares.sum())
    keys = FIRST_KEY + _distinct(rng, B, n, config.n_keys)
    values = config.first_value + _distinct(rng, B, n, config.n_values)
    offsets = starts % NEEDLE
    cells = (seq_len - QUESTION - offsets) // NEEDLE  # (B,)
    order = rng.random((B, seq_len // NEEDLE))
    order[np.arange(order.shape[1]) >= cells[:, None]] = 2.0  # no cell there: last
    order[np.arange(B), starts // NEEDLE] = -1.0  # the needle asked for: first
    places = offsets[:, None] + NEEDLE * order.argsort(axis=1)[:, :n]  # (B, n)
    rows = np.arange(B)[:, None]
    tokens[rows, places], tokens[rows, places + 1], tokens[rows, places + 2] = MARK, keys, values
    tokens[:, -3], tokens[:, -2], tokens[:, -1] = ASK, keys[:, 0], values[:, 0]
    weights = torch.zeros(B, seq_len)
    weights[:, -1] = 1
    return NeedleBatch(_tensor(tokens), weights, _tensor(starts))


def _tensor(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers.astype(np.int64))


def _distinct(rng: np.random.Generator, rows: int, n: int, of: int) -> np.ndarray:
    """`n` different numbers below `of` in each row, (rows, n)."""
    return rng.random((rows, of)).argsort(axis=1)[:, :n]
