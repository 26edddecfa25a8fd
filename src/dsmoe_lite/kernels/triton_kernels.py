"""The kernels of one MoE layer in Triton: tensors in, tensors out. On a CPU they run in Triton's interpreter.

Rows stand in expert order, and `ends` (E,) int32 holds the cumulative counts: expert e owns rows ends[e-1] .. ends[e],
and ends[E-1] = N; it stays on the device. Products are added up in float32, sizes need not tile, an expert may have no
rows. Importing raises RunError if Triton is missing, InputError if TRITON_INTERPRET was set too late.
"""

import os
from typing import Any

import torch
from torch import Tensor

from dsmoe_lite.common.errors import InputError, RunError, require

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise RunError("triton is not installed: pip install triton (Linux only), or use another backend") from error

INTERPRETED = bool(triton.knobs.runtime.interpret)  # what @triton.jit below goes by
if isinstance(tl.sum, triton.JITFunction) == INTERPRETED:  # what it went by when triton itself was imported
    value = os.environ.get("TRITON_INTERPRET")
    raise InputError(f"TRITON_INTERPRET = {value!r}: it changed after triton was imported; set it before Python starts")


# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, programs for each multiprocessor: at most 128 sums a thread and 227 KiB of
# shared memory, in 16 bit. The last is for float32, which no tensor core multiplies exactly, and for smaller GPUs.
HOPPER = (
    (128, 256, 64, 8, 4, 1),
    (128, 128, 64, 8, 4, 1),
    (128, 128, 64, 4, 3, 2),
    (64, 256, 64, 4, 3, 1),
    (64, 128, 64, 4, 4, 2),
    (64, 64, 32, 4, 3, 2),
)
TILES = ((16, 32, 16, 4, 1, 4),) if INTERPRETED else HOPPER
BAND = 8  # rows of tiles that go through a matrix together, while its columns are in the L2 cache
FUSED = {"enable_fp_fusion": True}  # x y + z in one instruction, said here because Triton warns where nothing is said
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INDEX_DTYPES = {"ends": torch.int32, "row_of_choice": torch.int32, "token": torch.int64}

# A kernel takes BITS, how many N has, only so that tiles are tuned again when N doubles, and PER_SM only for its grid.
# BLOCK_M x BLOCK_N is the tile of the output a program computes at a time, BLOCK_K what its sum advances by.


@triton.jit
def _tiles_until(
    ends: tl.tensor, E: tl.tensor, columns: tl.tensor, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr
) -> tl.tensor:
    """How many tiles there are up to each expert's last, (BLOCK_E,)."""
    e = tl.arange(0, BLOCK_E)
    stop = tl.load(ends + e, mask=e < E, other=0)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
    return tl.cumsum(tl.cdiv(stop - start, BLOCK_M) * columns)


@triton.jit
def _find_tile(
    tile: tl.tensor, until: tl.tensor, ends: tl.tensor, columns: tl.tensor, BLOCK_M: tl.constexpr, BAND: tl.constexpr
) -> tl.tensor:
    """A tile's expert, its first row, how many rows its expert has from there on, and its column of tiles."""
    expert = tl.sum((until <= tile).to(tl.int32))
    tile -= tl.max(tl.where(until <= tile, until, 0))  # from here on counted within the expert
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(ends + expert)
    band = tile // (BAND * columns)
    height = tl.minimum(tl.cdiv(stop - start, BLOCK_M) - band * BAND, BAND)
    within = tile - band * BAND * columns
    row = start + (band * BAND + within % height) * BLOCK_M
    return expert.to(tl.int64), row.to(tl.int64), stop - row, within // height  # int64: E * F * D may exceed 2^31


@triton.jit
def _add_product(
    total: tl.tensor, left: tl.tensor, right: tl.tensor, K: tl.tensor, left_step: tl.tensor, right_step: tl.tensor,
    m_inside: tl.tensor, n_inside: tl.tensor, BLOCK_K: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """The total (M, N) + left (M, K) @ right (K, N), whose pointers are to their first BLOCK_K columns and rows."""
    k = tl.arange(0, BLOCK_K)
    for first in range(0, K, BLOCK_K):
        k_inside = k < K - first
        a = tl.load(left, mask=m_inside[:, None] & k_inside[None, :], other=0.0)
        b = tl.load(right, mask=k_inside[:, None] & n_inside[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += left_step
        right += right_step
    return total


@triton.jit
def _add_rows(
    out: tl.tensor, rows: tl.tensor, row_of_choice: tl.tensor, T: tl.tensor, D: tl.tensor, K: tl.tensor,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
) -> None:  # fmt: skip
    """out[t] = sum_k rows[row_of_choice[t, k]], -1 adds nothing."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    t_inside, d_inside, t = t < T, d < D, t.to(tl.int64)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in range(K):
        n = tl.load(row_of_choice + t * K + k, mask=t_inside, other=-1).to(tl.int64)
        inside = (n >= 0)[:, None] & d_inside[None, :]
        total += tl.load(rows + n[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    at = out + t[:, None] * D + d[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=t_inside[:, None] & d_inside[None, :])


@triton.jit(do_not_specialize=["BITS"])
def _gate_up(
    hidden: tl.tensor, a: tl.tensor, b: tl.tensor, left: tl.tensor, gate: tl.tensor, up: tl.tensor,
    gates: tl.tensor, ends: tl.tensor, F: tl.tensor, D: tl.tensor, E: tl.tensor, BITS: tl.tensor,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
    PER_SM: tl.constexpr
) -> None:  # fmt: skip
    """a = left @ gate[e].T, b = left @ up[e].T, hidden = silu(a) b g; both products read a tile of rows once."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    columns = tl.cdiv(F, BLOCK_N)
    until = _tiles_until(ends, E, columns, BLOCK_E, BLOCK_M)
    for tile in range(tl.program_id(0), tl.max(until), tl.num_programs(0)):
        expert, row, rows, column = _find_tile(tile, until, ends, columns, BLOCK_M, BAND)
        f = column * BLOCK_N + n
        m_inside, f_inside = m < rows, f < F
        at_left = left + row * D + m[:, None] * D + k[None, :]
        matrix, inner = expert * F * D, f[None, :] * D + k[:, None]
        at_gate, at_up = gate + matrix + inner, up + matrix + inner
        sum_a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sum_b = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, D, BLOCK_K):
            k_inside = k < D - first
            x = tl.load(at_left, mask=m_inside[:, None] & k_inside[None, :], other=0.0)
            inside = k_inside[:, None] & f_inside[None, :]
            sum_a = tl.dot(x, tl.load(at_gate, mask=inside, other=0.0), sum_a, input_precision="ieee")
            sum_b = tl.dot(x, tl.load(at_up, mask=inside, other=0.0), sum_b, input_precision="ieee")
            at_left += BLOCK_K
            at_gate += BLOCK_K
            at_up += BLOCK_K
        g = tl.load(gates + row + m, mask=m_inside, other=0.0).to(tl.float32)
        inside = m_inside[:, None] & f_inside[None, :]
        at, inner = row * F, m[:, None] * F + f[None, :]
        value = sum_a * tl.sigmoid(sum_a) * sum_b * g[:, None]
        tl.store(hidden + at + inner, value.to(hidden.dtype.element_ty), mask=inside)
        if a is not None:
            tl.store(a + at + inner, sum_a.to(a.dtype.element_ty), mask=inside)
            tl.store(b + at + inner, sum_b.to(b.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["BITS"])
def _multiply(
    out: tl.tensor, left: tl.tensor, right: tl.tensor, left2: tl.tensor, right2: tl.tensor, ends: tl.tensor,
    P: tl.tensor, K: tl.tensor, E: tl.tensor, BITS: tl.tensor, TRANSPOSED: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr, PER_SM: tl.constexpr
) -> None:  # fmt: skip
    """out = left @ right[e] + left2 @ right2[e], right (E, K, P), or (E, P, K) where TRANSPOSED."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    columns = tl.cdiv(P, BLOCK_N)
    until = _tiles_until(ends, E, columns, BLOCK_E, BLOCK_M)
    for tile in range(tl.program_id(0), tl.max(until), tl.num_programs(0)):
        expert, row, rows, column = _find_tile(tile, until, ends, columns, BLOCK_M, BAND)
        p = column * BLOCK_N + n
        m_inside, p_inside = m < rows, p < P
        at_left, in_left, matrix = row * K, m[:, None] * K + k[None, :], expert * K * P
        if TRANSPOSED:
            in_right, step = p[None, :] * K + k[:, None], BLOCK_K
        else:
            in_right, step = k[:, None] * P + p[None, :], BLOCK_K * P
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        x, w = left + at_left + in_left, right + matrix + in_right
        total = _add_product(total, x, w, K, BLOCK_K, step, m_inside, p_inside, BLOCK_K)
        if left2 is not None:
            x, w = left2 + at_left + in_left, right2 + matrix + in_right
            total = _add_product(total, x, w, K, BLOCK_K, step, m_inside, p_inside, BLOCK_K)
        at = out + row * P + m[:, None] * P + p[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=m_inside[:, None] & p_inside[None, :])


@triton.jit
def _finish_hidden(
    d: tl.tensor, hidden: tl.tensor, a: tl.tensor, b: tl.tensor, g: tl.tensor, m_inside: tl.tensor,
    stride: tl.tensor, columns: tl.tensor
) -> tl.tensor:  # fmt: skip
    """What `_hidden_backward` makes of d (M, N), 16 columns at a time: all at once, registers spill by kilobytes."""
    half: tl.constexpr = d.shape[1] // 2
    if half >= 16:
        d0, d1 = tl.split(tl.permute(tl.reshape(d, (d.shape[0], 2, half)), (0, 2, 1)))
        sums = _finish_hidden(d0, hidden, a, b, g, m_inside, stride, columns)
        sums += _finish_hidden(d1, hidden + half, a + half, b + half, g, m_inside, stride, columns - half)
    else:
        m, n = tl.arange(0, d.shape[0]), tl.arange(0, d.shape[1])
        at = m[:, None] * stride + n[None, :]
        inside = m_inside[:, None] & (n < columns)[None, :]
        of_a = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
        of_b = tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
        tl.debug_barrier()  # no thread may write over a number another has yet to read
        sigma = tl.sigmoid(of_a)
        s = of_a * sigma
        sums = tl.sum(d * s * of_b, 1)
        tl.store(hidden + at, (s * of_b * g[:, None]).to(hidden.dtype.element_ty), mask=inside)
        d *= g[:, None]
        tl.store(a + at, (d * of_b * (sigma + s * (1 - sigma))).to(a.dtype.element_ty), mask=inside)
        tl.store(b + at, (d * s).to(b.dtype.element_ty), mask=inside)
    return sums


@triton.jit(do_not_specialize=["BITS"])
def _hidden_backward(
    hidden: tl.tensor, partial: tl.tensor, a: tl.tensor, b: tl.tensor, left: tl.tensor, down: tl.tensor,
    gates: tl.tensor, ends: tl.tensor, F: tl.tensor, D: tl.tensor, PARTS: tl.tensor, E: tl.tensor, BITS: tl.tensor,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
    PER_SM: tl.constexpr
) -> None:  # fmt: skip
    """From d = left @ down[e] the gradients of a and b, in their places, hidden, and d_gates' sum over a tile."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    columns = tl.cdiv(F, BLOCK_N)
    until = _tiles_until(ends, E, columns, BLOCK_E, BLOCK_M)
    for tile in range(tl.program_id(0), tl.max(until), tl.num_programs(0)):
        expert, row, rows, column = _find_tile(tile, until, ends, columns, BLOCK_M, BAND)
        f = column * BLOCK_N + n
        m_inside, f_inside = m < rows, f < F
        at_left = left + row * D + m[:, None] * D + k[None, :]
        at_down = down + expert * D * F + k[:, None] * F + f[None, :]
        d = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        d = _add_product(d, at_left, at_down, D, BLOCK_K, BLOCK_K * F, m_inside, f_inside, BLOCK_K)
        g = tl.load(gates + row + m, mask=m_inside, other=0.0).to(tl.float32)
        first = row * F + column * BLOCK_N
        sums = _finish_hidden(d, hidden + first, a + first, b + first, g, m_inside, F, F - column * BLOCK_N)
        tl.store(partial + (row + m) * PARTS + column, sums, mask=m_inside)


@triton.jit(do_not_specialize=["BITS"])
def _weights_backward(
    out: tl.tensor, left: tl.tensor, right: tl.tensor, ends: tl.tensor, P: tl.tensor, Q: tl.tensor, E: tl.tensor,
    BITS: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PER_SM: tl.constexpr
) -> None:  # fmt: skip
    """out[e] = left[rows of e].T @ right[rows of e]; the sum runs over rows."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    columns = tl.cdiv(Q, BLOCK_N)
    tiles = tl.cdiv(P, BLOCK_M) * columns
    for tile in range(tl.program_id(0), E * tiles, tl.num_programs(0)):
        expert, within = tile // tiles, tile % tiles
        start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        rows, start = tl.load(ends + expert) - start, start.to(tl.int64)
        p, q = within // columns * BLOCK_M + m, within % columns * BLOCK_N + n
        at_left = left + start * P + k[None, :] * P + p[:, None]
        at_right = right + start * Q + k[:, None] * Q + q[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total = _add_product(total, at_left, at_right, rows, BLOCK_K * P, BLOCK_K * Q, p < P, q < Q, BLOCK_K)
        at = out + expert.to(tl.int64) * P * Q + p[:, None] * Q + q[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=(p < P)[:, None] & (q < Q)[None, :])


def _tuned(kernel: Any, key: str, share: int = 1, **changed: list[str]) -> Any:
    """The kernel, which at its first launch for these sizes tries TILES, BLOCK_N // share wide, and keeps the fastest.

    `changed` names what must be as before at each trial: reset_to_zero, restore_value.
    """
    configs = [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n // share, "BLOCK_K": k, "PER_SM": per_sm}, warps, stages)
        for m, n, k, warps, stages, per_sm in TILES
    ]

    def prune(configs: list[Any], args: dict[str, Any], **_: Any) -> list[Any]:
        return configs[-1:] if args["left"].dtype == torch.float32 else configs

    pruned = {"early_config_prune": prune}
    tune = triton.autotune(configs, [*key.split(), "BITS"], prune_configs_by=pruned, cache_results=True, **changed)
    return tune(kernel)


GATE_UP = _tuned(_gate_up, "F D E", share=2)  # it holds two sums
MULTIPLY = _tuned(_multiply, "P K E TRANSPOSED")
HIDDEN_BACKWARD = _tuned(_hidden_backward, "F D E", reset_to_zero=["partial"], restore_value=["a", "b"])
WEIGHTS_BACKWARD = _tuned(_weights_backward, "P Q E")


def permute(x: Tensor, token: Tensor) -> Tensor:
    """Return rows (N, D), rows[n] = x[token[n]], of x (T, D) and token (N,) int64."""
    size = _sizes(x=(x, "TD"), token=(token, "N"))
    return _sum_rows(x, token, size["N"], 1)


def combine(rows: Tensor, row_of_choice: Tensor) -> Tensor:
    """y (T, D), y_t = sum over k of rows[row_of_choice[t, k]]; row_of_choice (T, K) int32, -1: no row."""
    size = _sizes(rows=(rows, "ND"), row_of_choice=(row_of_choice, "TK"))
    return _sum_rows(rows, row_of_choice, size["T"], size["K"])


def gate_up(
    rows: Tensor, gate: Tensor, up: Tensor, gates: Tensor, ends: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return hidden = silu(a) b g, a = W_gate x and b = W_up x, each (N, F); a and b are None unless `keep`.

    rows (N, D), gate and up (E, F, D), gates (N,). hidden is made of a and b before they are rounded.
    """
    size = _sizes(rows=(rows, "ND"), gate=(gate, "EFD"), up=(up, "EFD"), gates=(gates, "N"), ends=(ends, "E"))
    hidden = rows.new_empty(size["N"], size["F"])
    a, b = (torch.empty_like(hidden), torch.empty_like(hidden)) if keep else (None, None)
    _launch(GATE_UP, hidden, a, b, rows, gate, up, gates, ends, size["F"], size["D"], **_by_expert(size))
    return hidden, a, b


def multiply(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Return rows @ matrices[e].T (N, P), of rows (N, K) and matrices (E, P, K)."""
    size = _sizes(rows=(rows, "NK"), matrices=(matrices, "EPK"), ends=(ends, "E"))
    out, P, K = rows.new_empty(size["N"], size["P"]), size["P"], size["K"]
    _launch(MULTIPLY, out, rows, matrices, None, None, ends, P, K, TRANSPOSED=True, **_by_expert(size))
    return out


def hidden_backward(
    dy_rows: Tensor, down: Tensor, a: Tensor, b: Tensor, gates: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return da and db, which overwrite a and b, hidden, each (N, F), and d_gates (N,) float32.

    With d = W_down^T dy and s = silu(a): hidden = s b g, d_gates = sum_f d s b, da = d g b silu'(a), db = d g s.
    dy_rows (N, D), down (E, D, F), a and b (N, F), gates (N,); d is not written, and no sum depends on who comes first.
    """
    named = {"dy_rows": (dy_rows, "ND"), "down": (down, "EDF"), "a": (a, "NF"), "b": (b, "NF")}
    size = _sizes(**named, gates=(gates, "N"), ends=(ends, "E"))
    hidden, F = torch.empty_like(a), size["F"]
    parts = triton.cdiv(F, min(tile[1] for tile in TILES))  # a tile's columns add up to one of them
    partial = gates.new_zeros(size["N"], parts, dtype=torch.float32)
    args = (hidden, partial, a, b, dy_rows, down, gates, ends, F, size["D"], parts)
    _launch(HIDDEN_BACKWARD, *args, **_by_expert(size))
    return a, b, hidden, partial.sum(1)


def rows_backward(da: Tensor, db: Tensor, gate: Tensor, up: Tensor, ends: Tensor) -> Tensor:
    """Return dx_rows = da @ gate[e] + db @ up[e] (N, D), of da and db (N, F), gate and up (E, F, D)."""
    size = _sizes(da=(da, "NF"), db=(db, "NF"), gate=(gate, "EFD"), up=(up, "EFD"), ends=(ends, "E"))
    out, D, F = da.new_empty(size["N"], size["D"]), size["D"], size["F"]
    _launch(MULTIPLY, out, da, gate, db, up, ends, D, F, TRANSPOSED=False, **_by_expert(size))
    return out


def weights_backward(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Return dW (E, P, Q), left[e].T @ right[e] over the rows of e, of left (N, P) and right (N, Q); zeros for none."""
    size = _sizes(left=(left, "NP"), right=(right, "NQ"), ends=(ends, "E"))
    N, E, P, Q = (size[name] for name in "NEPQ")
    if N == 0:
        return left.new_zeros(E, P, Q)
    out = left.new_empty(E, P, Q)
    _launch(WEIGHTS_BACKWARD, out, left, right, ends, P, Q, E=E, BITS=N.bit_length())
    return out


def _sum_rows(rows: Tensor, row_of_choice: Tensor, T: int, K: int) -> Tensor:
    """Return out (T, D), the sum of the rows at K places for each of T."""
    D = rows.shape[1]
    if len(rows) == 0:
        return rows.new_zeros(T, D)
    out = rows.new_empty(T, D)
    if out.numel():
        columns = min(1024, triton.next_power_of_2(D))
        tokens = 1024 // columns
        grid = (triton.cdiv(T, tokens), triton.cdiv(D, columns))
        with torch.cuda.device_of(rows):
            _add_rows[grid](out, rows, row_of_choice, T, D, K, BLOCK_T=tokens, BLOCK_D=columns, **FUSED)
    return out


def _by_expert(size: dict[str, int]) -> dict[str, int]:
    """What a kernel takes that looks up the expert of its rows."""
    N, E = size["N"], size["E"]
    return {"E": E, "BITS": N.bit_length(), "BLOCK_E": triton.next_power_of_2(E), "BAND": BAND}


def _launch(kernel: Any, *args: Any, **constants: Any) -> None:
    """Start the programs that share the tiles of the output, args[0], among them; none where it is empty."""
    out: Tensor = args[0]
    if not out.numel():
        return
    programs = 1 if INTERPRETED else torch.cuda.get_device_properties(out.device).multi_processor_count
    with torch.cuda.device_of(out):
        kernel[lambda chosen: (programs * chosen["PER_SM"],)](*args, **constants, **FUSED)


def _sizes(**named: tuple[Tensor, str]) -> dict[str, int]:
    """Return the size behind each letter of the shapes given by name. Raises InputError if a tensor does not fit."""
    first_name, (first, _) = next(iter(named.items()))
    require(first.dtype in DTYPES, f"{first_name}.dtype", first.dtype, "must be float32, float16 or bfloat16")
    if INTERPRETED and first.dtype == torch.bfloat16:
        raise InputError("triton: bfloat16 is wrong in Triton's interpreter; use float32 or float16, or a GPU")
    remedy = "Triton needs a GPU, or TRITON_INTERPRET=1 set before Python starts"
    require(INTERPRETED or first.is_cuda, f"{first_name}.device", str(first.device), remedy)
    size: dict[str, int] = {}
    for name, (tensor, letters) in named.items():
        dtype = INDEX_DTYPES.get(name, first.dtype)
        require(tensor.dtype == dtype, f"{name}.dtype", tensor.dtype, f"must be {dtype}")
        require(tensor.device == first.device, f"{name}.device", str(tensor.device), f"must be {first.device}")
        shape = tuple(tensor.shape)
        known = "(" + ", ".join(f"{letter} = {size[letter]}" if letter in size else letter for letter in letters) + ")"
        fits = len(shape) == len(letters) and all(size.get(c, n) == n for c, n in zip(letters, shape, strict=True))
        require(fits, f"{name}.shape", shape, f"must be {known}")
        require(tensor.is_contiguous(), f"{name}.stride()", tensor.stride(), "must be contiguous, see .contiguous()")
        size |= dict(zip(letters, shape, strict=True))
    return size
