"""The routing explorer, a widget: what does a model say next, and which experts does each token use, layer by layer?"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import anywidget
import traitlets
from tokenizers import Tokenizer

from dsmoe_lite.common.errors import InputError, RunError, require, require_int
from dsmoe_lite.config import to_dict
from dsmoe_lite.model import Transformer
from dsmoe_lite.routing.trace import RoutingTrace
from dsmoe_lite.viz import identity, renderer, theme
from dsmoe_lite.viz.explorer_answers import Answers, Disabled, Question, Reading, view
from dsmoe_lite.viz.packed_model import fingerprint
from dsmoe_lite.viz.token_routing import MAX_TOKENS as MAX_PICTURE_TOKENS
from dsmoe_lite.viz.token_routing import token_routing

STATIC = Path(__file__).parent / "static"
PARTS = ("helpers", "views", "answers", "tokens", "grid", "path", "panel", "discoveries", "writing", "link",
         "without_kernel", "main")  # fmt: skip
MAX_VIEWS = 3


def explore(
    models: Mapping[str, Transformer],
    tokenizer: Tokenizer,
    text: str,
    *,
    window: int | None = None,
    n_devices: int | None = None,
    layer: int = 0,
    expert: int | None = None,
    questions: Sequence[Question] = (),
    likes: Mapping[str, Mapping[tuple[int, int], str]] | None = None,
) -> "Explorer":
    """Explore one to three models side by side, with a text that the reader can change; one has experts at least.

    window, n_devices: as in `RoutingTrace.of`; layer, expert: in focus first, by default layer 0 and its busiest
    expert. questions: (prompt, answer) to ask with a click; an answer begins with its space. likes: for each model what
    an expert likes, in words, by (MoE layer, expert). The models are copied, so further training does not change the
    explorer. Raises InputError if the text is empty or has more than 512 tokens, if no model has experts, or if the
    layer or expert does not exist.
    """
    require(1 <= len(models) <= MAX_VIEWS, "models", len(models), f"must be 1 to {MAX_VIEWS}")
    require(len(text) > 0, "text", text, "is empty; give at least one character")
    some = any(model.moe_layers for model in models.values())
    require(some, "models", list(models), "has no MoE layers, so there is no routing to explore")
    copies = {name: deepcopy(model).eval() for name, model in models.items()}
    answers = Answers(copies, tokenizer, window=window, n_devices=n_devices, questions=questions)
    known = [{"weights": fingerprint(model), "config": to_dict(model.config)} for model in copies.values()]
    readings = {name: answers.read(name, text) for name in copies}
    live = {"models": known, "window": window, "n_devices": n_devices}
    return Explorer(
        readings, text=text, answers=answers, layer=layer, expert=expert, live=live, questions=questions, likes=likes
    )


class OutOfRangeError(InputError, traitlets.TraitError):
    """A layer, token or expert that does not exist: traitlets restores the old value, also if the page sent it."""


class Explorer(anywidget.AnyWidget):
    """The widget. Without `answers` it shows recorded traces: text and experts cannot be changed.

    live: the weights and configs of the models, for a page that computes without Python if it has these weights.

    The page draws its traits; `layer`, `token` and `focus` (the expert in focus of each model) can be set.
    """

    _esm = ""
    _css = ""

    views: Any = traitlets.List().tag(sync=True)
    text = traitlets.Unicode().tag(sync=True)
    layer = traitlets.Int(0).tag(sync=True)
    token = traitlets.Int(0).tag(sync=True)
    focus = traitlets.List(traitlets.Int()).tag(sync=True)
    busy = traitlets.Bool(False).tag(sync=True)
    message = traitlets.Unicode().tag(sync=True)
    can_compute = traitlets.Bool(False).tag(sync=True)
    live: Any = traitlets.Dict().tag(sync=True)
    questions: Any = traitlets.List().tag(sync=True)
    likes: Any = traitlets.Dict().tag(sync=True)
    colours = traitlets.List(traitlets.Unicode()).tag(sync=True)  # a role of the theme per model

    def __init__(
        self,
        traces: Mapping[str, RoutingTrace | Reading],
        *,
        text: str | None = None,
        answers: Answers | None = None,
        layer: int = 0,
        expert: int | None = None,
        live: Mapping[str, Any] | None = None,
        questions: Sequence[Question] = (),
        likes: Mapping[str, Mapping[tuple[int, int], str]] | None = None,
    ) -> None:
        require(1 <= len(traces) <= MAX_VIEWS, "traces", len(traces), f"must be 1 to {MAX_VIEWS}")
        readings = {name: one if isinstance(one, Reading) else Reading(one) for name, one in traces.items()}
        self._traces = {name: reading.trace for name, reading in readings.items()}
        same = len({trace.tokens for trace in self._traces.values()}) == 1
        require(same, "traces", list(traces), "have different tokens: trace one text with one tokenizer")
        require_int("layer", layer, 0, max(trace.n_layers for trace in self._traces.values()) - 1)
        if expert is not None:
            n = min(reading.trace.n_experts for reading in readings.values() if not reading.dense)
            require_int("expert", expert, 0, n - 1)
        first = next(iter(self._traces.values()))
        self._answers = answers
        self._disabled: dict[str, Disabled] = dict.fromkeys(traces, frozenset())
        self._esm, self._css = script(), style()
        word = answers.word if answers else str
        super().__init__(
            views=[view(name, reading, words=word) for name, reading in readings.items()],
            text="".join(first.tokens) if text is None else text,
            layer=layer,
            token=len(first.tokens) - 1,
            focus=[_in_focus(reading, layer, expert) for reading in readings.values()],
            can_compute=answers is not None,
            live=dict(live or {}),
            colours=[role.removesuffix("_tint") for role in identity.roles(list(traces))],
            questions=[list(question) for question in questions],
            likes={name: {f"{i} {e}": what for (i, e), what in one.items()} for name, one in (likes or {}).items()},
        )
        self.on_msg(self._receive)

    @traitlets.validate("layer")
    def _validate_layer(self, proposal: Any) -> int:
        return _require_index("layer", proposal["value"], max((view["n_layers"] for view in self.views), default=1))

    @traitlets.validate("token")
    def _validate_token(self, proposal: Any) -> int:
        return _require_index("token", proposal["value"], max((len(view["tokens"]) for view in self.views), default=1))

    @traitlets.validate("focus")
    def _validate_focus(self, proposal: Any) -> list[int]:
        focus = list(proposal["value"])
        if len(focus) != len(self.views):
            raise OutOfRangeError(f"focus = {focus}: must be one expert for each of {len(self.views)} models")
        return [_require_index("expert", e, view["n_experts"]) for e, view in zip(focus, self.views, strict=True)]

    def _receive(self, _: Any, content: dict[str, Any], __: Any) -> None:
        """Handle a request of the page: {"do": "hello" | "route" | "toggle" | "off" | "all on" | "break" | "write"}."""
        if self._answers is None:
            return
        what, off = content.get("do"), self._disabled
        if what == "hello":
            self.send({"do": "ready"})
        elif what == "route":
            self._show(str(content.get("text", "")), lambda _: off)
        elif what == "all on":
            self._show(self.text, lambda _: dict.fromkeys(off, frozenset()))
        elif what == "toggle":
            name = list(off)[content["view"]]
            toggled = frozenset({(content["layer"], content["expert"])})
            self._show(self.text, lambda _: {**off, name: off[name] ^ toggled})
        elif what == "off":  # exactly these, for each model
            given = [frozenset((layer, expert) for layer, expert in pairs) for pairs in content["off"]]
            self._show(self.text, lambda _: dict(zip(off, given, strict=True)))
        elif what == "break":
            self._show(self.text, lambda answers: {k: answers.most_needed(k, self.text, v) for k, v in off.items()})
        elif what == "write":
            self._write(content)

    def _show(self, text: str, choose: Callable[[Answers], dict[str, Disabled]]) -> None:
        """Read `text` without the experts that `choose` returns; on an error, report it and keep the old state."""
        assert self._answers is not None
        self.busy, self.message = True, ""
        try:
            off = choose(self._answers)
            views, traces = zip(*(self._answers.view(name, text, off[name]) for name in off), strict=True)
        except Exception as error:
            self.message = _in_words(error)
        else:
            self._traces, self._disabled = dict(zip(off, traces, strict=True)), off
            with self.hold_sync():
                is_new, self.views, self.text = text != self.text, list(views), text
                if is_new:
                    self.token = len(traces[0].tokens) - 1  # the one that predicts
        finally:
            self.busy = False

    def _write(self, content: dict[str, Any]) -> None:
        """Send the page {"do": "wrote", "steps": n tokens of each model}; none of them after an error."""
        assert self._answers is not None
        steps: list[Any] = []
        try:
            given = zip(self._disabled.items(), content["after"], strict=True)
            n, temperature = content["n"], content["temperature"]
            steps = [self._answers.write(k, self.text, off, after, n, temperature) for (k, off), after in given]
        except Exception as error:
            self.message = _in_words(error)
        self.send({"do": "wrote", "steps": steps})

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return the live widget and, for pages without scripts, a picture of a model with experts in this layer."""
        bundle = super()._repr_mimebundle_(**kwargs)
        shown = next(i for i, one in enumerate(self.views) if not one["dense"])
        name, trace = list(self._traces.items())[shown]
        picture = _picture(name, trace, min(self.layer, trace.n_layers - 1), self.focus[shown])
        still, metadata = renderer.bundle(picture.to_dict())
        data = {**(bundle[0] if bundle else {}), "image/png": still["image/png"], "text/plain": still["text/plain"]}
        return data, {"image/png": metadata["image/png"]}


def _in_words(error: Exception) -> str:
    """An error in one line for the page: a widget's log is rarely read."""
    return str(error) if isinstance(error, InputError | RunError) else f"{type(error).__name__}: {error}"


def _require_index(name: str, value: Any, n: int) -> int:
    try:
        require_int(name, value, 0, n - 1)
    except InputError as error:
        raise OutOfRangeError(str(error)) from None
    return int(value)


def _in_focus(reading: Reading, layer: int, expert: int | None) -> int:
    trace = reading.trace
    if reading.dense:
        return 0
    return int(trace.layer(min(layer, trace.n_layers - 1)).counts.argmax()) if expert is None else expert


def _picture(name: str, trace: RoutingTrace, layer: int, expert: int) -> Any:
    shown = slice(0, MAX_PICTURE_TOKENS)
    layers = [
        {"topk_ids": trace.topk_ids[i, shown], "gates": trace.gates[i, shown], "kept": trace.kept[i, shown]}
        for i in range(trace.n_layers)
    ]
    chosen = (trace.topk_ids[layer] == expert).any(axis=1)
    return token_routing(
        [token or "∙" for token in trace.tokens[shown]],
        layers,
        focus=expert,
        layer=layer,
        title=f"{name}, layer {layer}: which tokens go to e{expert}?",
        description=f"Routing explorer of {name}: {len(trace.tokens)} tokens in {trace.n_layers} MoE layers of "
        f"{trace.n_experts} experts. In layer {layer}, expert e{expert} is chosen by {chosen.sum()} tokens.",
    )


def script() -> str:
    """Return the explorer's script: the files of static/explorer, one module together."""
    files = (STATIC / "explorer" / f"{name}.js" for name in PARTS)
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def style() -> str:
    """Return the explorer's CSS: the palette as variables, light and dark, then the rules of explorer.css."""

    def block(selector: str, colours: Mapping[str, str]) -> str:
        return f"{selector} {{ {' '.join(f'--dx-{role}: {colour};' for role, colour in colours.items())} }}\n"

    fonts = {"font": theme.FONT, "mono": theme.MONO}
    dark = ':is([data-jp-theme-light="false"], html[data-theme="dark"]) .dsmoe-explorer'
    rules = (STATIC / "explorer.css").read_text(encoding="utf-8")
    return block(".dsmoe-explorer", theme.LIGHT | fonts) + block(dark, theme.DARK) + rules
