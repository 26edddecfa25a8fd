"""A model over a mesh: experts cut on the expert axis, everything else by FSDP2."""

from typing import cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dsmoe_lite.layers.dispatch import Dispatched
from dsmoe_lite.layers.experts import Experts, as_multiplied, run_experts
from dsmoe_lite.model import Transformer
from dsmoe_lite.parallel.dispatch import bring_back, send
from dsmoe_lite.parallel.split import groups_each


class ParallelExperts(Experts):
    """The experts of a layer, E / P of them on each of the P processes of `mesh`, a single axis; same names, same y."""

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)  # the weights are those of `experts`
        self.backend, self.group = experts.backend, mesh.get_group()
        for name, weight in experts.named_parameters():
            part = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)  # every process has it all
            self.register_parameter(name, nn.Parameter(part))

    def forward(self, sent: Dispatched) -> Tensor:
        """As `Experts.forward`; every process of the axis must call it."""
        sent = as_multiplied(sent)
        here, way = send(sent, self.group)
        weights = [self._mine(name).to(here.x.dtype) for name in ("gate", "up", "down")]
        return bring_back(run_experts(self.backend, here, *weights), way, len(sent.x))

    def _mine(self, name: str) -> Tensor:
        """This process's part of a weight. Its gradient is a sum over P processes' tokens; FSDP wants their mean."""
        mine = cast(DTensor, getattr(self, name)).to_local()
        if mine.requires_grad:
            mine.register_hook(lambda gradient: gradient / self.group.size())
        return mine


def parallelize(model: Transformer, mesh: DeviceMesh) -> None:
    """Spread `model`, which every process has made alike, over `mesh` (data, expert), in place.

    Gradients become means over all processes: of an expert's, each process of its set has a part of the sum. InputError
    where routing groups cannot be whole processes.
    """
    each = groups_each(model.config.moe, mesh.size())
    for layer in model.moe_layers:
        layer.router.groups = each
        experts = ParallelExperts(layer.experts, mesh["expert"])
        layer.experts = experts
        fully_shard(experts, mesh=mesh["data"], shard_placement_fn=lambda _: Shard(1))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
