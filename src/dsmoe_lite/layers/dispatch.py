"""Dispatch and combine, as pure functions: sort the tokens by expert, and add up the experts' rows by token."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsmoe_lite.layers.router import Routing

USE_LOOP = "use backend='loop', without expert parallelism"  # the remedy of a backend without second derivatives


@dataclass(frozen=True)
class Dispatched:
    """Tokens in expert order: the rows of expert 0 first, the rows of one expert ordered by token.

    N counts the kept choices, at most T * K.
    """

    x: Tensor  # (T, D), every token once
    top_k: int  # K
    choice: Tensor  # (N,), the choice that each row is made for: number k of token t is t * K + k
    gates: Tensor  # (N,), the weight of each row in its token's sum
    ends: Tensor  # (E,) int32, cumulative counts: expert e owns rows ends[e-1] .. ends[e]

    @cached_property
    def token(self) -> Tensor:
        """The token of each row, (N,)."""
        return self.choice // self.top_k

    @cached_property
    def row_of_choice(self) -> Tensor:
        """The row of each choice, (T, K) int32; -1 if the choice was not kept."""
        rows = torch.arange(len(self.choice), dtype=torch.int32, device=self.choice.device)
        row_of_choice = rows.new_full((len(self.x) * self.top_k,), -1).index_copy(0, self.choice, rows)
        return row_of_choice.view(-1, self.top_k)

    @property
    def x_sorted(self) -> Tensor:
        """The token of each row itself, (N, D)."""
        return self.x.index_select(0, self.token)  # not x[token]: this gradient is one index_add

    @property
    def counts(self) -> list[int]:
        """The number of rows of each expert. Waits for a GPU."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()


class Implementation(NamedTuple):
    """One backend: how it computes the experts' rows, and how it adds them up."""

    run: Callable[..., Tensor]  # Dispatched, gate, up and down, and a limit if there is one: y_sorted (N, D)
    combine: Callable[[Tensor, Dispatched], Tensor]  # y_sorted (N, D): y (T, D)


def dispatch(x: Tensor, routing: Routing) -> Dispatched:
    """Give each token of x (T, D) one row for every expert that keeps it. Ids are not read if `kept` is False."""
    E, K = routing.n_experts, routing.topk_ids.shape[1]
    ids = routing.topk_ids.masked_fill(~routing.kept, E).flatten()  # E: a bin for dropped choices
    counts = torch.bincount(ids, minlength=E + 1)[:E]
    ends = counts.cumsum(0)
    choice = ids.argsort(stable=True)[: int(ends[-1])]  # N sets the sizes of all that follows: a GPU is waited for
    gates = routing.gates.flatten().index_select(0, choice).to(x.dtype)
    return Dispatched(x, K, choice, gates, ends.to(torch.int32))


def combine(y_sorted: Tensor, dispatched: Dispatched) -> Tensor:
    """Add up the rows y_sorted (N, D) of each token: y (T, D). A token that no expert kept gets zero."""
    return sum_by_token(y_sorted, dispatched.token, len(dispatched.x))


def sum_by_token(rows: Tensor, token: Tensor, n_tokens: int) -> Tensor:
    """Add up the rows (N, D) of each token, (T, D). token (N,): the token of each row."""
    return _SumByToken.apply(rows, token, n_tokens)


class _SumByToken(torch.autograd.Function):
    """index_add, whose own backward pass would keep the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, n_tokens: int) -> Tensor:
        ctx.save_for_backward(token)
        return rows.new_zeros(n_tokens, rows.shape[1]).index_add_(0, token, rows)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (token,) = ctx.saved_tensors
        return dy.index_select(0, token), None, None
