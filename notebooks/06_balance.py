# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Balance: does every expert get work?
#
# ![Eight experts on four devices. Left alone, one expert gets more than three times its fair share and others nearly nothing. A loss that pushes affinities, or a bias that moves only the choice, brings all near their share.](images/balance.svg)
#
# **What keeps all experts at work?** Not the loss of the language model: with nothing else, our router soon sends
# nearly all tokens to one of sixteen experts. A small extra loss prevents that: *how often* an expert is chosen, times
# *how much* it is wanted. A bias, added only when experts are ranked, cures it without any gradient. With 64 experts
# either brings the busiest from 3.3 times its fair share to under 1.5, at no price that five seeds can resolve. The
# z-loss, often listed beside them, balances nothing: used alone, it raised the busiest expert from 3.3 to 9.2 times its
# share.
#
# **Afterwards you can** measure imbalance, write the balance loss of DeepSeekMoE and the bias of DeepSeek-V3, say what
# each of them cannot see, and recognise a leaking bias. **You need** chapters 02, 04 and 05. **Reading time** 16
# minutes. **Hardware** any laptop CPU.

# %% tags=["parameters"]
profile: str = "cpu"  # size of the run: smoke | cpu | gpu
seed: int = 0  # seed of weights: 0..2147483647
n_experts: int = 16  # routed experts of the models trained here: 4..64
top_k: int = 1  # experts a token visits in them: 1..4
method: str = "expert"  # the loss: expert | switch | sequence | importance | z
balance_weight: float = 0.01  # weight of that loss: 0.0..10.0
bias_speed: float = 0.001  # step of the bias, without a loss: 0.0001..0.1

# %% tags=["hide-input"]
try:
    from dsmoe_lite.labs import begin, check_exercise, claim, report
except ModuleNotFoundError:
    raise SystemExit("dsmoe_lite is missing: run make setup, then make lab") from None

import torch

from dsmoe_lite.viz import charts

lab = begin(globals())
steps = lab.choose(smoke=40, cpu=240, gpu=2000)

# %% [markdown]
# ## Let a router go
#
# Train with sixteen experts, of which each token uses one, without a capacity and without a balance loss. First a
# measure. Let $n_i$ be the number of tokens that choose expert $i$:
#
# $$
# \text{load}_i = \frac{n_i}{\frac1E \sum_{j=1}^{E} n_j}, \qquad
# \text{MaxVio} = \max_i\, \text{load}_i - 1 .
# $$ (eq:maxvio)
#
# A load of 1 is the fair share. MaxVio, the largest *violation* of balance {cite:p}`LossFree2024`, is 0 if all loads
# are equal. The worst case is **collapse**: every token takes the same $K$ experts, and MaxVio is $E/K - 1$, here 15. Random
# choices give about 0.2 for the 1,024 tokens of a step.
#
# **Ask.** How high will MaxVio of the first layer climb in the first few hundred steps?

# %%
from dataclasses import replace
from statistics import mean

from dsmoe_lite import MoEConfig, TrainConfig, Transformer, preset, train
from dsmoe_lite.data.batches import Batches, heldout_batches
from dsmoe_lite.data.tokenizer import load_tokenizer
from dsmoe_lite.data.world import World
from dsmoe_lite.evaluate import heldout_loss

world = World()
tokenizer = load_tokenizer(world, 1024)
V = tokenizer.get_vocab_size()
held_out = heldout_batches(world, tokenizer, 64, 64, 8)
plain = MoEConfig(n_routed_experts=n_experts, top_k=top_k, expert_width=128)


def train_with(moe, losses, **settings):
    torch.manual_seed(seed)
    model = Transformer(replace(preset("course-dense"), vocab_size=V, moe=moe))
    batches = Batches(world, tokenizer, batch_size=16, seq_len=64)
    config = TrainConfig(steps=steps, balance=losses, seed=seed, **settings)
    return model, train(model.to(lab.device), batches, config)


# %% tags=["hide-input"]
PEAKS = {"about 1": 1, "about 5": 5, "nearly 15": 15}
lab.ask("06-peak", *PEAKS)
models, runs, learnt = {}, {}, {}
models["none"], runs["none"] = train_with(plain, {})
learnt["none"] = heldout_loss(models["none"], held_out, world.domains)


def max_vios(run, layer):
    return [max(entry["loads"][layer]) - 1 for entry in run.routing]


peak = max(max_vios(runs["none"], 0))
at_peak = runs["none"].routing[max_vios(runs["none"], 0).index(peak)]["step"]
lab.answer("06-peak", min(PEAKS, key=lambda p: abs(PEAKS[p] - peak)), f"{peak:.1f}")
charts.expert_load(
    [
        {"step": entry["step"], "expert": i, "load": value}
        for entry in runs["none"].routing
        for i, value in enumerate(entry["loads"][0])
    ],
    step=at_peak,
    title="Left alone, who gets the tokens? (first layer)",
)

# %% tags=["trained", "hide-cell"]
free = learnt["none"].experts[0]
# recorded over seeds 0 to 4, widened; not yet for a GPU
interval = {"smoke": (3.0, 15.0), "cpu": (11.0, 15.0), "gpu": (0.0, 15.0)}[profile]
claim("highest MaxVio of the first layer", peak, interval, asserted=lab.own)
interval = {"smoke": (9.0, 15.0), "cpu": (1.0, 15.0), "gpu": (0.0, 15.0)}[profile]
claim(
    "its MaxVio on held-out text, at the end", free.max_vio, interval, asserted=lab.own
)
dice = torch.rand(1024, 16, generator=torch.Generator().manual_seed(0))
thrown = torch.bincount(dice.argmax(dim=1), minlength=16)
claim("MaxVio of random choices, 16 experts", thrown.max() / 64 - 1, (0.1, 0.35))
report(
    share_of_the_busiest_expert_at_the_peak=(peak + 1) / n_experts,
    overflow_at_the_end=free.overflow,
    experts_with_under_a_tenth_of_their_share=sum(value < 0.1 for value in free.load),
)

# %% [markdown]
# Nearly 15. The chart opens at the peak: within a few steps one expert takes nearly all tokens, the dark column in the
# strip. **Move** the slider: later others win some back, and the layer stays uneven to the end.
#
# Collapse feeds itself. An expert that gets more tokens gets more gradient and improves sooner; the router, trained by
# the same loss, sends it more. An expert that gets none learns nothing. Collapse costs either way: with a capacity,
# choices over it are *dropped*; without one, all other devices *wait* for the busiest.
#
# ## How often, times how much
#
# How often an expert is chosen, $f_i$, is a count and has no gradient. How much it is wanted, its mean affinity $P_i$,
# has one. In their product the count shows which experts are overloaded, and the affinity carries the gradient that
# pushes them down (DeepSeekMoE {cite:p}`DeepSeekMoE2024`, Equations 12 to 14):
#
# $$
# \mathcal L_{expert} = \sum_{i=1}^{E} f_i P_i, \qquad
# f_i = \frac{E}{KT} \sum_{t=1}^{T} \mathbb 1[\,i \in \mathcal T_t\,], \qquad
# P_i = \frac1T \sum_{t=1}^{T} s_{i,t}
# $$ (eq:expert-loss)
#
# $\mathbb 1[\cdot]$ is 1 if its condition holds, else 0; $\mathcal T_t$ are the $K$ experts of token $t$. $E$ and $K$ count
# routed experts only: shared experts have nothing to balance. The loss is 1 at balance and $E/K$ at collapse. Chapter 02's loss
# {eq}`eq:gshard-loss` is the same idea, with first choices only. **Build** it:


# %%
import torch.nn.functional as F
from torch.testing import assert_close

from dsmoe_lite import Router
from dsmoe_lite.layers import balance
from dsmoe_lite.routing.metrics import load, max_vio


def expert_loss(routing):
    T, K = routing.topk_ids.shape
    E = routing.n_experts
    chosen = F.one_hot(routing.topk_ids, E).sum(dim=(0, 1))
    f = chosen * E / (K * T)  # (E,) how often
    P = routing.scores.mean(dim=0)  # (E,) how much
    return (f * P).sum()


x = torch.randn(6 * 20, 32)  # 6 sequences of 20 tokens
small = Router(32, MoEConfig(n_routed_experts=16, top_k=2, expert_width=8), 1)(
    x, (6, 20)
)
assert_close(expert_loss(small), balance.expert_loss(small))
assert_close(load(small).max() - 1, torch.tensor(max_vio(small)), check_dtype=False)
print("expert-level loss: equal")

# %% [markdown]
# How strong is its push? Put all tokens on one expert and raise that expert's logit above the others':

# %% tags=["hide-input"]
for ahead in (1.0, 40.0):
    logits = torch.zeros(128, 16, dtype=torch.float64)
    logits[:, 0] = ahead  # every token chooses e0
    logits.requires_grad_()
    scores = logits.softmax(dim=-1)
    of_all = 16 * scores[:, 0].mean()  # f is 16 for e0 and 0 for the others
    (gradient,) = torch.autograd.grad(of_all, logits)
    print(f"e0 ahead by {ahead:2g}: push on its logit {gradient[:, 0].sum():.0e}")

# %% [markdown]
# Once the router is certain, the loss cannot bring it back: a saturated softmax has no gradient. So use the loss from
# the first step, before that can happen.
#
# ## Without a loss: a bias
#
# Any such loss adds a gradient that has nothing to do with the text. Wang and others {cite:p}`LossFree2024` move only
# the *choice*. Each expert has a bias $b_i$, which is added to its affinity when experts are ranked. After each step
# overloaded experts go down by a fixed $\gamma$ and the others up. In DeepSeek-V3's form (Equation 16 and Section 2.1.2):
#
# $$
# \begin{aligned}
# \mathcal T_t &= \text{the } K \text{ experts with the largest } s_{i,t} + b_i, \\
# g_{i,t} &\propto s_{i,t} \ \text{ for } i \in \mathcal T_t, \\
# b_i &\leftarrow b_i + \gamma\,\operatorname{sign}\Bigl(\frac1E \sum_j n_j - n_i\Bigr)
# \end{aligned}
# $$ (eq:bias)
#
# The gate is made of $s$ alone. No gradient is involved: the bias moves by a fixed step, so it works after a collapse
# too. **Build** the step:


# %%
def updated(bias, counts, speed):
    return bias + speed * torch.sign(counts.double().mean() - counts)


start = torch.zeros(4, dtype=torch.float64)
theirs = start.clone()
counts = torch.tensor([9, 4, 0, 3])
balance.update_bias(theirs, counts, 0.1)
assert_close(updated(start, counts, 0.1), theirs)
print(f"counts {counts.tolist()}, mean 4: biases move by {theirs.tolist()}")

# %% [markdown]
# ## Three routers side by side
#
# The model from the beginning again, with the same seed and the same text: left alone; with the loss at a weight of 0.01; and with
# the bias at a speed of 0.001.
#
# **Ask.** Which remedy, the loss or the bias, prevents the collapse?

# %% tags=["trained", "hide-input"]
lab.ask("06-first", "the loss", "the bias", "both")
with_bias = replace(plain, expert_bias=True)
models[method], runs[method] = train_with(plain, {method: balance_weight})
models["bias"], runs["bias"] = train_with(with_bias, {}, bias_speed=bias_speed)
for name in (method, "bias"):
    learnt[name] = heldout_loss(models[name], held_out, world.domains)
peaks = {name: max(max_vios(run, 0)) for name, run in runs.items()}
held = [words for words, name in (("the loss", method), ("the bias", "bias"))
        if peaks[name] < peaks["none"] / 2]  # fmt: skip
lab.answer("06-first", "both" if len(held) != 1 else held[0])
worst = n_experts / top_k - 1
SHOWN = {"none": "no remedy", method: f"{method} loss", "bias": "bias"}
rows = [
    {"model": name, "seed": seed, "step": entry["step"], "max_vio": vio}
    for name, run in runs.items()
    for entry, vio in zip(run.routing, max_vios(run, 0), strict=True)
]
charts.training_curves(
    [{**row, "model": SHOWN[row["model"]]} for row in rows],
    y="max_vio",
    y_title="MaxVio",
    title="Which router collapses? (first layer)",
    subtitle="MaxVio is 0 if all experts get as many tokens.",
    levels={"worst case": worst},
)

# %% tags=["trained", "hide-cell"]
uneven = {
    name: mean(e.max_vio for e in found.experts) for name, found in learnt.items()
}
over = {name: mean(e.overflow for e in found.experts) for name, found in learnt.items()}
lost = {name: found.loss for name, found in learnt.items()}
# recorded over seeds 0 to 4, widened; not yet for a GPU
interval = {"smoke": (-15.0, 15.0), "cpu": (0.5, 15.0), "gpu": (-15.0, 15.0)}[profile]
for name in (method, "bias"):
    less = uneven["none"] - uneven[name]
    claim(
        f"MaxVio on held-out text, none minus {name}", less, interval, asserted=lab.own
    )
OF_PEAK = {  # highest MaxVio of the first layer in training
    "smoke": {method: (0.5, 5.5), "bias": (2.0, 15.0)},
    "cpu": {method: (2.5, 4.0), "bias": (3.0, 15.0)},
    "gpu": {method: (0.0, 15.0), "bias": (0.0, 15.0)},
}
for name, interval in OF_PEAK[profile].items():
    claim(
        f"highest MaxVio in training, {name}",
        peaks[name],
        interval,
        asserted=lab.own,
    )
interval = {"smoke": (-0.8, 0.8), "cpu": (-0.08, 0.08), "gpu": (-7.0, 7.0)}[profile]
for name in (method, "bias"):
    gap = lost[name] - lost["none"]
    claim(f"held-out loss, {name} minus none", gap, interval, asserted=lab.own)
report(max_vio=uneven, overflow=over, heldout_loss=lost)

# %% [markdown]
# The loss: it acts from the first step, and MaxVio never exceeds 3.2. The bias starts at 0, so MaxVio first climbs to
# 13; then the small steps of the bias add up and bring it below 1, as the loss does.
#
# **Repair a collapse yourself.** Below two small layers learn to paint 16 tiles, in the page: A is left alone, B has
# the loss (with weight 1; it competes with a squared error here, not with a language model's loss). Press a button to
# guess and start. Then press *Give A the loss now*, or *Give A a bias now*, and see how far A comes back.

# %% tags=["trained"]
from dsmoe_lite.viz.playground import Playground

Playground("collapse")

# %% [markdown]
# How fast should the bias move? **Move** the slider. Here the router that was left alone is frozen and only the bias
# moves, on one batch of 1,024 tokens after another.

# %% tags=["trained"]
from dsmoe_lite.layers.selection import ordered_topk

frozen = models["none"].cpu().eval()
with torch.no_grad():
    affinities = torch.cat(
        [frozen(batch.tokens[:, :-1]).routings[0].scores for batch in held_out]
    )


def settle(speed, batch=1024):  # MaxVio of each of 400 batches
    bias, seen = torch.zeros(n_experts), []
    for step in range(400):
        start = step * batch % (len(affinities) - batch + 1)
        ids = ordered_topk(affinities[start : start + batch] + bias, top_k)
        counts = torch.bincount(ids.flatten(), minlength=n_experts)
        seen.append(float(counts.max() / counts.float().mean()) - 1)
        balance.update_bias(bias, counts, speed)
    return seen


SPEEDS = [bias_speed * 10 ** (i / 2) for i in range(-2, 5)]
settled = {speed: settle(speed) for speed in SPEEDS}
charts.bias_speed(
    [
        {"speed": speed, "batch": i, "max_vio": vio}
        for speed, vios in settled.items()
        for i, vio in enumerate(vios)
    ],
    speed=bias_speed,
)

# %% tags=["trained", "hide-cell"]
NAMED = {"slow": SPEEDS[0], "own": SPEEDS[2], "fast": SPEEDS[4]}
late = {name: mean(settled[speed][-100:]) for name, speed in NAMED.items()}
OVER = {  # MaxVio at the end, over that at the chapter's own speed
    "smoke": {"slow": (-16.0, 16.0), "fast": (-16.0, 16.0)},
    "cpu": {"slow": (-1.5, 9.0), "fast": (1.0, 3.0)},
    "gpu": {"slow": (-16.0, 16.0), "fast": (-16.0, 16.0)},
}
for name, interval in OVER[profile].items():
    claim(
        f"MaxVio at the end, {name} minus own speed",
        late[name] - late["own"],
        interval,
        asserted=lab.own,
    )
report(max_vio_at_the_end={f"{NAMED[name]:g}": value for name, value in late.items()})

# %% [markdown]
# At 0.001, this chapter's speed, MaxVio settles lowest of the three speeds named here. At 0.0001 the bias is too slow:
# after 400 batches MaxVio is still near 5. At 0.01 it overshoots: experts go from overloaded to idle and back, and
# MaxVio stays near 2.
#
# ## What does each loss see?
#
# A batch can be balanced while each of its texts is not: one all code, another all sums. At inference texts come one at
# a time. So DeepSeek-V3 {cite:p}`DeepSeekV3`, which balances by the bias, keeps a very small loss *within every
# sequence* beside it (Equations 17 to 20). V3's affinities are sigmoids, so $P_i$ first divides them by their sum over
# the experts. $f_i$ counts how often expert $i$ is among the $K$ largest $s$, without the bias. Both are taken over the
# $S$ tokens of one sequence:
#
# $$
# \mathcal L_{sequence} = \sum_{i=1}^{E} f_i P_i, \qquad
# P_i = \frac1S \sum_{t=1}^{S} \frac{s_{i,t}}{\sum_j s_{j,t}}
# $$ (eq:sequence-loss)
#
# ST-MoE {cite:p}`STMoE2022` limits the *size* of the logits $h_{i,t} = \mathbf{u}_t^\top \mathbf{e}_i$, because in low precision a
# softmax of large numbers is coarse. It is often listed with the balance losses:
#
# $$
# \mathcal L_z = \frac1T \sum_{t=1}^{T} \Bigl(\log \sum_{i=1}^{E} e^{h_{i,t}}\Bigr)^2
# $$ (eq:z-loss)
#
# Show these losses five made-up routings of 8 sequences of 16 tokens, with 16 experts and two per token: balanced; one
# pair of experts for all tokens; half of the experts; a separate pair for each sequence; and balanced with 20 added to
# every logit. (*Switch* is chapter 02's loss, which counts first choices only; *importance* and *load* are the first
# balance losses, of 2017: exercise 2.)
#
# **Ask.** Which loss sees that each sequence uses a single pair?

# %% tags=["hide-input"]
import math

from dsmoe_lite import Routing

lab.ask("06-sees", "expert", "importance", "sequence", "z")
t = torch.arange(8 * 16)
place, row_of = t % 16, t // 16
PAIRS = {
    "balanced": (place, (place + 4) % 16),
    "one pair|for all": (0 * t, 0 * t + 1),
    "half of|the experts": (place % 8, (place + 4) % 8),
    "each sequence|its own pair": (row_of, row_of + 8),
    "logits|20 higher": (place, (place + 4) % 16),
}


def made_up(pair, added=0.0):
    first, second = (F.one_hot(ids, 16).double() for ids in pair)
    scores = 0.5 * first + (0.5 - 2e-6) * second + 1.25e-7
    made = Routing.of_scores(scores, 2, (8, 16))
    logits = made.logits + math.log(16) + added
    return replace(
        made, logits=logits, clean_logits=logits, noise_scale=torch.ones_like(logits)
    )


SEES = {
    "importance": balance.importance_loss,
    "load": balance.load_loss,
    "Switch": balance.switch_loss,
    "expert": balance.expert_loss,
    "sequence": balance.sequence_loss,
    "z": balance.z_loss,
    "(MaxVio)": max_vio,
}
seen = [
    {"loss": loss, "routing": name, "value": round(float(of(made)), 3)}
    for loss, of in SEES.items()
    for name, pair in PAIRS.items()
    for made in [made_up(pair, 20.0 if name.startswith("logits") else 0.0)]
]
value_of = {(row["loss"], row["routing"]): row["value"] for row in seen}
alone = [
    loss
    for loss in ("expert", "importance", "sequence", "z")
    if value_of[loss, "each sequence|its own pair"] != value_of[loss, "balanced"]
]
lab.answer("06-sees", alone[0])
charts.loss_table(seen, balanced="balanced")

# %% tags=["trained", "hide-cell"]
third = Router(
    32,
    MoEConfig(
        n_routed_experts=16,
        top_k=2,
        expert_width=8,
        scoring_func="sigmoid",
        norm_topk_prob=True,
        expert_bias=True,
    ),
    vocab_size=1,
)
third.expert_bias.normal_(std=0.1)  # without it the two counts would be the same
routing = third(x, (6, 20))
assert not torch.equal(routing.topk_ids, ordered_topk(routing.scores, 2))
found = []
for b in range(6):
    s = routing.scores[20 * b : 20 * (b + 1)]
    ids = s.topk(2).indices  # Equation 18: without the bias
    own = replace(routing, scores=s / s.sum(dim=1, keepdim=True), topk_ids=ids)
    found.append(expert_loss(own))
assert_close(torch.stack(found).mean(), balance.sequence_loss(routing))
z = small.logits.exp().sum(dim=1).log().square().mean()
assert_close(z, balance.z_loss(small))
claim(
    "sequence loss, each sequence its own pair",
    value_of["sequence", "each sequence|its own pair"],
    (7.9, 8.1),
)
claim(
    "expert loss, one pair for all", value_of["expert", "one pair|for all"], (7.9, 8.1)
)

# %% [markdown]
# Only the sequence-wise loss. Read the table by rows: importance, load, Switch and the expert-level loss see what MaxVio sees, uneven
# experts, on different scales. z sees the size of the logits and nothing else. It is no balance loss.
#
# ## All remedies on one axis
#
# We trained one design, 64 narrow experts of which a token uses six, and two shared, with each remedy and five seeds. Numbers beside a
# name are weights, or the bias's $\gamma$.
#
# **Ask.** Will a router trained with the z-loss be more even than one with no remedy, the same, or less?

# %% tags=["hide-input"]
from dsmoe_lite.study.grids import records
from dsmoe_lite.study.rows import balance_rows

lab.ask("06-z", "more even", "the same", "less even")
NAMES = {  # in the grid: to show
    "expert-0.1": "expert 0.1",
    "expert-0.01": "expert 0.01",
    "bias": "bias 0.001",
    "sequence": "sequence 0.01",
    "importance+load": "importance, load 0.1",
    "switch": "Switch 0.01",
    "expert-0.001": "expert 0.001",
    "none": "no remedy",
    "z": "z 0.001",
}
recorded = records("balance")
of_runs = balance_rows(
    recorded, {name: (shown, "") for name, shown in NAMES.items()}, "none"
)
vio = {
    shown: mean(row["max_vio"] for row in of_runs if row["method"] == shown)
    for shown in NAMES.values()
}
lab.answer("06-z", "less even" if vio["z 0.001"] > vio["no remedy"] else "more even")
by_vio = sorted(of_runs, key=lambda row: vio[row["method"]])
charts.model_comparison(
    [
        {
            "model": row["method"],
            "seed": row["seed"],
            "metric": shown,
            "value": row[key],
        }
        for shown, key in (
            ("MaxVio (worst: 9.7)", "max_vio"),
            ("loss minus no remedy", "gap"),
        )
        for row in by_vio
        if not (key == "gap" and row["method"] == "no remedy")
    ],
    title="How even, at what price?",
    subtitle="Held-out text. Ring: one of five seeds. Dot and bar: mean and its 95% interval.",
)

# %% tags=["trained", "hide-cell"]
by_seed = {(row["method"], row["seed"]): row["max_vio"] for row in of_runs}
least = min(by_seed["z 0.001", n] / by_seed["no remedy", n] for n in range(5))
claim("MaxVio, z over no remedy, least of five seeds", least, (2.0, 5.0))

# %% [markdown]
# Less even, with every seed: MaxVio is more than three times that of no remedy, and close to the worst case. The next
# section finds out why. For the others:
#
# - The weight of the loss sets the balance almost freely. Only importance and load, whose router adds noise, have a
#   price that five seeds can resolve: 0.034 nats. DeepSeekMoE and the paper of the bias warn of large weights in large
#   models; at our size we do not see it.
# - The bias ends as even as the expert-level loss at 0.01.
# - Switch counts first choices only. With six choices per token it ends more than twice as uneven as DeepSeekMoE's
#   count at the same weight.
#
# ## Why does z make it worse?
#
# {eq}`eq:z-loss` is 0 only if the logits are near $-\ln E$, here $-4.2$; it pushes all of them down. Our router has no
# constant term, so it can lower all logits in one way only: by turning all vectors $\mathbf e_i$ against what the
# tokens have in common. Does that do the damage? **One experiment**: train the design for 60 steps without z, with z,
# and with $(\log \sum_i e^{h_{i,t}} - \ln E)^2$, which also limits the size of the logits but does not push them down.
#
# **Ask.** If the push is the reason, which routers come near collapse?

# %% tags=["trained", "hide-input"]
lab.ask("06-why", "with z only", "with either z", "with neither")
narrow = preset("course-devices").moe
ln_E = math.log(narrow.n_routed_experts)
z_steps = lab.choose(smoke=10, cpu=60, gpu=60)


def train_with_size(target):
    """Train with (log-sum-exp of the logits - target)^2, weight 0.001; return what became of the routers."""
    torch.manual_seed(seed)
    config = replace(preset("course-dense"), vocab_size=V, moe=narrow)
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = Batches(world, tokenizer, batch_size=16, seq_len=64)
    for _ in range(z_steps):
        tokens = next(batches).tokens
        out = model(tokens[:, :-1])
        loss = F.cross_entropy(out.logits.flatten(0, 1), tokens[:, 1:].flatten())
        if target is not None:
            sizes = [routing.logits.logsumexp(dim=1) for routing in out.routings]
            loss = loss + 0.001 * sum((s - target).square().mean() for s in sizes)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        routings = model.eval()(held_out[0].tokens[:, :-1]).routings
    found = []
    for routing, layer in zip(routings, model.moe_layers, strict=True):
        e = F.normalize(layer.router.weight.detach(), dim=1)
        own = routing.logits - routing.logits.mean(dim=1, keepdim=True)
        found.append(
            {
                "MaxVio": max_vio(routing),
                "mean logit": routing.logits.mean().item(),
                "cosine of two experts' vectors": ((e @ e.T).sum() - len(e)).item()
                / (len(e) * (len(e) - 1)),
                "spread of logits between experts": own.mean(dim=0).std().item(),
                "spread of one expert's logit": (own - own.mean(dim=0)).std().item(),
            }
        )
    return {what: mean(one[what] for one in found) for what in found[0]}


became = {
    name: train_with_size(target)
    for name, target in (("without", None), ("z", 0.0), ("z from ln E", ln_E))
}
near = [
    name
    for name in ("z", "z from ln E")
    if became[name]["MaxVio"] > 1.5 * became["without"]["MaxVio"]
]
lab.answer(
    "06-why", {1: "with z only", 2: "with either z", 0: "with neither"}[len(near)]
)
print(f"{'mean of both layers':36}" + "".join(f"{name:>13}" for name in became))
for what in became["z"]:
    print(f"{what:36}" + "".join(f"{one[what]:13.2f}" for one in became.values()))

# %% tags=["trained", "hide-cell"]
gap = became["z"]["MaxVio"] - became["without"]["MaxVio"]
interval = {"smoke": (-9.0, 9.0), "cpu": (1.5, 6.0), "gpu": (1.5, 6.0)}[profile]
claim("MaxVio, z minus without", gap, interval, asserted=lab.own)
gap = became["z from ln E"]["MaxVio"] - became["without"]["MaxVio"]
interval = {"smoke": (-9.0, 9.0), "cpu": (-2.5, 1.5), "gpu": (-2.5, 1.5)}[profile]
claim("MaxVio, z from ln E minus without", gap, interval, asserted=lab.own)

# %% [markdown]
# Only the router with z comes near it: MaxVio is nearly 8, and the worst case 9.7. Its logits have come down, and the
# experts' vectors now point nearly the same way (cosine 0.8). What is left of their differences is mostly the *same
# for all tokens*: logits vary more between experts than one expert's logit varies between tokens, so the same experts
# win everywhere. With the target $\ln E$, z did no harm in this run. (One seed; and ST-MoE uses z beside a balance
# loss, never alone.)
#
# ## What the papers chose

# %% tags=["hide-input"]
from IPython.display import Markdown

from dsmoe_lite.study import published

paper = published.load()
lines = ["| design | weight of each loss | speed of the bias |", "|---|---|---|"]
for entry in paper["balance"]:
    weights = ", ".join(
        f"{loss} {weight:g}" for loss, weight in entry["weights"].items()
    )
    lines.append(f"| {entry['design']} | {weights} | {entry.get('bias_speed', '')} |")
Markdown("\n".join(lines))

# %% [markdown]
# V3's loss has a hundredth of Switch's weight. V3's own comparison (Section 4.5.2) favours the bias: 0.724 against
# 0.727 bits per byte in a model of 15.7B weights, 0.652 against 0.656 in one of 228.7B. V3 still keeps a tiny
# sequence-wise loss beside it, because the bias counts the whole batch. (V2's other two losses are about devices:
# chapter 11.)
#
# ## When the bias leaks
#
# {eq}`eq:bias` adds $b_i$ when experts are ranked, and takes the gate from $s$ alone. Code in the wild gathers the
# gates from the sum $s + b$ instead. No error is raised. **Build** that router:


# %%
class LeakyRouter(Router):
    def forward(self, x, batch_shape, token_ids=None):
        routing = super().forward(x, batch_shape, token_ids)
        leaky = (routing.scores + self.expert_bias).gather(1, routing.topk_ids)
        return replace(routing, gates=leaky)


# %% [markdown]
# If a few experts are overloaded and many are not, more biases go up than down, and all drift together. A bias that is the
# same for all experts changes no choice, and should change nothing.
#
# **Ask.** Take the model trained with the bias and raise all of its biases by 1. By how much does the loss rise if they leak into the gates?
# (In nats; it was 1.6.)

# %% tags=["trained", "hide-input"]
import copy

lab.ask("06-leak", low=0, high=10)


def with_leak(model, shift, leak):
    changed = copy.deepcopy(model).cpu()
    for layer in changed.moe_layers:
        if leak:
            router = LeakyRouter(model.config.d_model, with_bias, vocab_size=V)
            router.load_state_dict(layer.router.state_dict())
            layer.router = router
        layer.router.expert_bias += shift
    return heldout_loss(changed, held_out, world.domains).loss


base = with_leak(models["bias"], 0.0, leak=False)
shifted = with_leak(models["bias"], 1.0, leak=False) - base
leaked = with_leak(models["bias"], 0.0, leak=True) - base
leaked_more = with_leak(models["bias"], 1.0, leak=True) - base
lab.answer("06-leak", round(leaked_more, 2), within=0.5)
print(f"right router, every bias 1 higher: {shifted:+.3f}")
print(f"leaky router, as trained:          {leaked:+.3f}")
print(f"leaky router, every bias 1 higher: {leaked_more:+.3f}")

# %% tags=["trained", "hide-cell"]
claim("right router, every bias 1 higher: loss moves by", shifted, (-0.001, 0.001))
interval = {"smoke": (-0.15, 0.1), "cpu": (-0.02, 0.05), "gpu": (-1.0, 20.0)}[profile]
claim("leaky router as trained: loss moves by", leaked, interval, asserted=lab.own)
interval = {"smoke": (0.0, 4.0), "cpu": (0.4, 1.6), "gpu": (-1.0, 20.0)}[profile]
claim(
    "leaky router, every bias 1 higher: loss moves by",
    leaked_more,
    interval,
    asserted=lab.own,
)

# %% [markdown]
# By 0.9 nats, for a change that should do nothing. After a short training with small steps the biases are small and so
# is the harm, which is why the bug goes unnoticed. It grows as the biases drift. (`bias-leak` in
# `data/published.json`.)
#
# ## Let the experts choose
#
# Why not turn the choice around? In *expert choice* {cite:p}`ExpertChoice2022` each expert takes the tokens with the highest
# affinity to it, as many as are its fair share:
#
# $$
# \mathcal C_i = \text{the } \tfrac{KT}{E} \text{ tokens with the largest } s_{i,t}, \qquad
# g_{i,t} = s_{i,t} \ \text{ for } t \in \mathcal C_i
# $$ (eq:expert-choice)
#
# MaxVio is 0 by construction, with no loss and no bias.
#
# **Ask.** Replace the *last* token of a text. Can that change the experts of an earlier one?

# %% tags=["hide-input"]
lab.ask("06-future", "yes", "no")


def taken(scores, K):  # (T, E) -> which expert has which token, (T, E)
    slots = len(scores) * K // scores.shape[1]
    best = scores.topk(slots, dim=0).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(0, best, True)


chooser = Router(
    32,
    MoEConfig(n_routed_experts=16, top_k=2, expert_width=8, chooser="expert"),
    vocab_size=1,
)
theirs = chooser(x, (6, 20))
mine = taken(theirs.scores, 2)
assert all(
    set(row.nonzero()[:, 0].tolist()) == set(ids.tolist()) - {-1}
    for row, ids in zip(mine, theirs.topk_ids, strict=True)
)
later = x.clone()
later[-1] = -later[-1]
moved = taken(chooser(later, (6, 20)).scores, 2)
changed = int((moved != mine)[:-1].any(dim=1).sum())
lab.answer("06-future", "yes" if changed else "no", f"{changed} of 119 tokens")
number = mine.sum(dim=1)
print(
    f"{changed} earlier tokens get other experts; {(number == 0).sum()} of {len(mine)} get none at all"
)

# %% [markdown]
# Yes. An expert compares all tokens of the batch, so what happens to a token depends on tokens that come after it. In training the
# future leaks into the past; at inference, where tokens come one by one, there is nothing to compare with. And a token may
# get no expert at all. Models that predict the next token let the tokens choose.
#
# ## Exercises
#
# **1. A bug from the wild** (5 minutes). In a widely used library one family of models has a dense FFN in some layers and experts in every
# `sparse_step`-th. If all layers have experts, `sparse_step` is 1, and the model trains without any balance loss; nothing
# says so. Fix the total: `routings` has a Routing for each layer of experts, and none if `sparse_step` is 0.


# %%
def total_loss(text_loss, routings, sparse_step, alpha):  # as it was: do not use
    if sparse_step > 1:
        return text_loss + alpha * mean(float(balance.switch_loss(r)) for r in routings)
    return text_loss


def mended_total(text_loss, routings, sparse_step, alpha):
    return None  # the text's loss plus alpha times the mean balance loss


# %% tags=["hide-input"]
import random


def adds_the_balance_loss(mended_total):
    layer = Router(32, MoEConfig(n_routed_experts=16, top_k=2, expert_width=8), 1)
    torch.manual_seed(0)
    routings = [layer(torch.randn(64, 32), (1, 64)) for _ in range(3)]
    worth = [float(balance.switch_loss(r)) for r in routings]
    draw = random.Random(0)
    for step, n in ((1, 3), (2, 2), (0, 0), (4, 1)) * 8:
        text, alpha = draw.uniform(1, 3), draw.uniform(0.01, 0.3)
        right = text + alpha * (sum(worth[:n]) / n if n else 0.0)
        got = float(mended_total(text, routings[:n], step, alpha))
        assert abs(got - right) < 1e-6, (
            f"sparse_step = {step}, {n} layers of experts: {got - text:.4f} is added to"
            f" the text's loss, too {'much' if got > right else 'little'}"
        )


verdict = check_exercise(mended_total, adds_the_balance_loss)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def mended_total(text_loss, routings, sparse_step, alpha):
#     if not routings:
#         return text_loss
#     return text_loss + alpha * sum(float(balance.switch_loss(r)) for r in routings) / len(routings)
# ```
#
# The case is recorded, with its source, as `hf-switch` in `data/published.json`.
# </details>
#
# **2. The first balance losses** (15 minutes). The sparse layers of 2017 {cite:p}`Shazeer2017` added up each expert's gates over a
# batch and punished their spread, by the squared coefficient of variation:
#
# $$
# \mathcal L_{importance} = \operatorname{CV}\Bigl(\sum_t g_{i,t}\Bigr)^2, \qquad
# \operatorname{CV}(x)^2 = \frac{\operatorname{Var}_i(x_i)}{\operatorname{Mean}_i(x_i)^2}
# $$ (eq:importance)
#
# Equal sums of gates can hide unequal counts, and counts have no gradient. So these layers added noise to the logits,
# $H_{i,t} = h_{i,t} + \sigma_{i,t}\,\epsilon_{i,t}$, with $\epsilon_{i,t}$ standard normal. The *chance* that expert $i$ is chosen if its
# noise is drawn again is smooth; $\Phi$ is the normal distribution function:
#
# $$
# \mathcal L_{load} = \operatorname{CV}\Bigl(\sum_t \Phi\Bigl(\frac{h_{i,t} - \psi_{i,t}}{\sigma_{i,t}}\Bigr)\Bigr)^2, \qquad
# \psi_{i,t} = \text{the } K\text{-th largest } H_{j,t} \text{ with } j \ne i
# $$ (eq:load-loss)
#
# Write both, from the gates and the numbers of a noisy router.


# %%
def importance(gates, topk_ids, n_experts):  # (T, K), (T, K), E
    return None  # a number


def noisy_load(logits, noisy, noise_scale, K):  # h, H and sigma, each (T, E)
    return None  # a number


# %% tags=["hide-input"]
def noisy_routing(seed):
    torch.manual_seed(seed)
    config = MoEConfig(
        n_routed_experts=16,
        top_k=2 + seed % 3,
        expert_width=8,
        noisy_gating=True,
        norm_topk_prob=True,
    )
    return Router(32, config, vocab_size=1)(torch.randn(120, 32), (6, 20))


def is_importance(importance):
    for seed in range(30):
        made = noisy_routing(seed)
        got = float(importance(made.gates.detach(), made.topk_ids, 16))
        right = float(balance.importance_loss(made))
        assert abs(got - right) < 1e-5, (
            f"batch {seed}, K = {made.topk_ids.shape[1]}: {got:.5f} is too"
            f" {'high' if got > right else 'low'}"
        )


def is_noisy_load(noisy_load):
    for seed in range(30):
        made = noisy_routing(seed)
        given = (made.clean_logits, made.logits, made.noise_scale)
        K = made.topk_ids.shape[1]
        got = float(noisy_load(*(one.detach() for one in given), K))
        right = float(balance.load_loss(made))
        assert abs(got - right) < 1e-4, (
            f"batch {seed}, K = {K}: {got:.5f} is too"
            f" {'high' if got > right else 'low'}"
        )


verdict = check_exercise(importance, is_importance)
verdict = check_exercise(noisy_load, is_noisy_load)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def importance(gates, topk_ids, n_experts):
#     sums = torch.zeros(n_experts).index_add(0, topk_ids.flatten(), gates.flatten())
#     return sums.var(unbiased=False) / sums.mean() ** 2
#
# def noisy_load(logits, noisy, noise_scale, K):
#     chances = []
#     for i in range(logits.shape[1]):
#         others = noisy.clone()
#         others[:, i] = -float("inf")
#         kth = others.sort(dim=1, descending=True).values[:, K - 1]
#         chances.append(torch.special.ndtr((logits[:, i] - kth) / noise_scale[:, i]).sum())
#     chances = torch.stack(chances)
#     return chances.var(unbiased=False) / chances.mean() ** 2
# ```
# </details>
#
# **3. Other parameters** (a few minutes of computing). What does too much balance cost? And a bias in a hurry?
#
# ```
# dsmoe run 06 -p balance_weight=1.0
# dsmoe run 06 -p bias_speed=0.03
# dsmoe run 06 -p method=z
# ```
#
# Compare `max_vio` and `heldout_loss` of each run (`dsmoe run` prints what it reported).
#
# ## Recap

# %% tags=["hide-input"]
lab.score()

# %% [markdown]
# 1. Left alone, a router collapses onto few experts, and the collapse feeds itself. MaxVio measures it: 0 is balance,
#    $E/K-1$ collapse.
# 2. A balance loss multiplies how often by how much. It works only while the router is not yet certain, so use it from
#    the first step.
# 3. A bias on the choice balances without a gradient, as long as it stays out of the gates.
# 4. Every remedy is blind to something: batch losses to uneven sequences, z to balance altogether.
# 5. In our runs the expert-level loss and the bias have no price that five seeds can resolve. Even experts do not
#    guarantee even devices: see chapter 11.
#
# All parts of DeepSeekMoE are built. Do the paper's claims about them hold in models that a laptop can train? **Chapter 07** tests
# nineteen of them.
