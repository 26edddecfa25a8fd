# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-grained experts
#
# ![An expert of eight hidden channels is cut into four of two channels each, whose outputs sum to its own. Sixteen experts of which a token uses two become sixty-four of which it uses eight.](images/fine_grained.svg)
#
# **Are many small experts better than a few large ones?** DeepSeekMoE's first idea {cite:p}`DeepSeekMoE2024` is to cut
# every expert into $m$ narrow ones and let a token use $m$ times as many. Weights and work stay the same, but a token
# can mix pieces of many experts. If a task needs combinations, this is decisive: in the toy below the error falls from
# 37% to 6%. In this chapter's language model five seeds do not decide (the finer model's loss is 0.011 ± 0.021 nats
# *higher*); in chapter 07, with ten seeds and smaller models, it is 0.017 ± 0.016 nats *lower*, barely resolved. Both
# results belong to the answer.
#
# **Afterwards you can** cut a layer of experts without changing its output, say what grows and what does not, and recognise a
# task that needs fine experts. **You need** chapter 02. **Reading time** 14 minutes. **Hardware** any laptop CPU.

# %% tags=["parameters"]
profile: str = "cpu"  # size of the run: smoke | cpu | gpu
seed: int = 0  # seed of weights and toys: 0..2147483647
n_experts: int = 16  # experts of a layer before cutting: 8..32
top_k: int = 2  # of those, experts a token visits: 1..4
m: int = 4  # pieces of an expert in the finest toy: 2 | 4 | 8
balance_weight: float = 0.03  # weight of the balance loss in the toy: 0.0..1.0

# %% tags=["hide-input"]
try:
    from dsmoe_lite.labs import begin, check_exercise, claim, report
except ModuleNotFoundError:
    raise SystemExit("dsmoe_lite is missing: run make setup, then make lab") from None

import torch

from dsmoe_lite.viz import charts

lab = begin(globals())
toy_steps = lab.choose(smoke=100, cpu=1000, gpu=1000)

# %% [markdown]
# ## A toy in which tokens need combinations
#
# Picture a quilt of 8 x 8 tiles. Each tile has its own pattern, but the patterns are not independent: **a tile
# combines the skill of its column with the skill of its row**. Sixteen skills make 64 tiles. A token is a point
# $\mathbf{z}$ of one tile, and the layer must return the height of the pattern there:
#
# $$
# y = \bigl(f_i(\mathbf{z}) + h_j(\mathbf{z})\bigr) / \sqrt2
# $$
#
# where $f_i$ is the wave of column $i$ and $h_j$ that of row $j$, drawn at random.
#
# The layer is a mixture of experts. Its router sees the tags, column $i$ and row $j$; its experts see only
# $\mathbf{z}$. With $m = 1$ there are 8 experts with 16 hidden channels, and a token uses one. Cut them: 16 experts
# with 8 channels, two per token; then 32 with 4 channels, four per token. The experts' weight matrices and their work
# are the same for every $m$; the router and the experts' output biases grow with it. (In a Transformer router and
# experts see the same vector; here they are kept apart, so that experts cannot tell tiles apart by themselves.)


# %%
import math

from torch.nn.functional import one_hot

SEEDS = 5  # independent quilts and layers, trained side by side


def quilt(generator, only_columns=False):
    """Return a function that draws points, tags and heights.

    only_columns: rows have no pattern.
    """
    angle, size, phase = torch.rand(3, SEEDS, 16, generator=generator)
    wave = torch.stack(
        (torch.cos(2 * math.pi * angle), torch.sin(2 * math.pi * angle)), -1
    )
    wave = 3 * (0.75 + 0.5 * size)[..., None] * wave  # (seeds, 16 skills, 2)

    def draw(n):
        z = 2 * torch.rand(SEEDS, n, 2, generator=generator) - 1
        column, row = torch.randint(8, (2, SEEDS, n), generator=generator)
        tags = (one_hot(column, 16) + one_hot(8 + row, 16)).float()
        heights = 1.41 * torch.sin(z @ wave.mT + 2 * math.pi * phase[:, None])
        used = tags * (torch.arange(16) < 8) if only_columns else tags
        return z, tags, (heights * used).sum(-1) / (1 if only_columns else math.sqrt(2))

    return draw


def train_toy(pieces, only_columns=False):
    """Return the unexplained share of the variance of the heights, per seed."""
    g = torch.Generator().manual_seed(seed)
    draw = quilt(g, only_columns)
    n, k, width = 8 * pieces, pieces, 16 // pieces
    W_r = 0.02 * torch.randn(SEEDS, 16, n, generator=g)
    W_1, b_1 = (torch.randn(SEEDS, d, n * width, generator=g) for d in (2, 1))
    W_2 = torch.randn(SEEDS, 1, n * width, generator=g) / math.sqrt(width)
    b_2 = torch.zeros(SEEDS, 1, n)
    weights = [W.requires_grad_() for W in (W_r, W_1, b_1, W_2, b_2)]
    optimizer = torch.optim.Adam(weights, lr=0.02, betas=(0.9, 0.99), fused=True)

    def layer(z, tags):
        scores = (tags @ W_r).softmax(dim=-1)  # (seeds, T, n)
        chosen = (scores >= scores.topk(k).values[..., -1:]).float()
        gates = scores * chosen
        if k > 1:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        hidden = ((z @ W_1 + b_1).relu() * W_2).unflatten(-1, (n, width)).sum(-1)
        balance = n / k * (chosen.mean(1) * scores.mean(1)).sum(-1)  # chapter 06
        return (gates * (hidden + b_2)).sum(-1), balance

    for _ in range(toy_steps):
        z, tags, heights = draw(128)
        output, balance = layer(z, tags)
        error = (output - heights).square().mean(1)
        (error + balance_weight * balance).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    z, tags, heights = draw(4096)
    with torch.no_grad():
        output, _ = layer(z, tags)
    return ((output - heights).square().mean(1) / heights.var(1)).tolist()


# %% [markdown]
# **Ask.** One large expert per token leaves 37% of the quilt unexplained. What do four small experts leave, with the
# same expert weights and work? (A number in percent.)

# %% tags=["trained", "hide-input"]
lab.ask("04-quilt", low=0, high=100)
quilts = {pieces: train_toy(pieces) for pieces in sorted({1, 2, 4, m})}
controls = {pieces: train_toy(pieces, only_columns=True) for pieces in (1, 4)}
rows = [
    {
        "model": f"{task}, {pieces} of {8 * pieces}",
        "metric": "unexplained (%)",
        "value": 100 * value,
        "seed": number,
    }
    for task, errors in (("quilt", quilts), ("columns only", controls))
    for pieces, values in errors.items()
    for number, value in enumerate(values)
]
lab.answer("04-quilt", 100 * sum(quilts[4]) / SEEDS, within=5)
charts.model_comparison(
    rows,
    title="How much of the patterns stays unexplained?",
    subtitle="Ring: one of five quilts. Dot and bar: mean and its 95% interval.",
)

# %% tags=["trained", "hide-cell"]
mean_of = {
    name: {n: sum(v) / SEEDS for n, v in e.items()}
    for name, e in {"quilt": quilts, "control": controls}.items()
}
for name, pieces, interval in (
    ("quilt", 1, {"smoke": (0.3, 1.2), "cpu": (0.3, 0.5), "gpu": (0.3, 0.5)}),
    ("quilt", 4, {"smoke": (0.2, 1.2), "cpu": (0.03, 0.12), "gpu": (0.03, 0.12)}),
    ("control", 1, {"smoke": (0.1, 1.2), "cpu": (0.0, 0.2), "gpu": (0.0, 0.2)}),
    ("control", 4, {"smoke": (0.0, 1.2), "cpu": (0.0, 0.05), "gpu": (0.0, 0.05)}),
):
    claim(
        f"{name}, m = {pieces}: unexplained",
        mean_of[name][pieces],
        interval[profile],
        asserted=lab.own,
    )
report(
    unexplained={
        f"{name}, m = {n}": value
        for name, e in mean_of.items()
        for n, value in e.items()
    }
)

# %% [markdown]
# About 6%. The reason is visible in the task: 64 tiles need 64 different functions, and eight large experts can hold
# only eight. Sixteen smaller experts could hold one skill each, and a token would *add two of them up*. Trained, 2 of
# 16 leave 17%; 4 of 32, which can give two experts to a skill, leave 6%. That is what cutting buys: **not more weights,
# but combinations.**
#
# The control, *columns only*, shows that this is about combinations. There a tile has the pattern of its column alone,
# and eight functions are enough: one large expert leaves 6%, four small ones 2%. The small ones lead by 4 points, not
# by 30.
#
# **Watch it happen.** Below two layers learn a quilt in the page, A with 1 of 8 experts and B with 4 of 32 (SwiGLU
# experts, 2,000 steps). Press a button to guess and start; point at an expert to see its tiles.

# %% tags=["trained"]
from dsmoe_lite.viz.playground import Playground

Playground("finer")

# %% [markdown]
# ## How many more choices?
#
# With $m$ pieces per expert a token chooses $mK$ of $mE$ experts (DeepSeekMoE, Equations 6 to 8; the paper writes $N$
# for our $E$):
#
# $$
# \mathbf{h}_t = \mathbf{u}_t + \sum_{i=1}^{mE} g_{i,t} \operatorname{FFN}_i(\mathbf{u}_t), \qquad
# s_{i,t} = \operatorname{Softmax}_i\bigl(\mathbf{u}_t^\top \mathbf{e}_i\bigr)
# $$ (eq:fine)
#
# $$
# g_{i,t} = \begin{cases} s_{i,t}, & s_{i,t} \in \operatorname{Topk}\bigl(\{s_{j,t} \mid 1 \le j \le mE\},\, mK\bigr) \\
# 0, & \text{otherwise} \end{cases}
# $$ (eq:fine-gates)
#
# The letters are those of chapter 02: $\mathbf{u}_t$ is the token as it enters, $s_{i,t}$ its affinity to expert $i$,
# $\mathbf{e}_i$ that expert's vector, $g_{i,t}$ the gate. Each $\operatorname{FFN}_i$ is now $1/m$ as wide.
#
# The gates are the scores themselves, not divided by their sum. Chapter 02 divides, as GShard's paper
# {cite:p}`GShard2020` does (Algorithm 1). The DeepSeekMoE paper prints even the conventional layer undivided (Section
# 2, Equations 3 to 5), and builds on that.
#
# Move the sliders: $E$ experts, $K$ per token, each cut into $m$.

# %%
from dsmoe_lite import MoEConfig, preset

charts.finer_experts(n_experts=16, top_k=2, pieces=4)

# %% [markdown]
# From 2 of 16 to 8 of 64 the number of choices grows from 120 to 4.4 billion, while the filled area, what a token pays
# for, stays the same. That is what a router *could* choose, not what it does.
#
# ## Why an expert can be cut
#
# Why can an FFN be cut at all? Write it channel by channel. With row $c$ of $W_{gate}$ and $W_{up}$, and column $c$ of
# $W_{down}$:
#
# $$
# \operatorname{FFN}(\mathbf{u}) = \sum_{c=1}^{F} \mathbf{w}^{down}_c \;
# \operatorname{silu}\bigl(\mathbf{w}^{gate\,\top}_c \mathbf{u}\bigr)\, \bigl(\mathbf{w}^{up\,\top}_c \mathbf{u}\bigr)
# $$ (eq:channels)
#
# No channel looks at another, and the last step is a sum. A sum can be cut anywhere:


# %%
from torch.nn.functional import silu
from torch.testing import assert_close

from dsmoe_lite.layers.ffn import SwiGLU

dense = preset("course-dense")
D, E, K, F_width = dense.d_model, n_experts, top_k, dense.ffn_width
SPLITS = (1, 2, 4, 8)  # the m that this chapter looks at


def run_ffn(u, gate, up, down):  # (F, D), (F, D), (D, F)
    return (silu(u @ gate.T) * (u @ up.T)) @ down.T


ffn = SwiGLU(D, F_width).double()
gate, up, down = ffn.gate.weight, ffn.up.weight, ffn.down.weight
u = torch.randn(40, D, dtype=torch.float64)
for pieces in SPLITS:
    channels = torch.randperm(F_width).chunk(pieces)  # dealt out in any order
    parts = [run_ffn(u, gate[c], up[c], down[:, c]) for c in channels]
    assert_close(sum(parts), ffn(u))
print("pieces sum to the FFN, for m =", *SPLITS)

# %% [markdown]
# Now cut every expert of a layer, and give each piece a copy of its expert's vector $\mathbf{e}_i$. The pieces of one expert
# have equal affinities, so the best $mK$ pieces are the pieces of the best $K$ experts.
#
# **Ask.** Use the gates of {eq}`eq:fine-gates` and cut every expert in four. Is the layer's output unchanged, a quarter as
# large, or four times as large?


# %% tags=["hide-input"]
from dsmoe_lite import MoELayer

lab.ask("04-size", "unchanged", "a quarter", "four times")


def finer(pieces, factor=1.0, **more):
    """A layer of E experts, each cut into `pieces`; gates times `factor`."""
    return MoEConfig(
        n_routed_experts=pieces * E,
        top_k=pieces * K,
        expert_width=F_width // pieces,
        routed_scaling_factor=factor,
        **more,
    )


def split_layer(layer, pieces, factor):
    """The same experts in pieces, as a layer; gates times `factor`."""
    config = finer(pieces, factor, norm_topk_prob=layer.router.config.norm_topk_prob)
    new = MoELayer(D, config, vocab_size=1).to(layer.router.weight)
    old, W = layer.experts, F_width // pieces
    down = old.down.unflatten(2, (pieces, W)).transpose(1, 2)  # (E, m, D, W)
    new.load_state_dict({
        "router.weight": layer.router.weight.repeat_interleave(pieces, dim=0),
        "experts.gate": old.gate.reshape(pieces * E, W, D),
        "experts.up": old.up.reshape(pieces * E, W, D),
        "experts.down": down.flatten(0, 1),
    })  # fmt: skip
    return new


def coarse_layer(**more):
    layer = MoELayer(D, finer(1, **more), vocab_size=1).double()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return layer


def size_after(layer, pieces, factor):
    """The size of the output after the cut, over that before."""
    before, after = layer(u[None])[0], split_layer(layer, pieces, factor)(u[None])[0]
    if factor == pieces and not layer.router.config.norm_topk_prob:
        assert_close(after, before)  # the very same function
    return (after.norm() / before.norm()).item()


coarse = coarse_layer()
divided = coarse_layer(norm_topk_prob=True) if K > 1 else None
print("size of the output, over that of the uncut layer:")
for pieces in SPLITS[1:]:
    line = f"m = {pieces}: gates as printed {size_after(coarse, pieces, 1.0):.3f}"
    line += f", times m {size_after(coarse, pieces, float(pieces)):.3f}"
    if divided is not None:
        line += f", divided by their sum {size_after(divided, pieces, 1.0):.3f}"
    print(line)
lab.answer(
    "04-size",
    "a quarter",
    "the softmax now has four times as many experts to share 1 among",
)

# %% [markdown]
# A quarter. The softmax now runs over $mE$ experts, $m$ equal copies of each:
#
# $$
# s^{fine}_{i,t} = \frac{\exp(\mathbf{u}_t^\top \mathbf{e}_i)}{\sum_{j=1}^{E} m \exp(\mathbf{u}_t^\top \mathbf{e}_j)}
# = \frac{s_{i,t}}{m}
# $$ (eq:smaller)
#
# Dividing the gates by their sum does not help: the same 1 is shared by $mK$ pieces.
#
# With **gates times $m$** the finer layer *is* the coarser one (the folded cell checks it in float64). So this course
# multiplies by $m$ (`routed_scaling_factor`), and then $m$ changes one thing only, the choices. **The paper prints no
# such factor.** It is our departure; weights trained from scratch can grow to make up for it. (DeepSeek-V2 and V3 have
# a factor in their released configs; the case is `routed-scaling` in `data/published.json`.) In the pilot runs before
# [chapter 07](07_paper_experiments.ipynb), DeepSeekMoE as printed lost to GShard; three seeds could not decide whether
# the factor helps.
#
# ## What can pieces do that one expert cannot?
#
# So a finely cut layer can imitate the uncut one. Does training leave it there? Give the layer that was just cut one
# backward pass. If the pieces of an expert got the same gradient, they would move together and stay one expert.

# %%
cut = split_layer(coarse, 4, factor=4.0)
cut(u[None])[0].square().mean().backward()
grad = cut.router.weight.grad.unflatten(0, (E, 4))  # of the four pieces of each expert
alike = torch.cosine_similarity(grad[:, 0], grad[:, 1], dim=-1).abs().mean()
print(f"gradients of two pieces of one expert: |cosine| {alike:.2f} (1: one direction)")

# %% [markdown]
# They do not: pieces give different outputs, so their rows of the router are pulled in different directions, and one
# step of training separates them. From then on a token can weigh each piece by itself, leave some out, and take pieces
# of eight different experts. Instead of $K$ whole experts it gets a recipe of $mK$ pieces.
#
# ## What does it cost?
#
# **Ask.** Weights and FLOPs of the experts do not depend on $m$. Which part of the layer does grow?

# %% tags=["hide-input"]
from dataclasses import replace

from torch.utils.flop_counter import FlopCounterMode

from dsmoe_lite import accounting

lab.ask("04-what-grows", "the router", "the experts", "the gates only")


def counted(pieces, n_tokens=256):
    """FLOPs of one live layer's matrix products, forward and backward, per token: experts, router."""
    layer = MoELayer(D, finer(pieces, backend="loop"), vocab_size=1)
    x = torch.randn(1, n_tokens, D, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x)[0].sum().backward()
    total = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        layer.router(x[0], (1, n_tokens)).scores.sum().backward()
    router = counter.get_total_flops()
    return (total - router) // n_tokens, router // n_tokens


print(
    "                weights                      | FLOPs per token      | bytes copied"
)
print(
    " m    experts  stored    used   router       | experts    router    | per token, bf16"
)
for pieces in SPLITS:
    weights = accounting.parameters(replace(dense, n_layers=1, moe=finer(pieces)))
    experts, router = counted(pieces)
    assert experts == 6 * weights.routed_experts.active
    assert router == 6 * weights.router.active
    print(
        f"{pieces:2} {pieces * K:3} of {pieces * E:3}"
        f" {weights.routed_experts.total:8,} {weights.routed_experts.active:7,}"
        f" {weights.router.total:7,} {router / experts:5.1%} | {experts:8,} {router:8,}"
        f"    | {2 * 2 * pieces * K * D:6,}"
    )
large = accounting.parameters(preset("deepseekmoe-2B"))
print(
    f"DeepSeekMoE 2B: the router is {large.router.active / large.routed_experts.active:.2%} of the experts' work"
)
lab.answer("04-what-grows", "the router", "one row per piece")

# %% [markdown]
# The router, with one row per piece. In our tiny model it does a sixth of the experts' work at $m = 8$; in the paper's
# 2B model, a third of a percent. The last column grows too: a token is copied to $mK$ experts and its results come
# back. On one device these are memory accesses; on many devices they travel over a network, and chapters 11 and 12 are
# about keeping that in bounds.
#
# On the clock, equal FLOPs are not equal time. One layer, forward and backward, beside a dense FFN that does the same work:

# %% tags=["measured", "hide-input"]
from dsmoe_lite.bench.ratios import compare

x = torch.randn(1024, D, requires_grad=True)


def forward_and_backward(module):
    def step():
        output = module(x[None])
        (output[0] if isinstance(output, tuple) else output).square().mean().backward()
        module.zero_grad(set_to_none=True)
        x.grad = None

    return step


timed = {"dense": forward_and_backward(SwiGLU(D, K * F_width))}
timed |= {
    f"m = {pieces}": forward_and_backward(MoELayer(D, finer(pieces), vocab_size=1))
    for pieces in SPLITS
}
for row in compare(timed, rounds={"smoke": 3, "cpu": 12, "gpu": 50}[profile])[1:]:
    print(f"{row['what']}: {1 / row['speed ratio']:.1f} times the dense FFN's time")

# %% [markdown]
# Finer is slower here: more and smaller products, more copies, more sorting. Chapter 10 is about that bill.
#
# ## Does it pay in a language model?
#
# The paper says yes. Its Figure 3 compares benchmark scores (HellaSwag, PIQA, ARC, TriviaQA, NaturalQuestions), and finer
# segmentation raises them step by step; it is a bar chart without printed numbers. Our models are far smaller. `dsmoe experiment deepseekmoe` trained them with the same weights, work and text, and five seeds for each
# $m$. Held-out loss and recall of rare people stand in for the benchmarks.
#
# **Ask.** Do five seeds show that $m = 4$ has a lower loss than $m = 1$, a higher one, or neither?

# %% tags=["hide-input"]
from dsmoe_lite.study.grids import records
from dsmoe_lite.study.rows import gaps, metric_rows, seed_line

lab.ask("04-recorded", "lower", "higher", "neither")
NAMES = {"m1": "m = 1", "m2": "m = 2", "m4": "m = 4", "m4-plain": "m = 4, as printed"}
recorded = records("deepseekmoe")
shown = [
    row
    for row in metric_rows(recorded, NAMES)
    if row["metric"] != "recall, frequent people"
]
for metric in ("held-out loss", "recall, rare people"):
    print(
        f"m = 4 minus m = 1, {metric}: {seed_line(gaps(recorded, 'm4', 'm1', metric))}"
    )
lab.answer("04-recorded", "neither")
charts.model_comparison(
    shown, title="What do finer experts buy, at the same weights and FLOPs?"
)

# %% [markdown]
# Neither. Each line above has the mean difference, its 95% interval and the seeds; both intervals include zero, and the
# means lean the wrong way. Whether the factor $m$ pays is undecided too.
#
# Why, if the toy is so clear? Our made-up world is mostly a lookup table: *whose* tool, *which* tool. One expert that
# knows the pair is enough. That is a guess; no run here tests it. The toy shows what would have to be different:
# knowledge that is **made of reusable parts**. With ten seeds and smaller models [chapter
# 07](07_paper_experiments.ipynb) does find a small gain there; on real text the gain of cutting alone is not resolved.
#
# ## Exercises
#
# **1. A bug from the wild** (10 minutes). A widely used library chooses the experts on the logits, and takes the softmax
# of the chosen ones only. That is right for Mixtral {cite:p}`Mixtral`. It is not right for DeepSeekMoE, whose gates are
# those of {eq}`eq:fine-gates`. Fix it: return the gates of the paper, as printed, best first.


# %%
def gates_of_the_library(logits, k):  # (T, E); as it is: not Equations 7 and 8
    return logits.topk(k, dim=-1).values.softmax(dim=-1)  # (T, k)


def mended_gates(logits, k):
    return None  # (T, k)


few = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
print("affinities 0.4, 0.3, 0.2, 0.1; the library's gates for two of them:", end=" ")
print(", ".join(f"{gate:.3f}" for gate in gates_of_the_library(few, 2)[0]))

# %% tags=["hide-input"]
from itertools import product


def are_those_of_the_paper(mended_gates):
    s = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]])
    shifted = s.log() + torch.tensor([[3.0], [-2.0]])  # softmax does not see this
    draw = torch.Generator().manual_seed(0)
    drawn = [2 * torch.randn(6, 8, generator=draw) for _ in range(5)]
    for logits, k in product((shifted, *drawn), (1, 2, 3)):
        got, T = mended_gates(logits.clone(), k), len(logits)
        assert tuple(got.shape) == (T, k), (
            f"shape ({T}, {k}) expected: T tokens, k gates"
        )
        for row, gates in zip(logits.tolist(), got.tolist(), strict=True):
            whole = sum(math.exp(one) for one in row)
            best = sorted((math.exp(one) / whole for one in row), reverse=True)[:k]
            pairs = zip(gates, best, strict=True)
            assert all(abs(one - other) < 1e-5 for one, other in pairs), (
                f"logits {[round(one, 2) for one in row]}, {k} chosen: gates"
                f" {[round(one, 3) for one in gates]} are not the highest affinities"
                " of the token, best first"
            )


verdict = check_exercise(mended_gates, are_those_of_the_paper)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def mended_gates(logits, k):
#     return logits.softmax(dim=-1).topk(k, dim=-1).values
# ```
#
# A softmax over the chosen logits equals a softmax over all of them, divided by the sum of the chosen: the gates of
# GShard's own paper. The same experts are chosen, nothing fails, and every output of the layer has the wrong size. The
# case is recorded as `softmax-order` in `data/published.json`. </details>
#
# **2. How fine before the router counts?** (15 minutes) Return the largest $m$ that divides the width $F$ and for which
# the router does at most `share` of the work of the experts that a token uses.


# %%
def finest(n_experts, top_k, width, share):  # E, K, F before cutting
    return None  # a whole number


# %% tags=["hide-input"]
import random


def agrees_with_accounting(finest):
    cases = [
        (16, 2, 128, 0.1),
        (16, 2, 128, 0.25),
        (16, 2, 96, 0.25),
        (8, 1, 96, 0.25),
        (8, 1, 96, 0.5),
        (64, 6, 1408, 0.02),
        (16, 2, 3413, 0.01),
        (32, 4, 120, 0.125),
        (12, 2, 128, 0.125),  # exactly an eighth
    ]
    draw = random.Random(0)
    for n_experts in (8, 16, 32, 64) * 8:
        top_k, width = draw.randint(2, 8), 24 * draw.randint(8, 60)
        cases.append((n_experts, top_k, width, draw.uniform(0.06, 0.5)))
    for n_experts, top_k, width, share in cases:

        def fits(m, E=n_experts, K=top_k, F=width, share=share):
            moe = MoEConfig(n_routed_experts=m * E, top_k=m * K, expert_width=F // m)
            layer = replace(preset("course-dense"), n_layers=1, moe=moe)
            weights = accounting.parameters(layer)
            return weights.router.active <= share * weights.routed_experts.active

        m = finest(n_experts, top_k, width, share)
        where = f"{top_k} of {n_experts} experts of width {width}, share {share:.3g}: "
        divides = m >= 1 and m == int(m) and width % m == 0
        assert divides, f"{where}m = {m} does not divide the width"
        assert fits(int(m)), f"{where}with m = {m} the router does more"
        assert not any(
            fits(n) for n in range(int(m) + 1, width + 1) if width % n == 0
        ), f"{where}m = {m} is not the largest possible"


verdict = check_exercise(finest, agrees_with_accounting)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def finest(n_experts, top_k, width, share):
#     def fits(pieces):  # router m E D, experts K 3 D F: D cancels
#         return pieces * n_experts <= share * 3 * top_k * width
#
#     return max(m for m in range(1, width + 1) if width % m == 0 and fits(m))
# ```
#
# The experts' work does not depend on $m$, so their share falls only because the router grows. A wide expert can be cut
# finer: one reason why fine-grained experts suit large models.
# </details>
#
# **3. Other parameters** (a minute of computing). Make the toy's experts finer still, then take its balance loss away:
#
# ```
# dsmoe run 04 -p m=8
# dsmoe run 04 -p balance_weight=0
# ```
#
# Which of the two changes the quilt more? (`dsmoe run` prints what each run reported.)
#
# ## Recap

# %% tags=["hide-input"]
lab.score()

# %% [markdown]
# 1. Cutting experts buys combinations: in the quilt, 64 tiles from 16 skills, four small experts leave a sixth of the
#    error of one large expert.
# 2. An FFN can be cut because its channels meet only in a sum. A cut layer equals the uncut one if gates are multiplied
#    by $m$; the paper prints no such factor.
# 3. Expert weights and FLOPs stay the same. The router, the copies and the time grow.
# 4. In the paper finer experts do better on benchmarks. In this chapter's model five seeds do not decide (loss 0.011 ±
#    0.021 nats higher); in chapter 07's, ten seeds barely resolve a gain (0.017 ± 0.016 lower).
#
# If every token has its own recipe of narrow experts, where does the knowledge go that *all* tokens need? **Chapter 05** sets
# some experts aside for it.
