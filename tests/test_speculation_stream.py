"""Streamed speculation: the text grows by forward passes, accepted drafts are marked, plain decoding lags behind."""

from html import escape

import pytest
import torch
from test_text_stream import Shown
from tokenizers import Tokenizer

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import AttentionConfig, ModelConfig
from dsmoe_lite.data.tokenizer import load_tokenizer
from dsmoe_lite.data.world import World
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
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(World(), 1024)
    attention = AttentionConfig(n_heads=2, head_dim=16)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "d_model": 32, "n_layers": 1, "ffn_width": 32, "max_seq_len": 64}
    return Transformer(ModelConfig(attention=attention, n_mtp=1, init_std=0.3, **sizes)), tokenizer


def test_the_text_is_that_of_generate_and_grows_by_passes(shown: Shown, model: tuple[Transformer, Tokenizer]) -> None:
    transformer, tokenizer = model
    ids = tokenizer.encode("The home of").ids
    result = speculation_stream.stream_speculation(transformer, tokenizer, "The home of", 20)
    assert result.tokens == generate(transformer, [ids], 20)[0]
    assert len(shown.bundles) == 2 + result.n_forward  # before the first pass, after each, and at the end
    last = shown.bundles[-1]
    plain = last["text/plain"].replace("[", "").replace("]", "")
    assert plain == f"With drafts: 20 tokens in {result.n_forward} forward passes: The home of" + tokenizer.decode(
        result.tokens
    )
    assert last["text/html"].count("<p ") == 2
    assert last["text/html"].count(speculation_stream.ACCEPTED) == sum(result.accepted)
    assert f"Without: {min(20, result.n_forward)} tokens in {result.n_forward}" in last["text/html"]


def test_accepted_drafts_are_marked_and_text_is_escaped(model: tuple[Transformer, Tokenizer]) -> None:
    _, tokenizer = model
    tokens = tokenizer.encode("a <b> c").ids
    accepted = [number % 2 == 1 for number in range(len(tokens))]
    bundle = speculation_stream._bundle(tokenizer, "x <i>", Speculation(tokens, accepted, n_forward=2, n_drafts=3))
    assert "<b>" not in bundle["text/html"]
    assert "<em>x &lt;i&gt;</em>" in bundle["text/html"]
    assert bundle["text/plain"].count("[") == sum(accepted)
    assert bundle["text/html"].endswith(f"{escape(tokenizer.decode(tokens[:2]))}</p>")


def test_steps_are_reported_as_they_are_made(model: tuple[Transformer, Tokenizer]) -> None:
    transformer, tokenizer = model
    seen = []
    ids = tokenizer.encode("The home of").ids
    result = speculate(transformer, ids, 20, on_step=lambda made: seen.append((made.n_forward, len(made.tokens))))
    assert [passes for passes, _ in seen] == list(range(1, result.n_forward + 1))
    assert [after - before for (_, before), (_, after) in zip([(0, 0), *seen], seen, strict=False)] == [
        2 if draft else 1 for draft, _ in _by_pass(result)
    ]


def _by_pass(result: Speculation) -> list[tuple[bool, int]]:
    """For each pass, whether its draft was accepted, and its last token."""
    passes = []
    for number, (token, accepted) in enumerate(zip(result.tokens, result.accepted, strict=True)):
        if not accepted:
            passes.append((number > 0 and result.accepted[number - 1], token))
    return passes


def test_an_empty_prompt_is_refused(model: tuple[Transformer, Tokenizer]) -> None:
    with pytest.raises(InputError, match="prompt"):
        speculation_stream.stream_speculation(*model, "", 4)
