# %% [markdown]
# # Expert ablation: what is an expert worth?
#
# The authors of DeepSeekMoE (arXiv:2401.06066, Section 4.5) removed the shared expert from a trained model and let
# every token use one more routed expert instead. The loss rose from 1.808 to 2.414. Such an experiment is an
# *ablation*: remove a part, and measure how much it is missed.
#
# **What is an expert worth, and how would you know?** Removing an expert is easy. Reading the result is not. Does
# another expert replace it? With what weight? And how much would the loss have risen without *any other* expert? You
# will remove experts in two ways, measure what each was worth, and build a control to compare with. At the end you
# will mask the best experts of ten trained models.
#
# Chapters 05, 07 and 08 of the course are the background. Your lab has {{n_experts}} experts; other students have
# other numbers and other rules, so read yours. Run every cell as you go. Each answer is graded alone: **everything
# that an answer needs must be in its cell**, apart from the given code and the parameters.

# %% tags=["parameters"]
n_experts: int = 8  # experts of your layer: 6..16
rounded: str = "up"  # how you round the number of masked experts: up | down
gate_norm: str = "own"  # gates of your layer: own | divided | fixed
replacement: str = "nobody"  # who replaces a silenced expert: nobody | next
mean_over: str = "all"  # tokens that count for an expert's worth: all | users
controls: str = "any"  # sets that your control silences: any | others
seed: int = 0  # of your layer: 0..999999
profile: str = "cpu"  # size of the experiment at the end: smoke | cpu

# %% tags=["given"]
import math

import torch


def made_up_layer(seed, n_tokens=200, n_experts=n_experts, d_model=4):
    """Router scores (T, E), and each expert's output for each token (T, E, D)."""
    random = torch.Generator().manual_seed(seed)
    favour = torch.linspace(1.0, -1.0, n_experts)[
        torch.randperm(n_experts, generator=random)
    ]
    logits = torch.randn(n_tokens, n_experts, generator=random) + favour
    outputs = torch.randn(n_tokens, n_experts, d_model, generator=random)
    return logits.softmax(dim=1), outputs


# %%
from dsmoe_lite.labs import check_exercise

scores, outputs = made_up_layer(seed)
[round(score, 3) for score in scores[0].sort(descending=True).values.tolist()]

# %% [markdown]
# The last line shows the scores of one token, highest first.
#
# **The layer.** For each of $T$ tokens, the router gives each of the $E$ experts a positive score. The token uses the
# $K$ experts with the highest scores. Expert $i$ returns a vector $\mathbf{o}_i$ with $D$ numbers, and the layer adds
# them up, weighted by gates: $\mathbf{y} = \sum_i g_i\,\mathbf{o}_i$ over the experts that the token uses.
#
# **The gates.** Let $s_i$ be the token's score of expert $i$. Three rules are in use:
#
# - `own`: $g_i = s_i$, as in DeepSeekMoE.
# - `divided`: $g_i = s_i / N$, where $N$ is the sum of the scores of the $K$ experts *that the token uses*, as in
#   GShard.
# - `fixed`: $g_i = s_i / N^*$, where $N^*$ is the sum of the token's $K$ highest scores *of all $E$ experts*, removed
#   ones included.
#
# If no expert is removed, `divided` and `fixed` are the same. **Your rule in questions 1 and 2 is {{gate_norm}}.**

# %% [markdown] question="masked"
# ## 1. Mask the best (2 points)
#
# In a second ablation of Section 4.5, each token loses the experts that it scores highest, and uses the $K$ best of
# the rest. The number of masked experts is `share` times $E$, rounded **{{rounded}}**: 2.4 becomes 3 with `up` and 2
# with `down`.
#
# Write `choose_masked(scores, share, top_k)` for scores (T, E) and `top_k` = $K$, for any $E$. It returns a pair: the
# ids of the experts that each token now uses (T, K), best first, and their gates (T, K), in the same order and by
# your rule **{{gate_norm}}**.


# %% tags=["answer"] question="masked"
def choose_masked(scores, share, top_k):
    return None


# %% tags=["check"] question="masked"
def check(choose_masked):
    some = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15], [0.3, 0.05, 0.1, 0.15, 0.4]])
    ids, weights = choose_masked(some.clone(), 0.0, 2)
    assert ids.tolist() == some.topk(2).indices.tolist(), (
        "share 0 masks no expert: each token uses its two best, the best first"
    )
    ids, weights = choose_masked(some.clone(), 0.4, 2)
    assert ids.shape == weights.shape == (2, 2), "two ids and two gates for each token"
    assert not {1, 3} & set(ids[0].tolist()), (
        "0.4 of five experts are two: the first token cannot use experts 1 and 3"
    )
    assert bool((weights[:, 0] > weights[:, 1]).all()), (
        "the expert with the higher score has the larger gate, and comes first"
    )
    total = float(weights[0].sum())
    assert (abs(total - 1) < 1e-4) == (gate_norm == "divided"), (
        "do the gates of the experts in use sum to 1? They do by one of the three rules"
    )


verdict = check_exercise(choose_masked, check)


# %% tags=["solution"] question="masked"
def choose_masked(scores, share, top_k):
    masked = share * scores.shape[1]
    n = math.ceil(masked) if rounded == "up" else math.floor(masked)
    ranked = scores.argsort(dim=1, descending=True)
    ids = ranked[:, n : n + top_k]
    chosen, best = scores.gather(1, ids), scores.gather(1, ranked[:, :top_k])
    sums = {"own": 1, "divided": chosen.sum(1, True), "fixed": best.sum(1, True)}
    return ids, chosen / sums[gate_norm]


# %% tags=["hidden"] question="masked"
def check(answer, reference, random):
    for E, share, K in (
        (n_experts, 0.16, 2),
        (n_experts, 0.33, 3),
        (n_experts, 0.07, 1),
        (7, 0.16, 3),
        (20, 0.13, 2),
    ):
        scores, _ = made_up_layer(random.getrandbits(31), n_tokens=41, n_experts=E)
        ids, weights = answer(scores.clone(), share, K)
        right_ids, right_weights = reference(scores, share, K)
        assert torch.as_tensor(ids).tolist() == right_ids.tolist()
        weights = torch.as_tensor(weights).double()
        assert weights.shape == right_weights.shape
        assert torch.allclose(weights, right_weights.double(), rtol=1e-4, atol=1e-6)


# %% [markdown] question="silenced"
# ## 2. Silence an expert (3 points)
#
# Masking the best asks about ranks. To ask about *one* expert, silence it for all tokens and compute the layer's
# output again. Who replaces it? Your rule is **{{replacement}}**:
#
# - `nobody`: the tokens keep their experts and all their gates, those of the intact layer. A silenced expert adds
#   nothing.
# - `next`: each token uses the $K$ best of the experts that are *not* silenced. Their gates follow your gate rule,
#   **{{gate_norm}}**.
#
# The two ask different things. `nobody` asks what the expert contributed; `next` asks whether others can do its work.
#
# Write `silenced_output(scores, outputs, silenced, top_k)`: scores (T, E), outputs (T, E, D) and a list of silenced
# experts, which may be empty, to the new output of the layer (T, D). Do not change `scores` or `outputs`.


# %% tags=["answer"] question="silenced"
def silenced_output(scores, outputs, silenced, top_k):
    return None


# %% tags=["check"] question="silenced"
def check(silenced_output):
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    outputs = torch.eye(4)[
        None
    ]  # number i of the layer's output is the gate of expert i
    before = scores.clone(), outputs.clone()
    intact = silenced_output(scores, outputs, [], 2)
    assert intact.shape == (1, 4), "a vector of D numbers for each token"
    assert intact[0, 0] > intact[0, 1] > intact[0, 2] == 0, (
        "with an empty list, the layer is intact: the token uses experts 0 and 1"
    )
    unused = silenced_output(scores, outputs, [3], 2)
    assert torch.allclose(intact, unused, atol=1e-6), (
        "the token does not use expert 3: silencing it changes nothing"
    )
    found = silenced_output(scores, outputs, [0], 2)
    unchanged = torch.equal(scores, before[0]), torch.equal(outputs, before[1])
    assert all(unchanged), (
        "the scores and outputs you were given must stay as they were"
    )
    assert found[0, 0] == 0, "expert 0 is silenced and must add nothing"
    assert (found[0, 2] > 0) == (replacement == "next"), (
        "does expert 2 take the place of expert 0? Read your rule again"
    )


verdict = check_exercise(silenced_output, check)


# %% tags=["solution"] question="silenced"
def silenced_output(scores, outputs, silenced, top_k):
    off = torch.zeros_like(scores, dtype=torch.bool)
    off[:, silenced] = True
    best = scores.topk(top_k, dim=1)
    remaining = scores.masked_fill(off, -math.inf)
    ids = best.indices if replacement == "nobody" else remaining.topk(top_k).indices
    weights = scores.gather(1, ids)
    if gate_norm == "divided":
        weights = weights / weights.sum(dim=1, keepdim=True)
    if gate_norm == "fixed":
        weights = weights / best.values.sum(dim=1, keepdim=True)
    gates = torch.zeros_like(scores).scatter(1, ids, weights).masked_fill(off, 0.0)
    return torch.einsum("te,ted->td", gates, outputs)


# %% tags=["hidden"] question="silenced"
def check(answer, reference, random):
    for K, n in ((1, 1), (2, 0), (2, 1), (2, 3), (3, 2), (3, 3)):
        scores, outputs = made_up_layer(random.getrandbits(31), n_tokens=37)
        off = random.sample(range(n_experts), n)
        busiest = int(scores.sum(dim=0).argmax())
        off = off if busiest in off else off[1:] + [busiest] * (n > 0)
        expected = reference(scores, outputs, off, K)
        found = torch.as_tensor(answer(scores.clone(), outputs.clone(), list(off), K))
        assert found.shape == expected.shape
        assert torch.allclose(found.double(), expected.double(), rtol=1e-3, atol=1e-5)


# %% [markdown] question="worth"
# ## 3. Is a busy expert a needed one? (2 points)
#
# Silence each expert in turn, and record the loss of the model at each token. The **worth** of an expert is the mean
# *rise* of the loss without it. Yours is the mean over **{{mean_over}}**: with `all`, over all $T$ tokens; with
# `users`, over the tokens that used the expert when the model was intact. (The loss may change at other tokens, too:
# they look back at those that used it.)
#
# The **load** of an expert is the number of tokens that use it, here not divided by the mean. Do worth and load order
# the experts alike? *Kendall's tau* counts pairs. Of all pairs of different experts, let $a$ be the number of those in
# which the expert with the higher load is worth more, and $b$ the number of all others. Then
#
# $$\tau = \frac{a - b}{a + b}.$$
#
# Write `worth_and_load(intact, without, topk_ids)`. It gets the losses of the intact model (T,), those without each
# expert (E, T), one row per expert, and the ids of the experts that each token of the intact model used (T, K). It
# returns a pair: a list of $E$ worths, and $\tau$. Each expert has at least one token, and no two experts have the
# same load or the same worth.


# %% tags=["answer"] question="worth"
def worth_and_load(intact, without, topk_ids):
    return None


# %% tags=["check"] question="worth"
def check(worth_and_load):
    ids = torch.tensor([[0], [0], [0], [1], [1], [2]])
    intact = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    for rises, limit in (((3.0, 2.0, 1.0), 1), ((-1.0, 2.0, 3.0), -1)):
        without = intact + torch.tensor(rises)[:, None]
        worths, tau = worth_and_load(intact.clone(), without, ids.clone())
        assert len(worths) == 3, "one worth for each expert"
        assert all(abs(a - b) < 1e-4 for a, b in zip(worths, rises, strict=True)), (
            "without an expert, all tokens here lose equally much: that is its worth"
        )
        assert abs(tau - limit) < 1e-4, (
            "if worth and load agree on all pairs, tau has its highest value; "
            "if they disagree on all pairs, its lowest"
        )


verdict = check_exercise(worth_and_load, check)


# %% tags=["solution"] question="worth"
def worth_and_load(intact, without, topk_ids):
    rises, E = (without - intact).double(), len(without)
    used = torch.stack([(topk_ids == i).any(dim=1) for i in range(E)])  # (E, T)
    load = used.sum(dim=1)
    counted = used if mean_over == "users" else torch.ones_like(used)
    worth = (rises * counted).sum(dim=1) / counted.sum(dim=1)
    alike = (worth[:, None] - worth).sign() * (load[:, None] - load).sign()
    return worth.tolist(), float(alike.sum()) / (E * (E - 1))


# %% tags=["hidden"] question="worth"
def check(answer, reference, random):
    def least_gap(values):
        return float(torch.as_tensor(values).double().sort().values.diff().min())

    for K in (1, 2, 3):
        drawn = torch.Generator().manual_seed(random.getrandbits(31))
        load, worths = [0] * n_experts, [0.0] * n_experts
        while min(load) == 0 or least_gap(load) == 0 or least_gap(worths) < 1e-3:
            logits = 0.25 * torch.arange(n_experts)
            noise = torch.rand(250, n_experts, generator=drawn)
            topk_ids = (logits - (-noise.log()).log()).topk(K, dim=1).indices
            load = torch.bincount(topk_ids.flatten(), minlength=n_experts).tolist()
            intact = 3 * torch.rand(250, generator=drawn)
            rises = torch.randn(n_experts, 1, generator=drawn)
            rises = 0.3 * rises + 0.5 * torch.randn(n_experts, 250, generator=drawn)
            without = intact + rises
            worths, tau = reference(intact, without, topk_ids)
        found, found_tau = answer(intact, without, topk_ids)
        assert len(found) == n_experts
        assert all(abs(a - b) < 1e-4 for a, b in zip(found, worths, strict=True))
        assert abs(found_tau - tau) < 1e-4


# %% [markdown] question="control"
# ## 4. The control (3 points)
#
# You silence some experts, and the output of the layer changes a lot. Were these experts special, or would any others
# have done the same? A control silences other sets of the same size. There are few enough to try **all** of them, so
# nothing has to be drawn at random.
#
# Let $\mathbf{c}_{t,i}$ be what expert $i$ contributes to the output of token $t$: its gate times its output, and
# zero if the token does not use it. Silence a set $A$ of experts, with no replacements. The output of token $t$ then
# loses the sum of their contributions. The **damage** is the squared length of this sum, mean over the tokens:
#
# $$\text{damage}(A) = \frac1T \sum_{t=1}^{T} \Bigl\lVert \sum_{i \in A} \mathbf{c}_{t,i} \Bigr\rVert^2 .$$
#
# (The squared length of a vector is the sum of its squared numbers.) The damage of a set is not the sum of the
# damages of its experts: contributions may cancel.
#
# Let $R$ be the set of the $n$ experts that you removed. The sets of your control are **{{controls}}**:
#
# - `any`: every set of $n$ of the $E$ experts, $R$ among them;
# - `others`: every set of $n$ of the $E - n$ experts that are not in $R$.
#
# Write `control(contributions, removed)`: contributions (T, E, D) and the list of the $n$ experts of $R$, to a pair:
# the mean damage of all control sets, and the share of control sets, from 0 to 1, with a damage *at least* as large
# as that of $R$. If the share is small, $R$ was special. (`itertools.combinations` lists sets.)


# %% tags=["answer"] question="control"
def control(contributions, removed):
    return None


# %% tags=["check"] question="control"
def check(control):
    equal = torch.eye(n_experts)[None]  # one token; all experts contribute equally much
    expected, share = control(equal.clone(), [1, 0])
    assert abs(float(share) - 1) < 1e-6, (
        "all sets do the same damage here, so each does at least as much as yours"
    )
    assert abs(float(expected) - 2) < 1e-4, (
        "all sets do the same damage here: then their mean is this damage, too"
    )
    one = equal * (torch.arange(n_experts) == 4)  # only expert 4 contributes
    expected, share = control(one, [4])
    assert float(expected) < 1, (
        "only a set with expert 4 does damage: the mean is small"
    )
    assert float(share) < 0.5, (
        "the removed expert does all the work: few sets can do as much damage"
    )
    opposed = torch.ones(1, n_experts, 1)
    opposed[0, 2] = -1.0
    expected, share = control(opposed, [2, 5])
    assert abs(float(share) - 1) < 1e-6, (
        "experts 2 and 5 cancel each other: no set can do less damage than these two"
    )
    expected, share = control(opposed, [0, 1])
    assert float(share) < 1, (
        "experts 0 and 1 add up, and some sets cancel: not all do as much damage"
    )


verdict = check_exercise(control, check)

# %% tags=["solution"] question="control"
from itertools import combinations


def control(contributions, removed):
    def damage(experts):
        lost = contributions[:, list(experts)].double().sum(dim=1)  # (T, D)
        return float(lost.square().sum(dim=1).mean())

    E, taken = contributions.shape[1], removed if controls == "others" else []
    pool = [i for i in range(E) if i not in taken]
    damages = [damage(experts) for experts in combinations(pool, len(removed))]
    as_bad = sum(one >= damage(removed) for one in damages)
    return sum(damages) / len(damages), as_bad / len(damages)


# %% tags=["hidden"] question="control"
def check(answer, reference, random):
    def damage(contributions, experts):
        return contributions[:, experts].sum(dim=1).square().sum()

    for n in (1, 2, 3, 3):  # whole numbers: damages are exact, in float32, too
        drawn = torch.Generator().manual_seed(random.getrandbits(31))
        size = (32, n_experts, 3)
        contributions = torch.randint(-3, 4, size, generator=drawn).float()
        contributions += torch.randint(-2, 3, (1, n_experts, 3), generator=drawn)
        used = torch.rand(32, n_experts, 1, generator=drawn) < 0.5
        contributions *= used
        groups = torch.combinations(torch.arange(n_experts), n).tolist()
        damages = [int(damage(contributions, group)) for group in groups]
        unique = [
            g for g, d in zip(groups, damages, strict=True) if damages.count(d) == 1
        ]
        unique.sort(key=lambda group: int(damage(contributions, group)))
        for place in (0.3, 0.8):  # less harmful than most, more harmful than most
            removed = unique[int(place * len(unique))]
            random.shuffle(removed)
            expected, share = reference(contributions, removed)
            found = answer(contributions.clone(), list(removed))
            assert abs(float(found[0]) - expected) < 1e-4 * expected
            assert abs(float(found[1]) - share) < 1e-6


# %% [markdown]
# ## See it at work
#
# Now mask the best experts of the trained models of chapter 08, as Figure 4 of the paper does: five runs of GShard
# (each token uses 2 of 16 experts) and five of DeepSeekMoE (1 shared expert and 7 of 63 routed ones, each a quarter
# as wide). Each token loses the best sixteenth of the routed experts, one in GShard and four in DeepSeekMoE; then
# two, three and four sixteenths. The next best replace them. GShard is measured twice: with `divided` gates, as
# trained, and with `fixed` ones. DeepSeekMoE has `own` gates, times 4. The control masks as many experts, drawn at
# random for each token.
#
# Intact, all ten have a loss between 0.84 and 0.91. Before you run the cell, write down three guesses. What is the
# loss of DeepSeekMoE without the best sixteenth of each token's experts? What is it without a random sixteenth? And
# which of GShard's two curves is higher?

# %%
from copy import deepcopy

import altair as alt
import pandas as pd
import torch.nn.functional as F

from dsmoe_lite import load_model
from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.data.batches import heldout_batches
from dsmoe_lite.data.tokenizer import read_tokenizer
from dsmoe_lite.routing.interventions import freeze_gate_norm, mask_top
from dsmoe_lite.training.job import corpus_of
from dsmoe_lite.viz import identity, renderer

renderer.enable()
torch.set_num_threads(1)  # the models are small: more threads only wait for each other

n_runs, n_batches = {"smoke": (1, 1), "cpu": (5, 2)}[profile]
SHARES = [1 / 16, 2 / 16, 3 / 16, 4 / 16]
BEST, RANDOM = "best experts", "random experts"
folder = DATA / "models"
facts = read_metadata(folder / "paper-gshard-seed0.safetensors")
tokenizer = read_tokenizer(facts["tokenizer"])
parts = heldout_batches(corpus_of(facts), tokenizer, 64, 64, n_batches)
tokens = torch.cat([part.tokens for part in parts])


@torch.no_grad()
def loss_of(model):
    logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


def mask_random(model, share):
    """A copy of the model in which random experts of each token are masked."""

    def forbid(scores):  # (T, E) -> which experts a token cannot use
        random = torch.Generator().manual_seed(seed)
        noise = torch.rand(scores.shape, generator=random)
        masked = noise.topk(round(share * scores.shape[1]), dim=1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, masked, True)

    changed = deepcopy(model)
    for layer in changed.moe_layers:
        layer.router.forbidden += (forbid,)
    return changed


rows = []
for run in range(n_runs):
    gshard, deepseekmoe = (
        load_model(folder / f"paper-{name}-seed{run}.safetensors")
        for name in ("gshard", "deepseekmoe")
    )
    for name, model in {
        "GShard, divided": gshard,
        "GShard, fixed": freeze_gate_norm(gshard),
        "DeepSeekMoE": deepseekmoe,
    }.items():
        intact = loss_of(model)
        for masked, mask in {BEST: mask_top, RANDOM: mask_random}.items():
            losses = [intact] + [loss_of(mask(model, share)) for share in SHARES]
            rows += [
                {"model": name, "run": run, "masked": masked, "share": x, "loss": y}
                for x, y in zip([0, *SHARES], losses, strict=True)
            ]
frame = pd.DataFrame(rows)

NAMES = ["GShard, divided", "GShard, fixed", "DeepSeekMoE"]
base = alt.Chart(frame).encode(
    x=alt.X(
        "share", title="share of routed experts masked: best (solid) or random (dashed)"
    ).axis(values=[0, *SHARES], labelExpr="datum.value * 16 + '/16'"),
    y=alt.Y("mean(loss)", title="held-out loss (nats per token)"),
    color=alt.Color("model", legend=None).scale(
        domain=NAMES, range=identity.colors(NAMES)
    ),
    strokeDash=alt.StrokeDash("masked", legend=None).scale(
        domain=[BEST, RANDOM], range=[[1, 0], [5, 4]]
    ),
)
each = base.mark_line(strokeWidth=1, opacity=0.3).encode(detail="run")
average = base.mark_line(strokeWidth=2.5)
at_end = base.mark_text(align="left", dx=6).transform_filter("datum.share == 0.25")
names = at_end.transform_filter(f"datum.masked == '{BEST}'").encode(text="model")
control_name = (
    at_end.transform_filter(f"datum.masked == '{RANDOM}'")
    .transform_calculate(control="'random experts'")
    .encode(text="control:N", color=alt.value("#555555"))
)
(each + average + names + control_name).properties(
    title="How much does a token miss its best experts?",
    description="Held-out loss by the share of experts masked, three models, with a control.",
    width=350,
    height=300,
)

# %%
means = frame.groupby(["model", "masked", "share"], sort=False)["loss"].mean()
means.unstack("share").rename(columns=lambda share: f"{16 * share:.0f}/16").round(2)

# %% [markdown]
# A thin line is one run, a thick line the mean of the runs; the table shows the means. The thin lines show how much
# another seed would change. They do not show what another text or another size would change: all ten models are
# small, and all read the same made-up text.
#
# **Discuss in your group.**
#
# - A random sixteenth is as many experts as the best sixteenth. Why does losing it hurt so little? How many of the
#   experts that a token uses does it contain on average?
# - GShard's two solid curves have the same experts and the same weights. What is different, and which of the two
#   would you compare with DeepSeekMoE?
# - The paper compares DeepSeekMoE with a GShard that has the same loss when intact. There DeepSeekMoE's loss rises
#   faster, and the authors conclude that its experts are less redundant. Do your curves show that order? And which
#   measurement would tell an expert that matters from an expert that is hard to replace? (Remember `nobody` and
#   `next`; chapter 07 makes this comparison.)
