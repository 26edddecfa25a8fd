"""How many tokens chose each expert, as counts and relative to an even share."""

import torch
from torch import Tensor


def expert_counts(topk_ids: Tensor, n_experts: int) -> Tensor:
    """Count the choices of each expert, (E,) int64. topk_ids: any shape; -1 stands for no expert."""
    return torch.bincount(topk_ids.flatten() + 1, minlength=n_experts + 1)[1:]


def relative_load(counts: Tensor) -> Tensor:
    """Divide counts (..., E) by their mean over experts: 1 everywhere at balance, 0 if there are no choices."""
    counts = counts if counts.is_floating_point() else counts.float()
    return counts * counts.shape[-1] / counts.sum(dim=-1, keepdim=True).clamp(min=1)
