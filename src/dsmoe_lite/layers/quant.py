"""FP8 numbers with scales per block, as DeepSeek-V3 trains with them (arXiv:2412.19437, Section 3.3), on any device.

A number in E4M3 has 4 bits of exponent and 3 of mantissa: 448 is the largest, 2^-9 the smallest above 0. All numbers of
a block share one scale s = amax / 448, so that the largest becomes 448. Stored are q = E4M3(x / s) and s; x is about
s q. One outlier makes s large for its whole block, and small numbers beside it are lost: hence small blocks.

    y_mn = sum over blocks b of s^a_{m,b} s^w_{n,b} sum_{k in b} q^a_mk q^w_nk

The inner sums run on a GPU's FP8 tensor cores if it has them. Elsewhere they are simulated: float32 holds each product
of two FP8 numbers exactly before it adds them, with more bits than tensor cores do. The outer sum, every `block`
channels, is float32 as there.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsmoe_lite.common.autograd import first_order
from dsmoe_lite.common.errors import RunError, require, require_bool, require_int
from dsmoe_lite.layers import fp8_cores

LARGEST = 448.0  # of E4M3
LEAST_AMAX = 1e-30  # a block of zeros needs a scale, too; DeepSeek's published kernel has 1e-4, too much for gradients

BlockShape = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which numbers share a scale; a block is (rows, channels), None the whole tensor.

    activation: of tokens and their channels, and of gradients; weight: of a weight (out, in).
    """

    activation: BlockShape | None = (1, 128)
    weight: BlockShape | None = (128, 128)
    power_of_two: bool = False  # scales are rounded up to powers of two (E8M0)

    def __post_init__(self) -> None:
        for name in ("activation", "weight"):
            block = getattr(self, name)
            pair = block is None or (isinstance(block, tuple | list) and len(block) == 2)
            require(pair, name, block, "must be a pair (rows, channels), or None for the whole tensor")
            for size in block or ():
                require_int(f"a side of {name}", size, 1)
        require_bool("power_of_two", self.power_of_two)


RECIPES = {
    "v3": Recipe(),
    "tensor": Recipe(activation=None, weight=None),
    "mx": Recipe(activation=(1, 32), weight=(1, 32), power_of_two=True),  # MXFP8's blocks; its scales round down
}


@dataclass(frozen=True)
class Quantized:
    """A matrix in FP8, or a stack of them, with the scale of each block."""

    values: Tensor  # (..., R, C), torch.float8_e4m3fn
    scales: Tensor  # (..., ceil(R / rows), ceil(C / channels)), float32
    block: BlockShape

    def dequantize(self) -> Tensor:
        """Return s q, (..., R, C) float32."""
        return dequantize(self.values, self.scales, self.block)


def quantize(x: Tensor, block: BlockShape | None, *, power_of_two: bool = False) -> Quantized:
    """Quantise the matrices x (..., R, C) in blocks, partial ones at the edges; None: one block per matrix.

    Raises RunError for NaN or infinity.
    """
    require(x.ndim >= 2, "shape of x", tuple(x.shape), "must be (..., rows, channels)")
    R, C = x.shape[-2:]
    rows, channels = (max(1, R), max(1, C)) if block is None else block
    filled = pad(x.float(), (0, -C % channels, 0, -R % rows))  # zeros change no scale
    blocks = filled.unflatten(-1, (-1, channels)).unflatten(-3, (-1, rows))  # (..., row blocks, rows, blocks, channels)
    amax = blocks.abs().amax(dim=(-3, -1))
    if not torch.isfinite(amax).all():
        where = (~torch.isfinite(amax)).nonzero()[0].tolist()
        raise RunError(f"amax of block {tuple(where)}: NaN or infinite; training diverged: lower the learning rate")
    scales = amax.clamp(min=LEAST_AMAX) / LARGEST
    if power_of_two:
        scales = torch.exp2(scales.log2().ceil())
    scaled = (blocks / scales[..., :, None, :, None]).clamp(-LARGEST, LARGEST)  # x / s may round above 448
    return Quantized(scaled.to(torch.float8_e4m3fn).view_as(filled)[..., :R, :C], scales, (rows, channels))


def dequantize(values: Tensor, scales: Tensor, block: BlockShape = (128, 128)) -> Tensor:
    """Return s q of values (..., R, C) and scales (..., ceil(R / rows), ceil(C / channels)), float32.

    Blocks at the edges may be partial, as in the files of DeepSeek-V3: there the scales of `X.weight` are called
    `X.weight_scale_inv`, and multiply all the same.
    """
    *stack, R, C = values.shape
    expected = (*stack, -(-R // block[0]), -(-C // block[1]))
    require(
        tuple(scales.shape) == expected, "shape of scales", tuple(scales.shape), f"must be {expected}, one per block"
    )
    spread = scales.float().repeat_interleave(block[0], dim=-2)[..., :R, :]
    return _to_float(values) * spread.repeat_interleave(block[1], dim=-1)[..., :C]


def multiply(a: Quantized, b: Quantized) -> Tensor:
    """Return a b^T of a (..., M, K) and b (..., N, K), (..., M, N) float32, block by block as in the equation above.

    Raises InputError if the blocks of a and b do not end at the same channels.
    """
    K, side = a.values.shape[-1], a.block[1]
    same = (b.values.shape[-1], b.block[1]) == (K, side)
    require(
        same, "channels and block", (b.values.shape[-1], b.block[1]), f"must be {(K, side)}, as in the other factor"
    )
    M, N = a.values.shape[-2], b.values.shape[-2]
    left, right = _scale_of_row(a).unsqueeze(-2), _scale_of_row(b).unsqueeze(-3)
    on_cores = fp8_cores.available(a.values.device)
    values = (a.values, b.values) if on_cores else (_to_float(a.values), _to_float(b.values))
    y = left.new_zeros(*a.values.shape[:-2], M, N)
    for number, start in enumerate(range(0, K, side)):
        x, w = (factor[..., start : start + side] for factor in values)
        product = fp8_cores.fp8_product(x, w) if on_cores else x @ w.mT
        y.addcmul_(product, left[..., number] * right[..., number])
    return y


def _to_float(values: Tensor) -> Tensor:
    """To float32. On a CPU from a table of the 256 numbers: torch converts one number at a time, five times slower."""
    if not values.is_cpu or values.dtype != torch.float8_e4m3fn:
        return values.float()
    table = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()
    return table.index_select(0, values.contiguous().view(torch.uint8).flatten().int()).view(values.shape)


def _scale_of_row(m: Quantized) -> Tensor:
    """The scales of each row of m, (..., R, blocks of channels)."""
    return m.scales.repeat_interleave(m.block[0], dim=-2)[..., : m.values.shape[-2], :]


def fp8_linear(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    """Return x W^T with forward product and both gradients in FP8.

    x (..., K) and weight (N, K); or the rows of E experts x (E, R, K), each with its own weight (E, N, K).
    """
    fits = weight.ndim == 2 or x.shape[:-2] == weight.shape[:-2]
    require(fits, "shape of weight", tuple(weight.shape), f"must be one matrix, or one for each of x {tuple(x.shape)}")
    rows = x.reshape(-1, x.shape[-1]) if weight.ndim == 2 else x
    y: Tensor = _Linear.apply(rows, weight, recipe)
    return y.view(*x.shape[:-1], weight.shape[-2])


class _Linear(torch.autograd.Function):
    """y = x W^T; dx = dy W; dW = dy^T x, in which blocks run along the tokens. Factors are quantised anew for each.

    DeepSeek-V3 keeps x for the last product in FP8 and changes its blocks there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        return _product(x, weight, recipe.activation, recipe.weight, recipe).to(x.dtype)

    @staticmethod
    @first_order("train in another precision")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        dx = _product(dy, weight.mT, recipe.activation, recipe.weight, recipe)
        d_weight = _product(dy.mT, x.mT, recipe.activation, recipe.activation, recipe)
        return dx.to(x.dtype), d_weight.to(weight.dtype), None


def _product(a: Tensor, b: Tensor, of_a: BlockShape | None, of_b: BlockShape | None, recipe: Recipe) -> Tensor:
    options = {"power_of_two": recipe.power_of_two}
    with torch.autocast(a.device.type, enabled=False):  # which would add the products in half precision
        return multiply(quantize(a, of_a, **options), quantize(b, of_b, **options))
