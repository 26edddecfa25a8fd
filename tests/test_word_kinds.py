"""Tokens by kind: a sentence about a person word by word, and the other domains."""

import torch

from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.data.batches import Batch, heldout_batches
from dsmoe_lite.data.tokenizer import END_ID, read_tokenizer
from dsmoe_lite.data.word_kinds import KINDS, by_kind
from dsmoe_lite.data.world import World

WORLD = World()
TOKENIZER = read_tokenizer(read_metadata(DATA / "models" / "world-gshard.safetensors")["tokenizer"])


def test_a_sentence_about_a_person() -> None:
    words = WORLD.language
    first, last, relation = words.first[0], words.last[0], words.relations[0]
    value = words.values[0][0]
    sentence = f"The {relation} of {first} {last} is {value}."
    tokens = torch.tensor([[*TOKENIZER.encode(sentence).ids, END_ID]])
    labelled = by_kind(Batch(tokens, torch.zeros_like(tokens, dtype=torch.uint8)), WORLD, TOKENIZER)
    assert torch.equal(labelled.tokens, tokens)
    kinds = [KINDS[i] for i in labelled.domains[0].tolist()]
    assert kinds == [
        *("function word", "relation", "function word", "first name", "last name", "function word", "value"),
        *("punctuation", "punctuation"),  # the full stop and the end of the document
    ]


def test_other_domains_keep_their_name() -> None:
    batch = heldout_batches(WORLD, TOKENIZER, 16, 64, 1)[0]
    labelled = by_kind(batch, WORLD, TOKENIZER)
    for i, domain in enumerate(WORLD.domains[1:], 1):
        kinds = {KINDS[k] for k in labelled.domains[batch.domains == i].tolist()}
        assert kinds <= {{"parallel": "second language", "arithmetic": "sums"}.get(domain, domain)}
    assert set(labelled.domains[batch.domains == 0].tolist()) <= set(range(7))
