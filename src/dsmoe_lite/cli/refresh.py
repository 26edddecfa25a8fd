"""`dsmoe refresh`: write the chapters' reference outputs."""

import click

from dsmoe_lite.common import paths
from dsmoe_lite.labs.chapters import find_chapter
from dsmoe_lite.labs.refresh import refresh_chapter


@click.command(name="refresh")
@click.argument("chapters", nargs=-1)
@click.option("--measure", is_flag=True, help="Renew the outputs of `measured` cells too.")
def command(chapters: tuple[str, ...], measure: bool) -> None:
    """Execute CHAPTERS (by default all of notebooks/*.py) and write their .ipynb files."""
    if chapters:
        sources = [find_chapter(name, ".py") for name in chapters]
    else:
        sources = sorted(paths.NOTEBOOKS.glob("[0-9]*.py"))
    for source in sources:
        changed = refresh_chapter(source, measure=measure)
        click.echo(f"{source.stem}: {'written' if changed else 'unchanged'}")
