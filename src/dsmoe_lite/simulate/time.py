"""The time of a layer's experts, and of a training step, on many devices, on paper: counted rows, a stated machine."""

from dataclasses import dataclass, fields

from torch import Tensor

from dsmoe_lite.accounting import parameters, training_flops
from dsmoe_lite.common.errors import require, require_number, require_whole
from dsmoe_lite.config import ModelConfig
from dsmoe_lite.simulate.traffic import Traffic


@dataclass(frozen=True)
class Machine:
    """What is assumed of every device, and nothing else: links are used one way each, at full speed, by all at once."""

    flops: float  # FLOP/s that it sustains in the experts' products
    inside: float  # bytes/s to the other devices of its node, and as many from them
    across: float  # bytes/s to other nodes, and as many from them
    latency: float = 0.0  # seconds that a message takes beside its bytes; a device sends one after the other

    def __post_init__(self) -> None:
        for name in ("flops", "inside", "across"):
            require_number(name, getattr(self, name), 0.0, open_low=True)
        require_number("latency", self.latency, 0.0)


@dataclass(frozen=True)
class LayerTime:
    """Seconds of the forward pass of one layer's experts; in each part the slowest device is waited for."""

    dispatch: float
    compute: float
    combine: float

    @property
    def apart(self) -> float:
        """One part after the other."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def overlapped(self) -> float:
        """While one batch computes another is sent: what remains where either hides the other whole."""
        return max(self.compute, self.dispatch + self.combine)


def layer_time(
    crossing: Traffic,
    machine: Machine,
    d_model: int,
    expert_width: int,
    bytes_sent: float = 2.0,
    bytes_returned: float = 2.0,
) -> LayerTime:
    """The time of a layer whose rows cross as counted; a row is d_model numbers of so many bytes there and back.

    The way back is taken to have as many messages as the way there.
    """
    for name, value in (("d_model", d_model), ("expert_width", expert_width)):
        require_whole(name, value, 1)
    for name, size in (("bytes_sent", bytes_sent), ("bytes_returned", bytes_returned)):
        require_number(name, size, 0.0)
    across = _busiest(crossing.sent_across, crossing.received_across) / machine.across
    inside = _busiest(crossing.sent_inside, crossing.received_inside) / machine.inside
    seconds_a_byte = d_model * (across + inside)
    flops = 6.0 * d_model * expert_width  # of a choice: three products
    compute = float(crossing.choices.max()) * flops / machine.flops
    latency = float(crossing.messages.max()) * machine.latency
    return LayerTime(latency + bytes_sent * seconds_a_byte, compute, latency + bytes_returned * seconds_a_byte)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step of one device."""

    experts: float  # products of the routed experts, the busiest device's
    rest: float  # all other products
    exchange: float  # tokens to their experts and back, and their gradients
    weights: float  # gathering weights, adding up gradients

    @property
    def apart(self) -> float:
        """One part after the other."""
        return self.experts + self.rest + self.exchange + self.weights

    @property
    def overlapped(self) -> float:
        """What remains where products and links hide each other whole."""
        return max(self.experts + self.rest, self.exchange + self.weights)


def step_time(
    config: ModelConfig,
    layer: LayerTime,
    machine: Machine,
    *,
    tokens: int,
    seq_len: int,
    devices: int,
    expert: int,
    bytes_a_weight: float = 4.0,
) -> StepTime:
    """The time of a step with `tokens` on each device, every layer's experts taking `layer`, spread as `shard` does.

    Backward sends the same rows and multiplies twice. Weights take the links between nodes, as `weight_bytes` has them.
    No pipeline, nothing recomputed, no optimizer.
    """
    for name, value in (("tokens", tokens), ("seq_len", seq_len), ("devices", devices), ("expert", expert)):
        require_whole(name, value, 1)
    require(devices % expert == 0, "expert", expert, f"must divide devices = {devices}")
    n_layers = sum(config.is_moe_layer(index) for index in range(config.n_layers))
    work = training_flops(config, seq_len)
    rest = (work.total + work.router - work.routed_experts) / seq_len * tokens / machine.flops
    weights = weight_bytes(config, devices, expert, bytes_a_weight) / machine.across
    return StepTime(3 * n_layers * layer.compute, rest, 2 * n_layers * (layer.dispatch + layer.combine), weights)


def weight_bytes(config: ModelConfig, devices: int, expert: int, bytes_a_weight: float = 4.0) -> float:
    """Bytes of weights and gradients that a device receives from others in a step.

    Of `expert` devices each has a part of everything but the routed experts: FSDP gathers a block's weights in both
    passes, the embeddings' once, and adds up all gradients; then the `devices / expert` copies add up theirs. Those
    copies share out an expert's weights among them in the same way. What FSDP pads is not counted.
    """
    count, copies = parameters(config), devices // expert
    ends = count.embed_in.total + count.lm_head.total + config.d_model  # stay gathered between the passes
    blocks, others = count.total - count.routed_experts.total - ends, (expert - 1) / expert
    moved = (3 * blocks + 2 * ends) * others
    moved += (2 * (blocks + ends) + 3 * count.routed_experts.total) / expert * (copies - 1) / copies
    return moved * bytes_a_weight


def _busiest(sent: Tensor, received: Tensor) -> float:
    """The most rows that one device sends or receives."""
    return float(max(sent.max(), received.max()))
