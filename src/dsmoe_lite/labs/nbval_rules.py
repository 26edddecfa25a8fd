"""A pytest plugin that sets how `pytest --nbval` compares each kind of cell.

Untagged cells: exact comparison, except for images. `trained`: text is compared, charts and reported values are not.
`measured`, and cells whose reference shows a widget: executed, not compared. stderr is never compared. An exception
always fails.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from dsmoe_lite.labs.claims import without_value
from dsmoe_lite.labs.guesses import READER
from dsmoe_lite.labs.results import MIME

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
NUMERIC = (MIME, "application/vnd.vega", "image/")  # prefixes of MIME types that contain numbers of a training


def pytest_configure(config: pytest.Config) -> None:
    """With --nbval: use this interpreter as the kernel, hide progress bars and record the history of inputs."""
    if not config.getoption("nbval", default=False):
        return
    from nbval.kernel import RunningKernel

    os.environ["TQDM_DISABLE"] = "1"
    os.environ.pop(READER, None)  # nobody is there to guess, even in a terminal of JupyterLab
    config.option.nbval_current_env = True
    RunningKernel.execute_cell_input = _execute_with_history  # `check_parameters` reads the history


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Set the comparison of each cell by its tags and its reference output."""
    for item in items:
        if hasattr(item, "cell") and hasattr(item, "compare_outputs"):
            _set_comparison(item)


def _set_comparison(item: Any) -> None:
    item.parent.skip_compare = (*item.parent.skip_compare, "stderr")
    tags = item.cell.metadata.get("tags", [])
    if "measured" in tags or any(WIDGET_VIEW in output.get("data", {}) for output in item.cell.outputs):
        item.options["check"] = False
    elif "trained" in tags:
        compare = item.compare_outputs
        item.compare_outputs = lambda test, ref: compare(list(_without_numbers(test)), list(_without_numbers(ref)))


def _without_numbers(outputs: Iterable[Any]) -> Iterator[Any]:
    """Outputs reduced to what repeats: of charts and reported results only the MIME types, of claims no values."""
    for output in outputs:
        data = output.get("data", {})
        types = [mime for mime in data if mime.startswith(NUMERIC)]
        if types:
            text = {"text/plain": without_value(data["text/plain"])} if MIME in data else {}
            output = type(output)({**output, "data": dict.fromkeys(types, "not compared") | text})
        yield output


def _execute_with_history(kernel: Any, cell_input: str, allow_stdin: bool | None = None) -> str:
    message: str = kernel.kc.execute(cell_input, store_history=True, allow_stdin=allow_stdin, stop_on_error=False)
    return message
