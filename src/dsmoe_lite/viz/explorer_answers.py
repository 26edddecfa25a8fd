"""What the routing explorer asks: a text read by each model, the expert an answer needs most, a text continued.

static/compute.js computes the same in a page without Python; a test compares the two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from dsmoe_lite.common.errors import InputError, require, require_int, require_number
from dsmoe_lite.generate import sample
from dsmoe_lite.model import Transformer, eval_mode
from dsmoe_lite.routing.interventions import silence, switch_off
from dsmoe_lite.routing.token_types import token_types
from dsmoe_lite.routing.trace import RoutingTrace, tokenize

MAX_TOKENS = 512
MAX_CHARACTERS = 8_000
MAX_WRITTEN = 256  # tokens of one request
NONE = 0xFFFF  # no expert
N_LIKELY = 3  # next tokens shown
UNKNOWN = 0xFF  # the right next token is not known
WHOLE = 65535  # a probability of 1, and the highest gate
SHARED = "shared"  # in the place of an expert's number

Disabled = frozenset[tuple[int, int | str]]  # (MoE layer, expert or "shared") switched off
Question = tuple[str, str]  # (prompt, answer); the answer begins with its space


@dataclass(frozen=True, eq=False)
class Reading:
    """A text of T tokens as one model reads it. A recorded trace has no predictions.

    A dense model is traced as a model of one expert per layer that every token uses with gate 1.
    """

    trace: RoutingTrace
    p: Tensor | None = None  # (T, V), of the next token
    right: Sequence[int] = ()  # T ids of the right next token, -1 if it is not known
    expert_size: int = 0  # weights of one routed expert; 0 if not known
    dense: bool = False


class Answers:
    """Models and a tokenizer, asked by the explorer. Texts are read in windows of `window` tokens."""

    def __init__(
        self,
        models: Mapping[str, Transformer],
        tokenizer: Tokenizer,
        *,
        window: int | None = None,
        n_devices: int | None = None,
        questions: Sequence[Question] = (),
    ) -> None:
        self.models, self.tokenizer, self.questions = models, tokenizer, questions
        self.window, self.n_devices = window, n_devices
        self._generator = torch.Generator().manual_seed(0)  # leaves the notebook's random numbers alone

    def read(self, name: str, text: str, disabled: Disabled = frozenset()) -> Reading:
        """Read `text` with these experts switched off. Raises InputError for a text that is empty or too long."""
        check_length(self.tokenizer, text)
        model, p = without(self.models[name], disabled), []

        def keep(logits: Tensor) -> None:
            p.append(logits.float().softmax(dim=-1).cpu())

        if dense := model.config.moe is None:
            trace = _dense_trace(model, self.tokenizer, text, self._window(name), keep)
        else:
            trace = RoutingTrace.of(
                model, self.tokenizer, text, window=self.window, n_devices=self.n_devices, on_logits=keep
            )
        right = [*trace.token_ids[1:].tolist(), self._right(text)]
        moe, D = model.config.moe, model.config.d_model
        width = model.config.ffn_width if moe is None else moe.expert_width
        return Reading(trace, torch.cat(p), right, expert_size=3 * D * width, dense=dense)

    def view(self, name: str, text: str, disabled: Disabled) -> tuple[dict[str, Any], RoutingTrace]:
        """Return the view of a model with these experts switched off, and its trace with all experts."""
        intact = self.read(name, text)
        if not disabled:
            return view(name, intact, words=self.word), intact.trace
        return view(name, self.read(name, text, disabled), intact, disabled, self.word), intact.trace

    def most_needed(self, name: str, text: str, disabled: Disabled) -> Disabled:
        """Return `disabled` and the expert used by the last token whose loss hurts the right answer most.

        If the right answer is not known, the likeliest with all experts counts. Shared experts are not tried.
        """
        intact, now = self.read(name, text), self.read(name, text, disabled)
        assert intact.p is not None
        target = intact.right[-1] if intact.right[-1] >= 0 else int(intact.p[-1].argmax())
        left: dict[tuple[int, int], float] = {}
        for layer, experts in enumerate([] if now.dense else now.trace.topk_ids[:, -1].tolist()):
            for e in [e for e in experts if e >= 0]:
                try:
                    p = self.read(name, text, disabled | {(layer, e)}).p
                except InputError:  # too few would be left
                    continue
                assert p is not None
                left[layer, e] = float(p[-1, target])
        return disabled | {min(left, key=left.__getitem__)} if left else disabled

    @torch.no_grad()
    def write(
        self, name: str, text: str, disabled: Disabled, after: Sequence[int], n: int, temperature: float
    ) -> list[dict[str, Any]]:
        """Continue `text` and the ids `after` it by n tokens: {id, word, experts: [expert, gate, kept] per layer}.

        Temperature 0 takes the likeliest token. Raises InputError for a bad text, n or temperature.
        """
        check_length(self.tokenizer, text)
        require_int("n", n, 1, MAX_WRITTEN)
        require_number("temperature", temperature, 0.0)
        model, window, steps = without(self.models[name], disabled), self._window(name), []
        ids = [token_id for token_id, _ in tokenize(self.tokenizer, text)]
        ids = ids[(len(ids) - 1) // window * window :] + list(after)  # the window that the last token is in
        with eval_mode(model):
            for _ in range(n):
                output = model(torch.tensor([ids[-window:]], device=model.embed.weight.device))
                token_id = int(sample(output.logits[:, -1].float(), temperature, generator=self._generator))
                ids.append(token_id)
                chosen = [(r.topk_ids[-1].tolist(), r.gates[-1].tolist(), r.kept[-1].tolist()) for r in output.routings]
                experts = [[list(one) for one in zip(*layer, strict=True) if one[0] >= 0] for layer in chosen]
                steps.append({"id": token_id, "word": self.word(token_id), "experts": experts})
        return steps

    def _window(self, name: str) -> int:
        return self.window or self.models[name].config.max_seq_len

    def word(self, token_id: int) -> str:
        """The characters of a token, "" for the end of a document."""
        return str(self.tokenizer.decode([token_id]))

    def _right(self, text: str) -> int:
        """The first id of the answer, if the text ends with a question whose answer is known; else -1."""
        answers = [answer for prompt, answer in self.questions if text.endswith(prompt)]
        return self.tokenizer.encode(answers[0], add_special_tokens=False).ids[0] if answers else -1


def without(model: Transformer, disabled: Disabled) -> Transformer:
    """Return `model` with these experts switched off: the router chooses among the rest.

    Raises InputError for an expert that does not exist, and if fewer routed experts than a token needs would be left.
    """
    routed: dict[int, set[Any]] = {}
    for layer, expert in disabled:
        if expert != SHARED:
            routed.setdefault(layer, set()).add(expert)
    if shared := [layer for layer, expert in disabled if expert == SHARED]:
        model = silence(model, shared=shared)
    return switch_off(model, routed) if routed else model


def check_length(tokenizer: Tokenizer, text: str) -> None:
    """Raise InputError for a text that is empty or too long, before a model reads it."""
    if not text:
        raise InputError("Type something first.")
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"text = {len(text):,} characters: the explorer takes at most {MAX_CHARACTERS:,}; shorten it")
    check_tokens(sum(1 for _ in tokenize(tokenizer, text)))


def check_tokens(n: int) -> None:
    """Raise InputError if the explorer cannot show n tokens."""
    if n > MAX_TOKENS:
        raise InputError(f"text = {n:,} tokens: the explorer shows at most {MAX_TOKENS}; shorten it")


@torch.no_grad()
def _dense_trace(model: Transformer, tokenizer: Tokenizer, text: str, window: int, keep: Any) -> RoutingTrace:
    pieces = tokenize(tokenizer, text)
    ids, tokens = torch.tensor([token_id for token_id, _ in pieces]), tuple(token for _, token in pieces)
    losses = []
    with eval_mode(model):
        for part in ids.split(window):
            logits = model(part[None].to(model.embed.weight.device)).logits[0].float().cpu()
            losses.append(F.pad(F.cross_entropy(logits[:-1], part[1:], reduction="none"), (1, 0), value=float("nan")))
            keep(logits)
    shape = (model.config.n_layers, len(tokens), 1)
    return RoutingTrace(
        tokens=tokens,
        token_ids=ids.numpy().astype(np.int32),
        domain=("",) * len(tokens),
        token_type=token_types(tokens),
        topk_ids=np.zeros(shape, np.int16),
        gates=np.ones(shape, np.float16),
        kept=np.ones(shape, bool),
        scores=np.ones(shape, np.float16),
        loss=torch.cat(losses).numpy(),
        device_of=np.zeros(1, np.int8),
        n_shared=0,
        n_devices=1,
    )


def view(
    name: str,
    reading: Reading,
    intact: Reading | None = None,
    disabled: Disabled = frozenset(),
    words: Any = str,
) -> dict[str, Any]:
    """Return a reading in the form that the page draws: arrays as bytes, shares as multiples of 1 / 65,535.

    Arrays: ids, gates (of the highest) and kept (bits) are (L, T, K); loss, right (a column of likely) and before are
    (T,); likely (numbers of `words`), p and before_p are (T, 3). before: with all experts, if some are switched off.
    """
    trace = reading.trace
    check_tokens(len(trace.tokens))
    require(trace.n_experts <= NONE, "n_routed_experts", trace.n_experts, f"the explorer shows at most {NONE}")
    gates = trace.gates.astype(np.float64)
    max_gate = float(gates.max()) or 1.0
    return {
        "name": name,
        "tokens": list(trace.tokens),
        "n_layers": trace.n_layers,
        "n_experts": trace.n_experts,
        "n_shared": trace.n_shared,
        "n_devices": trace.n_devices,
        "top_k": trace.top_k,
        "expert_size": reading.expert_size,
        "dense": reading.dense,
        "ids": np.where(trace.topk_ids < 0, NONE, trace.topk_ids).astype("<u2").tobytes(),
        "gates": (gates / max_gate * WHOLE).round().astype("<u2").tobytes(),
        "gate_top": max_gate,
        "kept": np.packbits(trace.kept).tobytes(),
        "devices": trace.device_of.astype(np.uint8).tobytes(),
        "loss": trace.loss.astype("<f4").tobytes(),
        "before": intact.trace.loss.astype("<f4").tobytes() if intact else b"",
        **_likely(reading, intact, words),
        "off": sorted(map(list, disabled), key=lambda pair: (pair[0], -1 if pair[1] == SHARED else pair[1])),
    }


def _likely(reading: Reading, intact: Reading | None, word: Any) -> dict[str, Any]:
    """The likeliest next tokens of each position and their probabilities.

    Among them is the right one, or if that is not known, the likeliest with all experts.
    """
    if reading.p is None:
        return {"words": [], "likely": b"", "right": b"", "p": b"", "before_p": b""}
    top = reading.p.topk(N_LIKELY, dim=1).indices
    right = torch.tensor(reading.right)
    likeliest = (reading if intact is None or intact.p is None else intact).p
    assert likeliest is not None
    wanted = torch.where(right >= 0, right, likeliest.argmax(dim=1))
    missing = ~(top == wanted[:, None]).any(dim=1)
    top[missing, -1] = wanted[missing]
    places = {token_id: n for n, token_id in enumerate(dict.fromkeys(top.flatten().tolist()))}
    where = (top == right[:, None]).int()
    return {
        "words": [word(token_id) for token_id in places],
        "likely": np.array([places[one] for one in top.flatten().tolist()], "<u2").tobytes(),
        "right": where.argmax(dim=1).masked_fill(right < 0, UNKNOWN).numpy().astype(np.uint8).tobytes(),
        "p": _shares(reading.p, top),
        "before_p": b"" if intact is None or intact.p is None else _shares(intact.p, top),
    }


def _shares(p: Tensor, ids: Tensor) -> bytes:
    return (p.gather(1, ids).double().numpy() * WHOLE).round().astype("<u2").tobytes()
