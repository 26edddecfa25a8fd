"""A needle in a haystack, in tokens: filler that hides a few pairs of key and value, and a question for one of them.

A row of S + 1 tokens consists of filler with 1 + n_distractors needles `MARK key value` in it, then `ASK key`, then the
value asked for. All keys of a row differ, and so do all values: the answer is only in its needle and at the end.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsmoe_lite.common.errors import require, require_int, require_number
from dsmoe_lite.data.words import stable_hash

MARK, ASK, FIRST_KEY = 0, 1, 2
NEEDLE = 3  # tokens: MARK, key, value
QUESTION = 2  # tokens: ASK, key


@dataclass(frozen=True, kw_only=True)
class NeedleConfig:
    """Vocabulary and haystack. The token ids are, in this order: MARK, ASK, keys, values, filler."""

    n_keys: int = 16
    n_values: int = 16  # chance is 1 / n_values, or 1 / (1 + n_distractors) among the values of the row
    n_filler: int = 16
    n_distractors: int = 3  # needles with other keys
    zipf: float = 1.0  # the filler token of rank r has weight r^-zipf, independent of the tokens before it

    def __post_init__(self) -> None:
        require_int("n_distractors", self.n_distractors, 0)
        for name in ("n_keys", "n_values"):
            remedy = f"must be a whole number above n_distractors = {self.n_distractors}: all in a row differ"
            value = getattr(self, name)
            require(isinstance(value, int) and value > self.n_distractors, name, value, remedy)
        require_int("n_filler", self.n_filler, 1)
        require_number("zipf", self.zipf, 0.0, 4.0)

    @property
    def first_value(self) -> int:
        """Id of the first value, behind the keys."""
        return FIRST_KEY + self.n_keys

    @property
    def first_filler(self) -> int:
        """Id of the first, most frequent filler token, behind the values."""
        return self.first_value + self.n_values

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return self.first_filler + self.n_filler

    def n_starts(self, seq_len: int) -> int:
        """How many positions a needle may start at: 0 to n_starts - 1. Raises InputError if seq_len is too short."""
        least = NEEDLE * (self.n_distractors + 2) + QUESTION - 1  # cells of three tokens; the offset may cost one cell
        require_int("seq_len", seq_len, least)
        return seq_len - QUESTION - NEEDLE + 1


@dataclass(frozen=True)
class NeedleBatch:
    """Rows of tokens, the weight of the loss at each target, and where the needle asked for starts."""

    tokens: Tensor  # (B, S + 1) int64; the last one is the answer
    weights: Tensor  # (B, S), 1 at targets that the row determines, 0 at others
    starts: Tensor  # (B,) int64


def needle_batch(config: NeedleConfig, batch_size: int, seq_len: int, *key: object) -> NeedleBatch:
    """Return rows that depend on `key` alone. The needle asked for starts at a uniformly random position."""
    require_int("batch_size", batch_size, 1)
    rng = np.random.default_rng(stable_hash("needle", *key))
    return _make(config, rng.integers(config.n_starts(seq_len), size=batch_size), seq_len, rng)


def copy_batch(config: NeedleConfig, batch_size: int, seq_len: int, *key: object) -> NeedleBatch:
    """Return rows that repeat a random string of seq_len / 8 to seq_len / 2 tokens, as practice for needles.

    To continue the string, a model must find the current token earlier in the row and copy the token after it, as for a
    needle. Most tokens of these rows teach this; in a row with a question, only one does. `starts` is where the string
    begins again.
    """
    require_int("batch_size", batch_size, 1)
    require_int("seq_len", seq_len, 8)
    rng = np.random.default_rng(stable_hash("copy", *key))
    strings = rng.integers(config.vocab_size, size=(batch_size, seq_len + 1))
    periods = rng.integers(seq_len // 8, seq_len // 2 + 1, size=(batch_size, 1))
    positions = np.arange(seq_len + 1)
    tokens = np.take_along_axis(strings, positions % periods, axis=1)
    determined = positions[1:] > periods  # from the second token of the repetition on
    return NeedleBatch(_tensor(tokens), torch.from_numpy(determined.astype(np.float32)), _tensor(periods[:, 0]))


def depth_bins(config: NeedleConfig, seq_len: int, bins: int, per_bin: int, *key: object) -> list[NeedleBatch]:
    """Return one batch of `per_bin` rows for each of `bins` equal parts of the haystack, first part first.

    The needle asked for starts at a uniformly random position in that part. Its distractors may be anywhere.
    """
    require_int("per_bin", per_bin, 1)
    n_starts = config.n_starts(seq_len)
    require_int("bins", bins, 1, n_starts)
    batches = []
    for part in range(bins):
        rng = np.random.default_rng(stable_hash("needle", *key, seq_len, part, bins))
        low, high = (-(-n_starts * edge // bins) for edge in (part, part + 1))
        batches.append(_make(config, rng.integers(low, high, size=per_bin), seq_len, rng))
    return batches


def _make(config: NeedleConfig, starts: np.ndarray, seq_len: int, rng: np.random.Generator) -> NeedleBatch:
    """Make rows whose needles are in cells of three tokens, counted from the needle asked for: none overlap."""
    B, n = len(starts), 1 + config.n_distractors
    shares = np.arange(1, config.n_filler + 1) ** -config.zipf
    tokens = config.first_filler + rng.choice(config.n_filler, (B, seq_len + 1), p=shares / shares.sum())
    keys = FIRST_KEY + _distinct(rng, B, n, config.n_keys)
    values = config.first_value + _distinct(rng, B, n, config.n_values)
    offsets = starts % NEEDLE
    cells = (seq_len - QUESTION - offsets) // NEEDLE  # (B,)
    order = rng.random((B, seq_len // NEEDLE))
    order[np.arange(order.shape[1]) >= cells[:, None]] = 2.0  # cells that do not exist sort last
    order[np.arange(B), starts // NEEDLE] = -1.0  # the needle asked for sorts first
    marks = offsets[:, None] + NEEDLE * order.argsort(axis=1)[:, :n]  # (B, n)
    rows = np.arange(B)[:, None]
    tokens[rows, marks], tokens[rows, marks + 1], tokens[rows, marks + 2] = MARK, keys, values
    tokens[:, -3], tokens[:, -2], tokens[:, -1] = ASK, keys[:, 0], values[:, 0]
    weights = torch.zeros(B, seq_len)
    weights[:, -1] = 1
    return NeedleBatch(_tensor(tokens), weights, _tensor(starts))


def _tensor(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers.astype(np.int64))


def _distinct(rng: np.random.Generator, rows: int, n: int, of: int) -> np.ndarray:
    """Return `n` different numbers below `of` in each row: (rows, n)."""
    return rng.random((rows, of)).argsort(axis=1)[:, :n]
