"""The explorer's Python side: the views it sends to the page, its answers to requests, and the input it refuses."""

import base64
import io
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from explorer_samples import made_up
from PIL import Image
from test_trace import CONFIG, TEXT, TOKENIZER, made

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.model import Transformer
from dsmoe_lite.routing.interventions import switch_off
from dsmoe_lite.routing.trace import RoutingTrace
from dsmoe_lite.viz import explorer as module
from dsmoe_lite.viz.explorer import NONE, Explorer, explore


def unpacked(view):
    """The arrays of a view, as the page reads them."""
    shape = (view["n_layers"], len(view["tokens"]), view["top_k"])
    return {
        "topk_ids": np.frombuffer(view["ids"], "<u2").reshape(shape),
        "gates": np.frombuffer(view["gates"], "<u2").reshape(shape) / 65535 * view["gate_top"],
        "kept": np.frombuffer(view["kept"], np.uint8).reshape(shape).astype(bool),
        "loss": np.frombuffer(view["loss"], "<f4"),
        "before": np.frombuffer(view["before"], "<f4"),
    }


def asked(widget: Explorer, **content) -> None:
    widget._receive(widget, content, [])


def test_a_view_contains_the_trace():
    trace = made_up(2, 16, 20, top_k=3)
    (view,) = Explorer({"GShard": trace}).views
    arrays = unpacked(view)
    np.testing.assert_array_equal(arrays["topk_ids"], trace.topk_ids)
    np.testing.assert_array_equal(arrays["kept"], trace.kept)
    np.testing.assert_array_equal(arrays["loss"], trace.loss)
    np.testing.assert_allclose(arrays["gates"], trace.gates, atol=1e-4)
    assert view["tokens"] == list(trace.tokens)
    assert list(view["devices"]) == trace.device_of.tolist()


def test_no_expert_differs_from_expert_0():
    trace = made_up(1, 4, 5)
    trace.topk_ids[0, 2, 1] = -1
    arrays = unpacked(Explorer({"a": trace}).views[0])
    assert arrays["topk_ids"][0, 2, 1] == NONE


def test_experts_switched_off_change_losses_and_can_be_switched_on_again():
    model = made()
    widget = explore({"a": model, "b": made(n_shared_experts=1)}, TOKENIZER, TEXT, window=8)
    intact = RoutingTrace.of(model, TOKENIZER, TEXT, window=8)
    asked(widget, do="toggle", view=0, layer=1, expert=2)
    asked(widget, do="toggle", view=0, layer=2, expert=0)
    ablated = RoutingTrace.of(switch_off(model, {1: [2], 2: [0]}), TOKENIZER, TEXT, window=8)
    first, second = (unpacked(view) for view in widget.views)
    np.testing.assert_array_equal(first["loss"], ablated.loss)
    np.testing.assert_array_equal(first["before"], intact.loss)
    np.testing.assert_array_equal(first["topk_ids"], ablated.topk_ids)
    assert 2 not in first["topk_ids"][1]
    assert widget.views[0]["off"] == [[1, 2], [2, 0]]
    assert second["before"].size == 0
    asked(widget, do="toggle", view=0, layer=1, expert=2)
    assert widget.views[0]["off"] == [[2, 0]]
    asked(widget, do="all on")
    np.testing.assert_array_equal(unpacked(widget.views[0])["loss"], intact.loss)
    assert not widget.busy
    assert widget.message == ""


def test_a_new_text_keeps_the_experts_switched_off():
    widget = explore({"a": made()}, TOKENIZER, TEXT)
    widget.token = len(TEXT) - 1
    asked(widget, do="toggle", view=0, layer=0, expert=1)
    asked(widget, do="route", text="ab")
    assert widget.text == "ab"
    assert widget.views[0]["tokens"] == ["a", "b"]
    assert widget.token == 1
    assert widget.views[0]["off"] == [[0, 1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [({"do": "route", "text": ""}, "text = '': is empty"),
     ({"do": "route", "text": "x" * 100_000}, "text = 100,000 characters: the explorer takes at most 8,000"),
     ({"do": "route", "text": "x" * 513}, "text = 513 tokens: the explorer shows at most 512"),
     ({"do": "route", "text": "\ud800"}, "half a character"),
     ({"do": "toggle", "view": 0, "layer": 0, "expert": 6}, "expert = 6: must be"),
     ({"do": "toggle", "view": 0, "layer": 7, "expert": 0}, "layer = 7: must be")],
)  # fmt: skip
def test_a_refused_request_is_reported_and_changes_nothing(content, message):
    widget = explore({"a": made()}, TOKENIZER, TEXT)
    before = widget.views
    asked(widget, **content)
    assert message in widget.message
    assert "\n" not in widget.message
    assert (widget.views, widget.text, widget.busy) == (before, TEXT, False)
    asked(widget, do="route", text="fine")
    assert widget.message == ""


def test_a_long_text_is_refused_before_any_model_reads_it(monkeypatch):
    widget = explore({"a": made()}, TOKENIZER, TEXT)
    monkeypatch.setattr(module.RoutingTrace, "of", None)
    asked(widget, do="route", text="日" * 8_000)
    assert "text = 24,000 tokens: the explorer shows at most 512" in widget.message


def test_any_other_error_is_reported_too(monkeypatch):
    widget = explore({"a": made()}, TOKENIZER, TEXT)
    monkeypatch.setattr(module.RoutingTrace, "of", lambda *_, **__: {}["lost"])
    asked(widget, do="route", text="ab")
    assert widget.message == "KeyError: 'lost'"
    assert not widget.busy


def test_further_training_does_not_change_the_explorer():
    model = made()
    widget = explore({"a": model}, TOKENIZER, TEXT)
    before = widget.views[0]["loss"]
    with torch.no_grad():
        model.head.weight.zero_()
    asked(widget, do="toggle", view=0, layer=0, expert=0)
    asked(widget, do="all on")
    asked(widget, do="route", text=TEXT)
    assert widget.views[0]["loss"] == before


def test_switching_off_is_refused_if_too_few_experts_are_left():
    widget = explore({"a": made()}, TOKENIZER, TEXT)
    for e in range(5):
        asked(widget, do="toggle", view=0, layer=0, expert=e)
    assert "experts left = 1: must be at least top_k = 2" in widget.message
    assert len(widget.views[0]["off"]) == 4


def test_hello_is_answered_only_where_python_can_compute(monkeypatch):
    sent = []
    monkeypatch.setattr(Explorer, "send", lambda self, content: sent.append(content))
    asked(Explorer({"a": made_up(1, 4, 5)}), do="hello")
    assert sent == []
    asked(explore({"a": made()}, TOKENIZER, TEXT), do="hello")
    assert sent == [{"do": "ready"}]


@pytest.mark.parametrize("text", ["🙂", "日本語", "a\tb\n\nc", " ", "\0", "e\u0301"])
def test_any_text_can_be_shown(text):
    widget = explore({"a": made()}, TOKENIZER, text)
    assert "".join(widget.views[0]["tokens"]) == text
    assert Image.open(io.BytesIO(base64.b64decode(widget._repr_mimebundle_()[0]["image/png"]))).width > 200


def test_refused_when_made():
    dense = Transformer(replace(CONFIG, moe=None))
    trace, other = made_up(1, 4, 5), made_up(1, 4, 6)
    for call, message in (
        (lambda: explore({}, TOKENIZER, TEXT), "models = 0: must be 1 to 2"),
        (lambda: explore({"a": dense}, TOKENIZER, TEXT), "has no MoE layers"),
        (lambda: explore({"a": made()}, TOKENIZER, ""), "text = '': is empty"),
        (lambda: explore({"a": made()}, TOKENIZER, TEXT, expert=6), "expert = 6: must be"),
        (lambda: explore({"a": made()}, TOKENIZER, TEXT, layer=3), "layer = 3: must be"),
        (lambda: Explorer({}), "traces = 0: must be 1 to 2"),
        (lambda: Explorer({"a": trace, "b": other}), "have different tokens"),
        (lambda: Explorer({"a": made_up(1, 4, 513)}), "text = 513 tokens"),
    ):
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("focus", [16], "expert = 16: must be"), ("focus", [0, 0], "one expert for each of 1 models"),
     ("layer", 2, "layer = 2: must be"), ("token", 20, "token = 20: must be")],
)  # fmt: skip
def test_traits_out_of_range_are_refused(name, value, message):
    widget = Explorer({"a": made_up(2, 16, 20)})
    before = getattr(widget, name)
    with pytest.raises(InputError, match=message):
        setattr(widget, name, value)
    assert getattr(widget, name) == before
    with pytest.raises(InputError, match=message):
        widget.set_state({name: value})  # in the form that the page sends
    assert getattr(widget, name) == before


def test_a_page_without_scripts_gets_a_picture_and_a_text():
    widget = explore({"GShard": made()}, TOKENIZER, TEXT, layer=1, expert=3)
    data, metadata = widget._repr_mimebundle_()
    assert set(data) == {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"}
    assert "In layer 1, expert e3 is chosen by" in data["text/plain"]
    assert metadata["image/png"]["width"] <= 720


def test_state_is_small():
    widget = Explorer({"a": made_up(4, 64, 512, top_k=6)})
    arrays = sum(len(value) for value in widget.views[0].values() if isinstance(value, bytes))
    assert arrays < 70_000


def test_colours_come_from_the_theme():
    css = (module.STATIC / "explorer.css").read_text(encoding="utf-8")
    assert "#" not in css.replace("/*", "").replace("*/", "")
    assert "--dx-ramp5: #0B3A66" in Explorer({"a": made_up(1, 4, 5)})._css


def test_trace_of_512_tokens_is_quick(slowness):
    torch.manual_seed(0)
    moe = replace(CONFIG.moe, n_routed_experts=64, top_k=6, expert_width=32)
    model = Transformer(replace(CONFIG, d_model=64, n_layers=4, moe=moe, max_seq_len=64))
    text = "abcdefgh" * 64
    RoutingTrace.of(model, TOKENIZER, text[:64])
    start = time.process_time()
    trace = RoutingTrace.of(model, TOKENIZER, text)
    seconds = time.process_time() - start
    assert trace.topk_ids.shape == (4, 512, 6)
    assert seconds < 2 * slowness
