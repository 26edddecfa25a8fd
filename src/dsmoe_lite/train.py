"""One readable training loop: AdamW, warm-up and cosine decay, clipping, checkpoints that resume exactly."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_lite.config import MoEConfig, to_dict
from dsmoe_lite.data.batches import Batches
from dsmoe_lite.errors import DivergedError, require, require_choice, require_number, require_whole
from dsmoe_lite.interrupts import stop_requested
from dsmoe_lite.layers import balance
from dsmoe_lite.layers.router import Routing
from dsmoe_lite.layers.selection import group_of
from dsmoe_lite.model import Output, Transformer
from dsmoe_lite.parallel.alone import Alone
from dsmoe_lite.progress import progress
from dsmoe_lite.provenance import provenance
from dsmoe_lite.run_folder import keep_settings, own

PLAIN_LOSSES = {
    "importance": balance.importance_loss,
    "load": balance.load_loss,
    "gshard": balance.gshard_loss,
    "switch": balance.switch_loss,
    "z": balance.z_loss,
    "expert": balance.expert_loss,
    "sequence": balance.sequence_loss,
}
DEVICE_LOSSES = ("device", "communication")  # of the config's groups, one a device
BALANCE_LOSSES = (*PLAIN_LOSSES, *DEVICE_LOSSES)
ALONE = Alone()
SCHEMA_VERSION = 2  # 1 had one balance loss, and no loads


@dataclass(frozen=True)
class TrainConfig:
    """How to train. A step sees batch_size * grad_accum sequences of seq_len tokens."""

    steps: int
    batch_size: int = 16
    seq_len: int = 64
    grad_accum: int = 1
    lr: float = 3e-3
    warmup_steps: int = 50
    final_lr_share: float = 0.1  # the cosine ends at this share of lr
    weight_decay: float = 0.1  # on matrices; not on norms, nor on the router
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    balance: dict[str, float] = field(default_factory=lambda: {"switch": 0.01})  # weights of losses, of each MoE layer
    bias_speed: float = 0.0  # of loss-free balancing: how far expert_bias moves in a step
    precision: str = "auto"  # auto: bf16 autocast on a GPU, fp32 on a CPU
    checkpoint_every: int = 0  # steps; 0: only when the run ends or is interrupted
    routing_every: int = 20  # steps between two entries of balance figures
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "grad_accum", "routing_every"):
            require_whole(name, getattr(self, name), 1)
        for name in ("warmup_steps", "checkpoint_every", "seed"):
            require_whole(name, getattr(self, name), 0, 2**31 - 1)
        for name in ("lr", "grad_clip"):
            require_number(name, getattr(self, name), 0.0, open_low=True)
        for name in ("weight_decay", "bias_speed"):
            require_number(name, getattr(self, name), 0.0)
        for name in ("final_lr_share", "beta1", "beta2"):
            require_number(name, getattr(self, name), 0.0, 1.0)
        for name, weight in self.balance.items():
            require_choice("balance", name, BALANCE_LOSSES)
            require_number(f"balance weight of {name}", weight, 0.0)
        require_choice("precision", self.precision, ("auto", "fp32", "bf16"))


@dataclass
class Run:
    """What a training run leaves: one loss a step, balance figures every routing_every steps, time and progress."""

    losses: list[float] = field(default_factory=list)  # next-token cross-entropy in nats, balance losses not included
    routing: list[dict[str, Any]] = field(default_factory=list)  # step, max_vio and drop_rate (means over MoE layers),
    # loads (MoE layers, E): assignments over their mean, of the step's last batch
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0

    @property
    def steps_done(self) -> int:
        """Optimizer steps taken."""
        return len(self.losses)

    @property
    def tokens_per_second(self) -> float:
        """Training tokens a second of wall clock."""
        return self.tokens / self.seconds if self.seconds else 0.0


def train(
    model: Transformer,
    batches: Batches,
    config: TrainConfig,
    *,
    folder: Path | None = None,
    until: int | None = None,
    after: Callable[[int], None] | None = None,
    processes: Alone = ALONE,
) -> Run:
    """Train `model` in place and return its Run; with `folder`, keep checkpoints there and go on from the last one.

    `until`: stop after so many of config.steps, the learning rate that of the whole; None: do them all. `after` is
    called with the number of steps taken, after each. Many `processes`, over which `model` is spread, all call with the
    same arguments and get the same Run, but for its seconds. An interrupt ends training after the current step: the
    model keeps what it has learnt and a line says so. Raises DivergedError when the loss is not finite, RunError when
    another process works in `folder`, InputError when `folder` holds a run with other settings, when a balance loss
    does not fit the model, or a batch cannot be shared out.
    """
    check_balance(model.config.moe, config)
    processes.rows(config.batch_size, model.config.moe)
    last = config.steps if until is None else until
    require_whole("until", last, 1, config.steps)
    optimizer = make_optimizer(model, config)
    torch.manual_seed(config.seed)
    with ExitStack() as held, stop_requested(processes.stopped_by) as stop:
        processes.first(lambda: held.enter_context(own(folder)))
        run = _resume(folder, model, optimizer, batches, config, processes)
        processes.own_noise(run.steps_done)
        quiet = not processes.leads
        bar = progress(total=last, initial=run.steps_done, desc="training", unit="step", disable=quiet)
        model.train()
        watch = _Stopwatch()
        for step in range(run.steps_done, last):
            loss = _step(model, optimizer, batches, config, step, run, processes)
            if not math.isfinite(loss):
                raise DivergedError(f"loss = {loss} at step {step}: lower lr = {config.lr:g} or raise warmup_steps")
            run.losses.append(loss)
            run.tokens += config.batch_size * config.grad_accum * config.seq_len
            seconds, cpu_seconds = watch.lap()
            run.seconds += seconds
            run.cpu_seconds += cpu_seconds
            bar.update()
            if after:
                after(run.steps_done)
            bar.set_postfix_str(f"loss {loss:.3f}, {run.tokens_per_second:,.0f} tokens/s", refresh=False)
            due = config.checkpoint_every and run.steps_done % config.checkpoint_every == 0
            stopped = processes.any(stop.is_set())
            if folder and (due or stopped or run.steps_done == last):
                state = vars(run) | {"batches": batches.state_dict()}
                processes.save(folder, run.steps_done, model, optimizer, state)
            if stopped:
                break
        bar.close()
    if run.steps_done < last and processes.leads:
        kept = f"run it again to go on from {folder}" if folder else "the model keeps what it has learnt so far"
        print(f"Stopped after step {run.steps_done} of {config.steps}: {kept}.")
    return run


def check_balance(moe: MoEConfig | None, config: TrainConfig) -> None:
    """Raise InputError where a model lacks what a loss or the bias needs; a dense model ignores the other losses."""
    by_devices = moe is not None and moe.n_group > 1
    by_logits = moe is not None and moe.noisy_gating and not moe.expert_bias and moe.topk_group == moe.n_group
    needs = {
        **dict.fromkeys(DEVICE_LOSSES, (by_devices, "needs a model with n_group > 1")),
        "load": (
            by_logits,
            "needs a model with noisy_gating, without expert_bias, and topk_group = n_group: the K best logits win",
        ),
        "sequence": (moe is None or moe.chooser == "token", "is not defined for a model with chooser = 'expert'"),
    }
    for name, (fits, remedy) in needs.items():
        weight = config.balance.get(name, 0.0)
        require(fits or not weight, f"balance weight of {name}", weight, remedy)
    biased = moe is not None and moe.expert_bias
    require(biased or not config.bias_speed, "bias_speed", config.bias_speed, "needs a model with expert_bias")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the rate of `step` (from 0): linear warm-up, then a cosine down to final_lr_share * lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * cosine)


def make_optimizer(model: Transformer, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only, the router's left out."""
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and ".router." not in name]
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or ".router." in name]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def balance_terms(
    output: Output, moe: MoEConfig | None, config: TrainConfig, total: balance.Total = balance.alone
) -> Tensor:
    """Return the weighted balance losses of every MoE layer, summed; 0 for a dense model.

    total: as in `layers.balance`, where the batch lies on several processes.
    """
    terms = output.logits.new_zeros((), dtype=torch.float32)
    if moe is None:
        return terms
    for routing in output.routings:
        for name, weight in config.balance.items():
            if weight:
                terms = terms + weight * _balance_loss(name, routing, moe, total)
    return terms


def run_record(run: Run, model: Transformer, config: TrainConfig, **facts: Any) -> dict[str, Any]:
    """Return the JSON-able record of a run: configs, seeds, curve, speed, versions, commit, and `facts`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": to_dict(model.config),
        "train": to_dict(config),
        "finished": run.steps_done == config.steps,
        "tokens": run.tokens,
        "seconds": round(run.seconds, 3),
        "cpu_seconds": round(run.cpu_seconds, 3),
        "tokens_per_second": round(run.tokens_per_second, 1),
        "losses": [round(loss, 5) for loss in run.losses],
        "routing": run.routing,
        **facts,
        "provenance": provenance(),
    }


def _balance_loss(name: str, routing: Routing, moe: MoEConfig, total: balance.Total) -> Tensor:
    if name in PLAIN_LOSSES:
        return PLAIN_LOSSES[name](routing, total=total)
    device_of = group_of(moe.n_routed_experts, moe.n_group, routing.topk_ids.device)
    if name == "device":
        return balance.device_loss(routing, device_of=device_of, total=total)
    return balance.communication_loss(routing, device_of=device_of, topk_group=moe.topk_group, total=total)


class _Stopwatch:
    """Wall and CPU seconds since the last lap."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        took = wall - self._wall, cpu - self._cpu
        self._wall, self._cpu = wall, cpu
        return took


def _step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    config: TrainConfig,
    step: int,
    run: Run,
    processes: Alone,
) -> float:
    device, moe = model.embed.weight.device, model.config.moe
    half = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    mean_loss = 0.0
    counts: list[Tensor] = []  # (E,) a layer, of all micro-batches
    mine = processes.rows(config.batch_size, moe)
    share = (mine.stop - mine.start) / config.batch_size
    for _ in range(config.grad_accum):
        tokens = next(batches).tokens[mine].to(device, non_blocking=True)  # (B, S + 1)
        with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
            output = model(tokens[:, :-1])
            loss = F.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss = processes.total(loss * share)
        whole = (loss + balance_terms(output, moe, config, processes.total)) / config.grad_accum
        (whole * processes.size).backward()  # FSDP takes means of gradients over processes
        mean_loss += loss.item() / config.grad_accum
        here = [routing.counts for routing in output.routings]
        counts = [a + b for a, b in zip(counts, here, strict=True)] if counts else here
    weights = list(model.parameters())
    torch.nn.utils.clip_grads_with_norm_(weights, config.grad_clip, processes.norm(weights))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if config.bias_speed:
        for layer, count in zip(model.moe_layers, counts, strict=True):
            balance.update_bias(layer.router.expert_bias, processes.total(count), config.bias_speed)
    if output.routings and step % config.routing_every == 0:
        run.routing.append(_routing_figures(step, output.routings, processes))
    return mean_loss


def _routing_figures(step: int, routings: tuple[Routing, ...], processes: Alone) -> dict[str, Any]:
    counts = processes.total(torch.stack([routing.counts for routing in routings]))  # (MoE layers, E)
    kept = processes.total(torch.stack([routing.kept.sum() for routing in routings])).tolist()
    assigned, n_layers = counts.sum(dim=1).clamp(min=1), len(routings)
    loads = (counts.float() * counts.shape[1] / assigned.unsqueeze(1)).tolist()
    vio = sum(max(layer) - 1 for layer in loads) / n_layers
    dropped = sum(1 - k / n for k, n in zip(kept, assigned.tolist(), strict=True)) / n_layers
    rounded = [[round(value, 3) for value in layer] for layer in loads]
    return {"step": step, "max_vio": round(vio, 4), "drop_rate": round(dropped, 4), "loads": rounded}


def _resume(
    folder: Path | None,
    model: Transformer,
    optimizer: torch.optim.AdamW,
    batches: Batches,
    config: TrainConfig,
    processes: Alone,
) -> Run:
    if folder is None:
        return Run()
    settings = {"model": to_dict(model.config), "train": to_dict(config), "data": batches.describe()}
    processes.same(settings)
    processes.first(lambda: keep_settings(folder, settings))
    state = processes.load(folder, model, optimizer)
    if state is None:
        return Run()
    known = state.keys() == {"batches", *vars(Run())}
    require(known, "checkpoint", str(folder), "another version of dsmoe wrote it")
    batches.load_state_dict(state.pop("batches"))
    return Run(**state)
