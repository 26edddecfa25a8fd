"""The explorer on a saved page without a kernel: fast, controlled by mouse and keys, accessible."""

import base64
import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from explorer_samples import made_up
from ipywidgets import Widget

from dsmoe_lite.book import build as book
from dsmoe_lite.book.mime import widget_html
from dsmoe_lite.viz.explorer import Explorer

PHONE, WIDE = (390, 844), (1280, 900)
FRAME = """() => new Promise(done => requestAnimationFrame(() => setTimeout(done)))"""


def write_page(folder: Path, *widgets: Explorer) -> str:
    """Write a page with the saved widgets, as in a page of the book; return its address."""
    state = json.dumps(Widget.get_manager_state(widgets=widgets)).replace("</", "<\\/")
    places = "".join(widget_html({"model_id": widget.model_id}) for widget in widgets)
    script = (book.STATIC / "widgets.js").read_text(encoding="utf-8")
    page = folder / "page.html"
    head = '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>t</title></head>'
    saved = f'<script type="application/vnd.jupyter.widget-state+json">{state}</script>'
    body = f"<body><main><h1>t</h1>{places}</main>{saved}<script>{script}</script></body></html>"
    page.write_text(head + body, encoding="utf-8")
    return page.as_uri()


@pytest.fixture
def show(browser, tmp_path):
    """Open a page with widgets; every error in the browser fails the test."""
    contexts, errors = [], []

    def opened(*widgets: Explorer, size=WIDE, mode="light"):
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=mode)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(write_page(tmp_path, *widgets))
        page.locator(".saved-widget[data-mounted=yes] .dsmoe-explorer").last.wait_for()
        if mode == "dark":
            page.evaluate("document.documentElement.dataset.theme = 'dark'")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []


def texts(locator) -> list[str]:
    return [one.strip() for one in locator.all_inner_texts()]


def squares(page, layer=0, panel=0):
    return page.locator(".dx-panel").nth(panel).locator(".dx-experts").nth(layer).get_by_role("switch")


def focus_on(page, expert, layer=0, panel=0):
    squares(page, layer, panel).nth(expert).focus()


def test_tokens_experts_and_the_path_of_a_token_through_every_layer(show):
    trace = made_up(2, 16, 20)
    page = show(Explorer({"GShard": trace}, expert=5))
    tokens = page.locator(".dx-tokens [role=option]")
    assert texts(tokens)[:5] == ["The", "tool", "of", "Ridi", "Lava"]
    assert texts(squares(page)) == ["S", *(f"{e}" for e in range(16))]
    assert page.locator(".dx-tokens [aria-selected=true]").get_attribute("data-i") == "19"  # the token that predicts
    chosen = [t for t in range(20) if 5 in trace.topk_ids[0, t]]
    assert [t for t in range(20) if "dx-chosen" in tokens.nth(t).get_attribute("class")] == chosen
    tokens.nth(7).click()
    for layer in range(2):
        path = page.get_by_role("list", name=f"layer {layer}")
        gates = trace.gates[layer, 7].astype(float)
        expected = [
            f"e{e} {g:.0%} d{trace.device_of[e]}"
            for e, g in zip(trace.topk_ids[layer, 7], gates / gates.sum(), strict=True)
        ]
        assert texts(path.get_by_role("listitem")) == ["shared", *expected]
    assert f"loss {trace.loss[7]:.2f}" in page.locator(".dx-panel").inner_text()
    tokens.nth(3).click()
    dropped = page.locator(".dx-chip.dx-hollow")
    assert "×" in dropped.inner_text()
    assert page.locator(".dx-ribbons path.dx-hollow").count() == 1
    assert f"Mean loss of the text: {trace.mean_loss:.2f}" in page.locator(".dx-losses").inner_text()


def test_squares_say_what_the_selected_token_and_the_text_do_with_them(show):
    trace = made_up(2, 16, 20)
    page = show(Explorer({"GShard": trace}, expert=5))
    page.locator(".dx-tokens [role=option]").nth(7).click()
    for layer in range(2):
        counts = np.bincount(trace.topk_ids[layer].flatten(), minlength=16)
        used = trace.topk_ids[layer, 7].tolist()
        shares = trace.gates[layer, 7].astype(float) / trace.gates[layer, 7].astype(float).sum()
        found = [one.get_attribute("aria-label") for one in squares(page, layer).all()]
        assert found[0] == f"shared expert of layer {layer}, used by every token"
        for e, label in enumerate(found[1:]):
            part = f"{shares[used.index(e)]:.0%} of the gates" if e in used else "not used by this token"
            load = f"{counts[e]} tokens, {counts[e] / counts.mean():.2f} times the mean load"
            assert label == f"expert {e} of layer {layer}, device {trace.device_of[e]}, {part}, {load}"
    strongest = squares(page, 0).nth(1 + int(trace.topk_ids[0, 7, 0]))
    assert "dx-s" in strongest.get_attribute("class")
    assert page.get_by_role("switch", checked=False).count() == 0


def test_a_card_says_what_an_expert_took_and_likes(show):
    trace = made_up(2, 16, 20)
    likes = {"GShard": {(1, 4): "tools"}}
    page = show(Explorer({"GShard": trace}, expert=5, likes=likes))
    card = page.locator(".dx-card")
    taken = {}
    for t, token in enumerate(trace.tokens):
        for e, gate in zip(trace.topk_ids[1, t], trace.gates[1, t].astype(float), strict=True):
            if e == 4:
                taken.setdefault(token.strip() or "↵", []).append(gate)
    squares(page, 1).nth(5).hover()
    ranked = sorted(taken.items(), key=lambda one: -max(one[1]))[:8]
    times = {token: f" ×{len(gates)}" if len(gates) > 1 else "" for token, gates in ranked}
    words = ", ".join(f"{token}{times[token]} {max(gates):.2f}" for token, gates in ranked)
    assert words in card.inner_text()
    assert "e4 of layer 1" in card.inner_text()
    assert "It likes tools." in card.inner_text()
    page.mouse.move(0, 0)
    assert "e5 of layer 0" in card.inner_text()
    squares(page, 0).nth(0).focus()
    assert "takes every token" in card.inner_text()


def test_layers_focus_and_colour_change_what_is_marked(show):
    trace = made_up(4, 16, 20)  # of four layers one is drawn
    page = show(Explorer({"GShard": trace}, expert=0))
    tokens = page.locator(".dx-tokens [role=option]")

    def marked():
        return {t for t in range(20) if "dx-chosen" in (tokens.nth(t).get_attribute("class") or "")}

    def chosen(layer, expert):
        return {t for t in range(20) if expert in trace.topk_ids[layer, t]}

    assert marked() == chosen(0, 0)
    page.get_by_role("button", name="next layer").click()
    assert marked() == chosen(1, 0)
    page.get_by_label("Layer", exact=True).select_option("2")
    assert marked() == chosen(2, 0)
    assert page.locator(".dx-experts").count() == 1
    focus_on(page, 12)
    assert marked() == chosen(2, 11)
    page.get_by_label("Colour of the text").select_option("loss")
    highest = max(range(1, 20), key=lambda t: trace.loss[t])
    assert "dx-s5" in tokens.nth(highest).get_attribute("class")
    assert page.get_by_label("Colour of the text").locator("option").nth(2).is_disabled()  # nothing is switched off


def test_every_layer_of_a_shallow_model_is_drawn(show):
    trace = made_up(3, 16, 20)
    page = show(Explorer({"GShard": trace}, expert=0))
    assert page.locator(".dx-experts").count() == 3
    focus_on(page, 12, layer=2)
    assert page.get_by_label("Layer", exact=True).input_value() == "2"
    tokens = page.locator(".dx-tokens [role=option]")
    marked = [t for t in range(20) if "dx-chosen" in (tokens.nth(t).get_attribute("class") or "")]
    assert marked == [t for t in range(20) if 11 in trace.topk_ids[2, t]]


def test_keys_move_the_selection_and_stay_inside(show):
    page = show(Explorer({"GShard": made_up(2, 16, 40)}))
    page.locator(".dx-tokens").focus()

    def selected():
        return page.locator(".dx-tokens [aria-selected=true]").get_attribute("data-i")

    assert selected() == "39"
    for key, at in (("Home", "0"), ("ArrowRight", "1"), ("ArrowRight", "2"), ("ArrowLeft", "1"), ("End", "39"),
                    ("ArrowRight", "39"), ("Home", "0"), ("ArrowLeft", "0")):  # fmt: skip
        page.keyboard.press(key)
        assert selected() == at
    page.keyboard.press("ArrowDown")
    below = page.locator(".dx-tokens [aria-selected=true]").bounding_box()["y"]
    assert below > page.locator(".dx-tokens [role=option]").first.bounding_box()["y"]
    page.keyboard.press("ArrowUp")
    assert selected() == "0"
    page.keyboard.press("PageDown")
    assert page.get_by_label("Layer", exact=True).input_value() == "1"
    assert "Token 0" in page.locator("[aria-live]").inner_text()
    focus_on(page, 0)
    for key, at in (("ArrowRight", 1), ("End", 16), ("ArrowRight", 16), ("Home", 0), ("ArrowUp", 0)):
        page.keyboard.press(key)
        assert squares(page).nth(at).evaluate("square => square === document.activeElement")
    page.keyboard.press("ArrowDown")
    top = squares(page).first.bounding_box()
    below = page.locator(":focus").bounding_box()
    assert (below["x"], below["y"] > top["y"]) == (top["x"], True)
    stops = page.evaluate(
        "[...document.querySelectorAll('.dsmoe-explorer :is([role=listbox], [role=option], [role=switch])')]"
        ".filter(node => node.tabIndex >= 0).length"
    )
    assert stops == 3  # one for the text, one for the experts of each layer


def test_two_models_move_together(show):
    first, second = made_up(2, 16, 12), made_up(3, 64, 12, top_k=6, seed=1)
    page = show(Explorer({"GShard": first, "DeepSeekMoE": second}))
    panels = page.locator(".dx-panel")
    page.get_by_label("Layer", exact=True).select_option("2")  # the first model has only two
    panels.nth(1).locator(".dx-tokens [role=option]").nth(4).click()
    for panel, trace in ((panels.nth(0), first), (panels.nth(1), second)):
        assert "The path of token 4" in panel.inner_text()
        assert panel.locator(".dx-flow ul").count() == trace.n_layers
    focus_on(page, 64, layer=2, panel=1)
    assert panels.nth(0).locator(".dx-focus").first.inner_text() != "63"
    assert [panel.evaluate("node => node.style.getPropertyValue('--dx-model')") for panel in panels.all()] == [
        "var(--dx-gshard_label)", "var(--dx-deepseekmoe_label)",
    ]  # fmt: skip


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_an_area_is_a_number_of_weights(show, size):
    """16 experts and four times as many of a quarter of the size cover the same area."""
    large, small = made_up(2, 16, 12), made_up(2, 63, 12, top_k=7)
    page = show(Explorer({"GShard": replace(large, n_shared=0), "DeepSeekMoE": small}), size=size)
    areas = [
        page.locator(".dx-panel").nth(panel).locator(".dx-experts").first.locator("button").evaluate_all(
            "all => all.reduce((sum, one) => sum + (one.offsetWidth + 3) ** 2, 0)"
        )
        for panel in range(2)
    ]  # fmt: skip
    assert areas[1] == pytest.approx(areas[0], rel=0.03)


def test_two_explorers_are_independent(show):
    first, second = Explorer({"a": made_up(2, 16, 12)}), Explorer({"b": made_up(2, 8, 12)})
    page = show(first, second)
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(node => node.id)")
    assert len(ids) == len(set(ids)) == 34
    page.locator(".dsmoe-explorer").nth(1).get_by_role("button", name="next layer").click()
    values = page.get_by_label("Layer", exact=True)
    assert [values.nth(i).input_value() for i in range(2)] == ["0", "1"]


def test_a_shorter_text_moves_the_token_inside(show):
    page = show(Explorer({"a": made_up(2, 16, 30)}))
    page.locator(".dx-tokens [role=option]").nth(29).click()
    short = Explorer({"a": made_up(1, 4, 5)}).views
    page.evaluate(
        """([view, packedNames]) => {
            const buffer = text => new DataView(Uint8Array.from(atob(text), letter => letter.charCodeAt(0)).buffer);
            for (const name of packedNames) view[name] = buffer(view[name]);
            document.querySelector('.saved-widget').model.set('views', [view]);
        }""",
        [
            {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in short[0].items()},
            [k for k, v in short[0].items() if isinstance(v, bytes)],
        ],
    )
    assert "token 4" in page.locator(".dx-panel").inner_text()
    assert squares(page).count() == 5
    assert page.get_by_label("Layer", exact=True).locator("option").count() == 1


def test_without_python_the_controls_that_compute_are_disabled(show):
    page = show(Explorer({"a": made_up(1, 4, 5)}))
    for name in ("Read this text", "All experts on", "Break what this answer needs most", "Let it write"):
        assert page.get_by_role("button", name=name).is_disabled()
    assert page.get_by_role("switch", disabled=True).count() == 5
    assert "A recorded trace" in page.get_by_role("status").inner_text()


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_no_accessibility_violations(show, size, mode, screenshots):
    from axe_playwright_python.sync_playwright import Axe

    widgets = (Explorer({"GShard": made_up(2, 16, 40), "DeepSeekMoE": made_up(2, 63, 40, top_k=7)}),)
    page = show(*widgets, size=size, mode=mode)
    for colour in ("gate", "loss"):
        page.get_by_label("Colour of the text").select_option(colour)
        violations = Axe().run(page, context=".dsmoe-explorer").response["violations"]
        assert [(one["id"], one["nodes"][0]["html"][:200]) for one in violations] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    small = page.evaluate(
        "[...document.querySelectorAll('.dsmoe-explorer :is(button, select, [role=option])')]"
        ".map(node => node.getBoundingClientRect()).filter(box => box.width < 24 || box.height < 24).length"
    )
    assert small == 0
    card = page.locator(".dsmoe-explorer").evaluate("node => getComputedStyle(node).backgroundColor")
    assert card == ("rgb(255, 255, 255)" if mode == "light" else "rgb(20, 24, 31)")
    page.screenshot(path=screenshots / f"explorer_{mode}_{size[0]}.png", full_page=True)


def test_first_paint_and_updates_are_fast(show, slowness):
    """Medians, in milliseconds, for 4 layers of 64 experts and 512 tokens; layout and paint included."""
    page = show(Explorer({"large": made_up(4, 64, 512, top_k=6)}))
    first = page.evaluate(
        f"""async () => {{
        const frame = {FRAME};
        const box = document.querySelector('.saved-widget');
        const all = JSON.parse(document.querySelector('script[type*=widget-state]').textContent).state;
        const times = [];
        for (let i = 0; i < 7; i += 1) {{
            await frame();
            const start = performance.now();
            await window.dsmoeMount(box, structuredClone(all[box.dataset.model]));
            await frame();
            times.push(performance.now() - start);
        }}
        return times;
    }}"""
    )
    update = page.evaluate(
        f"""async () => {{
        const frame = {FRAME};
        const layers = document.querySelector('.dx-menu select[id$=layer]');
        const times = [];
        for (let i = 0; i < 12; i += 1) {{
            await frame();
            const start = performance.now();
            if (i % 2) document.querySelectorAll('.dx-experts button')[5 * i].focus();
            else {{ layers.value = (i / 2) % 4; layers.dispatchEvent(new Event('change')); }}
            await frame();
            times.push(performance.now() - start);
        }}
        return times;
    }}"""
    )
    slack = 2 * slowness
    print(f"first paint {statistics.median(first):.0f} ms, update {statistics.median(update):.0f} ms")
    assert statistics.median(first) < 100 * slack
    assert statistics.median(update) < 50 * slack
