"""Tokens to experts and back, as pure functions: sort by expert, compute, add up weighted by the gates."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe_lite.layers.router import Routing


@dataclass(frozen=True)
class Dispatched:
    """Tokens in expert order. N counts the kept assignments, at most T * K."""

    x_sorted: Tensor  # (N, D), expert 0's tokens first
    ends: Tensor  # (E,) int32, cumulative counts: expert e owns rows ends[e-1] .. ends[e]
    token: Tensor  # (N,), which token each row came from
    slot: Tensor  # (N,), index into the flattened (T * K) gates


def dispatch(x: Tensor, routing: Routing) -> Dispatched:
    """Copy each token x (T, D) once for every expert that keeps it, sorted by expert, then by token."""
    E, K = routing.n_experts, routing.topk_ids.shape[1]
    ids = routing.topk_ids.masked_fill(~routing.kept, E).flatten()  # E: a bin for what is left out
    counts = torch.bincount(ids, minlength=E + 1)[:E]
    ends = counts.cumsum(0)
    slot = ids.argsort(stable=True)[: int(ends[-1])]
    token = slot // K
    return Dispatched(x[token], ends.to(torch.int32), token, slot)


def combine(y_sorted: Tensor, dispatched: Dispatched, gates: Tensor) -> Tensor:
    """Add up y_sorted (N, D), each row times its gate, into (T, D); a token nobody kept gets zero."""
    weighted = y_sorted * gates.flatten()[dispatched.slot].unsqueeze(1).to(y_sorted.dtype)
    y = y_sorted.new_zeros(gates.shape[0], y_sorted.shape[1])
    return y.index_add(0, dispatched.token, weighted)
