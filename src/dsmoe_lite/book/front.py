"""The front page of the book: two trained models answer in the page, and their experts can be switched off."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

from dsmoe_lite.book.learning import learning
from dsmoe_lite.book.playground_picture import playground_picture
from dsmoe_lite.checkpoint import load_model
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.config import to_dict
from dsmoe_lite.data.world import World
from dsmoe_lite.study.grids import records
from dsmoe_lite.study.rows import metric_rows
from dsmoe_lite.viz.packed_model import fingerprint

SOURCES = Path(__file__).parent / "front"
MODELS = {
    "GShard": DATA / "models" / "world-gshard.safetensors",
    "DeepSeekMoE": DATA / "models" / "world-deepseekmoe.safetensors",
}
N_FILMED = 8  # questions
ROW = re.compile(r"^\| (\d\d) (.*?) \| (.*?) \| (\d+) \|$", re.MULTILINE)  # of the map in the first chapter


def write_front(pages: Path, title: str, chapters: Sequence[Path]) -> None:
    """Write index.html and what it loads into the built book; `chapters` are its notebooks, the first has the map."""
    static = pages / "_static"
    for path in SOURCES.iterdir():
        if path.suffix in (".css", ".js"):
            shutil.copy(path, static)
    data = _data()
    (static / "front_data.js").write_text(f"window.dsmoeFront = {json.dumps(data)};\n", encoding="utf-8")
    still = playground_picture()
    (static / "playground.svg").write_text(still.svg, encoding="utf-8")
    names = {path.name[:2]: f"{path.stem}.html" for path in chapters}
    page = (SOURCES / "index.html").read_text(encoding="utf-8")
    filled = {
        "title": escape(title),
        "first": names["00"],
        "paper": names["07"],
        "film_ends": _film_ends(data["learning"]),
        "still": escape(still.description),
        "still_height": f"{still.height}",
        "result": _result(),
        "chapters": "\n".join(_items(chapters[0], names)),
    }
    for name, text in filled.items():
        page = page.replace("{" + name + "}", text)
    (pages / "index.html").write_text(page, encoding="utf-8")


def _data() -> dict[str, Any]:
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


def _film_ends(film: dict[str, Any]) -> str:
    ends = [f"{model['name']} with {model['known'][-1]}" for model in film["models"]]
    return f"{' and '.join(ends)} of {film['n_facts']}"


def _result() -> str:
    """What chapter 00 ends with, beside the dense model of the same work per word: means of the recorded runs."""
    names = {"course-dense-x2": "dense", "course-gshard": "experts"}
    rows = [row for row in metric_rows(records("neighbours"), names) if row["metric"] == "recall, rare people"]
    runs = {kind: [row["value"] for row in rows if row["model"] == kind] for kind in names.values()}
    dense, experts = (f"{int(100 * mean(values) + 0.5)}%" for values in runs.values())
    return (
        f"Asked about people whom its text rarely mentions, a model without experts answers <b>{dense}</b> of the"
        f" questions correctly. A model with 16 experts does the same work per word and answers <b>{experts}</b>"
        f" (means of {len(runs['experts'])} runs)."
    )


def _items(chapter: Path, names: dict[str, str]) -> list[str]:
    cells = json.loads(chapter.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return [
        f'          <li><a href="{names[number]}">{number} {escape(name)}</a> <span>{escape(question)}</span>'
        f" <small>{minutes} min</small></li>"
        for number, name, question, minutes in ROW.findall(text)
    ]
