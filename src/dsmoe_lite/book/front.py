"""The front page of the book: two trained models answer in the page, and their experts can be switched off."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from dsmoe_lite.book.learning import learning
from dsmoe_lite.checkpoint import load_model
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.config import to_dict
from dsmoe_lite.data.world import World
from dsmoe_lite.viz.packed_model import fingerprint

SOURCES = Path(__file__).parent / "front"
MODELS = {
    "GShard": DATA / "models" / "world-gshard.safetensors",
    "DeepSeekMoE": DATA / "models" / "world-deepseekmoe.safetensors",
}
N_FILMED = 6  # questions
ROW = re.compile(r"^\| (\d\d) (.*?) \| (.*?) \| (\d+) \|$", re.MULTILINE)  # of the map in the first chapter


def write_front(pages: Path, title: str, chapters: Sequence[Path]) -> None:
    """Write index.html and what it loads into the built book; `chapters` are its notebooks, the first has the map."""
    static = pages / "_static"
    for name in ("front.css", "front.js", "learn.js"):
        shutil.copy(SOURCES / name, static)
    (static / "front_data.js").write_text(f"window.dsmoeFront = {json.dumps(_data())};\n", encoding="utf-8")
    names = {path.name[:2]: f"{path.stem}.html" for path in chapters}
    page = (SOURCES / "index.html").read_text(encoding="utf-8")
    filled = {
        "title": escape(title),
        "first": names["00"],
        "paper": names["07"],
        "chapters": "\n".join(_items(chapters[0], names)),
    }
    for name, text in filled.items():
        page = page.replace("{" + name + "}", text)
    (pages / "index.html").write_text(page, encoding="utf-8")


def _data() -> dict[str, object]:
    """Questions, one of each relation first, and the models without capacities: one question is a very small batch."""
    asked = World().questions("head")
    firsts = {question.relation: question for question in reversed(asked)}
    ordered = [q for q in asked if firsts[q.relation] is q] + [q for q in asked if firsts[q.relation] is not q]
    models: list[object] = []
    for name, path in MODELS.items():
        model = load_model(path)
        assert model.config.moe is not None
        free = replace(model.config.moe, capacity_factor=None, eval_capacity_factor=None)
        config = to_dict(replace(model.config, moe=free))
        models.append({"name": name, "weights": fingerprint(model), "config": config})
    return {
        "questions": [[question.prompt, question.answer] for question in ordered],
        "models": models,
        "learning": learning(ordered[:N_FILMED]),
    }


def _items(chapter: Path, names: dict[str, str]) -> list[str]:
    cells = json.loads(chapter.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return [
        f'          <li><a href="{names[number]}">{number} {escape(name)}</a> <span>{escape(question)}</span>'
        f" <small>{minutes} min</small></li>"
        for number, name, question, minutes in ROW.findall(text)
    ]
