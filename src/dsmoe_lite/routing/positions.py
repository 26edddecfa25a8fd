"""Where in a sequence assignments are dropped, and whether a token goes where the one before it went."""

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require, require_whole
from dsmoe_lite.routing.choices import require_batch


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
