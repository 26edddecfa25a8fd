"""The time of an MoE layer and of a training step on many devices, from counted traffic and a machine's speeds."""

from dataclasses import dataclass, fields

from torch import Tensor

from dsmoe_lite.accounting import parameters, training_flops
from dsmoe_lite.common.errors import require, require_int, require_number
from dsmoe_lite.config import ModelConfig
from dsmoe_lite.simulate.traffic import Traffic


@dataclass(frozen=True)
class Machine:
    """The speeds of every device. All devices use their links at the same time, at full speed in both directions."""

    flops: float  # FLOP/s sustained in the experts' matrix products
    intra_node: float  # bytes/s to the other devices of a node, and as many from them
    inter_node: float  # bytes/s to other nodes, and as many from them
    latency: float = 0.0  # seconds of a message beside its bytes; a device sends its messages one after the other

    def __post_init__(self) -> None:
        for name in ("flops", "intra_node", "inter_node"):
            require_number(name, getattr(self, name), 0.0, open_low=True)
        require_number("latency", self.latency, 0.0)


@dataclass(frozen=True)
class LayerTime:
    """Seconds of the forward pass of one layer's experts; each part takes as long as on the slowest device."""

    dispatch: float
    compute: float
    combine: float

    @property
    def sequential(self) -> float:
        """The parts one after the other."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def overlapped(self) -> float:
        """Communication of one micro-batch during computation of another: the longer of the two."""
        return max(self.compute, self.dispatch + self.combine)


def layer_time(
    traffic: Traffic,
    machine: Machine,
    d_model: int,
    expert_width: int,
    dispatch_bytes: float = 2.0,
    combine_bytes: float = 2.0,
) -> LayerTime:
    """The time of a layer with this traffic. A row has d_model numbers.

    dispatch_bytes, combine_bytes: bytes per number. Combine is taken to send as many messages as dispatch.
    """
    for name, value in (("d_model", d_model), ("expert_width", expert_width)):
        require_int(name, value, 1)
    for name, size in (("dispatch_bytes", dispatch_bytes), ("combine_bytes", combine_bytes)):
        require_number(name, size, 0.0)
    inter_node = _busiest(traffic.sent_inter_node, traffic.received_inter_node) / machine.inter_node
    intra_node = _busiest(traffic.sent_intra_node, traffic.received_intra_node) / machine.intra_node
    seconds_per_byte = d_model * (inter_node + intra_node)  # of a number in every row
    flops = 6.0 * d_model * expert_width  # of a choice: three products
    compute = float(traffic.choices.max()) * flops / machine.flops
    latency = float(traffic.messages.max()) * machine.latency
    return LayerTime(latency + dispatch_bytes * seconds_per_byte, compute, latency + combine_bytes * seconds_per_byte)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step on one device."""

    experts: float  # products of the routed experts, on the busiest device
    rest: float  # all other products
    exchange: float  # dispatch and combine of tokens, and of their gradients
    weights: float  # gathering weights, and reducing gradients

    @property
    def sequential(self) -> float:
        """The parts one after the other."""
        return self.experts + self.rest + self.exchange + self.weights

    @property
    def overlapped(self) -> float:
        """Communication during computation: the longer of the two."""
        return max(self.experts + self.rest, self.exchange + self.weights)


def step_time(
    config: ModelConfig,
    layer: LayerTime,
    machine: Machine,
    *,
    tokens: int,
    seq_len: int,
    devices: int,
    expert_parallel: int,
    bytes_per_weight: float = 4.0,
) -> StepTime:
    """The time of a step with `tokens` on each device, sharded as in `parallel.shard`; every MoE layer takes `layer`.

    The backward pass sends the same rows and multiplies twice. The traffic of `weight_bytes` crosses the links between
    nodes. There is no pipeline parallelism, no recomputation and no optimizer.
    """
    sizes = {"tokens": tokens, "seq_len": seq_len, "devices": devices, "expert_parallel": expert_parallel}
    for name, value in sizes.items():
        require_int(name, value, 1)
    require(devices % expert_parallel == 0, "expert_parallel", expert_parallel, f"must divide devices = {devices}")
    n_layers = sum(config.is_moe_layer(index) for index in range(config.n_layers))
    work = training_flops(config, seq_len)
    rest = (work.total + work.router - work.routed_experts) / seq_len * tokens / machine.flops
    weights = weight_bytes(config, devices, expert_parallel, bytes_per_weight) / machine.inter_node
    return StepTime(3 * n_layers * layer.compute, rest, 2 * n_layers * (layer.dispatch + layer.combine), weights)


def weight_bytes(config: ModelConfig, devices: int, expert_parallel: int, bytes_per_weight: float = 4.0) -> float:
    """Bytes of weights and gradients that a device receives from others in a step.

    All weights but those of the routed experts are sharded over `expert_parallel` devices. FSDP gathers a block's
    weights in both passes and the embeddings' once, and reduces all gradients; then the `devices / expert_parallel`
    replicas add up theirs. An expert's weights are sharded over these replicas in the same way. Padding by FSDP is not
    counted.
    """
    count, replicas = parameters(config), devices // expert_parallel
    ends = count.embed_in.total + count.lm_head.total + config.d_model  # stay gathered between the passes
    blocks = count.total - count.routed_experts.total - ends
    moved = (3 * blocks + 2 * ends) * ((expert_parallel - 1) / expert_parallel)
    moved += (2 * (blocks + ends) + 3 * count.routed_experts.total) / expert_parallel * (replicas - 1) / replicas
    return moved * bytes_per_weight


def _busiest(sent: Tensor, received: Tensor) -> float:
    """The most rows that one device sends or receives."""
    return float(max(sent.max(), received.max()))
