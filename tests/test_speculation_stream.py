"""Streamed speculation: the text grows by forward passes, accepted drafts are marked, plain decoding lags behind."""

import copy
from html import escape

import pytest
import torch
from stream_samples import Shown, small_model
from tokenizers import Tokenizer

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.data.tokenizer import END_ID
from dsmoe_lite.generate import Speculation, generate, speculate
from dsmoe_lite.model import Transformer
from dsmoe_lite.viz import speculation_stream


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    output = Shown()
    monkeypatch.setattr(speculation_stream, "display", output)
    monkeypatch.setattr(speculation_stream, "REDRAW_INTERVAL", 0.0)
    return output


@pytest.fixture(scope="module")
def model() -> tuple[Transformer, Tokenizer]:
    return small_model(n_mtp=1)


@pytest.fixture(scope="module")
def certain(model: tuple[Transformer, Tokenizer]) -> tuple[Transformer, Tokenizer]:
    """A model that always says one token, or that token and another one: most drafts are right."""
    transformer = copy.deepcopy(model[0])
    torch.nn.init.zeros_(transformer.head.weight)
    return transformer, model[1]


@pytest.mark.parametrize("sure", [False, True])
def test_the_text_is_that_of_generate_and_grows_by_passes(
    shown: Shown, model: tuple[Transformer, Tokenizer], certain: tuple[Transformer, Tokenizer], sure: bool
) -> None:
    transformer, tokenizer = certain if sure else model
    ids = tokenizer.encode("The home of").ids
    result = speculation_stream.stream_speculation(transformer, tokenizer, "The home of", 20)
    assert result.tokens == generate(transformer, [ids], 20)[0]
    assert result.n_forward == (11 if sure else 20)  # one token of the prompt's pass, nine pairs, one without a draft
    assert len(shown.bundles) == 1 + result.n_forward  # after each pass, and at the end
    last = shown.bundles[-1]
    plain = last["text/plain"].replace("[", "").replace("]", "")
    told = f"With drafts: 20 tokens in {result.n_forward} forward passes: The home of"
    text = tokenizer.decode(result.tokens, skip_special_tokens=False)
    assert plain == told + text.replace("[", "").replace("]", "")
    assert last["text/html"].count("<p ") == 2
    assert last["text/html"].count(speculation_stream.ACCEPTED) == sum(result.accepted) == (9 if sure else 0)
    assert last["text/html"].count(speculation_stream.REPLACED) == result.n_drafts - sum(result.accepted)
    assert f"Without: {result.n_forward} tokens in {result.n_forward}" in last["text/html"]


def test_accepted_drafts_are_marked_and_text_is_escaped(model: tuple[Transformer, Tokenizer]) -> None:
    _, tokenizer = model
    tokens = tokenizer.encode("a <b> c").ids
    accepted = [number % 2 == 1 for number in range(len(tokens))]
    bundle = speculation_stream._bundle(tokenizer, "x <i>", Speculation(tokens, accepted, n_forward=2, n_drafts=3))
    assert "<b>" not in bundle["text/html"]
    assert "<em>x &lt;i&gt;</em>" in bundle["text/html"]
    assert bundle["text/plain"].count("[") == sum(accepted)
    assert bundle["text/html"].endswith(f"{escape(tokenizer.decode(tokens[:2]))}</p>")


def test_the_end_of_a_document_is_shown(model: tuple[Transformer, Tokenizer]) -> None:
    _, tokenizer = model
    assert speculation_stream._pieces(tokenizer, [*tokenizer.encode("a").ids, END_ID])[-1] == "<|end|>"


def test_a_character_of_several_tokens_is_shown_once(model: tuple[Transformer, Tokenizer]) -> None:
    _, tokenizer = model
    tokens = tokenizer.encode("cafés 漢").ids
    assert any("\ufffd" in tokenizer.decode(tokens[:n]) for n in range(len(tokens)))
    pieces = speculation_stream._pieces(tokenizer, tokens)
    assert "".join(pieces) == "cafés 漢"
    assert "" in pieces


def test_steps_are_reported_as_they_are_made(certain: tuple[Transformer, Tokenizer]) -> None:
    transformer, tokenizer = certain
    seen = []
    ids = tokenizer.encode("The home of").ids
    result = speculate(transformer, ids, 20, on_step=lambda made: seen.append((made.n_forward, len(made.tokens))))
    assert seen == [(1, 1), *((1 + n, 1 + 2 * n) for n in range(1, 10)), (11, 20)]
    stopped = speculate(transformer, ids, 20, stop=[result.tokens[0]], on_step=lambda made: seen.append((0, 0)))
    assert (stopped.n_forward, len(stopped.tokens), seen.count((0, 0))) == (1, 1, 1)


def test_an_empty_prompt_is_refused(model: tuple[Transformer, Tokenizer]) -> None:
    with pytest.raises(InputError, match="prompt"):
        speculation_stream.stream_speculation(*model, "", 4)
