"""Live controls: redrawn with the latest values, at most twice per second; errors are reported in one line."""

import asyncio
from itertools import pairwise
from types import SimpleNamespace

import ipywidgets
import pytest
from IPython.display import Markdown

from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.viz import live as module


class Shown:
    """Stands in for the displayed chart: collects its updates."""

    def __init__(self) -> None:
        self.charts: list[object] = []

    def update(self, chart: object) -> None:
        self.charts.append(chart)


@pytest.fixture
def page(monkeypatch):
    """What `live` displays: the bundle of its controls, then the chart."""
    seen = SimpleNamespace(bundles=[], first=[], shown=Shown())

    def display(value, *, raw=False, display_id=False):
        if display_id:
            seen.first.append(value)
            return seen.shown
        seen.bundles.append(value)
        return None

    def status():
        seen.status = make_status()
        return seen.status

    make_status = module._Status
    monkeypatch.setattr(module, "display", display)
    monkeypatch.setattr(module, "_Status", status)
    return seen


def control(value: int = 2, **options) -> ipywidgets.IntSlider:
    return ipywidgets.IntSlider(value, min=0, max=100, **options)


def test_the_first_chart_has_the_initial_values(page):
    module.live(lambda k: f"chart {k}", k=control(description="top-k"))
    assert page.first == ["chart 2"]
    assert page.bundles[0]["text/plain"] == "JupyterLab shows controls here: top-k."
    assert "application/vnd.jupyter.widget-view+json" in page.bundles[0]


def test_without_an_event_loop_every_change_redraws(page):
    k = control()
    module.live(lambda k: f"chart {k}", k=k)
    k.value = 3
    k.value = 4
    assert page.shown.charts == ["chart 3", "chart 4"]


def test_many_changes_are_at_most_two_redraws_per_second_ending_with_the_latest(page, monkeypatch):
    monkeypatch.setattr(module, "REDRAW_INTERVAL", 0.2)
    k, times = control(), []

    def draw(k):
        times.append(asyncio.get_running_loop().time() if page.first else 0.0)
        return f"chart {k}"

    async def move():
        module.live(draw, k=k)
        start = asyncio.get_running_loop().time()
        for value in range(3, 33):
            k.value = value
            assert "Computing" in page.status.value
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)
        return asyncio.get_running_loop().time() - start

    seconds = asyncio.run(move())
    gaps = [later - earlier for earlier, later in pairwise(times[1:])]
    assert page.shown.charts[-1] == "chart 32"
    assert 2 <= len(page.shown.charts) <= seconds / module.REDRAW_INTERVAL + 1  # of 30 moves
    assert min(gaps) >= 0.19
    assert page.status.value.endswith("></span>")  # no message


@pytest.mark.parametrize(
    "error", [InputError("top_k = 9: must be <8"), RunError("top_k = 9: must be <8"), ValueError("<8")]
)
def test_errors_are_reported_and_the_chart_stays(page, error):
    def draw(k):
        if k == 9:
            raise error
        return f"chart {k}"

    k = control()
    module.live(draw, k=k)
    k.value = 9
    message = str(error) if type(error) is not ValueError else "ValueError: <8"
    assert message.replace("<", "&lt;") in page.status.value
    assert page.shown.charts == []
    k.value = 5
    assert page.shown.charts == ["chart 5"]
    assert "&lt;8" not in page.status.value


def test_an_error_in_the_first_chart_fails_in_the_cell(page):
    def draw(k):
        raise InputError("k = 2: never")

    with pytest.raises(InputError, match="k = 2: never"):
        module.live(draw, k=control())
    assert page.bundles == []


def test_anything_that_can_be_displayed_can_be_drawn(page):
    module.live(lambda k: Markdown(f"**{k}**"), k=control())
    assert page.first[0].data == "**2**"


def test_a_page_that_was_loaded_again_asks_to_run_the_cell(page, monkeypatch):
    """JupyterLab restores the controls from the kernel, the chart from the file, and can no longer update the chart."""
    monkeypatch.setattr(module, "_current_page", lambda: "first")
    k = control()
    module.live(lambda k: f"chart {k}", k=k)
    k.value = 3
    assert page.status.get_state()["value"].endswith("></span>")  # the same page has lost and found its kernel
    monkeypatch.setattr(module, "_current_page", lambda: "second")
    assert page.status.get_state("description") == {"description": ""}
    assert module.RELOADED in page.status.get_state()["value"]
    k.value = 4
    assert page.shown.charts == ["chart 3"]
    assert module.RELOADED in page.status.value


def test_a_move_after_a_reload_asks_to_run_the_cell(page, monkeypatch):
    monkeypatch.setattr(module, "_current_page", lambda: "first")
    k = control()
    module.live(lambda k: f"chart {k}", k=k)
    monkeypatch.setattr(module, "_current_page", lambda: "second")
    k.value = 4
    assert page.shown.charts == []
    assert module.RELOADED in page.status.value
