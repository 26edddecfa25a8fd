"""All-to-all dispatch of rows to the processes that own their experts, and combine on the way back; with gradients.

A token that chose several experts of one process is sent there once, and one row comes back: the sum over those
experts, gates included. These are the rows that the papers count. Each process also sends the numbers of its rows and
choices, the row that each choice reads, and the gates.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor

from dsmoe_lite.common.autograd import first_order
from dsmoe_lite.layers.dispatch import USE_LOOP, Dispatched, sum_by_token


class SendPlan(NamedTuple):
    """What goes to each of P processes, process 0's part first. R counts the rows, N the choices."""

    token: Tensor  # (R,) the token of each row, ordered by token within a process
    rows: Tensor  # (P,) rows per process
    row: Tensor  # (N,) which of its process's rows each choice reads, choices ordered by expert
    counts: Tensor  # (P, E / P) choices of each expert


@dataclass(frozen=True)
class ReturnPlan:
    """What `all_to_all_combine` needs to return the rows of one dispatch."""

    group: ProcessGroup
    n_tokens: int  # T of this process
    token: Tensor  # (R,) the token of each row that was sent
    rows_sent: list[int]  # to each process
    rows_received: list[int]  # from each process


@dataclass(frozen=True)
class Received(Dispatched):
    """The rows that this process received for its experts. x (R', D) are the rows of all processes, process 0's first.

    Within one expert, rows are ordered by process and then by token. "Token" is here a row of x, and top_k is E / P.
    """

    plan: ReturnPlan


def plan_send(dispatched: Dispatched, n_processes: int) -> SendPlan:
    """Find the rows that each process must receive: every token once, if it chose an expert there."""
    P, T, E = n_processes, len(dispatched.x), len(dispatched.ends)
    ends, choice = dispatched.ends, dispatched.choice
    counts = ends.diff(prepend=ends.new_zeros(1)).view(P, E // P)
    process = torch.arange(P, device=counts.device).repeat_interleave(counts.sum(dim=1), output_size=len(choice))
    needed = torch.zeros(P, T, dtype=torch.bool, device=counts.device)
    needed[process, dispatched.token] = True
    row = (needed.cumsum(dim=1) - 1)[process, dispatched.token]
    return SendPlan(needed.nonzero()[:, 1], needed.sum(dim=1), row, counts)


def all_to_all_dispatch(dispatched: Dispatched, group: ProcessGroup) -> Received:
    """Send rows to the processes of their experts; return the rows received here. Collective over `group`."""
    P = group.size()
    send = plan_send(dispatched, P)
    sizes = torch.cat([send.rows.unsqueeze(1), send.counts], dim=1)  # (P, 1 + E / P)
    incoming = _exchange(sizes, None, None, group).view_as(sizes)
    rows, counts = incoming[:, 0], incoming[:, 1:]
    rows_sent, choices_sent = send.rows.tolist(), send.counts.sum(dim=1).tolist()
    rows_received, choices_received = rows.tolist(), counts.sum(dim=1).tolist()

    x = _Exchange.apply(dispatched.x.index_select(0, send.token), rows_received, rows_sent, group)
    gates = _Exchange.apply(dispatched.gates, choices_received, choices_sent, group)
    row = _exchange(send.row, choices_received, choices_sent, group)

    N, E_local = len(row), counts.shape[1]
    row = row + (rows.cumsum(0) - rows).repeat_interleave(counts.sum(dim=1), output_size=N)
    expert = torch.arange(E_local, device=row.device).repeat(P).repeat_interleave(counts.flatten(), output_size=N)
    order = expert.argsort(stable=True)
    choice = (row * E_local + expert).index_select(0, order)  # a row chooses each local expert at most once
    ends = counts.sum(dim=0).cumsum(0).to(torch.int32)
    plan = ReturnPlan(group, len(dispatched.x), send.token, rows_sent, rows_received)
    return Received(x, E_local, choice, gates.index_select(0, order), ends, plan)


def all_to_all_combine(y: Tensor, plan: ReturnPlan) -> Tensor:
    """Return the sums y (R', D) of the received rows to their senders and add them up by token: (T, D). Collective."""
    returned = _Exchange.apply(y, plan.rows_sent, plan.rows_received, plan.group)
    return sum_by_token(returned, plan.token, plan.n_tokens)


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; the gradients of the rows return to the processes that sent them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _exchange(rows, received, sent, group)

    @staticmethod
    @first_order(USE_LOOP)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(dy, ctx.sent, ctx.received, ctx.group), None, None, None


def _exchange(rows: Tensor, received: list[int] | None, sent: list[int] | None, group: ProcessGroup) -> Tensor:
    """Send sent[p] rows to process p and return its received[p] rows; None: equal parts.

    The rows have arrived: a kernel that takes a pointer could not wait for torch's AsyncCollectiveTensor.
    """
    return wait_tensor(all_to_all_single(rows.contiguous(), received, sent, group))
