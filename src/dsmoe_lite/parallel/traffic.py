"""Which rows cross between devices, counted from a routing alone."""

import torch
from torch import Tensor

from dsmoe_lite.errors import require
from dsmoe_lite.parallel.placement import Placement


def rows_between(topk_ids: Tensor, kept: Tensor, home: Tensor, placement: Placement) -> Tensor:
    """Rows sent from each device to each, (devices, devices): a token goes once to a device that holds experts of it.

    topk_ids, kept (T, K) as in a Routing; home (T,): the device of each token. The diagonal crosses nothing. As many
    rows come back. Copies of an expert are taken in turn, by the number of the token.
    """
    D, (T, _) = len(placement.slots), topk_ids.shape
    require(tuple(home.shape) == (T,), "home", tuple(home.shape), f"must be the device of each of {T} tokens")
    inside = T == 0 or (int(home.min()) >= 0 and int(home.max()) < D)
    require(inside, "home", home.tolist()[:8], f"must be devices from 0 to {D - 1}")
    device = torch.where(kept, _device_of(placement, topk_ids), D).sort(dim=1).values
    first = device.diff(dim=1, prepend=device.new_full((T, 1), -1)) != 0
    pairs = (home.unsqueeze(1) * D + device)[first & (device < D)]
    return pairs.bincount(minlength=D * D).view(D, D)


def _device_of(placement: Placement, topk_ids: Tensor) -> Tensor:
    """The device that serves each choice, (T, K)."""
    copies = placement.copies
    by_expert = placement.slots.flatten().argsort(stable=True)  # slots of expert 0, of expert 1, ...
    device = by_expert // placement.slots.shape[1]
    ids = topk_ids.clamp(min=0)  # -1 is never kept
    turn = torch.arange(len(ids)).unsqueeze(1) % copies[ids]
    return device[(copies.cumsum(0) - copies)[ids] + turn]
