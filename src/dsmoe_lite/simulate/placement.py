"""Where experts stand: copies of the busiest, packed so that every device has about the same work.

DeepSeek-V3 is deployed so, from measured loads (arXiv:2412.19437, Section 3.4: redundant experts).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require, require_whole


@dataclass(frozen=True)
class Placement:
    """The expert in each slot of each device; an expert may have several slots, which share its tokens evenly."""

    slots: Tensor  # (devices, slots of each) int64
    n_experts: int

    @property
    def copies(self) -> Tensor:
        """Slots of each expert, (E,)."""
        return self.slots.flatten().bincount(minlength=self.n_experts)

    def loads(self, load: Tensor) -> Tensor:
        """What each device has to do, (devices,), of the experts' loads (E,)."""
        return (load.double() / self.copies)[self.slots].sum(dim=1)

    def imbalance(self, load: Tensor) -> float:
        """The busiest device's load over the mean: how much longer a step waits than it must; 1 at balance."""
        loads = self.loads(load)
        return float(loads.max() / loads.mean()) if loads.sum() > 0 else 1.0


def in_order(n_experts: int, n_devices: int) -> Placement:
    """Neighbours together, one slot each, as the processes of `parallel.mesh` hold them."""
    require_whole("n_devices", n_devices, 1)
    require(n_experts % n_devices == 0, "n_devices", n_devices, f"must divide n_experts = {n_experts}")
    return Placement(torch.arange(n_experts).view(n_devices, -1), n_experts)


def balanced(load: Tensor, n_devices: int, n_slots: int) -> Placement:
    """Give spare slots to the experts whose copies are busiest, then the busiest copies to the least busy devices.

    load (E,): tokens of each expert, measured before. n_slots: of all devices together. The copies keep the busiest one
    as idle as can be; the packing is the usual greedy one, which keeps copies of an expert apart where there is room.
    """
    E = len(load)
    require(bool((load >= 0).all()) and bool(load.isfinite().all()), "load", load.tolist(), "must be counts of tokens")
    require_whole("n_devices", n_devices, 1)
    require(n_slots % n_devices == 0, "n_slots", n_slots, f"must be a multiple of n_devices = {n_devices}")
    require_whole("n_slots", n_slots, E)
    copies = _copies(load.double(), n_slots)
    expert = torch.arange(E).repeat_interleave(copies)
    of_copy = (load.double() / copies)[expert]
    room, work = [n_slots // n_devices] * n_devices, [0.0] * n_devices
    held: list[list[int]] = [[] for _ in range(n_devices)]
    for copy in of_copy.argsort(descending=True, stable=True).tolist():
        e = int(expert[copy])
        device = min((d for d in range(n_devices) if room[d]), key=lambda d: (e in held[d], work[d]))
        held[device].append(e)
        room[device] -= 1
        work[device] += float(of_copy[copy])
    return Placement(torch.tensor(held), E)


def _copies(load: Tensor, n_slots: int) -> Tensor:
    copies = torch.ones(len(load), dtype=torch.int64)
    for _ in range(n_slots - len(load)):
        copies[(load / copies).argmax()] += 1
    return copies
