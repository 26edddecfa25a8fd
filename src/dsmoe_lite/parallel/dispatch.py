"""Rows to the processes that hold their experts and back: all-to-all with uneven parts, and its gradient.

A token that chose several experts of one process is sent there once, and one row comes back: the sum over those
experts, gates included. These rows are what the papers count. Beside them go how many rows and choices there are, which
row each choice reads, and the gates.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd, wait_tensor

from dsmoe_lite.layers.dispatch import Dispatched


class Leaving(NamedTuple):
    """What of `sent` goes to each of P processes, process 0's part first."""

    token: Tensor  # (R,) the token of each row, by token within a process
    rows: Tensor  # (P,) how many
    row: Tensor  # (N,) which of its process's rows each choice reads, choices by expert
    counts: Tensor  # (P, E / P) choices of each expert


@dataclass(frozen=True)
class Way:
    """The way back of one exchange."""

    group: ProcessGroup
    token: Tensor  # (R,) the token of each row that went out
    sent: list[int]  # rows to each process
    received: list[int]  # rows from each process


def leaving(sent: Dispatched, n_processes: int) -> Leaving:
    """Find the rows that each process must get: every token once, if it chose an expert there."""
    P, T, E = n_processes, len(sent.x), len(sent.ends)
    counts = sent.ends.diff(prepend=sent.ends.new_zeros(1)).view(P, E // P)
    process = torch.arange(P, device=counts.device).repeat_interleave(counts.sum(dim=1), output_size=len(sent.choice))
    wanted = torch.zeros(P, T, dtype=torch.bool, device=counts.device)
    wanted[process, sent.token] = True
    row = (wanted.cumsum(dim=1) - 1)[process, sent.token]
    return Leaving(wanted.nonzero()[:, 1], wanted.sum(dim=1), row, counts)


def send(sent: Dispatched, group: ProcessGroup) -> tuple[Dispatched, Way]:
    """Send the rows to their experts' processes; return those that arrived here, by local expert, and the way back.

    Of one expert's rows those of process 0 come first, each process's by token. Every process of `group` must call.
    """
    P = group.size()
    out = leaving(sent, P)
    numbers = torch.cat([out.rows.unsqueeze(1), out.counts], dim=1)  # (P, 1 + E / P)
    arriving = wait_tensor(all_to_all_single(numbers, None, None, group)).view_as(numbers)
    rows, counts = arriving[:, 0], arriving[:, 1:]
    rows_out, choices_out = out.rows.tolist(), out.counts.sum(dim=1).tolist()
    rows_in, choices_in = rows.tolist(), counts.sum(dim=1).tolist()

    x = all_to_all_single_autograd(sent.x.index_select(0, out.token), rows_in, rows_out, group)
    gates = all_to_all_single_autograd(sent.gates, choices_in, choices_out, group)
    row = wait_tensor(all_to_all_single(out.row, choices_in, choices_out, group))

    N, L = len(row), counts.shape[1]
    row = row + (rows.cumsum(0) - rows).repeat_interleave(counts.sum(dim=1), output_size=N)
    expert = torch.arange(L, device=row.device).repeat(P).repeat_interleave(counts.flatten(), output_size=N)
    order = expert.argsort(stable=True)
    choice = (row * L + expert).index_select(0, order)  # a row has at most one choice of each local expert
    ends = counts.sum(dim=0).cumsum(0).to(torch.int32)
    here = Dispatched(x, L, choice, gates.index_select(0, order), ends)
    return here, Way(group, out.token, rows_out, rows_in)


def bring_back(y: Tensor, way: Way, n_tokens: int) -> Tensor:
    """Return the sums of the rows that arrived, (R', D), to where they came from, and add them up by token: (T, D)."""
    returned = all_to_all_single_autograd(y, way.sent, way.received, way.group)
    return returned.new_zeros(n_tokens, y.shape[1]).index_add(0, way.token, returned)
