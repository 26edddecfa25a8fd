"""A model's words as they come: text that grows in the notebook, with a bar for how far it is."""

import time
from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from IPython.display import display
from tokenizers import Tokenizer

from dsmoe_lite.common.errors import require
from dsmoe_lite.generate import generate
from dsmoe_lite.model import Transformer

SECONDS = 0.1  # between two drawings


def speak(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], n_new: int, *, seed: int = 0, **options: Any
) -> list[str]:
    """Let `model` go on from each of `prompts`, show the words as they come, and return them.

    options: those of `generate`, temperature and top_p among them; `seed` sets what is drawn.
    """
    for number, prompt in enumerate(prompts):
        require(prompt != "", f"prompt {number}", prompt, "must hold some text for the model to go on from")
    page = _Page(tokenizer, prompts, n_new)
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    generator = torch.Generator(device=model.embed.weight.device).manual_seed(seed)
    said = generate(model, ids, n_new, generator=generator, on_step=page.grow, **options)
    return page.end(said)


class _Page:
    """One output that is drawn again as the texts grow."""

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[str], n_new: int) -> None:
        self._tokenizer, self._prompts, self._n_new = tokenizer, prompts, n_new
        self._drawn_at = time.monotonic()
        self._shown = display(self._bundle([[] for _ in prompts], 0), raw=True, display_id=True)

    def grow(self, said: list[list[int]]) -> None:
        now = time.monotonic()
        if now - self._drawn_at >= SECONDS:
            self._drawn_at = now
            self._shown.update(self._bundle(said, max(map(len, said))), raw=True)

    def end(self, said: list[list[int]]) -> list[str]:
        self._shown.update(self._bundle(said, None), raw=True)
        return self._texts(said)

    def _texts(self, said: list[list[int]]) -> list[str]:
        return [self._tokenizer.decode(ids) for ids in said]

    def _bundle(self, said: list[list[int]], done: int | None) -> dict[str, str]:
        texts = self._texts(said)
        bar = ""
        if done is not None:
            bar = f'<progress value="{done}" max="{self._n_new}" aria-label="tokens said"></progress> {done} tokens'
        lines = [
            '<p style="margin: .4em 0; white-space: pre-wrap; overflow-wrap: anywhere">'
            f"<em>{escape(prompt)}</em>{escape(text)}</p>"
            for prompt, text in zip(self._prompts, texts, strict=True)
        ]
        plain = "\n".join(prompt + text for prompt, text in zip(self._prompts, texts, strict=True))
        return {"text/html": "".join(lines) + bar, "text/plain": plain}
