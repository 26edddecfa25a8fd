# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What experts learn
#
# ![Two ways to ask what an expert is for: count which tokens it gets, or switch it off and see which tokens suffer.](images/what_experts_learn.svg)
#
# A trained router sends every token somewhere. It is tempting to read its choices like labels: *the expert for code*, *the
# expert for names*. This chapter asks what such readings are worth. First it **looks**: what decides a choice, which experts
# does a domain use, who works together, and when in training do the choices settle? Every number stands beside what chance
# would give. Then it **interferes**: switch experts off, and see which tokens suffer. The two need not agree.
#
# **You will** read the routing of two kinds of model of chapter 07, GShard and DeepSeekMoE, each trained with five seeds;
# follow their choices back through training; find out what each expert is worth; take a domain's specialists away; and
# do all of it with a model of your own.
#
# **You need** chapters 02 to 04. **Reading time** 35 minutes. **Hardware** any laptop CPU.

# %% tags=["parameters"]
profile: str = "cpu"  # size of the run: smoke | cpu | gpu
seed: int = 0  # of the draws by chance: 0..2147483647
run: int = 0  # which of the five training runs is looked at closely: 0..4
layer: int = 0  # which MoE layer, from 0: 0..99
domain: str = "code"  # the kind of text whose experts are sought: 1..60
checkpoint: str = ""  # a model of yours (.safetensors) in place of ours: 0..400
text_folder: str = ""  # text for it, if not its own corpus: 0..400

# %% tags=["hide-input"]
try:
    from dsmoe_lite.labs import begin, check_exercise, claim, predict
except ModuleNotFoundError:
    raise SystemExit("dsmoe_lite is missing: run make setup, then make lab") from None

import torch

from dsmoe_lite.viz import charts

lab = begin(globals(), "scipy")
own = lab.own and profile == "cpu"

# %% [markdown]
# ## The models
#
# GShard has 16 experts, of which a token takes two; DeepSeekMoE one shared expert and 63 routed ones, of which it takes seven. Both store the
# same number of expert weights, and use the same number for a token. They are runs of [chapter 07's protocol](07_protocol.md),
# each with five seeds, trained again by `dsmoe replay`, since a recorded run keeps its results and not its weights. The text is
# held out: no model has seen it. Nine tokens of ten are in sentences about people (*facts*), the rest in sums, brackets and code.

# %%
from collections import namedtuple
from pathlib import Path

import torch.nn.functional as F

from dsmoe_lite import load_model
from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common.errors import require, require_choice
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.data.batches import heldout_batches
from dsmoe_lite.data.folder import Folder
from dsmoe_lite.data.tokenizer import read_tokenizer
from dsmoe_lite.training.job import corpus_of

n_batches = lab.choose(smoke=1, cpu=4, gpu=16)  # of 64 rows
draws = lab.choose(smoke=3, cpu=20, gpu=100)
draw = torch.Generator().manual_seed(seed)

folder = DATA / "models"
files = {
    shown: sorted(folder.glob(f"paper-{name}-seed?.safetensors"))
    for shown, name in {"GShard": "gshard", "DeepSeekMoE": "deepseekmoe"}.items()
}
if checkpoint:
    files = {Path(checkpoint).stem: [Path(checkpoint)]}
runs = {
    name: [load_model(path).to(lab.device) for path in paths]
    for name, paths in files.items()
}
closely = 0 if checkpoint else run
models = {name: those[closely] for name, those in runs.items()}
tried = [closely] if profile == "smoke" or checkpoint else [0, 1, 2, 3, 4]
for name, model in models.items():
    n_layers = len(model.moe_layers)
    require(n_layers > 0, "checkpoint", checkpoint, "has no experts to look at")
    has = f"{name} has MoE layers 0 to {n_layers - 1}"
    require(layer < n_layers, "layer", layer, has)

facts = read_metadata(next(iter(files.values()))[0])
tokenizer = read_tokenizer(facts["tokenizer"])
corpus = Folder(Path(text_folder)) if text_folder else corpus_of(facts)
length = min(64, *(model.config.max_seq_len for model in models.values()))
parts = heldout_batches(corpus, tokenizer, 64, length, n_batches)
tokens = torch.cat([part.tokens for part in parts])  # (N, S + 1)
labels = torch.cat([part.domains for part in parts]).long()  # domains by number
N, n_domains = len(tokens), len(corpus.domains)
here = [d for i, d in enumerate(corpus.domains) if (labels == i).any()]
require_choice("domain", domain, here)

Seen = namedtuple("Seen", "routings losses guesses")


@torch.no_grad()
def look(model, tokens):
    """A Routing for each MoE layer; loss and likeliest token, (N, S)."""
    output = model(tokens[:, :-1].to(lab.device))
    logits, targets = output.logits.float().cpu(), tokens[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    routings = [routing.to("cpu") for routing in output.routings]
    return Seen(routings, losses, logits.argmax(dim=-1))


seen = {name: look(model, tokens) for name, model in models.items()}
for name, found in seen.items():
    K, E = found.routings[layer].topk_ids.shape[1], found.routings[layer].n_experts
    print(
        f"{name}: {K} of {E} routed experts, {len(found.routings)} MoE layers;", end=" "
    )
    print(
        f"{len(runs[name])} runs; loss of run {closely} here {found.losses.mean():.2f}"
    )
of_domain = {
    d: (labels[:, :-1] == corpus.domains.index(d)).float().mean() for d in here
}
print(f"{N * length:,} tokens:", end=" ")
print(", ".join(f"{share:.1%} {d}" for d, share in of_domain.items()))

# %% [markdown]
# ## What does a choice go with?
#
# A router sees a vector of $D$ numbers. In it may be the token itself, the tokens before it, what is likely to come next,
# what kind of text this is. Which of them does the choice of an expert go with?
#
# One measure serves for all. Let $e$ be a token's first choice and $a$ some label of the token: which word it is, or which domain. $H(e)$
# is the entropy of the choices, and $I(e; a)$ the part of it that goes away for one who knows the label. Their ratio is the
# *uncertainty coefficient*:
#
# $$
# U(e \mid a) = \frac{I(e; a)}{H(e)} = 1 - \frac{H(e \mid a)}{H(e)}
# $$ (eq:settled)
#
# It is 1 if the label settles the choice, as the token does in hash routing, and 0 if it says nothing. OpenMoE asked it of the token,
# and called the answer *context-independent specialization* {cite:p}`OpenMoE2024`. Two warnings go with it. Labels that are many and rare
# give more than 0 by chance: so the choices are also shuffled over the text, in whole rows of 64 tokens, for the
# tokens of one row belong together. And a label that holds little information can settle little: $U$ is at most $H(a)/H(e)$.
#
# **Build** it, and **prove** it equal to the package's.


# %%
from torch.testing import assert_close

from dsmoe_lite.routing.specialization import uncertainty_coefficient


def entropy(counts):
    return torch.special.entr(counts / counts.sum()).sum().item()


def settled(first, a, n_experts):
    table = torch.zeros(int(a.max()) + 1, n_experts, dtype=torch.double)
    for label, e in zip(a.tolist(), first.tolist(), strict=True):
        table[label, e] += 1
    of_choice = entropy(table.sum(dim=0))
    given_label = entropy(table) - entropy(table.sum(dim=1))  # H(e | a)
    return 1 - given_label / of_choice if of_choice else 0.0


words = tokens[:, :-1].flatten()
for found in seen.values():
    at = found.routings[layer]
    mine = settled(at.topk_ids[:, 0], words, at.n_experts)
    assert_close(mine, uncertainty_coefficient(at.topk_ids, words, at.n_experts))

# %% [markdown]
# Six labels: the token, the token before it, the token that comes next, the one that the model *takes to be* next (its likeliest token),
# the type of the token (word, part of a word, digit, punctuation...), and the domain of its text. The first token of a row has none before
# it and is left out.
#
# **Ask.** Which of the six goes with the choice most?

# %%
from dsmoe_lite.routing.specialization import shuffled
from dsmoe_lite.routing.token_types import TYPES, token_types

predict("08-decides", None)  # "token", "before", "next", "guess", "type" or "domain"

pieces = [
    tokenizer.decode([i], skip_special_tokens=False)
    for i in range(tokenizer.get_vocab_size())
]
type_of = torch.tensor([TYPES.index(kind) for kind in token_types(pieces)])


def labels_of(guesses):
    """By name, (N, S - 1)."""
    return {
        "token": tokens[:, 1:-1],
        "token before": tokens[:, :-2],
        "next token": tokens[:, 2:],
        "its guess": guesses[:, 1:],
        "type": type_of[tokens[:, 1:-1]],
        "domain": labels[:, 1:-1],
    }


rows = []
for name, found in seen.items():
    for number, at in enumerate(found.routings):
        first = at.topk_ids[:, 0].reshape(N, length)[:, 1:]
        for what, a in labels_of(found.guesses).items():

            def share(first, a=a, E=at.n_experts):
                return uncertainty_coefficient(first.reshape(-1, 1), a.flatten(), E)

            chance = shuffled(share, first, draw, draws)  # of whole rows
            of_label, of_choice = (
                entropy(torch.bincount(x.flatten()).double()) for x in (a, first)
            )
            rows.append(
                {
                    "what": f"{name}: {what}",
                    "layer": number,
                    "value": share(first),
                    "most": min(1.0, of_label / max(of_choice, 1e-9)),
                    "null": chance.median(),
                    "null_low": chance.min(),
                    "null_high": chance.max(),
                }
            )

# %% tags=["trained"]
charts.specialization_against_null(
    [row for row in rows if row["layer"] == layer],
    value_title="share of the choice that the label settles",
    title=f"What does the choice of layer {layer} go with?",
    subtitle=f"Mark: the router. Tick: {draws} shuffles of its choices, by rows.",
)

# %% [markdown]
# **Ask.** And in the other layer?

# %% tags=["trained"]
print("settled, of at most (by chance)")
for row in rows:
    print(f"  layer {row['layer']}, {row['what']:25} {row['value']:.2f}", end=" ")
    print(f"of {row['most']:.2f} ({row['null']:.2f})")

# %% tags=["trained"]
settles = {(row["what"], row["layer"]): row for row in rows}
for name, found in seen.items():
    last = len(found.routings) - 1
    for number, interval in ((0, (-0.03, 0.15)), (last, (0.05, 0.3))):
        one, other = (
            settles[f"{name}: {what}", number]["value"]
            for what in ("next token", "token")
        )
        claim(
            f"{name}, layer {number}: next minus token",
            one - other,
            interval,
            asserted=own,
        )
    row = settles[f"{name}: domain", last]
    of_most = row["value"] / max(row["most"], 1e-9)
    claim(
        f"{name}, layer {last}: domain, of what it could",
        of_most,
        (0.1, 0.9),
        asserted=own,
    )

# %% [markdown]
# **What to notice.** Domain and type of token settle little of the choice, but there is little in them: the domain could settle at
# most what stands behind *of*, and settles between a quarter and three fifths of that. Single words settle most. And the word that goes with the choice
# is less the one that the router stands on than the one that comes *next*, which the router cannot see; and best of all the model's
# own guess of it, right or wrong. In the first layer the lead is small, in the second it is not. So a choice goes with what the
# model is about to say. (That is a correlation: the place in the sentence would give it too, as a name is followed by *has*. And labels
# overlap, so that shares do not add up.)
#
# ## Which experts does a domain use?
#
# Here is each expert by itself: the share of one domain's tokens that chose it, beside the same share with the choices shuffled in
# whole rows. In the mean over all shuffles that is the share of *all* tokens that chose it.
#
# **Ask.** If experts were specialists, what would this picture look like? How many of the 63 do you expect above chance?

# %%
from dsmoe_lite.routing.specialization import specialization

predict("08-domain", None)  # a number of experts

domain_id = corpus.domains.index(domain)
domains = labels[:, :-1].flatten()
rows = []
for name, found in seen.items():
    at = found.routings[layer]
    K, E = at.topk_ids.shape[1], at.n_experts

    def share(ids, K=K, E=E):
        """Of the domain's tokens, by expert."""
        return specialization(ids.reshape(-1, K), domains, n_domains, E)[domain_id]

    ids = at.topk_ids.reshape(N, length * K)
    chance = shuffled(share, ids, draw, draws)  # of whole rows
    rows += [
        {
            "what": name,
            "expert": e,
            "value": value,
            "null": chance[:, e].median(),
            "null_low": chance[:, e].min(),
            "null_high": chance[:, e].max(),
        }
        for e, value in enumerate(share(ids).tolist())
    ]

# %% tags=["trained"]
charts.specialization_against_null(
    rows,
    value_title=f"share of tokens of {domain}",
    title=f"Which experts does {domain} use?",
    subtitle=f"Layer {layer}. Mark: the router. Bar: {draws} shuffles of its choices, by rows.",
)

# %% tags=["trained"]
from statistics import mean

print(f"by chance {2 / (draws + 1):.0%} of the experts would lie outside their bars")
for name in models:
    bars = [row for row in rows if row["what"] == name]
    outside = mean(
        not bar["null_low"] <= bar["value"] <= bar["null_high"] for bar in bars
    )
    claim(f"{name}: experts outside their bars", outside, (0.5, 1.0), asserted=own)
    best = max(bars, key=lambda bar: bar["value"] - bar["null"])
    its = (seen[name].routings[layer].topk_ids == best["expert"]).any(dim=1)
    of_its = (domains[its] == domain_id).float().mean()
    which = f"{name}, e{best['expert']}, highest above its bar"
    claim(f"{which}: share of {domain}", best["value"], (0.3, 0.7), asserted=own)
    claim(f"{which}: {domain} among its tokens", of_its, (0.05, 0.35), asserted=own)

# %% [markdown]
# **What to notice.** Most experts lie outside their bars, and most of these below: code goes to few experts, and some of them it chooses several
# times as often as chance would have it. That looks like experts for code. Now take the one that lies highest above its bar, and look from its side: of
# all tokens that it gets, only a small part is code, for code is rare. "The expert for code" is mostly busy with something
# else. Always print both shares.
#
# ## Who works together?
#
# Chapter 03 drew which pairs of experts are chosen together, beside a null that keeps every expert's load. These models have been
# trained longer: have their experts formed teams? And if so, what do the tokens of a team have in common?
#
# **Ask.** Do you expect the strongest teams to stand at a domain, at a word, or at neither?

# %%
from dsmoe_lite.routing.coactivation import coactivation, coactivation_null

predict("08-together", None)  # "a domain", "a word" or "neither"

name = list(models)[-1]
at = seen[name].routings[layer]
E = at.n_experts
together = coactivation(at.topk_ids, E)
nulls = coactivation_null(at.topk_ids, E, draw, draws=min(draws, 10))
null = nulls.mean(dim=0).clamp(min=1e-9)

# %% tags=["trained"]
from dsmoe_lite.routing.coactivation import seriate

charts.coactivation(
    together.tolist(),
    null=null.tolist(),
    order=seriate(together / null),
    title=f"Which experts of {name} work together? (layer {layer})",
)

# %% tags=["trained"]
chose = torch.zeros(N * length, E, dtype=torch.bool).scatter_(1, at.topk_ids, True)
# a few tokens are enough to make a strong pair of rare experts
often = chose.float().mean(dim=0) >= 0.02
pairs = (often[:, None] & often[None, :]).triu(1)
times_chance = together / null * pairs
highest = (nulls / null * pairs).max()
print(f"highest of {pairs.sum()} pairs in any shuffle: {highest:.1f} times chance")


def commonest(values, names):
    """What most tokens that chose both have (and its share of all tokens)."""
    value = values[both].mode().values
    share, of_all = ((some == value).float().mean() for some in (values[both], values))
    return f"{share:.0%} {names[value]!r} ({of_all:.0%})"


for pair in times_chance.flatten().topk(6).indices.tolist():
    i, j = divmod(pair, E)
    both = chose[:, i] & chose[:, j]
    print(
        f"  e{i} and e{j}: {times_chance[i, j]:.1f};",
        f"{commonest(domains, corpus.domains)},",
        f"token {commonest(words, pieces)},",
        f"next {commonest(tokens[:, 1:].flatten(), pieces)}",
    )

# %% [markdown]
# **What to notice.** There are teams: the strongest pairs meet three times as often as any pair does in the shuffles. The lines say what the tokens of
# a team have in common. Four of the six stand where nearly all text stands, in sentences about people, and what sets their tokens apart is a full
# stop, the end of a document, a few words. The other two stand outside such sentences much more often than text does. So some teams go with a place in the
# sentence, and some with a kind of text.
#
# ## When do the choices settle?
#
# A router learns beside its experts, and an expert can learn nothing in particular while its tokens keep changing. *Saturation*
# {cite:p}`OLMoE2024` compares the experts $\mathcal{E}_t$ that a token chose at step $t$ of training with those that it chooses in the end,
# $\mathcal{E}$:
#
# $$
# S(t) = \frac{\lvert \mathcal{E}_t \cap \mathcal{E} \rvert}{\lvert \mathcal{E} \rvert}, \quad \text{mean over tokens}
# $$ (eq:saturation)
#
# Of $E$ experts with equal loads, two choices of $K$ by chance have $K/E$ in common; more if both overload the same ones, and that is
# the null here. The weights before the first step come from the seed; those of later steps were kept, for the first run, when it
# was trained again.
#
# **Ask.** A run has 1,200 steps. By which step are half of the choices those of the end?

# %%
from dsmoe_lite import Transformer
from dsmoe_lite.routing.saturation import saturation, saturation_null

predict("08-settled", None)  # a number of steps

rows = []
for name, model in {} if checkpoint else models.items():
    torch.manual_seed(run)  # the run's own seed, so its own first weights
    then = {0: Transformer(model.config).to(lab.device).eval()}
    path = files[name][closely]
    for kept in sorted(folder.glob(f"{path.stem}-step*.safetensors")):
        then[int(kept.stem.rpartition("-step")[2])] = load_model(kept).to(lab.device)
    for step, earlier in sorted(then.items()):
        found = look(earlier, tokens)
        for number, (at, final) in enumerate(
            zip(found.routings, seen[name].routings, strict=True)
        ):
            rows.append(
                {
                    "model": f"{name} ({number})",
                    "step": step,
                    "share": saturation(at.topk_ids, final.topk_ids),
                    "chance": saturation_null(
                        at.topk_ids, final.topk_ids, at.n_experts
                    ),
                    "loss": found.losses.mean().item(),
                }
            )

# %% tags=["trained"]
if rows:
    charts.training_curves(
        rows
        + [{**row, "step": 1200, "share": 1.0} for row in rows if row["step"] == 0],
        y="share",
        y_title="share of the final choices already made",
        title="When does routing settle?",
        subtitle="In brackets: the MoE layer. The end agrees with itself.",
    ).display()
else:
    print(f"no earlier weights of {', '.join(models)} are at hand")

# %% tags=["trained"]
for row in rows:
    print(f"{row['model']:15} step {row['step']:4}: {row['share']:.0%},", end=" ")
    print(f"by chance {row['chance']:.0%}; loss {row['loss']:.2f}")
if not checkpoint and run == 0:
    made = {(row["model"], row["step"]): row["share"] for row in rows}
    for name, step, interval in (
        ("GShard (0)", 50, (0.45, 0.65)),
        ("GShard (1)", 50, (0.16, 0.36)),
        ("DeepSeekMoE (0)", 50, (0.12, 0.32)),
        ("DeepSeekMoE (1)", 50, (0.05, 0.25)),
        ("GShard (0)", 800, (0.74, 0.94)),
        ("DeepSeekMoE (0)", 800, (0.64, 0.84)),
    ):
        claim(f"{name}, step {step}", made[name, step], interval, asserted=own)

# %% [markdown]
# **What to notice.** After 50 steps, with most of the fall in loss still to come, GShard's first layer already makes more than half of its
# final choices. Its second layer and both of DeepSeekMoE's come later, and at step 800 a sixth to a quarter of all choices are
# still to change. Which 7 of 63 is a finer question than which 2 of 16, so it is no surprise that they agree less; chance is about
# equal in both. But it does mean that a fine expert spends more of its training on tokens that it will not keep. This is one run
# of each.
#
# ## What is an expert worth?
#
# So far we looked. Now each routed expert is switched off, one at a time; its tokens take the next best expert. The rise in
# loss, mean over all tokens, is what it was *worth* to the model. This is done in all five runs; the picture shows one of them, the numbers are of
# all.
#
# Three things can be counted of an expert without touching the model: its load, the mean of its gates (of the tokens that
# chose it), and the sum of its gates, which is both together.
#
# **Ask.** Which of the three goes with what an expert turns out to be worth? And first: is a busy expert a needed one?

# %%
from dsmoe_lite.common.progress import progress
from dsmoe_lite.routing.interventions import switch_off
from dsmoe_lite.routing.metrics import load

predict("08-worth", None)  # "load", "mean gate", "sum of gates" or "none"

some = tokens[::6]  # every sixth row
without = {}  # (model, run, layer): its routing, and what each token loses without each expert
for name, those in runs.items():
    for i in progress(tried, desc=name):
        model = those[i]
        whole = look(model, some)
        for number, at in enumerate(whole.routings):
            gained = [
                look(switch_off(model, {number: [e]}), some).losses - whole.losses
                for e in range(at.n_experts)
            ]
            without[name, i, number] = at, torch.stack(gained).flatten(1)  # (E, T)


def counted(at):
    """What can be counted of each expert."""
    total = torch.zeros(at.n_experts)
    total.index_add_(0, at.topk_ids.flatten(), at.gates.flatten().float())
    return {
        "load": load(at),
        "mean gate": total / at.counts.clamp(min=1),
        "sum of gates": total,
    }


# %% tags=["trained"]
rows = []
for name in models:
    at, gained = without[name, closely, layer]
    rows += [
        {"model": name, "expert": e, "counted": load(at)[e], "worth": gained[e].mean()}
        for e in range(at.n_experts)
    ]
charts.expert_worth(rows, title=f"Is a busy expert a needed one? (layer {layer})")

# %% tags=["trained"]
from scipy.stats import spearmanr

from dsmoe_lite.study.rows import seed_line

print("rank correlation with worth: mean of the runs ± half its 95% interval; each run")
related = {}
for name, model in models.items():
    for number in range(len(model.moe_layers)):
        for what in ("load", "mean gate", "sum of gates"):
            by_run = {}
            for i in tried:
                at, gained = without[name, i, number]
                worth = gained.mean(dim=1)
                by_run[i] = spearmanr(counted(at)[what], worth).statistic
            where = f"{name}, layer {number}"
            print(f"  {where:21} {what:13} {seed_line(by_run)}")
            related[name, number, what] = mean(by_run.values())

# %% tags=["trained"]
for name, model in models.items():
    last = len(model.moe_layers) - 1
    for number, of_load in ((0, (0.05, 0.8)), (last, (-0.4, 0.15))):
        for what, interval in (("load", of_load), ("mean gate", (0.5, 0.9))):
            value = related[name, number, what]
            claim(
                f"{name}, layer {number}: {what} and worth",
                value,
                interval,
                asserted=own,
            )

# %% [markdown]
# **What to notice.** In GShard's first layer the busy experts are the needed ones. In the other three layers load says little: the interval
# holds zero, or lies just below it. The mean gate goes with worth in all four, and about as well in each: how much a router
# wants an expert when it takes it says more than how often it takes it. That is a rank correlation in five runs of one small
# world, and no recipe; nothing was pruned here.
#
# And of DeepSeekMoE's dots most lie on the line: nearly any single expert can be missed, since the next best steps in. A few carry the
# layer.
#
# ## Take the specialists away
#
# Some experts looked like specialists: a domain used them far more than chance would have it. If that is what they are, then
# without them this domain should suffer, and the others less. So:
#
# 1. On one half of the text, find for each domain the eighth of the experts whose share of its tokens lies highest above their
#    share of all tokens, in every MoE layer.
# 2. On the other half, measure the rise in each domain's loss without them.
# 3. Subtract the rise without as many experts that are about as busy in all, drawn at random.
#
# **Ask.** Four domains lose their specialists in turn. In how many of the four does the domain itself suffer most?

# %%
from dsmoe_lite.routing.specialization import null_specialization

predict("08-specialists", None)  # 0 to 4

found_on, tried_on = (slice(1, None, 2), slice(0, None, 2))  # rows of text
domains_found = labels[found_on, :-1].flatten()
domains_tried = labels[tried_on, 1:]


def above_chance(at, d):
    """Of each expert, its share of the domain's tokens minus its share of all."""
    share = specialization(at.topk_ids, domains_found, n_domains, at.n_experts)
    return share[d] - null_specialization(at.topk_ids, at.n_experts)


def as_busy(at, experts):
    """As many others at random: of 100 drawings the one whose load is nearest."""
    others = torch.tensor([e for e in range(at.n_experts) if e not in experts])
    drawn = [
        others[torch.randperm(len(others), generator=draw)[: len(experts)]]
        for _ in range(100)
    ]
    return min(
        drawn, key=lambda those: abs(at.counts[those].sum() - at.counts[experts].sum())
    )


rows = []
for name, those in runs.items():
    for i in progress(tried, desc=name):
        model = those[i]
        routings = look(model, tokens[found_on]).routings
        whole = look(model, tokens[tried_on]).losses
        for without_whose in here:
            d = corpus.domains.index(without_whose)
            theirs = [
                above_chance(at, d).topk(at.n_experts // 8).indices for at in routings
            ]
            others = [
                as_busy(at, experts)
                for at, experts in zip(routings, theirs, strict=True)
            ]
            rise, by_chance = (
                look(
                    switch_off(model, {n: e.tolist() for n, e in enumerate(gone)}),
                    tokens[tried_on],
                ).losses
                - whole
                for gone in (theirs, others)
            )
            for on in here:
                its = domains_tried == corpus.domains.index(on)
                rows.append(
                    {
                        "model": name,
                        "run": i,
                        "without": without_whose,
                        "on": on,
                        "value": (rise[its].mean() - by_chance[its].mean()).item(),
                    }
                )

# %% tags=["trained"]
charts.effect_matrix(
    rows,
    title="Who suffers without a domain's specialists?",
    subtitle=[
        "Row: whose specialists are gone. Column: on whose tokens. Framed: their own.",
        "Rise beyond that without other experts as busy, mean of the runs.",
    ],
)

# %% tags=["trained"]
print("rise on the domain's own tokens: mean ± half its 95% interval; each run")
for name in models:
    value = {
        (row["run"], row["without"], row["on"]): row["value"]
        for row in rows
        if row["model"] == name
    }
    for d in here:
        print(f"  {f'{name}, {d}':24}", seed_line({i: value[i, d, d] for i in tried}))
    cases = [(i, d) for i in tried for d in here]
    by_row = mean(
        value[i, d, d] == max(value[i, d, on] for on in here) for i, d in cases
    )
    by_column = mean(
        value[i, d, d] == max(value[i, other, d] for other in here) for i, d in cases
    )
    claim(f"{name}: the domain suffers most of all", by_row, (0.5, 1.0), asserted=own)
    claim(f"{name}: it suffers most from its own", by_column, (0.5, 1.0), asserted=own)
print(f"by chance {1 / len(here):.0%} of the cases, run by run and domain by domain")

# %% [markdown]
# **What to notice.** Looking was right, for DeepSeekMoE: experts that were found by looking at one half of the text are missed on the other half
# by just the domain that they were found for. Its framed cells are the highest of their row, and of their column, in nearly every
# case, and above zero in every run. In GShard a framed cell is the highest in more than half of the cases; whether facts miss their
# own experts these runs do not tell; and where those of sums, brackets or code go, the other two of these suffer too. An eighth is in both as many experts as
# a token takes, and nearly the same weights. So this is the *hybridity* of chapter 02 from the side of causes: a wide expert
# does several domains' work, and goes for all of them. Finer experts have less of it, in these runs. They are not clean
# either: beside the frames there are cells above zero.
#
# One warning. How specialists are picked, and what their absence is compared with, was changed three times while this
# chapter was written, after the first runs had been seen. So this is an exploration, and no test that was fixed before.
#
# ## Where does an expert's absence hurt?
#
# A mean over thousands of tokens hides where they lose. Two questions to the numbers that we have. Of all change in loss, up or
# down, how much lies at tokens that had *not* chosen the expert, and read its work only through the attention of later layers? And
# how much of the rise do the few tokens have that are hit most?
#
# **Ask.** The hundredth of the tokens that lose most: what share of an expert's rise is theirs?

# %%
predict("08-few", None)  # a percentage


def elsewhere(at, gained):
    """By expert: share of all change in loss at tokens that did not choose it."""
    chose = torch.zeros(gained.shape[1], at.n_experts, dtype=torch.bool)
    chose.scatter_(1, at.topk_ids, True)
    change = gained.abs()
    return (change * ~chose.T).sum(dim=1) / change.sum(dim=1).clamp(min=1e-9)


def of_the_most_hit(gained):
    """By expert: share of all rises at the hundredth of the tokens hit most."""
    rises = gained.clamp(min=0).sort(dim=1, descending=True).values
    most = rises[:, : rises.shape[1] // 100].sum(dim=1)
    return most / rises.sum(dim=1).clamp(min=1e-9)


# %% tags=["trained"]
print("medians over the experts of all runs")
for name, model in models.items():
    for number in range(len(model.moe_layers)):
        pairs = [without[name, i, number] for i in tried]
        away = torch.cat([elsewhere(at, gained) for at, gained in pairs])
        most = torch.cat([of_the_most_hit(gained) for _, gained in pairs])
        where = f"{name}, layer {number}"
        of_change = f"{away.median():.0%}, at most {away.max():.0%}"
        print(f"{where}: of the change in loss elsewhere {of_change}")
        if number == 0:
            claim(f"{where}: change elsewhere", away.median(), (0.1, 0.5), asserted=own)
        claim(
            f"{where}: rise at 1% of the tokens",
            most.median(),
            (0.4, 1.0),
            asserted=own,
        )

# %% [markdown]
# What is it that these few tokens have to predict? Take the expert of the layer that is worth most, in the last model above.

# %% tags=["trained"]
at, gained = without[name, closely, layer]
best = int(gained.mean(dim=1).argmax())
order = gained[best].argsort(descending=True)[:8]
print(f"{name}, e{best}: worth {gained[best].mean():.3f}; it is missed most between")
before, after = some[:, :-1].flatten(), some[:, 1:].flatten()
print(
    ", ".join(f"{pieces[before[t]]!r} and {pieces[after[t]]!r}" for t in order.tolist())
)

# %% [markdown]
# **What to notice.** In the last layer nothing can happen elsewhere: no attention follows, so an expert changes only the tokens that chose it. In
# the first, a good part of the change lies at tokens that had not chosen the expert, for some experts most of it: they looked back at one that
# had. Counting an expert's tokens misses them. And the rise is concentrated: of the typical expert's a hundredth of the tokens has more than half, in
# the last layer nearly all. The expert of the example is missed at one place in the sentence, after a person's name.
#
# Try it on one row of text: switch the expert off in the explorer and step through the tokens.

# %% tags=["trained"]
from dsmoe_lite.viz.explorer import explore

explore(
    {name: models[name]},
    tokenizer,
    tokenizer.decode(tokens[0].tolist(), skip_special_tokens=False),
    window=length,
    layer=layer,
    expert=best,
)

# %% [markdown]
# ## Your own model
#
# Everything above ran on files of weights. One of yours takes their place:
#
# ```
# dsmoe run 08 -p checkpoint=/path/to/model.safetensors
# dsmoe run 08 -p checkpoint=/path/to/model.safetensors -p text_folder=/path/to/texts -p domain=...
# ```
#
# It is read with the corpus that it was trained on, or with a folder of text; each folder inside it is a domain. `dsmoe train` writes such files, and
# `dsmoe replay` makes one of any recorded run.
#
# ## Exercises
#
# **1. A bug from the wild** (10 minutes). A published analysis of who works together counts, of the experts that a token chose, only those that
# follow each other in its ranking: first and second, second and third, and so on. Mend the count: all pairs.


# %%
from itertools import pairwise


def neighbours_only(topk_ids, n_experts):  # as it was: do not use
    counts = torch.zeros(n_experts, n_experts, dtype=torch.long)
    for ranked in topk_ids.tolist():
        for i, j in pairwise(ranked):
            counts[i, j] += 1
            counts[j, i] += 1
    return counts


def all_pairs(topk_ids, n_experts):
    return None  # (E, E): how many tokens chose both


def counts_every_pair(all_pairs):
    ids = torch.tensor([[0, 1, 2], [2, 0, 3], [3, 1, 0]])
    got = torch.as_tensor(all_pairs(ids.clone(), 5)).tolist()
    right = [
        [0, 2, 2, 2, 0],
        [2, 0, 1, 1, 0],
        [2, 1, 0, 1, 0],
        [2, 1, 1, 0, 0],
        [0] * 5,
    ]
    for i in range(5):
        for j in range(5):
            assert got[i][j] == right[i][j], (
                f"e{i} and e{j}: {right[i][j]}, not {got[i][j]}"
            )


K = 7
some = torch.rand(1000, 63, generator=torch.Generator().manual_seed(0)).topk(K).indices
pairs = K * (K - 1) * len(some)  # each counted both ways
print(f"the script sees one pair in {pairs / neighbours_only(some, 63).sum():.1f}")
verdict = check_exercise(all_pairs, counts_every_pair)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# from itertools import combinations
#
# def all_pairs(topk_ids, n_experts):
#     counts = torch.zeros(n_experts, n_experts, dtype=torch.long)
#     for ranked in topk_ids.tolist():
#         for i, j in combinations(ranked, 2):
#             counts[i, j] += 1
#             counts[j, i] += 1
#     return counts
# ```
#
# Of $K$ choices there are $K(K - 1)/2$ pairs and $K - 1$ neighbours. What is worse than the factor $K/2$: two experts that always
# come together, one at the top of the ranking and one at its end, are never counted. The case is `coactivation-neighbours` in
# `data/published.json`, with its source.
# </details>
#
# **2. When did it settle?** (10 minutes). Write the saturation of the section above: of the final choices of all tokens, the share that the same
# token had made before. Both arguments are $(T, K)$; the order of a token's choices does not matter.


# %%
def settled_share(then, final):
    return None  # between 0 and 1


def finds_choices_in_any_place(settled_share):
    final = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    for then, right in (
        ([[0, 1], [2, 3], [4, 5], [6, 7]], 1.0),
        ([[1, 0], [3, 2], [5, 4], [7, 6]], 1.0),
        ([[2, 3], [4, 5], [6, 7], [0, 1]], 0.0),
        ([[1, 9], [9, 3], [8, 9], [7, 6]], 4 / 8),
    ):
        got = float(settled_share(torch.tensor(then), final.clone()))
        assert abs(got - right) < 1e-6, (
            f"{then} against {final.tolist()}: {right:g}, not {got:g}"
        )


verdict = check_exercise(settled_share, finds_choices_in_any_place)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def settled_share(then, final):
#     return (final[:, :, None] == then[:, None, :]).any(dim=2).float().mean().item()
# ```
#
# Comparing place by place, `then == final`, would call a token unsettled that only ranks the same experts in another order.
# </details>
#
# **3. Other parameters** (a few minutes of computing). Look closely at another training run, and at the second layer:
#
# ```
# dsmoe run 08 -p run=3
# dsmoe run 08 -p layer=1
# ```
#
# Which of the statements above hold for both layers and for other runs, and which were one model's own?
#
# ## Recap
#
# - What a choice goes with best is the word that the model is about to say, not the word that stands there.
# - An expert that a domain uses far above chance is mostly busy with something else.
# - GShard's first layer settles early; the choices of fine experts move over the whole run.
# - Load says little of what an expert is worth, the size of its gates more; and its worth lies at few tokens.
# - Without its specialists a domain suffers. In DeepSeekMoE it is nearly always the one that suffers most; in GShard
#   others go with it.
