"""Write the reference outputs, notebooks/*.ipynb. Nothing else writes them; a second refresh changes no byte."""

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from dsmoe_lite.common.errors import RunError
from dsmoe_lite.common.files import write_text
from dsmoe_lite.common.progress import progress

LIMIT = 1_000_000  # bytes of a notebook
FOLDED = {  # what JupyterLab folds, by the tags with which the book folds it
    "source_hidden": {"hide-input", "hide-cell"},
    "outputs_hidden": {"hide-output", "hide-cell"},
}
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


def refresh_chapter(source: Path, *, measure: bool = False) -> bool:
    """Execute the percent script `source` and write the .ipynb beside it; return whether that file changed.

    Without `measure`, a `measured` cell keeps its stored output unless its source has changed. Raises RunError for a
    cell that fails and for a notebook over 1 MB; the old file then stays as it is.
    """
    import jupytext
    import nbformat

    target = source.with_suffix(".ipynb")
    notebook = jupytext.read(source)
    _fix_metadata(notebook, source.stem)
    _execute(notebook, source.stem)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _merge_streams([out for out in cell.outputs if out.get("name") != "stderr"])
    if not measure and target.exists():
        _restore_measured(notebook, nbformat.read(target, as_version=4))
    text = nbformat.writes(_renumber_widgets(notebook)) + "\n"
    size = len(text.encode())
    if size > LIMIT:
        raise RunError(f"{source.stem}: {size:,} bytes with outputs, over the limit of {LIMIT:,}; {_largest(notebook)}")
    changed = not target.exists() or target.read_text(encoding="utf-8") != text
    if changed:
        write_text(target, text)
    return changed


def _execute(notebook: Any, name: str) -> None:
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    from dsmoe_lite.labs import jupyter_kernel

    with tempfile.TemporaryDirectory(prefix="dsmoe-refresh-") as folder:
        client = NotebookClient(
            notebook,
            kernel_name=jupyter_kernel.NAME,
            kernel_manager_class=jupyter_kernel.SameInterpreterKernelManager,
            timeout=None,
            record_timing=False,
            store_widget_state=True,
            resources={"metadata": {"path": folder}},
        )
        client.reset_execution_trackers()
        # cell by cell: client.execute() turns Ctrl-C into a dead kernel
        with client.setup_kernel():
            for index, cell in enumerate(progress(notebook.cells, desc=name, unit="cell", disable=None)):
                try:
                    client.execute_cell(cell, index)
                except CellExecutionError as error:
                    location = f"{name}: cell In [{cell.execution_count}]"
                    raise RunError(f"{location} stopped with {error.ename}: {error.evalue}") from None
                except DeadKernelError:
                    raise RunError(f"{name}: the kernel died (out of memory?)") from None
            client.set_widgets_metadata()


def _fix_metadata(notebook: Any, name: str) -> None:
    """Set metadata that is the same in every refresh: kernel name and cell ids, without pairing or Python version."""
    from dsmoe_lite.labs import jupyter_kernel

    notebook.metadata.clear()
    notebook.metadata["kernelspec"] = dict(jupyter_kernel.METADATA)
    notebook.metadata["language_info"] = {
        "name": "python",
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "pygments_lexer": "ipython3",
        "codemirror_mode": {"name": "ipython", "version": 3},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    number = name.partition("_")[0]
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"{number}-{index:03d}"
        hidden = {key: True for key, folding in FOLDED.items() if folding & set(cell.metadata.get("tags", []))}
        if hidden:
            cell.metadata["jupyter"] = hidden


def _merge_streams(outputs: list[Any]) -> list[Any]:
    """Join adjacent outputs of one stream, because how a kernel splits them depends on timing."""
    merged: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and merged and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def _restore_measured(notebook: Any, stored: Any) -> None:
    """Copy the outputs of `measured` cells from cells of `stored` with the same source, in order."""
    outputs = defaultdict(list)
    for cell in stored.cells:
        if "measured" in cell.metadata.get("tags", []) and cell.execution_count is not None:
            outputs[cell.source].append(cell.outputs)
    for cell in notebook.cells:
        if "measured" in cell.metadata.get("tags", []) and outputs[cell.source]:
            cell.outputs = outputs[cell.source].pop(0)


def _renumber_widgets(notebook: Any) -> Any:
    """Replace the random ids of widgets by their order of creation, everywhere in the notebook."""
    import nbformat

    state = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    text = json.dumps(notebook)
    for number, model_id in enumerate(state):
        text = text.replace(model_id, f"{number:032x}")
    return nbformat.from_dict(json.loads(text))


def _largest(notebook: Any) -> str:
    cell = max(notebook.cells, key=lambda cell: len(json.dumps(cell)))
    return f"the largest cell, {len(json.dumps(cell)):,} bytes, begins with {cell.source.splitlines()[0]!r}"
