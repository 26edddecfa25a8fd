"""The routing explorer, a widget: which experts does each token of a text choose, layer by layer?"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets
from tokenizers import Tokenizer

from dsmoe_lite.common.errors import InputError, RunError, require, require_int
from dsmoe_lite.config import to_dict
from dsmoe_lite.model import Transformer
from dsmoe_lite.routing.interventions import switch_off
from dsmoe_lite.routing.trace import RoutingTrace, tokenize
from dsmoe_lite.viz import renderer, theme
from dsmoe_lite.viz.packed_model import fingerprint
from dsmoe_lite.viz.token_routing import MAX_TOKENS as MAX_PICTURE_TOKENS
from dsmoe_lite.viz.token_routing import token_routing

STATIC = Path(__file__).parent / "static"
MAX_TOKENS = 512
MAX_CHARACTERS = 8_000
NONE = 0xFFFF  # no expert
MAX_VIEWS = 2

Disabled = frozenset[tuple[int, int]]  # (MoE layer, expert) of experts switched off
Recompute = Callable[[str, str, Disabled], RoutingTrace]  # (name of the model, text, experts switched off)


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
    """Explore one model, or two side by side, with a text that the reader can change.

    window, n_devices: as in `RoutingTrace.of`; layer, expert: shown first, by default layer 0 and its busiest expert.
    The models are copied, so further training does not change the explorer. Raises InputError if the text is empty or
    has more than 512 tokens, if a model has no experts, or if the layer or expert does not exist.
    """

    def recompute(name: str, text: str, disabled: Disabled) -> RoutingTrace:
        _check_length(tokenizer, text)
        by_layer: dict[int, set[int]] = {}
        for i, e in disabled:
            by_layer.setdefault(i, set()).add(e)
        model = switch_off(copies[name], by_layer) if disabled else copies[name]
        return RoutingTrace.of(model, tokenizer, text, window=window, n_devices=n_devices)

    require(1 <= len(models) <= MAX_VIEWS, "models", len(models), f"must be 1 to {MAX_VIEWS}")
    copies = {name: deepcopy(model).eval() for name, model in models.items()}
    traces = {name: recompute(name, text, frozenset()) for name in copies}
    known = [{"weights": fingerprint(model), "config": to_dict(model.config)} for model in copies.values()]
    live = {"models": known, "window": window, "n_devices": n_devices}
    return Explorer(traces, text=text, recompute=recompute, layer=layer, expert=expert, live=live)


class OutOfRangeError(InputError, traitlets.TraitError):
    """A layer, token or expert that does not exist: traitlets restores the old value, also if the page sent it."""


class Explorer(anywidget.AnyWidget):
    """The widget. Without `recompute` it shows recorded traces: text and experts cannot be changed.

    live: the weights and configs of the models, for a page that computes without Python if it has these weights.

    The page draws its traits; `layer`, `token` and `focus` (the expert in focus of each model) can be set.
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
    live: Any = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        traces: Mapping[str, RoutingTrace],
        *,
        text: str | None = None,
        recompute: Recompute | None = None,
        layer: int = 0,
        expert: int | None = None,
        live: Mapping[str, Any] | None = None,
    ) -> None:
        require(1 <= len(traces) <= MAX_VIEWS, "traces", len(traces), f"must be 1 to {MAX_VIEWS}")
        texts = {trace.tokens for trace in traces.values()}
        require(len(texts) == 1, "traces", list(traces), "have different tokens: trace one text with one tokenizer")
        require_int("layer", layer, 0, max(trace.n_layers for trace in traces.values()) - 1)
        if expert is not None:
            require_int("expert", expert, 0, min(trace.n_experts for trace in traces.values()) - 1)
        first = next(iter(traces.values()))
        self._recompute, self._traces = recompute, dict(traces)
        self._disabled: dict[str, Disabled] = dict.fromkeys(traces, frozenset())
        self._css = style()
        super().__init__(
            views=[_view(name, trace) for name, trace in traces.items()],
            text="".join(first.tokens) if text is None else text,
            layer=layer,
            focus=[_busiest(trace, layer) if expert is None else expert for trace in traces.values()],
            can_compute=recompute is not None,
            live=dict(live or {}),
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
        """Handle a request of the page: {"do": "hello" | "route" | "toggle" | "all on", ...}."""
        if self._recompute is None:
            return
        if content.get("do") == "hello":
            self.send({"do": "ready"})
        elif content.get("do") == "route":
            self._show(str(content.get("text", "")), self._disabled)
        elif content.get("do") == "all on":
            self._show(self.text, dict.fromkeys(self._disabled, frozenset()))
        elif content.get("do") == "toggle":
            name = list(self._traces)[content["view"]]
            toggled = frozenset({(content["layer"], content["expert"])})
            self._show(self.text, {**self._disabled, name: self._disabled[name] ^ toggled})

    def _show(self, text: str, disabled: dict[str, Disabled]) -> None:
        """Trace `text` with these experts switched off; on an error, report it and keep the old state."""
        assert self._recompute is not None
        self.busy, self.message = True, ""
        try:
            if text == self.text:
                intact = self._traces
            else:
                intact = {name: self._recompute(name, text, frozenset()) for name in disabled}
            views = []
            for name, experts in disabled.items():
                trace = self._recompute(name, text, experts) if experts else intact[name]
                views.append(_view(name, trace, intact[name], experts))
        except (InputError, RunError) as error:
            self.message = str(error)
        except Exception as error:  # a widget's log is rarely read
            self.message = f"{type(error).__name__}: {error}"
        else:
            self._traces, self._disabled = intact, disabled
            with self.hold_sync():
                self.token = min(self.token, len(views[0]["tokens"]) - 1)
                self.views, self.text = views, text
        finally:
            self.busy = False

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return the live widget and, for pages without scripts, a picture of the first model in this layer."""
        bundle = super()._repr_mimebundle_(**kwargs)
        name, trace = next(iter(self._traces.items()))
        picture = _picture(name, trace, min(self.layer, trace.n_layers - 1), self.focus[0])
        still, metadata = renderer.bundle(picture.to_dict())
        data = {**(bundle[0] if bundle else {}), "image/png": still["image/png"], "text/plain": still["text/plain"]}
        return data, {"image/png": metadata["image/png"]}


def _require_index(name: str, value: Any, n: int) -> int:
    try:
        require_int(name, value, 0, n - 1)
    except InputError as error:
        raise OutOfRangeError(str(error)) from None
    return int(value)


def _check_length(tokenizer: Tokenizer, text: str) -> None:
    """Raise InputError for a text that is too long, before a model reads it."""
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"text = {len(text):,} characters: the explorer takes at most {MAX_CHARACTERS:,}; shorten it")
    _check_tokens(sum(1 for _ in tokenize(tokenizer, text)))


def _check_tokens(n: int) -> None:
    if n > MAX_TOKENS:
        raise InputError(f"text = {n:,} tokens: the explorer shows at most {MAX_TOKENS}; shorten it")


def _view(
    name: str, trace: RoutingTrace, intact: RoutingTrace | None = None, disabled: Disabled = frozenset()
) -> dict[str, Any]:
    """Return a trace in the form that the page reads: arrays as bytes, gates as multiples of the highest / 65,535."""
    _check_tokens(len(trace.tokens))
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
        "ids": np.where(trace.topk_ids < 0, NONE, trace.topk_ids).astype("<u2").tobytes(),
        "gates": (gates / max_gate * 65535).round().astype("<u2").tobytes(),
        "gate_top": max_gate,
        "kept": trace.kept.astype(np.uint8).tobytes(),
        "devices": trace.device_of.astype(np.uint8).tobytes(),
        "loss": trace.loss.astype("<f4").tobytes(),
        "before": intact.loss.astype("<f4").tobytes() if intact is not None and disabled else b"",
        "off": [list(pair) for pair in sorted(disabled)],
    }


def _busiest(trace: RoutingTrace, layer: int) -> int:
    return int(trace.layer(min(layer, trace.n_layers - 1)).counts.argmax())


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


def style() -> str:
    """Return the explorer's CSS: the palette as variables, light and dark, then the rules of explorer.css."""

    def block(selector: str, colours: Mapping[str, str]) -> str:
        return f"{selector} {{ {' '.join(f'--dx-{role}: {colour};' for role, colour in colours.items())} }}\n"

    fonts = {"font": theme.FONT, "mono": theme.MONO}
    dark = ':is([data-jp-theme-light="false"], html[data-theme="dark"]) .dsmoe-explorer'
    rules = (STATIC / "explorer.css").read_text(encoding="utf-8")
    return block(".dsmoe-explorer", theme.LIGHT | fonts) + block(dark, theme.DARK) + rules
