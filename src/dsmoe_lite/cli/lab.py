"""`dsmoe lab`: JupyterLab at the reader's copy of a chapter."""

import click

from dsmoe_lite.common import paths
from dsmoe_lite.labs.chapters import chapters, find_chapter
from dsmoe_lite.labs.jupyter_server import has_display, serve
from dsmoe_lite.labs.reader_copies import copy_chapters, renew


@click.command()
@click.argument("chapter", required=False)
@click.option("--fresh", metavar="NN", help="Renew your copy of chapter NN; the old one is kept as .bak.")
@click.option("--no-browser", is_flag=True, help="Print the address only.")
@click.option("--port", type=int, help="Port to listen on; without it, 8888 or the next free one.")
@click.option("--ip", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in, by the token.")
def command(chapter: str | None, fresh: str | None, no_browser: bool, port: int | None, ip: str) -> None:
    """Open JupyterLab at your copy of CHAPTER (00 without one), made in work/ if it is not there yet."""
    wanted = chapter or fresh
    opened = find_chapter(wanted) if wanted else chapters()[0]
    if fresh:
        kept = renew(find_chapter(fresh), paths.WORK)
        click.echo(f"Renewed {fresh}" + (f"; your old copy is {kept.relative_to(paths.REPOSITORY)}" if kept else ""))
    for line in copy_chapters(paths.NOTEBOOKS, paths.WORK):
        click.echo(line)
    serve(paths.REPOSITORY, paths.WORK / opened.name, ip=ip, port=port, browser=has_display() and not no_browser)
