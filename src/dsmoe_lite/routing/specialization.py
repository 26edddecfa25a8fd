"""Do experts specialise in domains, token types or token ids? Each measure comes with its null baseline."""

from collections.abc import Callable

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require_int
from dsmoe_lite.routing.checks import require_choices, require_labels


def specialization(topk_ids: Tensor, labels: Tensor, n_labels: int, n_experts: int) -> Tensor:
    """Return, for each label, the share of its tokens that chose each expert, (n_labels, E).

    N_(expert, label) / N_label of Mixtral (arXiv:2401.04088) and OLMoE (arXiv:2409.02060, Eq 7); labels (T,) are
    domains, token types or any other label of a token. A row sums to K, the number of choices per token; a label
    without tokens gives zeros. The null baseline is `null_specialization`; with few tokens per label, use `shuffled`.
    """
    require_choices(topk_ids, n_experts)
    require_int("n_labels", n_labels, 1)
    require_labels("labels", labels, len(topk_ids), n_labels)
    labels = labels.long()
    counts = _label_counts(topk_ids, labels, n_labels, n_experts).double()
    return counts / torch.bincount(labels, minlength=n_labels).clamp(min=1).unsqueeze(1)


def null_specialization(topk_ids: Tensor, n_experts: int) -> Tensor:
    """Return N_expert / T, (E,): every row of `specialization` if labels did not matter.

    It is K / E only at balance: an overloaded expert is chosen often under every label.
    """
    require_choices(topk_ids, n_experts)
    one_label = torch.zeros(len(topk_ids), dtype=torch.long, device=topk_ids.device)
    return specialization(topk_ids, one_label, 1, n_experts)[0]


def vocabulary_specialization(topk_ids: Tensor, token_ids: Tensor, n_experts: int, min_count: int = 1) -> float:
    """Return the mean of max_e N_(id, e) / N_id over the token ids seen at least `min_count` times.

    OLMoE's number for a layer (arXiv:2409.02060, Eq 8 and Figure 23); for the paper's k = 1 pass topk_ids[:, :1]. It is
    1 if every id always goes to the same expert. Its null baseline is not 1 / E: an id seen once agrees with itself, so
    random choices score high until ids are common. Draw the null with `shuffled`. Each id counts once; ids without any
    expert are left out; without ids the result is 0.
    """
    require_choices(topk_ids, n_experts)
    require_labels("token_ids", token_ids, len(topk_ids))
    require_int("min_count", min_count, 1)
    ids, n_ids = _renumber(token_ids)
    n_tokens = torch.bincount(ids, minlength=n_ids)
    counts = _label_counts(topk_ids, ids, n_ids, n_experts)
    frequent = (n_tokens >= min_count) & (counts.sum(dim=1) > 0)  # an id whose tokens chose no expert has no best one
    best = counts[frequent].amax(dim=1).double() / n_tokens[frequent]
    return float(best.mean()) if len(best) else 0.0


def uncertainty_coefficient(topk_ids: Tensor, labels: Tensor, n_experts: int) -> float:
    """Return I(first choice; label) / H(first choice), Theil's U: how much of the choice the label determines.

    labels (T,): token ids, domains or any other label of a token. It is 1 if the label alone determines the expert, and
    0 if the label carries no information or one expert takes all tokens. For token ids it is OpenMoE's
    context-independent specialization (arXiv:2402.01739) as one number, 1 in hash routing. The divisor is the entropy
    of the choice: many labels have a larger entropy, with which 1 could not be reached. Rare labels raise the value:
    draw a null baseline with `shuffled`. Tokens without an expert are left out.
    """
    require_choices(topk_ids, n_experts)
    require_labels("labels", labels, len(topk_ids))
    if topk_ids.numel() == 0:
        return 0.0
    chosen = topk_ids[:, 0] >= 0
    renumbered, n_labels = _renumber(labels[chosen])
    counts = _label_counts(topk_ids[chosen, :1], renumbered, n_labels, n_experts)
    choice_entropy = _entropy(counts.sum(dim=0))
    if choice_entropy == 0:
        return 0.0
    information = choice_entropy + _entropy(counts.sum(dim=1)) - _entropy(counts.flatten())
    return min(1.0, max(0.0, information / choice_entropy))


def shuffled(
    metric: Callable[[Tensor], float | Tensor], topk_ids: Tensor, generator: torch.Generator, draws: int = 20
) -> Tensor:
    """Return metric(topk_ids) for `draws` random permutations of the tokens, (draws, ...) float64: a permutation null.

    Loads and the set of experts that one token chooses stay the same; which token, and so which id or label, gets a set
    is chance.
    """
    require_int("draws", draws, 1)
    results = []
    for _ in range(draws):
        order = torch.randperm(len(topk_ids), generator=generator, device=generator.device).to(topk_ids.device)
        results.append(torch.as_tensor(metric(topk_ids[order]), dtype=torch.double))
    return torch.stack(results)


def _label_counts(topk_ids: Tensor, labels: Tensor, n_labels: int, n_experts: int) -> Tensor:
    """Count the choices of each expert by the tokens of each label, (n_labels, E) int64."""
    E1 = n_experts + 1
    cell = (labels.unsqueeze(1) * E1 + topk_ids + 1).flatten()
    return torch.bincount(cell, minlength=n_labels * E1).view(n_labels, E1)[:, 1:]  # column 0 counts -1


def _renumber(ids: Tensor) -> tuple[Tensor, int]:
    """Renumber ids as 0, 1, ... without gaps; return them and the number of distinct ids."""
    distinct, renumbered = ids.unique(return_inverse=True)
    return renumbered, len(distinct)


def _entropy(counts: Tensor) -> float:
    return float(torch.special.entr(counts.double() / counts.sum().clamp(min=1)).sum())
