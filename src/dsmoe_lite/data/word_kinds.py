"""The kind of each token of the world's texts: in the sentences about people its part in them, elsewhere the domain."""

import torch
from tokenizers import Tokenizer

from dsmoe_lite.data.batches import Batch
from dsmoe_lite.data.world import WORD, World

IN_FACTS = ("function word", "punctuation", "first name", "last name", "relation", "value", "piece of a word")
KINDS = (*IN_FACTS, "second language", "sums", "brackets", "code")  # labels are positions in this list


def by_kind(batch: Batch, world: World, tokenizer: Tokenizer) -> Batch:
    """Return the same tokens (B, S + 1), labelled by kind, a position in KINDS, instead of domain.

    The end of a document counts as punctuation.
    """
    words = world.language
    kind_of = dict.fromkeys([*".,:?", ""], "punctuation")  # "" is <|end|>, decoded
    kind_of |= {word: "function word" for text in (*words.statements, words.question) for word in WORD.findall(text)}
    kind_of |= dict.fromkeys(words.first, "first name") | dict.fromkeys(words.last, "last name")
    kind_of |= dict.fromkeys(words.relations, "relation")
    kind_of |= {value: "value" for values in words.values for value in values}
    decoded = [tokenizer.decode([i]).strip() for i in range(tokenizer.get_vocab_size())]
    in_facts = torch.tensor([KINDS.index(kind_of.get(word, "piece of a word")) for word in decoded])
    domain = batch.domains.long()
    labels = torch.where(domain == 0, in_facts[batch.tokens], domain + len(IN_FACTS) - 1)
    return Batch(batch.tokens, labels.to(torch.uint8))
