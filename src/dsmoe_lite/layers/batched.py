"""All experts at once: by padded batches (bmm), or by torch's grouped matrix product, with one backward for both.

Autograd would keep five tensors of hidden width and the sorted tokens. Here only a = W_gate x and b = W_up x are kept;
the rest is computed again, block by block, so that a block's tensors stay in the cache.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.layers.dispatch import Dispatched

BLOCK = 2**17  # hidden numbers a block computes at once; measured: as fast as 2^18 to 2^20, in half the memory
WASTE = 1.25  # rows a block may compute for every real one


class Product(Protocol):
    """The rows of every expert, times its own matrix."""

    def __call__(self, rows: Tensor, matrices: Tensor, /, *, out: Tensor | None = None) -> Tensor: ...


class Block(NamedTuple):
    """Neighbouring experts that are computed together."""

    experts: slice
    rows: slice
    shape: tuple[int, ...]  # of its rows: (experts, rows of each) padded, (rows,) grouped


class _SwiGLU(torch.autograd.Function):
    """y_t = sum over rows r of token t of W_down (g_r silu(W_gate x_t) * W_up x_t), with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        product: Product,
        blocks: list[Block],
        token: Tensor,
        x: Tensor,
        gates: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
    ) -> Tensor:
        y, kept = torch.zeros_like(x), []
        for e, rows, shape in blocks:
            x_rows, g = x.index_select(0, token[rows]).view(*shape, x.shape[1]), gates[rows].view(*shape, 1)
            a, b = product(x_rows, gate[e].mT), product(x_rows, up[e].mT)
            hidden = F.silu(a).mul_(b).mul_(g)  # the gate stands before W_down: no product of width D is kept for it
            y.index_add_(0, token[rows], product(hidden, down[e].mT).view(-1, x.shape[1]))
            kept += [a, b]
        ctx.product, ctx.blocks = product, blocks
        ctx.save_for_backward(token, x, gates, gate, up, down, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        token, x, gates, gate, up, down, *kept = ctx.saved_tensors
        product: Product = ctx.product
        dx, dg = torch.zeros_like(x), torch.empty_like(gates)
        whole = len(ctx.blocks) == 1  # then the products are the gradients, else they are written into their places
        d_weights = [None if whole else torch.empty_like(weight) for weight in (gate, up, down)]
        for (e, rows, shape), a, b in zip(ctx.blocks, kept[::2], kept[1::2], strict=True):
            x_rows, dy_rows = (t.index_select(0, token[rows]).view(*shape, x.shape[1]) for t in (x, dy))
            g = gates[rows].view(*shape, 1)
            to_gate, to_up, to_down = (None if d is None else d[e] for d in d_weights)
            s = F.silu(a)
            hidden, d_hidden = s * b, product(dy_rows, down[e])
            torch.sum(d_hidden * hidden, dim=-1, out=dg[rows].view(shape))
            d_down = product(dy_rows.mT, hidden.mul_(g), out=to_down)
            del dy_rows, hidden
            db = s.mul_(d_hidden.mul_(g))
            da = torch.ops.aten.silu_backward(d_hidden.mul_(b), a)
            d_gate, d_up = product(da.mT, x_rows, out=to_gate), product(db.mT, x_rows, out=to_up)
            del x_rows
            dx_rows = product(da, gate[e])
            dx_rows += product(db, up[e])
            dx.index_add_(0, token[rows], dx_rows.view(-1, x.shape[1]))
            if whole:
                d_weights = [d_gate, d_up, d_down]
        return None, None, None, dx, dg, *d_weights


def run_grouped(sent: Dispatched, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Multiply every expert's rows by its matrix in one call of F.grouped_mm. InputError where torch has none."""
    if not can_group(sent.x, gate):
        raise InputError(
            f"backend: 'grouped' needs float32, bfloat16 or float16 and widths of a multiple of 16 bytes, got "
            f"{sent.x.dtype} of {sent.x.shape[1]} and {gate.shape[1]}; use 'padded'"
        )

    def product(rows: Tensor, matrices: Tensor, /, *, out: Tensor | None = None) -> Tensor:
        return F.grouped_mm(rows, matrices, offs=sent.ends)

    everything = [Block(slice(None), slice(None), (len(sent.token),))]
    return _SwiGLU.apply(product, everything, sent.token, sent.x, sent.gates, gate, up, down)


def can_group(x: Tensor, gate: Tensor) -> bool:
    """Whether F.grouped_mm takes these tensors."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    return all(width * x.itemsize % 16 == 0 for width in gate.shape[1:])


def run_padded(sent: Dispatched, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Cut the experts into blocks; in a block each gets as many rows as the busiest, and one bmm multiplies all."""
    T, counts = len(sent.x), sent.counts
    blocks = cut_blocks(counts, gate.shape[1])
    place = _padded_places(sent.ends, counts, blocks)
    size = blocks[-1].rows.stop
    # a padding row reads a token of zeros, which stands last, with gate 0
    token = torch.full((size,), T, device=place.device).index_copy(0, place, sent.token)
    gates = sent.gates.new_zeros(size).index_copy(0, place, sent.gates)
    return _SwiGLU.apply(torch.bmm, blocks, token, F.pad(sent.x, (0, 0, 0, 1)), gates, gate, up, down)[:T]


def cut_blocks(counts: list[int], width: int) -> list[Block]:
    """Put neighbouring experts in a block until it is large enough, or an expert would make others pad too much."""
    blocks, first, start, most, real = [], 0, 0, 0, 0
    for e, count in enumerate([*counts, 0]):
        n, rows = e - first, max(most, count)
        full = (n + 1) * rows * width > BLOCK or (n + 1) * rows > WASTE * (real + count) + 16
        if n and (full or e == len(counts)):
            blocks.append(Block(slice(first, e), slice(start, start + n * most), (n, most)))
            first, start, most, real = e, start + n * most, 0, 0
        most, real = max(most, count), real + count
    return blocks


def _padded_places(ends: Tensor, counts: list[int], blocks: list[Block]) -> Tensor:
    """Return where each sorted row stands among the blocks' padded rows, (N,)."""
    padded_starts = [b.rows.start + i * b.shape[1] for b in blocks for i in range(b.shape[0])]
    count = torch.tensor(counts, device=ends.device)
    shift = torch.tensor(padded_starts, device=ends.device) - (ends - count)
    rows = int(ends[-1])
    return torch.arange(rows, device=ends.device) + shift.repeat_interleave(count, output_size=rows)
