"""The words that an expert gets above its base rate."""

import pytest
import torch

from dsmoe_lite import load_model
from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.data.batches import heldout_batches
from dsmoe_lite.data.tokenizer import read_tokenizer
from dsmoe_lite.data.world import World
from dsmoe_lite.routing.favourites import favourite_words

PATH = DATA / "models" / "world-gshard.safetensors"
TOKENIZER = read_tokenizer(read_metadata(PATH)["tokenizer"])


@pytest.fixture(scope="module")
def tokens():
    return heldout_batches(World(), TOKENIZER, 64, 64, 1)[0].tokens[:, :-1]


def test_the_best_word_and_its_shares_agree_with_a_count_by_hand(tokens):
    model = load_model(PATH)
    found = favourite_words(model, TOKENIZER, tokens, most=1)
    assert len(found) > 16  # of 32 experts
    words = tokens.flatten().tolist()
    with torch.no_grad():
        routings = model.eval()(tokens).routings
    for (layer, e), said in found.items():
        chosen = [e in ids for ids in routings[layer].topk_ids.tolist()]
        base = sum(chosen) / len(words)
        shares = {}
        for word in set(words):
            of_word = [took for one, took in zip(words, chosen, strict=True) if one == word]
            share, n = sum(of_word) / len(of_word), len(of_word)
            if n >= 20 and share >= 2 * base and share - base >= 5 * (base * (1 - base) / n) ** 0.5:
                shares[word] = share
        best = max(shares.values())
        assert f"({best:.0%}); of all tokens it gets {base:.0%}" in said
        best_words = [word for word, share in shares.items() if share == best]
        names = [TOKENIZER.decode([word], skip_special_tokens=False).strip() or "∙" for word in best_words]
        assert any(said.startswith(f"“{name}” (") for name in names)


def test_words_that_look_alike_have_no_favourites(tokens):
    """A model that cannot tell words apart sends all of them to its experts by their place alone."""
    from dsmoe_lite import Transformer

    torch.manual_seed(0)
    model = Transformer(load_model(PATH).config)
    model.embed.weight.data.normal_()
    model.embed.weight.data[:] = model.embed.weight.data.mean(0)  # every word looks alike
    assert favourite_words(model, TOKENIZER, tokens) == {}


def test_bad_input_is_named(tokens):
    with pytest.raises(InputError, match="most = 0"):
        favourite_words(load_model(PATH), TOKENIZER, tokens, most=0)
    with pytest.raises(InputError, match="min_count = 0"):
        favourite_words(load_model(PATH), TOKENIZER, tokens, min_count=0)
