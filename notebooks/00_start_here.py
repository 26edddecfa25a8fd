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
# Many large language models store far more than they use: for each token, a **router** picks a few **experts**, small
# feed-forward networks (FFNs), and leaves the rest idle. DeepSeekMoE {cite:p}`DeepSeekMoE2024` is the design behind DeepSeek-V2 {cite:p}`DeepSeekV2` and V3
# {cite:p}`DeepSeekV3`. This course builds it step by
# step, on your machine, in code you can read; every piece is proved equal to the package that the chapters share, and
# every experiment is one you can run again.
#
# **In this chapter** you check your machine, meet a trained model of sixteen experts, and watch it send the tokens of
# your own sentence to them. **Reading time** 10 minutes. **Hardware** any laptop CPU.

# %% tags=["parameters"]
profile: str = "cpu"  # size of the run: smoke | cpu | gpu
seed: int = 0  # seed of what the model makes up: 0..2147483647
sentence: str = "Which tool does Ridi Lava have? 12+30=42. def f(x, y):"  # text: 1..400
temperature: float = 0.7  # how freely the model speaks: 0.0..2.0

# %% tags=["hide-input"]
try:
    from dsmoe_lite.labs import begin, check_exercise, claim, predict, report
except ModuleNotFoundError:
    raise SystemExit("dsmoe_lite is missing: run make setup, then make lab") from None

lab = begin(globals())

# %% [markdown]
# ## The map
#
# | chapter | what it builds | the question it leaves |
# |---|---|---|
# | 00 Start here | nothing yet: look | do experts mean something? |
# | 01 The dense Transformer and its FFN | attention, SwiGLU, a block | why pay for all weights at every token? |
# | 02 GShard: two experts for each token | router, experts, capacity, balance | are sixteen experts too few? |
# | 03 Fine-grained experts | many narrow experts | what do they all have to know? |
# | 04 Shared experts | experts that are always on | how are they kept busy? |
# | 05 Balance | losses, and balance without a loss | what does attention keep? |
# | 06 Latent attention | MLA and its cache | does all this help? |
# | 07 The paper's experiments | Tables 1 and 2, Figures 3 to 6, with ten seeds | and what is in the experts? |
# | 08 What experts learn | who uses which, and what is lost without them | how does a GPU run this? |
# | 10 Kernels | the layer in CUDA C++, run on your CPU | how do many devices share it? |
# | 11 Many devices | experts on several processes, equal to one | what did V3 add? |
#
# ## How a chapter works
#
# A chapter runs from top to bottom. Each idea goes through the same steps: you **predict** something; the paper's
# **equation** stands beside its source; you **build** the smallest code that does it; you **prove** it equal to the
# package; from then on the package's own is used; and you **look** at what it does. The cell above that begins with `profile` holds
# the chapter's parameters and their ranges; a value outside is refused in one line. To predict, write your guess in place
# of `None`; it is kept in `work/predictions.json`, never in the notebook.
#
# Some exercises give a command, such as `dsmoe run 01 -p ffn_width=32`. Run it in a cell of its own, with `!` before it, or in
# a terminal in the course's folder: there `.venv/bin/dsmoe` is its full name, if `dsmoe` alone is not found.
#
# ## Your machine

# %% tags=["measured"]
from dsmoe_lite.common import machine

for part in machine.parts():
    print(f"{part.name:16} {part.found or 'not here: ' + part.remedy}")
print(f"{'profile to use':16} {machine.profile()}")

# %% [markdown]
# Nothing is missing if torch and the course packages are there; the rest serves single chapters.
#
# ## A model with experts
#
# The course ships a small GShard model, the design of chapter 02: two layers, in each of them sixteen FFNs, of which a
# token uses two. It learnt the made-up world of chapter 01: people and what they have, told in two languages, with
# sums, brackets and code beside.

# %%
from dsmoe_lite import RoutingTrace, accounting, load_model
from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.data.tokenizer import read_tokenizer
from dsmoe_lite.viz import charts

checkpoint = DATA / "models" / "world-gshard.safetensors"
model = load_model(checkpoint).to(lab.device)
tokenizer = read_tokenizer(read_metadata(checkpoint)["tokenizer"])
count = accounting.parameters(model.config)
print(
    f"{count.total:,} weights stored, {count.active_all:,} of them used by any one token"
)

# %% [markdown]
# **Ask.** Does the model know its world? Here are questions about people who are often written about, questions that its
# training text never asked. How many of them does it answer rightly?

# %%
from dsmoe_lite.data.world import World

predict("00-recall", None)  # your guess, 0 to 1

questions = World().questions("head")
print(len(questions), "questions, such as:", questions[0].prompt)
print("right answer:", questions[0].answer)

# %% tags=["trained"]
import torch

from dsmoe_lite.evaluate import recall
from dsmoe_lite.generate import generate

prompt = torch.tensor([tokenizer.encode(questions[0].prompt).ids], device=lab.device)
n_answer = len(tokenizer.encode(questions[0].answer).ids)
(answer,) = generate(model, prompt, n_answer)  # for each prompt the ids that follow
report(the_model_says=tokenizer.decode(answer))
claim(
    "share of these questions answered rightly",
    recall(model, tokenizer, questions)["head"],
    (0.95, 1.0),
)

# %% [markdown]
# Left to itself it writes more text like its training text, more freely at a higher `temperature`:

# %% tags=["trained"]
start = "The home of"
chance = torch.Generator(device=lab.device).manual_seed(seed)
start_ids = tokenizer.encode(start).ids
(spoken,) = generate(model, [start_ids], 48, temperature=temperature, generator=chance)
report(the_model_goes_on=start + tokenizer.decode(spoken))

# %% [markdown]
# ## Which expert handles each token?
#
# **Ask.** Look at the default sentence: a question, a sum, a line of code. The token 2 stands in it twice. Will the same token
# always go to the same experts?

# %%
predict("00-same-word", None)  # "always", "mostly" or "no"

LENGTH = 64  # tokens: the model was trained on sequences of this length
trace = RoutingTrace.of(model, tokenizer, sentence, window=LENGTH)
print(
    f"{len(trace.tokens)} tokens, {trace.n_layers} layers of experts, {trace.top_k} experts for each token"
)

# %% tags=["trained"]
from dsmoe_lite.viz.explorer import explore

explore({"GShard": model}, tokenizer, sentence, window=LENGTH, layer=1)

# %% [markdown]
# This is the **routing explorer**. One expert is in focus; the tokens that it gets are underlined, and the deeper their
# fill, the larger its gate (its weight in the sum). Struck out: the expert had no room left. Click another expert, step
# to the other layer, or click a token to see its two experts in every layer; arrow keys do the same. Layers count from 0.
#
# When this chapter runs, the explorer does more. Type a sentence of your own and press *Route this text*. Or switch the
# expert in focus off: which tokens does the model now predict worse? (The *loss* of a token is large where the model did
# not expect it.)
#
# One sentence can mislead. Over thousands of tokens of text that the model was not trained on: how often does a token
# get, as its first choice, the expert that its word gets most often?

# %%
from dsmoe_lite.data.batches import heldout_batches

held_out = heldout_batches(World(), tokenizer, 64, 64, 1)[0].tokens[:, :-1]
words = held_out.flatten()
with torch.no_grad():
    choices = [
        routing.topk_ids[:, 0].cpu()
        for routing in model(held_out.to(lab.device)).routings
    ]


def follows_the_word(experts):
    table = torch.zeros(model.config.vocab_size, model.config.moe.n_routed_experts)
    table.index_put_(
        (words, experts), torch.ones(len(words)), accumulate=True
    )  # how often each word met each expert
    return (table.max(dim=1).values.sum() / len(words)).item()


# %% tags=["trained"]
for layer, experts in enumerate(choices):
    shuffled = experts[
        torch.randperm(len(experts), generator=torch.Generator().manual_seed(0))
    ]
    report(
        layer=layer,
        follows_the_word=follows_the_word(experts),
        by_chance=follows_the_word(shuffled),
    )

# %% [markdown]
# **What to notice.** *By chance* is the same count after the experts were shuffled over the tokens: a rare word follows
# its one expert whatever happens, so chance is far above 1/16, and a number without it says nothing. In both layers the
# word decides far more often than chance would have it, and far from always: context matters too. Nobody asked the
# router for either; it came from training.
#
# Do all experts get work? Over your sentence:

# %% tags=["trained"]
from dsmoe_lite.routing.metrics import load

charts.expert_load(
    load(trace.layer(trace.n_layers - 1)).tolist(),
    title="How much does each expert get? (your sentence, last layer)",
)

# %% [markdown]
# A sentence is a small sample, so bars are uneven here even for a balanced router. Chapter 02 counts over thousands of
# tokens.
#
# ## An exercise to warm up
#
# **How many ways?** A token takes 2 of 16 experts. In how many ways can it? DeepSeekMoE cuts each expert into four and
# takes 8 of 64: in how many ways then? Return both numbers.


# %%
def ways():
    return None  # (2 of 16, 8 of 64)


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
# The check compares with what the paper prints in its Section 3.1. From 120 combinations to over four billion, at the
# same number of weights used: that is the first idea of DeepSeekMoE, and chapter 03's.
# </details>
#
# ## Recap
#
# 1. A mixture of experts stores many FFNs and uses few of them for each token.
# 2. A router decides, token by token and layer by layer.
# 3. Chapters predict, build, prove, use and look; their knobs are checked.
# 4. What experts stand for is an open question; this course measures before it says.
# 5. Next: **chapter 01**, the dense Transformer that all of this starts from.
