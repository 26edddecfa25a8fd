"""A device mesh with two axes: processes along `expert` share one set of experts, those along `data` replicate it.

Every process has its own tokens. With 8 processes of which 4 share the experts, ranks 0-3 hold one set of experts and
ranks 4-7 a replica. This module also divides the sequences of a batch among the ranks.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh

from dsmoe_lite.common.errors import require, require_int
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers.capacity import even_parts
from dsmoe_lite.layers.selection import group_of


def make_mesh(
    device_type: str, moe: MoEConfig | None, expert: int = 0, timeout: timedelta = default_pg_timeout
) -> DeviceMesh:
    """Make the mesh (data, expert) over the default process group. Collective.

    expert: processes that share one set of experts; 0: all of them. timeout: of a collective along one axis. Raises
    InputError if `expert` does not divide the number of processes, the experts or their groups.
    """
    world = dist.get_world_size()
    require_int("expert_parallel", expert, 0)
    expert = expert or (world if moe is not None else 1)
    require(world % expert == 0, "expert_parallel", expert, f"must divide the number of processes, {world}")
    check_placement(moe, expert)
    ranks = torch.arange(world).view(-1, expert)
    axes = [_group(members, timeout) for members in (ranks.T, ranks)]
    return DeviceMesh.from_group(axes, device_type, ranks, mesh_dim_names=("data", "expert"))


def check_placement(moe: MoEConfig | None, expert: int) -> None:
    """Raise InputError unless `expert` processes can share the experts of `moe`.

    A group of experts may span several processes, or a process may hold several groups, but no process may hold parts
    of two groups.
    """
    if moe is None:
        require(expert == 1, "expert_parallel", expert, "must be 1: the model has no experts to share")
        return
    E, groups = moe.n_routed_experts, moe.n_group
    require(E % expert == 0, "expert_parallel", expert, f"must divide n_routed_experts = {E}")
    fits = groups == 1 or expert % groups == 0 or groups % expert == 0
    remedy = f"must divide n_group = {groups} or be a multiple of it: a group of experts is a device, or a node of them"
    require(fits, "expert_parallel", expert, remedy)


def device_of(n_experts: int, mesh: DeviceMesh) -> torch.Tensor:
    """The coordinate of each expert on the expert axis, (E,): Shard(0) places consecutive experts together."""
    return group_of(n_experts, mesh["expert"].size())


def groups_per_rank(moe: MoEConfig | None, world: int) -> int:
    """Routing groups on each of `world` processes. Raises InputError if a group would be split between processes."""
    if moe is None or not moe.competes:
        return 1
    groups = moe.routing_groups
    remedy = f"must be a multiple of the {world} processes: tokens of two processes cannot compete for slots"
    require(groups % world == 0, "routing_groups", groups, remedy)
    return groups // world


def rows_of_rank(rank: int, world: int, n_sequences: int, moe: MoEConfig | None) -> slice:
    """The sequences of a batch that `rank` takes: complete routing groups, or else parts as even as possible.

    Raises InputError if the batch has too few sequences.
    """
    groups = groups_per_rank(moe, world)
    parts = groups * world
    require(n_sequences >= parts, "batch_size", n_sequences, f"must be at least {parts}, one sequence per part")
    sizes = even_parts(n_sequences, parts)
    return slice(sum(sizes[: rank * groups]), sum(sizes[: (rank + 1) * groups]))


def _group(members: torch.Tensor, timeout: timedelta) -> dist.ProcessGroup:
    """The group of this process among `members`, with our timeout: DeviceMesh itself would set half an hour."""
    group, _ = dist.new_subgroups_by_enumeration(members.tolist(), timeout=timeout)
    return group
