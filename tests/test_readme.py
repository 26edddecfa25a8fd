"""The README fits on one screen and says what is so; so do the pages that it links to, and the pictures on both."""

import io
import re
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import yaml
from PIL import Image, ImageSequence

from dsmoe_lite.book import recording, svg
from dsmoe_lite.common.paths import NOTEBOOKS, REPOSITORY

MOST_WORDS = 800
LARGEST_PICTURE = 2_000_000  # bytes
TOP = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")
PAGES = sorted(NOTEBOOKS.glob("pages/*.md"))
IMAGES = NOTEBOOKS / "images"
PICTURES = sorted(IMAGES.glob("*.svg"))
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BOOK = yaml.safe_load((REPOSITORY / "book.yml").read_text(encoding="utf-8"))["toc"]
LISTED = [BOOK["root"], *(entry["file"] for entry in BOOK["chapters"])]
CHAPTERS = [Path(name) for name in LISTED if Path(name).name[0].isdigit() and not name.endswith(".md")]


def minutes(chapter: Path) -> int:
    source = (REPOSITORY / chapter).with_suffix(".py").read_text(encoding="utf-8")
    return int(re.search(r"\*\*Reading[\s#]+time\*\* (\d+)[\s#]+minutes", source)[1])


def links(path: Path) -> list[str]:
    found = re.findall(r"]\(([^)]+)\)|(?:src|srcset)=\"([^\"]+)\"", path.read_text(encoding="utf-8"))
    return [markdown or html for markdown, html in found]


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- the text ---------------------------------------------------------------------------------------------------------


def test_readme_fits_on_one_screen() -> None:
    assert len(README.split()) <= MOST_WORDS


def test_readme_names_the_two_commands_first() -> None:
    for text in (README, (NOTEBOOKS / "pages" / "install.md").read_text(encoding="utf-8")):
        blocks = re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL)
        commands = [line.split("#")[0].strip() for line in blocks[0].splitlines()]
        assert [line for line in commands if line.startswith("make")] == ["make lab", "make test"]


@pytest.mark.parametrize("path", [*(REPOSITORY / name for name in TOP), *PAGES], ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for link in links(path):
        if link.startswith("https://"):
            continue
        target, _, heading = link.partition("#")
        file = path.parent / unquote(target) if target else path
        assert file.exists(), link
        if heading:
            assert heading in anchors(file), link


def test_readme_has_every_chapter_with_its_minutes() -> None:
    rows = re.findall(r"^\| \[(\d\d) [^\]]+\]\((\S+)\) \| [^|]+ \| (\d+) \|$", README, flags=re.MULTILINE)
    assert rows == [(path.name[:2], f"{path}.ipynb", str(minutes(path))) for path in CHAPTERS]
    hours = sum(map(minutes, CHAPTERS)) / 60
    assert f"Reading them all takes {round(2 * hours) / 2:g} hours" in README


def test_readme_sums_up_the_table_of_times() -> None:
    table = (NOTEBOOKS / "pages" / "run_times.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d\d) [^|]+ \| (\d+) \| (\d+) \|$", table, flags=re.MULTILINE)
    assert [number for number, _, _ in rows] == [path.name[:2] for path in CHAPTERS]
    seconds = sum(int(cpu) for _, cpu, _ in rows)
    assert f"takes [{-(-seconds // 60)} minutes](notebooks/pages/run_times.md)" in README


def test_every_page_is_in_the_book() -> None:
    assert {path.stem for path in PAGES} == {Path(name).stem for name in LISTED if "/pages/" in name}


# --- the pictures -----------------------------------------------------------------------------------------------------


def test_moving_pictures_are_small_and_have_a_still() -> None:
    for mode in ("light", "dark"):
        moving, still = IMAGES / f"break-{mode}.gif", IMAGES / f"break-{mode}.png"
        assert moving.stat().st_size < LARGEST_PICTURE
        with Image.open(moving) as picture, Image.open(still) as one:
            assert picture.size == one.size
            assert picture.size[0] == recording.WIDTH * recording.SCALE
            shown = [frame.info["duration"] for frame in ImageSequence.Iterator(picture)]
            assert 11_500 <= sum(shown) <= 12_500  # ms
        assert README.count(f"notebooks/images/break-{mode}.gif") == 1
        assert README.count(f"notebooks/images/break-{mode}.png") == 1


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_picture_has_a_dark_form_and_a_description(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "planned" not in text
    assert svg.DARK_STYLE in text
    drawn = ElementTree.fromstring(text)
    assert {"title", "desc"} <= {node.tag.rpartition("}")[2] for node in drawn}
    used = {node.get(kind) for node in drawn.iter() for kind in ("fill", "stroke")} - {None, "none"}
    assert used <= svg.DARK.keys() | svg.SAME
    card = next(node for node in drawn if node.tag.endswith("rect"))
    assert card.get("fill") == svg.CARD


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_of_a_picture_stays_inside_and_can_be_read(browser, mode: str) -> None:
    """Widths are those of DejaVu Sans, the widest of the usual fonts."""
    page = browser.new_context(color_scheme=mode).new_page()
    for path in PICTURES:
        page.goto(path.as_uri())
        beyond = page.evaluate(
            """() => {
                const card = document.querySelector("rect").getBoundingClientRect();
                return [...document.querySelectorAll("text")]
                    .filter((text) => { const box = text.getBoundingClientRect();
                        return box.left < card.left + 4 || box.right > card.right - 4; })
                    .map((text) => text.textContent);
            }"""
        )
        assert beyond == [], path.name
        colors = page.evaluate(
            "() => [...document.querySelectorAll('text')].map((text) => getComputedStyle(text).fill)"
            ".filter((color, i, all) => all.indexOf(color) === i)"
        )
        assert ("rgb(27, 31, 36)" in colors) == (mode == "light"), path.name


def test_the_moving_picture_shows_what_the_readme_says(browser) -> None:
    """The facts left, of each model: with one expert off, and with one large or four small ones off."""
    found = []

    class Listening:
        """The browser; each picture of its page notes the facts left."""

        def new_page(self, **options):
            page = browser.new_page(**options)
            screenshot = page.screenshot

            def noted(**clip):
                known = page.locator("#lab .known b").all_inner_texts()
                found.append([int(text.split(" ")[0]) for text in known])
                return screenshot(**clip)

            page.screenshot = noted
            return page

    recording.record(Listening(), "light", scale=1)
    left = [facts for n, facts in enumerate(found) if facts not in found[:n]]
    assert left == [[200, 200], [154, 199], [154, 197]]
    assert "knows 154 of 200 facts; DeepSeekMoE still answers and knows 199" in README
    assert "DeepSeekMoE too gives a wrong answer and knows 197" in README


def test_the_moving_picture_can_be_recorded_again(browser) -> None:
    moving, still = recording.record(browser, "dark", scale=1)
    with Image.open(io.BytesIO(moving)) as now, Image.open(IMAGES / "break-dark.gif") as stored:
        assert now.n_frames == stored.n_frames
        assert [side * recording.SCALE for side in now.size] == list(stored.size)
    with Image.open(io.BytesIO(still)) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100  # something is drawn
