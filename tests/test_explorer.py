"""The explorer's Python side: the views it sends to the page, its answers to requests, and the input it refuses."""

import base64
import io
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from explorer_samples import made_up
from PIL import Image
from test_trace import CONFIG, TEXT, TOKENIZER, made

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.generate import generate
from dsmoe_lite.model import Transformer
from dsmoe_lite.routing.interventions import silence, switch_off
from dsmoe_lite.routing.trace import RoutingTrace
from dsmoe_lite.viz import explorer as module
from dsmoe_lite.viz.explorer import Explorer, explore
from dsmoe_lite.viz.explorer_answers import NONE, UNKNOWN


def unpacked(view):
    """The arrays of a view, as the page reads them."""
    shape = (view["n_layers"], len(view["tokens"]), view["top_k"])
    return {
        "topk_ids": np.frombuffer(view["ids"], "<u2").reshape(shape),
        "gates": np.frombuffer(view["gates"], "<u2").reshape(shape) / 65535 * view["gate_top"],
        "kept": np.unpackbits(np.frombuffer(view["kept"], np.uint8), count=math.prod(shape))
        .reshape(shape)
        .astype(bool),
        "loss": np.frombuffer(view["loss"], "<f4"),
        "before": np.frombuffer(view["before"], "<f4"),
        "likely": np.frombuffer(view["likely"], "<u2").reshape(-1, 3),
        "right": np.frombuffer(view["right"], np.uint8),
        "p": np.frombuffer(view["p"], "<u2").reshape(-1, 3) / 65535,
        "before_p": np.frombuffer(view["before_p"], "<u2").reshape(-1, 3) / 65535,
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
    [({"do": "route", "text": ""}, "Type something first."),
     ({"do": "route", "text": "x" * 100_000}, "text = 100,000 characters: the explorer takes at most 8,000"),
     ({"do": "route", "text": "x" * 513}, "text = 513 tokens: the explorer shows at most 512"),
     ({"do": "route", "text": "\ud800"}, "half a character"),
     ({"do": "toggle", "view": 0, "layer": 0, "expert": 6}, "expert = 6: must be"),
     ({"do": "toggle", "view": 0, "layer": 7, "expert": 0}, "layer = 7: must be"),
     ({"do": "toggle", "view": 0, "layer": 0, "expert": "shared"}, "the model has no shared experts"),
     ({"do": "off", "off": [[[0, "all"]]]}, "expert = 'all': must be")],
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
    monkeypatch.setattr(RoutingTrace, "of", None)
    asked(widget, do="route", text="日" * 8_000)
    assert "text = 24,000 tokens: the explorer shows at most 512" in widget.message


def test_any_other_error_is_reported_too(monkeypatch):
    widget = explore({"a": made()}, TOKENIZER, TEXT)
    monkeypatch.setattr(RoutingTrace, "of", lambda *_, **__: {}["lost"])
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


def test_shared_experts_are_switched_off_layer_by_layer():
    model = made(n_shared_experts=1)
    widget = explore({"a": model}, TOKENIZER, TEXT)
    asked(widget, do="toggle", view=0, layer=1, expert=3)
    asked(widget, do="toggle", view=0, layer=1, expert="shared")
    without = RoutingTrace.of(switch_off(silence(model, shared=[1]), {1: [3]}), TOKENIZER, TEXT)
    np.testing.assert_array_equal(unpacked(widget.views[0])["loss"], without.loss)
    assert widget.views[0]["off"] == [[1, "shared"], [1, 3]]
    every = [[layer, "shared"] for layer in range(3)]
    asked(widget, do="off", off=[every])
    without = RoutingTrace.of(silence(model, shared=True), TOKENIZER, TEXT)
    np.testing.assert_array_equal(unpacked(widget.views[0])["loss"], without.loss)
    assert widget.views[0]["off"] == every


@torch.no_grad()
def test_the_likeliest_next_tokens_and_the_right_one():
    model, text = made(), "a question?"
    widget = explore({"a": model}, TOKENIZER, text, questions=[("question?", "!")])
    assert widget.token == len(text) - 1  # the token that predicts
    p = model(torch.tensor([TOKENIZER.encode(text).ids])).logits[0].softmax(-1)
    arrays, words = unpacked(widget.views[0]), widget.views[0]["words"]
    for t, right in enumerate(text[1:] + "!"):
        shown = [words[i] for i in arrays["likely"][t]]
        assert shown[arrays["right"][t]] == right
        assert shown[:2] == [TOKENIZER.decode([i]) for i in p[t].topk(2).indices.tolist()]
        at = TOKENIZER.encode(right).ids[0]
        np.testing.assert_allclose(arrays["p"][t][arrays["right"][t]], p[t, at], atol=2e-5)
        np.testing.assert_allclose(arrays["p"][t][:2], p[t].topk(2).values, atol=2e-5)
    assert arrays["before_p"].size == 0
    asked(widget, do="toggle", view=0, layer=0, expert=1)
    after = unpacked(widget.views[0])
    at = after["right"][-1]
    np.testing.assert_allclose(after["before_p"][-1][at], p[-1, TOKENIZER.encode("!").ids[0]], atol=2e-5)
    asked(widget, do="route", text="no question of theirs")
    assert unpacked(widget.views[0])["right"][-1] == UNKNOWN


def test_the_expert_that_an_answer_needs_most_is_switched_off():
    model = made()
    widget = explore({"a": model}, TOKENIZER, "why?", questions=[("why?", "!")])
    trace, answer = RoutingTrace.of(model, TOKENIZER, "why?"), TOKENIZER.encode("!").ids[0]
    used = {(i, int(e)) for i in range(3) for e in trace.topk_ids[i, -1]}
    ids = torch.tensor([TOKENIZER.encode("why?").ids])
    with torch.no_grad():
        left = {pair: switch_off(model, {pair[0]: [pair[1]]})(ids).logits[0, -1].softmax(-1)[answer] for pair in used}
    asked(widget, do="break")
    assert widget.views[0]["off"] == [list(min(left, key=left.get))]
    asked(widget, do="break")
    assert len(widget.views[0]["off"]) == 2


def test_the_models_write_and_say_which_experts_they_used(monkeypatch):
    sent = []
    monkeypatch.setattr(Explorer, "send", lambda self, content: sent.append(content))
    model = made()
    widget = explore({"a": model}, TOKENIZER, "text", window=16)
    asked(widget, do="write", n=5, temperature=0, after=[[]])
    (expected,) = generate(model, [TOKENIZER.encode("text").ids], 5)
    steps = sent[0]["steps"][0]
    assert [step["id"] for step in steps] == expected
    trace = RoutingTrace.of(model, TOKENIZER, "text")
    first = [sorted(e for e, _, _ in layer) for layer in steps[0]["experts"]]
    assert first == [sorted(trace.topk_ids[i, -1].tolist()) for i in range(3)]
    asked(widget, do="write", n=1, temperature=0, after=[expected[:2]])
    assert [step["id"] for step in sent[1]["steps"][0]] == expected[2:3]
    asked(widget, do="write", n=20, temperature=1, after=[expected])  # beyond the window: the oldest are forgotten
    assert len(sent[2]["steps"][0]) == 20
    assert widget.text == "text"
    asked(widget, do="write", n=0, temperature=0, after=[[]])
    assert sent[3]["steps"] == []
    assert "n = 0: must be" in widget.message


def test_a_dense_model_is_one_ffn_per_layer():
    dense = Transformer(replace(CONFIG, moe=None, max_seq_len=16))
    widget = explore({"dense": dense, "a": made(), "b": made(n_shared_experts=1)}, TOKENIZER, "three models in windows")
    view = widget.views[0]
    arrays = unpacked(view)
    assert (view["dense"], view["n_layers"], view["n_experts"]) == (True, 3, 1)
    ids = torch.tensor(TOKENIZER.encode("three models in windows").ids)
    with torch.no_grad():
        logits = dense(ids[None, :16]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[1:16], reduction="none")
    np.testing.assert_allclose(arrays["loss"][1:16], expected, atol=1e-5)
    assert np.isnan(arrays["loss"][16])
    assert widget.colours == ["dense", "line1", "line2"]
    asked(widget, do="break")
    assert [len(one["off"]) for one in widget.views] == [0, 1, 1]
    asked(widget, do="toggle", view=0, layer=0, expert=0)
    assert "has no experts" in widget.message
    assert "expert e" in widget._repr_mimebundle_()[0]["text/plain"]


def test_what_experts_like_and_questions_are_kept_for_the_page():
    widget = explore({"a": made()}, TOKENIZER, TEXT, questions=[("a?", " b")], likes={"a": {(1, 2): "brackets"}})
    assert widget.questions == [["a?", " b"]]
    assert widget.likes == {"a": {"1 2": "brackets"}}


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
        (lambda: explore({}, TOKENIZER, TEXT), "models = 0: must be 1 to 3"),
        (lambda: explore({"a": dense}, TOKENIZER, TEXT), "has no MoE layers"),
        (lambda: explore({"a": made()}, TOKENIZER, ""), "text = '': is empty"),
        (lambda: explore({"a": made()}, TOKENIZER, TEXT, expert=6), "expert = 6: must be"),
        (lambda: explore({"a": made()}, TOKENIZER, TEXT, layer=3), "layer = 3: must be"),
        (lambda: Explorer({}), "traces = 0: must be 1 to 3"),
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
