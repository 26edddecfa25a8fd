"""The README's moving picture: the routing explorer with its model behind it, used in a browser and recorded.

`python -m dsmoe_lite.book.recording` needs Playwright and Chromium and writes notebooks/images/explorer-light.gif and
explorer-dark.gif, and a still beside each for readers who want no motion.
"""

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

from dsmoe_lite.checkpoint import load_model, read_metadata
from dsmoe_lite.common.errors import RunError
from dsmoe_lite.common.machine import find_chromium
from dsmoe_lite.common.paths import DATA, NOTEBOOKS
from dsmoe_lite.data.tokenizer import read_tokenizer
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.explorer import Explorer, explore

FOLDER = NOTEBOOKS / "images"
MODEL = DATA / "models" / "world-gshard.safetensors"
TEXT = (
    "Here Vebu Tora has stone vamo. Here Vebu Tora has pet nena. Look at Vebu Tora: craft loni, drink sedu, song mabu, "
    "tree sana. Look at Vebu Tora: home veri, tool neda."
)
STORY = (  # an expert of layer 0, the word that needs it, the caption when it is switched off
    (2, "nena", "Switch expert 2 off, and the model forgets the pet."),
    (14, "mabu", "Without expert 14 it forgets the song."),
    (6, "veri", "Without expert 6 it forgets the home."),
)
STILL = 2  # number of the frame after the first expert is switched off
WIDTH, HEIGHT, SCALE, COLORS = 720, 540, 2, 64
SYNCED = ("views", "text", "layer", "token", "focus", "busy", "message", "colours")

PAGE = """<!doctype html><html data-theme="{mode}" style="color-scheme: {mode}"><meta charset="utf-8"><style>
body {{ margin: 0; padding: 12px; background: {card}; color: {ink}; font: 600 17px/1.4 {font}; }}
#caption {{ height: 30px; }}
#pointer {{ position: fixed; width: 18px; height: 18px; margin: -9px; border-radius: 50%; opacity: 0;
  background: {point}88; border: 2px solid {point}; box-sizing: border-box; pointer-events: none; }}
.dsmoe-explorer {{ border: none !important; padding: 0 !important; }}
.dsmoe-explorer :is(form, .dx-row, .dx-message, .dx-losses) {{ display: none !important; }}
{css}</style><body><div id="caption"></div><div id="explorer"></div><div id="pointer"></div><script type="module">
const listeners = {{}};
const bytes = (text) => new DataView(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
const unpack = (name, value) => name !== "views" ? value : value.map((view) => Object.fromEntries(
  Object.entries(view).map(([key, one]) => [key, one && one.bytes !== undefined ? bytes(one.bytes) : one])));
const traits = {{ can_compute: true }};
const fire = (event, content) => (listeners[event] || []).forEach((listener) => listener(content));
window.sent = [];
window.receive = (state) => {{
  for (const [name, value] of Object.entries(state)) traits[name] = unpack(name, value);
  for (const name of Object.keys(state)) fire(`change:${{name}}`);
}};
window.connect = () => fire("msg:custom", {{ do: "ready" }});
const model = {{
  get: (name) => traits[name],
  set: (name, value) => {{ traits[name] = value; fire(`change:${{name}}`); }},
  save_changes() {{}},
  send: (message) => window.sent.push(message),
  on: (event, listener) => (listeners[event] ||= []).push(listener),
  off() {{}},
}};
window.receive({state});
const {{ default: widget }} = await import(URL.createObjectURL(new Blob([{esm}], {{ type: "text/javascript" }})));
await widget.render({{ model, el: document.getElementById("explorer") }});
window.connect();
window.mounted = true;
</script></body></html>
"""


def record(browser: Any, mode: str, scale: int = SCALE) -> tuple[bytes, bytes]:
    """Use the explorer in Playwright's `browser`; return the GIF and, as a PNG, its most telling frame.

    mode: light or dark; scale: pixels of the picture per pixel of the page.
    """
    tokenizer = read_tokenizer(read_metadata(MODEL)["tokenizer"])
    explorer = explore({"GShard": load_model(MODEL)}, tokenizer, TEXT, window=64, expert=STORY[0][0])
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=scale)
    page.set_content(_page(explorer, mode))
    page.emulate_media(reduced_motion="reduce")
    page.wait_for_function("window.mounted")
    frames = list(_story(page, explorer))
    page.close()
    return _gif(frames), frames[STILL][0]


def _story(page: Any, explorer: Explorer) -> Iterator[tuple[bytes, int]]:
    """Frames, and how long each is shown in milliseconds."""

    def frame(milliseconds: int) -> tuple[bytes, int]:
        page.wait_for_timeout(60)
        return page.screenshot(), milliseconds

    def caption(text: str) -> None:
        page.evaluate("text => { document.getElementById('caption').textContent = text; }", text)

    def point(locator: Any) -> None:
        box = locator.bounding_box()
        at = [box["x"] + box["width"] - 3, box["y"] + box["height"] - 1]  # beside the words
        page.evaluate(
            "([x, y]) => Object.assign(document.getElementById('pointer').style, "
            "{ left: `${x}px`, top: `${y}px`, opacity: 1 })",
            at,
        )

    def click(locator: Any) -> None:
        locator.click()
        for message in page.evaluate("window.sent.splice(0)"):
            explorer._receive(explorer, message, [])
        page.evaluate("state => window.receive(state)", _traits(explorer, ("views", "text", "busy", "message")))

    def before(word: str) -> Any:
        """The token that predicts this word."""
        at = max(t for t, one in enumerate(explorer.views[0]["tokens"]) if one.strip() == word)
        return page.locator(".dx-tokens [role=option]").nth(at - 1)

    def square(expert: int) -> Any:
        return page.get_by_role("switch", name=f"expert {expert} of layer 0")

    for expert, word, outcome in STORY:
        caption(f"What does the model say next? Its expert {expert} of layer 0 is at work.")
        click(before(word))
        point(before(word))
        yield frame(2200)
        point(square(expert))
        yield frame(600)
        click(square(expert))
        caption(outcome)
        page.mouse.move(0, 0)
        yield frame(2900)
        click(square(expert))
        caption("Switched on again, it remembers.")
        yield frame(900)


def _traits(explorer: Explorer, names: tuple[str, ...] = SYNCED) -> dict[str, Any]:
    """Traits as JSON; bytes as base64."""
    traits = {name: getattr(explorer, name) for name in names}
    if "views" in traits:
        traits["views"] = [
            {
                key: {"bytes": base64.b64encode(one).decode()} if isinstance(one, bytes) else one
                for key, one in view.items()
            }
            for view in traits["views"]
        ]
    return traits


def _page(explorer: Explorer, mode: str) -> str:
    colors = theme.LIGHT if mode == "light" else theme.DARK
    return PAGE.format(
        mode=mode, card=colors["card"], ink=colors["ink"], point=colors["line2"], font=theme.FONT, css=explorer._css,
        state=json.dumps(_traits(explorer)), esm=json.dumps(str(explorer._esm)),
    )  # fmt: skip


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
            for name, data in ((f"explorer-{mode}.gif", gif), (f"explorer-{mode}.png", still)):
                (FOLDER / name).write_bytes(data)
                print(f"{name}: {len(data):,} bytes")
        browser.close()


if __name__ == "__main__":
    main()
