"""Who goes where, and why: scores, the K experts of every token, their gates, and what capacity leaves."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_lite.config import MoEConfig
from dsmoe_lite.errors import require


@dataclass(frozen=True)
class Routing:
    """The decision of one router on T tokens. Losses, metrics and charts all read this one record."""

    logits: Tensor  # (T, E), at least float32
    scores: Tensor  # (T, E), affinities s_i,t
    topk_ids: Tensor  # (T, K), best first; ties go to the lower id
    gates: Tensor  # (T, K), weight of each chosen expert in the sum
    kept: Tensor  # (T, K) bool, False where capacity or GShard's random second choice left it out
    batch_shape: tuple[int, int]  # (B, S), T = B * S

    @property
    def n_experts(self) -> int:
        """E."""
        return self.scores.shape[-1]


class Router(nn.Module):
    """Score every expert for every token and choose K of them, as `MoEConfig` says.

    softmax: s = softmax(W x), DeepSeekMoE Eq 5 (arXiv:2401.06066); gates are the chosen s, divided by their sum with
    `norm_topk_prob` (GShard, arXiv:2006.16668, Algorithm 1). hash: a fixed balanced table from token id to one expert,
    gate 1, nothing learnt (Hash Layer, arXiv:2106.04426).
    """

    hash_table: Tensor

    def __init__(self, d_model: int, config: MoEConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        E = config.n_routed_experts
        if config.scoring_func == "hash":
            shuffled = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0))
            self.register_buffer("hash_table", shuffled % E)  # every expert gets V/E token ids, rounded
        else:
            self.weight = nn.Parameter(torch.empty(E, d_model))
            nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, batch_shape: tuple[int, int], token_ids: Tensor | None = None) -> Routing:
        """x (T, D), token_ids (T,) for hash routing -> Routing. InputError when hash routing gets no token ids."""
        logits, scores = (
            self._hash_scores(x, token_ids) if self.config.scoring_func == "hash" else self._softmax_scores(x)
        )
        topk_ids = ordered_topk(scores, self.config.top_k)
        gates = scores.gather(1, topk_ids)
        if self.config.norm_topk_prob:
            gates = gates / gates.sum(dim=1, keepdim=True)
        return Routing(logits, scores, topk_ids, gates, self._kept(topk_ids, gates), batch_shape)

    def _softmax_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.weight.to(dtype))  # (T, E)
        return logits, logits.softmax(dim=-1)

    def _hash_scores(self, x: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        require(token_ids is not None, "token_ids", token_ids, "hash routing needs the id of every token")
        assert token_ids is not None
        scores = F.one_hot(self.hash_table[token_ids], self.config.n_routed_experts)
        scores = scores.to(torch.promote_types(x.dtype, torch.float32))  # (T, E)
        return scores.log(), scores

    def _kept(self, topk_ids: Tensor, gates: Tensor) -> Tensor:
        config = self.config
        kept = torch.ones_like(topk_ids, dtype=torch.bool)
        if self.training and config.second_choice == "random":
            draw = torch.rand_like(gates[:, 1])
            kept[:, 1] = 2 * gates[:, 1].detach() > draw  # GShard Algorithm 1, line 20
        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        if factor is not None:
            limit = capacity(topk_ids.shape[0], config.top_k, config.n_routed_experts, factor)
            kept &= place_in_expert(topk_ids, config.n_routed_experts) < limit
        return kept


def ordered_topk(scores: Tensor, k: int) -> Tensor:
    """Return the ids (T, K) of the k largest scores of each row, best first; equal scores go to the lower id."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]  # topk leaves the order of ties open


def capacity(n_tokens: int, top_k: int, n_experts: int, factor: float) -> int:
    """Return the slots of one expert: ceil(factor * T * K / E). Factor 1 is GShard's 2N/(GE) with K = 2, one group."""
    return math.ceil(factor * n_tokens * top_k / n_experts)


def place_in_expert(topk_ids: Tensor, n_experts: int) -> Tensor:
    """Return how many assignments stand before each one in its expert's queue, (T, K).

    GShard's order (Algorithm 1): every first choice in token order, then every second choice, and so on. An assignment
    counts even when it is not kept, as the algorithm prints it.
    """
    T, K = topk_ids.shape
    queue = topk_ids.T.reshape(-1)  # (K*T,) choice-major
    order = queue.argsort(stable=True)
    counts = torch.bincount(queue, minlength=n_experts)
    starts = counts.cumsum(0) - counts  # (E,)
    places = torch.empty_like(queue)
    places[order] = torch.arange(K * T, device=queue.device) - starts[queue[order]]
    return places.view(K, T).T
