"""`dsmoe lab`: open JupyterLab at the reader's copy of a chapter."""

import click

from dsmoe_lite.common import paths
from dsmoe_lite.labs.chapters import chapters, find_chapter
from dsmoe_lite.labs.jupyter_server import has_display, serve
from dsmoe_lite.labs.packages import require_packages
from dsmoe_lite.labs.reader_copies import copy_chapters, renew


@click.command()
@click.argument("chapter", required=False)
@click.option("--fresh", metavar="NN", help="Replace your copy of chapter NN with a new one; keep yours as .bak.")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@click.option("--port", type=int, help="Port to listen on.  [default: 8888, or the next free one]")
@click.option(
    "--ip",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 admits other machines that have the token.",
)
def command(chapter: str | None, fresh: str | None, no_browser: bool, port: int | None, ip: str) -> None:
    """Open JupyterLab at your copy of CHAPTER (02, gshard, ...; 00 by default).

    Your copies are in work/; missing ones are made first.
    """
    require_packages("jupyterlab", "nbformat", what="dsmoe lab")
    paths.require_writable(paths.WORK)
    wanted = chapter or fresh
    opened = find_chapter(wanted) if wanted else chapters()[0]
    if fresh:
        backup = renew(find_chapter(fresh), paths.WORK)
        click.echo(f"Renewed {fresh}" + (f"; your old copy is {backup.relative_to(paths.FOLDER)}" if backup else ""))
    for line in copy_chapters(paths.NOTEBOOKS, paths.WORK):
        click.echo(line)
    serve(paths.FOLDER, paths.WORK / opened.name, ip=ip, port=port, browser=has_display() and not no_browser)
