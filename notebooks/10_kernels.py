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
# ![Left: a loop starts some twelve hundred small operations for one step of a layer with 64 experts, and the GPU waits between them. Right: twelve launches, each of which has work for the whole GPU: permute, gate and up, down, combine, and eight more for the gradients.](images/kernels.svg)
#
# The layer of chapters 02 to 05 is right, and on a GPU a plain loop over its experts would be slow: a GPU is fast at few, large
# things, and the loop does many small ones. This chapter writes the layer as a handful of kernels in CUDA C++, from a
# product that a beginner would write to one that feeds the tensor cores of an H100.
#
# **You will** count what a loop starts; find out when memory and when arithmetic sets the limit; run CUDA C++ *on your CPU*, take
# a barrier away and see it caught; follow one grouped product up a ladder of five rungs; cost the permutation in bytes;
# and take gradients through the kernels, equal to the loop's.
#
# **You need** chapters 02 and 04; for the kernels themselves some C++. **Reading time** 70 minutes. **Hardware** any laptop
# CPU with g++ (`apt install g++`; macOS has not been tried); without it you read recorded outputs. A GPU is only
# needed for the last section's timings.

# %% tags=["parameters"]
profile: str = "cpu"  # size of the run: smoke | cpu | gpu
seed: int = 0  # seed of tokens and weights: 0..2147483647
n_experts: int = 64  # experts of the layer that is counted: 8 | 16 | 32 | 64 | 128
top_k: int = 6  # experts a token visits: 1..8
gpu: str = "H100"  # whose peak and bandwidth are the roof: A100 | H100 | H200

# %% tags=["hide-input"]
try:
    from dsmoe_lite.labs import check_exercise, check_parameters, predict
    from dsmoe_lite.labs.guard import need
except ModuleNotFoundError:
    raise SystemExit(
        "This chapter needs dsmoe_lite: run `make setup` in the course's folder, then `make lab`."
    ) from None

check_parameters(globals())
need("torch", "altair", "vl_convert")

# %% tags=["hide-input"]
import os
import time
from unittest.mock import patch

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler speaks when it starts

import torch
from IPython.display import display
from ipywidgets import IntSlider, SelectionSlider
from torch.testing import assert_close

from dsmoe_lite import published
from dsmoe_lite.bench.backends import Layer
from dsmoe_lite.bench.kernels import newest_record
from dsmoe_lite.bench.launches import operations
from dsmoe_lite.bench.products import DENSE
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.errors import RunError
from dsmoe_lite.kernels import cuda
from dsmoe_lite.kernels.build import SOURCES, cpu_library_of
from dsmoe_lite.kernels.cuda_router import Rule, route
from dsmoe_lite.kernels.launch import launch_on_cpu
from dsmoe_lite.kernels.work import grouped_product, row_copies, tile_intensity
from dsmoe_lite.labs.kernels import or_recorded, show_source
from dsmoe_lite.layers.dispatch import dispatch
from dsmoe_lite.layers.experts import Experts
from dsmoe_lite.layers.router import Router
from dsmoe_lite.paths import NOTEBOOKS
from dsmoe_lite.viz import charts, renderer
from dsmoe_lite.viz.live import live

renderer.enable()
torch.set_num_threads(1)
torch.manual_seed(seed)
chapter = NOTEBOOKS / "10_kernels.ipynb"
T, D, F = 256, 64, 32  # tokens, model width, expert width: small, the CPU runs it
E, K = n_experts, top_k

# %% [markdown]
# ## Many small things
#
# One layer with 64 experts of which a token visits 6, as in DeepSeek-V2-Lite. A loop sends each expert its rows and
# does for it what the equation says: two products, SiLU, a product of numbers, one more product, times the gate.
#
# On a GPU each of these is a **kernel launch**: the CPU asks, the GPU runs one function on all its processors, and the next
# one starts when that is done. A launch costs the CPU some microseconds, however little there is to do.
#
# **Ask.** How many operations does such a loop start for one step of the layer, forward and backward?

# %%
predict("10-launches", None)  # a number

router = Router(D, MoEConfig(E, K, F), vocab_size=1)
x = torch.randn(T, D, requires_grad=True)
dy = torch.randn(T, D)
sent = dispatch(x, router(x, (1, T)))
assert len(sent.token) == T * K  # computed once, before we count


def step(backend):  # operations that torch starts, forward and backward
    experts, out = Experts(E, D, F, backend), []
    forward = operations(lambda: out.append(experts(sent)))
    return forward, operations(lambda: out[0].backward(dy, retain_graph=True))


rows = []
for backend, name in {
    "loop": "a loop over experts",
    "padded": "padded batches",
    "grouped": "torch's grouped product",
}.items():
    forward, backward = step(backend)
    rows.append({"way": name, "forward": len(forward), "backward": len(backward)})

# our kernels, counted without being run
with patch.object(cuda, "launch") as forward_calls:
    y = Experts(E, D, F, "cuda")(sent)
with patch.object(cuda, "launch") as backward_calls:
    y.backward(dy, retain_graph=True)
ours = {"forward": forward_calls.call_count, "backward": backward_calls.call_count}
rows.append({"way": "kernels of this chapter", **ours})
charts.launch_counts(rows)

# %%
print("forward: ", *(call.args[0] for call in forward_calls.call_args_list))
print("backward:", *(call.args[0] for call in backward_calls.call_args_list))
assert ours == {"forward": 4, "backward": 8}

# %% [markdown]
# The last row counts the kernels alone, not the operations by which torch prepares their arguments; the other rows count all that torch
# starts.
#
# What does one start cost *here*? No GPU is asked, but torch's own way to an operation is the same: look it up, check
# its arguments, record it for the gradient.

# %% tags=["measured"]
tiny = torch.randn(2, 2, requires_grad=True)
began = time.perf_counter()
for _ in range(2000):
    tiny @ tiny
each = (time.perf_counter() - began) / 2000
total = sum(rows[0][name] for name in ("forward", "backward"))
print(f"one product of 2 x 2: {1e6 * each:.1f} microseconds on this CPU")
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
# tokens must a batch have at least, so that arithmetic sets the limit and not memory? Guess; then move the slider.

# %%
predict("10-tokens", None)  # a number of tokens


def roof(tokens):
    points = []
    for name, experts, chosen, width in (
        ("dense FFN", 1, 1, K * 1408),  # the same work for a token
        (f"{K} of {E}", E, K, 1408),
    ):
        product = grouped_product(tokens * chosen, experts, 2048, width)
        points.append({"name": name, "intensity": product.intensity})
    return charts.roofline(
        points,
        peak=peak,
        bandwidth=bandwidth,
        device=f"{gpu}, bfloat16",
        title=f"{tokens:,} tokens: does memory or arithmetic set the limit?",
    )


live(
    roof,
    tokens=SelectionSlider(
        options=[2**i for i in range(17)],
        value=1024,
        description="tokens in a batch",
    ),
)

# %%
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
print(f"arithmetic sets the limit from {enough:,} tokens on")
least = 1e6 * one.seconds(peak, bandwidth)
print(
    f"\none expert with {one.flops / (2 * 2048 * 1408):.0f} rows, one of its three products:"
)
print(
    f"at least {least:.1f} microseconds on all of {gpu}, {device['multiprocessors']} multiprocessors"
)

# %% [markdown]
# **What to notice.** Two things starve a GPU here. Each product is over in a few microseconds, about as long as it takes to start
# the next; and it has too few rows to fill all multiprocessors at once. Both are cured by *one*
# launch for all experts, a **grouped product**: one kernel whose blocks work on tiles of different experts at the same time
# (MegaBlocks {cite:p}`MegaBlocks` showed that no token needs to be dropped for it). What it does not cure is intensity: weights that
# few rows use must still be read. Experts want large batches.
#
# ## CUDA in ten lines, on your CPU
#
# A CUDA **kernel** is a function that runs once for every **thread**. Threads come in **blocks** of up to 1024. A block runs on one
# multiprocessor, whose **shared memory** all its threads see; 32 threads in a row are a **warp** and execute together. Threads of a block wait
# for each other at a **barrier**, `__syncthreads()`; blocks do not wait for each other at all.
#
# This kernel turns 128 numbers around. Each thread puts one number into shared memory and takes another one out:

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
# On a GPU `nvcc` compiles that. Here `g++` does, with a header of this package, `cuda_on_cpu.h`, which gives each thread a **fiber**: a stack of
# its own, and a place where it goes on. Its scheduler lets one warp run as far as it gets, then the next:

# %%
show_source("cuda_on_cpu.h", "inline bool run_warp")


# %%
def turn_around():
    x = torch.arange(128.0)
    launch_on_cpu(cpu_library_of(reverse), "run", x)
    print("reversed:", torch.equal(x, torch.arange(128.0).flip(0)))


or_recorded(turn_around, chapter)

# %% [markdown]
# **Ask.** Take the barrier away. On a GPU the result may still be right, most of the time. What happens here? And if only the
# first warp reaches a barrier, and the others another one, two lines further down?

# %%
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


or_recorded(without_barrier, chapter)

# %%
or_recorded(two_barriers, chapter)

# %% [markdown]
# **What to notice.** Shared memory starts as NaN, and the first two warps read what the last two have not written yet. That is how the
# shim finds a missing barrier: not by luck, as on a GPU, but because one warp runs ahead as far as it may. It can
# also run the warps in other orders, and do what is asynchronous as late as allowed, or at once. The package's tests take
# *every* wait out of *every* kernel of this chapter, one at a time, and demand that the shim notices.
#
# ## The router in one kernel
#
# Scores, the best groups, the K best experts, gates and the count of tokens for each expert: in torch a dozen operations, each of which
# reads and writes all of it. Here a warp takes a token; lane $l$ looks after experts $l, l + 32, \dots$; the largest score is found by
# comparing with the lane 16 away, 8 away, 4, 2, 1, without any memory at all:

# %%
show_source("router.cuh", "int warp_argmax")

# %% [markdown]
# **Prove** it equal to the `Router` of chapters 02 and 05, with DeepSeek-V3's rule: sigmoid, groups by their best two, a bias that chooses and
# is in no gate.


# %%
def same_choices():
    config = MoEConfig(
        64, 6, F, scoring_func="sigmoid", expert_bias=True, n_group=8, topk_group=3,
        group_score="top2", norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    theirs = Router(D, config, vocab_size=1)
    theirs.expert_bias.normal_(std=0.05)
    wanted = theirs(x.detach(), (1, T))
    rule = Rule(6, "sigmoid", 8, 3, "top2", norm_topk_prob=True, scale=2.5)
    _, ids, gates, counts = route(wanted.logits.detach(), rule, theirs.expert_bias)
    assert torch.equal(ids, wanted.topk_ids)
    assert_close(gates, wanted.gates.detach(), rtol=0, atol=1e-6)
    assert torch.equal(counts.long(), wanted.counts)
    print(
        f"{T} tokens, 64 experts: same ids, gates to 1e-6, counts {counts[:6].tolist()} ..."
    )


or_recorded(same_choices, chapter)

# %% [markdown]
# ## What moving costs
#
# Before the products every token's row is copied to where its experts' rows stand (**permute**), and afterwards the results
# are added up (**combine**). Neither multiplies anything worth counting, so bytes decide.
#
# **Ask.** Of the time that the forward pass of V2-Lite's routed experts takes at least, with 16K tokens: which share goes into moving rows?

# %%
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
# where blocks share their tiles.
#
# ### 1. One thread an output

# %%
show_source("gemm_naive.cuh", "void gemm_naive")

# %% [markdown]
# Two numbers fetched for one multiplication and one addition: a "tile" of one by one.
#
# ### 2. Tiles in shared memory
#
# 256 threads fetch 64 rows of A and 64 columns of B, 16 deep, and each multiplies $4 \times 4$ of the results from there. Two
# barriers: nobody multiplies before all have fetched; nobody fetches the next before all have multiplied. In the package this rung also has the gradients and
# float32.

# %%
show_source("gemm_tiled.cuh", "void gemm(")

# %% [markdown]
# ### 3. Tensor cores, CUDA's own words
#
# The same tiles in bfloat16; `wmma::mma_sync` lets a whole warp multiply $16 \times 16$ by $16 \times 16$ at once. Which thread holds which
# number is kept secret, so results take a detour through shared memory.
#
# ### 4. `mma.sync`, copies that run ahead, and a swizzle
#
# Now 128 by 128, three stages deep: while one stage is multiplied the next two are on their way (`cp.async`), past the
# registers. And here shared memory itself becomes the limit. It has 32 **banks** of 4 bytes; in one turn each gives one
# number. `ldmatrix` reads 8 rows' pieces of 16 bytes at once. A row of the tile is 128 bytes, so that the same piece of all rows lies in the *same* four banks.
#
# **Ask.** How many turns does it take to read piece 3 of rows 0 to 7? Find a permutation of the pieces of each row that makes it one, for
# every piece.

# %%
predict("10-turns", None)  # a number; a rule


def swizzled(row, piece):  # the group of banks that a piece of a row lies in
    return piece ^ (row % 8)


plain = [list(range(8)) for _ in range(8)]
mixed = [[swizzled(row, piece) for piece in range(8)] for row in range(8)]
live(
    lambda piece: charts.bank_groups({"as it lies": plain, "swizzled": mixed}, piece),
    piece=IntSlider(3, 0, 7, description="piece that is read"),
)

# %%
show_source("gemm_mma.cuh", "int place(int row")

# %% [markdown]
# The copies ahead bring a new kind of mistake: to multiply what has not landed. On a GPU the result then
# depends on the timing. Here a copy comes as late as the program allows. Take the wait away:


# %%
def without_wait():
    wait = "    copy_async_wait<STAGES - 2>();\n"
    text = (SOURCES / "gemm_mma.cuh").read_text()
    assert text.count(wait) == 1
    launcher = """
extern "C" int run(const bf16* a, const bf16* b, const int* ends, int rows, bf16* out) {
  Sizes s{ends, 1, rows, 0, 128, 256};
  dim3 grid{unsigned(most_tiles<Layout::NT, mma_rung::BM, mma_rung::BN>(s))};
  return launch(mma_rung::gemm<Layout::NT, Form::ONE, Store<bf16>>, grid, mma_rung::THREADS,
                sizeof(mma_rung::Shared), nullptr, Operands<bf16>{{a}, {b}}, s, Store<bf16>{out});
}
"""
    a = torch.randn(100, 256).bfloat16()
    b = torch.randn(128, 256).bfloat16()
    ends, exact = torch.tensor([100], dtype=torch.int32), a.double() @ b.double().T
    for name, source in {
        "with the wait": text,
        "without": text.replace(wait, ""),
    }.items():
        out = torch.empty(100, 128, dtype=torch.bfloat16)
        launch_on_cpu(cpu_library_of(source + launcher), "run", a, b, ends, 100, out)
        right = (out.double() - exact).abs() < 0.01 * exact.abs() + 0.05
        print(f"{name:13} {int(right.sum()):6,} of {right.numel():,} right,", end=" ")
        print(f"{int(out.isnan().sum()):,} NaN")


or_recorded(without_wait, chapter)

# %% [markdown]
# ### 5. Hopper: `wgmma`, TMA, and blocks that stay
#
# An H100's tensor cores are so fast that warps have no time left to fetch for them. So roles are split. One thread does nothing but order boxes
# of tiles from the **tensor memory accelerator**, as far ahead as there are stages, and waits until a stage is free:

# %%
show_source("gemm_hopper.cuh", "void produce(")

# %% [markdown]
# Two **warpgroups** of 128 threads wait until a stage is full and multiply straight from shared memory (`wgmma`), 128 rows by 256
# columns; each keeps its sums in 128 registers a thread. A block stays on its multiprocessor and takes one tile after the
# other, of whatever expert is next, so that the copies for the next tile begin while this one is being written.
#
# An expert's last tile overlaps the next expert's rows. Forward that costs a little work, and those results are not
# stored. In the gradient of the weights, where the rows are *summed over*, they must count as zero; so both sides are cleared,
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
            limit = 1e-6 if dtype == torch.float32 else 2**-8
            assert error < limit
            print(f"{rung:7} {str(dtype)[6:]:9} within {limit:.1e}")


or_recorded(every_rung, chapter)

# %% [markdown]
# **Ask.** What can each rung reach at most, if all it fetches came from memory? Which of them could reach half of the peak?

# %%
predict("10-ladder", None)  # names

tiles = {
    "1 naive": (1, 1), "2, 3 tiles of 64": (64, 64), "4 tiles of 128": (128, 128),
    "5 tiles of 128 x 256": (128, 256),
}  # fmt: skip
charts.roofline(
    [
        {"name": name, "intensity": tile_intensity(*sides)}
        for name, sides in tiles.items()
    ],
    peak=peak,
    bandwidth=bandwidth,
    device=f"{gpu}, bfloat16",
    title="What if every tile came from memory?",
)

# %% [markdown]
# **What to notice.** None of them. (The roof is that of the tensor cores, which rungs 1 and 2 do not use: theirs is far lower.) Larger tiles
# alone do not do it: registers and shared memory end before. The rest comes from the **L2 cache**: blocks that run at the
# same time share rows or columns, so that most fetches never reach memory. That is why the order in which blocks take tiles matters: here
# down the rows of an expert first, so that neighbours share the columns of its matrix.
#
# ## Gradients: the same product, lying differently
#
# The backward pass has five products of two more kinds. Both are this one, with A or B lying the other way round. The letters are those
# of BLAS, one for A and one for B: N as it lies, T transposed.
#
# | | A | B | |
# |---|---|---|---|
# | forward | rows | matrix, transposed | `NT` |
# | gradient of the rows | rows | matrix | `NN` |
# | gradient of the matrix | rows, transposed | rows | `TN`: the sum runs over an expert's rows |
#
# The tensor cores read either way, transposed by `ldmatrix.trans` or by a bit of the instruction. What a product ends with is fused again: where $dL/d\mathbf{h}$ is complete, still in
# registers, SwiGLU's gradient is taken, and it is written *over* $\mathbf{a} = W_{gate}\mathbf{x}$ and $\mathbf{b} = W_{up}\mathbf{x}$, which nobody
# needs any more:

# %%
show_source("grouped.cuh", "struct SwiGLUBackward")

# %% [markdown]
# **Prove** it: output and all gradients by the float32 kernels of rung 2, against the loop in float64. The package's tests do the same for
# rungs 4 and 5 in bfloat16.


# %%
def trains_alike():
    tokens, width, hidden = 60, 24, 40
    results = []
    for backend, dtype in (("loop", torch.float64), ("cuda", torch.float32)):
        torch.manual_seed(seed)
        experts = Experts(5, width, hidden, backend)
        for weight in experts.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        experts = experts.to(dtype)
        start = torch.randn(tokens, width).to(dtype).requires_grad_()
        routing = Router(width, MoEConfig(5, 2, hidden), vocab_size=1).to(dtype)
        out = experts(dispatch(start, routing(start, (1, tokens))))
        wanted = (start, *experts.parameters(), *routing.parameters())
        results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    names = "y", "dx", "dW gate", "dW up", "dW down", "dW router"
    for name, exact, mine in zip(names, *results, strict=True):
        error = float((mine.double() - exact).abs().max() / exact.abs().max())
        assert error < 1e-5
        print(f"{name:9} within 1e-5 of the loop")


or_recorded(trains_alike, chapter)

# %% [markdown]
# How much memory does a step hold at most, beside the weights and their gradients? torch records every allocation, and what is allocated does
# not depend on the device. The widths of V2-Lite, a sixteenth of each:

# %%
predict("10-memory", None)  # of the loop's peak, the kernels' share


def peak_memory():
    layer = Layer(MoEConfig(64, 6, 88), d_model=128, n_tokens=256)
    peaks = {
        name: layer.contender(name, "cpu", torch.float32).peak_bytes()
        for name in ("loop", "grouped", "cuda")
    }
    for name, peak_bytes in peaks.items():
        print(f"{name:8} {peak_bytes / 1e6:5.1f} MB, {peak_bytes / peaks['loop']:4.0%}")
    assert peaks["cuda"] < 0.7 * peaks["grouped"]


or_recorded(peak_memory, chapter)

# %% [markdown]
# ## The same in Triton
#
# Triton writes kernels in Python: a *program* works on whole tiles, and the compiler decides what a thread does, how tiles
# are staged and swizzled. `Experts(backend="triton")` is its twin of the experts' kernels, without the router and without the lower rungs. What you give up is the say in those decisions; what you gain
# is fewer and simpler lines, and float16 besides.

# %%
own = [path for path in SOURCES.iterdir() if path.suffix in (".cu", ".cuh")]
own_lines = sum(len(path.read_text().splitlines()) for path in own)
twins = len((SOURCES / "triton_twins.py").read_text().splitlines())
print(
    f"{own_lines:,} lines of CUDA C++ with all rungs and the router, {twins} of Triton"
)

# %% [markdown]
# ## What a GPU says
#
# `dsmoe bench kernels --record` on a machine with a GPU checks every rung, Triton, torch's grouped product and whole layers against
# float64, and then times them. This section draws the newest record.

# %%
record = newest_record()


def what_a_gpu_said(record):
    made = record["provenance"]
    print(f"{made['device']}, torch {made['torch']}, {record['date'][:10]}\n")
    for row in record["ladder"]:
        print(
            f"{row['by']:20} {row['TFLOP/s']:6.0f} TFLOP/s, {row['of dense']:4.0%} of dense"
        )
    print()
    for row in record["goals"]:
        value = "not measured" if row["value"] is None else f"{row['value']:.2f}"
        print(f"{row['what']:48} {value:>12}   goal {row['goal']}")
    at = {"experts": 64, "k": 2048, "routing": "uniform"}
    mine = [row for row in record["products"] if at.items() <= row.items()]
    ways = ("hopper", "mma", "triton", "F.grouped_mm")
    display(
        charts.product_speed(
            [row for row in mine if row["by"] in ways],
            dense=[row for row in mine if row["by"] == DENSE],
        )
    )


if record is None:
    print("No GPU run is recorded yet.")
else:
    what_a_gpu_said(record)

# %% [markdown]
# As long as no run is recorded, what can be said is this: the kernels compile for sm_80, sm_90 and sm_90a, the two upper rungs keep everything in registers
# and contain the instructions they are meant to contain (the tests disassemble them), and on the CPU they are right. What the CPU
# cannot show is a missing fence, which does nothing there, or an instruction that we misread: `wgmma`, TMA and `ldmatrix` do there what we
# understood from the manual. Nothing is claimed about their speed. On a machine with a GPU, `auto` compiles them at first use, compares them with torch once, and goes on without
# them where they do not compile or differ.
#
# ## Exercises
#
# **1. A bug from the wild** (20 minutes). Before a grouped product, somebody must say which tile of rows belongs to which expert. This
# kernel does: thread $e$ counts the tiles up to and with expert $e$; then all threads look up their tiles. It follows a
# kernel of a serving engine, and has the bug that a pull request there reports. (To check an answer needs g++.) Return the kernel mended.


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


print(tile_kernel())


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


verdict = check_exercise(mended, finds_owners)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def mended(kernel):
#     return kernel.replace("  for (int t =", "  __syncthreads();\n  for (int t =")
# ```
#
# A thread of the second warp may search before the first warp has written its ends. Inside the `if` a barrier would be
# another bug: threads without an expert never come there. Found in SGLang's `moe_align_block_size` (pull request 37663); a
# sister, a missing `__syncwarp()` in a router (11183), now and then made a sum of gates zero, and the output infinite.
# </details>
#
# **2. Code** (15 minutes). A tile whose rows are 64 bytes long has only 4 pieces in a row, and two rows share the 8 groups of banks: piece
# $p$ of row $r$ lies in group $(4r + p) \bmod 8$. Where should piece $p$ of row $r$ stand in its row, so that any piece of 8 rows in a row is
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
# ## Recap
#
# - A loop over experts starves a GPU by the number of its launches and by their size; one grouped product cures both.
# - Few rows an expert mean few FLOPs a byte: experts want larger batches than a dense FFN.
# - Moving rows is not free: fold the gate into the hidden vector, fuse SwiGLU, gather instead of adding atomically.
# - From rung to rung the same sums come from nearer places, are ordered further ahead, by larger instructions.
# - A missing barrier need not show on a GPU. Run warp by warp, as late as allowed or at once, it does.
