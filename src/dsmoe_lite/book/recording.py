"""The README's moving picture: the book's front page in a browser, where a reader breaks experts of two models.

`python -m dsmoe_lite.book.recording` needs Playwright and Chromium and writes notebooks/images/break-light.gif and
break-dark.gif, and a still beside each for readers who want no motion.
"""

import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsmoe_lite.book.front import MODELS, write_front
from dsmoe_lite.common.errors import RunError
from dsmoe_lite.common.machine import find_chromium
from dsmoe_lite.common.paths import NOTEBOOKS
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.packed_model import ENGINE
from dsmoe_lite.viz.page_models import write_models

FOLDER = NOTEBOOKS / "images"
WIDTH, SCALE, COLORS = 860, 2, 64
STILL = 3  # number of the frame in which one expert of each model is off
ONE = "Break what this answer needs most"
FOUR = "Break one large, four small"
COUNTED = "() => [...document.querySelectorAll('#lab .known b')].every((known) => known.textContent !== '…')"
STYLE = """
h1 + .lead, main > section, #lab > .row:first-child, .written, .fact, .examples { display: none !important; }
#lab { min-height: 0 !important; }
.report { min-height: 5.6rem !important; } /* of the longest sentence: nothing moves */
body, main { padding-bottom: 0.5rem !important; }
#pointer { position: fixed; width: 18px; height: 18px; margin: -9px; border-radius: 50%; opacity: 0;
  box-sizing: border-box; background: {point}88; border: 2px solid {point}; pointer-events: none; }
"""


def record(browser: Any, mode: str, scale: int = SCALE) -> tuple[bytes, bytes]:
    """Break experts in Playwright's `browser`; return the GIF and, as a PNG, its most telling frame.

    mode: light or dark; scale: pixels of the picture per pixel of the page.
    """
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder)
        (pages / "_static").mkdir()
        write_models([], pages / "_static", MODELS.values())
        shutil.copy(ENGINE, pages / "_static")
        write_front(pages, "", sorted(NOTEBOOKS.glob("[0-9]*.ipynb")))
        page = browser.new_page(
            viewport={"width": WIDTH, "height": 900},
            device_scale_factor=scale,
            color_scheme=mode,
            reduced_motion="reduce",
        )
        page.goto((pages / "index.html").as_uri())
        page.wait_for_function(COUNTED)
        frames = list(_story(page, (theme.LIGHT if mode == "light" else theme.DARK)["line2"]))
        page.close()
    return _gif(frames), frames[STILL][0]


def _story(page: Any, point_color: str) -> Iterator[tuple[bytes, int]]:
    """Frames, and how long each is shown in milliseconds; 12 seconds together."""
    page.add_style_tag(content=STYLE.replace("{point}", point_color))
    page.evaluate("document.body.append(Object.assign(document.createElement('div'), { id: 'pointer' }))")
    height = page.evaluate("document.querySelector('#lab').getBoundingClientRect().bottom") + 12

    def frame(milliseconds: int) -> tuple[bytes, int]:
        page.wait_for_function(COUNTED)
        page.wait_for_timeout(60)
        return page.screenshot(clip={"x": 0, "y": 0, "width": WIDTH, "height": height}), milliseconds

    def point(name: str) -> Any:
        button = page.get_by_role("button", name=name)
        box = button.bounding_box()
        at = [box["x"] + box["width"] - 14, box["y"] + box["height"] - 8]  # beside the words
        page.evaluate(
            "([x, y]) => Object.assign(document.getElementById('pointer').style, "
            "{ left: `${x}px`, top: `${y}px`, opacity: 1 })",
            at,
        )
        return button

    yield frame(2200)
    for name in (ONE, FOUR):
        button = point(name)
        yield frame(700)
        button.click()
        yield frame(300)
        yield frame(3300)
        again = point("All on again")
        yield frame(400)
        again.click()
        yield frame(200)


def _gif(frames: list[tuple[bytes, int]]) -> bytes:
    """One palette for all frames, so that nothing flickers."""
    from PIL import Image

    pictures = [Image.open(io.BytesIO(png)).convert("RGB") for png, _ in frames]
    strip = Image.new("RGB", (pictures[0].width, pictures[0].height * len(pictures)))
    for number, picture in enumerate(pictures):
        strip.paste(picture, (0, number * picture.height))
    palette = strip.quantize(COLORS, dither=Image.Dither.NONE)
    quantized = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    background: Any = quantized[0].getpixel((0, 0))
    card: Any = pictures[0].getpixel((0, 0))
    entries = palette.getpalette() or []
    entries[3 * background : 3 * background + 3] = card  # exactly, or the edge would show
    for picture in quantized:
        picture.putpalette(entries)
    out = io.BytesIO()
    quantized[0].save(
        out, "GIF", save_all=True, append_images=quantized[1:], duration=[shown for _, shown in frames], loop=0,
        optimize=True,
    )  # fmt: skip
    return out.getvalue()


def main() -> None:
    """Record both modes and print the sizes. RunError without Chromium."""
    from playwright.sync_api import sync_playwright

    chromium = find_chromium()
    if chromium is None:
        raise RunError("chromium not found: apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for mode in ("light", "dark"):
            gif, still = record(browser, mode)
            for name, data in ((f"break-{mode}.gif", gif), (f"break-{mode}.png", still)):
                (FOLDER / name).write_bytes(data)
                print(f"{name}: {len(data):,} bytes")
        browser.close()


if __name__ == "__main__":
    main()
