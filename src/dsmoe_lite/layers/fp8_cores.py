"""Products of FP8 numbers on the FP8 tensor cores of a GPU, by cuBLAS through torch."""

import logging
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, pad, scaled_mm

ALIGNED = 16  # cuBLAS multiplies FP8 matrices whose sides are multiples of it
FIRST_CAPABILITY = (8, 9)  # of a GPU with FP8 tensor cores
TOLERANCE = 1e-2  # of the norm; Hopper's tensor cores add with 14 bits (DeepSeek-V3, Section 3.3.2)


@cache
def available(device: torch.device) -> bool:
    """Whether FP8 products run on `device`. If its cores fail a trial product, the reason is logged once."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FIRST_CAPABILITY:
        return False
    reason = disagreement(device)
    if reason:
        logging.getLogger("dsmoe_lite").warning("FP8 is simulated on %s: %s", device, reason)
    return not reason


def disagreement(device: torch.device) -> str:
    """Return how a trial product differs from the one in float32; an empty line if it does not."""
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, 100, generator=random, device="cpu").to(device, torch.float8_e4m3fn) for side in (33, 40))
    exact = a.float() @ b.float().mT
    try:
        error = float((fp8_product(a, b) - exact).norm() / exact.norm())
    except RuntimeError as refused:  # by cuBLAS
        return str(refused).splitlines()[0]
    return "" if error < TOLERANCE else f"a product differs by {error:.1e} of its norm"


def fp8_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T of a (..., M, K) and b (..., N, K), both float8_e4m3fn: (..., M, N) float32.

    A stack is multiplied one matrix after the other. torch has the same operation on a CPU.
    """
    *stack, M, _ = a.shape
    N = b.shape[-2]
    if 0 in (*a.shape, N):
        return torch.zeros(*stack, M, N, dtype=torch.float32, device=a.device)
    left, right = (_aligned(x.reshape(-1, *x.shape[-2:])) for x in (a, b))
    scale = (torch.ones((), dtype=torch.float32, device=a.device), ScalingType.TensorWise)
    products = [
        scaled_mm(x, y.mT, *scale, *scale, output_dtype=torch.float32) for x, y in zip(left, right, strict=True)
    ]
    return torch.stack(products)[:, :M, :N].view(*stack, M, N)


def _aligned(x: Tensor) -> Tensor:
    """Fill the matrices x (E, R, C) up with zeros, contiguous; a zero adds nothing to a product."""
    R, C = x.shape[-2:]
    filled = pad(x.view(torch.uint8), (0, -C % ALIGNED, 0, -R % ALIGNED))
    return filled.contiguous().view(torch.float8_e4m3fn)
