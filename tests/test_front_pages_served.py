"""The front page and the playground from a server with a strict content security policy, and what they weigh."""

import functools
import http.server
import shutil
import threading

import pytest

from dsmoe_lite.book import front
from dsmoe_lite.book.playground import write_playground
from dsmoe_lite.common import paths
from dsmoe_lite.viz.packed_model import ENGINE
from dsmoe_lite.viz.page_models import write_models

POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'"
HEAVIEST = 6_000_000  # bytes of the front page with both models and the playground


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pages = tmp_path_factory.mktemp("served")
    static, notebooks = pages / "_static", sorted(paths.NOTEBOOKS.glob("[0-9]*.ipynb"))
    static.mkdir()
    write_models([], static, front.MODELS.values())
    shutil.copy(ENGINE, static)
    front.write_front(pages, "A book", notebooks)
    write_playground(pages, "A book", {path.name[:2]: f"{path.stem}.html" for path in notebooks})
    return pages


@pytest.fixture(scope="module")
def address(site):
    class Strict(http.server.SimpleHTTPRequestHandler):
        def end_headers(self):
            self.send_header("Content-Security-Policy", POLICY)
            super().end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Strict, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def page(browser):
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    assert [error for error in errors if "favicon" not in error and "404" not in error] == []


def test_the_models_answer_under_a_strict_policy(page, address):
    page.goto(f"{address}/index.html")
    page.locator("#lab .gshard .experts button").first.click()
    page.wait_for_function(
        "() => [...document.querySelectorAll('#lab .known b')].every((b) => / of /.test(b.textContent))"
    )
    assert page.locator("#lab [aria-pressed=true].chip").count() == 1
    page.locator("#film").fill("5")
    assert "knows 188 of 200 facts" in page.locator("#learning .gshard").inner_text()


def test_the_playground_trains_under_a_strict_policy(page, address):
    page.goto(f"{address}/playground.html#lesson=collapse")
    page.get_by_role("button", name="B paints better").click()
    page.wait_for_selector(".pg-result p", timeout=60_000)
    assert "B paints better." in page.inner_text(".pg-result")


def test_the_pages_are_light(site):
    files = [path for path in site.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < HEAVIEST


def test_the_page_is_painted_before_the_models_arrive(page, address, slowness):
    """First paint, and the time until a reader can click an expert; generous where the machine is slow."""
    page.goto(f"{address}/index.html")
    page.wait_for_selector("#lab .experts button")
    usable = page.evaluate("performance.now()")
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0")
    print(f"first paint {painted:.0f} ms, usable after {usable:.0f} ms")
    assert painted < 1000 * max(1, slowness)
    assert usable < 2000 * max(1, slowness)
