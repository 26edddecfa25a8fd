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
    from dsmoe_lite.labs import check_exercise, check_parameters, claim, predict
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

# %% tags=["trained"]
settles = {(row["what"], row["layer"]): row["value"] for row in rows}
for name in models:
    for number in {0, len(seen[name][0]) - 1}:
        claim(
            f"{name}, layer {number}: settled by the next token minus by the token",
            settles[f"{name}: next token", number] - settles[f"{name}: token", number],
            (-0.03, 0.13) if number == 0 else (0.06, 0.26),
            asserted=own,
        )

# %% [markdown]
# **What to notice.** What kind of text it is, and what type of token, are far above chance and settle hardly more than a tenth of the
# choice. Single words settle most of it. And the word that goes with the choice best is not the one that the router
# stands on: it is the one that comes *next*, which the router cannot see. In the first layer the two are close, in the
# second they are not. The model has read the sentence and expects something, and the choice follows what it expects.
# (The labels overlap: in this world a word often tells the next one, so the shares do not add up. And 16 experts are settled more than 63, as there is
# less to settle.)
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
    bars = [row for row in rows if row["what"] == name]
    outside = mean(
        not row["null_low"] <= row["value"] <= row["null_high"] for row in bars
    )
    claim(
        f"{name}: share of experts outside chance", outside, (0.75, 1.0), asserted=own
    )
    best = max(bars, key=lambda row: row["value"] - row["null"])
    its = (seen[name][0][layer].topk_ids == best["expert"]).any(dim=1)
    claim(
        f"{name}, e{best['expert']}, highest above chance: share of {domain}'s tokens",
        best["value"],
        (0.3, 0.7),
        asserted=own,
    )
    claim(
        f"{name}, e{best['expert']}: share of {domain} among its own tokens",
        (domains[its] == d).float().mean(),
        (0.05, 0.35),
        asserted=own,
    )

# %% [markdown]
# **What to notice.** Nearly every expert lies outside what shuffling gives, most of them below: code goes to few experts, some of
# which it chooses several times as often as chance would have it. That looks like experts for code. Now take the expert that lies highest above
# its bar, and look from its side: of all the tokens that it gets, only a small part is code, for code is rare. "The
# expert for code" spends most of its time on something else. Which of the two shares is printed decides what the reader believes.
# (Tokens of one text are not independent of each other, and shuffling them one by one makes the bars narrower than chance is. A mark just
# outside proves little.)
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
# **What to notice.** There are teams: pairs that meet several times as often as loads alone would have it. The lines say what the tokens of a pair have in common, and in
# brackets how common it is in all the text. Some teams stand at one mark or a few words, some at the end of a document, some in
# the texts that are not about people. None covers a domain. It is as with single experts: words, and places in a sentence.
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
# **What to notice.** In GShard's first layer half of the choices are final after 50 steps, when the model knows hardly a fact. The
# other layer and both of DeepSeekMoE's follow much later, and at step 800 a good part of all choices is still to change. Which
# 7 of 63 is a finer question than which 2 of 16, so the two are not put to the same test; chance is near an eighth in both. An
# expert whose tokens change has to learn anew. Late settling is a price of fine experts that no table of losses shows.
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
related = {}
for name in models:
    for number in range(len(models[name].moe_layers)):
        for what in ("load", "mean gate", "sum of gates"):
            by_run = {
                i: spearmanr(counted(at)[what], gained.mean(dim=1)).statistic
                for i, layers in enumerate(found[name])
                for at, gained in [layers[number]]
            }
            print(f"  {name}, layer {number}  {what:13} {seed_line(by_run)}")
            related[name, number, what] = mean(by_run.values())

# %% tags=["trained"]
for name in models:
    last = len(models[name].moe_layers) - 1
    for number, interval in ((0, (0.2, 0.8)), (last, (-0.6, 0.2))):
        claim(
            f"{name}, layer {number}: rank correlation of load and worth",
            related[name, number, "load"],
            interval,
            asserted=own,
        )
gate = min(value for (_, _, what), value in related.items() if what == "mean gate")
claim("mean gate and worth, the lowest of all", gate, (0.45, 0.85), asserted=own)

# %% [markdown]
# **What to notice.** How busy an expert is says little of what it is worth. In the first layer the busy ones are somewhat more needed; in
# the second that is gone, or turned round. A rule that prunes the idle would do well in one layer and badly in the next. The mean
# gate does better in all four: how much a router wants an expert when it takes it says more than how often it takes it. It is a
# rank correlation all the same, far from 1, in five runs of one small world.
#
# And most dots lie on the line: nearly any single expert can go without the model noticing, since the next best steps in. A few
# carry the layer.
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
    title="Who suffers without a domain's specialists?",
    subtitle=[
        "Row: whose specialists are gone. Column: on whose tokens. Framed: their own.",
        "Rise beyond that without random experts, mean of the runs.",
    ],
)

# %% tags=["trained"]
print(
    "the domain's own rise; in how many runs it is the highest; mean ± half its 95% interval; each run"
)
for name in models:
    highest = 0
    for d in here:
        gone = [row for row in rows if row["model"] == name and row["without"] == d]
        own_rise = {row["run"]: row["value"] for row in gone if row["on"] == d}
        first = sum(
            value == max(row["value"] for row in gone if row["run"] == i)
            for i, value in own_rise.items()
        )
        highest += first
        print(f"  {name}, {d:11} {first} of {len(own_rise)}; {seed_line(own_rise)}")
    claim(
        f"{name}: share of cases in which the domain itself suffers most",
        highest / len(here) / len(runs[name]),
        (0.5, 1.0),
        asserted=own,
    )

# %% tags=["trained"]
print("over the experts of a layer, rank correlation of a domain's share above chance")
print(
    "and the rise in its loss without the expert: mean ± half its 95% interval; each run"
)
of_input, of_target = (
    labels[::6, cut].flatten() for cut in (slice(-1), slice(1, None))
)
for name in models:
    for d in map(corpus.domains.index, here):
        by_run = {}
        for i, layers in enumerate(found[name]):
            at, gained = layers[layer]
            share = specialization(
                at.topk_ids, of_input, len(corpus.domains), at.n_experts
            )[d]
            above = share - null_specialization(at.topk_ids, at.n_experts)
            rise = gained[:, of_target == d].mean(dim=1)
            by_run[i] = spearmanr(above, rise).statistic
        print(f"  {name}, {corpus.domains[d]:11} {seed_line(by_run)}")

# %% [markdown]
# **What to notice.** @SPECTEXT@
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
            f"{name}, layer {number}, medians over experts of {len(pairs)} runs: {away.median():.0%} of the change "
            f"elsewhere (highest {away.max():.0%}), {most.median():.0%} of the rise at 1% of the tokens"
        )
        if number == 0:
            claim(f"{name}: elsewhere", away.median(), (0.1, 0.5), asserted=own)
        claim(
            f"{name}, layer {number}: of the rise at 1% of the tokens",
            most.median(),
            (0.4, 1.0),
            asserted=own,
        )

# %% [markdown]
# **What to notice.** In the last layer nothing can happen elsewhere: no attention follows, and an expert changes the tokens that chose it, and
# no others. In the first layer a good part of the change lies at tokens that had *not* chosen the expert; they looked back at one
# that had. Who counts an expert's tokens misses them. And the rise is concentrated: a hundredth of the tokens carries more
# than half of what the typical expert is worth, in the last layer nearly all of it. An expert is for a few places in the text, where a
# fact or a name is due; at the others it could be anyone.
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
# - What a choice goes with best is the word that is due next; domain and type of token say little.
# - Experts that a domain uses far above chance are mostly busy with something else.
# - Choices settle late: coarse first layers early, fine ones over the whole run.
# - Load does not say what an expert is worth; the size of its gates says more.
# - Taking a domain's specialists away hits that domain most, but not only; and the loss lies at few tokens, some of
#   which never chose the expert.
#
# Chapter 07 asks what the paper says of such experts: are they less redundant?
