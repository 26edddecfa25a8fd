# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The paper's experiments
#
# ![The models that the paper compares, as blocks: one standard FFN; sixteen, of which a token uses one; sixteen, of which it uses two; the same sixteen cut into quarters, of which it uses eight.](images/paper_experiments.svg)
#
# The DeepSeekMoE paper {cite:p}`DeepSeekMoE2024` claims that finer and shared experts beat GShard at equal size and equal work. **Does that hold in models that a laptop can train?**
# Partly. We tested 19 of its claims with 16 models and ten seeds each, by a [protocol](07_protocol.md) written before the runs. Fourteen hold, and seven of these also
# after a correction for testing 19 of them. The main claim, a lead over GShard, depends on a detail: how a token's two gates are scaled.
#
# **You will** turn ten runs into a verdict by hand, see all 19 verdicts in one picture, find the detail that decides four of them, train one
# more seed yourself, and put the clock beside the loss.
#
# **You need** chapters 02 to 05. **Reading time** 24 minutes. **Hardware** any laptop CPU.

# %% tags=["parameters"]
profile: str = "cpu"  # size of the run: smoke | cpu | gpu
seed: int = 150  # of your run; 0 to 9 are recorded: 0..2147483647
live: str = "deepseekmoe"  # the model that you train: dense | gshard | deepseekmoe
live_steps: int = 240  # of 1200; smoke makes 60 of it: 60..1200

# %% tags=["hide-input"]
try:
    from dsmoe_lite.labs import begin, check_exercise, claim, report
except ModuleNotFoundError:
    raise SystemExit("dsmoe_lite is missing: run make setup, then make lab") from None

import torch

from dsmoe_lite.viz import charts

lab = begin(globals(), "statsmodels", "scipy")

# %% [markdown]
# ## What was asked
#
# The paper's validation experiments compare models of equal cost. The paper counts in **standard FFNs**: one is the FFN of the dense model. Most models store 16 of them,
# however finely they are cut, and use two for a token. Our models have the paper's numbers of experts at a
# fortieth of its width: $D = 32$ channels, two layers, 2.5 million training tokens. Before anything trained, the expert parameters were
# counted and compared with the paper's.

# %%
from dsmoe_lite.study import ledger
from dsmoe_lite.study.grids import grid, records

runs, claims, plan = records("paper"), ledger.load(), grid("paper")
print(f"{len(plan.jobs)} models x {len(plan.seeds)} seeds, {len(runs)} runs recorded")

# %% tags=["hide-input"]
from dsmoe_lite.accounting import parameters
from dsmoe_lite.study.protocol import CPU, MODELS, UNITS

standard = parameters(CPU.dense).ffn.total
print("model        paper, in all        here     standard FFNs: in all, for a token")
for name in MODELS:
    theirs, ours = parameters(MODELS[name]).ffn, parameters(plan.jobs[name].model).ffn
    units = ours.total / standard, ours.active / standard
    assert name not in UNITS or units == UNITS[name], "the protocol's own table"
    print(
        f"{name:12} {theirs.total / 1e6:9,.0f}M {ours.total:12,}"
        f"   {units[0]:10.4g} {units[1]:10.4g}"
    )

# %% [markdown]
# The name *1+3-of-31* means one shared expert and three of 31 routed ones, each half a standard FFN wide. *deepseekmoe* is 1+7 of 63, each a
# quarter wide.
#
# The text is a made-up world: nine documents of ten state facts about 512 people, 4,096 facts in all; the rest are sums, brackets and code. The models must store facts, which
# is where the paper expects experts to help. That makes it a friendly test, and a narrow one.
#
# Our experiment departs from the paper's in these ways:
#
# | | paper | here |
# |---|---|---|
# | text | 100 billion tokens | 2.5 million tokens about a made-up world |
# | models | nine layers, $D = 1280$ | two layers, $D = 32$; experts 8 to 32 channels wide |
# | gates of GShard | printed undivided (Equations 3 to 5) | divided by their sum, as in GShard's own paper |
# | gates of DeepSeekMoE | softmax scores (Equation 10) | softmax scores times $m$ |
# | balance factor | 0.01 | 0.001 |
# | initial weights | standard deviation 0.006 | 0.02 |
# | learning rate | two steps down | cosine decay; one rate per family, from a pilot |
# | seeds | one run per model | ten |
# | measure | loss on the Pile, and benchmarks | held-out loss, recall of facts |
#
# The factor $m$, the number of pieces of a standard FFN, is our departure (chapter 04). DeepSeekMoE as printed, without the factor, lost to GShard in the
# pilot: 0.886 against 0.867, mean of three seeds. So the protocol gave DeepSeekMoE the factor, and GShard the gates that did best for it.
#
# ## One verdict, worked
#
# Take the main claim: DeepSeekMoE has a lower loss than GShard. Each of ten seeds draws the first weights of both models and sets where
# in the text both begin to read. Here are the ten differences.

# %%
from statistics import mean, stdev

from dsmoe_lite.study.rows import gaps

lead = list(gaps(runs, "deepseekmoe", "gshard", "held-out loss").values())
print(" ".join(f"{d:+.3f}" for d in lead))
print(f"mean {mean(lead):+.4f}, standard deviation {stdev(lead):.4f}")

# %% [markdown]
# **Ask.** The mean favours DeepSeekMoE, but single seeds differ by as much as the mean itself. Is the lead real: is 0
# outside the 95% interval of the mean?
#
# For $n$ differences $d_i$ with mean $\bar d$ and standard deviation $s$, the interval is Student's, and the effect size $d_z$ counts how many standard
# deviations the mean is from 0:
#
# $$
# \bar d \pm t_{0.975,\, n-1} \, \frac{s}{\sqrt n}, \qquad d_z = \frac{\bar d}{s}
# $$ (eq:paired-interval)
#
# where $t_{0.975,\, n-1}$ is the point that Student's $t$ with $n - 1$ degrees of freedom exceeds in 2.5% of cases.
#
# One test at the 5% level finds an effect that is not there in one case of twenty. Six tests give chance six tries. Holm's correction makes up for that: of
# $k$ sorted p-values $p_{(1)} \le p_{(2)} \le \dots$ the smallest is multiplied by $k$, the next by $k - 1$, and so on, and none may become smaller
# than the one before {cite:p}`Holm1979`:
#
# $$
# \tilde p_{(j)} = \max_{i \le j} \, \min\bigl(1, (k - i + 1) \, p_{(i)}\bigr)
# $$ (eq:holm)
#
# **Build** both, and **prove** them equal to the package's, which takes them from statsmodels.


# %%
import math

from scipy.stats import t as student
from torch.testing import assert_close

from dsmoe_lite.common.stats import holm, p_value, paired

lab.ask("07-interval", "yes", "no")


def interval(differences):
    n, middle = len(differences), mean(differences)
    half = student.ppf(0.975, n - 1) * stdev(differences) / math.sqrt(n)
    return middle - half, middle + half


def corrected(p_values):
    k, least, found = len(p_values), 0.0, {}
    for j, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (k - j) * p))
        found[name] = least
    return found


package = paired(lead)
assert_close(interval(lead), (package.low, package.high))
print(f"{package.low:+.4f} to {package.high:+.4f}, d_z = {package.effect:+.2f}")
lab.answer("07-interval", "yes" if package.high < 0 else "no")

planned = [c for c in claims if c.trend and c.trend.grid == "paper"]
planned = [c for c in planned if not c.trend.after_runs]
p_values = {}
for one in planned:
    its = list(ledger.differences(one.trend, runs).values())
    p_values[one.id] = p_value(its, one.trend.expected, one.trend.margin)
table_1 = [one.id for one in planned if one.trend.figure == "moe-table-1"]
for family in (table_1, list(p_values)):
    those = {id: p_values[id] for id in family}
    assert corrected(those) == holm(those)
    print(
        f"p = {p_values['moe-beats-gshard']:.4f};",
        f"corrected over {len(family)} claims {corrected(those)['moe-beats-gshard']:.3f}",
    )

# %% [markdown]
# Yes: the interval excludes 0. The six claims of Table 1 form one family. This claim has the largest p-value of the
# six, so the correction leaves it as it is, and the claim **holds** by the protocol. Corrected over all 19 claims, it
# is no longer significant at 5%.
#
# The other verdicts follow in the same way. A claim **leans** if it is significant only before the correction, is **reversed** if the opposite is
# significant, and is otherwise **inconclusive**, which does not mean "no difference". No number of seeds can prove two models equal. For claims of the kind "as good as" we fixed a
# margin beforehand, 0.012 nats, and test whether the difference is within it. By the pilot's spread, ten seeds find a difference of 0.012
# in four cases of five; the reported seeds vary more, so they find less.
#
# Does it help to compare runs in pairs? Only if a seed that is easy for one model is easy for the other:

# %%
import numpy as np

from dsmoe_lite.study.rows import seed_line

losses = {n: [r["heldout_loss"] for r in runs if r["model_name"] == n] for n in MODELS}
related = np.corrcoef(list(losses.values()))[np.triu_indices(len(losses), 1)]
print(f"correlation over seeds, mean of {len(related)} pairs: {related.mean():+.2f}")

# %% [markdown]
# It is not, so pairing gains nothing here. We keep it because the protocol says so.
#
# How much do verdicts owe to the number of seeds? **Move** the slider: the six claims of Table 1, with the first so many seeds. (The protocol's number is ten; a number
# chosen because it looks good proves nothing.)


# %%
from dataclasses import replace

from dsmoe_lite.common.stats import trend_verdict
from dsmoe_lite.study.rows import effect_row, trend_rows


def judged(ids, few):
    """The claims of one family by some of the records, corrected together."""
    chosen = {id: ledger.by_id(claims, id) for id in ids}
    found = {
        id: list(ledger.differences(one.trend, few).values())
        for id, one in chosen.items()
    }
    tests = {id: (one.trend.expected, one.trend.margin) for id, one in chosen.items()}
    p = {id: p_value(found[id], *tests[id]) for id in chosen}
    return [
        replace(
            one,
            verdict=trend_verdict(
                paired(found[id]), tests[id][0], p[id], holm(p)[id], tests[id][1]
            ),
        )
        for id, one in chosen.items()
    ]


assert [c.verdict for c in judged(table_1, runs)] == [
    c.verdict for c in planned if c.id in table_1
]


rows = []
for n in range(5, 11):
    few = [r for r in runs if r["seed"] < n]
    rows += [r | {"seeds": n} for r in trend_rows(judged(table_1, few), few)]
charts.trend_intervals(
    rows, seeds=10, title="Do the verdicts of Table 1 depend on the number of seeds?"
)

# %% [markdown]
# ## What holds, and what does not
#
# **Ask.** Of the 19 claims, how many hold? (A number.) Each row below is one claim. A dot right of 0 means that we find
# what the paper reports; left of 0, the opposite.

# %% tags=["hide-input"]
lab.ask("07-all", low=0, high=19)
lab.answer("07-all", sum(one.verdict == "holds" for one in planned), within=1)

charts.trend_intervals(
    trend_rows(planned, runs), title="Which of the paper's trends appear?"
)

# %%
from collections import Counter

tally = Counter(one.verdict for one in planned)
print(", ".join(f"{n} {verdict}" for verdict, n in tally.items()))
print(f"holds also if corrected over all: {sum(bool(c.survives) for c in planned)}")
print(f"could hardly have failed: {sum(bool(c.easy) for c in planned)}")

# %% [markdown]
# Fourteen hold, and seven of them survive a correction over all 19: the order of Table 1 except its last step, and the
# leads over the two larger dense models. Mixtures of experts beat dense models here; that is beyond doubt.
#
# Five of the fourteen could hardly have failed. DeepSeekMoE's leads over Switch and over hash routing follow in direction from other claims. Four active experts of seven keep nearly all of
# the gate. Any expert that is used at all is "irreplaceable" if the test is against zero. And the dense model of 16 standard FFNs, the paper's upper bound, is none here: ten models have a
# lower mean loss. It may need more steps.
#
# Four are inconclusive, but not all in the same way. Four shared experts are worse than one (+0.017 ± 0.009); the claim asked whether by more than the margin. Half as many active experts
# gain at most 0.001 nats over GShard.
#
# Figures 3 and 6 of the paper plot benchmark scores, not losses. Our loss is a proxy. Closer to the paper's closed-book questions is recall: we ask for facts
# in a wording in which training never gave them, about frequent and about rare people.

# %%
from dsmoe_lite.study.rows import metric_rows

SHOWN = {
    "dense": "Dense",
    "hash": "Hash",
    "switch": "Switch",
    "gshard": "GShard",
    "1+3-of-63": "half active",
    "deepseekmoe": "DeepSeekMoE",
}
charts.model_comparison(
    metric_rows(runs, SHOWN),
    title="Do loss and recall agree?",
    subtitle="Ring: one seed. Dot and bar: mean and 95% interval.",
)

# %%
for one, other in (("deepseekmoe", "gshard"), ("1+3-of-63", "gshard")):
    for metric in ("recall, frequent people", "recall, rare people"):
        line = seed_line(gaps(runs, one, other, metric)).partition("   ")[0]
        print(f"{one:11} - {other}: {metric:24} {line}")

# %% [markdown]
# Loss and recall order the models alike, with one exception: hash routing has a lower loss than the dense model and
# recalls far less. In the paper it answers more questions, or as many. All our questions end in the same token, so a
# fixed table sends every answer to one expert. That may be the reason; no run tests it.
#
# Among rare people DeepSeekMoE recalls more than GShard, and a model with half the active experts recalls less. The first agrees with the paper's benchmarks, the second
# does not. Neither was a planned claim.
#
# ## One baseline decides
#
# GShard's own paper divides a token's two softmax scores by their sum {cite:p}`GShard2020`. The DeepSeekMoE paper prints the conventional layer undivided (Section 2, Equations 3 to
# 5) and does not say which of the two its GShard runs used. Our protocol took the divided gates, which did better in the pilot. It also ran *0+2 of 16*, which is GShard
# with undivided gates, without a claim.
#
# **Ask.** Read GShard as the paper prints it. How many of four verdicts change: the lead in Table 1, one shared expert
# (Figure 3), four active experts (Figure 5), half the active experts (Figure 6)?

# %% tags=["hide-input"]
lab.ask("07-gates", low=0, high=4)

AGAINST_GSHARD = {
    "moe-beats-gshard": "DeepSeekMoE",
    "moe-shared-helps": "1+1 of 15",
    "moe-four-active": "Four active",
    "moe-half-active": "Half active",
}
rows = []
for id, name in AGAINST_GSHARD.items():
    trend = ledger.by_id(claims, id).trend
    for other, gates in (("gshard", "divided"), ("0+2-of-16", "undivided")):
        found = list(ledger.differences(replace(trend, other=other), runs).values())
        result, p = paired(found), p_value(found, trend.expected, trend.margin)
        one = replace(
            ledger.by_id(claims, id),
            short=f"{name} against GShard, {gates}",
            verdict=trend_verdict(result, trend.expected, p, p, trend.margin),
        )
        rows.append(effect_row(one, found))
changed = sum(
    one["verdict"] != other["verdict"]
    for one, other in zip(rows[::2], rows[1::2], strict=True)
)
lab.answer("07-gates", changed)
charts.trend_intervals(
    rows,
    title="Which verdicts depend on GShard's gates?",
    subtitle="Right: better than GShard. Verdicts without any correction: exploration.",
)

# %% tags=["hide-input"]
for row in rows:
    half = (row["high"] - row["low"]) / 2
    where = f"{row['place']}, {row['label']}"
    print(f"{where:48} {row['mean']:+.3f} ± {half:.3f}  {row['verdict']}")
apart = seed_line(gaps(runs, "0+2-of-16", "gshard", "held-out loss"))
print(f"undivided minus divided: {apart.partition('   ')[0]}")

# %% [markdown]
# All four. With undivided gates the lead in Table 1 and Figure 5 are not shown, one shared expert is *worse* than none,
# and half the active experts are clearly worse than GShard. Yet the two GShards do not differ beyond their seeds, and
# undivided gates are, if anything, the better ones. In the pilot divided gates led by 0.042 on three seeds; that did
# not replicate.
#
# So the honest reading of the main claim is this. At this size DeepSeekMoE's lead over GShard is small, and it is not shown against the baseline that the paper
# prints.
#
# ## Whose experts are redundant?
#
# Figure 4 of the paper disables each token's best experts; the next best of its ranking step in. DeepSeekMoE's loss rises more
# than that of GShard x1.5, which starts from the same loss. The paper concludes that DeepSeekMoE's experts are less redundant.
#
# The planned claim came out *reversed*: GShard x1.5 loses more, by 1.6 nats. But a rise alone cannot tell an important expert from an
# irreplaceable one. It takes two: the rise if replacements step in, and the rise if **nobody** does. What the replacements take
# back is their **gain**, and that is redundancy. So, after the planned runs, we trained GShard, GShard x1.5 and
# DeepSeekMoE again with ten seeds, each with both kinds of gates, and measured both. This is exploration.
#
# **Ask.** If GShard x1.5 loses each token's best expert and nobody steps in, its loss rises by 1.56. What is the rise if the next best expert
# steps in? (Its gates are divided by their sum.)

# %% tags=["hide-input"]
lab.ask("07-replaced", "lower", "about the same", "higher")
again = records("paper-figure-4")
GATES = {
    "gshard": "GShard, divided",
    "gshard-x1.5": "x1.5, divided",
    "gshard-softmax": "GShard, undivided",
    "gshard-x1.5-softmax": "x1.5, undivided",
    "deepseekmoe-printed": "DeepSeekMoE, printed",
    "deepseekmoe": "DeepSeekMoE, times m",
}


def without_best_sixteenth(record):
    """The rises with replacements and with nobody, and their difference, the gain."""
    n = round(record["model"]["moe"]["n_routed_experts"] / 16)  # one of 16, four of 63
    replaced = record["masked"][str(1 / 16)]["heldout_loss"] - record["heldout_loss"]
    nobody = record["silenced"][str(n)]["heldout_loss"] - record["heldout_loss"]
    return {"replaced": replaced, "nobody": nobody, "gain": nobody - replaced}


found = {(r["model_name"], r["seed"]): without_best_sixteenth(r) for r in again}
means = {
    (name, what): mean(found[name, one][what] for one in range(10))
    for name in GATES
    for what in ("replaced", "nobody", "gain")
}
lab.answer(
    "07-replaced", "higher", f"{means['gshard-x1.5', 'replaced']:.2f}, for they do harm"
)
charts.model_comparison(
    [
        {"model": GATES[name], "seed": one, "metric": shown, "value": values[what]}
        for what, shown in (
            ("replaced", "rise, replaced (nats)"),
            ("nobody", "rise, nobody steps in"),
            ("gain", "gain of replacements"),
        )
        for name in GATES
        for (model, one), values in found.items()
        if model == name
    ],
    title="Without each token's best sixteenth of the experts",
    subtitle="Ring: one of ten seeds. Dot and bar: mean and its 95% interval.",
)

# %% tags=["hide-input"]
for other in ("gshard-x1.5", "gshard-x1.5-softmax"):
    line = {}
    for what in ("replaced", "nobody", "gain"):
        apart = {
            one: found["deepseekmoe", one][what] - found[other, one][what]
            for one in range(10)
        }
        line[what] = seed_line(apart).partition("   ")[0]
    print(f"DeepSeekMoE, times m, minus GShard {GATES[other]}")
    for what, words in line.items():
        print(f"  {what:9} {words}")

# %% tags=["hide-cell"]
planned_rise = ledger.by_id(claims, "moe-masked-hurts-more")
print(planned_rise.ours)
for name in GATES:
    print(
        f"{name:20}",
        {what: round(means[name, what], 3) for what in ("replaced", "nobody", "gain")},
    )

# %% [markdown]
# Higher: GShard's replacements do *harm*. Divided gates give them all the weight that the best expert had, whatever
# they know. So the planned comparison mostly measured how heavily the gate weighs the replacements.
#
# With undivided gates the paper's order appears: DeepSeekMoE loses more, by 0.37 ± 0.30. But it loses as much more if nobody steps in.
# Its best sixteenth *carries* more; it is not harder to replace. The gain is 0.02 to 0.04 nats in GShard and DeepSeekMoE alike, of
# a rise of more than 1. **By this measure none of these models has redundant experts, and they do not differ in it.** The two
# models do not start from the same loss here, as the paper wanted, so even the first order is uncertain.
#
# ## What does the shared expert do?
#
# The paper disables the shared expert of the trained model, lets one more routed expert work in its place, and sees the loss rise
# from 1.808 to 2.414.
#
# **Ask.** Here too the loss rises if the shared expert is swapped. Does it rise more than if the best *routed* expert of each token
# is replaced?

# %% tags=["hide-input"]
lab.ask("07-swap", "more", "about as much", "less")
E = plan.jobs["deepseekmoe"].model.moe.n_routed_experts
ours = [r for r in again if r["model_name"] == "deepseekmoe"]
swap = {
    r["seed"]: r["shared_swapped"]["heldout_loss"] - r["heldout_loss"] for r in ours
}
best = {
    r["seed"]: r["masked"][str(1 / E)]["heldout_loss"] - r["heldout_loss"] for r in ours
}
lab.answer("07-swap", "less", "far less")
for what, rises in (
    ("shared expert swapped", swap),
    ("best routed expert replaced", best),
):
    print(f"{what:28} {seed_line(rises).partition('   ')[0]}")

# %% tags=["hide-input"]
print("shared experts swapped, other models")
for name in plan.jobs:
    rises = {
        r["seed"]: r["shared_swapped"]["heldout_loss"] - r["heldout_loss"]
        for r in runs
        if r["model_name"] == name and "shared_swapped" in r
    }
    if rises:
        print(f"  {name:12} {seed_line(rises).partition('   ')[0]}")
print("steps from GShard with undivided gates to DeepSeekMoE")
for what, one, other in (
    ("cut in 4, none shared", "0+8-of-64", "0+2-of-16"),
    ("then 1 of 64 shared", "deepseekmoe", "0+8-of-64"),
):
    line = seed_line(gaps(runs, one, other, "held-out loss")).partition("   ")[0]
    print(f"  {what:22} {line}")

# %% [markdown]
# Far less: 0.015 nats against 1.03. The swap is above zero with every seed, and so the claim holds; but the routed
# expert that a token likes best is missed seventy times as much. Where the shared expert is half of what a token meets
# (*1+1 of 15*, *4+4 of 60*), its removal costs more. (The first two numbers are of the new runs, made on another
# processor; the planned runs of the same model gave 0.020 ± 0.014.) The last two lines agree: cutting helps, barely,
# and sharing one of 64 experts adds nothing that ten seeds can resolve.
#
# ## Is it the text?
#
# Why so little? A shared expert should hold what every token needs beside its own facts, and this templated text has little of
# that. So a [third protocol](07_common_protocol.md) makes a text in which all facts obey **one rule**: an ending that depends
# on the hour and the place, and is the same for all people. In the control there is no such rule. (A [second
# one](07_text_protocol.md), on real text, still waits for its runs.)
#
# **Ask.** Is the mean loss with one of 64 experts shared below that with none, above it, or can ten seeds not tell?

# %% tags=["hide-input"]
lab.ask("07-common", "below", "above", "ten seeds cannot tell")
third = records("common")
COMMON = {
    "rule-0+8-of-64-m": "rule, none shared",
    "rule-1+7-of-63-m": "rule, one shared",
    "control-0+8-of-64-m": "control, none shared",
    "control-1+7-of-63-m": "control, one shared",
}
lab.answer(
    "07-common",
    {"holds": "below", "reversed": "above"}.get(
        ledger.by_id(claims, "common-sharing").verdict, "ten seeds cannot tell"
    ),
)
charts.model_comparison(
    [
        {
            "model": shown,
            "metric": "held-out loss",
            "seed": r["seed"],
            "value": r["heldout_loss"],
        }
        for name, shown in COMMON.items()
        for r in third
        if r["model_name"] == name
    ],
    title="Does a shared expert learn a common rule?",
)

# %% tags=["hide-input"]
from dsmoe_lite.common.stats import seeds_needed

for one in claims:
    if one.trend and one.trend.grid == "common":
        found = list(ledger.differences(one.trend, third).values())
        row = effect_row(one, found)
        half = (row["high"] - row["low"]) / 2
        print(f"{row['label']:40} {row['mean']:+.3f} ± {half:.3f}  {one.verdict}")
wide = list(
    ledger.differences(
        ledger.by_id(claims, "common-rule-widens-lead").trend, third
    ).values()
)
spread, planned_for = stdev(wide), 0.0175  # the latter by the protocol
print(f"spread over seeds: {spread / planned_for:.0f} times what was planned for")
print(f"seeds to find 0.03 with it: {seeds_needed(spread, 0.03)}, not 10")

# %% [markdown]
# Ten seeds cannot tell. The single runs show why: with the rule they fall into two groups, one near 2.8 and one near
# 2.5. Most likely the second group found the rule and the first did not, before training ended; we did not test that.
# The pilot's single seed showed a lead of 0.1; over ten seeds none is left. So this text does not decide the question.
# That would take longer training, until every run finds the rule, or far more seeds. And one planned claim is
# *reversed*: swapping the shared expert for one more routed one costs less than replacing each token's best routed
# expert, here too.
#
# ## One more seed
#
# Now train one yourself. It takes the first steps of a full run, with the full run's learning rates, so its curve can be compared with the
# recorded ones: other first weights, another part of the text.
#
# **Ask.** Over its last 20 steps, will its loss be between the lowest and the highest of the recorded seeds?

# %%
from dsmoe_lite.training.job import first_steps

lab.ask("07-live", "inside", "outside")

steps = 60 if profile == "smoke" else live_steps
WINDOW = 20  # steps that are averaged


def smoothed(losses):
    return [
        mean(losses[end - WINDOW : end])
        for end in range(WINDOW, len(losses) + 1, WINDOW)
    ]


job = plan.job(live, seed % plan.n_streams)  # where it begins to read
job = replace(job, train=replace(job.train, seed=seed))
begun = first_steps(replace(job, device="cuda" if profile == "gpu" else "cpu"), steps)
recorded = {
    r["seed"]: smoothed(r["losses"][:steps]) for r in runs if r["model_name"] == live
}
middle = [mean(losses) for losses in zip(*recorded.values(), strict=True)]
mine = smoothed(begun.losses)

# %% tags=["trained"]
curves = [(f"{len(recorded)} recorded", one, curve) for one, curve in recorded.items()]
curves.append((f"seed {seed}, yours", seed, mine))
rows = [
    {"model": model, "seed": one, "step": (i + 1) * WINDOW, "loss": loss - middle[i]}
    for model, one, curve in curves
    for i, loss in enumerate(curve)
]
charts.training_curves(
    rows,
    y_title="training loss less the recorded mean",
    title="Does a fresh seed fall into the band?",
    subtitle="Band: lowest to highest recorded seed, each point the mean of 20 steps.",
)

# %% tags=["trained"]
lowest, highest = (f(curve[-1] for curve in recorded.values()) for f in (min, max))
print(f"steps {steps - WINDOW + 1} to {steps}, recorded: {lowest:.3f} to {highest:.3f}")
off = mine[-1] - middle[-1]
limit = round(6 * stdev(curve[-1] for curve in recorded.values()), 2)
claim("yours minus the recorded mean", off, (-limit, limit), asserted=lab.own)
report(loss={"yours": mine[-1]})

# %% tags=["measured", "hide-input"]
where = "inside" if lowest <= mine[-1] <= highest else "outside"
print(where, "the band at its end")
lab.answer("07-live", where)

# %% [markdown]
# A band of $n$ seeds is not a bound. At any one point a fresh seed is outside it with probability $2/(n+1)$, here 18%: it is
# as likely as any of the others to be the lowest, or the highest, of all $n + 1$.
#
# ## The clock
#
# The comparisons above hold parameters equal, stored and used. Neither is time.
#
# Time one training step of each model, on one thread, the two models of a pair in turns.
#
# **Ask.** Which is faster, DeepSeekMoE or GShard x1.5, the model that is nearest to it in loss?

# %% tags=["measured", "hide-input"]
from dsmoe_lite import Transformer
from dsmoe_lite.bench.ratios import time_ratio
from dsmoe_lite.bench.train import training_step

lab.ask("07-clock", "DeepSeekMoE", "GShard x1.5")
PAIRS = [
    ("dense-x4", "dense"),
    ("dense-x16", "dense"),
    ("switch", "dense"),
    ("gshard", "dense"),
    ("deepseekmoe", "dense"),
    ("gshard", "dense-x4"),
    ("deepseekmoe", "gshard-x1.5"),
]
rounds = {"smoke": 3, "cpu": 15, "gpu": 50}[profile]
words = runs[0]["vocab_size"]
tokens = torch.randint(0, words, (32, 65), generator=torch.Generator().manual_seed(0))
timed = {
    name: training_step(
        Transformer(replace(plan.jobs[name].model, vocab_size=words)), tokens
    )
    for name in dict.fromkeys(name for pair in PAIRS for name in pair)
}
took = {pair: time_ratio(*(timed[n] for n in pair), rounds).median for pair in PAIRS}
slower = took["deepseekmoe", "gshard-x1.5"] > 1
lab.answer("07-clock", "GShard x1.5" if slower else "DeepSeekMoE")
print("time of a step over the other's; loss less the other's, ± half its 95% interval")
for one, other in PAIRS:
    less = seed_line(gaps(runs, one, other, "held-out loss")).partition("   ")[0]
    print(f"  {one:11} over {other:11} {took[one, other]:.2f}   {less}")

# %% [markdown]
# GShard x1.5: a step of DeepSeekMoE takes longer, for about the same loss; it stores two thirds of the expert weights.
# A step of GShard takes about as long as one of the dense model with four standard FFNs, and after as many steps its
# loss is lower. So here, on a CPU thread, with experts 8 channels wide and this implementation, fine experts cost time
# and save memory. How far kernels can turn the clock is the subject of chapter 10. (Routers are fresh here and the
# balance loss is left out; a trained router gives experts more unequal work.)
#
# ## Exercises
#
# **1. A bug from the wild** (10 minutes). All learnt routers of this chapter train with a balance loss. In one library the routers of several models
# returned probabilities under the name of logits; the balance loss, which expects logits, took the softmax once more. A
# comparison of such models compares the bug. Fix the loss for both: told which of the two it is given, it returns the loss of the router's own
# probabilities.


# %%
def switch_loss(given, are_logits):  # as it was: do not use
    shares = given.softmax(dim=-1)  # (T, E)
    E = shares.shape[1]
    first = torch.bincount(given.argmax(dim=-1), minlength=E) / len(given)
    return E * (first * shares.mean(dim=0)).sum()


def mended_loss(given, are_logits):
    return None  # E * sum of f_i P_i, of (T, E)


def is_the_loss_of_probabilities(mended_loss):
    logits = torch.tensor([[4.0, 0.0, 0.0], [4.0, 1.0, 0.0], [0.0, 0.0, 9.0]])
    shares = logits.softmax(dim=-1)
    P = [float(shares[:, i].mean()) for i in range(3)]
    right = 3 * (P[0] * 2 / 3 + P[2] / 3)
    for given, are_logits in ((logits, True), (shares, False)):
        got = float(mended_loss(given.clone(), are_logits))
        what = "logits" if are_logits else "probabilities"
        assert abs(got - right) < 1e-5, f"given {what}: {right:.4f}, not {got:.4f}"


collapsed = torch.zeros(100, 16)
collapsed[:, 0] = 20.0  # every token to expert 0, all but certainly
print(
    f"all tokens to one of 16 experts, from logits: {switch_loss(collapsed, True):.2f}"
)
probabilities = collapsed.softmax(dim=-1)
print(f"from probabilities: {switch_loss(probabilities, False):.2f}; balanced is 1")
verdict = check_exercise(mended_loss, is_the_loss_of_probabilities)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def mended_loss(given, are_logits):
#     shares = given.softmax(dim=-1) if are_logits else given
#     E = shares.shape[1]
#     first = torch.bincount(given.argmax(dim=-1), minlength=E) / len(given)
#     return E * (first * shares.mean(dim=0)).sum()
# ```
#
# The second softmax makes probabilities nearly equal: a collapsed router looks nearly balanced, and hardly any gradient is left to mend it. The
# case is recorded, with its source, as `double-softmax` in `data/published.json`.
# </details>
#
# **2. A test without the normal distribution** (10 minutes). Student's interval takes the differences to be normal. This test only assumes that
# if two models are alike, either sign of a difference is equally likely. So flip signs in all $2^n$ ways; the p-value is the share of ways in
# which the mean is at least as far from 0 as the one found. Write it.


# %%
def sign_flip_p(differences):
    return None  # a share, in (0, 1]


def counts_all_flips(sign_flip_p):
    for values, right in (
        ([1.0, 2.0, 3.0], 2 / 8),
        ([-1.0, -2.0, -3.0], 2 / 8),
        ([1.0, -2.0, 3.0], 6 / 8),
        ([1.0, 1.0, 1.0, 1.0, 1.0], 2 / 32),
        ([0.5], 1.0),
    ):
        got = float(sign_flip_p(list(values)))
        assert abs(got - right) < 1e-9, f"{values}: {right:g}, not {got:g}"


verdict = check_exercise(sign_flip_p, counts_all_flips)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# from itertools import product
#
# def sign_flip_p(differences):
#     found = abs(sum(differences)) - 1e-12
#     flips = product((1, -1), repeat=len(differences))
#     sums = [abs(sum(f * d for f, d in zip(flip, differences))) for flip in flips]
#     return sum(one >= found for one in sums) / len(sums)
# ```
#
# With five seeds that all agree it is $2/32 = 0.0625$: so five seeds can never reach 5%. Try it on one of the claims above, with
# `gaps(runs, "deepseekmoe", "gshard", "held-out loss").values()`.
# </details>
#
# **3. Other parameters** (a few minutes of computing). Train a fresh seed of the dense model, then one of GShard:
#
# ```
# dsmoe run 07 -p live=dense
# dsmoe run 07 -p live=gshard -p seed=151
# ```
#
# Is either outside its band? How many of 20 fresh seeds would you expect outside?
#
# ## Recap
#
# - A verdict needs several seeds, a test fixed before the runs, and a correction for the number of tests. 14 of 19
#   claims hold by family, 7 over all.
# - Mixtures of experts beat dense models of equal work, and of four times the work, beyond doubt.
# - DeepSeekMoE's lead over GShard is small, and is not shown against the GShard that the paper prints, with undivided
#   gates. Hold the gates equal when you compare experts.
# - Cutting experts helps a little. What a shared expert adds we could not resolve, in a text with a common rule
#   neither; four are worse than one.
# - Figure 4 comes out reversed, because it measures the weight of replacement experts. Measured with and without
#   replacements, no model's experts are redundant, and they do not differ in it (exploration).
# - On one CPU thread fine experts take more time than coarse ones for about the same loss.
# - None of this says what models thousands of times as large do.
#
# Next, [chapter 08](08_what_experts_learn.ipynb): what did these experts learn, and is it theirs alone?
