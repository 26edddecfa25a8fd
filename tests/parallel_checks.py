"""What tests/test_parallel.py asks of several processes; torchrun runs this file.

With "check" everything in one launch, with "resume" only what needs another number of processes. Rank 0 writes what it
found, by name, into found.json of the folder that is named; a checkpoint stands beside it.
"""

import copy
import json
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.config import AttentionConfig, ModelConfig, MoEConfig
from dsmoe_lite.layers import balance
from dsmoe_lite.layers.experts import Experts
from dsmoe_lite.layers.router import Router, Routing
from dsmoe_lite.model import Transformer
from dsmoe_lite.parallel.checkpoint import load_sharded, save_sharded
from dsmoe_lite.parallel.checkpoint_folders import newest_checkpoint
from dsmoe_lite.parallel.collectives import all_reduce_sum
from dsmoe_lite.parallel.mesh import device_of, make_mesh, rows_of_rank
from dsmoe_lite.parallel.shard import ParallelExperts, parallelize
from dsmoe_lite.simulate.placement import consecutive_placement
from dsmoe_lite.simulate.traffic import rows_between
from dsmoe_lite.training.launch import launched_processes
from dsmoe_lite.training.objective import mtp_loss
from dsmoe_lite.training.processes import Processes

FOUND: dict[str, Any] = {}
V, D, S = 40, 16, 12
MODEL = ModelConfig(
    vocab_size=V,
    d_model=D,
    n_layers=2,
    attention=AttentionConfig(n_heads=2, head_dim=8),
    ffn_width=32,
    moe=MoEConfig(n_routed_experts=8, top_k=2, expert_width=12, n_shared_experts=1),
    n_dense_layers=1,
    max_seq_len=S,
)
CHECKPOINTED = replace(
    MODEL,
    tie_embeddings=True,
    moe=MoEConfig(
        n_routed_experts=8, top_k=2, expert_width=12, n_shared_experts=1, scoring_func="sigmoid", expert_bias=True
    ),
)
LOSSES: dict[str, Callable[..., Tensor]] = {
    "importance": balance.importance_loss, "gshard": balance.gshard_loss, "switch": balance.switch_loss,
    "z": balance.z_loss, "expert": balance.expert_loss, "sequence": balance.sequence_loss,
    "device": lambda routing, all_reduce: balance.device_loss(
        routing, device_of=torch.arange(8) // 2, all_reduce=all_reduce
    ),
    "communication": lambda routing, all_reduce: balance.communication_loss(
        routing, device_of=torch.arange(8) // 2, topk_group=2, all_reduce=all_reduce
    ),
}  # fmt: skip


def worst(pairs: Iterator[tuple[Tensor, Tensor]]) -> float:
    """The largest difference of two tensors, over the largest number of the second."""
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def whole(tensor: Tensor) -> Tensor:
    """A tensor as if there were one process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradient_of(weight: Tensor) -> Tensor:
    """The gradient, which must be there."""
    assert weight.grad is not None
    return weight.grad


def loss_of(model: Transformer, tokens: Tensor, n_sequences: int, all_reduce: balance.AllReduce) -> Tensor:
    """Cross-entropy of a batch of n_sequences, of which `tokens` are a part, with two balance losses."""
    out = model(tokens[:, :-1])
    loss = F.cross_entropy(out.logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum") / (n_sequences * S)
    loss = all_reduce(loss)
    for routing in (*out.routings, *out.ahead_routings):
        loss = loss + 0.1 * balance.expert_loss(routing, all_reduce=all_reduce)
        if model.config.moe and model.config.moe.chooser == "token":
            loss = loss + 0.1 * balance.sequence_loss(routing, all_reduce=all_reduce)
    if out.ahead:
        loss = loss + 0.3 * all_reduce(mtp_loss(out, tokens) * len(tokens) / n_sequences)
    return loss


def train_both(name: str, config: ModelConfig, expert: int, n_sequences: int = 8, steps: int = 20) -> None:
    """`steps` steps of AdamW on the same tokens, in one process and in all."""
    torch.manual_seed(0)
    alone = Transformer(config)
    together = copy.deepcopy(alone)
    parallelize(together, make_mesh("cpu", config.moe, expert))
    tokens = torch.randint(16, V, (n_sequences, S + 1), generator=torch.Generator().manual_seed(5))
    # Of alike tokens that have seen no others (first in two sequences, first and second in one) the states are equal:
    # where experts choose they would tie, and rounding would decide.
    tokens[:, 0] = torch.arange(n_sequences)
    mine = rows_of_rank(dist.get_rank(), dist.get_world_size(), n_sequences, config.moe)
    both = [torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True) for model in (alone, together)]
    losses, gradients = [], 0.0
    for _ in range(steps):
        one = loss_of(alone, tokens, len(tokens), balance.single_process)
        all_ = loss_of(together, tokens[mine], len(tokens), all_reduce_sum)
        one.backward()
        (all_ * dist.get_world_size()).backward()
        losses.append(abs(float(one.detach() - all_.detach())))
        pairs = zip(together.parameters(), alone.parameters(), strict=True)
        gradients = max(gradients, worst((whole(gradient_of(p)), gradient_of(q)) for p, q in pairs))
        for model, optimizer in zip((alone, together), both, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(together.parameters(), alone.parameters(), strict=True)
    parameters = worst((whole(p.detach()), q.detach()) for p, q in pairs)
    FOUND[name] = {"losses": max(losses), "gradients": gradients, "parameters": parameters}


def output(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """Dispatch, run the experts, combine."""
    dispatched = experts.dispatch(x, routing)
    return experts.combine(experts(dispatched), dispatched)


class SentRows(TorchDispatchMode):
    """Rows of every all-to-all that leave this process, by the shape of a row and by dtype."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.left: dict[tuple[tuple[int, ...], torch.dtype], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "all_to_all_single":
            tensor, _, parts, *_ = args
            row = (tuple(tensor.shape[1:]), tensor.dtype)
            self.left[row] = self.left.get(row, 0) + sum(parts) - parts[self.rank]
        return func(*args, **(kwargs or {}))


def payload(expert: int) -> None:
    """Rows that leave, there and back and in the backward pass, beside the fewest that can."""
    torch.manual_seed(0)
    E, K, T = 8, 3, 50
    experts, router = Experts(E, D, 12, "padded"), Router(D, MoEConfig(n_routed_experts=E, top_k=K, expert_width=12), V)
    mesh = make_mesh("cpu", MoEConfig(n_routed_experts=E, top_k=K, expert_width=12), expert)
    spread = ParallelExperts(experts, mesh["expert"])
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(dist.get_rank())).requires_grad_()
    routing = router(x, (1, T))
    here = mesh["expert"].get_local_rank()
    devices = device_of(E, mesh)[routing.topk_ids]
    fewest = sum(len(set(row) - {here}) for row in devices.tolist())

    with SentRows(here) as forward:
        y = output(spread, x, routing)
    with SentRows(here) as backward:
        torch.autograd.grad(y.sum() + (y * x.detach()).sum(), x)
    home = torch.full((T,), here)
    crossing = rows_between(routing.topk_ids, routing.kept, home, consecutive_placement(E, expert)).fill_diagonal_(0)
    assert int(crossing.sum()) == fewest
    numbers = torch.tensor([fewest, forward.left[(D,), x.dtype], backward.left[(D,), x.dtype]])
    dist.all_reduce(numbers)
    wanted = output(experts, x, routing)
    error = worst(iter([(y.detach(), wanted.detach())]))
    held = sum(p.to_local().numel() for p in spread.parameters()) / sum(p.numel() for p in experts.parameters())
    FOUND[f"payload {expert}"] = {"fewest": int(numbers[0]), "forward": int(numbers[1]), "backward": int(numbers[2]),
                                  "error": error, "held": held}  # fmt: skip


def empty(expert: int) -> None:
    """All tokens choose the experts of one process; the others' compute nothing. Gradients of x and of the weights."""
    torch.manual_seed(0)
    config = MoEConfig(n_routed_experts=8, top_k=2, expert_width=12)
    mesh = make_mesh("cpu", config, expert)
    for backend in ("loop", "padded"):
        experts = Experts(8, D, 12, backend)
        spread = ParallelExperts(experts, mesh["expert"])
        x = torch.randn(9, D).requires_grad_()
        ids = torch.tensor([[0, 1]]).expand(9, 2)
        gates, kept = torch.rand(9, 2), torch.ones(9, 2, dtype=torch.bool)
        routing = Routing(torch.zeros(9, 8), torch.zeros(9, 8), ids, gates, kept, (1, 9))
        found = [
            torch.autograd.grad(output(way, x, routing).square().sum(), (x, *way.parameters()))
            for way in (spread, experts)
        ]
        FOUND[f"empty {backend}"] = worst((whole(mine), wanted) for mine, wanted in zip(*found, strict=True))


def backends(expert: int) -> None:
    """Every backend on exchanged rows, forward and backward, against the same backend on all rows."""
    config = MoEConfig(n_routed_experts=8, top_k=3, expert_width=16)
    mesh = make_mesh("cpu", config, expert)
    names = ["loop", "padded", "grouped", "auto", *(["cuda"] if shutil.which("g++") else [])]
    for name in names:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            experts = Experts(8, D, 16, name).to(dtype)
            spread = ParallelExperts(experts, mesh["expert"])
            x = torch.randn(9, D, dtype=dtype).requires_grad_()
            routing = Router(D, config, V)(x.detach().float(), (1, 9))
            found = [
                torch.autograd.grad(output(way, x, routing).float().square().sum(), (x, *way.parameters()))
                for way in (spread, experts)
            ]
            pairs = zip(*found, strict=True)
            FOUND[f"backend {name} {dtype}"] = worst((whole(mine).float(), wanted.float()) for mine, wanted in pairs)
        try:
            torch.autograd.grad(output(spread, x, routing).sum(), x, create_graph=True)
        except InputError as error:
            FOUND[f"second derivative {name}"] = str(error)


def losses() -> None:
    """Every balance loss and its gradient on a batch that is spread over the processes."""
    torch.manual_seed(0)
    B, config = 5, MoEConfig(n_routed_experts=8, top_k=2, expert_width=12, n_group=4, topk_group=2)
    router, x = Router(D, config, V), torch.randn(B, S, D)
    world = dist.get_world_size()
    mine = x[rows_of_rank(dist.get_rank(), world, B, config)]
    for name, loss in LOSSES.items():
        one = loss(router(x.flatten(0, 1), (B, S)), all_reduce=balance.single_process)
        (wanted,) = torch.autograd.grad(one, router.weight)
        all_ = loss(router(mine.flatten(0, 1), (len(mine), S)), all_reduce=all_reduce_sum)
        (part,) = torch.autograd.grad(all_ * world, router.weight)
        dist.all_reduce(part)
        FOUND[f"loss {name}"] = worst(iter([(all_.detach(), one.detach()), (part / world, wanted)]))


@contextmanager
def _dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def checkpointed() -> tuple[Transformer, torch.optim.AdamW, Tensor]:
    """A model over all processes, its optimizer, and this process's tokens."""
    torch.manual_seed(0)
    model = Transformer(CHECKPOINTED)
    parallelize(model, make_mesh("cpu", CHECKPOINTED.moe))
    tokens = torch.randint(0, V, (8, S + 1), generator=torch.Generator().manual_seed(5))
    mine = rows_of_rank(dist.get_rank(), dist.get_world_size(), len(tokens), CHECKPOINTED.moe)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True), tokens[mine]


def train_on(model: Transformer, optimizer: torch.optim.AdamW, tokens: Tensor, steps: int) -> list[float]:
    """The losses of `steps` steps, and that after them."""
    losses = []
    for step in range(steps + 1):
        loss = loss_of(model, tokens, 8, all_reduce_sum)
        losses.append(float(loss.detach()))
        if step < steps:
            (loss * dist.get_world_size()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return losses


def save(folder: Path) -> None:
    """Train, save, go on; and a save that the disk refuses."""
    model, optimizer, tokens = checkpointed()
    for step in range(1, 4):
        train_on(model, optimizer, tokens, 1)
        model.moe_layers[0].router.expert_bias.fill_(step / 8)
        save_sharded(folder, step, model, optimizer, {"step": step})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        save_sharded(folder, 4, model, optimizer, {"step": 4})
    except RunError as error:
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, str(error))
        FOUND["refused"] = said
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    FOUND["next"] = train_on(model, optimizer, tokens, 2)


def resume(folder: Path) -> None:
    """Go on from the newest checkpoint."""
    model, optimizer, tokens = checkpointed()
    path = newest_checkpoint(folder)
    assert path is not None
    FOUND["state"] = load_sharded(path, model, optimizer)
    FOUND["next"] = train_on(model, optimizer, tokens, 2)


def norms(processes: Processes) -> None:
    """The norm of all gradients, where weights lie whole, in parts along one axis and along both."""
    for name, config, expert in (("dense", replace(MODEL, moe=None, n_dense_layers=0), 1), *(
        (str(expert), replace(MODEL, tie_embeddings=True), expert) for expert in (1, 2, 4))):  # fmt: skip
        torch.manual_seed(0)
        model = Transformer(config)
        parallelize(model, make_mesh("cpu", config.moe, expert))
        own = torch.full((2, S), processes.rank)
        model(own).logits.square().mean().backward()
        whole_norm = torch.nn.utils.get_total_norm([whole(gradient_of(p)) for p in model.parameters()])
        found = processes.grad_norm(list(model.parameters()))
        FOUND[f"norm {name}"] = abs(float(found / whole_norm) - 1)


def check(folder: Path, processes: Processes) -> None:
    """Everything that four processes do."""
    moe = MODEL.moe
    assert moe is not None
    with _dtype(torch.float64):
        for expert in (1, 2, 4):
            train_both(f"float64 {expert}", MODEL, expert)
        train_both("float64 ragged", MODEL, 4, n_sequences=7)
        v3 = replace(moe, scoring_func="sigmoid", expert_bias=True, n_group=4, topk_group=2, norm_topk_prob=True)
        train_both("float64 limited", replace(MODEL, moe=v3), 4)
        slots = replace(moe, capacity_factor=1.0, routing_groups=4)
        train_both("float64 capacity", replace(MODEL, moe=slots), 2, n_sequences=6)
        devices = replace(
            moe, n_group=4, topk_group=2, group_capacity_factor=1.0, routing_groups=8, never_drop_share=0.5
        )
        train_both("float64 dropping", replace(MODEL, moe=devices), 4, n_sequences=16)
        experts = replace(moe, chooser="expert", routing_groups=4)
        train_both("float64 expert choice", replace(MODEL, moe=experts), 4)
        train_both("float64 mtp", replace(MODEL, n_mtp=2, tie_embeddings=True), 2)
        norms(processes)
        losses()
        empty(4)
        payload(4)
        payload(2)
        save(folder)
    train_both("float32 4", MODEL, 4)
    backends(4)


def main(mode: str, folder: Path) -> None:
    """Everything, in the same order on every process."""
    torch.set_num_threads(1)
    with launched_processes() as processes:
        processes.join("cpu")
        if mode == "resume":
            with _dtype(torch.float64):
                resume(folder)
        else:
            check(folder, processes)
        if processes.is_rank0:
            (folder / "found.json").write_text(json.dumps(FOUND, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
