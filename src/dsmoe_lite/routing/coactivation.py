"""Which experts does a token choose together? Beside a null that keeps every load, and an order that shows groups."""

import math

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require, require_whole
from dsmoe_lite.layers.load import expert_counts
from dsmoe_lite.routing.choices import require_choices

SETTLE = 10  # rounds of trades beyond those that let every token reach every other
BETWEEN = 6  # from one draw to the next: about one expert in 2**6 has stayed where it was


def pair_counts(topk_ids: Tensor, n_experts: int) -> Tensor:
    """Return N_ij, how many tokens chose both i and j, (E, E) int64, symmetric, 0 on the diagonal."""
    require_choices(topk_ids, n_experts)
    E1 = n_experts + 1  # -1 has a row and a column of its own, cut off at the end
    counts = torch.zeros(E1 * E1, dtype=torch.long, device=topk_ids.device)
    for apart in range(1, topk_ids.shape[1]):  # all pairs of ranks, not neighbours only
        cell = (topk_ids[:, :-apart] + 1) * E1 + topk_ids[:, apart:] + 1
        counts += torch.bincount(cell.flatten(), minlength=E1 * E1)
    one_way = counts.view(E1, E1)[1:, 1:]
    return one_way + one_way.T


def coactivation(topk_ids: Tensor, n_experts: int) -> Tensor:
    """Return C(i -> j) = N_ij / N_i, the share of expert i's tokens that chose j too, (E, E), 0 on the diagonal.

    OLMoE, arXiv:2409.02060, Eq 6, over all pairs of a token's choices; its published script counts only pairs next to
    each other in rank, a factor K / 2 fewer (4 at K = 8). The row of an expert that always has K - 1 others sums to
    K - 1; without tokens it is 0. At balance chance gives (K - 1) / (E - 1); else use `coactivation_null`.
    """
    pairs = pair_counts(topk_ids, n_experts)
    alone = expert_counts(topk_ids, n_experts)
    return pairs.double() / alone.clamp(min=1).unsqueeze(1)


def coactivation_null(topk_ids: Tensor, n_experts: int, generator: torch.Generator, draws: int = 20) -> Tensor:
    """Return `coactivation` of choices that only chance brought together, (draws, E, E).

    Every draw keeps each expert's load and each token's number of experts exactly: see `trade`.
    """
    require_choices(topk_ids, n_experts)
    require_whole("draws", draws, 1)
    settled = trade(topk_ids, generator, SETTLE + math.ceil(math.log2(max(1, len(topk_ids)))))
    results = []
    for _ in range(draws):
        settled = trade(settled, generator, BETWEEN)
        results.append(coactivation(settled, n_experts))
    return torch.stack(results)


def trade(topk_ids: Tensor, generator: torch.Generator, rounds: int) -> Tensor:
    """Return topk_ids (T, K) after rounds in which tokens, paired anew, swap some experts that only one of the two has.

    Loads and each token's number of experts stay, and none has an expert twice. A round with the same coins undoes
    itself, and swaps connect all such arrangements (Ryser 1957), so in the limit all are equally likely, as in Global
    Curveball (arXiv:1804.08487). Ranks are lost.
    """
    require_whole("rounds", rounds, 0)
    for _ in range(rounds):
        topk_ids = _trade_once(topk_ids, generator)
    return topk_ids


def _trade_once(topk_ids: Tensor, generator: torch.Generator) -> Tensor:
    (T, K), device = topk_ids.shape, topk_ids.device
    half, slots = T // 2, torch.arange(K, device=device)
    order = torch.randperm(T, generator=generator, device=generator.device).to(device)
    coins = torch.rand((half, K + 1), generator=generator, device=generator.device).to(device)
    one, other = topk_ids[order[:half]], topk_ids[order[half : 2 * half]]  # of an odd number one sits out
    length = torch.maximum((one >= 0).sum(dim=1), (other >= 0).sum(dim=1)).unsqueeze(1)
    turned = (slots + (coins[:, :1] * length).long()) % length.clamp(min=1)  # whom each slot of `one` faces
    facing = turned.where(slots < length, slots)
    other = other.gather(1, facing)
    swap = (coins[:, 1:] < 0.5) & (one >= 0) & (other >= 0)
    for k in range(K):
        same = one[:, k : k + 1] == other
        swap &= ~same  # `one` has it already
        swap[:, k] &= ~same.any(dim=1)  # `other` has it already
    traded = topk_ids.clone()
    traded[order[:half]] = other.where(swap, one)
    traded[order[half : 2 * half]] = torch.empty_like(other).scatter_(1, facing, one.where(swap, other))
    return traded


def seriate(matrix: Tensor) -> list[int]:
    """Return an order of the experts that puts those firing together side by side, for a heat map's rows and columns.

    Average linkage on (matrix + its transpose) / 2, larger is closer; clusters are laid end to end so that the closer
    ends meet. Ties go to lower numbers. matrix (E, E), its diagonal unused.
    """
    square = matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1] > 0
    require(square, "matrix", tuple(matrix.shape), "must be square, experts by experts")
    near = matrix.detach().cpu().double().clone().fill_diagonal_(0)
    require(bool(torch.isfinite(near).all()), "matrix", "not finite", "must hold finite numbers off its diagonal")
    near = (near + near.T) / 2
    between = near.clone().fill_diagonal_(-math.inf)
    clusters = [[expert] for expert in range(len(near))]
    for _ in range(len(near) - 1):
        a, b = sorted(divmod(int(between.argmax()), len(near)))
        size_a, size_b = len(clusters[a]), len(clusters[b])
        merged = (size_a * between[a] + size_b * between[b]) / (size_a + size_b)
        between[a], between[:, a] = merged, merged
        between[a, a] = -math.inf
        between[b], between[:, b] = -math.inf, -math.inf
        clusters[a], clusters[b] = _end_to_end(clusters[a], clusters[b], near), []
    order = clusters[0]
    return order if order[0] <= order[-1] else order[::-1]


def _end_to_end(left: list[int], right: list[int], near: Tensor) -> list[int]:
    """Both clusters, turned so that the closest of the four pairs of ends meets."""
    ways = [(l, r) for l in (left, left[::-1]) for r in (right, right[::-1])]
    left, right = max(ways, key=lambda way: float(near[way[0][-1], way[1][0]]))
    return left + right
