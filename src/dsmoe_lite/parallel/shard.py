"""Shard a model over a device mesh: experts along the expert axis, everything else by FSDP2."""

from typing import cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dsmoe_lite.layers.dispatch import Dispatched
from dsmoe_lite.layers.experts import Experts
from dsmoe_lite.layers.router import Routing
from dsmoe_lite.model import Transformer
from dsmoe_lite.parallel.dispatch import Received, all_to_all_combine, all_to_all_dispatch
from dsmoe_lite.parallel.mesh import groups_per_rank


class ParallelExperts(Experts):
    """The experts of one layer, E / P of them on each of the P processes of `mesh`, a single axis.

    Parameter names and y are those of `Experts`. `dispatch` and `combine` are collective over the axis.
    """

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)  # the weights come from `experts`
        self.backend, self.limit, self.group = experts.backend, experts.limit, mesh.get_group()
        for name, weight in experts.named_parameters():
            shard = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)  # all have the full weight
            self.register_parameter(name, nn.Parameter(shard))

    def dispatch(self, x: Tensor, routing: Routing) -> Received:
        """Sort the tokens x (T, D) by expert, and send each to the processes of its experts."""
        return all_to_all_dispatch(super().dispatch(x, routing), self.group)

    def combine(self, y_sorted: Tensor, dispatched: Dispatched) -> Tensor:
        """Add up the rows of each token on every process, return one row from each, and add those up: y (T, D)."""
        assert isinstance(dispatched, Received), "combine takes what dispatch returned"
        return all_to_all_combine(super().combine(y_sorted, dispatched), dispatched.plan)

    def local_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """This process's shards of gate, up and down."""
        return self._local("gate"), self._local("up"), self._local("down")

    def _local(self, name: str) -> Tensor:
        """This process's shard of a weight. Its gradient sums over the tokens of P processes; FSDP expects a mean."""
        local = cast(DTensor, getattr(self, name)).to_local()
        if local.requires_grad:
            local.register_hook(lambda gradient: gradient / self.group.size())
        return local


def parallelize(model: Transformer, mesh: DeviceMesh) -> None:
    """Shard `model`, initialised alike on every process, over `mesh` (data, expert), in place.

    Gradients become means over all processes. For an expert, each process along `data` contributes a part of the sum.
    Raises InputError if a routing group would be split between processes.
    """
    groups = groups_per_rank(model.config.moe, mesh.size())
    for layer in model.all_moe_layers:
        layer.router.groups = groups
        experts = ParallelExperts(layer.experts, mesh["expert"])
        layer.experts = experts
        fully_shard(experts, mesh=mesh["data"], shard_placement_fn=lambda _: Shard(1))
    for part in (*model.blocks, *model.mtp):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
