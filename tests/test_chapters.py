"""Every chapter: its two files agree, it follows the rules for chapters, and it runs with other parameters."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations, takewhile
from pathlib import Path

import jupytext
import nbformat
import pytest

from dsmoe_lite.common import paths
from dsmoe_lite.labs.chapters import chapter_schema, chapters
from dsmoe_lite.labs.execute import run_chapter
from dsmoe_lite.labs.nbval_rules import WIDGET_VIEW
from dsmoe_lite.labs.parameters import check_value, find_parameter
from dsmoe_lite.labs.refresh import FOLDED, LIMIT, WIDGET_STATE
from dsmoe_lite.viz import explorer, playground, theme
from dsmoe_lite.viz.renderer import MIME as CHART

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("[0-9]*.ipynb"))
KINDS = {"trained", "measured"}  # an untagged cell is exact
OTHER_TAGS = {"parameters", "hide-input", "hide-cell", "hide-output", "remove-input", "remove-cell", "remove-output"}
CHART_LIMIT = 150 * 1024  # bytes, with one element per line as nbformat writes it
SHOWS = re.compile(r"charts\.|live\(|explore\(|report\(|print\(|predict\(|lab\.ask\(")
ADDRESS = re.compile(r"0x[0-9a-f]{6,}")  # of an object in memory, which differs between runs

SMOKE_BUDGET = 20.0  # CPU seconds of a chapter on the idle reference machine, without kernel start and imports
LARGER_BUDGETS = {"12": 60.0}  # starts processes, each of which imports torch

OTHER = {"profile": "smoke", "seed": 1}  # for the quick run of every chapter
FURTHER = {  # for the slow runs; a chapter without an entry gets three seeds
    "01": [{"seed": 2}, {"ffn_width": 32}, {"learning_rate": 0.01}],
    "02": [{"seed": 2, "top_k": 1}, {"n_experts": 8, "top_k": 4}, {"capacity_factor": 0.5, "balance_weight": 0.0}],
    "03": [{"seed": 2}, {"layer": 1}],
    "04": [{"seed": 2}, {"m": 8, "n_experts": 8, "top_k": 1}, {"m": 2, "balance_weight": 0.0}],
    "05": [{"seed": 2}, {"n_shared": 7}, {"n_shared": 1, "common": 0.0}],
    "06": [
        {"seed": 2, "method": "z"},
        {"n_experts": 8, "top_k": 2},
        {"method": "sequence", "bias_speed": 0.03},
    ],
    "09": [{"seed": 2, "latent": 8}, {"n_kv_heads": 4, "window": 1, "latent": 4}, {"window": 64, "latent": 128}],
    "07": [{"seed": 151, "live": "dense"}, {"seed": 152, "live": "gshard", "live_steps": 60}, {"seed": 0}],
    "08": [
        {"run": 3, "layer": 1, "domain": "brackets"},
        {"checkpoint": str(paths.DATA / "models" / "world-deepseekmoe.safetensors")},
        {
            "checkpoint": str(paths.DATA / "models" / "paper-gshard-seed1.safetensors"),
            "text_folder": str(paths.DATA / "runs" / "neighbours"),
            "domain": "text",
        },
    ],
    "10": [{"seed": 2, "n_experts": 8, "top_k": 8}, {"n_experts": 128, "top_k": 1, "gpu": "A100"}, {"gpu": "H200"}],
    "11": [{"seed": 2}, {"reach": 1}, {"reach": 8}],
    "12": [{"seed": 2, "processes": 2}, {"top_k": 4, "across": 400.0}, {"top_k": 1, "tokens": 65536, "latency": 0.0}],
    "14": [{"tables": "none", "seed": 2}, {"tables": "last"}, {"tables": "both"}],
    "13": [{"seed": 2, "n_layers": 1}, {"mtp_weight": 0.0, "block": 16}, {"n_layers": 8, "block": 256}],
}
SEEDS = [{"seed": 2}, {"seed": 3}, {"seed": 2**31 - 1}]

each_chapter = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def test_the_book_has_all_chapters():
    assert NOTEBOOKS
    assert sorted(chapters()) == NOTEBOOKS
    assert [path.stem for path in sorted(paths.NOTEBOOKS.glob("[0-9]*.py"))] == [path.stem for path in NOTEBOOKS]


@each_chapter
def test_source_and_notebook_agree(notebook):
    def cells(read):
        return [(cell.cell_type, cell.source, tags(cell)) for cell in read.cells]

    source = notebook.with_suffix(".py")
    assert cells(jupytext.read(source)) == cells(nbformat.read(notebook, as_version=4))
    assert "jupytext_version" not in source.read_text(encoding="utf-8")


@each_chapter
def test_notebook_is_small_and_valid(notebook):
    assert notebook.stat().st_size <= LIMIT
    nbformat.validate(nbformat.read(notebook, as_version=4))


@each_chapter
def test_no_chart_is_wider_than_a_page(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    sizes = [output.get("metadata", {}).get("image/png", {}).get("width", 0) for output in outputs]
    assert max(sizes) <= theme.MAX_WIDTH


@each_chapter
def test_every_chart_and_explorer_has_an_image_and_a_description(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            data = output.get("data", {})
            if CHART in data or ("explore(" in cell.source and WIDGET_VIEW in data):
                assert len(data["image/png"]) > 2000
                assert len(data["text/plain"]) >= theme.MIN_DESCRIPTION
                assert len(json.dumps(data, indent=1)) < CHART_LIMIT


@each_chapter
def test_stored_explorers_and_playgrounds_are_up_to_date(notebook):
    widgets = nbformat.read(notebook, as_version=4).metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    for widget in widgets.values():
        if widget["model_module"] == "anywidget":
            of_playground = "lesson" in widget["state"]
            assert widget["state"]["_esm"] == (
                playground.script() + playground.MOUNT if of_playground else explorer.script()
            )
            assert widget["state"]["_css"] == (playground if of_playground else explorer).style()
            if of_playground:
                assert widget["state"]["evidence"] == playground.evidence()


def moves_without_a_kernel(data):
    """Whether an output is a chart with a slider or menu of its own."""
    return any("bind" in param for param in data.get(CHART, {}).get("params", []))


@each_chapter
def test_every_chapter_has_a_chart_and_a_control_that_moves_in_the_book(notebook):
    cells = code_cells(notebook)
    data = [output.get("data", {}) for cell in cells for output in cell.outputs]
    explored = any("explore(" in cell.source for cell in cells)  # the explorer answers in the book, too
    assert notebook.name.startswith("00") or any(CHART in one for one in data)
    assert explored or any(moves_without_a_kernel(one) for one in data)


def test_controls_that_need_python_compute_what_a_reader_trained():
    cells = {path.name[:2]: [cell for cell in code_cells(path) if re.search(r"^live\(", cell.source, re.MULTILINE)]
             for path in NOTEBOOKS}  # fmt: skip
    assert {number for number, found in cells.items() if found} == {"01", "02"}
    for cell in cells["01"] + cells["02"]:
        assert "trained" in tags(cell)
        assert any(WIDGET_VIEW in output.get("data", {}) for output in cell.outputs)


@each_chapter
def test_parameters_have_ranges_and_profile_and_seed(notebook):
    schema = chapter_schema(notebook)
    assert schema["profile"].choices == ("smoke", "cpu", "gpu")
    assert schema["profile"].default == "cpu"
    assert (schema["seed"].type, schema["seed"].low, schema["seed"].high) == ("int", 0, 2**31 - 1)
    assert all(parameter.help for parameter in schema.values())
    assert sum("parameters" in tags(cell) for cell in code_cells(notebook)) == 1


@each_chapter
def test_parameters_are_checked_in_the_cell_after_them(notebook):
    sources = [cell.source for cell in code_cells(notebook)]
    index = next(i for i, cell in enumerate(code_cells(notebook)) if "parameters" in tags(cell))
    assert "begin(globals()" in sources[index + 1]


@each_chapter
def test_the_hidden_setup_is_at_most_twelve_lines(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    after = next(i for i, cell in enumerate(cells) if "parameters" in tags(cell)) + 1
    hidden = list(takewhile(lambda cell: "hide-input" in tags(cell), cells[after:]))
    assert sum(len(cell.source.splitlines()) for cell in hidden) <= 12


@each_chapter
def test_cells_are_of_the_three_kinds(notebook):
    cells = code_cells(notebook)
    assert {tag for cell in cells for tag in tags(cell)} <= KINDS | OTHER_TAGS
    kinds = Counter(next(iter(KINDS & set(tags(cell))), "exact") for cell in cells)
    assert all(len(KINDS & set(tags(cell))) <= 1 for cell in cells)
    assert kinds["exact"] > 0, kinds
    claims = [cell for cell in cells if re.search(r"^\s*claim\(", cell.source, re.MULTILINE)]
    assert all("trained" in tags(cell) for cell in claims)
    assert claims or not kinds["trained"], "trained cells, and no claim holds their result to an interval"


@each_chapter
def test_jupyterlab_folds_what_the_book_folds(notebook):
    for cell in code_cells(notebook):
        folded = {key: True for key, folding in FOLDED.items() if folding & set(tags(cell))}
        assert cell.metadata.get("jupyter", {}) == folded


@each_chapter
def test_cells_that_only_check_are_folded(notebook):
    for cell in code_cells(notebook):
        if re.search(r"^\s*claim\(", cell.source, re.MULTILINE) and not SHOWS.search(cell.source):
            assert "hide-cell" in tags(cell), cell.source


@each_chapter
def test_every_cell_ran_in_order_without_error(notebook):
    cells = [cell for cell in code_cells(notebook) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]


@each_chapter
def test_compared_outputs_contain_no_addresses(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            assert "measured" in tags(cell) or not ADDRESS.search(text), text


@pytest.fixture(scope="session")
def startup_seconds() -> float:
    """CPU seconds to start a kernel and import the packages of a chapter."""
    before = os.times()
    subprocess.run(
        [sys.executable, "-c", "import ipykernel.kernelapp, torch, altair, vl_convert, tokenizers"], check=True
    )
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


@each_chapter
def test_a_smoke_run_with_another_seed_stays_within_the_budget(notebook, tmp_path, slowness, startup_seconds):
    run = run_chapter(notebook, OTHER, tmp_path)
    assert run.notebook.stat().st_size <= LIMIT
    assert paths.RUNS not in run.notebook.parents
    budget = LARGER_BUDGETS.get(notebook.name[:2], SMOKE_BUDGET)
    assert run.cpu_s - startup_seconds <= 2 * budget * slowness


@pytest.mark.slow
@each_chapter
def test_three_further_parameter_sets_give_three_results(notebook, tmp_path):
    schema = chapter_schema(notebook)
    results = []
    for values in FURTHER.get(notebook.name[:2], SEEDS):
        checked = {
            name: check_value(find_parameter(schema, name), value)
            for name, value in {"profile": "smoke", **values}.items()
        }
        results.append(run_chapter(notebook, checked, tmp_path).result)
    if any("trained" in tags(cell) for cell in code_cells(notebook)):
        assert all(one != other for one, other in combinations(results, 2)), results
