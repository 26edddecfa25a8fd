"""Do experts follow domains, token types or token ids? Shares of tokens, each beside what chance would give."""

from collections.abc import Callable

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require_whole
from dsmoe_lite.routing.choices import require_choices, require_labels


def specialization(topk_ids: Tensor, labels: Tensor, n_labels: int, n_experts: int) -> Tensor:
    """Return, for each label, the share of its tokens that have each expert among their choices, (n_labels, E).

    N_(expert, label) / N_label of Mixtral (arXiv:2401.04088) and OLMoE (arXiv:2409.02060, Eq 7), for a domain, a token
    type or any other label of a token, labels (T,). A row sums to the experts its tokens have, K; a label without
    tokens gives zeros. The null is `null_specialization`, and with few tokens a label `shuffled`.
    """
    require_choices(topk_ids, n_experts)
    require_whole("n_labels", n_labels, 1)
    require_labels("labels", labels, len(topk_ids), n_labels)
    labels = labels.long()
    counts = _counts(topk_ids, labels, n_labels, n_experts).double()
    return counts / torch.bincount(labels, minlength=n_labels).clamp(min=1).unsqueeze(1)


def null_specialization(topk_ids: Tensor, n_experts: int) -> Tensor:
    """Return N_expert / T, (E,): what every row of `specialization` would be if labels did not matter.

    K / E only when balanced: an overloaded expert is chosen often under every label.
    """
    require_choices(topk_ids, n_experts)
    everyone = torch.zeros(len(topk_ids), dtype=torch.long, device=topk_ids.device)
    return specialization(topk_ids, everyone, 1, n_experts)[0]


def vocabulary_specialization(topk_ids: Tensor, token_ids: Tensor, n_experts: int, least: int = 1) -> float:
    """Return the mean over the token ids seen at least `least` times of max_e N_(id, e) / N_id, each id counted once.

    OLMoE's number for a layer (arXiv:2409.02060, Eq 8 and Figure 23); the paper's k = 1 is topk_ids[:, :1]. 1 where
    every id always meets the same expert. The null is not 1 / E: an id seen once agrees with itself, so random choices
    score high until ids are common. Draw it with `shuffled`. Ids without any expert are left out; 0 without ids.
    """
    best, _ = _peaks(topk_ids, token_ids, n_experts, least)
    return float(best.mean()) if len(best) else 0.0


def uncertainty_coefficient(topk_ids: Tensor, labels: Tensor, n_experts: int) -> float:
    """Return I(first choice; label) / H(first choice), Theil's U: how much of the choice the label settles.

    labels (T,): token ids, domains, any label of a token. 1 where the label alone decides, 0 where it says nothing or
    there is nothing to say (one expert takes all). Of token ids it is OpenMoE's context-independent specialization
    (arXiv:2402.01739) as one number, 1 in hash routing. Divided by the entropy of the choice, since that of many labels
    is larger and 1 could not be reached. Rare labels lift it: draw a null with `shuffled`. Tokens without an expert are
    left out.
    """
    require_choices(topk_ids, n_experts)
    require_labels("labels", labels, len(topk_ids))
    if topk_ids.numel() == 0:
        return 0.0
    chosen = topk_ids[:, 0] >= 0
    dense, n_labels = _dense(labels[chosen])
    counts = _counts(topk_ids[chosen, :1], dense, n_labels, n_experts)
    of_expert = _entropy(counts.sum(dim=0))
    if of_expert == 0:
        return 0.0
    return min(1.0, max(0.0, (of_expert + _entropy(counts.sum(dim=1)) - _entropy(counts.flatten())) / of_expert))


def shuffled(
    metric: Callable[[Tensor], float | Tensor], topk_ids: Tensor, generator: torch.Generator, draws: int = 20
) -> Tensor:
    """Return metric(topk_ids) for `draws` random orders of the tokens, (draws, ...) float64: a permutation null.

    Loads and the experts that a token has together stay; which token, and so which id or label, has them is chance.
    """
    require_whole("draws", draws, 1)
    results = []
    for _ in range(draws):
        order = torch.randperm(len(topk_ids), generator=generator, device=generator.device).to(topk_ids.device)
        results.append(torch.as_tensor(metric(topk_ids[order]), dtype=torch.double))
    return torch.stack(results)


def _peaks(topk_ids: Tensor, token_ids: Tensor, n_experts: int, least: int) -> tuple[Tensor, Tensor]:
    """The largest share of each token id, and the expert that has it."""
    require_choices(topk_ids, n_experts)
    require_labels("token_ids", token_ids, len(topk_ids))
    require_whole("least", least, 1)
    ids, n_ids = _dense(token_ids)
    times = torch.bincount(ids, minlength=n_ids)
    counts = _counts(topk_ids, ids, n_ids, n_experts)
    often = (times >= least) & (counts.sum(dim=1) > 0)  # an id nobody chose has no expert
    times, counts = times[often], counts[often]
    owner = counts.argmax(dim=1)  # the first of equal ones
    return counts.gather(1, owner.unsqueeze(1))[:, 0].double() / times, owner


def _counts(topk_ids: Tensor, labels: Tensor, n_labels: int, n_experts: int) -> Tensor:
    """How often each label has each expert, (n_labels, E) int64."""
    E1 = n_experts + 1
    cell = (labels.unsqueeze(1) * E1 + topk_ids + 1).flatten()
    return torch.bincount(cell, minlength=n_labels * E1).view(n_labels, E1)[:, 1:]  # -1 falls away


def _dense(ids: Tensor) -> tuple[Tensor, int]:
    """The same labels numbered from 0, and how many there are."""
    present, dense = ids.unique(return_inverse=True)
    return dense, len(present)


def _entropy(counts: Tensor) -> float:
    return float(torch.special.entr(counts.double() / counts.sum().clamp(min=1)).sum())
