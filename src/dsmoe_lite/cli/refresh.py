"""`dsmoe refresh`: write the reference outputs of the chapters."""

import click

from dsmoe_lite.common import paths
from dsmoe_lite.labs.chapters import find_chapter
from dsmoe_lite.labs.refresh import refresh_chapter


@click.command(name="refresh")
@click.argument("chapters", nargs=-1)
@click.option("--measure", is_flag=True, help="Also replace the outputs of cells tagged `measured`.")
def command(chapters: tuple[str, ...], measure: bool) -> None:
    """Execute CHAPTERS (by default all notebooks/*.py) and write their .ipynb files."""
    paths.require_clone("refresh")
    if chapters:
        sources = [find_chapter(name, ".py") for name in chapters]
    else:
        sources = sorted(paths.NOTEBOOKS.glob("[0-9]*.py"))
    for source in sources:
        changed = refresh_chapter(source, measure=measure)
        click.echo(f"{source.stem}: {'written' if changed else 'unchanged'}")
