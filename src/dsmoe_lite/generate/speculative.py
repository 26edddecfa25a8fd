"""Self-speculative decoding: the first MTP module drafts a token, and one forward pass of the model checks it.

A forward pass over two tokens, the last one and the draft, gives two distributions. If the draft passes, both count and
the pass has made two tokens; if not, the model's own token replaces it. The tokens are distributed exactly as in plain
decoding (arXiv:2211.17192; DeepSeek-V3, arXiv:2412.19437, Section 5.4.3).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsmoe_lite.common.errors import require, require_int, require_number
from dsmoe_lite.generate.decode import check_prompts, probabilities, sample, to_rows
from dsmoe_lite.layers.block import Positions
from dsmoe_lite.layers.cache import Cache, GrowingCache
from dsmoe_lite.layers.sdpa import attention_mask
from dsmoe_lite.model import Transformer, eval_mode, require_finite


@dataclass
class Speculation:
    """The tokens of a continuation, and what they took."""

    tokens: list[int] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)  # of each token, whether it is an accepted draft
    n_forward: int = 0  # forward passes of the model, the prompt's included
    n_drafts: int = 0  # tokens that were drafted

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted; 0 without drafts."""
        return sum(self.accepted) / max(1, self.n_drafts)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens per forward pass: 1 in plain decoding, 2 if every draft is accepted."""
        return len(self.tokens) / max(1, self.n_forward)

    def add(self, found: Sequence[tuple[int, bool]], stop: Collection[int]) -> None:
        """Add the tokens of one forward pass, each with whether it is an accepted draft, up to a token of `stop`."""
        self.n_forward += 1
        for token, accepted in found:
            self.tokens.append(token)
            self.accepted.append(accepted)
            if token in stop:
                break


@torch.no_grad()
def speculate(
    model: Transformer,
    prompt: Sequence[int],
    n_new: int,
    *,
    temperature: float = 0.0,
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
    on_step: Callable[[Speculation], None] | None = None,
) -> Speculation:
    """Continue one prompt by n_new tokens, or fewer if an id of `stop` ends it.

    Temperature 0 gives the tokens of `generate`; above, tokens have the distribution of `generate`, from other draws.
    on_step: called after every forward pass with the result so far, the same object each time.
    Raises InputError for a model without MTP modules, with a sliding window or with experts whose tokens compete for
    slots, and for a prompt that is empty or leaves no room; RunError if a logit is NaN or infinite.
    """
    prompt = _checked(model, prompt, n_new, temperature, stop)
    result = Speculation()
    if n_new == 0:
        return result
    with eval_mode(model):
        draw = _Draw(temperature, generator)
        state = _State(model, prompt, n_new)
        p = state.read(1)[-1]  # the distribution of the next token, as logits (V,)
        state.push(draw.token(p))
        found = [(state.tokens[-1], False)]
        while True:
            result.add(found, stop)
            if on_step is not None:
                on_step(result)
            if len(result.tokens) == n_new or result.tokens[-1] in stop:
                return result
            if len(result.tokens) == n_new - 1:  # no room for a draft
                found = [(draw.token(state.read(1)[-1]), False)]
                state.push(found[0][0])
            else:
                found = _draft_and_check(state, draw)
                result.n_drafts += 1


def _draft_and_check(state: "_State", draw: "_Draw") -> list[tuple[int, bool]]:
    """Draft one token, check it in one forward pass: the tokens that this gives, and whether they are the draft."""
    q = state.draft()
    token = draw.token(q)
    state.push(token)
    p, after = state.read(2)
    if draw.accepts(p, q, token):
        last = draw.token(after)
        state.push(last)
        return [(token, True), (last, False)]
    state.take_back()
    other = draw.instead(p, q)
    state.push(other)
    return [(other, False)]


class _Draw:
    """Random choices: by the largest logit at temperature 0, else from softmax(logits / temperature)."""

    def __init__(self, temperature: float, generator: torch.Generator | None) -> None:
        self.temperature, self.generator = temperature, generator

    def token(self, logits: Tensor) -> int:
        return int(sample(logits[None], self.temperature, generator=self.generator))

    def accepts(self, p: Tensor, q: Tensor, token: int) -> bool:
        """Whether a token drawn from q stands for one drawn from p: with probability min(1, p / q)."""
        if self.temperature == 0:
            return int(p.argmax()) == token
        ratio = self._probabilities(p)[token] / self._probabilities(q)[token]
        drawn = torch.rand((), dtype=torch.float64, generator=self.generator, device=self._device(p))
        return bool(drawn < ratio.to(drawn.device))

    def instead(self, p: Tensor, q: Tensor) -> int:
        """A token for a draft that was refused, from max(0, p - q) divided by its sum."""
        if self.temperature == 0:
            return int(p.argmax())
        rest = (self._probabilities(p) - self._probabilities(q)).clamp(min=0).to(self._device(p))
        if not rest.any():  # p and q differ by rounding alone
            return self.token(p)
        return int(torch.multinomial(rest, 1, generator=self.generator))

    def _probabilities(self, logits: Tensor) -> Tensor:
        return probabilities(logits, self.temperature)

    def _device(self, logits: Tensor) -> torch.device:
        return logits.device if self.generator is None else self.generator.device  # it draws on its own device only


class _State:
    """The tokens so far, with the caches of the model and of its MTP module.

    The model has read the first `cache.length` tokens; `hidden` (1, n, D) are its states that the module has not read.
    The module's entry i is made from the state of token i and token i + 1.
    """

    def __init__(self, model: Transformer, prompt: list[int], n_new: int) -> None:
        self.model, self.tokens = model, prompt
        room = min(len(prompt) + n_new, model.config.max_seq_len)
        self.cache = Cache(model.config, 1, reserve=room)
        self.of_module = GrowingCache(room, model.config.max_seq_len)
        self.hidden = model.embed.weight.new_empty(1, 0, model.config.d_model)

    def read(self, n_last: int) -> Tensor:
        """Read all tokens that the model has not read; return the logits (n_last, V) of the last ones."""
        unread = self._tensor(self.tokens[self.cache.length :])
        output = self.model(unread, self.cache)
        require_finite(output.logits)
        assert output.hidden is not None
        self.hidden = torch.cat((self.hidden, output.hidden), dim=1)
        return output.logits[0, -n_last:]

    def push(self, token: int) -> None:
        """Add a token that the model has not read."""
        self.tokens.append(token)

    def take_back(self) -> None:
        """Forget the draft, the last token, which the model has read."""
        self.tokens.pop()
        self.cache.forget(1)
        self.hidden = self.hidden[:, :-1]

    def draft(self) -> Tensor:
        """The module's logits (V,) for the token after the last one, which the model has not read."""
        model, start, n = self.model, self.of_module.length, self.hidden.shape[1]
        following = self._tensor(self.tokens[start + 1 : start + 1 + n])
        cos, sin = model.rope.on(self.hidden.device)
        mask = attention_mask(n, self.hidden.device, cache=self.of_module, window=None, pad=None)
        positions = Positions(cos[start : start + n], sin[start : start + n], mask)
        h, _ = model.mtp[0](self.hidden, model.embed(following), positions, following, self.of_module)
        self.of_module.advance(n)
        self.hidden = self.hidden[:, n:]
        logits: Tensor = model.head(h[:, -1])[0]
        return logits

    def _tensor(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.model.embed.weight.device)


def _checked(
    model: Transformer, prompt: Sequence[int], n_new: int, temperature: float, stop: Collection[int]
) -> list[int]:
    """The prompt as a list. Raises the InputErrors of `speculate`."""
    config = model.config
    require_int("n_new", n_new, 0)
    require_number("temperature", temperature, 0.0)
    require(
        config.n_mtp > 0, "n_mtp", config.n_mtp, "the model has no MTP module to draft with: train one with n_mtp = 1"
    )
    alone = config.moe is None or config.moe.routes_alone
    remedy = "must have experts without capacities that tokens choose: a draft would compete with other tokens"
    require(alone, "moe", config.moe and config.moe.chooser, remedy)
    require(config.attention.window is None, "window", config.attention.window, "a rolling cache cannot forget a draft")
    rows = to_rows([prompt])
    check_prompts(config, rows, n_new, stop)
    return rows[0]
