"""Stream text from self-speculative decoding: accepted drafts on green, beside plain decoding after as many passes."""

import itertools
import time
from html import escape
from typing import Any

from IPython.display import display
from tokenizers import Tokenizer

from dsmoe_lite.common.errors import require
from dsmoe_lite.generate import Speculation, speculate
from dsmoe_lite.model import Transformer
from dsmoe_lite.viz import theme

REDRAW_INTERVAL = 0.1  # seconds, at least
ACCEPTED = f"background: {theme.LIGHT['fill4']}; color: {theme.LIGHT['on_fill']}; border-radius: 3px"


def stream_speculation(model: Transformer, tokenizer: Tokenizer, prompt: str, n_new: int) -> Speculation:
    """Let `model` continue the prompt greedily with drafts, show the text as it grows, and return the result.

    Plain decoding gives the same text, one token a forward pass, so it is shown as far as it would be. Raises the
    InputErrors of `speculate`, and InputError for an empty prompt.
    """
    require(prompt != "", "prompt", prompt, "must have some text for the model to continue")
    output = display(_bundle(tokenizer, prompt, Speculation()), raw=True, display_id=True)
    last = time.monotonic()

    def redraw(result: Speculation) -> None:
        nonlocal last
        if time.monotonic() - last >= REDRAW_INTERVAL:
            last = time.monotonic()
            output.update(_bundle(tokenizer, prompt, result), raw=True)

    result = speculate(model, tokenizer.encode(prompt).ids, n_new, on_step=redraw)
    output.update(_bundle(tokenizer, prompt, result), raw=True)
    return result


def _bundle(tokenizer: Tokenizer, prompt: str, result: Speculation) -> dict[str, Any]:
    """The two texts as HTML and as plain text, in which accepted drafts are in brackets."""
    ends = [tokenizer.decode(result.tokens[:n]) for n in range(len(result.tokens) + 1)]
    pieces = [after.removeprefix(before) for before, after in itertools.pairwise(ends)]
    marked = "".join(
        f'<span style="{ACCEPTED}">{escape(piece)}</span>' if accepted else escape(piece)
        for piece, accepted in zip(pieces, result.accepted, strict=True)
    )
    n_plain = min(result.n_forward, len(pieces))
    titles = [f"With drafts: {len(pieces)} tokens", f"Without: {n_plain} tokens"]
    passes = f"in {result.n_forward} forward passes"
    bodies = [marked, escape("".join(pieces[:n_plain]))]
    html = "".join(
        f'<p style="margin: .4em 0; white-space: pre-wrap; overflow-wrap: anywhere"><strong>{title} {passes}</strong>\n'
        f"<em>{escape(prompt)}</em>{body}</p>"
        for title, body in zip(titles, bodies, strict=True)
    )
    text = "".join(f"[{piece}]" if ok else piece for piece, ok in zip(pieces, result.accepted, strict=True))
    return {"text/html": html, "text/plain": f"{titles[0]} {passes}: {prompt}{text}"}
