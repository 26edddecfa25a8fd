"""Traffic of expert parallelism: the rows that cross between devices and between nodes, counted from a routing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require, require_int
from dsmoe_lite.simulate.placement import Placement


@dataclass(frozen=True)
class Traffic:
    """The rows and messages of dispatch on G devices: (G,) each.

    A token goes to another node once: to the device at the same position as its own device has in its node. That device
    forwards it within the node, as in DeepSeek-V3 (arXiv:2412.19437, Section 3.2.2). Combine returns the same rows.
    """

    sent_inter_node: Tensor  # rows to other nodes
    received_inter_node: Tensor
    sent_intra_node: Tensor  # rows to other devices of the node, including forwarded ones
    received_intra_node: Tensor
    choices: Tensor  # (token, expert) pairs that the device's experts compute
    messages: Tensor  # devices that it sends to, including those to which it only forwards


def rows_between(topk_ids: Tensor, kept: Tensor, home: Tensor, placement: Placement) -> Tensor:
    """Rows sent directly from each device to each other, (G, G): a token goes once to a device that has its experts.

    topk_ids, kept (T, K): as in a Routing. home (T,): the device of each token. Rows on the diagonal stay where they
    are. As many rows come back. The copies of an expert take turns by the number of the token.
    """
    G = len(placement.slots)
    token, device = _distinct(_devices(topk_ids, kept, home, placement), G)
    return (home[token] * G + device).bincount(minlength=G * G).view(G, G)


def count_traffic(topk_ids: Tensor, kept: Tensor, home: Tensor, placement: Placement, node: int) -> Traffic:
    """Count the traffic with `node` devices per node; other arguments as in `rows_between`."""
    G = len(placement.slots)
    require_int("node", node, 1)
    require(G % node == 0, "node", node, f"must divide the number of devices, {G}")
    devices = _devices(topk_ids, kept, home, placement)

    token, to_node = _distinct(devices.div(node, rounding_mode="floor"), G // node)
    leaves = to_node != home[token] // node
    token, to_node = token[leaves], to_node[leaves]
    sender, receiver = home[token], to_node * node + home[token] % node

    token, device = _distinct(devices, G)
    same_node = device // node == home[token] // node
    forwarder = torch.where(same_node, home[token], device // node * node + home[token] % node)
    moves = forwarder != device
    forwarder, device = forwarder[moves], device[moves]
    return Traffic(
        sent_inter_node=sender.bincount(minlength=G),
        received_inter_node=receiver.bincount(minlength=G),
        sent_intra_node=forwarder.bincount(minlength=G),
        received_intra_node=device.bincount(minlength=G),
        choices=devices[devices < G].bincount(minlength=G),
        messages=_partners(sender, receiver, G) + _partners(forwarder, device, G),
    )


def _devices(topk_ids: Tensor, kept: Tensor, home: Tensor, placement: Placement) -> Tensor:
    """The device that serves each choice, (T, K), in ascending order; G if the choice was dropped."""
    G, (T, _) = len(placement.slots), topk_ids.shape
    require(tuple(home.shape) == (T,), "home", tuple(home.shape), f"must be the device of each of {T} tokens")
    valid = T == 0 or (int(home.min()) >= 0 and int(home.max()) < G)
    require(valid, "home", home.tolist()[:8], f"must be devices from 0 to {G - 1}")
    copies = placement.copies
    by_expert = placement.slots.flatten().argsort(stable=True)  # slots of expert 0, of expert 1, ...
    device = by_expert // placement.slots.shape[1]
    ids = topk_ids.clamp(min=0)  # -1 is never kept
    copy = torch.arange(T).unsqueeze(1) % copies[ids]
    return torch.where(kept, device[(copies.cumsum(0) - copies)[ids] + copy], G).sort(dim=1).values


def _distinct(ids: Tensor, n_ids: int) -> tuple[Tensor, Tensor]:
    """Each token's distinct ids below n_ids, as pairs: tokens (R,) and ids (R,). Rows of `ids` (T, K) are sorted."""
    first = ids.diff(dim=1, prepend=ids.new_full((len(ids), 1), -1)) != 0
    token, k = (first & (ids < n_ids)).nonzero(as_tuple=True)
    return token, ids[token, k]


def _partners(sender: Tensor, receiver: Tensor, n_devices: int) -> Tensor:
    """The number of different receivers of each sender, (G,)."""
    return (sender * n_devices + receiver).unique().div(n_devices, rounding_mode="floor").bincount(minlength=n_devices)
