"""A small book of two chapters with every kind of thing that the real ones hold."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import chart_samples
import nbformat
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from dsmoe_lite.common import paths
from dsmoe_lite.viz import renderer

BOOK = {
    "title": "A small book",
    "author": "dsmoe-lite contributors",
    "bibliography": "notebooks/references.bib",
    "toc": {
        "format": "jb-book",
        "root": "notebooks/00_first",
        "chapters": [{"file": "notebooks/01_second"}, {"file": "notebooks/glossary"}, {"file": "notebooks/references"}],
    },
}
EQUATION = r"""
# Experts

## A layer

The gate of expert $i$ for token $t$ is

$$
g_{i,t} = \begin{cases} s_{i,t}, & s_{i,t} \in \operatorname{Topk}(\{s_{j,t} \mid 1 \le j \le E\}, K) \\
0, & \text{otherwise} \end{cases}
$$ (eq:gate)

and {eq}`eq:gate` is from {cite:t}`DeepSeekMoE2024`, after {cite:p}`GShard2020`. The output adds them up:

\begin{align}
\mathbf{h}_t = \boldsymbol{u}_t + \sum_{i=1}^{E} g_{i,t}\, \operatorname{FFN}_i(\mathbf{u}_t)
\end{align}

| model | loss |
|---|---|
| dense | 2.31 |

```{admonition} What to notice
Experts are chosen per token: each
expert of a token adds to its output, times GATE.
```
"""

GLOSSARY = """# Words

```{glossary}
expert
  One of several FFNs.

GATE
  An acronym.

expert of a token
  The one that a token uses.
```
"""


def write(root: Path, names: tuple[str, ...] = ("training_curves", "token_routing")) -> Path:
    """Write book.yml and notebooks/ under `root`; return book.yml."""
    notebooks = root / "notebooks"
    notebooks.mkdir(parents=True)
    for name in ("references.bib", "references.md"):
        shutil.copy(paths.NOTEBOOKS / name, notebooks)
    (notebooks / "glossary.md").write_text(GLOSSARY, encoding="utf-8")
    (root / "book.yml").write_text(yaml.safe_dump(BOOK), encoding="utf-8")
    save(notebooks / "00_first.ipynb", [new_markdown_cell("# Start here\n\nThen read {eq}`eq:gate`.")])
    samples = chart_samples.every_chart()
    outputs = [(f"charts.draw({name!r})", chart_output(samples[name])) for name in names]
    outputs.append(("print('text')", [new_output("stream", name="stdout", text="text\n" * 3)]))
    outputs.append(("report(loss=2.31)", [result_output()]))
    outputs.append(("slider", [widget_output()]))
    cells = [code_cell(source, output) for source, output in outputs]
    cells[0].metadata["tags"] = ["hide-input"]
    save(notebooks / "01_second.ipynb", [new_markdown_cell(EQUATION), *cells])
    return root / "book.yml"


def save(path: Path, cells: list[Any]) -> None:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    language = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python", "pygments_lexer": "ipython3"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": language}), path)


def code_cell(source: str, outputs: list[Any]) -> Any:
    return new_code_cell(source, outputs=outputs, execution_count=1)


def chart_output(chart: Any) -> list[Any]:
    data, metadata = renderer.bundle(chart.to_dict())
    return [new_output("execute_result", data=data, metadata=metadata, execution_count=1)]


def result_output() -> Any:
    return new_output("display_data", data={"application/vnd.dsmoe.result+json": {"loss": 2.31}})


def widget_output() -> Any:
    view = {"model_id": "0", "version_major": 2, "version_minor": 0}
    data = {"application/vnd.jupyter.widget-view+json": view, "text/plain": "IntSlider(value=3)"}
    return new_output("display_data", data=data)


class Anchors(HTMLParser):
    """The ids of a page, and where it links."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        words = dict(attributes)
        if words.get("id"):
            self.ids.add(str(words["id"]))
        if tag == "a" and words.get("href"):
            self.links.append(str(words["href"]))


def assert_links_work(folder: Path) -> int:
    """Every link from a page of the reference leads to a page of the book and an id on it; return how many do."""
    anchors = {page: Anchors(page) for page in folder.rglob("*.html")}
    n_links = 0
    for page in folder.glob("api/*.html"):
        for link in anchors[page].links:
            if not re.match(r"[a-z]+:", link):
                file, _, anchor = link.partition("#")
                target = (page.parent / file).resolve() if file else page
                assert target.exists(), (page.name, link)
                assert not anchor or target.suffix != ".html" or anchor in anchors[target].ids, (page.name, link)
                n_links += 1
    return n_links
