"""Streamed text: the output grows, ends without a progress bar, and equals what `generate` returns."""

import pytest
import torch
from stream_samples import Shown, small_model
from tokenizers import Tokenizer

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.generate import generate
from dsmoe_lite.model import Transformer
from dsmoe_lite.viz import text_stream


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """The display of `stream_text`, redrawn at every token."""
    output = Shown()
    monkeypatch.setattr(text_stream, "display", output)
    monkeypatch.setattr(text_stream, "REDRAW_INTERVAL", 0.0)
    return output


@pytest.fixture(scope="module")
def model() -> tuple[Transformer, Tokenizer]:
    return small_model()


def test_text_grows_and_equals_what_generate_returns(shown, model):
    transformer, tokenizer = model
    prompts = ["The home of", "x <b>"]
    texts = text_stream.stream_text(transformer, tokenizer, prompts, 12, temperature=1.0, seed=3)
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    generated = generate(transformer, ids, 12, temperature=1.0, generator=torch.Generator().manual_seed(3))
    assert texts == [tokenizer.decode(row) for row in generated]
    lengths = [len(bundle["text/plain"]) for bundle in shown.bundles]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 5
    assert all("<progress" in bundle["text/html"] for bundle in shown.bundles[:-1])
    last = shown.bundles[-1]
    assert "<progress" not in last["text/html"]
    assert last["text/plain"] == "\n".join(map("".join, zip(prompts, texts, strict=True)))
    assert "x &lt;b&gt;" in last["text/html"]


def test_another_seed_samples_another_text(shown, model):
    one, two = (text_stream.stream_text(*model, ["The home of"], 12, temperature=1.0, seed=seed) for seed in (0, 1))
    assert one != two


def test_generation_ends_at_a_stop_token_and_shows_it(shown, model):
    transformer, tokenizer = model
    (first, *_), *_ = generate(transformer, [tokenizer.encode("The").ids], 1)
    (text,) = text_stream.stream_text(transformer, tokenizer, ["The"], 12, stop=[first])
    assert text == tokenizer.decode([first])
    assert shown.bundles[-1]["text/plain"] == "The" + text


def test_a_prompt_without_text_is_refused_before_anything_is_shown(shown, model):
    with pytest.raises(InputError, match="prompt 1 = '': must have some text"):
        text_stream.stream_text(*model, ["The", ""], 3)
    assert not shown.bundles
