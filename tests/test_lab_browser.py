"""What readers do: the real JupyterLab of `dsmoe lab` in headless Chromium, in a folder with a space in its name."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from dsmoe_lite.common import paths

CHAPTERS = sorted(path.name for path in paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
ALL_CELLS_IN_PAGE = '{"windowingMode": "none"}'  # so that cells outside the viewport can be counted too
ALL_DONE_OR_FAILED = """() => {
    const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent);
    const failed = document.querySelector('[data-mime-type="application/vnd.jupyter.stderr"]') !== null;
    return !prompts.some(text => text.includes('*')) && (failed || prompts.every(text => /[0-9]/.test(text)));
}"""
MINUTE = 60_000  # milliseconds, Playwright's unit


@dataclass(frozen=True)
class Lab:
    address: str
    repository: Path
    process: subprocess.Popen

    def url(self, path: str) -> str:
        """The address of a file in a separate workspace, so that tests do not share tabs."""
        start, token = self.address.split("/lab/tree/")[0], self.address.split("?")[1]
        return f"{start}/lab/workspaces/{re.sub('[^a-z0-9]', '', path)}/tree/{path}?{token}"


def tiny_notebook() -> nbformat.NotebookNode:
    chart = {
        "data": {"values": [{"expert": "e0", "load": 3}, {"expert": "e1", "load": 1}]},
        "mark": "bar",
        "encoding": {"x": {"field": "expert", "type": "nominal"}, "y": {"field": "load", "type": "quantitative"}},
        "width": 200,
    }
    draw = f"from IPython.display import display\ndisplay({{'application/vnd.vegalite.v5+json': {chart}}}, raw=True)"
    cells = [
        new_markdown_cell("# Tiny"),
        new_code_cell('profile = "cpu"', metadata={"tags": ["parameters"]}),
        new_code_cell("import sys\nprint(profile, sys.executable)"),
        new_code_cell(draw),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def live_notebook() -> nbformat.NotebookNode:
    draw = (
        "from IPython.display import Markdown\nfrom ipywidgets import IntSlider\n"
        "from dsmoe_lite.viz.live import live\n"
        "live(lambda s: Markdown(f'chart {s}'), s=IntSlider(40, min=0, max=128))"
    )
    cells = [new_code_cell("!command -v dsmoe"), new_code_cell(draw)]
    return new_notebook(cells=cells, metadata=tiny_notebook().metadata)


def asking_notebook() -> nbformat.NotebookNode:
    start = 'profile: str = "cpu"  # size: smoke | cpu | gpu\nseed: int = 0  # seed: 0..9'
    chart = tiny_notebook().cells[3].source
    choice = f'lab.ask("97-a", "some", "none")\n{chart}\nprint("shown by the answer")\nlab.answer("97-a", "none", "0%")'
    number = 'lab.ask("97-b", low=0, high=1)\nprint("another answer")\nlab.answer("97-b", 0.6, within=0.1)'
    sources = ["from dsmoe_lite.labs import begin\nlab = begin(globals())", choice, number, "lab.score()"]
    cells = [new_code_cell(start, metadata={"tags": ["parameters"]}), *map(new_code_cell, sources)]
    cells[2].outputs = [nbformat.v4.new_output("stream", name="stdout", text="the stored answer\n")]
    cells.insert(3, new_markdown_cell("None, says the text.\n\n**Ask.** And how much?"))
    return new_notebook(cells=cells, metadata=tiny_notebook().metadata)


PARAMETERS = 'profile: str = "cpu"  # size: smoke | cpu | gpu\nseed: int = {}  # seed: 0..9'


def edited_notebook() -> nbformat.NotebookNode:
    """With parameters that a test edits in the browser."""
    sources = ["from dsmoe_lite.labs import begin\nlab = begin(globals())", 'print("the seed is", seed)']
    start = new_code_cell(PARAMETERS.format(0), metadata={"tags": ["parameters"]})
    return new_notebook(cells=[start, *map(new_code_cell, sources)], metadata=tiny_notebook().metadata)


def set_profile(copy: Path, profile: str) -> None:
    """Write `profile` into the parameters cell and clear all outputs, so that a number at a prompt means a run."""
    notebook = nbformat.read(copy, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    cell.source, changed = re.subn(r'^profile(.*?)= "\w+"', rf'profile\1= "{profile}"', cell.source, flags=re.MULTILINE)
    assert changed == 1
    for code in (cell for cell in notebook.cells if cell.cell_type == "code"):
        code.execution_count, code.outputs = None, []
        code.metadata.pop("jupyter", None)  # a folded cell has no prompt
    nbformat.write(notebook, copy)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """`dsmoe lab` on a copy of the chapters, so that a test touches neither work/ nor the reader's Jupyter."""
    home = tmp_path_factory.mktemp("home")
    repository = tmp_path_factory.mktemp("lab") / "with space"
    notebooks = repository / "notebooks"
    shutil.copytree(paths.NOTEBOOKS, notebooks, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    nbformat.write(tiny_notebook(), notebooks / "99_tiny.ipynb")
    nbformat.write(live_notebook(), notebooks / "98_live.ipynb")
    nbformat.write(asking_notebook(), notebooks / "97_ask.ipynb")
    nbformat.write(edited_notebook(), notebooks / "95_edited.ipynb")
    shutil.copy(notebooks / "00_start_here.ipynb", notebooks / "96_saved.ipynb")  # of which no test runs a cell
    (notebooks / "99_tiny.py").write_text("# %% [markdown]\n# # Tiny\n\n# %%\n1 + 1\n", encoding="utf-8")
    (repository / "book.yml").write_text("toc: {format: jb-book, root: notebooks/99_tiny}\n", encoding="utf-8")
    settings = home / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(ALL_CELLS_IN_PAGE, encoding="utf-8")

    program = (
        "import sys; from pathlib import Path; from dsmoe_lite.common import paths; r = Path(sys.argv[1]); "
        "paths.REPOSITORY, paths.FOLDER = r, r; paths.NOTEBOOKS, paths.WORK = r / 'notebooks', r / 'work'; "
        "from dsmoe_lite.cli import main; main(['lab'])"
    )
    environment = {
        **os.environ,
        "CI": "true",  # no display: the address is printed and no browser opens
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "IPYTHONDIR": str(home / "ipython"),
    }
    log = (home / "log").open("w", encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(repository)], env=environment, stdout=subprocess.PIPE, stderr=log, text=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("JupyterLab: "):
                yield Lab(line.removeprefix("JupyterLab: ").strip(), repository, process)
                break
        else:
            pytest.fail(f"no address was printed: {(home / 'log').read_text(encoding='utf-8')}")
    finally:
        process.kill()
        process.wait()
        log.close()


def open_notebook(browser, lab: Lab, path: str, refuse: str = ""):
    """A page with `path` open as a notebook whose kernel is ready, and the hosts that the page contacts.

    refuse: a pattern of addresses that the page cannot load.
    """
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    if refuse:
        page.route(refuse, lambda route: route.abort())
    hosts: set[str | None] = set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.goto(lab.url(path))
    page.locator(".jp-Notebook").wait_for(timeout=MINUTE)
    page.locator(".jp-StatusBar-Widget").get_by_text("| Idle").wait_for(timeout=MINUTE)
    return page, hosts


def run_all(page, timeout: int) -> None:
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.wait_for_function(ALL_DONE_OR_FAILED, timeout=timeout)


def assert_no_pop_up(page) -> None:
    assert page.locator(".jp-Dialog, .Toastify__toast").all_inner_texts() == []


def code_cells(copy: Path) -> list[nbformat.NotebookNode]:
    return [
        cell for cell in nbformat.read(copy, as_version=4).cells if cell.cell_type == "code" and cell.source.strip()
    ]


def run_top_to_bottom(
    browser, lab: Lab, name: str, screenshot: Path, timeout: int, then: Callable[[Any], None] | None = None
) -> list[nbformat.NotebookNode]:
    """Run the copy of a chapter in the browser as a reader would, then call `then`; return the saved code cells."""
    copy = lab.repository / "work" / name
    set_profile(copy, "smoke")
    asked = re.findall(r'^lab\.ask\("([^"]+)"', "\n".join(cell.source for cell in code_cells(copy)), re.MULTILINE)
    (copy.parent / "predictions.json").write_text(json.dumps(dict.fromkeys(asked)), encoding="utf-8")  # all skipped
    page, hosts = open_notebook(browser, lab, f"work/{name}")
    errors_in_page: list[str] = []
    page.on("console", lambda message: errors_in_page.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors_in_page.append(str(error)))
    assert_no_pop_up(page)
    run_all(page, timeout)
    if then is not None:
        then(page)
    page.locator("[data-jp-item-name=save] .jp-ToolbarButtonComponent").click()  # the explorer captures all keys
    page.wait_for_function("!document.querySelector('.lm-TabBar-tab.jp-mod-dirty')", timeout=MINUTE)
    cells = code_cells(copy)
    errors = [out.get("evalue") for cell in cells for out in cell.outputs if out.output_type == "error"]
    assert errors == []
    assert all(cell.execution_count for cell in cells)
    assert_charts_drawn(page, cells)
    assert_no_pop_up(page)
    assert hosts <= {"localhost", "127.0.0.1", None}  # None: data and blob addresses
    assert errors_in_page == []
    height = page.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollHeight")
    page.set_viewport_size({"width": 1400, "height": min(200 + height, 12_000)})
    page.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0")
    page.wait_for_timeout(500)  # for the layout of the taller page
    page.screenshot(path=screenshot)
    page.close()
    return cells


def assert_charts_drawn(page, cells: list[nbformat.NotebookNode]) -> None:
    charts = sum("vegalite" in kind for cell in cells for out in cell.outputs for kind in out.get("data", {}))
    drawn = page.locator(".jp-OutputArea-output .vega-embed").locator("svg.marks, canvas.marks")  # a bare spec: canvas
    page.wait_for_timeout(1000)  # the last chart is drawn after its cell is done
    assert drawn.count() == charts
    sizes = [box for box in (mark.bounding_box() for mark in drawn.all()) if box]
    assert all(box["width"] > 50 and box["height"] > 20 for box in sizes)


def test_tiny_notebook_runs_in_this_environment(browser, lab: Lab, screenshots: Path) -> None:
    picture = screenshots / "lab_tiny.png"
    cells = run_top_to_bottom(browser, lab, "99_tiny.ipynb", picture, MINUTE)
    assert cells[1].outputs[0].text == f"smoke {sys.executable}\n"
    assert picture.stat().st_size > 10_000


def move_a_control(page) -> None:
    """What a reader of chapter 02 does: move a slider that needs no Python, and ask the router just trained."""
    chart = page.locator(".vega-embed", has_text="Who is full, and what is dropped?")
    assert "c = 1.25: 640 slots each" in chart.inner_text()
    for _ in range(3):
        chart.get_by_role("slider").press("ArrowRight")  # which JupyterLab would take: labs/jupyter_settings.py
    chart.get_by_text("c = 1.4: 717 slots each").wait_for(timeout=MINUTE)

    text = page.locator(".widget-text", has=page.get_by_text("text", exact=True)).locator("input")
    text.fill("12+30=42.")
    text.press("Enter")
    table = page.locator(".jp-RenderedMarkdown table", has_text="yours")
    table.get_by_text("+", exact=True).wait_for(timeout=MINUTE)
    assert re.findall(r"e\d+ e\d+", table.inner_text())
    page.locator(".widget-html", has_text="Computing").wait_for(state="detached", timeout=MINUTE)


def switch_an_expert_off(page) -> None:
    """What a reader of chapter 03 does: switch an expert off, try valid and invalid texts."""
    explorer = page.locator(".dsmoe-explorer")
    status, tokens = explorer.get_by_role("status"), explorer.locator(".dx-tokens [role=option]")
    switch = explorer.get_by_role("switch", name="expert 2 of layer 0")
    switch.click()
    explorer.get_by_text("from the experts switched off").wait_for(timeout=MINUTE)
    assert "✓" not in explorer.locator(".dx-answers li").first.inner_text()
    assert explorer.locator(".dx-track b").count() == 3  # where the answers were with all experts
    assert switch.get_attribute("aria-checked") == "false"
    cells = page.locator(".jp-Cell").count()
    explorer.get_by_label("Colour of the text").focus()
    for key in ("ArrowUp", "d", "d"):  # JupyterLab's shortcuts to leave the cell and to delete it
        page.keyboard.press(key)
    assert page.locator(".jp-Cell").count() == cells
    assert explorer.get_by_label("Colour of the text").evaluate("node => node === document.activeElement")
    explorer.get_by_role("button", name="All experts on").click()
    explorer.get_by_text("from the experts switched off").wait_for(state="detached", timeout=MINUTE)
    assert switch.get_attribute("aria-checked") == "true"
    assert "✓" in explorer.locator(".dx-answers li").first.inner_text()
    assert explorer.locator(".dx-track b").count() == 0

    route, text = explorer.get_by_role("button", name="Read this text"), explorer.locator("textarea")
    for bad, message_part in (("", "Type something first."), ("x" * 100_000, "text = 100,000 characters")):
        text.fill(bad)
        route.click()
        status.get_by_text(message_part).wait_for(timeout=MINUTE)
    text.fill("日本 🙂 12+30=42.")
    route.click()
    explorer.locator(".dx-tokens", has_text="🙂").wait_for(timeout=MINUTE)
    status.filter(has_text="Click a square").wait_for(timeout=MINUTE)
    assert tokens.first.inner_text() == "日"
    explorer.get_by_label("tokens", exact=True).select_option("8")
    explorer.get_by_role("button", name="Let it write").click()
    explorer.locator(".dx-written b").wait_for(timeout=MINUTE)
    explorer.get_by_role("button", name="Stop").wait_for(state="detached", timeout=MINUTE)
    explorer.get_by_role("button", name="Break what this answer needs most").click()
    explorer.get_by_text("GShard without e").wait_for(timeout=MINUTE)
    assert explorer.get_by_role("button", name="Copy link").count() == 0


USED = {"02": move_a_control, "03": switch_an_expert_off}  # what is done in a chapter after it has run


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n[:2] in USED else [pytest.mark.slow]) for n in CHAPTERS])
def test_chapter_runs_top_to_bottom(browser, lab: Lab, name: str, screenshots: Path) -> None:
    picture = screenshots / f"lab_{name[:2]}.png"
    run_top_to_bottom(browser, lab, name, picture, 5 * MINUTE, USED.get(name[:2]))


def test_a_saved_explorer_answers_before_any_cell_runs(browser, lab: Lab, screenshots: Path) -> None:
    page, hosts = open_notebook(browser, lab, "work/96_saved.ipynb")
    explorer = page.locator(".dsmoe-explorer")
    explorer.wait_for(timeout=MINUTE)
    explorer.get_by_role("button", name="next layer").click()
    square = explorer.get_by_role("switch", name="expert 2 of layer 0")
    page.wait_for_function("node => node.ariaDisabled !== 'true'", arg=square.element_handle(), timeout=MINUTE)
    assert "Click a square" in explorer.get_by_role("status").inner_text()
    assert page.evaluate("async () => await window.dsmoeBorrowed")  # by the page, not by a kernel
    square.click()
    explorer.locator('[role=switch][aria-checked="false"]').wait_for(timeout=MINUTE)
    assert square.get_attribute("aria-checked") == "false"
    explorer.get_by_role("button", name="All experts on").click()
    explorer.locator('[role=switch][aria-checked="false"]').wait_for(state="detached", timeout=MINUTE)
    page.screenshot(path=screenshots / "lab_saved_explorer.png")
    assert hosts <= {"localhost", "127.0.0.1", None}
    page.close()


def test_a_saved_explorer_without_helper_and_kernel_asks_to_run_its_cell(browser, lab: Lab) -> None:
    page, _ = open_notebook(browser, lab, "work/96_saved.ipynb", refuse="**/static/dsmoe/**")
    explorer = page.locator(".dsmoe-explorer")
    explorer.wait_for(timeout=MINUTE)
    page.wait_for_function("async () => (await window.dsmoeBorrowed) === false", timeout=MINUTE)
    explorer.get_by_role("button", name="next layer").click()
    square = explorer.get_by_role("switch", name="expert 7 of layer 1")
    square.click(force=True)  # it may be pointed at, but not switched
    explorer.locator(".dx-chosen").first.wait_for(timeout=MINUTE)
    assert square.is_disabled()
    assert square.get_attribute("aria-checked") == "true"
    assert "Run this cell" in explorer.get_by_role("status").inner_text()
    page.close()


LINES = """[...document.querySelectorAll('.jp-RenderedMarkdown > p')].map(node => {
    const lines = Math.round(node.clientHeight / parseFloat(getComputedStyle(node).lineHeight));
    return [node.innerText.length / lines, lines];
})"""


def test_lines_of_prose_have_at_most_76_characters(browser, lab: Lab) -> None:
    page, _ = open_notebook(browser, lab, "work/03_who_goes_where.ipynb")
    page.locator(".jp-RenderedMarkdown > p").first.wait_for(timeout=MINUTE)
    found = [characters for characters, lines in page.evaluate(LINES) if lines >= 4]  # mean of a paragraph
    assert len(found) >= 3
    assert 55 <= max(found) <= 76
    page.close()


def test_a_reloaded_page_asks_to_run_the_cell_of_a_live_chart_again(browser, lab: Lab, screenshots: Path) -> None:
    page, _ = open_notebook(browser, lab, "work/98_live.ipynb")
    run_all(page, MINUTE)
    page.get_by_text(str(Path(sys.executable).with_name("dsmoe")), exact=True).wait_for(timeout=MINUTE)
    chart, handle = page.locator(".jp-RenderedMarkdown p", has_text="chart"), page.locator(".noUi-handle")
    page.get_by_text("chart 40", exact=True).wait_for(timeout=MINUTE)
    page.keyboard.press("Control+s")
    page.wait_for_function("!document.querySelector('.lm-TabBar-tab.jp-mod-dirty')", timeout=MINUTE)
    handle.press("ArrowRight")
    page.get_by_text("chart 41", exact=True).wait_for(timeout=MINUTE)
    assert page.get_by_text("run this cell again").count() == 0

    page.on("dialog", lambda dialog: dialog.accept())  # changes that are not saved
    page.reload()  # the file has the chart of 40, the kernel the slider at 41
    page.get_by_text("run this cell again").wait_for(timeout=MINUTE)
    page.screenshot(path=screenshots / "lab_reloaded.png")
    run_all(page, MINUTE)
    page.get_by_text("run this cell again").wait_for(state="detached", timeout=MINUTE)
    handle.press("ArrowRight")
    page.get_by_text("chart 41", exact=True).wait_for(timeout=MINUTE)
    assert chart.count() == 1
    page.close()


def test_an_edited_parameter_is_checked_and_a_corrected_one_counts_at_once(browser, lab: Lab) -> None:
    page, _ = open_notebook(browser, lab, "work/95_edited.ipynb")
    editor = page.locator(".jp-CodeCell .cm-content").first

    def edit_and_run(seed: str) -> None:
        editor.click()
        page.keyboard.press("Control+a")
        page.keyboard.insert_text(PARAMETERS.format(seed))
        run_all(page, MINUTE)

    edit_and_run("99")
    error = page.get_by_text("seed = 99: must be a whole number, 0..9", exact=True)
    error.wait_for(timeout=MINUTE)
    assert page.get_by_text("Traceback").count() == 0
    assert page.get_by_text("the seed is").count() == 1  # the cell's source alone
    edit_and_run("7")
    page.get_by_text("the seed is 7", exact=True).wait_for(timeout=MINUTE)
    assert error.count() == 0
    edit_and_run("8")
    page.get_by_text("the seed is 8", exact=True).wait_for(timeout=MINUTE)
    page.close()


def test_an_answer_is_shown_after_the_guess_and_guesses_are_scored(browser, lab: Lab, screenshots: Path) -> None:
    page, _ = open_notebook(browser, lab, "work/97_ask.ipynb")
    assert page.get_by_text("the stored answer").count() == 0
    assert not page.get_by_role("group").get_by_text("None, says the text.").is_visible()
    run_all(page, MINUTE)
    page.get_by_text("No guesses yet; questions in this chapter: 2.").wait_for(timeout=MINUTE)
    chart, number = page.locator(".vega-embed"), page.locator(".widget-text input")
    page.locator(".jupyter-button", has_text="some").wait_for(timeout=MINUTE)
    page.screenshot(path=screenshots / "lab_ask.png")
    assert not page.locator("pre", has_text="shown by the answer").is_visible()
    assert not any(one.is_visible() for one in chart.all())

    page.get_by_role("button", name="some", exact=True).click()
    page.get_by_text("✗ You said some; it was none: 0%.").first.wait_for(timeout=MINUTE)
    page.locator("pre", has_text="shown by the answer").wait_for(timeout=MINUTE)
    chart.locator("svg.marks, canvas.marks").first.wait_for(timeout=MINUTE)
    number.fill("5")
    page.get_by_role("button", name="Guess", exact=True).click()
    page.get_by_text("your guess = 5.0: must be a finite number").wait_for(timeout=MINUTE)
    assert not page.locator("pre", has_text="another answer").is_visible()
    number.fill("0.55")
    page.wait_for_timeout(500)  # the number must be in the kernel before the click
    page.get_by_role("button", name="Guess", exact=True).click()
    page.locator("pre", has_text="another answer").wait_for(timeout=MINUTE)
    page.get_by_text("1 of 2 guesses right; questions without a guess: 0.").wait_for(timeout=MINUTE)
    page.screenshot(path=screenshots / "lab_guessed.png")
    stored = json.loads((lab.repository / "work" / "predictions.json").read_text(encoding="utf-8"))
    assert {key: stored[key] for key in ("97-a", "97-b")} == {"97-a": "some", "97-b": 0.55}

    run_all(page, MINUTE)  # stored guesses are not asked for again
    page.get_by_text("✓ You said 0.55; it was 0.6.").first.wait_for(timeout=MINUTE)
    assert page.get_by_role("button", name="Guess", exact=True).count() == 0
    page.close()


def test_py_source_opens_as_a_notebook(browser, lab: Lab) -> None:
    page, _ = open_notebook(browser, lab, "notebooks/99_tiny.py")
    assert page.locator(".jp-Notebook h1").inner_text().startswith("Tiny")
    assert page.locator(".jp-CodeCell").count() == 1
    assert_no_pop_up(page)
    page.close()


def test_reference_outputs_are_unchanged(browser, lab: Lab) -> None:
    for name in CHAPTERS:
        assert (lab.repository / "notebooks" / name).read_bytes() == (paths.NOTEBOOKS / name).read_bytes()


def test_the_server_needs_its_token_and_listens_on_this_machine_only(lab: Lab) -> None:
    import psutil
    import requests

    parts = urlsplit(lab.address)
    assert requests.get(f"http://{parts.netloc}/api/contents", timeout=20).status_code == 403
    listening = [c for c in psutil.Process(lab.process.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip for c in listening if c.laddr.port == parts.port} == {"127.0.0.1"}


def test_port_in_use_is_refused_in_one_line(lab: Lab) -> None:
    port = urlsplit(lab.address).port
    program = (
        "from dsmoe_lite.labs.jupyter_server import serve; "
        f"serve('.', None, ip='127.0.0.1', port={port}, browser=False)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert f"port = {port}: Address already in use" in done.stderr.splitlines()[-1]


def test_term_stops_server_and_kernels(lab: Lab) -> None:  # last in this file: it stops the server
    import psutil

    kernels = psutil.Process(lab.process.pid).children(recursive=True)
    lab.process.send_signal(signal.SIGTERM)
    assert lab.process.wait(timeout=30) == 0
    assert psutil.wait_procs(kernels, timeout=10)[1] == []
