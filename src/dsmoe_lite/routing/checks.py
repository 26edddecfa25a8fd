"""Input checks that the routing metrics share: choices of experts, labels of tokens, batch shapes."""

from torch import Tensor

from dsmoe_lite.common.errors import require, require_int


def require_choices(topk_ids: Tensor, n_experts: int, name: str = "topk_ids") -> None:
    """Require (T, K) expert ids in [-1, n_experts), -1 for no expert. A token with one expert twice is not detected."""
    require_int("n_experts", n_experts, 1)
    require(topk_ids.dim() == 2, name, tuple(topk_ids.shape), "must be (tokens, choices)")
    _require_ids(name, topk_ids, -1, n_experts, f"must be an expert id, 0 to {n_experts - 1}, or -1 for no expert")


def require_labels(name: str, labels: Tensor, n_tokens: int, n_labels: int | None = None) -> None:
    """Require one label per token, at least 0 and, if `n_labels` is given, below it."""
    require(labels.shape == (n_tokens,), name, tuple(labels.shape), f"must be one label per token, ({n_tokens},)")
    upper = "" if n_labels is None else f" and below {n_labels}"
    _require_ids(name, labels, 0, n_labels, f"must be at least 0{upper}")


def require_batch(batch_shape: tuple[int, int], n_tokens: int) -> None:
    """Require a batch shape (B, S) with B * S = `n_tokens`."""
    fits = len(batch_shape) == 2 and min(batch_shape) >= 0 and batch_shape[0] * batch_shape[1] == n_tokens
    require(fits, "batch_shape", batch_shape, f"must be (sequences, tokens per sequence) of {n_tokens} tokens in all")


def _require_ids(name: str, ids: Tensor, low: int, high: int | None, remedy: str) -> None:
    if ids.numel():
        smallest, largest = (int(end) for end in ids.aminmax())
        require(smallest >= low, name, smallest, remedy)
        require(high is None or largest < high, name, largest, remedy)
