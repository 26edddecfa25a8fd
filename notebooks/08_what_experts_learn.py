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
    from dsmoe_lite.labs import check_exercise, check_parameters, claim, predict, report
    from dsmoe_lite.labs.guard import need
except ModuleNotFoundError:
    raise SystemExit(
        "This chapter needs dsmoe_lite: run `make setup` in the course's folder, then `make lab`."
    ) from None

# False with other knobs: claims are recorded for the chapter's own
own = check_parameters(globals())
need("torch", "altair", "vl_convert", "tokenizers", "scipy")

# %% tags=["hide-input"]
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from torch.testing import assert_close

from dsmoe_lite.checkpoint import load_model, read_facts
from dsmoe_lite.data.batches import heldout_batches
from dsmoe_lite.data.folder import Folder
from dsmoe_lite.errors import require, require_choice
from dsmoe_lite.job import corpus_of
from dsmoe_lite.labs.recorded import seed_line
from dsmoe_lite.model import Transformer
from dsmoe_lite.paths import DATA
from dsmoe_lite.progress import progress
from dsmoe_lite.routing.coactivation import coactivation, coactivation_null, seriate
from dsmoe_lite.routing.interventions import switch_off
from dsmoe_lite.routing.metrics import load
from dsmoe_lite.routing.saturation import saturation, saturation_null
from dsmoe_lite.routing.specialization import (
    null_specialization,
    shuffled,
    specialization,
    uncertainty_coefficient,
)
from dsmoe_lite.routing.token_types import TYPES, token_types
from dsmoe_lite.viz import charts, renderer
from dsmoe_lite.viz.explorer import explore

renderer.enable()
torch.set_num_threads(1)
device = "cuda" if profile == "gpu" else "cpu"
n_batches = {"smoke": 1, "cpu": 4, "gpu": 16}[profile]  # of 4,096 tokens
draws = {"smoke": 3, "cpu": 20, "gpu": 100}[profile]

# %% [markdown]
# ## The models
#
# GShard, two of 16 experts, and DeepSeekMoE, one shared expert and 7 of 63 routed ones, with the same expert weights in all and for a token. They
# are runs of chapter 07's grid `paper`; `dsmoe replay` trained them again, as a record keeps results and no weights. The
# text is held out: no model has seen it.

# %%
folder = DATA / "models"
files = {
    shown: sorted(folder.glob(f"paper-{name}-seed?.safetensors"))
    for shown, name in {"GShard": "gshard", "DeepSeekMoE": "deepseekmoe"}.items()
}
if checkpoint:
    files = {Path(checkpoint).stem: [Path(checkpoint)]}
runs = {
    name: [load_model(p).to(device) for p in paths] for name, paths in files.items()
}
closely = 0 if checkpoint else run
models = {name: those[closely] for name, those in runs.items()}
for name, model in models.items():
    require(
        bool(model.moe_layers), "checkpoint", checkpoint, "has no experts to look at"
    )
    n_layers = len(model.moe_layers)
    require(
        layer < n_layers, "layer", layer, f"{name} has MoE layers 0 to {n_layers - 1}"
    )

facts = read_facts(next(iter(files.values()))[0])
tokenizer = Tokenizer.from_str(facts["tokenizer"])
corpus = Folder(Path(text_folder)) if text_folder else corpus_of(facts)
length = min(64, *(model.config.max_seq_len for model in models.values()))
parts = heldout_batches(corpus, tokenizer, 64, length, n_batches)
tokens = torch.cat([part.tokens for part in parts])  # (N, S + 1)
labels = torch.cat([part.domains for part in parts]).long()
domains = labels[:, :-1].flatten()
here = [d for d in corpus.domains if (domains == corpus.domains.index(d)).any()]
require_choice("domain", domain, here)


@torch.no_grad()
def look(model, tokens):
    """Its routing in every MoE layer, and the loss at each token but the first of a row."""
    output = model(tokens[:, :-1].to(device))
    logits, targets = output.logits.flatten(0, 1).float().cpu(), tokens[:, 1:].flatten()
    losses = F.cross_entropy(logits, targets, reduction="none")
    return [routing.to("cpu") for routing in output.routings], losses


seen = {name: look(model, tokens) for name, model in models.items()}
for name, (routings, _) in seen.items():
    at = routings[layer]
    print(
        f"{name}: {at.topk_ids.shape[1]} of {at.n_experts} routed experts a token, {len(routings)} MoE layers, {len(runs[name])} runs"
    )
of_domain = {d: (domains == corpus.domains.index(d)).float().mean() for d in here}
print(
    f"{len(domains):,} tokens:",
    ", ".join(f"{share:.1%} {d}" for d, share in of_domain.items()),
)

# %% [markdown]
# ## What decides a choice?
#
# A router sees a vector of $D$ numbers. After one attention and some layers it may hold the token itself, the tokens before
# it, what is likely to come next, what kind of text this is. Which of them does the choice of an expert go with?
#
# One measure serves for all. Let $e$ be the first choice of a token and $a$ some label of it: which word it is, or which
# domain. $H(e)$ is the entropy of the choices, and $I(e; a)$ the part of it that goes away for one who knows the label. Their ratio
# is the *uncertainty coefficient*:
#
# $$
# U(e \mid a) = \frac{I(e; a)}{H(e)} = 1 - \frac{H(e \mid a)}{H(e)}
# $$ (eq:settled)
#
# 1 if the label decides, as the token does in hash routing; 0 if it says nothing. OpenMoE asked it of the token, and called the answer
# *context-independent specialization* {cite:p}`OpenMoE2024`. With many labels and few tokens each, chance alone gives more than 0: so
# the choices are shuffled over the tokens and the measure taken again.
#
# **Build** it, and **prove** it equal to the package's.


# %%
def entropy(counts):
    return torch.special.entr(counts / counts.sum()).sum()


def settled(first, a, n_experts):
    table = torch.zeros(int(a.max()) + 1, n_experts, dtype=torch.double)
    table.index_put_(
        (a, first), torch.ones(len(a), dtype=torch.double), accumulate=True
    )
    given_label = entropy(table) - entropy(table.sum(dim=1))  # H(e | a)
    return float(1 - given_label / entropy(table.sum(dim=0)))


words = tokens[:, :-1].flatten()
for routings, _ in seen.values():
    at = routings[layer]
    mine = settled(at.topk_ids[:, 0], words, at.n_experts)
    assert_close(mine, uncertainty_coefficient(at.topk_ids, words, at.n_experts))

# %% [markdown]
# Five labels: the token, the token before it, the one that comes next and that the model has to predict, the type of the
# token, and the domain of its text. The first token of each row has none before it, and is left out.
#
# **Ask.** Which of the five goes with the choice most? And does the other layer give the same answer?

# %%
predict("08-decides", None)  # "token", "before", "next", "type" or "domain"

pieces = [
    tokenizer.decode([i], skip_special_tokens=False)
    for i in range(tokenizer.get_vocab_size())
]
type_of = torch.tensor([TYPES.index(kind) for kind in token_types(pieces)])
inner = torch.ones_like(tokens[:, :-1], dtype=torch.bool)
inner[:, 0] = False
inner = inner.flatten()
LABELS = {
    "token": words[inner],
    "token before": tokens[:, :-1].roll(1, dims=1).flatten()[inner],
    "next token": tokens[:, 1:].flatten()[inner],
    "type": type_of[words][inner],
    "domain": domains[inner],
}
draw = torch.Generator().manual_seed(seed)
rows = []
for name, (routings, _) in seen.items():
    for number, at in enumerate(routings):
        first = at.topk_ids[inner, :1]
        for what, a in LABELS.items():
            chance = shuffled(
                lambda ids, a=a, E=at.n_experts: uncertainty_coefficient(ids, a, E),
                first,
                draw,
                draws,
            )
            rows.append(
                {
                    "what": f"{name}: {what}",
                    "layer": number,
                    "value": uncertainty_coefficient(first, a, at.n_experts),
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
    subtitle=f"Mark: the router. Bar: {draws} shuffles of its choices over the tokens.",
)

# %% tags=["trained"]
for name in models:
    print(name)
    for what in LABELS:
        own_rows = [row for row in rows if row["what"] == f"{name}: {what}"]
        print(
            f"  {what:13}"
            + "".join(
                f"  layer {row['layer']}: {row['value']:.2f} ({row['null']:.2f})"
                for row in own_rows
            )
        )

# %% [markdown]
# **What to notice.** TODO
#
# ## Which experts does a domain use?
#
# Nine texts of ten are sentences about people; the rest sums, brackets and code. Chapter 03 compared mixtures of domains. Here is each expert by
# itself: the share of one domain's tokens that chose it, beside the same share when choices are shuffled over the tokens, $N_e / T$ in the mean.
#
# **Ask.** If experts were specialists, what would this picture look like? How many of the 63 do you expect far above chance?

# %%
predict("08-domain", None)  # a number of experts

rows = []
d = corpus.domains.index(domain)


def share_of_domain(ids, n_experts):
    return specialization(ids, domains, len(corpus.domains), n_experts)[d]


for name, (routings, _) in seen.items():
    at = routings[layer]
    chance = shuffled(
        lambda ids, E=at.n_experts: share_of_domain(ids, E), at.topk_ids, draw, draws
    )
    rows += [
        {
            "what": name,
            "expert": e,
            "value": value,
            "null": chance[:, e].median(),
            "null_low": chance[:, e].min(),
            "null_high": chance[:, e].max(),
        }
        for e, value in enumerate(share_of_domain(at.topk_ids, at.n_experts).tolist())
    ]

# %% tags=["trained"]
charts.specialization_against_null(
    rows,
    value_title=f"share of tokens of {domain}",
    title=f"Which experts does {domain} use?",
    subtitle=f"Mark: the router. Bar: {draws} shuffles of its choices over the tokens. Layer {layer}.",
)

# %% tags=["trained"]
for name in models:
    found = [row for row in rows if row["what"] == name]
    most = max(row["value"] / max(row["null"], 1e-9) for row in found)
    away = mean(
        not row["null_low"] <= row["value"] <= row["null_high"] for row in found
    )
    report(
        **{
            name: {
                "outside chance": f"{away:.0%}",
                "highest over chance": f"{most:.1f}",
            }
        }
    )

# %% [markdown]
# **What to notice.** TODO
# (Tokens of one text are not independent of each other, so shuffling them one by one makes the bar somewhat narrower than chance is. A mark
# just outside it proves little.)
#
# ## Who works together?
#
# Chapter 03 drew which pairs of experts are chosen together, beside a null that keeps every expert's load. Now for a model that has been
# trained longer: do its experts form teams? And if they do, are they teams *for* something?
#
# **Ask.** Look at the strongest pairs. Do you expect them to serve one domain, or one word, or neither?

# %%
predict("08-together", None)  # "a domain", "a word" or "neither"

name = list(models)[-1]
at = seen[name][0][layer]
together = coactivation(at.topk_ids, at.n_experts)
null = coactivation_null(at.topk_ids, at.n_experts, draw, draws=min(draws, 10)).mean(
    dim=0
)
lift = together / null.clamp(min=1e-9)

# %% tags=["trained"]
charts.coactivation(
    together.tolist(),
    null=null.tolist(),
    order=seriate(lift),
    title=f"Which experts of {name} work together? (layer {layer})",
)

# %% tags=["trained"]
E = at.n_experts
chose = torch.zeros(len(at.topk_ids), E, dtype=torch.bool).scatter_(
    1, at.topk_ids.clamp(min=0), True
)
busy = (
    chose.float().mean(dim=0) >= 0.02
)  # of rare experts a few tokens make a strong pair
strongest = (lift * busy[:, None] * busy[None, :]).triu(1).flatten().topk(6).indices


def commonest(values, among, names):
    """The value that most of these tokens have, its share there and in all the text."""
    value = values[among].mode().values
    share, everywhere = (
        (values[w] == value).float().mean() for w in (among, slice(None))
    )
    return f"{share:.0%} {names[value]!r} ({everywhere:.0%})"


for i, j in (divmod(pair, E) for pair in strongest.tolist()):
    both = chose[:, i] & chose[:, j]
    print(
        f"e{i} and e{j}, {lift[i, j]:.1f} times chance:",
        commonest(domains, both, corpus.domains) + ", token",
        commonest(words, both, pieces) + ", next",
        commonest(tokens[:, 1:].flatten(), both, pieces),
    )

# %% [markdown]
# **What to notice.** TODO
#
# ## When do the choices settle?
#
# A router learns beside its experts. If it kept changing its mind, experts could not learn anything in particular. *Saturation* {cite:p}`OLMoE2024`
# compares the experts $E_t$ that a token chose at step $t$ with those it chooses in the end, $E$:
#
# $$
# S(t) = \frac{\lvert E_t \cap E \rvert}{\lvert E \rvert}, \quad \text{mean over tokens}
# $$ (eq:saturation)
#
# Two choices by chance have $K/E$ in common if loads are equal, more if both overload the same experts; that is the null here.
#
# **Ask.** A run has 1,200 steps. By which step are half of the final choices made? The weights before the first step come from the seed; those
# of later steps were kept when the run was trained again.

# %%
predict("08-settled", None)  # a number of steps

KEPT = (50, 200, 400, 800)
rows = []
for name, model in {} if checkpoint else models.items():
    torch.manual_seed(run)  # the run's own seed, so its own first weights
    then = {0: Transformer(model.config).to(device).eval()}
    path = files[name][closely]
    if run == 0:  # of the other runs only the end is kept
        then |= {
            s: load_model(path.with_name(f"{path.stem}-step{s}.safetensors")).to(device)
            for s in KEPT
        }
    for step, earlier in then.items():
        for number, at in enumerate(look(earlier, tokens)[0]):
            final = seen[name][0][number]
            rows.append(
                {
                    "model": f"{name} ({number})",
                    "step": step,
                    "share": saturation(at.topk_ids, final.topk_ids),
                    "chance": saturation_null(
                        at.topk_ids, final.topk_ids, at.n_experts
                    ),
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
        subtitle="In brackets: the MoE layer.",
    ).display()
else:
    print(f"no earlier weights of {', '.join(models)} are at hand")

# %% tags=["trained"]
for row in rows:
    print(
        f"{row['model']:15} step {row['step']:4}: {row['share']:.0%}, by chance {row['chance']:.0%}"
    )

# %% [markdown]
# **What to notice.** TODO
#
# ## What is an expert worth?
#
# So far we looked. Now each routed expert is switched off, one at a time; its tokens take the next best expert, and the
# rise in loss says what it was worth to the model.
#
# Three things can be counted of an expert without touching the model: its load, the mean of its gates, and their sum,
# which is both together. Such counts are what experts are pruned by.
#
# **Ask.** Which of the three goes with what an expert turns out to be worth?

# %%
predict("08-worth", None)  # "load", "mean gate", "sum of gates" or "none"

some = tokens[::6]  # 43 of the 256 rows


def without_each(model):
    """For each MoE layer its routing, and what each token loses without each expert, (E, T)."""
    routings, whole = look(model, some)
    return [
        (
            at,
            torch.stack(
                [
                    look(switch_off(model, {number: [e]}), some)[1] - whole
                    for e in range(at.n_experts)
                ]
            ),
        )
        for number, at in enumerate(routings)
    ]


found = {
    name: [without_each(model) for model in progress(those, desc=name)]
    for name, those in runs.items()
}


def counted(at):
    """What can be counted of each expert."""
    gates = at.gates.flatten().float()
    total = torch.zeros(at.n_experts).index_add(0, at.topk_ids.flatten(), gates)
    return {
        "load": load(at),
        "mean gate": total / at.counts.clamp(min=1),
        "sum of gates": total,
    }


# %% tags=["trained"]
charts.worth_scatter(
    [
        {
            "model": name,
            "expert": e,
            "counted": load(at)[e],
            "worth": gained[e].mean(),
        }
        for name in models
        for at, gained in [found[name][closely][layer]]
        for e in range(at.n_experts)
    ],
    title=f"Is a busy expert a needed one? (layer {layer})",
)

# %% tags=["trained"]
print("rank correlation with worth: mean of the runs ± half its 95% interval; each run")
for name in models:
    for number in range(len(models[name].moe_layers)):
        for what in ("load", "mean gate", "sum of gates"):
            by_run = {
                i: spearmanr(counted(at)[what], gained.mean(dim=1)).statistic
                for i, layers in enumerate(found[name])
                for at, gained in [layers[number]]
            }
            print(f"  {name}, layer {number}  {what:13} {seed_line(by_run)}")

# %% [markdown]
# **What to notice.** TODO
#
# ## Take the specialists away
#
# Some experts looked like specialists: they got far more of one domain's tokens than chance would give. If they are, then without
# them that domain should suffer, and the others should not. So for each domain take away the eighth of the experts whose share lies
# highest above chance, in every MoE layer at once, and measure the rise in loss in each domain. What counts is the rise beyond
# that without as many experts drawn at random.
#
# **Ask.** Four domains lose their specialists in turn. In how many of the four does the domain itself suffer most?

# %%
predict("08-specialists", None)  # 0 to 4

half = tokens[::2]
of_target = labels[::2, 1:].flatten()
drawings = {"smoke": 1, "cpu": 4, "gpu": 20}[profile]


def eighth(model, number):
    """How many experts of a layer are taken away."""
    return model.moe_layers[number].router.config.n_routed_experts // 8


def specialists(model, d):
    """For each MoE layer the experts whose share of the domain lies highest above chance."""
    chosen = {}
    for number, at in enumerate(look(model, tokens)[0]):
        share = specialization(at.topk_ids, domains, len(corpus.domains), at.n_experts)[
            corpus.domains.index(d)
        ]
        above = share - null_specialization(at.topk_ids, at.n_experts)
        chosen[number] = above.topk(eighth(model, number)).indices.tolist()
    return chosen


def anyone(model):
    """As many experts of each MoE layer, drawn at random."""
    return {
        number: torch.randperm(layer.router.config.n_routed_experts, generator=draw)[
            : eighth(model, number)
        ].tolist()
        for number, layer in enumerate(model.moe_layers)
    }


rows = []
for name, those in runs.items():
    for i, model in enumerate(progress(those, desc=name)):
        whole = look(model, half)[1]

        def rise_without(gone, model=model, whole=whole):
            """By domain, the mean over its tokens."""
            gained = look(switch_off(model, gone), half)[1] - whole
            return {
                d: gained[of_target == corpus.domains.index(d)].mean().item()
                for d in here
            }

        by_chance = [rise_without(anyone(model)) for _ in range(drawings)]
        rows += [
            {
                "model": name,
                "run": i,
                "without": d,
                "on": on,
                "value": value - mean(one[on] for one in by_chance),
            }
            for d in here
            for on, value in rise_without(specialists(model, d)).items()
        ]

# %% tags=["trained"]
charts.effect_matrix(
    rows,
    value_title="rise in loss beyond random experts (nats)",
    title="Who suffers without a domain's specialists?",
    subtitle="Row: whose specialists are gone. Column: on whose tokens. Framed: their own. Mean of the runs.",
)

# %% tags=["trained"]
print("the domain's own rise, and in how many runs it is the highest of all domains")
for name in models:
    for d in here:
        gone = [row for row in rows if row["model"] == name and row["without"] == d]
        own_rise = {row["run"]: row["value"] for row in gone if row["on"] == d}
        first = sum(
            value == max(row["value"] for row in gone if row["run"] == i)
            for i, value in own_rise.items()
        )
        print(f"  {name}, {d:11} {first} of {len(own_rise)}; {seed_line(own_rise)}")

# %% [markdown]
# **What to notice.** TODO
#
# ## Where does an expert's absence hurt?
#
# A domain is a coarse label, and a mean over thousands of tokens hides where they lose. Two questions to the same numbers. How much of the
# change in loss lies at tokens that had chosen the expert, and how much at others, which read its work through
# the attention of later layers? And how few tokens make up the rise?
#
# **Ask.** The hundredth of the tokens that lose most: what share of an expert's worth do they carry?

# %%
predict("08-few", None)  # a percentage


def elsewhere(at, gained):
    """For each expert, the share of all change in loss that lies at tokens that had not chosen it."""
    chose = torch.zeros(gained.shape[1], at.n_experts, dtype=torch.bool)
    chose.scatter_(1, at.topk_ids, True)
    change = gained.abs()
    return (change * ~chose.T).sum(dim=1) / change.sum(dim=1).clamp(min=1e-9)


def of_the_most_hit(gained):
    """For each expert, the share of all rises that the hundredth of the tokens with the largest has."""
    rises = gained.clamp(min=0).sort(dim=1, descending=True).values
    return rises[:, : rises.shape[1] // 100].sum(dim=1) / rises.sum(dim=1).clamp(
        min=1e-9
    )


# %% tags=["trained"]
for name in models:
    for number in range(len(models[name].moe_layers)):
        pairs = [layers[number] for layers in found[name]]
        away = torch.cat([elsewhere(at, gained) for at, gained in pairs])
        most = torch.cat([of_the_most_hit(gained) for _, gained in pairs])
        print(
            f"{name}, layer {number}: of the change in loss {away.median():.0%} elsewhere (largest {away.max():.0%}), "
            f"of the rise {most.median():.0%} at 1% of the tokens; medians over experts"
        )

# %% [markdown]
# **What to notice.** TODO
#
# Look at one: the expert of the layer that is worth most, on a line of held-out text.

# %% tags=["trained"]
name = list(models)[-1]
best = int(found[name][closely][layer][1].mean(dim=1).argmax())
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
        ([[1, 9], [9, 2], [8, 9], [7, 6]], 4 / 8),
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
# **3. Other parameters** (a few minutes of computing). Look at another training run, and at the first layer:
#
# ```
# dsmoe run 08 -p run=3
# dsmoe run 08 -p layer=0
# ```
#
# Which of the statements above hold for both layers and for other runs, and which were one model's own?
#
# ## Recap
#
# TODO
