"""The experts by hand-written kernels, in CUDA C++ or in Triton: few launches, few tensors, one backward for both.

Between forward and backward only a = W_gate x and b = W_up x are kept. The backward pass writes their gradients over
them, so a graph can be used once: autograd refuses a second backward pass through it.
"""

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from dsmoe_lite.common.autograd import first_order
from dsmoe_lite.kernels.launch import contiguous_aligned
from dsmoe_lite.layers.dispatch import USE_LOOP, Dispatched, Implementation


class Kernels(Protocol):
    """The functions that kernels.cuda and kernels.triton_kernels share; their docstrings give equations and shapes."""

    def permute(self, x: Tensor, token: Tensor) -> Tensor: ...
    def combine(self, rows: Tensor, row_of_choice: Tensor) -> Tensor: ...
    def multiply(self, rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor: ...
    def gate_up(
        self, rows: Tensor, gate: Tensor, up: Tensor, gates: Tensor, ends: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...
    def hidden_backward(
        self, dy_rows: Tensor, down: Tensor, a: Tensor, b: Tensor, gates: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
    def rows_backward(self, da: Tensor, db: Tensor, gate: Tensor, up: Tensor, ends: Tensor) -> Tensor: ...
    def weights_backward(self, left: Tensor, right: Tensor, ends: Tensor) -> Tensor: ...


class _GateUp(torch.autograd.Function):
    """a = W_gate x and b = W_up x of every row, with gradients; and hidden = g silu(a) * b, whose gradient is _Down's.

    Two functions, not one: autograd then drops dy_rows (N, D) before this backward pass gathers the rows of x (N, D).
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        token: Tensor,
        row_of_choice: Tensor,
        ends: Tensor,
        gates: Tensor,
        x: Tensor,
        gate: Tensor,
        up: Tensor,
    ) -> tuple[Tensor | None, ...]:
        hidden, a, b = kernels.gate_up(kernels.permute(x, token), gate, up, gates, ends, True)
        ctx.kernels = kernels
        ctx.mark_non_differentiable(hidden)
        ctx.save_for_backward(token, row_of_choice, ends, x, gate, up)
        return hidden, a, b

    @staticmethod
    @first_order(USE_LOOP)
    def backward(ctx: Any, _: Any, da: Tensor, db: Tensor) -> tuple[Tensor | None, ...]:
        token, row_of_choice, ends, x, gate, up = ctx.saved_tensors
        kernels: Kernels = ctx.kernels
        rows = kernels.permute(x, token)
        d_gate, d_up = kernels.weights_backward(da, rows, ends), kernels.weights_backward(db, rows, ends)
        del rows
        dx = kernels.combine(kernels.rows_backward(da, db, gate, up, ends), row_of_choice)
        return None, None, None, None, None, dx, d_gate, d_up


class _Down(torch.autograd.Function):
    """y_sorted = W_down hidden, with the gradients of W_down and of what hidden was made of: a, b and the gates."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, ends: Tensor, hidden: Tensor, gates: Tensor, a: Tensor, b: Tensor, down: Tensor
    ) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(ends, gates, a, b, down)
        return kernels.multiply(hidden, down, ends)

    @staticmethod
    @first_order(USE_LOOP)
    def backward(ctx: Any, dy_rows: Tensor) -> tuple[Tensor | None, ...]:
        ends, gates, a, b, down = ctx.saved_tensors
        kernels: Kernels = ctx.kernels
        dy_rows = contiguous_aligned(dy_rows)
        torch.autograd.graph.increment_version((a, b))
        da, db, hidden, d_gates = kernels.hidden_backward(dy_rows, down, a.detach(), b.detach(), gates, ends)
        d_down = kernels.weights_backward(dy_rows, hidden, ends)
        return None, None, None, d_gates.to(gates.dtype), da, db, d_down


class _Combine(torch.autograd.Function):
    """y_t = sum of the rows of token t, with its gradient: dy_t for each of them."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, token: Tensor, row_of_choice: Tensor, y_sorted: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(token)
        return kernels.combine(y_sorted, row_of_choice)

    @staticmethod
    @first_order(USE_LOOP)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (token,) = ctx.saved_tensors
        return None, None, None, ctx.kernels.permute(contiguous_aligned(dy), token)


def run_cuda(dispatched: Dispatched, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return y_sorted (N, D) by the kernels of moe.cu; tensors on the CPU run them there, slowly.

    Raises InputError for dtypes and shapes that the kernels do not take.
    """
    return _run(_cuda(), dispatched, gate, up, down)


def combine_cuda(y_sorted: Tensor, dispatched: Dispatched) -> Tensor:
    """Return y (T, D), as `layers.dispatch.combine`, by the kernels of moe.cu."""
    return _combine(_cuda(), y_sorted, dispatched)


def run_triton(dispatched: Dispatched, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return y_sorted (N, D) by the Triton kernels; on the CPU only in Triton's interpreter.

    Raises InputError for dtypes and shapes that the kernels do not take.
    """
    return _run(_triton(), dispatched, gate, up, down)


def combine_triton(y_sorted: Tensor, dispatched: Dispatched) -> Tensor:
    """Return y (T, D), as `layers.dispatch.combine`, by the Triton kernels."""
    return _combine(_triton(), y_sorted, dispatched)


KERNELS = {"cuda": Implementation(run_cuda, combine_cuda), "triton": Implementation(run_triton, combine_triton)}


def _cuda() -> Kernels:
    from dsmoe_lite.kernels import cuda

    return cuda


def _triton() -> Kernels:
    from dsmoe_lite.kernels import triton_kernels

    return cast(Kernels, triton_kernels)


def _run(kernels: Kernels, dispatched: Dispatched, *weights: Tensor) -> Tensor:
    token, ends = dispatched.token, dispatched.ends
    x, gates, gate, up, down = map(contiguous_aligned, (dispatched.x, dispatched.gates, *weights))
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, gates, gate, up, down))):
        hidden, _, _ = kernels.gate_up(kernels.permute(x, token), gate, up, gates, ends, False)
        return kernels.multiply(hidden, down, ends)
    hidden, a, b = _GateUp.apply(kernels, token, dispatched.row_of_choice, ends, gates.detach(), x, gate, up)
    return _Down.apply(kernels, ends, hidden, gates, a, b, down)


def _combine(kernels: Kernels, y_sorted: Tensor, dispatched: Dispatched) -> Tensor:
    y_sorted = contiguous_aligned(y_sorted)
    return _Combine.apply(kernels, dispatched.token, dispatched.row_of_choice, y_sorted)
