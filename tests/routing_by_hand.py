"""One router's decision, a token and an expert at a time, from the papers: what the package is compared with."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe_lite.config import MoEConfig


@dataclass
class Decision:
    """Experts of each token, best first, their gates (scalars that carry gradients), and what stays of it."""

    scores: list[list[Tensor]]
    chosen: list[list[int]]
    gates: list[list[Tensor]]
    kept: set[tuple[int, int]]  # (token, expert)


def decide(
    config: MoEConfig,
    logits: Tensor,
    batch_shape: tuple[int, int],
    *,
    training: bool,
    bias: list[float] | None = None,
    tabled: list[list[int]] | None = None,
) -> Decision:
    """The decision on logits (T, E), without random choices. tabled: a table's experts of each token, if it chooses."""
    scores = [affinities(row, config.scoring_func) for row in logits]
    bias = [0.0] * config.n_routed_experts if bias is None else bias
    values = [[s.item() for s in row] for row in scores]
    if config.chooser == "expert":
        chosen = experts_choose(values, -(-len(scores) * config.top_k // config.n_routed_experts))
    elif tabled is not None:
        chosen = [sorted(ids, key=lambda e: (-row[e], e)) for row, ids in zip(values, tabled, strict=True)]
    else:
        chosen = [best_experts([s + b for s, b in zip(row, bias, strict=True)], config) for row in values]
    gates = [weigh([row[e] for e in ids], config) for row, ids in zip(scores, chosen, strict=True)]
    kept = {(t, e) for t, ids in enumerate(chosen) for e in ids}
    factor = config.capacity_factor if training else config.eval_capacity_factor
    if factor is not None:
        kept &= within_experts(chosen, config.n_routed_experts, factor * len(scores) * config.top_k)
    if training and config.group_capacity_factor is not None:
        kept &= within_groups(config, values, chosen, batch_shape)
    return Decision(scores, chosen, gates, kept)


def affinities(row: Tensor, scoring_func: str) -> list[Tensor]:
    """Softmax, sigmoid or the root of softplus of one token's logits."""
    if scoring_func == "sigmoid":
        return [1 / (1 + torch.exp(-x)) for x in row]
    if scoring_func == "sqrtsoftplus":
        return [torch.log1p(torch.exp(x)) ** 0.5 for x in row]
    exps = [torch.exp(x - row.detach().max()) for x in row]
    total = torch.stack(exps).sum()
    return [x / total for x in exps]


def best_experts(worth: list[float], config: MoEConfig) -> list[int]:
    """The K best experts of the best groups, best first; equal ones by number."""
    size = config.n_routed_experts // config.n_group
    group_worth = []
    for group in range(config.n_group):
        inside = sorted(worth[group * size : (group + 1) * size], reverse=True)
        group_worth.append(inside[0] if config.group_score == "max" else inside[0] + inside[1])
    groups = sorted(range(config.n_group), key=lambda g: (-group_worth[g], g))[: config.topk_group]
    reach = [e for e in range(len(worth)) if e // size in groups]
    return sorted(reach, key=lambda e: (-worth[e], e))[: config.top_k]


def experts_choose(values: list[list[float]], slots: int) -> list[list[int]]:
    """Each expert takes its `slots` best tokens; a token lists its experts best first."""
    chosen: list[list[int]] = [[] for _ in values]
    for e in range(len(values[0]) if values else 0):
        for t in sorted(range(len(values)), key=lambda t: (-values[t][e], t))[:slots]:
            chosen[t].append(e)
    return [sorted(ids, key=lambda e: (-values[t][e], e)) for t, ids in enumerate(chosen)]


def weigh(picked: list[Tensor], config: MoEConfig) -> list[Tensor]:
    """Gates of the chosen affinities: normalised and scaled, or one of them, as the code of that generation did."""
    if config.norm_topk_prob:
        picked = [s / sum(picked) for s in picked]
        if not config.scale_normalised:
            return picked
    return [s * config.routed_scaling_factor for s in picked]


def within_experts(chosen: list[list[int]], n_experts: int, total_slots: float) -> set[tuple[int, int]]:
    """GShard's Algorithm 1: all first choices in token order, then all second ones, each while its expert has room."""
    slots, count, kept = math.ceil(total_slots / n_experts), [0] * n_experts, set()
    for k in range(max(map(len, chosen), default=0)):
        for t, ids in enumerate(chosen):
            if count[ids[k]] < slots:
                kept.add((t, ids[k]))
            count[ids[k]] += 1
    return kept


def within_groups(
    config: MoEConfig, values: list[list[float]], chosen: list[list[int]], batch_shape: tuple[int, int]
) -> set[tuple[int, int]]:
    """DeepSeek-V2, Section 2.2.4: each device drops its lowest affinities until it is within its budget."""
    B, S = batch_shape
    size = config.n_routed_experts // config.n_group
    assert config.group_capacity_factor is not None
    budget = math.floor(config.group_capacity_factor * B * S * config.top_k / config.n_group)
    safe = round(config.never_drop_share * B)  # sequences
    kept = set()
    for group in range(config.n_group):
        here = [(t, e) for t, ids in enumerate(chosen) for e in ids if e // size == group]
        droppable = sorted((p for p in here if p[0] // S >= safe), key=lambda p: values[p[0]][p[1]])  # lowest first
        excess = max(0, len(here) - budget)
        kept |= set(here) - set(droppable[:excess])
    return kept
