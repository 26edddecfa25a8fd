"""Processes along two axes: those on `expert` share one set of experts, those on `data` hold copies of it.

Every process has tokens of its own. With 8 processes and 4 that share, ranks 0-3 are one set and 4-7 its copy.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh

from dsmoe_lite.config import MoEConfig
from dsmoe_lite.errors import require, require_whole
from dsmoe_lite.layers.selection import group_of


def make_mesh(
    device_type: str, moe: MoEConfig | None, expert: int = 0, patience: timedelta = default_pg_timeout
) -> DeviceMesh:
    """The mesh (data, expert) of all processes of the default group; `expert` 0 has all of them share the experts.

    patience: what an exchange along an axis may take. InputError where the sizes do not fit each other, the experts or
    their groups.
    """
    world = dist.get_world_size()
    require_whole("expert_parallel", expert, 0)
    expert = expert or (world if moe is not None else 1)
    require(world % expert == 0, "expert_parallel", expert, f"must divide the number of processes, {world}")
    check_placement(moe, expert)
    ranks = torch.arange(world).view(-1, expert)
    axes = [_groups(lines, patience) for lines in (ranks.T, ranks)]
    return DeviceMesh.from_group(axes, device_type, ranks, mesh_dim_names=("data", "expert"))


def check_placement(moe: MoEConfig | None, expert: int) -> None:
    """Raise InputError unless `expert` processes can share the experts, and each group of them be whole processes.

    A group may also be a part of a process: one that stands for several devices.
    """
    if moe is None:
        require(expert == 1, "expert_parallel", expert, "must be 1: the model has no experts to share")
        return
    E, groups = moe.n_routed_experts, moe.n_group
    require(E % expert == 0, "expert_parallel", expert, f"must divide n_routed_experts = {E}")
    whole = groups == 1 or expert % groups == 0 or groups % expert == 0
    remedy = f"must divide n_group = {groups} or be a multiple of it: a group of experts is a device, or a node of them"
    require(whole, "expert_parallel", expert, remedy)


def device_of(n_experts: int, mesh: DeviceMesh) -> torch.Tensor:
    """The place on the expert axis of each expert, (E,): neighbours stand together, as a Shard(0) puts them."""
    return group_of(n_experts, mesh["expert"].size())


def _groups(lines: torch.Tensor, patience: timedelta) -> dist.ProcessGroup:
    """This process's group of those in `lines`; a mesh that makes its own waits half an hour for a lost process."""
    mine, _ = dist.new_subgroups_by_enumeration(lines.tolist(), timeout=patience)
    return mine
