# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Many devices: experts that live elsewhere
#
# ![Four processes, each with tokens of its own and two of eight experts. Dispatch sends each token once to every process that holds one of its experts; combine brings one sum back from each.](images/many_devices.svg)
#
# All chapters so far kept all experts in one place. DeepSeek-V3 has 14,848 of them, and they do not fit into any one device. This chapter spreads experts
# over processes and lets tokens travel: first with lists, then with four real processes on your laptop, which must
# learn the same model as one, then on paper with thousands.
#
# **You will** send each token once to a process, however many of its experts live there; write an all-to-all; train on four processes
# and get one process's losses; kill a process and watch the run come back; and find out which assumptions decide how much of
# a thousand devices' speed is left.
#
# **You need** chapters 05, 06 and 11. Nothing about `torch.distributed`. **Reading time** 40 minutes. **Hardware** any laptop CPU; the
# processes are real, the network is your memory.

# %% tags=["parameters"]
profile: str = "cpu"  # size of the run: smoke | cpu | gpu
seed: int = 0  # seed of weights: 0..2147483647
processes: int = 4  # processes that share the experts: 2 | 4
top_k: int = 2  # experts a token visits in the model that is trained here: 1..4
tokens: int = 4096  # tokens on each device of the simulated machines: 256..65536
flops: float = 400.0  # TFLOP/s that a device sustains in its products: 1.0..5000.0
inside: float = 160.0  # GB/s to the other devices of a node: 1.0..2000.0
across: float = 50.0  # GB/s to other nodes: 1.0..1000.0
latency: float = 2.0  # microseconds that a message takes beside its bytes: 0.0..1000.0
bytes_sent: float = 1.0  # bytes of a number on its way to an expert: 0.5..4.0
bytes_back: float = 2.0  # bytes of a number on its way back: 0.5..4.0

# %% tags=["hide-input"]
try:
    from dsmoe_lite.labs import begin, check_exercise, claim, predict
except ModuleNotFoundError:
    raise SystemExit("dsmoe_lite is missing: run make setup, then make lab") from None

import torch

from dsmoe_lite.viz import charts

lab = begin(globals())
steps = 20

# %% [markdown]
# ## Too large for one
#
# Mixed-precision training with Adam keeps some 16 bytes a weight: the weight and its gradient in 16 bits, and in 32 bits a copy of the weight
# and Adam's two moments. A device has 80 GB.
#
# **Ask.** How many devices does it take to hold DeepSeek-V3, before a single token is read? And which share of the
# weights are routed experts?

# %%
from dataclasses import replace

from dsmoe_lite import AttentionConfig, MoEConfig, preset
from dsmoe_lite.accounting import parameters

predict("12-devices", None)  # a number; 0 to 1

wider = MoEConfig(n_routed_experts=128, top_k=12, expert_width=1408, n_shared_experts=4)
MODELS = {
    "16B": preset("deepseekmoe-16B"),
    "145B": replace(
        preset("deepseekmoe-16B"),
        d_model=4096,
        n_layers=62,
        attention=AttentionConfig(n_heads=32, head_dim=128),
        ffn_width=22528,
        moe=wider,
    ),
    "DeepSeek-V2": preset("deepseek-v2"),
    "DeepSeek-V3": preset("deepseek-v3"),
}
print(f"{'':12} {'weights':>8} {'routed':>7} {'experts':>8} {'devices':>8}")
for name, config in MODELS.items():
    count, moe = parameters(config), config.moe
    routed = count.routed_experts.total / count.total
    layers = sum(map(config.is_moe_layer, range(config.n_layers)))
    print(
        f"{name:12} {count.total / 1e9:7.1f}B {routed:7.1%}"
        f" {layers * moe.n_routed_experts:8,} {16 * count.total / 80e9:8.1f}"
    )

# %% [markdown]
# **What to notice.** Nearly all weights are routed experts, and a token meets few of them. So these are spread: $P$ processes share one set
# of experts, process $p$ holds the $E/P$ experts $\mathcal E_p$ of each layer, and every process has tokens of its own. What is left is
# small, and every token needs it. There FSDP (fully sharded data parallel) saves memory: each process stores a part of every weight, gathers a block's just before use,
# and afterwards averages the gradients and keeps its part. (V2 and V3 instead cut the layers into a *pipeline*, so that weights stay in place, and share out only Adam's state. The widths of the 145B
# model are not printed; these give its 144.6B.)
#
# ## Each token once
#
# A token needs its $K$ experts. If two of them live on one process, it goes there once. Of the tokens $\mathcal T_q$ of process $q$,
# process $p$ gets so many **rows**, a row being one token's vector:
#
# $$
# n_{q \to p} = \sum_{t \in \mathcal T_q} \mathbb 1[\,\text{some expert of token } t \text{ is in } \mathcal E_p\,] .
# $$ (eq:rows-sent)
#
# Take the routing of a trained model, GShard with 16 experts, two for each token, on text that it has not seen, and give each
# process an equal part of the tokens.
#
# **Ask.** A fair die would leave a share of $1/P$ of these rows at home. Does a trained router leave more?

# %%
from dsmoe_lite import load_model
from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.data.batches import heldout_batches
from dsmoe_lite.data.tokenizer import read_tokenizer
from dsmoe_lite.data.world import World
from dsmoe_lite.simulate.placement import consecutive_placement
from dsmoe_lite.simulate.traffic import rows_between

predict("12-home", None)  # "more", "fewer" or "as many"

P = processes
file = DATA / "models" / "world-gshard.safetensors"
trained = load_model(file)
tokenizer = read_tokenizer(read_metadata(file)["tokenizer"])
text = heldout_batches(World(), tokenizer, 16, 64, 1)[0].tokens
x_seen = []
layer = trained.moe_layers[0]
layer.register_forward_hook(lambda module, inputs, output: x_seen.append(inputs[0]))
with torch.no_grad():
    routing = trained(text[:, :-1]).routings[0]
E, K = routing.n_experts, routing.topk_ids.shape[1]
each = E // P  # experts of a process
homes = torch.arange(len(routing.topk_ids)).chunk(P)


def tokens_for(p, ids):  # ids (T, K): the tokens with an expert on process p
    return (ids // each == p).any(dim=1).nonzero()[:, 0]


sent = [[len(tokens_for(p, routing.topk_ids[own])) for p in range(P)] for own in homes]

home = torch.arange(P).repeat_interleave(len(homes[0]))
theirs = rows_between(routing.topk_ids, routing.kept, home, consecutive_placement(E, P))
assert theirs.tolist() == sent
charts.exchange_matrix(sent)

# %%
rows, stay = sum(map(sum, sent)), sum(sent[p][p] for p in range(P))
print("rows sent: mine equal the package's")
print(f"choices {routing.topk_ids.numel():,}, rows {rows:,}, at home {stay / rows:.1%}")

# %% [markdown]
# **What to notice.** About one row in $P$ stays: the router does not know where its experts live. Some tokens have both experts
# on one process, so there are a few rows fewer than choices. With six experts a token on eight devices it saves more: chance alone gives 4.5 rows (chapter 11).
# Columns are not even: what a process *receives* depends on how busy its experts are, and the busiest is waited for. It also needs memory for them: one reason for V2's
# budget of a device and its dropping.
#
# ## All to all
#
# Every process sends something else to every other one, and all receive at once: an **all-to-all**. With lists it is a transposition. **Build** the layer
# out of two of them, *dispatch* and *combine*. What comes back is one row for each that went: the sum over the experts there, gates
# included.


# %%
import torch.nn.functional as F
from torch.testing import assert_close

from dsmoe_lite.layers.dispatch import dispatch


def all_to_all(outbox):  # outbox[q][p]: what q has for p
    return [[outbox[q][p] for q in range(P)] for p in range(P)]


def expert(e, x):
    weights = layer.experts
    return (F.silu(x @ weights.gate[e].T) * (x @ weights.up[e].T)) @ weights.down[e].T


def work(p, x, ids, gates):  # what process p does with the rows of one other
    y = torch.zeros_like(x)
    for e in range(p * each, (p + 1) * each):
        row, k = (ids == e).nonzero(as_tuple=True)
        y.index_add_(0, row, gates[row, k, None] * expert(e, x[row]))
    return y


def spread_out(x, ids, gates):
    out = torch.zeros_like(x)
    for_whom = [[own[tokens_for(p, ids[own])] for p in range(P)] for own in homes]
    outbox = [[(x[t], ids[t], gates[t]) for t in parts] for parts in for_whom]
    inbox = all_to_all(outbox)  # dispatch
    done = [[work(p, *box) for box in inbox[p]] for p in range(P)]
    back = all_to_all(done)  # combine
    for q in range(P):
        for p in range(P):
            out.index_add_(0, for_whom[q][p], back[q][p])
    return out


with torch.no_grad():
    x = x_seen[0].flatten(0, 1)
    mine = spread_out(x, routing.topk_ids, routing.gates)
    dispatched = dispatch(x, routing)
    assert_close(mine, layer.experts.combine(layer.experts(dispatched), dispatched))
print("experts spread over processes: mine equals one place")

# %% [markdown]
# Backward the rows' gradients take the same ways in the opposite order: four exchanges for each layer and step. Between real processes one exchange is one call, but nobody knows
# beforehand how many rows will come. So the counts go first:
#
# ```python
# dist.all_to_all_single(rows_in, rows_out)  # how many, P numbers each
# received = x.new_empty(int(rows_in.sum()), x.shape[1])
# dist.all_to_all_single(received, outgoing, rows_in.tolist(), rows_out.tolist())
# ```
#
# `tolist` brings the counts to the CPU, and a GPU has to be waited for. Beside the rows go two small things, which row each choice
# reads and the gates.
#
# ## Four processes
#
# Now real ones. `torchrun` starts processes that find each other; here they exchange over gloo, torch's library for CPUs, on a cluster over NCCL, NVIDIA's for GPUs. Each runs
# this function, and knows its number (*rank*) and how many there are (*world*). The function is sent to them as text, so it imports what it needs itself. Besides:
#
# - `make_mesh` arranges the processes in a grid: those in a row share one set of experts, those in a column would hold copies of the same ones. Here there is one row.
# - `parallelize` spreads the model over it; `rows_of_rank` gives each process its part of the batch; `all_reduce_sum` adds up over processes.
# - Each process computes a *part* of the batch's loss and gradient, and FSDP averages; `world * loss` turns its mean into the sum.
# - `say` reports to this notebook; the checkpoints have a section of their own below.


# %%
from dsmoe_lite import ModelConfig, Transformer
from dsmoe_lite.layers.balance import expert_loss


def train_part(config, text, seed, steps, folder):
    from pathlib import Path

    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    from dsmoe_lite.config import ModelConfig, from_dict
    from dsmoe_lite.labs.workers import emit
    from dsmoe_lite.layers.balance import expert_loss
    from dsmoe_lite.model import Transformer
    from dsmoe_lite.parallel.checkpoint import load_sharded, save_sharded
    from dsmoe_lite.parallel.checkpoint_folders import newest_checkpoint
    from dsmoe_lite.parallel.collectives import all_reduce_sum
    from dsmoe_lite.parallel.mesh import make_mesh, rows_of_rank
    from dsmoe_lite.parallel.shard import parallelize

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    config, text = from_dict(ModelConfig, config), torch.tensor(text)

    torch.manual_seed(seed)  # every process makes the same model, and keeps its part
    model = Transformer(config)
    parallelize(model, make_mesh("cpu", config.moe))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    mine = text[rows_of_rank(rank, world, len(text), config.moe)]

    done = newest_checkpoint(Path(folder))  # a checkpoint, if this run was here before
    begin = load_sharded(done, model, optimizer)["step"] if done else 0
    for step in range(begin, steps):
        out = model(mine[:, :-1])
        loss = F.cross_entropy(out.logits.flatten(0, 1), mine[:, 1:].flatten())
        loss = all_reduce_sum(loss * len(mine) / len(text))
        for routing in out.routings:
            loss = loss + 0.01 * expert_loss(routing, all_reduce=all_reduce_sum)
        (world * loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        experts = model.moe_layers[0].experts
        held = sum(p.to_local().numel() for p in experts.parameters())
        emit(step=step + 1, of=steps, loss=loss.item(), held=held)
        if (step + 1) % 5 == 0:
            save_sharded(Path(folder), step + 1, model, optimizer, {"step": step + 1})


# %% [markdown]
# Beside it, the same steps in one process. The batch is the text above; the model is small, with one shared expert and 16 routed ones.
#
# **Ask.** How far apart will the losses be after the last step: not at all, in the seventh digit, or visibly?

# %%
import tempfile

from dsmoe_lite.config import to_dict
from dsmoe_lite.labs.workers import run_workers

predict("12-apart", None)  # "equal", "seventh" or "visibly"

small = ModelConfig(
    vocab_size=tokenizer.get_vocab_size(),
    d_model=64,
    n_layers=2,
    attention=AttentionConfig(n_heads=4, head_dim=16),
    ffn_width=128,
    moe=MoEConfig(
        n_routed_experts=16, top_k=top_k, expert_width=32, n_shared_experts=1
    ),
    max_seq_len=64,
)
torch.manual_seed(seed)
model = Transformer(small)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
alone = []
for _ in range(steps):
    out = model(text[:, :-1])
    loss = F.cross_entropy(out.logits.flatten(0, 1), text[:, 1:].flatten())
    for one in out.routings:
        loss = loss + 0.01 * expert_loss(one)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    alone.append(loss.item())

arguments = (to_dict(small), text.tolist(), seed, steps)
losses = {p: [] for p in range(P)}
with tempfile.TemporaryDirectory() as folder:
    for event in run_workers(train_part, P, *arguments, folder):
        losses[event["rank"]].append(event["loss"])
        held = event["held"]

# %%
assert all(losses[p] == losses[0] for p in range(P))
apart = max(abs(a - b) for a, b in zip(alone, losses[0], strict=True))
assert apart < 1e-5, apart
print(f"{steps} losses, the same in {P} processes; from one process's less than 1e-5")
whole = sum(p.numel() for p in model.moe_layers[0].experts.parameters())
assert held * P == whole
print(f"weights of a layer's experts: {whole:,}, in each process {held:,}")

# %% tags=["trained", "hide-cell"]
fall = losses[0][0] - losses[0][-1]
claim(f"fall of the loss in {steps} steps", fall, (3.2, 4.1), asserted=lab.own)

# %% [markdown]
# **What to notice.** All processes report the same numbers to the last bit, because a sum over processes is computed once and handed to all. From one process's they
# differ by rounding alone, by less than 1e-5: sums are added up in another order. (Sooner or later rounding flips some token's choice of an
# expert, and from there two runs part ways.)
#
# ### Sums, and what is divided by what
#
# Two things are easy to get wrong, and neither stops a run. The first are **gradients of experts**. Let there be $W$ processes in several sets of $P$ that each hold all experts; the loss of the batch is the mean of theirs. Of
# a weight that all have, each process computes a gradient from its own tokens, and the mean over $W$ is right. An expert has no such
# copies: its process has already *summed* what came from all $P$ of its set. If $G^{(c)}$ is that sum in set $c$ of $W/P$, then
#
# $$
# \nabla_{\theta_e} \mathcal L = \frac1W \sum_{c=1}^{W/P} G^{(c)} ,
# $$ (eq:expert-mean)
#
# and a mean over the $W/P$ sets would be $P$ times too large. The first exercise is this bug, as it was found in the wild.
#
# The second are **balance losses**. They are products of sums, $\sum_i f_i \bar s_i$ with the share of choices $f_i$ and the mean affinity $\bar s_i$ of expert $i$ (chapter 06, there $P_i$), and a mean of products is not the product of means:
#
# $$
# \sum_i \Bigl(\frac1W \sum_w f_i^{(w)}\Bigr) \Bigl(\frac1W \sum_w \bar s_i^{(w)}\Bigr)
# \;\ne\; \frac1W \sum_w \sum_i f_i^{(w)} \bar s_i^{(w)} .
# $$ (eq:sum-first)
#
# **Ask.** 16 experts, one for each token. Of four processes each has text of one subject, and sends it to four experts of its own, evenly. What
# is the loss of each process? What is the loss of the batch?

# %%
import os
import signal
import time
from statistics import mean

from dsmoe_lite import Routing
from dsmoe_lite.layers.router import join

predict("12-product", None)  # two numbers; 1 is balance, 16 collapse

subjects = [
    Routing.of_scores(F.one_hot(4 * w + torch.arange(100) % 4, 16).float(), 1)
    for w in range(4)
]
together_loss = expert_loss(join(subjects, (4, 100)))
each_loss = mean(expert_loss(one).item() for one in subjects)
print(f"mean of the processes' losses: {each_loss:g}")
print(f"loss of the batch:             {together_loss.item():g}")

# %% [markdown]
# **What to notice.** Locally this looks four times worse than balance; over the batch it is perfectly balanced. Trained on the local losses, every
# expert would be pushed off its subject: each small batch must be even by itself. For language models that is measurably worse {cite:p}`GlobalBatch2025`. So `total` adds up both factors over processes
# before they are multiplied. A sequence-wise loss, as in V3, needs no such sum: a sequence lives on one process. V3's bias does need the counts of all, and clipping the norm of all gradients.
#
# ## A process dies
#
# The more devices, the more often one of them fails. Every five steps the processes above write a checkpoint together, each its own part, into a folder
# that gets its name only when all have written. `torchrun` watches them: when one dies it stops the others and starts all
# again, and they go on from the newest folder.
#
# **Watch**: the same run again, and this time process 1 is killed after step 7 by the strongest signal there is.

# %% tags=["measured"]
again, seen, before = {}, [], {}
began, killed = time.perf_counter(), None
with tempfile.TemporaryDirectory() as folder:
    for event in run_workers(train_part, P, *arguments, folder, restarts=1):
        now, rank, step = time.perf_counter() - began, event["rank"], event["step"]
        if rank == 1 and step == 7 and killed is None:
            os.kill(event["pid"], signal.SIGKILL)
            killed = now
        start = before.get((rank, event["restart"]), now)
        before[rank, event["restart"]] = now
        of = "started again" if event["restart"] else "first start"
        row = {"lane": f"process {rank}", "group": of, "start": start, "end": now}
        if start < now:
            seen.append(row | {"what": f"step {step}"})
        again[rank, step] = event["loss"]
back = min(row["start"] for row in seen if row["group"] == "started again")
charts.link_timeline(
    sorted(seen, key=lambda row: row["lane"]),
    spans=[
        {"start": killed, "end": back, "text": f"killed; back in {back - killed:.1f} s"}
    ],
    unit="seconds",
    title="What does each process do?",
    subtitle="A bar is a step; the first after a start is not drawn.",
)

# %%
assert killed is not None
for rank in range(P):
    assert [again[rank, step + 1] for step in range(steps)] == losses[0]
print(f"killed once, and still the same {steps} losses to the last bit")

# %% [markdown]
# **What to notice.** The gap is the price, about as long as the first start: new processes, torch loaded again, a model read. What was learnt since the last
# checkpoint is computed once more, and comes out the same.
#
# The command line does all this for a config file, with one process and with many:
#
#     dsmoe train config.yml
#     torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node=4 --max-restarts=3 -m dsmoe_lite train config.yml
#
# (for restarts torch 2.13 needs `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` before the second command; without it the new processes
# cannot meet).
# `src/dsmoe_lite/parallel/clusters` has files that start the second line on Slurm and on Kubernetes.
#
# ## Seconds, on paper
#
# Nobody here has a thousand GPUs. But rows can be counted from a routing, and time follows from rows with a few assumptions. They are all in the
# parameters cell: how many FLOP/s a device sustains, the bandwidth to devices of its **node** (a computer with 8 of them) and to other nodes, and what a message
# costs beside its bytes. The two bandwidths are those of V3's cluster, NVLink and InfiniBand, and so are one byte there (FP8) and two back (BF16)
# {cite:p}`DeepSeekV3`. The 400 TFLOP/s are two fifths of an H100's peak in BF16; the 2 µs are a guess.
#
# As in V3, a token crosses to another node once, to the device that stands where its own does, and is handed on inside. Let $a_i$ be the rows that device $i$ sends or
# receives across nodes, whichever is more, $b_i$ those inside, and $m_i$ the number of devices that it sends to. With rows of $d$ numbers of $\beta$ bytes, $\lambda$ for the latency and $w$ for the bandwidths, one exchange takes
#
# $$
# t = \lambda \max_i m_i + \beta d \Bigl( \frac{\max_i a_i}{w_{across}} + \frac{\max_i b_i}{w_{inside}} \Bigr) ,
# $$ (eq:exchange-time)
#
# and the experts of width $F$ take $6 d F$ FLOPs for each of the choices of the busiest device. The two ways are added, as if a device first sent across and then handed on. **Use** the package's, for one layer of V3 on 64 devices in 8 nodes, with a random router that
# keeps V3's limits.
#
# **Ask.** What takes longer, the experts or the way to them and back?

# %%
from dsmoe_lite.layers.selection import limit_groups, ordered_topk
from dsmoe_lite.simulate.time import Machine, layer_time
from dsmoe_lite.simulate.traffic import Traffic, count_traffic

predict("12-longer", None)  # "experts" or "way"

machine = Machine(flops * 1e12, inside * 1e9, across * 1e9, latency * 1e-6)
SHARE = {"16B": 8, "145B": 4, "DeepSeek-V2": 8, "DeepSeek-V3": 64}  # of one set
draw = torch.Generator().manual_seed(0)
SAMPLE = {"smoke": 64, "cpu": 256, "gpu": 1024}[profile]  # tokens of a device


def rows_of_layer(name):  # counted for SAMPLE tokens a device
    moe, n = MODELS[name].moe, SHARE[name]
    affinity = torch.rand(SAMPLE * n, moe.n_routed_experts, generator=draw)
    allowed = limit_groups(affinity, moe.n_group, moe.topk_group, moe.group_score)
    ids = ordered_topk(allowed, moe.top_k)
    own = torch.arange(n).repeat_interleave(SAMPLE)
    placed = consecutive_placement(moe.n_routed_experts, n)
    return count_traffic(ids, torch.ones_like(ids).bool(), own, placed, min(n, 8))


counted = {name: rows_of_layer(name) for name in MODELS}


def longer(rows, factor):  # as many messages, with more rows each
    of = {key: value * factor for key, value in vars(rows).items()}
    return Traffic(**of | {"messages": rows.messages})


def layer_of(name, n_tokens, machine):
    config = MODELS[name]
    widths = config.d_model, config.moe.expert_width
    rows = longer(counted[name], n_tokens / SAMPLE)
    return layer_time(rows, machine, *widths, bytes_sent, bytes_back)


v3 = layer_of("DeepSeek-V3", tokens, machine)
for part in ("dispatch", "compute", "combine"):
    print(f"{part:9} {getattr(v3, part) * 1e3:6.2f} ms")
hidden = layer_of("DeepSeek-V3", tokens, replace(machine, intra_node=1e18))
print(
    f"with free links inside {hidden.dispatch * 1e3:.2f} and {hidden.combine * 1e3:.2f} ms"
)

# %% [markdown]
# **What to notice.** The way takes longer, and its second half longest: rows come back in twice as many bytes. V3 hands rows on while others are still crossing (Section 3.2.2);
# then only the longer way counts, which is the one across, and the experts take longer than both ways together.
#
# A random router is even. The trained one from above is not: here are its own choices, one expert on each of 16 devices, with widths of 16B, beside random choices for as many tokens.
#
# **Ask.** How much longer does a layer take with the real choices?

# %%
predict("12-real", None)  # times as long


def of_choices(ids):  # seconds of a layer, load of the busiest device
    own = torch.arange(E).repeat_interleave(len(ids) // E)
    rows = count_traffic(
        ids, torch.ones_like(ids).bool(), own, consecutive_placement(E, E), 8
    )
    rows = longer(rows, tokens / (len(ids) // E))
    taken = layer_time(rows, machine, 2048, 1408, bytes_sent, bytes_back)
    return taken.sequential, float(rows.choices.max() / rows.choices.mean())


by_chance = torch.rand(len(routing.topk_ids), E, generator=draw).topk(K).indices
for name, ids in {"random": by_chance, "trained": routing.topk_ids}.items():
    seconds, load = of_choices(ids)
    print(f"{name:8} {seconds * 1e3:5.2f} ms, the busiest device has {load:.2f} shares")

# %% [markdown]
# **What to notice.** A third longer: everyone waits for the device with the busiest expert, which computes more and hears more. (Chance alone gives a busiest device of 1.18 shares, for so few tokens
# were drawn.) What evenness is worth in seconds can be read off here, before any device is bought.
#
# ### Hiding it
#
# Links and arithmetic units are different parts of a device, so while one half of a batch is computed the other can
# travel. V3 does this with two micro-batches when it reads prompts; in training its schedule, DualPipe, pairs one micro-batch's forward pass with another's backward. (Sending is not quite free: V3 gives
# it 20 of a GPU's multiprocessors, Section 3.2.2.) Below: two layers, forward, of two halves *A* and *B*.
#
# **Ask.** Which bandwidth across nodes is enough to hide all sending?


# %%
from dsmoe_lite.accounting import training_flops

predict("12-hidden", None)  # GB/s


def schedule(length, overlap, n_layers=2):
    """Bars of two halves; what follows on a part's lane waits for it."""
    order = ("attn", "go", "exp", "back")
    lane_of = {"go": "links", "back": "links"}
    free, ready, bars = {}, {}, []
    parts = [(half, what) for what in order for half in "AB"]
    if not overlap:
        parts = [(half, what) for half in "AB" for what in order]
    for half, what in parts * n_layers:
        lane = lane_of.get(what, "products")
        start = max(free.get(lane if overlap else "", 0.0), ready.get(half, 0.0))
        end = start + length[what]
        free[lane if overlap else ""] = ready[half] = end
        name = f"{'overlapped' if overlap else 'in turn'}: {lane}"
        bars.append(
            {"lane": name, "group": half, "what": what, "start": start, "end": end}
        )
    return bars


def timeline(across):
    faster = replace(machine, inter_node=across * 1e9)
    half = layer_of("DeepSeek-V3", tokens / 2, faster)
    config = MODELS["DeepSeek-V3"]
    work = training_flops(config, 4096)
    own = work.attention + work.attention_scores + work.shared_experts
    forward = own / 3 / config.n_layers / 4096  # FLOPs of a token in a layer
    length = {"attn": forward * tokens / 2 / machine.flops, "exp": half.compute}
    length |= {"go": half.dispatch, "back": half.combine}
    length = {what: seconds * 1e3 for what, seconds in length.items()}
    bars = schedule(length, overlap=False) + schedule(length, overlap=True)
    return [bar | {"bandwidth": across} for bar in bars]


charts.link_timeline(
    [bar for across in (25, 50, 100, 200, 400) for bar in timeline(across)],
    unit="ms",
    bandwidth=50,
    subtitle=[
        "A and B: halves of a batch. go: dispatch, back: combine;",
        "attn: attention and the shared expert; exp: experts.",
    ],
)

# %% [markdown]
# **What to notice.** At 50 GB/s the links are busy two thirds as long as the units, and only the last *back* sticks out: the overlapped schedule ends after two thirds of
# the time. Choose 25 in the menu: now the links need longer than the units, which wait. Beyond 50 more bandwidth only shortens the tail.
#
# ### Scale
#
# A whole training step: every layer's experts and exchanges, forward and backward; everything else's arithmetic; and FSDP's gathering of weights and adding up of
# gradients, which is taken to use the links across nodes. Experts are shared by 4 devices in 145B, 8 in V2 and 64 in V3, as the papers say, and by 8 in 16B, which its paper
# keeps on one; more devices than that hold copies. A curve begins where the model fits. The papers' pipelines, which keep weights in place, are left out. What is drawn is the
# speed of a device over what it would have if links were free and experts even.
#
# **Ask.** Which helps more at 4,096 devices: four times the bandwidth, or four times the tokens on each device?

# %%
from dsmoe_lite.simulate.time import step_time

predict("12-scale", None)  # "bandwidth" or "tokens"


def scale(tokens, across):
    there = replace(machine, inter_node=across * 1e9)
    rows = []
    for name, config in MODELS.items():
        n = SHARE[name]
        layer = layer_of(name, tokens, there)
        choices = counted[name].choices.double()
        even = float(choices.mean() / choices.max())
        least = max(n, 16, 16 * parameters(config).total / 80e9)
        for devices in (2**i for i in range(4, 13) if 2**i >= least):
            step = step_time(
                config,
                layer,
                there,
                tokens=tokens,
                seq_len=4096,
                devices=devices,
                expert_parallel=n,
                bytes_per_weight=2.0,
            )
            best = step.experts * even + step.rest
            of = {"model": name, "devices": devices, "tokens": tokens}
            of |= {"bandwidth": across}
            rows += [
                of | {"schedule": "in turn", "value": best / step.sequential},
                of | {"schedule": "overlapped", "value": best / step.overlapped},
            ]
    return rows


TOKENS, ACROSS = (1024, 4096, 16_384, 65_536), (25, 50, 100, 200)
scaled = [row for n in TOKENS for across in ACROSS for row in scale(n, across)]
charts.scaling_curve(scaled, tokens=4096, bandwidth=50, schedule="in turn")

# %%
CASES = {
    "as above": (4096, 50.0),
    "4 x bandwidth": (4096, 200.0),
    "4 x tokens": (16384, 50.0),
    "16 x tokens": (65536, 50.0),
}
print(f"{'':26}" + "".join(f"{name:>13}" for name in MODELS))
for overlap in ("", ", overlapped"):
    for case, setting in CASES.items():
        wanted = (*setting, 4096, overlap[2:] or "in turn")
        fields = ("tokens", "bandwidth", "devices", "schedule")
        last = [r["value"] for r in scaled if tuple(r[f] for f in fields) == wanted]
        label = case + overlap
        print(f"{label:26}" + "".join(f"{share:13.0%}" for share in last))

# %% [markdown]
# **What to notice.** Curves are nearly flat: each device gathers and adds up as much, however many there are. At few tokens that traffic of weights is what hurts, and it is the same for
# one token as for many: so four times the tokens help as much as four times the bandwidth. V3 gathers less, for its experts are spread over 64; but its exchanges cross nodes and grow with the
# tokens, so bandwidth helps it more, and with many tokens it is the slowest. Overlapped, four times of either hide nearly everything. Real runs do better at few tokens by keeping weights in place, and
# worse by all that is missing here: optimizer, recomputation, stragglers, a network that others use, uneven routers.
#
# ## Move the experts
#
# If some experts are busier, need they stand in their order? Where V3 answers requests, loads are measured while it runs; now and then the busiest experts get copies and all are packed
# anew (Section 3.4). **Use** `balanced_placement`: spare slots go to the experts whose copies are busiest, then the busiest copies to the
# least busy devices. The loads are those of the recorded runs without any balance loss, first layer, 64 experts, on 8 devices and on 32. (They are packed by the very loads that come: the best case.)
#
# **Ask.** How even does packing alone make 8 devices? And 32? And with one more slot on each?

# %%
from dsmoe_lite.simulate.placement import balanced_placement
from dsmoe_lite.study.grids import records

predict("12-placed", None)  # busiest device over the mean, four times

runs = [r for r in records("balance") if r["model_name"] == "none"]
PLACED = {
    "in order": lambda load, n: consecutive_placement(64, n),
    "packed": lambda load, n: balanced_placement(load, n, 64),
    "one more slot each": lambda load, n: balanced_placement(load, n, 64 + n),
}
rows = []
for n in (8, 32):
    for run in runs:
        load = torch.tensor(run["heldout_experts"][0]["load"])
        for name, place in PLACED.items():
            value = place(load, n).imbalance(load)
            row = {"model": name, "seed": run["seed"], "metric": f"{n} devices"}
            rows.append(row | {"value": value})
charts.model_comparison(
    rows,
    title="What does it help to move experts?",
    subtitle="Busiest device over the mean. Ring: one seed. Dot and bar: mean, 95% interval.",
)

# %% [markdown]
# **What to notice.** On 8 devices packing is enough: among eight experts busy and idle ones find each other. On 32, with two experts each, an expert that is busier than
# two shares is too much wherever it stands; a copy splits it. When V3 reads prompts, 32 devices
# have eight routed experts each and a ninth slot for a copy (Section 3.4.1).
#
# ## Exercises
#
# **1. A bug from the wild** (15 minutes). Each copy of an expert has summed its gradient over the tokens of the `sharing` processes of its set; `sums` has one row a copy. Return the gradient of the batch's
# loss, which is the mean over *all* processes' losses. Two frameworks returned what `expert_gradient` does.


# %%
def expert_gradient(sums, sharing):  # sums (copies, ...): one a set; processes of a set
    return sums.mean(dim=0)


def mended(sums, sharing):
    return None


def is_the_batch_mean(mended):
    draw = torch.Generator().manual_seed(1)
    for copies, sharing in ((1, 4), (2, 2), (4, 1), (3, 8), (2, 5), (6, 2)):
        of_each = torch.randn(copies, sharing, 5, generator=draw)  # a process's tokens
        wanted = of_each.flatten(0, 1).mean(dim=0)
        found = mended(of_each.sum(dim=1), sharing)
        size = "larger" if found.norm() > wanted.norm() else "smaller"
        assert torch.allclose(found, wanted, atol=1e-6), (
            f"{copies} copies, each shared by {sharing}: not the mean over all"
            f" processes, but {size}"
        )


verdict = check_exercise(mended, is_the_batch_mean)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def mended(sums, sharing):
#     return sums.mean(dim=0) / sharing
# ```
#
# DeepSpeed had expert gradients 4 times too large with 4 processes (issue 5618), torchtitan on FSDP2 2 times with 2 (pytorch issue 160285). Losses looked well: Adam divides a gradient by its
# own size. What it does change is the norm that clips all gradients.
# </details>
#
# **2. Code** (15 minutes). Experts stand in order, `per_device` on each device, and a node is `node` devices. For each token: how many rows leave its node,
# if it crosses to each other node once?


# %%
def rows_across(ids, home, per_device, node):  # ids (T, K), home (T,) devices
    return None  # (T,) rows


def counts_nodes(rows_across):
    draw = torch.Generator().manual_seed(2)
    for per_device, node, K in ((1, 4, 3), (2, 2, 4), (4, 8, 6)):
        ids = torch.rand(200, 16 * per_device, generator=draw).argsort(dim=1)[:, :K]
        home = torch.randint(0, 16, (200,), generator=draw)
        found = rows_across(ids, home, per_device, node)
        assert len(found) == 200, "one number a token"
        for t in range(200):
            nodes = {e // per_device // node for e in ids[t].tolist()}
            wanted = len(nodes - {int(home[t]) // node})
            assert int(found[t]) == wanted, (
                f"a token of device {int(home[t])} with experts {ids[t].tolist()},"
                f" {per_device} a device, {node} devices a node: {int(found[t])} rows"
                f" are too {'many' if found[t] > wanted else 'few'}"
            )


verdict = check_exercise(rows_across, counts_nodes)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def rows_across(ids, home, per_device, node):
#     there = ids // per_device // node  # (T, K) nodes
#     reached = F.one_hot(there).amax(dim=1).sum(dim=1)
#     stays = (there == (home // node)[:, None]).any(dim=1)
#     return reached - stays.long()
# ```
# </details>
#
# **3. Run it** with `dsmoe run 12 -p bytes_sent=2`, then with `dsmoe run 12 -p inside=50`. Compare the lines of *dispatch*, *compute* and *combine* (half a minute each): which of the two costs V3's layer more, and why?
#
# <details><summary>Solution</summary>
#
# `inside=50` costs more: dispatch grows from 3.5 to 6.3 ms and combine from 6.9 to 12.5, while `bytes_sent=2` only doubles dispatch. A device sends nearly twice as many rows inside its
# node as across, its own and those it hands on for others; `inside=50` makes them 3.2 times slower in both directions, `bytes_sent=2` doubles one direction.
# </details>
#
# ## Recap
#
# - Experts are nearly all weights, so they are spread; a token goes once to each process that holds one of its experts, and one sum comes back.
# - Dispatch and combine are two all-to-alls, and two more backward; numbers of rows go first.
# - Spread over processes, training gives the losses of one process; so it does after one of them was killed.
# - Sum before you multiply (balance losses), and divide by all processes, not by the copies (expert gradients).
# - Rows follow from routing, time from rows and assumptions: state them, then move them.
#
# **Claims settled here:** parallel training equals one process's, in losses below 1e-5 in float32, and to the last bit after a kill; each process holds $1/P$ of the experts' weights.
# Not settled: every time of a layer or a step, which was computed and not measured.
