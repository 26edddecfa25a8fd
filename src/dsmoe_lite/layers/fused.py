"""The experts by hand-written kernels, in CUDA C++ or in Triton: few launches, few tensors, one backward for both.

Between forward and backward only a = W_gate x and b = W_up x are kept. The backward pass writes their gradients over
them, so a graph can be used once: a second backward pass through it is refused by autograd.
"""

from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe_lite.kernels.launch import contiguous_aligned
from dsmoe_lite.layers.dispatch import Dispatched


class Kernels(Protocol):
    """What kernels.cuda and kernels.triton_twins both have; their docstrings give equations and shapes."""

    def permute(self, x: Tensor, token: Tensor) -> Tensor: ...
    def combine(self, rows: Tensor, place: Tensor) -> Tensor: ...
    def multiply(self, rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor: ...
    def gate_up(
        self, rows: Tensor, gate: Tensor, up: Tensor, gates: Tensor, ends: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...
    def hidden_backward(
        self, dy_rows: Tensor, down: Tensor, a: Tensor, b: Tensor, gates: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
    def rows_backward(self, da: Tensor, db: Tensor, gate: Tensor, up: Tensor, ends: Tensor) -> Tensor: ...
    def weights_backward(self, left: Tensor, right: Tensor, ends: Tensor) -> Tensor: ...


class _Fused(torch.autograd.Function):
    """y_t = sum over rows r of token t of W_down (g_r silu(W_gate x_t) * W_up x_t), with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        token: Tensor,
        place: Tensor,
        ends: Tensor,
        x: Tensor,
        gates: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
    ) -> Tensor:
        keep = any(ctx.needs_input_grad)
        hidden, a, b = kernels.gate_up(kernels.permute(x, token), gate, up, gates, ends, keep)
        ctx.kernels = kernels
        if keep:
            ctx.save_for_backward(token, place, ends, x, gates, gate, up, down, a, b)
        return kernels.combine(kernels.multiply(hidden, down, ends), place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        token, place, ends, x, gates, gate, up, down, a, b = ctx.saved_tensors
        kernels: Kernels = ctx.kernels
        dy_rows = kernels.permute(contiguous_aligned(dy), token)
        torch.autograd.graph.increment_version((a, b))
        da, db, hidden, d_gates = kernels.hidden_backward(dy_rows, down, a, b, gates, ends)
        d_down = kernels.weights_backward(dy_rows, hidden, ends)
        del dy_rows, hidden
        rows = kernels.permute(x, token)
        d_gate, d_up = kernels.weights_backward(da, rows, ends), kernels.weights_backward(db, rows, ends)
        del rows
        dx = kernels.combine(kernels.rows_backward(da, db, gate, up, ends), place)
        return None, None, None, None, dx, d_gates.to(gates.dtype), d_gate, d_up, d_down


def run_cuda(sent: Dispatched, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Run the kernels of moe.cu; tensors on the CPU run them there, slowly. InputError for what they do not take."""
    from dsmoe_lite.kernels import cuda

    return _run(cuda, sent, gate, up, down)


def run_triton(sent: Dispatched, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Run the Triton kernels; on the CPU only in Triton's interpreter. InputError for what they do not take."""
    from dsmoe_lite.kernels import triton_kernels

    return _run(triton_kernels, sent, gate, up, down)


def _run(kernels: ModuleType, sent: Dispatched, *weights: Tensor) -> Tensor:
    floats = [contiguous_aligned(tensor) for tensor in (sent.x, sent.gates, *weights)]
    if not torch.is_grad_enabled():  # ctx.needs_input_grad does not know of torch.no_grad: a and b would be written
        floats = [tensor.detach() for tensor in floats]
    return _Fused.apply(cast(Kernels, kernels), sent.token, sent.place, sent.ends, *floats)
