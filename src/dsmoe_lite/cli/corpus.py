"""`dsmoe corpus`: make a corpus of real text."""

from pathlib import Path

import click

from dsmoe_lite.cli.tables import json_option, print_rows


@click.command(
    help="Make the corpus NAME, which is debian: seven domains from packages of Debian, fetched with apt-get. "
    "Nothing is installed, and root is not needed."
)
@click.argument("name", type=click.Choice(["debian"]))
@click.option("--out", type=click.Path(path_type=Path), help="Folder to make.  [default: debian in the cache]")
@click.option(
    "--packages",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with the .deb files of the packages, to fetch nothing.",
)
@json_option
def command(name: str, out: Path | None, packages: Path | None, as_json: bool) -> None:
    """Make the corpus, then list its domains."""
    from dsmoe_lite.data.debian import Debian, default_folder, make_debian

    folder = out or default_folder()
    make_debian(folder, packages)
    facts = Debian(folder).fingerprint()
    rows = [
        {"domain": path.name, "files": len(sizes), "bytes": sum(sizes)}
        for path in sorted(folder.iterdir())
        if path.is_dir()
        for sizes in [[file.stat().st_size for file in path.iterdir()]]
    ]
    print_rows(rows, as_json=as_json, title=f"{folder}, sha256 {facts['sha256']}")
