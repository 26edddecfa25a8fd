"""The time of one layer's experts on many devices, on paper: counted rows, and a machine that is stated."""

from dataclasses import dataclass, fields

from torch import Tensor

from dsmoe_lite.errors import require_number, require_whole
from dsmoe_lite.parallel.traffic import Crossings


@dataclass(frozen=True)
class Machine:
    """What is assumed of every device, and nothing else: links are used one way each, at full speed, by all at once."""

    flops: float  # FLOP/s that it sustains in the experts' products
    inside: float  # bytes/s to the other devices of its node, and as many from them
    across: float  # bytes/s to other nodes, and as many from them
    latency: float = 0.0  # seconds that an exchange takes beside its bytes

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
    crossing: Crossings,
    machine: Machine,
    d_model: int,
    expert_width: int,
    bytes_sent: float = 2.0,
    bytes_returned: float = 2.0,
) -> LayerTime:
    """The time of a layer whose rows cross as counted; a row is d_model numbers of so many bytes there and back."""
    for name, value in (("d_model", d_model), ("expert_width", expert_width)):
        require_whole(name, value, 1)
    for name, size in (("bytes_sent", bytes_sent), ("bytes_returned", bytes_returned)):
        require_number(name, size, 0.0)
    across = _busiest(crossing.sent_across, crossing.received_across) / machine.across
    inside = _busiest(crossing.sent_inside, crossing.received_inside) / machine.inside
    seconds_a_byte = d_model * (across + inside)
    flops = 6.0 * d_model * expert_width  # of a choice: three products
    compute = float(crossing.choices.max()) * flops / machine.flops
    return LayerTime(
        machine.latency + bytes_sent * seconds_a_byte, compute, machine.latency + bytes_returned * seconds_a_byte
    )


def _busiest(sent: Tensor, received: Tensor) -> float:
    """The most rows that one device sends or receives."""
    return float(max(sent.max(), received.max()))
