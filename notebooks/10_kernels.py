# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Kernels: feeding a GPU
#
# ![Left: a loop starts some twelve hundred small operations for one step of 64 experts, and the GPU waits between them. Right: twelve launches, each of which has work for the whole GPU: permute, gate and up, down, combine, and eight more for the gradients.](images/kernels.svg)
#
# The layer of chapters 02 to 06 is right, and on a GPU a plain loop over its experts would be slow: a GPU is fast at few, large
# things, and the loop does many small ones. This chapter writes the layer as a handful of kernels in CUDA C++, from a
# product that a beginner would write to one that feeds the tensor cores of an H100.
#
# **You will** count what a loop starts; find out when memory and when arithmetic sets the limit; run CUDA C++ *on your CPU*, take
# a barrier away and see it caught; follow one grouped product up a ladder of five rungs, a bound guessed before each; cost the permutation in bytes;
# and take gradients through the kernels, equal to the loop's.
#
# **You need** chapters 02, 05 and, for one router, 06; for the kernels themselves some C++. **Reading time** 49 minutes. **Hardware** any laptop
# CPU with g++ (`apt install g++`; macOS has not been tried); without it you read recorded outputs. A GPU is only
# needed for the last section's timings.

# %% tags=["parameters"]
profile: str = "cpu"  # size of the run, and who starts operations: smoke | cpu | gpu
seed: int = 0  # seed of tokens and weights: 0..2147483647
n_experts: int = 64  # experts of the layer that is counted: 8 | 16 | 32 | 64 | 128
top_k: int = 6  # experts a token visits: 1..8
gpu: str = "H100"  # whose peak and bandwidth are the roof: A100 | H100 | H200

# %% tags=["hide-input"]
try:
    from dsmoe_lite.labs import begin, check_exercise, predict
except ModuleNotFoundError:
    raise SystemExit("dsmoe_lite is missing: run make setup, then make lab") from None

import torch

from dsmoe_lite.viz import charts

lab = begin(globals())

# %% [markdown]
# ## Many small things
#
# One layer with 64 experts of which a token visits 6, as in DeepSeek-V2-Lite. A loop sends each expert its rows and
# does for it what the equation says: two products, SiLU, a product of numbers, one more product, times the gate.
#
# A GPU is some hundred **multiprocessors**, each with its own arithmetic units, registers and a small fast memory. It works by **kernel launches**:
# the CPU asks, the GPU runs one function on its multiprocessors, and the next function starts when that is done. A launch costs the CPU some microseconds,
# however little there is to do.
#
# **Ask.** How many operations does such a loop start for one step of the experts, forward and backward? (Router and sorting are the same for every way,
# and left out.) Beside it stand *grouped*, which uses the product by experts that torch itself has, and the kernels of this chapter.

# %%
import os
from dataclasses import replace
from unittest.mock import MagicMock, patch

from dsmoe_lite import MoEConfig, Router
from dsmoe_lite.bench.launches import operations
from dsmoe_lite.common.paths import NOTEBOOKS
from dsmoe_lite.kernels import cuda
from dsmoe_lite.layers.dispatch import dispatch
from dsmoe_lite.layers.experts import Experts

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler speaks when it starts
chapter = NOTEBOOKS / "10_kernels.ipynb"
T = lab.choose(smoke=128, cpu=256, gpu=1024)  # tokens
D, F = 64, 32  # model width, expert width: small, the CPU runs it
E, K = n_experts, top_k

predict("10-launches", None)  # a number

x, dy = torch.randn(T, D, requires_grad=True), torch.randn(T, D)
compiled = MagicMock(**{"moe_slots.return_value": 1})  # to count takes no compiler


def step(backend, E):  # operations started forward and backward, our kernels' names
    router = Router(
        D, MoEConfig(n_routed_experts=E, top_k=K, expert_width=F), vocab_size=1
    )
    experts = Experts(E, D, F, backend)
    with torch.no_grad():
        sent = dispatch(x, router(x, (1, T)))
    sent, out, ours = replace(sent, x=x, gates=sent.gates.requires_grad_()), [], []
    wanted = (x, sent.gates, *experts.parameters())
    with (
        patch.object(cuda, "launch", lambda name, *_: ours.append(name)),
        patch.object(cuda, "library_for", lambda _: compiled),
    ):
        forward = operations(lambda: out.append(experts.combine(experts(sent), sent)))
        n_forward = len(ours)
        backward = operations(lambda: torch.autograd.grad(out[0], wanted, dy))
    return len(forward) + n_forward, len(backward) + len(ours) - n_forward, ours


rows = []
for backend, name in {
    "loop": "a loop over experts",
    "grouped": "torch's grouped product",
    "cuda": "kernels of this chapter",
}.items():
    forward, backward, ours = step(backend, E)
    rows.append({"backend": name, "forward": forward, "backward": backward})
charts.launch_counts(rows)

# %%
import time

print("kernels forward: ", *ours[:4])
print("kernels backward:", *ours[4:])
print(f"and {forward + backward - len(ours)} small operations of torch")
assert len(ours) == 12
for backend in ("loop", "cuda"):
    forward, backward, ours = step(backend, 16)
    print(f"with 16 experts, {backend:4} {forward:3} + {backward}")
assert len(ours) == 12
router = Router(D, MoEConfig(n_routed_experts=E, top_k=K, expert_width=F), vocab_size=1)
around = operations(lambda: dispatch(x, router(x, (1, T))))
print(f"to route and to sort, forward, for every way: {len(around)} more")

# %% [markdown]
# **What to notice.** The loop's count grows with the number of experts, the kernels' does not: each serves all experts at once. What
# torch still does beside them is to prepare their arguments and to add up parts of the gates' gradient. For torch's ways an operation is *at least* one launch.
# And torch's grouped product cures the launches too: what kernels of one's own can add is fusion, which means fewer bytes and less memory.
#
# What does one start cost *here*? On a CPU no GPU is asked, but torch's own way to an operation is the same: look it up, check
# its arguments, record it for the gradient; and the smallest of products. (With `profile=gpu` the GPU is asked.)

# %% tags=["measured"]
where = "cuda" if profile == "gpu" else "cpu"
tiny = torch.randn(2, 2, requires_grad=True, device=where)
for _ in range(2000):
    tiny @ tiny
began = time.perf_counter()
for _ in range(2000):
    tiny @ tiny
if where == "cuda":
    torch.cuda.synchronize()
each = (time.perf_counter() - began) / 2000
total = rows[0]["forward"] + rows[0]["backward"]
print(f"one product of 2 x 2: {1e6 * each:.1f} microseconds on this {where.upper()}")
print(f"{total:,} of them: {1e3 * total * each:.1f} milliseconds")

# %% [markdown]
# How long would a GPU be busy? That takes a look at what it can do at most.
#
# ## How often is a number used?
#
# A GPU multiplies far faster than it fetches. So the question for every kernel is: how many FLOPs does it do for each byte
# that it moves? The product of one expert with $r$ rows, $r \times k$ times $k \times n$, with $b$ bytes a number, does
#
# $$
# I(r) = \frac{2\, r\, k\, n}{b\,(r\,k + k\,n + r\,n)}
# $$ (eq:intensity)
#
# FLOPs a byte, if everything is moved once: its **arithmetic intensity**. A device with peak $P$ FLOPs a second and bandwidth
# $\beta$ bytes a second then needs at least
#
# $$
# t \ge \max\left(\frac{\text{FLOPs}}{P},\; \frac{\text{bytes}}{\beta}\right)
# $$ (eq:roofline)
#
# which is the **roofline** {cite:p}`Roofline`: below $P / \beta$ FLOPs a byte memory sets the limit, above it arithmetic.

# %% [markdown]
# **Build** both, and hold them against the package's:


# %%
from dsmoe_lite.kernels.work import grouped_product
from dsmoe_lite.study import published


def intensity(r, k, n, b=2):
    return 2 * r * k * n / (b * (r * k + k * n + r * n))


def at_least(flops, moved, peak, bandwidth):
    return max(flops / peak, moved / bandwidth)


one = grouped_product(rows=384, experts=1, k=2048, n=1408)
assert one.intensity == intensity(384, 2048, 1408)
assert one.seconds(1e12, 1e9) == at_least(one.flops, one.bytes, 1e12, 1e9)
print("intensity and roofline: mine equal the package's")

device = next(d for d in published.load()["hardware"] if d["name"].startswith(gpu))
peak, bandwidth = device["bf16_flops"], device["bytes_per_second"]
print(f"{gpu}: {peak / 1e12:.0f} TFLOP/s in bfloat16, {bandwidth / 1e12:.2f} TB/s")
print(f"they meet at {peak / bandwidth:.0f} FLOPs a byte; {device['source']}")

# %% [markdown]
# **Ask.** The experts of V2-Lite multiply rows of 2048 numbers by matrices of $1408 \times 2048$. With 64 experts and 6 a token, how many
# tokens must a batch have at least, so that arithmetic sets the limit and not memory? Guess; then move the slider. Beside the experts stands one dense FFN
# as wide as those of a token together: the same FLOPs.

# %%
predict("10-tokens", None)  # a number of tokens


points = []
for tokens in [2**power for power in range(17)]:
    for name, experts, chosen, width in (
        ("dense FFN", 1, 1, K * 1408),  # the same work for a token
        (f"{K} of {E}", E, K, 1408),
    ):
        product = grouped_product(tokens * chosen, experts, 2048, width)
        points.append({"name": name, "tokens": tokens, "intensity": product.intensity})
charts.roofline(
    points, peak=peak, bandwidth=bandwidth, device=f"{gpu}, bfloat16", tokens=1024
)

# %%
from math import ceil

for tokens in (1024, 4096, 16_384):
    product = grouped_product(tokens * K, E, 2048, 1408)
    kind = "arithmetic" if product.intensity > peak / bandwidth else "memory"
    dense = grouped_product(tokens, 1, 2048, K * 1408).intensity
    print(
        f"{tokens:6,} tokens, {tokens * K // E:5} rows an expert:"
        f" {product.intensity:4.0f} FLOPs a byte ({kind});"
        f" dense FFN {dense:4.0f}"
    )
enough = next(
    n
    for n in range(1, 2**17)
    if grouped_product(n * K, E, 2048, 1408).intensity >= peak / bandwidth
)
print(f"arithmetic sets the limit from {enough:,} tokens on\n")
tiles = ceil(384 / 128) * ceil(1408 / 128)
least = one.seconds(peak, bandwidth)
print(
    f"one product of one expert with 384 rows: {1e6 * least:.1f} microseconds at least"
)
print(
    f"on all {device['multiprocessors']} multiprocessors; it has {tiles} tiles of 128 x 128"
)
print(f"a step has {9 * E} of them, {9e3 * E * least:.1f} milliseconds at least")

# %% [markdown]
# **What to notice.** Two things starve a GPU here. Each product would be over in a few microseconds, if all multiprocessors worked on it: about as long as it takes to start
# the next. (Nine a step and expert: three forward, six for the gradients.) But it has too few tiles, and a multiprocessor takes a whole tile or none, so most of them wait. Both are cured by *one*
# launch for all experts, a **grouped product**: one kernel whose blocks work on tiles of different experts at the same time
# (MegaBlocks {cite:p}`MegaBlocks` showed that no token needs to be dropped for it). What it does not cure is intensity: weights that
# few rows use must still be read. Experts want large batches.
#
# ## CUDA in ten lines, on your CPU
#
# A CUDA **kernel** is a function that runs once for every **thread**. Threads come in **blocks** of up to 1024. A block runs on one
# multiprocessor, whose **shared memory** all its threads see; several blocks may share one, and while some warps wait for memory others compute. 32 threads in a row are a **warp**, which mostly
# executes together but need not; a thread's place in its warp, 0 to 31, is its **lane**. The lanes of a warp read fastest where they read neighbouring addresses: their reads are then
# **coalesced** into few. Threads of a block wait for each other at a **barrier**, `__syncthreads()`, lanes of a warp at `__syncwarp()`; blocks do not wait for each other at all.
#
# In the code `__global__` marks a kernel and `__device__` a function that it calls; `threadIdx.x` is the thread's number in its block, `blockIdx.x` the number of the
# block, `gridDim.x` how many blocks there are. `shared_memory<Shared>()` is this package's name for the block's shared memory.
#
# This kernel reverses 128 numbers. Each thread puts one number into shared memory and takes another one out. `run` launches it: one
# block (`dim3` counts blocks in up to three directions), 128 threads, that many bytes of shared memory, the default queue of the GPU (`nullptr`), and the kernel's
# arguments.

# %%
reverse = """
#include "launch.cuh"

struct Shared { float part[128]; };

__global__ void reverse(float* x) {
  auto& shared = shared_memory<Shared>();
  shared.part[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = shared.part[127 - threadIdx.x];
}

extern "C" int run(float* x) {
  return launch(reverse, dim3{1}, 128, sizeof(Shared), nullptr, x);
}
"""

# %% [markdown]
# On a GPU `nvcc` compiles that. Here `g++` does, with a **shim**: a header of this package, `cuda_on_cpu.h`, in which every word of CUDA is C++. It gives each thread a **fiber**, a stack of
# its own and a place where it goes on, and lets one warp run as far as it gets, then the next:

# %%
from dsmoe_lite.labs.cuda_source import show_source

show_source("cuda_on_cpu.h", "inline bool run_warp")

# %%
from dsmoe_lite.kernels.build import cpu_library_of
from dsmoe_lite.kernels.launch import launch_on_cpu
from dsmoe_lite.labs.cuda_source import run_or_show_recorded


def in_reverse():
    x = torch.arange(128.0)
    launch_on_cpu(cpu_library_of(reverse), "run", x)
    print("reversed:", torch.equal(x, torch.arange(128.0).flip(0)))


run_or_show_recorded(in_reverse, chapter)

# %% [markdown]
# **Ask.** Take the barrier away. On a GPU the result may still be right, most of the time. What happens here? And if only the
# first warp reaches a barrier, and the others another one, two lines further down?

# %%
from dsmoe_lite.common.errors import RunError

predict("10-barrier", None)  # in words


def without_barrier():
    broken = reverse.replace("  __syncthreads();\n", "")
    x = torch.arange(128.0)
    launch_on_cpu(cpu_library_of(broken), "run", x)
    wrong = x != torch.arange(128.0).flip(0)
    print(f"no barrier: {int(wrong.sum())} of 128 numbers wrong,", end=" ")
    print(f"the first of them {x[wrong][0]:.0f}")


def two_barriers():
    two = ("if (threadIdx.x < 32)", "  __syncthreads();", "else", "  __syncthreads();")
    split = "\n  ".join(two)
    try:
        divergent = cpu_library_of(reverse.replace("__syncthreads();", split))
        launch_on_cpu(divergent, "run", torch.arange(128.0))
    except RunError as error:
        print(error)


run_or_show_recorded(without_barrier, chapter)

# %%
run_or_show_recorded(two_barriers, chapter)

# %% [markdown]
# **What to notice.** Without the barrier the first two warps read what the last two have not written yet; shared memory starts as NaN, so that it shows. That is how the
# shim finds a missing barrier: not by luck, as on a GPU, but because one warp runs ahead as far as it may. It can
# also run the warps in other orders, and do what is asynchronous as late as allowed, or at once. And a block whose warps wait at different lines is an error with
# both lines in it; CUDA forbids it, and on a GPU it may hang, or go on, with wrong numbers or with right ones. The package's tests take
# *every* wait out of *every* kernel of this chapter, one at a time, and demand that the shim notices.
#
# ## The router in one kernel
#
# From the logits on: scores, the best groups, the K best experts, gates and the count of tokens for each expert. In torch each is several operations, which
# read and write all of it. Here a warp takes a token; lane $l$ has experts $l, l + 32, \dots$; the largest score is found by
# comparing with the lane 16 away, then 8, 4, 2, 1 (`__shfl_xor_sync` hands a number from lane to lane), without any memory at all:

# %%
show_source("router.cuh", "int warp_argmax")

# %% [markdown]
# **Prove** it equal to the `Router` of chapters 02 and 06, with DeepSeek-V3's rule: sigmoid, groups by their best two, a bias that chooses and
# is in no gate.


# %%
from torch.testing import assert_close

from dsmoe_lite.kernels.cuda_router import Rule, route


def same_choices():
    config = MoEConfig(
        n_routed_experts=64,
        top_k=6,
        expert_width=F,
        scoring_func="sigmoid",
        expert_bias=True,
        n_group=8,
        topk_group=3,
        group_score="top2",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    theirs = Router(D, config, vocab_size=1)
    theirs.expert_bias.normal_(std=0.05)
    wanted = theirs(x.detach(), (1, T))
    rule = Rule(6, "sigmoid", 8, 3, "top2", norm_topk_prob=True, scale=2.5)
    _, ids, gates, counts = route(wanted.logits.detach(), rule, theirs.expert_bias)
    assert torch.equal(ids, wanted.topk_ids)
    assert_close(gates, wanted.gates.detach(), rtol=0, atol=1e-6)
    assert torch.equal(counts.long(), wanted.counts)
    print(f"{T} tokens, 64 experts: same ids, same counts, gates to 1e-6")
    in_torch = operations(lambda: theirs(x.detach(), (1, T)))
    print(f"one kernel for {len(in_torch)} operations of torch, the logits among them")


run_or_show_recorded(same_choices, chapter)

# %% [markdown]
# (The layer itself still routes by torch: this kernel has no gradient, and waits for one.)

# %% [markdown]
# ## What moving costs
#
# Before the products every token's row is copied to where its experts' rows stand (**permute**), and afterwards the results
# are added up (**combine**). Neither multiplies anything worth counting, so bytes decide.
#
# **Ask.** The forward pass of V2-Lite's routed experts takes some time at least. With 16,384 tokens, which share of it goes into moving rows?

# %%
from dsmoe_lite.kernels.work import row_copies

predict("10-moving", None)  # a share


def forward_parts(tokens, E=64, K=6, D=2048, F=1408):
    N = tokens * K
    return {
        "permute": row_copies(tokens, N, D),  # each token read once, if caches keep it
        # two results, kept for the gradients, and the hidden vector
        "gate and up, SwiGLU": grouped_product(N, E, D, 2 * F) + row_copies(0, N, F),
        "down": grouped_product(N, E, F, D),
        "combine": row_copies(N, tokens, D),
    }


parts = forward_parts(16_384)
seconds = {name: work.seconds(peak, bandwidth) for name, work in parts.items()}
for name, work in parts.items():
    share = seconds[name] / sum(seconds.values())
    print(
        f"{name:20} {work.bytes / 1e6:7,.0f} MB {work.flops / 1e9:8,.0f} GFLOP {share:6.1%}"
    )
moving = (seconds["permute"] + seconds["combine"]) / sum(seconds.values())
print(f"moving rows: {moving:.0%} of the least time on the {gpu}")

# %% [markdown]
# **What to notice.** Moving is a small part but no trifle, and this is the least: where a token's row leaves the caches before all its experts have
# it, it is read up to six times. So the kernels save where they can:
#
# - The gate is multiplied *before* $W_{down}$, into the hidden vector: $W_{down}(g\,\mathbf{h}) = g\,W_{down}\mathbf{h}$. Then combine is a plain sum, and the
#   backward pass needs no result of width $D$.
# - SwiGLU happens where the two products end, in registers; $W_{gate}\mathbf{x}$ and $W_{up}\mathbf{x}$ share the same tile of $\mathbf{x}$.
# - Combine reads the K rows of its token and writes once: no atomic additions, the same sum in the same order in every run.

# %%
show_source("permute.cuh", "void combine")

# %% [markdown]
# ## The ladder
#
# One product, rows of expert $e$ times its matrix, five times. What changes from rung to rung is where the numbers come from, and who
# multiplies. A block that computes a tile of $m \times n$ results and fetches each side of it once per step does
#
# $$
# I_{tile} = \frac{2\, m\, n}{b\,(m + n)}
# $$ (eq:tile-intensity)
#
# FLOPs for each byte it fetches. That is its ceiling under the bandwidth of whatever it fetches from: memory at worst, the L2 cache
# where blocks share their tiles. **Ask**, before each rung: which share of the tensor cores' peak can it reach at most, if all it fetches comes from memory?

# %%
from dsmoe_lite.bench.kernels import newest_record
from dsmoe_lite.kernels.work import tile_intensity

record = newest_record()
rungs = {  # tile, units that multiply
    "1 naive": (1, 1, "fp32"), "2 tiled": (64, 64, "fp32"),
    "3 wmma": (64, 64, "bf16"), "4 mma": (128, 128, "bf16"),
    "5 hopper": (128, 256, "bf16"),
}  # fmt: skip
if gpu == "A100":
    del rungs["5 hopper"]  # it has no such instructions


def of_peak(name):
    (m, n, units), ladder = rungs[name], record["ladder"] if record else []
    at_most = min(device[f"{units}_flops"], bandwidth * tile_intensity(m, n)) / peak
    print(
        f"{name}: {tile_intensity(m, n):.1f} FLOPs a byte, at most {at_most:.1%}",
        end="; ",
    )
    shares = [f"{row['of dense']:.0%}" for row in ladder if row["by"] in name.split()]
    print(f"measured, of a dense product: {''.join(shares) or 'not yet'}")


# %% [markdown]
# **Names in the sources.** The product is $C = A B$.
#
# | | |
# |---|---|
# | A, `m` | rows of experts, and their number |
# | B, `n` | an expert's matrix; `n` counts the columns of the result |
# | `k` | what is summed over |
# | `Layout` | which way A and B lie; here `NT`, B transposed, since torch keeps a matrix as $n \times k$ |
# | `Form` | one product (`ONE`), two with the same A (`DUAL`: $W_{gate}\mathbf{x}$ and $W_{up}\mathbf{x}$), the sum of two (`SUM`) |
# | `find_tile`, `Cursor` | from the number of a block to an expert and a tile of its results |
# | `a_index`, `b_index` | where a number lies in memory |
# | `fetch`, `multiply` | into shared memory, and from there |
# | `finish`, **epilogue** | hands complete sums to what comes last: store them, or take SwiGLU of them first |
#
# ### 1. One thread an output

# %%
predict("10-rung-1", None)  # a share of the peak
show_source("gemm_naive.cuh", "void gemm_naive")

# %%
of_peak("1 naive")

# %% [markdown]
# Two numbers are fetched for one multiplication and one addition: a "tile" of one by one. And neighbouring lanes have neighbouring columns, so that at each $k$ they
# read from 32 rows of the matrix, far apart: nothing is coalesced.
#
# ### 2. Tiles in shared memory
#
# 256 threads fetch 64 rows of A and 64 columns of B, 16 deep, into shared memory, and each multiplies $4 \times 4$ of the results from there: eight numbers read for
# sixteen multiplications. In the package this is the rung for training in float32, and for any width.

# %%
predict("10-rung-2", None)  # a share of the peak
show_source("gemm_tiled.cuh", "void multiply(")

# %%
show_source("gemm_tiled.cuh", "void gemm(")

# %%
of_peak("2 tiled")

# %% [markdown]
# ### 3. Tensor cores, CUDA's own words
#
# Tiles of 64 by 64 again, in bfloat16, 32 deep and by four warps, multiplied by **tensor cores**: units that multiply small matrices whole. `wmma::mma_sync` has a warp multiply
# $16 \times 16$ by $16 \times 16$, spread over its lanes as **fragments**. CUDA does not say which lane holds which number, so the results
# take a detour through shared memory before they are written.

# %%
predict("10-rung-3", None)  # a share of the peak
show_source("gemm_wmma.cuh", "void multiply(")

# %%
of_peak("3 wmma")

# %% [markdown]
# ### 4. `mma.sync`, copies that run ahead, and a swizzle
#
# Now tiles of 128 by 128, and room for three **stages**: a stage is 64 of $k$, of A and of B. While one stage is multiplied the next two are on their
# way. `cp.async` copies past the registers and lets the thread go on; who needs the numbers waits for them later.
#
# And here shared memory itself becomes the limit. It has 32 **banks**; in one turn each of them gives 4 bytes. `ldmatrix`, which feeds the tensor cores, reads from 8 rows a
# **piece** of 16 bytes each, four banks wide: a **group** of banks, of which there are 8. A row of the tile has 128 bytes, 8 pieces, so that piece 3 of every row lies in the *same* group:

# %%
apart = [list(range(8)) for _ in range(8)]
charts.bank_groups({"as it lies": apart}, 3)

# %% [markdown]
# **Ask.** Eight turns, one for each row. Find a rule that stores the pieces of each row in another order, so that *any* piece of these 8 rows is read in
# one turn.

# %%
predict("10-turns", None)  # a rule: the group of banks for a row and a piece

# %% [markdown]
# The usual rule is an exclusive or with the row's number, a **swizzle**. Move the slider:


# %%
def swizzled(row, piece):  # the group of banks that a piece of a row lies in
    return piece ^ (row % 8)


mixed = [[swizzled(row, piece) for piece in range(8)] for row in range(8)]
charts.bank_groups({"as it lies": apart, "swizzled": mixed}, 3)

# %% [markdown]
# **What to notice.** In every row the 8 pieces still fill the 8 groups, and so do the marked ones of the 8 rows: $p \oplus r$ takes each value once, whichever of the
# two is held. In the kernel it is one line, and `gemm` never waits for the stage it has just asked for:

# %%
predict("10-rung-4", None)  # a share of the peak
show_source("gemm_mma.cuh", "int place(int row")

# %%
show_source("gemm_mma.cuh", "void gemm(")

# %%
of_peak("4 mma")

# %% [markdown]
# Copies that run ahead bring a new kind of mistake: to multiply what has not landed. `copy_async_wait<N>` waits until at most N of the groups of copies that were begun are
# still on their way. On a GPU the result of too short a wait depends on the timing; in the shim a copy lands as late as the program allows. **Ask.** How many numbers are still right with
# `STAGES - 1` in place of `STAGES - 2`, and how many without any wait?

# %%
from dsmoe_lite.kernels.build import SOURCES
from dsmoe_lite.labs.cuda_source import multiply_with

predict("10-wait", None)  # of 12,800


def without_wait():
    text = (SOURCES / "gemm_mma.cuh").read_text()
    rows, matrix = (torch.randn(n, 256).bfloat16() for n in (100, 128))
    exact = rows.double() @ matrix.double().T
    wait = "copy_async_wait<STAGES - 2>();"
    for name, instead in (
        ("as it is", wait),
        ("one too many", wait.replace("2", "1")),
        ("no wait", ""),
    ):
        assert text.count(wait) == 1
        out = multiply_with(text.replace(wait, instead), rows, matrix)
        right = (out.double() - exact).abs() < 0.01 * exact.abs() + 0.05
        print(f"{name:13} {int(right.sum()):6,} of {right.numel():,} right,", end=" ")
        print(f"{int(out.isnan().sum()):,} NaN")


run_or_show_recorded(without_wait, chapter)

# %% [markdown]
# **What to notice.** Off by one, each step multiplies the stage before its copies have landed: what lies there is NaN at first, and later the numbers of three steps ago, which look like a
# result. No test that only asks for finite numbers would find those.
#
# ### 5. Hopper: `wgmma`, TMA, and blocks that stay
#
# The tensor cores of an H100 are so fast that warps have no time left to fetch for them. So roles are split. One thread does nothing but order copies
# from the **tensor memory accelerator**. It names a **box**, a rectangle of a matrix, by its corner; the accelerator knows the matrix from a map made before the
# launch, and fills with zeros what lies outside. Two **warpgroups** of 128 threads do nothing but multiply.
#
# They meet at two barriers of each stage, which lie in shared memory and do not need the whole block. At `full` the copies report their bytes; at `empty` the warps report
# that they have read the stage. Such a barrier counts rounds, and who waits says by a **parity**, 0 or 1, which round is meant: nobody is ever more than one ahead. The stages
# are used in turn, as a **ring**. At the start every stage is free, but nobody has reported so: the thread that copies asks for the round *before* (`parity ^ 1`), which a new barrier takes as over. 128 rows of A, 64 deep, have
# `PART` bytes, and `HALVES` says of how many such parts B is made; `pair` counts the two products of a `SUM`. The thread that copies:

# %%
predict("10-rung-5", None)  # a share of the peak
show_source("gemm_hopper.cuh", "void produce(")

# %% [markdown]
# The two warpgroups multiply straight from shared memory (`wgmma`), 64 rows by 256 columns each; a **descriptor** tells the tensor cores where a slab of 64 rows begins and how it lies. Each thread
# keeps 128 of the sums in registers. One product always runs while the next is being prepared, so a stage is handed back one step late. A **fence** orders writes and reads as others see them, and waits for nobody; a
# **named barrier** waits for some of a block's threads, here those that multiply:

# %%
show_source("gemm_hopper.cuh", "void consume(")

# %%
if "5 hopper" in rungs:
    of_peak("5 hopper")

# %% [markdown]
# A block stays on its multiprocessor and takes one tile after the
# other, of whatever expert is next, so that the copies for the next tile begin while this one is being written.
#
# An expert's last tile overlaps the next expert's rows; those results are not stored. In the gradient of the weights, where the rows are *summed over*, they must count as zero; so both sides are cleared,
# since a NaN in one times zero in the other is still NaN.
#
# All rungs against float64, on the CPU, with an empty expert, a tail, one row:


# %%
def every_rung():
    counts, width, out = [70, 0, 129, 1], 200, 136
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    rows, matrices = torch.randn(200, width), torch.randn(4, out, width)
    for rung in cuda.RUNGS:
        for dtype in (torch.float32, torch.bfloat16):
            if dtype == torch.float32 and rung not in ("naive", "tiled"):
                continue
            a, b = rows.to(dtype), matrices.to(dtype)
            mine = cuda.multiply(a, b, ends, rung).double()
            parts = zip(a.double().split(counts), b.double(), strict=True)
            exact = torch.cat([part @ matrix.T for part, matrix in parts])
            error = float((mine - exact).norm() / exact.norm())
            assert error < (1e-6 if dtype == torch.float32 else 2**-8)
            print(f"{rung:7} {str(dtype)[6:]:9} error {error:.0e} of the norm")


run_or_show_recorded(every_rung, chapter)

# %% [markdown]
# How much of a tile is such overlap? It depends on how many rows an expert has, uniformly or by Zipf's law:

# %%
from dsmoe_lite.bench.grouped_products import Case

for tokens in (64, 256, 1024, 4096, 16_384):
    shares = []
    for routing in ("uniform", "skewed"):
        counts = Case(E, 2048, 1408, max(1, tokens * K // E), routing).counts()
        shares.append(sum(counts) / sum(128 * ceil(count / 128) for count in counts))
    print(
        f"{tokens:6,} tokens: {shares[0]:4.0%} of the rows of tiles are real, {shares[1]:4.0%} skewed"
    )

# %% [markdown]
# **What to notice.** A grouped product wastes no launch, but tiles: with few rows an expert most of a tile is computed for nothing. A server that writes a few answers at a time stands at the top
# of this list, and there memory sets the limit anyway, since the matrices must be read for few rows.
#
# **Ask.** From memory no rung reaches half of the peak. What must a better place to fetch from give?

# %%
predict("10-ladder", None)  # bytes a second


def sharing(m, n, rows=1024, columns=1408):  # fetched by all blocks / different
    down, across = ceil(rows / m), ceil(columns / n)
    of_a, of_b, blocks = set(), set(), device["multiprocessors"]
    for number in range(blocks):
        expert, inside = divmod(number, down * across)
        of_a.add((expert, inside % down))
        of_b.add((expert, inside // down))
    return blocks * (m + n) / (len(of_a) * m + len(of_b) * n)


points = []
for name, (m, n, _) in list(rungs.items())[2:]:
    reads, times = tile_intensity(m, n), sharing(m, n)
    points.append({"name": name, "intensity": reads})
    points.append({"name": f"{name}, L2", "intensity": reads * times})
    print(f"{name:9} needs {peak / reads / 1e12:4.1f} TB/s at the peak;", end=" ")
    print(f"{times:4.1f} blocks want each byte at once")
charts.roofline(
    points,
    peak=peak,
    bandwidth=bandwidth,
    device=f"{gpu}, bfloat16",
    title="What if memory gives a byte once, for all blocks that want it?",
)

# %% [markdown]
# **What to notice.** Between memory and the multiprocessors lies the **L2 cache**: what one block has fetched the others find there. `find_tile` hands out tiles down the rows of an expert
# first, so that neighbours share (counted for 1024 rows an expert, one block on each multiprocessor, which simplifies rungs 3 and 4). Then memory alone no longer sets the limit. But the L2 must
# still give each block its bytes, three to nine times what memory gives on an H100: that is why the tiles grow from rung to rung, until at rung 5 shared
# memory is full. No datasheet states the L2's bandwidth, and nothing here has measured it. What else lies between a rung and the peak is how well copies, barriers and products overlap: that only a GPU can say.
#
# ## Gradients: the same product, lying differently
#
# The backward pass has six products of two more kinds, in five launches: the two that make $dL/d\mathbf{x}$ are summed in one. All are this product, with A or B lying the other way round. The letters are those
# of BLAS, one for A and one for B: N as it lies, T transposed.
#
# | | A | B | |
# |---|---|---|---|
# | forward | rows | matrix, transposed | `NT` |
# | gradient of the rows | rows | matrix | `NN` |
# | gradient of the matrix | rows, transposed | rows | `TN`: the sum runs over an expert's rows |
#
# The tensor cores read either way, transposed by `ldmatrix.trans` or by a bit of the instruction. What a product ends with is fused again: where $\mathbf{d} = W_{down}^\top\, dL/d\mathbf{y}$, the gradient of $g\,\mathbf{h}$, is complete, still in
# registers, SwiGLU's gradient is taken, and it is written *over* $\mathbf{a} = W_{gate}\mathbf{x}$ and $\mathbf{b} = W_{up}\mathbf{x}$, which nobody
# needs any more:

# %%
show_source("grouped.cuh", "struct SwiGLUBackward")

# %% [markdown]
# **Prove** it: output and all gradients, by the float32 kernels of rung 2 and the bfloat16 kernels of rung 5, against the loop in float64 on the same
# numbers. Beside them stands what the loop itself loses in bfloat16.


# %% tags=["measured"]
def trains_alike():
    tokens, width, hidden = 60, 24, 40
    draw = [torch.randn(tokens, width), torch.randn(tokens, width)]
    draw += [0.3 * torch.randn(*s) for s in ((5, hidden, width),) * 2]
    draw += [0.3 * torch.randn(5, width, hidden), 0.3 * torch.randn(5, width)]
    draw = [numbers.bfloat16() for numbers in draw]  # the same in every dtype

    def results(backend, dtype):
        x, dy, gate, up, down, vectors = (
            numbers.to(dtype).requires_grad_() for numbers in draw
        )
        experts = Experts(5, width, hidden, backend)
        experts.gate, experts.up, experts.down = map(
            torch.nn.Parameter, (gate.detach(), up.detach(), down.detach())
        )
        routing = Router(
            width,
            MoEConfig(n_routed_experts=5, top_k=2, expert_width=hidden),
            vocab_size=1,
        )
        routing.weight = torch.nn.Parameter(vectors.detach())
        dispatched = dispatch(x, routing(x, (1, tokens)))
        out = experts.combine(experts(dispatched), dispatched)
        wanted = (x, *experts.parameters(), *routing.parameters())
        return [out, *torch.autograd.grad(out, wanted, dy.detach())]

    ways = {
        "loop bfloat16": results("loop", torch.bfloat16),
        "cuda bfloat16": results("cuda", torch.bfloat16),
        "cuda float32": results("cuda", torch.float32),
    }
    exact = results("loop", torch.float64)
    print(" " * 9, *(f"{name:>14}" for name in ways))
    for i, name in enumerate(("y", "dx", "dW gate", "dW up", "dW down", "dW router")):
        errors = [
            float((mine[i].double() - exact[i]).norm() / exact[i].norm())
            for mine in ways.values()
        ]
        print(f"{name:9}", *(f"{error:14.0e}" for error in errors))
        assert errors[1] < 1.2 * errors[0]
        assert errors[2] < 1e-5


run_or_show_recorded(trains_alike, chapter)

# %% [markdown]
# **Ask.** How much memory does a step hold at most, beside the weights and their gradients? torch records every allocation, and what is allocated does
# not depend on the device. The widths are a sixteenth of V2-Lite's; the loop keeps every step of its arithmetic for the gradients.

# %%
from dsmoe_lite.bench.backends import Layer

predict("10-memory", None)  # of the loop's peak, the kernels' share


def peak_memory():
    layer = Layer(
        MoEConfig(n_routed_experts=64, top_k=6, expert_width=88),
        d_model=128,
        n_tokens=256,
    )
    peaks = {
        name: layer.contender(name, "cpu", torch.float32).peak_bytes()
        for name in ("loop", "grouped", "cuda")
    }
    for name, peak_bytes in peaks.items():
        print(f"{name:8} {peak_bytes / 1e6:5.1f} MB, {peak_bytes / peaks['loop']:4.0%}")
    assert peaks["cuda"] < 0.7 * peaks["grouped"]


run_or_show_recorded(peak_memory, chapter)

# %% [markdown]
# **What to notice.** Between the passes the kernels keep $\mathbf{a}$ and $\mathbf{b}$ alone, in the backward pass their gradients take the same place, and no result of width $D$ waits
# for a gate. The shares are those of this small layer; they move with the widths and with $K$.
#
# ## The same in Triton
#
# Triton writes kernels in Python: a *program* works on whole tiles, and the compiler decides what a thread does, how tiles
# are staged and swizzled. `Experts(backend="triton")` is the twin of the experts' kernels here, without the router and without the lower rungs. The sum over $k$, which
# took a `fetch`, a `multiply`, stages and barriers:

# %%
show_source("triton_kernels.py", "def _add_product(")

# %% [markdown]
# What you give up is the say in those decisions; what you gain is fewer and simpler lines, and float16 besides.

# %% [markdown]
# ## What a GPU must say
#
# `dsmoe bench kernels --record` on a machine with a GPU checks every rung, Triton, torch's grouped product and whole layers against
# float64, and then times them, against goals that were set before. This section draws the newest record.


# %%
from IPython.display import display

from dsmoe_lite.bench.grouped_products import DENSE
from dsmoe_lite.bench.kernels import goals


def what_a_gpu_said(record):
    made = record["provenance"]
    print(f"{made['device']}, torch {made['torch']}, {record['date'][:10]}\n")
    for row in record["ladder"]:
        print(
            f"{row['by']:20} {row['TFLOP/s']:6.0f} TFLOP/s, {row['of dense']:4.0%} of dense"
        )
    print()
    hold_against(record["goals"])
    at = {"experts": 64, "k": 2048, "routing": "uniform"}
    mine = [row for row in record["products"] if at.items() <= row.items()]
    ways = ("hopper", "mma", "triton", "F.grouped_mm")
    display(
        charts.product_speed(
            [row for row in mine if row["by"] in ways],
            dense=[row for row in mine if row["by"] == DENSE],
        )
    )


def hold_against(goals):
    for row in goals:
        value = "not measured" if row["value"] is None else f"{row['value']:.2f}"
        print(f"{row['what']:48} {value:>12}   goal {row['goal']}")


if record is None:
    print("No GPU run is recorded yet.\n")
    hold_against(goals([], [], []))
else:
    what_a_gpu_said(record)

# %% [markdown]
# As long as no run is recorded, what can be said is this: the kernels compile for sm_80 (A100), sm_90 and sm_90a (H100 and H200, without and with `wgmma` and TMA); the two upper rungs keep everything in registers
# and contain the instructions they are meant to contain (the tests disassemble them); and on the CPU they are right. What the CPU
# cannot show is a missing fence, which does nothing there, or an instruction that we misread: `wgmma`, TMA and `ldmatrix` do there what we
# understood from the manual. Nothing is claimed about their speed. On a machine with a GPU, `auto` has them compiled at first use by a process of its own, which compares a layer with the
# loop, and goes on without them where they do not compile, differ, crash or hang.
#
# Two more things happen between the CPU and the GPU. A launch does not wait for the kernel: the CPU runs ahead, until it needs a number from the GPU. `dispatch` needs one, how many rows there are; so the
# experts' ends stay on the GPU, a kernel is started with as many blocks as could be needed, and those without a tile return. And a whole step can be recorded once and started again by one call, as a
# *CUDA graph*, which the benchmark does: the other cure for launches.
#
# ## Exercises
#
# **1. A bug from the wild** (20 minutes). Before a grouped product, somebody must say which tile of rows belongs to which expert. This
# kernel does: thread $e$ counts the tiles up to and with expert $e$; then all threads look up their tiles. It follows a
# kernel of a serving engine, and has the bug that a pull request there reports. Return the kernel mended: `kernel.replace(old, new)`. The check needs g++.


# %%
def tile_kernel():
    return """
#include "launch.cuh"

struct Shared { int ends[64]; };

__global__ void tile_experts(const int* counts, int experts, int tile, int tiles, int* owner) {
  auto& shared = shared_memory<Shared>();
  if (threadIdx.x < experts) {
    int end = 0;
    for (int e = 0; e <= threadIdx.x; e++) end += (counts[e] + tile - 1) / tile;
    shared.ends[threadIdx.x] = end;
  }
  for (int t = threadIdx.x; t < tiles; t += blockDim.x) {
    int e = 0;
    while (e + 1 < experts && shared.ends[e] <= t) e++;
    owner[t] = e;
  }
}

extern "C" int run(const int* counts, int experts, int tile, int tiles, int* owner) {
  return launch(tile_experts, dim3{1}, 64, sizeof(Shared), nullptr, counts, experts, tile, tiles, owner);
}
"""


def mended(kernel):  # the text of the kernel
    return None  # the text, mended


def finds_owners(mended):
    library = cpu_library_of(mended(tile_kernel()))
    for counts in ([3, 0, 40, 16], [0] * 40 + [160] + [1] * 23, [5] * 64, [0, 1]):
        of_expert = [-(-count // 16) for count in counts]
        right = [e for e, tiles in enumerate(of_expert) for _ in range(tiles)]
        for order in range(4):  # of the warps
            library.cuda_on_cpu_schedule(order)
            owner = torch.full((len(right),), -1, dtype=torch.int32)
            given = torch.tensor(counts, dtype=torch.int32)
            launch_on_cpu(library, "run", given, len(counts), 16, len(right), owner)
            assert owner.tolist() == right, (
                f"{len(counts)} experts, order {order}: wrong owners"
            )


verdict = check_exercise(mended, finds_owners, needs="g++")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def mended(kernel):
#     return kernel.replace("  for (int t =", "  __syncthreads();\n  for (int t =")
# ```
#
# A thread may search before another has written its end: of another warp, and, since a warp need not execute together, even of its own. Inside the `if` a barrier would be
# another bug: threads without an expert never come there. Found in SGLang's `moe_align_block_size` (pull request 37663); a
# sister, a missing `__syncwarp()` in a router (11183), now and then made a sum of gates zero, and the output infinite.
# </details>
#
# **2. Code** (15 minutes). A tile whose rows are 64 bytes long has only 4 pieces in a row, and two rows share the 8 groups of banks: piece
# $p$ of row $r$ lies in group $(4r + p) \bmod 8$. Where should piece $p$ of row $r$ stand in its row, so that any one piece of rows 0 to 7, of rows 8 to 15, and so on, is
# read in one turn?


# %%
def stands(row, piece):  # 0 to 3
    return None  # 0 to 3


def one_turn(stands):
    for row in range(32):
        order = [stands(row, piece) for piece in range(4)]
        assert sorted(order) == [0, 1, 2, 3], f"row {row}: {order} loses a piece"
    for first in range(0, 32, 8):
        for piece in range(4):
            rows = range(first, first + 8)
            groups = {(4 * row + stands(row, piece)) % 8 for row in rows}
            assert len(groups) == 8, f"piece {piece}: only {len(groups)} groups"


verdict = check_exercise(stands, one_turn)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def stands(row, piece):
#     return piece ^ (row // 2 % 4)
# ```
#
# Rows $2i$ and $2i + 1$ lie in different halves of the groups anyway, so only every second row needs another order.
# </details>
#
# **3. Run it** with `dsmoe run 10 -p gpu=A100`, then with `dsmoe run 10 -p n_experts=128`. How does each change the number of tokens from
# which arithmetic sets the limit, and why?
#
# <details><summary>Solution</summary>
#
# 1,999 and 9,747 tokens in place of 4,874. An A100 has less of both, but of arithmetic still less: its roof is level from 153 FLOPs a byte on, that of an H100 from 295. So fewer rows an expert are enough, and fewer tokens. Twice
# the experts halve the rows of each, so twice as many tokens are needed; the product itself has not changed.
# </details>
#
# ## Recap
#
# - A loop over experts starves a GPU by the number of its launches and by their size; one grouped product cures both.
# - Few rows an expert mean few FLOPs a byte: experts want larger batches than a dense FFN.
# - Moving rows is not free: fold the gate into the hidden vector, fuse SwiGLU, gather instead of adding atomically.
# - From rung to rung the same sums come from nearer places, are ordered further ahead, by larger instructions.
# - A missing barrier need not show on a GPU. Run warp by warp, as late as allowed or at once, it does.
#
# **Claims settled here:** output and gradients of the kernels are the loop's, on the CPU; the same 12 launches serve 16 experts and 64; a step holds less than
# 0.7 of what torch's grouped product needs. Not settled: every claim of speed, which takes a GPU.
