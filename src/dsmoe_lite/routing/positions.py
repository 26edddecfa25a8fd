"""Where in a sequence assignments are dropped, and whether a token goes where the one before it went."""

import torch
from torch import Tensor

from dsmoe_lite.errors import require, require_whole
from dsmoe_lite.routing.choices import require_batch, require_choices
from dsmoe_lite.routing.coactivation import pair_counts


def drop_rate_by_position(kept: Tensor, topk_ids: Tensor, batch_shape: tuple[int, int], bins: int) -> Tensor:
    """Return the share of assignments dropped in each of `bins` equal parts of the sequences, (bins,).

    OpenMoE's drop-towards-the-end (arXiv:2402.01739). For the position in the batch, in whose order capacity fills,
    give the batch as one sequence, (1, B * S). Without an effect of position every part has the overall drop rate; 0
    where a part has no assignments.
    """
    require(topk_ids.dim() == 2, "topk_ids", tuple(topk_ids.shape), "must be (tokens, choices)")
    require(kept.shape == topk_ids.shape, "kept", tuple(kept.shape), f"must be as topk_ids, {tuple(topk_ids.shape)}")
    require_batch(batch_shape, len(topk_ids))
    B, S = batch_shape
    require_whole("bins", bins, 1, max(1, S))
    part = (torch.arange(S, device=topk_ids.device) * bins // max(1, S)).repeat(B)
    assigned = topk_ids >= 0
    dropped, total = (
        torch.bincount(part, cells.sum(dim=1), minlength=bins) for cells in (assigned & ~kept, assigned)
    )  # weighted, so float64
    return dropped / total.clamp(min=1)


def repetition(topk_ids: Tensor, batch_shape: tuple[int, int]) -> tuple[float, float]:
    """Return how often the next token of a sequence has the same first choice, and shares a first or second one.

    Mixtral's two columns (arXiv:2401.04088, Table 5), over the pairs of neighbours that both have an expert; 0 where
    there are none. Sequences are not joined. The null is `repetition_null`.
    """
    require(topk_ids.dim() == 2, "topk_ids", tuple(topk_ids.shape), "must be (tokens, choices)")
    require_batch(batch_shape, len(topk_ids))
    top = topk_ids[:, :2].unflatten(0, batch_shape)  # (B, S, 2)
    now, after = top[:, :-1, :], top[:, 1:, :]
    same = (now.unsqueeze(3) == after.unsqueeze(2)) & (now >= 0).unsqueeze(3)
    pairs = max(1, int(((now >= 0).any(dim=2) & (after >= 0).any(dim=2)).sum()))
    return int(same[:, :, :1, :1].sum()) / pairs, int(same.any(dim=3).any(dim=2).sum()) / pairs


def repetition_null(topk_ids: Tensor, n_experts: int) -> tuple[float, float]:
    """Return both shares for two tokens picked at random, the mean over all orders of the tokens.

    First choice: sum_e n_e (n_e - 1) / (T (T - 1)), close to sum_e p_e^2. First or second: the same sum over both
    choices, less the pairs of experts that both tokens have, which it counts twice. At balance with E = 8 and K = 2
    and many tokens 1 / 8 and 1 - C(6, 2) / C(8, 2) = 46.4%.
    """
    require_choices(topk_ids, n_experts)
    top = topk_ids[:, :2]
    T = int((top >= 0).any(dim=1).sum())
    first, either = (
        torch.bincount(ids.flatten() + 1, minlength=n_experts + 1)[1:].double() for ids in (top[:, :1], top)
    )
    together = pair_counts(top, n_experts).triu().double()
    ordered = max(1, T * (T - 1))
    return float(_pairs(first)) / ordered, float(_pairs(either) - _pairs(together)) / ordered


def _pairs(counts: Tensor) -> Tensor:
    return (counts * (counts - 1)).sum()
