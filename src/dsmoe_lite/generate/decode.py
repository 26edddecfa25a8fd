"""Generate text for several prompts at once: greedy, with a temperature or from a nucleus, with a KV cache."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from dsmoe_lite.common.errors import InputError, require, require_int, require_number
from dsmoe_lite.common.progress import progress
from dsmoe_lite.config import ModelConfig
from dsmoe_lite.layers.cache import Cache
from dsmoe_lite.model import Transformer, eval_mode, require_finite

PAD_ID = 0  # any id works: no other token sees a padding token


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Tensor | Sequence[Sequence[int]],
    n_new: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
    use_cache: bool | None = None,
    chunk: int | None = None,
    on_step: Callable[[list[list[int]]], None] | None = None,
) -> list[list[int]]:
    """Return, for each prompt, the ids of its continuation: n_new ids, or fewer if an id of `stop` ends it.

    prompts: ids (B, S), or lists of ids of any lengths. Temperature 0 takes the likeliest token. A higher temperature
    samples from softmax(logits / temperature), cut to the likeliest tokens that together reach probability top_p
    (nucleus sampling, arXiv:1904.09751). use_cache: None uses a KV cache if the cache cannot change the result. chunk:
    how many prompt tokens one prefill step reads; None: all. on_step: called after every token with the continuations
    so far.

    The model keeps its mode. Raises InputError for prompts that are empty or leave no room for n_new, for ids outside
    the vocabulary, in `stop` too, and for a cache if the experts of a token depend on its batch. Raises RunError if a
    logit is NaN or infinite.
    """
    require_int("n_new", n_new, 0)
    require_number("temperature", temperature, 0.0)
    require_number("top_p", top_p, 0.0, 1.0, open_low=True)
    if chunk is not None:
        require_int("chunk", chunk, 1)
    rows = to_rows(prompts)
    check_prompts(model.config, rows, n_new, stop)
    tokens, pad = _left_padded(rows, model.embed.weight.device)
    cache = None
    if _may_cache(model.config, pad is not None, use_cache):
        cache = Cache(model.config, len(rows), reserve=tokens.shape[1] + n_new)
    continuations: list[list[int]] = [[] for _ in rows]
    ended = [False] * len(rows)
    with eval_mode(model):
        for _ in progress(range(n_new), desc="generating", unit="token", delay=2):
            logits = _next_logits(model, tokens, cache, pad, chunk)
            require_finite(logits)
            sampled = sample(logits, temperature, top_p, generator)
            tokens = torch.cat((tokens, sampled[:, None]), dim=1)
            for row, token in enumerate(sampled.tolist()):
                if not ended[row]:
                    continuations[row].append(token)
                    ended[row] = token in stop
            if on_step is not None:
                on_step(continuations)
            if all(ended):
                break
    return continuations


def sample(logits: Tensor, temperature: float, top_p: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Choose one token id per row of logits (B, V), as in `generate`: (B,). Among equal logits, the lower id wins."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    p = probabilities(logits, temperature)
    if top_p < 1:
        ordered, ids = p.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # total probability of the likelier tokens
        p = torch.zeros_like(p).scatter(-1, ids, ordered.masked_fill(before >= top_p, 0.0))
    device = logits.device if generator is None else generator.device  # a generator draws on its own device only
    return torch.multinomial(p.float().to(device), 1, generator=generator)[:, 0].to(logits.device)


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature) over the last dimension, float64, for any temperature above 0."""
    logits = logits.double()  # half precision would lose the tail of the sum, and a low temperature would overflow
    return ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)


def _next_logits(
    model: Transformer, tokens: Tensor, cache: Cache | None, pad: Tensor | None, chunk: int | None
) -> Tensor:
    """Logits (B, V) of the token after tokens (B, S). With a cache, only tokens that it lacks are read."""
    if cache is None:
        return model(tokens, pad=pad).logits[:, -1]
    unread = tokens[:, cache.length :]
    for part in unread.split(chunk or unread.shape[1], dim=1):
        logits = model(part, cache, pad).logits[:, -1]
    return logits


def to_rows(prompts: Tensor | Sequence[Sequence[int]]) -> list[list[int]]:
    """Turn prompts into lists. Raises InputError for a single prompt outside a list."""
    try:
        return [list(row) for row in (prompts.tolist() if isinstance(prompts, Tensor) else prompts)]
    except TypeError:
        remedy = "must be a list of prompts, each a list of token ids; put brackets around a single prompt"
        raise InputError(f"prompts, of type {type(prompts).__name__}: {remedy}") from None


def _left_padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return rows, padded at the left, as one tensor (B, S), and the padding of each row (B,), or None without any."""
    longest = max(map(len, rows))
    pad = [longest - len(row) for row in rows]
    tokens = torch.tensor([[PAD_ID] * n + row for n, row in zip(pad, rows, strict=True)], device=device)
    return tokens, torch.tensor(pad, device=device) if any(pad) else None


def check_prompts(config: ModelConfig, rows: list[list[int]], n_new: int, stop: Collection[int]) -> None:
    """Raise InputError for prompts that are empty or leave no room for n_new, and for ids outside the vocabulary."""
    require(len(rows) > 0, "prompts", rows, "must have at least one prompt")
    most, V = config.max_seq_len, config.vocab_size
    for number, row in enumerate(rows):
        require(len(row) > 0, f"prompt {number}", row, "must have at least one token for the model to continue")
        remedy = f"must be at most max_seq_len = {most}: shorten the prompt"
        require(len(row) <= most, f"tokens of prompt {number}", len(row), remedy)
        for token in row:
            require_int(f"token id in prompt {number}", token, 0, V - 1)
    longest = max(map(len, rows))
    remedy = f"must be at most {most - longest}: max_seq_len = {most}, and the longest prompt has {longest} tokens"
    require(longest + n_new <= most, "n_new", n_new, remedy)
    require(isinstance(stop, Collection), "stop", stop, "must be a list or set of token ids")
    for token in stop:
        require_int("token id in stop", token, 0, V - 1)


def _may_cache(config: ModelConfig, padded: bool, use_cache: bool | None) -> bool:
    """Whether to use a cache. Raises InputError if a cache, or padding, would change which experts tokens reach."""
    independent = config.moe is None or config.moe.routes_alone
    reason = "the experts have capacities or choose their tokens, so the experts of a token depend on its batch"
    require(independent or not padded, "prompts", "of different lengths", f"must be equally long: {reason}")
    require(independent or not use_cache, "use_cache", use_cache, f"must be False: {reason}")
    return independent if use_cache is None else use_cache
