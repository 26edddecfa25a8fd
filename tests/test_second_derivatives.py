"""Second derivatives of experts: right with backend "loop", refused by every other, however they are asked for."""

from collections.abc import Callable

import pytest
import torch
from needs import needs_gxx
from torch import Tensor

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.kernels.cuda_router import Rule, route
from dsmoe_lite.layers.dispatch import sum_by_token
from dsmoe_lite.layers.moe import MoELayer

CUDA = pytest.param("cuda", marks=needs_gxx)
REFUSING = ["padded", "grouped", "auto", CUDA]


def made(backend: str, **settings: object) -> tuple[MoELayer, Tensor]:
    torch.manual_seed(0)
    config = MoEConfig(n_routed_experts=4, top_k=2, expert_width=16, backend=backend, **settings)
    layer = MoELayer(16, config, 32)
    for weight in layer.experts.parameters():
        weight.data.mul_(15)
    return layer, torch.randn(2, 5, 16, requires_grad=True)


def gradient_penalty(layer: MoELayer, x: Tensor) -> None:
    (g,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    torch.autograd.grad(g.square().sum(), x)


def constant_gradient(layer: MoELayer, x: Tensor) -> None:
    (g,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    torch.autograd.grad(g.square().sum(), x)


def hessian_of_weights(layer: MoELayer, x: Tensor) -> None:
    (g,) = torch.autograd.grad(layer(x)[0].square().sum(), layer.experts.up, create_graph=True)
    torch.autograd.grad(g.sum(), layer.experts.down)


def backward_that_keeps_a_graph(layer: MoELayer, x: Tensor) -> None:
    layer(x)[0].square().sum().backward(create_graph=True)


def hessian_vector_product(layer: MoELayer, x: Tensor) -> None:
    torch.autograd.functional.hvp(lambda x: layer(x)[0].square().sum(), x, torch.ones_like(x))


ASKED = [gradient_penalty, constant_gradient, hessian_of_weights, backward_that_keeps_a_graph, hessian_vector_product]


@pytest.mark.parametrize("backend", REFUSING)
@pytest.mark.parametrize("ask", ASKED, ids=lambda ask: ask.__name__)
def test_a_backend_without_them_refuses(backend: str, ask: Callable[[MoELayer, Tensor], None]) -> None:
    with pytest.raises(InputError, match=r"create_graph = True: .* backend='loop'"):
        ask(*made(backend))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_refuse_too(dtype: torch.dtype) -> None:
    layer, x = made("auto")
    with pytest.raises(InputError, match="backend='loop'"):
        gradient_penalty(layer.to(dtype), x.detach().to(dtype).requires_grad_())


@pytest.mark.parametrize("backend", ["loop", *REFUSING])
def test_first_derivatives_stay(backend: str) -> None:
    layer, x = made(backend)
    reference, _ = made("loop")
    (ours,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    (theirs,) = torch.autograd.grad(reference(x)[0].square().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_the_loop_is_right(shared: int, scoring_func: str) -> None:
    layer, _ = made("loop", n_shared_experts=shared, scoring_func=scoring_func)
    layer = layer.double()
    x = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x)


def test_sums_by_token_have_them() -> None:
    rows, token = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([2, 0, 0, 1, 2])
    assert torch.autograd.gradgradcheck(lambda rows: sum_by_token(rows, token, 4).sin(), rows)


@needs_gxx
def test_the_router_kernel_refuses() -> None:
    logits = torch.randn(6, 8, requires_grad=True)
    _, _, gates, _ = route(logits, Rule(top_k=2))
    with pytest.raises(InputError, match=r"use layers\.router\.Router"):
        torch.autograd.grad(gates.square().sum(), logits, create_graph=True)
