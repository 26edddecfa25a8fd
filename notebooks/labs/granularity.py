# %% [markdown]
# # Granularity: m at equal cost
#
# Take a layer of experts, cut each expert into $m$ narrow ones, and let every token use $m$ times as many. Together
# the narrow experts have the same weights and do the same work as before. But a token can now pick its own
# combination of pieces. DeepSeekMoE (arXiv:2401.06066) calls this *fine-grained expert segmentation*.
#
# **What does a larger $m$ buy, and what does it cost?** You will write the config of a cut layer, make room for its
# larger router, count the choices that a token gains, and cut a layer without changing its output. Then you train
# models with $m$ = 1, 2 and 4.
#
# Chapters 04 and 05 of the course are the background. Your lab starts from a layer with {{n_experts}} experts of
# width {{width}}, of which a token uses {{top_k}}. Other students have other numbers and other rules, so read yours.
# Run every cell as you go. Each answer is graded alone: **everything that an answer needs must be in its cell**,
# apart from the given code and the parameters.

# %% tags=["parameters"]
n_experts: int = 8  # experts before the cut: 4..32
top_k: int = 2  # of those, experts that a token uses: 1..4
width: int = 64  # hidden channels of an expert before the cut: 16..256
shared: str = "within"  # what becomes of shared experts: within | cut | whole
budget: str = "active"  # weights that must not grow: active | stored
multiple: int = 8  # widths are multiples of this: 1..64
reach: str = "at most"  # how the device limit is meant: at most | exactly
layout: str = "stacked"  # rows of gate and up in one matrix: stacked | interleaved
gates: str = "softmax"  # how scores become gates: softmax | sigmoid | divided
seed: int = 0  # of weights and tokens: 0..999999
profile: str = "cpu"  # size of the experiment at the end: smoke | cpu

# %% tags=["given"]
import math

import torch

# %%
from dsmoe_lite.labs import check_exercise, report


def describe(m):
    E, K, F = m * n_experts, m * top_k, width // m
    return f"m = {m}: {K} of {E} experts of width {F}, {math.comb(E, K):,} choices"


print(*map(describe, (1, 2, 4)), sep="\n")

# %% [markdown]
# In every line a token uses the same number of hidden channels, and the layer has the same number. Only the choices
# grow, and they grow fast.

# %% [markdown] question="config"
# ## 1. What stays equal? (2 points)
#
# Let $E$ be the number of experts, $K$ the number that a token uses, and $F$ the width of an expert (its hidden
# channels). The cut makes $mE$ experts of width $F/m$, of which a token uses $mK$.
#
# Now add $K_s$ **shared experts**. Every token visits them, and the router neither scores nor chooses them; it
# chooses among the other experts, which are called *routed*. What the cut does to shared experts is a matter of
# design. Your rule is **{{shared}}**:
#
# - `within`: before the cut there are none. After the cut, $K_s$ of the $mE$ narrow experts become shared. They count
#   among the $mK$ experts that a token uses.
# - `cut`: before the cut there are $K_s$ shared experts of width $F$ beside the $E$ routed ones. They are cut like
#   all others.
# - `whole`: before the cut there are the same $K_s$ shared experts as under `cut`. But they stay as they are, and
#   only the routed experts are cut.
#
# Under each rule, a token uses as many channels after the cut as before, and the layer holds as many.
#
# Write `fine_grained(n_experts, top_k, width, n_shared, m)`. It gets $E$, $K$, $F$, $K_s$ and an $m$ that divides
# $F$. It returns the layer after the cut as a dict of five whole numbers:
#
# - `"n_routed"`: routed experts; `"top_k"`: those that the router chooses for a token; `"width"`: the width of each,
# - `"n_shared"`: shared experts; `"shared_width"`: the width of each.


# %% tags=["answer"] question="config"
def fine_grained(n_experts, top_k, width, n_shared, m):
    return None


# %% tags=["check"] question="config"
def check(fine_grained):
    for E, K, F, K_s, m in ((8, 2, 12, 1, 3), (6, 1, 20, 3, 4), (5, 3, 16, 2, 1)):
        found = fine_grained(E, K, F, K_s, m)
        names = {"n_routed", "top_k", "width", "n_shared", "shared_width"}
        assert set(found) == names, "the dict must have the five keys of the text"
        before = 0 if shared == "within" else K_s
        always = found["n_shared"] * found["shared_width"]
        used = found["top_k"] * found["width"] + always
        assert used == (K + before) * F, (
            "a token must use as many channels as before, shared experts included"
        )
        held = found["n_routed"] * found["width"] + always
        assert held == (E + before) * F, (
            "the layer must hold as many channels as before the cut"
        )


verdict = check_exercise(fine_grained, check)


# %% tags=["solution"] question="config"
def fine_grained(n_experts, top_k, width, n_shared, m):
    taken = n_shared if shared == "within" else 0
    return {
        "n_routed": m * n_experts - taken,
        "top_k": m * top_k - taken,
        "width": width // m,
        "n_shared": m * n_shared if shared == "cut" else n_shared,
        "shared_width": width if shared == "whole" else width // m,
    }


# %% tags=["hidden"] question="config"
def check(answer, reference, random):
    for m in (1, 2, 3, 4, 8):
        K_s, K = random.randint(1, m), random.randint(2, 6)
        given = (random.randint(8, 64), K, m * random.randint(4, 200), K_s, m)
        found, expected = answer(*given), reference(*given)
        assert set(found) == set(expected)
        assert all(found[name] == expected[name] for name in expected)


# %% [markdown] question="router"
# ## 2. Who pays for the router? (2 points)
#
# "Equal cost" was not quite true: the router grows. Let $D$ be the model width. A SwiGLU expert of width $F$ has
# three matrices, $3DF$ weights in all. The router has one row of $D$ weights for each expert: $ED$ weights before the
# cut, $mED$ after it. If the total must not grow, the narrow experts have to be even narrower than $F/m$.
#
# Your budget is **{{budget}}**:
#
# - `active`: the weights that one token meets, which are the whole router and the experts that this token uses. They
#   set the FLOPs: a forward pass costs two for each.
# - `stored`: all weights of the layer. They set the memory.
#
# Write `width_left(n_experts, top_k, width, m)`. It gets $E$, $K$, $F$ and $m$, and returns the width that the narrow
# experts can have: the largest multiple of {{multiple}} for which the cut layer ($mK$ of $mE$ experts) has at most as
# many {{budget}} weights as the uncut layer ($K$ of $E$ experts of width $F$). If even width {{multiple}} is too
# much, the answer is 0. There are no shared experts here, $F$ need not be a multiple of anything, and you need not
# know $D$. (Why not?)


# %% tags=["answer"] question="router"
def width_left(n_experts, top_k, width, m):
    return None


# %% tags=["check"] question="router"
def check(width_left):
    assert width_left(12, 2, 20 * multiple, 1) == 20 * multiple, (
        "m = 1 cuts nothing: nothing may change"
    )
    for E, K, F, m in ((8, 2, 40 * multiple, 2), (16, 1, 40 * multiple, 5)):
        found = width_left(E, K, F, m)
        assert found >= 0, "no width is negative"
        assert found % multiple == 0, "the width must be a multiple of yours"
        assert found * m < F, (
            "the router has grown, so the m pieces together must be narrower than F"
        )
        assert width_left(3 * E, 3 * K, F, m) == found, (
            "three times E and K multiply everything by three: the width stays"
        )


verdict = check_exercise(width_left, check)


# %% tags=["solution"] question="router"
def width_left(n_experts, top_k, width, m):
    counted = top_k if budget == "active" else n_experts  # experts that count
    before = n_experts + 3 * counted * width  # weights over D
    left = before - m * n_experts  # for the narrow experts
    return max(0, left // (3 * m * counted) // multiple * multiple)


# %% tags=["hidden"] question="router"
def check(answer, reference, random):
    for m in (2, 3, 4, 8):
        for above in range(m + 1):  # F / m near a multiple: here the router decides
            E, K = random.randint(8, 128), random.randint(1, 8)
            F = m * multiple * random.randint(1, 30) + above
            assert answer(E, K, F, m) == reference(E, K, F, m)
    few = (128, 1, 8 * multiple, 8)  # the router may take all
    assert answer(*few) == reference(*few)


# %% [markdown] question="choices"
# ## 3. What does it buy? (3 points)
#
# A token's experts are a set: $mK$ out of $mE$. Without a limit there are $\binom{mE}{mK}$ sets. Because that number
# is so large, count in **bits**, its logarithm to base 2: each further bit doubles the choices.
#
# In a large model the experts are spread over $G$ devices, $mE/G$ on each. A set *reaches* a device if one or more of
# its experts are there. Each device that a token reaches costs a message over the network, so the router gets a limit
# $M$. Your rule is **{{reach}}**:
#
# - `at most`: a token's set reaches at most $M$ devices.
# - `exactly`: it reaches $M$ devices, no fewer and no more, so that every token sends the same number of messages.
#
# *Example.* Four experts on $G = 2$ devices, $\{0, 1\}$ and $\{2, 3\}$; a token uses two. Of the six pairs, two reach
# one device ($\{0, 1\}$ and $\{2, 3\}$), and four reach both.
#
# Write `choice_bits(n_experts, top_k, m, n_devices, limit)`. It gets $E$, $K$, $m$, $G$ (which divides $mE$) and $M$,
# and returns the logarithm to base 2 of the number of sets that your rule allows. You may assume that at least one
# set is allowed. Do not list the sets: for 8 of 64 there are more than four billion. `math.comb` and `math.log2` work
# with whole numbers of any size.


# %% tags=["answer"] question="choices"
def choice_bits(n_experts, top_k, m, n_devices, limit):
    return None


# %% tags=["check"] question="choices"
def check(choice_bits):
    pairs = [2 ** choice_bits(4, 2, 1, 2, limit) for limit in (1, 2)]
    assert abs(pairs[0] - 2) < 1e-6, "limit 1: see the example in the text"
    assert (reach == "exactly") == (pairs[1] < 5), "limit 2: read your rule again"
    counts = [2 ** choice_bits(8, 2, 2, 4, limit) for limit in (1, 2, 3, 4)]
    every = math.comb(16, 4)
    assert max(counts) < every * 1.000001, (
        "a limit cannot make more sets than there are without it"
    )
    total = counts[-1] if reach == "at most" else sum(counts)
    assert abs(total / every - 1) < 1e-6, (
        "each set of 4 of 16 experts reaches 1, 2, 3 or 4 devices: count each once"
    )


verdict = check_exercise(choice_bits, check)


# %% tags=["solution"] question="choices"
def choice_bits(n_experts, top_k, m, n_devices, limit):
    each, k = m * n_experts // n_devices, m * top_k

    def reaching(j):  # sets that reach j devices; inclusion and exclusion
        all_of_j = sum(
            (-1) ** (j - i) * math.comb(j, i) * math.comb(i * each, k)
            for i in range(j + 1)
        )
        return math.comb(n_devices, j) * all_of_j

    allowed = range(1, limit + 1) if reach == "at most" else [limit]
    return math.log2(sum(reaching(j) for j in allowed))


# %% tags=["hidden"] question="choices"
def check(answer, reference, random):
    for m, n_devices in ((1, 4), (2, 4), (3, 2), (4, 8), (8, 4)):
        E, K = random.choice((8, 16, 24)), random.randint(2, 3)
        fewest = -(-m * K // (m * E // n_devices))  # devices that hold m K experts
        limit = random.randint(max(2, fewest), min(n_devices, m * K))
        given = (E, K, m, n_devices, limit)
        assert abs(answer(*given) - reference(*given)) < 1e-4


# %% [markdown] question="surgery"
# ## 4. Cut without a scar (3 points)
#
# Now cut a layer so that **its output stays the same**. Write $\mathbf{u}$ for a token's vector of $D$ numbers. A
# SwiGLU expert is a sum over its hidden channels $c$:
#
# $$
# \operatorname{FFN}(\mathbf{u}) = \sum_{c=1}^{F} \mathbf{d}_c \,
# \operatorname{silu}(\mathbf{g}_c^\top \mathbf{u})\, (\mathbf{p}_c^\top \mathbf{u}),
# $$
#
# with $\operatorname{silu}(x) = x\,\sigma(x)$ and $\sigma(x) = 1/(1 + \exp(-x))$. A channel has three vectors: its
# gate row $\mathbf{g}_c$, its up row $\mathbf{p}_c$ and its down column $\mathbf{d}_c$. Divide the channels into $m$
# groups in any way you like: the groups are $m$ narrow experts, and their outputs add up to the output of the whole
# one.
#
# **The first trap is the layout.** A channel must keep its three vectors. But many implementations store gate rows
# and up rows in *one* matrix, so that one product computes both. Your layout, before and after the cut, is
# **{{layout}}**:
#
# - `stacked`: all $F$ gate rows, then all $F$ up rows.
# - `interleaved`: gate row of channel 1, up row of channel 1, gate row of channel 2, and so on.
#
# **The second trap is the size of the output.** The router has a row $\mathbf{e}_i$ for each expert $i$, computes the
# logits $z_i = \mathbf{e}_i^\top \mathbf{u}$ and chooses the experts with the largest. If each piece gets a copy of
# its expert's row, the router chooses the pieces of the same experts as before. But each expert's output is
# multiplied by a gate, and the gates may change. Your gate of a chosen expert $i$ is **{{gates}}**:
#
# - `softmax`: $\exp z_i$, divided by the sum of $\exp z_j$ over all experts $j$ of the layer.
# - `sigmoid`: $\sigma(z_i)$.
# - `divided`: $\sigma(z_i)$, divided by the sum of $\sigma(z_j)$ over the experts $j$ that this token uses.
#
# At the end the layer multiplies the sum of the outputs by a constant, the **scale**. Before the cut the scale is 1.
#
# The given code holds such a layer as three tensors: `router` (E, D), `gate_up` (E, 2F, D) and `down` (E, D, F).


# %% tags=["given"] question="surgery"
def new_layer(seed, n_experts, width, d_model=6):
    """Random weights of a layer: router, gate_up, down, in float64."""
    random = torch.Generator().manual_seed(seed)
    E, F, D = n_experts, width, d_model
    shapes = ((E, D), (E, 2 * F, D), (E, D, F))
    return tuple(torch.randn(s, generator=random, dtype=torch.float64) for s in shapes)


def expert_outputs(u, gate_up, down):
    """The output of every expert for tokens u (T, D), as (T, E, D)."""
    rows = torch.einsum("td,erd->ter", u, gate_up)
    if layout == "stacked":
        gate, up = rows.chunk(2, dim=2)
    else:
        gate, up = rows[..., 0::2], rows[..., 1::2]
    hidden = torch.nn.functional.silu(gate) * up
    return torch.einsum("tef,edf->ted", hidden, down)


def run_layer(u, router, gate_up, down, top_k, scale=1):
    """The output of the layer (T, D): the sum of the chosen experts, times gates."""
    logits = u @ router.T
    scores = logits.softmax(dim=1) if gates == "softmax" else logits.sigmoid()
    weights, ids = scores.topk(top_k, dim=1)
    if gates == "divided":
        weights = weights / weights.sum(dim=1, keepdim=True)
    chosen = expert_outputs(u, gate_up, down)[torch.arange(len(u))[:, None], ids]
    return scale * (weights[..., None] * chosen).sum(dim=1)


# %% [markdown] question="surgery"
# Write `cut_layer(router, gate_up, down, m)` for an $m$ that divides $F$. It returns four things: the three tensors
# of the cut layer, with $mE$ experts of width $F/m$, and the scale. With them, `run_layer` and $mK$ experts per token
# must give what the uncut layer gives with $K$. The pieces of expert 0 come first, then those of expert 1, and so on.
#
# The check below looks at the experts, but neither at the rows of the router nor at the scale. Test those yourself:
# `new_layer` makes a layer, and `run_layer` runs it before and after the cut.


# %% tags=["answer"] question="surgery"
def cut_layer(router, gate_up, down, m):
    return None


# %% tags=["check"] question="surgery"
def check(cut_layer):
    layer = new_layer(seed, n_experts=3, width=8)
    u = torch.randn(20, 6, dtype=torch.float64)
    for m in (2, 4):
        router, gate_up, down, _ = cut_layer(*layer, m)
        assert len(router) == len(gate_up) == len(down) == 3 * m, (
            "there are m E experts"
        )
        assert gate_up.shape[1:] == (16 // m, 6), "gate_up is (m E, 2 F / m, D)"
        assert down.shape[1:] == (6, 8 // m), "down is (m E, D, F / m)"
        pieces = expert_outputs(u, gate_up.double(), down.double()).unflatten(1, (3, m))
        off = (pieces.sum(dim=2) - expert_outputs(u, *layer[1:])).abs().max()
        assert off < 1e-3, "the m pieces of an expert must add up to that expert"


verdict = check_exercise(cut_layer, check)


# %% tags=["solution"] question="surgery"
def cut_layer(router, gate_up, down, m):
    E, D, F = down.shape
    if layout == "stacked":
        pieces = gate_up.reshape(E, 2, m, F // m, D).transpose(1, 2)
    else:
        pieces = gate_up.reshape(E, m, F // m, 2, D)
    columns = down.reshape(E, D, m, F // m).transpose(1, 2)
    return (
        router.repeat_interleave(m, dim=0),
        pieces.reshape(m * E, 2 * F // m, D),
        columns.reshape(m * E, D, F // m),
        1 if gates == "sigmoid" else m,
    )


# %% tags=["hidden"] question="surgery"
def check(answer, reference, random):
    for E, K, F, m in ((5, 2, 12, 2), (6, 1, 12, 3), (4, 3, 8, 4), (7, 2, 10, 5)):
        layer = new_layer(random.getrandbits(31), E, F)
        drawn = torch.Generator().manual_seed(random.getrandbits(31))
        u = torch.randn(30, 6, generator=drawn, dtype=torch.float64)
        *tensors, scale = answer(*layer, m)
        cut = [tensor.double() for tensor in tensors]
        for found, expected in zip(cut, reference(*layer, m)[:3], strict=True):
            assert found.shape == expected.shape
        pieces = expert_outputs(u, *cut[1:]).unflatten(1, (E, m)).sum(dim=2)
        pairs = (
            (pieces, expert_outputs(u, *layer[1:])),
            (run_layer(u, *cut, m * K, float(scale)), run_layer(u, *layer, K)),
        )
        for found, expected in pairs:
            assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


# %% [markdown]
# ## See it at work
#
# Does all this choice help a model? Train a small language model with your layer, uncut and cut: $m$ = 1, 2 and 4 on
# the same data, with three seeds each, because one seed proves nothing. The weights and the FLOPs of the experts are
# the same for every $m$; those of the router are not. The gates are a softmax, and the scale is $m$.
#
# Before you run the cell, write down two guesses. Which $m$ has the lowest loss? And how many *different* sets of
# experts do 4,096 tokens use at $m = 4$?

# %%
from dataclasses import replace

import altair as alt
import pandas as pd
from torch.nn.functional import cross_entropy

from dsmoe_lite import MoEConfig, TrainConfig, Transformer, preset, train
from dsmoe_lite.data.batches import Batches
from dsmoe_lite.data.tokenizer import load_tokenizer
from dsmoe_lite.data.world import World
from dsmoe_lite.viz import renderer

renderer.enable()
torch.set_num_threads(1)  # the models are small: more threads only wait for each other
world = World()
tokenizer = load_tokenizer(world, 1024)
heldout = Batches(world, tokenizer, batch_size=64, seq_len=64, split="heldout")
text = next(heldout).tokens
steps = {"smoke": 10, "cpu": 150}[profile]
rows = []
for number in (1, 2, 3):
    for m in (1, 2, 4):
        torch.manual_seed(seed + number)
        moe = MoEConfig(
            n_routed_experts=m * n_experts,
            top_k=m * top_k,
            expert_width=width // m,
            routed_scaling_factor=float(m),
        )
        config = replace(
            preset("course-dense"), vocab_size=tokenizer.get_vocab_size(), moe=moe
        )
        model = Transformer(config)
        batches = Batches(world, tokenizer, batch_size=8, seq_len=64)
        run = train(model, batches, TrainConfig(steps=steps, seed=seed + number))
        with torch.no_grad():
            output = model.eval()(text[:, :-1])
        loss = cross_entropy(output.logits.flatten(0, 1), text[:, 1:].flatten())
        sets = {tuple(sorted(ids)) for ids in output.routings[0].topk_ids.tolist()}
        rows.append(
            {
                "m": m,
                "run": f"seed {seed + number}",
                "loss": loss.item(),
                "sets": len(sets),
                "seconds": run.seconds,
            }
        )
frame = pd.DataFrame(rows)
alt.Chart(
    frame,
    title=alt.Title(
        "Do finer experts lower the loss?",
        subtitle="Each line is one seed: the same data, other random weights.",
        anchor="start",
    ),
    description="Held-out loss of models with m = 1, 2 and 4, one line per seed.",
    width=360,
    height=240,
).mark_line(
    color="#B8BFC9",
    point=alt.OverlayMarkDef(size=70, color="#44546F"),
).encode(
    x=alt.X("m:O", title="m, pieces of an expert", axis=alt.Axis(labelAngle=0)),
    y=alt.Y(
        "loss", title="held-out loss (nats per token)", scale=alt.Scale(zero=False)
    ),
    detail="run",
)

# %%
table = frame.groupby("m")[["loss", "sets"]].mean()
table["seconds"] = frame.groupby("m")["seconds"].median()
table["possible sets"] = [math.comb(m * n_experts, m * top_k) for m in table.index]
experts = 3 * top_k * width  # active weights over D, for every m
table["router, % of active"] = [
    100 * m * n_experts / (m * n_experts + experts) for m in table.index
]
report(
    loss={f"m = {m}": round(loss, 3) for m, loss in table["loss"].items()},
    sets={f"m = {m}": round(sets) for m, sets in table["sets"].items()},
)
table.round({"loss": 3, "sets": 0, "seconds": 1, "router, % of active": 1})

# %% [markdown]
# *loss*, *sets* and *seconds* (of training) are averages over the three seeds. *sets* counts the different sets of
# experts that the first layer uses for 4,096 tokens of held-out text; *possible sets* counts all that exist. The last
# column is the router's share of the weights that a token meets in one layer: the bill of question 2, which this
# experiment does not pay.
#
# **Be careful with the loss.** If one line rises where another falls, the seeds disagree, and three of them cannot
# tell which $m$ is best. If all three lines fall, remember that three coins all show heads once in eight throws. Even
# if the fall is large, 150 steps are only the start of training: finer experts may just learn faster at first, and
# their router has more weights. In chapter 04, after longer training, five seeds could not tell $m = 4$ from $m = 1$.
# (`dsmoe labs run` repeats this notebook for many seeds.)
#
# **Discuss in your group.**
#
# - Uncut, most of the possible sets are in use. What keeps the sets in use so far below the possible ones at $m = 4$:
#   the number of tokens, or something else?
# - The experts' FLOPs are equal. Are the seconds? What besides FLOPs takes time when experts get smaller?
# - Compare question 2 with a neighbour who has the other budget. Why is the router expensive for one of you and
#   nearly free for the other?
