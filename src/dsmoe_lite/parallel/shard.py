"""Shard a model over a device mesh: experts along the expert axis, everything else by FSDP2."""

from typing import cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dsmoe_lite.layers.dispatch import Dispatched
from dsmoe_lite.layers.experts import Experts, as_multiplied, run_experts
from dsmoe_lite.model import Transformer
from dsmoe_lite.parallel.dispatch import combine, dispatch
from dsmoe_lite.parallel.mesh import groups_per_rank


class ParallelExperts(Experts):
    """The experts of one layer, E / P of them on each of the P processes of `mesh`, a single axis.

    Parameter names and y are those of `Experts`.
    """

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)  # takes its weights from `experts`
        self.backend, self.group = experts.backend, mesh.get_group()
        for name, weight in experts.named_parameters():
            shard = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)  # all have the full weight
            self.register_parameter(name, nn.Parameter(shard))

    def forward(self, dispatched: Dispatched) -> Tensor:
        """As `Experts.forward`. Collective over the axis."""
        dispatched = as_multiplied(dispatched)
        received, plan = dispatch(dispatched, self.group)
        weights = [self._local(name).to(received.x.dtype) for name in ("gate", "up", "down")]
        return combine(run_experts(self.backend, received, *weights), plan, len(dispatched.x))

    def _local(self, name: str) -> Tensor:
        """This process's shard of a weight. Its gradient sums over the tokens of P processes; FSDP expects a mean."""
        local = cast(DTensor, getattr(self, name)).to_local()
        if local.requires_grad:
            local.register_hook(lambda gradient: gradient / self.group.size())
        return local


def parallelize(model: Transformer, mesh: DeviceMesh) -> None:
    """Shard `model`, initialised alike on every process, over `mesh` (data, expert), in place.

    Gradients become means over all processes. For an expert, each process along `data` contributes a part of the sum.
    InputError if a routing group would be split between processes.
    """
    groups = groups_per_rank(model.config.moe, mesh.size())
    for layer in model.moe_layers:
        layer.router.groups = groups
        experts = ParallelExperts(layer.experts, mesh["expert"])
        layer.experts = experts
        fully_shard(experts, mesh=mesh["data"], shard_placement_fn=lambda _: Shard(1))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
