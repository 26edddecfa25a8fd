"""Stream generated text: tokens appear in the notebook as the model generates them, with a progress bar."""

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

REDRAW_INTERVAL = 0.1  # seconds, at least


def stream_text(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], n_new: int, *, seed: int = 0, **options: Any
) -> list[str]:
    """Let `model` continue each of `prompts`, show the text as it is generated, and return the continuations.

    options: those of `generate`, such as temperature and top_p; `seed` seeds the sampling. Raises InputError if a
    prompt is empty.
    """
    for number, prompt in enumerate(prompts):
        require(prompt != "", f"prompt {number}", prompt, "must have some text for the model to continue")
    display_area = _TextDisplay(tokenizer, prompts, n_new)
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    generator = torch.Generator(device=model.embed.weight.device).manual_seed(seed)
    generated = generate(model, ids, n_new, generator=generator, on_step=display_area.update, **options)
    return display_area.finish(generated)


class _TextDisplay:
    """One output of the notebook, redrawn as the texts grow."""

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[str], n_new: int) -> None:
        self._tokenizer, self._prompts, self._n_new = tokenizer, prompts, n_new
        self._last_redraw = time.monotonic()
        self._output = display(self._bundle([[] for _ in prompts], 0), raw=True, display_id=True)

    def update(self, generated: list[list[int]]) -> None:
        now = time.monotonic()
        if now - self._last_redraw >= REDRAW_INTERVAL:
            self._last_redraw = now
            self._output.update(self._bundle(generated, max(map(len, generated))), raw=True)

    def finish(self, generated: list[list[int]]) -> list[str]:
        self._output.update(self._bundle(generated, None), raw=True)
        return self._texts(generated)

    def _texts(self, generated: list[list[int]]) -> list[str]:
        return [self._tokenizer.decode(ids) for ids in generated]

    def _bundle(self, generated: list[list[int]], n_done: int | None) -> dict[str, str]:
        texts = self._texts(generated)
        bar = ""
        if n_done is not None:
            limits = f'value="{n_done}" max="{self._n_new}"'
            bar = f'<progress {limits} aria-label="tokens generated"></progress> {n_done} tokens'
        lines = [
            '<p style="margin: .4em 0; white-space: pre-wrap; overflow-wrap: anywhere">'
            f"<em>{escape(prompt)}</em>{escape(text)}</p>"
            for prompt, text in zip(self._prompts, texts, strict=True)
        ]
        plain = "\n".join(prompt + text for prompt, text in zip(self._prompts, texts, strict=True))
        return {"text/html": "".join(lines) + bar, "text/plain": plain}
