"""All-to-all dispatch of rows to the processes that hold their experts, and combine on the way back; with gradients.

A token that chose several experts of one process is sent there once, and one row comes back: the sum over those
experts, gates included. These are the rows that the papers count. Each message also carries how many rows and choices
it has, which row each choice reads, and the gates.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd, wait_tensor

from dsmoe_lite.layers.dispatch import Dispatched


class SendPlan(NamedTuple):
    """What goes to each of P processes, process 0's part first."""

    token: Tensor  # (R,) the token of each row, ordered by token within a process
    rows: Tensor  # (P,) rows per process
    row: Tensor  # (N,) which of its process's rows each choice reads, choices ordered by expert
    counts: Tensor  # (P, E / P) choices of each expert


@dataclass(frozen=True)
class ExchangePlan:
    """What `combine` needs to return the rows of one exchange."""

    group: ProcessGroup
    token: Tensor  # (R,) the token of each row that was sent
    sent: list[int]  # rows to each process
    received: list[int]  # rows from each process


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


def dispatch(dispatched: Dispatched, group: ProcessGroup) -> tuple[Dispatched, ExchangePlan]:
    """Send rows to the processes of their experts; return the rows received here, by local expert, and the plan.

    Within one expert, rows are ordered by process and then by token. Collective over `group`.
    """
    P = group.size()
    plan = plan_send(dispatched, P)
    sizes = torch.cat([plan.rows.unsqueeze(1), plan.counts], dim=1)  # (P, 1 + E / P)
    incoming = wait_tensor(all_to_all_single(sizes, None, None, group)).view_as(sizes)
    rows, counts = incoming[:, 0], incoming[:, 1:]
    rows_out, choices_out = plan.rows.tolist(), plan.counts.sum(dim=1).tolist()
    rows_in, choices_in = rows.tolist(), counts.sum(dim=1).tolist()

    x = all_to_all_single_autograd(dispatched.x.index_select(0, plan.token), rows_in, rows_out, group)
    gates = all_to_all_single_autograd(dispatched.gates, choices_in, choices_out, group)
    row = wait_tensor(all_to_all_single(plan.row, choices_in, choices_out, group))

    N, E_local = len(row), counts.shape[1]
    row = row + (rows.cumsum(0) - rows).repeat_interleave(counts.sum(dim=1), output_size=N)
    expert = torch.arange(E_local, device=row.device).repeat(P).repeat_interleave(counts.flatten(), output_size=N)
    order = expert.argsort(stable=True)
    choice = (row * E_local + expert).index_select(0, order)  # a row chooses each local expert at most once
    ends = counts.sum(dim=0).cumsum(0).to(torch.int32)
    received = Dispatched(x, E_local, choice, gates.index_select(0, order), ends)
    return received, ExchangePlan(group, plan.token, rows_out, rows_in)


def combine(y: Tensor, plan: ExchangePlan, n_tokens: int) -> Tensor:
    """Return the received rows' sums y (R', D) to their senders and add them up by token: (T, D). Collective."""
    returned = all_to_all_single_autograd(y, plan.sent, plan.received, plan.group)
    return returned.new_zeros(n_tokens, y.shape[1]).index_add(0, plan.token, returned)
