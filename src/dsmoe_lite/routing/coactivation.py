"""Which experts do tokens choose together? Co-activation, its null model with the same loads, and a seriation."""

import math

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require, require_int
from dsmoe_lite.layers.load import expert_counts
from dsmoe_lite.routing.checks import require_choices

BURN_IN = 10  # rounds of trades before the first draw, beyond those that let every token reach every other
THINNING = 6  # rounds linkage two draws: about one expert in 2**6 has not moved


def pair_counts(topk_ids: Tensor, n_experts: int) -> Tensor:
    """Count the tokens that chose both i and j, N_ij: (E, E) int64, symmetric, 0 on the diagonal."""
    require_choices(topk_ids, n_experts)
    E1 = n_experts + 1  # -1 gets row and column 0, cut off at the end
    counts = torch.zeros(E1 * E1, dtype=torch.long, device=topk_ids.device)
    for distance in range(1, topk_ids.shape[1]):  # all pairs of ranks, not only adjacent ones
        cell = (topk_ids[:, :-distance] + 1) * E1 + topk_ids[:, distance:] + 1
        counts += torch.bincount(cell.flatten(), minlength=E1 * E1)
    one_way = counts.view(E1, E1)[1:, 1:]
    return one_way + one_way.T


def coactivation(topk_ids: Tensor, n_experts: int) -> Tensor:
    """Return C(i -> j) = N_ij / N_i, the share of expert i's tokens that also chose j: (E, E), 0 on the diagonal.

    OLMoE, arXiv:2409.02060, Eq 6, over all pairs of a token's choices; its published script counts only pairs of
    adjacent ranks, a factor K / 2 fewer (4 at K = 8). The row of an expert that always has K - 1 others sums to K - 1;
    the row of an expert without tokens is 0. At balance, chance gives (K - 1) / (E - 1); at any other load use
    `coactivation_null`.
    """
    pairs = pair_counts(topk_ids, n_experts)
    counts = expert_counts(topk_ids, n_experts)
    return pairs.double() / counts.clamp(min=1).unsqueeze(1)


def coactivation_null(topk_ids: Tensor, n_experts: int, generator: torch.Generator, draws: int = 20) -> Tensor:
    """Draw `coactivation` under a null model in which only chance brings experts together, (draws, E, E).

    Every draw keeps each expert's load and each token's number of experts exactly; see `trade`.
    """
    require_choices(topk_ids, n_experts)
    require_int("draws", draws, 1)
    topk_ids = trade(topk_ids, generator, BURN_IN + math.ceil(math.log2(max(1, len(topk_ids)))))
    results = []
    for _ in range(draws):
        topk_ids = trade(topk_ids, generator, THINNING)
        results.append(coactivation(topk_ids, n_experts))
    return torch.stack(results)


def trade(topk_ids: Tensor, generator: torch.Generator, rounds: int) -> Tensor:
    """Shuffle topk_ids (T, K): in each round, random pairs of tokens swap some experts that only one of the two has.

    Loads and each token's number of experts stay the same, and no token gets an expert twice. A round with the same
    coins undoes itself, and swaps connect all such arrangements (Ryser 1957), so in the limit all are equally likely,
    as in Global Curveball (arXiv:1804.08487). Ranks are lost.
    """
    require_int("rounds", rounds, 0)
    for _ in range(rounds):
        topk_ids = _trade_once(topk_ids, generator)
    return topk_ids


def _trade_once(topk_ids: Tensor, generator: torch.Generator) -> Tensor:
    (T, K), device = topk_ids.shape, topk_ids.device
    half, slots = T // 2, torch.arange(K, device=device)
    order = torch.randperm(T, generator=generator, device=generator.device).to(device)
    coins = torch.rand((half, K + 1), generator=generator, device=generator.device).to(device)
    one, other = topk_ids[order[:half]], topk_ids[order[half : 2 * half]]  # if T is odd, one token sits out
    length = torch.maximum((one >= 0).sum(dim=1), (other >= 0).sum(dim=1)).unsqueeze(1)
    rotated = (slots + (coins[:, :1] * length).long()) % length.clamp(min=1)  # the slot of `other` that a slot faces
    facing = rotated.where(slots < length, slots)
    other = other.gather(1, facing)
    swap = (coins[:, 1:] < 0.5) & (one >= 0) & (other >= 0)
    for k in range(K):
        same = one[:, k : k + 1] == other
        swap &= ~same  # `one` has it already
        swap[:, k] &= ~same.any(dim=1)  # `other` has it already
    result = topk_ids.clone()
    result[order[:half]] = other.where(swap, one)
    result[order[half : 2 * half]] = torch.empty_like(other).scatter_(1, facing, one.where(swap, other))
    return result


def seriate(matrix: Tensor) -> list[int]:
    """Order the experts so that those that fire together are adjacent in a heat map.

    Average linkage on (matrix + its transpose) / 2, larger is closer; two clusters are joined at their closest ends.
    Ties go to lower numbers. matrix (E, E), its diagonal unused. Raises InputError unless it is square and finite.
    """
    square = matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1] > 0
    require(square, "matrix", tuple(matrix.shape), "must be square, experts by experts")
    similarity = matrix.detach().cpu().double().clone().fill_diagonal_(0)
    require(bool(torch.isfinite(similarity).all()), "matrix", "not finite", "must be finite off its diagonal")
    similarity = (similarity + similarity.T) / 2
    linkage = similarity.clone().fill_diagonal_(-math.inf)
    clusters = [[expert] for expert in range(len(similarity))]
    for _ in range(len(similarity) - 1):
        a, b = sorted(divmod(int(linkage.argmax()), len(similarity)))
        size_a, size_b = len(clusters[a]), len(clusters[b])
        merged = (size_a * linkage[a] + size_b * linkage[b]) / (size_a + size_b)
        linkage[a], linkage[:, a] = merged, merged
        linkage[a, a] = -math.inf
        linkage[b], linkage[:, b] = -math.inf, -math.inf
        clusters[a], clusters[b] = _join_at_ends(clusters[a], clusters[b], similarity), []
    order = clusters[0]
    return order if order[0] <= order[-1] else order[::-1]


def _join_at_ends(left: list[int], right: list[int], similarity: Tensor) -> list[int]:
    """Join two clusters, each reversed if needed, so that the closest of the four pairs of ends is adjacent."""
    orientations = [(l, r) for l in (left, left[::-1]) for r in (right, right[::-1])]
    left, right = max(orientations, key=lambda pair: float(similarity[pair[0][-1], pair[1][0]]))
    return left + right
