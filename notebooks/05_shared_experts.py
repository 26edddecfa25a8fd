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
# Chapter 02 ended with two complaints. Chapter 04 built the remedy for the first, hybridity. The second is
# **redundancy**: tokens that go to different experts still need the same common knowledge, so several experts learn it.
# DeepSeekMoE's remedy {cite:p}`DeepSeekMoE2024` is to take a few experts out of the routing and to let every token visit
# them. With these **shared experts** the layer of the paper's title is complete.
#
# **What does a shared expert do?** In the model of this chapter it is the third most valuable of the eight experts that
# a token uses. Silence it, and the loss rises by 0.024 nats; for the best routed expert the rise is 0.629, for the second
# 0.055, for the third 0.012. And it has work of its own. For punctuation marks, relations, arithmetic and the second
# language it is worth more than the second-best routed expert; it leaves values and first names to the routed experts. This
# **division of labour**, in one trained model, is the chapter's finding.
#
# **You will** build the layer; look for redundancy in a model without shared experts; measure what each of the eight
# experts of a token is worth, and for which kind of text; repeat the paper's swap; and ask how many shared experts it
# takes.
#
# **You need** chapters 02 and 04. **Reading time** 47 minutes. **Hardware** any laptop CPU.

# %% tags=["parameters"]
profile: str = "cpu"  # size of the run: smoke | cpu | gpu
seed: int = 0  # seed of weights: 0..2147483647
n_shared: int = 1  # experts always on in the model you train: 1..4
m: int = 4  # pieces of an expert, as in chapter 04: 2 | 4 | 8
gate_scale: float = 4.0  # factor on the gates, chapter 04 takes m: 0.25..16.0
balance_weight: float = 0.01  # weight of the balance loss: 0.0..1.0

# %% tags=["hide-input"]
try:
    from dsmoe_lite.labs import begin, check_exercise, claim, predict, report
except ModuleNotFoundError:
    raise SystemExit("dsmoe_lite is missing: run make setup, then make lab") from None

import torch

from dsmoe_lite.viz import charts

lab = begin(globals())
steps = lab.choose(smoke=30, cpu=250, gpu=3000)
n_parts = lab.choose(smoke=2, cpu=8, gpu=8)  # of held-out text

# %%
from dsmoe_lite import MoEConfig, preset
from dsmoe_lite.common.errors import require

dense = preset("course-dense")
D, E, K, F_width = dense.d_model, 16, 2, dense.ffn_width  # GShard's experts, uncut
require(n_shared < m * K, "n_shared", n_shared, f"must be below m K = {m * K}")
if gate_scale != m:
    print(f"gates times {gate_scale:g}; chapter 04 would take {m}")


def with_shared(shared):
    """A layer of m E experts, of which a token uses m K: some always, the others routed."""
    return MoEConfig(
        n_routed_experts=m * E - shared,
        top_k=m * K - shared,
        expert_width=F_width // m,
        n_shared_experts=shared,
        routed_scaling_factor=gate_scale,
    )


# %% [markdown]
# ## The same knowledge in several experts?
#
# Take the GShard model of chapters 00 and 02: 16 experts, each token uses two, none is shared. What would redundancy
# look like in it? Some knowledge is wanted nearly everywhere in the text. In our world that is grammar: after a name
# comes *has* or *is*, after a value a comma or a full stop. If the places where a function word is due are spread over
# many experts, then each of these experts has to know when one is due.
#
# So sort the places in the text by **what has to be predicted there**: in the sentences about people a function word, a
# punctuation mark, a name, a relation or a value; elsewhere simply the domain. (The domain *second language* states the
# same facts in other words.)

# %%
from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.data.batches import Batch, heldout_batches
from dsmoe_lite.data.tokenizer import read_tokenizer
from dsmoe_lite.data.world import WORD, World

world = World()
folder = DATA / "models"
tokenizer = read_tokenizer(
    read_metadata(folder / "world-gshard.safetensors")["tokenizer"]
)
V = tokenizer.get_vocab_size()
words = world.language
wordings = [*words.statements, words.question]
kind_of_word = dict.fromkeys([*".,:?", ""], "mark")  # "" ends a document
kind_of_word |= {
    word: "function word" for text in wordings for word in WORD.findall(text)
}
kind_of_word |= dict.fromkeys(words.first, "first name")
kind_of_word |= dict.fromkeys(words.last, "last name")
kind_of_word |= dict.fromkeys(words.relations, "relation")
kind_of_word |= {word: "value" for values in words.values for word in values}

KINDS = ["function word", "mark", "first name", "last name", "relation", "value"]
KINDS += ["piece of a word", "second language", *world.domains[2:]]
in_facts = torch.tensor(
    [
        KINDS.index(kind_of_word.get(tokenizer.decode([i]).strip(), "piece of a word"))
        for i in range(V)
    ]
)


def by_kind(batch):  # the same tokens, labelled by kind instead of domain
    domain = batch.domains.long()
    label = torch.where(domain == 0, in_facts[batch.tokens], domain + 6)
    return Batch(batch.tokens, label.to(torch.uint8))


parts = [by_kind(b) for b in heldout_batches(world, tokenizer, 64, 64, n_parts)]
due = torch.cat([part.domains[:, 1:].flatten() for part in parts])  # what comes next
shown = [kind for i, kind in enumerate(KINDS) if (due == i).sum() > 100]
print("a text about people:", tokenizer.decode(parts[0].tokens[0, :40].tolist()))
for kind in shown:
    print(f"{kind:16} {(due == KINDS.index(kind)).float().mean():6.1%} of all places")

# %% [markdown]
# **Ask.** All places together keep all 16 experts busy. How many experts do the places share where a function word is
# due, and how many those where a first name is due? Count them as the *effective number*: the exponential of the entropy of
# their shares, 1 if one expert takes all, 16 if all take the same.

# %%
from dataclasses import replace

from dsmoe_lite import load_model
from dsmoe_lite.routing.metrics import load
from dsmoe_lite.routing.specialization import specialization

predict("05-experts-of-function-words", None)  # two numbers up to 16

gshard = load_model(folder / "world-gshard.safetensors")
with torch.no_grad():
    routed = [gshard(part.tokens[:, :-1]).routings for part in parts]


def joined(layer):  # one Routing of all parts
    routings = [routings[layer] for routings in routed]
    merged = {
        name: torch.cat([getattr(routing, name) for routing in routings])
        for name in ("logits", "scores", "topk_ids", "gates", "kept")
    }
    return replace(routings[0], **merged, batch_shape=(64 * n_parts, 64))


def effective(shares):
    shares = shares / shares.sum(dim=-1, keepdim=True)
    return torch.special.entr(shares).sum(dim=-1).exp()


def of_kinds(ids):  # (T, K) -> (kinds, E)
    return specialization(ids, due, len(KINDS), gshard.config.moe.n_routed_experts)


# the null: each place gets the experts of another place where the same token stands
current = torch.cat([part.tokens[:, :-1].flatten() for part in parts])
dice = torch.rand(len(current), generator=torch.Generator().manual_seed(0)).double()
places, mixed = current.argsort(stable=True), (current + 0.9 * dice).argsort()

rows, nulls, overall = [], [], {}
for layer in range(gshard.config.n_layers):
    routing = joined(layer)
    number = effective(of_kinds(routing.topk_ids))
    dealt = torch.empty_like(routing.topk_ids)
    dealt[places] = routing.topk_ids[mixed]
    nulls.append(effective(of_kinds(dealt)))
    name = f"layer {layer}"
    overall[name] = effective(load(routing).double())
    rows += [
        {"kind": kind, "effect": name, "value": number[KINDS.index(kind)]}
        for kind in shown
    ]

# %% tags=["trained"]
charts.effects_by_kind(
    rows,
    overall=overall,
    number=".1f",
    title="How many of GShard's 16 experts share a kind of place?",
    subtitle="Effective number of experts, by what is due next. Dashed: all places.",
)

# %% tags=["trained", "hide-cell"]
from statistics import mean

for kind in ("function word", "value"):
    number = mean(row["value"].item() for row in rows if row["kind"] == kind)
    claim(f"experts where a {kind} is due", number, (9.0, 11.5))
    null = mean(dealt[KINDS.index(kind)].item() for dealt in nulls)
    claim(f"the null of it, {kind}", null, (10.0, 12.5))

# %% [markdown]
# **What to notice.** Function words come from about ten experts, more than names or relations do. That is what redundancy
# would look like: the same grammar kept in ten places. But values come from about ten, too. And deal the experts out
# anew, to each place those of another place where the same token stands: both numbers come out a little larger. So the
# router mostly follows the token that stands there, and the number tells after which tokens a kind is due. This look
# cannot tell redundancy from that.
#
# ## The layer, complete
#
# Chapter 04 cut each of $E$ experts into $m$ and let a token use $mK$ of them. Now $K_s$ of the $mE$ experts are set
# apart, the **shared experts**. Every token visits them, with gate 1; the router chooses among the others, and chooses
# $K_s$ fewer (DeepSeekMoE, Equations 9 to 11):
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
# The letters are those of chapters 02 and 04. The paper does not say whether this softmax also runs over the shared
# experts. In the released code of the 16B model it does not: the router scores the routed experts only, and ours does
# the same.
#
# The course multiplies $g_{i,t}$ by $m$ (`gate_scale`), for the reason given in chapter 04. This factor is our
# departure: Equations 9 to 11 have none. Whether it helps is not settled. In the pilot runs of chapter 07 the layer as
# printed lost to GShard, with a loss of 0.886 against 0.867 on three seeds, and also to the layer with our factor (chapter
# 04 prints the runs). In the runs of this chapter the layer as printed has the slightly lower loss.
#
# **Build** it, with each expert as a function.


# %%
import torch.nn.functional as F


def deepseekmoe(u, shared, routed, e, k):  # u (T, D), e (mE - K_s, D)
    y = sum(ffn(u) for ffn in shared)  # every token, gate 1
    s = (u @ e.T).softmax(dim=-1)  # over the routed experts
    g, chosen = s.topk(k)  # (T, k)
    for i, ffn in enumerate(routed):
        token, choice = torch.where(chosen == i)
        y[token] += gate_scale * g[token, choice, None] * ffn(u[token])
    return y


def run_ffn(u, gate, up, down):  # (F, D), (F, D), (D, F)
    return (F.silu(u @ gate.T) * (u @ up.T)) @ down.T


# %% [markdown]
# **Prove** it equal to the package's layer. There is one difference to get over: the package does not hold $K_s$ shared
# experts, but one FFN of $K_s$ widths. By chapter 04's identity, read backwards, that is the same thing. So cut its wide
# FFN into $K_s$, and use the pieces as shared experts.

# %%
from functools import partial

from torch.testing import assert_close

from dsmoe_lite import MoELayer
from dsmoe_lite.layers.upcycle import split_expert

for shared in range(1, n_shared + 1):
    config = with_shared(shared)
    layer = MoELayer(D, config, vocab_size=1).double().eval()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    w = layer.experts
    always_on = split_expert(layer.shared, shared)
    chosen_from = [
        partial(run_ffn, gate=w.gate[i], up=w.up[i], down=w.down[i])
        for i in range(config.n_routed_experts)
    ]
    u = torch.randn(40, D, dtype=torch.float64)
    mine = deepseekmoe(u, always_on, chosen_from, layer.router.weight, config.top_k)
    theirs, routing = layer(u[None])
    assert_close(mine, theirs[0])
    assert_close(sum(ffn(u) for ffn in always_on), layer.shared(u))
    assert routing.scores.shape == (40, config.n_routed_experts)
    print(
        f"{shared} shared + {config.top_k} of {config.n_routed_experts} routed:"
        " mine equals the package's"
    )

# %% [markdown]
# What the layer is made of:
#
# | part | built in |
# |---|---|
# | router, gates, routed experts | chapter 02 |
# | many narrow experts instead of few wide ones, Equations 6 to 8 | chapter 04 |
# | shared experts, Equations 9 to 11 | here |
# | losses that balance the load, Equations 12 to 17 | chapter 06 |
#
# ## What does it cost?
#
# **Ask.** Go from no shared expert to four, in the layer above. Think of the weights that are stored, of those that a
# token uses, and of the router's: what does change, and by how much?

# %%
from dsmoe_lite import accounting

predict("05-price", None)

priced = {}
for shared in (0, 1, 2, 4):
    if shared < m * K:
        config = with_shared(shared)
        name = f"{shared} + {config.top_k} of {config.n_routed_experts}"
        priced[name] = replace(dense, n_layers=1, moe=config)
print("shared + routed     stored     used   router")
for name, config in priced.items():
    weights = accounting.parameters(config)
    print(
        f"{name:16} {weights.ffn.total:9,} {weights.ffn.active:8,}"
        f" {weights.router.total:8,}"
    )
assert len({accounting.parameters(config).ffn for config in priced.values()}) == 1

# %%
split = accounting.split_rows({name: (config, 64) for name, config in priced.items()})
rows = [
    {
        **row,
        "component": row["component"].replace("_", " "),
        "total": None,
        "flops": None,
    }
    for row in split
    if "experts" in row["component"]
]
charts.parameter_split(rows, title="Whose are the weights that a token uses?")

# %% [markdown]
# **What to notice.** Each shared expert takes the place of one routed expert, in store and in use. Only the router
# changes, by one row. So we can compare 1 + 7 of 63, which the paper trained, with 8 of 64: but for that row, weights and
# FLOPs are the same.
#
# ## What is in the shared expert? First, look
#
# The course ships a trained model with one shared expert and 63 routed ones of which a token uses 7, each a quarter as
# wide as chapter 02's. At every place we can look at the two sums of {eq}`eq:deepseekmoe` apart. How much of what the
# layer adds comes from the shared expert?
#
# **Ask.** The shared expert is 1 of 8 that a token uses. Which share of the length of the two sums is its own, about?
# And for which kind of place should it be largest, if it holds the grammar?

# %%
from dsmoe_lite.routing.contributions import contributions
from dsmoe_lite.routing.interventions import silence

predict("05-norm-share", None)  # a share, and a kind

checkpoint = folder / "world-deepseekmoe.safetensors"
model = load_model(checkpoint)
assert read_metadata(checkpoint)["tokenizer"] == tokenizer.to_str()
routed_k = model.config.moe.top_k

rows, seen, first_longer = [], {}, []
only_first = silence(model, ranks=range(1, routed_k))  # of the routed, the first choice
for number, part in enumerate(parts):
    tokens, due_here = part.tokens[:, :-1], part.domains[:, 1:].flatten()
    of_shared, of_first = contributions(only_first, tokens)[0]
    first_longer.append(of_first.norm(dim=1) > of_shared.norm(dim=1))
    for layer, (of_shared, of_routed) in enumerate(contributions(model, tokens)):
        ours, others = of_shared.norm(dim=1), of_routed.norm(dim=1)  # (T,)
        share = ours / (ours + others)
        name = f"layer {layer}"
        seen.setdefault(name, []).append(share)
        for kind in shown:
            here = due_here == KINDS.index(kind)
            if here.any():
                value = share[here].mean()
                rows.append(
                    {"kind": kind, "effect": name, "value": value, "part": number}
                )
overall = {name: torch.cat(shares).mean() for name, shares in seen.items()}

# %% tags=["trained"]
charts.effects_by_kind(
    rows,
    overall=overall,
    number=".0%",
    title="How much of the layer's output is the shared expert's?",
    subtitle=[
        "Length of its output over that length plus the length of the routed sum, by what is due next.",
        "Dashed: all places. Bar: 95% interval over parts of the text.",
    ],
)

# %% tags=["trained", "hide-cell"]
claim("share of the shared expert, layer 0", overall["layer 0"], (0.2, 0.27))
claim("share of the shared expert, layer 1", overall["layer 1"], (0.1, 0.2))
longer = torch.cat(first_longer).double().mean()
claim("layer 0: places where the first choice alone is longer", longer, (0.6, 0.8))

# %%
print(f"{routed_k} + 1 unrelated outputs of one length: {1 / (1 + routed_k**0.5):.2f}")

# %% [markdown]
# **What to notice.** Eight outputs of one length with unrelated directions would give 0.27, because a sum of seven such
# vectors is only $\sqrt 7$ times as long as one. The shared expert's part is below that in both layers. Its gate is 1,
# but at most places the first choice alone is longer. And does it hold the grammar? In layer 0 its part is longest where
# a relation or a mark is due, and short where a function word is. In layer 1 it is average for function words and
# relations, and short for marks.
#
# Lengths cannot settle the question. A long output may point in a direction that nothing later reads, and a short one may
# decide. All this is correlation.
#
# ## Then, take it away
#
# To see what the shared expert is *for*, silence it, so that it adds nothing, and see what the model predicts less well.
# This is a zero-ablation: the model is not trained again, and no other expert takes the silenced one's place. Then do the
# same to each of the seven routed experts of a token. They are ranked by their gates: the 1st choice has the largest, the
# 7th choice the smallest. All eight experts have the same width, and all eight are measured in the same way.
#
# **Ask.** Rank the eight experts by what the model loses without each of them. Which place does the shared expert take?
# And for which kinds of place is it worth more than the second choice?


# %%
from dsmoe_lite.evaluate import heldout_loss

predict("05-lesions", None)  # a place from 1 to 8, and the names of kinds


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


# %% tags=["trained"]
charts.ablation_matrix(
    [
        {"kind": kind, "effect": name, "value": part[kind], "part": number}
        for name in rise
        for kind in sorted(shown, key=over_second, reverse=True)
        for number, part in enumerate(rise[name])
        if kind in part
    ],
    overall={name: worth(name) for name in rise},
    overall_is="all places",
    apart="1st choice",
    title="What is each of a token's eight experts worth, and where?",
    subtitle=[
        "Rise in loss (nats a token) when this expert adds nothing, by what is due next.",
        "Framed: the largest of the column, the 1st choice left out.",
    ],
)

# %% tags=["trained"]
from dsmoe_lite.common.stats import mean_and_half_width
from dsmoe_lite.evaluate import recall

total = {name: worth(name) for name in rise}
place = 1 + sum(value > total["shared expert"] for value in total.values())
claim("place of the shared expert among the eight", place, (3, 3))
for kind, interval in {
    "mark": (0.01, 0.04),
    "relation": (0.0, 0.03),
    "second language": (0.01, 0.08),
    "arithmetic": (0.01, 0.06),
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
# **What to notice.** The shared expert comes third of the eight. The 1st choice does most of the work for every kind, and
# from the 4th choice on hardly anything is left. The columns tell more. Behind the 1st choice the work is **divided**:
#
# - For marks, relations, arithmetic and the second language the shared expert is worth more than the 2nd choice: 0.036
#   against 0.012 for marks, 0.102 against 0.056 in the second language. For relations the lead is narrow, 0.010 ± 0.010.
# - For values it is the other way round: 0.005 against 0.156, and even the 5th choice is worth more than the shared
#   expert. For first names and function words it is worth next to nothing.
# - For brackets, last names and code we cannot separate the two: the interval of their difference contains zero.
#
# This division of labour is the chapter's finding. What differs from person to person comes from the routed experts, and
# frequent people are remembered as well without the shared expert as with it. The shared expert works on what many
# texts have in common: punctuation, the relations that every person has, another language for the same facts. But it does
# not hold all of what the paper calls common knowledge. Function words are the most frequent kind of all, and for them it
# is worth 0.001.
#
# The lengths pointed to the right places: the four kinds for which the shared expert beats the 2nd choice are those for
# which its part of layer 0 was longest. But they could not show how little is lost without it.
#
# Two cautions. This is one trained model, and the intervals are over parts of the text, not over training runs. And an
# ablation of one expert shows only what the others cannot make up for. The rises for the seven routed experts add up to
# 0.70, but without all seven at once the loss rises by 1.64, and without the shared expert as well by another 0.54. Perhaps
# the experts back each other up; perhaps inputs so unlike those of training do extra harm. No row of the chart shows which.
#
# ## Swap it for one more routed expert
#
# The paper takes the shared expert of its trained 2B model away and lets every token use one more routed expert instead,
# so that the work stays the same.
#
# **Ask.** Its loss was 1.808. What is it after the swap? And in our model, how much of the 0.024 above should come back
# now that an eighth routed expert may help?

# %%
from dsmoe_lite.study import published

predict("05-swap", None)

(how_many, swap) = published.load()["shared_experts"]
print(f"the paper ({swap['source']}):")
for name, value in swap["pile_loss"].items():
    print(f"  {name:24} {value}")

# %% tags=["trained"]
from dsmoe_lite.routing.interventions import swap_shared

before = heldout_loss(model, parts, KINDS).loss
swapped = heldout_loss(swap_shared(model, 1), parts, KINDS).loss
alone = heldout_loss(silence(model, shared=True), parts, KINDS).loss
claim("shared expert swapped for a routed one, rise", swapped - before, (0.01, 0.04))
claim("what the eighth routed expert gives back", alone - swapped, (-0.005, 0.01))
report(loss=before, swapped=swapped, silenced=alone)

# %%
from dsmoe_lite.study.grids import records
from dsmoe_lite.study.rows import seed_line

recorded = records("deepseekmoe")
rises = {name: {} for name in ("shared-1", "shared-1-plain", "shared-2")}
for record in recorded:
    if (name := record["model_name"]) in rises:
        after = record["shared_swapped"]["heldout_loss"]
        rises[name][record["seed"]] = after - record["heldout_loss"]
print("rise when swapped: mean ± half the 95% interval, then each seed")
for name, by_seed in rises.items():
    print(f"{name:15} {seed_line(by_seed)}")
for name in ("shared-1-plain", "shared-2"):
    both = sorted(rises[name].keys() & rises["shared-1"].keys())
    gap = {one: rises[name][one] - rises["shared-1"][one] for one in both}
    print(f"{name} minus shared-1: {seed_line(gap)}")

# %% [markdown]
# **What to notice.** The loss rises, as in the paper, but only a little, and the eighth routed expert gives back next to
# nothing: the swap costs about as much as silencing the shared expert. The two rises cannot be compared. The paper's model
# has 2B weights and was trained on 100B tokens of real text; ours is a toy in a toy world. The gates differ as well: the
# paper prints them without a factor, as in the runs *shared-1-plain*, and ours are multiplied by $m$. A fresh router gives
# all experts the same affinity:

# %%
moe = model.config.moe
fresh = moe.top_k / moe.n_routed_experts
print(f"{moe.top_k} of {moe.n_routed_experts} equal gates, in all:")
print(f"  as the paper prints them {fresh:.2f}")
print(f"  times {moe.routed_scaling_factor:g} {fresh * moe.routed_scaling_factor:.2f}")
print("The shared expert's gate: 1")

# %% [markdown]
# With gates as printed, the shared expert starts out with more weight beside the routed ones. One could guess that the
# trained model then relies on it more, and that the swap costs more. The runs *shared-1-plain* do not show this. We call a
# difference **resolved** if its interval excludes zero; the difference between *shared-1-plain* and *shared-1*, paired by
# seed, is not. Swapping two shared experts for two routed ones does cost more than swapping one for one.
#
# Why does the loss rise at all, when the work is the same? Nothing was trained to stand in. The routed experts never had
# to hold what the shared one holds, and the expert that comes eighth in a token's ranking has the smallest of the eight
# gates: it was never meant for this token. The swap shows that **in this model** the routed experts do not do the shared
# expert's job. It does not show that a model trained *without* shared experts would be worse; that one could learn to do
# without. The next section asks this.
#
# The swap has also been made by mistake, in a serving engine that computes the shared expert as one more entry of
# the routed list:

# %%
import textwrap

lost = next(
    entry
    for entry in published.load()["discrepancies"]
    if entry["id"] == "fused-shared-lost"
)
what = lost["what"].removeprefix("The same fusion: ")
print(textwrap.fill(f"{what[0].upper()}{what[1:]} ({lost['source']})", width=76))

# %% [markdown]
# ## Are experts replaceable?
#
# If several experts held the same knowledge, a token could do without its best ones: the next in its ranking would know it
# too. So the paper forbids each token a share of the experts, those that it ranks highest, lets it choose among the rest,
# and compares its 2B DeepSeekMoE with GShard x1.5, a GShard whose experts are 1.5 times as large (its Figure 4, curves of
# the loss without printed numbers). If DeepSeekMoE's loss rises faster, its experts are harder to replace: less redundancy.
#
# **Ask.** Whose loss rises faster here?

# %%
from dsmoe_lite.routing.interventions import mask_top

predict("05-replaceable", None)  # "GShard" or "DeepSeekMoE"

both = {"GShard": gshard, "DeepSeekMoE": model}
some = parts[: {"smoke": 1, "cpu": 2, "gpu": 8}[profile]]
SHARES = (0, 1 / 16, 1 / 8, 3 / 16, 1 / 4)
rows = [
    {
        "model": name,
        "share": share,
        "loss": heldout_loss(mask_top(one, share), some, KINDS).loss,
    }
    for name, one in both.items()
    for share in SHARES
]
intact_loss = {row["model"]: row["loss"] for row in rows if row["share"] == 0}
print("experts forbidden at the largest share:", end=" ")
print(
    ", ".join(
        f"{SHARES[-1] * one.config.moe.n_routed_experts:.0f}" for one in both.values()
    )
)

# %% tags=["trained"]
charts.loss_against_disabled(
    rows, relative=True, title="Whose experts can be replaced?"
)

# %% tags=["trained", "hide-cell"]
by_share = {
    name: [row["loss"] - intact_loss[name] for row in rows if row["model"] == name]
    for name in both
}
claim(
    "rise at the first sixteenth, DeepSeekMoE minus GShard",
    by_share["DeepSeekMoE"][1] - by_share["GShard"][1],
    (0.2, 0.6),
)
claim(
    "rise at a quarter, DeepSeekMoE minus GShard",
    by_share["DeepSeekMoE"][-1] - by_share["GShard"][-1],
    (-0.3, 0.2),
)
for name, interval in {"GShard": (0.5, 0.65), "DeepSeekMoE": (0.75, 0.95)}.items():
    share = by_share[name][1] / by_share[name][-1]
    claim(f"{name}: share of its rise that the first step has", share, interval)

# %% [markdown]
# **What to notice.** Both models depend on their best experts: the first step costs each more than all the rest together. At
# first DeepSeekMoE loses more, as in the paper; at a quarter the curves meet. So this test does not show whose experts are
# less redundant here. The forbidden weights are the same, but the first step takes one of the two experts that a token wanted
# from GShard, and four of the seven from DeepSeekMoE, which keeps its shared expert.
#
# The gates differ as well. In GShard's own paper {cite:p}`GShard2020` the two gates are divided by their sum (Algorithm 1),
# and so they are in our GShard: whichever experts step in, they get the full weight. The DeepSeekMoE paper prints the
# conventional layer that it starts from with scores that are *not* divided (Section 2, Equations 3 to 5), and in our
# DeepSeekMoE the experts that step in get only their own small scores. With one model of each kind we cannot separate the
# gates from the experts, nor give an interval. Chapter 07 repeats the test with ten seeds and with both kinds of gates for
# GShard, and there the gates matter most.
#
# ## How many active experts are enough?
#
# The paper lets the trained model use fewer routed experts for each token (its Figure 5, again curves of the loss without
# printed numbers). With 4 of its 7 routed experts it has about the loss of GShard with 2 wide ones.
#
# **Ask.** With how many of its 7 is this one as good as the GShard of the same size?

# %%
from dsmoe_lite.routing.interventions import with_active

predict("05-active", None)  # 1 to 7, or "never"

rows = [
    {
        "model": "DeepSeekMoE",
        "active": active,
        "loss": heldout_loss(with_active(model, active), some, KINDS).loss,
    }
    for active in range(1, routed_k + 1)
]

# %% tags=["trained"]
charts.loss_against_active(
    rows,
    reference={"GShard": intact_loss["GShard"]},
    subtitle="Dashed: GShard with its 2 of 16 wide experts.",
)

# %% tags=["trained", "hide-cell"]
losses_by_active = {row["active"]: row["loss"] for row in rows}
lead = intact_loss["GShard"] - losses_by_active[routed_k]
claim("GShard minus DeepSeekMoE, all 7 active", lead, (-0.015, 0.02))
four = losses_by_active[4] - intact_loss["GShard"]
claim("DeepSeekMoE with 4 active minus GShard", four, (-0.015, 0.02))
half = losses_by_active[routed_k // 2] - losses_by_active[routed_k]
claim(f"rise with {routed_k // 2} of {routed_k} routed experts", half, (0.005, 0.04))

# %% [markdown]
# **What to notice.** The first experts of a token's ranking do nearly all of the work, as the matrix above showed. With 4 of
# 7 this model has about the loss that GShard has with both of its wide experts, for $(4 + 1)/8$ of the expert work, counting
# the shared one, and the last two experts add next to nothing. That is the paper's trend. It does not take finer knowledge
# to explain it: a softmax falls off, and experts with small gates add little. With all seven, the two models have almost
# the same loss here.
#
# Here are both models side by side, on one sentence.
#
# **Ask.** Which of the two spreads the digits over more experts? Click the digits, and step through the layers.

# %% tags=["trained"]
from dsmoe_lite.viz.explorer import explore

predict("05-digits", None)  # "GShard" or "DeepSeekMoE"

sentence = "Which tool does Ridi Lava have? 12+30=42. def f(x, y):"
explore(both, tokenizer, sentence, window=64, n_devices=4)

# %% tags=["trained"]
from dsmoe_lite import RoutingTrace

for name, one in both.items():
    trace = RoutingTrace.of(one, tokenizer, sentence, window=64)
    digits = [t for t, each in enumerate(trace.token_type) if each == "digit"]
    for layer in range(trace.n_layers):
        used = set(trace.topk_ids[layer, digits].flatten().tolist())
        print(f"{name}, layer {layer}: {len(digits)} digits use {len(used)} experts")

# %% [markdown]
# **What to notice.** More experts, for every digit takes more of them; in weights that is a quarter as much for each. Now
# focus on an expert that several digits share, switch it off, and colour by the change of the loss.
#
# %% [markdown]
# ## How many?
#
# The paper's evidence that one shared expert helps at all is its Figure 3. It shows scores on benchmarks (HellaSwag, PIQA,
# ARC, TriviaQA, NaturalQuestions) and no loss, so the losses that we measure below are a stand-in for them. For the *number*
# of shared experts the paper prints losses.
#
# **Ask.** The paper trained its 2B model with 1, 2 and 4 shared experts of 64, at the same work. How far apart are their
# losses?

# %%
predict("05-how-many", None)  # nats between the lowest and the highest

print(f"the paper ({how_many['source']}):")
for number, value in how_many["pile_loss"].items():
    print(f"  {number} shared {value}")

# %% [markdown]
# Two are marginally best, and the larger models of the paper keep their ratio: one shared expert for three routed ones in
# use. First a short run of our own, with shared experts and without.

# %%
from dsmoe_lite import TrainConfig, Transformer, train
from dsmoe_lite.data.batches import Batches

train_config = TrainConfig(
    steps=steps,
    batch_size=16,
    seq_len=64,
    lr=3e-3,
    balance={"expert": balance_weight},
    seed=seed,
)
runs, trained = {}, {}
for shared in (0, n_shared):
    torch.manual_seed(seed)
    config = replace(dense, vocab_size=V, moe=with_shared(shared))
    trained[shared] = Transformer(config).to(lab.device)
    batches = Batches(world, tokenizer, train_config.batch_size, train_config.seq_len)
    runs[shared] = train(trained[shared], batches, train_config)
print(f"{runs[0].tokens:,} tokens each")

# %% tags=["trained"]
live = {shared: heldout_loss(one, parts, KINDS).loss for shared, one in trained.items()}
live_swap = heldout_loss(swap_shared(trained[n_shared], n_shared), parts, KINDS).loss
# recorded over seeds 0 to 4, widened to about four standard deviations; not for a GPU
interval = {"smoke": (-0.1, 0.1), "cpu": (-0.12, 0.1), "gpu": (-7.0, 7.0)}[profile]
gap = live[n_shared] - live[0]
claim(f"{n_shared} shared minus none, held-out loss", gap, interval, asserted=lab.own)
interval = {"smoke": (-0.02, 0.04), "cpu": (0.0, 0.05), "gpu": (-1.0, 7.0)}[profile]
claim("shared swapped, rise", live_swap - live[n_shared], interval, asserted=lab.own)
report(loss={f"{shared} shared": loss for shared, loss in live.items()})

# %% [markdown]
# One short run says little. Here are more tokens and five seeds, recorded by `dsmoe experiment deepseekmoe`.

# %%
from dsmoe_lite.study.rows import metric_rows

NAMES = {"m4": "none", "shared-1": "1 shared", "shared-2": "2 shared"}
charts.model_comparison(
    metric_rows(recorded, NAMES),
    title="Do shared experts pay, at the same weights and FLOPs?",
)

# %%
from dsmoe_lite.bench.ratios import compare
from dsmoe_lite.layers.ffn import SwiGLU
from dsmoe_lite.study.rows import gaps

for metric in ("held-out loss", "recall, rare people"):
    print(f"{metric}, first minus second: mean ± half the 95% interval, then each seed")
    for one, other in (
        ("shared-1", "m4"),
        ("shared-2", "m4"),
        ("shared-2", "shared-1"),
        ("shared-1-plain", "shared-1"),
    ):
        gap = gaps(recorded, one, other, metric)
        print(f"  {one:14} - {other:8} {seed_line(gap)}")

paper_runs = records("paper")  # of chapter 07: ten seeds, narrower models
print("chapter 07, held-out loss: mean ± half the 95% interval")
for one, name in (("2+6-of-62", "2 shared"), ("4+4-of-60", "4 shared")):
    gap = gaps(paper_runs, one, "deepseekmoe", "held-out loss")
    center, margin = mean_and_half_width(list(gap.values()))
    print(f"  {name} minus 1 shared, {len(gap)} seeds: {center:+.3f} ± {margin:.3f}")

# %% [markdown]
# **What to notice.** Runs are paired by seed: both saw the same text in the same order. With several intervals, one may
# exclude zero by luck. No gap between none, one and two shared experts is resolved: five seeds at this size do not show
# whether a shared expert helps or harms. The narrower models of chapter 07, with ten seeds, say a little more. There two
# cannot be told from one, and **four are worse than one**, by 0.017 ± 0.009. The paper's three losses differ by a few
# thousandths, and are printed without a spread.
#
# One line above is resolved: with gates as the paper prints them (*plain*), without our factor $m$, the loss is lower by
# 0.010. The pilot runs of chapter 07 leaned the other way. So the factor has not shown that it pays; the course keeps it
# because it leaves the size of the layer's output the same for every $m$.
#
# ## On the clock
#
# A shared expert needs no router, no sorting and no gathering, and $K_s$ of them are one dense product. So at the same
# FLOPs more shared experts should mean less time.
#
# **Ask.** One layer, forward and backward, in turns in this very process, on this machine's CPU: how much time do 4
# shared of 64 save? And how far is the dense FFN, which is *all* shared?


# %% tags=["measured"]
predict("05-clock", None)

x = torch.randn(1, 2048, D, requires_grad=True)  # the layer below wants its gradient


def forward_and_backward(module):
    def step():
        y = module(x)
        (y[0] if isinstance(y, tuple) else y).square().mean().backward()
        module.zero_grad(set_to_none=True)
        x.grad = None

    return step


timed = {
    name: forward_and_backward(MoELayer(D, config.moe, vocab_size=1))
    for name, config in priced.items()
}
timed["dense, all shared"] = forward_and_backward(SwiGLU(D, K * F_width))
for row in compare(timed, rounds={"smoke": 5, "cpu": 25, "gpu": 50}[profile]):
    print(
        f"{row['what']:18} {row['milliseconds']:6.1f} ms,"
        f" {1 / row['speed ratio']:.2f} times the layer without"
    )

# %% [markdown]
# **What to notice.** One shared expert hardly shows on the clock; four do, at the same FLOPs. The dense FFN, which is all
# shared, is fastest by far. That is no reason to share everything, for then nothing is left to choose. On many devices a
# shared expert has one more use: its work needs no message, and can be done while the routed tokens travel.
#
# ## Exercises
#
# **1. A bug from the wild** (10 minutes). A serving engine computes shared and routed experts in one go: the shared
# expert becomes one more column of the gates, the last. When all is added up, the whole sum is multiplied by the
# scale of the routed gates; so that the shared expert keeps its weight of 1, its column holds 1 / scale. On one path the
# gates come with the scale already in them, and the last multiplication is left out. Mend the function for both paths.


# %%
def fused_gates(gates, scale, already_scaled):  # as it was: do not use
    shared = torch.full((len(gates), 1), 1 / scale)
    return torch.cat((gates, shared), dim=1)  # (T, K) -> (T, K + 1)


def mended_fusion(gates, scale, already_scaled):
    return None  # (T, K + 1), the shared expert last


def shared_keeps_weight_one(mended_fusion):
    bare = torch.tensor([[0.5, 0.25], [0.125, 0.0625]])
    for scale in (2.0, 16.0, 0.5):
        for already_scaled in (False, True):
            given = bare * scale if already_scaled else bare
            columns = mended_fusion(given.clone(), scale, already_scaled)
            assert tuple(columns.shape) == (2, 3), "two tokens, two routed, one shared"
            weights = columns * (1 if already_scaled else scale)  # what the engine does
            right = [[*row, 1.0] for row in (bare * scale).tolist()]
            got = [[round(float(w), 5) for w in row] for row in weights]
            where = "scale in the gates" if already_scaled else "sum multiplied"
            assert got == right, f"{where}, scale {scale:g}: {right[0]}, not {got[0]}"


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


def is_their_sum(merged):
    torch.manual_seed(0)
    for widths in ((3,), (2, 2), (4, 1, 3)):
        ffns = [
            (torch.randn(w, 5), torch.randn(w, 5), torch.randn(5, w)) for w in widths
        ]
        u = torch.randn(7, 5)
        gate, up, down = merged(list(ffns))
        assert tuple(gate.shape) == tuple(up.shape) == (sum(widths), 5), (
            f"widths {widths}: gate and up have shape ({sum(widths)}, 5)"
        )
        assert tuple(down.shape) == (5, sum(widths)), (
            f"widths {widths}: down has shape (5, {sum(widths)})"
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
# **3. Other parameters** (a few minutes of computing). Train with four shared experts, then with gates as the paper
# prints them:
#
# ```
# dsmoe run 05 -p n_shared=4
# dsmoe run 05 -p gate_scale=1
# ```
#
# What does each do to the gap, and to the rise when the shared experts are swapped? (`dsmoe run` prints what each run
# reported.) Compare with the recorded swaps of *shared-1-plain*: how much does one short run tell?
#
# ## Recap
#
# 1. Shared experts are experts that every token visits, with gate 1; the router chooses among the others.
# 2. $K_s$ shared experts are one dense FFN of $K_s$ widths; weights and FLOPs of the experts stay the same.
# 3. The length of an output does not say what it is worth; silencing the expert comes closer. In our model the shared
#    expert is third of the eight experts that a token uses, and the work is divided: marks, relations, arithmetic and the second
#    language need it more than the second routed choice, first names, values and function words hardly at all. The first
#    routed choice does most of the work everywhere.
# 4. If it is swapped for one more routed expert, the loss rises: much in the paper, little here. That shows what one
#    trained model relies on. Whether models without shared experts are worse, only training with and without can show; our
#    runs do not resolve it for one or two, and four are worse than one.
# 5. At the same FLOPs shared experts are faster than routed ones.
#
# **Claims settled here:** the ablations of the shipped model and the live gap lie in their intervals; the recorded gaps
# and swaps, seed by seed, are those printed above.
