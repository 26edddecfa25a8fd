"""The modules that benchmarks compare: MoE layers, a dense FFN, and the experts of transformers with our weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dsmoe_lite.bench.fixed_routing import FixedRouter
from dsmoe_lite.bench.memory import peak_bytes, peak_bytes_on_gpu
from dsmoe_lite.common.errors import RunError
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers.experts import Experts
from dsmoe_lite.layers.ffn import SwiGLU
from dsmoe_lite.layers.moe import MoELayer
from dsmoe_lite.layers.router import Routing


@dataclass(frozen=True)
class Contender:
    """A module and a call of it on its inputs. One step is forward and backward, to the weights and to the inputs."""

    module: nn.Module
    call: Callable[..., Tensor]
    inputs: list[Tensor]
    dy: Tensor

    def step(self) -> None:
        """Run forward and backward, into new gradients."""
        self.clear()
        self.call(*self.inputs).backward(self.dy)

    def clear(self) -> None:
        """Drop all gradients."""
        for tensor in (*self.module.parameters(), *self.inputs):
            tensor.grad = None

    def peak_bytes(self) -> int:
        """The peak memory of a step, without weights and their gradients."""
        measure = peak_bytes_on_gpu if self.dy.is_cuda else peak_bytes
        return measure(self.step, self.clear, self.gradients)

    def gradients(self) -> list[Tensor]:
        """The gradients of the weights."""
        return [weight.grad for weight in self.module.parameters() if weight.grad is not None]


def dense_ffn(moe: MoEConfig, n_tokens: int, d_model: int) -> Contender:
    """Return a dense FFN with the active width of `moe`."""
    ffn = SwiGLU(d_model, (moe.top_k + moe.n_shared_experts) * moe.expert_width)
    return Contender(ffn, ffn, [_tokens(n_tokens, d_model)], _dy(n_tokens, d_model))


def moe_layer(moe: MoEConfig, ids: Tensor, backend: str, d_model: int) -> Contender:
    """Return an MoE layer: router, experts and shared experts. Its choices are replaced by `ids` (T, K)."""
    layer = MoELayer(d_model, replace(moe, backend=backend), vocab_size=1)
    layer.router = FixedRouter(layer.router, ids)  # type: ignore[assignment]
    n_tokens = len(ids)
    return Contender(layer, lambda x: layer(x[None])[0][0], [_tokens(n_tokens, d_model)], _dy(n_tokens, d_model))


def routed_experts(
    moe: MoEConfig, ids: Tensor, backend: str, d_model: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Contender:
    """Return the routed experts with dispatch and combine, for given `ids` and gates (T, K)."""
    T, E = len(ids), moe.n_routed_experts
    with torch.device(device):
        experts = Experts(E, d_model, moe.expert_width, backend, moe.swiglu_limit).to(dtype)
    ids, scores = ids.to(device), torch.empty(T, E, device=device)

    def call(x: Tensor, gates: Tensor) -> Tensor:
        kept = torch.ones_like(ids, dtype=torch.bool)
        dispatched = experts.dispatch(x, Routing(scores, scores, ids, gates, kept, (1, T)))
        return experts.combine(experts(dispatched), dispatched)

    return _contender(experts, call, ids, d_model, dtype)


def transformers_experts(experts: Experts, ids: Tensor, implementation: str) -> Contender:
    """Return the MixtralExperts of transformers with the weights of `experts`; implementation: eager or grouped_mm."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    except ModuleNotFoundError:
        raise RunError("transformers is not installed: run `make setup`, or `pip install transformers`") from None
    E, width, d_model = experts.gate.shape
    config = MixtralConfig(hidden_size=d_model, intermediate_size=width, num_local_experts=E)
    config._experts_implementation = implementation
    with experts.gate.device:
        theirs = MixtralExperts(config).to(experts.gate.dtype)
    with torch.no_grad():
        theirs.gate_up_proj.copy_(torch.cat([experts.gate, experts.up], dim=1))
        theirs.down_proj.copy_(experts.down)
    ids = ids.to(experts.gate.device)
    return _contender(theirs, lambda x, gates: theirs(x, ids, gates), ids, d_model, experts.gate.dtype)


def _contender(
    module: nn.Module, call: Callable[..., Tensor], ids: Tensor, d_model: int, dtype: torch.dtype
) -> Contender:
    x, gates, dy = _tokens(len(ids), d_model), _gates(ids), _dy(len(ids), d_model)
    inputs = [tensor.detach().to(ids.device, dtype).requires_grad_() for tensor in (x, gates)]
    return Contender(module, call, inputs, dy.to(ids.device, dtype))


def _tokens(n_tokens: int, d_model: int) -> Tensor:
    return torch.randn(n_tokens, d_model, generator=torch.Generator().manual_seed(0)).requires_grad_()


def _gates(ids: Tensor) -> Tensor:
    return torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def _dy(n_tokens: int, d_model: int) -> Tensor:
    return torch.randn(n_tokens, d_model, generator=torch.Generator().manual_seed(2))
