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
# A trained router sends every token somewhere. It is tempting to read its choices as labels: *the expert for code*, *the
# expert for names*. This chapter asks what such readings are worth. First we **look**: what decides a choice, which experts
# does a domain use, which experts work together, and when in training do the choices settle? Every number comes with what
# chance would give. Then we **intervene**: remove experts and see which tokens suffer. The two need not agree.
#
# **You will** read the routing of two kinds of model from chapter 07, GShard and DeepSeekMoE, each trained with five seeds;
# follow their choices back through training; measure what each expert is worth; remove a domain's specialists; and
# do all of this with a model of your own.
#
# **You need** chapters 02 to 05. **Reading time** 45 minutes. **Hardware** any laptop CPU.

# %% tags=["parameters"]
profile: str = "cpu"  # size of the run: smoke | cpu | gpu
seed: int = 0  # of the random draws: 0..2147483647
run: int = 0  # which of the five training runs is looked at closely: 0..4
layer: int = 0  # which MoE layer, from 0: 0..99
domain: str = "code"  # the kind of text whose experts we look for: 1..60
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
# GShard has 16 experts, and each token uses two. DeepSeekMoE has one shared expert and 63 routed ones, and each token uses seven of
# these. Both store the same number of expert weights and use the same number per token. They are runs of
# [chapter 07's protocol](07_protocol.md), five seeds each, trained again by `dsmoe replay`, because a recorded run keeps its
# results but not its weights. The text is held out: no model has seen it. Nine tokens in ten are in sentences about people
# (*facts*), the rest in sums, brackets and code.

# %%
from collections import namedtuple
from pathlib import Path
from statistics import mean

import torch.nn.functional as F

from dsmoe_lite import load_model
from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common.errors import require, require_choice
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.data.batches import heldout_batches
from dsmoe_lite.data.folder import Folder
from dsmoe_lite.data.tokenizer import END, read_tokenizer
from dsmoe_lite.routing.metrics import drop_rate, load
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

Seen = namedtuple("Seen", "routings losses")


@torch.no_grad()
def look(model, tokens):
    """A Routing for each MoE layer; the losses, (N, S)."""
    output = model(tokens[:, :-1].to(lab.device))
    logits, targets = output.logits.float().cpu().flatten(0, 1), tokens[:, 1:]
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
    routings = [routing.to("cpu") for routing in output.routings]
    return Seen(routings, losses.view(targets.shape))


seen = {name: look(model, tokens) for name, model in models.items()}
for name, found in seen.items():
    K, E = found.routings[layer].topk_ids.shape[1], found.routings[layer].n_experts
    print(
        f"{name}: {K} of {E} routed experts, {len(found.routings)} MoE layers;", end=" "
    )
    print(
        f"{len(runs[name])} runs; loss of run {closely} here {found.losses.mean():.2f};",
        f"{mean(map(drop_rate, found.routings)):.1%} of its choices dropped,",
        f"{sum((at.counts == 0).sum() for at in found.routings)} dead experts",
    )
of_domain = {
    d: (labels[:, :-1] == corpus.domains.index(d)).float().mean() for d in here
}
print(f"{N * length:,} tokens:", end=" ")
print(", ".join(f"{share:.1%} {d}" for d, share in of_domain.items()))

# %% [markdown]
# No choice was dropped, as these models have no capacity limit, and no expert is *dead*, chosen by no token. So every choice that we
# count is also computed.
#
# ## What does a choice go with?
#
# A router sees a vector of $D$ numbers. It may encode the token itself, the tokens before it, what is likely to come next, or
# what kind of text this is. Which of these goes with the choice of an expert?
#
# One measure answers for all of them. Let $e$ be a token's first choice and $a$ some label of the token: which word it is, or which
# domain. $H(e)$ is the entropy of the choices, and $I(e; a)$ the part of it that disappears once the label is known. Their ratio is
# the *uncertainty coefficient*:
#
# $$
# U(e \mid a) = \frac{I(e; a)}{H(e)} = 1 - \frac{H(e \mid a)}{H(e)}
# $$ (eq:settled)
#
# It is 1 if the label determines the choice, as the token does in hash routing, and 0 if the label says nothing about it. OpenMoE
# measured it for the token and called it *context-independent specialization* {cite:p}`OpenMoE2024`. Two warnings. Many rare
# labels give more than 0 by chance, so we also shuffle the choices over the text, in whole rows of 64 tokens, because the
# tokens of one row belong together. And a label with little information can explain little: $U$ is at most $H(a)/H(e)$.
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
# Six labels: the token, the token before it, the token that comes next, the model's own guess of the next token (the likeliest one),
# the type of the token (word, part of a word, digit, punctuation...), and the domain of its text. The first token of a row has none
# before it and is left out.
#
# **Ask.** Which of the six explains most of the choice?

# %%
from dsmoe_lite.routing.specialization import shuffled
from dsmoe_lite.routing.token_types import TYPES, token_types

predict("08-decides", None)  # "token", "before", "next", "guess", "type" or "domain"

pieces = [
    tokenizer.decode([i], skip_special_tokens=False)
    for i in range(tokenizer.get_vocab_size())
]
type_of = torch.tensor([TYPES.index(kind) for kind in token_types(pieces)])


@torch.no_grad()
def labels_of(model):
    """By name, (N, S - 1)."""
    guesses = model(tokens[:, :-1].to(lab.device)).logits.argmax(dim=-1).cpu()
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
    by_name = labels_of(models[name])
    for number, at in enumerate(found.routings):
        first = at.topk_ids[:, 0].reshape(N, length)[:, 1:]
        for what, a in by_name.items():

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
    value_title="share of the choice that the label explains",
    title=f"What does the choice of an expert go with? (layer {layer})",
    subtitle=f"Mark: the router. Tick: {draws} shuffles of its choices, by rows.",
)

# %% tags=["trained", "hide-cell"]
explained = {(row["what"], row["layer"]): row for row in rows}
for name, found in seen.items():
    last = len(found.routings) - 1
    for number, interval in ((0, (-0.03, 0.15)), (last, (0.05, 0.3))):
        guess, following, itself = (
            explained[f"{name}: {what}", number]["value"]
            for what in ("its guess", "next token", "token")
        )
        where = f"{name}, layer {number}"
        claim(f"{where}: next minus token", following - itself, interval, asserted=own)
        claim(
            f"{where}: guess minus next", guess - following, (-0.02, 0.1), asserted=own
        )
    row = explained[f"{name}: domain", last]
    of_most = row["value"] / max(row["most"], 1e-9)
    claim(
        f"{name}, layer {last}: domain, of its maximum",
        of_most,
        (0.1, 0.9),
        asserted=own,
    )

# %% [markdown]
# **What to notice.** Domain and type explain little of the choice, but they have little information to begin with: in the last layer
# the domain explains between a quarter and three fifths of the most that it could. Single words explain most. And the word that
# goes with the choice is less the one the router is looking at than the one that comes *next*, which the router cannot see; best of
# all is the model's own guess of that word, right or wrong. The lead of the next word is small in the first layer and clear in the
# second. So a choice goes with what the model is about to say. (This is a correlation, and labels overlap: the shares do not add up.)
#
# ## Which experts does a domain use?
#
# Here is each expert by itself: the share of one domain's tokens that chose it, beside the same share with the choices shuffled in
# whole rows. The mean of all shuffles is the share of *all* tokens that chose it.
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
# **What to notice.** Most experts are outside their bars, and most of these are below: code goes to few experts, and it chooses some of
# them several times as often as chance would. That looks like experts for code. Now take the expert that is highest above its bar and
# look from its side: only a small part of all tokens that it gets is code, because code is rare. "The expert for code" is mostly busy
# with something else. Always print both shares.
#
# ## Who works together?
#
# A token of DeepSeekMoE uses seven routed experts at once. If some pairs always came together, they would be one wider expert
# again. *Co-activation* is the share of expert $i$'s tokens that also use expert $j$:
#
# $$
# C(i \to j) = N_{ij} / N_i
# $$ (eq:coactivation)
#
# with $N_i$ the tokens of expert $i$ and $N_{ij}$ those that use both. Have experts formed teams? And if so, what do the
# tokens of a team have in common?
#
# Busy experts meet often by chance. So the null lets tokens trade experts at random until only chance decides who meets whom, while
# every expert keeps its load and every token its number of experts. The chart divides by it. One thing the null cannot know: a
# phrase that recurs makes the same choices each time, so a strong pair may be one frequent phrase.
#
# **Ask.** Do the strongest teams go with a domain, with a word, or with neither?

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

chose = torch.zeros(N * length, E, dtype=torch.bool).scatter_(1, at.topk_ids, True)
# a few tokens would be enough to make a strong pair of rare experts
often = chose.float().mean(dim=0) >= 0.02
pairs = (often[:, None] & often[None, :]).triu(1)
times_chance = together / null * pairs
highest = (nulls / null * pairs).max()
print(f"highest of {pairs.sum()} pairs in any shuffle: {highest:.1f} times chance")
strongest = [
    divmod(pair, E) for pair in times_chance.flatten().topk(6).indices.tolist()
]
charts.coactivation(
    together.tolist(),
    null=null.tolist(),
    order=seriate(together / null),
    marked=strongest,
    title=f"Which experts of {name} work together? (layer {layer})",
    subtitle="Colour: tokens in common, over chance. Rings: the six strongest pairs, listed below.",
)


# %% tags=["trained"]
def commonest(values, names):
    """What most tokens that chose both have (and its share of all tokens)."""
    value = values[both].mode().values
    share, of_all = ((some == value).float().mean() for some in (values[both], values))
    return f"{share:.0%} {names[value]!r} ({of_all:.0%})"


for number, (i, j) in enumerate(strongest, 1):
    both = chose[:, i] & chose[:, j]
    print(
        f"{number}  e{i} and e{j}: {times_chance[i, j]:.1f};",
        f"{commonest(domains, corpus.domains)},",
        f"token {commonest(words, pieces)},",
        f"next {commonest(tokens[:, 1:].flatten(), pieces)}",
    )

# %% [markdown]
# **What to notice.** There are teams: the strongest pairs meet three times as often as any pair does in the shuffles. The lines show
# what the tokens of a team have in common. Four of the six are where nearly all text is, in sentences about people; what sets their
# tokens apart is a full stop, the end of a document, a few words. The other two teams are outside such sentences far more often than
# text in general. So some teams go with a place in the sentence, and some with a kind of text.
#
# ## When do the choices settle?
#
# A router learns together with its experts, and an expert can learn nothing in particular while its tokens keep changing. *Saturation*
# {cite:p}`OLMoE2024` compares the experts $\mathcal{E}_t$ that a token chose at step $t$ of training with those that it chooses in the end,
# $\mathcal{E}$:
#
# $$
# S(t) = \frac{\lvert \mathcal{E}_t \cap \mathcal{E} \rvert}{\lvert \mathcal{E} \rvert}, \quad \text{mean over tokens}
# $$ (eq:saturation)
#
# If loads are equal, two random choices of $K$ out of $E$ experts share $K/E$ of their experts; they share more if both overload the
# same ones, and that is the null here. The weights before the first step follow from the seed; later ones were kept, for the first
# run, when it was trained again.
#
# **Ask.** A run has 1,200 steps. By which step are half of the choices final?

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
# **What to notice.** After 50 steps GShard's first layer already makes more than half of its final choices. Its second layer and both of
# DeepSeekMoE's settle later, and at step 800 a sixth to a quarter of all choices are still going to change. Which 7 of 63 is a finer
# question than which 2 of 16, so less agreement is no surprise. But a fine expert spends more of its training on tokens that it will
# not keep. This is one run of each.
#
# ## What is an expert worth?
#
# So far we looked. Now we switch off each routed expert, one at a time; its tokens take the next best expert. The mean rise in loss over
# all tokens is what the expert was *worth* to the model. We do this in all five runs; the chart shows one of them, the numbers
# all. Gates are as trained, so compare experts of one model, and not the two models.
#
# Three things can be counted without touching the model: an expert's load, its mean gate (over the tokens that chose it), and the
# sum of its gates, which joins the two.
#
# **Ask.** Which of the three predicts what an expert is worth? And first: is a busy expert a needed one?

# %%
from dsmoe_lite.common.progress import progress
from dsmoe_lite.routing.interventions import switch_off

predict("08-worth", None)  # "load", "mean gate", "sum of gates" or "none"

some = tokens[::6]  # every sixth row
without = {}  # (model, run, layer): routing, rise in loss without each expert (E, T)
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

# %% tags=["trained", "hide-cell"]
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
# **What to notice.** In GShard's first layer the busy experts are the needed ones. In the other three layers load says little: its interval
# includes zero, or ends just below it. The mean gate goes with worth in all four layers, about equally well: how strongly a router
# wants an expert says more than how often it takes it. That is a rank correlation in five runs of one small world, and no recipe;
# nothing was pruned here.
#
# And most of DeepSeekMoE's dots are on the line: removing almost any single expert costs little. A few carry the layer.
#
# ## Take the specialists away
#
# Some experts looked like specialists: a domain used them far more often than chance would. If they are specialists, then this domain
# should suffer without them, and the others less. So:
#
# 1. On one half of the text, find for each domain the eighth of the experts whose share of its tokens is highest above their
#    share of all tokens, in every MoE layer.
# 2. On the other half, measure the rise in each domain's loss without them.
# 3. Subtract the mean rise of five random controls: as many other experts, about as busy in all.
#
# There are two ways to remove an expert, and they ask different things. With a *score of $-\infty$* no token can choose it and the next
# best steps in: can others do its work? With a *gate of 0* nobody steps in, and the other gates stay as they are: what did it
# contribute?
#
# The first way treats our models differently. GShard divides its two gates by their sum, so a stand-in gets a large weight even if
# its score is tiny; in DeepSeekMoE it gets its own score. A difference between gates could pass for one between experts. So we also
# remove experts at *equal gates*: GShard keeps dividing by the scores that the token would have chosen, and no gate grows.
# DeepSeekMoE's gates do that already.
#
# **Ask.** Four domains lose their specialists in turn. In how many of the four does the domain itself suffer most?

# %%
from dsmoe_lite.routing.interventions import freeze_gate_norm, silence
from dsmoe_lite.routing.specialization import null_specialization

predict("08-specialists", None)  # 0 to 4

REMOVALS = {
    "as trained": switch_off,
    "equal gates": lambda model, gone: freeze_gate_norm(switch_off(model, gone)),
    "gate of 0": lambda model, gone: silence(model, experts=gone),
}
n_controls = lab.choose(smoke=2, cpu=5, gpu=20)
found_on, tried_on = (slice(1, None, 2), slice(0, None, 2))  # rows of text
domains_found = labels[found_on, :-1].flatten()
domains_tried = labels[tried_on, 1:]
ids = [corpus.domains.index(d) for d in here]


def above_chance(at, d):
    """Of each expert, its share of the domain's tokens minus its share of all."""
    share = specialization(at.topk_ids, domains_found, n_domains, at.n_experts)
    return share[d] - null_specialization(at.topk_ids, at.n_experts)


def as_busy(at, experts):
    """Controls: of 100 random sets of as many others, those whose load is nearest."""
    others = torch.tensor([e for e in range(at.n_experts) if e not in experts])
    drawn = torch.stack(
        [
            others[torch.randperm(len(others), generator=draw)[: len(experts)]]
            for _ in range(100)
        ]
    )
    drawn = drawn.sort(dim=1).values.unique(dim=0)
    away = (at.counts[drawn].sum(dim=1) - at.counts[experts].sum()).abs()
    return drawn[away.argsort(stable=True)[:n_controls]].tolist()


def rises(changed, whole):
    """The rise in loss on each domain."""
    gained = look(changed, tokens[tried_on]).losses - whole
    return torch.stack([gained[domains_tried == d].mean() for d in ids])


rise = {}  # (model, way): (runs, without whose, set, on whose); set 0: specialists
for name, those in runs.items():
    divides = those[0].config.moe.norm_topk_prob
    measured = {way: [] for way in REMOVALS if divides or way != "equal gates"}
    for i in progress(tried, desc=name):
        routings = look(those[i], tokens[found_on]).routings
        whole = look(those[i], tokens[tried_on]).losses
        for d in ids:
            sets = []  # by layer: the specialists, then the controls
            for at in routings:
                theirs = above_chance(at, d).topk(at.n_experts // 8).indices
                sets.append([theirs.tolist(), *as_busy(at, theirs)])
            for gone in zip(*sets, strict=True):
                for way, of_sets in measured.items():
                    changed = REMOVALS[way](those[i], dict(enumerate(gone)))
                    of_sets.append(rises(changed, whole))
    for way, of_sets in measured.items():
        rise[name, way] = torch.stack(of_sets).view(len(tried), len(ids), -1, len(ids))
    rise.setdefault((name, "equal gates"), rise[name, "as trained"])

# %% tags=["trained"]
beyond = {key: x[:, :, 0] - x[:, :, 1:].mean(dim=2) for key, x in rise.items()}
charts.effect_matrix(
    [
        {"model": name, "without": without_whose, "on": on, "value": value}
        for name in models
        for one_run in beyond[name, "equal gates"].tolist()
        for without_whose, of_row in zip(here, one_run, strict=True)
        for on, value in zip(here, of_row, strict=True)
    ],
    title="Who suffers without a domain's specialists?",
    subtitle=[
        "Row: whose specialists are gone. Column: on whose tokens. Framed: their own.",
        "Rise beyond that of random controls, at equal gates, mean of the runs.",
    ],
)

# %% tags=["trained"]
from itertools import product

from scipy.stats import ttest_ind

from dsmoe_lite.common.stats import mean_and_half_width


def hit_most(effect):
    """In how many cases the own domain's is the highest of its row, of its column."""
    on_own = effect.diagonal(dim1=1, dim2=2)
    return [(on_own == effect.amax(dim=dim)).float().mean().item() for dim in (2, 1)]


print("own domain hit most, by row, by column; and with each control alone")
hit = {}
for name, way in product(models, REMOVALS):
    x = rise[name, way]
    hit[name, way] = hit_most(beyond[name, way])
    alone = [hit_most(x[:, :, 0] - x[:, :, k]) for k in range(1, x.shape[2])]
    print(f"  {f'{name}, {way}':24}", end="")
    for share, each in zip(hit[name, way], zip(*alone, strict=True), strict=True):
        print(f" {share:.2f} ({min(each):.2f} to {max(each):.2f})", end="  ")
    print()

for (name, way), shares in hit.items():
    interval = (0.65, 1.0) if name == "DeepSeekMoE" else (0.3, 0.9)
    claim(f"{name}, {way}: mean of both", mean(shares), interval, asserted=own)
for name in models:
    controls = rise[name, "equal gates"][:, :, 1:]
    others = controls.sum(dim=2, keepdim=True) - controls
    null = (controls - others / (controls.shape[2] - 1)).unbind(dim=2)
    share = mean(mean(hit_most(as_if)) for as_if in null)
    claim(f"{name}: controls as if specialists", share, (0.1, 0.4), asserted=own)

print("mean of both at equal gates: mean of the runs ± half its 95% interval; each run")
for name in models:
    by_run = beyond[name, "equal gates"].split(1)
    hit[name] = {i: mean(hit_most(x)) for i, x in zip(tried, by_run, strict=True)}
    print(f"  {name:24} {seed_line(hit[name])}")
if len(models) == 2 and len(tried) > 1:
    other, one = (list(hit[name].values()) for name in models)
    gap = ttest_ind(one, other, equal_var=False).confidence_interval()
    print(f"  DeepSeekMoE minus GShard: {gap.low:+.2f} to {gap.high:+.2f} (95%, Welch)")
print("rise on the domain's own tokens at equal gates: mean ± half its 95% interval")
for name in models:
    for j, d in enumerate(here):
        own_rise = beyond[name, "equal gates"][:, j, j]
        middle, half = mean_and_half_width(own_rise.tolist())
        spread = rise[name, "equal gates"][:, j, 1:, j].std(dim=1).mean()
        print(
            f"  {f'{name}, {d}':24} {middle:+.2f}" + (f" ± {half:.2f}" if half else ""),
            end=", ",
        )
        print(f"lowest run {own_rise.min():+.2f}; controls differ by ± {spread:.2f}")

# %% [markdown]
# **What to notice.** In DeepSeekMoE it is nearly always all four. Looking was right there: experts found on one half of the text are
# missed, on the other half, by the very domain that they were found for. Its rise is the highest of its row in 95% of the cases, the
# highest of its column in all of them, and above zero in every run. In GShard the own domain is hit most in about three cases of five.
# Removing the specialists of arithmetic also hurts code, and removing those of brackets or code also hurts arithmetic. Whether facts
# miss their own specialists, we could not resolve.
#
# The gates do not explain the difference: equal gates lower GShard's shares, from 0.70 and 0.75 to 0.65 and 0.60, and with a gate of 0
# the models are as far apart. Nor does chance: a random control in the specialists' place hits the own domain most in about one case
# of four. But one control is not enough: with each of the five alone, GShard's share by row at equal gates is anything from 0.55 to
# 0.70. And GShard's runs differ widely, from 0.38 to 1.00, so five of each only just resolve the gap.
#
# An eighth of the experts is as many as a token uses, with nearly the same number of weights in both models. So this is the
# *hybridity* of chapter 02, now seen by intervention: a wide expert works for several domains, and they lose it together. Finer
# experts have less of it, in these runs, though not none: without the specialists of arithmetic, code still loses 0.24.
#
# One warning. How specialists are picked, and what their absence is compared with, was changed several times after the first
# results had been seen; equal gates and five controls came last. So this is an exploration, not a test fixed in advance.
#
# ## Where does an expert's absence hurt?
#
# A mean over thousands of tokens hides where the loss rises. How much of all change in loss, up or down, is at tokens that had *not*
# chosen the expert, and felt its absence only through later attention? And how much of the rise falls on a few tokens?
#
# **Ask.** Take the 1% of tokens that lose most: what share of an expert's rise is theirs?

# %%
predict("08-few", None)  # a percentage


def elsewhere(at, gained):
    """By expert: share of all change in loss at tokens that did not choose it."""
    chose = torch.zeros(gained.shape[1], at.n_experts, dtype=torch.bool)
    chose.scatter_(1, at.topk_ids, True)
    change = gained.abs()
    return (change * ~chose.T).sum(dim=1) / change.sum(dim=1).clamp(min=1e-9)


def of_the_most_hit(gained):
    """By expert: share of all rises at the 1% of the tokens hit most."""
    rises = gained.clamp(min=0).sort(dim=1, descending=True).values
    most = rises[:, : rises.shape[1] // 100].sum(dim=1)
    return most / rises.sum(dim=1).clamp(min=1e-9)


# %% tags=["trained"]
for name, model in models.items():
    for number in range(len(model.moe_layers)):
        pairs = [without[name, i, number] for i in tried]
        away = torch.cat([elsewhere(*pair) for pair in pairs]).median()
        most = torch.cat([of_the_most_hit(gained) for _, gained in pairs]).median()
        where = f"{name}, layer {number}, typical expert"
        if number == 0:
            claim(f"{where}: change elsewhere", away, (0.1, 0.5), asserted=own)
        claim(f"{where}: rise at 1% of tokens", most, (0.4, 1.0), asserted=own)

at, gained = without[name, closely, layer]
best = int(gained.mean(dim=1).argmax())  # the expert worth most
before, after = some[:, :-1].flatten(), some[:, 1:].flatten()
order = gained[best].argsort(descending=True)[:4].tolist()
where = ", ".join(f"{pieces[before[t]]!r} and {pieces[after[t]]!r}" for t in order)
print(f"{name}, layer {layer}, e{best} is missed most between {where}")

# %% [markdown]
# **What to notice.** The rise is concentrated: for a typical expert, 1% of the tokens account for over half of the rise, and in the last
# layer for over four fifths. The expert that is worth most is missed at one place in the sentence, after a person's name. In the first
# layer a good part of the change is at tokens that had not chosen the expert; they looked back at one that had. (In the last layer
# this cannot happen, since no attention follows.)
#
# Try it on one row of text. The square of this expert is outlined: click it to switch the expert off. Then step through the
# tokens with the arrow keys, and see what the model says after each.

# %% tags=["trained"]
from dsmoe_lite.routing.favourites import favourite_words
from dsmoe_lite.viz.explorer import explore

explore(
    {name: models[name]},
    tokenizer,
    tokenizer.decode(tokens[0].tolist(), skip_special_tokens=False).replace(END, "\n"),
    window=length,
    layer=layer,
    expert=best,
    likes={name: favourite_words(models[name], tokenizer, tokens)},
)

# %% [markdown]
# ## Your own model
#
# Everything above was computed from files of weights. Use one of yours instead:
#
# ```
# dsmoe run 08 -p checkpoint=/path/to/model.safetensors
# dsmoe run 08 -p checkpoint=/path/to/model.safetensors -p text_folder=/path/to/texts -p domain=...
# ```
#
# The model then reads the corpus that it was trained on, or a folder of text, in which each subfolder is a domain. `dsmoe train`
# writes such files, and `dsmoe replay` makes one from any recorded run.
#
# ## Exercises
#
# **1. A bug from the wild** (10 minutes). A published analysis of co-activation counts only experts that are neighbours in a token's
# ranking: first and second, second and third, and so on. Fix it so that it counts all pairs.


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
    cases = [torch.tensor([[0, 1, 2], [2, 0, 3], [3, 1, 0]])]  # none chose e4
    draw = torch.Generator().manual_seed(0)
    for k in (1, 2, 3, 4):
        cases.append(torch.rand(6, 5, generator=draw).topk(k).indices)
    for ids in cases:
        got, rows = torch.as_tensor(all_pairs(ids.clone(), 5)).tolist(), ids.tolist()
        assert len(got) == 5, f"five experts, but {len(got)} rows"
        for i, j in product(range(5), repeat=2):
            right = sum(i in row and j in row for row in rows if i != j)
            size = "high" if got[i][j] > right else "low"
            assert got[i][j] == right, (
                f"choices {rows}: {got[i][j]} for e{i} and e{j} is too {size}"
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
# $K$ choices have $K(K - 1)/2$ pairs, but only $K - 1$ pairs of neighbours. Worse than this factor of $K/2$: two experts that always
# come together, one at the top of the ranking and one at its end, are never counted. The case is `coactivation-neighbours` in
# `data/published.json`, with its source.
# </details>
#
# **2. When did it settle?** (10 minutes). Write the saturation of {eq}`eq:saturation`: the share of all final choices that the same
# token had already made earlier. Both arguments are $(T, K)$; the order of a token's choices does not matter.


# %%
def settled_share(then, final):
    return None  # between 0 and 1


def finds_choices_in_any_place(settled_share):
    final = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    some = torch.tensor([[1, 9], [9, 3], [8, 9], [7, 6]])
    cases = [
        (final, final, 1.0),
        (final.flip(1), final, 1.0),
        (final.roll(-1, dims=0), final, 0.0),
        (some, final, 4 / 8),
    ]
    draw = torch.Generator().manual_seed(0)
    for k in (1, 2, 3, 4) * 8:
        final = torch.rand(3, 8, generator=draw).topk(k).indices
        stays = torch.rand(3, k, generator=draw) < 0.5
        order = torch.randperm(k, generator=draw)
        then = final.where(stays, final + 8)[:, order]  # 8 to 15 are never final
        cases.append((then, final, stays.float().mean().item()))
    for then, final, right in cases:
        got = float(settled_share(then.clone(), final.clone()))
        size = "high" if got > right else "low"
        assert abs(got - right) < 1e-6, (
            f"{then.tolist()} against {final.tolist()}: {got:g} is too {size}"
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
# Comparing place by place, `then == final`, would call a token unsettled if it only ranks the same experts in another order.
# </details>
#
# **3. Other parameters** (a few minutes of computing). Look at another training run, and at the second layer:
#
# ```
# dsmoe run 08 -p run=3
# dsmoe run 08 -p layer=1
# ```
#
# Which of the statements above hold for both layers and for other runs, and which were peculiar to one model?
#
# ## Recap
#
# - A choice goes best with the word that the model is about to say, not with the word it is looking at.
# - An expert that a domain uses far above chance is mostly busy with something else.
# - GShard's first layer settles early; the choices of fine experts move over the whole run.
# - Load says little about what an expert is worth, the size of its gates more; and most of its worth falls on few tokens.
# - Without its specialists a domain suffers. In DeepSeekMoE it is nearly always the domain that suffers most; in GShard
#   others suffer with it. Equal gates and random controls do not change this.
