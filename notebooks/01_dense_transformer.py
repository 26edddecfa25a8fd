# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The dense Transformer and its FFN
#
# ![One Transformer block: the token passes RMSNorm and attention, is added back, then passes RMSNorm and the feed-forward network, and is added back again.](images/block.svg)
#
# **A Transformer block has two parts, attention and a feed-forward network (FFN). Why is it the FFN that becomes
# experts?** Because it treats each token alone: different tokens can use different FFNs, and nothing else has to
# change. And because it pays: in the small dense model of the DeepSeekMoE paper the FFN holds 60% of the weights and
# does half of the work.
#
# This chapter builds the block, its loss and its training, small enough to read in one sitting, and shows all three:
# that the FFN treats each token alone, how many weights it holds, and how much work it does.
#
# **Afterwards you can** write a Transformer block from its equations, say where its weights and FLOPs are, and train it.
# **You need** PyTorch, and chapter 00. **Reading time** 16 minutes. **Hardware** any laptop CPU.

# %% tags=["parameters"]
profile: str = "cpu"  # size of the run: smoke | cpu | gpu
seed: int = 0  # seed of weights: 0..2147483647
ffn_width: int = 128  # hidden width of the FFN you train: 8..1024
learning_rate: float = 0.003  # peak learning rate: 0.0001..0.03

# %% tags=["hide-input"]
try:
    from dsmoe_lite.labs import begin, check_exercise, claim, report
except ModuleNotFoundError:
    raise SystemExit("dsmoe_lite is missing: run make setup, then make lab") from None

import torch

from dsmoe_lite.viz import charts

lab = begin(globals())
steps = lab.choose(smoke=30, cpu=1000, gpu=4000)

# %% [markdown]
# ## From text to tokens
#
# Real text needs far more training than a laptop can do in a minute. This course trains on the small made-up world of
# chapter 00. Its text becomes tokens by byte-level byte-pair encoding {cite:p}`BPE`: a frequent word is one token, a
# rare one several.

# %%
from dsmoe_lite.data.tokenizer import load_tokenizer
from dsmoe_lite.data.world import World

world = World()
tokenizer = load_tokenizer(world, 1024)
V = tokenizer.get_vocab_size()
question = world.questions("head")[0]
pieces = tokenizer.encode(question.prompt + question.answer).tokens
print(f"{V} tokens in the vocabulary;", " ".join(pieces).replace("Ġ", "␣"))

# %% [markdown]
# Each token becomes a vector of $D$ numbers. From here on a text is a matrix $X$ of $S \times D$: one row per position.
#
# ## Attention: tokens look at each other
#
# To predict what follows *Which tool does Ridi Lava have?*, the question mark must know that a tool is asked for, and
# whose. Attention {cite:p}`Transformer2017` fetches that. Each token makes a query, a key and a value, three linear
# maps of its vector: $\mathbf{q} = W^Q\mathbf{x}$, $\mathbf{k} = W^K\mathbf{x}$, $\mathbf{v} = W^V\mathbf{x}$. It
# compares its query with the keys of all tokens up to itself, then averages their values by how well they match:
#
# $$
# \mathbf{o}_{t,i} = \sum_{j \le t} \operatorname{Softmax}_j\!\left(\frac{\mathbf{q}_{t,i}^\top \mathbf{k}_{j,i}}{\sqrt{d_h}}\right)\mathbf{v}_{j,i},
# \qquad \mathbf{a}_t = W^O\,[\mathbf{o}_{t,1};\dots;\mathbf{o}_{t,H}]
# $$ (eq:attention)
#
# Here $t$ and $j$ are positions, and $i$ is one of $H$ heads, each of width $d_h = D/H$.
#
# So far order enters only through $j \le t$: no token looks ahead. But what counts is how far apart two tokens are. So
# position enters by rotation {cite:p}`RoPE`: channels $c$ and $c + d_h/2$ of every query and key turn by the angle
# $t\,\theta^{-2c/d_h}$, with $\theta = 10\,000$. Move all tokens by ten places, and every product of a query and a key
# stays the same. Only distances count:


# %%
def rotate(x, start=0, theta=10_000.0):  # x (..., S, d)
    S, d = x.shape[-2:]
    position, channel = torch.arange(start, start + S), torch.arange(0, d, 2)
    angle = torch.outer(position.double(), theta ** (-channel.double() / d)).to(
        x.device
    )
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)  # (S, d / 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


q, k = torch.randn(2, 1, 6, 16, dtype=torch.float64)
change = rotate(q, 10) @ rotate(k, 10).mT - rotate(q) @ rotate(k).mT
assert change.abs().max() < 1e-12
print("moved by ten places, no product of a query and a key changes")

# %% [markdown]
# With that, {eq}`eq:attention` takes eight lines. We give ours the weights of the package's layer and compare: equal.


# %%
import math

from torch.testing import assert_close

from dsmoe_lite import preset
from dsmoe_lite.layers.attention import Attention
from dsmoe_lite.layers.rope import rope_tables


def attention(x, W_q, W_k, W_v, W_o, n_heads):  # x (B, S, D); every W (out, in)
    B, S, _ = x.shape
    q, k, v = (  # each (B, H, S, d_h)
        (x @ W.T).view(B, S, n_heads, -1).transpose(1, 2) for W in (W_q, W_k, W_v)
    )
    scores = rotate(q) @ rotate(k).mT / math.sqrt(q.shape[-1])  # (B, H, S, S)
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    o = scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ v
    return o.transpose(1, 2).reshape(B, S, -1) @ W_o.T


config = preset("course-dense")
D, n_heads = config.d_model, config.attention.n_heads
package = Attention(D, config.attention)
W_attention = [
    m.weight for m in (package.query, package.key, package.value, package.output)
]
x = torch.randn(2, 20, D)
tables = rope_tables(config.attention.head_dim, 20)
assert_close(
    attention(x, *W_attention, n_heads), package(x, *tables), atol=1e-5, rtol=1e-5
)
print("attention: equal to the package's")

# %% [markdown]
# ## The FFN: each token alone
#
# $$
# \operatorname{FFN}(\mathbf{x}) = W_{down}\,\bigl(\operatorname{silu}(W_{gate}\,\mathbf{x}) \odot W_{up}\,\mathbf{x}\bigr)
# $$ (eq:swiglu)
#
# This is the SwiGLU form {cite:p}`SwiGLU`: $\odot$ multiplies channel by channel, and
# $\operatorname{silu}(z) = z / (1 + e^{-z})$ is a smooth switch, near 0 for negative $z$ and near $z$ for positive. Three
# matrices of $D \times F$ weights, where $F$ is the FFN's width.


# %%
from torch.nn.functional import silu

from dsmoe_lite.layers.ffn import SwiGLU


def ffn(x, W_gate, W_up, W_down):
    return (silu(x @ W_gate.T) * (x @ W_up.T)) @ W_down.T


package = SwiGLU(D, config.ffn_width)
W_ffn = [package.gate.weight, package.up.weight, package.down.weight]
assert_close(ffn(x, *W_ffn), package(x), atol=1e-6, rtol=1e-5)
print("FFN: equal to the package's")

# %% [markdown]
# Attention and the FFN both take one vector per token and return one. The difference is who may look at whom. Change
# one token of the question, and see whose outputs change.
#
# **Ask.** There are eight tokens. Change *Ridi*, the fourth. How many outputs of the **FFN** change?

# %% tags=["hide-input"]
lab.ask("01-alone", low=0, high=8)
names = [piece.replace("Ġ", "") for piece in pieces]
clean = torch.randn(1, len(names), D)
rows = []
for changed in range(len(names)):
    other = clean.clone()
    other[0, changed] += 1
    for part, layer, weights in (
        ("attention", attention, (*W_attention, n_heads)),
        ("FFN", ffn, W_ffn),
    ):
        moved = (layer(other, *weights) - layer(clean, *weights)).abs().amax(dim=-1)[
            0
        ] > 1e-6
        rows += [
            {
                "part": part,
                "input": names[changed],
                "output": names[j],
                "changes": bool(moved[j]),
            }
            for j in range(len(names))
        ]
lab.answer(
    "01-alone",
    sum(r["changes"] for r in rows if r["part"] == "FFN" and r["input"] == "Ridi"),
)
charts.influence(rows, title="Change one token: whose output changes?")

# %% [markdown]
# One: its own. Attention carries a change to every later token. **The FFN sees one token and nothing else.** That is why it can
# be exchanged token by token: give *Ridi* another FFN, and no other position notices. Attention cannot be divided like this,
# because its tokens need each other.
#
# ## The block, and the model
#
# A block adds both parts to a residual stream (DeepSeekMoE {cite:p}`DeepSeekMoE2024`, Equations 1 and 2; the normalisation,
# which the paper leaves out, is written here):
#
# $$
# \begin{aligned}
# \mathbf{u}^l &= \mathbf{h}^{l-1} + \operatorname{Attention}(\operatorname{RMSNorm}(\mathbf{h}^{l-1})) \\
# \mathbf{h}^l &= \mathbf{u}^l + \operatorname{FFN}(\operatorname{RMSNorm}(\mathbf{u}^l))
# \end{aligned}
# $$ (eq:block)
#
# $\mathbf{h}^l$ is what leaves block $l$, and RMSNorm {cite:p}`RMSNorm` divides a vector by its root mean square.
# Remember this equation: most later chapters change only its FFN, chapter 09 only its attention.


# %%
from dsmoe_lite import Transformer


def rms_norm(x, weight, eps=1e-6):
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def block(h, w):  # w: the package's Block
    a, f = w.attention, w.ffn
    W_attention = [m.weight for m in (a.query, a.key, a.value, a.output)]
    u = h + attention(rms_norm(h, w.attention_norm.weight), *W_attention, n_heads)
    W_ffn = f.gate.weight, f.up.weight, f.down.weight
    return u + ffn(rms_norm(u, w.ffn_norm.weight), *W_ffn)


def logits_of(model, tokens):
    h = model.embed.weight[tokens]
    for weights in model.blocks:
        h = block(h, weights)
    return rms_norm(h, model.norm.weight) @ model.head.weight.T  # (B, S, V)


model = Transformer(config)
tokens = torch.randint(0, V, (2, 20))
assert_close(logits_of(model, tokens), model(tokens).logits, atol=1e-5, rtol=1e-5)
print(f"model of {config.n_layers} blocks: equal to the package's")

# %% [markdown]
# ## Where do parameters and FLOPs sit?
#
# **Ask.** The paper's small dense model has $D = 1280$, nine layers, and an FFN of $8D^2$ weights per layer, beside
# $4D^2$ of attention; its vocabulary of 8,192 tokens needs two more matrices, the embedding and the output head. What
# share of all weights is in the FFNs? (A number from 0 to 1.)

# %% tags=["hide-input"]
from dsmoe_lite import accounting

lab.ask("01-ffn-share", low=0, high=1)
paper = preset("dense-0.2B")
count = accounting.parameters(paper)
flops = accounting.training_flops(paper, 2048)
print(f"{count.total:,} weights, {count.ffn.total / count.total:.0%} of them in FFNs")
print(
    f"{flops.total / 1e12:.2f}T FLOPs to train on 2,048 tokens, {flops.dense_ffn / flops.total:.0%} of them in FFNs"
)
lab.answer("01-ffn-share", count.ffn.total / count.total, within=0.08)

# %% [markdown]
# 0.60 of the weights, and half of the work. FLOPs are counted from the config alone. A weight costs one multiplication
# and one addition per token forward, and twice that backward: six in all. Attention also multiplies queries with keys
# and scores with values: $2 \cdot 2SD$ per token and layer forward, three times that with the backward pass. For $L$
# layers, $S$ tokens and a vocabulary of $V$:
#
# $$
# \mathcal{F} = S\,\bigl[\,6L\,(4D^2 + 3DF) + 12LDS + 6VD\,\bigr]
# $$ (eq:flops)
#
# The paper prints FLOPs but no formula. This one gives every figure of its tables except one, which differs in the last
# digit (`data/published.json`).

# %%
from dsmoe_lite.study import published

S, L, F, V_paper = 2048, paper.n_layers, paper.ffn_width, paper.vocab_size
by_hand = S * (
    6 * L * (4 * paper.d_model**2 + 3 * paper.d_model * F)
    + 12 * L * paper.d_model * S
    + 6 * V_paper * paper.d_model
)
assert math.isclose(by_hand, flops.total)
printed = published.printed("dense-0.2B", "flops_2k")
assert f"{by_hand / 1e12:.1f}T" == printed
print(f"by hand {by_hand / 1e12:.2f}T; the paper's Table 1 prints {printed}")

# %% [markdown]
# Longer texts shift the work to attention, because its products grow with $S^2$. Attention is two parts of the bar, its
# weights and its scores. Move the slider: at which length do they outgrow the FFN?

# %%
rows = []
for length in [2**power for power in range(9, 18)]:  # 512 to 131,072 tokens
    split = accounting.split_rows({"paper, 0.2B": (paper, length)})
    rows += [{**row, "seq_len": length} for row in split]
rows += accounting.split_rows({"ours, S = 64": (config, 64)})
for row in rows:
    del row["active"]  # a dense model uses every weight
title = "Where do parameters and FLOPs sit?"
charts.parameter_split(rows, shares=True, seq_len=2048, title=title)

# %% [markdown]
# Between 2,048 and 4,096 tokens: by {eq}`eq:flops` at $S = 2D = 2{,}560$, a little more than the paper's length. At
# 8,192 attention does twice as much as the FFN. Our own tiny model looks different: most of its weights are vocabulary.
# Remember that whenever the total of a small model is quoted.
#
# ## Train it
#
# A language model is trained to predict the next token. So its targets are its inputs, shifted by one place: from a row of
# $S + 1$ tokens the first $S$ go in, and the last $S$ should come out. The loss is the mean of
# $-\log p(\text{next token})$, in nats.


# %%
def loss_of(model, rows):  # rows (B, S + 1)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    log_p = logits_of(model, inputs).log_softmax(dim=-1)  # (B, S, V)
    return -log_p.gather(-1, targets[..., None]).mean()


# %% [markdown]
# **Ask.** An untrained model knows nothing about the 1,024 possible tokens. What is its loss, in nats?

# %% tags=["hide-input"]
from dataclasses import replace

from dsmoe_lite.data.batches import Batches

lab.ask("01-first-loss", low=0, high=20)
torch.manual_seed(seed)
model = Transformer(replace(config, vocab_size=V, ffn_width=ffn_width)).to(lab.device)
batches = Batches(world, tokenizer, batch_size=16, seq_len=64)
start = batches.state_dict()
first_loss = loss_of(model, next(batches).tokens.to(lab.device)).item()
batches.load_state_dict(start)
print(f"first loss: {first_loss:.1f}; ln {V} = {math.log(V):.1f}")
lab.answer("01-first-loss", first_loss, "ln 1024, as for a uniform guess", within=0.3)

# %% [markdown]
# About 7: a uniform guess has a loss of $\ln V = \ln 1024 = 6.9$. Training is then a loop: loss, gradient, one step of
# AdamW, for 1,024 tokens at a time. The package's `train` is that loop with a learning rate that warms up and falls,
# clipped gradients, and checkpoints. Its first loss is the one we computed.

# %% tags=["trained"]
from dsmoe_lite import TrainConfig, train

train_config = TrainConfig(
    steps=steps, batch_size=16, seq_len=64, lr=learning_rate, seed=seed
)
run = train(model, batches, train_config)
assert abs(run.losses[0] - first_loss) < (
    0.05 if profile == "gpu" else 1e-3
)  # bf16 on a GPU
rows = [
    {"model": f"dense, F = {ffn_width}", "seed": seed, "step": step, "loss": loss}
    for step, loss in enumerate(run.losses)
]
charts.training_curves(rows, title="How fast does the model learn its world?")

# %% tags=["trained", "hide-cell"]
from dsmoe_lite.data.batches import heldout_batches
from dsmoe_lite.evaluate import heldout_loss, recall

learnt = heldout_loss(
    model, heldout_batches(world, tokenizer, 64, 64, 16), world.domains
)
known = recall(model, tokenizer, world.all_questions())
# recorded over seeds 0 to 4, widened to four standard deviations; not yet for a GPU
interval = {"smoke": (5.3, 5.55), "cpu": (1.1, 1.18), "gpu": (0.0, 7.0)}[profile]
claim("held-out loss, nats a token", learnt.loss, interval, asserted=lab.own)
interval = {"smoke": (0.0, 0.02), "cpu": (0.4, 0.74), "gpu": (0.0, 1.0)}[profile]
claim("recall of frequent people", known["head"], interval, asserted=lab.own)
claim(
    "recall of people never mentioned", known["control"], (0.0, 0.07), asserted=lab.own
)
report(
    held_out_loss=learnt.loss, recall_frequent=known["head"], recall_rare=known["tail"]
)

# %% [markdown]
# What did it learn? Ask it a question that its training text never asked:

# %% tags=["trained"]
from dsmoe_lite.generate import generate

(answer,) = generate(model, [tokenizer.encode(question.prompt).ids], 1)
report(
    question=question.prompt,
    right_answer=question.answer.strip(),
    the_model_says=tokenizer.decode(answer).strip(),
)

# %% [markdown]
# *Seba* is a tool too, but not the right one: the form is learnt before the fact. Facts are what takes long to learn,
# and facts are what experts will be for.
#
# **Type** a question or a beginning of your own. Your model continues it by eight tokens. Sums show the same order: the
# form comes before the right result. (Your model has to compute the tokens, so this needs Python.)

# %% tags=["trained"]
from IPython.display import Markdown
from ipywidgets import Text

from dsmoe_lite.viz.live import live


def continued(text):
    (ids,) = generate(model, [tokenizer.encode(text).ids], 8)
    return Markdown(f"{text} **{tokenizer.decode(ids)}**")


beginning = Text("12+30=", description="text", continuous_update=False)
live(continued, text=beginning)

# %% [markdown]
# ## The bill
#
# To store more, make the FFN wider. These models were trained on 2.4 times as many tokens as your run above, with five
# seeds each:

# %% tags=["hide-input"]
from dsmoe_lite.study.grids import records
from dsmoe_lite.study.rows import metric_rows

NAMES = {"course-dense": "dense", "course-dense-x2": "dense, 2x wide"}
compared = [
    row
    for row in metric_rows(records("neighbours"), NAMES)
    if row["metric"] != "recall, frequent people"
]
charts.model_comparison(compared, title="Does a wider FFN know more?")

# %% [markdown]
# On average, yes: it recalls 0.45 of the facts about rare people instead of 0.30. But look at the rings: runs of one
# width that differ only in their seed, which sets the first weights and where in the text training begins, differ as
# much as the two widths do. So a single run of each could have shown the opposite.
#
# And the price is certain. Twice the width costs twice the FFN's weights and twice its FLOPs, **for every token,
# whether it needs them or not**. A token in a sum still pays for the weights that store people; a name still pays for
# brackets.
#
# ## Exercises
#
# **1. A bug from the wild** (10 minutes). DeepSeek's inference code turns *adjacent* channels, $(0,1), (2,3), \dots$;
# Hugging Face's turns channel $j$ with channel $j + d_h/2$, as this chapter does. Weights of the one loaded into the
# other give wrong output and no error (`rope-layout` in `data/published.json`). Return the order of channels, a list of
# `d` indices, such that `x_adjacent[..., order]` is in the layout of this chapter.


# %%
def halves_order(d):
    return None  # your list


# %% tags=["hide-input"]
from dsmoe_lite.layers.rope import apply_rope


def order_is_right(halves_order):
    def turn_adjacent(x):
        cos, sin = (
            table.repeat_interleave(2, dim=-1)
            for table in rope_tables(x.shape[-1], x.shape[-2])
        )
        a, b = x[..., ::2], x[..., 1::2]
        return x * cos + torch.stack((-b, a), dim=-1).flatten(-2) * sin

    for d in (4, 6, 16, 64):
        order = halves_order(d)
        assert sorted(order) == list(range(d)), (
            f"d = {d}: every index must be in the list once"
        )
        x = torch.randn(1, 7, d)
        mine = apply_rope(x[..., order], *rope_tables(d, 7))
        assert torch.allclose(mine, turn_adjacent(x)[..., order], atol=1e-5), (
            f"d = {d}: pairs do not turn as they should"
        )


verdict = check_exercise(halves_order, order_is_right)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def halves_order(d):
#     return [*range(0, d, 2), *range(1, d, 2)]
# ```
#
# Even channels first, then odd ones: pair $(2j, 2j+1)$ becomes $(j, j + d/2)$. In a model the same reordering is applied
# to the rows of $W^Q$ and $W^K$ of every head; products of queries and keys do not notice.
# </details>
#
# **2. How wide?** (5 minutes). The FFN of the first Transformers had two matrices, $D \times 4D$ and $4D \times D$.
# Return the width, to the nearest whole channel, at which SwiGLU has as many weights.


# %%
def swiglu_width(d_model):
    return None  # your width


# %% tags=["hide-input"]
def width_is_right(swiglu_width):
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(8, 9000, (40,), generator=draw).tolist()
    for d_model in (64, 1280, 4096, *drawn):
        got = swiglu_width(d_model)
        assert got == int(got), (
            f"d_model = {d_model}: a whole number of channels, not {got!r}"
        )
        extra = 3 * d_model * got - 2 * d_model * 4 * d_model
        assert abs(extra) <= 3 * d_model / 2, (
            f"d_model = {d_model}: at width {got} SwiGLU has too"
            f" {'many' if extra > 0 else 'few'} weights"
        )


verdict = check_exercise(swiglu_width, width_is_right)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def swiglu_width(d_model):
#     return round(8 * d_model / 3)
# ```
#
# Three matrices of $D \times F$ against two of $D \times 4D$: $F = \tfrac{8}{3} D$, so that both have $8D^2$ weights. The
# paper's validation models have $D = 1280$, hence $F = 3413$.
# </details>
#
# **3. Other parameters** (a few minutes of computing). Run this chapter with an FFN of a quarter and of four times the
# width, and compare loss and recall:
#
# ```
# dsmoe run 01 -p ffn_width=32
# dsmoe run 01 -p ffn_width=512
# ```
#
# Which of loss and recall moves more? (`dsmoe run` prints what each run reported.) Which did you expect?
#
# ## Recap

# %% tags=["hide-input"]
lab.score()

# %% [markdown]
# 1. A block is attention, which moves information between tokens, and an FFN, which treats each token alone. So the FFN
#    can be exchanged token by token.
# 2. In the paper's dense model the FFN holds 60% of the weights and does half of the work, at 2,048 tokens.
# 3. The FLOPs of the paper's tables follow from a config by {eq}`eq:flops`.
# 4. The loss is the mean of $-\log p$ of the next token; it starts at $\ln V$.
# 5. A wider FFN may know more, but every token pays for all of it.
#
# What if there were sixteen FFNs, and each token paid for two? **Chapter 02** builds that.
