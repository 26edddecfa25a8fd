"""All experts at once: in padded batches (bmm) or by torch's grouped matrix product, with one backward pass for both.

Autograd would keep five tensors of hidden width and the sorted tokens. Here only a = W_gate x and b = W_up x are kept;
the rest is computed again, block by block, so that the tensors of one block stay in the CPU's cache.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dsmoe_lite.common.autograd import first_order
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.layers.dispatch import USE_LOOP, Dispatched
from dsmoe_lite.layers.ffn import clamp

BLOCK = 2**17  # hidden numbers that a block computes at once; measured: as fast as 2^18 to 2^20, in half the memory
WASTE = 1.25  # rows that a block may compute for each real row


class Product(Protocol):
    """The rows of every expert times the expert's own matrix."""

    def __call__(self, rows: Tensor, matrices: Tensor, out: Tensor | None = None) -> Tensor: ...
    def add_to(self, total: Tensor, rows: Tensor, matrices: Tensor) -> Tensor: ...


class PaddedProduct:
    """torch.bmm: the rows of every expert are padded to the same number, (experts, rows, width)."""

    def __call__(self, rows: Tensor, matrices: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the product, written to `out` if one is given."""
        return torch.bmm(rows, matrices) if out is None else torch.bmm(rows, matrices, out=out)

    def add_to(self, total: Tensor, rows: Tensor, matrices: Tensor) -> Tensor:
        """Add the product to `total`, in place."""
        return total.baddbmm_(rows, matrices)


@dataclass(frozen=True)
class GroupedProduct:
    """F.grouped_mm: the rows of all experts in one matrix (N, width), expert e's up to ends[e]."""

    ends: Tensor  # (E,) int32

    def __call__(self, rows: Tensor, matrices: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the product, copied to `out` if one is given: F.grouped_mm cannot write there itself."""
        product = F.grouped_mm(rows, matrices, offs=self.ends)
        return product if out is None else out.copy_(product)

    def add_to(self, total: Tensor, rows: Tensor, matrices: Tensor) -> Tensor:
        """Add the product to `total`, in place."""
        return total.add_(self(rows, matrices))


class Block(NamedTuple):
    """Neighbouring experts that are computed together."""

    experts: slice
    rows: slice  # in expert order
    slots: slice  # its rows and its padding, among those of all blocks
    shape: tuple[int, ...]  # of the slots: (experts, slots of each) if padded, else (rows,)
    counts: list[int]  # rows of each expert, if padded


class _SwiGLU(torch.autograd.Function):
    """y_r = W_down (g_r silu(W_gate x_r) * W_up x_r) for every row r, by the weights of its expert; with gradients.

    row: the row of each slot, any for padding; None if nothing is padded. token and gates: of each slot. limit: of
    `ffn.clamp`; a number beyond it gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        product: Product,
        blocks: list[Block],
        row: Tensor | None,
        token: Tensor,
        x: Tensor,
        gates: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        limit: float | None,
    ) -> Tensor:
        D, saved = x.shape[1], []
        y_sorted = x.new_empty(0 if row is None else blocks[-1].rows.stop, D)
        for block in blocks:
            e, shape = block.experts, block.shape
            x_slots, g = x.index_select(0, token[block.slots]).view(*shape, D), gates[block.slots].view(*shape, 1)
            a, b = product(x_slots, gate[e].mT), product(x_slots, up[e].mT)
            within_a, within_b = clamp(a, b, limit)
            hidden = (
                F.silu(within_a).mul_(within_b).mul_(g)
            )  # the gate comes before W_down: no product of width D is kept for it
            y_slots = product(hidden, down[e].mT)
            y_sorted = y_slots if row is None else _unpad(y_slots, block, y_sorted)
            saved += [a, b]
        ctx.product, ctx.blocks, ctx.limit = product, blocks, limit
        ctx.save_for_backward(row, token, x, gates, gate, up, down, *saved)
        return y_sorted

    @staticmethod
    @first_order(USE_LOOP)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        row, token, x, gates, gate, up, down, *saved = ctx.saved_tensors
        product: Product = ctx.product
        dx, dg, D = torch.zeros_like(x), torch.empty_like(gates), x.shape[1]
        single = len(ctx.blocks) == 1  # then the products are the gradients, else each is written into its slice
        d_weights = [None if single else torch.empty_like(weight) for weight in (gate, up, down)]
        for block, a, b in zip(ctx.blocks, saved[::2], saved[1::2], strict=True):
            e, slots, shape = block.experts, block.slots, block.shape
            dy_slots, g = _pad(dy, block, row), gates[slots].view(*shape, 1)
            to_gate, to_up, to_down = (None if d is None else d[e] for d in d_weights)
            within_a, within_b = clamp(a, b, ctx.limit)
            s = F.silu(within_a)
            hidden, d_hidden = s * within_b, product(dy_slots, down[e])
            torch.sum(d_hidden * hidden, dim=-1, out=dg[slots].view(shape))
            d_down = product(dy_slots.mT, hidden.mul_(g), out=to_down)
            del dy_slots, hidden
            db = s.mul_(d_hidden.mul_(g))
            da = torch.ops.aten.silu_backward(d_hidden.mul_(within_b), within_a)
            if ctx.limit is not None:
                da.mul_(a <= ctx.limit)
                db.mul_(b.abs() <= ctx.limit)
            del d_hidden
            x_slots = x.index_select(0, token[slots]).view(*shape, D)
            d_gate, d_up = product(da.mT, x_slots, out=to_gate), product(db.mT, x_slots, out=to_up)
            del x_slots
            dx_slots = product.add_to(product(da, gate[e]), db, up[e])
            dx.index_add_(0, token[slots], dx_slots.view(-1, D))
            if single:
                d_weights = [d_gate, d_up, d_down]
        return None, None, None, None, dx, dg, *d_weights, None


def _pad(dy: Tensor, block: Block, row: Tensor | None) -> Tensor:
    """Copy the rows of a block to their slots; padding is zero."""
    if row is None:
        return dy.contiguous()  # F.grouped_mm does not take the stride 0 of a sum's gradient
    dy_slots = dy.index_select(0, row[block.slots]).view(*block.shape, dy.shape[1])
    for slots, count in zip(dy_slots, block.counts, strict=True):
        slots[count:] = 0
    return dy_slots


def _unpad(y_slots: Tensor, block: Block, y_sorted: Tensor) -> Tensor:
    """Copy the rows of a block from their slots into y_sorted."""
    rows = [slots[:count] for slots, count in zip(y_slots, block.counts, strict=True)]
    torch.cat(rows, out=y_sorted[block.rows])
    return y_sorted


def run_grouped(dispatched: Dispatched, gate: Tensor, up: Tensor, down: Tensor, limit: float | None = None) -> Tensor:
    """Return y_sorted (N, D); one call of F.grouped_mm multiplies the rows of every expert by its matrix.

    Raises InputError for dtypes and widths that F.grouped_mm does not take.
    """
    x, gates, token = dispatched.x, dispatched.gates, dispatched.token
    if not can_group(x, gate):
        raise InputError(
            f"backend: 'grouped' needs float32, bfloat16 or float16 and widths of a multiple of 16 bytes, got "
            f"{x.dtype} of {x.shape[1]} and {gate.shape[1]}; use 'padded'"
        )
    everything = [Block(slice(None), slice(None), slice(None), (len(token),), [])]
    return _SwiGLU.apply(GroupedProduct(dispatched.ends), everything, None, token, x, gates, gate, up, down, limit)


def can_group(x: Tensor, gate: Tensor) -> bool:
    """Whether F.grouped_mm takes tokens like x and weights `gate` (E, F, D)."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    return all(width * x.itemsize % 16 == 0 for width in gate.shape[1:])


def run_padded(dispatched: Dispatched, gate: Tensor, up: Tensor, down: Tensor, limit: float | None = None) -> Tensor:
    """Return y_sorted (N, D), by blocks: each expert gets as many slots as the busiest, and one bmm multiplies all."""
    x, T, N, counts = dispatched.x, len(dispatched.x), len(dispatched.choice), dispatched.counts
    blocks = cut_blocks(counts, gate.shape[1])
    row = row_of_slot(blocks, N).to(x.device)
    # a padding slot reads a token of zeros, appended to x, and has gate 0
    token = F.pad(dispatched.token, (0, 1), value=T).index_select(0, row)
    gates = F.pad(dispatched.gates, (0, 1)).index_select(0, row)
    x, row = F.pad(x, (0, 0, 0, 1)), row.clamp(max=N - 1)
    return _SwiGLU.apply(PaddedProduct(), blocks, row, token, x, gates, gate, up, down, limit)


def row_of_slot(blocks: list[Block], n_rows: int) -> Tensor:
    """Return the row in every slot of all blocks, n_rows in padding."""
    rows = torch.arange(n_rows, device="cpu")
    padded = [pad_sequence(rows[b.rows].split(b.counts), batch_first=True, padding_value=n_rows) for b in blocks]
    return torch.cat([part.flatten() for part in padded])


def cut_blocks(counts: list[int], width: int) -> list[Block]:
    """Put neighbouring experts in a block until it is large enough, or an expert would make others pad too much."""
    blocks, first, row, slot, most, real = [], 0, 0, 0, 0, 0
    for e, count in enumerate([*counts, 0]):
        n, rows = e - first, max(most, count)
        full = (n + 1) * rows * width > BLOCK or (n + 1) * rows > WASTE * (real + count) + 16
        if n and (full or e == len(counts)):
            rows_of_block, slots = slice(row, row + real), slice(slot, slot + n * most)
            blocks.append(Block(slice(first, e), rows_of_block, slots, (n, most), counts[first:e]))
            first, row, slot, most, real = e, rows_of_block.stop, slots.stop, 0, 0
        most, real = max(most, count), real + count
    return blocks
