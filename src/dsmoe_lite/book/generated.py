"""Files of the repository that are drawn from its code and its records.

`python -m dsmoe_lite.book.generated` reports which of them are out of date; with `--write` it renews them.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dsmoe_lite.book import architecture, scoreboard, text_results, train_settings
from dsmoe_lite.common.errors import require
from dsmoe_lite.common.files import write_text
from dsmoe_lite.common.paths import IS_CLONE, REPOSITORY
from dsmoe_lite.study import ledger


def stale() -> dict[Path, str]:
    """The files that are out of date, each with the text that it should have."""
    page = architecture.page(architecture.PAGE.read_text(encoding="utf-8"))
    wanted = {
        architecture.PAGE: page,
        architecture.BOOK_PAGE: architecture.book_page(page),
        architecture.PICTURE: architecture.picture(),
        scoreboard.PICTURE: scoreboard.picture(ledger.load()),
        text_results.PAGE: text_results.page(),
        train_settings.PAGE: train_settings.page(),
    }
    return {path: text for path, text in wanted.items() if not _holds(path, text)}


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


def main(arguments: Sequence[str]) -> int:
    """Report the files that are out of date, or renew them; return the exit status."""
    require(IS_CLONE, "repository", str(REPOSITORY), "is no clone: clone the repository to change its files")
    write = list(arguments) == ["--write"]
    found = stale()
    for path, text in found.items():
        if write:
            write_text(path, text)
        print(f"{os.path.relpath(path, REPOSITORY)}: {'written' if write else 'out of date: run `make generate`'}")
    return int(bool(found) and not write)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
