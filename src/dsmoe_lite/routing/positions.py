"""At which positions of a sequence are choices dropped?"""

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require, require_int
from dsmoe_lite.routing.checks import require_batch


def drop_rate_by_position(kept: Tensor, topk_ids: Tensor, batch_shape: tuple[int, int], bins: int) -> Tensor:
    """Return the share of choices dropped in each of `bins` equal parts of the sequences, (bins,).

    OpenMoE's drop-towards-the-end (arXiv:2402.01739). Capacity fills in the order of the whole batch: to bin by that
    position, pass the batch as one sequence, (1, B * S). If position has no effect, every part has the overall drop
    rate. A part without choices gives 0.
    """
    require(topk_ids.dim() == 2, "topk_ids", tuple(topk_ids.shape), "must be (tokens, choices)")
    require(
        kept.shape == topk_ids.shape,
        "kept",
        tuple(kept.shape),
        f"must have the shape of topk_ids, {tuple(topk_ids.shape)}",
    )
    require_batch(batch_shape, len(topk_ids))
    B, S = batch_shape
    require_int("bins", bins, 1, max(1, S))
    bin_of = (torch.arange(S, device=topk_ids.device) * bins // max(1, S)).repeat(B)
    chosen = topk_ids >= 0
    dropped, total = (
        torch.bincount(bin_of, choices.sum(dim=1), minlength=bins) for choices in (chosen & ~kept, chosen)
    )  # float64, as the counts are weighted
    return dropped / total.clamp(min=1)
