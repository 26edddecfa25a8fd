"""One typed table from a folder of executed notebooks, and a summary of one metric by one parameter."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dsmoe_lite.common.errors import InputError, find_name, require
from dsmoe_lite.common.files import atomic_write
from dsmoe_lite.common.paths import install_command
from dsmoe_lite.common.stats import mean_and_half_width
from dsmoe_lite.labs.executed import Executed, read_executed

FORMATS = (".csv", ".parquet")
LEAST_RUNS = 3  # with fewer, an interval says little


@dataclass(frozen=True)
class Results:
    """The runs of one notebook. rows: one mapping per run, all with the same columns, in the order of their files."""

    parameters: list[str]
    metrics: list[str]
    rows: list[dict[str, Any]]
    edited: list[Path]


def read_results(folder: Path) -> Results:
    """Read all unedited results in `folder`: parameters, metrics, and how each was made.

    A metric that is a list or a mapping becomes one column per entry, "name.key". Raises InputError if there is none,
    or if they are of different notebooks or of different versions of one.
    """
    found = list(read_executed(folder))
    results = [one for one in found if not one.edited]
    require(bool(results), "folder", str(folder), "holds no results of `dsmoe run` or `dsmoe labs run`")
    for name, of_run in (("notebooks", lambda one: one.chapter), ("versions", lambda one: one.source)):
        several = sorted({of_run(one) for one in results})
        require(len(several) == 1, name, several, f"{folder} mixes them: one table is of one; move the others away")
    metrics = list(dict.fromkeys(name for one in results for name in _flat(one.result)))
    parameters = list(results[0].parameters)
    rows = [_row(one, parameters, metrics) for one in results]
    return Results(
        parameters, [_column(name, parameters) for name in metrics], rows, [o.path for o in found if o.edited]
    )


def write_table(results: Results, path: Path) -> None:
    """Write the rows as .csv or .parquet, with the types of their columns, atomically."""
    require(path.suffix in FORMATS, "table", str(path), f"must end in {' or '.join(FORMATS)}")
    has_pyarrow = path.suffix == ".csv" or find_spec("pyarrow") is not None
    require(has_pyarrow, "table", str(path), f"needs pyarrow: run `{install_command('parquet')}`, or write a .csv")
    import pandas

    columns = {name: [row[name] for row in results.rows] for name in results.rows[0]}
    frame = pandas.DataFrame({name: pandas.array(values, dtype=_type(values)) for name, values in columns.items()})
    with atomic_write(path) as temporary:
        if path.suffix == ".csv":
            frame.to_csv(temporary, index=False)
        else:
            frame.to_parquet(temporary, index=False)


def summary(results: Results, metric: str, by: Sequence[str]) -> list[dict[str, Any]]:
    """Rows {by..., n, mean, half width}: the mean of `metric` and half its 95% t-interval per combination of `by`.

    Raises InputError with the nearest name for one that is no metric, or no parameter, and for a metric that is text.
    """
    _known("metric", metric, results.metrics)
    for name in by:
        _known("parameter", name, results.parameters)
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in results.rows:
        value = row[metric]
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        require(number, f"metric {metric}", value, "is no number; name another metric")
        groups.setdefault(tuple(row[name] for name in by), []).append(float(value))
    summed = []
    for key in sorted(groups, key=lambda key: [(isinstance(part, str), part) for part in key]):
        mean, half = mean_and_half_width(groups[key])
        summed.append({**dict(zip(by, key, strict=True)), "n": len(groups[key]), "mean": mean, "95% ±": half})
    return summed


def other_varied(results: Results, by: Sequence[str]) -> list[str]:
    """Parameters that vary and are not in `by`, except the seed: a summary mixes their values."""
    varied = [name for name in results.parameters if len({str(row[name]) for row in results.rows}) > 1]
    return [name for name in varied if name not in by and name != "seed"]


def _known(kind: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise InputError(f"unknown {kind} {name}: {find_name(name, known) if known else 'the runs report none'}")


def _row(one: Executed, parameters: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    values = _flat(one.result)
    record = {name: one.record.get(name) for name in ("wall_s", "cpu_s", "peak_mb")}
    made_by = dict(one.record.get("versions", {}))
    return {
        "notebook": one.path.name,
        **{name: one.parameters.get(name) for name in parameters},
        **{_column(name, parameters): values.get(name) for name in metrics},  # None: this run did not report it
        **record,
        **made_by,
    }


def _column(metric: str, parameters: Sequence[str]) -> str:
    return f"result {metric}" if metric in parameters else metric


def _type(values: Sequence[Any]) -> str:
    """The pandas type of a column; each of them has room for missing values."""
    found = {type(value) for value in values if value is not None}
    for types, name in (({bool}, "boolean"), ({int}, "Int64"), ({int, float}, "Float64")):
        if found and found <= types:
            return name
    return "string"


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested results by dotted names."""
    if not isinstance(values, dict | list):
        return {prefix: values}
    entries = values.items() if isinstance(values, dict) else enumerate(values)
    flat: dict[str, Any] = {}
    for key, value in entries:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
