"""`dsmoe run`: run a chapter with other parameters, as in `dsmoe run 02 -p top_k=1 -p profile=smoke`."""

from pathlib import Path

import click

from dsmoe_lite.cli.tables import json_option, print_rows
from dsmoe_lite.labs.chapters import chapter_schema, find_notebook
from dsmoe_lite.labs.execute import run_chapter
from dsmoe_lite.labs.parameters import parse_assignments


@click.command(name="run")
@click.argument("chapter")
@click.option("-p", "assignments", multiple=True, metavar="NAME=VALUE", help="Set a parameter; may be repeated.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder or .ipynb file to write to.  [default: runs/]")
@json_option
def command(chapter: str, assignments: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Run CHAPTER with parameters, write the executed notebook and print its results.

    CHAPTER is a number (02), a name (gshard) or the path of a notebook of your own.
    """
    notebook = find_notebook(chapter)
    run = run_chapter(notebook, parse_assignments(chapter_schema(notebook), assignments), out)
    if run.kept:
        click.echo(f"dsmoe: {run.kept} was edited and is kept; this run is {run.notebook.name}", err=True)
    if as_json:
        print_rows([{"notebook": str(run.notebook), "parameters": run.parameters, "result": run.result}], as_json=True)
        return
    click.echo(str(run.notebook))
    if run.result:
        print_rows([{"result": name, "value": value} for name, value in run.result.items()], as_json=False)
