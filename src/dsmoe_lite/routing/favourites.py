"""Which words does each expert get more often than chance would give it? In words, for readers."""

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsmoe_lite.common.errors import require_int
from dsmoe_lite.model import Transformer, eval_mode
from dsmoe_lite.routing.specialization import null_specialization, specialization

STANDARD_ERRORS = 5.0  # above the base rate: an expert has some hundred words to be lucky with


@torch.no_grad()
def favourite_words(
    model: Transformer, tokenizer: Tokenizer, tokens: Tensor, *, most: int = 2, min_count: int = 20
) -> dict[tuple[int, int], str]:
    """Name the words that each expert gets far above its base rate, by (MoE layer, expert).

    tokens (B, S): ids of held-out text. A word counts if it occurs at least `min_count` times and if the share of its
    tokens that choose the expert exceeds the expert's share of all tokens at least twofold and by five standard errors.
    An expert without such a word is left out. Raises InputError if most or min_count is below 1.
    """
    require_int("most", most, 1)
    require_int("min_count", min_count, 1)
    words, V, found = tokens.flatten(), model.config.vocab_size, {}
    n_tokens = torch.bincount(words, minlength=V).double()
    with eval_mode(model):
        routings = model(tokens.to(model.embed.weight.device)).routings
    for layer, routing in enumerate(routings):
        ids = routing.topk_ids.cpu()
        shares = specialization(ids, words, V, routing.n_experts)  # (V, E)
        base = null_specialization(ids, routing.n_experts)  # (E,)
        error = (base * (1 - base) / n_tokens.clamp(min=1)[:, None]).sqrt()
        liked = (shares >= 2 * base) & (shares - base >= STANDARD_ERRORS * error) & (n_tokens >= min_count)[:, None]
        for e in range(routing.n_experts):
            ranked = (shares[:, e] * liked[:, e]).sort(descending=True, stable=True)
            names = [
                f"“{tokenizer.decode([word], skip_special_tokens=False).strip() or '∙'}” ({share:.0%})"
                for share, word in zip(ranked.values[:most].tolist(), ranked.indices[:most].tolist(), strict=True)
                if share > 0
            ]
            if names:
                found[layer, e] = f"{' and '.join(names)}; of all tokens it gets {base[e]:.0%}"
    return found
