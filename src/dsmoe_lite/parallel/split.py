"""Which sequences of a batch each process takes, and which of its tokens compete for slots."""

from dsmoe_lite.config import MoEConfig
from dsmoe_lite.errors import require
from dsmoe_lite.layers.capacity import even_parts


def groups_each(moe: MoEConfig | None, world: int) -> int:
    """How many routing groups each of `world` processes has; InputError where they cannot be whole groups."""
    if moe is None or not moe.competes:
        return 1
    groups = moe.routing_groups
    remedy = f"must be a multiple of the {world} processes: tokens of two processes cannot compete for slots"
    require(groups % world == 0, "routing_groups", groups, remedy)
    return groups // world


def rows_of(rank: int, world: int, n_sequences: int, moe: MoEConfig | None) -> slice:
    """The sequences of process `rank`: whole routing groups, else as even as can be. InputError for too few."""
    each = groups_each(moe, world)
    parts = each * world
    require(n_sequences >= parts, "batch_size", n_sequences, f"must be at least {parts}, to share it out")
    sizes = even_parts(n_sequences, parts)
    return slice(sum(sizes[: rank * each]), sum(sizes[: (rank + 1) * each]))
