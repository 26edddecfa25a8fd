# %% [markdown]
# # KV cache: what does a token cost to remember?
#
# A model that writes looks back at all earlier tokens. Their keys and values do not change, so a server computes them
# once and keeps them: this is the *KV cache*. It saves time and costs memory. With ordinary attention, DeepSeek-V2
# would need 515 GB to remember one text of 128K tokens at 16 bits per number. With multi-head latent attention (MLA),
# it needs 9 GB.
#
# **What does a token cost to remember, and how can it cost less?** You will count the bytes of a cache, find out how
# many requests a server can take, follow a cache that forgets, and decode a token from latents without making a
# single key. Then you will time a small model with and without a cache.
#
# Chapter 09 of the course is the background. Other students have other numbers and other rules, so read yours; they
# are in **bold**. Run every cell as you go. Each answer is graded alone: **everything that an answer needs must be in
# its cell**, apart from the given code and the parameters.

# %% tags=["parameters"]
global_layers: str = "odd"  # layers that keep all tokens: odd | sixth | ends
bits: int = 16  # bits per cached number: 4 | 8 | 16
batching: str = "paged"  # how your server allocates: paged | padded
page: int = 16  # tokens per page: 2..64
keep: str = "window"  # what a full cache keeps: window | sinks | chunks
slots: int = 8  # slots of the cache in question 3: 5..16
n_sinks: int = 2  # first tokens that the rule sinks never drops: 1..4
seed: int = 0  # of the experiment: 0..999999
profile: str = "cpu"  # size of the experiment at the end: smoke | cpu

# %% tags=["given"]
import math

import torch

GROUPED = {  # a model with grouped-query attention
    "n_layers": 12,
    "window": 1024,
    "n_heads": 32,
    "n_kv_heads": 8,
    "head_dim": 128,
}
LATENT = {  # a model with MLA
    "n_layers": 12,
    "window": 1024,
    "n_heads": 32,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}

# %%
from dsmoe_lite.labs import check_exercise

# %% [markdown] question="bytes"
# ## 1. Count the bytes (2 points)
#
# In every layer, a token leaves some numbers in the cache:
#
# - With grouped-query attention, it leaves a key and a value of $d_h$ channels for each of $H_{kv}$ key-value heads.
#   If $H_{kv} = H$, the number of all heads, this is ordinary multi-head attention.
# - With MLA, it leaves one latent vector of $d_c$ channels and one rotated key of $d_h^R$ channels. All heads share
#   both.
#
# Many models save memory in some layers. A *global* layer keeps all tokens of a sequence. A *local* layer keeps at
# most the last $W$ tokens of each sequence. Layers are numbered from 0, and your global layers are
# **{{global_layers}}**:
#
# - `odd`: layers 1, 3, 5, and so on
# - `sixth`: every sixth layer, that is 5, 11, 17, and so on
# - `ends`: the first layer and the last
#
# All other layers are local. Each number takes **{{bits}} bits**.
#
# Write `cache_bytes(model, lengths)`, which returns the bytes of the whole cache. `lengths` is a list: the number of
# tokens of each sequence in the batch. `model` is a dictionary like the two in the given code:
#
# | key | symbol | in |
# |---|---|---|
# | `n_layers`, `n_heads` | $L$, $H$ | all models |
# | `window` | $W$, tokens that a local layer keeps | all models |
# | `n_kv_heads`, `head_dim` | $H_{kv}$, $d_h$ | grouped-query attention |
# | `kv_lora_rank`, `qk_rope_head_dim` | $d_c$, $d_h^R$ | MLA |


# %% tags=["answer"] question="bytes"
def cache_bytes(model, lengths):
    return None


# %% tags=["check"] question="bytes"
def check(cache_bytes):
    small = {"n_layers": 6, "window": 4, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
    assert cache_bytes(small, [1]) == 12 * bits, (
        "one token, six layers, a key and a value of 8 channels: count it by hand"
    )
    for model in (GROUPED, LATENT):
        one, two, both = (cache_bytes(model, S) for S in ([5000], [70], [5000, 70]))
        assert abs(one + two - both) < 1, "each sequence has a cache of its own"
        longer = cache_bytes(model, [5001])
        per_token = cache_bytes(model, [1])
        assert one < longer, "global layers keep every token"
        assert longer - one < per_token, "local layers stop growing at the window"
    twice = LATENT | {"n_heads": 64}
    assert cache_bytes(twice, [70]) == cache_bytes(LATENT, [70]), (
        "in MLA, all heads share what is cached"
    )


verdict = check_exercise(cache_bytes, check)


# %% tags=["solution"] question="bytes"
def cache_bytes(model, lengths):
    if "kv_lora_rank" in model:
        width = model["kv_lora_rank"] + model["qk_rope_head_dim"]
    else:
        width = 2 * model["n_kv_heads"] * model["head_dim"]
    L, W = model["n_layers"], model["window"]
    everything = {
        "odd": range(1, L, 2),
        "sixth": range(5, L, 6),
        "ends": {0, L - 1},
    }[global_layers]
    tokens = 0
    for layer in range(L):
        for S in lengths:
            tokens += S if layer in everything else min(S, W)
    return tokens * width * bits / 8


# %% tags=["hidden"] question="bytes"
def check(answer, reference, random):
    for kind in ("grouped", "latent", "grouped", "latent"):
        model = {
            "n_layers": random.choice((7, 13, 27, 33)),
            "window": random.choice((64, 100, 512)),
            "n_heads": 16,
        }
        if kind == "grouped":
            model |= {"n_kv_heads": random.choice((1, 2, 4, 8)), "head_dim": 128}
        else:
            rank = random.choice((128, 256, 512))
            model |= {"kv_lora_rank": rank, "qk_rope_head_dim": rank // 8}
        lengths = [random.randint(1, 3000) for _ in range(4)] + [17, model["window"]]
        random.shuffle(lengths)
        found, expected = float(answer(model, lengths)), reference(model, lengths)
        assert abs(found - expected) <= 1e-6 * expected


# %% [markdown] question="fits"
# ## 2. How many requests fit? (2 points)
#
# A server has `memory` bytes. The weights of the model take `weights` of them, and the cache may use the rest.
# Requests wait in a queue. The server admits them **in this order** and stops at the first request that does not fit,
# even if a shorter one waits behind it: otherwise a long request might wait forever.
#
# All admitted requests are decoded together. The server hands out memory in *pages* with room for **{{page}} tokens**
# each. Two sequences never share a page, so the last page of a sequence may be partly empty. Your server is
# **{{batching}}**:
#
# - `paged`: each sequence gets as many pages as it needs.
# - `padded`: the cache is one rectangular tensor. Each sequence gets as many pages as the longest of those admitted.
#
# In this question all layers are global, and a token takes `per_token` bytes.
#
# Write `admitted(lengths, memory, weights, per_token)`. `lengths` is the queue: how many tokens each request will
# have when it is finished. Return how many requests the server admits.


# %% tags=["answer"] question="fits"
def admitted(lengths, memory, weights, per_token):
    return None


# %% tags=["check"] question="fits"
def check(admitted):
    queue, one_page = [page] * 9, 10 * page  # at 10 bytes per token
    exact = admitted(queue, 4 * one_page + 1000, 1000, 10)
    assert exact == 4, "nine requests of one page each, and room for exactly four pages"
    less = admitted(queue, 4 * one_page + 999, 1000, 10)
    assert less == exact - 1, "with one byte less, one of the requests does not fit"
    assert admitted(queue, 900, 1000, 10) == 0, "not even the weights fit"
    assert admitted(queue, 10**9, 1000, 10) == 9, "there is room for all of them"
    blocked = admitted([page, 50 * page, page], 10 * one_page, 0, 10)
    assert blocked == 1, "the second request does not fit: nobody overtakes it"
    short = admitted([1] * 9, 3 * one_page, 0, 10)
    assert short < 9, "a sequence of one token takes a whole page"


verdict = check_exercise(admitted, check)


# %% tags=["solution"] question="fits"
def admitted(lengths, memory, weights, per_token):
    pages = [-(-S // page) for S in lengths]
    n = 0
    while n < len(pages):
        batch = pages[: n + 1]
        taken = sum(batch) if batching == "paged" else len(batch) * max(batch)
        if weights + taken * page * per_token > memory:
            break
        n += 1
    return n


# %% tags=["hidden"] question="fits"
def check(answer, reference, random):
    for _ in range(6):
        lengths = [random.randint(1, 6 * page) for _ in range(12)]
        lengths[random.randint(3, 6)] = 9 * page + 1  # one long request in the middle
        per_token, weights = random.randint(2, 900), random.randint(0, 10**6)
        first = [-(-S // page) for S in lengths[: random.randint(1, 9)]]
        for pages in (sum(first), len(first) * max(first), random.randint(1, 60)):
            for spare in (-1, 0, page * per_token - 1):
                memory = weights + pages * page * per_token + spare
                values = lengths, memory, weights, per_token
                assert int(answer(*values)) == reference(*values)


# %% [markdown] question="held"
# ## 3. A cache that forgets (3 points)
#
# Now look inside a local layer. Its cache has $W$ = **{{slots}}** slots, numbered from 0, and each slot holds one
# token. The tokens of a text have the positions $t = 0, 1, 2, \dots$ When all slots are in use, something must go.
# Your rule is **{{keep}}**:
#
# - `window`: position $t$ takes slot $t \bmod W$. The cache holds the last $W$ tokens.
# - `sinks`: the first $A$ = {{n_sinks}} positions keep the slots 0 to $A - 1$ forever. (Models often attend strongly
#   to the first tokens of a text, which are then called attention sinks.) Later positions take the other $W - A$
#   slots in turn: position $A$ takes slot $A$, position $W - 1$ takes slot $W - 1$, position $W$ takes slot $A$
#   again.
# - `chunks`: the text is cut into chunks of $W$ tokens. When the first token of a chunk arrives, all slots are
#   emptied. Position $t$ takes slot $t \bmod W$.
#
# Sometimes a server takes tokens back. In *speculative decoding*, it appends several guessed tokens at once and drops
# the last of them if they were wrong. The slot of a dropped token becomes empty, and the next token gets the position
# that has become free. **What a dropped token has overwritten does not come back**, nor does an emptied chunk.
#
# Write `held(steps)`. `steps` is a list of whole numbers: 5 appends five tokens, $-2$ drops the last two. The cache
# is empty at the start. Return a list with the position that each of the {{slots}} slots holds at the end, $-1$ if
# the slot is empty. For example, `held([3, -1])` starts with 0, 1, -1.


# %% tags=["answer"] question="held"
def held(steps):
    return None


# %% tags=["check"] question="held"
def check(held):
    assert list(held([slots])) == list(range(slots)), "at first, all tokens fit"
    assert list(held([3, -1])) == [0, 1] + [-1] * (slots - 2), (
        "the slot of a dropped token becomes empty"
    )
    full, dropped = list(held([slots + 1])), list(held([slots + 1, -1]))
    assert len(full) == slots, "one number for each slot, those that are empty included"
    assert slots in full, "the newest token is always there"
    assert dropped == [-1 if t == slots else t for t in full], (
        "dropping a token empties its slot and changes no other"
    )
    assert list(held([slots + 1, -1, 1])) == full, (
        "the next token gets the position that has become free"
    )
    late = [t for t in held([5 * slots + 3]) if t >= 0]
    assert len(set(late)) == len(late), "no position is in two slots"
    assert max(late) == 5 * slots + 2, "positions start at 0"


verdict = check_exercise(held, check)


# %% tags=["solution"] question="held"
def held(steps):
    def slot(t):
        if keep == "sinks" and t >= n_sinks:
            return n_sinks + (t - n_sinks) % (slots - n_sinks)
        return t % slots

    cache, t = [-1] * slots, 0
    for step in steps:
        for _ in range(step):
            if keep == "chunks" and t % slots == 0:
                cache = [-1] * slots
            cache[slot(t)] = t
            t += 1
        for _ in range(-step):
            t -= 1
            if cache[slot(t)] == t:
                cache[slot(t)] = -1
    return cache


# %% tags=["hidden"] question="held"
def check(answer, reference, random):
    for n_steps in (1, 1, 2, 2, 4, 8, 16, 30):
        steps, length = [], 0
        for number in range(n_steps):
            drop = number % 2 and random.random() < 0.8
            step = random.randint(1, 2 * slots)
            if drop:
                step = -random.randint(1, min(length, slots + 2))
            steps.append(step)
            length += step
        assert [int(t) for t in answer(steps)] == reference(steps)
    for steps in (
        [3 * slots + 1, -2, 1],
        [3 * slots + 1, -3, 3],
        [2 * slots, -slots, 1],
    ):
        assert [int(t) for t in answer(steps)] == reference(steps)


# %% [markdown] question="decode"
# ## 4. Decode without a key (3 points)
#
# Of each earlier token $j$, MLA caches the latent $\mathbf{c}_j$ ($d_c$ channels) and the rotated key
# $\mathbf{k}^R_j$ ($d_h^R$ channels). Head $i$ has two matrices: $W^{UK}_i$ ($d_h \times d_c$) makes a key of a
# latent, and $W^{UV}_i$ ($d_v \times d_c$) makes a value of $d_v$ channels. The new token is at position $t$. Its
# query in head $i$ has two parts, $\mathbf{q}_i$ ($d_h$ channels) and the rotated $\mathbf{q}^R_i$ ($d_h^R$
# channels). The output of the head is
#
# $$\mathbf{o}_i = \sum_{j} a_{ij}\, W^{UV}_i \mathbf{c}_j, \qquad
# a_{ij} = \operatorname{Softmax}_j\!\left(\frac{\mathbf{q}_i^\top W^{UK}_i \mathbf{c}_j
# + \mathbf{q}_i^{R\top} \mathbf{k}^R_j}{\sqrt{d_h + d_h^R}}\right),$$
#
# where $j$ runs over the tokens that token $t$ sees. Token $t$ never sees a later one. It sees itself and those
# earlier tokens that your rule **{{keep}}** allows:
#
# - `window`: $t - j < W$
# - `sinks`: $j < A$, or $t - j < W - A$, with $A$ = {{n_sinks}}
# - `chunks`: $j$ and $t$ are in the same chunk, $\lfloor j / W \rfloor = \lfloor t / W \rfloor$
#
# Computed as written, this makes a key and a value for every cached token and every head. The *absorbed* form makes
# none: multiply the query by $W^{UK}_i$ first, compare the result with the latents, average the latents, and apply
# $W^{UV}_i$ to the average. **Use the absorbed form.** The check counts your multiplications, and when your answer is
# graded the cache is so long that the keys of one head do not fit into memory at once.
#
# Write `decode(q, q_rope, cache, positions, t, window, W_UK, W_UV)`. It returns $(H, d_v)$, the outputs of all heads.
# Here $W$ is the argument `window`, and the cache has $N$ slots, which may be more than $W$:
#
# | argument | is | shape |
# |---|---|---|
# | `q`, `q_rope` | $\mathbf{q}_i$ and $\mathbf{q}^R_i$ of all heads | $(H, d_h)$ and $(H, d_h^R)$ |
# | `cache` | $\mathbf{c}_j$, then $\mathbf{k}^R_j$, of the token in each slot | $(N, d_c + d_h^R)$ |
# | `positions` | position $j$ of the token in each slot, in no order; $-1$: empty | $(N,)$, int64 |
# | `t`, `window` | $t$ and $W$, whole numbers | |
# | `W_UK`, `W_UV` | $W^{UK}_i$ and $W^{UV}_i$ of all heads | $(H, d_h, d_c)$ and $(H, d_v, d_c)$ |
#
# The cache already has token $t$ itself. An empty slot contains arbitrary numbers. A slot may also hold a token with
# a position above $t$, left by a draft that was dropped.


# %% tags=["answer"] question="decode"
def decode(q, q_rope, cache, positions, t, window, W_UK, W_UV):
    return None


# %% tags=["check"] question="decode"
def check(decode):
    from torch.utils.flop_counter import FlopCounterMode

    # One head, two tokens. The first has the latent (1, 0, 0) and fits the query.
    q, W_UK = torch.tensor([[2 * math.log(3), 0.0]]), torch.eye(3)[None, :2]
    both = torch.tensor([[1.0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0]])
    where, none = torch.tensor([0, 1]), torch.zeros(1, 2)
    found = decode(q, none, both, where, 1, 8, W_UK, torch.eye(3)[None])
    assert found.shape == (1, 3), (
        "one row per head, and one column per channel of a value"
    )
    assert abs(float(found[0, 0]) / float(found[0, 1]) - 3) < 1e-3, (
        "the scores differ by log 3: work out the softmax by hand"
    )

    draw = torch.Generator().manual_seed(1)
    shapes = (4, 32), (4, 8), (256, 24), (4, 32, 16), (4, 32, 16)
    q, r, cache, W_UK, W_UV = (torch.randn(s, generator=draw) for s in shapes)

    def now(cache, positions, t, window, r=r):
        return decode(q, r, cache, torch.as_tensor(positions), t, window, W_UK, W_UV)

    alone = now(cache[:1], [80], 80, 8)
    for what, position in {
        "an empty slot": -1,
        "a later token": 81,
        "a token far behind the window": 40,
    }.items():
        assert torch.allclose(now(cache[:2], [80, position], 80, 8), alone), (
            f"{what} must not change the output"
        )
    assert not torch.allclose(
        now(cache[:3], [1, 0, 2], 2, 8), now(cache[:3], [1, 0, 2], 2, 8, -r)
    ), "the rotated parts belong to the scores"
    with FlopCounterMode(display=False) as counter:
        now(cache, range(256), 255, 256)
    assert counter.get_total_flops() < 4 * 256 * 16 * (32 + 32), (
        "too many multiplications: keys or values of cached tokens are being made"
    )


verdict = check_exercise(decode, check)


# %% tags=["solution"] question="decode"
def decode(q, q_rope, cache, positions, t, window, W_UK, W_UV):
    visible = {
        "window": t - positions < window,
        "sinks": (positions < n_sinks) | (t - positions < window - n_sinks),
        "chunks": positions // window == t // window,
    }[keep]
    cache = cache[visible & (positions >= 0) & (positions <= t)]
    d_h, d_c = W_UK.shape[1:]
    latents, k_rope = cache[:, :d_c], cache[:, d_c:]
    absorbed = torch.einsum("hd,hdc->hc", q, W_UK)
    scores = (absorbed @ latents.T + q_rope @ k_rope.T) / math.sqrt(
        d_h + k_rope.shape[1]
    )
    return torch.einsum("hc,hvc->hv", scores.softmax(dim=-1) @ latents, W_UV)


# %% tags=["hidden"] question="decode"
def check(answer, reference, random):
    cases = [(3, 4, 2, 5, 6), (2, 6, 4, 12, 3), (4, 3, 2, 8, 3), (2, 2500, 2, 6, 2500)]
    for H, d_h, d_rope, d_c, d_v in cases:
        drawn = torch.Generator().manual_seed(random.getrandbits(31))
        N, window = 80, random.randint(6, 14)
        t = (0 if H == 4 else 4 * window) + random.randint(3, window - 2)
        if d_h > 1000:  # 1 GB for the keys of one head, in float32
            N = window = 100_000
            t = N - 1
        positions = torch.randperm(N, generator=drawn)
        empty = positions > t + 2
        positions[empty] = -1
        cache = torch.randn(N, d_c + d_rope, generator=drawn)
        cache[empty] *= 3
        shapes = (H, d_h), (H, d_rope), (H, d_h, d_c), (H, d_v, d_c)
        q, r, W_UK, W_UV = (torch.randn(s, generator=drawn) for s in shapes)
        values = q, r, cache, positions, t, window, W_UK, W_UV
        found, expected = torch.as_tensor(answer(*values)), reference(*values)
        assert tuple(found.shape) == (H, d_v)
        error = (found.double() - expected.double()).abs().max()
        assert float(error) < 2e-3 * float(expected.abs().max())


# %% [markdown]
# ## See it at work
#
# Now time a small model. Without a cache, it reads the whole text again for every new token. With a cache, it reads
# one token. The unit of time is one token with a cache, after a text of 16 tokens. Before you run the cell, write
# down two guesses: how many units does a token take after 2,048 tokens, with a cache and without?

# %%
from statistics import median
from time import perf_counter

import altair as alt
import pandas as pd

from dsmoe_lite import AttentionConfig, ModelConfig, Transformer, accounting, preset
from dsmoe_lite.layers.cache import Cache
from dsmoe_lite.viz import renderer

renderer.enable()

torch.manual_seed(seed)
torch.set_num_threads(1)  # so that other programs disturb the clock less
model = Transformer(
    ModelConfig(
        vocab_size=1024,
        d_model=128,
        n_layers=4,
        attention=AttentionConfig(n_heads=4, head_dim=32),
        ffn_width=256,
        max_seq_len=2100,
    )
)


@torch.no_grad()
def seconds(n_tokens, cached):
    """Time of one token after n_tokens; with a cache, these have been read before."""
    text = torch.randint(1024, (1, n_tokens))
    new, cache, clock = text, None, []
    if cached:
        new, cache = text[:, -1:], Cache(model.config, 1, reserve=n_tokens + 8)
        model(text, cache)
    for _ in range(3):
        start = perf_counter()
        model(new, cache)
        clock.append(perf_counter() - start)
    return min(clock)


lengths = {"smoke": [16, 128], "cpu": [16, 32, 64, 128, 256, 512, 1024, 2048]}[profile]
CACHED = {"without a cache": False, "with a cache": True}
times = {(name, S): [] for name in CACHED for S in lengths}
for _ in range({"smoke": 2, "cpu": 7}[profile]):  # in turn: other programs slow all
    for name, S in times:
        times[name, S].append(seconds(S, CACHED[name]))
times = {where: median(found) for where, found in times.items()}
unit = times["with a cache", lengths[0]]
frame = pd.DataFrame(
    {"way": name, "tokens": S, "time": took / unit} for (name, S), took in times.items()
)
base = alt.Chart(frame).encode(
    x=alt.X("tokens", title="tokens of the text").scale(type="log", base=2),
    y=alt.Y("time", title="time of the next token (1: with a cache, 16 tokens)")
    .scale(type="log", domainMin=0.8, nice=False)
    .axis(values=[1, 3, 10, 30, 100, 300]),
    color=alt.Color("way", legend=None),
)
ends = base.transform_filter(alt.datum.tokens == lengths[-1])
(
    base.mark_line(point=True)
    + ends.mark_text(align="right", dx=-12, dy=-8).encode(text="way")
    + ends.mark_text(align="left", dx=8).encode(text=alt.Text("time", format=".1f"))
).properties(
    title="What does a token take, with a cache and without?",
    description="Time of the next token by length of the text, with and without a cache.",
    width=440,
    height=260,
)

# %% [markdown]
# The cache saves time and takes memory. How much memory depends on the model. These are published models, with 16
# bits per number. The last column answers: how many million cached tokens, in all sequences of a batch together, take
# as much memory as the weights?

# %%
rows = []
for name in ("llama2-7B", "deepseek-67B", "qwen2.5-72B", "deepseek-v2", "deepseek-v3"):
    config = preset(name)
    numbers = accounting.kv_cache_elements(config)
    weights = accounting.parameters(config).total
    rows.append(
        {
            "model": name,
            "attention": accounting.attention_kind(config.attention),
            "KB per token": round(2 * numbers / 1000),
            "million tokens": round(weights / numbers / 1e6, 3),
        }
    )
pd.DataFrame(rows).set_index("model")

# %% [markdown]
# **Discuss in your group.**
#
# - Without a cache, why does the line rise more slowly for short texts than for long ones?
# - In each step, a server decodes one token of every sequence. It reads the weights once, and all caches. With 64
#   sequences of 8,192 tokens each, which of these models read more cache than weights?
# - A user asks about the first page of a long text. Which of the three rules of question 3 still see that page? What
#   changes if every sixth layer is global?
