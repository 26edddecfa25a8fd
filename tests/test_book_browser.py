"""The built book in headless Chromium: light, dark and on a phone, from files and from a server, without a network."""

import functools
import http.server
import threading
from urllib.parse import urlsplit

import book_fixture
import chart_samples
import pytest
from test_explorer_live_browser import ASK, assert_alike

from dsmoe_lite import load_model
from dsmoe_lite.book.build import build
from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common import paths
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.data.tokenizer import read_tokenizer
from dsmoe_lite.routing.interventions import without_capacity
from dsmoe_lite.study import equations
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.explorer import explore

ALL_DRAWN = "() => [...document.querySelectorAll('figure.chart')].every(figure => figure.dataset.drawn === {mode!r})"
ALL_MOUNTED = "() => [...document.querySelectorAll('.saved-widget')].every(box => box.dataset.mounted)"
ONE_OF_EACH_KIND = """() => {
    const seen = new Set();
    for (const word of document.querySelectorAll('article :is(.highlight pre, .sig) span[class]')) {
        if (seen.has(word.className)) word.replaceWith(...word.childNodes);
        else seen.add(word.className);
    }
    for (const drawing of document.querySelectorAll('mjx-container > svg')) drawing.replaceChildren();
    for (const group of document.querySelectorAll('figure.chart svg g')) {
        const tags = new Set();
        for (const mark of [...group.children]) {
            const kind = mark.tagName + mark.getAttribute('class') + mark.getAttribute('fill');
            if (tags.has(kind)) mark.remove();
            tags.add(kind);
        }
    }
}"""  # axe takes most of its time for thousands of alike words, marks and strokes
LOCAL = ("127.0.0.1", "localhost")
WIDE, PHONE = (1280, 900), (390, 844)
CHAPTER = "01_second.html"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small book")
    return build(book_fixture.write(root), root / "book").parent


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """The course's own book."""
    root = tmp_path_factory.mktemp("course book")
    return build(paths.REPOSITORY / "book.yml", root / "book").parent


class Page:
    """One open page, with its requests to other hosts and its errors."""

    def __init__(self, browser, address, size=WIDE, mode="light"):
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=mode)
        self.page = self.context.new_page()
        self.outside, self.errors = [], []
        self.page.route("**/*", self._only_local)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._listen)
        self.page.goto(address)
        self.page.wait_for_function(ALL_DRAWN.format(mode=mode), timeout=60_000)
        self.page.wait_for_function(ALL_MOUNTED)
        self.page.wait_for_function(
            "() => !document.querySelector('.math') || document.querySelector('.math mjx-container')"
        )

    def _only_local(self, route):
        parts = urlsplit(route.request.url)
        if parts.scheme in ("file", "data", "blob") or parts.hostname in LOCAL:
            route.continue_()
        else:
            self.outside.append(route.request.url)
            route.abort()

    def _listen(self, message):
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def assert_quiet(self):
        assert self.outside == []
        assert self.errors == []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_charts_and_equations_are_drawn(browser, small, mode, size):
    with Page(browser, (small / CHAPTER).as_uri(), size, mode) as opened:
        page = opened.page
        drawings = page.locator("figure.chart svg")
        assert drawings.count() == 2
        assert all(drawings.nth(i).locator("path, text").count() > 20 for i in range(2))
        assert page.locator("div.math mjx-container svg").count() == 2
        assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        card = page.locator("figure.chart svg").first.evaluate("svg => getComputedStyle(svg).backgroundColor")
        assert card == ("rgb(255, 255, 255)" if mode == "light" else "rgb(20, 24, 31)")
        assert_charts_can_be_read(page)
        opened.assert_quiet()


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_pages_have_no_serious_accessibility_faults(browser, small, mode):
    for name in ("00_first.html", CHAPTER, "references.html"):
        with Page(browser, (small / name).as_uri(), mode=mode) as opened:
            assert serious_faults(opened.page) == set()


def serious_faults(page):
    """The serious and critical faults that axe-core finds in the article."""
    from axe_playwright_python.sync_playwright import Axe

    page.evaluate(ONE_OF_EACH_KIND)
    return {
        (violation["id"], node["html"][:200])
        for violation in Axe().run(page, context="article").response["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    }


def test_menus_redraw_and_keep_their_choice_in_another_mode(browser, small):
    with Page(browser, (small / CHAPTER).as_uri()) as opened:
        page, figure = opened.page, opened.page.locator("figure.chart").nth(1)

        def fills():
            return figure.locator("svg .mark-rect path").evaluate_all("marks => marks.map(m => m.getAttribute('fill'))")

        before = fills()
        figure.locator("select").nth(1).select_option(label="e7")
        page.wait_for_timeout(300)
        assert fills() != before
        page.evaluate("document.documentElement.dataset.theme = 'dark'")
        page.wait_for_function(ALL_DRAWN.format(mode="dark"))
        assert figure.locator("select").nth(1).evaluate("menu => menu.selectedOptions[0].label") == "e7"
        opened.assert_quiet()


def assert_charts_can_be_read(page, least=0.0):
    """No chart is wider than its room, shown on a phone at less than `least` of its size, or in letters too small."""
    for figure in page.locator("figure.chart").all():
        drawn, shown, room = figure.evaluate(
            """figure => { const svg = figure.querySelector("svg");
            return [Number(svg.getAttribute("width")), svg.clientWidth, figure.parentElement.clientWidth - 2]; }"""
        )
        sizes = figure.locator("svg text").evaluate_all(
            "texts => texts.map(t => parseFloat(getComputedStyle(t).fontSize))"
        )
        assert min(drawn, room) <= shown <= room
        assert room >= 560 or shown >= least * drawn
        assert min(sizes) * shown / drawn >= theme.MIN_FONT_SIZE * (1 if room < 560 else 0.75)


@pytest.fixture(scope="module")
def every_chart(tmp_path_factory):
    root = tmp_path_factory.mktemp("every chart")
    return build(book_fixture.write(root, tuple(chart_samples.every_chart())), root / "book").parent


def test_every_chart_can_be_read_on_a_phone(browser, every_chart, screenshots):
    with Page(browser, (every_chart / CHAPTER).as_uri(), PHONE) as opened:
        opened.page.screenshot(path=screenshots / "every_chart_on_a_phone.png", full_page=True)
        assert_charts_can_be_read(opened.page)
        opened.assert_quiet()


@pytest.mark.parametrize(("size", "mode"), [(WIDE, "light"), (PHONE, "dark")])
def test_every_control_of_every_chart_answers(browser, every_chart, size, mode):
    with Page(browser, (every_chart / CHAPTER).as_uri(), size, mode) as opened:
        controls = opened.page.locator(".chart-controls :is(input, select)")
        assert controls.count() > 20
        assert all(control.locator("..").inner_text().strip() for control in controls.all())
        assert_charts_answer(opened.page)
        assert_charts_can_be_read(opened.page)
        assert not [error for error in opened.errors if "Infinite extent" not in error]  # of a layer without rows


def test_a_turned_phone_draws_its_charts_again(browser, small):
    with Page(browser, (small / CHAPTER).as_uri(), PHONE) as opened:
        figure = opened.page.locator("figure.chart").first
        names = figure.locator("svg .role-legend-label text")
        assert names.count() == 4  # beside the lines there is no room for them
        opened.page.set_viewport_size({"width": WIDE[0], "height": WIDE[1]})
        opened.page.wait_for_function("() => document.querySelector('figure.chart svg').getAttribute('width') > 560")
        assert names.count() == 0
        opened.page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
        opened.page.wait_for_function("() => document.querySelector('figure.chart svg').getAttribute('width') < 390")
        opened.assert_quiet()


def test_a_keyboard_reaches_the_numbers_of_a_chart(browser, small):
    with Page(browser, (small / CHAPTER).as_uri()) as opened:
        figure = opened.page.locator("figure.chart").nth(1)
        figure.locator("summary").focus()
        opened.page.keyboard.press("Enter")
        cells = figure.locator(".chart-rows tbody tr")
        cells.first.wait_for()
        before = cells.all_inner_texts()
        assert len(before) > 10
        assert figure.locator(".chart-rows th").all_inner_texts() == ["token", "experts", "gates"]
        figure.locator("select").first.select_option(index=1)  # another layer
        opened.page.wait_for_timeout(400)
        after = cells.all_inner_texts()
        assert [row.split("\t")[0] for row in after] == [row.split("\t")[0] for row in before]
        assert after != before
        opened.assert_quiet()


def test_the_book_works_from_a_server(browser, small):
    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=small)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Page(browser, f"http://127.0.0.1:{server.server_port}/index.html") as opened:
            opened.page.wait_for_url("**/00_first.html")
            opened.page.locator("a.right-next").click()
            opened.page.wait_for_url("**/01_second.html")
            opened.page.wait_for_function(ALL_DRAWN.format(mode="light"))
            opened.page.locator("button.search-button-field:visible").first.click()
            opened.page.locator("dialog input[name=q]").fill("experts")
            opened.page.keyboard.press("Enter")
            opened.page.locator("#search-results li a").first.wait_for()
            opened.assert_quiet()
        server.shutdown()


def test_the_book_of_the_course_works(browser, course, screenshots):
    pages = sorted(path.stem for path in paths.NOTEBOOKS.glob("[0-9]*.ipynb"))
    assert pages
    for path in [course / f"{name}.html" for name in pages]:
        for size, mode in ((WIDE, "light"), (PHONE, "dark")):
            with Page(browser, path.as_uri(), size, mode) as opened:
                assert opened.page.evaluate("document.documentElement.scrollWidth") <= size[0]
                assert opened.page.locator("mjx-merror, [data-mjx-error]").count() == 0
                opened.page.screenshot(path=screenshots / f"book_{path.stem}_{mode}.png", full_page=True)
                explorers = opened.page.locator(".saved-widget[data-mounted=yes] .dsmoe-explorer").count()
                assert explorers == (path.name[:2] in {"00", "03", "05", "08"})
                assert_charts_can_be_read(opened.page, least=0.98)
                assert opened.page.locator(".chart-rows[hidden]").count() == 0
                opened.assert_quiet()  # before axe, whose requests for style sheets are blocked
                if size is WIDE:
                    assert_controls_work(opened.page)
                else:  # once per page: axe is slow
                    assert serious_faults(opened.page) == set()


def test_pages_of_text_open_on_a_phone(browser, course, screenshots):
    pages = sorted(course.glob("pages/*.html"))
    assert len(pages) >= 7
    for path in pages:
        with Page(browser, path.as_uri(), PHONE, "dark") as opened:
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
            for picture in opened.page.locator("article img[src$='.svg']").all():
                assert picture.evaluate("image => getComputedStyle(image).filter") == "none"
                assert picture.evaluate("image => image.naturalWidth") > 0
                assert picture.evaluate("image => image.clientWidth / image.naturalWidth") >= 0.7
            opened.page.screenshot(path=screenshots / f"book_{path.stem}_dark.png", full_page=True)
            opened.assert_quiet()
            assert serious_faults(opened.page) == set()


def assert_controls_work(page):
    """Every control of every chart changes its drawing, and every explorer steps to another expert."""
    assert_charts_answer(page)
    for explorer in page.locator(".dsmoe-explorer").all():
        before = explorer.locator(".dx-tokens").first.inner_html()
        explorer.locator(".dx-tokens").first.press("Home")
        explorer.locator(".dx-experts button[tabindex='0']").first.press("End")
        assert explorer.locator(".dx-tokens").first.inner_html() != before
        assert_explorer_answers(page, explorer)


def assert_charts_answer(page):
    """Every slider and menu of every chart changes its drawing."""
    for figure in page.locator("figure.chart").all():
        for control in figure.locator(".chart-controls :is(input, select)").all():
            before = figure.locator("svg").inner_html()
            if control.evaluate("node => node.tagName") == "SELECT":
                chosen = control.evaluate("menu => menu.selectedIndex")
                control.select_option(index=1 if chosen == 0 else 0)
            else:
                control.press("Home" if control.input_value() != control.get_attribute("min") else "End")
            page.wait_for_timeout(300)
            assert figure.locator("svg").inner_html() != before


def assert_explorer_answers(page, explorer):
    """Without Python it traces another text, switches an expert off and on again, and refuses what it cannot read."""
    status, losses = explorer.get_by_role("status"), explorer.locator(".dx-losses").first
    text = explorer.get_by_role("textbox", name="Text")
    ready = "box => !box.querySelector('[aria-busy=true]')"
    for typed, message in (("sum 1+2", ""), ("", "Type something first."), ("a" * 8001, "8,001 characters")):
        text.fill(typed)
        explorer.get_by_role("button", name="Read this text").click()
        page.wait_for_function(ready, arg=explorer.locator("..").element_handle())
        assert message in status.inner_text()
    assert "".join(explorer.locator(".dx-tokens").first.locator("[role=option]").all_inner_texts()) == "sum␣1+2"
    explorer.get_by_role("switch", name="expert 3 of layer 0").first.click()
    losses.get_by_text("from the experts switched off").wait_for()
    explorer.get_by_role("button", name="All experts on").click()
    page.wait_for_function(ready, arg=explorer.locator("..").element_handle())
    assert "switched off" not in losses.inner_text()


@pytest.mark.parametrize(("chapter", "names"), [
    ("00_start_here", ["gshard"]), ("03_who_goes_where", ["gshard"]), ("05_shared_experts", ["gshard", "deepseekmoe"]),
])  # fmt: skip
def test_an_explorer_of_the_book_answers_as_python_does(browser, course, chapter, names):
    """The scripted messages of test_explorer_live_browser, with the models and weights that the book ships."""
    models, question = {}, "Which tool does Ridi Lava have? muda. Which pet does Ridi Lava have?"
    for name in names:
        path = DATA / "models" / f"world-{name}.safetensors"
        models[name] = without_capacity(load_model(path))
    tokenizer = read_tokenizer(read_metadata(path)["tokenizer"])
    with Page(browser, (course / f"{chapter}.html").as_uri()) as opened:
        state = "(() => document.querySelector('.saved-widget:has(.dsmoe-explorer)').model.state)()"
        live, questions = opened.page.evaluate(f"{state}.live"), opened.page.evaluate(f"{state}.questions")
        settings = {name: live[name] for name in ("window", "n_devices")}
        python = explore(models, tokenizer, "x", **settings, questions=[tuple(one) for one in questions])
        requests = [
            {"do": "route", "text": question},
            {"do": "toggle", "view": 0, "layer": 0, "expert": 6},
            {"do": "toggle", "view": len(names) - 1, "layer": 1, "expert": 2},
            {"do": "toggle", "view": len(names) - 1, "layer": 1, "expert": "shared"},
            {"do": "all on"},
            {"do": "break"},
        ]
        for request in requests:
            python._receive(None, request, None)
            found = opened.page.evaluate(ASK, request)
            assert (found["message"], found["text"]) == (python.message, python.text)
            for mine, theirs in zip(python.views, found["views"], strict=True):
                assert_alike(mine, theirs)


def test_the_reference_shows_every_equation_and_no_link_is_dead(course):
    assert book_fixture.assert_links_work(course) > 2000
    text = "".join(path.read_text(encoding="utf-8") for path in course.glob("api/*.html"))
    assert text.count('<div class="api-equation docutils container">') == len(equations.load())


@pytest.mark.parametrize(("size", "mode"), [(WIDE, "dark"), (PHONE, "light")], ids=["wide", "phone"])
def test_the_reference_can_be_read(browser, course, screenshots, size, mode):
    for name in ("index", "layers", "labs", "viz"):
        with Page(browser, (course / "api" / f"{name}.html").as_uri(), size, mode) as opened:
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= size[0]
            assert opened.page.locator("mjx-merror, [data-mjx-error]").count() == 0
            opened.page.screenshot(path=screenshots / f"book_api_{name}_{mode}.png")
            opened.assert_quiet()
            assert serious_faults(opened.page) == set()


def test_the_reference_is_searched(browser, course):
    with Page(browser, f"{(course / 'search.html').as_uri()}?q=sequence_loss") as opened:
        first = opened.page.locator("#search-results li a").first
        first.wait_for()
        assert "layers.html" in first.get_attribute("href")
        assert opened.outside == []
