"""The book's playground page, and the record of its lessons over ten seeds.

`python -m dsmoe_lite.book.playground` trains every lesson and its control with ten seeds in Chromium and writes
data/playground.json; it needs Playwright and Chromium.
"""

import html
import json
from pathlib import Path
from typing import Any

from dsmoe_lite.common.errors import RunError
from dsmoe_lite.common.files import write_json
from dsmoe_lite.common.machine import find_chromium
from dsmoe_lite.common.progress import progress
from dsmoe_lite.viz import renderer
from dsmoe_lite.viz.playground import SEEDS, evidence, script, still, style

SOURCES = Path(__file__).parent / "playground"
N_SEEDS = 10
PAIRS = """() => Object.entries(dsmoePlayground.LESSONS).flatMap(([name, { task, control }]) =>
  control ? [[name, task], [name, control.task]] : [[name, task]])"""
TRAIN = """([name, task, seed]) => {
  const { a, b, steps } = dsmoePlayground.LESSONS[name];
  return { steps, errors: [...dsmoePlayground.trainPair(task, [a, b], seed, steps)].at(-1) };
}"""
START = """
addEventListener("DOMContentLoaded", () => dsmoePlayground.mount(document.getElementById("playground"), {{
  evidence: dsmoeEvidence, useAddress: true, link: (chapter) => ({pages})[chapter],
}}));
"""


def write_playground(pages: Path, title: str, names: dict[str, str]) -> None:
    """Write playground.html and what it loads into the built book; names: {number of a chapter: its page}."""
    static = pages / "_static"
    (static / "playground.js").write_text(script() + START.format(pages=json.dumps(names)), encoding="utf-8")
    (static / "playground.css").write_text(style(), encoding="utf-8")
    (static / "playground_data.js").write_text(f"window.dsmoeEvidence = {json.dumps(evidence())};\n", encoding="utf-8")
    page = (SOURCES / "index.html").read_text(encoding="utf-8")
    picture, width = renderer.png(still("collapse").to_dict())
    (static / "playground.png").write_bytes(picture)
    description = html.escape(still("collapse").to_dict()["description"])
    texts = {"title": title, "paper": names["07"], "width": str(width), "description": description}
    for name, text in texts.items():
        page = page.replace("{" + name + "}", text)
    (pages / "playground.html").write_text(page, encoding="utf-8")


def record() -> dict[str, Any]:
    """Train every lesson and its control with seeds 1 to 10; return the errors. Raises RunError without Chromium."""
    from playwright.sync_api import sync_playwright

    chromium = find_chromium()
    if chromium is None:
        raise RunError("no Chromium found: install it, for example the Debian package chromium")
    lessons: dict[str, Any] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.add_script_tag(content=script())
        pairs = page.evaluate(PAIRS)
        with progress(total=N_SEEDS * len(pairs), desc="lessons", unit="seed") as bar:
            for name, task in pairs:
                found: dict[str, Any] = {"task": task, "a": [], "b": []}
                for seed in range(1, N_SEEDS + 1):
                    trained = page.evaluate(TRAIN, [name, task, seed])
                    found["steps"] = trained["steps"]
                    for model, error in zip("ab", trained["errors"], strict=True):
                        found[model].append(round(error, 5))
                    bar.update()
                if name in lessons:
                    lessons[name]["control"] = found
                else:
                    lessons[name] = found
        version = browser.version
        browser.close()
    return {"schema_version": 1, "seeds": [1, N_SEEDS], "browser": f"Chromium {version}", "lessons": lessons}


if __name__ == "__main__":
    write_json(SEEDS, record())
    print(f"written: {SEEDS}")
