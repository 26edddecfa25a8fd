"""The tables of a page of text, for tests that compare them with the code."""

from collections.abc import Iterator


def rows_below(page: str, heading: str) -> Iterator[list[str]]:
    """The cells of each row below the table head that begins with this cell."""
    lines = page.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]
