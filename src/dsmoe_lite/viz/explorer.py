"""The routing explorer: a text, token by token, and the experts that each token finds, layer by layer."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets
from tokenizers import Tokenizer

from dsmoe_lite.common.errors import InputError, RunError, require, require_whole
from dsmoe_lite.model import Transformer
from dsmoe_lite.routing.interventions import switch_off
from dsmoe_lite.routing.trace import RoutingTrace, cut
from dsmoe_lite.viz import renderer, theme
from dsmoe_lite.viz.tokens import MOST_TOKENS as MOST_IN_PICTURE
from dsmoe_lite.viz.tokens import token_routing

STATIC = Path(__file__).parent / "static"
MOST_TOKENS = 512
MOST_CHARACTERS = 8_000
NONE = 0xFFFF  # no expert
MOST_VIEWS = 2

Off = frozenset[tuple[int, int]]  # (MoE layer, expert) of those switched off
Recompute = Callable[[str, str, Off], RoutingTrace]  # name of the model, text, experts switched off


def explore(
    models: Mapping[str, Transformer],
    tokenizer: Tokenizer,
    text: str,
    *,
    window: int | None = None,
    n_devices: int | None = None,
    layer: int = 0,
    expert: int | None = None,
) -> "Explorer":
    """An explorer of one model or two side by side, for a text that the reader may change.

    window: tokens that a model sees at once, as RoutingTrace.of takes it; n_devices: where experts stand, in order;
    layer, expert: shown first (the busiest expert). The models are copied: training them on does not change the
    explorer. InputError for an empty text, one of more than 512 tokens, a model without experts, a layer or expert that
    is not there.
    """

    def recompute(name: str, text: str, off: Off) -> RoutingTrace:
        _check_length(tokenizer, text)
        by_layer: dict[int, set[int]] = {}
        for at, e in off:
            by_layer.setdefault(at, set()).add(e)
        model = switch_off(own[name], by_layer) if off else own[name]
        return RoutingTrace.of(model, tokenizer, text, window=window, n_devices=n_devices)

    require(1 <= len(models) <= MOST_VIEWS, "models", len(models), f"must be 1 to {MOST_VIEWS}")
    own = {name: deepcopy(model).eval() for name, model in models.items()}
    traces = {name: recompute(name, text, frozenset()) for name in own}
    return Explorer(traces, text=text, recompute=recompute, layer=layer, expert=expert)


class OutOfRangeError(InputError, traitlets.TraitError):
    """A layer, token or expert that is not there: traitlets takes such a value back, also where the page sent it."""


class Explorer(anywidget.AnyWidget):
    """The widget. Without `recompute` it shows recorded traces, and neither text nor experts can be changed.

    Its traits are what the page draws; `layer`, `token` and `focus` (the expert in focus of each model) may be set.
    """

    _esm = STATIC / "explorer.js"
    _css = ""

    views: Any = traitlets.List().tag(sync=True)
    text = traitlets.Unicode().tag(sync=True)
    layer = traitlets.Int(0).tag(sync=True)
    token = traitlets.Int(0).tag(sync=True)
    focus = traitlets.List(traitlets.Int()).tag(sync=True)
    busy = traitlets.Bool(False).tag(sync=True)
    message = traitlets.Unicode().tag(sync=True)
    can_compute = traitlets.Bool(False).tag(sync=True)

    def __init__(
        self,
        traces: Mapping[str, RoutingTrace],
        *,
        text: str | None = None,
        recompute: Recompute | None = None,
        layer: int = 0,
        expert: int | None = None,
    ) -> None:
        require(1 <= len(traces) <= MOST_VIEWS, "traces", len(traces), f"must be 1 to {MOST_VIEWS}")
        same = {trace.tokens for trace in traces.values()}
        require(len(same) == 1, "traces", list(traces), "cut the text into different tokens: trace with one tokenizer")
        require_whole("layer", layer, 0, max(trace.n_layers for trace in traces.values()) - 1)
        if expert is not None:
            require_whole("expert", expert, 0, min(trace.n_routed for trace in traces.values()) - 1)
        first = next(iter(traces.values()))
        self._recompute, self._traces = recompute, dict(traces)
        self._off: dict[str, Off] = dict.fromkeys(traces, frozenset())
        self._css = style()
        super().__init__(
            views=[_view(name, trace) for name, trace in traces.items()],
            text="".join(first.tokens) if text is None else text,
            layer=layer,
            focus=[_busiest(trace, layer) if expert is None else expert for trace in traces.values()],
            can_compute=recompute is not None,
        )
        self.on_msg(self._receive)

    @traitlets.validate("layer")
    def _layer_is_there(self, proposal: Any) -> int:
        return _one_of("layer", proposal["value"], max((view["n_layers"] for view in self.views), default=1))

    @traitlets.validate("token")
    def _token_is_there(self, proposal: Any) -> int:
        return _one_of("token", proposal["value"], max((len(view["tokens"]) for view in self.views), default=1))

    @traitlets.validate("focus")
    def _experts_are_there(self, proposal: Any) -> list[int]:
        focus = list(proposal["value"])
        if len(focus) != len(self.views):
            raise OutOfRangeError(f"focus = {focus}: must be one expert for each of {len(self.views)} models")
        return [_one_of("expert", e, view["n_experts"]) for e, view in zip(focus, self.views, strict=True)]

    def _receive(self, _: Any, content: dict[str, Any], __: Any) -> None:
        """What the page asks for: {"do": "hello" | "route" | "toggle" | "all on", ...}."""
        if self._recompute is None:
            return
        if content.get("do") == "hello":
            self.send({"do": "ready"})
        elif content.get("do") == "route":
            self._show(str(content.get("text", "")), self._off)
        elif content.get("do") == "all on":
            self._show(self.text, dict.fromkeys(self._off, frozenset()))
        elif content.get("do") == "toggle":
            name = list(self._traces)[content["view"]]
            one = frozenset({(content["layer"], content["expert"])})
            self._show(self.text, {**self._off, name: self._off[name] ^ one})

    def _show(self, text: str, off: dict[str, Off]) -> None:
        """Trace `text` with these experts off; what cannot be done leaves all as it was and says why."""
        assert self._recompute is not None
        self.busy, self.message = True, ""
        try:
            same = text == self.text
            whole = self._traces if same else {name: self._recompute(name, text, frozenset()) for name in off}
            now = {name: self._recompute(name, text, off[name]) if off[name] else whole[name] for name in off}
            views = [_view(name, now[name], whole[name], off[name]) for name in off]
        except (InputError, RunError) as error:
            self.message = str(error)
        except Exception as error:  # nobody reads the log of a widget
            self.message = f"{type(error).__name__}: {error}"
        else:
            self._traces, self._off = whole, off
            with self.hold_sync():
                self.token = min(self.token, len(views[0]["tokens"]) - 1)
                self.views, self.text = views, text
        finally:
            self.busy = False

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The live widget and, where no script runs, a picture of the first model in this layer."""
        bundle = super()._repr_mimebundle_(**kwargs)
        name, trace = next(iter(self._traces.items()))
        picture = _picture(name, trace, min(self.layer, trace.n_layers - 1), self.focus[0])
        still, metadata = renderer.bundle(picture.to_dict())
        data = {**(bundle[0] if bundle else {}), "image/png": still["image/png"], "text/plain": still["text/plain"]}
        return data, {"image/png": metadata["image/png"]}


def _one_of(name: str, value: Any, n: int) -> int:
    try:
        require_whole(name, value, 0, n - 1)
    except InputError as error:
        raise OutOfRangeError(str(error)) from None
    return int(value)


def _check_length(tokenizer: Tokenizer, text: str) -> None:
    """Refuse a long text before a model reads it."""
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"text = {len(text):,} characters: the explorer takes at most {MOST_CHARACTERS:,}; shorten it")
    _check_tokens(sum(1 for _ in cut(tokenizer, text)))


def _check_tokens(n: int) -> None:
    if n > MOST_TOKENS:
        raise InputError(f"text = {n:,} tokens: the explorer shows at most {MOST_TOKENS}; shorten it")


def _view(name: str, trace: RoutingTrace, whole: RoutingTrace | None = None, off: Off = frozenset()) -> dict[str, Any]:
    """A trace as the page takes it: plain facts, and arrays as bytes, gates in 65,535ths of the highest."""
    _check_tokens(len(trace.tokens))
    gate = trace.gate.astype(np.float64)
    top = float(gate.max()) or 1.0
    return {
        "name": name,
        "tokens": list(trace.tokens),
        "n_layers": trace.n_layers,
        "n_experts": trace.n_routed,
        "n_shared": trace.n_shared,
        "n_devices": trace.n_devices,
        "top_k": trace.top_k,
        "ids": np.where(trace.expert < 0, NONE, trace.expert).astype("<u2").tobytes(),
        "gates": (gate / top * 65535).round().astype("<u2").tobytes(),
        "gate_top": top,
        "kept": trace.kept.astype(np.uint8).tobytes(),
        "devices": trace.device_of.astype(np.uint8).tobytes(),
        "loss": trace.loss.astype("<f4").tobytes(),
        "before": whole.loss.astype("<f4").tobytes() if whole is not None and off else b"",
        "off": [list(one) for one in sorted(off)],
    }


def _busiest(trace: RoutingTrace, layer: int) -> int:
    return int(trace.layer(min(layer, trace.n_layers - 1)).counts.argmax())


def _picture(name: str, trace: RoutingTrace, layer: int, expert: int) -> Any:
    shown = slice(0, MOST_IN_PICTURE)
    layers = [
        {"topk_ids": trace.expert[i, shown], "gates": trace.gate[i, shown], "kept": trace.kept[i, shown]}
        for i in range(trace.n_layers)
    ]
    mine = (trace.expert[layer] == expert).any(axis=1)
    return token_routing(
        [token or "∙" for token in trace.tokens[shown]],
        layers,
        focus=expert,
        layer=layer,
        title=f"{name}, layer {layer}: who goes to e{expert}?",
        description=f"Routing explorer of {name}: {len(trace.tokens)} tokens in {trace.n_layers} MoE layers of "
        f"{trace.n_routed} experts. In layer {layer}, expert e{expert} is chosen by {mine.sum()} tokens.",
    )


def style() -> str:
    """The explorer's CSS: the theme as variables, light and dark, then its rules."""

    def block(selector: str, colours: Mapping[str, str]) -> str:
        return f"{selector} {{ {' '.join(f'--dx-{role}: {colour};' for role, colour in colours.items())} }}\n"

    fonts = {"font": theme.FONT, "mono": theme.MONO}
    dark = ':is([data-jp-theme-light="false"], html[data-theme="dark"]) .dsmoe-explorer'
    rules = (STATIC / "explorer.css").read_text(encoding="utf-8")
    return block(".dsmoe-explorer", theme.LIGHT | fonts) + block(dark, theme.DARK) + rules
