# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Start here
#
# ![From a dense FFN, to GShard's top-2 experts, to DeepSeekMoE's many narrow experts with one shared expert.](images/overview.svg)
#
# **Which part of a language model works on which word?** In most models the answer is dull: all of it, on every word. A
# *mixture of experts* (MoE) is different. It holds many small networks, its **experts**, and for every token a
# **router** picks a few of them. Below you will see a trained model with sixteen experts per layer route your own
# sentence. A word goes to its usual expert in 63% of all cases, three times as often as by chance, but not always:
# context decides too.
#
# Many of today's large open models are built this way. DeepSeekMoE {cite:p}`DeepSeekMoE2024` is the design behind DeepSeek-V2
# {cite:p}`DeepSeekV2` and DeepSeek-V3 {cite:p}`DeepSeekV3`, and this course builds it step by step, on your machine, in code
# that you can read.
#
# **Afterwards you can** read a routing picture, tell a real pattern from chance, and choose your way through the
# course. **Reading time** 9 minutes. **Hardware** any laptop.

# %% tags=["parameters"]
profile: str = "cpu"  # size of the run: smoke | cpu | gpu
seed: int = 0  # seed of shuffles: 0..2147483647
sentence: str = "Which tool does Ridi Lava have? muda. Which pet does Ridi Lava have?"  # text: 1..400

# %% tags=["hide-input"]
try:
    from dsmoe_lite.labs import begin, check_exercise, claim
except ModuleNotFoundError:
    raise SystemExit("dsmoe_lite is missing: run make setup, then make lab") from None

lab = begin(globals())

# %% [markdown]
# ## Your sentence finds its experts
#
# The course ships a small model of the design that chapter 02 builds, GShard: two layers with sixteen experts each, of
# which a token uses two. It was trained on a made-up world of people and what they own, so its questions sound odd:
# *Which tool does Ridi Lava have?*

# %% tags=["hide-input"]
from dsmoe_lite import RoutingTrace, load_model
from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.data.batches import heldout_batches
from dsmoe_lite.data.tokenizer import read_tokenizer
from dsmoe_lite.data.world import World
from dsmoe_lite.routing.favourites import favourite_words
from dsmoe_lite.routing.interventions import without_capacity
from dsmoe_lite.viz import charts
from dsmoe_lite.viz.explorer import explore

checkpoint = DATA / "models" / "world-gshard.safetensors"
model = load_model(checkpoint).to(lab.device)
tokenizer = read_tokenizer(read_metadata(checkpoint)["tokenizer"])
LENGTH = 64  # tokens: the model was trained on sequences of this length
asked = World().questions("head")
asked.sort(key=lambda one: "Ridi Lava" not in one.prompt)
questions = [(one.prompt, one.answer) for one in asked[:6]]
held_out = heldout_batches(World(), tokenizer, 64, 64, 1)[0].tokens[:, :-1]
likes = {"GShard": favourite_words(without_capacity(model), tokenizer, held_out)}

# %% tags=["trained"]
explore(
    {"GShard": without_capacity(model)},
    tokenizer,
    sentence,
    window=LENGTH,
    expert=2,
    questions=questions,
    likes=likes,
)

# %% [markdown]
# This is the **routing explorer**. Under the buttons is the model's answer: Ridi Lava's pet is *matu*, as the tick
# says. Each square is an expert, and the two filled ones per layer gave this answer. The fill is the expert's **gate**,
# its share in the layer's output; the bar below is its **load**, how many tokens of this text it gets. (Layers and
# experts count from 0.) **Click square 2 of layer 0** to switch that expert off: the router now chooses among the rest,
# and the pet is forgotten. The thin mark stays where the answer was with all experts. A second click switches it on
# again.
#
# - Point at a square to see which tokens it works on here, and which words it likes: e2 of layer 0 gets every *have*,
#   but only 10% of all tokens. Click a token to follow its path through both layers.
# - Ask another question with one of the buttons on top, or type a sentence of this world and press *Read this text*.
# - *Break what this answer needs most* finds the expert that matters, *Same word, other experts* a word that is sent
#   elsewhere the second time. *Let it write* shows the experts of each new token. *All experts on* repairs everything,
#   and *Copy link* keeps what you found.
#
# (In the book this page runs the model itself; it needs no Python. The model knows only its small world: English is noise
# to it.)
#
# **Ask.** A question comes twice, about a tool and about a pet. Five tokens occur in both: *does*, *Ridi*, *Lava*,
# *have* and the question mark. In layer 0, how many of the five go to the same two experts both times? (0 to 5.)

# %% tags=["hide-input"]
lab.ask("00-same-word", low=0, high=5)
trace = RoutingTrace.of(model, tokenizer, sentence, window=LENGTH)
experts = [set(ids) for ids in trace.layer(0).topk_ids.tolist()]
twice = {
    token: [i for i, other in enumerate(trace.tokens) if other == token]
    for token in trace.tokens
}
for token, places in twice.items():
    if len(places) > 1:
        first, last = (
            ", ".join(f"e{e}" for e in sorted(experts[i]))
            for i in (places[0], places[-1])
        )
        print(
            f"{token.strip():8}{first:9} then {last:9}{'same' if first == last else 'other'}"
        )
same = sum(
    experts[places[0]] == experts[places[-1]]
    for places in twice.values()
    if len(places) > 1
)
lab.answer("00-same-word", same)

# %% [markdown]
# Four of the five. So a word seems to have its own experts. The exception is the question mark: it goes to e0 and e6
# where a tool must follow, and to e1 and e2 where a pet must. There the model has to produce the answer, and **the same
# token gets different experts when different knowledge is needed**. Nobody programmed that. It came from training.
#
# ## Is that more than chance?
#
# Do words really have their own experts? One sentence proves nothing. Take 4,096 tokens of text that the model never
# saw in training. For every word, look up the expert that it gets most often as its first choice. What share of all
# tokens gets the favourite expert of their word?
#
# Here chance needs care. A word that occurs once always gets its favourite expert, whatever the router does. So shuffle
# the experts over the tokens and count again: that is what chance would give.
#
# **Ask.** With shuffled experts, 0.2 of the tokens get the favourite expert of their word. What share do with the
# trained router? (A number from 0 to 1.)

# %% tags=["hide-input"]
import torch

words = held_out.flatten()
with torch.no_grad():
    routings = model(held_out.to(lab.device)).routings
chosen = [
    routing.topk_ids[:, 0].cpu() for routing in routings
]  # first choices, by layer


# %%
def follows_its_word(experts):
    """The share of tokens that get the expert which their word gets most often."""
    met = torch.zeros(
        model.config.vocab_size, 16
    )  # how often each word met each expert
    met.index_put_((words, experts), torch.ones(len(words)), accumulate=True)
    return (met.max(dim=1).values.sum() / len(words)).item()


# %% tags=["trained", "hide-input"]
lab.ask("00-follows", low=0, high=1)
draw = torch.Generator().manual_seed(seed)
shuffled = [
    sorted(
        follows_its_word(e[torch.randperm(len(e), generator=draw)]) for _ in range(20)
    )
    for e in chosen
]
observed = [follows_its_word(e) for e in chosen]
rows = [
    {
        "what": f"layer {i}",
        "value": observed[i],
        "null": s[10],
        "null_low": s[0],
        "null_high": s[-1],
    }
    for i, s in enumerate(shuffled)
]
lab.answer("00-follows", sum(observed) / 2, within=0.1)
charts.specialization_against_null(
    rows,
    value_title="share of tokens that get their word's favourite expert",
    title="Does the word decide?",
    subtitle="Mark: the router. Bar: 20 shuffles of its choices over the tokens.",
)

# %% tags=["trained", "hide-cell"]
claim("layer 0, the word decides", observed[0], (0.55, 0.75))
claim("layer 1, the word decides", observed[1], (0.5, 0.75))
claim("by chance, the larger of the two", max(s[-1] for s in shuffled), (0.1, 0.3))

# %% [markdown]
# 0.63, three times as often as by chance. So the word decides much, and context decides the rest, as at the question
# mark. Keep the habit: in this course **every such number is shown beside what chance would give**.
#
# ## What the model has read
#
# The world is generated, so every fact in it is known, and so is the kind of every text. One sample of each kind:

# %% tags=["hide-input"]
SHOWN = {
    "facts": "who owns what",
    "parallel": "the same in a second language",
    "arithmetic": "sums",
    "brackets": "brackets that close in order",
    "code": "small programs",
}
samples = {}
for document in World().documents("heldout"):
    samples.setdefault(document.domain, document.text.replace("\n", " ⏎ "))
    if len(samples) == len(SHOWN):
        break
for domain, words_shown in SHOWN.items():
    print(f"{words_shown}:\n    {samples[domain][:76]} ...")

# %% [markdown]
# ## Do experts remember more?
#
# Some facts are stated in the training text but never asked about there. After training we ask about them, in the form
# of the questions that the model has read: that tests memory. **Recall** is the share of right answers. The hardest
# test is about people who are rarely mentioned.
#
# **Ask.** A *dense* model, in which every token uses all weights, recalls 0.30 of these facts. The model with experts
# costs as much per token as a dense model whose memory, its feed-forward network (FFN), is twice as wide, but stores
# eight times that model's FFN weights. What does it recall? (A number from 0 to 1.)

# %% tags=["hide-input"]
from dsmoe_lite.study.grids import records
from dsmoe_lite.study.rows import metric_rows

lab.ask("00-recall", low=0, high=1)
NAMES = {
    "course-dense": "dense",
    "course-dense-x2": "dense, 2x wide",
    "course-gshard": "16 experts (GShard)",
}
recalled = [
    row
    for row in metric_rows(records("neighbours"), NAMES)
    if row["metric"] == "recall, rare people"
]
of_experts = [
    row["value"] for row in recalled if row["model"] == NAMES["course-gshard"]
]
lab.answer("00-recall", sum(of_experts) / len(of_experts), within=0.1)
charts.model_comparison(
    recalled,
    title="Who remembers people that are rarely mentioned?",
    subtitle="Ring: one of five training runs. Dot and bar: mean and its 95% interval.",
)

# %% [markdown]
# 0.93. The experts remember what the dense models forget, for the work of the wider one. That is why this course exists:
# **experts store knowledge that a token does not have to pay for.** How they do it, what each of them holds, whether it is
# better to have more and smaller ones, and what it costs, are the questions of the chapters.
#
# ## The map
#
# | chapter | its question | minutes |
# |---|---|---:|
# | 00 Start here | which part of a model works on which word? | 9 |
# | 01 The dense Transformer and its FFN | why is it the FFN that becomes experts? | 16 |
# | 02 GShard: two experts for each token | how does one train a model that picks its own parts? | 18 |
# | 03 Who goes where? | what do experts divide among themselves? | 11 |
# | 04 Fine-grained experts | are many small experts better than few large ones? | 14 |
# | 05 Shared experts | what should every token get? | 17 |
# | 06 Balance | what keeps all experts at work? | 16 |
# | 07 The paper's experiments | which of the paper's findings hold at our size? | 20 |
# | 08 What experts learn | what is lost without each expert? | 45 |
# | 09 Latent attention | what must attention remember? | 43 |
# | 10 Kernels | how does a GPU compute a layer of experts? | 49 |
# | 11 Devices | how far must a token travel? | 13 |
# | 12 Many devices | how do many devices share one layer? | 40 |
# | 13 MTP and FP8 | how can a model get more from every pass? | 15 |
# | 14 The router after V2 | why did DeepSeek rebuild its router twice? | 15 |
#
# The minutes cover text, charts and visible code, not the exercises. In a hurry? 00 to 05 and 07 make a course of their
# own.
#
# ## How a chapter works
#
# - **Words and letters** are explained on the page *Words and letters* of the book (`pages/glossary.md`); there, each
#   word links to it at its first use.
# - **Ask**: make a guess before the answer is shown. In JupyterLab you enter it with buttons, and the end of the
#   chapter scores it.
# - **Build**: each idea is built in a few lines, then proved equal to the package `dsmoe_lite`, which is used from then
#   on.
# - **Fold**: set-up, plotting and checks are folded away. Open a folded cell at its left edge; in the book, with *Show
#   the code*.
# - **Change**: the first code cell holds the chapter's parameters and their ranges. Change one and run the chapter
#   again. Or run it in a cell of its own: `!dsmoe run 01 -p ffn_width=32`.
#
# What does your machine have? In JupyterLab the next cell tells you; the book shows the machine on which it was made.
# The course needs torch; the rest serves single chapters:

# %% tags=["measured", "hide-input"]
from dsmoe_lite.common import machine

for part in machine.parts():
    print(f"{part.name:16} {part.found or 'not here: ' + part.remedy}")
print(f"{'profile to use':16} {machine.profile()}")

# %% [markdown]
# ## An exercise to warm up
#
# **How many ways?** A token picks 2 of 16 experts. How many different pairs are there? DeepSeekMoE cuts each expert into
# four and picks 8 of 64: how many choices then? Return both numbers.


# %%
def ways():
    return None  # (2 of 16, 8 of 64)


# %% tags=["hide-input"]
def ways_are_right(ways):
    from dsmoe_lite.study import published

    right = {
        (row["n"], row["k"]): row["value"] for row in published.load()["combinations"]
    }
    small, large = ways()
    assert small == right[16, 2], (
        f"2 of 16: order does not matter, and no expert is taken twice; {small!r} is not it"
    )
    assert large == right[64, 8], f"8 of 64: {large!r} is not it"


verdict = check_exercise(ways, ways_are_right)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def ways():
#     from math import comb
#     return comb(16, 2), comb(64, 8)
# ```
#
# The check compares with Section 3.1 of the paper. From 120 choices to over four billion, at the same number of weights
# used: that is the first idea of DeepSeekMoE, and the subject of chapter 04.
# </details>
#
# ## Recap

# %% tags=["hide-input"]
lab.score()

# %% [markdown]
# 1. A mixture of experts stores many small networks and uses a few of them for each token.
# 2. A router picks them, token by token and layer by layer. Word and context both decide.
# 3. A number means little without what chance would give.
# 4. Experts remember what a dense model of the same work forgets.
#
# Experts take the place of one part of a Transformer, its feed-forward network. Why this part and no other? **Chapter 01**
# builds it and looks.
