# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Latent attention: what a model keeps of its text
#
# ![What one token leaves behind in one layer. MHA: a key and a value of each of eight heads. GQA: of two groups. MQA: one key and one value. MLA: one latent vector, from which keys and values of all heads can be made, and one small rotated key.](images/latent_attention.svg)
#
# Experts (chapters 02 to 06) make a token cheap to compute. What then limits a server is memory: to say the next token, attention needs
# something of *every* token before it, in every layer. DeepSeek-V2 therefore changed the other half of the block too.
# Its attention keeps one short vector for a token, from which the keys and values of all heads can be made.
#
# **You will** build a cache and prove that it changes nothing; share keys and values (MQA, GQA); look at a window only;
# build Multi-head Latent Attention (MLA) in two forms, and prove them equal; take three wrong turns on purpose; measure
# what a token costs; and let a model read texts four times as long as those it was trained on.
#
# **You need** chapter 01. **Reading time** 43 minutes. **Hardware** any laptop CPU.

# %% tags=["parameters"]
profile: str = "cpu"  # size of the run: smoke | cpu | gpu
seed: int = 0  # seed of weights: 0..2147483647
n_kv_heads: int = 2  # keys and values that the heads share, in GQA: 1 | 2 | 4
window: int = 16  # tokens a token sees, in the sliding window: 1..64
latent: int = 32  # width of MLA's latent vector: 4 | 8 | 16 | 32 | 64 | 128

# %% tags=["hide-input"]
try:
    from dsmoe_lite.labs import begin, check_exercise, claim, predict, report
except ModuleNotFoundError:
    raise SystemExit("dsmoe_lite is missing: run make setup, then make lab") from None

import torch

from dsmoe_lite.viz import charts

lab = begin(globals())
steps = lab.choose(smoke=40, cpu=300, gpu=2000)

# %% [markdown]
# ## Why keep anything?
#
# Chapter 01 built attention ({eq}`eq:attention`): a token's query meets the keys of all tokens up to it, and mixes their
# values. A token never sees what comes later. So the keys and values of earlier tokens do not change when a new one
# arrives, and to say the next token, only one query is new. Keep the rest: the **KV cache**.
#
# **Ask.** A model reads a prompt of 56 tokens and says 200 more. How often does a token pass through the model in all if
# every step starts anew, and how often with a cache?

# %%
predict("09-passes", None)  # two numbers

anew = sum(56 + said for said in range(200))
kept = 56 + 199  # the last token is said, never read
print(f"anew {anew:,} passes, with a cache {kept}: {anew / kept:.0f} times fewer")

# %% [markdown]
# **Build** it: `step` reads some new tokens; `past` holds keys and values of those before. Eight heads of eight channels,
# in float64, so that proofs are sharp.

# %%
import math

from torch.testing import assert_close

from dsmoe_lite import AttentionConfig
from dsmoe_lite.layers.attention import Attention
from dsmoe_lite.layers.rope import apply_rope, rope_tables

D, H, d_h = 64, 8, 8
T = 48  # tokens of the texts below
x = torch.randn(2, T, D, dtype=torch.float64)  # (B, T, D)
cos, sin = rope_tables(d_h, T)


def heads(x, n):  # (B, S, n * d) -> (B, n, S, d)
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def joined(o):  # (B, n, S, d) -> (B, S, n * d)
    return o.transpose(1, 2).flatten(2)


def look(q, k, v, scale, window=math.inf):  # q: the last S of N tokens
    S, N = q.shape[2], k.shape[2]
    distance = torch.arange(N - S, N)[:, None] - torch.arange(N)  # (S, N)
    hidden = (distance < 0) | (distance >= window)
    scores = scale * q @ k.mT  # (B, H, S, N)
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v


def step(layer, x, past=None):  # x (B, S, D); past: k and v, (B, H, t, d_h)
    t, S = 0 if past is None else past[0].shape[2], x.shape[1]
    here = cos[t : t + S], sin[t : t + S]
    q = apply_rope(heads(layer.query(x), H), *here)
    k = apply_rope(heads(layer.key(x), H), *here)
    v = heads(layer.value(x), H)
    if past is not None:
        k = torch.cat((past[0], k), dim=2)
        v = torch.cat((past[1], v), dim=2)
    return layer.output(joined(look(q, k, v, 1 / math.sqrt(d_h)))), (k, v)


mha = Attention(D, AttentionConfig(n_heads=H, head_dim=d_h)).double()
at_once, _ = step(mha, x)
past, one_by_one = None, []
for t in range(T):
    y, past = step(mha, x[:, t : t + 1], past)
    one_by_one.append(y)
assert_close(torch.cat(one_by_one, dim=1), at_once)
assert_close(at_once, mha(x, cos, sin))
print("one token at a time gives what all at once gives")
print("attention: mine equals the package's")

# %% [markdown]
# The package's `Cache` does the same for a whole model. Its buffers double when they are full, so that keeping a token does
# not copy all the others again. `generate` uses it. Here is the model of chapter 05, in float64, with and without:


# %%
from dsmoe_lite import load_model
from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.data.tokenizer import read_tokenizer
from dsmoe_lite.generate import generate
from dsmoe_lite.viz.text_stream import stream_text

shipped = DATA / "models" / "world-deepseekmoe.safetensors"
model = load_model(shipped).double()
tokenizer = read_tokenizer(read_metadata(shipped)["tokenizer"])
prompts = ["The home of", "Anna"]
ids = [tokenizer.encode(prompt).ids for prompt in prompts]
n_new = {"smoke": 40, "cpu": 200, "gpu": 200}[profile]
said = generate(model, ids, n_new, use_cache=True)
assert said == generate(model, ids, n_new, use_cache=False)
assert said == [generate(model, [one], n_new)[0] for one in ids]
print(f"{n_new} tokens for each of two prompts of different lengths: the same with")
print("and without a cache, together and alone")

# %% [markdown]
# Watch it speak:

# %% tags=["measured"]
_ = stream_text(
    model, tokenizer, ["The home of"], 60, temperature=0.8, top_p=0.9, seed=seed
)

# %% [markdown]
# ## What it costs
#
# For each token, MHA keeps a key and a value of every head in each of $L$ layers: $2 H d_h L$ numbers.
#
# **Ask.** DeepSeek-V2 has $L = 60$ layers and $H = 128$ heads of $d_h = 128$ channels. If it had plain attention, how many
# gigabytes would one text of 128K tokens keep, at 16 bits a number? A GPU of that time has 80.

# %%
from dataclasses import replace

from dsmoe_lite import accounting, preset

predict("09-gigabytes", None)  # a number

v2 = preset("deepseek-v2")
plain = replace(v2, attention=AttentionConfig(n_heads=128, head_dim=128))
assert accounting.kv_cache_elements(plain) == 2 * 128 * 128 * 60
for name, config in {"with plain attention": plain, "as it is": v2}.items():
    size = accounting.kv_cache_bytes(config, n_tokens=128 * 1024, bits=16)
    print(f"DeepSeek-V2 {name}: {size / 1e9:.1f} GB for one text of 128K tokens")

# %% [markdown]
# ## Share keys and values: MQA and GQA
#
# All heads may ask different questions of the *same* keys and values: multi-query attention, MQA {cite:p}`MQA`. Or each
# group of heads shares a pair: grouped-query attention, GQA {cite:p}`GQA`. With $G$ groups,
#
# $$
# \mathbf{o}_{t,i} = \sum_{j \le t} \operatorname{Softmax}_j\!\left(\frac{\mathbf{q}_{t,i}^\top \mathbf{k}_{j,g(i)}}{\sqrt{d_h}}\right)\mathbf{v}_{j,g(i)},
# \qquad g(i) = \left\lfloor \frac{i\,G}{H} \right\rfloor, \quad i = 0, \dots, H-1
# $$ (eq:gqa)
#
# $G = H$ is MHA, $G = 1$ is MQA. **Build** it:


# %%
def grouped(layer, x, G, window=math.inf):
    q = apply_rope(heads(layer.query(x), H), cos, sin)  # (B, H, T, d_h)
    k = apply_rope(heads(layer.key(x), G), cos, sin)  # (B, G, T, d_h)
    v = heads(layer.value(x), G)
    group = torch.arange(H) * G // H  # g(i)
    o = look(q, k[:, group], v[:, group], 1 / math.sqrt(d_h), window)
    return layer.output(joined(o))


for groups in (1, n_kv_heads, H):
    theirs = Attention(
        D, AttentionConfig(n_heads=H, head_dim=d_h, n_kv_heads=groups)
    ).double()
    assert_close(grouped(theirs, x, groups), theirs(x, cos, sin))
print(f"MQA, GQA with {n_kv_heads} groups and MHA: mine equal the package's")

# %% [markdown]
# ## Look at a window only
#
# Mistral 7B {cite:p}`Mistral` lets a token see itself and the $W-1$ tokens before it. Then the cache
# need not grow either: the key of token $t$ takes slot $t \bmod W$, in the place of one that nobody sees any more.

# %% [markdown]
# **Ask.** Two layers with a window of 16: how far back can a token be and still change what the last one says?

# %%
predict("09-reach", None)  # a number of tokens

windowed = AttentionConfig(n_heads=H, head_dim=d_h, window=window)
theirs = Attention(D, windowed).double()
assert_close(grouped(theirs, x, H, window), theirs(x, cos, sin))


def rolling(layer, x, W):  # one token at a time, W slots
    slots_k = torch.zeros(2, H, W, d_h, dtype=torch.float64)
    slots_v, out = torch.zeros_like(slots_k), []
    for t in range(x.shape[1]):
        here, new = (cos[t : t + 1], sin[t : t + 1]), x[:, t : t + 1]
        slots_k[:, :, t % W] = apply_rope(heads(layer.key(new), H), *here)[:, :, 0]
        slots_v[:, :, t % W] = heads(layer.value(new), H)[:, :, 0]
        n = min(t + 1, W)  # filled slots, in any order: rotations know the places
        q = apply_rope(heads(layer.query(new), H), *here)
        o = (q @ slots_k[:, :, :n].mT / math.sqrt(d_h)).softmax(dim=-1)
        out.append(layer.output(joined(o @ slots_v[:, :, :n])))
    return torch.cat(out, dim=1)


assert_close(rolling(theirs, x, window), theirs(x, cos, sin))
print(f"a window of {window}: mine equals the package's, and {window} slots are enough")

second = Attention(D, windowed).double()
long = torch.randn(1, 160, D, dtype=torch.float64)
tables = rope_tables(d_h, 160)


def two_layers(x):
    return second(x + theirs(x, *tables), *tables)[0, -1]


changed = []
for back in range(160):
    other = long.clone()
    other[0, -1 - back] += 1.0
    changed.append(not torch.equal(two_layers(other), two_layers(long)))
reach = max(back for back, differs in enumerate(changed) if differs)
assert reach == 2 * (window - 1)
print(f"two layers reach {reach} tokens back: 2 (W - 1)")

# %% [markdown]
# **What to notice.** A window bounds the memory, and depth widens the view: $L(W-1)$ tokens. But what lies further back is
# gone, and what was passed on is only what a layer chose to pass on. MLA drops no token; what it gives up is width.
#
# ## Compress: MLA
#
# GQA keeps fewer keys and values. MLA (DeepSeek-V2 {cite:p}`DeepSeekV2`, Equations 9 to 19) keeps those of all heads, in
# *compressed* form. Of a token's input $\mathbf{h}_t$ it makes one **latent** vector of $d_c$ channels, and of that all keys and
# values:
#
# $$
# \mathbf{c}_t = W^{DKV} \mathbf{h}_t, \qquad
# \mathbf{k}^C_{t,i} = W^{UK}_i \mathbf{c}_t, \qquad
# \mathbf{v}_{t,i} = W^{UV}_i \mathbf{c}_t
# $$ (eq:mla-latent)
#
# for head $i$. Positions go into channels of their own, $d_h^R$ of them: every head has a rotated query, and all heads share
# *one* rotated key.
#
# $$
# \mathbf{k}^R_t = \operatorname{RoPE}(W^{KR} \mathbf{h}_t), \qquad
# \mathbf{q}^C_{t,i} = W^{Q}_i \mathbf{h}_t, \qquad
# \mathbf{q}^R_{t,i} = \operatorname{RoPE}(W^{QR}_i \mathbf{h}_t)
# $$ (eq:mla-rope)
#
# Queries and keys are both parts side by side, and attention is as ever:
#
# $$
# \mathbf{o}_{t,i} = \sum_{j \le t} \operatorname{Softmax}_j\!\left(
#   \frac{\mathbf{q}_{t,i}^{C\top} \mathbf{k}^C_{j,i} + \mathbf{q}_{t,i}^{R\top} \mathbf{k}^R_j}{\sqrt{d_h + d_h^R}}
# \right) \mathbf{v}_{j,i}
# $$ (eq:mla)
#
# Only $\mathbf{c}_t$ and $\mathbf{k}^R_t$ are kept: $d_c + d_h^R$ numbers a layer, however many heads there are. In V2, $d_c = 4 d_h$
# and $d_h^R = d_h / 2$. The released models normalise $\mathbf{c}_t$ (RMSNorm), which the
# equations leave out. V2 and V3 also make queries from a latent of their own, which saves memory in training and nothing in
# the cache; V2-Lite does not. **Build** the equations, with that norm:

# %%
from dsmoe_lite import MLAConfig
from dsmoe_lite.layers.mla import MLA

d_R, d_c = 4, latent
mla = MLA(
    D,
    MLAConfig(
        n_heads=H,
        qk_nope_head_dim=d_h,
        qk_rope_head_dim=d_R,
        v_head_dim=d_h,
        kv_lora_rank=d_c,
    ),
).double()
cos, sin = rope_tables(d_R, T)
W_UK, W_UV = mla.kv_up.weight.unflatten(0, (H, -1)).split(d_h, dim=1)  # (H, d_h, d_c)


def compressed(layer, x):  # what is kept: c (B, T, d_c), k^R (B, T, d_R)
    c, k_R = layer.kv_down(x).split((d_c, d_R), dim=-1)
    return layer.kv_norm(c), apply_rope(k_R, cos, sin)


def queries(layer, x):  # q^C (B, H, S, d_h), q^R (B, H, S, d_R)
    q_C, q_R = heads(layer.query(x), H).split((d_h, d_R), dim=-1)
    return q_C, apply_rope(q_R, cos, sin)


def naive(q_C, q_R, c, k_R):
    k_C = torch.einsum("btc,hdc->bhtd", c, W_UK)  # keys of every head and token
    v = torch.einsum("btc,hdc->bhtd", c, W_UV)
    k = torch.cat((k_C, k_R[:, None].expand(-1, H, -1, -1)), dim=-1)
    return look(torch.cat((q_C, q_R), dim=-1), k, v, 1 / math.sqrt(d_h + d_R))


mine = mla.output(joined(naive(*queries(mla, x), *compressed(mla, x))))
assert_close(mine, mla.use("naive")(x, cos, sin))
print("MLA as its equations say, with the norm: mine equals the package's")
print(f"kept for a token: {d_c + d_R} numbers; MHA keeps {2 * H * d_h}")

# %% [markdown]
# ## Absorb: never make the keys
#
# To say one token, this **naive** form makes keys and values of *all* tokens from their latents again. That is far more work than
# attention itself. But a product can be read from both sides:
#
# $$
# \mathbf{q}_{t,i}^{C\top} \bigl(W^{UK}_i \mathbf{c}_j\bigr) = \bigl(W^{UK\top}_i \mathbf{q}^C_{t,i}\bigr)^{\!\top} \mathbf{c}_j,
# \qquad
# \sum_j a_j\, W^{UV}_i \mathbf{c}_j = W^{UV}_i \sum_j a_j\, \mathbf{c}_j
# $$ (eq:absorb)
#
# with the weights $a_j$ of the softmax. The query takes $W^{UK}$ in, once; then it looks at the latents themselves, and
# $W^{UV}$ comes after the sum, once. All heads look at the same vectors: it is MQA, with keys of $d_c + d_h^R$ channels and
# values of $d_c$.
#
# **Ask.** The scores are now products of vectors of $d_c + d_h^R$ channels. Which number belongs under the root?

# %%
from dsmoe_lite.layers.cache import GrowingCache

predict("09-scale", None)  # d_h + d_R, or d_c + d_R


def absorbed(q_C, q_R, c, k_R, channels):  # channels: under the root
    q = torch.cat((torch.einsum("bhsd,hdc->bhsc", q_C, W_UK), q_R), dim=-1)
    k = torch.cat((c, k_R), dim=-1)[:, None]  # (B, 1, T, d_c + d_R)
    o = look(q, k, c[:, None], 1 / math.sqrt(channels))  # (B, H, S, d_c)
    return torch.einsum("bhsc,hdc->bhsd", o, W_UV)


q_C, q_R = queries(mla, x)
c, k_R = compressed(mla, x)
right = naive(q_C, q_R, c, k_R)
assert_close(absorbed(q_C, q_R, c, k_R, d_h + d_R), right)
# one query, all latents
last = absorbed(q_C[:, :, -1:], q_R[:, :, -1:], c, k_R, d_h + d_R)
assert_close(last, right[:, :, -1:])
print("naive = absorbed, for all tokens and for the last alone")

cache, out = GrowingCache(), []
with torch.no_grad():  # no gradient passes a cache
    for t in range(T):
        now = slice(t, t + 1)
        y = mla.use("absorbed")(x[:, now], cos[now], sin[now], cache=cache)
        out.append(y)
        cache.advance(1)  # now the token counts
assert_close(torch.cat(out, dim=1), mine)
print("the package's absorbed path with its cache: the same, token by token")

# %% [markdown]
# The scores are the same numbers as before, whatever vectors they are computed from. So the root stays
# $\sqrt{d_h + d_h^R}$.
#
# ## Three wrong turns
#
# Each of them looks right, and none of them crashes.
#
# **1. The wrong root.** $\sqrt{d_c + d_h^R}$ instead. With $d_c > d_h$ scores shrink, as if read at a higher temperature.

# %%
lite = preset("deepseek-v2-lite").attention
blur = math.sqrt((lite.kv_lora_rank + lite.qk_rope_head_dim) / lite.qk_dim)
print(f"in V2-Lite every score would be divided by {blur:.2f}")
blurred = absorbed(q_C, q_R, c, k_R, d_c + d_R)
assert d_c == d_h or not torch.allclose(blurred, right)

# %% [markdown]
# **2. Positions inside.** Why channels of their own? Rotate $\mathbf{q}^C$ and $\mathbf{k}^C$ instead, each by the angle of its
# place, with matrices $R_t$ and $R_j$. Then
#
# $$
# (R_t\, \mathbf{q}^C_{t,i})^\top R_j\, W^{UK}_i \mathbf{c}_j = \bigl(W^{UK\top}_i R_{t-j}\, \mathbf{q}^C_{t,i}\bigr)^{\!\top} \mathbf{c}_j
# $$ (eq:rope-inside)
#
# and the matrix between query and latent depends on the distance $t - j$: the query cannot take it in once for all tokens. To
# rotate $W^{UK\top}_i\mathbf{q}^C_{t,i}$ and $\mathbf{c}_j$ themselves is something else.

# %%
full = rope_tables(d_h, T)
k_C = torch.einsum("btc,hdc->bhtd", c, W_UK)
scores = apply_rope(q_C, *full) @ apply_rope(k_C, *full).mT  # as it is meant
latents = rope_tables(d_c, T)
q_in = torch.einsum("bhsd,hdc->bhsc", q_C, W_UK)
turned = apply_rope(q_in, *latents) @ apply_rope(c[:, None], *latents).mT
same_place = torch.diagonal_copy(scores - turned, dim1=-2, dim2=-1).abs().max()
apart = (scores - turned).abs().max()
assert same_place < 1e-5 < 1e-3 < apart  # rotations have float32 angles
print("RoPE inside, absorbed: scores are equal where a token looks at itself,")
print("and wrong between tokens")

# %% [markdown]
# **3. A rotated key for every head.** It would work, and looks natural: every head has its rotated query, after all. But then
# each of these keys is kept:

# %%
for name, width in {
    "one rotated key for all heads": lite.kv_lora_rank + lite.qk_rope_head_dim,
    "one for each head": lite.kv_lora_rank + lite.n_heads * lite.qk_rope_head_dim,
    "MHA, heads of 128": 2 * lite.n_heads * lite.v_head_dim,
    "keys and values themselves": lite.n_heads * (lite.qk_dim + lite.v_head_dim),
}.items():
    print(f"V2-Lite, {name:30} {width:5,} numbers a token and layer")

# %% [markdown]
# The last line is what code keeps that makes all keys and values first and caches those, as the `naive` setting of DeepSeek's
# own inference code does: the right numbers, at more memory than MHA.
#
# ## How big is the cache?
#
# What one design costs, per layer, and what a few published models keep: move the controls.
#
# **Ask.** With 128 heads, between which numbers of groups of GQA does MLA lie? Does that depend on the number of heads?

# %%
predict("09-groups", None)  # two numbers; True or False

charts.cache_by_design()

# %% [markdown]
# **Ask.** Which of these models keeps most, and is it the largest? Set the context to 32K tokens: how many such texts fit beside
# each other into 80 GB, of it and of DeepSeek-V3?

# %%
predict("09-most", None)  # a name, True or False; two numbers

shown = (
    "deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "mixtral-8x7B", "dbrx",
    "deepseekmoe-16B", "llama-3.1-405B", "qwen2.5-72B", "deepseek-67B", "llama2-7B",
)  # fmt: skip
rows = accounting.cache_rows({name: preset(name) for name in shown})
charts.cache_calculator(rows)

# %%
for name in ("llama2-7B", "deepseek-v3"):
    size = accounting.kv_cache_bytes(preset(name), n_tokens=32 * 1024, bits=16)
    print(
        f"{name:12} {80e9 // size:3.0f} texts of 32K tokens in 80 GB, beside no weights"
    )

# %% [markdown]
# DeepSeek-V2's abstract promises a KV cache smaller by 93.3% than that of DeepSeek 67B. The numbers that are kept are not
# 93.3% fewer, though:

# %%
from dsmoe_lite.study import published

numbers = {
    name: accounting.kv_cache_elements(preset(name))
    for name in ("deepseek-67B", "deepseek-v2")
}
fewer = 1 - numbers["deepseek-v2"] / numbers["deepseek-67B"]
print(f"numbers a token: {numbers}, {fewer:.1%} fewer")
in_bits = 1 - 6 * numbers["deepseek-v2"] / (16 * numbers["deepseek-67B"])
entry = next(
    one for one in published.load()["kv_cache"]["published"]
    if one["text"] == "93.3%"
)  # fmt: skip
print(f"at 6 bits against 16: {in_bits:.1%} fewer; printed: {entry['text']}")
print(entry["source"])

# %% [markdown]
# **What to notice.** MLA alone gives 82.2%. The printed figure comes out exactly if each number of V2 takes 6 bits, which the paper
# mentions for its deployment (Section 3.2.3) and which MHA could do as well. And DeepSeek 67B is no MHA: it has 8 groups for 64 heads. Against
# plain attention of its own 128 heads V2 saves far more:

# %%
times = accounting.kv_cache_elements(plain) / numbers["deepseek-v2"]
print(f"plain attention of V2's heads would keep {times:.1f} times as much")

# %% [markdown]
# ## What does a step cost?
#
# Count multiplications for one new token at a context of $N$ tokens, a head. The naive path makes key and value of every
# token, $N d_c (d_h + d_v)$, and looks at them, $N (d_h + d_h^R + d_v)$, with values of $d_v$ channels ($d_v = d_h$ in all models
# here). The absorbed path only looks, at vectors of $d_c + d_h^R$ and of $d_c$ channels: $N (2 d_c + d_h^R)$, and takes
# $d_c (d_h + d_v)$ for query and output, whatever $N$ is.
#
# **Ask.** With the numbers of V2-Lite, by which factor is the absorbed path cheaper at a context of 8K? And when all 8K tokens of
# a prompt are read at once, is it still the cheaper one?

# %%
predict("09-factor", None)  # a factor; True or False


def multiplications(S, N, path):  # S new tokens, N in all, one head of V2-Lite
    through_up = lite.kv_lora_rank * (lite.qk_nope_head_dim + lite.v_head_dim)
    if path == "naive":
        return N * through_up + S * N * (lite.qk_dim + lite.v_head_dim)
    return S * through_up + S * N * (2 * lite.kv_lora_rank + lite.qk_rope_head_dim)


for what, S in {"one new token": 1, "all 8K tokens of a prompt": 8192}.items():
    ways = {path: multiplications(S, 8192, path) for path in ("naive", "absorbed")}
    print(f"{what}: naive / absorbed = {ways['naive'] / ways['absorbed']:.2f}")

# %% [markdown]
# So a prompt is read in the naive form, and the answer is said in the absorbed one. The package's `auto` counts in this way
# for each call.
#
# Multiplications are not time. Here is what one step of one attention layer took, with the geometry of V2-Lite, as
# `dsmoe bench mla` measured and recorded it. MHA has the same 16 heads of 128 channels, GQA 4 groups of them.

# %%
import json

from dsmoe_lite.bench import mla as mla_bench

measured = json.loads(mla_bench.record_path("cpu").read_text(encoding="utf-8"))
charts.decode_cost(measured["decode"])

# %% [markdown]
# If a step only had to read its cache, it would run at the speed of a copy; if it only had to multiply, at that of a large
# product. How near does each come, by what a step takes longer for each further token?

# %%
machine, speed = measured["provenance"], measured["peaks"]
print(f"{machine['processor']}, {machine['threads']} threads, float32, one sequence")
print(
    f"it copies {speed['copy GB/s']:.1f} GB/s, read and written,",
    f"and multiplies {speed['matmul GFLOP/s']:.0f} GFLOP/s\n",
)
for row in measured["goals"]:
    print(f"{row['what']:40} {row['value']:7.3g}   goal {row['goal']}")
print()
for row in measured["slopes"]:
    print(
        f"{row['method']:13}{row['FLOPs a byte']:8,.1f} FLOPs a byte of cache:",
        f"{row['of copy']:3.0%} of the copy, {row['of matmul']:3.0%} of the product",
    )
absorbed_row = measured["slopes"][-1]
most = speed["matmul GFLOP/s"] / absorbed_row["FLOPs a byte"] / speed["copy GB/s"]
print(
    f"\n{absorbed_row['method']}: at best at {most:.0%} of the copy, all else being free"
)

# %% [markdown]
# And on this machine, at small contexts:

# %% tags=["measured"]
here = mla_bench.decode_costs((256, 512, 1024), rounds=5)
charts.decode_cost(here, title="What does a decoded token cost here?")

# %% [markdown]
# **What to notice.** All lines grow with the context, the naive path's far above the others. It is behind by less than counting
# said: its large products run nearer to the machine's speed, and a good part of the absorbed step does not grow with the context
# (reading the layer's weights is in it) and was not counted. The absorbed path reads a seventh of MHA's bytes and is yet little
# faster: each number it reads is multiplied by 16 queries, as a key and again as a value. It is busy computing where MHA is busy
# reading, and so it cannot reach half the speed of a copy, which was the goal. GQA, here with 4 groups, reads little *and* computes
# little, and is the fastest. A GPU multiplies far more for each byte that it reads; there the figures differ, and we have not
# measured them yet. What MLA saves on any machine is memory. To read a prompt of 2K tokens costs what it costs in MHA, one of 8K a
# fifth more.
#
# ## Longer than trained: YaRN
#
# A model that was trained on texts of $L$ tokens (not layers, from here on) has seen rotations by up to $L$ places. The pair $j$ of rotated channels turns
# by $\theta_j = b^{-2j/d_h^R}$ a place, with the base $b = 10\,000$ (chapter 01 called the base $\theta$): once around every $2\pi/\theta_j$ tokens. A fast pair has been all around many
# times and has seen every angle. A slow one has not been around once, and beyond $L$ it shows angles that are new to the model.
#
# YaRN {cite:p}`YaRN` slows the slow pairs down by the factor $s$ by which the text grows, so that they stay among the angles they
# know; it leaves the fast ones alone, which tell neighbours apart; and mixes in between:
#
# $$
# \theta'_j = \gamma_j\, \theta_j + (1 - \gamma_j)\, \frac{\theta_j}{s}, \qquad
# \gamma_j = 1 - \operatorname{clamp}\!\left(\frac{j - low}{high - low}, 0, 1\right)
# $$ (eq:yarn)
#
# Pairs that turn at least $\beta_{fast}$ times in $L$ tokens are left alone, those that turn at most $\beta_{slow}$ times take the whole
# factor: $low = \max(0, \lfloor d(\beta_{fast}) \rfloor)$ and $high = \min(d_h^R - 1, \lceil d(\beta_{slow}) \rceil)$, where
#
# $$
# d(r) = \frac{d_h^R \ln\bigl(L / (2\pi r)\bigr)}{2 \ln b}
# $$ (eq:yarn-pair)
#
# is the pair that turns $r$ times in $L$ tokens. With more tokens in view a softmax gets flatter; so scores are also multiplied by
# $(0.1\, m \ln s + 1)^2$, with $m = 0.707$ in V2 and 1 in V3. Both take $s = 40$, $L = 4096$, $\beta_{fast} = 32$ and $\beta_{slow} = 1$
# (V2, Section 3.1.4; V3, Section 4.3), on the rotated channels alone, of which a head has 64.
#
# **Ask.** Of these 32 pairs, how many keep their frequency, and how many are slowed down by the whole factor 40?

# %%
from dsmoe_lite.config import YarnConfig
from dsmoe_lite.layers.rope import rope_frequencies, softmax_scale, yarn_range

predict("09-pairs", None)  # two numbers


def my_yarn(d, s, L, fast=32, slow=1, b=10_000):
    def pair(turns):
        return d * math.log(L / (2 * math.pi * turns)) / (2 * math.log(b))

    low, high = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), d - 1)
    theta = [b ** (-2 * j / d) for j in range(d // 2)]
    gamma = [1 - min(max((j - low) / (high - low), 0), 1) for j in range(d // 2)]
    return [g * t + (1 - g) * t / s for g, t in zip(gamma, theta, strict=True)]


yarn = v2.attention.yarn
mine = torch.tensor(my_yarn(64, 40, 4096), dtype=torch.float64)
assert_close(mine, rope_frequencies(64, 10_000.0, yarn))
small = torch.tensor(my_yarn(16, 4, 64), dtype=torch.float64)  # used below
assert_close(
    small, rope_frequencies(16, 10_000.0, YarnConfig(factor=4.0, original_max_len=64))
)
low, high = yarn_range(64, 10_000.0, yarn)
print(f"{low + 1} pairs, 0 to {low}, keep their frequency;")
print(f"{32 - high} pairs, {high} to 31, are 40 times slower")
for name in ("deepseek-v2", "deepseek-v3"):
    config = preset(name).attention
    factor = softmax_scale(config.qk_dim, config.yarn) * math.sqrt(config.qk_dim)
    print(f"{name}: scores times {factor:.6f}")

# %% [markdown]
# Which pairs move if the text is to become longer, or if the model was trained on longer texts to begin with? Move the sliders:

# %%
charts.rotary_frequencies(
    channels=64, factor=int(yarn.factor), trained=yarn.original_max_len
)

# %% [markdown]
# ### Does it help? A needle in a haystack
#
# Hide something in a long text, and ask for it at the end. Here a text is filler; in it, at random places, lie four needles of
# three tokens each: a mark, a key and its value. The last two tokens ask for one of the keys.

# %%
from dsmoe_lite.data.needle import NeedleConfig, needle_batch

row = needle_batch(NeedleConfig(), 1, 48, "shown").tokens[0].tolist()
haystack = NeedleConfig()
words = {0: "MARK", 1: "ASK"}
for token in row:
    if token >= haystack.first_filler:
        words[token] = "."
    elif token >= haystack.first_value:
        words[token] = f"value{token - haystack.first_value}"
    elif token > 1:
        words[token] = f"key{token - 2}"
print(" ".join(words[token] for token in row[:-1]), "->", words[row[-1]])

# %% [markdown]
# A small MLA model of two layers practised on strings that repeat, of 16 to 64 tokens, which it needed, then on such texts of **64**
# tokens, and was then asked in texts of 64, 128 and **256**. To guess among the four values in sight is right one time in four. Five
# seeds, 512 questions for each length (`dsmoe experiment needle`, a few minutes a seed; how its settings were found stands in
# `data/README.md`). The same weights were given four kinds of positions:
#
# - **RoPE**, as trained;
# - **RoPE, sharper**: only the scores are multiplied, as YaRN does;
# - **all slower**: every pair turns $s = 4$ times slower, position interpolation {cite:p}`PositionInterpolation`;
# - **YaRN**: with $s = 4$, $L = 64$. Of the eight pairs here only the fastest keeps its frequency, two are mixed, and five are four
#   times slower.
#
# **Ask.** At 64 tokens the model is nearly always right. Which share does each find at 256, *without* any further training? Is a
# needle near the beginning harder, or one near the question?

# %%
from dsmoe_lite.study.grids import records
from dsmoe_lite.study.rows import needle_rows

predict("09-needle", None)  # four shares; "beginning" or "question"

found = records("needle")
POSITIONS = {
    "plain": "RoPE",
    "sharper": "RoPE, sharper",
    "interpolated": "all slower",
    "yarn": "YaRN",
}
charts.needle(needle_rows(found, POSITIONS))

# %%
from statistics import mean

from dsmoe_lite.study.rows import needle_gaps, seed_line

for kind, shown_as in POSITIONS.items():
    share = mean(mean(record["recall"][kind]["256"]) for record in found)
    print(f"{shown_as:14} finds {share:.0%} at 256 tokens")
print()
for what, one, other in (
    ("YaRN minus RoPE", "yarn", "plain"),
    ("YaRN minus RoPE, sharper", "yarn", "sharper"),
    ("YaRN minus its frequencies alone", "yarn", "yarn-frequencies"),
):
    print(f"{what:33} {seed_line(needle_gaps(found, one, other, 256))}")

# %% [markdown]
# Released models are also trained on for a little at the new length: 1,000 steps in V2. Here 50 steps at 256 tokens:

# %%
EXTENDED = {"plain-extended": "RoPE, trained on", "yarn-extended": "YaRN, trained on"}
charts.needle(needle_rows(found, EXTENDED))

# %%
gap = needle_gaps(found, "yarn-extended", "plain-extended", 256)
print(f"after 50 steps, YaRN minus RoPE: {seed_line(gap)}")
for steps_done in ("5", "10", "20"):
    ways = {
        kind: mean(record["extension"][kind]["recall"][steps_done] for record in found)
        for kind in ("plain", "yarn")
    }
    print(f"after {steps_done:>2}: RoPE {ways['plain']:.2f}, YaRN {ways['yarn']:.2f}")

# %% [markdown]
# **What to notice.** At the trained length nothing is lost by YaRN, and at four times that it finds most of what RoPE misses, without
# a step of training. Its slower pairs do part of the work and the sharper scores another part; sharper scores alone do less than slower pairs alone. To slow
# *every* pair, the fast ones too, ruins this model even at 64 tokens: what stands right beside what is told by the fast pairs. At 256
# tokens RoPE finds least in the second half, even in the last quarter, at distances it knows from training; at 128 it is the
# beginning that suffers. Our guess for 256: tokens further back than any it was trained with draw attention away.
#
# And a little training at the new length closes nearly all of the gap, with either kind of positions. YaRN is the better start; after
# 50 steps it is still ahead in all five seeds, but by so little that the interval includes zero. This is a toy: two layers, a made-up language, a context of 64. That a
# model of billions of weights finds needles in 128K tokens, as V2 and V3 report, is another matter.
#
# ## What does it cost in quality?
#
# MLA keeps less than MHA. Does it know less? Four dense models of the course's size with equally many parameters: what one
# saves in attention, it has in its FFN. Each has four heads of 16 channels; MLA a latent of 32 channels and 8 rotated ones, twice
# and half a head's width (V2 takes four times and half). 1,200 steps, five seeds.
#
# **Ask.** Order MHA, GQA with two groups, MQA and MLA by their loss. Are the gaps larger than the chance of a seed?

# %%
from dsmoe_lite.study.grids import grid

predict("09-order", None)  # four names; True or False

recorded = records("attention")
NAMES = {"mha": "MHA", "gqa": "GQA, 2 groups", "mqa": "MQA", "mla": "MLA"}
for name, job in grid("attention").jobs.items():
    total = accounting.parameters(job.model).total
    width = job.model.attention.cache_width
    print(f"{NAMES[name]:14} {total:,} parameters; kept a token and layer: {width:3}")

# %%
from dsmoe_lite.study.rows import metric_rows

print(f"{recorded[0]['tokens']:,} tokens each")
charts.model_comparison(
    metric_rows(recorded, NAMES),
    title="What does a smaller cache cost, at the same number of parameters?",
)

# %%
from dsmoe_lite.study.rows import gaps

for metric in ("held-out loss", "recall, rare people"):
    print(f"{metric} minus that of MHA, by seed:")
    for name in ("gqa", "mqa", "mla"):
        print(f"  {NAMES[name]:14} {seed_line(gaps(recorded, name, 'mha', metric))}")

# %% [markdown]
# **What to notice.** GQA and MQA cannot be told from MHA here, and MQA keeps least of all. MLA, which here keeps as much as 1.25
# groups, is *behind*, in every seed, in loss and in what it
# remembers of rare people: at this size compression costs something. DeepSeek-V2 reports the opposite, MLA ahead of MHA, for models of 15.8B
# and 250.8B weights (Appendix D.2, Table 9). Ours has heads of 16 channels and a latent of half the model's width, was trained on few
# tokens, and no setting was searched for any of the four. What it would take to see V2's result, we do not know;
# wider heads and longer training are the first things to try.
#
# Train two of them for a short while, with one FFN width for both, so that MLA has a few weights more:

# %% tags=["trained"]
from dsmoe_lite import TrainConfig, Transformer, train
from dsmoe_lite.data.batches import Batches, heldout_batches
from dsmoe_lite.data.tokenizer import load_tokenizer
from dsmoe_lite.data.world import World
from dsmoe_lite.evaluate import heldout_loss

world = World()
tokenizer = load_tokenizer(world, 1024)
held_out = heldout_batches(world, tokenizer, 64, 64, 8)


def train_with(attention):
    torch.manual_seed(seed)
    config = replace(
        preset("course-dense"),
        vocab_size=tokenizer.get_vocab_size(),
        attention=attention,
    )
    model = Transformer(config).to(lab.device)
    batches = Batches(world, tokenizer, batch_size=16, seq_len=64)
    run = train(model, batches, TrainConfig(steps=steps, seed=seed))
    return run, heldout_loss(model, held_out, world.domains).loss


runs = {
    "GQA": train_with(AttentionConfig(n_heads=4, head_dim=16, n_kv_heads=n_kv_heads)),
    "MLA": train_with(
        MLAConfig(
            n_heads=4,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            kv_lora_rank=latent,
        )
    ),
}
# recorded over seeds 0 to 4, widened; not yet for a GPU
interval = {"smoke": (4.3, 5.0), "cpu": (1.5, 1.9), "gpu": (0.0, 7.0)}[profile]
for name, (_, loss) in runs.items():
    claim(f"held-out loss of {name}, nats a token", loss, interval, asserted=lab.own)
report(MLA_minus_GQA=runs["MLA"][1] - runs["GQA"][1])

# %% tags=["trained"]
charts.training_curves(
    [
        {"model": name, "seed": seed, "step": step, "loss": loss}
        for name, (run, _) in runs.items()
        for step, loss in enumerate(run.losses)
    ],
    title="Does compression slow the learning?",
)

# %% [markdown]
# ## Exercises
#
# **1. A bug from the wild** (15 minutes). RoPE turns *pairs* of channels. Which two make a pair is a choice: the paper and
# DeepSeek's own code take neighbours, $2j$ and $2j + 1$; this package, like most models in `transformers`, takes channel $j$ of each half. Weights that
# were trained with one choice give wrong results with the other, and no error is raised. Port the weight of a query projection: `W` has
# $H\,(d_h + d_h^R)$ rows, head by head, first the $d_h$ plain channels of a head, then its $d_h^R$ rotated ones as neighbours. Return it for
# halves.


# %%
from dsmoe_lite.layers.rope import apply_rope_pairs, pairs_to_halves


def ported(W, n_heads, nope, rope):  # W (n_heads * (nope + rope), D)
    return None  # the same shape


def turns_alike(ported):
    for draw, (n_heads, nope, rope, D) in enumerate(
        ((1, 0, 4, 6), (1, 3, 8, 5), (3, 0, 6, 7), (4, 5, 8, 9))
    ):
        generator = torch.Generator().manual_seed(draw)
        W, x, key = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((n_heads * (nope + rope), D), (1, 10, D), (rope, D))
        )
        tables = rope_tables(rope, 10)
        new = ported(W.clone(), n_heads, nope, rope)
        assert tuple(new.shape) == tuple(W.shape), f"{tuple(W.shape)} rows and columns"

        def of_heads(weight, n_heads=n_heads, x=x):
            return (x @ weight.T).unflatten(-1, (n_heads, -1)).transpose(1, 2)

        before, after = of_heads(W), of_heads(new)
        plain_too = torch.equal(before[..., :nope], after[..., :nope])
        assert plain_too, "the plain channels must stay as they were"
        right = apply_rope_pairs(before[..., nope:], *tables) @ (
            apply_rope_pairs(x @ key.T, *tables).mT
        )
        got = apply_rope(after[..., nope:], *tables) @ (
            apply_rope(pairs_to_halves(x @ key.T), *tables).mT
        )
        assert torch.allclose(got, right), f"{n_heads} heads: scores differ"


generator = torch.Generator().manual_seed(0)
q, k = torch.randn(2, 1, 10, 64, generator=generator, dtype=torch.float64)
tables = rope_tables(64, 10)
right = apply_rope_pairs(q, *tables) @ apply_rope_pairs(k, *tables).mT
unported = apply_rope(q, *tables) @ apply_rope(k, *tables).mT
agrees = torch.isclose(right, unported).float().mean()
print(f"not ported, {agrees:.0%} of the scores are right: where a token meets itself")
verdict = check_exercise(ported, turns_alike)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def ported(W, n_heads, nope, rope):
#     plain, turned = W.unflatten(0, (n_heads, nope + rope)).split((nope, rope), dim=1)
#     return torch.cat((plain, pairs_to_halves(turned, dim=1)), dim=1).flatten(0, 1)
# ```
#
# The same goes for the rotated rows of the down-projection of keys. The case is recorded as `rope-interleave` in
# `data/published.json`.
# </details>
#
# **2. Fold it in** (10 minutes). The absorbed path multiplies by $W^{UV}_i$ and then by $W^O$. Both are fixed matrices: make one of
# them. `W_O` is $D \times H d_v$, `W_UV` is $H \times d_v \times d_c$; return the matrix that takes the mixed latents of all heads, side by side,
# to the output.


# %%
def folded(W_O, W_UV):  # (D, H * d_v), (H, d_v, d_c)
    return None  # (D, H * d_c)


def folds(folded):
    for draw, (D, n_heads, d_v, d_c) in enumerate(
        ((5, 1, 3, 4), (6, 3, 2, 7), (4, 4, 4, 4))
    ):
        generator = torch.Generator().manual_seed(draw)
        W_O, W_UV, mixed = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((D, n_heads * d_v), (n_heads, d_v, d_c), (n_heads, d_c))
        )
        values = [W_UV[i] @ mixed[i] for i in range(n_heads)]
        right = W_O @ torch.cat(values)
        new = folded(W_O, W_UV)
        assert tuple(new.shape) == (D, n_heads * d_c), (
            f"{D} rows, {n_heads * d_c} columns"
        )
        got = new @ mixed.flatten()
        assert torch.allclose(got, right), f"{n_heads} heads: the output differs"


c = v2.attention
two = c.n_heads * c.v_head_dim * (v2.d_model + c.kv_lora_rank)
one = v2.d_model * c.n_heads * c.kv_lora_rank
print(f"weights in V2, a layer: {two / 1e6:.0f} million in two, {one / 1e6:.0f} in one")
verdict = check_exercise(folded, folds)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def folded(W_O, W_UV):
#     of_heads = W_O.unflatten(1, (W_UV.shape[0], -1))  # (D, H, d_v)
#     return torch.einsum("ohv,hvc->ohc", of_heads, W_UV).flatten(1)
# ```
#
# It is right, and no gain: the one matrix is 3.6 times as large as the two, for $d_c$ is four times $d_v$. To absorb means to
# choose an order of multiplications; the package keeps the two.
# </details>
#
# **3. Other parameters** (a few minutes of computing). How narrow may the latent be? And is one key for all heads enough?
#
# ```
# dsmoe run 09 -p latent=4
# dsmoe run 09 -p latent=128
# dsmoe run 09 -p n_kv_heads=1
# ```
#
# Compare the held-out losses of the short training (`dsmoe run` prints them); a wider latent also has more weights.
#
# ## Recap
#
# 1. Keys and values of earlier tokens do not change: keep them, and every token is computed once. The price is memory.
# 2. MQA and GQA keep fewer keys and values, a window only the last; MLA keeps one latent vector and one rotated key a token,
#    however many heads there are.
# 3. Read with many tokens at once, MLA makes keys and values; said one by one, the query takes $W^{UK}$ in and looks at the
#    latents. The scale stays $1/\sqrt{d_h + d_h^R}$, and positions need channels of their own.
# 4. The absorbed path reads little and computes much.
# 5. YaRN slows down the pairs that training never saw turn.
#
# **Claims settled here:** a cache changes no token; MLA's two paths are equal, and the scale, the place of positions and the shared key
# are not matters of taste; 93.3% is MLA *and* numbers of 6 bits; YaRN finds needles at four times the trained length that RoPE
# misses, without training. Not reproduced at this size: that MLA is better than MHA.
