"""Tokens to experts and back, as pure functions: sort by expert, compute, add up."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dsmoe_lite.layers.router import Routing


@dataclass(frozen=True)
class Dispatched:
    """Tokens in expert order: expert 0's first, each expert's by token. N counts the kept assignments, at most T*K."""

    x: Tensor  # (T, D), every token once
    top_k: int  # K
    choice: Tensor  # (N,), which of the T * K choices each row is: number k of token t is t * K + k
    gates: Tensor  # (N,), the weight of each row in its token's sum
    ends: Tensor  # (E,) int32, cumulative counts: expert e owns rows ends[e-1] .. ends[e]

    @cached_property
    def token(self) -> Tensor:
        """Which token each row is, (N,)."""
        return self.choice // self.top_k

    @property
    def place(self) -> Tensor:
        """Which row each choice is, (T, K) int32; -1 where it was not kept."""
        rows = torch.arange(len(self.choice), dtype=torch.int32, device=self.choice.device)
        place = rows.new_full((len(self.x) * self.top_k,), -1).index_copy(0, self.choice, rows)
        return place.view(-1, self.top_k)

    @property
    def x_sorted(self) -> Tensor:
        """The rows themselves, (N, D)."""
        return self.x.index_select(0, self.token)  # not x[token]: this gradient is one index_add

    @property
    def counts(self) -> list[int]:
        """Rows of each expert."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()


def dispatch(x: Tensor, routing: Routing) -> Dispatched:
    """Send each token of x (T, D) to every expert that keeps it; ids may be anything where `kept` is False."""
    E, K = routing.n_experts, routing.topk_ids.shape[1]
    ids = routing.topk_ids.masked_fill(~routing.kept, E).flatten()  # E: a bin for what is left out
    counts = torch.bincount(ids, minlength=E + 1)[:E]
    ends = counts.cumsum(0)
    choice = ids.argsort(stable=True)[: int(ends[-1])]
    return Dispatched(x, K, choice, routing.gates.flatten().index_select(0, choice), ends.to(torch.int32))


def combine(y_sorted: Tensor, sent: Dispatched) -> Tensor:
    """Add up the rows y_sorted (N, D) of each token into (T, D); a token nobody kept gets zero."""
    return y_sorted.new_zeros(sent.x.shape).index_add(0, sent.token, y_sorted)
