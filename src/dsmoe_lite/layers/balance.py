"""Balance losses, as pure functions of a Routing. Each docstring gives the loss at perfect balance and at collapse.

The caller applies the weight (alpha). Counts have no gradient; affinities have one. The affinities of each token are
divided by their sum (DeepSeek-V3 Eq 19), which changes nothing for softmax. A batch without tokens gives 0.

If a batch is divided among processes, `all_reduce` sums over them, with the gradient of this process's part. Every
process then gets the loss of the whole batch: factors are summed over processes before they are multiplied.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dsmoe_lite.common.errors import InputError, require
from dsmoe_lite.layers.load import expert_counts, relative_load
from dsmoe_lite.layers.router import TINY, Routing
from dsmoe_lite.layers.selection import ordered_topk

AllReduce = Callable[[Tensor], Tensor]


def single_process(part: Tensor) -> Tensor:
    """The `all_reduce` of one process: its part is the sum."""
    return part


def importance_loss(routing: Routing, *, all_reduce: AllReduce = single_process) -> Tensor:
    """Return CV(Importance)^2, Importance_i = sum of expert i's gates (Shazeer et al., arXiv:1701.06538).

    0 at balance, E - 1 when one expert has every gate. The variance is the biased one.
    """
    ids = routing.topk_ids.clamp(min=0).flatten()  # the gate of id -1 is 0
    return _cv_squared(
        all_reduce(routing.gates.new_zeros(routing.n_experts).index_add(0, ids, routing.gates.flatten()))
    )


def load_loss(routing: Routing, *, all_reduce: AllReduce = single_process) -> Tensor:
    """Return CV(Load)^2, with Load_i = sum_t Phi((clean_ti - kth_excluding_ti) / noise_ti) (arXiv:1701.06538).

    Load_i is the expected number of tokens that choose i if their noise on i is drawn again; 0 at balance. InputError
    without noise: outside training, or without `noisy_gating`.
    """
    if routing.clean_logits is None or routing.noise_scale is None:
        raise InputError("load loss: needs noise on the logits; set noisy_gating=True and take it in training")
    K = routing.topk_ids.shape[1]
    if routing.n_experts == K:
        return routing.logits.new_zeros(())  # every expert is always chosen
    best = routing.logits.topk(K + 1, dim=-1).values  # (T, K + 1)
    among_best = routing.logits >= best[:, K - 1 : K]
    threshold = torch.where(among_best, best[:, K:], best[:, K - 1 : K])  # to be beaten: the K-th largest of the others
    chance = torch.special.ndtr((routing.clean_logits - threshold) / routing.noise_scale)
    return _cv_squared(all_reduce(chance.sum(dim=0)))


def gshard_loss(routing: Routing, *, all_reduce: AllReduce = single_process) -> Tensor:
    """Return l_aux = 1/E sum_e (c_e / S) m_e (GShard, arXiv:2006.16668, Algorithm 1): 1/E^2 at balance, 1/E collapsed.

    c_e counts first choices; m_e is the mean affinity to expert e over the S = T tokens.
    """
    return (_first_choice_share(routing, all_reduce) * _mean_affinity(routing, all_reduce)).mean()


def switch_loss(routing: Routing, *, all_reduce: AllReduce = single_process) -> Tensor:
    """Return E sum_i f_i P_i (Switch Transformer, arXiv:2101.03961, without alpha): 1 at balance, E collapsed.

    f_i is the share of tokens whose first choice is i, P_i the mean affinity to i: E^2 times GShard's loss.
    """
    return routing.n_experts * (_first_choice_share(routing, all_reduce) * _mean_affinity(routing, all_reduce)).sum()


def z_loss(routing: Routing, *, all_reduce: AllReduce = single_process) -> Tensor:
    """Return the mean over tokens of (log sum_j exp x_j)^2 (ST-MoE, arXiv:2202.08906), (ln E)^2 at zero logits."""
    return all_reduce(torch.logsumexp(routing.logits, dim=-1).square().sum()) / _n_tokens(routing, all_reduce)


def expert_loss(routing: Routing, *, earlier: Tensor | None = None, all_reduce: AllReduce = single_process) -> Tensor:
    """Return sum_i f_i P_i, f_i = E / (K T) * tokens that chose i (DeepSeekMoE Eq 12-14): 1 at balance, E/K collapsed.

    Over all T tokens of the batch; `sequence_loss` with `selected` is the same within each sequence.
    earlier (E,): choices in the micro-batches before this one, which f also counts (arXiv:2501.11873).
    """
    return (_relative_load(routing, all_reduce, earlier) * _mean_affinity(routing, all_reduce)).sum()


def device_loss(
    routing: Routing, *, device_of: Tensor, earlier: Tensor | None = None, all_reduce: AllReduce = single_process
) -> Tensor:
    """Return sum_i f'_i P'_i over G devices (DeepSeekMoE Eq 15-17): 1 at balance, G when one device does all.

    device_of (E,): the device of each expert, 0 .. G - 1. f'_i is the mean f of its experts, P'_i the sum of their P.
    earlier: as in `expert_loss`.
    """
    devices = _devices(routing, device_of)
    experts = devices.bincount()  # (G,) on each device
    f = _relative_load(routing, all_reduce, earlier)
    f = f.new_zeros(len(experts)).index_add(0, devices, f) / experts
    return (f * _on_devices(routing, devices, len(experts), all_reduce)).sum()


def communication_loss(
    routing: Routing, *, device_of: Tensor, topk_group: int, all_reduce: AllReduce = single_process
) -> Tensor:
    """Return sum_i f''_i P''_i, f''_i = G / (M T) * tokens sent to device i (DeepSeek-V2 Eq 29-31, arXiv:2405.04434).

    device_of (E,); topk_group is M, the device limit. A token counts once per device that holds one of its experts.
    1 if all tokens reach M devices evenly, less if they reach fewer, G / M if all go to one device.
    """
    devices = _devices(routing, device_of)
    G = int(devices.max()) + 1
    require(1 <= topk_group <= G, "topk_group", topk_group, f"must be 1 to {G}, the number of devices")
    ids = routing.topk_ids
    used = torch.zeros(ids.shape[0], G + 1, dtype=torch.bool, device=ids.device)
    used.scatter_(1, torch.where(ids >= 0, devices[ids], G), True)
    sent = all_reduce(used[:, :G].to(routing.scores.dtype).sum(dim=0)) / _n_tokens(
        routing, all_reduce
    )  # (G,) share of the tokens
    return G / topk_group * (sent * _on_devices(routing, devices, G, all_reduce)).sum()


def sequence_loss(routing: Routing, *, selected: bool = False, all_reduce: AllReduce = single_process) -> Tensor:
    """Return the mean over sequences of sum_i f_i P_i (DeepSeek-V3 Eq 17-20, arXiv:2412.19437): 1 at balance, E/K else.

    f and P are those of `expert_loss`, taken within one sequence. f counts the Topk of the scores without bias (Eq 18);
    `selected` counts the experts really chosen, as published code does, and makes it DeepSeek-V2's Eq 23-25; only this
    count is defined where experts choose.
    """
    (B, S), E, K = routing.batch_shape, routing.n_experts, routing.topk_ids.shape[1]
    ids = routing.topk_ids if selected else ordered_topk(routing.scores, K)
    chosen = routing.scores.new_zeros(B * S, E + 1).scatter(1, ids + 1, 1)[:, 1:]  # (T, E); -1 falls away
    counts = chosen.view(B, S, E).sum(dim=1)
    f = counts * E / counts.sum(dim=1, keepdim=True).clamp(min=1)  # K * S assignments a sequence
    P = _affinity(routing).view(B, S, E).sum(dim=1) / max(1, S)
    return all_reduce((f * P).sum(dim=1).sum()) / all_reduce(f.new_tensor(B)).clamp(min=1)


@torch.no_grad()
def update_bias(expert_bias: Tensor, counts: Tensor, speed: float, kappa: float = 0.0) -> None:
    """Move expert_bias (E,) in place: b_i += speed * sign(mean count - count_i) (arXiv:2408.15664; V3 Section 2.1.2).

    counts (E,) int: how many tokens of the whole step chose each expert. The sign leaves an expert at the mean where it
    is. With a kappa above 0, tanh(kappa * (1 - count_i / mean count)) takes the place of the sign, and the mean of all
    steps is subtracted: bounded steps, small near balance. That is Trinity's rule (arXiv:2602.17004) without momentum.
    InputError for a bias in half precision, where small steps are rounded away.
    """
    exact = expert_bias.dtype in (torch.float32, torch.float64)
    require(exact, "expert_bias", expert_bias.dtype, "loses small steps; keep it in float32")
    too_few = counts.sum() - len(counts) * counts  # in whole numbers: a rounded mean would move experts at balance
    step = too_few.to(expert_bias.dtype)
    if kappa > 0:
        step = torch.tanh(kappa * step / counts.sum().clamp(min=1))
        step -= step.mean()
    else:
        step = step.sign()
    expert_bias += speed * step


def _affinity(routing: Routing) -> Tensor:
    return routing.scores / (routing.scores.sum(dim=-1, keepdim=True) + TINY)


def _n_tokens(routing: Routing, all_reduce: AllReduce) -> Tensor:
    return all_reduce(routing.scores.new_tensor(len(routing.scores))).clamp(min=1)


def _mean_affinity(routing: Routing, all_reduce: AllReduce) -> Tensor:
    return all_reduce(_affinity(routing).sum(dim=0)) / _n_tokens(routing, all_reduce)  # (E,)


def _first_choice_share(routing: Routing, all_reduce: AllReduce) -> Tensor:
    first = routing.topk_ids[:, :1].flatten()
    counts = expert_counts(first, routing.n_experts)
    return all_reduce(counts.to(routing.scores.dtype)) / _n_tokens(routing, all_reduce)  # (E,)


def _relative_load(routing: Routing, all_reduce: AllReduce, earlier: Tensor | None) -> Tensor:
    counts = routing.counts if earlier is None else routing.counts + earlier
    return relative_load(all_reduce(counts.to(routing.scores.dtype)))  # (E,), 1 at balance


def _devices(routing: Routing, device_of: Tensor) -> Tensor:
    E, shape = routing.n_experts, tuple(device_of.shape)
    require(shape == (E,), "device_of", shape, f"must hold one device for each of {E} experts")
    devices = device_of.to(routing.topk_ids.device, torch.int64)
    every = bool(devices.min() >= 0) and bool(devices.bincount().all())
    require(every, "device_of", device_of.tolist(), "must number the devices 0 .. G - 1, each with an expert")
    return devices


def _on_devices(routing: Routing, devices: Tensor, n_devices: int, all_reduce: AllReduce) -> Tensor:
    P = _mean_affinity(routing, all_reduce)
    return P.new_zeros(n_devices).index_add(0, devices, P)


def _cv_squared(values: Tensor) -> Tensor:
    mean = values.mean()
    return values.var(unbiased=False) / mean.square().clamp(min=1e-20)
