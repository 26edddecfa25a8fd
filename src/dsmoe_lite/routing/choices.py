"""What every routing metric asks of the choices that it is given."""

from torch import Tensor

from dsmoe_lite.common.errors import require, require_whole


def require_choices(topk_ids: Tensor, n_experts: int, name: str = "topk_ids") -> None:
    """Require (T, K) numbers in [-1, n_experts), -1 for no expert. A token should name an expert once: unchecked."""
    require_whole("n_experts", n_experts, 1)
    require(topk_ids.dim() == 2, name, tuple(topk_ids.shape), "must be (tokens, choices)")
    _require_ids(name, topk_ids, -1, n_experts, f"experts are numbered from 0 to {n_experts - 1}, -1 is nobody")


def require_labels(name: str, labels: Tensor, n_tokens: int, n_labels: int | None = None) -> None:
    """Require one number of at least 0, and below `n_labels` where given, for each of the tokens."""
    require(labels.shape == (n_tokens,), name, tuple(labels.shape), f"must be one for each of {n_tokens} tokens")
    upper = "" if n_labels is None else f" and below {n_labels}"
    _require_ids(name, labels, 0, n_labels, f"must be at least 0{upper}")


def require_batch(batch_shape: tuple[int, int], n_tokens: int) -> None:
    """Require (B, S) with B * S tokens."""
    fits = len(batch_shape) == 2 and min(batch_shape) >= 0 and batch_shape[0] * batch_shape[1] == n_tokens
    require(fits, "batch_shape", batch_shape, f"must be (sequences, tokens a sequence) of {n_tokens} tokens")


def _require_ids(name: str, ids: Tensor, low: int, high: int | None, remedy: str) -> None:
    if ids.numel():
        least, most = ids.aminmax()
        require(int(least) >= low, name, int(least), remedy)
        require(high is None or int(most) < high, name, int(most), remedy)
