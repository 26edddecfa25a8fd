"""The front page of the book in headless Chromium: its answers are the package's, whatever is switched off."""

import re
import shutil
from dataclasses import replace
from statistics import median

import pytest
import torch

from dsmoe_lite import Transformer, load_model
from dsmoe_lite.book import front
from dsmoe_lite.book.learning import shown_token
from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common import paths
from dsmoe_lite.common.files import read_json
from dsmoe_lite.data.tokenizer import read_tokenizer
from dsmoe_lite.data.world import World
from dsmoe_lite.evaluate import recall
from dsmoe_lite.routing.interventions import silence, switch_off
from dsmoe_lite.viz.packed_model import ENGINE
from dsmoe_lite.viz.page_models import write_models

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


def status(page):
    """What the page says happened, when all is counted."""
    page.wait_for_function("() => !document.querySelector('.say').textContent.includes('being counted')")
    page.wait_for_function(COUNTED)
    return page.locator("#lab .say").inner_text()


def break_expert(page, grid, layer, n):
    page.locator(grid).nth(layer).get_by_role("button").nth(n).click()
    return status(page)


def question(page, n=0):
    prompt, answer = page.evaluate("n => dsmoeFront.questions[n]", n)
    return prompt, answer.strip()


def share(p):
    return "<1%" if p < 0.005 else f"{p:.0%}"


@torch.no_grad()
def answered(model, prompt):
    """The likeliest next words with their probabilities, and the routing of each layer."""
    output = model(torch.tensor([TOKENIZER.encode(prompt).ids]))
    p, top = output.logits[0, -1].softmax(-1).topk(3)
    return [
        (TOKENIZER.decode([i]).strip(), one) for i, one in zip(top.tolist(), p.tolist(), strict=True)
    ], output.routings


@torch.no_grad()
def knows(model, asked):
    """For each question whether its likeliest next token is the right one."""
    tokens = torch.tensor([TOKENIZER.encode(prompt).ids for prompt, _ in asked])
    right = torch.tensor([TOKENIZER.encode(answer).ids[0] for _, answer in asked])
    return (model(tokens).logits[:, -1].argmax(-1) == right).tolist()


def test_the_answers_are_the_packages(opened, models):
    page = opened()
    for n, chip in enumerate(page.get_by_role("group", name="Questions").get_by_role("button").all()[:3]):
        chip.click()
        prompt, _ = question(page, n)
        assert page.locator(".words button").all_inner_texts() == prompt.replace("?", " ?").split()
        for name in NAMES:
            best, _ = answered(models[name], prompt)
            rows = page.locator(f".{name.lower()} .answer").all_inner_texts()
            assert [row.split()[0] for row in rows] == [word for word, _ in best]
            assert [row.split()[-1] for row in rows] == [share(p) for _, p in best]


# --- the router is seen -----------------------------------------------------------------------------------------------


PICKED = r"""grid => {
  const box = grid.parentElement.getBoundingClientRect();
  const inside = (line, square) => {
    const { left, right, top } = square.getBoundingClientRect();
    const [x, y] = [Number(line.getAttribute("x2")) + box.left, Number(line.getAttribute("y2")) + box.top];
    return left < x && x < right && Math.abs(y - top) < 6;
  };
  const lines = [...grid.parentElement.querySelectorAll("line")];
  const name = (square) => Number(/expert (\d+)/.exec(square.ariaLabel)[1]);
  const squares = [...grid.children].filter((square) => !square.matches(".shared"));
  return {
    linked: lines.map((line) => squares.filter((square) => inside(line, square)).map(name)).flat(),
    coloured: squares.filter((square) => Number(square.style.getPropertyValue("--used")) > 0).map(name),
    read: grid.parentElement.querySelector(".read").textContent,
  };
}"""


@pytest.mark.parametrize("at", [6, 3])
def test_lines_lead_from_the_router_to_the_experts_of_a_word(opened, models, at):
    """The last word at first, another one when it is clicked."""
    page = opened()
    words = page.locator(".words button")
    if at != 6:
        words.nth(at).click()
        assert f"send “{words.nth(at).inner_text()}”" in status(page)
    for grid, name in ((LARGE, NAMES[0]), (SMALL, NAMES[1])):
        _, routings = answered(models[name], question(page)[0])
        for layer, routing in enumerate(routings):
            seen = page.locator(grid).nth(layer).evaluate(PICKED)
            picked = sorted(routing.topk_ids[at].tolist())
            assert sorted(seen["linked"]) == sorted(seen["coloured"]) == picked
            assert seen["read"] == f"“{words.nth(at).inner_text()}”"
    assert page.locator(".words [aria-pressed=true]").count() == 1


def test_the_first_screen_shows_question_answers_routers_squares_and_facts(opened):
    page = opened()
    below = "all => all.map((one) => one.getBoundingClientRect().bottom)"
    for part in (
        ".words button",
        ".answer",
        ".router",
        "#lab .experts button",
        ".legend li",
        "#lab .known b",
        ".strip",
    ):
        bottoms = page.locator(part).evaluate_all(below)
        assert bottoms, part
        assert max(bottoms) <= 900, part
    legend = page.locator(".legend").inner_text()
    for kind in ("picked", "not picked", "shared", "switched off", "true answer"):
        assert kind in legend
    assert page.locator("#lab .panel h2").all_inner_texts()[0].endswith("per layer")
    lead = page.locator(".lead").first.inner_text()
    for word in ("layer", "router", "experts", "GShard", "DeepSeekMoE", "invented"):
        assert word in lead


# --- every switch says what happened ----------------------------------------------------------------------------------


def test_a_switch_says_what_it_did(opened, models):
    page = opened()
    prompt, right = question(page)
    broken = switch_off(models["GShard"], {0: [6]})
    (first, p), *_ = answered(models["GShard"], prompt)[0]
    (now, now_p), *_ = answered(broken, prompt)[0]
    assert first == right != now
    left, _ = expected(models, ({0: [6]}, {}))
    words = page.locator(".words button").all_inner_texts()
    routing = answered(models["GShard"], prompt)[1][0]
    own = [word for word, ids in zip(words, routing.topk_ids.tolist(), strict=True) if 6 in ids]
    said = break_expert(page, LARGE, 0, 6)
    assert said.startswith("GShard: expert 6 of layer 0 is off.")
    assert f"It worked on {' and '.join(f'“{word}”' for word in own)}.\n" in said
    assert f"The answer: now {now} ({share(now_p)}), before {first} ✓ ({share(p)}, now " in said
    assert f"{200 - left} facts lost, {left} of 200 known." in said
    again = break_expert(page, LARGE, 0, 6)
    assert again.startswith("GShard: expert 6 of layer 0 is on again. It works on")
    assert f"{200 - left} facts regained, 200 of 200 known." in again
    number = "one => getComputedStyle(one, '::after').content"
    assert page.locator(f"{LARGE} button").nth(6).evaluate(number) == "none"
    break_expert(page, LARGE, 0, 6)
    assert page.locator(f"{LARGE} button").nth(6).evaluate(number) == '"6"'


def test_an_expert_that_this_question_does_not_use_costs_other_facts(opened, models):
    page = opened()
    routings = answered(models["GShard"], question(page)[0])[1]
    used = set(routings[0].topk_ids.flatten().tolist())
    costs = {e: 200 - expected(models, ({0: [e]}, {}))[0] for e in sorted(set(range(16)) - used)}
    expert = max(costs, key=costs.get)
    assert costs[expert] > 0
    said = break_expert(page, LARGE, 0, expert)
    assert "No word of this question was sent to it.\nThe answer: still muda ✓" in said
    assert f"{costs[expert]} facts lost" in said
    assert said.endswith("Other questions are sent to it.")


def test_another_question_says_which_experts_are_still_off(opened, models):
    page = opened()
    break_expert(page, LARGE, 0, 6)
    page.locator(".chip").nth(1).click()
    said = status(page)
    left, _ = expected(models, ({0: [6]}, {}))
    assert "Still off: GShard, expert 6 of layer 0." in said
    assert f"GShard knows {left} of 200 facts, with all experts 200." in said
    page.get_by_role("button", name="All on again").click()
    page.locator(".chip").nth(2).click()
    assert "All experts are on." in status(page)


def test_the_selected_question_keeps_its_width(opened):
    page = opened()
    places = "all => all.map((one) => one.getBoundingClientRect().left)"
    before = page.locator(".chip").evaluate_all(places)
    page.locator(".chip").nth(2).click()
    assert page.locator(".chip").nth(2).get_attribute("aria-pressed") == "true"
    assert page.locator(".chip").evaluate_all(places) == before


def test_what_was_counted_is_remembered(opened):
    """Back to experts that were counted: the number is there at once, and few questions are asked."""
    page = opened()
    page.evaluate("""() => {
      const { forward } = dsmoeEngine.Model.prototype;
      window.asked = 0;
      dsmoeEngine.Model.prototype.forward = function (...all) { window.asked += 1; return forward.apply(this, all); };
    }""")
    left = break_expert(page, LARGE, 0, 6)
    assert page.evaluate("asked") >= 200
    page.evaluate("asked = 0")
    back = "() => { [...document.querySelectorAll('button')].find((one) => one.textContent === 'All on again').click();"
    back += " return document.querySelector('#lab .gshard .known b').textContent; }"
    assert page.evaluate(back) == "200 of 200"
    assert break_expert(page, LARGE, 0, 6) == left
    assert page.evaluate("asked") < 60


def test_too_few_experts_are_refused_in_a_line(opened):
    page = opened(f"#off0={','.join(f'0.{e}' for e in range(14))}")
    page.locator(LARGE).nth(0).get_by_role("button").nth(15).click()
    said = page.locator("#lab .say").inner_text()
    assert said.startswith(
        "GShard: expert 15 of layer 0 stays on. The router picks 2 experts for every word, and only 1"
    )
    assert page.locator(f"{LARGE} [aria-pressed=true]").count() == 14


# --- the buttons ------------------------------------------------------------------------------------------------------


def test_the_buttons_break_the_experts_that_the_answer_needs(opened, models):
    page = opened()
    page.get_by_role("button", name="Break what this answer needs most").click()
    said, first = status(page), known(page)
    assert first[0] < 200
    lines = said.split("\n")
    assert lines[0].endswith("All others are on.")
    for name, line, left in zip(NAMES, lines[1:], first, strict=True):
        assert line.startswith(f"{name}, expert ")
        lost = 200 - left
        assert line.endswith(f"{lost} {'fact' if lost == 1 else 'facts'} lost, {left} of 200 known.")
    page.get_by_role("button", name="Break one large, four small").click()
    assert "as many weights" in status(page)
    pressed = [page.locator(f"{grid} [aria-pressed=true]").count() for grid in (LARGE, SMALL)]
    assert pressed == [1, 4]
    page.get_by_role("button", name="All on again").click()
    assert known(page) == expected(models)


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_a_broken_square_draws_the_eye_and_the_keyboard(opened, motion):
    page = opened()
    page.emulate_media(reduced_motion=motion)
    page.get_by_role("button", name="Break what this answer needs most").click()
    for grid in (LARGE, SMALL):
        broken = page.locator(f"{grid} [aria-pressed=true]")
        assert "found" in broken.get_attribute("class")
        assert broken.get_attribute("tabindex") == "0"
        animation, outline = broken.evaluate(
            "one => [getComputedStyle(one).animationName, getComputedStyle(one).outlineStyle]"
        )
        assert (animation, outline) == ("none" if motion == "reduce" else "found", "solid")
    break_expert(page, LARGE, 1, 0)
    assert page.locator(".found").count() == 0


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_they_write_in_sight_and_the_squares_return_to_the_question(opened, motion):
    page = opened()
    page.emulate_media(reduced_motion=motion)
    labels = "all => all.map((one) => one.ariaLabel)"
    before = page.locator("#lab .experts button").evaluate_all(labels)
    page.get_by_role("button", name="Let them write").click()
    if motion == "no-preference":  # the squares follow the words that are read
        page.wait_for_function("() => document.querySelector('#lab .read').textContent !== '“?”'")
        assert page.locator("#lab .experts button").evaluate_all(labels) != before
    page.wait_for_function("() => document.querySelector('.say').textContent.includes('went on')", timeout=60_000)
    for text in page.locator(".written").all():
        assert text.bounding_box()["y"] + text.bounding_box()["height"] < 900
        words = text.inner_text()
        assert words.startswith(question(page)[0])
        assert len(words) > 80
        assert words.endswith((".", "…"))
        assert "\ufffd" not in words
    assert page.locator("#lab .experts button").evaluate_all(labels) == before
    assert page.locator("#lab .read").all_inner_texts() == ["“?”"] * 4
    page.locator(".chip").nth(1).click()
    assert page.locator(".written:visible").count() == 0


# --- a dot for each fact ----------------------------------------------------------------------------------------------


def test_the_dots_are_the_facts_that_the_package_knows(opened, models):
    page = opened()
    break_expert(page, LARGE, 0, 6)
    asked = page.evaluate("dsmoeFront.questions")
    broken = switch_off(models["GShard"], {0: [6]})
    for name, model in (("GShard", broken), ("DeepSeekMoE", models["DeepSeekMoE"])):
        right = knows(model, asked)
        strip = page.locator(f"#lab .{name.lower()} .strip")
        dots = strip.locator("i").evaluate_all("all => all.map((dot) => dot.classList.contains('knows'))")
        assert dots == right
        assert f"{sum(right)} of 200 facts known, {200 - sum(right)} lost" in strip.get_attribute("aria-label")
        assert strip.get_attribute("role") == "img"
        examples = []
        for (prompt, answer), known in zip(asked, right, strict=True):
            if not known and len(examples) < 5:
                relation, person = re.fullmatch(r"Which (\w+) does (.+) have\?", prompt).groups()
                (now, _), *_ = answered(model, prompt)[0]
                examples.append(f"{person}’s {relation}: {answer.strip()}, now {now}")
        assert page.locator(f"#lab .{name.lower()} .examples button").all_inner_texts() == examples
    assert len(examples) == 0  # of DeepSeekMoE, whose experts are on


def test_a_dot_is_read_by_pointing_and_a_lost_fact_is_asked_by_a_click(opened, models):
    page = opened()
    break_expert(page, LARGE, 0, 6)
    asked = page.evaluate("dsmoeFront.questions")
    lost = [n for n, right in enumerate(knows(switch_off(models["GShard"], {0: [6]}), asked)) if not right]
    n = next(n for n in lost if n > 41)  # in the second row
    page.locator("#lab .gshard .strip i").nth(n).hover(force=True)
    line = page.locator("#lab .gshard .fact").inner_text()
    prompt, answer = asked[n]
    now, _ = answered(switch_off(models["GShard"], {0: [6]}), prompt)[0][0]
    assert line.startswith(f"{prompt}{answer}. GShard says {now} and DeepSeekMoE says {answer.strip()} ✓.")
    page.locator("#lab .gshard .fact button").click()
    assert page.url.endswith(f"#q={n}&off0=0.6")
    page.locator("#lab .gshard .examples button").nth(1).focus()
    assert page.locator("#lab .gshard .fact").inner_text().startswith(asked[lost[1]][0])
    page.locator("#lab .gshard .examples button").nth(1).click()
    assert page.locator(".words").inner_text().split()[:-1] == asked[lost[1]][0].removesuffix("?").split()
    assert "Still off: GShard, expert 6 of layer 0." in status(page)


# --- addresses, keys, sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fragment", ["#q=3&off0=0.6,1.2&off1=0.17,1.shared", "#q=x&off0=9.9,a,0.99&off7=1", "#%E0"])
def test_an_address_brings_back_what_was_found(opened, fragment):
    page = opened(fragment)
    pressed = page.locator(".experts [aria-pressed=true]").evaluate_all("all => all.map((one) => one.ariaLabel)")
    if "q=3" in fragment:
        assert [label.split(",")[0] for label in pressed] == [
            "expert 6 of layer 0", "expert 2 of layer 1", "expert 17 of layer 0", "shared expert of layer 1",
        ]  # fmt: skip
        assert page.locator(".chip").nth(3).get_attribute("aria-pressed") == "true"
        assert page.locator(".words").inner_text().split()[:-1] == question(page, 3)[0].removesuffix("?").split()
        assert "Still off: GShard, expert 6 of layer 0 and expert 2 of layer 1; DeepSeekMoE, expert 17" in status(page)
        assert page.url.endswith(fragment)
    else:
        assert pressed == []
        assert status(page).startswith("Click a square")


def test_keys_move_through_the_squares_and_switch(opened):
    page = opened()
    grid = page.locator(LARGE).nth(0)
    grid.get_by_role("button").nth(0).focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    page.keyboard.press("Space")
    assert page.locator(f"{LARGE} [aria-pressed=true]").get_attribute("aria-label").startswith("expert 7 of layer 0")
    assert grid.locator("[tabindex='0']").count() == 1


def test_the_keyboard_enters_a_layer_at_its_most_used_expert(opened, models):
    page = opened()
    for n in (0, 1):
        page.locator(".chip").nth(n).click()
        for grid, name in ((LARGE, NAMES[0]), (SMALL, NAMES[1])):
            for layer, routing in enumerate(answered(models[name], question(page, n)[0])[1]):
                best = int(routing.topk_ids[-1][routing.gates[-1].argmax()])
                stops = page.locator(grid).nth(layer).locator("[tabindex='0']")
                assert stops.count() == 1
                assert stops.get_attribute("aria-label").startswith(f"expert {best} of layer {layer}, picked")
    hint = page.locator("#lab .gshard .keys").first
    assert not hint.is_visible()
    page.locator(".words button").last.focus()
    page.keyboard.press("Tab")
    assert hint.is_visible()
    assert "arrows move" in hint.inner_text()


def test_a_finger_finds_every_button_and_both_counts_stay_in_sight(opened):
    page = opened(size={"width": 390, "height": 844})
    break_expert(page, LARGE, 0, 6)
    sizes = page.locator("button, select, input").evaluate_all(
        "all => all.map((one) => one.getBoundingClientRect()).filter(({ width }) => width > 0)"
        ".map(({ width, height }) => Math.min(width, height))"
    )
    assert len(sizes) > 160
    assert min(sizes) >= 24
    page.locator(SMALL).nth(1).get_by_role("button").nth(60).click()
    status(page)
    page.locator(SMALL).nth(1).get_by_role("button").nth(62).scroll_into_view_if_needed()
    assert page.evaluate("scrollY") > 400
    tally = page.locator(".tally")
    assert 0 <= tally.bounding_box()["y"] < 300
    assert [int(text) for text in tally.locator("b").all_inner_texts()] == known(page)


def test_shades_can_be_told_apart_in_the_dark(opened):
    """Luminance contrast of a faint square with an idle one, and of the strongest with the faintest."""
    page = opened()
    for mode in ("light", "dark"):
        page.emulate_media(color_scheme=mode)
        page.wait_for_timeout(300)  # colours move
        found = page.locator("#lab .deepseekmoe .experts").first.evaluate(
            """grid => {
              const context = document.createElement("canvas").getContext("2d");
              return [...grid.children].filter((one) => !one.matches(".shared")).map((one) => {
                context.fillStyle = getComputedStyle(one).backgroundColor;
                context.fillRect(0, 0, 1, 1);
                const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((v) => (v / 255) ** 2.2);
                return [Number(one.style.getPropertyValue("--used")), 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05];
              }).sort((a, b) => a[0] - b[0]).map(([, luminance]) => luminance);
            }"""
        )
        idle, faint, strong = found[0], found[-7], found[-1]
        assert max(idle, faint) / min(idle, faint) > 1.25, mode
        assert max(strong, faint) / min(strong, faint) > 1.5, mode


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
    first = next(
        n for n in range(len(learning["questions"])) if all(m["answers"][-1][n]["right"] for m in learning["models"])
    )
    assert page.get_by_label("question", exact=True).input_value() == str(first)
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
            shown = model["answers"][at][first]
            assert f"says {shown['says']}" in panel.inner_text()
            assert f"knows {model['known'][at]} of 200 facts" in panel.inner_text()
            used = panel.locator(".experts span").evaluate_all(
                "all => all.filter((square) => Number(square.style.getPropertyValue('--used')) > 0).length"
            )
            assert used == sum(len(layer) for layer in shown["used"])
    page.get_by_role("button", name="Play", exact=True).click()
    page.wait_for_function("() => document.getElementById('film').value === '1'")
    page.get_by_role("button", name="Pause", exact=True).click()


def test_the_film_says_only_what_is_so(opened):
    """Whatever question a reader chooses: no broken characters, when the answer was right, which experts remain."""
    page = opened()
    film = page.evaluate("dsmoeFront.learning")
    last = len(film["steps"]) - 1
    for model in film["models"]:
        panel = page.locator(f"#learning .{model['name'].lower()}")
        assert f"ends with {model['known'][-1]} of 200 facts" in panel.locator("h3").inner_text()
        for n in range(len(film["questions"])):
            page.get_by_label("question", exact=True).select_option(str(n))
            answers = [moment[n] for moment in model["answers"]]
            for at, answer in enumerate(answers):
                assert answer["says"] != ""
                assert "\ufffd" not in answer["says"]
                page.locator("#film").fill(str(at))
                so_far = zip(film["steps"][: at + 1], answers, strict=False)
                right = [f"{step:,}" for step, one in so_far if one["right"]]
                when = panel.locator(".when").inner_text()
                assert re.findall(r"\d[\d,]*\d|\d", when) == right
                assert when.endswith("wrong in the end.") == (at == last and bool(right) and not answer["right"])
                ends = [{e for e, _ in layer} for layer in answers[last]["used"]]
                n_used = sum(len(layer) for layer in answer["used"])
                same = sum(e in end for layer, end in zip(answer["used"], ends, strict=True) for e, _ in layer)
                settled = panel.locator(".settled").inner_text()
                assert settled.startswith(
                    "These are the experts" if at == last else f"Of these {n_used} experts, {same or 'none'} will"
                )
    ends = [model["known"][-1] for model in film["models"]]
    lead = page.locator("#learning").locator("xpath=preceding-sibling::p").inner_text()
    assert f"GShard with {ends[0]} and DeepSeekMoE with {ends[1]} of 200" in lead


def test_a_token_is_shown_as_a_word_or_its_bytes(opened):
    """The page and the film name every token alike, and never show half a character."""
    page = opened()
    shown = page.evaluate(
        """async () => {
          const { weights, config } = dsmoeFront.models[0];
          const model = await dsmoeEngine.read({ ...dsmoeModels[weights], config });
          const subject = new dsmoePage.Subject("", model, []);
          return model.tokenizer.vocabulary.map((_, id) => subject.word(id));
        }"""
    )
    assert shown == [shown_token(TOKENIZER, token) for token in range(1024)]
    for words in shown:
        assert words
        assert words.isprintable()
        assert "\ufffd" not in words
    assert "byte e0" in shown


def test_one_result_and_the_playgrounds_picture_come_before_the_chapters(opened):
    page = opened()
    dense, experts = (
        [
            read_json(path)["recall"]["tail"]
            for path in sorted((paths.DATA / "runs" / "neighbours").glob(f"{name}-seed*.json"))
        ]
        for name in ("course-dense-x2", "course-gshard")
    )
    assert len(dense) == len(experts) == 5
    percent = [f"{100 * sum(values) / 5 + 1e-9:.0f}%" for values in (dense, experts)]
    result = page.locator(".result")
    assert result.locator("b").all_inner_texts() == percent
    assert result.bounding_box()["y"] < page.locator(".chapters").bounding_box()["y"]
    picture = page.locator("a.still[href='playground.html'] img")
    picture.scroll_into_view_if_needed()
    assert picture.evaluate("one => one.complete && one.naturalWidth") == 520
    lesson = read_json(paths.DATA / "playground.json")["lessons"]["collapse"]
    for model in "ab":
        assert f"{median(lesson[model]):.0%}" in picture.get_attribute("alt")
    drawn = (front.playground_picture().svg).count("<circle")
    assert drawn == len(lesson["a"]) + len(lesson["b"])


def test_a_helper_is_written_once():
    scripts = [path.read_text(encoding="utf-8") for path in front.SOURCES.glob("*.js")]
    assert sum(text.count("function make(") for text in scripts) == 1
    assert max(text.count("\n") for text in scripts) <= 310
