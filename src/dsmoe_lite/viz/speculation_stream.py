"""Stream text from speculative decoding: accepted drafts on green, beside plain decoding after as many passes."""

import time
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from IPython.display import display
from tokenizers import Tokenizer

from dsmoe_lite.common.errors import require
from dsmoe_lite.generate import Speculation, speculate
from dsmoe_lite.model import Transformer
from dsmoe_lite.viz import theme

REDRAW_INTERVAL = 0.1  # seconds, at least
ACCEPTED = f"background: {theme.LIGHT['fill4']}; color: {theme.LIGHT['on_fill']}; border-radius: 3px"
REPLACED = "text-decoration: underline dotted 2px; text-underline-offset: 3px"
UNFINISHED = "\ufffd"  # a character of which a token is missing


def stream_speculation(model: Transformer, tokenizer: Tokenizer, prompt: str, n_new: int) -> Speculation:
    """Let `model` continue the prompt greedily with drafts, show the text as it grows, and return the result.

    Plain decoding gives the same text, one token per forward pass, so it is shown as far as it would be. Raises the
    InputErrors of `speculate`, and InputError for an empty prompt.
    """
    require(prompt != "", "prompt", prompt, "must have some text for the model to continue")
    output, last = None, 0.0

    def redraw(result: Speculation) -> None:
        nonlocal output, last
        if output is None:
            output = display(_bundle(tokenizer, prompt, result), raw=True, display_id=True)
        elif time.monotonic() - last >= REDRAW_INTERVAL:
            output.update(_bundle(tokenizer, prompt, result), raw=True)
            last = time.monotonic()

    result = speculate(model, tokenizer.encode(prompt).ids, n_new, on_step=redraw)
    if output is not None:
        output.update(_bundle(tokenizer, prompt, result), raw=True)
    return result


def _bundle(tokenizer: Tokenizer, prompt: str, result: Speculation) -> dict[str, str]:
    """The two texts as HTML and as plain text, in which accepted drafts are in brackets."""
    pieces, n_plain = _pieces(tokenizer, result.tokens), result.n_forward
    marked = [
        f'<span style="{style}">{escape(piece)}</span>' if style else escape(piece)
        for piece, style in zip(pieces, _styles(result), strict=True)
    ]
    passes = f"in {result.n_forward} forward passes"
    texts = {
        f"With drafts: {len(pieces)} tokens {passes}": "".join(marked),
        f"Without: {n_plain} tokens {passes}": escape(_text(tokenizer, result.tokens[:n_plain])),
    }
    html = "".join(
        f'<p style="margin: .4em 0; white-space: pre-wrap; overflow-wrap: anywhere"><strong>{title}</strong>\n'
        f"<em>{escape(prompt)}</em>{text}</p>"
        for title, text in texts.items()
    )
    bracketed = [f"[{piece}]" if ok else piece for piece, ok in zip(pieces, result.accepted, strict=True)]
    return {"text/html": html, "text/plain": f"{next(iter(texts))}: {prompt}{''.join(bracketed)}"}


def _pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text; a character of several tokens belongs to the last of them."""
    texts = [_text(tokenizer, tokens[:n]).rstrip(UNFINISHED) for n in range(len(tokens))] + [_text(tokenizer, tokens)]
    return [after[len(before) :] for before, after in pairwise(texts)]


def _text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text with the ends of documents, which are tokens as well."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=False)
    return text


def _styles(result: Speculation) -> list[str]:
    """How to mark each token. One that follows another token of the model replaced a draft, if all drafts had room."""
    refused, styles, before = result.n_drafts - sum(result.accepted), [], True
    for accepted in result.accepted:
        replaced = not accepted and not before and refused > 0
        refused -= replaced
        styles.append(ACCEPTED if accepted else REPLACED if replaced else "")
        before = accepted
    return styles
