"""One FFN split in m narrower ones: the same function, and the same gradients."""

import pytest
import torch

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.layers.ffn import SwiGLU
from dsmoe_lite.layers.upcycle import split_expert

WIDTH = 12


@pytest.mark.parametrize("m", [m for m in range(1, WIDTH + 1) if WIDTH % m == 0])
@pytest.mark.parametrize("seed", range(2))
def test_the_parts_sum_to_the_whole(m: int, seed: int) -> None:
    torch.manual_seed(seed)
    ffn = SwiGLU(7, WIDTH).double()
    for weight in ffn.parameters():
        torch.nn.init.normal_(weight)
    parts = split_expert(ffn, m)
    x, target = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(5, 7, dtype=torch.float64)
    whole, total = ffn(x), sum(part(x) for part in parts)
    assert isinstance(total, torch.Tensor)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    assert [part.gate.weight.shape for part in parts] == [(WIDTH // m, 7)] * m
    assert [part.down.weight.shape for part in parts] == [(7, WIDTH // m)] * m
    dx, *of_whole = torch.autograd.grad((whole * target).sum(), [x, *ffn.parameters()])
    weights = [weight for part in parts for weight in part.parameters()]  # gate, up, down; gate, up, ...
    dx_parts, *of_parts = torch.autograd.grad((total * target).sum(), [x, *weights])
    torch.testing.assert_close(dx_parts, dx, rtol=1e-12, atol=1e-12)
    for index, gradient in enumerate(of_whole):
        joined = torch.cat(of_parts[index::3], dim=1 if index == 2 else 0)
        torch.testing.assert_close(joined, gradient, rtol=1e-12, atol=1e-12)


def test_weights_are_copies_of_the_same_type() -> None:
    ffn = SwiGLU(7, WIDTH).bfloat16()
    before = [weight.clone() for weight in ffn.parameters()]
    for part in split_expert(ffn, 3):
        for weight in part.parameters():
            assert weight.dtype == torch.bfloat16
            assert weight.requires_grad
            torch.nn.init.zeros_(weight)
    assert all(torch.equal(old, new) for old, new in zip(before, ffn.parameters(), strict=True))


@pytest.mark.parametrize("m", [0, -1, 5, 24, 1.5, True])
def test_other_numbers_are_refused(m: object) -> None:
    with pytest.raises(InputError, match=f"^m = {m}: must ") as error:
        split_expert(SwiGLU(7, WIDTH), m)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_parts_clamp_as_the_whole_does() -> None:
    torch.manual_seed(0)
    ffn = SwiGLU(7, 24, limit=0.1)
    x = 5 * torch.randn(3, 7)
    torch.testing.assert_close(sum(part(x) for part in split_expert(ffn, 4)), ffn(x))
