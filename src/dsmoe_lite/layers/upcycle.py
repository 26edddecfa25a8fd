"""One FFN as several narrower ones: the identity behind fine-grained experts."""

import torch

from dsmoe_lite.common.errors import require, require_int
from dsmoe_lite.layers.ffn import SwiGLU


@torch.no_grad()
def split_expert(ffn: SwiGLU, m: int) -> list[SwiGLU]:
    """Return m experts of 1/m of the width whose outputs sum to `ffn`'s (DeepSeekMoE, arXiv:2401.06066, Section 3.1).

    SwiGLU works on each hidden channel by itself and adds the channels up, so they may be shared out in any way; here
    neighbours stay together. Weights are copied. Raises InputError if m does not divide the width.
    """
    width, d_model = ffn.gate.weight.shape
    require_int("m", m, 1, width)
    require(width % m == 0, "m", m, f"must divide the width {width}")
    parts = [SwiGLU(d_model, width // m, ffn.limit).to(ffn.gate.weight) for _ in range(m)]
    for part, gate, up, down in zip(
        parts, ffn.gate.weight.chunk(m), ffn.up.weight.chunk(m), ffn.down.weight.chunk(m, dim=1), strict=True
    ):
        part.gate.weight.copy_(gate)
        part.up.weight.copy_(up)
        part.down.weight.copy_(down)
    return parts
