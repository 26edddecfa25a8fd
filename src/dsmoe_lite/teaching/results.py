"""One typed table from a folder of executed notebooks, and a summary of one metric by one parameter."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dsmoe_lite.common.errors import MAX_FLOAT, MAX_INT, InputError, find_name, require
from dsmoe_lite.common.files import atomic_write
from dsmoe_lite.common.paths import install_command
from dsmoe_lite.common.stats import mean_and_half_width
from dsmoe_lite.labs.executed import Executed, read_executed

FORMATS = (".csv", ".parquet")
VERSIONS = ("run.dsmoe_lite", "run.commit", "run.torch")
LEAST_RUNS = 3  # with fewer, an interval says little


@dataclass(frozen=True)
class Results:
    """The runs of one notebook. rows: one mapping per run, all with the same columns, in the order of their files."""

    parameters: list[str]
    metrics: list[str]
    rows: list[dict[str, Any]]
    edited: list[Path]


@dataclass(frozen=True)
class Group:
    """The runs with the same values of some parameters: their number, mean and half their 95% t-interval."""

    values: tuple[Any, ...]
    n: int
    mean: float
    half_width: float | None


def read_results(folder: Path) -> Results:
    """Read all unedited results in `folder`: parameters, metrics, and how each was made (columns "run.").

    A metric that is a list or a mapping becomes one column per entry, "name.key"; one that has the name of a parameter
    becomes "result.name". Raises InputError if there is none, if they are of different notebooks or of different
    versions of one, if two have the same parameters, or if two metrics get one name.
    """
    folder = folder.expanduser()
    found = list(read_executed(folder))
    results = [one for one in found if not one.edited]
    nothing = "has only results that were edited" if found else "holds no results of `dsmoe run` or `dsmoe labs run`"
    require(bool(results), "folder", str(folder), nothing)
    for name, several in (("notebooks", {o.chapter for o in results}), ("versions", {o.source for o in results})):
        require(len(several) == 1, name, sorted(several), f"{folder} mixes them: move all but one away")
    by_parameters: dict[str, Path] = {}
    for one in results:
        twin = by_parameters.setdefault(str(one.parameters), one.path)
        require(twin == one.path, "results", [twin.name, one.path.name], "have the same parameters: move one away")
    parameters = list(results[0].parameters)
    values = [_unique(_flat(one.result), one.path) for one in results]
    metrics = list(dict.fromkeys(name for flat in values for name in flat))
    rows = [_row(one, flat, metrics) for one, flat in zip(results, values, strict=True)]
    edited = [one.path for one in found if one.edited]
    return Results(parameters, [_column(name, parameters) for name in metrics], rows, edited)


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


def summary(results: Results, metric: str, by: Sequence[str]) -> list[Group]:
    """`metric` per combination of the parameters `by`, in rising order.

    Raises InputError with the nearest name for one that is no metric or no parameter, and for values that are no finite
    numbers.
    """
    _known("metric", metric, results.metrics)
    for name in by:
        _known("parameter", name, results.parameters)
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in results.rows:
        value = row[metric]
        if value is not None:
            number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_FLOAT
            require(number, f"metric {metric}", value, "is no finite number; name another metric")
            groups.setdefault(tuple(row[name] for name in by), []).append(float(value))
    require(bool(groups), f"metric {metric}", None, "no run reports it")
    keys = sorted(groups, key=lambda key: [(isinstance(part, str), part) for part in key])
    return [Group(key, len(groups[key]), *mean_and_half_width(groups[key])) for key in keys]


def other_varied(results: Results, by: Sequence[str]) -> list[str]:
    """Parameters and versions that vary and are not in `by`, except the seed: a summary mixes their values."""
    columns = [*results.parameters, *(name for name in results.rows[0] if name in VERSIONS)]
    varied = [name for name in columns if len({str(row[name]) for row in results.rows}) > 1]
    return [name for name in varied if name not in by and name != "seed"]


def _known(kind: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise InputError(f"unknown {kind} {name}: {find_name(name, known) if known else 'the runs report none'}")


def _row(one: Executed, values: dict[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    cells = [
        ("notebook", one.path.name),
        *one.parameters.items(),
        *((_column(name, one.parameters), values.get(name)) for name in metrics),  # None: this run did not report it
        *((f"run.{name}", one.record.get(name)) for name in ("wall_s", "cpu_s", "peak_mb")),
        *((f"run.{name}", value) for name, value in dict(one.record["versions"]).items()),
    ]
    return _unique(cells, one.path)


def _column(metric: str, parameters: Collection[str]) -> str:
    return f"result.{metric}" if metric in parameters or metric == "notebook" else metric


def _type(values: Sequence[Any]) -> str:
    """The pandas type of a column; each of them has room for missing values."""
    found = {type(value) for value in values if value is not None}
    if found == {int} and all(value is None or abs(value) <= MAX_INT for value in values):
        return "Int64"
    if found and found <= {int, float} and all(value is None or abs(value) <= MAX_FLOAT for value in values):
        return "Float64"
    return "boolean" if found == {bool} else "string"


def _flat(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested results with dotted names."""
    if not isinstance(values, dict | list):
        return [(prefix, values)]
    entries = values.items() if isinstance(values, dict) else enumerate(values)
    return [pair for key, value in entries for pair in _flat(value, f"{prefix}.{key}" if prefix else str(key))]


def _unique(cells: Sequence[tuple[str, Any]], path: Path) -> dict[str, Any]:
    names = [name for name, _ in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, "columns", twice, f"two values of {path.name} have this name: rename a result")
    return dict(cells)
