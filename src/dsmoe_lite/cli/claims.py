"""`dsmoe claims`: what the papers claim, and our verdicts."""

from collections import Counter

import click

from dsmoe_lite.cli.tables import json_option, print_rows
from dsmoe_lite.common.errors import RunError


@click.command(help="Recompute every claim in data/claims.yml and print its verdict.")
@click.option(
    "--write", "store", is_flag=True, help="Store the verdicts in data/claims.yml and in the book (for authors)."
)
@json_option
def command(store: bool, as_json: bool) -> None:
    """Exit with status 1 if a stored verdict no longer follows from its data."""
    from dataclasses import asdict

    from dsmoe_lite.book import claims as book_page
    from dsmoe_lite.common import paths
    from dsmoe_lite.common.files import write_text
    from dsmoe_lite.study import equations, ledger

    stored = ledger.load(ledger.PATH)
    settled = ledger.settle(stored)
    if as_json:
        print_rows([asdict(claim) for claim in settled], as_json=True)
    else:
        rows = [{"claim": c.id, "published": c.published, "ours": c.ours, "verdict": c.verdict} for c in settled]
        print_rows(rows, as_json=False, title=f"{len(settled)} claims")
        tally = Counter(claim.verdict for claim in settled)
        click.echo(", ".join(f"{tally[verdict]} {verdict}" for verdict in ledger.VERDICTS if tally[verdict]))
    if store:
        ledger.write(settled, ledger.PATH if paths.IS_CLONE else paths.data_to_write("claims.yml"))
        write_text(book_page.PAGE, book_page.page(settled, equations.load()))
        return
    changed = [new.id for old, new in zip(stored, settled, strict=True) if old != new]
    if changed:
        raise RunError(f"{ledger.PATH}: {', '.join(changed)}: not what is stored; look, then dsmoe claims --write")
