"""The training loop: AdamW, balance losses, gradient clipping, loss-free balancing, exact resumption."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dsmoe_lite.common.errors import require_int
from dsmoe_lite.common.progress import progress
from dsmoe_lite.data.batches import Batches
from dsmoe_lite.layers.balance import update_bias
from dsmoe_lite.model import Transformer
from dsmoe_lite.training.checkpointer import Checkpointer
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.fp8 import fp8_products
from dsmoe_lite.training.interrupts import stop_requested
from dsmoe_lite.training.objective import balance_terms, mtp_loss
from dsmoe_lite.training.optimizer import learning_rate, make_optimizer, set_learning_rate
from dsmoe_lite.training.processes import SINGLE_PROCESS, Processes
from dsmoe_lite.training.record import Run, Stopwatch, routing_figures


def train(
    model: Transformer,
    batches: Batches,
    config: TrainConfig,
    *,
    folder: Path | None = None,
    until: int | None = None,
    after: Callable[[int], None] | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> Run:
    """Train `model` in place and return its Run.

    folder: save checkpoints there, and resume from the newest; None: save nothing.
    until: stop after this many of config.steps, with the learning rates of the full run; None: take all.
    after: called after each step with the number of steps taken.
    processes: if many, `model` is sharded over them, all call with the same arguments, and all return the same Run
    except for its seconds.

    An interrupt ends training after the current step: the model keeps its progress, and a line is printed. Raises
    DivergedError if the loss is not finite, RunError if another process trains in `folder`, and InputError if `folder`
    holds a run with other settings, if a balance loss does not fit the model, or if a batch cannot be divided.
    """
    moe, device = model.config.moe, model.embed.weight.device
    config.check_fits(moe)
    last = config.steps if until is None else until
    require_int("until", last, 1, config.steps)
    rows = processes.rows(config.batch_size, moe)  # the sequences of each batch that this process takes
    share = (rows.stop - rows.start) / config.batch_size
    optimizer = make_optimizer(model, config)
    weights = list(model.parameters())
    moe_layers = model.all_moe_layers
    with (
        stop_requested(processes.stop_signals) as stop,
        Checkpointer(folder, model, optimizer, batches, config, processes) as checkpointer,
    ):
        run = checkpointer.resume()
        model.train()
        bar = progress(total=last, initial=run.steps_done, desc="training", unit="step", disable=not processes.is_rank0)
        stopwatch = Stopwatch()
        for step in range(run.steps_done, last):
            set_learning_rate(optimizer, learning_rate(step, config))
            mean_loss = 0.0
            counts: list[Any] = [0] * len(moe_layers)  # of each layer (E,), over all micro-batches
            for _ in range(config.grad_accum):
                tokens = next(batches).tokens[rows].to(device, non_blocking=True)  # (B, S + 1)
                with _precision(config, model):
                    output = model(tokens[:, :-1])
                    loss = F.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
                    ahead = config.mtp_weight_at(step) * mtp_loss(output, tokens)
                loss = processes.all_reduce_sum(loss * share)  # the mean over the full batch
                earlier = counts if config.global_batch else None
                terms = balance_terms(output, model.config, config.balance, processes.all_reduce_sum, earlier)
                if output.ahead:
                    terms = terms + processes.all_reduce_sum(ahead * share)
                objective = (loss + terms) / config.grad_accum
                (objective * processes.size).backward()  # FSDP averages gradients over processes
                mean_loss += loss.item() / config.grad_accum
                counts = [
                    n + routing.counts
                    for n, routing in zip(counts, (*output.routings, *output.ahead_routings), strict=True)
                ]
            torch.nn.utils.clip_grads_with_norm_(weights, config.grad_clip, processes.grad_norm(weights))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if config.bias_speed:
                for layer, n in zip(moe_layers, counts, strict=True):
                    if not layer.router.config.expert_bias:
                        continue  # a table chooses
                    whole = processes.all_reduce_sum(n)
                    update_bias(layer.router.expert_bias, whole, config.bias_speed, config.bias_kappa)
            if moe is not None and step % config.routing_every == 0:
                run.routing.append(routing_figures(step, output.routings, processes))
            run.add_step(mean_loss, config, stopwatch)
            bar.update()
            bar.set_postfix_str(f"loss {mean_loss:.3f}, {run.tokens_per_second:,.0f} tokens/s", refresh=False)
            if after:
                after(run.steps_done)
            stopped = processes.any(stop.is_set())
            checkpointer.save_if_due(run, last=last, stopped=stopped)
            if stopped:
                break
        bar.close()
    if run.steps_done < last and processes.is_rank0:
        advice = f"run it again to continue from {folder}" if folder else "the model keeps its progress so far"
        print(f"Stopped after step {run.steps_done} of {config.steps}: {advice}.")
    return run


def _precision(config: TrainConfig, model: Transformer) -> AbstractContextManager[object]:
    """The products of a forward pass: in FP8, in bfloat16 if asked for or on a GPU, or as the weights are."""
    device = model.embed.weight.device
    if config.precision == "fp8":
        return fp8_products(model, config.fp8_recipe)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
