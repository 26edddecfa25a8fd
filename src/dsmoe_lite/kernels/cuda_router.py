"""The router's decision in one CUDA kernel, from logits to scores, ids, gates and counts, with its gradient."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsmoe_lite.common.autograd import first_order
from dsmoe_lite.common.errors import InputError, require, require_choice, require_int
from dsmoe_lite.kernels.launch import check_ids, check_shape, check_tensors, contiguous_aligned, launch

MOST_EXPERTS, MOST_CHOICES, MOST_GROUPS = 512, 32, 32  # a warp a token, a lane a choice and a group


@dataclass(frozen=True)
class Rule:
    """How a token chooses, in MoEConfig's words. InputError for what the kernel does not have."""

    top_k: int
    scoring_func: str = "softmax"
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "max"
    norm_topk_prob: bool = False
    scale: float = 1.0  # on the gates

    def __post_init__(self) -> None:
        require_int("top_k", self.top_k, 1, MOST_CHOICES)
        require_choice("scoring_func", self.scoring_func, ("softmax", "sigmoid"))
        require_int("n_group", self.n_group, 1, MOST_GROUPS)
        require_int("topk_group", self.topk_group, 1, self.n_group)
        require_choice("group_score", self.group_score, ("max", "top2"))


def route(logits: Tensor, rule: Rule, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scores (T, E), ids (T, K) int64, gates (T, K) and counts (E,) int32 from logits (T, E) float32.

    The choice is that of layers.router.Router: the K largest scores + bias inside the best groups, ties to the lower
    id; -1 where a token has no K finite scores. Scores and gates carry gradients.
    """
    if logits.dtype != torch.float32:
        raise InputError(f"logits: must be torch.float32, not {logits.dtype}; call .float() first")
    E = logits.shape[1]
    require_int("experts", E, 1, MOST_EXPERTS)
    require(E % rule.n_group == 0, "n_group", rule.n_group, f"must divide the number of experts, {E}")
    in_reach = rule.topk_group * E // rule.n_group
    require(rule.top_k <= in_reach, "top_k", rule.top_k, f"must be at most {in_reach}, the experts within reach")
    check_tensors(logits=logits)
    if expert_bias is not None:
        check_tensors(logits=logits, expert_bias=expert_bias)
        check_shape("expert_bias", expert_bias, (E,))
    return _Route.apply(logits, rule, expert_bias)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rule: Rule, bias: Tensor | None) -> tuple[Tensor, ...]:
        T, E = logits.shape
        scores, counts = torch.empty_like(logits), torch.zeros(E, dtype=torch.int32, device=logits.device)
        ids = torch.empty(T, rule.top_k, dtype=torch.int64, device=logits.device)
        gates = logits.new_empty(T, rule.top_k)
        sigmoid, two_best = int(rule.scoring_func == "sigmoid"), int(rule.group_score == "top2")
        choice = (rule.n_group, rule.topk_group, two_best, int(rule.norm_topk_prob), float(rule.scale))
        launch("route", logits, logits, bias, T, E, rule.top_k, sigmoid, *choice, scores, ids, gates, counts)
        ctx.save_for_backward(scores, ids)
        ctx.rule = rule
        ctx.mark_non_differentiable(ids, counts)
        return scores, ids, gates, counts

    @staticmethod
    @first_order("use layers.router.Router")
    def backward(ctx: Any, d_scores: Tensor, _: Any, d_gates: Tensor, __: Any) -> tuple[Tensor | None, ...]:
        (scores, ids), rule = ctx.saved_tensors, ctx.rule
        (T, E), sigmoid = scores.shape, int(ctx.rule.scoring_func == "sigmoid")
        d_scores, d_gates, d_logits = (
            contiguous_aligned(d_scores),
            contiguous_aligned(d_gates),
            torch.empty_like(scores),
        )
        check_tensors(scores=scores, d_scores=d_scores, d_gates=d_gates)
        check_ids(scores.device, ids=(ids, torch.int64))
        settings = (T, E, rule.top_k, sigmoid, int(rule.norm_topk_prob), float(rule.scale))
        launch("route_backward", scores, scores, ids, d_scores, d_gates, *settings, d_logits)
        return d_logits, None, None
