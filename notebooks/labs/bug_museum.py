# %% [markdown]
# # Bug museum: bugs that raise no error
#
# A router with a bug still routes. It gives every token some experts, the model learns to live with them, and its
# loss goes down. Nothing crashes.
#
# **How do you find a bug that raises no error?** Compare the code with a *property*: something that is true of every
# right answer, whatever its numbers. For example, padding must not change a loss. Below each exhibit you find a check
# of one such property.
#
# The exhibits are from published code and files. Most are bugs that users or developers reported. A few are traps,
# into which the next reader may walk. Each is written anew, in a few lines of torch. First you read what the function
# must do, what went wrong, and when nothing shows. Then it is your turn:
#
# 1. Run the cell with the faulty function, then the check. It prints "not right yet" and the symptom.
# 2. Find the fault and mend it in place. A few lines are enough each time.
# 3. Run both again. When the check prints "right", ask yourself which sizes and settings it did not try: the grading
#    check tries them.
#
# Read a linked source after your repair, not before, because many sources contain the remedy. Each answer is graded
# alone: **everything that an answer needs must be in its cell**, apart from the given code and the parameters. Your
# routers have {{n_experts}} experts, of which a token visits {{top_k}}.

# %% tags=["parameters"]
n_experts: int = 8  # experts of your routers: 8..64
top_k: int = 2  # experts that a token visits: 2..4
seed: int = 0  # of your tokens: 0..999999

# %% tags=["given"]
import math

import torch


def draw(seed, *shape):
    """Normal numbers of this shape, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def router_logits(seed, n_tokens=100, n_experts=n_experts):
    """Logits (T, E) of a router that prefers the first experts."""
    return draw(seed, n_tokens, n_experts) + torch.linspace(1, -1, n_experts)


def switch_loss(logits):
    """The balance loss of one layer's logits (T, E): 1 at balance, E at collapse."""
    scores, E = logits.softmax(dim=1), logits.shape[1]
    first = torch.bincount(scores.argmax(dim=1), minlength=E) / len(scores)
    return float(E * (first * scores.mean(dim=0)).sum())


def z_loss(logits):
    """Mean square of the log of the router's normaliser, which keeps logits small."""
    return float(logits.logsumexp(dim=1).square().mean())


def same(found, expected, tolerance=1e-4):
    """Whether two results have one shape and equal numbers, up to rounding."""
    found, expected = (torch.as_tensor(one).double() for one in (found, expected))
    return found.shape == expected.shape and bool(
        ((found - expected).abs() <= tolerance * (1 + expected.abs())).all()
    )


# %%
from dsmoe_lite.labs import check_exercise

# %% [markdown]
# ## Room 1: balance losses
#
# A balance loss is small if all experts get equally many tokens. If it measures the wrong thing, training goes on,
# and the router is pushed the wrong way, or not at all.

# %% [markdown] question="padding"
# ### 1. Padding (1 point)
#
# **What it must do.** Short texts of a batch are filled up with padding. Let $T$ be the number of *real* tokens, $E$
# the number of experts and $K$ the number that a token chooses. The loss is
#
# $$\mathcal{L} = \sum_{i=1}^{E} f_i\,P_i, \qquad
# f_i = \frac{E}{KT}\sum_{t=1}^{T} \mathbb{1}(\text{token } t \text{ chooses expert } i), \qquad
# P_i = \frac1T\sum_{t=1}^{T} s_{i,t},$$
#
# where $s_{i,t}$ is token $t$'s score of expert $i$. All sums are over real tokens. `padded_loss` gets the scores and
# choices of all tokens, padding included, and `is_padding`, one bool per token. It returns the loss, a number.
#
# **What went wrong.** All padding chooses the same experts. They looked overloaded, and the router was pushed away
# from them. This happened in two libraries.
#
# **When nothing shows.** In a batch of texts that are equally long.
#
# *Source: Hugging Face transformers, [issue 28505](https://github.com/huggingface/transformers/issues/28505); NVIDIA
# Megatron-LM, [pull request 2121](https://github.com/NVIDIA/Megatron-LM/pull/2121).*


# %% tags=["answer"] question="padding"
def padded_loss(scores, topk_ids, is_padding):  # (T, E), (T, K), (T,)
    T, K = topk_ids.shape
    E = scores.shape[1]
    f = torch.bincount(topk_ids.flatten(), minlength=E) * E / (K * T)
    P = scores.mean(dim=0)
    return float((f * P).sum())


# %% tags=["check"] question="padding"
def check(padded_loss):
    logits = router_logits(seed)
    logits[60:] = torch.linspace(4, -4, n_experts)  # 40 times the same padding
    scores = logits.softmax(dim=1)
    ids = scores.topk(top_k, dim=1).indices
    is_padding = torch.arange(100) >= 60
    alone = padded_loss(scores[:60], ids[:60], is_padding[:60])
    padded = padded_loss(scores, ids, is_padding)
    assert same(padded, alone), (
        f"60 tokens have a loss of {alone:.3f}, with padding behind them {padded:.3f}"
    )


verdict = check_exercise(padded_loss, check)


# %% tags=["solution"] question="padding"
def padded_loss(scores, topk_ids, is_padding):
    scores, topk_ids = scores[~is_padding], topk_ids[~is_padding]
    T, K = topk_ids.shape
    E = scores.shape[1]
    f = torch.bincount(topk_ids.flatten(), minlength=E) * E / (K * T)
    P = scores.mean(dim=0)
    return float((f * P).sum())


# %% tags=["hidden"] question="padding"
def check(answer, reference, random):
    for K in (1, 2, 3, 4):
        s = random.getrandbits(31)
        scores = router_logits(s, 80).softmax(dim=1)
        ids = router_logits(s + 1, 80).topk(K, dim=1).indices
        padding = torch.arange(80) % (K + 1) == 0
        ids[padding] = torch.arange(K)
        scores[padding] = scores[0].clone()
        expected = reference(scores, ids, padding)
        assert same(answer(scores, ids, padding), expected)


# %% [markdown] question="layers"
# ### 2. The whole model (1 point)
#
# **What it must do.** The balance loss of a model is the mean over its $L$ layers of each layer's own loss,
#
# $$\mathcal{L} = \frac1L\sum_{l=1}^{L} E\sum_{i=1}^{E} f_i^{(l)}\,P_i^{(l)} .$$
#
# $f_i^{(l)}$ is the number of layer $l$'s tokens that choose expert $i$, divided by the number $T$ of tokens.
# $P_i^{(l)}$ is the mean softmax score of expert $i$ in layer $l$. With $K$ choices per token the loss is $K$ at
# balance, and $E$ if all tokens share the same $K$ experts equally. `model_loss` gets one tensor of logits (T, E) per
# layer and returns a number.
#
# **What goes wrong.** Take four layers of 8 experts with $K = 2$, and let each layer collapse on two other experts.
# The mean over the layers is 8.0. The code that serves Mixtral, Qwen2-MoE and OLMoE returns 2.0, the value of perfect
# balance.
#
# **When nothing shows.** In a model with one layer of experts, and in one whose layers are all balanced.
#
# *Source: transformers 5.23.0, modeling_mixtral.py; issues
# [28255](https://github.com/huggingface/transformers/issues/28255),
# [28093](https://github.com/huggingface/transformers/issues/28093) and
# [31464](https://github.com/huggingface/transformers/issues/31464).*


# %% tags=["answer"] question="layers"
def model_loss(layers, top_k):  # a list of L tensors (T, E)
    logits = torch.cat(layers)
    scores = logits.softmax(dim=1)
    topk_ids = scores.topk(top_k, dim=1).indices
    T, E = scores.shape
    f = torch.bincount(topk_ids.flatten(), minlength=E) / T
    return float(E * (f * scores.mean(dim=0)).sum())


# %% tags=["check"] question="layers"
def check(model_loss):
    layers = []
    for start in range(0, n_experts, top_k):
        collapsed = torch.full((16, n_experts), -30.0)
        collapsed[:, start : start + top_k] = 0  # all tokens go to these K experts
        layers.append(collapsed)
    found = model_loss(layers, top_k)
    assert same(found, n_experts), (
        f"all {len(layers)} layers have collapsed, and the loss is {found:.2f};"
        f" a balanced model has {top_k}"
    )


verdict = check_exercise(model_loss, check)


# %% tags=["solution"] question="layers"
def model_loss(layers, top_k):
    losses = []
    for logits in layers:
        scores = logits.softmax(dim=1)
        topk_ids = scores.topk(top_k, dim=1).indices
        T, E = scores.shape
        f = torch.bincount(topk_ids.flatten(), minlength=E) / T
        losses.append(float(E * (f * scores.mean(dim=0)).sum()))
    return sum(losses) / len(losses)


# %% tags=["hidden"] question="layers"
def check(answer, reference, random):
    for n_layers, K in ((1, 2), (2, 1), (3, 3), (5, 2)):
        layers = []
        for _ in range(n_layers):
            renamed = torch.tensor(random.sample(range(n_experts), n_experts))
            logits = router_logits(random.getrandbits(31), 40)
            layers.append(logits[:, renamed] * random.uniform(1, 3))
        expected = reference(layers, K)
        assert same(answer(layers, K), expected)


# %% [markdown] question="softmax_twice"
# ### 3. A loss without force (1 point)
#
# **What it must do.** A router multiplies a token by its weight. The products are the *logits*. Their softmax over
# all $E$ experts are the *scores*. The $K$ best scores are the token's gates, not divided by their sum. The balance
# loss is $\sum_i f_i P_i$, where $f_i$ is expert $i$'s share of all choices times $E$, and $P_i$ is the mean score of
# expert $i$. `gates_and_loss` gets tokens (T, D) and the weight (E, D). It returns the gates (T, K), best first, and
# the loss.
#
# **What went wrong.** The mean scores in the loss were flattened towards uniform, and the loss lost its gradient. It
# happened to the families of Mixtral, Qwen-MoE and OLMoE. The gates below are right, and must stay so.
#
# **When nothing shows.** While the router is balanced. The loss is then 1, as it should be.
#
# *Source: transformers, [issue 45120](https://github.com/huggingface/transformers/issues/45120).*


# %% tags=["answer"] question="softmax_twice"
def router(x, weight, top_k):  # (T, D), (E, D)
    router_logits = (x @ weight.T).softmax(dim=1)
    gates, topk_ids = router_logits.topk(top_k, dim=1)
    return router_logits, gates, topk_ids


def gates_and_loss(x, weight, top_k):
    logits, gates, topk_ids = router(x, weight, top_k)
    T, E = logits.shape
    f = torch.bincount(topk_ids.flatten(), minlength=E) * E / (top_k * T)
    P = logits.softmax(dim=1).mean(dim=0)
    return gates, float((f * P).sum())


# %% tags=["check"] question="softmax_twice"
def check(gates_and_loss):
    weight = torch.zeros(n_experts, 4)
    weight[:top_k] = 5.0  # every token wants the same K experts, and no other
    _, loss = gates_and_loss(torch.ones(10, 4), weight, top_k)
    assert loss > 0.99 * n_experts / top_k, (
        f"all tokens choose the same {top_k} of {n_experts} experts, and the loss is"
        f" only {loss:.2f}; a balanced router has 1"
    )


verdict = check_exercise(gates_and_loss, check)


# %% tags=["solution"] question="softmax_twice"
def gates_and_loss(x, weight, top_k):
    scores = (x @ weight.T).softmax(dim=1)
    gates, topk_ids = scores.topk(top_k, dim=1)
    T, E = scores.shape
    f = torch.bincount(topk_ids.flatten(), minlength=E) * E / (top_k * T)
    P = scores.mean(dim=0)
    return gates, float((f * P).sum())


# %% tags=["hidden"] question="softmax_twice"
def check(answer, reference, random):
    for K in (1, 2, 4):
        s = random.getrandbits(31)
        x, weight = draw(s, 50, 6), draw(s + 1, n_experts, 6)
        expected = reference(x, weight, K)
        gates, loss = answer(x, weight, K)
        assert same(gates, expected[0])
        assert same(loss, expected[1])


# %% [markdown] question="switch"
# ### 4. Every layer sparse (1 point)
#
# **What it must do.** Every `sparse_step`-th layer of a model has experts, and the others have a dense FFN. If
# `sparse_step` is 0, all layers are dense. The training loss is
#
# $$\mathcal{L} = \mathcal{L}_{\text{text}} + \alpha\,\overline{\mathcal{L}}_{\text{balance}}
# + \alpha_z\,\overline{\mathcal{L}}_{z} .$$
#
# The bars are means over the layers that have experts; $\alpha$ and $\alpha_z$ are weights. If no layer has experts,
# $\mathcal{L} = \mathcal{L}_{\text{text}}$. The losses of one layer, `switch_loss` and `z_loss`, are given.
# `total_loss` gets a list with one entry per layer: the router's logits, or None for a dense layer.
#
# **What goes wrong.** A Switch Transformer in which *every* layer has experts gets no balance loss and no z-loss,
# without a word.
#
# **When nothing shows.** While some layers are dense.
#
# *Source: transformers 5.23.0, modeling_switch_transformers.py;
# [issue 29503](https://github.com/huggingface/transformers/issues/29503).*


# %% tags=["answer"] question="switch"
def total_loss(text_loss, logits, sparse_step, alpha, alpha_z):
    if sparse_step > 1:
        routers = [one for one in logits if one is not None]
        balance = sum(switch_loss(one) for one in routers) / len(routers)
        z = sum(z_loss(one) for one in routers) / len(routers)
        return text_loss + alpha * balance + alpha_z * z
    return text_loss


# %% tags=["check"] question="switch"
def check(total_loss):
    mild, strong = (
        [factor * router_logits(seed + n) for n in range(4)] for factor in (0.1, 5.0)
    )
    before, after = (total_loss(2.0, each, 1, 0.01, 0.001) for each in (mild, strong))
    assert before < after, (
        f"four layers whose routers collapse: the loss was {before:.3f} before and is"
        f" {after:.3f} now"
    )


verdict = check_exercise(total_loss, check)


# %% tags=["solution"] question="switch"
def total_loss(text_loss, logits, sparse_step, alpha, alpha_z):
    routers = [one for one in logits if one is not None]
    if not routers:
        return text_loss
    balance = sum(switch_loss(one) for one in routers) / len(routers)
    z = sum(z_loss(one) for one in routers) / len(routers)
    return text_loss + alpha * balance + alpha_z * z


# %% tags=["hidden"] question="switch"
def check(answer, reference, random):
    for sparse_step in (0, 1, 2, 3):
        logits = [
            router_logits(random.getrandbits(31), 30)
            if sparse_step and (layer + 1) % sparse_step == 0
            else None
            for layer in range(6)
        ]
        weights = random.uniform(0.5, 1), random.uniform(0.1, 0.2)
        expected = reference(3.0, logits, sparse_step, *weights)
        assert same(answer(3.0, logits, sparse_step, *weights), expected)


# %% [markdown]
# ## Room 2: routers and gates
#
# A router gives each token $K$ experts and $K$ gates. A wrong expert is an expert all the same, and a wrong gate is a
# number all the same. Both look plausible.

# %% [markdown] question="groups"
# ### 5. Out of reach (1 point)
#
# **What it must do.** The experts form `n_group` groups of equal size: the first experts are the first group, and so
# on. Each token ranks experts by a biased score $s_{i,t} + b_i$, where the score $s_{i,t}$ is between 0 and 1 and the
# expert's bias $b_i$ is any number. A group's worth is the sum of its two highest biased scores. A token may use its
# best `topk_group` groups only. In these groups it chooses the `top_k` experts with the highest biased scores.
# `choose` returns their ids (T, K), in any order.
#
# **What went wrong.** Tokens chose experts of groups that they must not use. With biases of $-1$ *every* expert that
# they chose was of such a group.
#
# **When nothing shows.** If all biases are 0 or more.
#
# *Source: transformers, [issue 45440](https://github.com/huggingface/transformers/issues/45440).*


# %% tags=["answer"] question="groups"
def choose(biased, n_group, topk_group, top_k):  # (T, E)
    T, E = biased.shape
    grouped = biased.view(T, n_group, E // n_group)
    worth = grouped.topk(2, dim=2).values.sum(dim=2)
    best = worth.topk(topk_group, dim=1).indices
    closed = torch.ones(T, n_group, dtype=torch.bool).scatter(1, best, False)
    masked = grouped.masked_fill(closed.unsqueeze(2), 0.0)
    return masked.view(T, E).topk(top_k, dim=1).indices


# %% tags=["check"] question="groups"
def check(choose):
    biased, size = router_logits(seed).sigmoid() - 1, n_experts // 4  # biases of -1
    worth = biased.view(-1, 4, size).topk(2, dim=2).values.sum(dim=2)
    best = worth.topk(2, dim=1).indices
    groups = torch.as_tensor(choose(biased, 4, 2, top_k)) // size
    outside = (groups.unsqueeze(2) != best.unsqueeze(1)).all(dim=2).float().mean()
    assert outside == 0, (
        f"with biases of -1, {float(outside):.0%} of the experts chosen are in groups"
        " that their token may not use"
    )


verdict = check_exercise(choose, check)


# %% tags=["solution"] question="groups"
def choose(biased, n_group, topk_group, top_k):
    T, E = biased.shape
    grouped = biased.view(T, n_group, E // n_group)
    worth = grouped.topk(2, dim=2).values.sum(dim=2)
    best = worth.topk(topk_group, dim=1).indices
    closed = torch.ones(T, n_group, dtype=torch.bool).scatter(1, best, False)
    masked = grouped.masked_fill(closed.unsqueeze(2), -torch.inf)
    return masked.view(T, E).topk(top_k, dim=1).indices


# %% tags=["hidden"] question="groups"
def check(answer, reference, random):
    for n_group, topk_group in ((4, 2), (2, 1), (4, 3)):
        for bias in (-50.0, -1.0, -0.4, 0.3):
            biased = router_logits(random.getrandbits(31), 40).sigmoid() + bias
            biased += 0.2 * draw(random.getrandbits(31), n_experts)
            expected = reference(biased, n_group, topk_group, 3)
            found = torch.as_tensor(answer(biased, n_group, topk_group, 3))
            assert found.shape == expected.shape
            assert torch.equal(found.long().sort().values, expected.sort().values)


# %% [markdown] question="bias"
# ### 6. A bias that should only choose (1 point)
#
# **What it must do.** DeepSeek-V3 adds a bias $b_i$ to the score $s_{i,t}$ only to choose experts. Token $t$ chooses
# the $K$ experts with the largest $s_{i,t} + b_i$. Its gates are
#
# $$g_{i,t} = \frac{s_{i,t}}{\sum_{j \text{ chosen}} s_{j,t}} .$$
#
# `route` returns the ids (T, K) and their gates (T, K).
#
# **What goes wrong.** The bias is there to balance, and yet it changes the output of the layer. (This one is a trap:
# our sources name no library with this bug, and DeepSeek-V3's own code is right.)
#
# **When nothing shows.** While all biases are 0, as they are before the first update.
#
# *Source: arXiv:2412.19437, Equation 16; [DeepSeek-V3](https://github.com/deepseek-ai/DeepSeek-V3),
# inference/model.py.*


# %% tags=["answer"] question="bias"
def route(scores, bias, top_k):  # (T, E), (E,)
    chosen = (scores + bias).topk(top_k, dim=1)
    gates = chosen.values / chosen.values.sum(dim=1, keepdim=True)
    return chosen.indices, gates


# %% tags=["check"] question="bias"
def check(route):
    scores = router_logits(seed).sigmoid()
    before, after = (
        route(scores, torch.full((n_experts,), b), top_k) for b in (0.0, 0.5)
    )
    assert torch.equal(before[0], after[0]), (
        "the same bias for all experts changes who is chosen"
    )
    moved = float((before[1] - after[1]).abs().max())
    assert moved < 1e-4, (
        "the same bias for all experts changes no choice, and yet gates move by up to"
        f" {moved:.2f}"
    )


verdict = check_exercise(route, check)


# %% tags=["solution"] question="bias"
def route(scores, bias, top_k):
    topk_ids = (scores + bias).topk(top_k, dim=1).indices
    gates = scores.gather(1, topk_ids)
    return topk_ids, gates / gates.sum(dim=1, keepdim=True)


# %% tags=["hidden"] question="bias"
def check(answer, reference, random):
    for K in (1, 2, 4):
        scores = router_logits(random.getrandbits(31), 60).sigmoid()
        bias = 0.5 * draw(random.getrandbits(31), n_experts)
        dense = []
        for ids, gates in (reference(scores, bias, K), answer(scores, bias, K)):
            assert ids.shape == gates.shape == (60, K)
            empty = torch.zeros(60, n_experts, dtype=torch.float64)
            dense.append(empty.scatter(1, ids.long(), gates.double()))
        assert same(dense[1], dense[0])


# %% [markdown] question="softmax_order"
# ### 7. Gates of another model (1 point)
#
# **What it must do.** This is DeepSeekMoE's layer, with $\text{FFN}_i$ the experts and $u_t$ a token:
#
# $$y_t = \sum_{i \text{ chosen}} s_{i,t}\,\text{FFN}_i(u_t), \qquad
# s_{i,t} = \frac{e^{z_{i,t}}}{\sum_{j=1}^{E} e^{z_{j,t}}} .$$
#
# $z_{i,t}$ is the logit of expert $i$, and the $K$ experts with the largest $s_{i,t}$ are chosen. `layer` gets the
# logits (T, E) and the outputs of *all* experts (T, E, D), and returns $y$ (T, D).
#
# **What goes wrong.** Code that is right for GShard's gates is not right for DeepSeekMoE's. Used there, it makes all
# gates too large. With $K = 1$ it does not even matter how sure the router is.
#
# **When nothing shows.** In models that divide the chosen scores by their sum, as GShard does.
#
# *Source: arXiv:2006.16668, Algorithm 1; arXiv:2401.06066, Equations 9 to 11;
# [litgpt](https://github.com/Lightning-AI/litgpt), litgpt/model.py.*


# %% tags=["answer"] question="softmax_order"
def layer(logits, outputs, top_k):  # (T, E), (T, E, D)
    chosen = logits.topk(top_k, dim=1)
    gates = chosen.values.softmax(dim=1)
    ids = chosen.indices.unsqueeze(2).expand(-1, -1, outputs.shape[2])
    return (gates.unsqueeze(2) * outputs.gather(1, ids)).sum(dim=1)


# %% tags=["check"] question="softmax_order"
def check(layer):
    logits, outputs = router_logits(seed), draw(seed, 100, n_experts, 3)
    unsure, sure = (layer(factor * logits, outputs, 1) for factor in (0.1, 10.0))
    assert not same(unsure, sure), (
        "K = 1: whether the router is sure or unsure, all outputs are the same"
    )


verdict = check_exercise(layer, check)


# %% tags=["solution"] question="softmax_order"
def layer(logits, outputs, top_k):
    gates, topk_ids = logits.softmax(dim=1).topk(top_k, dim=1)
    ids = topk_ids.unsqueeze(2).expand(-1, -1, outputs.shape[2])
    return (gates.unsqueeze(2) * outputs.gather(1, ids)).sum(dim=1)


# %% tags=["hidden"] question="softmax_order"
def check(answer, reference, random):
    for K in (1, 2, 3):
        logits = router_logits(random.getrandbits(31), 40)
        outputs = draw(random.getrandbits(31), 40, n_experts, 5)
        expected = reference(logits, outputs, K)
        assert same(answer(logits, outputs, K), expected)


# %% [markdown] question="norm_and_scale"
# ### 8. One model's code runs the next model (1 point)
#
# **What it must do.** The gates of the chosen experts are their scores; if `normalise` is true, divided by their sum.
# All gates are then multiplied by the model's `scale`, whether they were divided or not. DeepSeek-V2 has
# `normalise=False, scale=16.0`, and DeepSeek-V3 has `normalise=True, scale=2.5`.
#
# **What goes wrong.** The code published with V2 runs with V3's settings, too. The gates of each token then sum to 1;
# V3's sum to 2.5.
#
# **When nothing shows.** With V2, for which the code was written, and wherever the scale is 1.
#
# *Source: modeling_deepseek.py, published with the DeepSeek-V2 weights;
# [DeepSeek-V3](https://github.com/deepseek-ai/DeepSeek-V3), inference/model.py.*


# %% tags=["answer"] question="norm_and_scale"
def scaled_gates(scores, topk_ids, normalise, scale):  # (T, E), (T, K)
    gates = scores.gather(1, topk_ids)
    if normalise:
        return gates / gates.sum(dim=1, keepdim=True)
    return gates * scale


# %% tags=["check"] question="norm_and_scale"
def check(scaled_gates):
    scores = router_logits(seed).sigmoid()
    ids = scores.topk(top_k, dim=1).indices
    small, large = (scaled_gates(scores, ids, True, scale) for scale in (1.0, 2.5))
    assert not same(small, large), (
        "V3: a model with scale 2.5 has the same gates as one with scale 1.0"
    )
    assert same(scaled_gates(scores, ids, False, 16.0), 16 * scores.gather(1, ids)), (
        "V2: its gates were right before and have changed"
    )


verdict = check_exercise(scaled_gates, check)


# %% tags=["solution"] question="norm_and_scale"
def scaled_gates(scores, topk_ids, normalise, scale):
    gates = scores.gather(1, topk_ids)
    if normalise:
        gates = gates / gates.sum(dim=1, keepdim=True)
    return gates * scale


# %% tags=["hidden"] question="norm_and_scale"
def check(answer, reference, random):
    for normalise in (False, True):
        for scale in (1.0, 2.5, 16.0, random.uniform(0.2, 5)):
            scores = router_logits(random.getrandbits(31), 30).sigmoid()
            ids = router_logits(random.getrandbits(31), 30).topk(3, dim=1).indices
            expected = reference(scores, ids, normalise, scale)
            assert same(answer(scores, ids, normalise, scale), expected)


# %% [markdown] question="fused_scale"
# ### 9. The shared expert, fused (1 point)
#
# **What it must do.** A layer adds a shared expert, which every token uses with weight 1, to its routed experts:
#
# $$y_t = o_{\text{shared},t} + \text{scale} \cdot \sum_{i \text{ chosen}} g_{i,t}\,o_{i,t},$$
#
# where $o$ are outputs of experts for token $t$, $g_{i,t}$ gates, and scale is a constant of the model. A serving
# engine computes the shared expert as one more entry of the routed list, the last one. It has two paths with the same
# result. One multiplies the whole sum by the scale at the end. The other scales the routed gates before
# (`scaled_before`), and leaves the sum alone. `fused_layer` gets the outputs of the $K$ chosen experts and of the
# shared one (T, K + 1, D), and the unscaled gates (T, K).
#
# **What went wrong.** On one path of an engine, with a scale of 2.5, the shared expert counted for 0.4 instead of 1.
# Short answers hardly suffered (GSM8K fell from 0.960 to 0.950). Long answers did not come to an end.
#
# **When nothing shows.** On the other path, and if the scale is 1.
#
# *Source: sglang, [pull request 28237](https://github.com/sgl-project/sglang/pull/28237).*


# %% tags=["answer"] question="fused_scale"
def fused_layer(outputs, gates, scale, scaled_before):  # (T, K + 1, D), (T, K)
    if scaled_before:
        gates = gates * scale
    shared = torch.full((len(gates), 1), 1 / scale)
    weights = torch.cat((gates, shared), dim=1)
    total = (weights.unsqueeze(2) * outputs).sum(dim=1)
    return total if scaled_before else total * scale


# %% tags=["check"] question="fused_scale"
def check(fused_layer):
    outputs, nothing = draw(seed, 10, top_k + 1, 4), torch.zeros(10, top_k)
    for scaled_before in (False, True):
        found = fused_layer(outputs, nothing, 2.5, scaled_before)
        times = float((found / outputs[:, -1]).mean())
        assert same(found, outputs[:, -1]), (
            f"scaled_before={scaled_before}: all routed gates are 0, and the shared"
            f" expert's output arrives {times:.2f} times"
        )


verdict = check_exercise(fused_layer, check)


# %% tags=["solution"] question="fused_scale"
def fused_layer(outputs, gates, scale, scaled_before):
    if scaled_before:
        gates = gates * scale
    shared = torch.full((len(gates), 1), 1.0 if scaled_before else 1 / scale)
    weights = torch.cat((gates, shared), dim=1)
    total = (weights.unsqueeze(2) * outputs).sum(dim=1)
    return total if scaled_before else total * scale


# %% tags=["hidden"] question="fused_scale"
def check(answer, reference, random):
    for scaled_before in (False, True):
        for K, scale in ((1, 2.5), (3, 16.0), (6, 0.5), (2, 1.0)):
            outputs = draw(random.getrandbits(31), 20, K + 1, 4)
            gates = draw(random.getrandbits(31), 20, K).sigmoid()
            expected = reference(outputs, gates, scale, scaled_before)
            assert same(answer(outputs, gates, scale, scaled_before), expected)


# %% [markdown] question="fused_lost"
# ### 10. The last entry (1 point)
#
# **What it must do.** A serving engine computes shared experts as more entries of the routed list. The routed experts
# have the ids 0 to $E - 1$. The shared experts have the ids from $E$ on. Each token gets `top_k + n_shared` entries:
# first its `top_k` best routed experts, best first, with their scores as gates, then all shared experts in their
# order, with gates of 1. `fused_route` returns ids and gates, (T, top_k + n_shared) each.
#
# **What went wrong.** In a model with one shared expert each token had 7 entries. The last was a seventh routed
# expert, for every token. The model answered 0 of 6 questions.
#
# **When nothing shows.** In a model without shared experts. And the shapes are right in every model.
#
# *Source: sglang, [pull request 38963](https://github.com/sgl-project/sglang/pull/38963).*


# %% tags=["answer"] question="fused_lost"
def best(scores, entries):
    gates, ids = scores.topk(entries, dim=1)
    return ids, gates


def fused_route(scores, top_k, n_shared):  # (T, E)
    return best(scores, top_k + n_shared)


# %% tags=["check"] question="fused_lost"
def check(fused_route):
    ids, gates = fused_route(router_logits(seed).softmax(dim=1), top_k, 1)
    assert ids.shape == gates.shape == (100, top_k + 1), (
        f"each token has {top_k + 1} entries"
    )
    reached = int((ids == n_experts).sum())
    assert reached == 100, (
        f"{reached} of 100 tokens reach the shared expert, which has the id {n_experts}"
    )


verdict = check_exercise(fused_route, check)


# %% tags=["solution"] question="fused_lost"
def fused_route(scores, top_k, n_shared):
    gates, ids = scores.topk(top_k, dim=1)
    T, E = scores.shape
    shared = torch.arange(E, E + n_shared).expand(T, n_shared)
    ones = torch.ones(T, n_shared)
    return torch.cat((ids, shared), dim=1), torch.cat((gates, ones), dim=1)


# %% tags=["hidden"] question="fused_lost"
def check(answer, reference, random):
    for K, n_shared in ((6, 1), (2, 2), (3, 0), (1, 3)):
        scores = router_logits(random.getrandbits(31), 30).softmax(dim=1)
        ids, gates = reference(scores, K, n_shared)
        found = answer(scores, K, n_shared)
        assert torch.equal(torch.as_tensor(found[0]).long(), ids)
        assert same(found[1], gates)


# %% [markdown] question="coactivation"
# ### 11. Who works together (1 point)
#
# **What it must do.** A token that chose expert $i$ has chosen $K - 1$ other experts, too. Let $N_i$ be the number of
# tokens that chose $i$, and $N_{ij}$ the number that chose both $i$ and $j$, $j \ne i$. The **co-activation** is
#
# $$C_{ij} = \frac{N_{ij}}{N_i},$$
#
# 0 on the diagonal, and in the whole row of an expert that nobody chose. `coactivation` gets the ids (T, K), best
# first, and returns $C$ (E, E).
#
# **What goes wrong.** The script behind a published figure finds $K/2$ times too few pairs: 4 times at $K = 8$. It
# does not miss them evenly, so no factor mends the figure.
#
# **When nothing shows.** With $K = 2$.
#
# *Source: arXiv:2409.02060, Equation 6; [OLMoE](https://github.com/allenai/OLMoE), scripts/run_moe_analysis.py.*


# %% tags=["answer"] question="coactivation"
def coactivation(topk_ids, n_experts):
    both = torch.zeros(n_experts, n_experts)
    ones = torch.ones(len(topk_ids))
    for rank in range(1, topk_ids.shape[1]):
        i, j = topk_ids[:, rank - 1], topk_ids[:, rank]
        both.index_put_((i, j), ones, accumulate=True)
        both.index_put_((j, i), ones, accumulate=True)
    counts = torch.bincount(topk_ids.flatten(), minlength=n_experts)
    return both / counts.clamp(min=1).unsqueeze(1)


# %% tags=["check"] question="coactivation"
def check(coactivation):
    ids = router_logits(seed, 200).topk(4, dim=1).indices
    found = coactivation(ids, n_experts)
    row, others = int(ids[0, 0]), float(found[ids[0, 0]].sum())
    assert same(others, 3.0), (
        f"K = 4: each token of expert {row} uses three others besides; its row has"
        f" {others:.2f}"
    )


verdict = check_exercise(coactivation, check)


# %% tags=["solution"] question="coactivation"
def coactivation(topk_ids, n_experts):
    chosen = torch.zeros(len(topk_ids), n_experts).scatter(1, topk_ids, 1.0)
    both = chosen.T @ chosen
    counts = both.diagonal().clone()
    both.fill_diagonal_(0)
    return both / counts.clamp(min=1).unsqueeze(1)


# %% tags=["hidden"] question="coactivation"
def check(answer, reference, random):
    for K in (1, 2, 3, 4, 6):
        ids = router_logits(random.getrandbits(31), 60).topk(K, dim=1).indices
        expected = reference(ids, n_experts + 1)  # nobody chose the last one
        assert same(answer(ids, n_experts + 1), expected)


# %% [markdown]
# ## Room 3: attention
#
# Attention compares a query with keys. A wrong rotation or a wrong temperature still gives a softmax that sums to 1.

# %% [markdown] question="rope"
# ### 12. Which channels turn together (1 point)
#
# **What it must do.** RoPE turns *pairs* of channels by an angle that grows with the position $p$. The weights that
# you load come from DeepSeek's code, where channels $2j$ and $2j + 1$ are a pair, $j = 0, \dots, d/2 - 1$:
#
# $$x'_{2j} = x_{2j}\cos\varphi - x_{2j+1}\sin\varphi, \quad
# x'_{2j+1} = x_{2j+1}\cos\varphi + x_{2j}\sin\varphi, \quad
# \varphi = p\cdot 10000^{-2j/d} .$$
#
# `rotate` gets one row of $d$ channels per position and returns rows of the same shape. Rotated keys go into a cache
# that other code reads: each channel must be **where it was**.
#
# **What goes wrong.** transformers uses another layout of RoPE. Code for that layout takes these weights, its output
# is wrong, and nothing fails. A second trap is quieter. transformers' V3 turns the right pairs, but writes all first
# channels before all second ones. Its scores are right; its cache is no cache for DeepSeek's code.
#
# **When nothing shows.** The first trap: where a token meets itself, because both positions are the same. The second:
# as long as one program both writes and reads the cache.
#
# *Source: [DeepSeek-V3](https://github.com/deepseek-ai/DeepSeek-V3), inference/model.py; transformers 5.23.0,
# modular_deepseek_v2.py and modular_deepseek_v3.py.*


# %% tags=["answer"] question="rope"
def rotate(x, positions):  # (S, d), (S,)
    d = x.shape[1]
    theta = 10000.0 ** (-torch.arange(0, d, 2) / d)
    angle = positions.unsqueeze(1) * theta
    cos, sin = angle.cos(), angle.sin()
    first, second = x[:, : d // 2], x[:, d // 2 :]
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat(turned, dim=1)


# %% tags=["check"] question="rope"
def check(rotate):
    one_hot = torch.eye(8)
    at = torch.tensor([seed % 100])
    query, key = rotate(one_hot[:1], at + 2), rotate(one_hot[1:2], at)
    score = float((query * key).sum())
    assert same(score, math.sin(2.0), 1e-3), (
        "a query in channel 0 meets a key in channel 1, two positions before: their"
        f" score is {score:.3f}, in DeepSeek's code 0.909"
    )


verdict = check_exercise(rotate, check)


# %% tags=["solution"] question="rope"
def rotate(x, positions):
    d = x.shape[1]
    theta = 10000.0 ** (-torch.arange(0, d, 2) / d)
    angle = positions.unsqueeze(1) * theta
    cos, sin = angle.cos(), angle.sin()
    first, second = x[:, ::2], x[:, 1::2]
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.stack(turned, dim=2).flatten(1)


# %% tags=["hidden"] question="rope"
def check(answer, reference, random):
    for d in (2, 6, 8, 64):
        x = draw(random.getrandbits(31), 30, d)
        positions = torch.arange(30) + random.randrange(50)
        expected = reference(x, positions)
        assert same(answer(x, positions), expected, 1e-3)


# %% [markdown] question="yarn"
# ### 13. The wrong temperature (1 point)
#
# **What it must do.** YaRN lets a model read longer texts than it was trained on. DeepSeek's models multiply
# attention scores by
#
# $$\frac{(0.1 \cdot \text{mscale} \cdot \ln s + 1)^2}{\sqrt{d}},$$
#
# where $d$ is the width of a query (`head_dim`), $s$ the factor by which texts become longer (`factor`), and mscale a
# number of the model, 1 if its configuration does not say. `score_scale` reads a released configuration, a dict with
# these keys and others, and returns the number.
#
# **What went wrong.** DeepSeek-V2 was trained with a numerator of 1.590. In the inference code that was published
# with DeepSeek-V3, V2 runs with 1.874. Nothing in that code fails.
#
# **When nothing shows.** With V3, whose mscale is 1.
#
# *Source: arXiv:2405.04434, Section 3.1.4; [DeepSeek-V3](https://github.com/deepseek-ai/DeepSeek-V3),
# inference/model.py and inference/configs/config_236B.json.*


# %% tags=["answer"] question="yarn"
def read_config(released):
    """The settings that attention needs."""
    return {"head_dim": released["head_dim"], "factor": released["factor"]}


def score_scale(released):
    config = read_config(released)
    t = 0.1 * config.get("mscale", 1.0) * math.log(config["factor"]) + 1.0
    return t**2 / math.sqrt(config["head_dim"])


# %% tags=["check"] question="yarn"
def check(score_scale):
    v2 = {"head_dim": 192, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}
    found = score_scale(v2) * 192**0.5
    assert same(found, 1.589626), (
        f"V2's numerator is {found:.3f}, and V2 was trained with 1.590"
    )


verdict = check_exercise(score_scale, check)


# %% tags=["solution"] question="yarn"
def score_scale(released):
    t = 0.1 * released.get("mscale", 1.0) * math.log(released["factor"]) + 1.0
    return t**2 / math.sqrt(released["head_dim"])


# %% tags=["hidden"] question="yarn"
def check(answer, reference, random):
    for mscale in (0.707, 1.0, None, 0.0, random.uniform(0.1, 2)):
        released = {"head_dim": random.choice([64, 192, 576]), "rope_theta": 10000}
        released["factor"] = random.uniform(1, 50)
        if mscale is not None:
            released["mscale"] = mscale
        expected = reference(released)
        assert same(answer(released), expected, 1e-5)


# %% [markdown]
# ## Room 4: many processes, released files, eight bits
#
# Here the mathematics is right in each part. The fault is at the border: between processes, between a paper and a
# file, between a name and its meaning.

# %% [markdown] question="gradients"
# ### 14. Four times too large (1 point)
#
# **What it must do.** $W$ processes train one model, and the loss is the mean of their $W$ losses. Each process has a
# copy of a dense weight and computes its gradient from its own tokens. Experts are different: a set of $P$ processes
# shares one copy of each expert. The process that holds it *adds up* the gradients of the tokens of all $P$. So there
# are $W/P$ such sums. `mean_gradients` gets the $W$ gradients of a dense weight (W, n), the sums for an expert's
# weight (W/P, n), and $P$, called `sharing`. It returns a pair: the gradient of the loss for the dense weight and for
# the expert's weight, (n,) each.
#
# **What went wrong.** Gradients of experts were 4 times too large with 4 processes in one framework, and 2 times with
# 2 in another.
#
# **When nothing shows.** If every process holds all experts ($P = 1$). And Adam, which divides a gradient by its own
# size, hides most of it.
#
# *Source: DeepSpeed, [issue 5618](https://github.com/deepspeedai/DeepSpeed/issues/5618); torchtitan, in pytorch
# [issue 160285](https://github.com/pytorch/pytorch/issues/160285); megablocks,
# [pull request 20](https://github.com/databricks/megablocks/pull/20).*


# %% tags=["answer"] question="gradients"
def mean_gradients(dense, expert, sharing):  # (W, n), (W/P, n), P
    return dense.mean(dim=0), expert.mean(dim=0)


# %% tags=["check"] question="gradients"
def check(mean_gradients):
    each = draw(seed, 4, 5).abs()  # gradients from the tokens of 4 processes
    dense, expert = mean_gradients(each, each.sum(dim=0, keepdim=True), 4)
    assert same(dense, each.mean(dim=0)), "the dense weight's gradient was right before"
    assert same(dense, expert), (
        "a dense weight and an expert's have the same gradient in all 4 processes, and"
        f" the expert's comes out {float((expert / dense).mean()):.2f} times as large"
    )


verdict = check_exercise(mean_gradients, check)


# %% tags=["solution"] question="gradients"
def mean_gradients(dense, expert, sharing):
    return dense.mean(dim=0), expert.mean(dim=0) / sharing


# %% tags=["hidden"] question="gradients"
def check(answer, reference, random):
    for copies, sharing in ((1, 4), (2, 2), (3, 8), (4, 1)):
        dense = draw(random.getrandbits(31), copies * sharing, 7)
        expert = draw(random.getrandbits(31), copies, 7)
        expected = reference(dense, expert, sharing)
        found = answer(dense, expert, sharing)
        assert same(found[0], expected[0])
        assert same(found[1], expected[1])


# %% [markdown] question="mtp"
# ### 15. Drafts that nobody takes (1 point)
#
# **What it must do.** DeepSeek-V3's MTP module drafts one token more. It first joins the state $h_i$ of token $i$
# with the embedding $e_{i+1}$ of the next token, and multiplies the joined vector by a matrix (D, 2D). Equation 21 of
# the paper joins them as $[h_i; e_{i+1}]$. The matrix in the released files is called `eh_proj`, and the name is
# literal: it takes **e**, the embedding, and then **h**, the state. `mtp_input` gets the states (S, D) and embeddings
# (S, D) of $S$ tokens, and the released matrix. It returns the products for the tokens 1 to $S - 1$, (S - 1, D).
#
# **What goes wrong.** The module drafts nonsense, and nothing fails. Drafts are checked before they are used, so the
# text stays correct. But decoding with drafts becomes slower than without.
#
# **When nothing shows.** The text never shows it. Only the share of accepted drafts does.
#
# *Source: arXiv:2412.19437, Equation 21; Megatron-LM,
# [issue 1588](https://github.com/NVIDIA/Megatron-LM/issues/1588); sglang, issues
# [3798](https://github.com/sgl-project/sglang/issues/3798) and
# [6423](https://github.com/sgl-project/sglang/issues/6423); DeepSeek-V3,
# [issue 712](https://github.com/deepseek-ai/DeepSeek-V3/issues/712).*


# %% tags=["answer"] question="mtp"
def mtp_input(states, embeddings, eh_proj):  # (S, D), (S, D), (D, 2D)
    joined = torch.cat((states[:-1], embeddings[1:]), dim=1)
    return joined @ eh_proj.T


# %% tags=["check"] question="mtp"
def check(mtp_input):
    follows = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    text = [0]
    for _ in range(41):
        text.append(
            int(follows[text[-1]])
        )  # a language in which each token has one successor
    embeddings, eh_proj = torch.eye(16)[text], torch.zeros(16, 32)
    eh_proj[follows, torch.arange(16)] = 1.0  # a module that has learned it
    drafts = mtp_input(draw(seed, 42, 16), embeddings, eh_proj)
    assert drafts.shape == (41, 16), "one row for each token but the last"
    accepted = int((drafts.argmax(dim=1)[:40] == torch.tensor(text[2:])).sum())
    assert accepted == 40, f"{accepted} of 40 drafts are accepted; it should be all"


verdict = check_exercise(mtp_input, check)


# %% tags=["solution"] question="mtp"
def mtp_input(states, embeddings, eh_proj):
    joined = torch.cat((embeddings[1:], states[:-1]), dim=1)
    return joined @ eh_proj.T


# %% tags=["hidden"] question="mtp"
def check(answer, reference, random):
    for S, D in ((2, 3), (10, 4), (5, 16)):
        states = draw(random.getrandbits(31), S, D)
        embeddings = draw(random.getrandbits(31), S, D)
        eh_proj = draw(random.getrandbits(31), D, 2 * D)
        expected = reference(states, embeddings, eh_proj)
        assert same(answer(states, embeddings, eh_proj), expected, 1e-3)


# %% [markdown] question="fp8"
# ### 16. Scales of a file (1 point)
#
# **What it must do.** The files of DeepSeek-V3 hold a weight matrix as numbers of eight bits. The matrix is cut into
# blocks of 128 rows and 128 columns, from its upper left corner. Each number of a block was divided by the block's
# scale (its largest size over 448) and rounded. The scales are in a second tensor, called `scale_inv`, one per block.
# Blocks at the lower and the right edge are partial: a matrix of 576 rows has 5 rows of scales. `dequantize` returns
# the matrix as it was, up to the rounding.
#
# **What goes wrong.** The name suggests one mistake, and the edge another. The function below makes **both**. (These
# are traps: our source names no library with these bugs.)
#
# **When nothing shows.** The first mistake shows at once, if you look at a weight. The second does not show if all
# blocks are full.
#
# *Source: [DeepSeek-V3](https://github.com/deepseek-ai/DeepSeek-V3), inference/fp8_cast_bf16.py.*


# %% tags=["answer"] question="fp8"
def dequantize(q, scale_inv):  # q: float32 numbers that fit into 8 bits
    rows, columns = (
        torch.arange(size) * n_scales // size
        for size, n_scales in zip(q.shape, scale_inv.shape, strict=True)
    )
    return q / scale_inv[rows][:, columns]


# %% tags=["check"] question="fp8"
def check(dequantize):
    weight = 0.02 * draw(seed, 128, 128)
    scale = weight.abs().max() / 448
    q = (weight / scale).to(torch.float8_e4m3fn).float()
    found = float(dequantize(q, scale.view(1, 1)).abs().max())
    assert same(found, float(weight.abs().max())), (
        f"a block of weights between -0.1 and 0.1 comes back as large as {found:.3g}"
    )


verdict = check_exercise(dequantize, check)


# %% tags=["solution"] question="fp8"
def dequantize(q, scale_inv):
    rows, columns = (torch.arange(size) // 128 for size in q.shape)
    return q * scale_inv[rows][:, columns]


# %% tags=["hidden"] question="fp8"
def check(answer, reference, random):
    for shape in ((256, 128), (576, 130), (130, 300), (40, 200)):
        q = draw(random.getrandbits(31), *shape) * 100
        q = q.to(torch.float8_e4m3fn).float()
        blocks = [-(-size // 128) for size in shape]
        scale_inv = 0.001 + draw(random.getrandbits(31), *blocks).abs()
        expected = reference(q, scale_inv)
        assert same(answer(q, scale_inv), expected)


# %% [markdown]
# ## On your way out
#
# Each exhibit breaks a property that a test of a few lines can check. You needed no loss curve to find it.
#
# **Discuss in your group.** Which exhibits change the *training* of a model, and which only its *use*? Which of them
# would survive a test that compares nothing but shapes? Choose the three properties that you would test first in code
# of your own. The page "Bug museum" of the course's book ends with a list to compare with.
