"""`dsmoe book`: the chapters as web pages that need no network."""

from pathlib import Path

import click

from dsmoe_lite.common import paths


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder to write.  [default: build/book]")
def command(out: Path | None) -> None:
    """Build the book from the executed chapters. Any warning is an error."""
    paths.require_clone("book")
    from dsmoe_lite.book.build import build

    first = build(paths.REPOSITORY / "book.yml", (out or paths.REPOSITORY / "build" / "book").resolve())
    click.echo(f"The book is in {first}")
