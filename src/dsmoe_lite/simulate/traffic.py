"""Which rows cross between devices and between nodes, counted from a routing alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require, require_whole
from dsmoe_lite.simulate.placement import Placement


@dataclass(frozen=True)
class Traffic:
    """Rows, and messages of them, that each of D devices sends and receives when tokens go to their experts, (D,) each.

    To another node a token goes once, to the device there that stands where its own does in its node; that device hands
    it on, as in DeepSeek-V3 (arXiv:2412.19437, Section 3.2.2). Results take the same ways back.
    """

    sent_across: Tensor  # to other nodes
    received_across: Tensor
    sent_inside: Tensor  # to other devices of the node, rows from elsewhere handed on among them
    received_inside: Tensor
    choices: Tensor  # what the experts of each device compute
    messages: Tensor  # other devices that it sends to, those that only hand on among them


def rows_between(topk_ids: Tensor, kept: Tensor, home: Tensor, placement: Placement) -> Tensor:
    """Rows sent from each device to each, (D, D), directly: a token goes once to a device that holds experts of it.

    topk_ids, kept (T, K) as in a Routing; home (T,): the device of each token. The diagonal crosses nothing. As many
    rows come back. Copies of an expert are taken in turn, by the number of the token.
    """
    D = len(placement.slots)
    token, device = _once(_devices(topk_ids, kept, home, placement), D)
    return (home[token] * D + device).bincount(minlength=D * D).view(D, D)


def count_traffic(topk_ids: Tensor, kept: Tensor, home: Tensor, placement: Placement, node: int) -> Traffic:
    """What crosses with `node` devices in each node; arguments otherwise as of `rows_between`."""
    D = len(placement.slots)
    require_whole("node", node, 1)
    require(D % node == 0, "node", node, f"must divide the number of devices, {D}")
    devices = _devices(topk_ids, kept, home, placement)
    token, to_node = _once(devices.div(node, rounding_mode="floor"), D // node)
    away = to_node != home[token] // node
    token, to_node = token[away], to_node[away]
    arrival = to_node * node + home[token] % node
    leaves = home[token]
    token, device = _once(devices, D)
    start = torch.where(device // node == home[token] // node, home[token], device // node * node + home[token] % node)
    moves = start != device
    start, device = start[moves], device[moves]
    return Traffic(
        leaves.bincount(minlength=D),
        arrival.bincount(minlength=D),
        start.bincount(minlength=D),
        device.bincount(minlength=D),
        devices[devices < D].bincount(minlength=D),
        _partners(leaves, arrival, D) + _partners(start, device, D),
    )


def _devices(topk_ids: Tensor, kept: Tensor, home: Tensor, placement: Placement) -> Tensor:
    """The device that serves each choice, (T, K), in ascending order; D where it was not kept."""
    D, (T, _) = len(placement.slots), topk_ids.shape
    require(tuple(home.shape) == (T,), "home", tuple(home.shape), f"must be the device of each of {T} tokens")
    inside = T == 0 or (int(home.min()) >= 0 and int(home.max()) < D)
    require(inside, "home", home.tolist()[:8], f"must be devices from 0 to {D - 1}")
    copies = placement.copies
    by_expert = placement.slots.flatten().argsort(stable=True)  # slots of expert 0, of expert 1, ...
    device = by_expert // placement.slots.shape[1]
    ids = topk_ids.clamp(min=0)  # -1 is never kept
    turn = torch.arange(T).unsqueeze(1) % copies[ids]
    return torch.where(kept, device[(copies.cumsum(0) - copies)[ids] + turn], D).sort(dim=1).values


def _once(places: Tensor, n_places: int) -> tuple[Tensor, Tensor]:
    """Each token with each of its places below n_places once: tokens (R,) and places (R,). Rows are sorted."""
    first = places.diff(dim=1, prepend=places.new_full((len(places), 1), -1)) != 0
    token, k = (first & (places < n_places)).nonzero(as_tuple=True)
    return token, places[token, k]


def _partners(start: Tensor, device: Tensor, n_devices: int) -> Tensor:
    """How many different devices each one's rows go to, (D,)."""
    return (start * n_devices + device).unique().div(n_devices, rounding_mode="floor").bincount(minlength=n_devices)
