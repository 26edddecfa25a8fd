"""What a model knows: held-out loss by domain, and facts recalled from memory."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from dsmoe_lite.data.batches import Batch
from dsmoe_lite.data.world import Question
from dsmoe_lite.model import Transformer
from dsmoe_lite.progress import progress


@dataclass(frozen=True)
class HeldOut:
    """Mean cross-entropy in nats a token, over all held-out tokens and over those of each domain; use of the experts.

    `loads` are assignments over their mean, `max_vio` a layer's largest load minus 1 (the whole set's, MaxVio_global of
    arXiv:2408.15664), `drop_rate` the share of assignments not kept. Empty lists for a dense model.
    """

    loss: float
    by_domain: dict[str, float]
    loads: list[list[float]]  # (MoE layers, E)
    max_vio: list[float]  # (MoE layers,)
    drop_rate: list[float]  # (MoE layers,)


@torch.no_grad()
def heldout_loss(model: Transformer, batches: Sequence[Batch], domains: Sequence[str]) -> HeldOut:
    """Evaluate on fixed batches; a domain without tokens is left out. The model is left in the mode it was in."""
    was_training, device = model.training, model.embed.weight.device
    model.eval()
    total = torch.zeros(len(domains), dtype=torch.float64)
    count = torch.zeros(len(domains), dtype=torch.float64)
    chosen: list[Tensor] = []  # (E,) a layer
    kept: list[int] = []
    for batch in progress(batches, desc="held-out"):
        tokens = batch.tokens.to(device)
        output = model(tokens[:, :-1])
        here = [routing.counts for routing in output.routings]
        chosen = [a + b for a, b in zip(chosen, here, strict=True)] if chosen else here
        here_kept = [int(routing.kept.sum()) for routing in output.routings]
        kept = [a + b for a, b in zip(kept, here_kept, strict=True)] if kept else here_kept
        losses = (
            F.cross_entropy(output.logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
            .cpu()
            .double()
        )
        labels = batch.domains[:, 1:].flatten().long()
        total.index_add_(0, labels, losses)
        count.index_add_(0, labels, torch.ones_like(losses))
    model.train(was_training)
    by_domain = {name: float(total[i] / count[i]) for i, name in enumerate(domains) if count[i]}
    loads = [(counts / counts.double().mean()).tolist() for counts in chosen]
    dropped = [1 - n / int(counts.sum()) for n, counts in zip(kept, chosen, strict=True)]
    max_vio = [max(layer) - 1 for layer in loads]
    return HeldOut(float(total.sum() / count.sum()), by_domain, loads, max_vio, dropped)


@torch.no_grad()
def recall(model: Transformer, tokenizer: Tokenizer, questions: Sequence[Question]) -> dict[str, float]:
    """Return the share of questions answered exactly by greedy decoding, for each group of questions.

    Every token of the answer has to be the likeliest one. Questions of one length go through together, so nothing is
    padded and no padding takes an expert's slot.
    """
    was_training, device = model.training, model.embed.weight.device
    model.eval()
    by_shape = defaultdict(list)
    for question in questions:
        prompt = tokenizer.encode(question.prompt).ids
        answer = tokenizer.encode(question.answer).ids
        by_shape[len(prompt), len(answer)].append((prompt + answer, question.group))
    right: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    for (_, n_answer), members in sorted(by_shape.items()):
        for start in range(0, len(members), 256):
            part = members[start : start + 256]
            tokens = torch.tensor([ids for ids, _ in part], device=device)
            said = model(tokens[:, :-1]).logits[:, -n_answer:].argmax(dim=-1)  # (B, n_answer)
            exact = (said == tokens[:, -n_answer:]).all(dim=1).tolist()
            for (_, group), hit in zip(part, exact, strict=True):
                right[group] += hit
                asked[group] += 1
    model.train(was_training)
    return {group: right[group] / asked[group] for group in sorted(asked)}
