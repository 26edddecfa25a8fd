"""Placement of experts on devices: copies of the busiest experts, packed so that devices have about equal loads.

DeepSeek-V3 is deployed with redundant experts chosen from measured loads (arXiv:2412.19437, Section 3.4).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require, require_int


@dataclass(frozen=True)
class Placement:
    """The expert in each slot of each of G devices. An expert in several slots shares its tokens evenly among them."""

    slots: Tensor  # (G, slots per device) int64
    n_experts: int

    @property
    def copies(self) -> Tensor:
        """Slots of each expert, (E,)."""
        return self.slots.flatten().bincount(minlength=self.n_experts)

    def loads(self, load: Tensor) -> Tensor:
        """The load of each device, (G,), for the experts' loads (E,)."""
        return (load.double() / self.copies)[self.slots].sum(dim=1)

    def imbalance(self, load: Tensor) -> float:
        """The busiest device's load over the mean: how many times longer a step takes than at balance, 1 at balance."""
        loads = self.loads(load)
        return float(loads.max() / loads.mean()) if loads.sum() > 0 else 1.0


def consecutive_placement(n_experts: int, n_devices: int) -> Placement:
    """Place consecutive experts together, one slot each, as expert parallelism does in `parallel.mesh`."""
    require_int("n_devices", n_devices, 1)
    require(n_experts % n_devices == 0, "n_devices", n_devices, f"must divide n_experts = {n_experts}")
    return Placement(torch.arange(n_experts).view(n_devices, -1), n_experts)


def balanced_placement(load: Tensor, n_devices: int, n_slots: int) -> Placement:
    """Give spare slots to the experts whose copies are busiest, then the busiest copies to the least busy devices.

    load (E,): measured tokens of each expert. n_slots: on all devices together. The copies minimise the load of the
    busiest copy. The packing is greedy, and keeps the copies of an expert on different devices if there is room.
    """
    E = len(load)
    require(bool((load >= 0).all()) and bool(load.isfinite().all()), "load", load.tolist(), "must be counts of tokens")
    require_int("n_devices", n_devices, 1)
    require(n_slots % n_devices == 0, "n_slots", n_slots, f"must be a multiple of n_devices = {n_devices}")
    require_int("n_slots", n_slots, E)
    copies = _copies(load.double(), n_slots)
    expert = torch.arange(E).repeat_interleave(copies)
    copy_load = (load.double() / copies)[expert]
    free_slots, device_load = [n_slots // n_devices] * n_devices, [0.0] * n_devices
    slots: list[list[int]] = [[] for _ in range(n_devices)]
    for copy in copy_load.argsort(descending=True, stable=True).tolist():
        e = int(expert[copy])
        device = min((g for g in range(n_devices) if free_slots[g]), key=lambda g: (e in slots[g], device_load[g]))
        slots[device].append(e)
        free_slots[device] -= 1
        device_load[device] += float(copy_load[copy])
    return Placement(torch.tensor(slots), E)


def _copies(load: Tensor, n_slots: int) -> Tensor:
    """Copies of each expert, (E,): one slot after the other goes to the expert whose copies are busiest."""
    copies = torch.ones(len(load), dtype=torch.int64)
    for _ in range(n_slots - len(load)):
        copies[(load / copies).argmax()] += 1
    return copies
