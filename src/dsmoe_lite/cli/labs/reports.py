"""`dsmoe labs report`: sum up the runs of a sweep, or the grades of a class."""

from pathlib import Path

import click

from dsmoe_lite.cli.labs.options import FOLDER
from dsmoe_lite.cli.tables import json_option, print_rows
from dsmoe_lite.common.errors import require


@click.command(
    epilog="""\b
Example, after the sweep of the page "Teaching with it":
  dsmoe labs report runs/scores --metric "experts shared by the same token" --by tables --chart scores.svg

\b
Example, after `dsmoe labs grade`:
  dsmoe labs report graded/balance --anonymous"""
)
@click.argument("folder", type=FOLDER)
@click.option("--metric", help="The result to sum up.  [default: list the results]")
@click.option("--by", multiple=True, metavar="PARAMETER", help="Group by this parameter; may be repeated.")
@click.option("--table", type=click.Path(path_type=Path), help="Write all runs to this .csv or .parquet file.")
@click.option("--chart", type=click.Path(path_type=Path), help="Draw the metric by the groups: .svg or .png.")
@click.option("--anonymous", is_flag=True, help="Of a class: numbers for names.")
@json_option
def report(
    folder: Path,
    metric: str | None,
    by: tuple[str, ...],
    table: Path | None,
    chart: Path | None,
    anonymous: bool,
    as_json: bool,
) -> None:
    """Sum up FOLDER: of a sweep the mean of a metric by parameters, of a graded lab each question and student."""
    from dsmoe_lite.teaching.grade import RECORDS

    if (folder / RECORDS).is_dir():
        if metric is not None or by or chart:
            raise click.UsageError("--metric, --by and --chart are for a sweep; this folder has the grades of a class")
        _class(folder, table, anonymous, as_json)
        return
    if anonymous:
        raise click.UsageError(f"--anonymous is for a class; {folder} has no grades")
    _sweep(folder, metric, by, table, chart, as_json)


def _class(folder: Path, table: Path | None, anonymous: bool, as_json: bool) -> None:
    import pandas

    from dsmoe_lite.common.files import write_text
    from dsmoe_lite.teaching.class_report import by_question, by_student, hardest
    from dsmoe_lite.teaching.grade import read_all_graded

    require(table is None or table.suffix == ".csv", "table", str(table), "must end in .csv for a class")
    graded = read_all_graded(folder)
    questions, students = by_question(graded), by_student(graded, anonymous=anonymous)
    if table is not None:
        write_text(table, pandas.DataFrame(students).to_csv(index=False))
        click.echo(f"{table}: {len(students)} students", err=as_json)
    if as_json:
        print_rows([{"questions": questions, "students": students}], as_json=True)
        return
    print_rows(questions, as_json=False, title=graded[0].lab)
    worst = hardest(questions)
    if worst is not None:
        share = f"{worst['right %']}% of {worst['submissions']} submissions are right"
        click.echo(f"hardest: {worst['question']}, {share}\n")
    print_rows(students, as_json=False)


def _sweep(
    folder: Path, metric: str | None, by: tuple[str, ...], table: Path | None, chart: Path | None, as_json: bool
) -> None:
    from dsmoe_lite.teaching.report import draw
    from dsmoe_lite.teaching.results import LEAST_RUNS, other_varied, read_results, summary, write_table

    if metric is None and (by or chart):
        raise click.UsageError("--by and --chart need --metric")
    results = read_results(folder)
    groups = [] if metric is None else summary(results, metric, by)
    for path in results.edited:
        click.echo(f"dsmoe: {path.name} was edited and is left out", err=True)
    if table is not None:
        write_table(results, table)
        click.echo(f"{table}: {len(results.rows)} runs", err=as_json)
    if metric is None:
        require(bool(results.metrics), "folder", str(folder), "its runs report no results")
        print_rows([{"metric": name} for name in results.metrics], as_json=as_json)
        return
    if chart is not None:
        draw(results, metric, by, chart)
        click.echo(str(chart), err=as_json)
    half = "half_width" if as_json else "95% ±"
    rows = [
        {**{f"by {n}" if n in ("n", "mean") else n: v for n, v in zip(by, group.values, strict=True)},
         "n": group.n, "mean": group.mean, half: group.half_width}
        for group in groups
    ]  # fmt: skip
    print_rows(rows, as_json=as_json, title=metric)
    if mixed := other_varied(results, by):
        click.echo(f"dsmoe: the groups mix different values of {', '.join(mixed)}", err=True)
    if few := sum(group.n < LEAST_RUNS for group in groups):
        click.echo(f"dsmoe: {few} of {len(groups)} groups have fewer than {LEAST_RUNS} runs: add seeds", err=True)
