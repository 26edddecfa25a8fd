# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Shared experts
#
# ![Without a shared expert every routed expert keeps a slice of the same common knowledge. With one, every token also visits an expert that is always on, and the routed experts can use their slices for something else.](images/shared_experts.svg)
#
# **What should every token get?** Whatever many tokens need. Without a shared expert, every expert has to learn it.
# DeepSeekMoE {cite:p}`DeepSeekMoE2024` takes a few experts out of the routing and lets every token visit them. In a toy
# with a common part this cuts the error in all five runs, on average from 9% to under 2%. In our language model the
# shared expert is the third most valuable of a token's eight, and the work is **divided**: it serves punctuation, sums
# and the second language; facts about individual people stay with the routed experts. Our runs cannot resolve whether
# such a model ends up *better* than one without.
#
# **Afterwards you can** write the complete DeepSeekMoE layer, find out what an expert is for, and say what the paper's
# two tests of shared experts show. **You need** chapters 02 to 04. **Reading time** 17 minutes. **Hardware** any laptop
# CPU.

# %% tags=["parameters"]
profile: str = "cpu"  # size of the run: smoke | cpu | gpu
seed: int = 0  # seed of the toys: 0..2147483647
n_shared: int = 4  # of the eight experts of a token in the toy, always on: 1..7
common: float = 1.0  # size of the part that all tiles of the toy share: 0.0..2.0

# %% tags=["hide-input"]
try:
    from dsmoe_lite.labs import begin, check_exercise, claim, report
except ModuleNotFoundError:
    raise SystemExit("dsmoe_lite is missing: run make setup, then make lab") from None

import torch

from dsmoe_lite.viz import charts

lab = begin(globals())
toy_steps = lab.choose(smoke=100, cpu=1000, gpu=1000)
n_parts = lab.choose(smoke=2, cpu=8, gpu=8)  # of held-out text

# %% [markdown]
# ## A toy with a common part
#
# Take sixteen tiles, four rows of four, each with a wave $f_i$ of its own. And lay **one more wave $c$ over all of them**. A token
# is a point $\mathbf{z}$ of tile $i$, and the layer must return the height there:
#
# $$
# y = f_i(\mathbf{z}) + c(\mathbf{z})
# $$
#
# As in chapter 04 the router sees the tags of row and column, and the experts see only $\mathbf{z}$. There are 32 small
# experts, of which a token uses eight. In the first layer all eight are routed. In the second, four experts are always on
# with gate 1, and the router chooses four of the other 28. Weights and work are the same. (A bias on the scores keeps the experts
# busy; chapter 06 builds it.)


# %%
import math

from torch.nn.functional import one_hot

SEEDS = 5  # independent tiles and layers, trained side by side


def wave(direction, phase, z):
    return 1.41 * torch.sin(z @ direction.mT + phase[:, None])


def train_toy(shared, common):
    """Return the unexplained share of the variance, and how much of c an expert has.

    One number per seed each.
    """
    g = torch.Generator().manual_seed(seed)

    def waves(n, frequency):
        angle, size, phase = torch.rand(3, SEEDS, n, generator=g)
        turn = 2 * math.pi * angle
        direction = torch.stack((turn.cos(), turn.sin()), -1)
        return frequency * (0.75 + 0.5 * size)[
            ..., None
        ] * direction, 2 * math.pi * phase

    own, for_all = waves(16, 2.0), waves(1, 5.0)

    def draw(n):
        z = 2 * torch.rand(SEEDS, n, 2, generator=g) - 1
        row, column = torch.randint(4, (2, SEEDS, n), generator=g)
        tags = (one_hot(row, 8) + one_hot(4 + column, 8)).float()
        height = (wave(*own, z) * one_hot(4 * row + column, 16)).sum(-1)
        return z, tags, height + common * wave(*for_all, z)[..., 0]

    n, k, width = 32 - shared, 8 - shared, 4
    W_r = 0.02 * torch.randn(SEEDS, 8, n, generator=g)
    W_1, b_1 = (torch.randn(SEEDS, d, 32 * width, generator=g) for d in (2, 1))
    W_2 = torch.randn(SEEDS, 1, 32 * width, generator=g) / math.sqrt(width)
    b_2, bias = torch.zeros(SEEDS, 1, 32), torch.zeros(SEEDS, 1, n)
    weights = [W.requires_grad_() for W in (W_r, W_1, b_1, W_2, b_2)]
    optimizer = torch.optim.Adam(weights, lr=0.02, betas=(0.9, 0.99), fused=True)

    def layer(z, tags):
        scores = (tags @ W_r).softmax(dim=-1)  # (seeds, T, n)
        biased = scores.detach() + bias
        chosen = (biased >= biased.topk(k).values[..., -1:]).float()
        gates = scores * chosen
        if k > 1:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        hidden = (z @ W_1 + b_1).relu() * W_2
        experts = hidden.unflatten(-1, (32, width)).sum(-1) + b_2  # (seeds, T, 32)
        always, routed = experts.split((shared, n), dim=-1)
        return always.sum(-1) + (gates * routed).sum(-1), chosen, routed

    for _ in range(toy_steps):
        z, tags, heights = draw(128)
        output, chosen, _ = layer(z, tags)
        (output - heights).square().mean(1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        bias += 0.003 * torch.sign(k / n - chosen.mean(1, keepdim=True))
    z, tags, heights = draw(4096)
    with torch.no_grad():
        output, _, routed = layer(z, tags)
    error = (output - heights).square().mean(1) / heights.var(1)
    c, f = (x - x.mean(1, keepdim=True) for x in (wave(*for_all, z), routed))
    correlation = (c * f).mean(1) / (c.square().mean(1) * f.square().mean(1)).sqrt()
    return error.tolist(), correlation.square().nanmean(-1).tolist()


# %% [markdown]
# As a control, both layers are also trained without $c$.
#
# **Ask.** With $c$ and all eight routed, 9% of the variance stays unexplained. How much stays unexplained with four of
# the eight shared? (In percent.)

# %% tags=["trained", "hide-input"]
lab.ask("05-toy", low=0, high=100)
names = {0: "none shared", n_shared: f"{n_shared} shared"}
toys = {
    (words, shared): train_toy(shared, size)
    for words, size in (("with c", common), ("without c", 0.0))
    for shared in names
}
rows = [
    {
        "model": f"{words}, {names[shared]}",
        "metric": metric,
        "value": value,
        "seed": number,
    }
    for (words, shared), (errors, shares) in toys.items()
    for metric, values in (
        ("unexplained (%)", [100 * error for error in errors]),
        ("share of c in an expert (%)", [100 * share for share in shares]),
    )
    for number, value in enumerate(values)
]
mean_of = {
    name: [sum(values) / SEEDS for values in results] for name, results in toys.items()
}
lab.answer("05-toy", round(100 * mean_of["with c", n_shared][0], 1), within=2)
charts.model_comparison(
    rows,
    title="Does a shared expert help?",
    subtitle="Ring: one of five toys. Dot and bar: mean and its 95% interval.",
)

# %% tags=["trained", "hide-cell"]
for words, shared, error, share in (
    ("with c", 0, (0.03, 0.2), (0.06, 0.2)),
    ("with c", 4, (0.005, 0.04), (0.0, 0.06)),
    ("without c", 0, (0.0, 0.03), (0.0, 0.05)),
    ("without c", 4, (0.0, 0.04), (0.0, 0.06)),
):
    if (words, shared) in mean_of:
        found = mean_of[words, shared]
        for what, value, interval in zip(
            ("unexplained", "r2 with c"), found, (error, share), strict=True
        ):
            limits = (0.0, 1.5) if profile == "smoke" else interval
            claim(f"{words}, {shared} shared: {what}", value, limits, asserted=lab.own)

# %% [markdown]
# Under 2%. The right panel says why. It shows how much of the common wave is in a routed expert: the squared
# correlation of its output with $c$. With none shared that is 11%; in the control, where a correlation can only be
# chance, some 2%. So expert after expert learns a part of $c$: that is **redundancy**. With four shared it is down to
# some 3%.
#
# Without $c$ sharing does not pay. **A shared expert is worth its place if there is something to share.**
#
# **Watch it happen.** Below two layers learn such tiles in the page, A with 8 of 32 experts, B with four shared and 4
# of 28 (SwiGLU experts, 2,000 steps). Press a button to guess and start; then press *Control: no common wave*.

# %% tags=["trained"]
from dsmoe_lite.viz.playground import Playground

Playground("shared")

# %% [markdown]
# ## The layer, complete
#
# Chapter 04 cut each of $E$ experts into $m$ and let a token use $mK$ of them. Now $K_s$ of these $mE$ experts are
# **shared**: every token visits them, with gate 1. The router chooses among the others, and chooses $K_s$ fewer
# (DeepSeekMoE, Equations 9 to 11):
#
# $$
# \mathbf{h}_t = \mathbf{u}_t + \sum_{i=1}^{K_s} \operatorname{FFN}_i(\mathbf{u}_t)
# + \sum_{i=K_s+1}^{mE} g_{i,t} \operatorname{FFN}_i(\mathbf{u}_t)
# $$ (eq:deepseekmoe)
#
# $$
# g_{i,t} = \begin{cases} s_{i,t}, & s_{i,t} \in \operatorname{Topk}\bigl(\{s_{j,t} \mid K_s + 1 \le j \le mE\},\, mK - K_s\bigr) \\
# 0, & \text{otherwise} \end{cases}
# $$ (eq:deepseekmoe-gates)
#
# $$
# s_{i,t} = \operatorname{Softmax}_i\bigl(\mathbf{u}_t^\top \mathbf{e}_i\bigr)
# $$ (eq:deepseekmoe-affinity)
#
# The softmax runs over the routed experts; the paper does not say so, but the released code of its 16B model does it
# this way. The course multiplies $g_{i,t}$ by $m$, for the reason given in chapter 04. The paper has no such factor,
# and whether it helps is not settled: in the pilot of chapter 07 the layer without it lost to GShard (0.886 against
# 0.867); in the runs of this chapter the model with one shared expert has a lower loss without the factor, by 0.010 ±
# 0.008 nats.
#
# **Build** it, with each expert as a function, and **prove** it equal to the package's layer. The package stores the
# $K_s$ shared experts as one FFN, $K_s$ times as wide. By chapter 04 that is the same function; the proof first cuts it
# into $K_s$ experts.


# %%
from functools import partial

import torch.nn.functional as F
from torch.testing import assert_close

from dsmoe_lite import MoEConfig, MoELayer, preset
from dsmoe_lite.layers.upcycle import split_expert

dense = preset("course-dense")
D, E, K, m = dense.d_model, 16, 2, 4  # 2 of 16 experts, each cut into 4


def deepseekmoe(u, shared, routed, e, k):  # u (T, D), e (mE - K_s, D)
    y = sum(ffn(u) for ffn in shared)  # every token, gate 1
    s = (u @ e.T).softmax(dim=-1)  # over the routed experts
    g, chosen = s.topk(k)  # (T, k)
    for i, ffn in enumerate(routed):
        token, rank = torch.where(chosen == i)
        y[token] += m * g[token, rank, None] * ffn(u[token])
    return y


def run_ffn(u, gate, up, down):  # (F, D), (F, D), (D, F)
    return (F.silu(u @ gate.T) * (u @ up.T)) @ down.T


def with_shared(shared):
    return MoEConfig(
        n_routed_experts=m * E - shared,
        top_k=m * K - shared,
        expert_width=dense.ffn_width // m,
        n_shared_experts=shared,
        routed_scaling_factor=float(m),
    )


for shared in (1, 2):
    config = with_shared(shared)
    layer = MoELayer(D, config, vocab_size=1).double().eval()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    w = layer.experts
    routed = [
        partial(run_ffn, gate=w.gate[i], up=w.up[i], down=w.down[i])
        for i in range(config.n_routed_experts)
    ]
    u = torch.randn(40, D, dtype=torch.float64)
    always_on = split_expert(layer.shared, shared)
    mine = deepseekmoe(u, always_on, routed, layer.router.weight, config.top_k)
    assert_close(mine, layer(u[None])[0][0])
    print(f"{shared} shared + {config.top_k} of {config.n_routed_experts}: equal")

# %% [markdown]
# This is the layer of the paper's title: narrow experts (chapter 04), shared experts, and the balance losses of chapter 06, which
# leave the shared experts out, since every token visits them.
#
# **Ask.** Go from no shared expert to four. Which number changes: the weights stored, the weights that a token uses, or the
# router's weights?

# %% tags=["hide-input"]
from dataclasses import replace

from dsmoe_lite import accounting

lab.ask("05-price", "stored", "used by a token", "the router's")
priced = {}
for shared in (0, 1, 2, 4):
    config = with_shared(shared)
    name = f"{shared} shared + {config.top_k} of {config.n_routed_experts}"
    priced[name] = replace(dense, n_layers=1, moe=config)
weights = {name: accounting.parameters(config) for name, config in priced.items()}
changes = {
    "stored": len({w.ffn.total for w in weights.values()}) > 1,
    "used by a token": len({w.ffn.active for w in weights.values()}) > 1,
    "the router's": len({w.router.total for w in weights.values()}) > 1,
}
(changed,) = [name for name, differs in changes.items() if differs]
lab.answer("05-price", changed, "one row less for each")
print(f"{'':22} stored   used  router")
for name, w in weights.items():
    print(f"{name:20} {w.ffn.total:8,} {w.ffn.active:6,}  {w.router.total:6,}")

# %% [markdown]
# Only the router's. So 1 + 7 of 63, which the paper trained, can be compared with 8 of 64.
#
# ## What is the shared expert for?
#
# The course ships a trained model with one shared and 63 routed experts, of which a token uses 7. To see what the shared
# expert does, **silence** it: it adds nothing, no other expert takes its place, and we look at what the model predicts less well. Do
# the same to each of the seven routed experts of a token, ranked by their gates. All eight are equally wide.
#
# We sort the places of the text by what has to be predicted next, as in chapter 03.
#
# **Ask.** Rank the eight by what the model loses without each. Which place does the shared expert take? (1 to 8.)

# %% tags=["hide-input"]
from statistics import mean

from dsmoe_lite import load_model
from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.data.batches import heldout_batches
from dsmoe_lite.data.tokenizer import read_tokenizer
from dsmoe_lite.data.word_kinds import KINDS, by_kind
from dsmoe_lite.data.world import World
from dsmoe_lite.evaluate import heldout_loss
from dsmoe_lite.routing.interventions import silence

lab.ask("05-place", low=1, high=8)
checkpoint = DATA / "models" / "world-deepseekmoe.safetensors"
model = load_model(checkpoint)
world, tokenizer = World(), read_tokenizer(read_metadata(checkpoint)["tokenizer"])
parts = [
    by_kind(part, world, tokenizer)
    for part in heldout_batches(world, tokenizer, 64, 64, n_parts)
]
due = torch.cat([part.domains[:, 1:].flatten() for part in parts])
shown = [kind for i, kind in enumerate(KINDS) if (due == i).sum() > 100]
routed_k = model.config.moe.top_k


def losses_of(changed):  # a loss over all places, and {kind: loss}, for each part
    found = [heldout_loss(changed, [part], KINDS) for part in parts]
    return [{"all": one.loss, **one.by_domain} for one in found]


intact = losses_of(model)


def rise_without(**silenced):  # {kind: rise in loss} for each part
    found = losses_of(silence(model, **silenced))
    return [
        {kind: after[kind] - before[kind] for kind in before}
        for before, after in zip(intact, found, strict=True)
    ]


ordinals = {0: "1st", 1: "2nd", 2: "3rd"}
rise = {"shared expert": rise_without(shared=True)}
for rank in range(routed_k):
    name = f"{ordinals.get(rank, f'{rank + 1}th')} choice"
    rise[name] = rise_without(ranks=[rank])


def worth(name, kind="all"):
    return mean(part[kind] for part in rise[name] if kind in part)


def over_second(kind):
    return worth("shared expert", kind) - worth("2nd choice", kind)


total = {name: worth(name) for name in rise}
place = 1 + sum(value > total["shared expert"] for value in total.values())
lab.answer("05-place", place)
charts.ablation_matrix(
    [
        {"kind": kind, "effect": name, "value": part[kind], "part": number}
        for name in rise
        for kind in sorted(shown, key=over_second, reverse=True)
        for number, part in enumerate(rise[name])
        if kind in part
    ],
    overall=total,
    overall_is="all places",
    apart="1st choice",
    title="What is each of a token's eight experts worth, and where?",
    subtitle=[
        "Rise in loss (nats a token) when this expert adds nothing, by what is due next.",
        "Framed: clearly the largest of its column, the 1st choice left out.",
    ],
)

# %% tags=["trained", "hide-cell"]
from dsmoe_lite.common.stats import mean_and_half_width
from dsmoe_lite.evaluate import recall

claim("place of the shared expert among the eight", place, (3, 3))
for kind, interval in {
    "punctuation": (0.01, 0.04),
    "relation": (0.0, 0.03),
    "second language": (0.01, 0.08),
    "sums": (0.01, 0.06),
    "value": (-0.25, -0.08),
    "first name": (-0.2, -0.08),
    "function word": (-0.09, -0.02),
}.items():
    claim(f"shared expert minus 2nd choice, due: {kind}", over_second(kind), interval)
of_routed = sum(value for name, value in total.items() if name != "shared expert")
without_routed = silence(model, ranks=range(routed_k))
all_routed = mean(part["all"] for part in rise_without(ranks=range(routed_k)))
all_eight = losses_of(silence(without_routed, shared=True))
last = mean(part["all"] for part in all_eight) - mean(part["all"] for part in intact)
claim("rises without each of the 7 routed experts, added up", of_routed, (0.5, 0.9))
claim("rise without all 7 at once", all_routed, (1.2, 2.2))
claim("further rise without the shared expert too", last - all_routed, (0.3, 0.8))
questions = world.questions("head")
knows = {
    "intact": recall(model, tokenizer, questions)["head"],
    "no shared": recall(silence(model, shared=True), tokenizer, questions)["head"],
}
claim(
    "recall of frequent people lost without the shared expert",
    knows["intact"] - knows["no shared"],
    (-0.02, 0.05),
)
leads = {}
for kind in sorted(shown, key=over_second, reverse=True):
    gap = [
        one[kind] - other[kind]
        for one, other in zip(rise["shared expert"], rise["2nd choice"], strict=True)
        if kind in one
    ]
    center, margin = mean_and_half_width(gap)
    leads[kind] = f"{center:+.3f} ± {margin or 0:.3f}"
report(recall_of_frequent_people=knows, shared_minus_2nd_with_interval_over_parts=leads)

# %% [markdown]
# Third: 0.024 nats, after 0.629 for the 1st choice and 0.055 for the 2nd. The 1st choice does most of the work for
# every kind. Behind it the work is **divided**:
#
# - For punctuation, sums and the second language, and narrowly for relations, the shared expert is worth more than the
#   2nd choice: 0.036 against 0.012 for punctuation.
# - For values it is the other way round: 0.005 against 0.155. First names and function words need it hardly at all.
# - For brackets, last names and code the intervals of the two overlap, so neither leads.
#
# So the shared expert serves punctuation, sums and the second language; facts about people come from the routed ones.
# Without it all frequent people are still recalled. One caution: this is one trained model, and an ablation shows only
# what the other experts cannot make up for.
#
# Here is this model beside GShard, with a question that both can answer. The square S is the shared expert: every token
# uses it. Press *Is the shared expert needed?* to switch it off in both layers. The answer stays, as it does for all
# frequent people. Then press *All experts on* and *Break what this answer needs most*: it is a routed expert.

# %% tags=["trained"]
from dsmoe_lite.routing.favourites import favourite_words
from dsmoe_lite.routing.interventions import without_capacity
from dsmoe_lite.viz.explorer import explore

gshard = load_model(DATA / "models" / "world-gshard.safetensors")
questions = [(one.prompt, one.answer) for one in world.questions("head")[:6]]
explored = {"GShard": without_capacity(gshard), "DeepSeekMoE": without_capacity(model)}
read = parts[0].tokens[:, :-1]
explore(
    explored,
    tokenizer,
    questions[0][0],
    window=64,
    questions=questions,
    likes={
        name: favourite_words(one, tokenizer, read) for name, one in explored.items()
    },
)

# %% [markdown]
# ## Are the routed experts less alike now?
#
# That was the purpose. In chapter 03's GShard model the two experts of a token wrote much the same wherever punctuation
# was due: the cosine {eq}`eq:overlap` of their outputs was 0.66.
#
# **Ask.** What is it between the two best routed experts of this model, before punctuation? (From 0 to 1.)

# %% tags=["hide-input"]
from dsmoe_lite.routing.overlap import output_overlap

lab.ask("05-overlap", low=0, high=1)
some = parts[:4]
alike, overall = [], {}
for name, one in {
    "GShard": gshard,
    "DeepSeekMoE": model,
}.items():
    for number, part in enumerate(some):
        kinds_due = part.domains[:, 1:].flatten()
        layers = output_overlap(one, part.tokens[:, :-1])
        both = torch.stack(layers).mean(0)
        overall.setdefault(name, []).append(both.mean().item())
        alike += [
            {
                "kind": kind,
                "effect": name,
                "value": both[kinds_due == KINDS.index(kind)].mean().item(),
                "part": number,
            }
            for kind in shown
        ]


def overlap(name, kind):
    return mean(
        row["value"] for row in alike if (row["effect"], row["kind"]) == (name, kind)
    )


shown_by_overlap = sorted(shown, key=lambda kind: -overlap("GShard", kind))
lab.answer("05-overlap", round(overlap("DeepSeekMoE", "punctuation"), 2), within=0.1)
charts.effects_by_kind(
    sorted(alike, key=lambda row: shown_by_overlap.index(row["kind"])),
    overall={name: mean(values) for name, values in overall.items()},
    number=".2f",
    title="Where do the two best routed experts of a token write the same?",
    subtitle="Cosine of their outputs, mean of both layers, by what is due next. Dashed: all places.",
    one_scale=True,
)

# %% tags=["trained", "hide-cell"]
claim(
    "overlap before punctuation, GShard", overlap("GShard", "punctuation"), (0.55, 0.75)
)
claim("the same, DeepSeekMoE", overlap("DeepSeekMoE", "punctuation"), (0.1, 0.3))

# %% [markdown]
# 0.22, a third of GShard's. Over all tokens it is half: 0.20 against 0.39. That is what the paper hopes for. But these
# are two single models, and experts of different width. Chapter 07 trained five pairs at another size; there the cosine
# over all tokens is:

# %% tags=["hide-input"]
from dsmoe_lite.study.protocol import CPU

other_world = World(CPU.corpus.world)
pairs = {"gshard": [], "deepseekmoe": []}
for kind_of_model, found in pairs.items():
    for run in range(5):
        path = DATA / "models" / f"paper-{kind_of_model}-seed{run}.safetensors"
        other_tokenizer = read_tokenizer(read_metadata(path)["tokenizer"])
        (part,) = heldout_batches(other_world, other_tokenizer, 64, 64, 1)
        layers = output_overlap(load_model(path), part.tokens[:, :-1])
        found.append(torch.stack(layers).mean().item())
for name, found in zip(("GShard", "DeepSeekMoE"), pairs.values(), strict=True):
    print(f"{name:12}", "  ".join(f"{value:.2f}" for value in found))

# %% tags=["trained", "hide-cell"]
apart = [one - other for one, other in zip(*pairs.values(), strict=True)]
claim("overlap of GShard minus DeepSeekMoE, five pairs", mean(apart), (-0.05, 0.08))

# %% [markdown]
# There we cannot resolve a difference. The toy shows that a shared expert *can* make routed experts less alike; our
# language models do not decide whether it does.
#
# ## Swap it for one more routed expert
#
# The paper removes the shared expert of its trained 2B model and lets every token use one more routed expert, so that the
# work stays the same.
#
# **Ask.** Its loss was 1.808. What was it after the swap?

# %% tags=["hide-input"]
from dsmoe_lite.routing.interventions import swap_shared
from dsmoe_lite.study import published
from dsmoe_lite.study.grids import records

lab.ask("05-swap", low=1.8, high=12)
how_many, swap = published.load()["shared_experts"]
before_swap, after_swap = swap["pile_loss"].values()
lab.answer("05-swap", after_swap, within=0.2)
ours = heldout_loss(model, parts, KINDS).loss
swapped = heldout_loss(swap_shared(model, 1), parts, KINDS).loss
print(
    f"the paper's model {before_swap} -> {after_swap}: {after_swap - before_swap:+.3f}"
)
print(f"ours              {ours:.3f} -> {swapped:.3f}: {swapped - ours:+.3f}")

# %% tags=["trained", "hide-cell"]
alone = heldout_loss(silence(model, shared=True), parts, KINDS).loss
claim("shared expert swapped for a routed one, rise", swapped - ours, (0.01, 0.04))
claim("what the eighth routed expert gives back", alone - swapped, (-0.005, 0.01))

# %% [markdown]
# 2.414, a rise of 0.606 nats; ours is a thirtieth of it. (Our model was trained twice as long as the five-seed models
# below, hence its lower loss.) Perhaps real text has more in common than our sentences: there, in larger models, a shared expert does lower the loss (chapter 07). One
# thing is clear: *nothing was trained to stand in*. The expert that comes eighth in a token's ranking was never meant
# for this token, and in our model it gives back 0.002 of the 0.024 lost. So the swap shows that the routed experts of
# **this model** do not do the shared expert's job. It does not show that a model trained *without* shared experts would
# be worse.
#
# The swap has also been made by accident. A serving engine took the shared expert for one more routed one, and the
# model answered 0 of 6 questions (`fused-shared-lost` in `data/published.json`).
#
# ## How many?
#
# To find out, one has to train with each number. The paper trained its 2B model with 1, 2 and 4 shared experts of 64,
# at the same work.
#
# **Ask.** How far apart are the three losses, lowest to highest? (In nats.)

# %% tags=["hide-input"]
from dsmoe_lite.study.rows import gaps, metric_rows, seed_line

lab.ask("05-number", low=0, high=1)
theirs = how_many["pile_loss"]
lab.answer(
    "05-number",
    round(max(theirs.values()) - min(theirs.values()), 3),
    ", ".join(f"{n} shared {value}" for n, value in theirs.items()),
    within=0.01,
)
recorded = records("deepseekmoe")
NAMES = {"m4": "none", "shared-1": "1 shared", "shared-2": "2 shared"}
charts.model_comparison(
    metric_rows(recorded, NAMES),
    title="Do shared experts pay, at the same weights and FLOPs?",
    subtitle="Our models. Ring: one seed. Dot and bar: mean and its 95% interval.",
)

# %% tags=["hide-cell"]
for one, other in (
    ("shared-1", "m4"),
    ("shared-2", "m4"),
    ("shared-1-plain", "shared-1"),
):
    gap = gaps(recorded, one, other, "held-out loss")
    print(f"{one} minus {other}: {seed_line(gap)}")
four = gaps(records("paper"), "4+4-of-60", "deepseekmoe", "held-out loss")
print(f"4 shared minus 1, chapter 07: {seed_line(four).partition('   ')[0]}")

# %% [markdown]
# 0.005 nats apart, one run each; two shared experts have the lowest loss. The chart shows our own models: five seeds
# cannot resolve whether one shared expert helps, or two. Chapter 07 has ten seeds and finds one thing more: **four of
# 64 are worse than one**, by 0.017 ± 0.009. The paper's larger models keep one shared expert for every three routed
# ones in use.
#
# ## What it saves
#
# A shared expert needs no sorting and no gathering, and $K_s$ of them are one dense product. One layer, forward and
# backward, timed alternately on one machine:

# %% tags=["measured", "hide-input"]
from dsmoe_lite.bench.ratios import compare

x = torch.randn(1, 2048, D, requires_grad=True)  # the layer below wants its gradient


def forward_and_backward(module):
    def step():
        module(x)[0].square().mean().backward()
        module.zero_grad(set_to_none=True)
        x.grad = None

    return step


timed = {
    name: forward_and_backward(MoELayer(D, config.moe, vocab_size=1))
    for name, config in priced.items()
}
for row in compare(timed, rounds={"smoke": 5, "cpu": 15, "gpu": 50}[profile])[1:]:
    print(f"{row['what']:20} {1 / row['speed ratio']:.2f} times the layer without")

# %% [markdown]
# Four shared experts show on the clock, at the same FLOPs. And on many devices a shared expert has one more use: every device
# holds a copy of it, so its work needs no message and can be done while the routed tokens travel (chapter 12).
#
# ## Exercises
#
# **1. A bug from the wild** (10 minutes). A serving engine computes shared and routed experts in one go: the shared
# expert becomes one more column of the gates, the last. When all is added up, the whole sum is multiplied by the
# scale of the routed gates; so that the shared expert keeps its weight of 1, its column holds 1 / scale. On one path the
# gates come with the scale already in them, and the last multiplication is left out. Fix the function for both paths.


# %%
def fused_gates(gates, scale, already_scaled):  # as it was: do not use
    shared = torch.full((len(gates), 1), 1 / scale)
    return torch.cat((gates, shared), dim=1)  # (T, K) -> (T, K + 1)


def mended_fusion(gates, scale, already_scaled):
    return None  # (T, K + 1), the shared expert last


# %% tags=["hide-input"]
from itertools import product


def shared_keeps_weight_one(mended_fusion):
    cases = [
        (torch.tensor([[0.5, 0.25], [0.125, 0.0625]]), s) for s in (2.0, 16.0, 0.5)
    ]
    draw = torch.Generator().manual_seed(0)
    for T in range(2, 7):
        scale = 0.5 + 3 * torch.rand(1, generator=draw).item()
        cases.append((torch.rand(T, 3, generator=draw), scale))
    for (bare, scale), already_scaled in product(cases, (False, True)):
        given = bare * scale if already_scaled else bare
        columns = mended_fusion(given.clone(), scale, already_scaled)
        where = "scale in the gates" if already_scaled else "sum multiplied"
        where = f"{where}, scale {scale:.3g}"
        T, K = bare.shape
        assert tuple(columns.shape) == (T, K + 1), f"{T} tokens, {K} routed, one shared"
        weights = columns * (1 if already_scaled else scale)  # what the engine does
        off = (weights[:, :K] - bare * scale).abs().max()
        assert off < 5e-6, f"{where}: the weights of the routed experts are changed"
        worst = weights[(weights[:, K] - 1).abs().argmax(), K].item()
        assert abs(worst - 1) < 5e-6, (
            f"{where}: the shared expert weighs {worst:.4g} in the sum"
        )


for already_scaled in (False, True):
    column = fused_gates(torch.ones(1, 2), 2.5, already_scaled)[0, -1]
    weight = column * (1 if already_scaled else 2.5)
    where = "scale already in the gates" if already_scaled else "sum multiplied by 2.5"
    print(f"{where}: the shared expert weighs {weight:.1f}")
verdict = check_exercise(mended_fusion, shared_keeps_weight_one)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def mended_fusion(gates, scale, already_scaled):
#     weight = 1.0 if already_scaled else 1 / scale
#     return torch.cat((gates, torch.full((len(gates), 1), weight)), dim=1)
# ```
#
# Short answers hardly suffered; long ones did not come to an end. The case is recorded, with its source,
# as `fused-shared-scale` in `data/published.json`.
# </details>
#
# **2. One from several** (10 minutes). The package holds $K_s$ shared experts as one FFN. Write that step: from a list of
# SwiGLU weights `(gate, up, down)`, of shapes (F, D), (F, D) and (D, F), make one triple whose FFN is the sum of all. The
# widths F may differ.


# %%
def merged(ffns):
    return None  # (gate, up, down)


# %% tags=["hide-input"]
def is_their_sum(merged):
    torch.manual_seed(0)
    for widths in ((3,), (2, 2), (4, 1, 3)):
        ffns = [
            (torch.randn(w, 5), torch.randn(w, 5), torch.randn(5, w)) for w in widths
        ]
        u = torch.randn(7, 5)
        gate, up, down = merged(list(ffns))
        assert tuple(gate.shape) == tuple(up.shape) == (sum(widths), 5), (
            f"widths {widths}: gate {tuple(gate.shape)} and up {tuple(up.shape)} need"
            " one row for each hidden channel"
        )
        assert tuple(down.shape) == (5, sum(widths)), (
            f"widths {widths}: down {tuple(down.shape)} needs one column for each"
            " hidden channel"
        )
        off = (run_ffn(u, gate, up, down) - sum(run_ffn(u, *ffn) for ffn in ffns)).abs()
        assert off.max() < 1e-4, f"widths {widths}: off by {off.max():.2g}"


verdict = check_exercise(merged, is_their_sum)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def merged(ffns):
#     gate, up, down = zip(*ffns, strict=True)
#     return torch.cat(gate), torch.cat(up), torch.cat(down, dim=1)
# ```
#
# The hidden channels stand side by side and never meet before the last sum: `split_expert` of chapter 04, backwards.
# </details>
#
# **3. Other parameters** (a few minutes of computing). Share nearly everything, then halve the common part:
#
# ```
# dsmoe run 05 -p n_shared=7
# dsmoe run 05 -p common=0.5
# ```
#
# With seven of eight shared the router has one choice left. What does that cost in each of the two toys?
#
# ## Recap

# %% tags=["hide-input"]
lab.score()

# %% [markdown]
# 1. Shared experts are experts that every token visits, with gate 1; the router chooses among the others. Weights and
#    work of the experts stay the same.
# 2. They pay if there is something to share: in the toy the error falls in all five runs, on average from 9% to under
#    2%, and in the control it does not.
# 3. In our model the work is divided. The shared expert serves punctuation, sums and the second language; facts stay
#    with the routed experts.
# 4. Swapped for a routed expert it is missed: much in the paper, little here. Our runs cannot resolve whether a model
#    without it would be worse; four of 64 are too many.
#
# The layer is complete. But what keeps a router from sending everything to the same few experts? **Chapter 06** lets one go, and
# watches.
