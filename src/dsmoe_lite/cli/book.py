"""`dsmoe book`: the chapters as pages that open without a network."""

from pathlib import Path

import click

from dsmoe_lite.common import paths


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder to write; build/book without it.")
def command(out: Path | None) -> None:
    """Build the book from the executed chapters; any warning is an error."""
    from dsmoe_lite.book.build import build

    first = build(paths.REPOSITORY / "book.yml", (out or paths.REPOSITORY / "build" / "book").resolve())
    click.echo(f"The book is in {first}")
