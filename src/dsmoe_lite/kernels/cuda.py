"""The CUDA C++ kernels of moe.cu on torch's tensors: on a GPU, or, to learn and to test, slowly on the CPU.

Shapes: T tokens, K choices each, N rows in expert order, D model, F expert width, E experts; `ends` (E,) int32 are
cumulative counts, expert e owns rows ends[e-1] .. ends[e]. Tensors are contiguous, float32 or bfloat16, and lie on one
device. InputError says what does not fit; RunError carries what a compiler or a kernel reports.
"""

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require, require_choice, require_int
from dsmoe_lite.kernels.launch import check_ids, check_shape, check_tensors, is_float, launch, library_for

RUNGS = ("naive", "tiled", "wmma", "mma", "hopper")  # as moe.cu numbers them
EVERYWHERE = ("tiled", "mma", "hopper")  # rungs that have all products, not `multiply` alone


def permute(x: Tensor, token: Tensor) -> Tensor:
    """Rows (N, D) with row n = x[token[n]], from x (T, D) and token (N,) int64."""
    check_tensors(x=x)
    check_ids(x.device, token=(token, torch.int64))
    rows = x.new_empty(len(token), x.shape[1])
    launch("permute", x, is_float(x), x, token, len(x), len(token), x.shape[1], rows)
    return rows


def combine(rows: Tensor, row_of_choice: Tensor) -> Tensor:
    """y (T, D), y_t = sum over k of rows[row_of_choice[t, k]] in float32; row_of_choice (T, K) int32, -1: no row."""
    check_tensors(rows=rows)
    check_ids(rows.device, row_of_choice=(row_of_choice, torch.int32))
    (T, K), (N, D) = row_of_choice.shape, rows.shape
    y = rows.new_empty(T, D)
    launch("combine", rows, is_float(rows), rows, row_of_choice, T, N, K, D, y)
    return y


def multiply(rows: Tensor, matrices: Tensor, ends: Tensor, rung: str | None = None) -> Tensor:
    """rows (N, P) times matrices (E, Q, P): row n of expert e becomes matrices[e] @ rows[n], (N, Q).

    rung: one of RUNGS; None takes the best that fits.
    """
    check_tensors(rows=rows, matrices=matrices)
    (N, P), (E, Q, _) = rows.shape, matrices.shape
    _check_ends(ends, rows, E)
    check_shape("matrices", matrices, (E, Q, P))
    out = rows.new_empty(N, Q)
    launch("multiply", rows, _rung(rung, RUNGS, rows, P, Q), is_float(rows), rows, matrices, ends, E, N, Q, P, out)
    return out


def gate_up(
    rows: Tensor, gate: Tensor, up: Tensor, gates: Tensor, ends: Tensor, keep: bool, rung: str | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """hidden = silu(a) * b * gates with a = W_gate x and b = W_up x, (N, F) each; a and b only if `keep`.

    rows (N, D), gate and up (E, F, D), gates (N,).
    """
    check_tensors(rows=rows, gate=gate, up=up, gates=gates)
    (N, D), (E, F, _) = rows.shape, gate.shape
    _check_ends(ends, rows, E)
    check_shape("gate", gate, (E, F, D))
    check_shape("up", up, (E, F, D))
    check_shape("gates", gates, (N,))
    hidden = rows.new_empty(N, F)
    a, b = (torch.empty_like(hidden), torch.empty_like(hidden)) if keep else (None, None)
    number = _rung(rung, EVERYWHERE, rows, D, F)
    launch("gate_up", rows, number, is_float(rows), rows, gate, up, gates, ends, E, N, F, D, hidden, a, b)
    return hidden, a, b


def hidden_backward(
    dy_rows: Tensor, down: Tensor, a: Tensor, b: Tensor, gates: Tensor, ends: Tensor, rung: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return da, db, hidden (N, F) and d_gates (N,) float32, from dy_rows (N, D), down (E, D, F), a and b (N, F).

    With d = W_down^T dy, s = silu(a): hidden = s b g, d_gates = sum of d s b, db = d g s, da = d g b silu'(a).
    da and db take the place of a and b: they are the same tensors.
    """
    check_tensors(dy_rows=dy_rows, down=down, a=a, b=b, gates=gates)
    (N, D), (E, _, F) = dy_rows.shape, down.shape
    _check_ends(ends, dy_rows, E)
    check_shape("down", down, (E, D, F))
    check_shape("a", a, (N, F))
    check_shape("b", b, (N, F))
    check_shape("gates", gates, (N,))
    number = _rung(rung, EVERYWHERE, dy_rows, D, F)
    hidden = torch.empty_like(a)
    slots = library_for(dy_rows).moe_slots(number, F)
    sums = torch.zeros(N, slots, dtype=torch.float32, device=dy_rows.device)
    floats = is_float(dy_rows)
    launch("hidden_backward", dy_rows, number, floats, dy_rows, down, gates, ends, E, N, F, D, a, b, hidden, sums)
    return a, b, hidden, sums.sum(dim=1)


def rows_backward(da: Tensor, db: Tensor, gate: Tensor, up: Tensor, ends: Tensor, rung: str | None = None) -> Tensor:
    """dx_rows (N, D): W_gate^T da + W_up^T db, from da and db (N, F), gate and up (E, F, D)."""
    check_tensors(da=da, db=db, gate=gate, up=up)
    (N, F), (E, _, D) = da.shape, gate.shape
    _check_ends(ends, da, E)
    check_shape("db", db, (N, F))
    check_shape("gate", gate, (E, F, D))
    check_shape("up", up, (E, F, D))
    out = da.new_empty(N, D)
    launch(
        "rows_backward", da, _rung(rung, EVERYWHERE, da, D, F), is_float(da), da, db, gate, up, ends, E, N, D, F, out
    )
    return out


def weights_backward(left: Tensor, right: Tensor, ends: Tensor, rung: str | None = None) -> Tensor:
    """left[e]^T right[e] over the rows of each expert, (E, P, Q); zeros without rows. left (N, P), right (N, Q)."""
    check_tensors(left=left, right=right)
    (N, P), (_, Q), E = left.shape, right.shape, len(ends)
    _check_ends(ends, left, E)
    check_shape("right", right, (N, Q))
    if N == 0:
        return left.new_zeros(E, P, Q)
    out = left.new_empty(E, P, Q)
    number = _rung(rung, EVERYWHERE, left, P, Q)
    launch("weights_backward", left, number, is_float(left), left, right, ends, E, N, P, Q, out)
    return out


def best_rung(x: Tensor, *widths: int) -> str:
    """The rung that `rung=None` means for x and these widths; on the CPU the one that a Hopper GPU would take."""
    if x.dtype == torch.float32 or any(width % 8 for width in widths):  # a copy moves 16 bytes
        return "tiled"
    return "hopper" if not x.is_cuda or torch.cuda.get_device_capability(x.device) == (9, 0) else "mma"


def _check_ends(ends: Tensor, rows: Tensor, E: int) -> None:
    check_ids(rows.device, ends=(ends, torch.int32))
    check_shape("ends", ends, (E,))
    require_int("experts", E, 1)


def _rung(rung: str | None, possible: tuple[str, ...], x: Tensor, *widths: int) -> int:
    if rung is None:
        return RUNGS.index(best_rung(x, *widths))
    require_choice("rung", rung, possible)
    if rung in ("wmma", "mma", "hopper"):
        require(x.dtype == torch.bfloat16, "rung", rung, f"needs bfloat16, not {x.dtype}; use 'tiled'")
    if rung in ("mma", "hopper"):
        fits = all(width % 8 == 0 for width in widths)
        require(fits, "rung", rung, f"needs widths that are multiples of 8, not {list(widths)}; use 'tiled'")
    return RUNGS.index(rung)
