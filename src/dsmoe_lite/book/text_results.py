"""The page of the second protocol's results: every model at both lengths, from the records."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from dsmoe_lite.common.paths import NOTEBOOKS
from dsmoe_lite.common.stats import mean_and_half_width
from dsmoe_lite.study import ledger
from dsmoe_lite.study.grids import records

PAGE = NOTEBOOKS / "pages" / "text_results.md"
SHORT, LONG = "text-short", "text-long"
HEAD = """# Real text, model by model

What the [second protocol](../07_text_protocol.md) reports beside its verdicts: all models at both lengths. Each cell is
the mean over the seeds, with its 95% interval but for single domains. The protocol describes the models; [chapter
07](../07_paper_experiments.ipynb) tells what follows. This page is made from `data/runs/text-long` and
`data/runs/text-short`; each record there is one seed.
"""
RISES = {
    "best sixteenth replaced": "rise, best sixteenth replaced",
    "gain of replacements": "gain of replacements, best sixteenth",
    "shared expert swapped": "rise, shared expert swapped",
    "best routed expert replaced": "rise, best routed expert replaced",
    "domain in the choice": "domain in the choice",
    "before training": "domain in the choice, untrained",
}
STEPS = {SHORT: "750", LONG: "1,500"}
Runs = Mapping[str, Sequence[dict[str, Any]]]


def page() -> str:
    """The page as the records have it."""
    runs = {grid: records(grid) for grid in (SHORT, LONG)}
    return "\n".join([HEAD, *_losses(runs), *_rises(runs), *_differences(runs)])


def _losses(runs: Runs) -> list[str]:
    domains = list(runs[LONG][0]["heldout_bits_per_byte"])[1:]
    rows = [
        [
            *(name, steps, str(len(of_model))),
            _cell(of_model, ledger.METRICS["bits per byte"]),
            *(f"{fmean(one['heldout_bits_per_byte'][domain] for one in of_model):.3f}" for domain in domains),
            _cell(of_model, ledger.METRICS["MaxVio"]),
        ]
        for name, steps, of_model in _by_model(runs)
    ]
    head = ["model", "steps", "seeds", "all", *domains, "MaxVio"]
    return ["## Bits per byte of held-out text, and MaxVio", "", *_table(head, rows), ""]


def _rises(runs: Runs) -> list[str]:
    rows = [
        [name, steps, *(_cell(of_model, ledger.METRICS[metric]) for metric in RISES.values())]
        for name, steps, of_model in _by_model(runs)
        if name != "dense"
    ]
    words = (
        "By how many bits per byte the loss rises; then Theil's U of domain and first choice, an average over layers."
    )
    return ["## Experts replaced, and domains", "", words, "", *_table(["model", "steps", *RISES], rows), ""]


def _differences(runs: Runs) -> list[str]:
    rows = []
    for claim in ledger.load():
        if claim.trend and claim.trend.grid == LONG and claim.trend.metric == "bits per byte":
            both = [list(ledger.differences(claim.trend, runs[grid]).values()) for grid in (SHORT, LONG)]
            pair = f"{claim.trend.model} - {claim.trend.other}"
            rows.append([pair, *(_interval(values) for values in both)])
    words = "In bits per byte, over the seeds that both models have. Below 0: as the paper reports."
    return [
        "## Do differences grow with training?",
        "",
        words,
        "",
        *_table(["first - second", "750 steps", "1,500 steps"], rows),
        "",
    ]


def _by_model(runs: Runs) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Model, steps and records, both lengths of a model together."""
    for name in sorted({record["model_name"] for record in runs[LONG]}):
        for grid, steps in STEPS.items():
            of_model = [record for record in runs[grid] if record["model_name"] == name]
            if of_model:
                yield name, steps, of_model


def _cell(runs: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> str:
    try:
        return _interval([value(one) for one in runs])
    except LookupError:  # not measured for this model, or at this length
        return "-"


def _interval(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, half = mean_and_half_width(values)
    return f"{mean:.3f}" if half is None else f"{mean:.3f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{half:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    marks = ["---", *("---:" for _ in head[1:])]
    return [f"| {' | '.join(row)} |" for row in (head, marks, *rows)]
