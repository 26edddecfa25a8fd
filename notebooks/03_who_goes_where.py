# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Who goes where?
#
# ![Left: four experts, each of which works on several kinds of text. Right: what the two experts of a token write, as arrows. Where punctuation is due they point in similar directions; where a fact is due they are nearly perpendicular.](images/who_goes_where.svg)
#
# **What do sixteen experts divide among themselves?** Nobody told them. In a trained GShard model the *word* decides
# much: a frequent word sends 60% of its tokens to one expert, where chance gives 18%. The kind of text decides little:
# an expert works on 3.7 of our five kinds, where chance gives 4.9. And before punctuation the two experts of a token
# write similar vectors, with a cosine of 0.66; before a fact it is 0.17. (The first layer of one model. In five other
# models the cosines are 0.33 and 0.15 on average.) DeepSeekMoE {cite:p}`DeepSeekMoE2024` calls the two faults
# **hybridity** and **redundancy**, and was built against them.
#
# **Afterwards you can** read a routing without fooling yourself, find out what an expert is worth, and explain
# hybridity and redundancy with one picture each. **You need** chapter 02. **Reading time** 11 minutes. **Hardware** any
# laptop CPU.

# %% tags=["parameters"]
profile: str = "cpu"  # size of the run: smoke | cpu | gpu
seed: int = 0  # of the shuffles: 0..2147483647
layer: int = 0  # the layer of experts in the pictures of one layer: 0..1

# %% tags=["hide-input"]
try:
    from dsmoe_lite.labs import begin, check_exercise, claim, report
except ModuleNotFoundError:
    raise SystemExit("dsmoe_lite is missing: run make setup, then make lab") from None

import torch

from dsmoe_lite.viz import charts

lab = begin(globals())

# %% [markdown]
# ## Does the word decide?
#
# The model is that of chapter 00: two layers of 16 experts, top-2, trained on our small world. We read 4,096 held-out tokens
# and note which experts each of them chose. (Layers count from 0. All slots are open here, so nothing is dropped.)

# %%
from dataclasses import replace

from dsmoe_lite import Transformer, load_model
from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.data.batches import heldout_batches
from dsmoe_lite.data.tokenizer import read_tokenizer
from dsmoe_lite.data.world import World


def without_capacity(model):
    free = replace(model.config.moe, capacity_factor=None, eval_capacity_factor=None)
    copy = Transformer(replace(model.config, moe=free)).eval()
    copy.load_state_dict(model.state_dict())
    return copy


checkpoint = DATA / "models" / "world-gshard.safetensors"
model = without_capacity(load_model(checkpoint))
world, tokenizer = World(), read_tokenizer(read_metadata(checkpoint)["tokenizer"])
parts = heldout_batches(world, tokenizer, 64, 64, 4)
inputs = parts[0].tokens[:, :-1]
with torch.no_grad():
    routings = model(inputs).routings
print(len(routings), "layers, chosen experts", tuple(routings[0].topk_ids.shape))

# %% [markdown]
# For each word of the vocabulary take its favourite: the expert that is most often its first choice. What share of the
# word's tokens go there? The mean of this share over all words is the *vocabulary specialization* {cite:p}`OLMoE2024`.
# At 1 the word alone decides. (Chapter 00 counted each token once; here each word counts once.)
#
# A number needs its **null**: what would chance give? Shuffle the choices over the tokens, so that every expert stays as busy
# as it is but words mean nothing, and measure again.
#
# **Ask.** What does a router that throws dice score, with 16 experts? (A number from 0 to 1.)

# %% tags=["hide-input"]
from dsmoe_lite.routing.specialization import shuffled, vocabulary_specialization

lab.ask("03-dice", low=0, high=1)
E = routings[0].n_experts
words = inputs.flatten()
draw = torch.Generator().manual_seed(seed)
rows = []
for number, routing in enumerate(routings):
    for least in (1, 10):

        def by_word(ids, least=least):
            return vocabulary_specialization(ids, words, E, min_count=least)

        first_choice = routing.topk_ids[:, :1]
        chance = shuffled(by_word, first_choice, draw)
        rows.append(
            {
                "what": f"layer {number}, {'all words' if least == 1 else 'frequent words'}",
                "value": by_word(first_choice),
                "null": chance.median(),
                "null_low": chance.min(),
                "null_high": chance.max(),
            }
        )
dice = rows[0]["null"].item()
lab.answer("03-dice", round(dice, 2), "and a router that looks scores 0.75", within=0.1)
charts.specialization_against_null(
    rows,
    value_title="share of a word's tokens with its favourite expert",
    title="Does the word decide more than chance would?",
    subtitle=[
        "Mark: the router. Bar: 20 shuffles of its choices over the tokens.",
        "Frequent words: seen at least 10 times.",
    ],
)

# %% tags=["trained", "hide-cell"]
claim("vocabulary specialization, first layer", rows[0]["value"], (0.68, 0.82))
claim("the null of it", rows[0]["null"], (0.42, 0.55))
claim("first layer, frequent tokens", rows[1]["value"], (0.52, 0.68))
claim("the null of that", rows[1]["null"], (0.12, 0.24))

# %% [markdown]
# 0.49, not 1/16. A word that is seen once has all of its tokens at one expert, whatever the router does, and most words
# are rare. So 0.75 alone proves nothing. Among frequent words the null falls to 0.18, and the router stays at 0.60: the word
# decides much. What comes before the word decides the rest.
#
# ## Is a busy expert an important one?
#
# So far we only looked. What does an expert *do*? Switch one off: its tokens take their next best expert, and the rise of
# the held-out loss is what the expert was worth. Do this for each of the 16 experts of both layers.
#
# **Ask.** Is the busiest expert of a layer also the one that the model needs most?

# %% tags=["hide-input"]
import torch.nn.functional as F

from dsmoe_lite.routing.interventions import switch_off
from dsmoe_lite.routing.metrics import load

lab.ask("03-busiest", "yes, in both layers", "in one of the two", "in neither")
targets = parts[0].tokens[:, 1:].flatten()


def losses_of(model):  # of each of the 4,096 tokens
    with torch.no_grad():
        logits = model(inputs).logits.flatten(0, 1)
    return F.cross_entropy(logits, targets, reduction="none")


whole = losses_of(model)
change = {  # (layer, expert): what each token's loss gains without it
    (at, e): losses_of(switch_off(model, {at: [e]})) - whole
    for at in range(len(routings))
    for e in range(E)
}
rise = {one: gained.mean().item() for one, gained in change.items()}
loads = [load(routing) for routing in routings]
agree = sum(
    int(loads[at].argmax()) == max(range(E), key=lambda e, at=at: rise[at, e])
    for at in range(2)
)
lab.answer(
    "03-busiest", ("in neither", "in one of the two", "yes, in both layers")[agree]
)
charts.expert_worth(
    [
        {
            "model": f"layer {at}",
            "expert": e,
            "counted": loads[at][e].item(),
            "worth": rise[at, e],
        }
        for at in range(2)
        for e in range(E)
    ]
)

# %% tags=["trained", "hide-cell"]
EXPECTED = {  # mean rise of one expert, rise without the busiest, correlation
    0: ((0.015, 0.08), (-0.01, 0.02), (-0.6, 0.4)),
    1: ((0.005, 0.04), (-0.01, 0.02), (-0.9, 0.0)),
}
for at, (of_one, of_busiest, related) in EXPECTED.items():
    rises = torch.tensor([rise[at, e] for e in range(E)])
    claim(f"layer {at}: mean rise without one expert", rises.mean(), of_one)
    claim(
        f"layer {at}: rise without the busiest", rises[loads[at].argmax()], of_busiest
    )
    r = torch.corrcoef(torch.stack((loads[at], rises)))[0, 1]
    claim(f"layer {at}: correlation of load and rise", r, related)
    report(
        **{
            f"layer_{at}": f"busiest e{loads[at].argmax()}, most missed e{rises.argmax()}"
        }
    )

# %% [markdown]
# No, in neither layer. The busiest expert, furthest right in each panel, can be switched off at almost no cost. Load
# says how much work an expert does, not what it is good for.
#
# What is the most important expert of layer 0, e4, good for? Take the six most important experts of the layer, and
# switch each of them off. After which token does the loss rise most?

# %% tags=["hide-input"]
V = tokenizer.get_vocab_size()
missed = []
for e in sorted(range(E), key=lambda e: -rise[layer, e])[:6]:
    by_token = torch.zeros(V).index_add(0, inputs.flatten(), change[layer, e])
    worst = int(by_token.argmax())
    share = by_token[worst] / change[layer, e].sum()
    name = tokenizer.decode([worst], skip_special_tokens=False).strip()
    missed.append((e, name, share.item()))
for e, name, share in missed:
    print(f"without e{e:<2}  {share:4.0%} of the rise comes right after  {name}")

# %% tags=["trained", "hide-cell"]
from dsmoe_lite.data.tokenizer import END_ID

most_missed = max(range(E), key=lambda e: rise[0, e])
here = inputs.flatten() == END_ID
name = f"e{most_missed}: share of its rise after <|end|>"
claim(
    name, change[0, most_missed][here].sum() / change[0, most_missed].sum(), (0.5, 0.8)
)
claim("share of <|end|> among all tokens", here.float().mean(), (0.01, 0.04))

# %% [markdown]
# Two thirds of e4's worth come right after `<|end|>`, where one document has ended and the next begins: 2% of the
# tokens. Half or more of the worth of e2 and of e14 comes after one relation each, *pet* and *song*, where a fact has
# to be recalled. The worth of e0 is spread over many tokens. An expert can earn its place on very few tokens, and no
# count of tokens shows it.
#
# See it for yourself. The question below is about a pet, and the model answers at the question mark. Click square 2 of
# layer 0 to switch e2 off: the pet is forgotten. Then ask for a song: that answer stays. (The model knows only its
# small world.)

# %% tags=["trained"]
from dsmoe_lite.routing.favourites import favourite_words
from dsmoe_lite.viz.explorer import explore

asked = {"pet": [], "song": []}
for question in world.questions("head"):
    asked.get(question.relation, []).append((question.prompt, question.answer))
questions = asked["pet"][1:4] + asked["song"][:3]
explore(
    {"GShard": model},
    tokenizer,
    questions[0][0],
    window=64,
    expert=2,
    questions=questions,
    likes={"GShard": favourite_words(model, tokenizer, inputs)},
)

# %% [markdown]
# ## Hybridity: one expert, many subjects
#
# Our world has five kinds of text: sentences about people, the same facts in a second language, sums, brackets and
# code. If experts divided the *subjects*, each would serve one of the five.
#
# Count how many kinds an expert serves with the **effective number**: the exponential of the entropy of its shares. It is 1 for a
# specialist and 5 for an expert that serves all five alike (every kind has the same weight, however common it is).
#
# **Ask.** How many kinds of text does the average expert of layer 0 serve? (A number from 1 to 5. If the kinds were
# shuffled over the tokens it would be 4.9.)

# %% tags=["hide-input"]
from statistics import mean

from dsmoe_lite.routing.specialization import specialization

lab.ask("03-kinds", low=1, high=5)
labels = parts[0].domains[:, :-1].flatten()
N_kinds = len(world.domains)


def mixes(routing, labels):  # each expert's mix of kinds, (kinds, E)
    p = specialization(routing.topk_ids, labels, N_kinds, E)
    return p / p.sum(dim=0, keepdim=True)


def kinds_of_an_expert(labels):
    of_each = torch.special.entr(mixes(routings[layer], labels)).sum(dim=0).exp()
    return of_each.mean().item()


lab.answer("03-kinds", round(kinds_of_an_expert(labels), 1), within=0.5)
SHOWN = ("people", "second language", "sums", "brackets", "code")
mix = mixes(routings[layer], labels)
mixed = labels[torch.randperm(len(labels), generator=draw)]
by_chance = kinds_of_an_expert(mixed)
charts.expert_mix(
    [
        {"expert": e, "kind": kind, "share": mix[k, e].item()}
        for e in range(E)
        for k, kind in enumerate(SHOWN)
    ],
    title=f"What does each expert of layer {layer} work on?",
    subtitle=[
        "Above each bar: the effective number of kinds. One would be a specialist.",
        f"Mean {kinds_of_an_expert(labels):.1f}; with the kinds shuffled over the tokens {by_chance:.1f}.",
    ],
)

# %% tags=["trained", "hide-cell"]
claim(
    "effective number of kinds that an expert serves",
    kinds_of_an_expert(labels),
    (3.0, 4.3),
)
report(with_kinds_shuffled=by_chance)

# %% [markdown]
# 3.7. Experts lean towards some kinds of text: e15 works on the two languages alone. But nearly all serve several kinds
# that have nothing in common. This is **hybridity**: with so few experts, each has to serve many kinds of text, so some
# of the weights that work on a token may be about something else. One remedy is to have more and smaller experts;
# chapter 04 cuts them.
#
# (Sharing an expert is not yet a proof that the subjects disturb each other. Chapter 08 switches experts off and looks at who
# suffers.)
#
# ## Redundancy: two experts, one answer
#
# Some knowledge is needed nearly everywhere. In our world it is grammar: after *has* comes a relation, after a value a
# comma or a full stop. If every expert has to know this, it is learnt many times over.
#
# To see it, compare what the two experts of a token *write*. Their outputs are vectors, and the cosine between them is 1 if they
# say the same, 0 if they have nothing in common:
#
# $$
# o_t = \cos\bigl(\operatorname{FFN}_i(\mathbf{u}_t),\, \operatorname{FFN}_j(\mathbf{u}_t)\bigr), \qquad
# i, j \text{ the best two experts of token } t
# $$ (eq:overlap)
#
# **Build** it for one token, and prove it equal to the package's.


# %%
from torch.testing import assert_close

from dsmoe_lite.routing.overlap import output_overlap

seen = []  # the input of the layer at token 9
moe_layer = model.moe_layers[layer]
hook = moe_layer.register_forward_pre_hook(lambda _, given: seen.append(given[0][0, 9]))
package = output_overlap(model, inputs)
hook.remove()
(u,), experts = seen, moe_layer.experts
i, j = routings[layer].topk_ids[9].tolist()


def output(e):
    hidden = F.silu(experts.gate[e] @ u) * (experts.up[e] @ u)
    return experts.down[e] @ hidden


assert_close(torch.cosine_similarity(output(i), output(j), dim=0), package[layer][9])
token = tokenizer.decode([inputs[0, 9].item()])
print(f"e{i} and e{j} at {token!r}: {package[layer][9]:.2f}")

# %% [markdown]
# Now group all tokens by **what comes next**. In sentences about people that is a function word, punctuation, a name, a
# relation or a value; the value is the fact itself, true of this person alone. In all other texts, group by the kind of
# text.
#
# **Ask.** Where do the two experts of a token agree most?

# %% tags=["hide-input"]
from dsmoe_lite.data.word_kinds import KINDS, by_kind

lab.ask("03-overlap", "before a value", "before punctuation", "everywhere alike")


def overlap_by_kind(model):
    """Rows {kind, effect, value, part} of the mean overlap, and the mean of each layer."""
    rows, overall = [], {}
    for number, part in enumerate(parts):
        due = by_kind(part, world, tokenizer).domains[:, 1:].flatten()
        for at, overlap in enumerate(output_overlap(model, part.tokens[:, :-1])):
            effect = f"layer {at}"
            overall.setdefault(effect, []).append(overlap.mean().item())
            rows += [
                {
                    "kind": kind,
                    "effect": effect,
                    "value": overlap[due == k].mean().item(),
                    "part": number,
                }
                for k, kind in enumerate(KINDS)
                if (due == k).sum() > 50
            ]
    return rows, {effect: mean(values) for effect, values in overall.items()}


rows, overall = overlap_by_kind(model)


def overlap_before(kind):
    return mean(row["value"] for row in rows if row["kind"] == kind)


kinds = sorted({row["kind"] for row in rows}, key=lambda kind: -overlap_before(kind))
lab.answer("03-overlap", "before punctuation" if kinds[0] == "punctuation" else "")
charts.effects_by_kind(
    sorted(rows, key=lambda row: kinds.index(row["kind"])),
    overall=overall,
    kinds_are="kinds of token due next",
    number=".2f",
    one_scale=True,
    title="Where do the two experts of a token write the same?",
    subtitle="Cosine of their outputs, by what is due next. Dashed: all tokens. Untrained experts: 0.0.",
)

# %% tags=["trained", "hide-cell"]
torch.manual_seed(seed)
_, untrained = overlap_by_kind(without_capacity(Transformer(model.config)))
claim("overlap before punctuation", overlap_before("punctuation"), (0.55, 0.75))
claim("overlap before a value", overlap_before("value"), (0.05, 0.25))
for effect, value in untrained.items():
    claim(f"untrained experts, {effect}", value, (-0.05, 0.05))

# %% [markdown]
# Before punctuation: the cosine is 0.66 in layer 0 and 0.65 in layer 1. Before a value it is 0.17 and 0.10. Where
# common knowledge is due the two experts write much the same; where a fact is due they write different things. Experts
# that have not been trained have a cosine of 0, so training made them alike. This is **redundancy**. The remedy is to
# give common knowledge an expert of its own, which every token visits: chapter 05.
#
# Is this a property of one model? Chapter 07 trained five more GShard models, with other sizes, on a larger world of the
# same grammar:

# %% tags=["hide-input"]
from dsmoe_lite.study.protocol import CPU

other_world = World(CPU.corpus.world)
before = {"punctuation": [], "value": []}
for run in range(5):
    path = DATA / "models" / f"paper-gshard-seed{run}.safetensors"
    other_tokenizer = read_tokenizer(read_metadata(path)["tokenizer"])
    (part,) = heldout_batches(other_world, other_tokenizer, 64, 64, 1)
    due = by_kind(part, other_world, other_tokenizer).domains[:, 1:].flatten()
    overlaps = output_overlap(load_model(path), part.tokens[:, :-1])
    for kind, found in before.items():
        found.append(mean(o[due == KINDS.index(kind)].mean().item() for o in overlaps))
charts.model_comparison(
    [
        {"model": f"before {kind}", "metric": "cosine", "seed": run, "value": value}
        for kind, found in before.items()
        for run, value in enumerate(found)
    ],
    title="Do the two experts agree more before punctuation in five other models?",
    subtitle="Ring: one model. Dot and bar: mean and its 95% interval.",
)

# %% tags=["trained", "hide-cell"]
gaps = [one - other for one, other in zip(*before.values(), strict=True)]
claim("overlap before punctuation minus before a value, least", min(gaps), (0.0, 0.3))
claim("overlap before punctuation minus before a value, mean", mean(gaps), (0.1, 0.3))

# %% [markdown]
# All five agree in direction, but the difference is smaller than in our model, and in one of them it is only 0.04.
#
# ## Exercises
#
# **1. A bug from the wild** (10 minutes). Short texts of a batch are filled up with a padding token. Several libraries counted
# these tokens like any others when they measured the load of experts and their balance. All padding goes to the same experts,
# and they look overloaded. Fix it: return each expert's share of the choices of real tokens.


# %%
def padded_load(topk_ids, is_padding, n_experts):  # as it was: do not use
    return torch.bincount(topk_ids.flatten(), minlength=n_experts) / topk_ids.numel()


def mended_load(topk_ids, is_padding, n_experts):  # (T, K), (T,) of bool, E
    return None  # (E,), sums to 1


# %% tags=["hide-input"]
def padding_does_not_count(mended_load):
    ids = torch.tensor([[0, 1], [2, 1], [3, 0], [3, 0], [3, 0]])
    padding = torch.tensor([False, False, False, True, True])
    cases = [(ids, padding, 5), (ids, torch.zeros(5, dtype=torch.bool), 4)]
    draw = torch.Generator().manual_seed(0)
    for T in range(5, 20):
        ids = torch.rand(T, 9, generator=draw).topk(1 + T % 4).indices
        cases.append((ids, torch.randperm(T, generator=draw) >= T * 2 // 3, 9))
    for ids, padding, E in cases:
        got = mended_load(ids.clone(), padding.clone(), E)
        assert len(got) == E, f"a share for each of {E} experts, not {len(got)}"
        got = torch.as_tensor(got).float()
        real = ids[~padding].flatten().tolist()
        right = torch.tensor([real.count(e) / len(real) for e in range(E)])
        e = int((got - right).abs().argmax())
        assert torch.allclose(got, right), (
            f"{len(ids)} tokens, of them {int(padding.sum())} padding: the share of"
            f" expert {e} is too {'high' if got[e] > right[e] else 'low'}"
        )


verdict = check_exercise(mended_load, padding_does_not_count)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def mended_load(topk_ids, is_padding, n_experts):
#     real = topk_ids[~is_padding].flatten()
#     return torch.bincount(real, minlength=n_experts) / len(real)
# ```
#
# The case is recorded, with its sources, as `padding-counted` in `data/published.json`.
# </details>
#
# **2. The favourite expert** (10 minutes). Write the measure of the first section: the mean, over all words that occur at
# least `least` times, of the share of a word's tokens whose first choice is its favourite expert.


# %%
def favourite_share(words, first, least):  # lists of T words and T experts, int
    return None  # a number from 0 to 1


# %% tags=["hide-input"]
def is_vocabulary_specialization(favourite_share):
    letters, experts = ["a", "b", "a", "a", "c", "b"], [1, 2, 1, 0, 3, 3]
    cases = [(letters, experts, least) for least in (1, 2)]
    draw = torch.Generator().manual_seed(0)
    for least in (1, 2, 3, 5, 8) * 6:
        some = torch.randint(0, 20, (2, 25 * least), generator=draw)
        cases.append((*some.tolist(), least))
    for read, experts, least in cases:
        got = float(favourite_share(read, experts, least))
        ids = torch.tensor([sorted(set(read)).index(word) for word in read])
        chosen = torch.tensor(experts)[:, None]
        right = vocabulary_specialization(chosen, ids, 20, min_count=least)
        what = (
            f"words {letters}, experts {experts}" if read is letters else "random words"
        )
        assert abs(got - right) < 1e-6, (
            f"{what}, least = {least}: {got:.3f} is too"
            f" {'high' if got > right else 'low'} for a mean over words"
        )


verdict = check_exercise(favourite_share, is_vocabulary_specialization)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# from collections import Counter, defaultdict
#
# def favourite_share(words, first, least):
#     chosen = defaultdict(Counter)
#     for word, expert in zip(words, first, strict=True):
#         chosen[word][expert] += 1
#     shares = [max(c.values()) / c.total() for c in chosen.values() if c.total() >= least]
#     return sum(shares) / len(shares)
# ```
# </details>
#
# **3. With a shared expert** (5 minutes). The model of chapter 05 has an expert that every token visits. Where do the
# two best *routed* experts of a token agree in it? Run `overlap_by_kind(load_model(DATA / "models" /
# "world-deepseekmoe.safetensors"))`, the function of the folded cell above, and compare punctuation with the chart.
# Then run this chapter for the second layer: `dsmoe run 03 -p layer=1`.
#
# ## Recap

# %% tags=["hide-input"]
lab.score()

# %% [markdown]
# 1. Experts divide words more than chance would: a frequent word keeps 60% of its tokens at one expert, against 18%.
#    Without its null such a number says nothing.
# 2. A busy expert need not be an important one. Switch it off to find out; its worth may lie on 2% of the tokens.
# 3. **Hybridity**: an expert serves 3.7 of five kinds of text; by chance it would be 4.9.
# 4. **Redundancy**: before punctuation the two experts of a token write more alike than before a fact: cosines of 0.66
#    and 0.17 in this model, 0.33 and 0.15 on average in five others.
#
# DeepSeekMoE blames both faults on few, large experts that share nothing. **Chapter 04** starts with the first: cut the
# experts finer.
