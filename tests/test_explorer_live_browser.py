"""The explorer in a page that computes without Python: its answers are the package's, its buttons work."""

import functools
import http.server
import json
import shutil
import threading
from dataclasses import replace
from urllib.parse import quote

import numpy as np
import pytest
import torch
from ipywidgets import Widget

from dsmoe_lite import Transformer, load_model, preset
from dsmoe_lite.book import build as book
from dsmoe_lite.book.mime import widget_html
from dsmoe_lite.book.widget_modules import name_of
from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.data.tokenizer import read_tokenizer
from dsmoe_lite.data.world import World
from dsmoe_lite.routing.interventions import without_capacity
from dsmoe_lite.viz.explorer import explore
from dsmoe_lite.viz.packed_model import fingerprint, pack
from dsmoe_lite.viz.page_models import SCRIPTS, write_models

PATHS = {name: DATA / "models" / f"world-{name.lower()}.safetensors" for name in ("GShard", "DeepSeekMoE")}
TOKENIZER = read_tokenizer(read_metadata(PATHS["GShard"])["tokenizer"])
QUESTIONS = [(question.prompt, question.answer) for question in World().questions("head")[:6]]
TEXT = QUESTIONS[0][0]
WINDOW = 12  # shorter than some of the texts
READY = "() => !document.querySelector('[aria-busy=true]')"
ASK = """async (request) => {
    const { model } = document.querySelector('.saved-widget:has(.dsmoe-explorer)');
    const sent = [];
    const listen = (content) => sent.push(content);
    model.on('msg:custom', listen);
    await model.answers.receive(model, request);
    model.off('msg:custom', listen);
    const finite = (list) => [...list].map((x) => (Number.isNaN(x) ? null : x));
    const plain = (value) => (ArrayBuffer.isView(value) ? finite(value) : value);
    const views = model.get('views').map((view) => Object.fromEntries(
        Object.entries(view).map(([name, value]) => [name, plain(value)])));
    return { sent, views, message: model.get('message'), text: model.get('text'), token: model.get('token') };
}"""


@pytest.fixture(scope="module")
def models():
    """The shipped models without capacities and a dense one, with the weights that the page has, in float16."""
    torch.manual_seed(0)
    dense = Transformer(replace(preset("course-dense"), vocab_size=1024, init_std=0.1)).eval()
    found = {"dense": dense, **{name: without_capacity(load_model(path)) for name, path in PATHS.items()}}
    with torch.no_grad():
        for model in found.values():
            for value in model.state_dict().values():
                value.copy_(value.half())
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory, models):
    """A page for each choice of models, with all that the book's pages load."""
    folder = tmp_path_factory.mktemp("live")
    write_models([], folder, PATHS.values())
    dense = fingerprint(models["dense"])
    packed = json.dumps(pack(models["dense"], TOKENIZER))
    (folder / "models" / f"{dense}.js").write_text(f'window.dsmoeModels["{dense}"] = {packed};\n')
    with (folder / "models.js").open("a") as list_of_models:
        list_of_models.write(f'window.dsmoeShipped.push("{dense}");\n')
    for path in (*SCRIPTS, book.STATIC / "widgets.js"):
        shutil.copy(path, folder)

    def page(name, **chosen):
        widget = explore(chosen, TOKENIZER, TEXT, window=WINDOW, questions=QUESTIONS)
        state = json.dumps(Widget.get_manager_state(widgets=[widget])).replace("</", "<\\/")
        scripts = "".join(
            f'<script src="{one}.js"></script>' for one in ("engine", "models", "compute", "answers", "widgets")
        )
        (folder / f"{name}.html").write_text(
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>t</title></head><body><main><h1>t</h1>'
            f'{widget_html({"model_id": widget.model_id})}</main>'
            f'<script type="application/vnd.jupyter.widget-state+json">{state}</script>{scripts}</body></html>',
            encoding="utf-8",
        )  # fmt: skip
        return widget

    page("one", GShard=models["GShard"])
    page("two", **{name: models[name] for name in PATHS})
    page("three", **models)
    return folder


@pytest.fixture
def opened(browser, site):
    """Open a page from a file; in the end the console is quiet."""
    contexts, errors = [], []

    def open_(name="two", fragment="", size=(1280, 900), mode="light", motion="no-preference", script=None):
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=mode, reduced_motion=motion
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        if script:
            page.add_init_script(script)
        page.goto(f"{(site / name).with_suffix('.html').as_uri()}{fragment}")
        page.locator(".saved-widget[data-mounted=yes] .dsmoe-explorer").wait_for()
        if mode == "dark":
            page.evaluate("document.documentElement.dataset.theme = 'dark'")
        page.wait_for_function(READY)
        return page

    open_.errors = errors
    yield open_
    for context in contexts:
        context.close()
    assert errors == []


def click(page, name):
    page.get_by_role("button", name=name).click()
    page.wait_for_function(READY)


def status(page):
    return page.get_by_role("status").inner_text()


def square(page, layer, expert, panel=0):
    """The switch of an expert; where there is a shared one, it is the first."""
    grid = page.locator(".dx-panel").nth(panel).locator(".dx-experts").nth(layer)
    return grid.get_by_role("switch", name=f"{'shared expert' if expert == 'shared' else f'expert {expert}'} of layer")


def assert_alike(mine, theirs):
    """A view of Python's and one of the page's show the same."""
    for name in ("tokens", "n_layers", "n_experts", "n_shared", "n_devices", "top_k", "expert_size", "dense", "off"):
        assert theirs[name] == mine[name], name
    for name, kind in (("ids", "<u2"), ("kept", "u1"), ("devices", "u1"), ("right", "u1")):
        assert theirs[name] == np.frombuffer(mine[name], kind).tolist(), name
    gates = np.frombuffer(mine["gates"], "<u2") / 65535 * mine["gate_top"]
    np.testing.assert_allclose(np.array(theirs["gates"]) / 65535 * theirs["gate_top"], gates, atol=2e-3)
    for name in ("loss", "before"):
        found = np.array([np.nan if x is None else x for x in theirs[name]], float)
        np.testing.assert_allclose(found, np.frombuffer(mine[name], "<f4"), atol=1e-3)
    for name in ("p", "before_p"):
        found = np.array(theirs[name]) / 65535
        np.testing.assert_allclose(found, np.frombuffer(mine[name], "<u2") / 65535, atol=1e-3)
    words = [[view["words"][i] for i in likely] for view, likely in (
        (mine, np.frombuffer(mine["likely"], "<u2")), (theirs, theirs["likely"]))]  # fmt: skip
    assert words[0] == words[1]


def test_the_page_answers_as_python_does(opened, models):
    page, sent = opened("three"), []
    python = explore(models, TOKENIZER, TEXT, window=WINDOW, questions=QUESTIONS)
    python.send = sent.append
    long = f"{TEXT}{QUESTIONS[0][1]}. {QUESTIONS[1][0]}"  # two windows
    everywhere = [[0, "shared"], [1, "shared"]]
    for request in [
        {"do": "route", "text": "sum 1+2"},
        {"do": "route", "text": long},
        {"do": "toggle", "view": 1, "layer": 0, "expert": 6},
        {"do": "toggle", "view": 2, "layer": 1, "expert": "shared"},
        {"do": "write", "n": 6, "temperature": 0, "after": [[], [], []]},
        {"do": "toggle", "view": 2, "layer": 1, "expert": "shared"},
        {"do": "off", "off": [[], [], everywhere]},
        {"do": "route", "text": ""},
        {"do": "route", "text": "日" * 8001},
        {"do": "route", "text": "日" * 400},
        {"do": "toggle", "view": 1, "layer": 0, "expert": 16},
        {"do": "toggle", "view": 1, "layer": 2, "expert": 0},
        {"do": "toggle", "view": 1, "layer": 0, "expert": "shared"},
        {"do": "off", "off": [[], [[1, e] for e in range(15)], []]},
        {"do": "all on"},
        {"do": "break"},
        {"do": "break"},
        {"do": "write", "n": 3, "temperature": 0, "after": [[5], [5, 6], [7]]},
        {"do": "write", "n": 2, "temperature": 0, "after": [[5, 6], [5, 6, 8], [7, 8]]},
        {"do": "write", "n": 20, "temperature": 0, "after": [[5, 6], [5], []]},
        {"do": "write", "n": 0, "temperature": 0, "after": [[], [], []]},
    ]:
        sent.clear()
        python._receive(None, request, None)
        found = page.evaluate(ASK, request)
        assert (found["message"], found["text"], found["token"]) == (python.message, python.text, python.token), request
        for mine, theirs in zip(python.views, found["views"], strict=True):
            assert_alike(mine, theirs)
        if request["do"] == "write":
            (mine,), (theirs,) = sent, found["sent"]
            for one, other in zip(mine["steps"], theirs["steps"], strict=True):
                assert [step["id"] for step in one] == [step["id"] for step in other]
                assert [step["word"] for step in one] == [step["word"] for step in other]
                chosen = [
                    [[[(e, kept) for e, _, kept in layer] for layer in step["experts"]] for step in steps]
                    for steps in (one, other)
                ]
                assert chosen[0] == chosen[1]


def test_a_click_breaks_an_answer_and_a_ghost_remembers_it(opened):
    page = opened("one")
    answers = page.locator(".dx-answers li")
    assert answers.first.inner_text().split() == ["muda", "✓", "right", "98%"]
    assert answers.first.get_attribute("class") == "dx-right"
    assert page.locator(".dx-track b").count() == 0
    square(page, 0, 6).click()
    page.locator(".dx-track b").first.wait_for()
    assert square(page, 0, 6).get_attribute("aria-checked") == "false"
    assert answers.first.get_attribute("class") != "dx-right"
    assert "duli" in answers.first.inner_text()
    assert "was 98%" in page.locator(".dx-right").inner_text()
    page.get_by_role("textbox", name="Text").fill(f"{TEXT} muda.")  # now the loss of the answer is seen as well
    click(page, "Read this text")
    assert page.get_by_label("Colour of the text").input_value() == "change"
    assert "muda" in page.locator(".dx-worse.dx-c3").inner_text()
    assert "from the experts switched off" in page.locator(".dx-losses").inner_text()
    square(page, 0, 6).press("Space")
    page.wait_for_function(READY)
    assert page.get_by_role("switch", checked=False).count() == 0
    assert square(page, 0, 6).evaluate("node => node === document.activeElement")
    page.locator(".dx-tokens").press("Home")
    assert "What comes after “Which”" in page.locator(".dx-panel").inner_text()


def test_discoveries_end_in_a_sentence(opened):
    page = opened()
    click(page, "Break what this answer needs most")
    found = status(page)
    assert "GShard without e6 of layer 0: “muda” goes from 98% to 4%, and the model now says “duli”" in found
    assert "DeepSeekMoE without e40 of layer 0: “muda” goes from 96% to" in found
    assert page.get_by_role("switch", checked=False).count() == 2
    labels = [square.get_attribute("aria-label") for square in page.locator(".dx-focus").all()]
    assert [label.split(",")[0] for label in labels] == ["expert 6 of layer 0", "expert 40 of layer 0"]  # in view
    assert "e6 of layer 0 is switched off" in page.locator(".dx-card").first.inner_text()
    click(page, "All experts on")
    click(page, "Is the shared expert needed?")
    found = status(page)
    assert found.startswith("DeepSeekMoE without its shared expert, in all layers: “muda” goes from 96% to")
    assert "the mean loss of the text changes by" in found
    assert page.get_by_role("switch", name="shared expert", checked=False).count() == 2
    click(page, "All experts on")
    click(page, "Same word, other experts")  # no word of the question comes twice: another text is loaded
    page.get_by_text("Here is a text with such a word.").wait_for()
    model = "document.querySelector('.saved-widget').model"
    text, token, layer = (page.evaluate(f"{model}.get('{name}')") for name in ("text", "token", "layer"))
    assert text != TEXT
    tokens = page.evaluate(f"{model}.get('views')[0].tokens")
    places = [t for t, one in enumerate(tokens) if one == tokens[token]]
    assert len(places) > 1
    assert f"token {token}. In layer {layer}," in status(page)
    page.locator(".dx-tokens").first.press("Home")
    assert "Here is a text" not in status(page)


def test_without_a_shared_expert_nothing_asks_for_it(opened):
    assert opened("one").get_by_role("button", name="Is the shared expert needed?").count() == 0


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_the_models_write_and_stop(opened, models, motion):
    page = opened(motion=motion)
    page.get_by_label("tokens", exact=True).select_option("8")
    page.get_by_role("button", name="Let it write").click()
    page.get_by_role("button", name="Let it write").wait_for()
    page.wait_for_function("() => document.querySelectorAll('.dx-written b').length === 2")
    page.get_by_role("button", name="Stop").wait_for(state="detached")
    python = explore({"GShard": models["GShard"]}, TOKENIZER, TEXT, window=WINDOW)
    sent = []
    python.send = sent.append
    python._receive(None, {"do": "write", "n": 8, "temperature": 0, "after": [[]]}, None)
    words = "".join(step["word"] or " ¶" for step in sent[0]["steps"][0])
    assert page.locator(".dx-written").first.inner_text().strip().endswith(words.strip())
    assert "GShard wrote: " in page.locator("[aria-live]").inner_text()
    page.get_by_label("tokens", exact=True).select_option("64")
    page.get_by_label("temperature").select_option("1")
    page.get_by_role("button", name="Let it write").click()
    if motion == "no-preference":
        page.wait_for_timeout(400)
        page.get_by_role("button", name="Stop").click()
        written = page.locator(".dx-written").first.inner_text()
        page.wait_for_timeout(400)
        assert page.locator(".dx-written").first.inner_text() == written
    square(page, 0, 0).click()
    page.wait_for_function(READY)
    assert page.locator(".dx-written").first.inner_text() == ""


def test_a_link_brings_back_what_was_shown(opened):
    page = opened()
    page.get_by_role("button", name=QUESTIONS[1][0]).click()
    page.wait_for_function(READY)
    square(page, 1, 3).click()
    page.wait_for_function(READY)
    square(page, 0, "shared", panel=1).click()
    page.wait_for_function(READY)
    page.locator(".dx-tokens").first.press("ArrowLeft")
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.get_by_role("button", name="Copy link").click()
    page.wait_for_function("() => window.copied")
    fragment = "#" + page.evaluate("window.copied").split("#")[1]
    state = "() => ['text', 'token', 'layer'].map((name) => document.querySelector('.saved-widget').model.get(name))"
    before = page.evaluate(state)
    again = opened(fragment=fragment)
    again.locator("[role=switch][aria-checked=false]").nth(1).wait_for()
    assert again.evaluate(state) == before
    assert square(again, 1, 3).get_attribute("aria-checked") == "false"
    assert square(again, 0, "shared", panel=1).get_attribute("aria-checked") == "false"
    assert again.get_by_role("switch", checked=False).count() == 2


@pytest.mark.parametrize(
    ("fragment", "message"),
    [("#explorer=0&layer=9&token=1&off0=0.99,0.3,x", "The link asks for expert 0.99, expert x and layer 9, which"),
     ("#explorer=0&text=", "The link asks for this text, which cannot be shown"),
     (f"#explorer=0&off0={','.join(f'0.{e}' for e in range(15))}", "asks for so many experts switched off"),
     ("#explorer=7&layer=1", "Click a square"), ("#a-heading", "Click a square")],
)  # fmt: skip
def test_a_link_with_unknown_values_says_so_and_goes_on(opened, fragment, message):
    page = opened(fragment=quote(fragment, safe="#&=,."))
    page.get_by_role("status").filter(has_text=message).wait_for()
    assert page.get_by_role("switch", checked=False).count() == ("layer=9" in fragment)


KILLED = "() => { window.dsmoeAnswers.patience = 1500; window.dsmoeAnswers.computer.worker.terminate(); }"


def test_a_worker_that_dies_is_started_again_and_the_reader_sees_a_line(opened):
    page = opened("one")
    square(page, 0, 3).click()
    page.wait_for_function(READY)
    page.evaluate(KILLED)
    square(page, 0, 6).click()
    page.get_by_text("had stopped and was started again").wait_for()
    page.wait_for_function(READY)
    assert page.get_by_role("switch", checked=False).count() == 2
    square(page, 0, 6).click()
    page.wait_for_function(READY)
    assert "Click a square" in status(page)


NO_WORKERS = "window.Worker = class { constructor() { throw new DOMException('refused', 'SecurityError'); } };"


def test_no_token_is_read_twice(opened):
    """A switch reads the text with one model, switching back reads nothing, a written token costs one token."""
    page = opened(script=NO_WORKERS)
    costs = page.evaluate(
        f"""async (requests) => {{
            const ask = {ASK};
            await ask(requests[0]);
            const {{ prototype }} = window.dsmoeEngine.Model;
            const {{ forward }} = prototype;
            let read = 0;
            prototype.forward = function (ids, options) {{
                read += ids.length;
                return forward.call(this, ids, options);
            }};
            const costs = [];
            let after = [[], []];
            for (const request of requests) {{
                read = 0;
                const {{ sent }} = await ask({{ ...request, after }});
                if (request.do === 'write') after = after.map((ids, i) => [...ids, sent[0].steps[i][0].id]);
                costs.push(read);
            }}
            return costs;
        }}""",
        [
            {"do": "route", "text": "sum 1+2"},
            {"do": "toggle", "view": 1, "layer": 0, "expert": 5},
            {"do": "toggle", "view": 0, "layer": 0, "expert": 3},
            {"do": "toggle", "view": 1, "layer": 0, "expert": 5},
            {"do": "write", "n": 1, "temperature": 0},
            {"do": "write", "n": 1, "temperature": 0},
            {"do": "write", "n": 1, "temperature": 1},
        ],
    )
    T = len(TOKENIZER.encode("sum 1+2", add_special_tokens=False).ids)
    assert costs == [0, T, T, 0, 2 * T, 2, 2]


@pytest.mark.parametrize(
    "script",
    [NO_WORKERS,
     "window.Worker = class { postMessage() { setTimeout(() => this.onerror(new Event('error'))); } terminate() {} };"],
    ids=["refused", "cannot start"],
)  # fmt: skip
def test_a_page_without_workers_computes_by_itself(opened, script):
    page = opened("one", script=script)
    click(page, "Break what this answer needs most")
    assert page.get_by_role("switch", checked=False).count() == 1
    assert page.evaluate("window.dsmoeAnswers.computer.refused")


def test_the_page_does_not_freeze_while_it_computes(opened):
    """Half a second of work in the worker leaves the page's own thread free."""
    page = opened()
    text = " ".join(prompt for prompt, _ in QUESTIONS * 9)
    longest = page.evaluate(
        """async ([ask, text]) => {
            let [last, longest] = [performance.now(), 0];
            const timer = setInterval(() => {
                longest = Math.max(longest, performance.now() - last);
                last = performance.now();
            }, 10);
            const { model } = document.querySelector('.saved-widget');
            model.emit = () => {}; // drawing is measured elsewhere
            const start = performance.now();
            await model.answers.receive(model, { do: 'route', text });
            await model.answers.receive(model, { do: 'break' });
            clearInterval(timer);
            return [longest, performance.now() - start];
        }""",
        [ASK, text],
    )
    print(f"longest pause {longest[0]:.0f} ms of {longest[1]:.0f} ms")
    assert longest[0] < max(250, longest[1] / 3)


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)], ids=["wide", "phone"])
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_no_accessibility_violations(opened, size, mode, screenshots):
    from axe_playwright_python.sync_playwright import Axe

    page = opened("three", size=size, mode=mode)
    for name in ("Is the shared expert needed?", "Break what this answer needs most"):
        click(page, name)
        violations = Axe().run(page, context=".dsmoe-explorer").response["violations"]
        opened.errors.clear()  # axe asks for style sheets, which file:// refuses
        assert [(one["id"], one["nodes"][0]["html"][:200]) for one in violations] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    page.screenshot(path=screenshots / f"explorer_live_{mode}_{size[0]}.png", full_page=True)


class Strict(http.server.SimpleHTTPRequestHandler):
    """A server whose pages run nothing but scripts and styles of its own."""

    def end_headers(self):
        self.send_header("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'")
        super().end_headers()

    def log_message(self, *_):
        pass


def test_it_answers_under_a_strict_policy(browser, site, models):
    """No Blob is imported, and without a worker of a Blob the page itself computes."""
    widget = explore({"GShard": models["GShard"]}, TOKENIZER, TEXT, window=WINDOW, questions=QUESTIONS)
    (site / "modules").mkdir(exist_ok=True)
    (site / "modules" / f"{name_of(widget._esm)}.js").write_text(widget._esm, encoding="utf-8")
    handler = functools.partial(Strict, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.server_port}/one.html")
        page.locator(".saved-widget[data-mounted=yes] .dsmoe-explorer").wait_for()
        page.wait_for_function(READY)
        click(page, "Break what this answer needs most")
        assert page.get_by_role("switch", checked=False).count() == 1
        assert page.evaluate("window.dsmoeAnswers.computer.refused")
        colour = page.locator(".dsmoe-explorer").evaluate("node => getComputedStyle(node).backgroundColor")
        assert colour == "rgb(255, 255, 255)"  # its style sheet applies
        assert errors == []
        page.close()
        server.shutdown()
