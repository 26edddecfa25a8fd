"""First derivatives only: refuse a second derivative through a hand-written backward pass."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from dsmoe_lite.common.errors import InputError

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_order(remedy: str) -> Callable[[Backward], Backward]:
    """Decorate the `backward` of an autograd Function: raise InputError if autograd records it (create_graph=True).

    torch's `once_differentiable` raises only when .backward() reaches its error node. torch.autograd.grad never visits
    that node, and returns a wrong second derivative.
    """

    def decorate(backward: Backward) -> Backward:
        @wraps(backward)
        def checked(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():
                raise InputError(f"create_graph = True: there is no second derivative here; {remedy}")
            return backward(ctx, *gradients)

        return checked

    return decorate
