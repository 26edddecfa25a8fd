"""The front page of the book in headless Chromium: its answers are the package's, whatever is switched off."""

import shutil
from dataclasses import replace

import pytest
import torch

from dsmoe_lite import Transformer, load_model
from dsmoe_lite.book import front
from dsmoe_lite.book.models import write_models
from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common import paths
from dsmoe_lite.data.tokenizer import read_tokenizer
from dsmoe_lite.data.world import World
from dsmoe_lite.evaluate import recall
from dsmoe_lite.routing.interventions import silence, switch_off
from dsmoe_lite.viz.packed_model import ENGINE

COUNTED = "() => [...document.querySelectorAll('#lab .known b')].every((known) => known.textContent !== '…')"
NAMES = list(front.MODELS)
LARGE, SMALL = (f"#lab .{name.lower()} .experts" for name in NAMES)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pages = tmp_path_factory.mktemp("front")
    static, notebooks = pages / "_static", sorted(paths.NOTEBOOKS.glob("[0-9]*.ipynb"))
    static.mkdir()
    write_models([], static, front.MODELS.values())
    shutil.copy(ENGINE, static)
    front.write_front(pages, "DeepSeekMoE & more", notebooks)
    return pages


@pytest.fixture(scope="module")
def models():
    """The shipped models without capacities, as the page has them."""
    found = {}
    for name, path in front.MODELS.items():
        shipped = load_model(path)
        moe = replace(shipped.config.moe, capacity_factor=None, eval_capacity_factor=None)
        found[name] = Transformer(replace(shipped.config, moe=moe)).eval()
        found[name].load_state_dict(shipped.state_dict())
    return found


TOKENIZER = read_tokenizer(read_metadata(front.MODELS["GShard"])["tokenizer"])


@pytest.fixture
def opened(browser, site):
    """Open the page at an address; in the end no request has left the machine and the console is quiet."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    outside, errors = [], []

    def only_files(route):
        if route.request.url.startswith(("file:", "blob:", "data:")):
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    def open_(fragment="", size=None):
        page = context.new_page()
        if size:
            page.set_viewport_size(size)
        page.route("**/*", only_files)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(f"{(site / 'index.html').as_uri()}{fragment}")
        page.wait_for_selector(".panels")
        page.wait_for_function(COUNTED)
        return page

    open_.errors = errors
    yield open_
    context.close()
    assert outside == []
    assert errors == []


def known(page):
    page.wait_for_function(COUNTED)
    return [int(text.split(" ")[0]) for text in page.locator("#lab .known b").all_inner_texts()]


@torch.no_grad()
def expected(models, off=({}, {}), shared=False):
    """What the package recalls, of 200 facts."""
    head, counts = World().questions("head"), []
    for name, experts in zip(NAMES, off, strict=True):
        model = switch_off(models[name], experts) if experts else models[name]
        if shared and model.config.moe.n_shared_experts:
            model = silence(model, shared=True)
        counts.append(round(200 * recall(model, TOKENIZER, head)["head"]))
    return counts


def test_a_click_switches_an_expert_off_and_the_facts_left_are_the_packages(opened, models):
    page = opened()
    assert known(page) == expected(models)
    page.locator(LARGE).nth(0).get_by_role("button").nth(6).click()
    page.locator(SMALL).nth(1).get_by_role("button").nth(3).click()  # the first is the shared expert
    assert known(page) == expected(models, ({0: [6]}, {1: [2]}))
    assert page.url.endswith("#q=0&off0=0.6&off1=1.2")
    page.locator(LARGE).nth(0).get_by_role("button").nth(6).click()
    page.locator(SMALL).nth(1).get_by_role("button").nth(3).click()
    assert known(page) == expected(models)
    for layer in range(2):
        page.locator(SMALL).nth(layer).get_by_role("button").nth(0).click()
    assert known(page) == expected(models, shared=True)


@torch.no_grad()
def test_the_answers_are_the_packages(opened, models):
    page = opened()
    for chip in page.get_by_role("group", name="Questions").get_by_role("button").all()[:3]:
        chip.click()
        ids = torch.tensor([TOKENIZER.encode(chip.inner_text()).ids])
        for name in NAMES:
            p, top = models[name](ids).logits[0, -1].softmax(-1).topk(3)
            rows = page.locator(f".{name.lower()} .answer").all_inner_texts()
            assert [row.split()[0] for row in rows] == [TOKENIZER.decode([i]).strip() for i in top.tolist()]
            assert [row.split()[-1] for row in rows] == [f"{share:.0%}" for share in p.tolist()]


def test_the_buttons_break_the_experts_that_the_answer_needs(opened, models):
    page = opened()
    page.get_by_role("button", name="Break what this answer needs most").click()
    first = known(page)
    assert first[0] < 200
    assert "GShard now says" in page.get_by_role("status").inner_text()
    page.get_by_role("button", name="Break one large, four small").click()
    pressed = [page.locator(f"{grid} [aria-pressed=true]").count() for grid in (LARGE, SMALL)]
    assert pressed == [1, 4]
    page.get_by_role("button", name="All on again").click()
    assert known(page) == expected(models)
    page.get_by_role("button", name="Let them write").click()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.written')].every((text) => text.textContent.length > 80)"
    )


@pytest.mark.parametrize("fragment", ["#q=3&off0=0.6,1.2&off1=0.17,1.shared", "#q=x&off0=9.9,a,0.99&off7=1", "#%E0"])
def test_an_address_brings_back_what_was_found(opened, fragment):
    page = opened(fragment)
    pressed = page.locator(".experts [aria-pressed=true]").evaluate_all("all => all.map((one) => one.ariaLabel)")
    if "q=3" in fragment:
        assert [label.split(",")[0] for label in pressed] == [
            "expert 6 of layer 0", "expert 2 of layer 1", "expert 17 of layer 0", "shared expert of layer 1",
        ]  # fmt: skip
        assert page.locator(".chip[aria-pressed=true]").inner_text() == page.locator(".asked").inner_text()
        assert page.url.endswith(fragment)
    else:
        assert pressed == []


def test_too_few_experts_are_refused_in_a_line(opened):
    page = opened(f"#off0={','.join(f'0.{e}' for e in range(14))}")
    page.locator(LARGE).nth(0).get_by_role("button").nth(15).click()
    assert "Only 1 experts are left" in page.get_by_role("status").inner_text()
    assert page.locator(f"{LARGE} [aria-pressed=true]").count() == 14


def test_keys_move_through_the_squares_and_switch(opened):
    page = opened()
    grid = page.locator(LARGE).nth(0)
    grid.get_by_role("button").nth(0).focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    page.keyboard.press("Space")
    assert page.locator(f"{LARGE} [aria-pressed=true]").get_attribute("aria-label").startswith("expert 7 of layer 0")
    assert grid.locator("[tabindex='0']").count() == 1


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_can_be_read_by_all(opened, screenshots, width):
    from axe_playwright_python.sync_playwright import Axe

    page = opened(size={"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.errors == []
    found = Axe().run(page).response["violations"]
    opened.errors.clear()  # axe asks for style sheets, which file:// refuses
    assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []
    page.screenshot(path=screenshots / f"front_{width}.png", full_page=True)
    areas = [
        page.locator(f"{grid} button:not(.shared)").evaluate_all(
            "all => all.reduce((a, b) => a + b.clientWidth ** 2, 0)"
        )
        for grid in (LARGE, SMALL)
    ]
    assert 0.75 <= areas[1] / areas[0] <= 1.05  # 63 small ones, with more gaps between them


def test_links_lead_to_the_chapters_and_a_missing_model_is_one_line(browser, site, tmp_path):
    page = browser.new_page()
    broken = shutil.copytree(site, tmp_path / "broken")
    shutil.rmtree(broken / "_static" / "models")
    page.goto((broken / "index.html").as_uri())
    page.get_by_text("The models are missing from this copy of the book.").wait_for()
    links = page.locator("a").evaluate_all("all => all.map((link) => link.getAttribute('href'))")
    stems = [path.stem for path in sorted(paths.NOTEBOOKS.glob("[0-9]*.ipynb"))]
    assert set(links) == {"playground.html"} | {f"{stem}.html" for stem in stems}
    assert page.locator(".chapters li").count() == len(stems)
    assert page.title() == "DeepSeekMoE & more"
    page.close()


def test_the_film_shows_what_the_models_knew_at_each_step(opened):
    page = opened()
    learning = page.evaluate("window.dsmoeFront.learning")
    assert learning["steps"] == [0, 50, 200, 400, 800, 1200]
    for name, model in zip(NAMES, learning["models"], strict=True):
        final = load_model(paths.DATA / "models" / f"paper-{name.lower()}-seed0.safetensors")
        asked = World().questions("head")
        tokenizer = read_tokenizer(
            read_metadata(paths.DATA / "models" / f"paper-{name.lower()}-seed0.safetensors")["tokenizer"]
        )
        assert model["known"][-1] == round(200 * recall(final, tokenizer, asked)["head"])
        assert model["known"][0] <= 4 < model["known"][-1]  # before training it knows nothing
        panel = page.locator(f"#learning .{name.lower()}")
        for at in (0, 5):
            page.locator("#film").fill(str(at))
            shown = model["answers"][at][0]
            assert f"says {shown['says'] or '∙'}" in panel.inner_text()
            assert f"knows {model['known'][at]} of 200 facts" in panel.inner_text()
            used = panel.locator(".experts span").evaluate_all(
                "all => all.filter((square) => Number(square.style.getPropertyValue('--used')) > 0).length"
            )
            assert used == sum(len(layer) for layer in shown["used"])
    page.get_by_role("button", name="Play", exact=True).click()
    page.wait_for_function("() => document.getElementById('film').value === '1'")
    page.get_by_role("button", name="Pause", exact=True).click()
