"""CSV files that an instructor writes."""

import csv
from pathlib import Path

from dsmoe_lite.common.errors import InputError


def read_csv(path: Path) -> list[tuple[int, list[str]]]:
    """The rows that are not empty, each with the number of its last line. Raises InputError naming the file."""
    try:
        with path.expanduser().open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            return [(reader.line_num, [entry.strip() for entry in row]) for row in reader if any(map(str.strip, row))]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is no CSV file in UTF-8; save it as CSV UTF-8 ({type(error).__name__})") from None
