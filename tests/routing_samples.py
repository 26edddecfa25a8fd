"""Choices of experts for tests of routing metrics."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsmoe_lite.common.errors import InputError

EMPTY = torch.zeros(0, 2, dtype=torch.long)
NOBODY = torch.full((3, 2), -1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_choices(seed: int, T: int = 40, E: int = 6, K: int = 3, *, padded: bool = True, skew: float = 1.0) -> Tensor:
    """K different experts per token, expert e with weight (e + 1)**-skew; with `padded` some rows end in -1."""
    g = seeded(seed)
    weights = torch.arange(1, E + 1, dtype=torch.double) ** -skew
    ids = torch.multinomial(weights.expand(T, E), K, generator=g)
    if padded:
        sizes = torch.randint(K + 1, (T, 1), generator=g)
        ids = ids.where(torch.arange(K) < sizes, -1)
    return ids


def in_turn(T: int, E: int, K: int) -> Tensor:
    """K neighbouring experts per token, every expert equally often if E divides T."""
    return torch.stack([(torch.arange(T) + k) % E for k in range(K)], dim=1)


def rows(topk_ids: Tensor) -> list[list[int]]:
    """The experts of each token."""
    return [[e for e in row if e >= 0] for row in topk_ids.tolist()]


def line_of(call: Callable[[], object]) -> str:
    """The one line of the InputError that `call` raises."""
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)
