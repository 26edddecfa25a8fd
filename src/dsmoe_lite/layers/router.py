"""Who goes where, and why: scores, the K experts of every token, their gates, and what capacity leaves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_lite.common.errors import RunError, require
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers.capacity import capacity, even_parts, exempt_tokens, group_budget, place_in_expert, within_budget
from dsmoe_lite.layers.load import expert_counts
from dsmoe_lite.layers.selection import expert_choice, group_of, limit_groups, ordered_topk

TINY = 1e-20  # all chosen sigmoids may underflow to 0
LEAST_NOISE = 1e-6  # the load loss divides by its square


@dataclass(frozen=True)
class Routing:
    """The decision of one router on T tokens. Losses, metrics and charts all read this one record."""

    logits: Tensor  # (T, E), at least float32, with the noise that was added; hash routing: 0 and -inf
    scores: Tensor  # (T, E), affinities s_i,t, without bias
    topk_ids: Tensor  # (T, K), best first; ties go to the lower id; -1 fills the rows of expert choice
    gates: Tensor  # (T, K), weight of each chosen expert in the sum
    kept: Tensor  # (T, K) bool, False where capacity or GShard's random second choice left it out
    batch_shape: tuple[int, int]  # (B, S), T = B * S
    clean_logits: Tensor | None = None  # (T, E), where noise was added
    noise_scale: Tensor | None = None  # (T, E), its standard deviation

    @classmethod
    def of_scores(cls, scores: Tensor, k: int, batch_shape: tuple[int, int] | None = None) -> "Routing":
        """The routing of given affinities (T, E): every token takes its `k` largest, which are also its gates."""
        ids = ordered_topk(scores, k)
        kept = torch.ones_like(ids, dtype=torch.bool)
        return cls(scores.log(), scores, ids, scores.gather(-1, ids), kept, batch_shape or (1, len(scores)))

    @property
    def n_experts(self) -> int:
        """E."""
        return self.scores.shape[-1]

    @property
    def counts(self) -> Tensor:
        """How many tokens chose each expert, (E,) int64; those it then dropped count too."""
        return expert_counts(self.topk_ids, self.n_experts)

    def to(self, device: str | torch.device) -> "Routing":
        """The same on another device."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = value.to(device) if isinstance(value, Tensor) else value
        return Routing(**moved)


def join(parts: Sequence[Routing], batch_shape: tuple[int, int]) -> Routing:
    """The routing of a batch whose sequences were routed in parts, in order; the rows of the shorter K are filled."""
    K = max(part.topk_ids.shape[1] for part in parts)
    fills = {"topk_ids": -1, "gates": 0, "kept": False}
    joined: dict[str, Any] = {"batch_shape": batch_shape}
    for field in fields(Routing):
        found = [getattr(part, field.name) for part in parts]
        if field.name in fills:
            found = [F.pad(piece, (0, K - piece.shape[1]), value=fills[field.name]) for piece in found]
        if isinstance(found[0], Tensor):
            joined[field.name] = torch.cat(found)
    return Routing(**joined)


class Router(nn.Module):
    """Score every expert for every token and choose K of them, as `MoEConfig` says.

    - scores: s = softmax(W x) (DeepSeekMoE Eq 5, arXiv:2401.06066), sigmoid(W x) (DeepSeek-V3 Eq 15,
      arXiv:2412.19437) or sqrt(softplus(W x)) (DeepSeek-V4, arXiv:2606.19348); in training, with `noisy_gating`, on
      W x + eps * softplus(W_noise x) (arXiv:1701.06538).
    - choice: the K largest s + bias (V3 Eq 16) inside the best groups, the best tokens of every expert, or, with
      `chooser="hash"`, the K experts that a fixed table has for the token id (V4's first layers).
    - gates: the chosen s, never the bias; divided by their sum with `norm_topk_prob` (GShard, V3 Eq 13); times
      `routed_scaling_factor`.
    - hash: a fixed balanced table from token id to one expert, gate 1, nothing learnt (arXiv:2106.04426).

    Where tokens compete for slots, those of each of `groups` parts of the batch do so apart: GShard's groups.

    `layer` is the block's number, for error lines. Four settings are for experiments on a trained router
    (`routing.interventions`). Each of `forbidden` takes the scores (T, E) and returns which experts (T, E) a token may
    not choose. Choices of the ranks `silenced`, 0 the best, and of the experts `silenced_experts` are not kept; the
    other gates stay as they are. With `frozen_norm`, `norm_topk_prob` divides by the sum of the scores that the token
    would have chosen if nothing were forbidden.
    """

    hash_table: Tensor
    expert_bias: Tensor
    forbidden: tuple[Callable[[Tensor], Tensor], ...] = ()
    silenced: frozenset[int] = frozenset()
    silenced_experts: frozenset[int] = frozenset()
    frozen_norm: bool = False

    def __init__(self, d_model: int, config: MoEConfig, vocab_size: int, layer: int | None = None) -> None:
        super().__init__()
        self.config, self.layer, self.groups = config, layer, config.routing_groups
        E = config.n_routed_experts
        if config.scoring_func == "hash":
            require(
                vocab_size >= E, "vocab_size", vocab_size, f"must be at least n_routed_experts = {E}, for hash routing"
            )
            shuffled = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0), device="cpu")
            self.register_buffer("hash_table", shuffled % E)  # every expert gets V/E token ids, rounded
            return
        if config.chooser == "hash":
            self.register_buffer("hash_table", hash_table(vocab_size, E, config.top_k, seed=layer or 0))
        self.weight = nn.Parameter(torch.empty(E, d_model))
        nn.init.normal_(self.weight, std=0.02)
        if config.noisy_gating:
            self.noise = nn.Parameter(torch.zeros(E, d_model))
        if config.expert_bias:
            self.register_buffer("expert_bias", torch.zeros(E))

    def forward(self, x: Tensor, batch_shape: tuple[int, int], token_ids: Tensor | None = None) -> Routing:
        """x (T, D), token_ids (T,) for hash routing -> Routing.

        RunError if a logit is NaN or infinite; InputError when hash routing lacks the token ids.
        """
        if self.groups == 1:
            return self._route(x, batch_shape, token_ids)
        B, S = batch_shape
        sizes = even_parts(B, self.groups)
        tokens = [n * S for n in sizes]
        ids = [None] * self.groups if token_ids is None else token_ids.split(tokens)
        parts = zip(x.split(tokens), sizes, ids, strict=True)
        return join([self._route(part, (n, S), some) for part, n, some in parts], batch_shape)

    def _route(self, x: Tensor, batch_shape: tuple[int, int], token_ids: Tensor | None) -> Routing:
        if self.config.scoring_func == "hash":
            return self._by_table(x, batch_shape, token_ids)
        clean, noise_scale = self._logits(x)
        logits = clean if noise_scale is None else clean + torch.randn_like(clean) * noise_scale
        self._check_finite("router logits", logits)
        scores = SCORES[self.config.scoring_func](logits)
        by_table = self.config.chooser == "hash"
        topk_ids = self._look_up(scores, token_ids) if by_table else self._choose(scores, self.forbidden)
        chosen = topk_ids >= 0
        affinities = scores.gather(1, topk_ids.clamp(min=0)) * chosen
        shares = affinities / (self._norm(scores, affinities) + TINY) if self.config.norm_topk_prob else affinities
        kept = chosen & self._kept(topk_ids, affinities, shares, batch_shape)
        added = {} if noise_scale is None else {"clean_logits": clean, "noise_scale": noise_scale}
        return Routing(logits, scores, topk_ids, shares * self._scale(), kept, batch_shape, **added)

    def _logits(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits without noise (T, E) and, in training with noisy gating, the size of the noise (T, E)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.weight.to(dtype))
            noisy = self.config.noisy_gating and self.training
            noise_scale = F.softplus(F.linear(x.to(dtype), self.noise.to(dtype))).clamp(LEAST_NOISE) if noisy else None
        return logits, noise_scale

    def _check_finite(self, name: str, values: Tensor) -> None:
        """On the CPU only: on a GPU this would wait in every layer for the device; a NaN there appears in the loss."""
        if values.is_cpu and not torch.isfinite(values).all():
            layer = "" if self.layer is None else f" of layer {self.layer}"
            raise RunError(f"{name}{layer}: NaN or infinite; check the input, or lower the learning rate")

    def _norm(self, scores: Tensor, affinities: Tensor) -> Tensor:
        """What `norm_topk_prob` divides by: scores (T, E), those of the chosen (T, K) -> (T, 1)."""
        if self.frozen_norm and self.forbidden:
            affinities = scores.gather(1, self._choose(scores, ()))
        return affinities.sum(dim=1, keepdim=True)

    def _choose(self, scores: Tensor, forbidden: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        config, ranked = self.config, scores.detach()
        if config.chooser == "expert":
            return expert_choice(ranked, capacity(scores.shape[0], config.top_k, config.n_routed_experts, 1.0))
        if config.expert_bias:
            ranked = ranked + self.expert_bias
        for forbid in forbidden:
            ranked = ranked.masked_fill(forbid(scores.detach()), -math.inf)
        if config.topk_group < config.n_group:
            ranked = limit_groups(ranked, config.n_group, config.topk_group, config.group_score)
        topk_ids = ordered_topk(ranked, config.top_k)
        if forbidden:
            reached = int(ranked.gather(1, topk_ids).isfinite().sum(dim=1).min()) if len(topk_ids) else config.top_k
            require(reached == config.top_k, "experts left", reached, f"must be top_k = {config.top_k}: forbid fewer")
        return topk_ids

    def _look_up(self, scores: Tensor, token_ids: Tensor | None) -> Tensor:
        """The table's experts of each token, (T, K), the one with the highest score first."""
        ids = self.hash_table[self._require_ids(token_ids, len(scores))]
        return ids.gather(1, ordered_topk(scores.detach().gather(1, ids), ids.shape[1]))

    def _scale(self) -> float:
        config = self.config
        return config.routed_scaling_factor if config.scale_normalised or not config.norm_topk_prob else 1.0

    def _kept(self, topk_ids: Tensor, affinities: Tensor, shares: Tensor, batch_shape: tuple[int, int]) -> Tensor:
        config, (T, K), E = self.config, topk_ids.shape, self.config.n_routed_experts
        kept = torch.ones_like(topk_ids, dtype=torch.bool)
        if self.training and config.second_choice == "random":
            draw = torch.rand_like(shares[:, 1])
            kept[:, 1] = 2 * shares[:, 1].detach() > draw  # GShard Algorithm 1, line 20
        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        if factor is not None:
            kept &= place_in_expert(topk_ids, E) < capacity(T, K, E, factor)
        if self.training and config.group_capacity_factor is not None:
            groups = group_of(E, config.n_group, topk_ids.device)[topk_ids]
            budget = group_budget(T, K, config.n_group, config.group_capacity_factor)
            exempt = exempt_tokens(batch_shape, config.never_drop_share, topk_ids.device)
            kept &= within_budget(groups, affinities, config.n_group, budget, exempt)
        for rank in self.silenced:
            kept[:, rank : rank + 1] = False  # empty for a rank that this batch does not have
        if self.silenced_experts:
            silenced = torch.tensor(sorted(self.silenced_experts), device=topk_ids.device)
            kept &= ~torch.isin(topk_ids, silenced)
        return kept

    def _by_table(self, x: Tensor, batch_shape: tuple[int, int], token_ids: Tensor | None) -> Routing:
        token_ids = self._require_ids(token_ids, len(x))
        self._check_finite("router input", x)
        topk_ids = self.hash_table[token_ids].unsqueeze(1)  # (T, 1)
        scores = F.one_hot(topk_ids[:, 0], self.config.n_routed_experts)
        scores = scores.to(torch.promote_types(x.dtype, torch.float32))  # (T, E)
        gates = scores.gather(1, topk_ids)
        kept = self._kept(topk_ids, gates, gates, batch_shape)
        return Routing(scores.log(), scores, topk_ids, gates * self._scale(), kept, batch_shape)

    @staticmethod
    def _require_ids(token_ids: Tensor | None, n_tokens: int) -> Tensor:
        shape = None if token_ids is None else tuple(token_ids.shape)
        require(shape == (n_tokens,), "token_ids", shape, f"hash routing needs the id of each of {n_tokens} tokens")
        assert token_ids is not None
        return token_ids


def hash_table(vocab_size: int, n_experts: int, k: int, seed: int) -> Tensor:
    """Draw `k` different experts for every token id, (V, k) int64: balanced over the vocabulary, not over a text.

    Rounds of n_experts // k ids share out a new random order of the experts, so every expert gets at most one id of a
    round. DeepSeek-V4 ships such a table with its weights; how that one was drawn is not known here.
    """
    generator, per_round = torch.Generator().manual_seed(seed), n_experts // k
    order = torch.rand(-(-vocab_size // per_round), n_experts, generator=generator, device="cpu").argsort(dim=1)
    rows = order[:, : per_round * k].reshape(-1, k)[:vocab_size]
    return rows[torch.randperm(vocab_size, generator=generator, device="cpu")]


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1)


def _sigmoid(logits: Tensor) -> Tensor:
    """The sigmoid, the same for equal logits: on a CPU, torch's last bit in float32 depends on a number's place."""
    return logits.double().sigmoid().to(logits.dtype) if logits.is_cpu else logits.sigmoid()


def _sqrt_softplus(logits: Tensor) -> Tensor:
    """sqrt(ln(1 + e^x)), the same for equal logits, as in `_sigmoid`. Above 0 also where e^x underflows."""
    exact = logits.double() if logits.is_cpu else logits
    return F.softplus(exact).clamp(min=TINY).sqrt().to(logits.dtype)  # the gradient of the root of 0 is infinite


SCORES = {"softmax": _softmax, "sigmoid": _sigmoid, "sqrtsoftplus": _sqrt_softplus}
