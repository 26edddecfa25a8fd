"""Evaluation: held-out loss by domain, the load of every expert, and facts that a model recalls."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from dsmoe_lite.common.progress import progress
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.data.batches import Batch
from dsmoe_lite.data.tokenizer import END_ID
from dsmoe_lite.data.world import Question
from dsmoe_lite.layers.load import relative_load
from dsmoe_lite.layers.router import Routing
from dsmoe_lite.layers.selection import group_of
from dsmoe_lite.model import Transformer, eval_mode, require_finite
from dsmoe_lite.routing.metrics import drop_rate, groups_reached, overflow
from dsmoe_lite.routing.specialization import shuffled, specialization, uncertainty_coefficient

OVERFLOW_FACTOR = 1.25  # the capacity factor of ST-MoE in training
BATCH_SIZE = 256  # questions
NULL_DRAWS = 20


@dataclass(frozen=True)
class ExpertUse:
    """How one MoE layer used its experts over all batches.

    load: choices of each expert over their mean. max_vio: the largest load minus 1 (MaxVio_global of arXiv:2408.15664).
    drop_rate: the share of choices that were dropped. overflow: the share that a capacity factor of 1.25 would drop,
    batch by batch. reached: to how many groups of experts (devices) a token is sent on average.
    """

    load: list[float]  # (E,)
    max_vio: float
    drop_rate: float
    overflow: float
    reached: float


@dataclass(frozen=True)
class HeldOut:
    """Mean cross-entropy in nats per token, over all held-out tokens and by domain."""

    loss: float
    by_domain: dict[str, float]
    experts: list[ExpertUse]  # one per MoE layer


@torch.no_grad()
def heldout_loss(model: Transformer, batches: Sequence[Batch], domains: Sequence[str]) -> HeldOut:
    """Evaluate on fixed batches. A domain without tokens is omitted. The model keeps its mode.

    Raises RunError if a logit is NaN or infinite.
    """
    device = model.embed.weight.device
    total = torch.zeros(len(domains), dtype=torch.float64, device="cpu")
    count = torch.zeros(len(domains), dtype=torch.float64, device="cpu")
    tallies = [_Tally(layer.router.config, model.config.moe) for layer in model.moe_layers]
    with eval_mode(model):
        for batch in progress(batches, desc="held-out"):
            tokens = batch.tokens.to(device)
            output = model(tokens[:, :-1])
            require_finite(output.logits)
            losses = F.cross_entropy(output.logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
            losses = losses.cpu().double()
            labels = batch.domains[:, 1:].flatten().long()
            total.index_add_(0, labels, losses)
            count.index_add_(0, labels, torch.ones_like(losses))
            for tally, routing in zip(tallies, output.routings, strict=True):
                tally.add(routing)
    by_domain = {name: float(total[i] / count[i]) for i, name in enumerate(domains) if count[i]}
    return HeldOut(float(total.sum() / count.sum()), by_domain, [tally.use() for tally in tallies])


def bits_per_byte(
    heldout: HeldOut, batches: Sequence[Batch], tokenizer: Tokenizer, domains: Sequence[str]
) -> dict[str, float]:
    """Return the held-out loss in bits per byte of text, over all batches ("all") and by domain.

    Unlike nats per token, it does not depend on the tokenizer. The end of a document is a target without bytes.
    """
    size = torch.tensor([len(tokenizer.id_to_token(i) or "") for i in range(tokenizer.get_vocab_size())], device="cpu")
    size[END_ID] = 0  # a byte-level token has one character per byte
    targets = torch.cat([batch.tokens[:, 1:].flatten() for batch in batches])
    labels = torch.cat([batch.domains[:, 1:].flatten() for batch in batches])
    shares = {name: labels == i for i, name in enumerate(domains)}
    losses = {"all": (heldout.loss, torch.ones_like(labels, dtype=torch.bool))}
    losses |= {name: (heldout.by_domain[name], share) for name, share in shares.items() if name in heldout.by_domain}
    return {
        name: loss * int(share.sum()) / (math.log(2) * int(size[targets[share]].sum()))
        for name, (loss, share) in losses.items()
    }


@dataclass(frozen=True)
class DomainUse:
    """Which domains one MoE layer sends to which experts.

    counts: how many tokens of each domain chose each expert. uncertainty: how much of the first choice the domain
    determines (Theil's U). null: the same with the choices shuffled over the text, in whole rows.
    """

    counts: list[list[int]]  # (domains, E)
    uncertainty: float
    null: float


@torch.no_grad()
def domain_use(model: Transformer, batches: Sequence[Batch], n_domains: int) -> list[DomainUse]:
    """Return the domains of every MoE layer's experts on fixed batches. The model keeps its mode."""
    device, n_rows = model.embed.weight.device, sum(len(batch.tokens) for batch in batches)
    chosen: list[list[torch.Tensor]] = [[] for _ in model.moe_layers]
    with eval_mode(model):
        for batch in batches:
            for parts, routing in zip(chosen, model(batch.tokens[:, :-1].to(device)).routings, strict=True):
                parts.append(routing.topk_ids.cpu())
    domains = torch.cat([batch.domains[:, :-1].flatten() for batch in batches]).long()
    E = 0 if model.config.moe is None else model.config.moe.n_routed_experts
    uses = []
    for parts in chosen:
        ids = torch.cat(parts)  # (T, K)
        n_chosen = torch.bincount(domains, minlength=n_domains)[:, None] * specialization(ids, domains, n_domains, E)

        def first_choice(rows: torch.Tensor) -> float:
            return uncertainty_coefficient(rows.reshape(-1, 1), domains, E)

        draws = shuffled(first_choice, ids[:, 0].reshape(n_rows, -1), torch.Generator().manual_seed(0), NULL_DRAWS)
        uses.append(DomainUse(n_chosen.round().long().tolist(), first_choice(ids[:, 0]), float(draws.mean())))
    return uses


class _Tally:
    """Accumulates how one MoE layer uses its experts, batch by batch."""

    def __init__(self, moe: MoEConfig, of_model: MoEConfig | None) -> None:
        self.counts = torch.zeros(moe.n_routed_experts, dtype=torch.float64, device="cpu")
        self.dropped = self.overflow = 0.0  # choices
        self.reached, self.tokens = 0.0, 0
        n_group = 1 if of_model is None else of_model.n_group  # a hash layer's own has no groups, yet devices hold it
        self.group_of = group_of(moe.n_routed_experts, n_group, torch.device("cpu"))

    def add(self, routing: Routing) -> None:
        counts = routing.counts.cpu().double()
        self.counts += counts
        self.dropped += drop_rate(routing) * float(counts.sum())
        self.overflow += overflow(routing, OVERFLOW_FACTOR) * float(counts.sum())
        n_tokens = len(routing.topk_ids)
        self.reached += groups_reached(routing, self.group_of.to(routing.topk_ids.device)) * n_tokens
        self.tokens += n_tokens

    def use(self) -> ExpertUse:
        load, choices = relative_load(self.counts), float(self.counts.sum())
        return ExpertUse(
            load=load.tolist(),
            max_vio=float(load.max()) - 1,
            drop_rate=self.dropped / choices,
            overflow=self.overflow / choices,
            reached=self.reached / self.tokens,
        )


@torch.no_grad()
def recall(model: Transformer, tokenizer: Tokenizer, questions: Sequence[Question]) -> dict[str, float]:
    """Return the share of questions that greedy decoding answers exactly, for each group of questions.

    Every token of the answer must be the likeliest one. Questions of equal length form a batch, so there is no padding
    that could take an expert's slot.
    """
    device = model.embed.weight.device
    by_shape = defaultdict(list)
    for question in questions:
        prompt = tokenizer.encode(question.prompt).ids
        answer = tokenizer.encode(question.answer).ids
        by_shape[len(prompt), len(answer)].append((prompt + answer, question.group))
    correct: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    with eval_mode(model):
        for (_, n_answer), members in sorted(by_shape.items()):
            for start in range(0, len(members), BATCH_SIZE):
                batch = members[start : start + BATCH_SIZE]
                tokens = torch.tensor([ids for ids, _ in batch], device=device)
                predicted = model(tokens[:, :-1]).logits[:, -n_answer:].argmax(dim=-1)  # (B, n_answer)
                exact = (predicted == tokens[:, -n_answer:]).all(dim=1).tolist()
                for (_, group), hit in zip(batch, exact, strict=True):
                    correct[group] += hit
                    asked[group] += 1
    return {group: correct[group] / asked[group] for group in sorted(asked)}
