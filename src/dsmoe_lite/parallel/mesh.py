"""A device mesh with two axes: processes along `expert` share one set of experts, those along `data` replicate it.

Every process has tokens of its own. With 8 processes of which 4 share the experts, ranks 0-3 hold one set of experts
and ranks 4-7 a copy. Also here: which sequences of a batch each rank takes.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh

from dsmoe_lite.common.errors import require, require_whole
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers.capacity import even_parts
from dsmoe_lite.layers.selection import group_of


def make_mesh(
    device_type: str, moe: MoEConfig | None, expert: int = 0, patience: timedelta = default_pg_timeout
) -> DeviceMesh:
    """Make the mesh (data, expert) over the default process group; with `expert` 0 all processes share the experts.

    patience: the time limit of a collective along one axis. InputError if `expert` does not divide the number of
    processes, the experts or their groups.
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
    """Raise InputError unless `expert` processes can share the experts without splitting a group unevenly.

    A group of experts may span several whole processes, or a process may hold several whole groups.
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
    """The coordinate of each expert on the expert axis, (E,): consecutive experts together, as Shard(0) places them."""
    return group_of(n_experts, mesh["expert"].size())


def groups_per_rank(moe: MoEConfig | None, world: int) -> int:
    """Routing groups on each of `world` processes; InputError if a group would be split between processes."""
    if moe is None or not moe.competes:
        return 1
    groups = moe.routing_groups
    remedy = f"must be a multiple of the {world} processes: tokens of two processes cannot compete for slots"
    require(groups % world == 0, "routing_groups", groups, remedy)
    return groups // world


def rows_of_rank(rank: int, world: int, n_sequences: int, moe: MoEConfig | None) -> slice:
    """The sequences of a batch that `rank` takes: whole routing groups, else parts as even as possible.

    InputError for a batch with too few sequences.
    """
    each = groups_per_rank(moe, world)
    parts = each * world
    require(n_sequences >= parts, "batch_size", n_sequences, f"must be at least {parts}, one sequence per part")
    sizes = even_parts(n_sequences, parts)
    return slice(sum(sizes[: rank * each]), sum(sizes[: (rank + 1) * each]))


def _groups(lines: torch.Tensor, patience: timedelta) -> dist.ProcessGroup:
    """This process's group among `lines`; a mesh that makes its own groups waits half an hour for a lost process."""
    mine, _ = dist.new_subgroups_by_enumeration(lines.tolist(), timeout=patience)
    return mine
